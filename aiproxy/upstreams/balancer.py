"""Who is asked next: smooth weighted round robin over the upstreams that serve a model and are usable.

A request may prefer some upstreams, in an order of its own (a conversation's). Preferred upstreams do not
move the round robin.

The round robin keeps one number for each upstream, under a thread lock; the locks of breakers are taken
inside it, never the other way round. An upstream pays for its turn even if it fails, so that a failing
one is never asked more often than its weight says.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from ..observability import logs
from ..policy import Cost, Decision
from .breaker import Change, Outcome, Pass, Permit
from .upstream import Upstream

_OUTCOMES = {Cost.FAILURE: Outcome.FAILURE, Cost.LATE: Outcome.TIMEOUT}


class Progress(Protocol):
    """What a request has met so far, as far as it decides who is asked next."""

    @property
    def may_ask_open_circuits(self) -> bool:
        """Whether upstreams with an open circuit may be asked as the last resort."""


class Candidate:
    """The next upstream, with the permit for one attempt at it.

    Only the first settlement counts, so every way out of an attempt may settle. Without a permit the attempt
    changes nothing that is known of the upstream's health. Changes of a circuit are logged, and sent to
    other processes, here, outside all locks.
    """

    def __init__(self, upstream: Upstream, model: str = "", permit: Permit | None = None) -> None:
        """`model`: as the upstream names it."""
        self.upstream = upstream
        self.kind = None if permit is None else permit.kind
        self._model = model
        self._permit = permit
        self._has_permit = permit is not None
        self._began = upstream.breaker.clock()
        if permit is not None and permit.kind is not Pass.ORDINARY:
            logs.circuit(upstream.name, permit.kind.value)

    @property
    def is_last_resort(self) -> bool:
        """Whether it is asked although it is in backoff or its circuit is open."""
        return self.kind is Pass.LAST_RESORT

    def succeed(self) -> None:
        """The attempt brought a complete answer."""
        if self._permit is not None:
            self._note_success()
        self._settle(Outcome.SUCCESS)

    def commit(self) -> None:
        """A stream is committed. A trial is a success here; an ordinary attempt is one when it ends well."""
        if self._permit is None:
            return
        permit = self._permit
        if permit.kind is not Pass.ORDINARY:
            self._note_success()
        self._permit, change = self.upstream.breaker.commit(permit)
        self._publish(permit, change)

    def fail(self) -> None:
        """The answer broke off after the commit point."""
        self._settle(Outcome.FAILURE)

    def ignore(self) -> None:
        """The attempt says nothing about the upstream."""
        self._settle(Outcome.IGNORED)

    def charge(self, decision: Decision) -> None:
        """The attempt failed before the commit point: settle the permit as the policy decided."""
        if self._permit is None:
            return
        if decision.cost not in (Cost.REFUSED, Cost.NONE):
            self.upstream.refusals.other_result(is_success=False)
        permit, models = self._permit, self.upstream.models
        if decision.cost is Cost.UPSTREAM_BACKOFF:
            self._permit = None
            seconds = self.upstream.breaker.cooldown if decision.backoff is None else decision.backoff
            self._publish(permit, self.upstream.breaker.back_off(permit, seconds))
            return
        if decision.cost is Cost.MODEL_BACKOFF:
            seconds = models.back_off(self._model, decision.backoff, self._began, self.is_last_resort)
            self._report_backoff(seconds)
        elif decision.cost is Cost.MODEL_MISSING and models.missing(self._model):
            self._report_backoff(models.cooldown)
        self._settle(_OUTCOMES.get(decision.cost, Outcome.IGNORED))

    def refused_alone(self) -> None:
        """It refused a request that another upstream has answered well."""
        if self._has_permit and self.upstream.refusals.refused():
            logs.backoff(self.upstream.name, None, self.upstream.refusals.due - self.upstream.breaker.clock())

    def _report_backoff(self, seconds: float) -> None:
        logs.backoff(self.upstream.name, self._model, seconds)
        self.upstream.shared.model_backed_off(self._model, seconds)

    def _note_success(self) -> None:
        if self.upstream.models.succeeded(self._model, self._began):
            self.upstream.shared.model_recovered(self._model)
        self.upstream.refusals.other_result(is_success=True)

    def _settle(self, outcome: Outcome) -> None:
        permit, self._permit = self._permit, None
        if permit is not None:
            self._publish(permit, self.upstream.breaker.settle(permit, outcome))

    def _publish(self, permit: Permit, change: Change | None) -> None:
        if change is None:
            return
        if change.is_news:
            logs.circuit(self.upstream.name, change.event, change.seconds)
        self.upstream.shared.report(change, permit)


class Balancer:
    """Thread-safe."""

    def __init__(self, upstreams: Sequence[Upstream], cursor: Mapping[str, float] | None = None) -> None:
        """`cursor`: another balancer's position, for the upstreams that had the same names."""
        self.upstreams = tuple(upstreams)
        self._lock = threading.Lock()
        # Bounded by what the weights can bring about: after a great change of weights it would last too long.
        bound = sum(upstream.weight for upstream in self.upstreams)
        was = cursor or {}
        self._current: dict[Upstream, float] = {
            each: max(-bound, min(bound, was.get(each.name, 0))) for each in self.upstreams
        }

    @property
    def cursor(self) -> dict[str, float]:
        """The position of the round robin: each upstream's number by its name."""
        with self._lock:
            return {upstream.name: current for upstream, current in self._current.items()}

    def serving(self, model: str) -> list[Upstream]:
        """The upstreams that a request for `model` may go to, drained ones included."""
        return [upstream for upstream in self.upstreams if upstream.serves(model)]

    def candidates(
        self,
        among: Sequence[Upstream],
        model: str,
        progress: Progress,
        preferred: Sequence[Upstream] = (),
        spared: Sequence[Upstream] = (),
    ) -> Iterator[Candidate]:
        """The upstreams that one request asks, in order, each at most once; the caller settles each.

        First the usable ones, `preferred` before the others; after a failure those of the same organization
        first, which alone can read the conversation's thinking blocks and caches. Then, as the last resort,
        those in backoff, the one due first, and those with an open circuit if `progress` allows it. `model`
        is the client's. `spared` ones are usable, and are asked after the other usable ones.
        """
        left = list(among)
        # A turn after a failure costs as much as the first one: the others then keep their shares.
        price = sum(upstream.weight for upstream in left if upstream.usable(model))
        tried: set[str] = set()
        while True:
            first = [each for each in left if each.settings.organization in tried]
            first = first or [each for each in left if each not in spared] if spared else first
            candidate = self._usable(first, model, preferred, price) if first else None
            candidate = candidate or self._usable(left, model, preferred, price)
            if candidate is None:
                break
            left.remove(candidate.upstream)
            if organization := candidate.upstream.settings.organization:
                tried.add(organization)
            yield candidate
        # Decided once: a circuit may open or close while the request asks the others.
        last = sorted((each.breaker.is_open, each.due(model), each.name, each) for each in left)
        for is_open, _, _, upstream in last:
            if not is_open or progress.may_ask_open_circuits:
                yield self._last_resort(upstream, model)

    def _last_resort(self, upstream: Upstream, model: str) -> Candidate:
        return Candidate(upstream, upstream.model_for(model), upstream.breaker.acquire_last_resort())

    def _usable(
        self, left: list[Upstream], model: str, preferred: Sequence[Upstream], price: float
    ) -> Candidate | None:
        """The next one that is usable; of a half-open one the trial must be free in all processes.

        Where another process runs the trial, `may_try` gives the permit back.
        """
        while True:
            found = self._preferred_one(left, model, preferred) or self._turn(left, model, price)
            if found is None:
                return None
            upstream, permit = found
            if permit.kind is not Pass.TRIAL or upstream.shared.may_try(permit):
                return Candidate(upstream, upstream.model_for(model), permit)

    def _preferred_one(
        self, left: list[Upstream], model: str, preferred: Sequence[Upstream]
    ) -> tuple[Upstream, Permit] | None:
        for upstream in preferred:
            if upstream in left and upstream.usable(model):
                permit = upstream.breaker.acquire()
                if permit is not None:
                    return upstream, permit
        return None

    def _turn(self, left: list[Upstream], model: str, price: float) -> tuple[Upstream, Permit] | None:
        """One step of nginx's smooth weighted round robin.

        Each gains its weight, the one that is furthest ahead is chosen and pays the sum:
        https://github.com/nginx/nginx/commit/52327e0627f49dbda1e8db695e63a4b0af4448b1
        `price` is the sum in the request's first turn. In a later turn fewer upstreams share that price.
        """
        with self._lock:
            usable = [upstream for upstream in left if upstream.usable(model)]
            while usable:
                chosen = max(usable, key=lambda upstream: self._current[upstream] + upstream.weight)
                permit = chosen.breaker.acquire()
                if permit is None:  # another thread's failure opened it at this moment
                    usable.remove(chosen)
                    continue
                weights = sum(upstream.weight for upstream in usable)
                share = max(1.0, price / weights)
                for upstream in usable:
                    self._current[upstream] += upstream.weight * share
                self._current[chosen] -= weights * share
                return chosen, permit
        return None
