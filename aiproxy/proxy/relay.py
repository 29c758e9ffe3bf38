"""A committed stream on its way to the client: the response body, and what becomes of it.

Passes on whole events, their bytes as they came, and beside that only notes whether `message_stop`, an
`error` event and usage figures went by. It ends in one of four ways (complete, error event, break,
client gone), and whichever it is, the attempt is settled exactly once.
"""

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from ..api.report import Report
from ..api.sse import EventTooLarge, Framer, encode, parse
from ..errors import error_body
from ..policy import Fault
from ..transport.transport import Call, CallFailed
from ..upstreams.breaker import Outcome

#: Seconds that an upstream gets to end the body once `message_stop` has come.
AFTER_STOP = 1.0

# A line break followed by `event:` cannot occur inside an event's data, so this search is exact.
_NOTED = re.compile(rb"(?:\A|[\r\n])event: ?(?:message_start|message_delta|message_stop|error)[\r\n]")


_BREAKS = {Fault.TIMEOUT: "silent", Fault.RESTART: "restart"}
_OUTCOMES = {
    "complete": Outcome.SUCCESS,
    "client_left": Outcome.UNDECIDED,
    "restart": Outcome.UNDECIDED,
}
#: What the client is told of each break: error type and message.
_TOLD = {
    "broken": ("api_error", "The upstream broke off its answer."),
    "silent": ("timeout_error", "The upstream fell silent in the middle of its answer."),
    "restart": ("overloaded_error", "aiproxy is restarting and had to break off the answer."),
}


class End(msgspec.Struct, frozen=True):
    """How a request ended, for the log."""

    how: str  # complete, error; a stream also error_event, broken, silent, restart, client_left
    bytes: int
    detail: str | None = None
    streamed: bool = False


class Owner(Protocol):
    """The attempt whose answer is relayed."""

    report: Report

    def shown(self, error: bytes) -> bytes:
        """An error of the upstream's as the client may see it."""
        ...

    def settle(self, outcome: Outcome) -> None: ...


class Relay:
    """The response body of a stream. `close` may come at any time, also before the first `__next__`."""

    def __init__(
        self, call: Call, pieces: Iterator[bytes], held: deque[bytes], framer: Framer, owner: Owner
    ) -> None:
        """`held` was read before the commit point and goes first; `pieces` goes on from there."""
        self._call = call
        self._pieces = pieces
        self._held = held
        self._framer = framer
        self._owner = owner
        self.bytes = 0  # handed out so far
        self._stopped = False  # message_stop went by: the answer is complete, whatever follows
        self._ends: float | None = None  # when to wait for the body's end no longer
        self._erred = False  # an error event went by: the client knows
        self._over = False
        self._to_cut = False
        self._request_id = ""
        self._cut: Callable[[], None] = _nothing
        self._on_end: Callable[[End], None] = _nothing
        self._on_stop: Callable[[], None] = _nothing
        self._on_last: Callable[[], None] = _nothing
        self._on_close: Callable[[], None] = _nothing

    def bind(
        self,
        request_id: str,
        cut: Callable[[], None],
        on_stop: Callable[[], None],
        on_end: Callable[[End], None],
    ) -> None:
        """`cut` breaks off the client's connection.

        `on_stop` is called before the client sees the message's end, `on_end` once the stream is over.
        """
        self._on_stop = on_stop
        self._request_id = request_id
        self._cut = cut
        self._on_end = on_end

    def watch(self, on_last: Callable[[], None], on_close: Callable[[], None]) -> None:
        """`on_last` is called before the body's end goes out, `on_close` when the server closes the body."""
        self._on_last = on_last
        self._on_close = on_close

    def __iter__(self) -> "Relay":
        return self

    def __next__(self) -> bytes:
        while not self._over:
            if self._ends is not None and time.monotonic() >= self._ends:
                self._end("complete")
                break
            try:
                block = self._held.popleft() if self._held else self._framer.feed(next(self._pieces))
                if block:
                    block = self._noted(block)
                    self.bytes += len(block)
                    return block
            except StopIteration:
                if not self._stopped and not self._erred:
                    return self._break("broken", "ended before message_stop")
                self._end(self._so_far("broken"))
            except CallFailed as failed:
                if failed.fault is Fault.CLIENT_LEFT:
                    # One that only closed its sending side still reads: it must not see a clean end.
                    self._to_cut = not self._stopped
                    self._end(self._so_far("client_left"))
                    break
                return self._break(_BREAKS.get(failed.fault, "broken"), failed.detail)
            except EventTooLarge:
                return self._break("broken", "an event is over the size limit")
        if self._to_cut:
            self._cut()
        raise StopIteration

    def close(self) -> None:
        """The server calls it in every case; before the end it means that the client left."""
        self._end(self._so_far("client_left"))
        self._on_close()

    def _so_far(self, otherwise: str) -> str:
        """How the stream ended if nothing more comes: clients leave as soon as they know enough."""
        return "complete" if self._stopped else "error_event" if self._erred else otherwise

    def _noted(self, block: bytes) -> bytes:
        """The block as it goes out."""
        # Most blocks are deltas: the plain search spares them the other, ten times as dear.
        if (b"message_" not in block and b"error" not in block) or not _NOTED.search(block):
            return block
        for event in parse(block):
            if event.name == b"message_stop":
                self._stopped = True
                self._on_stop()
                self._ends = time.monotonic() + AFTER_STOP
                self._call.idle(AFTER_STOP)
            elif event.name == b"error":
                self._erred = True
            else:
                self._owner.report.note_event(event.name, event.data)
        return self._owner.shown(block) if self._erred else block

    def _break(self, how: str, detail: str) -> bytes:
        """Tell the client, then break off: the Python SDK takes a clean early end for success."""
        if self._stopped:
            self._end("complete")
            raise StopIteration
        self._to_cut = True
        self._end(self._so_far(how), detail)
        if self._erred or self._framer.partial:
            # It knows already; or half an event is out, and an event now would complete it as garbage.
            self._cut()
            raise StopIteration
        return encode("error", error_body(*_TOLD[how], self._request_id))

    def _end(self, how: str, detail: str | None = None) -> None:
        if self._over:
            return
        self._over = True
        self._call.close()
        self._owner.settle(_OUTCOMES.get(how, Outcome.FAILURE))
        self._on_last()
        self._on_end(End(how, self.bytes, detail, streamed=True))


def _nothing(*_: object) -> None:
    """Until `bind` says otherwise."""
