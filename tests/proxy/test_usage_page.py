"""The page /usage, its CSV files, and the command line that reads the same ledger."""

import base64
import csv
import hashlib
import io
import json
import re
import time

import pytest

from aiproxy.app import create_app
from aiproxy.command_line import main
from aiproxy.config import Budget, ClientKey, Config, KeyLimits, LedgerSettings, Secret, UpstreamSettings
from aiproxy.ledger.rows import Exchange, day_of
from aiproxy.ledger.store import Store

NOW = time.time()
PASSWORD = "sk-test-admin"
HEADERS = {"authorization": "Basic " + base64.b64encode(f"x:{PASSWORD}".encode()).decode()}


def row(number, client="alice", **changes):
    """One exchange of today, which cost $1.50."""
    row = Exchange(
        id=f"req_{number}",
        at=NOW - number / 1000,
        client=client,
        model="claude-opus-5-5",
        upstream="team",
        upstream_model="claude-opus-5-5",
        request_class="main",
        input=100,
        output=20,
        cache_read=300,
        cache_write_5m=40,
        cache_write_1h=5,
        web_searches=1,
        web_fetches=0,
        cost=1_500_000_000,
        outcome="complete",
        seconds=2.5,
        attempts=1,
        is_estimated=0,
        is_unpriced=0,
        upstream_request_id=f"req_up_{number}",
    )
    return type(row)(**{name: changes.get(name, getattr(row, name)) for name in row.__struct_fields__})


@pytest.fixture
def ledger(tmp_path):
    """Writes rows into a ledger; its settings."""

    def write(*rows):
        settings = LedgerSettings(file=str(tmp_path / "ledger.db"))
        store = Store(settings)
        store.write(list(rows))
        store.close()
        return settings

    return write


def client_of(ledger, **settings):
    upstream = UpstreamSettings(name="team", base_url="demo://answers")
    return create_app(
        Config(upstreams=(upstream,), ledger=ledger, admin_key=Secret(PASSWORD), **settings)
    ).test_client()


def page(client, query=""):
    reply = client.get(f"/usage{query}", headers=HEADERS)
    assert (reply.status_code, reply.content_type) == (200, "text/html; charset=utf-8")
    return reply.get_data(as_text=True)


def table(client, name, query=""):
    reply = client.get(f"/usage.csv?table={name}{query}", headers=HEADERS)
    assert (reply.status_code, reply.content_type) == (200, "text/csv; charset=utf-8")
    return list(csv.DictReader(io.StringIO(reply.get_data(as_text=True))))


def test_the_page_shows_what_each_key_and_model_spent(ledger):
    shown = page(client_of(ledger(row(1), row(2), row(3, "bob", model="claude-x"))))
    assert re.search(r"<td>alice</td><td class=\"number\">\$3.00</td>", shown)
    assert re.search(r"<td>claude-x</td><td class=\"number\">\$1.50</td>", shown)
    assert re.search(r"<td>all</td><td class=\"number\">\$4.50</td>", shown)
    assert "Cost per day: at most $4.50 a day" in shown


def test_the_page_shows_what_is_left_of_budgets(ledger):
    keys = (ClientKey("alice", (Secret("sk-test-alice"),), limits=KeyLimits(Budget(daily=2))),)
    client = client_of(ledger(row(1)), api_keys=keys, budget=Budget(monthly=100))
    client.application.extensions["aiproxy"].ledger.start(is_awaited=True)
    shown = page(client)
    assert 'aria-label="75% used"' in shown
    assert "<td>all keys together</td><td>monthly</td>" in shown
    client.application.extensions["aiproxy"].close()


def test_the_page_says_that_a_model_has_no_known_price(ledger):
    assert "named a model without a known price" not in page(client_of(ledger(row(1))))
    assert "1 request of this month named a model" in page(client_of(ledger(row(2, is_unpriced=1))))


def test_exchanges_are_filtered_by_key_and_outcome(ledger):
    rows = [row(1), row(2, "bob"), row(3, "bob", outcome="client_left", is_estimated=1)]
    client = client_of(ledger(*rows))

    def ids(query):
        return re.findall(r"\breq_\d", page(client, query))

    assert ids("") == ["req_1", "req_2", "req_3"]
    assert ids("?key=bob") == ["req_2", "req_3"]
    assert ids("?key=bob&outcome=client_left") == ["req_3"]
    assert "(estimated)" in page(client, "?key=bob")
    assert ids("?key=nobody") == []


@pytest.mark.parametrize("query", ["?period=year", "?outcome=odd"])
def test_a_filter_that_makes_no_sense_is_refused(ledger, query):
    assert client_of(ledger()).get(f"/usage{query}", headers=HEADERS).status_code == 400


