"""Wrong passwords: after a few of them an address must wait, longer each time."""

import threading
from collections import OrderedDict
from collections.abc import Callable

#: Wrong passwords that an address may send before it must wait, and how long it then waits, in seconds.
FREE, FIRST, LONGEST = 5, 1.0, 60.0
#: Addresses that are remembered, and after how many seconds without a wrong password one is forgotten.
_ADDRESSES, _FORGOTTEN = 10_000, 3600.0


class Throttle:
    """Thread-safe; no thread waits in it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: monotonic seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and when the last one

    def must_wait(self, address: str) -> float:
        """For how many seconds the address must not try again; 0 if it may."""
        with self._lock:
            count, at = self._failures.get(address, (0, 0.0))
            return max(0.0, at + _pause(count) - self._clock()) if count >= FREE else 0.0

    def failed(self, address: str) -> None:
        """It sent a wrong password."""
        now = self._clock()
        with self._lock:
            count, at = self._failures.pop(address, (0, now))
            self._failures[address] = (1 if now - at > _FORGOTTEN else count + 1, now)
            if len(self._failures) > _ADDRESSES:
                self._failures.popitem(last=False)

    def succeeded(self, address: str) -> None:
        """It sent the right one."""
        with self._lock:
            self._failures.pop(address, None)


def _pause(failures: int) -> float:
    return float(min(LONGEST, FIRST * 2 ** min(failures - FREE, 10)))
