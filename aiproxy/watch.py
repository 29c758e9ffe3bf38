"""One thread a process that ends calls: when a deadline passes, it aborts the call with a reason.

It knows no HTTP: all it does to a call is `abort(reason)`, which must not block. The thread starts
with the first deadline, so after gunicorn's fork, and sleeps until the earliest one.
"""

import heapq
import itertools
import threading
import time
from enum import Enum
from typing import Protocol


class Reason(Enum):
    """Why a call was ended from outside; it decides the verdict, not the exception that follows."""

    CONNECT_TIMEOUT = "no connection in time"
    TIMEOUT = "no answer in time"


class Abortable(Protocol):
    """What the watcher ends."""

    def abort(self, reason: Reason) -> None: ...


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


class Watcher:
    """Thread-safe; one a process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Deadline]] = []
        self._order = itertools.count()  # a tie-break, since deadlines do not compare
        self._cancelled = 0
        self._thread: threading.Thread | None = None

    def deadline(self, call: Abortable, seconds: float, reason: Reason) -> Deadline:
        """Abort `call` with `reason` in `seconds` from now unless the deadline is cancelled before."""
        deadline = Deadline(self, call, time.monotonic() + seconds, reason)
        with self._changed:
            heapq.heappush(self._heap, (deadline.at, next(self._order), deadline))
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="watch", daemon=True)
                thread.start()
                self._thread = thread
            elif self._heap[0][2] is deadline:
                self._changed.notify()
        return deadline

    def cancel(self, deadline: Deadline) -> None:
        """See `Deadline.cancel`."""
        with self._changed:
            if deadline.call is None:
                return
            deadline.call = None
            self._cancelled += 1
            # Most deadlines are minutes off and cancelled within seconds: sweep before they pile up.
            if self._cancelled > 64 and self._cancelled * 2 > len(self._heap):
                self._heap = [entry for entry in self._heap if entry[2].call is not None]
                heapq.heapify(self._heap)
                self._cancelled = 0

    def _run(self) -> None:
        while True:
            with self._changed:
                deadline = self._due()
            if deadline is not None:
                call, reason = deadline
                call.abort(reason)

    def _due(self) -> tuple[Abortable, Reason] | None:
        """Wait for the earliest deadline; under the lock, which waiting releases."""
        if not self._heap:
            self._changed.wait()
            return None
        at, _, deadline = self._heap[0]
        if deadline.call is not None and at > time.monotonic():
            self._changed.wait(at - time.monotonic())
            return None
        heapq.heappop(self._heap)
        if deadline.call is None:
            self._cancelled -= 1
            return None
        call, deadline.call = deadline.call, None
        return call, deadline.reason
