"""Overload: one request too many is told so at once, and a place in flight is given back on every path.

One gunicorn with a single place in flight serves most tests: whatever loses the place fails the test itself.
Its `aiproxy.server.request_body` waits for tenths of seconds where the real one waits for half a minute.
"""

import itertools
import json
import re
import select
import socket
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest
from conftest import ROOT, serving
from fakes import (
    ASK,
    HOST,
    SPOKEN,
    STREAM,
    FakeUpstream,
    RawClient,
    answer,
    await_that,
    close_now,
    error,
    error_event,
    events,
    free_port,
    hang,
    later,
    message_events,
    message_json,
    whole,
)

MB = 1024 * 1024
IDLE = 0.5
SILENCE = 0.3
DISCARD_SECONDS = 0.8
KEY = ("x-api-key", "key-of-alice")
HEAD = f"POST /v1/messages HTTP/1.1\r\nhost: {HOST}\r\nx-api-key: {KEY[1]}\r\n"

# The proxy as it is, but in a hurry, and with a model that meets a bug of ours.
HURRY = f"""
import aiproxy.server.client
import aiproxy.server.request_body

aiproxy.server.client.UPLOAD_SILENCE = {SILENCE}
aiproxy.server.request_body.DISCARD_SECONDS = {DISCARD_SECONDS}

import os

import aiproxy.proxy.failover
from aiproxy.app import create_app
from aiproxy.config import load, path_from

messages = aiproxy.proxy.failover.Failover.messages


def with_a_bug(self, exchange):
    if exchange.request.body.model == "claude-bug":
        raise ZeroDivisionError("a bug")
    return messages(self, exchange)


aiproxy.proxy.failover.Failover.messages = with_a_bug
app = create_app(load(path_from(os.environ)))
"""


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    upstream_port = free_port()
    directory = tmp_path_factory.mktemp("overload")
    (directory / "wsgi.py").write_text(HURRY, encoding="utf-8")
    config = {
        "listen": free_port(),
        "max_body_mb": 1,
        "max_in_flight": 1,
        "api_keys": [KEY[1]],
        "timeouts": {"connect": 2, "first_byte": 10, "answer": 10, "idle": IDLE},
        "breaker": {"failures": 10**6, "cooldown": 0},
        "upstreams": [
            {
                "name": "a",
                "base_url": f"http://{HOST}:{upstream_port}",
                "token": "sk-test-a",
                "available_models": ["claude-x", "claude-bug"],
            }
        ],
    }
    sock = str(directory / "socket")
    binds = ["--bind", f"{HOST}:{config['listen']}", "--bind", f"unix:{sock}"]
    args = ["-c", str(ROOT / "gunicorn.conf.py"), *binds]
    env = {"PYTHONPATH": str(ROOT)}
    with serving(directory, config, gunicorn_args=args, app_dir=directory, env=env) as served:
        served.upstream_port = upstream_port
        served.socket = sock
        yield served


@pytest.fixture
def a(proxy):
    with FakeUpstream(port=proxy.upstream_port) as upstream:
        yield upstream


@contextmanager
def asking(url, body, **options):
    """A client of its own that has sent this request."""
    with RawClient.to(url) as client:
        client.post(body, headers=[KEY], **options)
        yield client


def ask(url, body=ASK, **options):
    with asking(url, body, **options) as client:
        return client.read()


def assert_a_place_is_free(url, client=None):
    """At the latest a moment after an answer's last byte; a client may ask on the connection that it has."""
    statuses = []

    def is_not_busy():
        if client is not None:
            client.post(ASK, headers=[KEY])
        statuses.append((ask(url) if client is None else client.read()).status)
        return statuses[-1] != 529

    await_that(is_not_busy, limit=2)
    assert statuses[-1] == 200


def assert_busy(reply):
    assert (reply.status, reply.ending) == (529, "end")
    assert reply.header("retry-after") == "1"
    assert reply.header("content-type") == "application/json"
    told = reply.json()
    assert (told["type"], told["error"]["type"]) == ("error", "overloaded_error")
    assert told["request_id"] == reply.header("request-id")


