"""What the ledger says, as tables for the page /usage and for the command line."""

import csv
import io
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, timedelta

import msgspec

from .rows import Exchange, Sums, day_of, money
from .spending import periods
from .store import Store

#: What sums can be by, and the column of the ledger that it is.
BY = {"key": "client", "model": "model", "upstream": "upstream", "day": "day"}
#: Kinds of tokens, as the columns of a CSV file are called.
KINDS = ("input", "output", "cache_read", "cache_write_5m", "cache_write_1h")
#: The latest exchanges that are shown, and the days of the chart.
EXCHANGES, DAYS = 200, 30
PERIODS = {"today": "Today", "week": "Seven days", "month": "This month"}
_NANO = 10**9


class Report(msgspec.Struct, frozen=True):
    """The whole page; sums by period, then by name. `days` are the last `DAYS`, the oldest first."""

    keys: dict[str, dict[str, Sums]]
    models: dict[str, dict[str, Sums]]
    days: list[tuple[str, Sums]]
    exchanges: list[Exchange]

    @classmethod
    def of(cls, store: Store, now: float, client: str | None, outcome: str | None) -> "Report":
        """What the ledger says at `now`, Unix time; exchanges of one client and outcome where they are given.

        Raises `LedgerError`.
        """
        since = first_days(now)
        days = store.sums(_days_before(now, DAYS - 1), "day")
        return cls(
            keys={period: store.sums(day, "client") for period, day in since.items()},
            models={period: store.sums(day, "model") for period, day in since.items()},
            days=[
                (day, days.get(day, Sums())) for n in range(DAYS) for day in [_days_before(now, DAYS - 1 - n)]
            ],
            exchanges=store.exchanges(EXCHANGES, client, outcome),
        )


def first_days(now: float) -> dict[str, str]:
    """The first day of each of `PERIODS`."""
    return {"today": day_of(now), "week": _days_before(now, 6), "month": periods(now)["monthly"].first}


def total(sums: Iterable[Sums]) -> Sums:
    """All of them together."""
    return sum(sums, start=Sums())


def sums_as_csv(by: str, sums: Mapping[str, Sums]) -> str:
    """A line for each name; `by` is one of `BY`."""
    rows = (
        [name, each.requests, *(getattr(each, kind) for kind in KINDS), dollars(each.cost)]
        for name, each in sums.items()
    )
    return _csv([by, "requests", *KINDS, "cost_dollars"], rows)


def exchanges_as_csv(exchanges: Iterable[Exchange]) -> str:
    """A line for each exchange, latest first."""
    names = ["time", "key", "model", "upstream", "upstream_model", "request_class", "attempts", "outcome"]
    names += ["seconds", *KINDS, "web_searches", "web_fetches", "cost_dollars", "estimated"]
    rows = (
        [
            datetime.fromtimestamp(each.at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            each.client,
            each.model,
            each.upstream,
            each.upstream_model,
            each.request_class,
            each.attempts,
            each.outcome,
            each.seconds,
            *(getattr(each, kind) for kind in KINDS),
            each.web_searches,
            each.web_fetches,
            dollars(each.cost),
            "yes" if each.is_estimated else "no",
            each.id,
            each.upstream_request_id,
        ]
        for each in exchanges
    )
    return _csv([*names, "request_id", "upstream_request_id"], rows)


def sums_as_text(by: str, sums: Mapping[str, Sums]) -> str:
    """A table for a terminal, with a line for all together at its end."""
    head = [by, "requests", *(kind.replace("_", " ") for kind in KINDS), "cost"]
    lines = [
        [
            name,
            f"{each.requests:,}",
            *(f"{getattr(each, kind):,}" for kind in KINDS),
            money(each.cost),
        ]
        for name, each in [*sums.items(), ("all", total(sums.values()))]
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(n) for text, n in zip(line[1:], widths[1:], strict=True))]
        )
        for line in [head, *lines]
    )


def dollars(nano: int) -> str:
    """Nano-dollars in dollars, exact."""
    return f"{nano // _NANO}.{nano % _NANO:09d}"


def _days_before(now: float, days: int) -> str:
    return (date.fromisoformat(day_of(now)) - timedelta(days=days)).isoformat()


def _csv(head: list[str], rows: Iterable[list[object]]) -> str:
    """Text that a spreadsheet would take for a formula gets an apostrophe in front: clients choose names."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow(
            f"'{each}" if isinstance(each, str) and each[:1] in tuple("=+-@\t\r") else each for each in row
        )
    return file.getvalue()
