"""The gunicorn worker: gthread's, that stops without losing a request and ends at once on Ctrl-C.

The only module that knows gunicorn's worker. A stopping gthread worker leaves its listening sockets open
and unserved for as long as a stream runs: whoever connects then waits for nothing, and is cut off at the end.
"""

import contextlib
import ctypes
import logging
import os
import re
import select
import socket
import sys
import zlib
from typing import Any

from gunicorn.http.errors import ParseException
from gunicorn.util import write_nonblock
from gunicorn.workers.gthread import ThreadWorker

from ..errors import ApiError, new_request_id, status_line
from ..observability import logs
from .client import ClientSocket

#: Seconds after which a thread that computes must let another one.
_SWITCH_INTERVAL = 0.05
#: Of gunicorn's exceptions; others are 400.
_STATUS = {
    "UnsupportedTransferCoding": 501,
    "LimitRequestLine": 414,
    "ExpectationFailed": 417,
    "LimitRequestHeaders": 431,
}
#: Of glibc's malloc.h.
_M_ARENA_MAX = -8


class Worker(ThreadWorker):  # type: ignore[misc]
    """Used by gunicorn, which calls the handlers below in the main thread."""

    alive: bool

    def load_wsgi(self) -> None:
        """Load the application, and give it the threads and addresses that serve it."""
        _pin(self.age, [listener.getsockname() for listener in self.sockets])
        _share_arena()
        super().load_wsgi()
        self._service = self.wsgi.extensions["aiproxy"]
        self._service.serve(self.cfg.threads, [listener.getsockname() for listener in self.sockets])

    def run(self) -> None:
        """Until the end, of which others are to know."""
        super().run()
        self._service.after_run()

    def enqueue_req(self, conn: Any) -> None:
        """As gthread's, with a socket of ours in a new connection."""
        if not isinstance(conn.sock, ClientSocket) and not conn.initialized:
            conn.sock = ClientSocket(fileno=conn.sock.detach())
        super().enqueue_req(conn)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """As gthread's; meanwhile the client's socket waits as `client` says."""
        sock = conn.sock
        sock.serving = self._service.serving(sock)
        sock.setblocking(False)
        try:
            return super().handle_request(req, conn)
        finally:
            sock.serving = None
            with contextlib.suppress(OSError):  # gunicorn may have closed it
                sock.setblocking(True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM. It may interrupt anything, so the stop itself waits for the event loop's next turn."""
        self.method_queue.defer(self._stop)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGINT and SIGQUIT: running streams are cut off.

        gthread's own handler would wait for their threads, and for ever where it interrupts the main
        thread in the middle of handing a request to one.
        """
        os._exit(0)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """A request that gunicorn itself cannot read is refused in the API's shape.

        gunicorn's own words repeat the part that is wrong, to the log and to the client: perhaps a key.
        """
        request_id = new_request_id()
        error = _refusal(exc)
        if isinstance(exc, ParseException):
            logs.line(logging.WARNING, "refused", id=request_id, status=error.status, reason=error.message)
        else:
            logs.exception("bug", id=request_id)
        body = error.body(request_id)
        head = [
            f"HTTP/1.1 {status_line(error.status)}",
            "connection: close",
            "content-type: application/json",
            f"content-length: {len(body)}",
            f"request-id: {request_id}",
            f"x-aiproxy-request-id: {request_id}",
            *(f"{name}: {value}" for name, value in error.headers),
            "\r\n",
        ]
        with contextlib.suppress(OSError):  # it may be gone
            write_nonblock(client, "\r\n".join(head).encode() + body)
            # gunicorn's main thread would wait two seconds for the client to close the connection. It would
            # accept nobody meanwhile, and after thirty such requests it would be taken for dead.
            socket.socket.shutdown(client, socket.SHUT_RD)

    def accept(self, listener: Any) -> None:
        """As gthread's; an event from before the stop may still be on its way here."""
        if listener.sock is not None:
            super().accept(listener)

    def _stop(self) -> None:
        """Take in every connection that waits to be accepted, and refuse all that come later.

        So a client, or nginx, either gets its answer here or is free to go elsewhere at once.
        """
        if not self.alive:
            return
        self.set_accept_enabled(False)
        for listener in self.sockets:
            while _is_waited_for(listener):
                self.accept(listener)
            listener.close()
        for connection in self.pending_conns:  # they have sent nothing; gunicorn would wait for them
            connection.timeout = 0.0
        self._service.shut_down(self.cfg.graceful_timeout)
        self.alive = False


def _refusal(exc: BaseException) -> ApiError:
    """With a status as gunicorn's, and its exception's name for a reason."""
    if not isinstance(exc, ParseException):
        return ApiError(500, "api_error", "Internal error in aiproxy; see its log.")
    name = type(exc).__name__
    words = " ".join(re.findall("[A-Z]+(?![a-z])|[A-Z][a-z0-9]+", name)).lower()
    status = _STATUS.get(name, 400)
    return ApiError(status, "invalid_request_error", f"The request is no HTTP that can be served: {words}.")


def _pin(age: int, addresses: list[Any]) -> None:
    """Keep a worker on one core: Python's lock lets one thread run at a time, wherever it is.

    On several cores threads hand it to one another across them, at up to a third more CPU time
    (bench/NOTES.md). `age` counts gunicorn's workers, and the port tells two instances apart, so that those
    on neighbouring ports do not meet on a core.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL)
    cores = sorted(os.sched_getaffinity(0))
    ports = [each[1] if isinstance(each, tuple) else zlib.crc32(str(each).encode()) for each in addresses]
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.sched_setaffinity(0, {cores[(age + sum(ports)) % len(cores)]})


def _share_arena() -> None:
    """One heap for all threads, which wait for one another anyway: else each of many keeps what it freed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's
        libc.mallopt(_M_ARENA_MAX, 1)


def _is_waited_for(listener: Any) -> bool:
    poll = select.poll()
    poll.register(listener.fileno(), select.POLLIN)
    return bool(poll.poll(0))
