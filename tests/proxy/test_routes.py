"""HTTP in, HTTP out: what is refused, how, and that the connection survives it.

One gunicorn with a limit of 1 MB serves the tests that need the client's wire; its upstream has a fixed
port, on which each test starts a fake of its own. The rest is asked of the application in process. What a
body may be is `tests/unit/test_body.py`'s, how it is read `test_request_body.py`'s.
"""

import gzip
import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Served
from fakes import HOST, Ended, FakeUpstream, RawClient, free_port

from aiproxy.app import create_app
from aiproxy.config import Config, UpstreamSettings
from aiproxy.errors import ApiError

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


def in_process(upstream, clock=time.monotonic, models=(), **settings):
    """The application as gunicorn would load it, asked without a server."""
    base_url = upstream if isinstance(upstream, str) else upstream.url
    one = UpstreamSettings(name="a", base_url=base_url, token="sk-test-a", available_models=frozenset(models))
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
        ("POST", "/v1//messages"),
        ("POST", "/v1/./messages"),
        ("POST", "/v1/Messages"),
        ("DELETE", "/v1/messages/batches/msgbatch_1"),
        ("OPTIONS", "*"),
        ("GET", "/v1/%ff%fe%00%0d%0a%e2%80%a8"),
        ("GET", "/" + "long/" * 600),
    ],
)
def test_unknown_paths_are_not_found_nor_redirected(client, a, method, target):
    client.request(method, target)
    answer = client.read()
    assert_ours(answer, 404, "not_found_error")
    assert len(answer.body) < 800
    assert_still_works(client)
    assert len(a.seen) == 1


@pytest.mark.parametrize("method", ["GET", "PUT", "OPTIONS", "TRACE", "FROBNICATE"])
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


@pytest.mark.parametrize(
    ("head", "piece", "end"),
    [
        (f"{HEAD}content-length: {40 * MB}\r\n\r\n".encode(), b"x" * MB, b""),
        (CHUNKED, b"%x\r\n%b\r\n" % (MB, b"x" * MB), b"0\r\n\r\n"),
        (CHUNKED + b"%x\r\n" % (40 * MB), b"x" * MB, b"\r\n0\r\n\r\n"),
    ],
    ids=["length", "chunks", "one chunk"],
)
def test_an_upload_of_40_mb_sees_the_413_and_is_not_kept(proxy, client, a, head, piece, end):
    assert_still_works(client)
    worker, used = memory_of(proxy, "VmRSS")
    Path(f"/proc/{worker}/clear_refs").write_text("5")  # the peak begins anew
    client.send(head)
    for _ in range(40):
        client.send(piece)
    client.send(end)
    assert_ours(client.read(), 413, "request_too_large")
    assert memory_of(proxy, "VmHWM")[1] - used < 16
    assert_still_works(client)


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


# ----------------------------------------------------------------------------------- bodies that are wrong


@pytest.mark.parametrize(
    "sent",
    [
        b"content-length: 999\r\n\r\n" + SPELT,  # what came would be a good request by itself
        b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
        b"transfer-encoding: chunked\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\nzz\r\nhello",
        b"transfer-encoding: chunked\r\n\r\n2\r\n{}0\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\nxyz\r\n",
    ],
)
def test_a_body_that_breaks_off_or_is_badly_chunked_is_a_400_and_not_sent_on(client, a, sent):
    client.send(HEAD.encode() + sent)
    client.half_close()
    assert_ours(client.read(), 400, "invalid_request_error")
    assert a.seen == []


def test_after_a_badly_chunked_body_nothing_on_the_connection_is_a_request(client, a):
    client.send(CHUNKED + b"zz\r\n" + WHOLE)
    client.read()
    with pytest.raises(Ended):
        client.read()
    assert a.seen == []


def test_well_chunked_bodies_with_extensions_and_trailers_are_served(client, a):
    chunks = b'%x;name="v"\r\n%b\r\n0\r\nx-trailer: 1\r\n\r\n' % (len(SPELT), SPELT)
    client.send(CHUNKED + chunks)
    assert client.read().status == 200
    assert a.seen[0].body == SPELT
    assert a.seen[0].every("content-length") == [str(len(SPELT))]
    assert a.seen[0].header("transfer-encoding") is None
    assert_still_works(client)


