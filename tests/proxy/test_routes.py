"""HTTP in, HTTP out: what is refused, how, and that the connection survives it.

One gunicorn with a limit of 1 MB serves the tests that need one; its upstream has a fixed port, on which
each test starts a fake of its own. What gunicorn cannot show is asked of the application in process.
"""

import http.client
import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
import yaml
from conftest import ROOT, Served
from fakes import (
    HOST,
    Ended,
    FakeUpstream,
    RawClient,
    answer,
    error,
    events,
    free_port,
    message_events,
    whole,
)

from aiproxy.app import create_app
from aiproxy.config import BreakerSettings, Config, UpstreamSettings
from aiproxy.errors import ApiError
from aiproxy.server import request_body as upload

MB = 1024 * 1024
ASK = {"model": "claude-x", "max_tokens": 16, "messages": [{"role": "user", "content": "Hi"}]}
SPELT = json.dumps(ASK).encode()
HEAD = f"POST /v1/messages HTTP/1.1\r\nhost: {HOST}\r\n"
CHUNKED = f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode()
WHOLE = f"{HEAD}content-length: {len(SPELT)}\r\n\r\n".encode() + SPELT


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    upstream_port, port = free_port(), free_port()
    config = {
        "listen": port,
        "max_body_mb": 1,
        "breaker": {"failures": 10**6, "cooldown": 0},
        "upstreams": [{"name": "a", "base_url": f"http://{HOST}:{upstream_port}", "token": "sk-test-a"}],
    }
    path = tmp_path_factory.mktemp("views") / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "gunicorn", "wsgi:app", "--graceful-timeout", "2"]
    served = Served(command, ROOT, {"AIPROXY_CONFIG": str(path)}, port)
    served.upstream_port = upstream_port
    try:
        served.wait_until_ready()
        yield served
    finally:
        served.quit()


@pytest.fixture
def a(proxy):
    with FakeUpstream(port=proxy.upstream_port) as upstream:
        yield upstream


@pytest.fixture
def client(proxy):
    with RawClient.to(proxy.url) as client:
        yield client


def in_process(upstream, clock=time.monotonic, **settings):
    """The application as gunicorn would load it, asked without a server."""
    base_url = upstream if isinstance(upstream, str) else upstream.url
    one = UpstreamSettings(name="a", base_url=base_url, token="sk-test-a")
    return create_app(Config(upstreams=(one,), **settings), clock).test_client()


def assert_ours(answer, status, type_):
    """An error of aiproxy's own, in the API's shape."""
    assert answer.status == status
    assert answer.header("content-type") == "application/json"
    body = answer.json()
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    assert body["error"]["type"] == type_
    assert re.fullmatch(r"req_[0-9a-f]{24}", body["request_id"])
    assert answer.header("request-id") == body["request_id"]
    assert HOST not in body["error"]["message"]
    assert answer.header("x-aiproxy-upstream") is None


def assert_still_works(client):
    """The next request on the same connection is served."""
    client.post(SPELT)
    assert client.read().status == 200


# ----------------------------------------------------------------------------- unknown paths and methods


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v1/complete"),
        ("POST", "/v1/messages/"),
        ("POST", "/v1/messages/batches"),
        ("DELETE", "/v1/messages/batches/msgbatch_1"),
        ("OPTIONS", "*"),
        ("POST", "/v1/./messages"),
        ("POST", "/v1/Messages"),
        ("GET", "/static/x"),
        ("GET", "/v1/%ff%fe%00%0d%0a%e2%80%a8"),
        ("GET", "/" + "long/" * 600),
    ],
)
def test_unknown_paths_are_not_found(client, a, method, target):
    client.request(method, target)
    answer = client.read()
    assert_ours(answer, 404, "not_found_error")
    assert len(answer.body) < 800
    assert_still_works(client)
    assert len(a.seen) == 1


@pytest.mark.parametrize("target", ["/v1//messages", "/v1/messages//"])
def test_doubled_slashes_are_no_redirect(client, target):
    client.post(SPELT, target)
    answer = client.read()
    assert_ours(answer, 404, "not_found_error")


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FROBNICATE"])
def test_wrong_methods_are_told_the_right_one(client, a, method):
    client.request(method, "/v1/messages?beta=true")
    answer = client.read()
    assert_ours(answer, 405, "invalid_request_error")
    assert answer.header("allow") == "POST"
    assert method in answer.json()["error"]["message"]
    assert_still_works(client)


