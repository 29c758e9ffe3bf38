"""What a client key may do: models, places in flight, expiry, rotation, budgets."""

import contextlib
import datetime
import hashlib
import json
import threading

import msgspec
import pytest
from fakes import ASK, RawClient, answer, await_that, error, events, hang, message_events, whole
from in_process import client_of

from aiproxy.config import Budget, ClientKey, ConfigError, KeyLimits, LedgerSettings, Secret, load

ALICE = {"x-api-key": "sk-test-alice"}
TODAY = datetime.datetime.now(datetime.UTC).date()


def key(name="alice", **limits):
    return ClientKey(name, (Secret(f"sk-test-{name}"),), limits=KeyLimits(**limits))


def ask(client, question=None, path="/v1/messages"):
    return client.post(path, json=question or ASK, headers=ALICE)


def told(reply):
    return reply.status_code, reply.json["error"]["type"]


# --- Models ---


@pytest.mark.parametrize(
    ("models", "more", "status"),
    [
        (("claude-x",), {}, 200),
        (("claude-*",), {}, 200),
        (("claude-y", "claude"), {}, 403),
        (("claude-x",), {"fallbacks": [{"model": "claude-x"}]}, 200),
        (("claude-x",), {"fallbacks": [{"model": "claude-y"}]}, 403),
        (("claude-x",), {"tools": [{"type": "advisor", "model": "claude-y"}]}, 403),
        (("claude-x",), {"tools": [{"name": "t", "input_schema": {"properties": {"model": {}}}}]}, 200),
        (("claude-x",), {"tools": None, "fallbacks": "nonsense"}, 200),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_a_key_may_only_name_its_models_wherever_a_body_names_one(upstream, path, models, more, status):
    client = client_of(upstream(), api_keys=(key(models=models),))
    reply = ask(client, {**ASK, **more}, path)
    assert reply.status_code == status
    if status == 403:
        assert told(reply) == (403, "permission_error")
        assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "members",
    [
        b'"fallbacks":[],"fallbacks":[{"model":"claude-y"}]',
        b'"tools":[],"t\\u006fols":[{"model":"claude-y"}]',
        b'"m\\u006fdel":"claude-y"',
    ],
)
def test_a_body_that_names_models_twice_is_refused(upstream, members):
    body = b'{"model":"claude-x",%s}' % members
    client = client_of(upstream(), api_keys=(key(models=("claude-x",)),))
    assert client.post("/v1/messages", data=body, headers=ALICE).status_code == 400


def test_the_model_list_shows_only_what_the_key_may_use(upstream):
    listed = {"base_url": upstream(), "available_models": frozenset({"claude-x", "claude-y", "other"})}
    client = client_of(listed, api_keys=(key(models=("claude-*",)),))
    page = client.get("/v1/models", headers=ALICE).json
    assert [each["id"] for each in page["data"]] == ["claude-x", "claude-y"]
    assert client.get("/v1/models/claude-x", headers=ALICE).status_code == 200
    assert client.get("/v1/models/other", headers=ALICE).status_code == 404


def test_where_no_upstream_names_models_the_list_has_those_of_the_key(upstream):
    client = client_of(upstream(), api_keys=(key(models=("claude-x", "claude-y-*")),))
    page = client.get("/v1/models", headers=ALICE).json
    assert [each["id"] for each in page["data"]] == ["claude-x"]


def test_an_upstream_s_list_shows_only_what_a_key_with_prefixes_may_use(upstream):
    listed = [{"type": "model", "id": name} for name in ("claude-x", "other", "claude-y")]
    page = {"data": listed, "has_more": True, "last_id": "claude-y"}
    bodies = (page, page, {"id": "claude-x"}, {"data": 5})
    replies = [whole(200, json.dumps(body).encode()) for body in bodies]
    keys = (key(models=("claude-*",)), key("bob"))
    client = client_of(upstream(*replies), api_keys=keys)
    allowed = {**page, "data": [listed[0], listed[2]]}
    assert client.get("/v1/models", headers=ALICE).json == allowed
    assert client.get("/v1/models", headers={"x-api-key": "sk-test-bob"}).json == page
    assert client.get("/v1/models/claude-x", headers=ALICE).status_code == 200
    assert client.get("/v1/models/other", headers=ALICE).status_code == 404
    assert told(client.get("/v1/models", headers=ALICE)) == (502, "api_error")


# --- Keys ---


@pytest.mark.parametrize(("days", "status"), [(0, 200), (1, 200), (-1, 401)])
def test_a_key_is_valid_until_the_end_of_its_last_day(upstream, days, status):
    expires = TODAY + datetime.timedelta(days=days)
    reply = ask(client_of(upstream(), api_keys=(key(expires=expires),)))
    assert reply.status_code == status
    if status == 401:
        assert told(reply) == (401, "authentication_error")
        assert f"was valid until {expires}" in reply.json["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/usage", "/v1/models", "/v1/models/claude-x"])
