"""Circuit breaker of one upstream: counters and states under a thread lock, the clock passed in, no I/O.

Closed: attempts pass. Open: after `failures` failures in a row, for `cooldown` seconds. Half-open:
after that, one trial at a time decides. Beside it the whole upstream may be in backoff until a given time.
Each attempt has a `Permit`, which is settled exactly once. A permit carries the breaker's generation, so a
result from before the last opening or closing changes nothing. Methods return what changed; callers log it
and send it to other processes, because nothing may be logged or sent under the lock.
"""

import threading
from collections.abc import Callable
from enum import Enum, StrEnum

import msgspec


class CircuitState(StrEnum):
    """How a circuit is; the words of the log, the metrics and the status page."""

    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"
    BACKOFF = "backoff"  # the upstream asked for a pause


class Pass(Enum):
    """Why an attempt was let through."""

    ORDINARY = "ordinary"
    TRIAL = "trial"  # the one attempt that decides a half-open circuit
    LAST_RESORT = "last_resort"  # past an open circuit, since nothing else is left


class Permit(msgspec.Struct, frozen=True):
    """Permission to make one attempt, to be settled exactly once."""

    kind: Pass
    generation: int
    began: int  # counts attempts and failures in the order in which they came


class Outcome(Enum):
    """How an attempt ended, as far as the breaker cares."""

    SUCCESS = "success"
    FAILURE = "failure"
    TIMEOUT = "timeout"  # a failure, unless another attempt succeeded while this one ran
    IGNORED = "ignored"  # the client left, or the failure is not about the upstream


class Event(StrEnum):
    """What happened to a circuit."""

    OPENED = "open"
    CLOSED = "closed"
    BACKED_OFF = "backoff"
    FAILED = "failed"  # a failure was counted
    RECOVERED = "recovered"  # the count is zero again
    RETURNED = "returned"  # a trial was given back undecided


class Change(msgspec.Struct, frozen=True):
    """What a result changed."""

    event: Event
    seconds: float = 0.0  # until the upstream is tried again

    @property
    def is_news(self) -> bool:
        """Whether it is logged; the other events are for other processes only."""
        return self.event in (Event.OPENED, Event.CLOSED, Event.BACKED_OFF)


class Circuit(msgspec.Struct, frozen=True):
    """How a circuit is at one moment."""

    state: CircuitState
    seconds: float = 0.0  # until the upstream is tried again
    failures: int = 0  # in a row


class View(msgspec.Struct, frozen=True):
    """A circuit as other processes know it; in seconds from now, since clocks differ."""

    failures: int = 0
    open_for: float | None = None  # None: closed; 0: half-open
    backoff_for: float = 0.0
    trial_for: float = 0.0  # another process's trial runs, for at most so long


