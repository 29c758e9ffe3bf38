"""`GET /v1/models`: out of the configuration, page by page; passed on only where it lists no model."""

import time
from urllib.parse import unquote

import anthropic
import pytest
from fakes import ASK, HOST, RawClient, answer, close_now, dead_port, error, whole
from in_process import client_of

MODELS = ["m1", "m2", "m3", "m4", "m5", "m6", "m7"]
LIST = b'{ "data":[{"type":"model","id":"m"}], "has_more" : false,"new":1.10}'


def listing(*names, **settings):
    return {"available_models": frozenset(names), **settings}


def maker(reply):
    return reply.headers["x-aiproxy-upstream"], reply.headers["x-aiproxy-attempts"]


def ids(reply):
    assert reply.status_code == 200, reply.data
    return [model["id"] for model in reply.get_json()["data"]]


# ---------------------------------------------------------------------------- out of the configuration


def test_the_list_has_the_clients_names_of_all_enabled_upstreams_once(upstream):
    fakes = [upstream() for _ in range(4)]
    client = client_of(
        listing("m2", "m1", base_url=fakes[0], model_mappings={"m2": "x", "alias": "y"}),
        listing("hidden", base_url=fakes[1], enabled=False, model_mappings={"hidden-too": "x"}),
        {"base_url": fakes[2], "model_mappings": {"alias": "z", "m9": "w"}},
        listing("m1", "m5", base_url=fakes[3]),
    )
    assert ids(client.get("/v1/models")) == ["m1", "m2", "alias", "m9", "m5"]
    assert [fake.connections for fake in fakes] == [0] * 4


def test_a_model_has_the_api_s_shape():
    client = client_of(listing("claude-x"))
    page = client.get("/v1/models")
    [model] = page.get_json()["data"]
    assert sorted(model) == ["created_at", "display_name", "id", "type"]
    assert (model["type"], model["id"], model["display_name"]) == ("model", "claude-x", "claude-x")
    assert time.strptime(model["created_at"], "%Y-%m-%dT%H:%M:%SZ")
    assert sorted(page.get_json()) == ["data", "first_id", "has_more", "last_id"]
    one = client.get("/v1/models/claude-x")
    assert (one.status_code, one.get_json()) == (200, model)
    for reply in (page, one):
        assert reply.content_type == "application/json"
        assert reply.headers["request-id"].startswith("req_")


@pytest.mark.parametrize("name", ["hidden", "x", "m", "m1x", "M1", "m1/", "../m1", "%20", "é"])
def test_an_unknown_model_is_a_404(upstream, name):
    fake = upstream()
    client = client_of(
        listing("m1", base_url=fake, model_mappings={"m1": "x"}), listing("hidden", enabled=False)
    )
    reply = client.get(f"/v1/models/{name}")
    assert (reply.status_code, reply.get_json()["error"]["type"]) == (404, "not_found_error")
    assert reply.get_json()["request_id"] == reply.headers["request-id"]
    assert fake.connections == 0


@pytest.mark.parametrize(
    ("name", "spelt"),
    [
        ("anthropic/claude-x", "anthropic/claude-x"),
        ("anthropic/claude-x", "anthropic%2Fclaude-x"),
        ("claude-x[1m]", "claude-x%5B1m%5D"),
        ("modèle", "mod%C3%A8le"),
        ("a?b=c", "a%3Fb%3Dc"),
    ],
)
def test_a_model_is_found_by_whatever_name_it_has(name, spelt):
    client = client_of(listing(name))
    assert client.get(f"/v1/models/{spelt}").get_json()["id"] == name
    assert ids(client.get("/v1/models")) == [name]


