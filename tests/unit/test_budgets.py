"""Budgets: periods, what is left, and what the client is told."""

import json
import random
from collections import Counter
from datetime import UTC, datetime

import pytest

from aiproxy.config import Budget, ClientKey, Config, KeyLimits, LedgerSettings
from aiproxy.errors import ApiError
from aiproxy.ledger.budgets import Budgets
from aiproxy.ledger.ledger import Ledger
from aiproxy.ledger.spending import Spending, periods

DOLLAR = 1_000_000_000


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


class Held:
    """Budgets of alice and bob over a ledger that is not written; `now` can be set."""

    def __init__(self, tmp_path, budget=None, whole=None, **settings):
        self.now = at("2026-11-27T12:00:00")
        keys = (
            ClientKey("alice", limits=KeyLimits(budget or Budget())),
            ClientKey("bob"),
        )
        config = Config(api_keys=keys, budget=whole or Budget(), **settings)
        self.ledger = Ledger(LedgerSettings(file=str(tmp_path / "nowhere" / "l.db")), lambda: self.now)
        self.budgets = Budgets(config, self.ledger, lambda: self.now)

    def spend(self, dollars, client="alice", when=None):
        self.ledger.spending.add(client, self.now if when is None else at(when), round(dollars * DOLLAR))

    def refusal(self, client="alice"):
        try:
            self.budgets.check(client)
        except ApiError as error:
            return error
        return None

    def headers(self):
        prefix = "anthropic-ratelimit-unified-"
        found = self.budgets.headers("alice")
        assert all(name.startswith(prefix) for name, _ in found)
        return {name.removeprefix(prefix): value for name, value in found}


@pytest.fixture
def held(tmp_path):
    return lambda *budgets, **settings: Held(tmp_path, *budgets, **settings)


@pytest.mark.parametrize(
    ("now", "begins", "resets"),
    [
        ("2026-11-27T12:00:00", "2026-11-27 2026-11-23 2026-11-01", "2026-11-28 2026-11-30 2026-12-01"),
        ("2026-11-30T00:00:00", "2026-11-30 2026-11-30 2026-11-01", "2026-12-01 2026-12-07 2026-12-01"),
        ("2026-12-31T23:59:59", "2026-12-31 2026-12-28 2026-12-01", "2027-01-01 2027-01-04 2027-01-01"),
        ("2028-02-29T05:00:00", "2028-02-29 2028-02-28 2028-02-01", "2028-03-01 2028-03-06 2028-03-01"),
    ],
)
def test_periods_are_utc_and_weeks_begin_on_monday(now, begins, resets):
    found = list(periods(at(now)).values())
    assert [each.first for each in found] == begins.split()
    assert [each.reset_text for each in found] == [f"{day}T00:00:00Z" for day in resets.split()]


def test_a_budget_that_is_used_up_is_a_429_until_its_period_ends(held):
    one = held(Budget(daily=20))
    one.spend(19.99)
    assert one.refusal() is None
    one.spend(0.01)
    error = one.refusal()
    assert (error.status, error.type) == (429, "billing_error")
    assert {"x-should-retry": "false", "retry-after": "43200"}.items() <= dict(error.headers).items()
    assert error.message == (
        "The daily budget of the key alice is used up: $20.00 of $20.00 are spent. "
        "It begins anew at 2026-11-28 00:00 UTC."
    )
    assert one.refusal("bob") is None
    one.now = at("2026-11-28T00:00:00")
    assert one.refusal() is None


@pytest.mark.parametrize(
    ("budget", "when", "is_refused"),
    [
        (Budget(daily=1), "2026-11-26T23:59:59", False),
        (Budget(weekly=1), "2026-11-23T00:00:00", True),
        (Budget(weekly=1), "2026-11-22T23:59:59", False),
        (Budget(monthly=1), "2026-11-01T00:00:00", True),
        (Budget(monthly=1), "2026-10-31T23:59:59", False),
        (Budget(daily=1), "2026-11-28T00:00:01", False),  # a clock that was set back
        (Budget(daily=0), "2026-10-31T23:59:59", True),
    ],
)
def test_what_was_spent_counts_in_its_own_period(held, budget, when, is_refused):
    one = held(budget)
    one.spend(1, when=when)
    assert (one.refusal() is not None) == is_refused


def test_of_several_budgets_the_one_that_lasts_longest_is_named(held):
    one = held(Budget(daily=1, weekly=2, monthly=3))
    one.spend(2.5)
    assert one.refusal().message.startswith("The weekly budget of the key alice")
    one.spend(2.5)
    assert one.refusal().message.startswith("The monthly budget of the key alice")


def test_the_budget_of_all_counts_everybody(held):
    one = held(None, Budget(daily=2))
    one.spend(1, "bob")
    one.spend(1, "anonymous")
    for client in ("alice", "bob", None):
        assert one.refusal(client).message.startswith("The daily budget of all keys together is used up")


def test_without_the_ledger_requests_pass_unless_the_strict_wish_otherwise(held):
    assert held(Budget(daily=1)).refusal() is None
    error = held(Budget(daily=1), fail_closed=True).refusal()
    assert (error.status, error.type) == (503, "api_error")
    assert held(Budget(daily=1), fail_closed=True).refusal("bob") is None