@pytest.mark.parametrize(("target", "status"), [("/v1/messages", 405), ("/v1/files", 404)])
def test_head_gets_the_same_head_and_no_body(client, a, target, status):
    client.request("HEAD", target)
    answer = client.read()
    assert answer.status == status
    assert answer.header("content-type") == "application/json"
    assert answer.header("request-id").startswith("req_")
    assert int(answer.header("content-length")) > 0
    assert_still_works(client)  # which a body would spoil


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("method", "target", "status"), [("POST", "/v1/files", 404), ("PUT", "/v1/messages", 405)]
)
def test_a_large_body_for_nobody_is_read_away_before_the_answer(client, a, method, target, status, chunked):
    client.request(method, target, b"x" * 5 * MB, chunked=chunked)
    assert client.read().status == status
    assert_still_works(client)


# --------------------------------------------------------------------------------------- bodies too large


def body_of(size):
    start = b'{"model":"claude-x","max_tokens":16,"messages":[{"role":"user","content":"'
    return start + b"x" * (size - len(start) - 4) + b'"}]}'


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_exactly_the_limit_is_served_and_one_byte_more_is_not(client, a, chunked):
    client.request("POST", "/v1/messages", body_of(MB), chunked=chunked)
    assert client.read().status == 200
    assert a.seen[0].body == body_of(MB)
    client.request("POST", "/v1/messages", body_of(MB + 1), chunked=chunked)
    answer = client.read()
    assert_ours(answer, 413, "request_too_large")
    assert "1 MB" in answer.json()["error"]["message"]
    assert_still_works(client)
    assert len(a.seen) == 2


def test_a_limit_of_less_than_a_megabyte_is_told_as_it_is():
    response = in_process("demo://answers", max_body_mb=0.5).post("/v1/messages", data=b"x" * MB)
    assert response.status_code == 413
    assert "0.5 MB" in response.json["error"]["message"]


def memory_of(proxy, field):
    """Of the worker, in MB."""
    arbiter = proxy.process.pid
    worker = int(Path(f"/proc/{arbiter}/task/{arbiter}/children").read_text())
    status = Path(f"/proc/{worker}/status").read_text()
    return worker, int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


@pytest.mark.parametrize("chunked", [False, True])
def test_a_slow_upload_of_40_mb_sees_the_413_and_is_not_kept(proxy, client, a, chunked):
    assert_still_works(client)
    worker, before = memory_of(proxy, "VmRSS")
    Path(f"/proc/{worker}/clear_refs").write_text("5")  # the peak begins anew
    client.send(CHUNKED if chunked else f"{HEAD}content-length: {40 * MB}\r\n\r\n".encode())
    piece = b"x" * MB
    for _ in range(40):
        client.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        time.sleep(0.001)
    client.send(b"0\r\n\r\n" if chunked else b"")
    assert_ours(client.read(), 413, "request_too_large")
    assert memory_of(proxy, "VmHWM")[1] - before < 16
    assert_still_works(client)


def test_a_chunk_of_40_mb_is_not_kept_either(proxy, client, a):
    assert_still_works(client)
    worker, before = memory_of(proxy, "VmRSS")
    Path(f"/proc/{worker}/clear_refs").write_text("5")
    client.send(CHUNKED)
    client.send(b"%x\r\n" % (40 * MB))
    for _ in range(40):
        client.send(b"x" * MB)
    client.send(b"\r\n0\r\n\r\n")
    assert_ours(client.read(), 413, "request_too_large")
    assert memory_of(proxy, "VmHWM")[1] - before < 16


