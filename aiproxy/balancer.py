"""Who is next: smooth weighted round robin over the upstreams that serve a model and are usable.

The cursor is one number an upstream, under a thread lock; breakers' locks are taken inside it, never
the other way round. A walk serves one request: it gives each upstream at most once, together with
its permit, and hands back the turn of an upstream that gave no answer, so that the upstreams which
do answer share the requests exactly by weight.
"""

import threading
from collections.abc import Sequence

import msgspec

from .breaker import Pass, Permit
from .upstream import Upstream


class Choice(msgspec.Struct, frozen=True):
    """The next upstream and the permit for one attempt at it; whoever takes it settles the permit."""

    upstream: Upstream
    permit: Permit

    @property
    def is_trial(self) -> bool:
        return self.permit.kind is not Pass.ORDINARY


class Balancer:
    """Thread-safe."""

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self.upstreams = tuple(upstreams)
        self._lock = threading.Lock()
        self._current = dict.fromkeys(self.upstreams, 0)

    def candidates(self, model: str) -> "Walk":
        """The upstreams for one request, in the order in which they should be tried."""
        return Walk(self, [upstream for upstream in self.upstreams if upstream.serves(model)])

    def turn(self, among: Sequence[Upstream]) -> tuple[Choice, dict[Upstream, int]] | None:
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
                return Choice(chosen, permit), moved
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

    def __init__(self, balancer: Balancer, upstreams: list[Upstream]) -> None:
        self._balancer = balancer
        self._left = upstreams
        self._moved: dict[Upstream, int] = {}
        self.is_empty = not upstreams

    def next(self, last_resort: bool) -> Choice | None:
        """The next upstream, if one is left.

        With `last_resort` the open and resting ones follow, the one due soonest first.
        """
        self._balancer.give_back(self._moved)
        self._moved = {}
        turn = self._balancer.turn(self._left)
        if turn is not None:
            choice, self._moved = turn
        elif last_resort and self._left:
            soonest = min(self._left, key=lambda upstream: upstream.breaker.due())
            choice = Choice(soonest, soonest.breaker.acquire_last_resort())
        else:
            return None
        self._left.remove(choice.upstream)
        return choice