def test_an_expired_key_is_told_nothing(upstream, tmp_path, path):
    expired = key(expires=TODAY - datetime.timedelta(days=1))
    ledger = LedgerSettings(file=str(tmp_path / "l.db"))
    client = client_of(upstream(), api_keys=(expired,), ledger=ledger)
    assert told(client.get(path, headers=ALICE)) == (401, "authentication_error")


def test_several_keys_of_one_name_and_digests_in_their_place(upstream, capsys):
    digest = hashlib.sha256(b"sk-test-third").hexdigest()
    one = ClientKey("alice", (Secret("sk-test-alice"), Secret("sk-test-second")), (digest,))
    client = client_of(upstream(), api_keys=(one,))
    for sent in ("sk-test-alice", "sk-test-second", "sk-test-third"):
        assert client.post("/v1/messages", json=ASK, headers={"x-api-key": sent}).status_code == 200
    for sent in (digest, "sk-test-fourth", ""):
        assert client.post("/v1/messages", json=ASK, headers={"x-api-key": sent}).status_code == 401
    assert capsys.readouterr().out.count(" done ") == 3


# --- Places in flight ---


def busy(upstream, serve, **limits):
    """A server whose client alice may have one request in flight, and has it; her next answer."""
    fake = upstream(hang())
    keys = [
        {"name": "alice", "key": "sk-test-alice", "max_in_flight": 1, **limits},
        {"name": "bob", "key": "sk-test-bob"},
    ]
    upstreams = [{"name": "a", "base_url": fake.url, "token": "sk-test-a"}]
    served = serve({"upstreams": upstreams, "api_keys": keys, "ledger": "none", "max_in_flight": 8})
    first = RawClient.to(served.url)
    first.post(ASK, headers=[("x-api-key", "sk-test-alice")])
    await_that(lambda: fake.seen)
    return served, first


def answered(served, name="alice"):
    with RawClient.to(served.url) as client:
        client.post(ASK, headers=[("x-api-key", f"sk-test-{name}")])
        return client.read()


def begin_to_wait(served):
    """A client whose request has reached the server; `since`: how long the log was before."""
    client = RawClient.to(served.url)
    client.since = len(served.stdout_lines())
    client.post(ASK, headers=[("x-api-key", "sk-test-alice")])
    served.wait_for_log(" request id=.* client=alice", since=client.since)
    return client


def test_one_request_too_many_of_a_key_is_a_429_at_once(upstream, serve):
    served, first = busy(upstream, serve)
    reply = answered(served)
    assert (reply.status, reply.json()["error"]["type"]) == (429, "rate_limit_error")
    assert dict(reply.headers)["retry-after"] == "1"
    assert answered(served, "bob").status == 200
    first.close()
    await_that(lambda: answered(served).status == 200)


def test_a_request_waits_for_a_place_of_its_key(upstream, serve):
    served, first = busy(upstream, serve, max_wait=10)
    waiting = threading.Thread(target=lambda: replies.append(answered(served)))
    replies = []
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    first.close()
    waiting.join(5)
    assert [reply.status for reply in replies] == [200]


