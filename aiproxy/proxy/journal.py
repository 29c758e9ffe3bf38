"""What is reported of requests and attempts: to the log, to the metrics and to the last hour's history.

One place reports to all three, so that they never disagree.
"""

import logging
import time

import msgspec

from ..api import MESSAGES
from ..api.headers import value_of
from ..api.usage import Tokens, Usage
from ..errors import ApiError
from ..ledger.ledger import Ledger
from ..ledger.prices import NANO, Prices
from ..ledger.rows import ANONYMOUS, Exchange, storable
from ..observability import logs
from ..observability.history import History
from ..observability.metrics import Metrics
from ..observability.redaction import FIELD, Redactor
from ..policy import Cost, Fault
from .attempt import Attempt, Failure
from .billing import Billing
from .outcome import Outcome
from .request import Request

#: Failures that say nothing of the upstream.
_NOT_ITS_FAULT = (Fault.CLIENT_LEFT, Fault.RESTART)
_BROKEN = {
    Outcome.BROKEN: "broke off in the middle:",
    Outcome.SILENT: "fell silent in the middle:",
    Outcome.ERROR_EVENT: "sent an error in the middle",
}


class Done(msgspec.Struct, frozen=True):
    """How an exchange ended."""

    attempts: int
    status: int
    outcome: Outcome
    bytes: int  # of the body, that went out
    detail: str | None  # of a break
    is_stream: bool
    billing: Billing


#: Bytes of an upstream's error that the log is cut out of.
_ERROR_READ = 65536


