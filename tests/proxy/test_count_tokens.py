"""`POST /v1/messages/count_tokens`: as messages are sent, but outside circuit breakers and round robin."""

import json
from collections import Counter

import pytest
import responses
from fakes import Clock, answer, close_now, error, message_json, whole

from aiproxy.app import create_app
from aiproxy.config import Config, LoggingSettings, UpstreamSettings

PATH = "/v1/messages/count_tokens"
COUNT = b'{ "input_tokens" : 14, "new":1.10}'
MANY = 10**9  # a weight that is always asked first


def client_of(*upstreams, clock=None, **settings):
    """Upstreams are named a, b, ...; the first is always asked first. Each is a fake, or settings."""
    listed = []
    for name, one in zip("abc", upstreams, strict=False):
        given = dict(one) if isinstance(one, dict) else {"base_url": one}
        base_url = given.pop("base_url")
        url = base_url if isinstance(base_url, str) else base_url.url
        given = {"weight": 1 if listed else MANY, **given}
        listed.append(UpstreamSettings(name=name, base_url=url, token=f"sk-test-{name}", **given))
    return create_app(Config(upstreams=tuple(listed), **settings), clock or Clock()).test_client()


def count(client, raw=None, headers=(), path=PATH, **extra):
    if raw is None:
        raw = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **extra}).encode()
    return client.post(
        path, data=raw, headers=[("content-type", "application/json"), *headers], buffered=True
    )


def message(client):
    return client.post("/v1/messages", json={"model": "m", "messages": []}, buffered=True)


def maker(reply):
    return reply.headers.get("x-aiproxy-upstream")


def counted():
    return whole(200, COUNT)


def beside(reply):
    """That reply to counts, and an answer to messages."""
    usual = answer()
    return lambda wire, seen: (reply if seen.target == PATH else usual)(wire, seen)


def asked(*fakes):
    return [len(fake.seen) for fake in fakes]


NOT_JSON = whole(404, b"<h1>Not Found</h1>", content_type="text/html")

LACKING = {
    "404 of a web server": NOT_JSON,
    "404 without a body": whole(404),
    "404 of a framework": whole(404, b'{"detail":"Not Found"}'),
    "404 in the API's shape": error(404, message="Not found."),
    "405": error(405),
    "405 of a web server": whole(405, b"<h1>", content_type="text/html"),
    "501": error(501),
}


# ------------------------------------------------------------------------------------ what goes through


def test_body_query_and_headers_go_on_and_the_count_comes_back_verbatim(upstream):
    raw = b'{"messages" : [],\n"model":"m", "tools":[1.10, 1e400], "system": "\xc3\xa9"}'
    fake = upstream(whole(200, COUNT, [("request-id", "req_7"), ("x-new", "1")]))
    reply = count(client_of(fake), raw, path=f"{PATH}?beta=true", headers=[("anthropic-beta", "x")])
    assert (reply.status_code, reply.data, reply.content_type) == (200, COUNT, "application/json")
    assert (reply.headers["request-id"], reply.headers["x-new"], maker(reply)) == ("req_7", "1", "a")
    [seen] = fake.seen
    assert (seen.method, seen.target, seen.body) == ("POST", f"{PATH}?beta=true", raw)
    assert (seen.header("anthropic-beta"), seen.header("x-api-key")) == ("x", "sk-test-a")


def test_only_upstreams_that_serve_the_model_are_asked(upstream):
    a, b = upstream(default=counted()), upstream(default=counted())
    client = client_of(
        *({"base_url": fake, "available_models": {name}} for fake, name in ((a, "x"), (b, "m")))
    )
    assert maker(count(client)) == "b"
    reply = count(client, model="y")
    assert (reply.status_code, reply.get_json()["error"]["type"]) == (404, "not_found_error")
    assert "y" in reply.get_json()["error"]["message"]
    assert asked(a, b) == [0, 1]


@pytest.mark.parametrize("stream", [None, False, True])
def test_a_count_is_never_made_a_stream(upstream, stream):
    # Nothing is validated: what the upstream makes of `stream` is its own affair.
    fake = upstream(default=counted())
    reply = count(
        client_of({"base_url": fake, "must_stream": True}), **{} if stream is None else {"stream": stream}
    )
    assert (reply.status_code, reply.data) == (200, COUNT)
    assert fake.seen[0].json().get("stream") is stream


# ------------------------------------------------------------------------------------------- failover