def test_a_request_that_waited_in_vain_is_refused(upstream, serve):
    served, first = busy(upstream, serve, max_wait=0.3)
    assert answered(served).status == 429
    first.close()


def test_a_client_that_leaves_while_it_waits_gives_its_place_back(upstream, serve):
    served, first = busy(upstream, serve, max_wait=10)
    for _ in range(3):  # two may wait
        waiting = begin_to_wait(served)
        waiting.close()
        served.wait_for_log("done id=.* outcome=client_left client=alice .*attempts=0", since=waiting.since)
    with begin_to_wait(served) as waiting:
        first.close()
        assert waiting.read().status == 200


def test_only_a_quarter_of_the_places_may_be_used_for_waiting(upstream, serve):
    served, first = busy(upstream, serve, max_wait=10)  # of 8 places 2 may wait
    waiting = [RawClient.to(served.url) for _ in range(3)]
    for each in waiting:
        each.post(ASK, headers=[("x-api-key", "sk-test-alice")])
    served.wait_for_log("refused id=.* client=alice .*status=429")
    assert answered(served, "bob").status == 200
    for each in (first, *waiting):
        each.close()


def test_a_request_that_waits_for_a_place_ends_with_the_server(upstream, serve):
    served, first = busy(upstream, serve, max_wait=10)
    waiting = begin_to_wait(served)
    served.ask_to_stop()
    reply = waiting.read()
    assert (reply.status, reply.json()["error"]["message"]) == (529, "aiproxy is restarting.")
    for each in (first, waiting):
        each.close()


def test_a_place_of_a_key_comes_back_however_its_request_ends(upstream):
    replies = [error(500), error(400), events(message_events()[:4], then="cut"), answer()]
    client = client_of(
        upstream(*replies), api_keys=(key(max_in_flight=1, models=("claude-x",)),), max_in_flight=1
    )
    for question in (b"no JSON", {**ASK, "model": "claude-y"}, *[{**ASK, "stream": True}] * 3):
        send = {"data": question} if isinstance(question, bytes) else {"json": question}
        with contextlib.suppress(ConnectionAbortedError):  # the stream that was cut
            assert client.post("/v1/messages", headers=ALICE, **send).status_code not in (200, 429, 529)
    assert ask(client).status_code == 200


# --- Budgets ---


def test_a_budget_ends_at_the_next_request_and_counting_stays_free(upstream, tmp_path):
    usage = {"input_tokens": 1_000_000, "output_tokens": 0}
    replies = [answer(usage=usage), answer(usage=usage), answer()]
    settings = {"ledger": LedgerSettings(file=str(tmp_path / "l.db")), "budget": Budget(daily=100)}
    client = client_of(upstream(*replies), api_keys=(key(budget=Budget(daily=20)), key("bob")), **settings)
    first = ask(client)
    assert first.headers["anthropic-ratelimit-unified-overage-utilization"] == "0.00"
    assert ask(client).headers["anthropic-ratelimit-unified-overage-surpassed-threshold"] == "0.75"
    reply = ask(client)  # $15 and $15 at the dearest price
    assert told(reply) == (429, "billing_error")
    assert "$30.00 of $20.00" in reply.json["error"]["message"]
    assert reply.headers["anthropic-ratelimit-unified-status"] == "rejected"
    assert ask(client, path="/v1/messages/count_tokens").status_code == 200
    spent = client.get("/v1/usage", headers=ALICE).json
    assert (spent["client"], spent["spent"]["daily"], spent["left"]) == ("alice", 30, {"daily": 0})
    bob = client.post("/v1/messages", json=ASK, headers={"x-api-key": "sk-test-bob"})
    assert bob.status_code == 200
    assert not any(name.startswith("anthropic-ratelimit-unified") for name, _ in bob.headers)


