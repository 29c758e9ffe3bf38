"""Waiting in the request's own thread, for three things at once.

A request waits for its upstream, for its client's hang-up and for the worker's shutdown. No other thread
touches its sockets. Every blocking call on an upstream's socket is a `Wait.until`.
"""

import errno
import functools
import math
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..policy import Fault

#: Seconds before a stopping worker's end at which the requests that are left are ended; half of its
#: time where that is less.
LAST_SECONDS = 2.0
_READABLE = select.POLLIN
_NO_LIMIT = 1e6  # seconds; poll() takes no infinity

Result = TypeVar("Result")


class Interrupted(Exception):
    """A wait ended without what was waited for. Not an `OSError`: urllib3 and requests let it pass.

    `session` turns it into a `TransportError`; only `Wait.check` lets it out.
    """

    fault = Fault.TIMEOUT
    detail = "no answer in time"


class DeadlineExceeded(Interrupted):
    """The total is over."""


class Silent(Interrupted):
    """The upstream sent no whole event for too long, or the client sent or took nothing."""

    detail = "silent for too long"


class ConnectTimeout(Interrupted):
    """There was no connection in time."""

    fault = Fault.CONNECT
    detail = "no connection in time"


class ClientLeft(Interrupted):
    """The client closed its connection, or its sending side, as nginx does when its own client leaves."""

    fault = Fault.CLIENT_LEFT
    detail = "the client left"


class ShuttingDown(Interrupted):
    """The worker stops."""

    fault = Fault.RESTART
    detail = "aiproxy is restarting"


class Shutdown:
    """One per process: ends all waits when the worker stops. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    @functools.cached_property
    def _descriptor(self) -> int:
        return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """A descriptor that becomes readable, and stays so, when waits are to end.

        It is made at the first call, so after gunicorn's fork: workers must not share it.
        """
        with self._lock:
            return self._descriptor

    def begin(self, graceful_timeout: float) -> None:
        """The worker is killed after `graceful_timeout` seconds: end the waits shortly before."""
        left = min(LAST_SECONDS, graceful_timeout / 2)
        self._timer = threading.Timer(graceful_timeout - left, self.end_waits)
        self._timer.daemon = True
        self._timer.start()

    def end_waits(self) -> None:
        """End all waits now, and those that begin later."""
        os.eventfd_write(self.fileno(), 1)

    def close(self) -> None:
        """Give the descriptor back; nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            if "_descriptor" in self.__dict__:
                os.close(self._descriptor)
                del self._descriptor


class Wait:
    """What ends the waiting of one request. Used by the request's thread alone."""

    def __init__(self, client: socket.socket | None, shutdown: Shutdown) -> None:
        #: Why the request is over, None while it is not: the client left or the worker stops.
        self.ended: Fault | None = None
        self.connect_by = float("inf")  # monotonic seconds; only while a connection is being made
        self._deadline = self._silent_by = 0.0  # monotonic seconds
        self._silence = _NO_LIMIT  # seconds
        self._is_renewed = False
        self.limit()
        self._shutdown = shutdown.fileno()
        self._client = client.fileno() if client is not None else -1
        self._fd = -1  # the upstream's
        self._event = 0
        self._poll = select.poll()
        self._poll.register(self._shutdown, select.POLLIN)
        if self._client >= 0:
            self._poll.register(self._client, select.POLLRDHUP)

    def limit(self, total: float | None = None, silence: float | None = None) -> None:
        """From now on: at most `total` seconds, and at most `silence` seconds without a whole event."""
        self._deadline = time.monotonic() + (_NO_LIMIT if total is None else total)
        self._silence = _NO_LIMIT if silence is None else silence
        self._is_renewed = True

    def expect(self, silence: float) -> None:
        """From now on at most `silence` seconds without a whole event; the total stays."""
        self._silence, self._is_renewed = silence, True

    def renew(self) -> None:
        """A whole event came: silence counts anew, from the moment of the next wait."""
        self._is_renewed = True

    def until(self, fd: int, event: int) -> None:
        """Return when `fd`, the upstream's, is ready for `event`. Raises `Interrupted`."""
        if fd != self._fd or event != self._event:
            self._watch(fd, event)
        now = time.monotonic()
        if self._is_renewed:
            self._silent_by, self._is_renewed = now + self._silence, False
        limit = min(self._deadline, self._silent_by, self.connect_by)
        left = limit - now
        ready = self._poll.poll(left * 1000 if left > 0 else 0)
        if len(ready) == 1 and ready[0][0] == fd and left > 0:
            return
        self._raise_if_over(ready)
        raise self._expired(limit)

    def pause(self, seconds: float) -> None:
        """Let the time pass. Raises `Interrupted` if the client left or the worker stops."""
        self._raise_if_over(self._poll.poll(math.ceil(seconds * 1000)))

    def check(self) -> None:
        """Raise `Interrupted` if the client left, the worker stops or the total is over."""
        self._raise_if_over(self._poll.poll(0))
        if time.monotonic() > self._deadline:
            raise DeadlineExceeded

    def for_client(self, event: int, seconds: float, may_leave: bool) -> None:
        """Return when the client's connection is ready for `event`.

        Raises `Silent` after `seconds`, `ShuttingDown`, and `ClientLeft` unless `may_leave`: what a client
        sent before it left can still be read.
        """
        poll = select.poll()
        poll.register(self._shutdown, select.POLLIN)
        poll.register(self._client, event if may_leave else event | select.POLLRDHUP)
        ready = dict(poll.poll(seconds * 1000))
        if self._shutdown in ready:
            self.ended = Fault.RESTART
            raise ShuttingDown
        if not ready:
            raise Silent
        if not may_leave and ready[self._client] & ~event:
            self.ended = Fault.CLIENT_LEFT
            raise ClientLeft

    def release(self) -> None:
        """Forget the upstream's descriptor: after its close the number may be another connection's."""
        if self._fd >= 0:
            self._poll.unregister(self._fd)
            self._fd = -1

    def _watch(self, fd: int, event: int) -> None:
        if fd != self._fd:
            self.release()
        self._poll.register(fd, event)
        self._fd, self._event = fd, event

    def _raise_if_over(self, ready: list[tuple[int, int]]) -> None:
        found = {fd for fd, _ in ready}
        if self._client in found:
            self.ended = Fault.CLIENT_LEFT
            raise ClientLeft
        if self._shutdown in found:
            self.ended = Fault.RESTART
            raise ShuttingDown

    def _expired(self, limit: float) -> Interrupted:
        if limit == self.connect_by:
            return ConnectTimeout()
        return Silent() if limit == self._silent_by else DeadlineExceeded()


