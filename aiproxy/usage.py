"""The tokens that an answer says it used, for the log."""

import msgspec

from .body import members


class Usage(msgspec.Struct):
    """Tokens by kind, None where the answer did not say.

    The figures in a stream are cumulative: the latest holds.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None

    def note_answer(self, message: dict[str, bytes]) -> None:
        """Take the figures of a Message's (or a `message_delta` event's) top-level members."""
        try:
            figures = members(message.get("usage", b"{}"))
        except ValueError:
            return
        for name in self.__struct_fields__:
            value = figures.get(name, b"")
            if value.isdigit() and len(value) < 16:
                setattr(self, name, int(value))

    def note_event(self, name: bytes, data: bytes) -> None:
        """Take the figures of a `message_start` or `message_delta` event."""
        try:
            event = members(data)
            self.note_answer(members(event.get("message", b"{}")) if name == b"message_start" else event)
        except ValueError:
            return