@pytest.mark.parametrize(
    "body", [b"", b"[]", SPELT[:-1], b'{"messages":[]}', b'{"model":"claude-x","stream":1}']
)
def test_what_is_no_request_is_refused_and_not_sent_on(client, a, body):
    client.post(body)
    assert_ours(client.read(), 400, "invalid_request_error")
    assert a.seen == []
    assert_still_works(client)


# ----------------------------------------------------------------------------------------------- bugs


@pytest.mark.parametrize("place", ["body.read", "_request", "_check_key"])
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


def test_odd_header_values_of_up_to_64_kb_reach_the_upstream_as_they_are(client, a):
    odd = [
        ("x-latin", "caf\xe9 \xff\x80"),
        ("x-long", "v" * 65_000),
        ("x-tab", "a\tb"),
        ("x-empty", ""),
        ("x-!#$%&'*+.^`|~", "odd name"),
        ("x-quoted", '"a, b"; c="\\""'),
        *((f"x-number-{n}", str(n)) for n in range(80)),
    ]
    client.post(SPELT, headers=odd)
    assert client.read().status == 200
    for name, value in odd:
        assert a.seen[0].every(name) == [value], name


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


@pytest.mark.parametrize(
    ("version", "field", "is_kept"),
    [
        ("1.1", "", True),
        ("1.1", "connection: close\r\n", False),
        ("1.0", "", False),
        ("1.0", "connection: keep-alive\r\n", True),
    ],
)
def test_a_connection_is_kept_or_closed_as_the_client_wants_it(client, a, version, field, is_kept):
    client.send(WHOLE.replace(b"HTTP/1.1\r\n", f"HTTP/{version}\r\n{field}".encode()))
    assert client.read().status == 200
    if is_kept:
        assert_still_works(client)
    else:
        client.wait_closed()


def test_the_upstream_gets_a_compressed_body_decoded(upstream):
    fake = upstream()
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    assert (
        in_process(fake).post("/v1/messages", data=gzip.compress(SPELT), headers=headers).status_code == 200
    )
    assert (fake.seen[0].body, fake.seen[0].header("content-encoding")) == (SPELT, None)


# ------------------------------------------------------------------------------------- what a retry mends


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/v1/messages"), ("GET", "/v1/v1/models")])
def test_a_base_url_that_ends_in_v1_is_named_as_the_mistake(method, path):
    response = in_process("demo://answers").open(path, method=method, json=ASK)
    assert (response.status_code, response.json["error"]["type"]) == (400, "invalid_request_error")
    assert "ANTHROPIC_BASE_URL must not end in /v1" in response.json["error"]["message"]
    assert in_process("demo://answers").head(path).status_code == 400


@pytest.mark.parametrize(
    ("path", "body", "status"), [("/nowhere", ASK, 404), ("/v1/messages", [], 400), ("/v1/models", ASK, 405)]
)
def test_our_own_errors_that_a_retry_cannot_mend_say_so(path, body, status):
    response = in_process("demo://answers").post(path, json=body)
    assert (response.status_code, response.headers["x-should-retry"]) == (status, "false")


@pytest.mark.parametrize(
    ("statuses", "headers"),
    [
        ((400, 401, 403, 404, 405, 413, 414, 415, 417, 422, 431), [("x-should-retry", "false")]),
        ((408, 409, 429, 500, 501, 502, 503, 504, 529), []),
    ],
)
def test_a_retry_may_mend_what_concerns_time_or_the_server_and_nothing_else(statuses, headers):
    assert [ApiError(status, "api_error", "x").headers for status in statuses] == [headers] * len(statuses)


def test_a_model_that_no_upstream_has_is_not_retried():
    client = in_process("demo://answers", models=["claude-y"])
    response = client.post("/v1/messages", json=ASK)
    assert (response.status_code, response.headers["x-should-retry"]) == (404, "false")


def test_our_own_errors_that_a_retry_may_mend_do_not():
    response = in_process(f"http://{HOST}:{free_port()}").post("/v1/messages", json=ASK)
    assert response.status_code == 502
    assert "x-should-retry" not in response.headers


# Last, since it reads what all the others left.
def test_none_of_this_was_a_bug_or_left_a_traceback(proxy):
    told = [*proxy.stdout_lines(), *proxy.stderr.splitlines()]
    assert [line for line in told if "Traceback" in line or " ERROR " in line or "[ERROR]" in line] == []