@pytest.mark.parametrize(
    ("query", "expected", "marks"),
    [
        ("", MODELS, (False, "m1", "m7")),
        ("?limit=7", MODELS, (False, "m1", "m7")),
        ("?limit=6", MODELS[:6], (True, "m1", "m6")),
        ("?limit=3&after_id=m2", ["m3", "m4", "m5"], (True, "m3", "m5")),
        ("?limit=3&after_id=m4", ["m5", "m6", "m7"], (False, "m5", "m7")),
        ("?after_id=m7", [], (False, None, None)),
        ("?limit=3&before_id=m6", ["m3", "m4", "m5"], (True, "m3", "m5")),
        ("?limit=3&before_id=m4", ["m1", "m2", "m3"], (False, "m1", "m3")),
        ("?before_id=m1", [], (False, None, None)),
        ("?beta=true&unknown=1", MODELS, (False, "m1", "m7")),
    ],
)
def test_pages_are_cut_as_the_query_asks(query, expected, marks):
    reply = client_of(listing(*MODELS)).get(f"/v1/models{query}")
    page = reply.get_json()
    assert (ids(reply), (page["has_more"], page["first_id"], page["last_id"])) == (expected, marks)


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=-1",
        "limit=1001",
        "limit=x",
        "limit=",
        "limit=1.5",
        "limit=%C2%B2",  # a superscript two
        "limit=+5",
        "after_id=nope",
        "before_id=nope",
        "after_id=",
        "after_id=m1&before_id=m3",
    ],
)
def test_a_page_that_cannot_be_is_a_400(query):
    reply = client_of(listing(*MODELS)).get(f"/v1/models?{query}")
    assert (reply.status_code, reply.get_json()["error"]["type"]) == (400, "invalid_request_error")
    assert reply.get_json()["request_id"] == reply.headers["request-id"]


def test_a_list_that_is_asked_for_by_head_is_no_error(upstream):
    reply = client_of(listing(*MODELS)).head("/v1/models")
    assert (reply.status_code, reply.data) == (200, b"")
    reply = client_of(upstream(whole(200, LIST))).head("/v1/models")
    assert (reply.status_code in (200, 405), reply.data) == (True, b"")


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m1"])
def test_models_can_only_be_read(upstream, method, path):
    for client in (client_of(listing("m1", base_url=upstream())), client_of(fake := upstream())):
        reply = client.open(path, method=method)
        assert (reply.status_code, reply.get_json()["error"]["type"]) == (405, "invalid_request_error")
        assert "GET" in reply.headers["allow"]
    assert fake.connections == 0


def test_the_sdk_lists_and_retrieves_models(upstream, serve, config_of):
    fake = upstream()
    models = {"available_models": MODELS[:5], "model_mappings": {"m1": "x"}}
    served = serve(
        config_of([{"base_url": fake, **models}, {"base_url": fake, "available_models": MODELS[3:]}])
    )
    with anthropic.Anthropic(base_url=served.url, api_key="any", max_retries=0) as client:
        for options in ({}, {"limit": 1}, {"limit": 3}, {"limit": 7}):
            assert [model.id for model in client.models.list(**options)] == MODELS
        assert [model.id for model in client.models.list(after_id="m2", limit=2)] == MODELS[2:]
        back = [model.id for model in client.models.list(before_id="m7", limit=2)]
        assert back == ["m5", "m6", "m3", "m4", "m1", "m2"]
        one = client.models.retrieve("m7")
        assert (one.id, one.type, one.display_name, one.created_at.year) == ("m7", "model", "m7", 1970)
        with pytest.raises(anthropic.NotFoundError) as missing:
            client.models.retrieve("m8")
        assert missing.value.type == "not_found_error"
        with pytest.raises(anthropic.BadRequestError):
            client.models.list(limit=0)
    assert fake.connections == 0


# ------------------------------------------------------------------- passed on where none is configured


def test_the_upstream_s_list_comes_back_verbatim(upstream):
    fake = upstream(whole(200, LIST, [("request-id", "req_7"), ("x-new", "1")]))
    reply = client_of(fake).get(
        "/v1/models?limit=1000&after_id=a%2Fb&x=%20+", headers={"anthropic-beta": "x"}
    )
    assert (reply.status_code, reply.data, reply.content_type) == (200, LIST, "application/json")
    assert (reply.headers["request-id"], reply.headers["x-new"]) == ("req_7", "1")
    assert maker(reply) == ("a", "1")
    [seen] = fake.seen
    assert (seen.method, seen.target) == ("GET", "/v1/models?limit=1000&after_id=a%2Fb&x=%20+")
    assert seen.body == b""
    framing = ("content-type", "content-length", "transfer-encoding")
    assert [seen.header(name) for name in framing] == [None] * 3
    assert (seen.header("x-api-key"), seen.header("anthropic-beta")) == ("sk-test-a", "x")


