"""How many requests are in flight. New ones are refused before gunicorn runs out of threads.

Without a free thread a request would wait unseen. So some threads are kept free: they tell clients that
the proxy is busy, and answer probes.
"""

import math
import threading
import time
from collections.abc import Callable

from ..config import ClientKey
from ..errors import ApiError
from ..transport.wait import Wait
from ..upstreams.shared_state import State

#: Threads that no request in flight may take.
SPARE = 8
#: Seconds that a request waits for a place, and how many may wait: a client whose last answer has gone
#: out may be here again before the thread that served it has given its place back.
WAIT, WAITING = 0.05, SPARE // 2


#: The part of all places in flight in which a request may wait for a place of its key.
_WAITING_FOR_KEYS = 4
#: Seconds between two tries for a place of a key: another worker may have given one back.
_RETRY = 0.05


class Place:
    """One request's place; a second release does nothing. Used by the request's thread alone."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._releases = [release]

    def add(self, release: Callable[[], None]) -> None:
        """Call this, too, when the place is given back."""
        self._releases.append(release)

    def release(self) -> None:
        """Give the place back."""
        while self._releases:
            self._releases.pop()()


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
            return Place(self._release)

    def _release(self) -> None:
        with self._changed:
            self._count -= 1
            if self._waiting:
                self._changed.notify()

    @property
    def limit(self) -> int:
        """How many there may be."""
        return self._configured or max(1, self._threads - SPARE)

    def _has_room(self) -> bool:
        return self._count < self.limit

    def _waited(self) -> bool:
        """Wait for a place; whether there is one now."""
        if self._waiting >= WAITING:
            return False
        self._waiting += 1
        try:
            return self._changed.wait_for(self._has_room, WAIT)
        finally:
            self._waiting -= 1


class KeyPlaces:
    """The places in flight of each client key, over all workers. Thread-safe.

    A request that waits for one has a place of the worker. So that few keys cannot take all of these, only a
    part of them may be used for waiting.
    """

    def __init__(self, state: State, in_flight: InFlight) -> None:
        self._state = state
        self._in_flight = in_flight
        self._lock = threading.Lock()
        self._waiting = 0

    def acquire(self, key: ClientKey, place: Place, wait: Wait) -> None:
        """A place of the key, given back with `place`; waits for it as long as the key may.

        Raises `ApiError` 429 where there is none, and `Interrupted`.
        """
        limit = key.limits.max_in_flight
        if limit is None:
            return
        if not (self._state.acquire_place(key.name, limit) or self._waited(key, limit, wait)):
            message = f"The key {key.name} has as many requests in flight as it may have: {limit}."
            raise ApiError(429, "rate_limit_error", message, retry_after=1)
        place.add(lambda: self._state.release_place(key.name))

    def _waited(self, key: ClientKey, limit: int, wait: Wait) -> bool:
        ends = time.monotonic() + key.limits.max_wait
        if not key.limits.max_wait or not self._may_wait():
            return False
        try:
            while (left := ends - time.monotonic()) > 0:
                wait.pause(min(_RETRY, left))
                if self._state.acquire_place(key.name, limit):
                    return True
            return False
        finally:
            with self._lock:
                self._waiting -= 1

    def _may_wait(self) -> bool:
        with self._lock:
            may = self._waiting < math.ceil(self._in_flight.limit / _WAITING_FOR_KEYS)
            self._waiting += may
            return may
