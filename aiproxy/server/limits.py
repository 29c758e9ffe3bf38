"""How many requests are in flight. New ones are refused before gunicorn runs out of threads.

Without a free thread a request would wait unseen. So some threads are kept free: they tell clients that
the proxy is busy, and answer probes.
"""

import threading

#: Threads that no request in flight may take.
SPARE = 8
#: Seconds that a request waits for a place, and how many may wait: a client whose last answer has gone
#: out may be here again before the thread that served it has given its place back.
WAIT, WAITING = 0.05, SPARE // 2


class Place:
    """One request's place; a second release does nothing."""

    def __init__(self, in_flight: "InFlight") -> None:
        self._in_flight: InFlight | None = in_flight

    def release(self) -> None:
        """Give the place back. Called by the request's thread alone."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.released()


class InFlight:
    """Thread-safe."""

    def __init__(self, limit: int | None) -> None:
        """`limit`: requests in flight at most; None: as `set_threads` finds it."""
        self._changed = threading.Condition()
        self._waiting = 0
        self._configured = limit
        self._threads = 0
        self._count = 0

    @property
    def count(self) -> int:
        """How many are in flight."""
        return self._count

    def set_threads(self, threads: int) -> None:
        """Set how many threads the worker has; a configured limit stays as it is."""
        self._threads = threads

    def configure(self, limit: int | None) -> None:
        """Set another limit, as in the constructor; requests in flight stay."""
        self._configured = limit

    def acquire(self) -> Place | None:
        """A place in flight, None if all are taken and stay so for a moment."""
        with self._changed:
            if not self._has_room() and not self._waited():
                return None
            self._count += 1
            return Place(self)

    def released(self) -> None:
        """See `Place.leave`."""
        with self._changed:
            self._count -= 1
            if self._waiting:
                self._changed.notify()

    def _has_room(self) -> bool:
        return self._count < (self._configured or max(1, self._threads - SPARE))

    def _waited(self) -> bool:
        """Wait for a place; whether there is one now."""
        if self._waiting >= WAITING:
            return False
        self._waiting += 1
        try:
            return self._changed.wait_for(self._has_room, WAIT)
        finally:
            self._waiting -= 1
