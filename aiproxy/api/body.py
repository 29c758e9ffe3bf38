"""The request body: the few top-level members that routing needs, and splicing `model` and `stream`.

Nothing else in a body is looked at, validated or rewritten: every other value keeps its bytes. JSON is read
strictly, with msgspec; a request body that it refuses is refused. Events of upstreams are read again with the
standard library, since a character may be split over two of them as halves of a surrogate pair.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from ..errors import ApiError

_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ASSISTANT = re.compile(rb'"role"\s*:\s*"assistant"')
_THINKING = re.compile(rb'"type"\s*:\s*"(?:redacted_)?thinking"')
_WHITE_SPACE = re.compile(r"[ \t\n\r]*")
#: Members that may name further models.
_NAME_MODELS = ("fallbacks", "tools")
#: Members that decide where a request goes and whether it may: two of a name could be read in two ways.
_ONCE = ("model", "stream", *_NAME_MODELS)
#: Top-level members that a body may have; the API knows some thirty.
_MOST_MEMBERS = 1000


class _Message(msgspec.Struct):
    role: Any = None
    content: msgspec.Raw = msgspec.Raw(b'""')


class _Block(msgspec.Struct):
    type: Any = None
    text: msgspec.Raw = msgspec.Raw(b'""')


_MESSAGE, _MESSAGES = msgspec.json.Decoder(_Message), msgspec.json.Decoder(list[_Message])
_BLOCKS = msgspec.json.Decoder(list[_Block])
_UNREADABLE = (ValueError, msgspec.DecodeError, RecursionError)


class Body(msgspec.Struct, frozen=True):
    """One Messages API request body, read once and sent to any number of upstreams."""

    raw: bytes
    members: dict[str, bytes]
    model: str
    stream: bool

    def spliced(self, model: str, stream: bool) -> bytes:
        """The body with `model` and `stream` as given; the very same bytes where they already are."""
        if model == self.model and stream == self.stream:
            return self.raw
        members = dict(self.members)
        if model != self.model:
            members["model"] = msgspec.json.encode(model)
        if stream != self.stream:
            members["stream"] = b"true" if stream else b"false"
        # One copy in all: a body may be megabytes long.
        pieces = [
            piece
            for name, value in members.items()
            for piece in (b",", msgspec.json.encode(name), b":", value)
        ]
        return b"".join([b"{", *pieces[1:], b"}"])

    @property
    def begins_conversation(self) -> bool:
        """Whether no turn of the model's is in it yet."""
        return _ASSISTANT.search(self.members.get("messages", b"")) is None

    @property
    def has_thinking(self) -> bool:
        """Whether a message carries a thinking block, which only the model that wrote it can continue."""
        return _THINKING.search(self.members.get("messages", b"")) is not None

    def with_model(self, model: str) -> "Body":
        """The same body for another model."""
        members = {**self.members, "model": msgspec.json.encode(model)}
        return Body(self.spliced(model, self.stream), members, model, self.stream)

    def named_models(self) -> Iterator[str]:
        """Every model that the body asks for: its own, and those of `fallbacks` and of tools."""
        yield self.model
        for name in _NAME_MODELS:
            value = msgspec.json.decode(self.members.get(name, b"null"))
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, dict) and isinstance(model := each.get("model"), str):
                    yield model

    def preview(self) -> str:
        """The last text of the user's, for the log; what tools answered since then is none."""
        raw = self.members.get("messages", b"[]")
        try:
            for message in _backwards(raw):
                if message.role == "user" and (found := _text_of(bytes(message.content))):
                    return found
        except _UNREADABLE:
            pass
        return ""


def _backwards(messages: bytes) -> Iterator[_Message]:
    if (last := _last_user_message(messages)) is not None:
        yield last
    yield from reversed(_MESSAGES.decode(messages))


def _last_user_message(messages: bytes) -> _Message | None:
    """The last message, if it is a user's and begins with its role, as SDKs write it.

    Spares the reading of all messages. The mark cannot stand in a string, where its quotes would be
    escaped, nor before a smaller object, whose end would not be that of the list.
    """
    start = messages.rfind(b'{"role"')
    try:
        return _MESSAGE.decode(messages[start:].removesuffix(b"]")) if start > 0 else None
    except _UNREADABLE:
        return None


