"""The page /usage: who spent what, as a page and as CSV. Knows no HTTP and no secret."""

from collections.abc import Mapping

import msgspec

from ..errors import ApiError
from ..ledger.budgets import Limit
from ..ledger.report import DAYS, PERIODS, Report, exchanges_as_csv, sums_as_csv, total
from ..proxy.outcome import Outcome
from .pages import template


class Query(msgspec.Struct, frozen=True):
    """What is asked for: a period of the tables, and which exchanges."""

    period: str = "month"
    key: str | None = None
    outcome: str | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, str]) -> "Query":
        """From the address of the page; raises `ApiError` 400."""
        period = arguments.get("period") or "month"
        outcome = arguments.get("outcome") or None
        if period not in PERIODS or (outcome is not None and outcome not in list(Outcome)):
            raise ApiError(400, "invalid_request_error", "No such period, or no such outcome.")
        return cls(period, arguments.get("key") or None, outcome)


def as_html(report: Report, query: Query, now: float, budgets: list[Limit], problem: str | None) -> bytes:
    """The page. `problem`: why the ledger is not written."""
    shown = template("usage.html").render(
        report=report,
        query=query,
        now=now,
        budgets=budgets,
        problem=problem,
        periods=PERIODS,
        outcomes=list(Outcome),
        days=DAYS,
        total=total,
    )
    return shown.encode()


def as_csv(report: Report, query: Query, table: str) -> bytes:
    """One table: `keys`, `models`, `days` or `exchanges`. Raises `ApiError` 400."""
    match table:
        case "keys":
            text = sums_as_csv("key", report.keys[query.period])
        case "models":
            text = sums_as_csv("model", report.models[query.period])
        case "days":
            text = sums_as_csv("day", dict(report.days))
        case "exchanges":
            text = exchanges_as_csv(report.exchanges)
        case _:
            raise ApiError(400, "invalid_request_error", "table: expected keys, models, days or exchanges.")
    return text.encode()