class Sending:
    """One request on its way to an upstream: how it is to be sent, and how far it came."""

    def __init__(self, wait: Wait, connect_timeout: float, is_fresh: bool) -> None:
        """`connect_timeout` in seconds; `is_fresh`: a kept connection will not do."""
        self.wait = wait
        self.connect_timeout = connect_timeout
        self.is_fresh = is_fresh
        self.began = time.monotonic()
        self.is_reused = False  # on a kept connection
        self.is_connected = False
        self.is_at_proxy = False  # on the way to a forward proxy, or waiting for its tunnel
        self.is_answered = False  # a byte of the answer arrived
        self.answer: Any = None  # http.client's response, `connection.HttpAnswer`


_here = threading.local()


def begin(sending: Sending) -> None:
    """From now on connections that this thread takes from a pool, or makes, are for this request.

    urllib3's pools and connections have no other way to learn it.
    """
    _here.sending = sending


def current() -> Sending:
    """The request that this thread is sending."""
    sending: Sending = _here.sending
    return sending


_receive = socket.socket.recv_into


class WatchedSocket(socket.socket):
    """A socket to an upstream: its blocking calls are waits. It is never blocking itself."""

    sending: Sending  # of the request that uses it
    is_looked_into = False  # reads return what is buffered, and never wait

    def settimeout(self, value: float | None) -> None:
        """urllib3 sets its own before each request. The `Wait` decides instead."""

    def pending(self) -> int:
        """As `SSLSocket`'s: bytes that were received and not yet read."""
        return 0

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Receive at least one byte; 0 at the end."""
        if self.is_looked_into:
            raise _nothing_is_buffered()
        wait, descriptor = self.sending.wait, self.fileno()
        while True:
            wait.until(descriptor, _READABLE)
            try:
                return _receive(self, buffer, nbytes, flags)
            except BlockingIOError:
                continue

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all of it."""
        with memoryview(data) as view:
            sent = 0
            while sent < len(view):
                try:
                    sent += self.send(view[sent:], flags)
                except BlockingIOError:
                    self.sending.wait.until(self.fileno(), select.POLLOUT)


class WatchedTlsSocket(ssl.SSLSocket):
    """The same over TLS. A readable descriptor may hold half a record, or a session ticket and no data."""

    sending: Sending
    is_looked_into = False

    def settimeout(self, value: float | None) -> None:
        """See `WatchedSocket`."""

    def do_handshake(self, block: bool = False) -> None:
        """As `SSLSocket`'s, in the `Wait` of the request that makes the connection."""
        self.sending = current()
        self.setblocking(False)
        try:
            self._retry(super().do_handshake)
        except BaseException:
            self.sending.wait.release()
            self.close()  # ssl closes it after errors of its own only
            raise

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """Receive at least one byte; 0 at the end."""
        if self.is_looked_into:
            raise _nothing_is_buffered()
        if not self.pending():
            self.sending.wait.until(self.fileno(), select.POLLIN)
        return self._retry(super().recv_into, buffer, nbytes)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all of it."""
        with memoryview(data) as view:
            sent = 0
            while sent < len(view):
                try:
                    sent += self._retry(super().send, view[sent : sent + 65536])
                except ssl.SSLEOFError:  # urllib3 looks for the answer after this error, but not after TLS's
                    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None

    def _retry(self, call: Callable[..., Result], *arguments: Any) -> Result:
        while True:
            try:
                return call(*arguments)
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            self.sending.wait.until(self.fileno(), event)  # outside: an error would name TLS as its cause


def _nothing_is_buffered() -> BlockingIOError:
    return BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
