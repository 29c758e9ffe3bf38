"""Requests on real sockets: clients that leave, reuse, stale connections, timeouts.

At the end the whole proxy behind a real gunicorn: what crosses it each way, byte for byte.
"""

import contextlib
import gc
import json
import random
import select
import socket
import threading
import time
import warnings

import pytest
from clients import Leaving, unwatched
from fakes import (
    HOST,
    LOOPBACK_CERT,
    BeforeBody,
    FakeUpstream,
    RawClient,
    answer,
    blackhole,
    close_now,
    dead_port,
    error,
    events,
    gzipped,
    hang,
    later,
    loopback_tls,
    message_json,
    raw,
    refuse_after_head,
    reset_now,
    stalled_upload,
    trickle,
    whole,
)

from aiproxy.policy import Fault
from aiproxy.transport.failures import TransportError
from aiproxy.transport.session import Outgoing, Transport

MB = 1024 * 1024
FRAMINGS = ["chunked", "length", "close"]
BODY = b'{"model":"claude-x"}'
MESSAGE = message_json()
LARGE = b'{"model":"claude-x","padding":"' + b"x" * 20 * MB + b'"}'


@pytest.fixture
def trusted(monkeypatch, tmp_path):
    """Makes requests trust the fakes' certificate."""
    bundle = tmp_path / "ca.pem"
    bundle.write_text(LOOPBACK_CERT)
    monkeypatch.setattr("requests.adapters.DEFAULT_CA_BUNDLE_PATH", str(bundle))


def begin(transport, upstream, *, fresh=False, body=BODY, headers=(), path="/v1/messages", wait=None):
    """A response whose head has come."""
    url = upstream.url if isinstance(upstream, FakeUpstream) else upstream
    outgoing = Outgoing("POST", url + path, list(headers), body)
    return transport.send(outgoing, wait or unwatched(), is_fresh=fresh)


def ask(transport, upstream, **options):
    """The whole body of an answer."""
    response = begin(transport, upstream, **options)
    try:
        return b"".join(response.pieces())
    finally:
        response.close()


def failure(transport, upstream, **options):
    """What went wrong on the way to the end of an answer."""
    with pytest.raises(TransportError) as failed:
        ask(transport, upstream, **options)
    return failed.value


def connections_used(upstream):
    return [request.connection for request in upstream.seen]


class Aside:
    """Something that runs in a thread of its own; `result` is what it returned or raised."""

    def __init__(self, run, *args, **options):
        self.result = None
        self._thread = threading.Thread(target=self._run, args=(run, args, options))
        self._thread.start()

    def _run(self, run, args, options):
        try:
            self.result = run(*args, **options)
        except TransportError as failed:
            self.result = failed

    def is_over(self, limit):
        """Whether it ends within that many seconds."""
        self._thread.join(limit)
        return not self._thread.is_alive()

    def end(self, limit=5.0):
        """Wait for its end, which must not take long."""
        self._thread.join(limit)
        assert not self._thread.is_alive(), "it still blocks"
        return self.result


# ---------------------------------------------------------------------------------------------- answers


def test_status_headers_and_body_come_as_they_were_sent(transport, upstream):
    headers = [("X-One", "1"), ("x-two", "a"), ("X-Two", "b"), ("x-latin", "\xe9")]
    response = begin(transport, upstream(whole(418, MESSAGE, headers=headers)))
    assert response.status == 418
    assert [pair for pair in response.headers if pair[0].startswith("x-")] == [
        ("x-one", "1"),
        ("x-two", "a"),
        ("x-two", "b"),
        ("x-latin", "\xe9"),
    ]
    assert b"".join(response.pieces()) == MESSAGE
    response.close()