@pytest.mark.parametrize("chunked", [False, True])
def test_ordinary_clients_see_the_413_of_a_large_upload(proxy, chunked):
    pieces = (b"x" * 65536 for _ in range(20 * MB // 65536))
    data = pieces if chunked else b"".join(pieces)
    with requests.Session() as session:
        response = session.post(f"{proxy.url}/v1/messages", data=data, timeout=10)
    assert (response.status_code, response.json()["error"]["type"]) == (413, "request_too_large")
    connection = http.client.HTTPConnection(HOST, proxy.port, timeout=10)
    connection.request("POST", "/v1/messages", iter([b"x" * MB] * 20), encode_chunked=True)
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["error"]["type"]) == (413, "request_too_large")
    connection.close()


class RequestBody:
    """A `wsgi.input` of so many bytes, that counts what is asked of it."""

    def __init__(self, size, pause=0.0):
        self.left = size
        self.read_so_far = 0
        self.largest = 0
        self._pause = pause

    def read(self, size):
        time.sleep(self._pause)
        self.largest = max(self.largest, size)
        size = min(size, self.left)
        self.left -= size
        self.read_so_far += size
        return bytes(size)


@pytest.mark.parametrize("target", ["/v1/messages", "/v1/files"])
def test_what_is_read_away_is_bounded_in_bytes(monkeypatch, target):
    monkeypatch.setattr(upload, "DISCARD_BYTES", 8 * MB)
    endless = RequestBody(10**12)
    response = in_process("demo://answers", max_body_mb=1).post(
        target, environ_overrides={"wsgi.input": endless, "CONTENT_LENGTH": str(10**12)}
    )
    assert response.status_code in (404, 413)
    assert endless.read_so_far == 8 * MB
    assert endless.largest <= MB


def test_what_is_read_away_is_bounded_in_time(monkeypatch):
    monkeypatch.setattr(upload, "DISCARD_SECONDS", 0.1)
    endless = RequestBody(10**12, pause=0.02)
    began = time.monotonic()
    response = in_process("demo://answers").post(
        "/v1/messages", environ_overrides={"wsgi.input": endless, "CONTENT_LENGTH": str(10**12)}
    )
    assert response.status_code == 413
    assert time.monotonic() - began < 0.4


def test_expect_100_continue_is_answered_and_goes_no_further(client, a):
    head = f"{HEAD}expect: 100-continue\r\ncontent-length: {len(SPELT)}\r\n\r\n"
    client.send(head.encode())
    sent = threading.Timer(0.05, client.send, [SPELT])  # a client that waits for the 100 a while
    sent.start()
    answer = client.read()
    sent.join()
    assert answer.interim == [100]
    assert answer.status == 200
    assert a.seen[0].header("expect") is None


# --------------------------------------------------------------------------------------- bodies that break


@pytest.mark.parametrize(
    "sent",
    [
        b"content-length: 100\r\n\r\n{}",
        b"content-length: 100\r\n\r\n",
        b"content-length: 999\r\n\r\n" + SPELT,  # what came would be a good request by itself
        b"transfer-encoding: chunked\r\n\r\n50\r\n{}",
        b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n",
        b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
        b"transfer-encoding: chunked\r\n\r\n",
    ],
)
def test_a_body_that_breaks_off_is_refused_and_not_sent_on(client, a, sent):
    client.send(HEAD.encode() + sent)
    client.half_close()
    assert_ours(client.read(), 400, "invalid_request_error")
    assert a.seen == []


BAD_CHUNKS = {
    "no number": b"zz\r\nhello",
    "negative": b"-5\r\nhello\r\n0\r\n\r\n",
    "empty size": b"\r\nhello\r\n0\r\n\r\n",
    "no line end after a chunk": b"2\r\n{}0\r\n\r\n",
    "line feed only": b"2\n{}\n0\n\n\r\n",
    "hexadecimal prefix": b"0x2\r\n{}\r\n0\r\n\r\n",
    "underscore": b"1_0\r\n{}\r\n0\r\n\r\n",
    "bad trailer": b"2\r\n{}\r\n0\r\nno colon\r\n\r\n",
    "bad after a good one": b"2\r\n{}\r\nxyz\r\n",
}


@pytest.mark.parametrize("chunks", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_a_badly_chunked_body_is_a_bad_request(client, a, chunks):
    client.send(CHUNKED + chunks)
    client.half_close()
    assert_ours(client.read(), 400, "invalid_request_error")
    assert a.seen == []


def test_after_a_badly_chunked_body_nothing_on_the_connection_is_a_request(client, a):
    client.send(CHUNKED + b"zz\r\n" + WHOLE)
    client.read()
    with pytest.raises(Ended):
        client.read()
    assert a.seen == []


@pytest.mark.parametrize(("target", "status"), [("/v1/files", 404), ("/v1/messages", 413)])
def test_a_body_that_turns_bad_while_it_is_thrown_away_does_not_matter(client, target, status):
    client.send(f"POST {target} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode())
    client.send(b"%x\r\n" % (2 * MB) + b"x" * 2 * MB + b"\r\nzz\r\n")
    answer = client.read()
    assert answer.status == status
    assert answer.json()["request_id"] == answer.header("request-id")


def test_a_client_that_leaves_in_the_middle_of_its_upload_harms_nobody(proxy, a):
    lines = len(proxy.stdout_lines())
    for _ in range(3):
        leaver = RawClient.to(proxy.url)
        leaver.send(f"{HEAD}content-length: 900000\r\n\r\n".encode() + b"x" * 9000)
        leaver.reset()
    for _ in range(3):
        proxy.wait_for_log("refused .*status=400", since=lines)
    with RawClient.to(proxy.url) as client:
        assert_still_works(client)
    assert len(a.seen) == 1


def test_well_chunked_bodies_with_extensions_and_trailers_are_served(client, a):
    chunks = b'%x;name="v"\r\n%b\r\n0\r\nx-trailer: 1\r\n\r\n' % (len(SPELT), SPELT)
    client.send(CHUNKED + chunks)
    assert client.read().status == 200
    assert a.seen[0].body == SPELT
    assert a.seen[0].every("content-length") == [str(len(SPELT))]
    assert a.seen[0].header("transfer-encoding") is None
    assert_still_works(client)


# ---------------------------------------------------------------------------------------- bad requests

NOT_SERVED = {
    "empty": b"",
    "white space": b" \r\n ",
    "list": b"[]",
    "null": b"null",
    "string": b'"model"',
    "number": b"3",
    "cut": SPELT[:-1],
    "two": SPELT + SPELT,
    "no model": b'{"messages":[]}',
    "model null": b'{"model":null}',
    "model number": b'{"model":3}',
    "model empty": b'{"model":""}',
    "model list": b'{"model":["claude-x"]}',
    "stream text": b'{"model":"claude-x","stream":"true"}',
    "stream number": b'{"model":"claude-x","stream":1}',
    "UTF-16": json.dumps(ASK).encode("utf-16"),
    "NaN": b'{"model":"claude-x","max_tokens":NaN}',
    "single quotes": b"{'model':'claude-x'}",
    "form": b"model=claude-x&max_tokens=16",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    "nested lists": b'{"model":"claude-x","messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "nested objects": b'{"model":"claude-x","x":' + b'{"a":' * 130_000 + b"1" + b"}" * 130_000 + b"}",
    "nested without end": b'{"model":"claude-x","messages":' + b"[" * 200_000,
    "nested from the top": b"[" * 200_000 + b"]" * 200_000,
    "nested model": b'{"model":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
}


@pytest.mark.parametrize("body", NOT_SERVED.values(), ids=NOT_SERVED)
def test_what_is_no_request_is_refused_and_not_sent_on(client, a, body):
    client.post(body)
    assert_ours(client.read(), 400, "invalid_request_error")
    assert a.seen == []
    assert_still_works(client)


def test_a_deeply_nested_body_does_not_end_the_worker(proxy, client, a):
    worker, _ = memory_of(proxy, "VmRSS")
    for depth in (1_000, 10_000, 50_000, 200_000):
        client.post(b'{"model":"claude-x","messages":' + b"[" * depth + b"]" * depth + b"}")
        assert client.read().status in (200, 400)
    assert memory_of(proxy, "VmRSS")[0] == worker


def test_every_refusal_has_an_id_of_its_own(client):
    ids = set()
    for _ in range(5):
        client.request("GET", "/v1/files")
        ids.add(client.read().header("request-id"))
    assert len(ids) == 5


# ----------------------------------------------------------------------------------------------- bugs


@pytest.mark.parametrize("place", ["body.read", "_request", "_log_request", "_check_key"])
def test_a_bug_of_ours_is_a_500_without_details(monkeypatch, place):
    def bug(*args, **kwargs):
        raise KeyError("sk-secret /srv/aiproxy")

    monkeypatch.setattr(f"aiproxy.server.routes.{place}", bug)
    response = in_process("demo://answers").post("/v1/messages", json=ASK)
    assert response.status_code == 500
    assert response.json["error"]["type"] == "api_error"
    assert response.json["request_id"] == response.headers["request-id"]
    assert "KeyError" not in response.text
    assert "sk-secret" not in response.text
    assert "/srv" not in response.text


@pytest.mark.parametrize(
    ("place", "meanwhile"),
    [
        ("aiproxy.proxy.attempt.to_upstream", answer()),
        ("aiproxy.proxy.attempt._read", answer()),
        ("aiproxy.proxy.exchange.decide", error(500)),
        ("aiproxy.proxy.failover.Attempt", answer()),
    ],
)
def test_a_bug_gives_the_permit_back(upstream, monkeypatch, capsys, place, meanwhile):
    def bug(*args, **kwargs):
        raise ZeroDivisionError

    now = [1000.0]
    fake = upstream(error(500))
    client = in_process(fake, lambda: now[0], breaker=BreakerSettings(failures=1, cooldown=60))
    assert client.post("/v1/messages", json=ASK).status_code == 500  # opens the circuit
    now[0] += 61
    fake.script(meanwhile)
    with monkeypatch.context() as broken:
        broken.setattr(place, bug)
        trial = client.post("/v1/messages", json=ASK)
    assert trial.json["error"]["message"].startswith("Internal error")
    capsys.readouterr()
    # Were the trial still running, this one would get through as a last resort only.
    fake.script(*[] if len(fake.seen) == 2 else [answer()])
    assert client.post("/v1/messages", json=ASK).status_code == 200
    out = capsys.readouterr().out
    assert "state=trial" in out
    assert "state=closed" in out


@pytest.mark.parametrize("place", ["routes._request", "routes._log_request", "routes.response"])
def test_a_bug_gives_the_place_in_flight_back(monkeypatch, place):
    def bug(*args, **kwargs):
        monkeypatch.undo()
        raise ZeroDivisionError

    client = in_process("demo://answers", max_in_flight=1)
    monkeypatch.setattr(f"aiproxy.server.{place}", bug)
    assert client.post("/v1/messages", json=ASK).status_code == 500
    assert client.post("/v1/messages", json=ASK).status_code == 200


# --------------------------------------------------------------------------------- odd, and yet served


def test_obs_text_and_other_odd_header_values_reach_the_upstream_as_they_are(client, a):
    odd = [
        ("x-latin", "caf\xe9 \xff\x80"),
        ("x-long", "v" * 8000),
        ("x-tab", "a\tb"),
        ("x-empty", ""),
        ("x-!#$%&'*+.^`|~", "odd name"),
        ("x-quoted", '"a, b"; c="\\""'),
    ]
    client.post(SPELT, headers=odd)
    assert client.read().status == 200
    for name, value in odd:
        assert a.seen[0].every(name) == [value], name


def test_ninety_headers_reach_the_upstream(client, a):
    many = [(f"x-number-{n}", str(n)) for n in range(90)]
    client.post(SPELT, headers=many)
    assert client.read().status == 200
    assert {name.lower(): value for name, value in a.seen[0].headers}.items() >= dict(many).items()


def test_a_repeated_header_reaches_the_upstream_joined(client, a):
    client.post(SPELT, headers=[("anthropic-beta", "one"), ("x-between", "x"), ("anthropic-beta", "two")])
    assert client.read().status == 200
    assert [re.sub(r",\s*", ",", value) for value in a.seen[0].every("anthropic-beta")] == ["one,two"]


@pytest.mark.parametrize(
    "query", ["?beta=true", "?a=%20%0D%0A&&c&b=%C3%A9", "?x=/../..//&y=http://h/?z", "?a=~!$'()*", ""]
)
def test_the_query_passes_as_it_is_and_cannot_change_the_path(client, a, query):
    client.post(SPELT, target=f"/v1/messages{query}")
    assert client.read().status == 200
    assert a.seen[0].target == f"/v1/messages{query}"


def test_a_whole_url_for_a_target_is_served(client, a):
    client.post(SPELT, target="http://other.example:99/v1/messages?beta=true")
    assert client.read().status == 200
    assert a.seen[0].target == "/v1/messages?beta=true"


def test_http_1_0_clients_get_whole_answers(proxy, a):
    with RawClient.to(proxy.url) as client:
        client.send(b"POST /v1/messages HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (len(SPELT), SPELT))
        answer = client.read()
        assert (answer.status, answer.ending) == (200, "end")
        assert answer.json()["type"] == "message"
        client.wait_closed()


def test_http_1_0_clients_get_streams_without_chunks(proxy, a):
    spoken = message_events(["one ", "two "])
    a.script(events(spoken))
    body = json.dumps({**ASK, "stream": True}).encode()
    with RawClient.to(proxy.url) as client:
        client.send(b"POST /v1/messages HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        answer = client.read()
    assert (answer.status, answer.ending) == (200, "close")
    assert answer.header("transfer-encoding") is None
    assert answer.body == b"".join(spoken)


def test_pipelined_requests_are_answered_in_order(client, a):
    for n in range(4):
        a.script(whole(200, b'{"type":"message","number":%d}' % n))
    wrong = b"GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n"
    client.send(WHOLE + WHOLE + wrong + WHOLE + WHOLE)
    answers = [client.read() for _ in range(5)]
    assert [answer.status for answer in answers] == [200, 200, 404, 200, 200]
    assert [answer.json()["number"] for answer in answers if answer.status == 200] == [0, 1, 2, 3]


def test_a_request_that_comes_byte_by_byte_is_served(client, a):
    for at in range(len(WHOLE)):
        client.send(WHOLE[at : at + 1])
    assert client.read().status == 200
    assert a.seen[0].body == SPELT


def test_connection_close_is_honoured(client, a):
    client.post(SPELT, headers=[("connection", "close")])
    answer = client.read()
    assert answer.status == 200
    assert answer.header("connection") == "close"
    client.wait_closed()


def test_both_framings_at_once_are_refused(client, a):
    client.send(f"{HEAD}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".encode() + WHOLE)
    assert client.read().status == 400
    client.wait_closed()
    assert a.seen == []


def test_many_refusals_on_one_connection_leave_it_usable(client, a):
    for n in range(30):
        if n % 3 == 0:
            client.post(b"nonsense")
        elif n % 3 == 1:
            client.request("PUT", "/v1/messages", b"x" * 100_000)
        else:
            client.request("GET", f"/{n}")
        assert client.read().status in (400, 404, 405)
    assert_still_works(client)


# Last, since it reads what all the others left.
def test_none_of_this_was_a_bug_or_left_a_traceback(proxy):
    told = [*proxy.stdout_lines(), *proxy.stderr.splitlines()]
    assert [line for line in told if "Traceback" in line or " ERROR " in line or "[ERROR]" in line] == []


def test_an_old_client_that_keeps_its_connection_is_answered_on_it_again(client, a):
    head = HEAD.replace("HTTP/1.1", "HTTP/1.0") + "connection: keep-alive\r\n"
    for _ in range(3):
        client.send(f"{head}content-length: {len(SPELT)}\r\n\r\n".encode() + SPELT)
        assert client.read().status == 200
    assert len(a.seen) == 3


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/v1/messages"), ("GET", "/v1/v1/models")])
def test_a_base_url_that_ends_in_v1_is_named_as_the_mistake(method, path):
    response = in_process("demo://answers").open(path, method=method, json=ASK)
    assert (response.status_code, response.json["error"]["type"]) == (400, "invalid_request_error")
    assert "ANTHROPIC_BASE_URL must not end in /v1" in response.json["error"]["message"]
    assert in_process("demo://answers").head(path).status_code == 400


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [("/nowhere", ASK, 404), ("/v1/messages", [], 400), ("/v1/models", ASK, 405)],
)
def test_our_own_errors_that_a_retry_cannot_mend_say_so(path, body, status):
    response = in_process("demo://answers").post(path, json=body)
    assert (response.status_code, response.headers["x-should-retry"]) == (status, "false")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 414, 415, 417, 422, 431])
def test_a_retry_mends_no_other_4xx(status):
    assert ApiError(status, "invalid_request_error", "x").headers == [("x-should-retry", "false")]


@pytest.mark.parametrize("status", [408, 409, 429, 500, 501, 502, 503, 504, 529])
def test_a_retry_may_mend_what_concerns_time_or_the_server(status):
    assert ApiError(status, "api_error", "x").headers == []


def test_a_model_that_no_upstream_has_is_not_retried():
    one = UpstreamSettings(
        name="a", base_url="demo://answers", token="", available_models=frozenset({"claude-x"})
    )
    response = (
        create_app(Config(upstreams=(one,)))
        .test_client()
        .post("/v1/messages", json={**ASK, "model": "claude-y"})
    )
    assert (response.status_code, response.headers["x-should-retry"]) == (404, "false")


def test_our_own_errors_that_a_retry_may_mend_do_not():
    response = in_process(f"http://{HOST}:{free_port()}").post("/v1/messages", json=ASK)
    assert response.status_code == 502
    assert "x-should-retry" not in response.headers
