"""What goes out on a connection, byte for byte, and how the head of an answer is read."""

import socket
import threading

import pytest
from clients import unwatched
from fakes import HOST, LOOPBACK_CERT, answer, early_refusal, loopback_tls, message_json, raw, whole

from aiproxy.policy import Fault
from aiproxy.transport.failures import TransportError
from aiproxy.transport.session import Outgoing

MESSAGE = message_json()
BODY = b'{"model":"claude-x"}'
LARGE = b"x" * 8 * 1024 * 1024


def begin(transport, url, headers=(), body=BODY, method="POST", ca_bundle=None):
    """A response whose head has come."""
    outgoing = Outgoing(method, url, list(headers), body, ca_bundle=ca_bundle)
    return transport.send(outgoing, unwatched())


def ask(*args, **options):
    """The whole body of an answer."""
    response = begin(*args, **options)
    try:
        return b"".join(response.pieces())
    finally:
        response.close()


@pytest.fixture
def reached(monkeypatch):
    """Let every host be found at the address of this upstream."""

    def at(upstream):
        place = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (HOST, upstream.port))
        monkeypatch.setattr("aiproxy.transport.resolver.Resolver.resolve", lambda *_: [place])
        return upstream

    return at


# ------------------------------------------------------------------------------------------- what goes out


def test_the_headers_go_out_in_the_order_and_case_they_are_given_in(transport, upstream):
    a = upstream()
    headers = [("x-b", "1"), ("User-Agent", "claude-cli/2.1"), ("x-a", "\xe9")]
    ask(transport, f"{a.url}/v1/messages", [*headers, ("accept-encoding", "identity")])
    assert a.seen[0].headers == [
        ("Host", f"{HOST}:{a.port}"),
        *headers,
        ("accept-encoding", "identity"),
        ("Content-Length", str(len(BODY))),
    ]


@pytest.mark.parametrize(
    ("method", "body", "said"),
    [
        ("POST", BODY, str(len(BODY))),
        ("POST", b"", "0"),
        ("GET", b"", None),
        ("GET", BODY, str(len(BODY))),
        ("POST", LARGE[:65537], "65537"),
        ("POST", LARGE, str(len(LARGE))),
    ],
    ids=["POST", "POST of nothing", "GET", "GET with a body", "64 KB and a byte", "8 MB"],
)
def test_a_body_of_any_size_arrives_whole_and_its_length_is_said_where_one_is_expected(
    transport, upstream, method, body, said
):
    a = upstream()
    ask(transport, a.url, method=method, body=body)
    assert (a.seen[0].header("content-length"), a.seen[0].body) == (said, body)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://api.example.com", "api.example.com"),
        ("http://Api.Example.com:80", "api.example.com"),
        ("http://api.example.com.:81", "api.example.com:81"),
        ("http://api.example.com:443", "api.example.com:443"),
        ("http://[::1]", "[::1]"),
        ("http://[::1]:81", "[::1]:81"),
    ],
)
def test_the_host_is_the_url_s_with_its_port_unless_it_is_the_usual_one(
    transport, upstream, reached, url, host
):
    a = reached(upstream())
    ask(transport, f"{url}/v1/messages")
    assert a.seen[0].every("host") == [host]


def test_upstreams_that_differ_in_their_port_only_share_no_connection(transport, upstream, reached):
    a = reached(upstream())
    for port in (81, 82):
        ask(transport, f"http://api.example.com:{port}")
    assert [(request.connection, request.header("host")) for request in a.seen] == [
        (1, "api.example.com:81"),
        (2, "api.example.com:82"),
    ]


def test_what_no_request_line_can_hold_is_escaped_byte_by_byte(transport, upstream):
    a = upstream()
    ask(transport, f"{a.url}/a/../b?x=%C3&y=\xc3\xa9 \x01#not sent")
    assert a.seen[0].target == "/a/../b?x=%C3&y=%C3%A9%20%01"


@pytest.mark.parametrize(("name", "value"), [("x-a", "1\r\nx-b: 2"), ("x-a\r\nx-b", "1"), ("x-a", "\u20ac")])
def test_a_header_that_could_be_read_as_more_than_itself_is_refused(transport, upstream, name, value):
    a = upstream()
    with pytest.raises(ValueError):
        begin(transport, a.url, [(name, value)])
    assert a.seen == []


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("reused", [False, True])
def test_an_answer_is_read_though_the_upstream_broke_the_upload_off(
    transport, upstream, tmp_path, tls, reused
):
    bundle = tmp_path / "ca.pem"
    bundle.write_text(LOOPBACK_CERT)
    a = upstream(*[answer()] * reused, early_refusal(413), tls=loopback_tls() if tls else None)
    if reused:
        ask(transport, a.url, ca_bundle=str(bundle))
    response = begin(transport, a.url, body=LARGE, ca_bundle=str(bundle))
    assert response.status == 413
    assert b"error" in b"".join(response.pieces())
    response.close()


# -------------------------------------------------------------------------------------- how a head is read


def test_a_folded_header_reads_as_one_line_and_a_line_that_is_none_is_left_out(transport, upstream):
    lines = b" folded\r\nno header\r\n too\r\nx-a: 1 \r\n\t 2\r\n  3\r\ncontent-length:0\r\n\r\n"
    response = begin(transport, upstream(raw(b"HTTP/1.1 200 OK\r\n" + lines)).url)
    assert response.headers == [("x-a", "1 2 3"), ("content-length", "0")]
    response.close()


