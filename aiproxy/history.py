"""What the last hour brought, minute by minute and upstream by upstream, for the status page.

Of one process, and gone with it. Bounded: sixty minutes and a few failures for each upstream.
"""

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping

import msgspec

from .report import Report

MINUTES = 60
#: Failures that are remembered in full.
FAILURES = 5
#: Characters of a failure's reason.
_REASON = 200
#: Upper bounds of the classes that seconds are counted in, each a quarter more than the one before.
_FIRST, _STEP = 0.01, 1.25
_BOUNDS = [_FIRST * _STEP**n for n in range(48)]


class Failed(msgspec.Struct, frozen=True):
    """One failure; `at` is Unix time."""

    at: float
    model: str
    reason: str


class Minute(msgspec.Struct, frozen=True):
    """One minute's figures; `first_byte` is the median in seconds, None without an answer."""

    attempts: int = 0
    failures: int = 0
    answers: int = 0
    first_byte: float | None = None


class Tokens(msgspec.Struct):
    """Tokens by kind."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0

    def add(self, other: "Tokens") -> None:
        """Add another's figures."""
        self.input += other.input
        self.output += other.output
        self.cache_read += other.cache_read
        self.cache_write += other.cache_write


class Record(msgspec.Struct, frozen=True):
    """One upstream's last hour; minutes from the oldest to the one that runs, failures latest first."""

    minutes: list[Minute]
    failures: list[Failed]
    tokens: Tokens
    first_byte: float | None  # the hour's median in seconds

    @property
    def attempts(self) -> int:
        """Attempts in the hour."""
        return sum(minute.attempts for minute in self.minutes)

    @property
    def failed(self) -> int:
        """Failures in the hour."""
        return sum(minute.failures for minute in self.minutes)

    @property
    def answers(self) -> int:
        """Answers in the hour."""
        return sum(minute.answers for minute in self.minutes)

    @property
    def cache_read_share(self) -> float | None:
        """The part of all input tokens that came from a prompt cache, None where there were none."""
        every = self.tokens.input + self.tokens.cache_read + self.tokens.cache_write
        return self.tokens.cache_read / every if every else None


class History:
    """Thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: Unix time, since people read it; it may jump, which at worst loses minutes."""
        self._clock = clock
        self._lock = threading.Lock()
        self._upstreams: dict[str, _Upstream] = {}

    def attempt(self, upstream: str, first_byte: float | None = None) -> None:
        """An attempt; with the seconds to the answer's head where it brought an answer."""
        with self._lock:
            minute = self._of(upstream).minute(self._number())
            minute.attempts += 1
            if first_byte is not None:
                minute.answers += 1
                minute.note(first_byte)

    def failed(self, upstream: str, model: str, reason: str) -> None:
        """An attempt failed, or the answer that it brought broke off; `reason` holds no secret."""
        now = self._clock()
        with self._lock:
            one = self._of(upstream)
            one.minute(int(now // 60)).failures += 1
            one.failures.appendleft(Failed(now, _printable(model), _printable(reason)))

    def used(self, upstream: str, report: Report) -> None:
        """What an answer says it used."""
        with self._lock:
            self._of(upstream).minute(self._number()).tokens.add(
                Tokens(
                    report.input_tokens or 0,
                    report.output_tokens or 0,
                    report.cache_read_input_tokens or 0,
                    report.cache_creation_input_tokens or 0,
                )
            )

    def keep(self, names: Iterable[str]) -> None:
        """Forget all other upstreams."""
        with self._lock:
            self._upstreams = {name: self._of(name) for name in names}

    def of(self, upstream: str) -> Record:
        """The last hour of one upstream."""
        with self._lock:
            return self._of(upstream).record(self._number())

    def _of(self, name: str) -> "_Upstream":
        return self._upstreams.setdefault(name, _Upstream())

    def _number(self) -> int:
        return int(self._clock() // 60)


class _Minute:
    """One minute as it fills."""

    def __init__(self) -> None:
        self.attempts = 0
        self.failures = 0
        self.answers = 0
        self.tokens = Tokens()
        self.classes: dict[int, int] = {}

    def note(self, seconds: float) -> None:
        """Count seconds in their class."""
        place = bisect_left(_BOUNDS, seconds)
        self.classes[place] = self.classes.get(place, 0) + 1


class _Upstream:
    """One upstream's minutes by their number, and its last failures."""

    def __init__(self) -> None:
        self.failures: deque[Failed] = deque(maxlen=FAILURES)
        self._minutes: dict[int, _Minute] = {}

    def minute(self, number: int) -> _Minute:
        """The minute of that number; old ones go, and those that a clock set back has left ahead."""
        found = self._minutes.get(number)
        if found is None:
            self._minutes = {
                n: minute for n, minute in self._minutes.items() if number - MINUTES < n < number
            }
            found = self._minutes[number] = _Minute()
        return found

    def record(self, number: int) -> Record:
        """The hour that ends with that minute."""
        numbers = range(number - MINUTES + 1, number + 1)
        minutes = [self._minutes.get(n) or _Minute() for n in numbers]
        tokens, classes = Tokens(), dict[int, int]()
        for minute in minutes:
            tokens.add(minute.tokens)
            for place, count in minute.classes.items():
                classes[place] = classes.get(place, 0) + count
        return Record(
            minutes=[
                Minute(each.attempts, each.failures, each.answers, _median(each.classes)) for each in minutes
            ],
            failures=list(self.failures),
            tokens=tokens,
            first_byte=_median(classes),
        )


def _printable(text: str) -> str:
    """Text that a client or an upstream sent, as it can be shown anywhere: no half characters, no control."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:_REASON])


def _median(classes: Mapping[int, int]) -> float | None:
    """The middle of the class in which the median lies, None of nothing."""
    left = sum(classes.values()) / 2
    for place in sorted(classes):
        left -= classes[place]
        if left <= 0:
            return float(_FIRST * _STEP ** (place - 0.5))
    return None
