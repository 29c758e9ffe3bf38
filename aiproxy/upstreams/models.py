"""What is known of single models of one upstream: backoffs after 429 and 529, and models it does not have.

An upstream that is out of capacity for one model, or does not have it, still serves its other models.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

#: Models of one upstream that are remembered; the one that was used longest ago is forgotten first.
MOST_MODELS = 200
#: Seconds of the first backoff where the upstream does not say when to come back, and of the longest.
FIRST_BACKOFF, LONGEST_BACKOFF = 2.0, 300.0
#: Seconds that a backoff lasts at least, whatever the upstream says.
SHORTEST_BACKOFF = 1.0
#: Answers in a row that the model does not exist, after which it is not asked for the cooldown.
MISSING_IN_A_ROW = 3


class _Model:
    """State of one model; times are the clock's."""

    def __init__(self) -> None:
        self.until = 0.0  # not asked before
        self.limited_at = float("-inf")  # when the latest backoff began
        self.next_backoff = FIRST_BACKOFF
        self.missing = 0  # in a row
        self.is_missing = False  # not asked because the upstream does not have it
        self.is_shared = False  # the other workers know of the backoff


class ModelStates:
    """Thread-safe; no method blocks. Models are named as the upstream names them."""

    def __init__(self, cooldown: float, clock: Callable[[], float]) -> None:
        """`cooldown`: the longest backoff that an upstream may ask for, and how long a missing model
        is not asked, in seconds; `clock`: monotonic seconds."""
        self.cooldown = cooldown
        self._clock = clock
        self._lock = threading.Lock()
        self._models: OrderedDict[str, _Model] = OrderedDict()

    def usable(self, model: str) -> bool:
        """Whether the model may be asked now."""
        return not self._models or self.due(model) <= self._clock()

    def due(self, model: str) -> float:
        """The clock's time from which the model may be asked; in the past where it may be asked now."""
        with self._lock:
            state = self._models.get(model)
            return state.until if state is not None else 0.0

    def back_off(self, model: str, seconds: float | None, began: float, is_last_resort: bool) -> float:
        """A 429 or 529; returns the seconds of the backoff.

        `seconds`: as the upstream says, None where it does not. The own length doubles only after an attempt
        that began (`began`, clock time) after the previous backoff had ended and was no last resort:
        attempts that ran side by side say the same thing once.
        """
        with self._lock:
            state = self._state(model)
            now = self._clock()
            if seconds is not None:
                length = min(max(seconds, SHORTEST_BACKOFF), self.cooldown)
            elif began < state.until or is_last_resort:
                length = max(0.0, state.until - now)
                if length == 0.0:
                    length = min(FIRST_BACKOFF, self.cooldown)
            else:
                length = min(state.next_backoff, self.cooldown)
                state.next_backoff = min(state.next_backoff * 2, LONGEST_BACKOFF)
            state.until = max(state.until, now + length)
            state.limited_at, state.is_missing = now, False
            return length

    def missing(self, model: str) -> bool:
        """The upstream says that it does not have the model; whether it is not asked from now on."""
        with self._lock:
            state = self._state(model)
            state.missing += 1
            if state.missing < MISSING_IN_A_ROW:
                return False
            state.missing, state.is_missing = 0, True
            state.until = max(state.until, self._clock() + self.cooldown)
            return True

    def succeeded(self, model: str, began: float) -> bool:
        """The model answered; a backoff that began after the attempt did (`began`, clock time) stays.

        Returns whether a backoff ended early.
        """
        if not self._models:
            return False
        with self._lock:
            state = self._models.get(model)
            if state is None or began < state.limited_at:
                return False
            del self._models[model]
            return state.until > self._clock()

    def backoffs(self) -> dict[str, float]:
        """The models that are not asked now, with the seconds until they are."""
        with self._lock:
            now = self._clock()
            return {name: state.until - now for name, state in self._models.items() if state.until > now}

    def not_there(self) -> list[str]:
        """Those of `backoffs` that the upstream does not have, as far as this process has found out."""
        with self._lock:
            now = self._clock()
            return [name for name, state in self._models.items() if state.is_missing and state.until > now]

    def follow(self, backoffs: Mapping[str, float]) -> None:
        """Take over the backoffs, in seconds from now, that all workers together know."""
        if not self._models and not backoffs:
            return
        with self._lock:
            now = self._clock()
            for name, state in self._models.items():
                if state.is_shared and name not in backoffs:
                    state.until, state.is_shared = min(state.until, now), False
            for name, seconds in backoffs.items():
                state = self._state(name)
                state.is_shared, state.is_missing = True, state.is_missing and state.until > now
                state.until = now + seconds

    def clear(self) -> None:
        """Forget everything: a person says that the upstream is well."""
        with self._lock:
            self._models.clear()

    def _state(self, model: str) -> _Model:
        state = self._models.setdefault(model, _Model())
        self._models.move_to_end(model)
        while len(self._models) > MOST_MODELS:
            self._models.popitem(last=False)
        return state
