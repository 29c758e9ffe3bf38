"""Who is next: smooth weighted round robin over the upstreams that serve a model and are usable.

A request may prefer some upstreams, in an order of its own (a session's); it then moves no cursor.

The cursor is one number an upstream, under a thread lock; breakers' locks are taken inside it, never
the other way round. A walk serves one request: it gives each upstream at most once, together with
its permit, and hands back the turn of an upstream that gave no answer, so that the upstreams which
do answer share the requests exactly by weight.
"""

import threading
from collections.abc import Mapping, Sequence

from ..observability import logs
from .breaker import Change, Outcome, Pass, Permit
from .upstream import Upstream


class Choice:
    """The next upstream, and leave for one attempt at it, which whoever takes it settles.

    Only the first settlement counts, so every way out of an attempt may settle. Without a permit the
    attempt concerns no circuit breaker. What changes a circuit is logged, and told to other processes, here,
    outside its lock.
    """

    def __init__(self, upstream: Upstream, permit: Permit | None = None) -> None:
        self.upstream = upstream
        self.kind = None if permit is None else permit.kind
        self._permit = permit
        if permit is not None and permit.kind is not Pass.ORDINARY:
            logs.circuit(upstream.name, permit.kind.value)

    def settle(self, outcome: Outcome) -> None:
        """Give the permit back with what became of it."""
        permit, self._permit = self._permit, None
        if permit is not None:
            self._tell(permit, self.upstream.breaker.settle(permit, outcome))

    def rest(self, seconds: float) -> None:
        """Give the permit back and let the upstream rest."""
        permit, self._permit = self._permit, None
        if permit is not None:
            self._tell(permit, self.upstream.breaker.rest(permit, seconds))

    def commit(self) -> None:
        """The answer is committed: see `Breaker.commit`."""
        if self._permit is not None:
            permit = self._permit
            self._permit, change = self.upstream.breaker.commit(permit)
            self._tell(permit, change)

    def _tell(self, permit: Permit, change: Change | None) -> None:
        if change is None:
            return
        if change.is_news:
            logs.circuit(self.upstream.name, change.state, change.seconds)
        self.upstream.shared.tell(change, permit)


class Balancer:
    """Thread-safe."""

    def __init__(self, upstreams: Sequence[Upstream], cursor: Mapping[str, int] | None = None) -> None:
        """`cursor`: where another balancer's was, for the upstreams that had the same names."""
        self.upstreams = tuple(upstreams)
        self._lock = threading.Lock()
        # Within what the weights can bring about: after a great change of weights it would last too long.
        bound = sum(upstream.weight for upstream in self.upstreams)
        was = cursor or {}
        self._current = {each: max(-bound, min(bound, was.get(each.name, 0))) for each in self.upstreams}

    @property
    def cursor(self) -> dict[str, int]:
        """Where the round robin is: each upstream's number by its name."""
        with self._lock:
            return {upstream.name: current for upstream, current in self._current.items()}

    def serving(self, model: str) -> list[Upstream]:
        """The upstreams that a request for `model` may go to, those that are being drained included."""
        return [upstream for upstream in self.upstreams if upstream.serves(model)]

    def candidates(self, among: Sequence[Upstream], preferred: Sequence[Upstream] = ()) -> "Walk":
        """The way of one request through `among`: the usable ones of `preferred` first, in that order."""
        return Walk(self, list(among), preferred)

    def turn(self, among: Sequence[Upstream]) -> tuple[Upstream, Permit, dict[Upstream, int]] | None:
        """One step of nginx's smooth weighted round robin; also what it moved, for `give_back`.

        Each gains its weight, the one that is furthest ahead is chosen and pays the sum:
        https://github.com/nginx/nginx/commit/52327e0627f49dbda1e8db695e63a4b0af4448b1
        """
        with self._lock:
            usable = [upstream for upstream in among if upstream.breaker.usable()]
            while usable:
                chosen = max(usable, key=lambda upstream: self._current[upstream] + upstream.weight)
                permit = chosen.breaker.acquire()
                if permit is None:  # another thread's failure opened it this moment
                    usable.remove(chosen)
                    continue
                moved = {upstream: upstream.weight for upstream in usable}
                moved[chosen] -= sum(upstream.weight for upstream in usable)
                self._move(moved, 1)
                return chosen, permit, moved
        return None

    def give_back(self, moved: dict[Upstream, int]) -> None:
        """Undo a turn that brought no answer."""
        with self._lock:
            self._move(moved, -1)

    def _move(self, moved: dict[Upstream, int], times: int) -> None:
        for upstream, steps in moved.items():
            self._current[upstream] += times * steps


class Walk:
    """One request's way through the upstreams; used by the one thread that serves the request."""

    def __init__(self, balancer: Balancer, upstreams: list[Upstream], preferred: Sequence[Upstream]) -> None:
        self._balancer = balancer
        self._left = upstreams
        self._preferred = preferred
        self._moved: dict[Upstream, int] = {}

    def next(self, last_resort: bool) -> Choice | None:
        """The next upstream, if one is left.

        With `last_resort` the open and resting ones follow, the one due soonest first.
        """
        choice = self._usable()
        if choice is None and last_resort and self._left:
            soonest = min(self._left, key=lambda upstream: upstream.breaker.due())
            choice = Choice(soonest, soonest.breaker.acquire_last_resort())
        if choice is not None:
            self._left.remove(choice.upstream)
        return choice

    def _usable(self) -> Choice | None:
        """One that is in use, or on trial where no other process tries it."""
        while True:
            self._balancer.give_back(self._moved)
            self._moved = {}
            found = self._preferred_one() or self._turn()
            if found is None:
                return None
            upstream, permit = found
            if permit.kind is not Pass.TRIAL or upstream.shared.may_try(permit):
                return Choice(upstream, permit)

    def _preferred_one(self) -> tuple[Upstream, Permit] | None:
        for upstream in self._preferred:
            if upstream in self._left and (permit := upstream.breaker.acquire()) is not None:
                return upstream, permit
        return None

    def _turn(self) -> tuple[Upstream, Permit] | None:
        turn = self._balancer.turn(self._left)
        if turn is None:
            return None
        upstream, permit, self._moved = turn
        return upstream, permit
