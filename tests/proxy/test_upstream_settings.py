"""What an upstream's own settings change: betas, removed headers, organizations; and fallback models."""

import pytest
from fakes import answer, error, hang

from aiproxy.app import create_app
from aiproxy.config import (
    Betas,
    ClientKey,
    Config,
    KeyLimits,
    LedgerSettings,
    Secret,
    Timeouts,
    UpstreamSettings,
)
from aiproxy.ledger.store import Store

ASK = {"model": "opus", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]}
THOUGHT = {"role": "assistant", "content": [{"type": "thinking", "thinking": "…", "signature": "s"}]}


def client_of(*upstreams, **settings):
    found = tuple(
        UpstreamSettings(**{"name": f"u{n}", "token": "sk-test-a", **one}) for n, one in enumerate(upstreams)
    )
    return create_app(Config(upstreams=found, **settings)).test_client()


def test_an_upstream_gets_its_betas_and_not_the_removed_headers(upstream):
    fake = upstream()
    settings = {"betas": Betas(drop=("old-1",), add=("new-2",)), "remove_headers": frozenset({"x-secret"})}
    client = client_of({"base_url": fake.url, **settings})
    headers = {"anthropic-beta": "old-1,kept-3", "x-secret": "s", "x-kept": "k"}
    assert client.post("/v1/messages", json=ASK, headers=headers).status_code == 200
    sent = dict(fake.seen[0].headers)
    assert (sent["anthropic-beta"], sent["x-kept"]) == ("kept-3,new-2", "k")
    assert "x-secret" not in sent


def test_on_failover_an_upstream_of_the_same_organization_is_asked_first(upstream):
    first, other, sister = upstream(error(500)), upstream(), upstream()
    client = client_of(
        {"base_url": first.url, "weight": 100, "organization": "acme"},
        {"base_url": other.url, "weight": 50},
        {"base_url": sister.url, "weight": 1, "organization": "acme"},
    )
    assert client.post("/v1/messages", json=ASK).headers["x-aiproxy-upstream"] == "u2"


# --- Fallback models ---

FALLBACK = {"fallback_models": {"opus": "sonnet"}}


def asked(fake):
    return [seen.json()["model"] for seen in fake.seen]


@pytest.mark.parametrize(
    "failure", [error(429), error(529), error(503), hang()], ids=["429", "529", "503", "timeout"]
)
def test_where_every_upstream_lacks_capacity_the_fallback_model_is_asked(tmp_path, upstream, capsys, failure):
    a = upstream(failure, answer("from sonnet"))
    ledger = LedgerSettings(file=str(tmp_path / "ledger.db"))
    client = client_of(
        {"base_url": a.url}, ledger=ledger, timeouts=Timeouts(answer=0.3, first_byte=0.3), **FALLBACK
    )
    reply = client.post("/v1/messages", json=ASK)
    assert (reply.status_code, reply.headers["x-aiproxy-model"]) == (200, "sonnet")
    assert asked(a) == ["opus", "sonnet"]
    assert " model=opus fallback_model=sonnet status=200" in capsys.readouterr().out
    client.application.extensions["aiproxy"].close()
    (row,) = Store(ledger).exchanges(10)
    assert (row.model, row.upstream_model, row.attempts) == ("opus", "sonnet", 2)


@pytest.mark.parametrize("failure", [error(500), error(400), error(404), error(401)])
def test_after_another_failure_the_fallback_model_is_not_asked(upstream, failure):
    a, b = upstream(failure), upstream(error(529))
    client = client_of({"base_url": a.url}, {"base_url": b.url}, **FALLBACK)
    reply = client.post("/v1/messages", json=ASK)
    assert reply.status_code >= 400
    assert "x-aiproxy-model" not in reply.headers
    assert set(asked(a) + asked(b)) == {"opus"}


def test_an_answer_of_the_first_model_names_no_fallback(upstream):
    reply = client_of({"base_url": upstream().url}, **FALLBACK).post("/v1/messages", json=ASK)
    assert (reply.status_code, "x-aiproxy-model" in reply.headers) == (200, False)


@pytest.mark.parametrize(
    "question",
    [
        {"messages": [*ASK["messages"], THOUGHT, *ASK["messages"]]},
        {"thread": {"type": "continue", "previous_message_id": "msg_1"}},
    ],
    ids=["thinking", "thread"],
)
def test_a_request_that_only_its_model_can_continue_does_not_fall_back(upstream, question):
    a = upstream(error(529), error(529))
    client_of({"base_url": a.url}, **FALLBACK).post("/v1/messages", json={**ASK, **question})
    assert set(asked(a)) == {"opus"}


@pytest.mark.parametrize(("models", "status"), [(("opus",), 529), (("opus", "son*"), 200)])
def test_a_key_never_falls_back_to_a_model_that_it_may_not_use(upstream, models, status):
    a = upstream(error(529))
    keys = (ClientKey("alice", (Secret("sk-test-alice"),), limits=KeyLimits(models=models)),)
    client = client_of({"base_url": a.url}, api_keys=keys, **FALLBACK)
    reply = client.post("/v1/messages", json=ASK, headers={"x-api-key": "sk-test-alice"})
    assert reply.status_code == status
