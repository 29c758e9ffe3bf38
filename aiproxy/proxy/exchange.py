"""One client request and everything that is done for it.

It holds what the request has met so far, and settles permits: a failed attempt's when it failed, a whole
answer's when it is complete, a stream's in `finish`. Only the trial of a half-open circuit is settled
earlier, at the stream's commit point. `finish` runs after the last byte for every kind of answer, and
counts and logs the exchange.
"""

import math
from collections.abc import Iterator

import msgspec

from ..api import MESSAGES
from ..api.headers import Pairs, value_of
from ..errors import ApiError
from ..ledger.budgets import UNIFIED
from ..policy import (
    MOST_TIMEOUTS,
    Cost,
    Decision,
    Fault,
    Rank,
    decide,
    names_model,
)
from ..upstreams.balancer import Candidate
from ..upstreams.message_threads import Owners, uses_thread
from ..upstreams.upstream import Upstream
from .attempt import Answer, Attempt, Failure, problem_of
from .billing import Billing
from .journal import Done, Journal
from .outcome import Outcome
from .request import Request
from .stream import Stream

#: The status, in the log alone, of a request whose client left before its answer: nginx's.
CLIENT_LEFT = 499
#: What a last resort does not cost; the breaker ignores it, too.
_FREE_FOR_LAST_RESORT = (Cost.FAILURE, Cost.LATE, Cost.UPSTREAM_BACKOFF)
_PIECE = 65536  # bytes of a whole answer that are handed to the server at a time


class Reply(msgspec.Struct, frozen=True):
    """What the client gets. `body`: the bytes in pieces, which may raise `stream.BreakConnection`."""

    status: int
    headers: Pairs
    body: Iterator[bytes]
    length: int | None  # bytes; None for a stream


class FailedAttempt(msgspec.Struct, frozen=True):
    """One failed attempt with what followed from it."""

    attempt: Attempt
    failure: Failure
    decision: Decision