@pytest.mark.parametrize("framing", FRAMINGS)
def test_each_piece_comes_as_soon_as_it_is_sent(transport, upstream, framing):
    gates = [threading.Event() for _ in range(3)]
    items = [item for n, gate in enumerate(gates) for item in (b"piece %d" % n, gate)]
    response = begin(transport, upstream(events(items, framing)))
    pieces = response.pieces()
    for n, gate in enumerate(gates):
        assert next(pieces) == b"piece %d" % n
        gate.set()
    assert list(pieces) == []
    response.close()


def test_a_compressed_body_is_decoded_and_says_so(transport, upstream):
    response = begin(transport, upstream(gzipped(MESSAGE)))
    assert (response.is_decoded, b"".join(response.pieces())) == (True, MESSAGE)
    response.close()


def test_tls_works_where_the_certificate_does(transport, upstream, trusted):
    a = upstream(tls=loopback_tls())
    assert [ask(transport, a), ask(transport, a)] == [MESSAGE, MESSAGE]
    assert connections_used(a) == [1, 1]
    assert ask(transport, a.url.replace(HOST, "localhost")) == MESSAGE


# ------------------------------------------------------------------------------------------------ reuse


@pytest.mark.parametrize(
    "reply",
    [
        whole(200, MESSAGE),
        whole(200, MESSAGE, framing="chunked"),
        whole(500, b""),
        error(400),
        events([MESSAGE] * 9),
        gzipped(MESSAGE),
    ],
)
def test_a_connection_whose_answer_was_read_to_its_end_is_used_again(transport, upstream, reply):
    a = upstream(default=reply)
    for _ in range(3):
        ask(transport, a)
    assert connections_used(a) == [1, 1, 1]


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_connection_whose_answer_was_not_read_to_its_end_is_closed(transport, upstream, framing):
    a = upstream(events([b"one", b"two"], framing, then="hang"))
    response = begin(transport, a)
    assert next(response.pieces())
    response.close()
    response.close()
    a.wait_left()
    assert ask(transport, a) == MESSAGE
    assert connections_used(a) == [1, 2]


def test_a_connection_whose_answer_has_arrived_but_was_not_read_is_closed(transport, upstream):
    a = upstream(whole(200, MESSAGE))
    begin(transport, a).close()
    a.wait_left()


def test_a_connection_that_switches_protocols_is_closed(transport, upstream):
    a = upstream(raw(b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "hang"))
    response = begin(transport, a)
    assert response.status == 101
    response.close()
    a.wait_left()


def test_a_fresh_call_takes_no_kept_connection(transport, upstream):
    a = upstream()
    ask(transport, a)
    ask(transport, a, fresh=True)
    ask(transport, a)
    assert connections_used(a) == [1, 2, 2]


def test_calls_at_the_same_time_use_connections_of_their_own_and_keep_them(transport, upstream):
    n = 20
    gate = threading.Event()
    a = upstream(default=later(gate, answer()))
    aside = [Aside(ask, transport, a) for _ in range(n)]
    a.wait_for(n)
    gate.set()
    assert [one.end(5) for one in aside] == [MESSAGE] * n
    for _ in range(3 * n):
        ask(transport, a)
    assert a.connections == n


def test_a_thread_may_have_several_calls_open(transport, upstream):
    a = upstream(default=events([b"one", b"two"]))
    calls = [begin(transport, a) for _ in range(3)]
    bodies = [response.pieces() for response in calls]
    assert [next(body) for body in bodies] == [b"one"] * 3
    assert [list(body) for body in bodies] == [[b"two"]] * 3
    for response in calls:
        response.close()
    assert a.connections == 3


# ------------------------------------------------------------------------------------------------ stale


@pytest.mark.parametrize("dies", [close_now(), reset_now(), refuse_after_head()])
def test_a_reused_connection_that_breaks_before_a_byte_is_stale(transport, upstream, dies):
    a = upstream(answer(), dies)
    ask(transport, a)
    failed = failure(transport, a)
    assert (failed.fault, failed.is_stale, a.connections) == (Fault.BROKEN, True, 1)


