"""Event framing: bytes to events and back.

The rules are https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream;
what an event means is not known here. Lines end in `\\n`, `\\r\\n` or `\\r` and in nothing else
(`str.splitlines` would also cut at U+2028 and others, which may stand in the middle of a JSON string).
A `Framer` belongs to one stream and to one thread.
"""

import re
from collections.abc import Iterator

import msgspec

#: Bytes of an unfinished event above which a `Framer` passes on what it carries.
PASS_ON = 4 * 1024 * 1024

#: Bytes that one event may have.
MAX_EVENT = 16 * 1024 * 1024

# A blank line is a line's end right after another. `\r\n` is one end, every other pair of the two is two.
_BLANK_LINE = re.compile(rb"[\r\n](?:\r\n?|(?<!\r)\n)")
_BLANK_LINE_ENDS = (b"\n\n", b"\n\r\n", b"\r\r\n", b"\n\r", b"\r\r")
_BOM = b"\xef\xbb\xbf"


class EventTooLarge(Exception):
    """One event has more than `MAX_EVENT` bytes; the `Framer` that says so is of no further use."""


class Event(msgspec.Struct, frozen=True):
    """One event: its name, b"" where it has none, and its data lines joined by `\\n`."""

    name: bytes
    data: bytes


def parse(block: bytes) -> Iterator[Event]:
    """The events in a block of bytes that begins where an event begins.

    An event that no blank line ends is dropped, and so is one without any `data` line; both as the
    specification wants it.
    """
    # What follows the last end of a line is a line not yet complete, or nothing: never a blank line.
    lines = block.removeprefix(_BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    name = b""
    data: list[bytes] = []
    for line in lines:
        if not line:
            if data:
                yield Event(name, b"\n".join(data))
            name = b""
            data = []
            continue
        field, _, value = line.partition(b":")  # a comment has no field name and so is no known field
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")


def encode(name: str, data: bytes) -> bytes:
    """One event's bytes; data of several lines becomes as many `data` lines."""
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\ndata: ")
    return b"event: " + name.encode() + b"\ndata: " + lines + b"\n\n"


class Framer:
    """Cuts a stream of pieces where events end; all bytes come out again as they went in.

    With `pass_on` an unfinished event of more than `PASS_ON` bytes is passed on in parts, so that
    memory stays bounded; without it only whole events come out.
    """

    def __init__(self, pass_on: bool = True) -> None:
        self._pass_on = pass_on
        self._held = bytearray()
        self._size = 0  # bytes of the unfinished event, held here or passed on
        # The byte before the next piece. Between two events it is a line's end whatever was there: an `\n`
        # that belongs to a `\r` already passed on then counts as one more blank line, which changes nothing.
        self._before = b"\n"

    @property
    def carried(self) -> int:
        """Bytes of the unfinished event that are held here."""
        return len(self._held)

    @property
    def partial(self) -> bool:
        """Whether a part of the unfinished event has been passed on already."""
        return self._size > len(self._held)

    @property
    def ends_in_comment(self) -> bool:
        """Whether the last line that is complete within the unfinished event is a comment."""
        if not self._held.endswith((b"\n", b"\r")):
            return False
        line = bytes(self._held).rstrip(b"\r\n")
        return line[max(line.rfind(b"\n"), line.rfind(b"\r")) + 1 :].startswith(b":")

    def feed(self, piece: bytes) -> bytes:
        """Take the next piece and return what may be passed on: all up to the end of the last blank line.

        Raises `EventTooLarge`.
        """
        if self._size + len(piece) > MAX_EVENT:
            self._check_sizes(piece)
        if not self._held and piece.endswith(_BLANK_LINE_ENDS):
            self._size = 0
            self._before = b"\n"
            return piece
        end = self._end_of_last_blank_line(piece)
        # Once a part is out, holding back the rest would protect nobody.
        passes_on = self._pass_on and self.partial and not end
        self._held += piece[: end or len(piece)]
        ready = b""
        if end:
            ready = bytes(self._held)
            self._held = bytearray(piece[end:])
            self._size = 0
        self._size += len(piece) - end
        self._before = (piece[-1:] or self._before) if self._size else b"\n"
        if passes_on or (self._pass_on and len(self._held) > PASS_ON):
            ready += self._held
            self._held = bytearray()
        return ready

    def _end_of_last_blank_line(self, piece: bytes) -> int:
        """Where in the piece it ends; 0 if there is none. What came before is not searched again."""
        # Looking for what is not there takes longest, and most streams have no `\r` at all.
        pairs = (b"\n\n", b"\n\r", b"\r\r") if b"\r" in piece else (b"\n\n",)
        at = max(piece.rfind(pair) for pair in pairs)
        if at < 0:
            border = _BLANK_LINE.match(self._before + piece[:2])
            return border.end() - 1 if border else 0
        return at + (3 if piece[at + 1 : at + 3] == b"\r\n" else 2)

    def _check_sizes(self, piece: bytes) -> None:
        """Refuse a piece with which an event, its first, its last or one between, gets too large."""
        start = 1 - self._size  # `before` stands at 0, so the piece begins at 1
        known = self._before + piece
        ends = [blank.end() for blank in _BLANK_LINE.finditer(known)]
        for end in [*ends, len(known)]:
            if end - start > MAX_EVENT:
                raise EventTooLarge(f"an event of more than {MAX_EVENT} bytes")
            start = end
