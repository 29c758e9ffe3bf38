"""What the last hour brought, minute by minute and upstream by upstream, for the status page.

Each process counts for itself, and forgets when it ends; what several counted can be put together.
Bounded: sixty minutes and a few failures for each upstream.
"""

import copy
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from ..api.usage import Usage

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


class Counted(msgspec.Struct):
    """What one process counts in one minute; `classes` are answers by the class of their first byte."""

    attempts: int = 0
    failures: int = 0
    answers: int = 0
    tokens: Tokens = msgspec.field(default_factory=Tokens)
    classes: dict[int, int] = msgspec.field(default_factory=dict)

    def note(self, seconds: float) -> None:
        """Count seconds in their class."""
        self._count(bisect_left(_BOUNDS, seconds), 1)

    def add(self, other: "Counted") -> None:
        """Add another's figures."""
        self.attempts += other.attempts
        self.failures += other.failures
        self.answers += other.answers
        self.tokens.add(other.tokens)
        for place, count in other.classes.items():
            self._count(place, count)

    def shown(self) -> Minute:
        """As a minute of the record."""
        return Minute(self.attempts, self.failures, self.answers, _median(self.classes))

    def _count(self, place: int, count: int) -> None:
        self.classes[place] = self.classes.get(place, 0) + count


_NOTHING = Counted()


class Hour(msgspec.Struct):
    """What one process knows of one upstream: minutes by their number since 1970, failures latest first."""

    minutes: dict[int, Counted] = msgspec.field(default_factory=dict)
    failures: list[Failed] = msgspec.field(default_factory=list)

    def minute(self, number: int) -> Counted:
        """The minute of that number; old ones go, and those that a clock set back has left ahead."""
        found = self.minutes.get(number)
        if found is None:
            self.minutes = {n: each for n, each in self.minutes.items() if number - MINUTES < n < number}
            found = self.minutes[number] = Counted()
        return found


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
        self._hours: dict[str, Hour] = {}

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
            hour = self._of(upstream)
            hour.minute(int(now // 60)).failures += 1
            hour.failures = [Failed(now, _printable(model), _printable(reason)), *hour.failures][:FAILURES]

    def used(self, upstream: str, report: Usage) -> None:
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
            self._hours = {name: self._of(name) for name in names}

    def hours(self) -> dict[str, Hour]:
        """What this process has counted, by upstream, in the last hour."""
        oldest = self._number() - MINUTES
        with self._lock:
            copied = msgspec.msgpack.encode(self._hours)
        hours = msgspec.msgpack.decode(copied, type=dict[str, Hour])
        for hour in hours.values():
            hour.minutes = {n: each for n, each in hour.minutes.items() if n > oldest}
        return hours

    def of(self, upstream: str, others: Iterable[Mapping[str, Hour]] = ()) -> Record:
        """The last hour of one upstream, with what `others` counted."""
        with self._lock:
            own = copy.deepcopy(self._of(upstream))
        return _record([own, *(each[upstream] for each in others if upstream in each)], self._number())

    def _of(self, name: str) -> Hour:
        return self._hours.setdefault(name, Hour())

    def _number(self) -> int:
        return int(self._clock() // 60)


def _record(hours: Sequence[Hour], number: int) -> Record:
    """The hour that ends with the minute of that number."""
    whole = Counted()
    minutes = []
    for n in range(number - MINUTES + 1, number + 1):
        minute = Counted()
        for hour in hours:
            minute.add(hour.minutes.get(n, _NOTHING))
        minutes.append(minute.shown())
        whole.add(minute)
    failures = sorted(
        (failed for hour in hours for failed in hour.failures), key=lambda failed: failed.at, reverse=True
    )
    return Record(minutes, failures[:FAILURES], whole.tokens, _median(whole.classes))


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
