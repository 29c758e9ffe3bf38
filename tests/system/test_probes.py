"""What clients probe is answered at once and in silence; what is not served is a 404."""

import pytest
from fakes import RawClient
from in_process import client_of

from aiproxy.config import ClientKey, LoggingSettings

PROBES = [("HEAD", "/"), ("GET", "/"), ("HEAD", "/api/hello"), ("GET", "/api/hello?x=1")]


@pytest.mark.parametrize("keys", [(), (ClientKey("alice", ("key-of-alice",)),)])
@pytest.mark.parametrize(("method", "path"), PROBES)
def test_a_probe_is_answered_without_a_key_an_upstream_or_a_line(upstream, capsys, method, path, keys):
    fake = upstream()
    reply = client_of(fake, api_keys=keys).open(path, method=method)
    assert (reply.status_code, reply.mimetype) == (200, "text/plain")
    assert len(reply.data) < 80
    assert method == "GET" or reply.data == b""
    assert fake.connections == 0
    assert capsys.readouterr().out == ""


def test_a_probe_is_logged_for_those_who_want_to_know_all(upstream, capsys):
    client = client_of(upstream(), logging=LoggingSettings(level="debug"))
    for method, path in PROBES:
        client.open(path, method=method)
        [line] = capsys.readouterr().out.splitlines()
        assert f" DEBUG probe path={path.partition('?')[0]}" in line


def test_probes_take_no_place_of_a_request(upstream):
    client = client_of(upstream(), max_in_flight=1)
    in_flight = client.application.extensions["aiproxy"].runtime.in_flight
    place = in_flight.acquire()
    for method, path in PROBES * 3:
        assert client.open(path, method=method).status_code == 200
    place.release()
    assert in_flight.acquire() is not None


@pytest.mark.parametrize(("method", "path"), [("POST", "/"), ("PUT", "/api/hello"), ("OPTIONS", "/")])
def test_a_probe_s_path_takes_no_other_method(upstream, method, path):
    reply = client_of(upstream()).open(path, method=method)
    assert (reply.status_code, reply.get_json()["error"]["type"]) == (405, "invalid_request_error")


def test_probes_and_refusals_on_the_wire_keep_the_connection_and_the_silence(upstream, serve, config_of):
    fake = upstream()
    served = serve(config_of([fake], api_keys=["key-of-alice"]))
    before = len(served.stdout_lines())
    with RawClient.to(served.url) as client:
        for method, path in PROBES * 2:
            client.request(method, path)
            reply = client.read()
            assert (reply.status, reply.ending) == (200, "end")
            assert len(reply.body) == (0 if method == "HEAD" else int(reply.header("content-length")))
        assert served.stdout_lines()[before:] == []
        for path in ("/v1/messages/batches", "/v1/files"):
            client.request("POST", path, b'{"requests":[' + b" " * 3_000_000 + b"]}")
            reply = client.read()
            assert (reply.status, reply.json()["error"]["type"]) == (404, "not_found_error")
    assert fake.connections == 0
