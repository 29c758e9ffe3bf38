"""The client's connection during a request: it is read and written in the request's own `Wait`.

gunicorn reads bodies and writes answers by `recv` and `sendall`. While a request is served these wait no
longer than they may, end with the worker's shutdown, and count progress: a client that takes something now
and then is not cut off, however long all of it takes.
"""

import errno
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..transport.wait import Interrupted, Silent, Wait

#: Seconds for which an upload may be silent.
UPLOAD_SILENCE = 60.0
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

Result = TypeVar("Result")


class Serving:
    """One request on a client's connection."""

    def __init__(self, wait: Wait, send_silence: float) -> None:
        """`send_silence`: seconds for which the client may take nothing of its answer."""
        self.wait = wait
        #: Until when the request's body may come, in monotonic seconds.
        self.upload_by = float("inf")
        self._send_silence = send_silence

    def receive(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """Call until it has received something. Raises `Interrupted`."""
        while True:
            try:
                return call(*arguments)
            except _WOULD_BLOCK as error:
                event = _event(error, select.POLLIN)
            seconds = min(UPLOAD_SILENCE, self.upload_by - time.monotonic())
            self.wait.for_client(event, max(0.0, seconds), may_leave=True)

    def send(self, call: Callable[..., int], data: Any) -> None:
        """Call until all is sent. Raises `BrokenPipeError`: gunicorn takes it for a client that left."""
        sent, latest = 0, float("inf")
        while True:
            try:
                sent += call(memoryview(data)[sent:])
            except _WOULD_BLOCK as error:
                event = _event(error, select.POLLOUT)
            else:
                if sent == len(data):
                    return
                latest = float("inf")
                continue
            latest = min(latest, time.monotonic())
            try:
                self._await_room(event, latest)
            except Interrupted as interrupted:
                raise BrokenPipeError(errno.EPIPE, interrupted.detail) from None

    def _await_room(self, event: int, since: float) -> None:
        """Wait until it makes sense to send again. Raises `Interrupted` once the client takes nothing.

        Linux reports room only when a third of the buffer is free, but sends as soon as some of it is: a slow
        client's progress is found by trying.
        """
        try:
            self.wait.for_client(event, self._send_silence / 4, may_leave=False)
        except Silent:
            if time.monotonic() - since >= self._send_silence:
                raise


class ClientSocket(socket.socket):
    """A connection that gunicorn accepted. Between requests it is a plain socket."""

    serving: Serving | None = None

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """See `Serving.receive`."""
        if self.serving is None:
            return super().recv(bufsize, flags)
        return self.serving.receive(super().recv, bufsize, flags)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """See `Serving.send`."""
        if self.serving is None:
            return super().sendall(data, flags)
        try:
            sent = self.send(data)  # nearly always all of it
        except BlockingIOError:
            sent = 0
        return None if sent == len(data) else self.serving.send(self.send, memoryview(data)[sent:])


class TlsClientSocket(ssl.SSLSocket):
    """The same where gunicorn itself speaks TLS."""

    serving: Serving | None = None

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """See `Serving.receive`."""
        if self.serving is None:
            return super().recv(buflen, flags)
        return self.serving.receive(super().recv, buflen, flags)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """See `Serving.send`."""
        if self.serving is None:
            return super().sendall(data, flags)
        return self.serving.send(super().send, data)


def _event(error: OSError, event: int) -> int:
    """What to wait for: TLS may have to read in order to send, and to send in order to read."""
    if isinstance(error, ssl.SSLWantReadError):
        return select.POLLIN
    return select.POLLOUT if isinstance(error, ssl.SSLWantWriteError) else event
