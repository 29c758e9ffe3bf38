"""A committed stream on its way to the client.

It passes on whole events, their bytes as they came; only an event that is too large to be held is passed
on in parts. Beside that it notes whether `message_stop`, an `error` event and usage figures went by. It never
ends early in a clean way: the Python SDK takes a clean early end for success.
"""

import math
import re
from collections import deque
from collections.abc import Iterator
from itertools import chain

from ..api.sse import EventTooLarge, Framer, encode, parse
from ..api.usage import Usage, characters
from ..errors import error_body
from ..policy import Fault
from ..transport.failures import TransportError
from ..transport.session import UpstreamResponse
from ..transport.wait import Wait
from .outcome import Outcome

#: Seconds that the upstream may take, after `message_stop`, to end its body, so that its connection can be
#: kept.
END_OF_BODY_SECONDS = 1.0

# A line break followed by `event:` cannot occur inside an event's data, so this search is exact.
_NOTED = re.compile(rb"(?:\A|[\r\n])event: ?(?:message_start|message_delta|message_stop|error)[\r\n]")

#: The length of the text is taken from so many blocks at the beginning and from every so many-th later:
#: taking it from each would cost some 5 % of a delta.
_FIRST_SAMPLED, _SAMPLED = 16, 64
#: Characters of text that make about one token.
_CHARACTERS = 4

_BREAKS = {
    Fault.TIMEOUT: Outcome.SILENT,
    Fault.RESTART: Outcome.RESTART,
    Fault.CLIENT_LEFT: Outcome.CLIENT_LEFT,
}
#: What the client gets for each break: error type and message.
_ERRORS = {
    Outcome.BROKEN: ("api_error", "The upstream broke off its answer."),
    Outcome.SILENT: ("timeout_error", "The upstream fell silent in the middle of its answer."),
    Outcome.RESTART: ("overloaded_error", "aiproxy is restarting and had to break off the answer."),
}


class BreakConnection(Exception):
    """The stream is over and not complete: the client's connection must not end cleanly."""


class Stream:
    """A stream from its commit point on. Iterate over it once; `close` it in every case."""

    def __init__(
        self,
        wait: Wait,
        response: UpstreamResponse,
        pieces: Iterator[bytes],
        held: deque[bytes],
        framer: Framer,
        usage: Usage,
    ) -> None:
        """`held` was read before the commit point and goes first; `pieces` goes on from there."""
        self.error: bytes | None = None  # the data of an error event that went by
        self.has_stopped = False  # message_stop went by: the answer is complete, whatever follows
        self.detail: str | None = None  # of a break
        self._wait = wait
        self._response = response
        self._pieces = pieces
        self._held = held
        self._framer = framer
        self._usage = usage
        self._break: Outcome | None = None
        self._blocks = self._own_bytes = 0
        self._first_bytes = self._first_characters = 0  # of the first blocks
        self._text_bytes = self._text_characters = 0  # of the sampled blocks with text

    @property
    def outcome(self) -> Outcome:
        """How it ended, or would if nothing more came: clients leave as soon as they know enough."""
        if self.has_stopped:
            return Outcome.COMPLETE
        if self.error is not None:
            return Outcome.ERROR_EVENT
        return self._break or Outcome.CLIENT_LEFT

    def estimated_tokens(self, sent: int) -> int:
        """About how many output tokens went by in `sent` bytes, judged by a sample of the blocks."""
        characters: float = self._first_characters
        if self._text_bytes:  # of the blocks with text; message_start and the like are long and come first
            rest = max(0, sent - self._own_bytes - self._first_bytes)
            characters += rest * self._text_characters / self._text_bytes
        return math.ceil(characters / _CHARACTERS)

    def close(self) -> None:
        """Give the upstream's connection back, or close it where the answer was not read to its end."""
        self._response.close()

    def blocks(self, request_id: str) -> Iterator[bytes]:
        """The bytes for the client; `request_id` is for an error event of ours.

        Raises `BreakConnection` where the client must not take the end for a clean one.
        """
        try:
            yield from self._relayed()
        except TransportError as failed:
            self._note_break(_BREAKS.get(failed.fault, Outcome.BROKEN), failed.detail)
        except EventTooLarge:
            self._note_break(Outcome.BROKEN, "an event is over the size limit")
        if self.has_stopped:
            return
        # Half an event may be out: an error event now would complete it as garbage.
        if self._break in _ERRORS and not self._framer.partial:
            event = encode("error", error_body(*_ERRORS[self._break], request_id))
            self._own_bytes = len(event)
            yield event
        raise BreakConnection

    def _relayed(self) -> Iterator[bytes]:
        """The upstream's blocks, up to an error event or the end."""
        for block in chain(self._held, map(self._framer.feed, self._pieces)):
            if not block:  # a trickle that completes no event does not prolong the silence
                if self._framer.ends_in_comment and not self.has_stopped:
                    self._wait.renew()
                continue
            had_stopped = self.has_stopped
            self._note(block)
            self._blocks += 1
            if self._blocks <= _FIRST_SAMPLED or not self._blocks % _SAMPLED:
                self._sample(block)
            yield block
            if self.error is not None:
                return
            if not self.has_stopped:
                self._wait.renew()  # not before: the client may have taken its time
            elif not had_stopped:
                self._wait.limit(END_OF_BODY_SECONDS)
        if not self.has_stopped:
            self._note_break(Outcome.BROKEN, "ended before message_stop")

    def _sample(self, block: bytes) -> None:
        found = characters(block)
        if found:
            self._text_bytes += len(block)
            self._text_characters += found
        if self._blocks <= _FIRST_SAMPLED:
            self._first_bytes += len(block)
            self._first_characters += found

    def _note(self, block: bytes) -> None:
        # Most blocks are deltas: the plain search is ten times as fast as the expression.
        if (b"message_" not in block and b"error" not in block) or not _NOTED.search(block):
            return
        for event in parse(block):
            if event.name == b"message_stop":
                self.has_stopped = True
            elif event.name == b"error":
                self.error = None if self.has_stopped else event.data
                return
            else:
                self._usage.note_event(event.name, event.data)

    def _note_break(self, outcome: Outcome, detail: str) -> None:
        if not self.has_stopped:
            self._break, self.detail = outcome, detail
