"""What an answer says of itself: its message id and what it used.

The members of `usage` are those of the SDKs' types `Usage`, `MessageDeltaUsage` and their beta variants.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec

from .body import members, text
from .sse import parse

#: The members of a `content_block_delta` that are text.
_TEXTS = ("text", "thinking", "partial_json")
_COUNTS = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
#: A larger figure is nonsense.
_MOST = 10**11


class Tokens(msgspec.Struct, frozen=True):
    """Tokens by what they cost; `input` is what no prompt cache held or was to hold."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        """The sums, which are no larger than a single figure may be."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return Tokens(*(min(sum(pair), _MOST) for pair in pairs))

    @property
    def prompt(self) -> int:
        """The length of the prompt, cached or not."""
        return self.input + self.cache_read + self.cache_write_5m + self.cache_write_1h


class Iteration(msgspec.Struct, frozen=True):
    """One entry of `usage.iterations`; `model` where it names one."""

    type: str
    model: str | None
    tokens: Tokens


class Usage:
    """What one answer used. The figures in a stream are cumulative: the latest holds.

    The tokens are those at the top level, None where the answer did not say.
    """

    def __init__(self, /, **figures: Any) -> None:
        """`figures`: members of `usage`."""
        self.message_id: str | None = None
        self.input_tokens: int | None = None  # beside the cache
        self.output_tokens: int | None = None
        self.cache_read_input_tokens: int | None = None
        self.cache_creation_input_tokens: int | None = None
        self._figures: dict[str, Any] = {}
        self._take(figures)

    def note_answer(self, message: dict[str, bytes]) -> None:
        """Take what a Message's top-level members say."""
        self.message_id = text(message.get("id", b"")) or self.message_id
        self._note_usage(message)

    def note_event(self, name: bytes, data: bytes) -> None:
        """Take what a `message_start` or `message_delta` event says."""
        try:
            event = members(data)
            if name == b"message_start":
                self.note_answer(members(event.get("message", b"{}")))
            else:
                self._note_usage(event)
        except ValueError:
            return

    @property
    def is_known(self) -> bool:
        """Whether the answer has said anything of tokens yet."""
        return bool(self._figures)

    @property
    def tokens(self) -> Tokens:
        """The sums at the top level. Cache writes of which no 1-hour part is named are for 5 minutes."""
        minutes, hour = self.cache_creation_input_tokens or 0, 0
        if isinstance(parts := self._figures.get("cache_creation"), dict):
            hour = _count(parts.get("ephemeral_1h_input_tokens")) or 0
            if self.cache_creation_input_tokens is None:
                minutes = hour + (_count(parts.get("ephemeral_5m_input_tokens")) or 0)
        return Tokens(
            self.input_tokens or 0,
            self.output_tokens or 0,
            self.cache_read_input_tokens or 0,
            max(0, minutes - hour),
            hour,
        )

    @property
    def iterations(self) -> Iterator[Iteration]:
        """The entries of `iterations`; what is no object is left out."""
        entries = self._figures.get("iterations")
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict):
                model = entry.get("model")
                yield Iteration(
                    str(entry.get("type")), model if isinstance(model, str) else None, Usage(**entry).tokens
                )

    def server_tool_uses(self, name: str) -> int:
        """How often a server tool was used: `web_search_requests`, `web_fetch_requests`."""
        uses = self._figures.get("server_tool_use")
        return _count(uses.get(name)) or 0 if isinstance(uses, dict) else 0

    def says(self, name: str, word: str) -> bool:
        """Whether `speed`, `inference_geo` or `service_tier` has this value."""
        return name in self._figures and self._figures[name] == word

    def _note_usage(self, fields: dict[str, bytes]) -> None:
        try:
            figures = msgspec.json.decode(fields.get("usage", b"{}"))
        except (msgspec.DecodeError, RecursionError):
            return
        if isinstance(figures, dict):
            self._take(figures)

    def _take(self, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            if value is not None:
                self._figures[name] = value
                if name in _COUNTS and type(value) is int and 0 <= value < _MOST:  # `True` is an `int`, too
                    setattr(self, name, value)


def characters(block: bytes) -> int:
    """The characters of text that the events of a stream's block bring."""
    found = 0
    for event in parse(block):
        if event.name == b"content_block_delta":
            with contextlib.suppress(msgspec.DecodeError, RecursionError):
                delta = msgspec.json.decode(event.data, type=_Delta).delta
                found += sum(len(delta[name]) for name in _TEXTS if isinstance(delta.get(name), str))
    return found


class _Delta(msgspec.Struct):
    delta: dict[str, Any] = {}


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < _MOST else None
