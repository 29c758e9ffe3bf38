"""Requests on real sockets: reuse, clients that leave, timeouts, and what a failure is called.

At the end the whole proxy behind a real gunicorn: what crosses it each way, byte for byte.
"""

import contextlib
import socket
import threading
import time

import pytest
from clients import Leaving, ask, begin, failure, unwatched
from fakes import (
    HOST,
    RawClient,
    answer,
    await_that,
    blackhole,
    close_now,
    dead_port,
    events,
    hang,
    later,
    loopback_tls,
    message_json,
    raw,
    reset_now,
    stalled_upload,
    whole,
)

from aiproxy.policy import Fault
from aiproxy.transport.session import Transport

MB = 1024 * 1024
FRAMINGS = ["chunked", "length", "close"]
MESSAGE = message_json()
LARGE = b'{"model":"claude-x","padding":"' + b"x" * 20 * MB + b'"}'


@contextlib.contextmanager
def aside(run, *args, **options):
    """Run something in a thread of its own; the list that its result is in at the end."""
    results = []
    thread = threading.Thread(target=lambda: results.append(run(*args, **options)))
    thread.start()
    yield results
    thread.join(10)
    assert not thread.is_alive(), "it still blocks"


# ------------------------------------------------------------------------------------- pieces and reuse


@pytest.mark.parametrize(
    "reply",
    [
        *(events([b"one", b"two"], framing, then="hang") for framing in FRAMINGS),
        whole(200, MESSAGE),
        raw(b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "hang"),
    ],
    ids=[*FRAMINGS, "arrived", "switched"],
)
def test_a_connection_whose_answer_was_not_read_to_its_end_is_closed(transport, upstream, reply):
    a = upstream(reply)
    begin(transport, a).close()
    a.wait_left()
    assert ask(transport, a) == MESSAGE
    assert [request.connection for request in a.seen] == [1, 2]


def test_a_connection_that_the_upstream_closed_while_idle_is_not_taken(transport, upstream):
    a = upstream(raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"))
    ask(transport, a)
    await_that(lambda: not a.open_connections)
    assert ask(transport, a) == MESSAGE
    assert a.connections == 2


def test_calls_at_the_same_time_use_connections_of_their_own_and_keep_them(transport, upstream):
    n = 20
    a = upstream(default=later(gate := threading.Event(), answer()))
    with contextlib.ExitStack() as stack:
        results = [stack.enter_context(aside(ask, transport, a)) for _ in range(n)]
        a.wait_for(n)
        gate.set()
    assert results == [[MESSAGE]] * n
    for _ in range(3 * n):
        ask(transport, a)
    assert a.connections == n


@pytest.mark.parametrize("proxy", ["", "through a forward proxy"])
def test_connections_send_at_once_and_are_kept_alive_by_tcp(transport, upstream, monkeypatch, proxy):
    made = []
    monkeypatch.setattr(
        "aiproxy.transport.wait.WatchedSocket.setsockopt", lambda _, *option: made.append(option)
    )
    a = upstream()
    ask(transport, "http://a" if proxy else a, proxy=a.url if proxy else None)
    assert {
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    } <= set(made)


# --------------------------------------------------------------------------------------- clients that leave


def assert_leaving_ends(transport, url, *, once=lambda: time.sleep(0.05), **options):
    """A client that leaves, once that has happened, ends its request within a second."""
    with Leaving() as client:
        with aside(failure, transport, url, wait=client.wait, **options) as results:
            once()
            began = time.monotonic()
            client.leave()
        assert time.monotonic() - began < 1
    assert [(one.fault, one.is_stale, one.detail) for one in results] == [
        (Fault.CLIENT_LEFT, False, "the client left")
    ]
    assert client.wait.ended is Fault.CLIENT_LEFT


def test_leaving_ends_a_hanging_connect_and_a_hanging_handshake(transport):
    with blackhole() as port:
        assert_leaving_ends(transport, f"http://{HOST}:{port}")
    with socket.create_server((HOST, 0)) as silent:
        assert_leaving_ends(transport, f"https://{HOST}:{silent.getsockname()[1]}")


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    ("reply", "body"),
    [(stalled_upload(), LARGE), (hang(), b"{}"), (events([b"one"], then="hang"), b"{}")],
    ids=["upload", "head", "body"],
)
def test_leaving_ends_an_upload_and_the_wait_for_an_answer(transport, upstream, bundle, tls, reply, body):
    a = upstream(answer(), reply, tls=loopback_tls() if tls else None)
    ask(transport, a, ca_bundle=bundle)  # a kept connection is no other
    assert_leaving_ends(transport, a, once=lambda: a.wait_for(2), body=body, ca_bundle=bundle)
    if body is not LARGE:
        a.wait_left()