def test_the_old_and_the_new_key_of_a_name_share_one_budget(upstream, tmp_path):
    alice = ClientKey(
        "alice", (Secret("sk-test-alice"), Secret("sk-test-new")), limits=KeyLimits(Budget(daily=14))
    )
    usage = {"input_tokens": 1_000_000, "output_tokens": 0}  # $15 at the dearest price
    ledger = LedgerSettings(file=str(tmp_path / "l.db"))
    client = client_of(upstream(answer(usage=usage)), api_keys=(alice,), ledger=ledger)
    assert ask(client).status_code == 200
    new = client.post("/v1/messages", json=ASK, headers={"authorization": "Bearer sk-test-new"})
    assert told(new) == (429, "billing_error")


def test_the_budget_of_all_refuses_keys_that_have_none_and_anonymous_clients(upstream, tmp_path):
    ledger = LedgerSettings(file=str(tmp_path / "l.db"))
    for keys, client_name in (((key(),), "alice"), ((), "anonymous")):
        client = client_of(upstream(), api_keys=keys, ledger=ledger, budget=Budget(monthly=0))
        assert told(ask(client)) == (429, "billing_error")
        assert client.get("/v1/usage", headers=ALICE).json["client"] == client_name


@pytest.mark.parametrize(("is_strict", "status"), [(False, 200), (True, 503)])
def test_a_ledger_out_of_reach_stops_only_the_strict(upstream, tmp_path, is_strict, status):
    ledger = LedgerSettings(file=str(tmp_path / "nowhere" / "l.db"))
    keys = (key(budget=Budget(daily=1)), key("bob"))
    client = client_of(upstream(), api_keys=keys, ledger=ledger, fail_closed=is_strict)
    assert ask(client).status_code == status
    assert client.post("/v1/messages", json=ASK, headers={"x-api-key": "sk-test-bob"}).status_code == 200


def test_an_upstream_s_own_headers_of_that_name_pass_only_without_a_budget(upstream, tmp_path):
    own = [("anthropic-ratelimit-unified-status", "allowed"), ("anthropic-ratelimit-unified-5h-reset", "1")]
    keys = (key(budget=Budget(daily=20)), key("bob"))
    ledger = LedgerSettings(file=str(tmp_path / "l.db"))
    client = client_of(upstream(*[answer(headers=own)] * 2), api_keys=keys, ledger=ledger)
    assert "anthropic-ratelimit-unified-5h-reset" not in ask(client).headers
    bob = client.post("/v1/messages", json=ASK, headers={"x-api-key": "sk-test-bob"})
    assert bob.headers["anthropic-ratelimit-unified-5h-reset"] == "1"


def test_budgets_are_refused_by_a_process_that_was_started_without_a_ledger(upstream, tmp_path):
    client = client_of(upstream(), api_keys=(key(),), ledger=None)
    service = client.application.extensions["aiproxy"]
    old = service.runtime
    changed = msgspec.structs.replace(
        old.config,
        api_keys=(key(budget=Budget(daily=1)),),
        ledger=LedgerSettings(file=str(tmp_path / "l.db")),
    )
    with pytest.raises(ConfigError, match="started without one, and budgets need it"):
        service.apply(changed, "digest")
    assert service.runtime is old
    service.apply(msgspec.structs.replace(changed, api_keys=(key("bob"),)), "digest")
    assert [each.name for each in service.runtime.config.api_keys] == ["bob"]


def test_without_a_ledger_nobody_can_be_told_what_was_spent(upstream):
    reply = client_of(upstream(), api_keys=(key(),)).get("/v1/usage", headers=ALICE)
    assert told(reply) == (404, "not_found_error")


# --- The configuration ---


@pytest.fixture
def keys_of(tmp_path):
    def read(text, **environ):
        path = tmp_path / "config.yaml"
        path.write_text('upstreams: [{base_url: "demo://answers"}]\n' + text)
        return load(path, environ).api_keys

    return read


