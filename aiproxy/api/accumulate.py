"""A whole event stream read into the one Message it spells: what the API would have answered unstreamed.

The rules are the accumulator's of Anthropic's own SDKs (`lib/streaming`, beta variant) and
https://docs.anthropic.com/en/api/messages-streaming. No value is decoded that need not be: numbers,
nested objects and unknown members keep their bytes, and text is joined in its escaped form. Framing is
`sse`'s business, and which failure leads to what is the caller's.
"""

import json
import re

from .body import members, text
from .sse import Event

# A `message_delta` may name these to say that there is none; all else that is null there says nothing.
_STOP_MEMBERS = frozenset({"stop_reason", "stop_sequence", "stop_details"})

# Of the event itself, or put together here: a `message_delta` never replaces them as they stand.
_NEVER_OVERLAID = frozenset({"type", "delta", "usage", "content"})


class Malformed(Exception):
    """The stream spells no Message. Says why in few words, and none of them from the conversation."""


class Accumulator:
    """Takes the events of one stream, in order. After `Malformed` it is of no further use.

    `partial_strings` says what a tool input that was cut off keeps of its last, unfinished string: the
    part that came (the SDKs do so under the beta `fine-grained-tool-streaming-2025-05-14`) or nothing.
    """

    def __init__(self, partial_strings: bool = False) -> None:
        self.complete = False  # message_stop came
        self.error: bytes | None = None  # the data of an `error` event, as it came
        self.repaired = False  # a tool input was cut off and has been completed
        self._partial_strings = partial_strings
        self._message: dict[str, bytes] | None = None
        self._usage: dict[str, bytes] | None = (
            None  # read once: a stream may have many `message_delta` events
        )
        self._blocks: dict[int, _Block] = {}

    def feed(self, event: Event) -> None:
        """Take the next event; what follows `message_stop` or an `error` event is ignored.

        Raises `Malformed`.
        """
        if self.complete or self.error is not None:
            return
        if event.name == b"error":
            self.error = event.data
        elif self._message is not None:
            self._go_on(self._message, event)
        elif event.name == b"message_start":
            message = _object(_required(_read(event), "message"))
            _elements(message.get("content", b"null"))  # must be a list, and here is the time to say so
            self._message = message

    def message(self) -> bytes:
        """The Message as JSON. Raises `Malformed` unless the stream is `complete`."""
        if self._message is None or not self.complete:
            raise Malformed("the stream ended before message_stop")
        content = _elements(self._message.get("content", b"null"))
        content += [block.written() for _, block in sorted(self._blocks.items())]
        usage = {} if self._usage is None else {"usage": _written(self._usage)}
        return _written({**self._message, **usage, "content": _list(content)})

    def _go_on(self, message: dict[str, bytes], event: Event) -> None:
        match event.name:
            case b"content_block_delta":
                fields = _read(event)
                self._block(fields).add(_object(_required(fields, "delta")))
            case b"content_block_start":
                self._start_block(message, _read(event))
            case b"content_block_stop":
                self._block(_read(event))  # must have been started; its input is read once, at the end
            case b"message_delta":
                self._overlay(message, _read(event))
            case b"message_stop":
                _read(event)
                for block in self._blocks.values():
                    self.repaired |= block.settle(self._partial_strings)
                self.complete = True
            case b"message_start":
                raise Malformed("a second message_start")

    def _overlay(self, message: dict[str, bytes], event: dict[str, bytes]) -> None:
        """Lay a `message_delta` over the message; usage figures are cumulative, so they replace too."""
        delta = _object(_required(event, "delta"))
        for fields in (delta, event):
            for name, value in fields.items():
                says_something = value != b"null" or (fields is delta and name in _STOP_MEMBERS)
                if says_something and name not in _NEVER_OVERLAID:
                    message[name] = value
        figures = _object_or_empty(event.get("usage", b"null"))
        news = {name: value for name, value in figures.items() if value != b"null"}
        if news:
            if self._usage is None:
                self._usage = _object_or_empty(message.get("usage", b"null"))
            self._usage.update(news)

    def _start_block(self, message: dict[str, bytes], fields: dict[str, bytes]) -> None:
        index = _index(fields)
        if index in self._blocks:
            raise Malformed("a content block was started twice")
        block = _Block(_required(fields, "content_block"))
        self._blocks[index] = block
        if block.type == "fallback":  # from here on another model speaks, and the Message is its own
            model = _required(_object(_required(block.fields, "to")), "model")
            _inside(model)  # must be a string
            message["model"] = model

    def _block(self, fields: dict[str, bytes]) -> "_Block":
        block = self._blocks.get(_index(fields))
        if block is None:
            raise Malformed("an event is about a content block that was not started")
        return block