# --------------------------------------------------------------------------------------------- timeouts


def test_a_handshake_that_trickles_ends_at_the_connect_timeout(impatient):
    def trickle():
        with listener.accept()[0] as server, contextlib.suppress(OSError):  # until it leaves
            for byte in b"\x16\x03\x03\x40" + bytes(500):
                server.send(bytes([byte]))
                time.sleep(0.02)

    with socket.create_server((HOST, 0)) as listener, aside(trickle):
        began = time.monotonic()
        failed = failure(impatient, f"https://{HOST}:{listener.getsockname()[1]}")
        assert 0.14 <= time.monotonic() - began < 5
    assert (failed.fault, failed.detail) == (Fault.CONNECT, "no connection in time")


def test_several_addresses_share_the_connect_timeout_and_the_one_that_works_is_used(
    impatient, upstream, monkeypatch
):
    a = upstream()
    with blackhole() as port:
        dead, good = ((socket.AF_INET, socket.SOCK_STREAM, 6, "", (HOST, n)) for n in (port, a.port))
        monkeypatch.setattr("aiproxy.transport.resolver.Resolver.resolve", lambda *_: [dead, good])
        assert ask(impatient, "http://somewhere") == MESSAGE
        monkeypatch.setattr("aiproxy.transport.resolver.Resolver.resolve", lambda *_: [dead] * 20)
        began = time.monotonic()
        assert failure(impatient, "http://elsewhere").fault is Fault.CONNECT
        assert 0.14 <= time.monotonic() - began < 2


def test_lookup_connect_and_handshake_share_the_connect_timeout(monkeypatch):
    with socket.create_server((HOST, 0)) as silent, contextlib.closing(Transport(1.0)) as transport:
        address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", silent.getsockname())

        def slowly(*_):
            time.sleep(0.9)
            return [address]

        monkeypatch.setattr("aiproxy.transport.resolver.Resolver.resolve", slowly)
        began = time.monotonic()
        assert failure(transport, "https://somewhere").fault is Fault.CONNECT
        assert 1.0 <= time.monotonic() - began < 1.9


TRICKLED = {
    "in a chunk's size": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    "in an extension": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5;",
    "in the trailers": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n",
    "in the head": b"HTTP/1.1 200 OK\r\n",
}


@pytest.mark.parametrize("begun", TRICKLED.values(), ids=TRICKLED)
def test_a_trickle_that_is_no_event_does_not_renew_the_silence(transport, upstream, begun):
    def reply(wire, seen):
        wire.send(begun)
        while True:
            wire.send(b"0")
            wire.pause(0.02)

    wait = unwatched()
    wait.limit(silence=0.2)
    assert failure(transport, upstream(reply), wait=wait).detail == "silent for too long"


def test_a_tls_server_that_is_silent_after_the_handshake_ends_in_time(transport, upstream, bundle):
    """TLS 1.3 sends session tickets then: the socket is readable and has no data."""
    wait = unwatched()
    wait.limit(total=0.5)
    failed = failure(transport, upstream(hang(), tls=loopback_tls()), wait=wait, ca_bundle=bundle)
    assert (failed.fault, failed.detail) == (Fault.TIMEOUT, "no answer in time")


# --------------------------------------------------------------------------------------------- failures

