"""What an exchange is billed, as the fake accounts bill it, and estimates of what was not finished."""

import json
import math
import random
import threading
from collections import Counter
from fractions import Fraction

import pytest
from fakes import (
    ASK,
    RawClient,
    answer,
    await_that,
    close_now,
    error,
    error_event,
    event,
    events,
    hang,
    message_events,
)
from in_process import WsgiAnswer
from ledger_rows import costs
from werkzeug.test import create_environ

from aiproxy.app import create_app
from aiproxy.config import BreakerSettings, Config, LedgerSettings, Price, Timeouts, UpstreamSettings
from aiproxy.ledger.store import Store

PRICES = {"claude-x": Price(3, 15, 0.3, 3.75, 6, 10)}
PRICED = ("claude-x", "claude-y")
PER_MILLION = {
    "input_tokens": 3,
    "output_tokens": 15,
    "cache_read_input_tokens": Fraction("0.3"),
    "cache_creation_input_tokens": Fraction("3.75"),
}
USAGE = {
    "input_tokens": 1000,
    "output_tokens": 500,
    "cache_read_input_tokens": 20_000,
    "cache_creation_input_tokens": 300,
}
WORDS = [f"word number {n}, " for n in range(200)]


def billed(usage):
    """Nano-dollars, as the account bills them."""
    return round(sum(Fraction(usage[kind]) * rate for kind, rate in PER_MILLION.items()) * 1000)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path)


class Ledger:
    """An application with a ledger, and its rows; `close` writes the last of them."""

    def __init__(self, directory):
        self.settings = LedgerSettings(file=str(directory / "ledger.db"))

    def app(self, *fakes, must_stream=False, **settings):
        upstreams = tuple(
            UpstreamSettings(name=f"u{n}", base_url=fake.url, token="sk-test-a", must_stream=must_stream)
            for n, fake in enumerate(fakes)
        )
        self._app = create_app(
            Config(**{"upstreams": upstreams, "ledger": self.settings, "prices": PRICES, **settings})
        )
        return self._app.test_client()

    def begin(self, stream, size=0):
        """Ask; the answer's body is still to be read."""
        question = {**ASK, "stream": stream, "system": "s" * size}
        environ = create_environ("/v1/messages", method="POST", data=json.dumps(question).encode())
        return WsgiAnswer(self._app, environ)

    def rows(self):
        self._app.extensions["aiproxy"].close()
        store = Store(self.settings)
        found = store.exchanges(1000)
        store.close()
        return found

    def row(self):
        (row,) = self.rows()
        return row