@pytest.mark.parametrize(
    "headers",
    [
        [("content-length", str(len(MESSAGE)))],  # twice
        [("connection", "keep-alive"), ("connection", "close")],
    ],
)
def test_a_connection_whose_framing_is_doubtful_or_that_ends_is_not_used_again(transport, upstream, headers):
    head = "".join(
        f"{name}: {value}\r\n" for name, value in [*headers, ("content-length", str(len(MESSAGE)))]
    )
    a = upstream(default=raw(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + MESSAGE, "keep"))
    assert [ask(transport, a.url) for _ in range(2)] == [MESSAGE] * 2
    assert a.connections == 2


def test_answers_without_a_body_leave_the_connection_as_it_is(transport, upstream):
    a = upstream(raw(b"HTTP/1.1 204 No Content\r\n\r\n", "keep"), whole(304, b""))
    assert [ask(transport, a.url) for _ in range(3)] == [b"", b"", MESSAGE]
    assert a.connections == 1


# ----------------------------------------------------------------------------------- who is asked no more


def test_connections_to_an_upstream_that_is_no_more_are_closed(upstream, transport):
    gone, stays = upstream(), upstream()
    for one in (gone, stays):
        ask(transport, one.url)
    running = begin(transport, gone.url)
    transport.keep_only([(stays.url, None, None)])
    assert b"".join(running.pieces()) == MESSAGE
    running.close()
    gone.wait_left(1)
    ask(transport, stays.url)
    assert stays.connections == 1


def test_an_upstream_that_comes_back_is_kept_again(upstream, transport):
    one = upstream()
    ask(transport, one.url)
    transport.keep_only([])
    for _ in range(3):
        ask(transport, one.url)
    assert one.connections == 2


@pytest.mark.parametrize(
    "framing", ["content-length: 5\r\n\r\nfirst", "transfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("tls", [False, True])
def test_bytes_behind_the_end_of_an_answer_never_reach_the_next_request(
    upstream, transport, tmp_path, framing, tls
):
    bundle = tmp_path / "ca.pem"
    bundle.write_text(LOOPBACK_CERT)
    forged = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged"
    first = raw(b"HTTP/1.1 200 OK\r\n" + framing.encode() + forged, "keep")
    one = upstream(first, tls=loopback_tls() if tls else None)
    assert ask(transport, one.url, ca_bundle=str(bundle)) == b"first"
    assert ask(transport, one.url, ca_bundle=str(bundle)) == MESSAGE
    assert one.connections == 2


# ------------------------------------------------------------------------------------------- how it is framed


@pytest.mark.parametrize(
    "length", ["abc", "-5", "+5", "0x10", "5, 6", "5\r\n 6", "", "9" * 5000, "2\r\ncontent-length: 3"]
)
def test_a_length_that_is_none_ends_the_call_at_once(upstream, transport, length):
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    with pytest.raises(TransportError) as failed:
        ask(transport, upstream(raw(head.encode() + MESSAGE, "hang")).url)
    assert failed.value.fault is Fault.BROKEN


def test_white_space_before_a_colon_is_no_part_of_the_name(upstream, transport):
    head = b"HTTP/1.1 200 OK\r\nContent-Type : application/json\r\nContent-Length\t: %d\r\n\r\n" % len(
        MESSAGE
    )
    response = begin(transport, upstream(raw(head + MESSAGE, "hang")).url)
    assert b"".join(response.pieces()) == MESSAGE
    assert dict(response.headers) == {"content-type": "application/json", "content-length": str(len(MESSAGE))}
    response.close()


CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk_after_chunk(gate, end):
    """One chunk of two halves, the second after the gate is opened."""

    def reply(wire, seen):
        wire.send(CHUNKED + b"a\r\nfirst")
        wire.pause(gate)
        wire.send(end)

    return reply


def test_what_is_there_of_a_chunk_goes_on_before_the_rest_is_there(upstream, transport):
    gate = threading.Event()
    response = begin(transport, upstream(chunk_after_chunk(gate, b"other\r\n0\r\n\r\n")).url)
    pieces = response.pieces()
    assert next(pieces) == b"first"
    gate.set()
    assert list(pieces) == [b"other"]
    response.close()


@pytest.mark.parametrize("rest", [b"", b"oth", b"other\r\n0"])
def test_what_came_of_a_chunked_body_that_is_cut_short_is_not_lost(upstream, transport, rest):
    gate = threading.Event()
    gate.set()

    def reply(wire, seen):
        chunk_after_chunk(gate, rest)(wire, seen)
        wire.close()

    response = begin(transport, upstream(reply).url)
    got = b""
    with pytest.raises(TransportError) as failed:
        for piece in response.pieces():
            got += piece
    assert (failed.value.fault, got) == (Fault.BROKEN, (b"first" + rest)[:10])
    response.close()


@pytest.mark.parametrize("end", [b"0\r\n\r\n", b"0\n\n", b"0\r\n\n", b"000;x=y\r\nx-trailer: 1\r\n\r\n"])
def test_each_usual_end_of_a_chunked_body_ends_it_and_keeps_the_connection(upstream, transport, end):
    one = upstream(raw(CHUNKED + b"5;ext=1\r\nfirst\r\n" + end, "keep"))
    assert ask(transport, one.url) == b"first"
    ask(transport, one.url)
    assert one.connections == 1


@pytest.mark.parametrize("size", [b"", b"x", b"-1", b"+5", b"0x5", b"5 5", b"1" * 17])
def test_what_is_no_chunk_ends_the_call(upstream, transport, size):
    with pytest.raises(TransportError):
        ask(transport, upstream(raw(CHUNKED + size + b"\r\nfirst\r\n0\r\n\r\n", "hang")).url)


@pytest.mark.parametrize("coding", ["br", "x"])
def test_an_error_in_a_coding_nobody_asked_for_is_still_that_error(upstream, transport, coding):
    response = begin(transport, upstream(whole(429, b"?", headers=[("content-encoding", coding)])).url)
    assert (response.status, b"".join(response.pieces())) == (429, b"?")
    response.close()