@contextmanager
def place_taken(proxy, upstream):
    """While the only place in flight is a whole answer's, which may be silent for longer than a stream."""
    gate = threading.Event()
    asked = len(upstream.seen) + 1
    upstream.script(later(gate, answer()))
    with asking(proxy.url, ASK) as client:
        upstream.wait_for(asked)
        yield
        assert len(upstream.seen) == asked
        gate.set()
        assert client.read().status == 200


# --------------------------------------------------------------------------------------- the next request


def test_one_request_too_many_is_told_so_at_once_and_logged(proxy, a):
    with place_taken(proxy, a):
        for body, target in (
            (ASK, "/v1/messages"),
            (STREAM, "/v1/messages?beta=true"),
            (ASK, "/v1/messages/count_tokens"),
        ):
            since = len(proxy.stdout_lines())
            began = time.monotonic()
            assert_busy(reply := ask(proxy.url, body, target=target))
            assert time.monotonic() - began < 3
            proxy.wait_for_log(rf"refused id={reply.json()['request_id']} .*status=529", since=since)
        with RawClient.to(proxy.url) as client:  # without a key it may be told either
            client.post(ASK)
            assert client.read().status in (401, 529)
    assert_a_place_is_free(proxy.url)


@pytest.mark.parametrize("size", [MB - 1000, 20 * MB])
@pytest.mark.parametrize("chunked", [False, True])
def test_its_large_body_is_read_and_thrown_away_and_the_connection_is_kept(proxy, a, size, chunked):
    body = b'{"model": "claude-x", "padding": "' + b"x" * size + b'"}'
    with place_taken(proxy, a), RawClient.to(proxy.url) as client:
        client.request("POST", "/v1/messages", body, [KEY], chunked)
        assert_busy(client.read())
        client.post(ASK, headers=[KEY])
        assert_busy(client.read())


def test_probes_models_and_unknown_paths_are_answered_while_every_place_is_taken(proxy, a):
    with place_taken(proxy, a), RawClient.to(proxy.url) as client:
        began = time.monotonic()
        for method, path, status in [
            ("GET", "/", 200),
            ("HEAD", "/", 200),
            ("HEAD", "/api/hello", 200),
            ("GET", "/v1/models", 200),
            ("GET", "/v1/models/claude-x", 200),
            ("GET", "/v1/files", 404),
            ("GET", "/v1/messages", 405),
        ]:
            client.request(method, path, headers=[KEY])
            assert client.read().status == status
        assert time.monotonic() - began < 3


@pytest.mark.parametrize(("limit", "threads", "places"), [(3, 64, 3), (None, 11, 3)])
def test_so_many_are_served_at_a_time_and_probes_beside_them(
    upstream, serve, config_of, limit, threads, places
):
    gate = threading.Event()
    fake = upstream(default=events([*SPOKEN[:4], gate, *SPOKEN[4:]]))
    extra = {"max_in_flight": limit} if limit else {}
    served = serve(config_of([fake], **extra), gunicorn_args=["--threads", str(threads)])
    with ExitStack() as stack:
        streams = [stack.enter_context(asking(served.url, STREAM)).answer() for _ in range(places)]
        assert [stream.status for stream in streams] == [200] * places
        for _ in range(3):
            assert_busy(ask(served.url))
        for path in ("/", "/api/hello"):
            with RawClient.to(served.url) as client:
                client.request("GET", path)
                assert client.read().status == 200
        gate.set()
        assert {stream.read().ending for stream in streams} == {"end"}
    fake.script(*[answer()] * 9)
    assert_a_place_is_free(served.url)


# ------------------------------------------------------------------------------ a place is given back


LARGE = b'{"model": "claude-x", "padding": "' + b"x" * MB + b'"}'