@pytest.mark.parametrize("must_stream", [False, True], ids=["", "must_stream"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_complete_answer_costs_what_the_account_bills(ledger, upstream, stream, must_stream):
    named = [("request-id", "req_of_the_account")]
    streamed, whole = events(message_events(usage=USAGE), headers=named), answer(usage=USAGE, headers=named)
    client = ledger.app(upstream(streamed if stream or must_stream else whole), must_stream=must_stream)
    headers = {"x-claude-code-request-class": "subagent"}
    reply = client.post("/v1/messages", json={**ASK, "stream": stream}, headers=headers)
    assert reply.status_code == 200
    row = ledger.row()
    assert (row.cost, row.is_estimated, row.is_unpriced, row.outcome) == (billed(USAGE), 0, 0, "complete")
    assert (row.input, row.output, row.cache_read, row.cache_write_5m) == tuple(USAGE.values())
    assert (row.client, row.model, row.upstream, row.request_class) == (
        "anonymous",
        "claude-x",
        "u0",
        "subagent",
    )
    assert (row.id, row.attempts) == (reply.headers["x-aiproxy-request-id"], 1)
    assert row.upstream_request_id == "req_of_the_account"


class Account:
    """A reply with random usage that bills what it answered; it fails now and then, for nothing."""

    def __init__(self, seed, prices, discount="1"):
        """`prices`: nano-dollars per token by model: input, output, cache read and both kinds of writes."""
        self.billed = 0
        self._dice = random.Random(seed)
        self._prices = prices
        self._discount = Fraction(discount)

    def __call__(self, wire, seen):
        if self._dice.random() < 0.3:
            self._dice.choice([error(500), close_now()])(wire, seen)
            return
        top, compaction = self._counts(), self._counts()
        usage = {**top, "iterations": [{"type": "compaction", **compaction}, {"type": "message", **top}]}
        searches = self._dice.randrange(3)
        usage["server_tool_use"] = {"web_search_requests": searches, "web_fetch_requests": 0}
        tokens = sum(map(self._cost, [top, compaction], [seen.json()["model"]] * 2))
        exact = (tokens + searches * 10**7) * self._discount
        self.billed += math.floor(exact + Fraction(1, 2))
        answer(usage=usage)(wire, seen)

    def _counts(self):
        minutes, hour, *others = (self._dice.randrange(10**6) for _ in range(5))
        return {
            **dict(zip(list(USAGE)[:3], others, strict=True)),
            "cache_creation_input_tokens": minutes + hour,
            "cache_creation": {"ephemeral_5m_input_tokens": minutes, "ephemeral_1h_input_tokens": hour},
        }

    def _cost(self, counts, model):
        numbers = [*(counts[kind] for kind in list(USAGE)[:3]), *counts["cache_creation"].values()]
        return sum(number * price for number, price in zip(numbers, self._prices[model], strict=True))


def test_what_two_accounts_bill_is_in_the_ledger_to_the_nano_dollar(ledger, upstream):
    usual, other = (3000, 15_000, 300, 3750, 6000), (1000, 5001, 101, 1250, 2000)
    discounted = Account(2, dict.fromkeys(PRICED, usual), "0.85")
    accounts = [Account(1, {"own-x": other, "claude-y": usual}), discounted]
    first, second = (upstream(default=account).url for account in accounts)
    settings = (
        UpstreamSettings(
            name="u0",
            base_url=first,
            must_stream=True,
            model_mappings={"claude-x": "own-x"},
            prices={"own-*": Price(1, 5.001, 0.101, 1.25, 2)},
        ),
        UpstreamSettings(name="u1", base_url=second, price_multiplier=0.85),
    )
    client = ledger.app(
        upstreams=settings,
        prices=dict.fromkeys(PRICED, PRICES["claude-x"]),
        breaker=BreakerSettings(failures=1000),
    )
    dice, statuses = random.Random(3), Counter()
    for _ in range(150):
        asked = {**ASK, "model": dice.choice(PRICED), "stream": dice.random() < 0.5}
        statuses[client.post("/v1/messages", json=asked).status_code] += 1
    rows = ledger.rows()
    assert len(rows) == statuses[200] > 100
    assert any(row.attempts > 1 for row in rows)
    assert [costs(rows, "upstream")[name] for name in ("u0", "u1")] == [each.billed for each in accounts]


def test_a_stream_that_the_client_left_is_estimated_by_its_text(ledger, upstream):
    gate = threading.Event()
    pieces = message_events(WORDS, usage=USAGE)
    ledger.app(upstream(events([*pieces[:103], gate, *pieces[103:]])))  # a hundred words
    given = ledger.begin(stream=True)
    while given.body.count(b"word number") < 100:
        assert given.next() is not None
    given.leave()
    gate.set()
    row = ledger.row()
    exact = sum(map(len, WORDS[:100])) / 4
    assert (row.outcome, row.is_estimated, row.input) == ("client_left", 1, 1000)
    assert abs(row.output - exact) < 0.05 * exact
    assert row.cost == billed({**USAGE, "output_tokens": row.output})


@pytest.mark.parametrize(
    ("then", "outcome"),
    [("cut", "broken"), ("reset", "broken"), ("hang", "silent"), ("error event", "error_event")],
)
def test_a_stream_that_the_upstream_broke_is_estimated(ledger, upstream, then, outcome):
    pieces = message_events(WORDS, usage=USAGE)[:13]
    broken = events([*pieces, error_event()]) if then == "error event" else events(pieces, then=then)
    ledger.app(upstream(broken), timeouts=Timeouts(idle=0.2))
    ledger.begin(stream=True).read()
    row = ledger.row()
    assert (row.outcome, row.is_estimated, row.cache_read) == (outcome, 1, 20_000)
    assert row.output == -(-sum(map(len, WORDS[:10])) // 4)


def test_an_output_that_was_reported_before_the_break_counts_if_it_is_more(ledger, upstream):
    told = message_events(["ok"], usage=USAGE)[:-1]  # message_delta says 500; no message_stop
    ledger.app(upstream(events(told, then="cut")))
    ledger.begin(stream=True).read()
    row = ledger.row()
    assert (row.output, row.cost, row.is_estimated) == (500, billed(USAGE), 1)


def test_thinking_and_tool_input_count_as_text(ledger, upstream):
    start = message_events(usage=USAGE)[0]
    deltas = [
        {"type": "thinking_delta", "thinking": "t" * 40},
        {"type": "input_json_delta", "partial_json": "j" * 80},
        {"type": "signature_delta", "signature": "s" * 4000},
    ]
    told = [
        event("content_block_delta", {"type": "content_block_delta", "index": 0, "delta": d}) for d in deltas
    ]
    ledger.app(upstream(events([start, *told], then="cut")))
    ledger.begin(stream=True).read()
    assert ledger.row().output == 30


@pytest.mark.parametrize("must_stream", [False, True], ids=["", "must_stream"])
def test_a_whole_answer_that_the_client_left_costs_its_request_s_bytes(
    ledger, upstream, serve, tmp_path, must_stream
):
    fake = upstream(hang())
    listed = {"name": "u0", "base_url": fake.url, "token": "sk-test-a", "must_stream": must_stream}
    prices = {"claude-x": {"input": 3, "output": 15}}
    served = serve({"upstreams": [listed], "ledger": str(tmp_path / "left.db"), "prices": prices})
    with RawClient.to(served.url) as client:
        client.post({**ASK, "system": "s" * 8000})
        await_that(lambda: fake.seen)
    store = Store(LedgerSettings(file=str(tmp_path / "left.db")))
    await_that(lambda: store.exchanges(9))
    (row,) = store.exchanges(9)
    store.close()
    length = len(fake.seen[0].body) - (len(b', "stream": true') if must_stream else 0)
    assert (row.outcome, row.is_estimated, row.output) == ("client_left", 1, 0)
    assert abs(row.input - length / 4) <= 4
    assert row.cost == row.input * 3000


def test_a_whole_answer_whose_client_left_while_it_was_written_is_exact(ledger, upstream):
    ledger.app(upstream(answer("x" * 300_000, usage=USAGE)))
    given = ledger.begin(stream=False)
    given.next()
    given.leave()
    row = ledger.row()
    assert (row.outcome, row.is_estimated, row.cost) == ("client_left", 0, billed(USAGE))


def test_failed_attempts_cost_nothing_and_the_one_that_answers_is_billed(ledger, upstream):
    client = ledger.app(upstream(error(500)), upstream(answer(usage=USAGE)))
    assert client.post("/v1/messages", json=ASK).status_code == 200
    row = ledger.row()
    assert (row.cost, row.upstream, row.attempts, row.is_estimated) == (billed(USAGE), "u1", 2, 0)


def test_a_failed_attempt_that_had_begun_costs_what_it_reported(ledger, upstream):
    begun = events(message_events(usage=USAGE)[:2], then="cut")  # message_start and a ping
    client = ledger.app(upstream(begun), upstream(events(message_events(usage=USAGE))))
    client.post("/v1/messages", json={**ASK, "stream": True})
    row = ledger.row()
    started = {**USAGE, "output_tokens": 1}
    assert (row.cost, row.is_estimated) == (billed(USAGE) + billed(started), 1)
    assert row.input == 2000


def test_an_accumulated_stream_that_broke_costs_what_its_start_reported(ledger, upstream):
    broken = events(message_events(WORDS, usage=USAGE)[:13], then="cut")
    client = ledger.app(upstream(broken), must_stream=True)
    assert client.post("/v1/messages", json=ASK).status_code == 502
    row = ledger.row()
    assert (row.outcome, row.is_estimated) == ("error", 1)
    assert row.cost == billed({**USAGE, "output_tokens": 1})


def test_where_all_attempts_failed_only_what_was_reported_has_a_row(ledger, upstream):
    begun = events(message_events(usage=USAGE)[:2], then="cut")
    client = ledger.app(upstream(begun, error(500)))
    assert client.post("/v1/messages", json={**ASK, "stream": True}).status_code == 502
    assert client.post("/v1/messages", json=ASK).status_code == 500
    row = ledger.row()
    assert (row.outcome, row.upstream, row.cost) == ("error", "u0", billed({**USAGE, "output_tokens": 1}))


def test_counting_tokens_and_refusals_have_no_row(ledger, upstream):
    client = ledger.app(upstream(answer(usage=USAGE)))
    client.post("/v1/messages/count_tokens", json=ASK)
    client.post("/v1/messages", json=[])
    assert ledger.rows() == []


def test_a_model_without_a_price_is_billed_at_the_dearest_and_marked(ledger, upstream):
    client = ledger.app(upstream(answer(usage={"input_tokens": 1_000_000, "output_tokens": 0})), prices={})
    client.post("/v1/messages", json=ASK)
    row = ledger.row()
    assert (row.is_unpriced, row.cost) == (1, 15_000_000_000)


def test_an_exchange_of_absurd_figures_does_not_keep_others_out_of_the_ledger(ledger, upstream):
    most = dict.fromkeys(USAGE, 10**11 - 1)
    absurd = {**most, "iterations": [{"type": "compaction", **most}] * 5000}
    absurd["server_tool_use"] = {"web_search_requests": 10**11 - 1}
    client = ledger.app(upstream(answer(usage=USAGE), answer(usage=absurd), answer(usage=USAGE)))
    for _ in range(3):
        assert client.post("/v1/messages", json=ASK).status_code == 200
    costs = sorted(row.cost for row in ledger.rows())
    assert costs[:2] == [billed(USAGE)] * 2
    assert 90_000 * costs[2] < 2**63  # as many of them fit the day's sums


def test_odd_texts_of_clients_and_upstreams_are_stored(ledger, upstream):
    odd = "m\0odel" + "\N{GRINNING FACE}" * 300
    client = ledger.app(upstream(answer(usage=USAGE)), timeouts=Timeouts(answer=5))
    client.post("/v1/messages", json={**ASK, "model": odd})
    row = ledger.row()
    assert (row.model[:6], len(row.model)) == ("model\N{GRINNING FACE}", 199)