@pytest.mark.parametrize(
    ("spent", "status", "used", "threshold"),
    [
        (0, "allowed", "0.00", None),
        (7.49, "allowed", "0.75", None),
        (7.5, "allowed_warning", "0.75", "0.75"),
        (9.5, "allowed_warning", "0.95", "0.95"),
        (9.999, "allowed_warning", "0.99", "0.95"),
    ],
)
def test_headers_say_how_much_of_a_budget_is_used(held, spent, status, used, threshold):
    one = held(Budget(daily=10, monthly=1000))
    one.spend(spent)
    reset = f"{at('2026-11-28T00:00:00'):.0f}" if spent else one.headers()["reset"]
    surpassed = {} if threshold is None else {"overage-surpassed-threshold": threshold}
    assert one.headers() == {
        "status": status,
        "reset": reset,
        "overage-reset": reset,
        "overage-utilization": used,
        "representative-claim": "overage",
        "overage-status": status,
        **surpassed,
    }


def test_the_headers_of_a_refusal_say_which_period_is_over(held):
    one = held(Budget(daily=10))
    one.spend(10.5)
    told = {name.rpartition("unified-")[2]: value for name, value in one.refusal().headers}
    assert (told["status"], told["overage-period"], told["overage-utilization"]) == (
        "rejected",
        "daily",
        "1.05",
    )
    assert told["overage-disabled-reason"] == "org_spend_cap_reached"


def test_a_key_without_a_budget_has_no_such_headers(held):
    assert held(None, Budget(daily=1)).headers() == {}


def test_a_client_sees_what_it_spent_and_has_left_exactly(held):
    one = held(Budget(daily=10, monthly=1))
    one.spend(1.25)
    one.spend(0.000001, when="2026-11-24T00:00:00")
    one.spend(2, when="2026-11-02T00:00:00")
    assert json.loads(one.budgets.report("alice")) == {
        "client": "alice",
        "spent": {"daily": 1.25, "weekly": 1.250001, "monthly": 3.250001},
        "budget": {"daily": 10, "monthly": 1},
        "left": {"daily": 8.75, "monthly": 0},
        "resets": {
            "daily": "2026-11-28T00:00:00Z",
            "weekly": "2026-11-30T00:00:00Z",
            "monthly": "2026-12-01T00:00:00Z",
        },
    }


def test_own_spending_counts_once_when_the_ledger_has_it():
    spending, day = Spending(), periods(at("2026-11-27T12:00:00"))["daily"]
    spending.add("alice", at("2026-11-27T12:00:00"), 5)
    spending.add("alice", at("2026-11-27T13:00:00"), 7)
    written = {("2026-11-27", "alice"): 5}
    spending.replace({("2026-11-27", "alice"): 105, ("2026-11-27", "bob"): 1}, written)
    assert [spending.of(client, day) for client in ("alice", "bob", None)] == [112, 1, 113]
    spending.replace({("2026-11-27", "alice"): 112}, {("2026-11-27", "alice"): 7})
    assert [spending.of(client, day) for client in ("alice", "bob", None)] == [112, 0, 112]


def test_a_budget_of_zero_is_used_up_and_can_be_reported_to_other_workers(held):
    one = held(Budget(daily=0))
    (limit,) = one.budgets.every()
    assert json.loads(json.dumps(limit.share, allow_nan=False)) == 1
    one.spend(3)
    assert one.budgets.every()[0].share == 1
    assert one.refusal().message.startswith("The daily budget of the key alice is used up: $3.00 of $0.00")


def test_random_spending_over_months_is_what_a_plain_sum_says_in_every_period():
    """Two processes and a database, whose clocks go back and forth; what is written counts once."""
    dice = random.Random(17)
    database, spent, one = Counter(), Counter(), Spending()
    unwritten = Counter()
    for _ in range(3000):
        now = at("2026-12-25T00:00:00") + dice.uniform(0, 80) * 24 * 3600
        client, cost = dice.choice(["alice", "bob"]), dice.randrange(10**12)
        day = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")
        spent[day, client] += cost
        if dice.random() < 0.3:  # another process
            database[day, client] += cost
        else:
            one.add(client, now, cost)
            unwritten[day, client] += cost
        if dice.random() < 0.1:
            database += unwritten
            one.replace(database, unwritten)
            unwritten.clear()
    database += unwritten
    one.replace(database, unwritten)
    for day in range(90):
        for period in periods(at("2026-12-20T00:00:00") + day * 24 * 3600).values():
            for client in ("alice", "bob", None):
                wanted = sum(
                    cost
                    for (day_, name), cost in spent.items()
                    if period.first <= day_ <= period.last and client in (name, None)
                )
                assert one.of(client, period) == wanted


def test_every_instant_is_in_one_day_one_week_and_one_month_that_end_at_their_reset():
    dice = random.Random(19)
    for _ in range(2000):
        now = dice.uniform(0, 4e9)
        today = datetime.fromtimestamp(now, UTC)
        for name, period in periods(now).items():
            assert period.first <= today.strftime("%Y-%m-%d") <= period.last
            assert now < period.reset
            after, before = (periods(period.reset - late)[name] for late in (0, 0.001))
            assert (before, after.first) == (period, period.reset_text[:10])
            begins = datetime.fromisoformat(period.first)
            assert {"daily": True, "weekly": begins.weekday() == 0, "monthly": begins.day == 1}[name]


@pytest.mark.parametrize("now", ["2026-11-27T23:59:59.999", "2026-11-27T00:00:00", "2026-02-28T23:59:59"])
@pytest.mark.parametrize("name", ["daily", "weekly", "monthly"])
def test_a_client_that_waits_as_long_as_it_is_told_is_served(held, now, name):
    one = held(Budget(**{name: 1}))
    one.now = at(now)
    one.spend(1)
    one.now += int(dict(one.refusal().headers)["retry-after"])
    assert one.refusal() is None
