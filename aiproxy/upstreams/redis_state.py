"""What processes on one or many machines know in common, in Redis or Valkey.

Each process decides by its own view of a circuit and tells what changed it; `circuit.lua` makes one truth
of that, and tells it to all. Two threads do the talking: one sends changes and looks at the whole once a
second, the other listens. A request waits for an answer only where it matters, after a failure and before
a trial, and briefly. Where the server is out of reach each process goes on by its own view.
"""

import contextlib
import itertools
import logging
import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..config import StateUrl
from ..observability import logs
from .breaker import Change, Event, Pass, Permit, View
from .message_threads import LIFETIME
from .shared_state import Answers, Replies, Sharing

#: Seconds between two looks at the whole, and between two tries to reach the server.
LOOK = 1.0
#: Seconds for which the server may be silent before it counts as out of reach.
SILENCE = 0.5
#: Seconds that a trial may run without a word of its process, which looks more often.
LEASE = 5.0
#: Seconds that a request waits for the count of failures, and for leave to make a trial or a thread's owner.
COUNT_WAIT, LEAVE_WAIT = 0.02, 0.04
#: Seconds that it waits in all: less than a tenth.
PATIENCE = 0.08
#: Seconds without waiting for the server, after it let somebody wait for leave in vain.
DOUBT = 1.0
#: Seconds until a process that may not make its trial asks again.
_AGAIN = 0.1
#: Seconds after which the thread that listens looks whether it is to stop.
_LISTEN = 0.25
#: Seconds of silence after which it asks whether the server is there; after twice as many it is not.
_PING = 5.0
#: Seconds that a question to all processes may take.
_ASKED = 0.5

_PREFIX = "aiproxy:"
_WORKERS = f"{_PREFIX}workers"
_SCRIPT = (Path(__file__).parent / "circuit.lua").read_text()
_LONGEST_ID = 200


class _Seen(msgspec.Struct, frozen=True, array_like=True):
    """circuit.lua's view: milliseconds."""

    version: int
    failures: int
    is_open: int
    open_for: int
    backoff_for: int
    drained: int
    trial: str
    trial_for: int
    granted: int

    def view(self, *own_trials: str) -> View:
        """As a breaker takes it."""
        elsewhere = self.trial_for if self.trial not in own_trials else 0
        open_for = self.open_for / 1000 if self.is_open else None
        return View(self.failures, open_for, self.backoff_for / 1000, elsewhere / 1000)


class _Name(msgspec.Struct, frozen=True):
    """A process, among all."""

    server: str
    master: int  # process ids
    worker: int
    mark: str  # process ids come again

    @classmethod
    def of(cls, spelt: str) -> "_Name | None":
        """None where no process spelt it."""
        parts = spelt.split("|")
        if len(parts) != 4 or not (parts[1].isdecimal() and parts[2].isdecimal()):
            return None
        return cls(parts[0], int(parts[1]), int(parts[2]), parts[3])

    @property
    def spelt(self) -> str:
        """For the server."""
        return f"{self.server}|{self.master}|{self.worker}|{self.mark}"

    def __str__(self) -> str:
        """For people."""
        return f"{self.server}, worker {self.worker}"


class _Told(msgspec.Struct):
    """A message to all processes: of a circuit, or a question."""

    id: str = ""
    view: _Seen | None = None
    ask: str = ""
    to: str = ""  # the list for the answers
    who: list[str] = []


class _Order:
    """Commands for the server that are sent together; what is to be done with their replies, or without."""

    def __init__(
        self,
        commands: Sequence[tuple[Any, ...]],
        done: Callable[[list[Any]], None] = lambda replies: None,
        dropped: Callable[[], None] = lambda: None,
    ) -> None:
        self.commands = commands
        self.done = done
        self.dropped = dropped


