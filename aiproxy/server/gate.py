"""How many requests are in flight, and the door that closes before threads run out.

A request more than gunicorn has threads would wait unseen. So some threads are kept free: they tell
clients that the proxy is busy, and answer probes.
"""

import threading

#: Threads that no request in flight may take.
SPARE = 8
#: Seconds that a request waits for a place, and how many may wait: a client whose last answer has gone
#: out may be here again before the thread that served it has given its place back.
WAIT, WAITING = 0.05, SPARE // 2


class Slot:
    """One request's place; leaving twice is leaving once."""

    def __init__(self, gate: "Gate") -> None:
        self._gate: Gate | None = gate

    def leave(self) -> None:
        """Give the place back. Called by the request's thread alone."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.left()


class Gate:
    """Thread-safe."""

    def __init__(self, limit: int | None) -> None:
        """`limit`: requests in flight at most; None: as `serve_with` finds it."""
        self._changed = threading.Condition()
        self._waiting = 0
        self._configured = limit
        self._threads = 0
        self._inside = 0

    @property
    def inside(self) -> int:
        """How many are in flight."""
        return self._inside

    def serve_with(self, threads: int) -> None:
        """Tell how many threads the worker has; a configured limit stays as it is."""
        self._threads = threads

    def configure(self, limit: int | None) -> None:
        """Take another limit, in the constructor's sense; who is inside stays."""
        self._configured = limit

    def enter(self) -> Slot | None:
        """A place in flight, None if all are taken and stay so for a moment."""
        with self._changed:
            if not self._has_room() and not self._waited():
                return None
            self._inside += 1
            return Slot(self)

    def left(self) -> None:
        """See `Slot.leave`."""
        with self._changed:
            self._inside -= 1
            if self._waiting:
                self._changed.notify()

    def _has_room(self) -> bool:
        return self._inside < (self._configured or max(1, self._threads - SPARE))

    def _waited(self) -> bool:
        """Wait for a place; whether there is one now."""
        if self._waiting >= WAITING:
            return False
        self._waiting += 1
        try:
            return self._changed.wait_for(self._has_room, WAIT)
        finally:
            self._waiting -= 1
