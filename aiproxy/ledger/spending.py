"""What has been spent in the current day, week and month, as sums in memory."""

import functools
import threading
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta

import msgspec

from .rows import day_of

PERIODS = ("daily", "weekly", "monthly")
_DAY = 24 * 3600


class Period(msgspec.Struct, frozen=True):
    """A day, a week from Monday on or a month, UTC: its first and its last day, and when the next begins."""

    name: str
    first: str  # such as 2026-11-27
    last: str
    reset: float  # Unix time

    @property
    def reset_text(self) -> str:
        """When the next one begins, such as 2026-11-28T00:00:00Z."""
        return datetime.fromtimestamp(self.reset, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def periods(now: float) -> dict[str, Period]:
    """The periods that `now`, Unix time, is in."""
    return _periods(int(now // _DAY))


@functools.lru_cache(maxsize=4)
def _periods(day: int) -> dict[str, Period]:
    today = date(1970, 1, 1) + timedelta(days=day)
    monday = today - timedelta(days=today.weekday())
    first = today.replace(day=1)
    next_month = (first + timedelta(days=32)).replace(day=1)
    bounds = {
        "daily": (today, today + timedelta(days=1)),
        "weekly": (monday, monday + timedelta(days=7)),
        "monthly": (first, next_month),
    }
    return {
        name: Period(
            name,
            begin.isoformat(),
            (end - timedelta(days=1)).isoformat(),
            datetime(end.year, end.month, end.day, tzinfo=UTC).timestamp(),
        )
        for name, (begin, end) in bounds.items()
    }


class Spending:
    """What has been spent in the days that a budget may count, by client and day. Thread-safe.

    It is the ledger's sums as they were read last, and what this process has added since.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: dict[str, dict[str, int]] = {}
        self._total: dict[str, int] = {}
        self._own: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def add(self, client: str, at: float, cost: int) -> None:
        """This process has spent `cost` nano-dollars, which the ledger does not know yet."""
        with self._lock:
            self._own[client][day_of(at)] += cost

    def replace(self, read: Mapping[tuple[str, str], int], written: Mapping[tuple[str, str], int]) -> None:
        """The ledger was read, by day and client; what this process has `written` is in it."""
        by_client: dict[str, dict[str, int]] = {}
        total: dict[str, int] = defaultdict(int)
        for (day, client), cost in read.items():
            by_client.setdefault(client, {})[day] = cost
            total[day] += cost
        with self._lock:
            self._read, self._total = by_client, total
            self._subtract(written)

    def _subtract(self, written: Mapping[tuple[str, str], int]) -> None:
        for (day, client), cost in written.items():
            days = self._own[client]
            days[day] -= cost
            if not days[day]:
                del days[day]
            if not days:
                del self._own[client]

    def of(self, client: str | None, period: Period) -> int:
        """Nano-dollars that a client, or for None all of them, has spent in a period."""
        with self._lock:
            read = self._total if client is None else self._read.get(client, {})
            own = list(self._own.values()) if client is None else [self._own.get(client, {})]
            return sum(
                cost
                for days in (read, *own)
                for day, cost in days.items()
                if period.first <= day <= period.last
            )
