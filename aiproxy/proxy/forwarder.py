"""The failover loop and nothing else: asks one candidate after the other until one answers."""

import re
from collections.abc import Callable, Iterable, Sequence

from ..api.headers import value_of
from ..errors import ApiError
from ..upstreams.affinity import key_of, rank
from ..upstreams.balancer import Balancer, Choice
from ..upstreams.breaker import Outcome
from ..upstreams.threads import Owners, continued_message
from ..upstreams.upstream import Upstream
from .attempt import Answer, Attempt, Request, Tools
from .course import Course, Reply
from .journal import Journal
from .relay import Relay

#: Breaks off the client's connection.
Cut = Callable[[], None]


class Forwarder:
    """Thread-safe; what belongs to one request lives in its own `Course`."""

    def __init__(
        self, balancer: Balancer, tools: Tools, owners: Owners, affinity: str, journal: Journal
    ) -> None:
        self._balancer = balancer
        self._tools = tools
        self._owners = owners
        self._affinity = affinity
        self._journal = journal
        self._without_counting: set[Upstream] = set()  # they answered that they cannot count tokens

    def forward(self, request: Request, cut: Cut) -> Reply:
        """Answer a request from the first upstream that can; else tell the best of their errors.

        Raises `ApiError` 404 where no upstream serves the model.
        """
        serving = self._serving(request)
        owner = self._thread_owner(request, serving)
        key = self._affinity_key(request)
        walk = self._balancer.candidates(serving, [*owner, *(rank(serving, key) if key else ())])
        is_bound = bool(owner) or _is_bound(request)
        course = Course(request, self._journal, self._owners, is_bound)

        def choices() -> Iterable[Choice]:
            while choice := walk.next(last_resort=not course.request_is_at_fault):
                yield choice

        try:
            return self._first_answer(request, course, choices(), cut) or course.failed()
        finally:
            course.release()

    def count_tokens(self, request: Request, cut: Cut) -> Reply:
        """As `forward`, for `/v1/messages/count_tokens`, which not every upstream has.

        Outside breakers and cursor: counting says nothing of an upstream's health.
        """
        is_bound = _is_bound(request) or continued_message(request.body) is not None
        course = Course(request, self._journal, self._owners, is_bound)
        able = [upstream for upstream in self._serving(request) if upstream not in self._without_counting]
        reply = self._first_answer(
            request, course, self._beside_the_cursor(request, able), cut, may_lack=True
        )
        self._without_counting.update(course.lacking)
        if reply is None and course.all_lack_it:
            raise ApiError(404, "not_found_error", "No upstream counts tokens.")
        return reply or course.failed()

    def pass_on(self, request: Request, cut: Cut) -> Reply:
        """As `forward`, for a request that is about no model, and so concerns neither breakers nor cursor."""
        course = Course(request, self._journal, self._owners)
        choices = self._beside_the_cursor(request, _not_draining(self._balancer.upstreams))
        return self._first_answer(request, course, choices, cut) or course.failed()

    def _first_answer(
        self, request: Request, course: Course, choices: Iterable[Choice], cut: Cut, may_lack: bool = False
    ) -> Reply | None:
        for choice in choices:
            try:
                attempt = Attempt(self._tools, choice, request)
                outcome = course.run(attempt, may_lack)
            except BaseException:  # a bug of ours: nobody else would give the permit back
                choice.settle(Outcome.UNDECIDED)
                raise
            if isinstance(outcome, Answer):
                return _committed(course, attempt, outcome, cut)
            if not course.goes_on:
                break
        return None

    def _serving(self, request: Request) -> list[Upstream]:
        serving = self._balancer.serving(request.body.model)
        if not serving:
            raise ApiError(404, "not_found_error", f"model: no upstream serves {request.body.model[:100]}")
        return _not_draining(serving)

    def _thread_owner(self, request: Request, serving: list[Upstream]) -> list[Upstream]:
        """The one upstream whose message thread the request continues, none if that is not known."""
        continued = continued_message(request.body)
        owner = self._owners.owner(continued) if continued else None
        return [upstream for upstream in serving if upstream.name == owner]

    def _affinity_key(self, request: Request) -> str | None:
        return key_of(self._affinity, request.client or "", request.headers, request.body)

    def _beside_the_cursor(self, request: Request, upstreams: Sequence[Upstream]) -> Iterable[Choice]:
        """In an order that spreads requests by weight without a cursor, those with an open circuit last."""
        ranked = rank(upstreams, self._affinity_key(request) or request.id)
        return map(Choice, sorted(ranked, key=lambda upstream: not upstream.breaker.usable()))


def _committed(course: Course, attempt: Attempt, answer: Answer, cut: Cut) -> Reply:
    try:
        return course.answered(attempt, answer, cut)
    except BaseException:  # a bug of ours: nobody else would end the upstream's stream
        if isinstance(answer.body, Relay):
            answer.body.close()
        raise


def _not_draining(upstreams: Iterable[Upstream]) -> list[Upstream]:
    """Those that take new requests. Raises `ApiError` 529 where there is none."""
    taking = [upstream for upstream in upstreams if not upstream.draining]
    if not taking:
        raise ApiError(529, "overloaded_error", "Every upstream that could answer is being drained.")
    return taking


# What only one account has: another can but refuse it.
_FILE = re.compile(rb'"file_id"\s*:\s*"')


def _is_bound(request: Request) -> bool:
    """Whether a request names a container, a file or a workspace."""
    container = request.body.members.get("container", b"null") != b"null"
    workspace = value_of(request.headers, "anthropic-workspace-id") is not None
    at = request.body.raw.find(b'"file_id"')  # ten times as fast as the expression
    return container or workspace or (at >= 0 and _FILE.search(request.body.raw, at) is not None)
