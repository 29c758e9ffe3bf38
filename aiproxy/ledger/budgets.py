"""What may still be spent, and what a client whose budget is used up is told."""

import math
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from ..config import Budget, Config
from ..errors import ApiError
from .ledger import Ledger
from .prices import NANO
from .rows import money
from .spending import PERIODS, Period, periods

#: How the names of headers begin that say how far an account may still go.
UNIFIED = "anthropic-ratelimit-unified-"
_THRESHOLDS = (1.0, 0.95, 0.75)


class Limit(msgspec.Struct, frozen=True):
    """One budget in one period; `limit` and `spent` are nano-dollars, `client` is None for that of all."""

    client: str | None
    period: Period
    limit: int
    spent: int

    @property
    def share(self) -> float:
        """The part of it that is spent; 1 or more: it is used up."""
        return self.spent / self.limit if self.limit else 1.0  # JSON knows no infinity


class Budgets:
    """The budgets of one configuration."""

    def __init__(self, config: Config, ledger: Ledger, clock: Callable[[], float]) -> None:
        """`clock`: Unix time."""
        self._budgets: dict[str | None, Budget] = {None: config.budget}
        self._budgets |= {key.name: key.limits.budget for key in config.api_keys}
        self._is_strict = config.fail_closed
        self._ledger = ledger
        self._clock = clock

    def every(self) -> list[Limit]:
        """How all budgets stand, that of all clients together first."""
        return [limit for client in self._budgets for limit in self.limits(client)]

    def limits(self, client: str | None) -> list[Limit]:
        """How a client's budget stands, or for None that of all; without budgets it is empty."""
        budget = self._budgets.get(client, Budget())
        now = periods(self._clock())
        return [
            Limit(client, now[name], round(dollars * NANO), self._ledger.spending.of(client, now[name]))
            for name in PERIODS
            if (dollars := getattr(budget, name)) is not None
        ]

    def check(self, client: str | None) -> None:
        """Raises `ApiError` 429 where the client's own budget is used up, or that of all.

        503 where the ledger is out of reach and that is not to let requests pass.
        """
        limits = [*self._own(client), *self.limits(None)]
        used_up = [each for each in limits if each.share >= 1]
        if limits and self._is_strict and self._ledger.is_out_of_reach:
            raise ApiError(
                503, "api_error", "aiproxy's ledger is out of reach, and budgets cannot be checked."
            )
        if used_up:
            raise _used_up(max(used_up, key=lambda each: each.period.reset), self._clock())

    def headers(self, client: str | None) -> list[tuple[str, str]]:
        """The headers of an answer by which Claude Code warns its user; none without a budget of the key."""
        limits = self._own(client)
        return _headers(max(limits, key=lambda each: each.share)) if limits else []

    def report(self, client: str) -> bytes:
        """What a client has spent and has left, as JSON; in dollars."""
        now = periods(self._clock())
        limits = {each.period.name: each for each in self.limits(client)}
        return msgspec.json.encode(
            {
                "client": client,
                "spent": {name: _dollars(self._ledger.spending.of(client, now[name])) for name in PERIODS},
                "budget": {name: _dollars(each.limit) for name, each in limits.items()},
                "left": {name: _dollars(max(0, each.limit - each.spent)) for name, each in limits.items()},
                "resets": {name: now[name].reset_text for name in PERIODS},
            }
        )

    def _own(self, client: str | None) -> list[Limit]:
        return self.limits(client) if client is not None else []


def _dollars(nano: int) -> float:
    return round(nano / NANO, 6)


def _used_up(limit: Limit, now: float) -> ApiError:
    whose = "of all keys together" if limit.client is None else f"of the key {limit.client}"
    reset = datetime.fromtimestamp(limit.period.reset, UTC)
    message = (
        f"The {limit.period.name} budget {whose} is used up: {money(limit.spent)} of {money(limit.limit)} "
        f"are spent. It begins anew at {reset:%Y-%m-%d %H:%M} UTC."
    )
    after = max(1, math.ceil(limit.period.reset - now))
    return ApiError(429, "billing_error", message, retry_after=after, headers=_headers(limit))


def _headers(limit: Limit) -> list[tuple[str, str]]:
    """How a budget stands, in the headers that Anthropic's own gateway sets for its spend limits.

    Claude Code reads them (seen in 2.1.332): a budget is its `overage`, and it warns when a threshold of
    it is surpassed.
    """
    threshold = next((share for share in _THRESHOLDS if limit.share >= share), None)
    status = "allowed" if threshold is None else "allowed_warning" if threshold < 1 else "rejected"
    used = min(round(limit.share, 2), 0.99) if status != "rejected" else min(limit.share, 9.99)
    reset = f"{limit.period.reset:.0f}"
    found = {"status": status, "reset": reset, "overage-reset": reset, "overage-utilization": f"{used:.2f}"}
    if threshold is not None:
        found["overage-surpassed-threshold"] = f"{threshold:g}"
    if status == "rejected":
        found["overage-period"] = limit.period.name
        found["overage-disabled-reason"] = "org_spend_cap_reached"
    else:
        found["representative-claim"] = "overage"
        found["overage-status"] = status
    return [(UNIFIED + name, value) for name, value in found.items()]
