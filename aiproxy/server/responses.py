"""The response of an exchange: its body, and what happens when the server closes it."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import flask

from ..api.headers import Pairs
from ..errors import status_line
from ..proxy.stream import BreakConnection


class Response(flask.Response):
    """A response whose body is closed also where the server never gets to see it."""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        try:
            body = super().__call__(environ, start_response)
        except BaseException:
            self.close()
            raise
        return body


class Body:
    """The body of one response. gunicorn closes it after the last byte or after a failed write."""

    def __init__(
        self,
        pieces: Iterator[bytes],
        client: socket.socket | None,
        is_head: bool,
        on_close: Callable[[int, bool], None],
    ) -> None:
        """`is_head`: the client waits for no byte of it. `on_close` gets the bytes that were handed out and
        whether the server took all of them."""
        self.bytes = 0  # handed out so far
        self._pieces = pieces
        self._client = client
        self._is_complete = is_head
        self._on_close = on_close

    def __iter__(self) -> Iterator[bytes]:
        try:
            for piece in self._pieces:
                self.bytes += len(piece)
                yield piece
            self._is_complete = True
        except BreakConnection:
            break_connection(self._client)

    def close(self) -> None:
        """Called once by the server, also where it took nothing."""
        self._on_close(self.bytes, self._is_complete)


def response(status: int, headers: Pairs, body: Body, length: int | None) -> flask.Response:
    """The Flask response of a reply; `length` in bytes, None for a stream."""
    made = Response(body, status=status_line(status), direct_passthrough=True)
    made.headers.clear()
    if length is not None:
        headers = [*headers, ("content-length", str(length))]
    made.headers.extend(headers)
    return made


def break_connection(client: socket.socket | None) -> None:
    """Break off the client's connection, so that it cannot take a stream's early end for a clean one.

    The plain socket's method, also where gunicorn itself speaks TLS: a TLS socket's own drops the TLS layer
    first, and what is sent in that gap goes out in clear. gunicorn then finds the connection broken when it
    writes the end of the body, and closes it. Both ways, else its main thread would wait two seconds for the
    client to close too, and accept nobody meanwhile.
    """
    if client is None:
        raise ConnectionAbortedError("no connection to break off")
    with contextlib.suppress(OSError):  # gone already
        socket.socket.shutdown(client, socket.SHUT_RDWR)