class _Block:
    """One content block: its start as it came, and what its deltas add or replace."""

    def __init__(self, raw: bytes) -> None:
        self.fields = _object(raw)
        self.type = text(self.fields.get("type", b"null"))
        self._raw = raw
        self._replaced: dict[str, bytes] = {}
        # The insides of string literals; joined they are the inside of one: a character that was split
        # over two deltas as a pair of `\u` escapes is whole again, and nothing is copied twice.
        self._strings: dict[str, list[bytes]] = {}
        self._citations: list[bytes] = []
        self._input: list[bytes] = []

    def add(self, delta: dict[str, bytes]) -> None:
        """Take a delta; one that is unknown or does not fit the block changes nothing."""
        match text(_required(delta, "type")), self.type:
            case "text_delta", "text":
                self._append("text", _required(delta, "text"))
            case "thinking_delta", "thinking":
                self._append("thinking", _required(delta, "thinking"))
            case "input_json_delta", "tool_use" | "server_tool_use" | "mcp_tool_use":
                self._input.append(_inside(_required(delta, "partial_json")))
            case "citations_delta", "text":
                if not self._citations:
                    self._citations = _elements(self.fields.get("citations", b"null"))
                self._citations.append(_required(delta, "citation"))
            case "signature_delta", "thinking":
                self._replaced["signature"] = _required(delta, "signature")
            case "compaction_delta", "compaction":
                for name in delta.keys() & {"content", "encrypted_content"}:
                    self._replaced[name] = delta[name]

    def settle(self, partial_strings: bool) -> bool:
        """Read the tool input that has come; whether it was cut off and had to be completed."""
        if not self._input:
            return False
        source = text(b'"' + b"".join(self._input) + b'"') or ""
        # Only half of a surrogate pair cannot be encoded, and its replacement is the JSON escape for it.
        value = source.encode(errors="backslashreplace")
        if not value.strip(b" \t\n\r"):  # the start's own input stands
            return bool(source)
        whole = _is_json(value)
        self._replaced["input"] = value if whole else _completed(value, partial_strings)
        return not whole

    def written(self) -> bytes:
        """The block as JSON: the very bytes of its start where no delta came."""
        changes = dict(self._replaced)
        for name, pieces in self._strings.items():
            changes[name] = b'"' + b"".join(pieces) + b'"'
        if self._citations:
            changes["citations"] = _list(self._citations)
        return _written({**self.fields, **changes}) if changes else self._raw

    def _append(self, name: str, value: bytes) -> None:
        pieces = self._strings.get(name)
        if pieces is None:
            first = self.fields.get(name, b"null")
            pieces = self._strings[name] = [] if first == b"null" else [_inside(first)]
        pieces.append(_inside(value))


# Reading and writing raw JSON


def _read(event: Event) -> dict[str, bytes]:
    """The members of an event's data."""
    try:
        event.data.isascii() or event.data.decode()
    except UnicodeDecodeError:
        raise Malformed("an event is not UTF-8") from None
    return _object(event.data)


def _object(raw: bytes) -> dict[str, bytes]:
    try:
        return members(raw)
    except ValueError:
        raise Malformed("a JSON object was expected in an event") from None


def _object_or_empty(raw: bytes) -> dict[str, bytes]:
    return {} if raw == b"null" else _object(raw)


def _required(fields: dict[str, bytes], name: str) -> bytes:
    try:
        return fields[name]
    except KeyError:
        raise Malformed(f"an event has no {name}") from None


def _index(fields: dict[str, bytes]) -> int:
    raw = _required(fields, "index")
    if not raw.isdigit() or len(raw) > 9:
        raise Malformed("an index is not a number")
    return int(raw)


def _inside(raw: bytes) -> bytes:
    """What stands between the quotes of a string literal."""
    if not raw.startswith(b'"'):
        raise Malformed("a string was expected in an event")
    return raw[1:-1]


def _elements(raw: bytes) -> list[bytes]:
    """A list's elements, those of a non-empty one in one piece: they are only ever followed by others."""
    if raw == b"null":
        return []
    if not raw.startswith(b"["):
        raise Malformed("a list was expected in an event")
    inside = raw[1:-1].strip()
    return [inside] if inside else []


def _list(elements: list[bytes]) -> bytes:
    return b"[" + b",".join(elements) + b"]"


def _written(fields: dict[str, bytes]) -> bytes:
    # json.dumps, because a name may hold half a surrogate pair, which nothing but an escape can write.
    return b"{" + b",".join(json.dumps(name).encode() + b":" + raw for name, raw in fields.items()) + b"}"


