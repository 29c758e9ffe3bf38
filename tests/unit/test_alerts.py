"""What the webhook is told, and when."""

import pytest

from aiproxy.config import LedgerSettings
from aiproxy.ledger.budgets import Limit
from aiproxy.ledger.ledger import Ledger
from aiproxy.ledger.spending import periods
from aiproxy.server.alerts import Alerts
from aiproxy.upstreams.breaker import Circuit, CircuitState

NOW = 1_795_000_000.0
CLOSED = Circuit(CircuitState.CLOSED)
OPEN = Circuit(CircuitState.OPEN, 1800.0, 3)


class Posted(list):
    """In the place of the webhook."""

    def send(self, url, text):
        assert url == "https://hooks.example.com/T0"
        self.append(text)


class Looked:
    """Looks again and again; `look` gives what was told."""

    def __init__(self, ledger=None):
        self.posted = Posted()
        self.alerts = Alerts(self.posted, ledger)
        self.look()

    def look(self, budgets=(), circuits=None, unready=None):
        before = len(self.posted)
        self.alerts.look("https://hooks.example.com/T0", "one:8080", budgets, circuits or {}, unready)
        return self.posted[before:]


def spent(share, client="alice", period="daily"):
    return [Limit(client, periods(NOW)[period], 20_000_000_000, round(20_000_000_000 * share))]


def test_a_budget_is_told_at_75_95_and_100_percent_once_each():
    looked = Looked()
    assert looked.look(spent(0.74)) == []
    (first,) = looked.look(spent(0.75))
    assert first == (
        "aiproxy on one:8080: The daily budget of the key alice is used to 75%: $15.00 of $20.00 are spent. "
        f"It begins anew at {periods(NOW)['daily'].reset_text}."
    )
    assert looked.look(spent(0.80)) == []
    assert "is used to 95%" in looked.look(spent(0.99))[0]
    assert "is used up" in looked.look(spent(1.5))[0]
    assert looked.look(spent(1.6)) == []
    assert "of all keys together is used up" in looked.look(spent(1.0, client=None))[0]


def test_a_budget_that_is_used_up_at_once_is_told_once():
    looked = Looked()
    assert len(looked.look(spent(3.0))) == 1


def test_circuits_are_told_when_they_open_and_close():
    looked = Looked()
    assert looked.look(circuits={"a": CLOSED, "b": CLOSED}) == []
    (told,) = looked.look(circuits={"a": OPEN, "b": CLOSED})
    assert told.endswith("The circuit of the upstream a is open. It is tried again in 30 min.")
    assert looked.look(circuits={"a": Circuit(CircuitState.HALF_OPEN), "b": CLOSED}) == []
    (told,) = looked.look(circuits={"a": CLOSED, "b": CLOSED})
    assert told.endswith("The circuit of the upstream a is closed: it is in use again.")


def test_an_upstream_that_leaves_the_configuration_is_not_told_as_closed():
    looked = Looked()
    looked.look(circuits={"a": OPEN})
    assert looked.look(circuits={}) == []


def test_no_usable_upstream_is_told_when_it_begins():
    looked = Looked()
    (told,) = looked.look(unready="no upstream is usable: all circuits are open")
    assert told == "aiproxy on one:8080: No upstream is usable: all circuits are open."
    assert looked.look(unready="no upstream is usable: all circuits are open") == []
    assert looked.look() == []
    assert len(looked.look(unready="no upstream is usable")) == 1


@pytest.mark.parametrize("times", [1, 2])
def test_of_several_workers_with_one_ledger_one_tells(tmp_path, times):
    settings = LedgerSettings(file=str(tmp_path / "ledger.db"))
    workers = [Looked(Ledger(settings, lambda: NOW)) for _ in range(3)]
    told = [looked.look(spent(0.8), {"a": OPEN}) for looked in workers for _ in range(times)]
    assert sorted(len(each) for each in told) == [0] * (3 * times - 1) + [2]


def test_without_a_ledger_that_answers_every_worker_tells(tmp_path):
    settings = LedgerSettings(file=str(tmp_path / "nowhere" / "ledger.db"))
    assert len(Looked(Ledger(settings, lambda: NOW)).look(spent(0.8))) == 1