ANSWERED = {
    "a whole answer": (ASK, answer(), 200),
    "a stream": (STREAM, answer(), 200),
    "an error of the upstream's": (ASK, error(429), 429),
    "a stream that begins with an error": (STREAM, events([error_event()]), 529),
    "no answer": (ASK, close_now(), 502),
    "an answer with odd headers": (ASK, whole(200, message_json(), [("x-odd", "a\r\n b"), ("x", "")]), 200),
    "no JSON": (b"{", None, 400),
    "no model": ({"messages": []}, None, 400),
    "an unknown model": ({**ASK, "model": "claude-unknown"}, None, 404),
    "a large body": (LARGE, None, 413),
    "an empty body": (b"", None, 400),
    "a bug": ({**ASK, "model": "claude-bug"}, None, 500),
}


@pytest.mark.parametrize(("body", "reply", "status"), ANSWERED.values(), ids=ANSWERED)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_place_is_given_back_after(proxy, a, body, reply, status, chunked):
    if reply is not None:
        a.script(reply)
    with RawClient.to(proxy.url) as client:
        client.request("POST", "/v1/messages", body, [KEY], chunked)
        assert client.read().status == status
        assert_a_place_is_free(proxy.url)
        assert_a_place_is_free(proxy.url, client)  # the connection was kept


@pytest.mark.parametrize(
    "reply",
    [
        *(events(SPOKEN[:4], then=then) for then in ("cut", "reset", "hang", "end")),
        events([*SPOKEN[:4], error_event()]),
    ],
    ids="cut reset hang end error".split(),
)
def test_a_place_is_given_back_after_a_broken_stream(proxy, a, reply):
    a.script(reply)
    assert ask(proxy.url, STREAM).ending in ("cut", "reset")
    assert_a_place_is_free(proxy.url)


@pytest.mark.parametrize("body", [ASK, STREAM])
def test_a_place_is_given_back_when_the_client_leaves(proxy, a, body):
    a.script(events(SPOKEN[:4], then="hang") if body is STREAM else hang())
    with asking(proxy.url, body):
        a.wait_for(1)
    assert_a_place_is_free(proxy.url)


# -------------------------------------------------------------------------------------------- uploads


def test_an_upload_is_in_flight_from_its_head_on(proxy, a):
    spelt = json.dumps(ASK).encode()
    with RawClient.to(proxy.url) as client:
        client.begin_upload(HEAD, len(spelt))
        client.send(spelt[:-1])
        await_that(lambda: ask(proxy.url).status == 529)
        client.send(spelt[-1:])
        assert client.read().status == 200
    assert_a_place_is_free(proxy.url)


def test_a_refused_upload_that_trickles_is_given_up_and_what_follows_it_is_no_request(proxy, a):
    # It may be the rest of the body, whoever wrote that.
    since = len(proxy.stdout_lines())
    with RawClient.to(proxy.url) as client:
        client.send(f"{HEAD}content-length: {20 * MB}\r\n\r\n".encode())
        began = time.monotonic()
        while not select.select([client.sock], [], [], 0.02)[0]:
            client.send(b"x")
        assert client.read().status == 413
        assert DISCARD_SECONDS <= time.monotonic() - began < DISCARD_SECONDS + 2
        with suppress(OSError):
            client.send(f"{HEAD}content-length: 2\r\n\r\n{{}}".encode())
            client.wait_closed()
        assert bytes(client.raw).count(b"HTTP/1.1 ") == 1
    proxy.wait_for_log("refused", since=since)
    assert sum("refused" in line for line in proxy.stdout_lines()[since:]) == 1


# --------------------------------------------------------------------------------- clients that take nothing


def slow_client(proxy, over):
    """A connection whose receive buffer is small, so that what is not read soon waits at the proxy."""
    if over == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(proxy.socket)
    else:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.connect((HOST, proxy.port))
    sock.settimeout(10)
    return RawClient.on(sock)