@pytest.mark.parametrize("spelt", ["claude-x", "a%20b", "a%2Fb", "a%3Fb", "%C3%A9", "%25", "%2541", "[1m]"])
def test_a_model_s_name_reaches_the_upstream_as_the_client_spelt_it(upstream, spelt):
    fake = upstream(whole(200, b'{"id":"x"}'))
    assert client_of(fake).get(f"/v1/models/{spelt}?beta=true").data == b'{"id":"x"}'
    path, _, query = fake.seen[0].target.partition("?")
    assert (unquote(path), query) == (f"/v1/models/{unquote(spelt)}", "beta=true")


def test_on_the_wire_neither_another_endpoint_nor_a_body_is_passed_on(upstream, serve, config_of):
    fake = upstream(default=whole(200, LIST))
    served = serve(config_of([fake]))
    with RawClient.to(served.url) as client:
        for name in ("../files", "%2e%2e/files", "..%2ffiles", "%2E%2E%2Fme", "..", ".", "m/../../messages"):
            client.request("GET", f"/v1/models/{name}")
            assert client.read().status in (200, 404)
        segments = {part for seen in fake.seen for part in seen.target.lower().split("/")}
        assert not {"..", ".", "%2e%2e", "%2e", "files", "me"} & segments
        fake.seen.clear()
        for body in (b"", b"{}", b"x" * 100_000):
            client.request("GET", "/v1/models?x=a%2Fb", body, [("content-type", "application/json")])
            reply = client.read()
            assert (reply.status, reply.body) == (200, LIST)
    for seen in fake.seen:
        assert (seen.target, seen.body) == ("/v1/models?x=a%2Fb", b"")
        assert [seen.header(name) for name in ("content-type", "content-length")] == [None, None]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m"])
@pytest.mark.parametrize(
    "failure",
    [
        error(401),
        error(404),
        error(405),
        error(429),
        error(500),
        close_now(),
        whole(200, b"<html>", content_type="text/html"),
        whole(302, b"", [("location", "/login")]),
        whole(200, LIST, then="cut", cut_at=9),
    ],
    ids="401 404 405 429 500 close html redirect cut".split(),
)
def test_another_upstream_is_asked_when_one_does_not_answer(upstream, path, failure):
    client = client_of({"base_url": upstream(failure), "weight": 10**9}, upstream(whole(200, LIST)))
    reply = client.get(path)
    assert (reply.status_code, reply.data, maker(reply)) == (200, LIST, ("b", "2"))


def test_when_all_fail_the_client_is_told_what_an_upstream_says(upstream):
    nope = error(404, message="model: nope")
    reply = client_of(upstream(nope), upstream(nope)).get("/v1/models/nope")
    assert (reply.status_code, reply.get_json()["error"]["message"]) == (404, "model: nope")
    assert client_of(f"http://{HOST}:{dead_port()}").get("/v1/models").status_code == 502


def beside(reply):
    """That reply to what is about models, and an answer to messages."""
    usual = answer()
    return lambda wire, seen: (reply if seen.target.startswith("/v1/models") else usual)(wire, seen)


def message(client):
    return maker(client.post("/v1/messages", json=ASK))[0]


@pytest.mark.parametrize("failure", [error(500), error(401), error(429, headers=[("retry-after", "60")])])
def test_no_circuit_opens_by_it(upstream, capsys, failure):
    first = {"base_url": upstream(default=beside(failure)), "weight": 10**9}
    client = client_of(first, upstream(default=whole(200, LIST)))
    assert {maker(client.get("/v1/models")) for _ in range(4)} == {("b", "2")}
    assert message(client) == "a"
    assert " circuit " not in capsys.readouterr().out
