"""How many requests are in flight, and the door that closes before threads run out.

A request more than gunicorn has threads would wait unseen. So some threads are kept free: they tell
clients that the proxy is busy, and answer probes.
"""

import threading

#: Threads that no request in flight may take.
SPARE = 8


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
        self._lock = threading.Lock()
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
        """A place in flight, None if all are taken."""
        with self._lock:
            if self._inside >= (self._configured or max(1, self._threads - SPARE)):
                return None
            self._inside += 1
            return Slot(self)

    def left(self) -> None:
        """See `Slot.leave`."""
        with self._lock:
            self._inside -= 1