TEXT = "0123456789abcdef" * (24 * MB // 16)


def long_stream(then="end"):
    """24 MB in a few hundred events."""
    return events(message_events([TEXT[at : at + 65536] for at in range(0, len(TEXT), 65536)]), then=then)


@pytest.mark.parametrize("over", ["tcp", "unix"])
@pytest.mark.parametrize("body", [ASK, STREAM], ids=["whole", "stream"])
def test_a_client_that_takes_no_byte_counts_as_one_that_left(proxy, a, over, body):
    a.script(long_stream() if body is STREAM else whole(200, message_json(TEXT)))
    since = len(proxy.stdout_lines())
    with slow_client(proxy, over) as client:
        began = time.monotonic()
        client.post(body, headers=[KEY])
        proxy.wait_for_log("done .*outcome=client_left", since=since)
        assert IDLE <= time.monotonic() - began < IDLE + 3
        assert_a_place_is_free(proxy.url)
        assert client.read().ending in ("cut", "reset")
    if body is STREAM:
        a.wait_left(1)
    assert "Traceback" not in proxy.stderr
    assert not re.search(r"\bcircuit\b", "\n".join(proxy.stdout_lines()[since:]))


# How much is read at a time, and with which pause, and for how long in all.
PACES = {"steadily": (65536, 0.01), "in gulps": (MB, 0.15)}


# Each pair of them once.
@pytest.mark.parametrize(
    ("over", "pace", "body"),
    [
        ("tcp", "steadily", ASK),
        ("tcp", "in gulps", STREAM),
        ("unix", "steadily", STREAM),
        ("unix", "in gulps", ASK),
    ],
)
def test_a_slow_reader_is_not_cut_off(proxy, a, over, pace, body):
    size, every = PACES[pace]
    a.script(long_stream() if body is STREAM else whole(200, message_json(TEXT)))
    with slow_client(proxy, over) as client:
        client.post(body, headers=[KEY])
        sock, read = client.sock, bytearray()
        began = time.monotonic()
        while time.monotonic() - began < 3 * IDLE:
            time.sleep(every)
            data = sock.recv(size)
            assert data, f"cut off after {time.monotonic() - began:.2f} s and {len(read)} bytes"
            read += data
        assert len(read) < 20 * MB, "the proxy had to wait for it"
        while not read.endswith((b'"output_tokens": 5}}', b"0\r\n\r\n")):
            data = sock.recv(MB)
            assert data
            read += data
    head, _, received = bytes(read).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    if body is ASK:
        assert received == message_json(TEXT)
    else:
        assert received.count(b"event: content_block_delta") == len(TEXT) // 65536
    assert_a_place_is_free(proxy.url)


@pytest.mark.parametrize("body", [ASK, STREAM], ids=["whole", "stream"])
def test_a_client_that_waits_longer_than_that_for_its_answer_is_not_cut_off(proxy, a, body):
    pauses = itertools.chain.from_iterable((0.15, piece) for piece in message_events())
    if body is STREAM:
        a.script(events([message_events()[0], 3 * IDLE, *pauses]))
    else:
        a.script(events([message_json()[:9], 3 * IDLE, message_json()[9:]], content_type="application/json"))
    reply = ask(proxy.url, body)
    assert (reply.status, reply.ending) == (200, "end")


# Last, so that it has seen all of the above.
def test_none_of_this_left_a_traceback_but_the_bug_s(proxy):
    tracebacks = [line for line in proxy.stdout_lines() if re.match(r"  \| \w*Error", line)]
    assert set(tracebacks) <= {"  | ZeroDivisionError: a bug"}
    assert "Traceback" not in proxy.stderr


def test_probes_are_answered_beside_refused_uploads_that_stall(upstream, serve, config_of):
    served = serve(config_of([upstream()], max_in_flight=1), gunicorn_args=["--threads", "9"])
    with ExitStack() as stack:
        for _ in range(12):
            client = stack.enter_context(RawClient.to(served.url))
            client.send(b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\nx")
        began = time.monotonic()
        probe = stack.enter_context(RawClient.to(served.url))
        probe.request("GET", "/")
        assert probe.read().status == 200
        assert time.monotonic() - began < 3