@pytest.mark.parametrize(
    "failure",
    [
        error(400),
        error(401),
        error(404, message="model: m"),
        error(529),
        close_now(),
        whole(200, b"<html>", content_type="text/html"),
        whole(200, b"5"),
        whole(200, b'{"type":"error","error":{"type":"api_error","message":"x"}}'),
        whole(200, COUNT, then="cut", cut_at=9),
        *LACKING.values(),
    ],
)
def test_another_upstream_is_asked_when_one_does_not_count(upstream, failure):
    reply = count(client_of(upstream(failure), upstream(counted())))
    assert (reply.status_code, reply.data, maker(reply)) == (200, COUNT, "b")
    assert reply.headers["x-aiproxy-attempts"] == "2"


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (error(429, message="one"), error(401, message="two"), (429, "one")),
        (error(400, message="one"), error(529, message="two"), (400, "one")),
        (error(404, message="model: m"), error(404, message="model: m"), (404, "model: m")),
        (error(404, message="model: m"), error(500, message="two"), (500, "two")),
        (NOT_JSON, error(529, message="two"), (529, "two")),
        (error(501, message="one"), error(404, message="model: m"), (404, "model: m")),
    ],
)
def test_when_all_fail_the_client_is_told_the_error_that_helps_it_most(upstream, first, second, told):
    reply = count(client_of(upstream(first), upstream(second)))
    assert (reply.status_code, reply.get_json()["error"]["message"]) == told


def test_when_none_answers_it_is_a_502(upstream):
    reply = count(client_of(upstream(close_now()), upstream(NOT_JSON)))
    assert (reply.status_code, reply.get_json()["error"]["type"]) == (502, "api_error")


# ----------------------------------------------------------------------- upstreams that cannot count


@pytest.mark.parametrize("refusal", LACKING.values(), ids=list(LACKING))
def test_an_upstream_that_lacks_the_endpoint_is_not_asked_to_count_for_an_hour(upstream, refusal):
    clock = Clock()
    lacking, able = upstream(default=beside(refusal)), upstream(default=counted())
    client = client_of(lacking, able, clock=clock)
    for _ in range(2):
        assert {maker(count(client)) for _ in range(3)} == {"b"}
        clock.now += 3599
        assert maker(count(client)) == "b"
        clock.now += 1
    assert asked(lacking, able) == [2, 8]
    assert maker(message(client)) == "a"  # it still gets its messages


def test_when_none_has_it_that_is_a_404_which_costs_no_attempt_from_then_on(upstream):
    fakes = [upstream(default=error(501)), upstream(default=NOT_JSON)]
    client = client_of(*fakes)
    for _ in range(3):
        reply = count(client)
        told = reply.get_json()
        assert (reply.status_code, told["type"], told["error"]["type"]) == (404, "error", "not_found_error")
        assert told["request_id"] == reply.headers["request-id"]
        assert not told["error"]["message"].startswith("model:")
    assert asked(*fakes) == [1, 1]


@pytest.mark.parametrize(
    "failure", [error(404, message="model: m"), error(400), error(401), error(429), error(500), close_now()]
)
def test_an_upstream_that_fails_in_another_way_is_asked_again(upstream, failure):
    failing = upstream(failure, default=counted())
    client = client_of(failing, upstream(default=counted()))
    assert [maker(count(client)) for _ in range(2)] == ["b", "a"]


BOUND = [
    ({"container": "container_01"}, []),
    ({"thread": {"type": "continue", "previous_message_id": "msg_1"}}, []),
    ({}, [("anthropic-workspace-id", "wrkspc_01")]),
    ({"messages": [{"role": "user", "content": [{"source": {"type": "file", "file_id": "file_01"}}]}]}, []),
]


@pytest.mark.parametrize(("extra", "headers"), BOUND)
def test_a_404_about_what_a_request_names_does_not_say_that_the_endpoint_is_lacking(upstream, extra, headers):
    # One client's wrong file must not take counting from all others.
    fakes = [upstream(error(404, message="File not found: file_01"), default=counted()) for _ in "ab"]
    client = client_of(*fakes)
    reply = count(client, headers=headers, **extra)
    assert (reply.status_code, reply.get_json()["error"]["message"]) == (404, "File not found: file_01")
    assert maker(count(client)) == "a"
    assert asked(*fakes) == [2, 0]