class RedisState:
    """See `State`. Nothing but its own two threads ever waits for the network."""

    is_shared = True

    def __init__(self, settings: StateUrl, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: monotonic seconds."""
        self._name = _Name("", 0, 0, "")
        self.name = ""
        self._password = settings.password
        self.clock = clock
        self._client, self._listener = _client(settings.url), _client(settings.url)
        database = self._client.get_connection_kwargs().get("db") or 0
        self._channel = f"{_PREFIX}{database}:changes"  # channels belong to no database
        self._sha = ""
        self._circuits: dict[str, _Circuit] = {}
        self._answers: Answers = {}
        self._numbers = itertools.count(1)
        self._talking: threading.Thread | None = None
        self._stopped = threading.Event()
        self._turn = threading.Condition()
        self._orders: deque[_Order] = deque()
        self._joined = False
        self._losses = 0  # of the server
        self._problem: str | None = "not reached yet"
        self._doubted_until = 0.0
        self._waited = threading.local()  # since when and for how long this thread has waited
        self._looked = 0.0
        self._is_known = threading.Event()  # how circuits are, or that nobody can say
        self._deaf: str | None = None  # why nothing is heard of others

    # --- For the service ---

    def share(self, upstreams: Sequence[Sharing]) -> None:
        """See `State`."""
        circuits: dict[str, _Circuit] = {}
        left = dict(self._circuits)
        for upstream in upstreams:
            circuit = left.pop(upstream.id, None) or _Circuit(self, upstream)
            circuits[upstream.id] = circuit
            circuit.belong_to(upstream)
        self._circuits = circuits
        for circuit in left.values():
            circuit.be_left()
        with self._turn:
            self._looked = 0.0  # a new one may have failed elsewhere
            self._turn.notify()

    def start(self, server: str, answers: Answers) -> None:
        """See `State`."""
        self._name = _Name(server, os.getppid(), os.getpid(), secrets.token_hex(4))
        self.name = self._name.spelt
        self._answers = answers
        self._talking = threading.Thread(target=self._talk, name="state", daemon=True)
        self._talking.start()
        threading.Thread(target=self._listen, name="state, listening", daemon=True).start()
        self._is_known.wait(PATIENCE)  # requests that come now are to know of open circuits

    def stop(self) -> None:
        """See `State`."""
        self._stopped.set()
        with self._turn:
            self._turn.notify()
        if self._talking is not None:
            self._talking.join(2 * SILENCE)

    def remember(self, message_id: str, upstream: str) -> None:
        """See `State`. Waits, since the client may continue the thread at once, by another process."""
        key = _owner_key(message_id)
        self._replies(("SET", key, upstream, "PX", int(LIFETIME * 1000)), limit=COUNT_WAIT)

    def owner(self, message_id: str) -> str | None:
        """See `State`."""
        replies = self._replies(("GET", _owner_key(message_id)), limit=LEAVE_WAIT)
        return replies[0] if replies else None

    def ask(self, question: str, once_a_server: bool = False) -> Replies:
        """See `State`. Takes half a second where somebody is silent."""
        found = self._replies(("ZRANGE", _WORKERS, 0, -1))
        if found is None:
            return Replies(problem=self._problem or "the server does not answer")
        others = {name: _Name.of(name) for name in found[0] if _Name.of(name) is not None}
        if once_a_server:
            last = {(each.server, each.master): name for name, each in others.items() if each}
            last.pop((self._name.server, self._name.master), None)
            others = {name: others[name] for name in last.values()}
        others.pop(self.name, None)
        answers = self._asked(question, list(others)) if others else {}
        heard = {str(each): answers.get(name, "").encode() for name, each in others.items()}
        return Replies(heard, problem=self._deaf)

    def _asked(self, question: str, others: list[str]) -> dict[str, str]:
        """The answers by who gave them."""
        to = f"{_PREFIX}answers:{secrets.token_hex(8)}"
        told = msgspec.json.encode(_Told(ask=question, to=to, who=others))
        ends = time.monotonic() + _ASKED
        count = self._replies(("PUBLISH", self._channel, told))
        while count is not None and time.monotonic() < ends:
            count = self._replies(("LLEN", to))
            if count is not None and count[0] >= len(others):
                break
            self._stopped.wait(0.01)
        given = self._replies(("LRANGE", to, 0, -1), ("DEL", to))
        return dict(each.partition("\n")[::2] for each in given[0]) if given else {}

    # --- For circuits ---

    def token(self) -> str:
        """What a trial is known by, everywhere."""
        return f"{self.name}|{next(self._numbers)}"

    def change(self, circuit: "_Circuit", what: str, *figures: Any) -> tuple[Any, ...]:
        """The command for circuit.lua."""
        return ("EVALSHA", self._sha, 1, circuit.key, what, *figures, circuit.id, self._channel)

    def put(self, order: _Order) -> bool:
        """Have it carried out; False where the server is out of reach."""
        with self._turn:
            if not self._joined:
                return False
            self._orders.append(order)
            self._turn.notify()
            return True

    @property
    def is_doubted(self) -> bool:
        """Whether somebody has just waited in vain: nobody else is to."""
        return self.clock() < self._doubted_until

    def wait(self, answer: "Future[Any]", limit: float) -> Any:
        """The answer. Raises `TimeoutError` after `limit` seconds, or where the request has waited enough."""
        began = self.clock()
        since, waited = getattr(self._waited, "by", (began, 0.0))
        if began - since > DOUBT:  # another request, or a long one
            since, waited = began, 0.0
        patience = 0.0 if self.is_doubted else min(limit, PATIENCE - waited)
        try:
            return answer.result(max(0.0, patience))
        except TimeoutError:
            if patience >= LEAVE_WAIT:
                self._doubted_until = self.clock() + DOUBT
            raise
        finally:
            self._waited.by = since, waited + self.clock() - began

    def _replies(self, *commands: tuple[Any, ...], limit: float = 0.0) -> list[Any] | None:
        """The server's, None where they do not come in time; a request's `limit` is in seconds."""
        answer: Future[list[Any] | None] = Future()
        if not self.put(_Order(commands, answer.set_result, lambda: answer.set_result(None))):
            return None
        with contextlib.suppress(TimeoutError):
            return self.wait(answer, limit) if limit else answer.result(_ASKED)
        return None

    # --- The thread that talks ---

    def _talk(self) -> None:
        while not self._stopped.is_set():
            try:
                if not self._joined:
                    self._join()
                self._carry_out(self._taken())
                if time.monotonic() >= self._looked + LOOK:
                    self._look()
            except (redis.RedisError, OSError) as error:
                self._leave(error)
            except Exception:
                logs.exception("bug", thread="state")
                self._leave(None)
        with contextlib.suppress(redis.RedisError, OSError):
            if self._joined:
                self._carry_out([*self._taken(waits=False), _Order([("ZREM", _WORKERS, self.name)])])
            self._client.close()

    def _join(self) -> None:
        self._sha = self._client.script_load(_SCRIPT)
        with self._turn:
            self._joined = True
        for circuit in list(self._circuits.values()):
            circuit.rejoin()
        self._look()
        self._is_known.set()
        self._problem = None
        logs.line(logging.INFO, "state", result="joined")

    def _leave(self, error: Exception | None) -> None:
        """Out of reach: from now on everybody goes by the own view."""
        self._losses += 1
        self._is_known.set()
        with self._turn:
            self._joined = False
            orders, self._orders = self._orders, deque()
        for order in orders:
            order.dropped()
        reason = self._reason(error)
        if self._problem is None or self._problem == "not reached yet":
            told = "each process goes on by itself"
            logs.line(logging.WARNING, "state", result="away", reason=reason, text=told)
        self._problem = reason
        self._client.connection_pool.disconnect()
        self._stopped.wait(LOOK)

    def _reason(self, error: Exception | None) -> str:
        """In the server's words, without its password."""
        reason = " ".join(str(error or "bug").split())[:200]
        password = re.escape(self._password or "")
        return re.sub(rf"(?<!\w){password}(?!\w)", "...", reason) if password else reason

    def _taken(self, waits: bool = True) -> list[_Order]:
        """What is to be sent; waits for it until the next look is due."""
        with self._turn:
            while waits and not self._orders and not self._stopped.is_set():
                seconds = self._looked + LOOK - time.monotonic()
                if seconds <= 0:
                    break
                self._turn.wait(seconds)
            taken = list(self._orders)
            self._orders.clear()
            return taken

    def _carry_out(self, orders: list[_Order]) -> None:
        """Send them all together. Raises the server's first error after all replies are handled."""
        if not orders:
            return
        left = deque(orders)
        try:
            pipe = self._client.pipeline(transaction=False)
            for order in orders:
                for command in order.commands:
                    pipe.execute_command(*command)  # type: ignore[no-untyped-call]
            replies = iter(pipe.execute(raise_on_error=False))
            failed: Exception | None = None
            while left:
                answers = [next(replies) for _ in left[0].commands]
                errors = [each for each in answers if isinstance(each, Exception)]
                # What this user may not do is no reason to leave: the rest may be allowed.
                grave = (each for each in errors if not isinstance(each, redis.exceptions.NoPermissionError))
                failed = failed or next(grave, None)
                order = left.popleft()
                order.dropped() if errors else order.done(answers)
            if failed is not None:
                raise failed
        finally:
            for order in left:
                order.dropped()

    def _look(self) -> None:
        """How is everything? The net for what was not heard, and the sign that this process is there."""
        self._looked = time.monotonic()
        circuits = list(self._circuits.values())
        keys = [circuit.key for circuit in circuits]
        found = self._client.evalsha(self._sha, len(keys) + 1, *keys, _WORKERS, "look", self.name)
        for circuit, seen in zip(circuits, found, strict=True):
            circuit.looked(msgspec.convert(seen, _Seen))

    # --- The thread that listens ---

    def _listen(self) -> None:
        refused = 0  # in a row
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                options = {"ignore_subscribe_messages": True}
                with self._listener.pubsub(**options) as subscription:  # type: ignore[no-untyped-call]
                    subscription.subscribe(self._channel)
                    self._listen_to(subscription)
            except (redis.RedisError, OSError) as error:
                refused = refused + 1 if time.monotonic() < began + LOOK else 1
                if refused > 1:  # the other thread has noticed by now, if the server is gone
                    self._be_deaf(self._reason(error))
                self._stopped.wait(LOOK)
            except Exception:
                logs.exception("bug", thread="state")
                self._stopped.wait(LOOK)

    def _be_deaf(self, reason: str) -> None:
        """Say so once, where the server is in reach all the same; otherwise the other thread says why."""
        if self._joined and self._deaf is None:
            self._deaf = reason
            told = "changes by other processes arrive a second late, and status and metrics lack them"
            logs.line(logging.WARNING, "state", result="deaf", reason=reason, text=told)

    def _listen_to(self, subscription: Any) -> None:
        """As long as there is somebody: a connection that was cut off without a word is only silent."""
        losses = self._losses
        heard = asked = time.monotonic()
        while losses == self._losses and not self._stopped.is_set():
            message = subscription.get_message(timeout=_LISTEN)
            now = time.monotonic()
            if message is not None:
                heard, self._deaf = now, None
                if message["type"] == "message":
                    self._heard(message["data"])
            elif now > heard + 2 * _PING:
                return
            elif now > max(heard, asked) + _PING:
                asked = now
                subscription.ping()

    def _heard(self, data: str) -> None:
        try:
            told = msgspec.json.decode(data, type=_Told)
        except msgspec.DecodeError:
            return  # of another version; the next look tells what matters
        if told.view is not None:
            circuit = self._circuits.get(told.id)
            if circuit is not None:
                circuit.heard(told.view)
        elif self.name in told.who and told.ask in self._answers:
            answer = f"{self.name}\n{self._answers[told.ask]().decode()}"
            self.put(_Order([("RPUSH", told.to, answer), ("PEXPIRE", told.to, 10_000)]))


class _Circuit:
    """One upstream's, shared. While changes of this process are on their way it takes over nothing else."""

    def __init__(self, state: RedisState, upstream: Sharing) -> None:
        self.id = upstream.id
        self.key = f"{_PREFIX}circuit:{self.id}"
        self._state = state
        self._upstream = upstream
        self._lock = threading.Lock()
        self._pending = 0
        self._version = 0
        self._trial = ""  # this process's own
        self._held = ("", 0.0)  # leave for one that nobody waited for any longer, and until when it is good
        # What was done by hand and the server may not have heard of, though it is true for all.
        self._is_closed = False
        self._is_drained: bool | None = None

    def belong_to(self, upstream: Sharing) -> None:
        """From now on it is this one's; an upstream that was taken out by hand is back in after a reload."""
        old, self._upstream = self._upstream, upstream
        upstream.shared = self
        if old.draining and not upstream.draining:
            self.drain(False)
        if upstream.breaker.view() != View():
            self._send("limited", _ms(upstream.breaker.cooldown))

    def be_left(self) -> None:
        """The upstream is none of this process's any more; where it comes back it is in use."""
        if self._upstream.draining:
            self.drain(False)

    # --- See `Shared` ---

    def may_try(self, permit: Permit) -> bool:
        """See `Shared`. By the own view where the server is out of reach."""
        token = self._leave()
        if token is None:
            self._upstream.breaker.defer(permit, _AGAIN)
            return False
        with self._lock:
            self._trial, self._held = token, ("", 0.0)
        return True

    def _leave(self) -> str | None:
        """The token of a trial that may be made; leave that came too late for one request is for the next."""
        token, ends = self._held
        if token and self._state.clock() < ends:
            return token
        token, answer = self._state.token(), Future[_Seen | None]()
        if not self._send("trial", token, _ms(LEASE), answer=answer):
            return token
        try:
            seen = self._state.wait(answer, LEAVE_WAIT)
        except TimeoutError:
            if answer.cancel():
                return None
            seen = answer.result()
        return token if seen is None or seen.granted else None

    def report(self, change: Change, permit: Permit | None = None) -> None:
        """See `Shared`."""
        breaker = self._upstream.breaker
        with self._lock:
            trial = self._trial
            if permit is None or permit.kind is Pass.TRIAL:
                self._trial, self._held = "", ("", 0.0)
        if change.event is Event.CLOSED:
            self._close()
        elif change.event is Event.BACKED_OFF:
            self._send("backed_off", trial, _ms(change.seconds))
        elif change.event is Event.RECOVERED:
            self._send("recovered")
        elif change.event is Event.RETURNED:
            self._send("returned", trial)
        elif permit is not None and permit.kind is Pass.TRIAL:
            self._send("reopened", trial, _ms(breaker.cooldown))
        else:
            counted: Future[_Seen | None] = Future()
            if self._send("failed", breaker.threshold, _ms(breaker.cooldown), answer=counted):
                with contextlib.suppress(TimeoutError):
                    self._state.wait(counted, COUNT_WAIT)

    def drain(self, draining: bool) -> None:
        """See `Shared`."""

        def lost() -> None:
            self._is_drained = draining

        self._send("drained", int(draining), lost=lost)

    def _close(self) -> None:
        def lost() -> None:
            self._is_closed = True

        self._send("closed", lost=lost)

    # --- For the state's own threads ---

    def rejoin(self) -> None:
        """The server is in reach again: what it says counts, but for what was done here by hand."""
        with self._lock:
            self._version = 0
        is_closed, self._is_closed = self._is_closed, False
        is_drained, self._is_drained = self._is_drained, None
        if is_closed or is_drained is not None:
            self._restore()  # first of all, lest an empty server hears how it was from another process
        if is_closed:
            self._close()
        if is_drained is not None:
            self.drain(is_drained)

    def looked(self, seen: _Seen) -> None:
        """What the look at the whole found."""
        if seen.version:
            self._follow(seen)
            with self._lock:
                if seen.trial != self._trial:  # it is over, or was given away
                    self._trial = ""
                trial = self._trial
            if trial:
                self._send("renewed", trial, _ms(LEASE))
            return
        if self._upstream.draining or self._upstream.breaker.view() != View():
            self._restore()

    def _restore(self) -> None:
        """Tell a server that was restarted empty; any other knows better."""
        view = self._upstream.breaker.view()
        open_for = -1 if view.open_for is None else _ms(view.open_for)
        self._send("restored", view.failures, open_for, _ms(view.backoff_for), int(self._upstream.draining))

    def heard(self, seen: _Seen) -> None:
        """What another process, or this one, made of it."""
        self._follow(seen)

    def _send(
        self,
        what: str,
        *figures: Any,
        answer: "Future[_Seen | None] | None" = None,
        lost: Callable[[], None] = lambda: None,
    ) -> bool:
        """Tell a change, False where the server is out of reach.

        `answer` gets what became of it, None if that cannot be known; `lost` is called if it may not have
        been heard.
        """

        def done(replies: list[Any]) -> None:
            seen = msgspec.convert(replies[0][0], _Seen)
            if seen.granted:
                self._held = (figures[0], self._state.clock() + LEASE / 2)
            self._follow(seen, is_answer=True)
            if answer is not None:
                _settle(answer, seen)

        def dropped() -> None:
            with self._lock:
                self._pending -= 1
            lost()
            if answer is not None:
                _settle(answer, None)

        with self._lock:
            self._pending += 1
        if self._state.put(_Order([self._state.change(self, what, *figures)], done, dropped)):
            return True
        with self._lock:
            self._pending -= 1
        lost()
        return False

    def _follow(self, seen: _Seen, is_answer: bool = False) -> None:
        """Take it over, if it is later than what is known."""
        upstream = self._upstream
        with self._lock:
            self._pending -= is_answer
            if self._pending or seen.version < self._version + (not is_answer) or not seen.version:
                return
            self._version = seen.version
            change = upstream.breaker.follow(seen.view(self._trial, self._held[0]))
            was_draining, upstream.draining = upstream.draining, bool(seen.drained)
        if change is not None:
            logs.circuit(upstream.name, change.event, change.seconds, by="another process")
        if was_draining != upstream.draining:
            action = "drain" if upstream.draining else "resume"
            logs.line(logging.WARNING, "status", upstream=upstream.name, action=action, by="another process")


def _client(url: str) -> "redis.Redis":
    """One try for each command, and no more patience than `SILENCE`."""
    keepalive = {} if url.lower().startswith("unix:") else {"socket_keepalive": True}
    return redis.Redis.from_url(
        url,
        socket_timeout=SILENCE,
        socket_connect_timeout=SILENCE,
        health_check_interval=0,  # of a subscription it would not notice that nobody answers
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        decode_responses=True,
        **keepalive,
    )


def _settle(answer: "Future[_Seen | None]", seen: _Seen | None) -> None:
    """Give the answer to whoever still waits for it."""
    if answer.set_running_or_notify_cancel():
        answer.set_result(seen)


def _owner_key(message_id: str) -> bytes:
    """Whatever an upstream or a client calls a message: also half a surrogate pair."""
    return f"{_PREFIX}owner:{message_id[:_LONGEST_ID]}".encode(errors="backslashreplace")


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
