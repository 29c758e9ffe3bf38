"""The gunicorn worker: gthread's, that stops without losing a request and ends at once on Ctrl-C.

The only module that knows gunicorn's worker. A stopping gthread worker leaves its listening sockets open
and unserved for as long as a stream runs: whoever connects then waits for nothing, and is cut off at the end.
"""

import contextlib
import ctypes
import os
import select
import sys
import zlib
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

#: Seconds after which a thread that computes must let another one.
_SWITCH_INTERVAL = 0.05
#: Of glibc's malloc.h.
_M_ARENA_MAX = -8


class Worker(ThreadWorker):  # type: ignore[misc]
    """Used by gunicorn, which calls the handlers below in the main thread."""

    alive: bool

    def load_wsgi(self) -> None:
        """Once the application is there, tell it who serves it."""
        _pin(self.age, [listener.getsockname() for listener in self.sockets])
        _share_arena()
        super().load_wsgi()
        self._service = self.wsgi.extensions["aiproxy"]
        self._service.serve(self.cfg.threads, [listener.getsockname() for listener in self.sockets])

    def run(self) -> None:
        """Until the end, of which others are to know."""
        super().run()
        self._service.seen_out()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM. It may interrupt anything, so the stop itself waits for the event loop's next turn."""
        self.method_queue.defer(self._stop)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGINT and SIGQUIT: running streams are cut off.

        gthread's own handler would wait for their threads, and for ever where it interrupts the main
        thread in the middle of handing a request to one.
        """
        os._exit(0)

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
        self._service.see_out(self.cfg.graceful_timeout)
        self.alive = False


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
