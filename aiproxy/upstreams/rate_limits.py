"""What an upstream's answers say of its rate limits: how much is left for each model, and until when.

https://docs.anthropic.com/en/api/rate-limits#response-headers
"""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime

import msgspec

from ..api.headers import Pairs

_PREFIX = "anthropic-ratelimit-"
_KINDS = ("requests", "input-tokens", "output-tokens")
_HEADERS = frozenset(f"{_PREFIX}{kind}-{what}" for kind in _KINDS for what in ("limit", "remaining", "reset"))
#: The part of a limit under which an upstream gets no new conversations for the model.
LOW = 0.1
#: Seconds at most that a model counts as low, whatever its answer says.
_LONGEST = 3600.0
_MODELS = 200


class Left(msgspec.Struct, frozen=True):
    """How much is left of a model's scarcest limit, as a part of it; `until`: clock time of the reset."""

    share: float
    until: float


class RateLimits:
    """Thread-safe."""

    def __init__(self, clock: Callable[[], float], now: Callable[[], float] = time.time) -> None:
        """`clock`: monotonic seconds; `now`: Unix time, since resets are given as dates."""
        self._clock = clock
        self._now = now
        self._lock = threading.Lock()
        self._models: OrderedDict[str, Left] = OrderedDict()
        self.was_low = False  # whether any model was ever low: until then a request looks at nothing else

    def note(self, model: str, headers: Pairs) -> None:
        """Take what the headers of an answer say."""
        found = {}
        for name, value in headers:
            if name in _HEADERS:
                found[name] = value
        if found and (left := self._scarcest(found)) is not None:
            with self._lock:
                self._models.pop(model, None)
                self._models[model] = left
                if len(self._models) > _MODELS:
                    self._models.popitem(last=False)
                self.was_low = self.was_low or left.share < LOW

    def is_low(self, model: str) -> bool:
        """Whether the model's limit is nearly used up, and not reset yet."""
        left = self._models.get(model)
        return left is not None and left.share < LOW and left.until > self._clock()

    def shares(self) -> dict[str, float]:
        """What is left for each model, as a part of its limit."""
        with self._lock:
            now = self._clock()
            return {model: left.share if left.until > now else 1.0 for model, left in self._models.items()}

    def _scarcest(self, found: dict[str, str]) -> Left | None:
        lefts = []
        for kind in _KINDS:
            with contextlib.suppress(KeyError, ValueError, ZeroDivisionError):
                share = int(found[f"{_PREFIX}{kind}-remaining"]) / int(found[f"{_PREFIX}{kind}-limit"])
                seconds = datetime.fromisoformat(found[f"{_PREFIX}{kind}-reset"]).timestamp() - self._now()
                lefts.append(Left(min(1.0, max(0.0, share)), self._clock() + min(seconds, _LONGEST)))
        return min(lefts, key=lambda left: left.share, default=None)