@pytest.mark.parametrize("dies", [close_now(), reset_now(), refuse_after_head()])
def test_a_new_connection_that_breaks_is_not_stale(transport, upstream, dies):
    assert not failure(transport, upstream(dies)).is_stale
    a = upstream(answer(), dies)
    ask(transport, a)
    assert not failure(transport, a, fresh=True).is_stale


@pytest.mark.parametrize(
    "said", [b"H", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx"]
)
def test_a_reused_connection_that_breaks_after_a_byte_is_not_stale(transport, upstream, said):
    a = upstream(answer(), raw(said))
    ask(transport, a)
    failed = failure(transport, a)
    assert (failed.fault, failed.is_stale) == (Fault.BROKEN, False)


def test_a_connection_that_the_upstream_closed_while_idle_is_not_taken(transport, upstream):
    a = upstream(raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"))
    ask(transport, a)
    deadline = time.monotonic() + 5
    while a.open_connections:
        assert time.monotonic() < deadline
        select.select([], [], [], 0.002)
    assert ask(transport, a) == MESSAGE
    assert connections_used(a) == [1, 2]


# --------------------------------------------------------------------------------------- clients that leave


def left(transport, url, ready, body=BODY):
    """What a request ends with whose client leaves as soon as `ready` says so."""
    with Leaving() as client:
        aside = Aside(ask, transport, url, body=body, wait=client.wait)
        ready()
        began = time.monotonic()
        client.leave()
        failed = aside.end()
        assert time.monotonic() - began < 1
    assert client.wait.ended is Fault.CLIENT_LEFT
    return failed


def a_moment():
    select.select([], [], [], 0.05)


def test_a_client_that_left_before_makes_no_connection(transport, upstream):
    a = upstream()
    failed = left(transport, a.url, lambda: None)
    assert (failed.fault, failed.is_stale) == (Fault.CLIENT_LEFT, False)


def test_it_ends_a_hanging_connect(transport):
    with blackhole() as port:
        failed = left(transport, f"http://{HOST}:{port}", a_moment)
    assert (failed.fault, failed.detail) == (Fault.CLIENT_LEFT, "the client left")


def test_it_ends_a_hanging_handshake(transport):
    with socket.create_server((HOST, 0)) as silent:
        failed = left(transport, f"https://{HOST}:{silent.getsockname()[1]}", a_moment)
    assert failed.fault is Fault.CLIENT_LEFT


@pytest.mark.parametrize("tls", [False, True])
def test_it_ends_an_upload_that_nobody_reads(transport, upstream, trusted, tls):
    a = upstream(stalled_upload(), tls=loopback_tls() if tls else None)
    assert left(transport, a.url, lambda: a.wait_for(1), LARGE).fault is Fault.CLIENT_LEFT


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("reused", [False, True])
def test_it_ends_the_wait_for_the_head_and_that_is_not_stale(transport, upstream, trusted, tls, reused):
    a = upstream(*[answer()] * reused, hang(), tls=loopback_tls() if tls else None)
    if reused:
        ask(transport, a)
    failed = left(transport, a.url, lambda: a.wait_for(1 + reused))
    assert (failed.fault, failed.is_stale) == (Fault.CLIENT_LEFT, False)
    a.wait_left()


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_it_ends_the_body_whatever_the_framing(transport, upstream, trusted, framing, tls):
    a = upstream(events([b"one"], framing, then="hang"), tls=loopback_tls() if tls else None)
    with Leaving() as client:
        response = begin(transport, a, wait=client.wait)
        pieces = response.pieces()
        assert next(pieces) == b"one"
        aside = Aside(next, pieces)
        a_moment()
        client.leave()
        assert aside.end().fault is Fault.CLIENT_LEFT
    response.close()
    a.wait_left()


def test_leaving_at_any_moment_ends_only_its_own_request(transport, upstream):
    dice = random.Random(7)
    after = [0, 0.001, 0.002, 0.003, 0.004, 0.006, 0.009, 0.013, 0.02, 0.03, 5, 5]

    def echo(wire, request):
        wire.pause(dice.random() * 0.004)
        half = len(request.body) // 2
        events([request.body[:half], 0.001, request.body[half:]], dice.choice(FRAMINGS))(wire, request)

    a = upstream(default=echo)

    def one(body):
        with Leaving() as client:
            timer = threading.Timer(dice.choice(after), client.leave)
            timer.start()
            try:
                return ask(transport, a, body=body, wait=client.wait)
            except TransportError as failed:
                return failed
            finally:
                timer.cancel()
                timer.join()

    def many(n):
        bodies = [json.dumps({"who": f"{n}/{k}", "padding": "x" * 200}).encode() for k in range(40)]
        return [(body, one(body)) for body in bodies]

    given = [pair for aside in [Aside(many, n) for n in range(6)] for pair in aside.end(10)]
    ended = [result for _, result in given if isinstance(result, TransportError)]
    # Only a kept connection that the fake closed at that moment may fail otherwise.
    assert [one for one in ended if one.fault is not Fault.CLIENT_LEFT and not one.is_stale] == []
    assert [pair for pair in given if pair[1] not in (pair[0], *ended)] == []
    assert 10 < len(ended) < 230


# --------------------------------------------------------------------------------------------- timeouts


@pytest.mark.parametrize("reply", [hang(), trickle(b"x" * 500, 0.01)])
def test_a_total_ends_a_request_and_no_trickle_prolongs_it(transport, upstream, reply):
    a = upstream(reply)
    wait = unwatched()
    wait.limit(total=0.1)
    began = time.monotonic()
    failed = failure(transport, a, wait=wait)
    assert (failed.fault, failed.detail) == (Fault.TIMEOUT, "no answer in time")
    assert 0.1 <= time.monotonic() - began < 1
    a.wait_left()


def test_a_connect_that_hangs_ends_at_the_connect_timeout(impatient):
    with blackhole() as port:
        began = time.monotonic()
        failed = failure(impatient, f"http://{HOST}:{port}")
    assert (failed.fault, failed.detail) == (Fault.CONNECT, "no connection in time")
    assert 0.14 <= time.monotonic() - began < 2


def test_a_handshake_that_hangs_or_trickles_ends_at_the_connect_timeout(impatient):
    for trickled in (b"", b"\x16\x03\x03\x40" + bytes(146)):
        with socket.create_server((HOST, 0)) as listener:
            began = time.monotonic()
            aside = Aside(failure, impatient, f"https://{HOST}:{listener.getsockname()[1]}")
            with listener.accept()[0] as server:
                for byte in trickled:
                    with contextlib.suppress(OSError):  # it has left
                        server.send(bytes([byte]))
                    if aside.is_over(0.02):
                        break
                failed = aside.end()
        assert (failed.fault, failed.detail) == (Fault.CONNECT, "no connection in time")
        assert 0.14 <= time.monotonic() - began < 2


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
    with socket.create_server((HOST, 0)) as silent:
        address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", silent.getsockname())

        def slowly(*_):
            select.select([], [], [], 0.3)
            return [address]

        monkeypatch.setattr("aiproxy.transport.resolver.Resolver.resolve", slowly)
        transport = Transport(0.4)
        began = time.monotonic()
        assert failure(transport, "https://somewhere").fault is Fault.CONNECT
        assert 0.4 <= time.monotonic() - began < 0.65
        transport.close()


def test_a_lookup_that_hangs_ends_at_the_connect_timeout(impatient, upstream, monkeypatch):
    answered, asked = threading.Event(), []

    def lookup(host, *_, **__):
        asked.append(host)
        answered.wait(5)
        raise socket.gaierror(socket.EAI_AGAIN, "later")

    monkeypatch.setattr("aiproxy.transport.resolver.socket.getaddrinfo", lookup)
    began = time.monotonic()
    aside = [Aside(failure, impatient, "http://slow.invalid") for _ in range(4)]
    assert [one.end().fault for one in aside] == [Fault.CONNECT] * 4
    assert 0.15 <= time.monotonic() - began < 2
    assert len(asked) == 1  # one thread a name, not one a request
    answered.set()


def test_an_address_is_not_looked_up(impatient, upstream, monkeypatch):
    a = upstream()
    monkeypatch.setattr("aiproxy.transport.resolver.Resolver._lookup", lambda *_: 1 / 0)
    assert ask(impatient, a) == MESSAGE


def test_the_connect_timeout_bounds_neither_the_head_nor_the_body(impatient, upstream):
    assert ask(impatient, upstream(later(0.2, answer()))) == MESSAGE
    assert ask(impatient, upstream(events([b"one", 0.2, b"two"]))) == b"onetwo"


def test_it_does_not_bound_them_on_a_kept_connection_either(impatient, upstream):
    a = upstream(answer(), later(0.2, answer()), events([b"one", 0.2, b"two"]))
    assert [ask(impatient, a) for _ in range(3)] == [MESSAGE, MESSAGE, b"onetwo"]
    assert a.connections == 1


@pytest.mark.parametrize("framing", FRAMINGS)
def test_silence_counts_from_the_latest_event(transport, upstream, framing):
    a = upstream(events([b"x", *[0.08, b"x"] * 3], framing, then="hang"))
    wait = unwatched()
    response = begin(transport, a, wait=wait)
    wait.limit(silence=0.2)
    began = time.monotonic()
    with pytest.raises(TransportError) as failed:
        for _ in response.pieces():
            wait.renew()
    assert (failed.value.fault, failed.value.detail) == (Fault.TIMEOUT, "silent for too long")
    assert 0.4 <= time.monotonic() - began < 3
    response.close()


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
        for _ in range(200):
            wire.send(b"0")
            wire.pause(0.02)

    wait = unwatched()
    wait.limit(silence=0.2)
    began = time.monotonic()
    failed = failure(transport, upstream(reply), wait=wait)
    assert failed.detail == "silent for too long"
    assert time.monotonic() - began < 1


def test_silence_ends_a_request_under_tls(transport, upstream, trusted):
    wait = unwatched()
    response = begin(transport, upstream(events([b"x"], then="hang"), tls=loopback_tls()), wait=wait)
    wait.limit(silence=0.1)
    with pytest.raises(TransportError) as failed:
        list(response.pieces())
    assert failed.value.fault is Fault.TIMEOUT
    response.close()


def test_a_tls_server_that_is_silent_after_the_handshake_ends_in_time(transport, upstream, trusted):
    """TLS 1.3 sends session tickets then: the socket is readable and has no data."""
    wait = unwatched()
    wait.limit(total=0.2)
    began = time.monotonic()
    failed = failure(transport, upstream(hang(), tls=loopback_tls()), wait=wait)
    assert failed.detail == "no answer in time"
    assert time.monotonic() - began < 1


# --------------------------------------------------------------------------------------------- failures

BAD = {
    "closed": (close_now(), Fault.BROKEN, "closed without an answer"),
    "reset": (reset_now(), Fault.BROKEN, "connection reset by peer"),
    "not_http": (raw(b"SSH-2.0-OpenSSH\r\n"), Fault.BROKEN, None),
    "half_a_head": (raw(b"HTTP/1.1 200 OK\r\nconte"), Fault.BROKEN, None),
    "cut_by_length": (whole(200, MESSAGE, then="cut", cut_at=9), Fault.BROKEN, "the answer was cut short"),
    "cut_between_chunks": (events([MESSAGE], then="cut"), Fault.BROKEN, "the answer was cut short"),
    "cut_in_a_chunk": (
        events([MESSAGE], then="cut", cut_at=9, torn=True),
        Fault.BROKEN,
        "the answer was cut short",
    ),
    "reset_in_the_body": (events([b"one", 0.02], then="reset"), Fault.BROKEN, "connection reset by peer"),
    "no_chunk_size": (
        raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"),
        Fault.BROKEN,
        None,
    ),
    "not_gzip": (
        whole(200, MESSAGE, headers=[("content-encoding", "gzip")]),
        Fault.BROKEN,
        "the answer's content encoding is broken",
    ),
    "brotli": (
        whole(200, MESSAGE, headers=[("content-encoding", "br")]),
        Fault.NO_ANSWER,
        "content encoding br was not asked for",
    ),
}


@pytest.mark.parametrize(("reply", "fault", "detail"), BAD.values(), ids=BAD)
def test_a_broken_answer_is_told_plainly_and_without_an_address(transport, upstream, reply, fault, detail):
    a = upstream(reply)
    failed = failure(transport, a)
    assert (failed.fault, failed.is_stale) == (fault, False)
    assert detail in (None, failed.detail)
    nameless(failed, a.port)


def nameless(failed, port):
    said = f"{failed} {failed.detail} {failed.args}"
    assert not any(
        part in said for part in (HOST, str(port), "invalid", "http://", "0x", "object at", "Errno")
    )
    assert failed.__cause__ is None
    assert failed.detail
    assert failed.detail == failed.detail.strip()


def test_no_connection_is_told_plainly_and_without_an_address(transport, impatient, upstream):
    plain = upstream()
    tls = upstream(tls=loopback_tls())
    port = dead_port()
    with blackhole() as hole:
        failed = {
            "refused": failure(transport, f"http://{HOST}:{port}"),
            "unknown": failure(transport, "http://name.invalid"),
            "idna": failure(transport, f"http://{'a' * 70}.invalid"),
            "hanging": failure(impatient, f"http://{HOST}:{hole}"),
            "no_tls": failure(transport, plain.url.replace("http:", "https:")),
            "untrusted": failure(transport, tls),
        }
        for one in failed.values():
            assert (one.fault, one.is_stale) == (Fault.CONNECT, False)
            for number in (port, hole, plain.port, tls.port):
                nameless(one, number)
    assert failed["refused"].detail == "connection refused"
    assert failed["unknown"].detail == "the host name was not found"
    assert failed["idna"].detail == "the host name was not found"
    assert failed["hanging"].detail == "no connection in time"
    assert failed["no_tls"].detail.startswith("TLS failed: ")
    assert failed["untrusted"].detail.startswith("the certificate does not verify: ")
    assert tls.seen == []


def test_an_answer_that_comes_before_the_upload_was_read_is_understood(transport, upstream):
    def refuse(wire, request):
        whole(413, b"{}", headers=[("connection", "close")])(wire, request)
        wire.drain()

    response = begin(transport, upstream(BeforeBody(refuse)), body=LARGE)
    assert (response.status, b"".join(response.pieces())) == (413, b"{}")
    response.close()


def test_nothing_is_left_open(transport, upstream):
    replies = [reply for reply, *_ in BAD.values()]
    a = upstream(*replies, hang(), events([b"one"], then="hang"), answer())
    tls = upstream(tls=loopback_tls())
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in replies:
            failure(transport, a)
        failure(transport, tls)
        failure(transport, f"http://{HOST}:{dead_port()}")
        with Leaving() as client:
            aside = Aside(ask, transport, a, wait=client.wait)
            a.wait_for(len(replies) + 1)
            client.leave()
            aside.end()
        response = begin(transport, a)
        next(response.pieces())
        response.close()
        ask(transport, a)
        del response, aside
        transport.close()
        gc.collect()
    assert [str(one.message) for one in caught] == []


# ---------------------------------------------------------------------------------- what goes out on the wire


def test_a_request_has_the_headers_given_its_framing_and_no_other(transport, upstream):
    a = upstream()
    headers = [("anthropic-version", "2023-06-01"), ("x-latin", "\xe9"), ("accept-encoding", "identity")]
    ask(transport, a, headers=headers, path="/prefix/v1/messages?beta=true&x=a%20b+c%2F")
    assert (a.seen[0].method, a.seen[0].target) == (
        "POST",
        "/prefix/v1/messages?beta=true&x=a%20b+c%2F",
    )
    assert sorted((name.lower(), value) for name, value in a.seen[0].headers) == sorted(
        [*headers, ("host", f"{HOST}:{a.port}"), ("content-length", str(len(BODY)))]
    )
    assert a.seen[0].body == BODY


def test_the_caller_s_user_agent_goes_out(transport, upstream):
    a = upstream()
    ask(transport, a, headers=[("user-agent", "claude-cli/2.1")])
    assert a.seen[0].every("user-agent") == ["claude-cli/2.1"]


def test_cookies_are_not_kept(transport, upstream):
    jar = [("set-cookie", "session=1; Path=/"), ("set-cookie2", "a=b")]
    redirect = whole(302, b"", headers=[*jar, ("location", "/x")])
    a = upstream(answer(headers=jar), error(400, headers=jar), redirect)
    for _ in range(4):
        ask(transport, a)
    assert [request.header("cookie") for request in a.seen] == [None] * 4


def test_connections_send_at_once_and_are_kept_alive_by_tcp(transport, upstream, monkeypatch):
    made = []
    monkeypatch.setattr(
        "aiproxy.transport.wait.WatchedSocket.setsockopt", lambda _, *option: made.append(option)
    )
    ask(transport, upstream())
    assert {
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    } <= set(made)


# ----------------------------------------------------------------------------- the whole proxy, on the wire

QUESTION = {"model": "claude-x", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def hostile_home(tmp_path):
    """An environment that would change every request, were it listened to."""
    home = tmp_path / "home"
    home.mkdir()
    netrc = home / ".netrc"
    netrc.write_text(f"machine {HOST} login evil password evil\ndefault login evil password evil\n")
    netrc.chmod(0o600)
    dead = f"http://{HOST}:{dead_port()}"
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"), dead)
    return {"HOME": str(home), "NETRC": str(netrc), "REQUESTS_CA_BUNDLE": "/nowhere", **proxies}


def test_only_what_should_crosses_the_proxy_each_way(upstream, serve, config_of, hostile_home):
    back = [
        ("request-id", "req_theirs"),
        ("anthropic-ratelimit-tokens-limit", "9"),
        ("x-new", "\xe9"),
        ("set-cookie", "session=1"),
        ("server", "cloudflare"),
        ("alt-svc", "h3"),
        ("keep-alive", "timeout=5"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
        ("x-aiproxy-upstream", "theirs"),
    ]
    a = upstream(default=answer(headers=back))
    b = upstream(default=answer(headers=back))
    settings = [a, {"base_url": b, "auth": "bearer", "headers": {"X-Extra": "1", "anthropic-beta": "ours"}}]
    served = serve(config_of(settings), env=hostile_home)
    asked = [
        ("Authorization", "Bearer sk-client"),
        ("X-Api-Key", "sk-client"),
        ("Proxy-Authorization", "Basic x"),
        ("Cookie", "theirs=1"),
        ("Accept-Encoding", "gzip, br, zstd"),
        ("Accept", "application/json"),
        ("User-Agent", "Anthropic/Python 2.12.0"),
        ("anthropic-version", "2026-10-21"),
        ("anthropic-beta", "one,two"),
        ("anthropic-beta", "three"),
        ("anthropic-something-new", "\xe9"),
        ("x-stainless-timeout", "NOT_GIVEN"),
        ("x-claude-code-session-id", "0000"),
        ("Origin", "http://a"),
        ("X-Forwarded-For", "1.2.3.4"),
        ("CF-Ray", "1"),
        ("Via", "1.1 a"),
        ("Forwarded", "for=a"),
        ("X-Real-IP", "1.2.3.4"),
        ("TE", "trailers"),
        ("Connection", "keep-alive, X-Mine"),
        ("X-Mine", "1"),
    ]
    with RawClient.to(served.url) as client:
        answers = []
        for _ in range(4):  # twice each, so that the first answer's cookies could come along
            client.post(QUESTION, "/v1/messages?beta=true", headers=asked)
            answers.append(client.read())
    assert [one.status for one in answers] == [200] * 4
    common = {
        "content-type": "application/json",
        "content-length": str(len(json.dumps(QUESTION))),
        "accept": "application/json",
        "accept-encoding": "identity",
        "user-agent": "Anthropic/Python 2.12.0",
        "anthropic-version": "2026-10-21",
        "anthropic-something-new": "\xe9",
        "x-stainless-timeout": "NOT_GIVEN",
        "x-claude-code-session-id": "0000",
    }
    to_a = {"host": f"{HOST}:{a.port}", "anthropic-beta": "one,two,three", "x-api-key": "sk-test-a"}
    to_b = {
        "host": f"{HOST}:{b.port}",
        "anthropic-beta": "ours",
        "authorization": "Bearer sk-test-b",
        "x-extra": "1",
    }
    assert [_flat(request.headers) for request in a.seen] == [{**common, **to_a}] * 2
    assert [_flat(request.headers) for request in b.seen] == [{**common, **to_b}] * 2
    assert [request.target for request in (*a.seen, *b.seen)] == ["/v1/messages?beta=true"] * 4
    got = _flat(answers[0].headers)
    assert {name: got[name] for name in ("request-id", "anthropic-ratelimit-tokens-limit", "x-new")} == {
        "request-id": "req_theirs",
        "anthropic-ratelimit-tokens-limit": "9",
        "x-new": "\xe9",
    }
    assert (got["x-aiproxy-upstream"], got["x-aiproxy-attempts"]) == ("a", "1")
    assert not got.keys() & {"set-cookie", "alt-svc", "x-hop"}
    assert got["server"] != "cloudflare"
    assert got["content-length"] == str(len(answers[0].body))


def _flat(headers):
    """The headers as a mapping; none may come twice."""
    names = [name.lower() for name, _ in headers]
    assert len(names) == len(set(names)), names
    return {name.lower(): value for name, value in headers}


def test_bodies_go_on_byte_for_byte_or_with_the_model_spliced(upstream, serve, config_of):
    a = upstream()
    served = serve(config_of([{"base_url": a, "model_mappings": {"alias": 'the "real" one'}}]))
    odd = ' \n{ "model" :\t"claude-x", "a":1.10,"b":1e400,"c":"\\u00e9é","a":2, "z":[ ] }\r\n'.encode()
    large = b'{"model":"claude-x","padding":"' + "\N{GRINNING FACE}".encode() * 500_000 + b'"}'
    with RawClient.to(served.url) as client:
        for body, chunked in ((odd, False), (odd, True), (large, False), (large, True)):
            client.request("POST", "/v1/messages", body, chunked=chunked)
            assert client.read().status == 200
        client.request("POST", "/v1/messages", odd.replace(b"claude-x", b"alias"))
        assert client.read().status == 200
    assert [
        request.body == body for request, body in zip(a.seen, (odd, odd, large, large), strict=False)
    ] == [True] * 4
    assert a.seen[4].body == (b'{"model":"the \\"real\\" one","a":2,"b":1e400,"c":"\\u00e9\xc3\xa9","z":[ ]}')
    for request in a.seen:
        assert request.every("content-length") == [str(len(request.body))]
        assert request.every("transfer-encoding") == []
