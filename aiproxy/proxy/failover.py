"""Which upstreams a request may ask, and the failover loop: one after the other, until one answers."""

import hashlib
from collections.abc import Callable, Iterable, Sequence

from ..api.headers import value_of
from ..errors import ApiError
from ..transport.wait import Interrupted
from ..upstreams.affinity import key_of, rank
from ..upstreams.balancer import Balancer, Candidate
from ..upstreams.message_threads import Owners, continued_message
from ..upstreams.upstream import Upstream
from .attempt import Answer, Attempt, Tools
from .exchange import Exchange, Reply
from .request import Request

#: Claude Code's word that the cached prefix is dead: the conversation may as well move.
_COMPACTED = "x-claude-code-context-compacted"
#: Seconds for which an upstream that lacks the counting of tokens is not asked to count.
WITHOUT_COUNTING = 3600.0


class Failover:
    """Thread-safe; what belongs to one request lives in its `Exchange`."""

    def __init__(
        self, balancer: Balancer, tools: Tools, owners: Owners, affinity: str, clock: Callable[[], float]
    ) -> None:
        """`clock`: monotonic seconds."""
        self._balancer = balancer
        self._tools = tools
        self._owners = owners
        self._affinity = affinity
        self._clock = clock
        #: Upstreams that answered that they cannot count tokens, and until when they are not asked to.
        self._without_counting: dict[Upstream, float] = {}

    def messages(self, exchange: Exchange) -> Reply:
        """Answer from the first upstream that can; else the best of their errors.

        Raises `ApiError` 404 where no upstream serves the model.
        """
        reply = self._ask(exchange)
        fallback = exchange.request.fallback_model
        if reply is None and fallback is not None and exchange.lacks_capacity and self._takes(fallback):
            exchange.request = exchange.request.fallen_back(fallback)
            reply = self._ask(exchange)
        return reply or exchange.best_failure()

    def _takes(self, model: str) -> bool:
        return any(not upstream.draining for upstream in self._balancer.serving(model))

    def _ask(self, exchange: Exchange) -> Reply | None:
        request = exchange.request
        serving = self._serving(request)
        key = self._affinity_key(request)
        preferred = [*self._thread_owner(request, serving), *(rank(serving, key) if key else ())]
        spared: Sequence[Upstream] = ()
        if [each for each in serving if each.rate_limits.was_low]:
            spared = self._spared(request, serving)
            if key is not None:
                preferred = self._where_it_moved(key, request, preferred, spared)
        candidates = self._balancer.candidates(serving, request.body.model, exchange, preferred, spared)
        return self._handle(exchange, candidates)

    def count_tokens(self, exchange: Exchange) -> Reply:
        """As `messages`, for `/v1/messages/count_tokens`, which not every upstream has.

        Outside breakers and round robin: counting says nothing about an upstream's health.
        """
        now = self._clock()
        serving = self._serving(exchange.request)
        able = [each for each in serving if self._without_counting.get(each, now) <= now]
        reply = self._handle(exchange, self._without_permits(exchange.request, able), may_lack=True)
        self._without_counting.update(dict.fromkeys(exchange.lacking, now + WITHOUT_COUNTING))
        if reply is None and exchange.all_lack_it:
            raise ApiError(404, "not_found_error", "No upstream counts tokens.")
        return reply or exchange.best_failure()

    def pass_on(self, exchange: Exchange) -> Reply:
        """As `messages`, for a request that is about no model: outside breakers and round robin."""
        upstreams = _not_drained(self._balancer.upstreams)
        candidates = self._without_permits(exchange.request, upstreams)
        return self._handle(exchange, candidates) or exchange.best_failure()

    def _handle(
        self, exchange: Exchange, candidates: Iterable[Candidate], may_lack: bool = False
    ) -> Reply | None:
        """The loop. `may_lack`: an upstream that lacks the endpoint is only noted in `exchange.lacking`."""
        for candidate in candidates:
            exchange.begin(candidate)
            attempt = Attempt(self._tools, candidate, exchange.request)
            result = attempt.run()
            if isinstance(result, Answer):
                return exchange.reply(attempt, result)
            if not exchange.record(attempt, result, may_lack):
                break
        return self._with_new_token(exchange)

    def _with_new_token(self, exchange: Exchange) -> Reply | None:
        """Nobody answered: ask again where only the token was missing, as soon as it is fetched."""
        request = exchange.request
        for _ in range(2):  # the first token of all may be refused, too
            for failed in exchange.without_token:
                command = failed.upstream.token_command
                try:
                    has_come = command is not None and command.await_new(failed.token, request.wait.pause)
                except Interrupted:
                    return None
                if not has_come:
                    continue
                breaker = failed.upstream.breaker
                permit = breaker.acquire() or breaker.acquire_last_resort()
                candidate = Candidate(failed.upstream, failed.model, permit)
                exchange.begin(candidate)
                attempt = Attempt(self._tools, candidate, request)
                result = attempt.run()
                if isinstance(result, Answer):
                    return exchange.reply(attempt, result)
                exchange.record(attempt, result)
        return None

    def _spared(self, request: Request, serving: Sequence[Upstream]) -> list[Upstream]:
        """Upstreams whose rate limit for the model is nearly used up: they get no new conversations."""
        model = request.body.model
        low = [each for each in serving if each.rate_limits.is_low(each.model_for(model))]
        is_new = low and (request.body.begins_conversation or value_of(request.headers, _COMPACTED))
        return low if is_new and len(low) < len(serving) else []

    def _where_it_moved(
        self, key: str, request: Request, preferred: list[Upstream], spared: Sequence[Upstream]
    ) -> list[Upstream]:
        """A conversation that began elsewhere, while its home was low, stays there."""
        conversation = f"{request.body.model} {key}".encode(errors="replace")
        session = f"session {hashlib.sha256(conversation).hexdigest()}"
        if spared:
            first = next(each for each in preferred if each not in spared)
            self._owners.note(session, first.name)
            return preferred
        owner = self._owners.owner(session)
        return sorted(preferred, key=lambda each: each.name != owner)

    def _serving(self, request: Request) -> list[Upstream]:
        serving = self._balancer.serving(request.body.model)
        if not serving:
            raise ApiError(404, "not_found_error", f"model: no upstream serves {request.body.model[:100]}")
        return _not_drained(serving)

    def _thread_owner(self, request: Request, serving: list[Upstream]) -> list[Upstream]:
        """The one upstream whose message thread the request continues, none if that is not known."""
        continued = continued_message(request.body)
        owner = self._owners.owner(continued) if continued else None
        return [upstream for upstream in serving if upstream.name == owner]

    def _affinity_key(self, request: Request) -> str | None:
        return key_of(self._affinity, request.client or "", request.headers, request.body)

    def _without_permits(self, request: Request, upstreams: Sequence[Upstream]) -> Iterable[Candidate]:
        """In an order that spreads requests by weight, those with an open circuit last."""
        ranked = rank(upstreams, self._affinity_key(request) or request.id)
        return map(Candidate, sorted(ranked, key=lambda upstream: not upstream.usable(request.body.model)))


def _not_drained(upstreams: Iterable[Upstream]) -> list[Upstream]:
    """Those that take new requests. Raises `ApiError` 529 where there is none."""
    taking = [upstream for upstream in upstreams if not upstream.draining]
    if not taking:
        raise ApiError(529, "overloaded_error", "Every upstream that could answer is being drained.")
    return taking
