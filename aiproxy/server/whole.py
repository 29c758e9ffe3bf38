"""A whole answer on its way to the client: a response body in pieces, so that progress can be seen."""

from collections.abc import Callable

_PIECE = 65536


class Whole:
    """The response body of an answer that is complete here."""

    def __init__(self, content: bytes, on_last: Callable[[], None], on_close: Callable[[], None]) -> None:
        """`on_last` is called before the last piece goes out, `on_close` when the server closes the body."""
        self.bytes = 0  # handed out so far
        self._content = content
        self._on_last = on_last
        self._on_close = on_close

    def __len__(self) -> int:
        return len(self._content)

    def __iter__(self) -> "Whole":
        return self

    def __next__(self) -> bytes:
        piece = self._content[self.bytes : self.bytes + _PIECE]
        self.bytes += len(piece)
        if self.bytes >= len(self._content):
            # Once the client has the last byte its next request may be here before this thread goes on.
            self._on_last()
        if not piece:
            raise StopIteration
        return piece

    def close(self) -> None:
        """The server calls it in every case."""
        self._on_last()
        self._on_close()