BAD = {
    "closed": (close_now(), "closed without an answer"),
    "reset": (reset_now(), "connection reset by peer"),
    "not_http": (raw(b"SSH-2.0-OpenSSH\r\n"), None),
    "cut": (events([MESSAGE], then="cut"), "the answer was cut short"),
    "reset_in_the_body": (events([b"one", 0.02], then="reset"), "connection reset by peer"),
    "no_chunk_size": (raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"), None),
    "not_gzip": (
        whole(200, MESSAGE, headers=[("content-encoding", "gzip")]),
        "the answer's content encoding is broken",
    ),
    "brotli": (
        whole(200, MESSAGE, headers=[("content-encoding", "br")]),
        "content encoding br was not asked for",
    ),
}


@pytest.mark.parametrize(("reply", "detail"), BAD.values(), ids=BAD)
def test_a_broken_answer_is_told_plainly_and_without_an_address(transport, upstream, reply, detail):
    a = upstream(reply)
    failed = failure(transport, a)
    no_answer = Fault.NO_ANSWER if detail and "asked for" in detail else Fault.BROKEN
    assert (failed.fault, failed.is_stale) == (no_answer, False)
    assert detail in (None, failed.detail)
    assert_nameless(failed, a.port)


def assert_nameless(failed, *ports):
    said = f"{failed} {failed.detail} {failed.args}"
    parts = (HOST, *map(str, ports), "invalid", "http://", "0x", "object at", "Errno")
    assert [part for part in parts if part in said] == []
    assert failed.__cause__ is None
    assert failed.detail
    assert failed.detail == failed.detail.strip()


def test_no_connection_is_told_plainly_and_without_an_address(transport, impatient, upstream):
    plain, tls, port = upstream(), upstream(tls=loopback_tls()), dead_port()
    with blackhole() as hole:
        told = {
            "connection refused": failure(transport, f"http://{HOST}:{port}"),
            "the host name was not found": failure(transport, "http://name.invalid"),
            "the host name was not found ": failure(transport, f"http://{'a' * 70}.invalid"),
            "no connection in time": failure(impatient, f"http://{HOST}:{hole}"),
            "TLS failed: ": failure(transport, plain.url.replace("http:", "https:")),
            "the certificate does not verify: ": failure(transport, tls),
        }
    for detail, failed in told.items():
        assert (failed.fault, failed.is_stale) == (Fault.CONNECT, False)
        assert failed.detail.startswith(detail.strip())
        assert_nameless(failed, port, hole, plain.port, tls.port)
    assert tls.seen == []


# ----------------------------------------------------------------------------- the whole proxy, on the wire


@pytest.fixture
def hostile_home(tmp_path):
    """An environment that would change every request, were it listened to."""
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine {HOST} login evil password evil\ndefault login evil password evil\n")
    netrc.chmod(0o600)
    dead = f"http://{HOST}:{dead_port()}"
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"), dead)
    return {"HOME": str(tmp_path), "NETRC": str(netrc), "REQUESTS_CA_BUNDLE": "/nowhere", **proxies}


def test_only_what_should_crosses_the_proxy_each_way(upstream, serve, config_of, hostile_home):
    back = [
        ("request-id", "req_theirs"),
        ("x-new", "\xe9"),
        ("set-cookie", "session=1"),
        ("server", "cloudflare"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
        ("x-aiproxy-upstream", "theirs"),
    ]
    a, b = (upstream(default=answer(headers=back)) for _ in "ab")
    settings = [a, {"base_url": b, "auth": "bearer", "headers": {"X-Extra": "1", "anthropic-beta": "ours"}}]
    served = serve(config_of(settings), env=hostile_home)
    common = {
        "user-agent": "Anthropic/Python 2.12.0",
        "anthropic-something-new": "\xe9",
        "x-stainless-timeout": "NOT_GIVEN",
        "x-claude-code-session-id": "0000",
    }
    asked = [
        *common.items(),
        ("Authorization", "Bearer sk-client"),
        ("X-Api-Key", "sk-client"),
        ("Cookie", "theirs=1"),
        ("Accept-Encoding", "gzip, br, zstd"),
        ("anthropic-beta", "one,two"),
        ("anthropic-beta", "three"),
        ("X-Forwarded-For", "1.2.3.4"),
        ("TE", "trailers"),
        ("Connection", "keep-alive, X-Mine"),
        ("X-Mine", "1"),
    ]
    odd = ' \n{ "model" :\t"claude-x", "a":1.10,"b":1e400,"c":"\\u00e9é","a":2, "z":[ ] }\r\n'.encode()
    with RawClient.to(served.url) as client:
        answers = []
        for _ in range(4):  # twice each, so that the first answer's cookies could come along
            client.post(odd, "/v1/messages?beta=true", headers=asked)
            answers.append(client.read())
    assert [one.status for one in answers] == [200] * 4
    common |= {
        "content-type": "application/json",
        "content-length": str(len(odd)),
        "accept-encoding": "identity",
    }
    to_a = {"host": f"{HOST}:{a.port}", "anthropic-beta": "one,two,three", "x-api-key": "sk-test-a"}
    to_b = {"anthropic-beta": "ours", "authorization": "Bearer sk-test-b", "x-extra": "1"}
    assert [_flat(request.headers) for request in a.seen] == [{**common, **to_a}] * 2
    assert [_flat(one.headers) for one in b.seen] == [{**common, "host": f"{HOST}:{b.port}", **to_b}] * 2
    assert {(request.target, request.body) for request in a.seen + b.seen} == {
        ("/v1/messages?beta=true", odd)
    }
    got = _flat(answers[0].headers)
    assert (got["request-id"], got["x-new"]) == ("req_theirs", "\xe9")
    assert (got["x-aiproxy-upstream"], got["x-aiproxy-attempts"]) == ("a", "1")
    assert not got.keys() & {"set-cookie", "x-hop"}
    assert got["server"] != "cloudflare"


def _flat(headers):
    """The headers as a mapping; none may come twice."""
    names = [name.lower() for name, _ in headers]
    assert len(names) == len(set(names)), names
    return {name.lower(): value for name, value in headers}
