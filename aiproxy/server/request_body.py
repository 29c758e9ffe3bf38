"""The body of a request: read under limits, or read and discarded.

The body of a refused request is read and discarded before the answer: otherwise clients see a broken pipe,
and nginx a 502, instead of the answer. gunicorn itself discards only 64 KiB.
"""

import contextlib
import socket
import time
from typing import Any

from ..errors import ApiError, too_large
from ..transport.wait import ShuttingDown, Silent
from .client import UPLOAD_SILENCE, ClientSocket, TlsClientSocket

#: At most so many bytes, for so many seconds, are read of a body that is refused, and with so many seconds
#: of computing: a body in chunks of one byte each takes half a second per MB.
DISCARD_BYTES = 256 * 1024 * 1024
DISCARD_SECONDS = 30.0
DISCARD_CPU = 0.5

_PIECE = 1024 * 1024
_DISCARDED = 64 * 1024  # gunicorn copies each piece several times


class RequestBody:
    """One request's body, read once by the thread that serves the request."""

    def __init__(self, environ: dict[str, Any]) -> None:
        """`environ`: the WSGI environment."""
        self._input = environ["wsgi.input"]
        self._client: ClientSocket | TlsClientSocket | None = environ.get("gunicorn.socket")
        declared = environ.get("CONTENT_LENGTH") or ""
        self._declared = int(declared) if declared.isdigit() else None
        self._is_empty = not self._declared and "HTTP_TRANSFER_ENCODING" not in environ
        self._is_unusable = False
        connection = environ.get("HTTP_CONNECTION", "").lower()
        is_old = environ.get("SERVER_PROTOCOL") == "HTTP/1.0"
        self._is_last = "close" in connection or (is_old and "keep-alive" not in connection)

    def read(self, limit: int) -> bytes:
        """The whole body.

        Raises `ApiError`: 413 over `limit` bytes, 408 if it falls silent, 400 if it breaks off, 529 where
        a restart breaks it off.
        """
        if self._declared is not None and self._declared > limit:
            raise too_large(limit)
        pieces: list[bytes] = []
        total = 0
        while piece := self._piece(_PIECE if self._declared is None else min(_PIECE, self._declared - total)):
            total += len(piece)
            if total > limit:
                raise too_large(limit)
            pieces.append(piece)
        if self._declared is not None and total < self._declared:
            raise self._broken_off("The request body ended early.")
        return b"".join(pieces)

    def discard(self) -> None:
        """Read and discard what is left, within bounds."""
        if self._is_unusable or self._is_empty:
            return
        ends = time.monotonic() + DISCARD_SECONDS
        if self._client is not None and self._client.serving is not None:
            self._client.serving.upload_by = ends
        left, computed = DISCARD_BYTES, time.thread_time() + DISCARD_CPU
        while left > 0 and time.monotonic() < ends and time.thread_time() < computed:
            if not (piece := self._any()):
                return
            left -= len(piece)
        self._is_unusable = True

    def give_up(self) -> None:
        """Read no more of it."""
        self._is_unusable |= not self._is_empty

    def end(self) -> None:
        """After the answer, where the connection carries no other request.

        gunicorn's main thread would wait two seconds for the client to close it, and accept nobody
        meanwhile; and what is still to come of an upload would be read as the next request.
        """
        if self._client is not None and (self._is_unusable or self._is_last):
            with contextlib.suppress(OSError):
                ways = socket.SHUT_RDWR if self._is_unusable else socket.SHUT_RD
                socket.socket.shutdown(self._client, ways)

    def _any(self) -> bytes:
        """The next bytes to throw away, none at the end or when the client is gone or too slow."""
        try:
            return self._read(_DISCARDED)
        except Exception:  # gunicorn has many, as in `_piece`; the answer may still reach the client
            self._is_unusable = True
            return b""

    def _piece(self, size: int) -> bytes:
        try:
            return self._read(size)
        except Silent:
            self._is_unusable = True
            message = f"The request body was silent for {UPLOAD_SILENCE:.0f} seconds."
            raise ApiError(408, "timeout_error", message) from None
        except ShuttingDown:
            self._is_unusable = True
            raise ApiError(529, "overloaded_error", "aiproxy is restarting.") from None
        except Exception:  # gunicorn's many errors for bodies that break off or are badly chunked
            raise self._broken_off("The request body could not be read.") from None

    def _broken_off(self, message: str) -> ApiError:
        self._is_unusable = True
        return ApiError(400, "invalid_request_error", message)

    def _read(self, size: int) -> bytes:
        """`size` bytes, or what comes before the end."""
        return bytes(self._input.read(size)) if size > 0 else b""
