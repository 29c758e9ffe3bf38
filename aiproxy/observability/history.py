"""What the last hour brought, minute by minute and upstream by upstream, for the status page.

Each process counts for itself, and forgets when it ends; `record` adds up what several counted.
Bounded: sixty minutes and a few failures for each upstream.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

import msgspec

from ..api.usage import Usage

MINUTES = 60
#: Failures that are remembered in full.
FAILURES = 5
#: Characters of a failure's reason, and of a model.
_LONGEST = 200
#: Upper bounds of the classes that seconds are counted in, each a quarter more than the one before.
_FIRST, _STEP = 0.01, 1.25
_BOUNDS = [_FIRST * _STEP**n for n in range(48)]


class Failed(msgspec.Struct, frozen=True):
    """One failure; `at` is Unix time, `id` the request's in the log."""

    at: float
    model: str
    reason: str
    id: str = ""


class Minute(msgspec.Struct, frozen=True):
    """One minute's figures; `first_byte` is the median in seconds, None without an answer."""

    attempts: int
    failures: int
    answers: int
    first_byte: float | None


class Counted(msgspec.Struct):
    """What is counted; `classes` are answers by the class of their first byte."""

    attempts: int = 0
    failures: int = 0
    answers: int = 0
    input: int = 0  # tokens, with those that a prompt cache was read for or written with
    output: int = 0
    cache_read: int = 0
    classes: dict[int, int] = msgspec.field(default_factory=dict)

    def add(self, other: "Counted") -> None:
        """Add another's figures."""
        self.attempts += other.attempts
        self.failures += other.failures
        self.answers += other.answers
        self.input += other.input
        self.output += other.output
        self.cache_read += other.cache_read
        for place, count in other.classes.items():
            self.classes[place] = self.classes.get(place, 0) + count

    @property
    def first_byte(self) -> float | None:
        """The middle of the class in which the median lies, in seconds, None without an answer."""
        left = sum(self.classes.values()) / 2
        for place in sorted(self.classes):
            left -= self.classes[place]
            if left <= 0:
                return float(_FIRST * _STEP ** (place - 0.5))
        return None


class Hour(msgspec.Struct):
    """What one process knows of one upstream: minutes by their number since 1970, failures latest first."""

    minutes: dict[int, Counted] = msgspec.field(default_factory=dict)
    failures: list[Failed] = msgspec.field(default_factory=list)

    def forget(self, number: int) -> None:
        """Keep the hour up to that minute; what a clock that was set back has left ahead goes, too."""
        self.minutes = {n: each for n, each in self.minutes.items() if number - MINUTES < n <= number}


class Record(msgspec.Struct, frozen=True):
    """One upstream's last hour; minutes from the oldest to the one that runs, failures latest first."""

    whole: Counted
    minutes: list[Minute]
    failures: list[Failed]


class History:
    """Thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: Unix time, since people read it; it may jump, which at worst loses minutes."""
        self._clock = clock
        self._lock = threading.Lock()
        self._hours: dict[str, Hour] = {}

    def attempt(self, upstream: str, first_byte: float | None = None) -> None:
        """An attempt; with the seconds to the answer's head where it brought an answer."""
        counted = Counted(attempts=1)
        if first_byte is not None:
            counted.answers = 1
            counted.classes[bisect_left(_BOUNDS, first_byte)] = 1
        self._count(upstream, counted)

    def failed(self, upstream: str, model: str, reason: str, id_: str) -> None:
        """An attempt failed, or the answer that it brought broke off; the texts hold no secret."""
        failed = Failed(self._clock(), printable(model), printable(reason), id_)
        self._count(upstream, Counted(failures=1), failed)

    def used(self, upstream: str, report: Usage) -> None:
        """What an answer says it used."""
        read = report.cache_read_input_tokens or 0
        every = (report.input_tokens or 0) + read + (report.cache_creation_input_tokens or 0)
        self._count(upstream, Counted(input=every, output=report.output_tokens or 0, cache_read=read))

    def keep(self, names: Iterable[str]) -> None:
        """Forget all other upstreams."""
        with self._lock:
            self._hours = {name: self._hours.get(name) or Hour() for name in names}

    def hours(self) -> dict[str, Hour]:
        """What this process has counted, by upstream, in the last hour."""
        with self._lock:
            for hour in self._hours.values():
                hour.forget(self._number())
            copied = msgspec.msgpack.encode(self._hours)
        return msgspec.msgpack.decode(copied, type=dict[str, Hour])

    def _count(self, upstream: str, counted: Counted, failed: Failed | None = None) -> None:
        number = self._number()
        with self._lock:
            hour = self._hours.get(upstream)
            if hour is None:
                hour = self._hours[upstream] = Hour()
            if number in hour.minutes:
                hour.minutes[number].add(counted)
            else:
                hour.minutes[number] = counted
                hour.forget(number)
            if failed is not None:
                hour.failures = [failed, *hour.failures][:FAILURES]

    def _number(self) -> int:
        return int(self._clock() // 60)


def record(hours: Sequence[Hour], now: float) -> Record:
    """What several processes counted of one upstream in the hour that ends `now`, Unix time."""
    last = int(now // 60)
    whole, minutes = Counted(), []
    for number in range(last - MINUTES + 1, last + 1):
        minute = Counted()
        for hour in hours:
            if number in hour.minutes:
                minute.add(hour.minutes[number])
        minutes.append(Minute(minute.attempts, minute.failures, minute.answers, minute.first_byte))
        whole.add(minute)
    failures = sorted((each for hour in hours for each in hour.failures), key=lambda each: -each.at)
    return Record(whole, minutes, failures[:FAILURES])


def printable(text: str) -> str:
    """Text that a client or an upstream sent, as it can be shown anywhere: no half characters, no control."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:_LONGEST])
