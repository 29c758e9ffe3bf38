"""Notices an upstream that refuses every request although others answer the same requests.

One client's odd requests must not close an upstream for everybody, so a 4xx about the request costs nothing.
But an upstream that for a minute does nothing except refuse what others answer is not of use.
"""

import threading
from collections.abc import Callable

#: Refusals, and the seconds over which they come, that make an upstream one that refuses everything.
ENOUGH, PERIOD = 20, 60.0
#: Seconds for which it is then not asked, at a time.
BACKOFF = 60.0


class Refusals:
    """Thread-safe; no method blocks."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: monotonic seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._count = 0
        self._since = 0.0
        self._until = 0.0
        self.is_suspect = False  # refused everything; until its next success

    @property
    def due(self) -> float:
        """The clock's time from which the upstream may be asked."""
        return self._until

    def usable(self) -> bool:
        """Whether it may be asked now."""
        return self._until <= self._clock()

    def refused(self) -> bool:
        """It refused a request that another upstream answered well; whether a backoff begins."""
        with self._lock:
            now = self._clock()
            if self._count == 0:
                self._since = now
            self._count += 1
            if not self.is_suspect and (self._count < ENOUGH or now - self._since < PERIOD):
                return False
            self.is_suspect = True
            self._count = 0
            self._until = now + BACKOFF
            return True

    def other_result(self, is_success: bool) -> None:
        """Anything but a refusal came of an attempt: it does not refuse everything."""
        if not self._count and not self.is_suspect:
            return
        with self._lock:
            self._count = 0
            if is_success:
                self.is_suspect = False
                self._until = 0.0