def _is_json(value: bytes) -> bool:
    """Whether the bytes are one JSON value; `members` knows, and `1,"input":2` must not get past it."""
    try:
        return members(b'{"input":' + value + b"}") == {"input": value.strip()}
    except ValueError:
        return False


# JSON that was cut off
#
# One pass over its tokens, without recursion, remembers up to where the text can stand and what would
# close the containers that are open there. What may come next is known by the tokens' first characters,
# `0` for numbers and literals.

_VALUE = b'{["0'
_FIRST_ELEMENT = _VALUE + b"]"
_KEY = b'"'
_FIRST_KEY = _KEY + b"}"

#: Tokens of a tool input that was cut off, some 0.3 s of computing. A text of megabytes is one token.
_MOST_TOKENS = 100_000

_TOKEN = re.compile(
    rb"""
    [ \t\n\r]*+
    (?: (?P<sign> [{}\[\],:] )
      | (?P<string> " BODY " )
      | (?P<scalar> (?: NUMBER | true | false | null ) (?![-+.0-9A-Za-z]) )
      | (?P<cut_string> " BODY ) CUT_ESCAPE \Z
      | (?P<cut_scalar> - | INTEGER \. | INTEGER (?:\.[0-9]+)? [eE] [-+]?
                      | t | tr | tru | f | fa | fal | fals | n | nu | nul ) \Z
      | \Z
    )
    """.replace(b"BODY", rb'(?: [^"\\\x00-\x1f]++ | (?! CUT_ESCAPE \Z ) \\ (?: ["\\/bfnrt] | u HEX{4} ) )*+')
    # Half of a surrogate pair is a part of an escape, too: one character takes both.
    .replace(b"CUT_ESCAPE", rb"(?: \\ u [dD] [89abAB] HEX{2} )? (?: \\ (?: u HEX{0,3} )? )?")
    .replace(b"NUMBER", rb"INTEGER (?: \.[0-9]+ )? (?: [eE] [-+]? [0-9]+ )?")
    .replace(b"INTEGER", rb"-? (?: 0 | [1-9][0-9]*+ )")
    .replace(b"HEX", rb"[0-9a-fA-F]"),
    re.VERBOSE,
)


def _completed(raw: bytes, partial_strings: bool) -> bytes:
    """A JSON text that was cut off, as far as it can stand, and closed.

    A key without its value goes, so does a number or literal that is not whole, and an unfinished string
    unless `partial_strings`. Raises `Malformed` for what is not the beginning of an object or a list.
    """
    beginning = _Beginning()
    at = 0
    for _ in range(_MOST_TOKENS):
        token = _TOKEN.match(raw, at)
        if token is None:
            raise Malformed("a tool input is not JSON")
        if token.lastgroup is None:
            break
        beginning.take(token, token.lastgroup, partial_strings)
        at = token.end()
    else:
        raise Malformed("a tool input was cut off and is too intricate to be completed")
    value = raw[: beginning.kept] + beginning.quote + beginning.closers[::-1]
    if not beginning.closers or not _is_json(value):  # whole, yet no JSON: nested too deeply
        raise Malformed("a tool input is not JSON")
    return value


class _Beginning:
    """Where a JSON text stands after the tokens taken so far."""

    def __init__(self) -> None:
        self.kept = 0
        self.quote = b""
        self.closers = bytearray()
        self._expected = _VALUE

    def take(self, token: re.Match[bytes], group: str, partial_strings: bool) -> None:
        """Take one token. Raises `Malformed` for one that cannot stand here."""
        kind = token[group] if group == "sign" else b'"' if group.endswith("string") else b"0"
        if kind not in self._expected:
            raise Malformed("a tool input is not JSON")
        is_value = self._expected.startswith(_VALUE)
        if group.startswith("cut"):
            if group == "cut_string" and partial_strings and is_value:
                self.kept = token.end(group)
                self.quote = b'"'
        elif kind in b"{[":
            self.kept = token.end(group)
            self.closers += b"}" if kind == b"{" else b"]"
            self._expected = _FIRST_KEY if kind == b"{" else _FIRST_ELEMENT
        elif kind == b",":
            self._expected = _KEY if self.closers.endswith(b"}") else _VALUE
        elif kind == b":":
            self._expected = _VALUE
        elif kind == b'"' and not is_value:
            self._expected = b":"
        else:
            self._end_value(token.end(group), closes=kind in b"}]")

    def _end_value(self, end: int, closes: bool) -> None:
        if closes:
            self.closers.pop()
        self.kept = end
        self._expected = b"," + self.closers[-1:] if self.closers else b""
