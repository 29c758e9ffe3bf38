"""One thread a process that ends calls from outside: deadlines pass, clients leave, the worker stops.

It knows no HTTP: all it does is `abort(reason)`, which must not block, and shutting the socket of a
client that takes nothing any more. The thread starts with the first thing to watch, so after gunicorn's
fork, and sleeps until something happens.
"""

import contextlib
import fcntl
import heapq
import itertools
import os
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from ..observability import logs

#: Seconds before a stopping worker's end at which the requests that are left are ended; half of its
#: time where that is less.
LAST_SECONDS = 2.0


class Reason(Enum):
    """Why a call was ended from outside; it decides the verdict, not the exception that follows."""

    CONNECT_TIMEOUT = "no connection in time"
    TIMEOUT = "no answer in time"
    CLIENT_LEFT = "the client left"
    RESTART = "aiproxy is restarting"


class Abortable(Protocol):
    """What the watcher ends."""

    def abort(self, reason: Reason) -> None: ...


class Scope:
    """The call that a request is making right now. Aborted, it aborts that call and every later one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._call: Abortable | None = None
        self._reason: Reason | None = None

    @property
    def reason(self) -> Reason | None:
        """Why the request is over, None while it is not."""
        return self._reason

    def enter(self, call: Abortable) -> None:
        """From now on this is the call to abort."""
        with self._lock:
            self._call = call
            if self._reason is not None:
                call.abort(self._reason)

    def abort(self, reason: Reason) -> None:
        """End the request's calls; the first reason stays."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
            if self._call is not None:
                self._call.abort(self._reason)


class Deadline:
    """A time by which a call must be done; `cancel` it when it is."""

    def __init__(self, watcher: "Watcher", call: Abortable, at: float, reason: Reason) -> None:
        self._watcher = watcher
        self.call: Abortable | None = call
        self.at = at
        self.reason = reason

    def cancel(self) -> None:
        """Forget the deadline; idempotent, and harmless after it has passed."""
        self._watcher.cancel(self)


class Client:
    """A client's connection during one request; `cancel` it before the connection is given back."""

    def __init__(self, watcher: "Watcher", sock: socket.socket, scope: Abortable, patience: float) -> None:
        self._watcher = watcher
        self.socket = sock
        self.descriptor = sock.fileno()
        self.scope = scope
        self._patience = patience
        self._handed_out: Callable[[], int] = int
        self._progress: tuple[int, int, int] = (0, 0, 0)
        self._since = time.monotonic()

    def cancel(self) -> None:
        """Watch no longer; idempotent."""
        self._watcher.forget(self)

    def follow(self, handed_out: Callable[[], int]) -> None:
        """`handed_out`: how many bytes the server has been given for it so far."""
        self._handed_out = handed_out

    def has_left(self) -> bool:
        """Whether the other side has closed, or shut its sending side, which nginx does as it leaves."""
        if self.socket.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def has_stalled(self, now: float) -> bool:
        """Whether bytes have been waiting for it, none of which it took for as long as it may."""
        progress = (*_progress(self.socket), self._handed_out())
        if progress != self._progress or progress[0] == 0:
            self._progress = progress
            self._since = now
        return now - self._since >= self._patience


