"""What one request has met so far: its attempts' failures judged, charged, logged, and the best one kept."""

from collections.abc import Callable

import msgspec

from ..api.headers import Pairs, value_of
from ..errors import ApiError
from ..policy import THREAD_NOT_FOUND, TIMEOUTS_A_REQUEST, Charge, Fault, Rank, Rule, rule_for
from ..transport.watch import Reason
from ..upstreams.breaker import Outcome
from ..upstreams.threads import Owners, continued_message, uses_thread
from ..upstreams.upstream import Upstream
from .attempt import Answer, Attempt, Failure, Request, error_of
from .journal import Journal
from .relay import End, Relay

#: The status, in the log alone, of a request whose client left before its answer: nginx's.
CLIENT_LEFT = 499


class Reply(msgspec.Struct, frozen=True):
    """What the client gets."""

    status: int
    headers: Pairs
    body: bytes | Relay


class Course:
    """What one request has met so far."""

    def __init__(self, request: Request, journal: Journal, owners: Owners, is_bound: bool = False) -> None:
        """`is_bound`: the request names something that only one account has."""
        self.goes_on = True
        self.request_is_at_fault = False
        self._request = request
        self._journal = journal
        self._owners = owners
        self._is_bound = is_bound
        self._attempts = 0
        self._timeouts = 0
        self.lacking: list[Upstream] = []  # they have no such endpoint
        self._undecided: list[Attempt] = []  # charged only if another upstream answers
        self._rank = Rank.NONE
        self._failure: Failure | None = None  # the one to be told, if none answers
        self._failed_at: Attempt | None = None
        self._retry_afters: list[tuple[float, str]] = []

    def run(self, attempt: Attempt, may_lack: bool = False) -> Answer | Failure:
        """Make the attempt; a failure is judged, charged and logged.

        `may_lack`: an upstream that lacks the endpoint is no failure to tell the client of.
        """
        self._attempts += 1
        outcome = attempt.run()
        if isinstance(outcome, Failure):
            rule = self._rule(outcome)
            self._journal.attempt(self._request, attempt, self._attempts, outcome, rule)
            self._charge(attempt, outcome, rule)
            if may_lack and self._lacks_endpoint(outcome):
                self.lacking.append(attempt.upstream)
                return outcome
            self._keep(attempt, outcome, rule)
            self._timeouts += outcome.fault is Fault.TIMEOUT
            self.goes_on = rule.next_upstream and self._timeouts < TIMEOUTS_A_REQUEST
        else:
            self._journal.attempt(self._request, attempt, self._attempts, None, None)
        return outcome

    def answered(self, attempt: Attempt, answer: Answer, cut: Callable[[], None]) -> Reply:
        """Another upstream answered the same request: those that refused it were at fault."""
        for refused in self._undecided:
            refused.settle(Outcome.FAILURE)
        if isinstance(answer.body, Relay):
            self._journal.streaming(self._request)
            answer.body.bind(
                self._request.id,
                cut,
                on_stop=lambda: self._remember(attempt),
                on_end=lambda end: self._done(attempt, answer.status, end),
            )
        else:
            self._remember(attempt)
            self._done(attempt, answer.status, End("complete", len(answer.body)))
        return self._reply(attempt, answer.status, answer.headers, answer.body)

    @property
    def all_lack_it(self) -> bool:
        """Whether each upstream that was asked, if any was, has no such endpoint."""
        return len(self.lacking) == self._attempts

    def failed(self) -> Reply:
        """No upstream answered: the error of theirs that helps the client most, else one of ours."""
        attempt, failure = self._failed_at, self._failure
        if self._request.scope.reason is Reason.CLIENT_LEFT:
            self._done(None, CLIENT_LEFT, End("client_left", 0))
            return Reply(CLIENT_LEFT, [], b"")
        if self._request.scope.reason is Reason.RESTART:
            return self._own(ApiError(529, "overloaded_error", "aiproxy is restarting."), "restart")
        if failure is None or failure.status is None:
            if self._timeouts:
                return self._own(ApiError(504, "timeout_error", "No upstream answered in time."))
            return self._own(ApiError(502, "api_error", "No upstream could answer the request."))
        body = self._journal.redactor.answer(failure.body)
        self._done(attempt, failure.status, End("error", len(body)))
        return self._reply(attempt, failure.status, self._with_soonest_retry(failure.headers), body)

    def release(self) -> None:
        """Give back what is still held; of no effect on what is settled."""
        for attempt in self._undecided:
            attempt.settle(Outcome.UNDECIDED)

    def _own(self, error: ApiError, how: str = "error") -> Reply:
        body = error.body(self._request.id)
        self._done(None, error.status, End(how, len(body)))
        return self._reply(None, error.status, [("content-type", "application/json")], body)

    def _done(self, attempt: Attempt | None, status: int, end: End) -> None:
        self._journal.done(self._request, attempt, self._attempts, status, end)

    def _rule(self, failure: Failure) -> Rule:
        if failure.status == 404 and _thread_not_found(failure) and continued_message(self._request.body):
            return THREAD_NOT_FOUND
        return rule_for(failure.fault, failure.status, failure.retry_after, self._is_bound)

    def _lacks_endpoint(self, failure: Failure) -> bool:
        """Whether an upstream says that it has no such endpoint; a 404 may also be about what is asked."""
        if failure.status == 404:
            about_model = (error_of(failure).get("message") or "").startswith("model:")
            return not about_model and not self._is_bound
        return failure.status in (405, 501)

    def _remember(self, attempt: Attempt) -> None:
        """Which upstream made a thread's message; before the client can continue it."""
        if attempt.report.message_id is not None and uses_thread(self._request.body):
            self._owners.note(attempt.report.message_id, attempt.upstream.name)

    def _charge(self, attempt: Attempt, failure: Failure, rule: Rule) -> None:
        if rule.charge is Charge.IF_ANOTHER_ANSWERS:
            self._undecided.append(attempt)
        elif rule.charge is Charge.REST:
            attempt.rest(failure.retry_after or 0.0)
        else:
            attempt.settle(Outcome.FAILURE if rule.charge is Charge.FAILURE else Outcome.UNDECIDED)

    def _keep(self, attempt: Attempt, failure: Failure, rule: Rule) -> None:
        """Remember the failure that the client is to be told: the highest rank, of equals the latest."""
        if rule.rank is Rank.REQUEST:
            self.request_is_at_fault = True
        if failure.retry_after is not None:
            self._retry_afters.append((failure.retry_after, value_of(failure.headers, "retry-after") or ""))
        if failure.status is not None and rule.rank >= self._rank:
            self._rank, self._failure, self._failed_at = rule.rank, failure, attempt

    def _with_soonest_retry(self, headers: Pairs) -> Pairs:
        """Of several `retry-after` values the smallest: some upstream is free again by then."""
        if value_of(headers, "retry-after") is None or not self._retry_afters:
            return headers
        soonest = min(self._retry_afters)[1]
        if soonest == value_of(headers, "retry-after"):
            return headers
        kept = [pair for pair in headers if pair[0] not in ("retry-after", "retry-after-ms")]
        return [*kept, ("retry-after", soonest)]

    def _reply(self, attempt: Attempt | None, status: int, headers: Pairs, body: bytes | Relay) -> Reply:
        added = [("x-aiproxy-attempts", str(self._attempts))]
        if attempt is not None:
            added.append(("x-aiproxy-upstream", attempt.upstream.name))
        if value_of(headers, "request-id") is None:
            added.append(("request-id", self._request.id))
        return Reply(status, [*self._journal.redactor.pairs(headers), *added], body)


def _thread_not_found(failure: Failure) -> bool:
    return error_of(failure).get("error_code") == "thread_not_found"