class Breaker:
    """Thread-safe; every method is arithmetic only and returns at once."""

    def __init__(self, failures: int, cooldown: float, clock: Callable[[], float]) -> None:
        """`failures` in a row open it for `cooldown` seconds of `clock`, a monotonic one."""
        self.threshold = failures
        self.cooldown = cooldown
        self.clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._sequence = 0
        self._latest_failure = 0
        self._latest_success = 0
        self._generation = 0
        self._open_until: float | None = None
        self._backoff_until = 0.0
        self._trial_running = False
        self._trial_elsewhere_until = 0.0

    def usable(self) -> bool:
        """Whether `acquire` would let an attempt through."""
        with self._lock:
            return self._usable()

    def due(self) -> float:
        """The clock's time from which the upstream may be tried again; past where it is usable."""
        with self._lock:
            return max(self._open_until or 0.0, self._backoff_until)

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open or half-open; a backoff is neither."""
        return self._open_until is not None

    def circuit(self) -> Circuit:
        """How it is now, for people and for monitors."""
        with self._lock:
            now = self.clock()
            open_for = (self._open_until or now) - now
            backoff_for = self._backoff_until - now
            if open_for > 0:
                return Circuit(CircuitState.OPEN, max(open_for, backoff_for), self._failures)
            if backoff_for > 0:
                return Circuit(CircuitState.BACKOFF, backoff_for, self._failures)
            state = CircuitState.CLOSED if self._open_until is None else CircuitState.HALF_OPEN
            return Circuit(state, 0.0, self._failures)

    def view(self) -> View:
        """What another process is to know; its own trial is not in it."""
        with self._lock:
            now = self.clock()
            return View(
                failures=self._failures,
                open_for=None if self._open_until is None else max(0.0, self._open_until - now),
                backoff_for=max(0.0, self._backoff_until - now),
            )

    def follow(self, view: View) -> Change | None:
        """Take over what all processes together know. What this one knew besides is forgotten."""
        with self._lock:
            now = self.clock()
            was_open, was_in_backoff = self._open_until is not None, now < self._backoff_until
            is_open, is_in_backoff = view.open_for is not None, view.backoff_for > 0
            if was_open != is_open:
                self._generation += 1
                self._trial_running = False
            if view.failures > self._failures:
                self._sequence += 1
                self._latest_failure = self._sequence
            self._failures = view.failures
            self._open_until = None if view.open_for is None else now + min(view.open_for, self.cooldown)
            self._backoff_until = now + min(view.backoff_for, self.cooldown)
            self._trial_elsewhere_until = now + view.trial_for
            if is_open != was_open:
                return Change(Event.OPENED, view.open_for or 0.0) if is_open else Change(Event.CLOSED)
            return (
                Change(Event.BACKED_OFF, view.backoff_for) if is_in_backoff and not was_in_backoff else None
            )

    def reach(self, failures: int) -> Change | None:
        """All workers together have counted so many failures: open the circuit where that is enough."""
        with self._lock:
            self._failures = max(self._failures, failures)
            if self._open_until is not None or self._failures < self.threshold:
                return None
            return self._open()

    def defer(self, permit: Permit, seconds: float) -> None:
        """Give a trial back that another process has; none begins here for `seconds`."""
        with self._lock:
            self._settle(permit, Outcome.IGNORED)
            self._trial_elsewhere_until = max(self._trial_elsewhere_until, self.clock() + seconds)

    def close(self) -> Change | None:
        """Close the circuit by hand, and end a backoff; what is under way decides nothing any more."""
        with self._lock:
            return self._close()

    def configure(self, failures: int, cooldown: float) -> None:
        """Take new settings; nothing stays open, or in backoff, for longer than the new cooldown from now."""
        with self._lock:
            self.threshold = failures
            self.cooldown = cooldown
            latest = self.clock() + cooldown
            self._backoff_until = min(self._backoff_until, latest)
            if self._open_until is not None:
                self._open_until = min(self._open_until, latest)

    def acquire(self) -> Permit | None:
        """Permission for an attempt: ordinary, or the trial of a half-open circuit; else None."""
        with self._lock:
            if not self._usable():
                return None
            if self._open_until is None:
                return self._permit(Pass.ORDINARY)
            self._trial_running = True
            return self._permit(Pass.TRIAL)

    def acquire_last_resort(self) -> Permit:
        """Permission in any state: success closes the circuit, failure changes nothing."""
        with self._lock:
            return self._permit(Pass.LAST_RESORT)

    def commit(self, permit: Permit) -> tuple[Permit, Change | None]:
        """Take the commit point as a trial's success, and exchange it for an ordinary permit.

        So a long stream never blocks recovery, and its later break still counts as one failure. An
        ordinary permit is given back as it is: a stream is a success when it ends well.
        """
        with self._lock:
            if permit.kind is Pass.ORDINARY or permit.generation != self._generation:
                return permit, None
            change = self._settle(permit, Outcome.SUCCESS)
            return self._permit(Pass.ORDINARY), change

    def settle(self, permit: Permit, outcome: Outcome) -> Change | None:
        """Give a permit back with what became of it."""
        with self._lock:
            return self._settle(permit, outcome)

    def back_off(self, permit: Permit, seconds: float) -> Change | None:
        """Give a permit back; the upstream is not asked for `seconds`, at most for the cooldown.

        Of several deadlines the latest holds.
        """
        with self._lock:
            current = permit.generation == self._generation
            returned = self._settle(permit, Outcome.IGNORED)
            seconds = min(seconds, self.cooldown)
            until = self.clock() + seconds
            if permit.kind is Pass.LAST_RESORT or not current or until <= self._backoff_until:
                return returned
            self._backoff_until = until
            return Change(Event.BACKED_OFF, seconds) if seconds else returned

    def _usable(self) -> bool:
        now = self.clock()
        if now < self._backoff_until:
            return False
        if self._open_until is None:
            return True
        return now >= max(self._open_until, self._trial_elsewhere_until) and not self._trial_running

    def _permit(self, kind: Pass) -> Permit:
        self._sequence += 1
        return Permit(kind=kind, generation=self._generation, began=self._sequence)

    def _settle(self, permit: Permit, outcome: Outcome) -> Change | None:
        if permit.generation != self._generation:
            return None
        if permit.kind is Pass.TRIAL:
            self._trial_running = False
        if outcome is Outcome.TIMEOUT:
            outcome = Outcome.IGNORED if permit.began < self._latest_success else Outcome.FAILURE
        if outcome is Outcome.FAILURE and permit.kind is not Pass.LAST_RESORT:
            return self._failed(permit)
        if outcome is Outcome.SUCCESS:
            return self._succeeded(permit)
        return Change(Event.RETURNED) if permit.kind is Pass.TRIAL else None

    def _failed(self, permit: Permit) -> Change | None:
        self._sequence += 1
        self._latest_failure = self._sequence
        self._failures += 1
        if permit.kind is Pass.ORDINARY and self._failures < self.threshold:
            return Change(Event.FAILED)
        return self._open()

    def _open(self) -> Change:
        self._generation += 1
        self._open_until = self.clock() + self.cooldown
        return Change(Event.OPENED, self.cooldown)

    def _succeeded(self, permit: Permit) -> Change | None:
        self._sequence += 1
        self._latest_success = self._sequence
        if permit.kind is not Pass.ORDINARY:
            return self._close()
        if not self._failures or permit.began < self._latest_failure:
            return None
        self._failures = 0
        return Change(Event.RECOVERED)

    def _close(self) -> Change | None:
        was_open = self._open_until is not None or self.clock() < self._backoff_until
        self._generation += 1
        self._failures = 0
        self._open_until = None
        self._backoff_until = 0.0
        self._trial_running = False
        self._trial_elsewhere_until = 0.0
        return Change(Event.CLOSED) if was_open else None