def read(raw: bytes) -> Body:
    """Read what routing needs.

    Raises `ApiError` 400 for a body that is not a JSON object, has more than 1,000 members, has no string
    `model` or two of them, or has a `stream` that is not a boolean.
    """
    fields = _members_of_request(raw)
    model = text(fields.get("model", b"null"))
    if not model:
        raise _invalid("model: a non-empty string is required.")
    stream = fields.get("stream", b"null")
    if stream not in (b"true", b"false", b"null"):
        raise _invalid("stream: expected true or false.")
    return Body(raw=raw, members=fields, model=model, stream=stream == b"true")


class _Name(str):
    """The name of a top-level member; msgspec shows each one to `take` below while it reads."""


def _members_of_request(raw: bytes) -> dict[str, bytes]:
    """As `members`, but what clients get wrong is refused at once. Raises `ApiError` 400."""
    names: set[str] = set()
    twice: list[str] = []

    def take(_: type, name: str) -> _Name:
        if name in names and name in _ONCE:
            twice.append(name)
        names.add(name)
        if len(names) > _MOST_MEMBERS:
            raise ValueError("it has too many members")
        return _Name(name)

    try:
        fields = msgspec.json.decode(raw, type=dict[_Name, msgspec.Raw], dec_hook=take)
    except RecursionError:
        raise _invalid("The request body is nested too deeply.") from None
    except msgspec.DecodeError as error:
        raise _invalid(f"The request body is not a JSON object: {str(error)[:200]}") from None
    if twice:
        raise _invalid(f"{twice[0]}: given twice.")
    return {str(name): bytes(value).strip() for name, value in fields.items()}


def members(raw: bytes) -> dict[str, bytes]:
    """The top-level members of a JSON object, each value as its raw bytes.

    The last of duplicate keys stays. Raises `ValueError` for anything but a JSON object, nesting too deep
    to be read included. Whether the text inside the values is UTF-8 is not looked at.
    """
    try:
        fields = _MEMBERS.decode(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except msgspec.DecodeError:
        return _members_by_the_standard_library(raw)
    return {name: bytes(value).strip() for name, value in fields.items()}


def text(value: bytes) -> str | None:
    """The string that a raw JSON value spells, None if it spells none."""
    if not value.startswith(b'"'):
        return None
    try:
        return msgspec.json.decode(value, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        return str(json.loads(value))
    except ValueError:
        return None


def _members_by_the_standard_library(raw: bytes) -> dict[str, bytes]:
    """As `members`, for what msgspec refuses; slower, and as exact: it cuts the values out of the text."""
    source = raw.decode()
    # Numbers are only stepped over: converting them would refuse integers of over 4,300 digits.
    decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=len, parse_float=len)
    fields: dict[str, bytes] = {}
    at = _skip_white_space(source, 0)
    if source[at : at + 1] != "{":
        raise ValueError("not an object")
    at = _skip_white_space(source, at + 1)
    closed = source[at : at + 1] == "}"
    try:
        while not closed:
            name, at = decoder.raw_decode(source, at)
            if not isinstance(name, str):
                raise ValueError("a key is not a string")
            at = _expect(source, at, ":")
            start = at
            _, at = decoder.raw_decode(source, at)
            fields[name] = source[start:at].encode()
            at = _skip_white_space(source, at)
            closed = source[at : at + 1] == "}"
            if not closed:
                at = _expect(source, at, ",")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _skip_white_space(source, at + 1) != len(source):
        raise ValueError("text after the object")
    return fields


def _skip_white_space(source: str, at: int) -> int:
    found = _WHITE_SPACE.match(source, at)
    return found.end() if found else at


def _expect(source: str, at: int, sign: str) -> int:
    """Step over `sign` and the white space around it."""
    at = _skip_white_space(source, at)
    if source[at : at + 1] != sign:
        raise ValueError(f"expected {sign}")
    return _skip_white_space(source, at + 1)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _text_of(content: bytes) -> str:
    """The text of a message's content: the string itself, or its last text block's."""
    if (string := text(content)) is not None:
        return string
    texts = (text(bytes(block.text)) for block in reversed(_BLOCKS.decode(content)) if block.type == "text")
    return next(filter(None, texts), "")


def _invalid(message: str) -> ApiError:
    return ApiError(400, "invalid_request_error", message)