def test_limits_are_read_and_defaults_hold_where_a_key_sets_none(keys_of):
    alice, bob = keys_of(
        """
key_defaults: {budget: {daily: 20, weekly: 80}, models: [claude-x], max_in_flight: 3}
api_keys:
  - {name: alice, key: sk-test-alice}
  - name: bob
    key_sha256: "5E884898DA28047151D0E56F8DC6292773603D0D6AABBDD62A11EF721D1542D8"
    budget: {monthly: 5.5}
    max_wait: 2.5
    expires: 2027-01-31
"""
    )
    assert alice.limits == KeyLimits(Budget(20, 80), ("claude-x",), 3)
    assert bob.limits == KeyLimits(
        Budget(monthly=5.5), ("claude-x",), 3, max_wait=2.5, expires=datetime.date(2027, 1, 31)
    )
    assert bob.digests == ("5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8",)


def test_a_last_day_may_be_a_text_and_keys_may_be_lists(keys_of):
    (alice,) = keys_of(
        'api_keys: [{name: alice, key: [sk-test-a, "${B}"], expires: "2027-01-31"}]', B="sk-test-b"
    )
    assert (alice.keys, alice.limits.expires) == (("sk-test-a", "sk-test-b"), datetime.date(2027, 1, 31))
    assert "sk-test" not in repr(alice)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("api_keys: [{name: a}]", "api_keys[0].key: is missing"),
        ("api_keys: [{name: a, key_sha256: sk-test-secret}]", "key_sha256: is not a SHA-256"),
        ("api_keys: [{name: a, key: []}]", "api_keys[0].key: is an empty list"),
        ("api_keys: [{name: a, key: sk-test-a, budget: {dayly: 3}}]", "did you mean daily?"),
        ("api_keys: [{name: a, key: sk-test-a, budget: {daily: -3}}]", "a number, 0 or more"),
        ("api_keys: [{name: a, key: sk-test-a, max_wait: 11}]", "a number from 0 to 10"),
        ("api_keys: [{name: a, key: sk-test-a, max_in_flight: 0}]", "1 or more"),
        ("api_keys: [{name: a, key: sk-test-a, models: []}]", "expected at least one model"),
        ("api_keys: [{name: a, key: sk-test-a, expires: 2027-02-30}]", "the last valid day"),
        ("api_keys: [{name: a, key: sk-test-a, expires: soon}]", "the last valid day"),
        ("api_keys: [{name: a, key: [sk-test-a, sk-test-a]}]", "is the same key as one before"),
        ("api_keys: [{name: a, key: sk-test-a}]\nledger: none\nbudget: {daily: 3}", "ledger: is none"),
        ("key_defaults: {name: a}", "key_defaults.name: is no setting"),
        ("ledger: mysql://x", "ledger: is none of sqlite"),
        ("ledger: /no/such/folder/l.db", "ledger: is a directory, or in one that does not exist"),
        ("prices: {claude-x: {input: 3}}", "prices.claude-x.output: is missing"),
        ("webhook: ftp://sk-test-secret", "webhook: is not the URL of a webhook"),
    ],
)
def test_faults_say_what_is_wrong_and_show_no_secret(keys_of, text, fault):
    with pytest.raises(ConfigError) as caught:
        keys_of(text)
    assert fault in str(caught.value)
    assert "sk-test" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "environ", "file"),
    [
        ("", {}, "{here}/ledger.db"),
        ("ledger: sqlite", {"STATE_DIRECTORY": "/var/lib/aiproxy"}, "/var/lib/aiproxy/ledger.db"),
        ("ledger: other.db", {"STATE_DIRECTORY": "/var/lib/aiproxy"}, "{here}/other.db"),
        ("ledger: /tmp/other.db", {}, "/tmp/other.db"),
        ("ledger: none", {}, None),
    ],
)
def test_the_ledger_is_where_the_configuration_or_systemd_says(tmp_path, text, environ, file):
    path = tmp_path / "config.yaml"
    path.write_text('upstreams: [{base_url: "demo://answers"}]\n' + text)
    found = load(path, environ).ledger
    assert (found and found.file) == (file and file.format(here=tmp_path))