@pytest.mark.parametrize("status", [405, 501])
@pytest.mark.parametrize(("extra", "headers"), BOUND)
def test_what_only_one_account_has_is_counted_by_another_where_one_has_no_such_endpoint(
    upstream, extra, headers, status
):
    client = client_of(upstream(default=error(status)), upstream(default=counted()))
    assert [maker(count(client, headers=headers, **extra)) for _ in range(2)] == ["b", "b"]


@pytest.mark.parametrize(("extra", "headers"), BOUND)
def test_and_by_no_other_where_it_is_refused(upstream, extra, headers):
    client = client_of(upstream(error(400, message="no")), other := upstream())
    reply = count(client, headers=headers, **extra)
    assert (reply.status_code, reply.get_json()["error"]["message"]) == (400, "no")
    assert other.connections == 0


# ------------------------------------------------------------------------- outside breakers and cursor


@pytest.mark.parametrize(
    "failure", [error(500), error(429, headers=[("retry-after", "60")]), NOT_JSON, close_now()]
)
def test_failing_to_count_opens_no_circuit_and_is_no_backoff(upstream, capsys, failure):
    client = client_of(upstream(default=beside(failure)), upstream(default=counted()))
    for _ in range(5):
        assert count(client).status_code == 200
    assert maker(message(client)) == "a"
    assert " circuit " not in capsys.readouterr().out


def test_counting_well_does_not_wipe_out_failures(upstream):
    first = upstream(error(500), error(500), counted(), error(500), default=answer())
    client = client_of(first, upstream())
    for ask in (message, message, count, message):
        ask(client)
    assert maker(message(client)) == "b", "three failures in a row"


def test_an_open_upstream_is_asked_last_and_stays_open(upstream):
    clock = Clock()
    first = upstream(*[error(500)] * 3, counted(), counted(), default=answer())
    second = upstream(*[answer()] * 6, default=counted())
    client = client_of(first, second, clock=clock)
    for _ in range(6):
        message(client)
    assert {maker(count(client)) for _ in range(4)} == {"b"}
    second.script(error(500))
    assert maker(count(client)) == "a"
    assert maker(count(client)) == "b", "counting well closes no circuit"
    clock.now += 1800
    assert maker(count(client)) == "a", "it may be tried again, and counting is no trial"
    assert maker(message(client)) == "a"


def test_counting_takes_no_trial(upstream):
    clock = Clock()
    first = upstream(*[error(500)] * 3, error(500), default=answer())
    client = client_of(first, upstream(default=counted()), clock=clock)
    for _ in range(3):
        message(client)
    clock.now += 1800
    assert maker(count(client)) == "b"
    assert maker(message(client)) == "a", "the trial was still to be had"


@responses.activate
def test_three_to_one_stays_exact_with_counts_in_between():
    for name in "ab":
        responses.post(f"http://{name}.test{PATH}", COUNT, content_type="application/json")
        responses.post(f"http://{name}.test/v1/messages", message_json(), content_type="application/json")
    weights = [{"base_url": f"http://{name}.test", "weight": weight} for name, weight in (("a", 3), ("b", 1))]
    client = client_of(*weights, logging=LoggingSettings(level="error"))
    messages, counts = Counter(), Counter()
    for number in range(200):
        messages[maker(message(client))] += 1
        for _ in range(number % 2):
            counts[maker(count(client))] += 1
    assert messages == {"a": 150, "b": 50}
    assert 5 < counts["b"] < 50, "counts are spread by weight too, though by chance (25)"


def test_a_session_is_counted_where_its_cache_is(upstream):
    fakes = [upstream(default=beside(counted())) for _ in "abc"]
    client = client_of(*({"base_url": fake, "weight": 1} for fake in fakes))
    extra = {"cache_control": {"type": "ephemeral"}}
    homes = []
    for number in range(12):
        session = [("x-claude-code-session-id", f"session-{number}")]
        reply = client.post("/v1/messages", json={"model": "m", **extra}, headers=session, buffered=True)
        homes.append(maker(reply))
        assert {maker(count(client, headers=session, **extra)) for _ in range(3)} == {homes[-1]}
    assert set(homes) == set("abc")


def test_counts_are_logged_as_what_they_are(upstream, capsys):
    count(client_of(upstream(counted())))
    said = capsys.readouterr().out
    assert f"path={PATH}" in said
    assert [line.split()[2] for line in said.splitlines()] == ["request", "attempt", "done"]