class Journal:
    """Thread-safe. Metrics and history are about messages alone: the counting of tokens would blur them.

    No report fails a request: a part that raises is a bug, and the other parts are done all the same.
    """

    def __init__(
        self, redactor: Redactor, metrics: Metrics, history: History, prices: Prices, ledger: Ledger | None
    ) -> None:
        self.redactor = redactor
        self.prices = prices
        self._metrics = metrics
        self._history = history
        self._ledger = ledger

    def attempt(
        self, request: Request, attempt: Attempt, number: int, failure: Failure | None, cost: Cost
    ) -> None:
        """An attempt came to its commit point, or failed before it; `cost`: what the failure cost."""
        verdict = "answered" if failure is None else cost.value
        error = failure.body[:_ERROR_READ].decode(errors="replace") if failure and failure.body else None
        logs.redacted(
            self.redactor,
            logging.INFO if failure is None else logging.WARNING,
            "attempt",
            request.secrets,
            id=request.id,
            number=number,
            upstream=attempt.upstream.name,
            model=request.body.model,
            upstream_model=attempt.model,
            status=attempt.status,
            fault=failure.problem.fault.value if failure is not None else None,
            detail=failure.detail if failure is not None else None,
            verdict=verdict,
            reconnected=attempt.reconnected or None,
            first_byte=attempt.first_byte,
            upstream_request_id=attempt.upstream_request_id,
            error=error,
        )
        if request.path != MESSAGES:
            return
        try:
            self._metrics.attempt(attempt.upstream.name, verdict, attempt.first_byte)
            self._history.attempt(attempt.upstream.name, attempt.first_byte if failure is None else None)
            if failure is not None and failure.problem.fault not in _NOT_ITS_FAULT:
                self._remember(request, attempt, _reason(failure))
        except Exception:
            logs.exception("bug", id=request.id)

    def streaming(self, request: Request) -> None:
        """The answer is a stream, which goes on until `done`."""
        try:
            if request.path == MESSAGES:
                self._metrics.stream_began()
        except Exception:
            logs.exception("bug", id=request.id)

    def done(self, request: Request, attempt: Attempt | None, done: Done) -> None:
        """A request is over; `attempt` is the one whose answer, or whose error, the client got."""
        usage = attempt.usage if attempt is not None else Usage()
        seconds = time.monotonic() - request.began
        logs.redacted(
            self.redactor,
            logging.INFO if done.outcome in (Outcome.COMPLETE, Outcome.CLIENT_LEFT) else logging.WARNING,
            "done",
            request.secrets,
            id=request.id,
            outcome=done.outcome.value,
            client=request.client,
            model=request.model or None,
            fallback_model=request.body.model if request.asked_model is not None else None,
            status=done.status,
            upstream=attempt.upstream.name if attempt is not None else None,
            attempts=done.attempts,
            bytes=done.bytes,
            seconds=seconds,
            detail=done.detail,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=usage.cache_read_input_tokens,
            cache_write_tokens=usage.cache_creation_input_tokens,
            upstream_request_id=attempt.upstream_request_id if attempt is not None else None,
        )
        for part in (self._count, self._bill) if request.path == MESSAGES else ():
            try:
                part(request, attempt, seconds, done)
            except Exception:
                logs.exception("bug", id=request.id)

    def refused(
        self,
        request_id: str,
        path: str,
        secrets: tuple[str, ...],
        error: ApiError,
        client: str | None,
        address: str,
    ) -> None:
        """A request was refused before an upstream was asked; `client` is None where no key is known."""
        try:
            logs.redacted(
                self.redactor,
                logging.WARNING,
                "refused",
                secrets,
                id=request_id,
                client=client,
                address=address or None,
                status=error.status,
                reason=error.message,
            )
            self._metrics.refused(error.type, client)
            if path == MESSAGES:
                self._metrics.request("", "refused", client or "unknown")
        except Exception:
            logs.exception("bug", id=request_id)

    def _count(self, request: Request, attempt: Attempt | None, seconds: float, done: Done) -> None:
        self._metrics.request(request.model, done.outcome.value, request.client)
        if done.is_stream:
            self._metrics.stream_ended()
        if attempt is None or done.outcome is Outcome.ERROR:
            return
        self._metrics.answer(attempt.upstream.name, seconds, attempt.usage)
        self._metrics.client_tokens(request.client, request.model, done.outcome.value, attempt.usage)
        self._history.used(attempt.upstream.name, attempt.usage)
        if done.outcome in _BROKEN:
            self._remember(request, attempt, f"{_BROKEN[done.outcome]} {done.detail or ''}")

    def _bill(self, request: Request, attempt: Attempt | None, seconds: float, done: Done) -> None:
        """A row of the ledger for an exchange that used tokens; the upstream is the one that answered."""
        bill = done.billing.bill
        if bill is None or not (bill.pico or bill.tokens != Tokens()):
            return
        self._metrics.cost(request.client, request.model, done.outcome.value, bill.nano / NANO)
        if self._ledger is None:
            return
        last = attempt or done.billing.last
        self._ledger.add(
            Exchange(
                id=request.id,
                at=time.time(),
                client=ANONYMOUS if request.client is None else request.client,
                model=storable(request.model),
                upstream=last.upstream.name if last is not None else "",
                upstream_model=storable(last.model) if last is not None else "",
                request_class=storable(value_of(request.headers, "x-claude-code-request-class") or ""),
                input=bill.tokens.input,
                output=bill.tokens.output,
                cache_read=bill.tokens.cache_read,
                cache_write_5m=bill.tokens.cache_write_5m,
                cache_write_1h=bill.tokens.cache_write_1h,
                web_searches=bill.web_searches,
                web_fetches=bill.web_fetches,
                cost=bill.nano,
                outcome=done.outcome.value,
                seconds=round(seconds, 3),
                attempts=done.attempts,
                is_estimated=int(done.billing.is_estimated),
                is_unpriced=int(not bill.is_priced),
                upstream_request_id=storable((last and last.upstream_request_id) or ""),
            )
        )

    def _remember(self, request: Request, attempt: Attempt, reason: str) -> None:
        model, reason = (
            self.redactor.text(text.strip(), FIELD, request.secrets) for text in (request.model, reason)
        )
        self._history.failed(attempt.upstream.name, model, reason, request.id)


def _reason(failure: Failure) -> str:
    message = failure.problem.message
    return f"{failure.detail}: {message}" if message else failure.detail