def test_only_the_200_latest_exchanges_are_shown(ledger):
    rows = [row(number) for number in range(250)]
    shown = table(client_of(ledger(*rows)), "exchanges")
    assert [each["request_id"] for each in shown] == [f"req_{number}" for number in range(200)]


def test_every_table_can_be_had_as_csv(ledger):
    client = client_of(ledger(row(1), row(2, "bob", cost=1)))
    keys = table(client, "keys")
    assert keys[0] == {
        "key": "alice",
        "requests": "1",
        "input": "100",
        "output": "20",
        "cache_read": "300",
        "cache_write_5m": "40",
        "cache_write_1h": "5",
        "cost_dollars": "1.500000000",
    }
    assert keys[1]["cost_dollars"] == "0.000000001"
    assert [each["requests"] for each in table(client, "models", "&period=today")] == ["2"]
    assert {each["day"]: each["requests"] for each in table(client, "days")}[day_of(NOW)] == "2"
    assert [each["key"] for each in table(client, "exchanges", "&key=bob")] == ["bob"]
    assert client.get("/usage.csv?table=odd", headers=HEADERS).status_code == 400


def test_a_name_that_a_spreadsheet_would_compute_is_text(ledger):
    (line,) = table(client_of(ledger(row(1, model="=1+1"))), "models")
    assert line["model"] == "'=1+1"


@pytest.mark.parametrize("path", ["/usage", "/usage.csv?table=keys"])
def test_the_page_wants_the_admin_key_and_a_ledger(ledger, path):
    assert client_of(ledger()).get(path).status_code == 401
    assert client_of(None).get(path, headers=HEADERS).status_code == 404


def test_a_ledger_that_cannot_be_read_is_an_error_in_the_api_s_shape(tmp_path):
    (tmp_path / "ledger.db").write_text("this is not a database, and long enough to be looked at")
    client = client_of(LedgerSettings(file=str(tmp_path / "ledger.db")))
    reply = client.get("/usage", headers=HEADERS)
    assert (reply.status_code, reply.json["error"]["type"]) == (503, "api_error")


# --- The command line ---


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command line with a configuration; its exit code and what it printed."""
    (tmp_path / "config.yaml").write_text('upstreams: [{base_url: "demo://answers"}]')
    monkeypatch.setenv("AIPROXY_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)

    def run(*arguments):
        code = main(list(arguments))
        return code, capsys.readouterr()

    return run


def test_usage_is_printed_as_a_table_or_as_csv(ledger, command):
    ledger(row(1), row(2), row(3, "bob"))
    code, said = command("usage")
    assert code == 0
    lines = [re.split(r"  +", line) for line in said.out.splitlines()[1:]]
    assert [(line[0], line[1], line[-1]) for line in lines] == [
        ("key", "requests", "cost"),
        ("alice", "2", "$3.00"),
        ("bob", "1", "$1.50"),
        ("all", "3", "$4.50"),
    ]
    code, said = command("usage", "--by", "upstream", "--csv")
    assert said.out.splitlines() == [
        "upstream,requests,input,output,cache_read,cache_write_5m,cache_write_1h,cost_dollars",
        "team,3,300,60,900,120,15,4.500000000",
    ]


def test_usage_begins_on_the_day_that_is_asked_for(ledger, command):
    ledger(row(1), row(2, at=NOW - 40 * 24 * 3600))
    assert len(command("usage", "--by", "day", "--csv")[1].out.splitlines()) == 2
    assert len(command("usage", "--by", "day", "--csv", "--since", "2020-01-01")[1].out.splitlines()) == 3
    with pytest.raises(SystemExit):
        command("usage", "--since", "2020-02-30")


def test_usage_without_a_ledger_is_one_line(command):
    code, said = command("usage")
    assert (code, said.err.count("\n")) == (1, 1)
    assert "there is no such ledger" in said.err


def test_a_new_key_is_printed_with_the_lines_for_the_file(command):
    code, said = command("key", "alice")
    assert code == 0
    (key,) = re.findall(r"\b[\w-]+\.[\w-]+\.[\w-]{43}\b", said.out)
    claims = base64.urlsafe_b64decode(key.split(".")[1] + "==")
    assert json.loads(claims) == {"aud": "claude-gateway"}  # for which Claude Code minds budgets
    assert f"key_sha256: {hashlib.sha256(key.encode()).hexdigest()}" in said.out
    assert '- name: "alice"' in said.out
    assert key not in command("key", "alice")[1].out