class Exchange:
    """Used by the request's thread alone. Whoever gets a reply, or meets a bug, calls `finish`."""

    def __init__(self, request: Request, journal: Journal, owners: Owners) -> None:
        self.request = request
        self.lacking: list[Upstream] = []  # they do not have this endpoint
        self._journal = journal
        self._owners = owners
        self._attempts = 0
        self._failed: list[FailedAttempt] = []
        self._candidate: Candidate | None = None  # of the attempt under way
        self._attempt: Attempt | None = None  # the one whose answer or error is sent
        self._stream: Stream | None = None
        self._status = 0
        self._outcome: Outcome | None = None
        self._is_finished = False

    @property
    def may_ask_open_circuits(self) -> bool:
        """See `balancer.Progress`: the best answer so far is not a 400 or 422 about the request."""
        best = self._best()
        if best is None or best.decision.rank is not Rank.REQUEST:
            return True
        return best.failure.problem.status not in (400, 422)

    @property
    def all_lack_it(self) -> bool:
        """Whether each upstream that was asked, if any was, does not have this endpoint."""
        return len(self.lacking) == self._attempts

    @property
    def without_token(self) -> list[Attempt]:
        """Of each upstream the latest attempt, if it failed because the token is being fetched anew."""
        latest = {each.attempt.upstream: each for each in self._failed}
        return [each.attempt for each in latest.values() if each.failure.problem.fault is Fault.TOKEN]

    @property
    def lacks_capacity(self) -> bool:
        """Whether every attempt failed by overload, limits or timeouts, and the request is not over."""
        problems = [each.failure.problem for each in self._failed]
        lacking = [each.fault is Fault.TIMEOUT or each.status in (429, 503, 529) for each in problems]
        return bool(lacking) and all(lacking) and self.request.wait.ended is None

    def begin(self, candidate: Candidate) -> None:
        """An attempt at the candidate is under way."""
        self._attempts += 1
        self._candidate = candidate

    def record(self, attempt: Attempt, failure: Failure, may_lack: bool = False) -> bool:
        """Judge, charge and log a failed attempt; whether the next upstream is to be asked.

        `may_lack`: an upstream that lacks the endpoint is not a failure that the client is to see.
        """
        decision = self._decide(attempt, failure)
        cost = (
            Cost.NONE
            if attempt.candidate.is_last_resort and decision.cost in _FREE_FOR_LAST_RESORT
            else decision.cost
        )
        self._journal.attempt(self.request, attempt, self._attempts, failure, cost)
        attempt.candidate.charge(decision)
        if may_lack and self._lacks_endpoint(attempt, failure):
            self.lacking.append(attempt.upstream)
            return True
        self._failed.append(FailedAttempt(attempt, failure, decision))
        timeouts = sum(each.failure.problem.fault is Fault.TIMEOUT for each in self._failed)
        return decision.try_next and timeouts < MOST_TIMEOUTS

    def reply(self, attempt: Attempt, answer: Answer) -> Reply:
        """An upstream answered; upstreams that refused the same request are noticed."""
        self._attempt = attempt
        if isinstance(answer.body, Stream):  # first of all: `finish` closes it, whatever happens
            self._stream, self._status = answer.body, answer.status
        for each in self._failed:
            if each.decision.cost is Cost.REFUSED:
                each.attempt.candidate.refused_alone()
        self._journal.attempt(self.request, attempt, self._attempts, None, Cost.NONE)
        headers = self._headers(attempt, answer.headers)
        if isinstance(answer.body, Stream):
            self._journal.streaming(self.request)
            return Reply(answer.status, headers, self._events(attempt, answer.body), None)
        attempt.candidate.succeed()
        self._note_owner(attempt)
        return self._whole(answer.status, headers, answer.body, Outcome.COMPLETE)

    def best_failure(self) -> Reply:
        """No upstream answered: the upstreams' error that helps the client most, else one of ours."""
        if self.request.wait.ended is Fault.CLIENT_LEFT:
            return self._whole(CLIENT_LEFT, [], b"", Outcome.CLIENT_LEFT)
        if self.request.wait.ended is Fault.RESTART:
            return self._own(ApiError(529, "overloaded_error", "aiproxy is restarting."), Outcome.RESTART)
        best = self._best()
        status = best.failure.problem.status if best is not None else None
        if best is None or status is None:
            return self._own(self._own_error(), Outcome.ERROR)
        self._attempt = best.attempt
        headers = best.failure.headers
        if best.decision.rank is Rank.RETRYABLE:
            headers = self._with_soonest_retry(headers)
        body = self._journal.redactor.answer(best.failure.body)
        return self._whole(status, self._headers(best.attempt, headers), body, Outcome.ERROR)

    def finish(self, sent: int, is_complete: bool) -> None:
        """The exchange is over; a second call does nothing. Without a reply it only settles the permit.

        `sent`: bytes of the body that went out; `is_complete`: whether the client took all of it.
        """
        if self._is_finished:
            return
        self._is_finished = True
        if self._stream is not None:
            try:
                self._stream.close()
            finally:
                self._settle_stream(self._stream)
                self._outcome = self._stream.outcome
        elif self._outcome is Outcome.COMPLETE and not is_complete:
            self._outcome = Outcome.CLIENT_LEFT
        if self._outcome is None:
            if self._candidate is not None:
                self._candidate.ignore()
            return
        stream = self._stream
        done = Done(
            attempts=self._attempts,
            status=self._status,
            outcome=self._outcome,
            bytes=sent,
            detail=stream.detail if stream is not None else None,
            is_stream=stream is not None,
            billing=self._billing(sent),
        )
        self._journal.done(self.request, self._attempt, done)

    def _billing(self, sent: int) -> Billing:
        billing = Billing(self._journal.prices, self.request)
        if self._failed:
            billing.add_failed((each.attempt, each.failure.problem.fault) for each in self._failed)
        if self._attempt is not None and self._outcome is not Outcome.ERROR:
            billing.add_answer(self._attempt, self._stream, sent)
        return billing

    def _events(self, attempt: Attempt, stream: Stream) -> Iterator[bytes]:
        """The stream's blocks: the owner of a thread is noted before the client sees the message's end."""
        noted = False
        for block in stream.blocks(self.request.id):
            if stream.has_stopped and not noted:
                self._note_owner(attempt)
                noted = True
            yield block if stream.error is None else self._journal.redactor.answer(block)

    def _settle_stream(self, stream: Stream) -> None:
        if self._attempt is None:
            return
        if stream.outcome is Outcome.COMPLETE:
            self._attempt.candidate.succeed()
        elif stream.outcome in (Outcome.BROKEN, Outcome.SILENT):
            self._attempt.candidate.fail()
        elif stream.error is not None:
            problem = problem_of(stream.error)
            self._attempt.candidate.charge(
                decide(problem, self._models(self._attempt), self.request.is_bound)
            )
        else:
            self._attempt.candidate.ignore()

    def _best(self) -> FailedAttempt | None:
        """The failure whose error the client gets as it is: the highest rank, of equals the latest."""
        shown = [each for each in self._failed if each.decision.rank >= Rank.SUSPECT]
        return max(reversed(shown), key=lambda each: each.decision.rank, default=None)

    def _own_error(self) -> ApiError:
        """What to say where no upstream sent an error that the client may see."""
        if any(each.failure.problem.fault is Fault.TIMEOUT for each in self._failed):
            return ApiError(504, "timeout_error", "No upstream answered in time.")
        accounts = [each for each in self._failed if each.decision.rank is Rank.ACCOUNT]
        if not accounts:
            return ApiError(502, "api_error", "No upstream could answer the request.")
        said = accounts[-1].failure.problem.message or f"status {accounts[-1].failure.problem.status}"
        said = self._journal.redactor.text(said, 1000, self.request.secrets)
        return ApiError(502, "api_error", f"An upstream refused aiproxy's own account there: {said}")

    @property
    def _all_about_accounts(self) -> bool:
        """Whether every attempt failed because of the upstream's own account: no retry can mend that."""
        return bool(self._failed) and all(each.decision.rank is Rank.ACCOUNT for each in self._failed)

    def _own(self, error: ApiError, outcome: Outcome) -> Reply:
        headers = [("content-type", "application/json")]
        if outcome is Outcome.ERROR and self._all_about_accounts:
            headers.append(("x-should-retry", "false"))
        return self._whole(error.status, self._headers(None, headers), error.body(self.request.id), outcome)

    def _whole(self, status: int, headers: Pairs, body: bytes, outcome: Outcome) -> Reply:
        self._status, self._outcome = status, outcome
        pieces = (body[at : at + _PIECE] for at in range(0, len(body), _PIECE))
        return Reply(status, headers, pieces, len(body))

    def _decide(self, attempt: Attempt, failure: Failure) -> Decision:
        decision = decide(failure.problem, self._models(attempt), self.request.is_bound)
        if decision.cost is Cost.REFUSED and attempt.upstream.refusals.is_suspect:
            return msgspec.structs.replace(decision, rank=Rank.SUSPECT)
        return decision

    def _models(self, attempt: Attempt) -> tuple[str, str]:
        return self.request.body.model, attempt.model

    def _lacks_endpoint(self, attempt: Attempt, failure: Failure) -> bool:
        """Whether an upstream says that it does not have this endpoint; a 404 may be about the model."""
        if failure.problem.status == 404:
            return not self.request.is_bound and not names_model(
                failure.problem.message, self._models(attempt)
            )
        return failure.problem.status in (405, 501)

    def _note_owner(self, attempt: Attempt) -> None:
        """Note which upstream made a thread's message, before the client can continue it."""
        message_id, request = attempt.usage.message_id, self.request
        if message_id is not None and request.path == MESSAGES and uses_thread(request.body):
            self._owners.note(message_id, attempt.upstream.name)

    def _with_soonest_retry(self, headers: Pairs) -> Pairs:
        """Of several `retry-after` the smallest, in whole seconds: some upstream is free again by then."""
        if value_of(headers, "retry-after") is None:
            return headers  # the upstream that answered last may be free sooner
        waits = [wait for each in self._failed if (wait := each.failure.problem.retry_after)]
        kept = [pair for pair in headers if pair[0] not in ("retry-after", "retry-after-ms")]
        return [*kept, ("retry-after", str(math.ceil(min(waits))))] if waits else kept

    def _headers(self, attempt: Attempt | None, headers: Pairs) -> Pairs:
        added = [("x-aiproxy-request-id", self.request.id), ("x-aiproxy-attempts", str(self._attempts))]
        if attempt is not None:
            added.append(("x-aiproxy-upstream", attempt.upstream.name))
        if value_of(headers, "request-id") is None:
            added.append(("request-id", self.request.id))
        if self.request.asked_model is not None and attempt is not None:
            added.append(("x-aiproxy-model", self.request.body.model))
        budget = self.request.budget_headers
        if budget:
            headers = [pair for pair in headers if not pair[0].startswith(UNIFIED)]
        return [*self._journal.redactor.pairs(headers), *budget, *added]
