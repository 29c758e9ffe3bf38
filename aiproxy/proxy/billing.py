"""What an exchange is billed: what answers reported, and estimates of what was not finished.

An upstream charges also for what nobody read to its end. It is not read on only to learn the figures:

- A stream that the client left or the upstream broke costs what its `message_start` reported and about one
  output token per four characters that went by.
- A whole answer that the client left costs its request's bytes / 4 as input.
- A failed attempt costs what its `message_start` reported, else nothing.
"""

from collections.abc import Iterable

from ..api.usage import Tokens
from ..ledger.prices import Bill, Prices
from ..policy import Fault
from .attempt import Attempt
from .request import Request
from .stream import Stream

_BYTES = 4  # of a request, which make about one token
#: Failed attempts that we ended ourselves while the upstream was at work.
_ENDED_HERE = (Fault.CLIENT_LEFT, Fault.RESTART)


class Billing:
    """Puts one exchange's bill together."""

    def __init__(self, prices: Prices, request: Request) -> None:
        self.bill: Bill | None = None
        self.is_estimated = False
        self.last: Attempt | None = None  # that was billed
        self._prices = prices
        self._request = request

    def add_failed(self, attempts: Iterable[tuple[Attempt, Fault]]) -> None:
        """Attempts that brought no answer."""
        for attempt, fault in attempts:
            if attempt.usage.is_known:
                self._add_reported(attempt)
                self.is_estimated = True
            elif fault in _ENDED_HERE and attempt.was_sent:
                self._add_estimate(attempt, Tokens(input=len(self._request.body.raw) // _BYTES))

    def add_answer(self, attempt: Attempt, stream: Stream | None, sent: int) -> None:
        """The attempt whose answer the client got, of a stream `sent` bytes."""
        if stream is None or stream.has_stopped:
            self._add_reported(attempt)
            return
        reported = attempt.usage.tokens.output
        more = Tokens(output=max(0, stream.estimated_tokens(sent) - reported))
        if not attempt.usage.is_known:
            more += Tokens(input=len(self._request.body.raw) // _BYTES)
        self._add_reported(attempt)
        self._add_estimate(attempt, more)

    def _add_reported(self, attempt: Attempt) -> None:
        model = self._request.body.model
        self._add(attempt, self._prices.bill(attempt.usage, attempt.upstream.name, attempt.model, model))

    def _add_estimate(self, attempt: Attempt, tokens: Tokens) -> None:
        model = self._request.body.model
        self._add(attempt, self._prices.estimate(tokens, attempt.upstream.name, attempt.model, model))
        self.is_estimated = True

    def _add(self, attempt: Attempt, bill: Bill) -> None:
        self.last = attempt
        self.bill = bill if self.bill is None else self.bill + bill