class Watcher:
    """Thread-safe; one a process."""

    def __init__(self, patience: float) -> None:
        #: Seconds for which a client may take no byte of what waits for it.
        self.patience = patience
        self._lock = threading.Lock()
        self._heap: list[tuple[float, int, Deadline]] = []
        self._order = itertools.count()  # a tie-break, since deadlines do not compare
        self._cancelled = 0
        self._clients: dict[int, Client] = {}
        self._ends = float("inf")  # when the requests that are left are ended
        self._ended = False
        self._next_sweep = 0.0
        self._asleep_until = 0.0
        self._started = False
        self._closed = False
        self._epoll: select.epoll
        self._wake: int

    def deadline(self, call: Abortable, seconds: float, reason: Reason) -> Deadline:
        """Abort `call` with `reason` in `seconds` from now unless the deadline is cancelled before."""
        deadline = Deadline(self, call, time.monotonic() + seconds, reason)
        with self._lock:
            self._start()
            heapq.heappush(self._heap, (deadline.at, next(self._order), deadline))
            self._wake_by(deadline.at)
        return deadline

    def client(self, sock: socket.socket, scope: Abortable) -> Client:
        """Abort `scope` when the client at the other end of `sock` leaves, or takes nothing any more."""
        client = Client(self, sock, scope, self.patience)
        with self._lock:
            self._start()
            if not self._started:  # closed
                return client
            self._clients[client.descriptor] = client
            ending = time.monotonic() >= self._ends
            self._epoll.register(client.descriptor, select.EPOLLRDHUP)
            self._next_sweep = min(self._next_sweep, time.monotonic() + self.patience / 4)
            self._wake_by(self._next_sweep)
        if ending:
            scope.abort(Reason.RESTART)
        return client

    def shut_down(self, graceful_timeout: float) -> None:
        """The worker stops, and is killed after `graceful_timeout` seconds.

        Shortly before, the requests that are left are ended properly.
        """
        with self._lock:
            left = min(LAST_SECONDS, graceful_timeout / 2)
            self._ends = time.monotonic() + graceful_timeout - left
            self._start()
            self._wake_by(self._ends)

    def cancel(self, deadline: Deadline) -> None:
        """See `Deadline.cancel`."""
        with self._lock:
            if deadline.call is None:
                return
            deadline.call = None
            self._cancelled += 1
            # Most deadlines are minutes off and cancelled within seconds: sweep before they pile up.
            if self._cancelled > 64 and self._cancelled * 2 > len(self._heap):
                self._heap = [entry for entry in self._heap if entry[2].call is not None]
                heapq.heapify(self._heap)
                self._cancelled = 0

    def forget(self, client: Client) -> None:
        """See `Client.cancel`."""
        with self._lock:
            if self._clients.get(client.descriptor) is client:
                del self._clients[client.descriptor]
                self._unregister(client)

    def close(self) -> None:
        """End the thread, soon; nothing is watched any more."""
        with self._lock:
            self._closed = True
            if self._started:
                os.eventfd_write(self._wake, 1)

    @property
    def watched(self) -> int:
        """How many deadlines and clients are being watched."""
        with self._lock:
            return len(self._heap) - self._cancelled + len(self._clients)

    def _start(self) -> None:
        if self._started or self._closed:
            return
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._next_sweep = float("inf")
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        self._started = True

    def _wake_by(self, at: float) -> None:
        if at < self._asleep_until and self._started:
            self._asleep_until = at
            os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        while not self._closed:
            for descriptor, _ in self._epoll.poll(self._sleep()):
                if descriptor == self._wake:
                    os.eventfd_read(self._wake)
                else:
                    self._hung_up(descriptor)
            try:
                self._expire()
                self._sweep()
                self._end()
            except Exception:  # a bug must not end the one thread that ends calls
                logs.exception("bug", thread="watch")
        with self._lock:
            self._started = False
            self._epoll.close()
            os.close(self._wake)

    def _sleep(self) -> float | None:
        """Seconds until something is due."""
        with self._lock:
            at = min(self._heap[0][0] if self._heap else float("inf"), self._next_sweep)
            if not self._ended:
                at = min(at, self._ends)
            self._asleep_until = at
        return None if at == float("inf") else max(0.0, at - time.monotonic())

    def _hung_up(self, descriptor: int) -> None:
        with self._lock:
            client = self._clients.get(descriptor)
            # The event may be from before: ask the socket that has this descriptor now.
            if client is None or not client.has_left():
                return
            # The event is level-triggered: it would come again and again.
            self._unregister(client)
        client.scope.abort(Reason.CLIENT_LEFT)

    def _expire(self) -> None:
        now = time.monotonic()
        while True:
            with self._lock:
                if not self._heap or (self._heap[0][2].call is not None and self._heap[0][0] > now):
                    return
                deadline = heapq.heappop(self._heap)[2]
                call, deadline.call = deadline.call, None
                if call is None:
                    self._cancelled -= 1
                    continue
            call.abort(deadline.reason)

    def _sweep(self) -> None:
        """Find the clients that take nothing any more; the server's thread blocks in sending to them."""
        now = time.monotonic()
        with self._lock:
            if now < self._next_sweep:
                return
            self._next_sweep = now + self.patience / 4 if self._clients else float("inf")
            stalled = [client for client in self._clients.values() if client.has_stalled(now)]
            for client in stalled:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(client.socket, socket.SHUT_RDWR)
        for client in stalled:
            client.scope.abort(Reason.CLIENT_LEFT)

    def _end(self) -> None:
        """End what is left; what comes later ends as it comes."""
        with self._lock:
            if self._ended or time.monotonic() < self._ends:
                return
            self._ended = True
            left = list(self._clients.values())
        for client in left:
            client.scope.abort(Reason.RESTART)

    def _unregister(self, client: Client) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed already, or unregistered when it hung up
            self._epoll.unregister(client.descriptor)


def _progress(sock: socket.socket) -> tuple[int, int]:
    """Bytes that wait to be taken by the other side, and bytes that it has taken (0 where unknown)."""
    try:
        waiting = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
        if waiting == 0 or sock.family == socket.AF_UNIX:
            return waiting, 0
        # struct tcp_info of linux/tcp.h: tcpi_bytes_acked stands at byte 120.
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        return waiting, struct.unpack_from("Q", info, 120)[0]
    except (OSError, ValueError, struct.error):
        return 0, 0  # closed
