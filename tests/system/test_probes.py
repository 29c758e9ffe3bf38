"""What clients and monitors probe is answered at once and in silence; what is not served is a 404."""

import pytest
from fakes import RawClient

from aiproxy.app import create_app
from aiproxy.config import ClientKey, Config, LoggingSettings, UpstreamSettings

PROBES = [("HEAD", "/"), ("GET", "/"), ("HEAD", "/api/hello"), ("GET", "/api/hello")]
ELSEWHERE = [
    ("POST", "/v1/messages/batches"),
    ("GET", "/v1/messages/batches"),
    ("GET", "/v1/messages/batches?limit=20"),
    ("GET", "/v1/messages/batches/msgbatch_01"),
    ("DELETE", "/v1/messages/batches/msgbatch_01"),
    ("POST", "/v1/messages/batches/msgbatch_01/cancel"),
    ("GET", "/v1/messages/batches/msgbatch_01/results"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/file_01/content"),
    ("DELETE", "/v1/files/file_01"),
    ("POST", "/v1/skills"),
    ("GET", "/v1/skills/skill_01/versions"),
    ("GET", "/v1/organizations/me"),
    ("POST", "/v1/user_profiles"),
    ("POST", "/v1/sessions"),
    ("POST", "/v1/agents"),
    ("POST", "/v1/environments"),
    ("POST", "/v1/complete"),
    ("POST", "/v1/something-new"),
    ("HEAD", "/v1/something-new"),
    ("GET", "/v1"),
    ("GET", "/v1/"),
    ("POST", "/v1/messages/"),
    ("POST", "/v1//messages"),
    ("POST", "//v1/messages"),
    ("POST", "/v1/messages/count_tokens/"),
    ("POST", "/v1/messages/count_tokens/x"),
    ("POST", "/v1/Messages"),
    ("POST", "/v2/messages"),
    ("POST", "/messages"),
    ("GET", "/api/hello/"),
    ("GET", "/api/event_logging/batch"),
    ("GET", "/favicon.ico"),
    ("GET", "/v1/%00"),
    ("GET", "/v1/\u00e9"),
    ("GET", "/static/x"),
]


def client_of(fake, **settings):
    upstream = UpstreamSettings(name="a", base_url=fake.url, token="sk-test-a")
    return create_app(Config(upstreams=(upstream,), **settings)).test_client()


@pytest.mark.parametrize("keys", [(), (ClientKey("alice", ("key-of-alice",)),)])
@pytest.mark.parametrize(("method", "path"), PROBES)
def test_a_probe_is_answered_without_a_key_an_upstream_or_a_line(upstream, capsys, method, path, keys):
    fake = upstream()
    reply = client_of(fake, api_keys=keys).open(path, method=method, buffered=True)
    assert reply.status_code == 200
    assert reply.data.count(b"\n") <= 1
    assert len(reply.data) < 80
    assert reply.content_type.startswith("text/plain")
    assert method == "GET" or reply.data == b""
    assert fake.connections == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("path", ["/?utm=1", "/api/hello?x=1"])
def test_a_probe_s_query_does_not_matter(upstream, capsys, path):
    assert client_of(upstream()).get(path, buffered=True).status_code == 200
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("method", "path"), PROBES)
def test_a_probe_is_logged_for_those_who_want_to_know_all(upstream, capsys, method, path):
    client = client_of(upstream(), logging=LoggingSettings(level="debug"))
    client.open(path, method=method, buffered=True)
    [line] = capsys.readouterr().out.splitlines()
    assert f" DEBUG probe path={path}" in line


def test_probes_take_no_place_of_a_request(upstream):
    client = client_of(upstream(), max_in_flight=1)
    in_flight = client.application.extensions["aiproxy"].runtime.in_flight
    place = in_flight.acquire()
    for method, path in PROBES * 3:
        assert client.open(path, method=method, buffered=True).status_code == 200
    place.release()
    assert in_flight.acquire() is not None


@pytest.mark.parametrize(("method", "path"), [("POST", "/"), ("PUT", "/api/hello"), ("OPTIONS", "/")])
def test_a_probe_s_path_takes_no_other_method(upstream, method, path):
    reply = client_of(upstream()).open(path, method=method, buffered=True)
    assert (reply.status_code, reply.get_json()["error"]["type"]) == (405, "invalid_request_error")


@pytest.mark.parametrize(("method", "path"), ELSEWHERE)
def test_what_is_not_served_is_a_404_in_the_api_s_shape_and_never_forwarded(upstream, method, path):
    fake = upstream()
    reply = client_of(fake).open(path, method=method, buffered=True)
    assert (reply.status_code, reply.content_type) == (404, "application/json")
    assert "location" not in reply.headers
    assert reply.headers["request-id"].startswith("req_")
    if method != "HEAD":
        told = reply.get_json()
        assert (told["type"], told["error"]["type"]) == ("error", "not_found_error")
        assert told["error"]["message"]
        assert told["request_id"] == reply.headers["request-id"]
    assert fake.connections == 0


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_a_wrong_method_is_a_405_in_the_api_s_shape(upstream, method, path):
    fake = upstream()
    reply = client_of(fake).open(path, method=method, buffered=True)
    assert (reply.status_code, reply.get_json()["error"]["type"]) == (405, "invalid_request_error")
    assert reply.headers["allow"] == "POST"
    assert fake.connections == 0


def test_probes_and_refusals_on_the_wire_keep_the_connection_and_the_silence(upstream, serve, config_of):
    fake = upstream()
    served = serve(config_of([fake], api_keys=["key-of-alice"]))
    before = len(served.stdout_lines())
    with RawClient.to(served.url) as client:
        for method, path in [*PROBES, *PROBES]:
            client.request(method, path)
            reply = client.read()
            assert (reply.status, reply.ending) == (200, "end")
            assert len(reply.body) == (0 if method == "HEAD" else int(reply.header("content-length")))
        assert served.stdout_lines()[before:] == []
        client.request("POST", "/v1/messages/batches", b'{"requests":[' + b" " * 3_000_000 + b"]}")
        reply = client.read()
        assert (reply.status, reply.json()["error"]["type"]) == (404, "not_found_error")
    assert fake.connections == 0
