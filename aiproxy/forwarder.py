"""The failover loop and nothing else: walks the candidates until one answers, or tells the best failure."""

import logging
import time
from collections.abc import Callable

import msgspec

from . import logs
from .attempt import Answer, Attempt, Failure, Request, Tools
from .balancer import Balancer
from .breaker import Outcome
from .errors import ApiError, error_body
from .headers import Pairs, value_of
from .policy import TIMEOUTS_A_REQUEST, Charge, Fault, Rank, Rule, rule_for
from .relay import End, Relay
from .usage import Usage

#: Characters of an upstream's error in the log.
_ERROR_PREVIEW = 500


class Reply(msgspec.Struct, frozen=True):
    """What the client gets."""

    status: int
    headers: Pairs
    body: bytes | Relay


class Forwarder:
    """Thread-safe; what belongs to one request lives in its own `_Course`."""

    def __init__(self, balancer: Balancer, tools: Tools, redactor: logs.Redactor) -> None:
        self._balancer = balancer
        self._tools = tools
        self._redactor = redactor

    def forward(self, request: Request, cut: Callable[[], None]) -> Reply:
        """Answer a request from the first upstream that can; else tell the best of their errors.

        `cut` breaks off the client's connection. Raises `ApiError` 404 where no upstream serves the model.
        """
        walk = self._balancer.candidates(request.body.model)
        if walk.is_empty:
            raise ApiError(404, "not_found_error", f"model: no upstream serves {request.body.model}")
        course = _Course(request, self._redactor)
        try:
            while course.goes_on and (choice := walk.next(last_resort=not course.request_is_at_fault)):
                if choice.is_trial:
                    logs.circuit(choice.upstream.name, choice.permit.kind.value)
                attempt = Attempt(self._tools, choice, request)
                outcome = course.run(attempt)
                if isinstance(outcome, Answer):
                    return course.answered(attempt, outcome, cut)
            return course.failed()
        finally:
            course.release()


class _Course:
    """What one request has met so far."""

    def __init__(self, request: Request, redactor: logs.Redactor) -> None:
        self.goes_on = True
        self.request_is_at_fault = False
        self._request = request
        self._redactor = redactor
        self._attempts = 0
        self._timeouts = 0
        self._undecided: list[Attempt] = []  # charged only if another upstream answers
        self._rank = Rank.NONE
        self._failure: Failure | None = None  # the one to be told, if none answers
        self._failed_at: Attempt | None = None
        self._retry_afters: list[tuple[float, str]] = []

    def run(self, attempt: Attempt) -> Answer | Failure:
        """Make the attempt; a failure is judged, charged and logged."""
        self._attempts += 1
        outcome = attempt.run()
        if isinstance(outcome, Failure):
            rule = rule_for(outcome.fault, outcome.status, outcome.retry_after)
            self._log_attempt(attempt, outcome, rule)
            self._charge(attempt, outcome, rule)
            self._keep(attempt, outcome, rule)
            self._timeouts += outcome.fault is Fault.TIMEOUT
            self.goes_on = rule.next_upstream and self._timeouts < TIMEOUTS_A_REQUEST
        else:
            self._log_attempt(attempt, None, None)
        return outcome

    def answered(self, attempt: Attempt, answer: Answer, cut: Callable[[], None]) -> Reply:
        """Another upstream answered the same request: those that refused it were at fault."""
        for refused in self._undecided:
            refused.settle(Outcome.FAILURE)
        if isinstance(answer.body, Relay):
            answer.body.bind(self._request.id, cut, lambda end: self._log_done(attempt, answer.status, end))
        else:
            self._log_done(attempt, answer.status, End("complete", len(answer.body)))
        return self._reply(attempt, answer.status, answer.headers, answer.body)

    def failed(self) -> Reply:
        """No upstream answered: the error of theirs that helps the client most, else one of ours."""
        attempt, failure = self._failed_at, self._failure
        if failure is None or failure.status is None:
            status, type_, message = (
                (504, "timeout_error", "No upstream answered in time.")
                if self._timeouts
                else (502, "api_error", "No upstream could answer the request.")
            )
            body = error_body(type_, message, self._request.id)
            self._log_done(None, status, End("error", len(body)))
            return self._reply(None, status, [("content-type", "application/json")], body)
        body = self._redactor.answer(failure.body)
        self._log_done(attempt, failure.status, End("error", len(body)))
        return self._reply(attempt, failure.status, self._with_soonest_retry(failure.headers), body)

    def release(self) -> None:
        """Give back what is still held; of no effect on what is settled."""
        for attempt in self._undecided:
            attempt.settle(Outcome.UNDECIDED)

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
        return Reply(status, [*headers, *added], body)

    def _log_attempt(self, attempt: Attempt, failure: Failure | None, rule: Rule | None) -> None:
        error = None
        if failure is not None and failure.body:
            text = failure.body[: _ERROR_PREVIEW * 16].decode(errors="replace")
            error = self._redactor.text(text, _ERROR_PREVIEW, self._request.secrets)
        logs.line(
            logging.INFO if failure is None else logging.WARNING,
            "attempt",
            id=self._request.id,
            number=self._attempts,
            upstream=attempt.upstream.name,
            model=self._request.body.model,
            upstream_model=attempt.model,
            status=attempt.status,
            fault=failure.fault.value if failure is not None else None,
            detail=failure.detail if failure is not None else None,
            verdict="answered" if rule is None else rule.charge.value,
            reconnected=attempt.reconnected or None,
            first_byte=attempt.first_byte,
            upstream_request_id=attempt.upstream_request_id,
            error=error,
        )

    def _log_done(self, attempt: Attempt | None, status: int, end: End) -> None:
        usage = attempt.usage if attempt is not None else Usage()
        logs.line(
            logging.INFO if end.how in ("complete", "client_left") else logging.WARNING,
            "done",
            id=self._request.id,
            outcome=end.how,
            status=status,
            upstream=attempt.upstream.name if attempt is not None else None,
            attempts=self._attempts,
            bytes=end.bytes,
            seconds=time.monotonic() - self._request.began,
            detail=end.detail,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=usage.cache_read_input_tokens,
            cache_write_tokens=usage.cache_creation_input_tokens,
            upstream_request_id=attempt.upstream_request_id if attempt is not None else None,
        )
