"""What an answer says of itself: its message id and the tokens that it used."""

import msgspec

from .body import members, text

_FIGURES = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


class Usage(msgspec.Struct):
    """Tokens by kind, None where the answer did not say.

    The figures in a stream are cumulative: the latest holds.
    """

    message_id: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None

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

    def _note_usage(self, fields: dict[str, bytes]) -> None:
        try:
            figures = members(fields.get("usage", b"{}"))
        except ValueError:
            return
        for name in _FIGURES:
            value = figures.get(name, b"")
            if value.isdigit() and len(value) < 16:
                setattr(self, name, int(value))
