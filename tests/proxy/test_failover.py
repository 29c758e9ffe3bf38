"""Every row of the failover policy, against upstreams on real sockets that break each rule of HTTP.

The application runs in process and is spoken to as WSGI, since no row depends on the client's wire. Each
breaker is a `Recorded` one: it keeps what every attempt was settled as, and complains about a permit that
is settled twice or never.
"""

import gzip
import itertools
import json
import socket
import threading
import time
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from fakes import (
    HOST,
    BeforeBody,
    Clock,
    answer,
    blackhole,
    close_if_reused,
    close_now,
    dead_port,
    early_refusal,
    error,
    error_event,
    events,
    gzipped,
    hang,
    head_only,
    later,
    loopback_tls,
    message_events,
    message_json,
    raw,
    refuse_after_head,
    reset_now,
    stalled_upload,
    trickle,
    whole,
)
from in_process import MB, MESSAGE, QUESTION, Proxy


@pytest.fixture
def proxy():
    made = []

    def make(*upstreams, **settings):
        made.append(Proxy(*upstreams, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def clock():
    return Clock(5000.0)


def seen(*upstreams):
    return [len(one.seen) for one in upstreams]


# ---------------------------------------------------------------- what is no answer: the next one, counted

START, PING, BLOCK = message_events()[:3]
REDIRECT = [("location", "http://127.0.0.1:1/v1/messages")]
NEVER_ENDS = [("content-length", "1000000")]


def sent(data):
    return raw(b"HTTP/1.1 " + data)


ANY_REQUEST = {
    "closed_without_a_byte": close_now(),
    "reset_without_a_byte": reset_now(),
    "closed_before_the_body_was_read": refuse_after_head(),
    "died_in_the_status_line": sent(b"20"),
    "died_in_the_head": sent(b"200 OK\r\ncontent-type: appl"),
    "died_after_the_head": head_only(content_type="application/json"),
    "died_after_the_head_of_a_stream": head_only(),
    "not_http": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "status_99": sent(b"099 Odd\r\ncontent-length: 0\r\n\r\n"),
    "a_header_of_100_kb": sent(b"200 OK\r\nx-a: " + b"a" * 100_000 + b"\r\n\r\n"),
    "a_thousand_headers": sent(b"200 OK\r\n" + b"x-a: 1\r\n" * 1000 + b"\r\n"),
    "a_length_that_is_no_number": sent(
        b"200 OK\r\ncontent-type: application/json\r\ncontent-length: x\r\n\r\n"
    ),
    "a_chunk_size_that_is_no_number": sent(
        b"200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}"
    ),
    "html": whole(200, b"<h1>It works!</h1>", content_type="text/html"),
    "no_content_type": whole(200, MESSAGE, headers=[("content-type", None)]),
    "an_unknown_content_type": whole(200, MESSAGE, content_type="application/x-ndjson"),
    "no_content": sent(b"204 No Content\r\n\r\n"),
    "empty_json": whole(200, b""),
    "empty_events": events([]),
    "empty_html_by_close": events([], framing="close", content_type="text/html"),
    "created_html": whole(201, b"<p>", content_type="text/html"),
    "a_content_encoding_nobody_asked_for": whole(200, MESSAGE, headers=[("content-encoding", "br")]),
    "gzip_that_is_none": whole(200, MESSAGE, headers=[("content-encoding", "gzip")]),
    "gzip_events_that_are_none": events([START, BLOCK], headers=[("content-encoding", "gzip")]),
    "redirect_301": whole(301, b"", headers=REDIRECT),
    "redirect_302": whole(302, b"<a>", headers=REDIRECT, content_type="text/html"),
    "redirect_303": whole(303, MESSAGE, headers=REDIRECT),
    "redirect_307": whole(307, b"", headers=REDIRECT),
    "redirect_308": whole(308, b"", headers=[("location", "/v1/messages")]),
    "redirect_to_nowhere": whole(302, b"", headers=[("location", "http://[/")]),
    "redirect_to_another_scheme": whole(302, b"", headers=[("location", "ftp://a/b")]),
    "redirect_with_cookies": whole(302, b"", headers=[*REDIRECT, ("set-cookie", "a=b")]),
    "redirect_without_location": whole(302, b""),
    "not_modified": whole(304, b""),
    "multiple_choices": whole(300, MESSAGE),
    "early_hints_and_then_nothing": sent(b"103 Early Hints\r\nlink: </a>\r\n\r\n"),
    "switching_protocols": sent(b"101 Switching Protocols\r\nupgrade: h2c\r\n\r\n"),
}
WHOLE = {
    "cut_short_by_length": whole(200, MESSAGE, then="cut", cut_at=40),
    "cut_short_by_length_with_a_reset": whole(200, MESSAGE, then="reset", cut_at=40),
    "cut_short_of_one_byte": whole(200, MESSAGE + b" ", then="cut", cut_at=len(MESSAGE)),
    "cut_short_between_chunks": whole(200, MESSAGE, framing="chunked", then="cut"),
    "cut_short_in_a_chunk": events(
        [MESSAGE], then="cut", cut_at=40, torn=True, content_type="application/json"
    ),
    "cut_short_by_close": whole(200, MESSAGE, framing="close", then="cut", cut_at=40),
    "a_list": whole(200, b"[" + MESSAGE + b"]"),
    "a_string": whole(200, b'"ok"'),
    "null": whole(200, b"null"),
    "not_json": whole(200, b"upstream connect error"),
    "json_and_more": whole(200, MESSAGE + MESSAGE),
    "nested_too_deeply": whole(200, b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "events_unasked": events(message_events()),
    "an_error_in_a_200": whole(200, b'{"type":"error","error":{"type":"api_error","message":"x"}}'),
    "an_error_of_no_known_type_in_a_200": whole(200, b'{"type":"error","error":{"type":"new_error"}}'),
    "an_error_without_a_type": whole(200, b'{"error":"out of order"}'),
    "an_openai_error": whole(200, b'{"error":{"message":"x","code":500}}'),
    "an_error_spelt_with_escapes": whole(200, b'{"type":"\\u0065rror"}'),
    "gzip_cut_short": whole(
        200,
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03\xab\x56",
        headers=[("content-encoding", "gzip")],
    ),
}
STREAM = {
    "died_after_message_start": events([START], then="cut"),
    "died_after_message_start_by_length": events([START], framing="length", then="cut"),
    "died_after_message_start_by_close": events([START], framing="close"),
    "reset_after_message_start_and_a_ping": events([START, PING], then="reset"),
    "died_in_the_first_content": events([START, BLOCK], then="cut", cut_at=20),
    "died_in_a_chunk_of_the_first_content": events([START, BLOCK], then="cut", cut_at=20, torn=True),
    "ended_after_message_start": events([START]),
    "ended_after_message_start_and_a_ping": events([START, PING]),
    "ended_in_the_first_content": events([START, BLOCK[:-1]]),
    "only_comments": events([b": hello\n\n", b": again\n\n"]),
    "an_error_event_at_once": events([error_event("api_error")]),
    "an_error_event_after_message_start": events([START, PING, error_event("api_error")]),
    "an_error_event_of_no_known_type": events([START, error_event("new_error")]),
    "an_error_event_that_is_no_json": events([b"event: error\ndata: oops\n\n"]),
    "an_error_event_with_carriage_returns": events([error_event("api_error").replace(b"\n", b"\r\n")]),
    "json_though_a_stream_was_asked_for": whole(200, MESSAGE),
    "a_json_error_in_a_200": whole(200, b'{"type":"error","error":{"type":"api_error"}}'),
    "json_that_breaks_off": whole(200, MESSAGE, then="cut", cut_at=20),
}
OTHER = message_json("another")
CASES = [
    *(pytest.param(False, reply, id=name) for name, reply in {**ANY_REQUEST, **WHOLE}.items()),
    *(pytest.param(True, reply, id=f"stream-{name}") for name, reply in {**ANY_REQUEST, **STREAM}.items()),
]


@pytest.mark.parametrize(("stream", "reply"), CASES)
def test_what_is_no_answer_counts_and_the_next_upstream_answers(upstream, proxy, stream, reply):
    a, b = upstream(reply, default=answer("a")), upstream()
    one = proxy(a, b)
    given = one.ask(stream)
    assert (given.status, given.upstream, given.attempts, given.ending) == (200, "b", 2, "end")
    assert given.body == (b"".join(message_events(["ok"])) if stream else MESSAGE)
    assert seen(a, b) == [1, 1]
    assert one.outcomes() == [["failure"], ["success"]]


@pytest.mark.parametrize(
    ("status", "stream"),
    [*((status, False) for status in (401, 402, 408, 500, 502, 503, 504, 599, 999)), (500, True)],
)
def test_a_status_of_the_upstream_s_own_counts_and_the_next_one_answers(upstream, proxy, status, stream):
    a, b = upstream(error(status)), upstream()
    one = proxy(a, b)
    given = one.ask(stream)
    assert (given.status, given.upstream, given.attempts) == (200, "b", 2)
    assert one.outcomes() == [["failure"], ["success"]]


HALF_HEADS = [b"", b"\r\ncontent-ty", b"\r\ncontent-length: 0\r\n"]


@pytest.mark.parametrize("rest", HALF_HEADS)
@pytest.mark.parametrize("status", [b"200 OK", b"400 Bad Request", b"529 Overloaded"])
def test_half_a_head_is_no_answer_whatever_its_status(upstream, proxy, status, rest):
    a, b = upstream(sent(status + rest), default=sent(status + rest)), upstream()
    one = proxy(a, b)
    assert one.ask().upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]
    assert proxy(a).ask().status == 502


def test_a_redirect_s_body_is_not_waited_for(upstream, proxy):
    a, b = upstream(whole(302, b"", headers=[*REDIRECT, *NEVER_ENDS], then="hang")), upstream()
    began = time.monotonic()
    assert proxy(a, b).ask().upstream == "b"
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("status", [408, 500, 502, 503, 599])
def test_a_status_of_the_upstream_s_own_counts_though_no_other_answers(upstream, proxy, status):
    one = proxy(upstream(error(status)))
    assert one.ask().status == status
    assert one.outcomes() == [["failure"]]


def test_a_redirect_is_not_followed(upstream, proxy):
    elsewhere = upstream()
    a = upstream(whole(307, b"", headers=[("location", f"{elsewhere.url}/v1/messages")]))
    one = proxy(a)
    assert one.ask().status == 502
    assert seen(a, elsewhere) == [1, 0]
    assert one.outcomes() == [["failure"]]


@pytest.mark.parametrize("status", [100, 102, 103, 199])
@pytest.mark.parametrize("times", [1, 10])
def test_interim_answers_are_skipped(upstream, proxy, status, times):
    interim = b"HTTP/1.1 %d Interim\r\nlink: </a>\r\n\r\n" % status
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    a = upstream(raw(interim * times + head % len(OTHER) + OTHER, "keep"))
    one = proxy(a)
    assert (one.ask().body, one.ask().body) == (OTHER, MESSAGE)
    assert a.connections == 1


def test_interim_answers_without_end_are_a_failure(upstream, proxy):
    a, b = upstream(raw(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 11, "keep")), upstream()
    assert proxy(a, b).ask().upstream == "b"


@pytest.mark.parametrize(("size", "answers"), [(31, "a"), (33, "b")])
def test_a_head_of_more_than_32_kb_is_a_failure(upstream, proxy, size, answers):
    fields = [(f"x-{n}", "v" * 1000) for n in range(size)]
    a, b = upstream(whole(200, MESSAGE, headers=fields)), upstream()
    assert proxy(a, b).ask().upstream == answers


def test_what_an_upstream_sends_after_its_answer_is_not_the_next_one_s(upstream, proxy):
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    first, surplus = head % len(MESSAGE) + MESSAGE, head % 16 + b'{"id":"another"}'
    a = upstream(raw(first + surplus * 200, "keep"), default=answer("mine"))
    one = proxy(a)
    assert one.ask().body == MESSAGE
    assert one.ask().json()["content"][0]["text"] == "mine"


# -------------------------------------------------------------------------------- no connection at all


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("url", ["http://name.invalid", "https://name.invalid:8443/prefix", "http://refused"])
def test_no_connection_counts_and_the_next_upstream_answers(upstream, proxy, url, stream):
    b = upstream()
    one = proxy(url.replace("http://refused", f"http://{HOST}:{dead_port()}"), b, connect=1.0)
    given = one.ask(stream)
    assert (given.status, given.upstream, given.attempts) == (200, "b", 2)
    assert one.outcomes() == [["failure"], ["success"]]


def test_a_connection_that_does_not_come_about_in_time_counts(upstream, proxy):
    b = upstream()
    with blackhole() as port:
        one = proxy(f"http://{HOST}:{port}", b, connect=0.15)
        began = time.monotonic()
        assert one.ask().upstream == "b"
        assert 0.15 <= time.monotonic() - began < 3
    assert one.outcomes() == [["failure"], ["success"]]


def test_tls_to_a_port_that_speaks_none_counts(upstream, proxy):
    a, b = upstream(), upstream()
    one = proxy(a.url.replace("http:", "https:"), b)
    assert one.ask().upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]


def test_a_certificate_that_does_not_verify_counts_and_gets_no_request(upstream, proxy):
    a, b = upstream(tls=loopback_tls()), upstream()
    one = proxy(a, b)
    assert one.ask().upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]
    assert seen(a) == [0]


def test_tls_that_never_shakes_hands_ends_at_the_connect_timeout(upstream, proxy):
    b = upstream()
    with socket.create_server((HOST, 0)) as silent:
        one = proxy(f"https://{HOST}:{silent.getsockname()[1]}", b, connect=0.15)
        began = time.monotonic()
        assert one.ask().upstream == "b"
        assert 0.15 <= time.monotonic() - began < 3
    assert one.outcomes() == [["failure"], ["success"]]


# ------------------------------------------------------------------------ a reused connection that is dead


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dies", [close_now(), reset_now()])
def test_a_stale_connection_costs_nothing(upstream, proxy, dies, stream):
    a, b = upstream(answer(), dies), upstream()
    one = proxy({"base_url": a, "weight": 9}, b)
    one.ask()
    given = one.ask(stream)
    assert (given.status, given.upstream, given.attempts) == (200, "a", 1)
    assert [request.connection for request in a.seen] == [1, 1, 2]
    assert one.outcomes() == [["success", "success"], []]


@pytest.mark.parametrize("size", [10, 4 * MB])
def test_a_connection_that_goes_stale_during_the_upload_costs_nothing(upstream, proxy, size):
    question = json.dumps({**QUESTION, "padding": "x" * size}).encode()
    a = upstream(answer(), refuse_after_head())
    one = proxy(a)
    one.ask()
    assert one.ask(question=question).status == 200
    assert a.seen[-1].body == question
    assert one.outcomes() == [["success", "success"]]


@pytest.mark.parametrize("dies", [close_now(), reset_now(), sent(b"20")])
def test_the_fresh_connection_that_fails_too_is_counted_once(upstream, proxy, dies):
    a, b = upstream(answer(), close_now(), dies), upstream()
    one = proxy({"base_url": a, "weight": 9}, b)
    one.ask()
    given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (200, "b", 2)
    assert [request.connection for request in a.seen] == [1, 1, 2]
    assert one.outcomes() == [["success", "failure"], ["success"]]


def test_a_fresh_connection_that_dies_is_not_tried_again(upstream, proxy):
    a, b = upstream(close_now()), upstream()
    one = proxy(a, b)
    assert one.ask().upstream == "b"
    assert seen(a) == [1]


@pytest.mark.parametrize("byte", [b"H", b"HTTP/1.1 200 OK\r\n"])
def test_a_reused_connection_that_breaks_after_a_byte_is_not_stale(upstream, proxy, byte):
    a, b = upstream(answer(), raw(byte)), upstream()
    one = proxy({"base_url": a, "weight": 9}, b)
    one.ask()
    assert one.ask().upstream == "b"
    assert seen(a) == [2]
    assert one.outcomes() == [["success", "failure"], ["success"]]


def test_a_reused_connection_that_breaks_after_seconds_of_silence_is_not_stale(upstream, proxy, monkeypatch):
    monkeypatch.setattr("aiproxy.transport.session.DEAD_WITHIN", 0.2)

    def breaks_late(wire, request):
        time.sleep(0.4)
        wire.close()

    one = proxy(upstream(answer(), breaks_late))
    assert one.ask().status == 200
    assert one.ask().status == 502
    assert one.outcomes() == [["success", "failure"]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_reused_connection_that_is_silent_is_not_stale(upstream, proxy, stream):
    a, b = upstream(answer(), hang()), upstream()
    one = proxy({"base_url": a, "weight": 9}, b, first_byte=0.3, answer=0.3)
    one.ask()
    assert one.ask(stream).upstream == "b"
    assert seen(a) == [2]
    assert one.outcomes() == [["success", "failure"], ["success"]]


def test_the_fresh_connection_has_only_what_is_left_of_the_time(upstream, proxy):
    asked = []

    def silent(wire, request):
        asked.append(time.monotonic())
        wire.hang()

    a = upstream(answer(), later(0.3, close_now()), silent)
    one = proxy(a, answer=0.6)
    one.ask()
    assert one.ask().status == 504
    assert a.wait_left(2) - asked[0] < 0.5


def test_an_upstream_that_closes_after_every_answer_is_never_charged(upstream, proxy):
    closing = close_if_reused()
    a = upstream(default=closing)
    one = proxy(a)
    assert [one.ask().status for _ in range(6)] == [200] * 6
    assert closing.closed > 0
    assert one.outcomes() == [["success"] * 6]


def test_a_connection_that_the_upstream_closed_idle_is_not_used(upstream, proxy):
    gone = threading.Event()

    def reply(wire, request):
        answer()(wire, request)
        wire.close()
        gone.set()

    a = upstream(reply)
    one = proxy(a)
    one.ask()
    assert gone.wait(5)
    one.ask()
    assert [request.connection for request in a.seen] == [1, 2]


# ------------------------------------------------------------------------------------------- timeouts

TRICKLED_HEAD = b"HTTP/1.1 200 OK\r\n" + b"".join(b"x-%d: y\r\n" % n for n in range(200))
SILENT_WHOLE = {
    "hang": hang(),
    "stalled_upload": stalled_upload(),
    "head_only": head_only(content_type="application/json", then="hang"),
    "trickled_head": trickle(TRICKLED_HEAD, 0.01, content_type=None),
    "trickled_body": trickle(MESSAGE * 9, 0.01, content_type="application/json"),
    "half_a_body": whole(200, MESSAGE, then="hang", cut_at=20),
    "half_a_body_by_close": whole(200, MESSAGE, framing="close", then="hang", cut_at=20),
    "a_body_that_never_closes": events(
        [MESSAGE], framing="close", then="hang", content_type="application/json"
    ),
    "a_body_whose_last_chunk_is_missing": whole(200, MESSAGE, framing="chunked", then="hang"),
}
SILENT_STREAM = {
    "hang": hang(),
    "head_only": head_only(then="hang"),
    "trickled_head": trickle(TRICKLED_HEAD, 0.01, content_type=None),
    "trickled_start": trickle(START * 9, 0.01),
    "half_an_event": events([START, BLOCK], cut_at=20, then="hang"),
    "trickled_content": events([START, *(BLOCK[n : n + 1] for n in range(len(BLOCK)))], gap=0.01),
    "start_then_silence": events([START, PING], then="hang"),
    "start_then_silence_by_close": events([START, PING], framing="close", then="hang"),
    "start_then_silence_by_length": events([START, PING], framing="length", then="hang"),
}
SILENT = [
    *(pytest.param(False, reply, id=name) for name, reply in SILENT_WHOLE.items()),
    *(pytest.param(True, reply, id=f"stream-{name}") for name, reply in SILENT_STREAM.items()),
]


@pytest.mark.parametrize(("stream", "reply"), SILENT)
def test_waiting_past_a_timeout_ends_the_attempt_and_counts(upstream, proxy, stream, reply):
    a = upstream(reply)
    one = proxy(a, **{"first_byte" if stream else "answer": 0.1})
    began = time.monotonic()
    given = one.ask(stream, question={**QUESTION, "padding": "x" * 100_000})
    assert 0.1 <= time.monotonic() - began < 3
    assert (given.status, given.json()["error"]["type"]) == (504, "timeout_error")
    assert one.outcomes() == [["failure"]]
    a.wait_left()


@pytest.mark.parametrize("sign", [PING, b": wait\n\n", b": wait\n", START])
def test_signs_of_life_renew_the_silence_limit_and_commit_nothing(upstream, proxy, sign):
    a, b = upstream(events([START, *[0.2, sign] * 4], then="cut")), upstream()
    one = proxy(a, b, first_byte=0.35)
    assert one.ask(stream=True).upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]


@pytest.mark.parametrize("sign", [PING, b": wait\n\n"])
def test_a_sign_of_life_long_after_sending_commits(upstream, proxy, monkeypatch, sign):
    monkeypatch.setattr("aiproxy.proxy.attempt.PATIENCE", 0.2)
    gate = threading.Event()
    a, b = upstream(events([START, sign, 0.3, sign, gate], then="cut")), upstream()
    given = proxy(a, b).begin(stream=True)
    assert given.upstream == "a"
    gate.set()
    assert given.read().body.startswith(START + sign + sign)


def test_a_late_message_start_alone_commits_nothing(upstream, proxy, monkeypatch):
    monkeypatch.setattr("aiproxy.proxy.attempt.PATIENCE", 0.1)
    a = upstream(events([0.2, START, error_event("overloaded_error")]))
    assert proxy({"base_url": a, "weight": 9}, upstream()).ask(stream=True).upstream == "b"


@pytest.mark.parametrize("stream", [False, True])
def test_the_head_of_a_wrong_content_type_decides_and_its_body_is_not_awaited(
    upstream, proxy, monkeypatch, stream
):
    monkeypatch.setattr("aiproxy.proxy.attempt.ERROR_BODY_SECONDS", 0.1)
    one = proxy(
        {"base_url": upstream(head_only(content_type="text/html", then="hang")), "weight": 9}, upstream()
    )
    began = time.monotonic()
    assert one.ask(stream).upstream == "b"
    assert time.monotonic() - began < 1
    assert one.outcomes() == [["failure"], ["success"]]


def test_an_error_and_a_stop_in_one_piece_are_an_error(upstream, proxy):
    last = error_event("overloaded_error") + b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    given = proxy(upstream(events([*message_events(["one "])[:4], last]))).ask(stream=True)
    assert given.ending == "cut"


@pytest.mark.parametrize("stream", [False, True])
def test_after_a_timeout_the_next_upstream_answers(upstream, proxy, stream):
    a, b = upstream(head_only(then="hang")), upstream()
    one = proxy(a, b, first_byte=0.25, answer=0.25)
    given = one.ask(stream)
    assert (given.status, given.upstream, given.attempts) == (200, "b", 2)
    assert one.outcomes() == [["failure"], ["success"]]


def test_a_whole_answer_is_not_bounded_by_first_byte(upstream, proxy):
    assert proxy(upstream(default=later(0.2, answer())), first_byte=0.1).ask().status == 200


def test_a_stream_is_bounded_by_answer_up_to_its_commit_point_and_no_longer(upstream, proxy):
    assert proxy(upstream(default=later(0.3, answer())), answer=0.1).ask(stream=True).status == 504
    slow = events(message_events([f"word {n} " for n in range(9)]), gap=0.05)
    assert proxy(upstream(slow), answer=0.2).ask(stream=True).ending == "end"


def test_an_upload_that_the_upstream_does_not_read_ends_at_the_timeout(upstream, proxy):
    one = proxy(upstream(stalled_upload()), answer=0.15)
    question = json.dumps({**QUESTION, "padding": "x" * 16 * MB}).encode()
    began = time.monotonic()
    assert one.ask(question=question).status == 504
    assert time.monotonic() - began < 3
    assert one.outcomes() == [["failure"]]


def test_the_connect_timeout_does_not_bound_the_upload(upstream, proxy):
    def reads_late(wire, request):
        wire.pause(0.3)
        whole(200, MESSAGE, headers=[("connection", "close")])(wire, request)
        wire.drain()

    one = proxy(upstream(BeforeBody(reads_late)), connect=0.2)
    assert one.ask(question={**QUESTION, "padding": "x" * 16 * MB}).status == 200
    assert one.outcomes() == [["success"]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_timeout_ends_the_request(upstream, proxy, stream):
    a, b, c = upstream(hang()), upstream(hang()), upstream()
    one = proxy(a, b, c, first_byte=0.1, answer=0.1)
    given = one.ask(stream)
    assert (given.status, given.attempts, given.upstream) == (504, 2, None)
    assert given.json()["error"]["type"] == "timeout_error"
    assert seen(a, b, c) == [1, 1, 0]
    assert one.outcomes() == [["failure"], ["failure"], []]


def test_another_failure_between_two_timeouts_changes_nothing(upstream, proxy):
    a, b, c, d = upstream(hang()), upstream(close_now()), upstream(hang()), upstream()
    given = proxy(a, b, c, d, answer=0.2).ask()
    assert (given.status, given.attempts) == (504, 3)
    assert seen(d) == [0]


def test_connect_timeouts_do_not_count_as_timeouts(upstream, proxy):
    hanging, b = upstream(hang()), upstream()
    with blackhole() as port:
        dead = f"http://{HOST}:{port}"
        one = proxy(dead, dead, dead, hanging, b, connect=0.12, answer=0.3)
        given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (200, "e", 5)


def test_after_connect_timeouts_alone_the_client_gets_a_502(proxy):
    with blackhole() as port:
        given = proxy(f"http://{HOST}:{port}", connect=0.08).ask()
    assert (given.status, given.json()["error"]["type"]) == (502, "api_error")


# -------------------------------------------------------------------------------------- errors of requests

REFUSALS = [*((status, False) for status in (400, 403, 404, 405, 409, 413, 415, 422, 451, 499)), (400, True)]


@pytest.mark.parametrize(("status", "stream"), REFUSALS)
def test_a_refused_request_is_tried_elsewhere_and_costs_nothing(upstream, proxy, status, stream):
    a, b = upstream(error(status)), upstream()
    one = proxy(a, b)
    given = one.ask(stream)
    assert (given.status, given.upstream, given.attempts) == (200, "b", 2)
    assert one.outcomes() == [["ignored"], ["success"]]


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_no_client_can_close_an_upstream_for_others(upstream, proxy, clock, status):
    a, b = upstream(*[error(status)] * 50), upstream()
    one = proxy({"base_url": a, "weight": 999}, b, clock=clock)
    assert [one.ask().upstream for _ in range(50)] == ["b"] * 50
    assert seen(a) == [50]
    assert one.ask().upstream == "a"


def test_an_upstream_that_refuses_everything_for_a_minute_backs_off_for_a_minute(upstream, proxy, clock):
    a, b = upstream(*[error(400)] * 22), upstream()
    one = proxy({"base_url": a, "weight": 999}, b, clock=clock)
    for _ in range(20):
        assert one.ask().upstream == "b"
        clock.now += 3.2
    assert one.ask().upstream == "b"
    assert seen(a) == [20]
    clock.now += 60
    assert one.ask().upstream == "b"  # one refusal more, and it is in backoff again
    assert one.ask().upstream == "b"
    assert seen(a) == [21]


def test_the_refusals_of_such_an_upstream_rank_last(upstream, proxy, clock):
    a, b = upstream(*[error(400)] * 30), upstream(*[answer()] * 20, error(404))
    one = proxy({"base_url": a, "weight": 999}, b, clock=clock)
    for _ in range(20):
        one.ask()
        clock.now += 3.2
    given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (404, "b", 2)


@pytest.mark.parametrize(("status", "stream"), REFUSALS)
def test_a_request_that_all_refuse_costs_nobody_anything(upstream, proxy, status, stream):
    a, b = upstream(error(status, message="from a")), upstream(error(status, message="from b"))
    one = proxy(a, b)
    given = one.ask(stream)
    assert (given.status, given.upstream, given.attempts) == (status, "b", 2)
    assert given.json()["error"]["message"] == "from b"
    assert one.outcomes() == [["ignored"], ["ignored"]]


@pytest.mark.parametrize("words", ["bound to a different conversation", "prefix mismatch"])
def test_a_thinking_block_of_another_conversation_reaches_the_client_at_once(upstream, proxy, words):
    a, b = upstream(error(400, message=f"messages.1: thinking block: {words}")), upstream()
    one = proxy(a, b)
    given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (400, "a", 1)
    assert one.outcomes() == [["ignored"], []]


def test_a_refusal_before_the_body_was_read_is_understood(upstream, proxy):
    question = json.dumps({**QUESTION, "padding": "x" * 4 * MB}).encode()
    given = proxy(upstream(early_refusal(413, drain=True))).ask(question=question)
    assert (given.status, given.json()["error"]["type"]) == (413, "request_too_large")


# ------------------------------------------------------------- errors inside answers that say 200

ERROR_TYPES = [
    ("invalid_request_error", 400),
    ("authentication_error", 401),
    ("billing_error", 402),
    ("permission_error", 403),
    ("not_found_error", 404),
    ("conflict_error", 409),
    ("request_too_large", 413),
    ("rate_limit_error", 429),
    ("api_error", 500),
    ("timeout_error", 504),
    ("overloaded_error", 529),
    ("an_error_of_tomorrow", 500),
]


@pytest.mark.parametrize(("type_", "status"), ERROR_TYPES)
def test_an_error_in_a_200_counts_as_the_status_of_its_type(upstream, proxy, type_, status):
    body = json.dumps({"type": "error", "error": {"type": type_, "message": "no"}}).encode()
    one = proxy(upstream(whole(200, body, headers=[("request-id", "req_theirs")])))
    given = one.ask()
    if status in (401, 402):
        assert given.status == 502
    else:
        assert (given.status, given.body) == (status, body)
        assert given.header("request-id") == "req_theirs"
    assert one.outcomes() == [["failure" if status in (401, 402, 500, 504) else "ignored"]]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("type_", "status"), ERROR_TYPES)
def test_a_first_error_event_counts_as_the_status_of_its_type(upstream, proxy, type_, status, named):
    data = json.dumps({"type": "error", "error": {"type": type_, "message": "no"}}).encode()
    event = (b"event: error\n" if named else b"") + b"data: " + data + b"\n\n"
    one = proxy(upstream(events([START, event], headers=[("request-id", "req_theirs")])))
    given = one.ask(stream=True)
    if status in (401, 402):
        assert given.status == 502
    else:
        assert (given.status, given.body, given.ending) == (status, data, "end")
        assert given.header("request-id") == "req_theirs"
    assert given.header("content-type") == "application/json"
    assert one.outcomes() == [["failure" if status in (401, 402, 500, 504) else "ignored"]]


def test_events_without_event_lines_are_no_answer(upstream, proxy):
    nameless = b"".join(message_events()).replace(b"event: ", b"x: ")
    one = proxy(upstream(events([nameless])), upstream())
    assert one.ask(stream=True).upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]


@pytest.mark.parametrize(
    "body", [b'{"success":false,"message":"no"}', b'{"object":"error","message":"no"}', b'{"id":"x"}', b"{}"]
)
def test_an_object_of_another_shape_is_no_answer(upstream, proxy, body):
    one = proxy(upstream(whole(200, body)), upstream())
    assert one.ask().upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]


def test_a_json_error_in_place_of_a_stream_is_told_as_the_status_of_its_type(upstream, proxy):
    given = proxy(upstream(whole(200, b'{"error":{"type":"overloaded_error"}}'))).ask(stream=True)
    assert (given.status, given.body) == (529, b'{"error":{"type":"overloaded_error"}}')


@pytest.mark.parametrize("extra", [b'"error":null', b'"content":["error"]'])
def test_an_answer_is_not_taken_for_an_error_without_cause(upstream, proxy, extra):
    body = b'{"type":"message",' + extra + b"}"
    given = proxy(upstream(whole(200, body))).ask()
    assert (given.status, given.body) == (200, body)


# --------------------------------------------------------------------------------------- retry-after


OTHER_MODEL = {**QUESTION, "model": "claude-y"}


@pytest.mark.parametrize("status", [429, 529])
def test_a_limit_that_says_when_to_come_back_is_a_backoff_of_the_model(upstream, proxy, clock, status):
    a, b = upstream(error(status, headers=[("retry-after", "20")])), upstream()
    one = proxy({"base_url": a, "weight": 9}, b, clock=clock, failures=1)
    assert one.ask().upstream == "b"
    assert one.outcomes("a") == [["ignored"]]
    assert one.ask(question=OTHER_MODEL).upstream == "a"
    clock.now += 19.9
    assert one.ask().upstream == "b"
    clock.now += 0.1
    assert one.ask().upstream == "a"
    assert one.breakers["a"].kinds == ["ordinary"] * 3


def test_a_503_that_says_when_to_come_back_is_a_backoff_of_the_upstream(upstream, proxy, clock):
    a, b = upstream(error(503, headers=[("retry-after", "20")])), upstream()
    one = proxy({"base_url": a, "weight": 9}, b, clock=clock, failures=1)
    assert one.ask().upstream == "b"
    assert one.outcomes("a") == [["backoff 20"]]
    assert one.ask(question=OTHER_MODEL).upstream == "b"
    clock.now += 20
    assert one.ask().upstream == "a"


@pytest.mark.parametrize("code", ["enforced_spend_limit_reached", "contract_spend_limit_reached"])
def test_a_spend_limit_is_a_backoff_of_the_upstream_for_the_cooldown(upstream, proxy, clock, code):
    a, b = upstream(error(429, details={"error_code": code})), upstream()
    one = proxy({"base_url": a, "weight": 9}, b, clock=clock, cooldown=1800.0)
    assert one.ask().upstream == "b"
    clock.now += 1799
    assert one.ask(question=OTHER_MODEL).upstream == "b"
    clock.now += 1
    assert one.ask().upstream == "a"


def test_three_answers_that_a_model_is_missing_skip_this_model_only(upstream, proxy, clock):
    def missing(wire, request):
        (answer() if request.json()["model"] == "claude-y" else error(404))(wire, request)

    a, b = upstream(default=missing), upstream()
    one = proxy({"base_url": a, "weight": 999}, b, clock=clock, cooldown=1800.0)
    for _ in range(3):
        assert one.ask().upstream == "b"
        assert one.ask(question=OTHER_MODEL).upstream == "a"
    assert seen(a) == [6]
    assert one.ask().upstream == "b"
    assert one.ask(question=OTHER_MODEL).upstream == "a"
    assert seen(a) == [7]
    clock.now += 1800
    one.ask()
    assert seen(a) == [8]


def test_an_http_date_is_as_good_as_seconds(upstream, proxy, clock):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=31), usegmt=True)
    a, b = upstream(error(429, headers=[("retry-after", date)])), upstream()
    one = proxy({"base_url": a, "weight": 9}, b, clock=clock)
    assert one.ask().upstream == "b"
    clock.now += 28
    assert one.ask().upstream == "b"
    clock.now += 4
    assert one.ask().upstream == "a"


@pytest.mark.parametrize(
    ("value", "lasts"),
    [
        ("1e9", 60),
        ("99999999999999999999999", 60),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 60),
        ("0.5", 1),
        # Those that do not say when: two seconds.
        *((value, 2) for value in ("0", "-5", "1e999", "nan", "soon", "", "20 seconds", "9" * 5000 + "x")),
        *((f"Thu, 01 Jan {year} 00:00:00 GMT", 2) for year in ("1970", "99999")),
        ("Mon, 01 Jan 2026 00:00:00 +99999999999999999999", 2),
    ],
)
def test_a_backoff_lasts_as_long_as_the_upstream_says_within_bounds(upstream, proxy, clock, value, lasts):
    a, b = upstream(error(429, headers=[("retry-after", value)])), upstream()
    one = proxy({"base_url": a, "weight": 9}, b, clock=clock, cooldown=60, failures=1)
    assert one.ask().upstream == "b"
    clock.now += lasts - 0.1
    assert one.ask().upstream == "b"
    clock.now += 0.2
    assert one.ask().upstream == "a"


@pytest.mark.parametrize("status", [401, 408, 500, 502, 504])
def test_other_statuses_count_whatever_their_retry_after(upstream, proxy, status):
    one = proxy(upstream(error(status, headers=[("retry-after", "20")])), upstream())
    assert one.ask().upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]


def test_an_error_event_of_a_stream_with_a_retry_after_is_a_backoff(upstream, proxy, clock):
    reply = events([START, error_event("rate_limit_error")], headers=[("retry-after", "20")])
    one = proxy({"base_url": upstream(reply), "weight": 9}, upstream(), clock=clock)
    assert one.ask(stream=True).upstream == "b"
    clock.now += 19.9
    assert one.ask().upstream == "b"
    clock.now += 0.1
    assert one.ask().upstream == "a"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (("30", "5", "17"), "5"),
        (("5", "30"), "5"),
        (("30", "0.5"), "1"),
        (("30", None), None),
        (("Fri, 31 Dec 9999 23:59:59 GMT", "30"), "30"),
        (("30", "Fri, 31 Dec 9999 23:59:59 GMT"), "30"),
        (("30", "soon"), None),
    ],
)
def test_the_client_is_told_the_smallest_retry_after(upstream, proxy, values, told):
    replies = [error(429, headers=[("retry-after", value)]) for value in values]
    given = proxy(*map(upstream, replies)).ask()
    assert given.status == 429
    assert given.header("retry-after") == told


def test_a_retry_after_in_milliseconds_does_not_contradict_the_one_told(upstream, proxy):
    long = [("retry-after", "30"), ("retry-after-ms", "30000")]
    short = [("retry-after", "5")]
    given = proxy(*(upstream(error(429, headers=headers)) for headers in (short, long))).ask()
    assert (given.header("retry-after"), given.header("retry-after-ms")) == ("5", None)


# ------------------------------------------------------------------------ the circuit and the last resort


def test_three_failures_in_a_row_open_the_circuit_and_a_trial_closes_it(upstream, proxy, clock):
    a, b = upstream(*[close_now()] * 3), upstream()
    one = proxy({"base_url": a, "weight": 999}, b, clock=clock)
    assert [one.ask().upstream for _ in range(6)] == ["b"] * 6
    assert seen(a) == [3]
    clock.now += 60
    assert [one.ask().upstream for _ in range(3)] == ["a"] * 3
    assert one.breakers["a"].kinds == ["ordinary"] * 3 + ["trial"] + ["ordinary"] * 2


def test_a_failed_trial_opens_it_again(upstream, proxy, clock):
    a, b = upstream(close_now(), error(500)), upstream()
    one = proxy({"base_url": a, "weight": 9}, b, clock=clock, failures=1)
    one.ask()
    clock.now += 60
    assert [one.ask().upstream for _ in range(3)] == ["b"] * 3
    assert seen(a) == [2]


def test_a_refused_trial_decides_nothing_and_the_next_request_is_one_too(upstream, proxy, clock):
    a = upstream(close_now(), error(400), error(400))
    one = proxy(a, clock=clock, failures=1)
    assert one.ask().status == 502
    clock.now += 60
    assert [one.ask().status, one.ask().status, one.ask().status] == [400, 400, 200]
    assert one.breakers["a"].kinds == ["ordinary", "trial", "trial", "trial"]
    assert one.outcomes() == [["failure", "ignored", "ignored", "success"]]


def noting(list_, name, reply):
    """The reply, which first notes that it was asked for."""

    def noted(wire, request):
        list_.append(name)
        reply(wire, request)

    return noted


@pytest.fixture
def three_open(upstream, proxy, clock):
    """Three upstreams whose circuits are open, due in the order c, a, b; the list of who was asked since."""
    asked = []
    fakes = {name: upstream(default=noting(asked, name, close_now())) for name in "abc"}
    one = proxy(
        *({"base_url": fake, "available_models": {name, "claude-x"}} for name, fake in fakes.items()),
        clock=clock,
        failures=1,
    )
    for name in "cab":
        assert one.ask(question={**QUESTION, "model": name}).status == 502
        clock.now += 1
    asked.clear()
    return one, fakes, asked


def test_open_upstreams_are_the_last_resort_the_one_due_soonest_first(three_open):
    one, _, asked = three_open
    given = one.ask()
    assert (given.status, given.attempts, asked) == (502, 3, ["c", "a", "b"])
    assert [breaker.kinds[-1] for breaker in one.breakers.values()] == ["last_resort"] * 3


def test_a_success_as_the_last_resort_closes_the_circuit(three_open):
    one, fakes, asked = three_open
    fakes["a"].script(answer())
    assert one.ask().upstream == "a"
    assert asked == ["c"]
    assert one.breakers["a"].usable()
    assert not one.breakers["c"].usable()


def test_a_stream_as_the_last_resort_closes_the_circuit_at_its_commit_point(three_open):
    one, fakes, _ = three_open
    fakes["c"].script(events([START, BLOCK], then="hang"))
    given = one.begin(stream=True)
    assert given.upstream == "c"
    assert one.breakers["c"].usable()
    given.leave()


def test_a_failure_as_the_last_resort_changes_nothing(three_open, clock):
    one, _, asked = three_open
    for _ in range(5):
        assert one.ask().status == 502
    clock.now += 57  # 60 after c was opened
    asked.clear()
    assert one.ask().status == 502
    assert asked == ["c", "a", "b"]
    assert [breaker.kinds[-1] for breaker in one.breakers.values()] == ["last_resort", "last_resort", "trial"]


@pytest.fixture
def a_open(upstream, proxy):
    """Upstream a, whose circuit is open though it would answer, beside b of these replies."""

    def start(*replies):
        a = upstream(close_now())
        others = [{"base_url": upstream(reply), "available_models": {"claude-x"}} for reply in replies]
        one = proxy(a, *others, failures=1, answer=0.25)
        assert one.ask(question={**QUESTION, "model": "only-a"}).status == 502
        return one

    return start


@pytest.mark.parametrize(
    "reply",
    [
        close_now(),
        error(500),
        error(401),
        error(429, headers=[("retry-after", "9")]),
        whole(200, b"no"),
        hang(),
    ],
)
def test_the_last_resort_comes_after_failures(a_open, reply):
    given = a_open(reply).ask()
    assert (given.status, given.upstream, given.attempts) == (200, "a", 2)


def test_the_last_resort_does_not_come_after_a_second_timeout(a_open):
    given = a_open(hang(), hang()).ask()
    assert (given.status, given.attempts) == (504, 2)


@pytest.mark.parametrize("status", [400, 422])
def test_open_circuits_are_left_alone_after_an_error_about_the_request(a_open, status):
    given = a_open(error(status), close_now()).ask()
    assert (given.status, given.upstream, given.attempts) == (status, "b", 2)


@pytest.mark.parametrize("status", [404, 405, 413])
def test_an_open_circuit_is_tried_after_what_one_upstream_lacks(a_open, status):
    given = a_open(error(status)).ask()
    assert (given.status, given.upstream, given.attempts) == (200, "a", 2)


def test_an_upstream_in_backoff_is_asked_also_after_an_error_about_the_request(upstream, proxy, clock):
    a, b = upstream(error(429, headers=[("retry-after", "50")])), upstream(answer(), error(400))
    one = proxy({"base_url": a, "weight": 9}, b, clock=clock)
    assert one.ask().upstream == "b"
    given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (200, "a", 2)


def test_an_upstream_in_backoff_is_a_last_resort_too(upstream, proxy, clock):
    a = upstream(error(529, headers=[("retry-after", "50")]))
    one = proxy(a, clock=clock)
    assert one.ask().status == 529
    assert one.ask().status == 200
    assert one.breakers["a"].usable()


def test_an_outage_of_all_does_not_outlast_itself(upstream, proxy, clock):
    a, b = upstream(*[close_now()] * 9), upstream(*[reset_now()] * 9)
    one = proxy(a, b, clock=clock, cooldown=1800.0)
    assert [one.ask().status for _ in range(9)] == [502] * 9
    assert [one.ask().status for _ in range(4)] == [200] * 4


def test_one_trial_at_a_time_and_the_others_go_elsewhere(upstream, proxy, clock):
    gate = threading.Event()
    a, b = upstream(close_now(), later(gate, answer())), upstream()
    one = proxy({"base_url": a, "weight": 9}, b, clock=clock, failures=1)
    one.ask()
    clock.now += 60
    given = []
    trial = threading.Thread(target=lambda: given.append(one.ask()))
    trial.start()
    a.wait_for(2)
    assert [one.ask().upstream for _ in range(3)] == ["b"] * 3
    gate.set()
    trial.join(5)
    assert given[0].upstream == "a"
    assert one.ask().upstream == "a"


def test_a_trial_that_streams_is_settled_at_its_commit_point_and_its_break_is_one_failure(
    upstream, proxy, clock
):
    gate = threading.Event()
    a, b = upstream(close_now(), close_now(), events([START, BLOCK, gate], then="cut")), upstream()
    one = proxy({"base_url": a, "weight": 9}, b, clock=clock, failures=2)
    assert [one.ask().upstream, one.ask().upstream] == ["b", "b"]
    clock.now += 60
    given = one.begin(stream=True)
    assert (given.upstream, one.breakers["a"].kinds[-1]) == ("a", "trial")
    assert one.outcomes("a") == [["failure", "failure", "committed"]]
    assert one.ask().upstream == "a"
    gate.set()
    assert given.read().ending == "cut"
    assert one.outcomes("a") == [["failure", "failure", "committed", "success", "failure"]]
    assert one.breakers["a"].usable()


def test_a_trial_whose_client_leaves_after_the_commit_point_has_closed_the_circuit(upstream, proxy, clock):
    a = upstream(close_now(), events([START, BLOCK], then="hang"))
    one = proxy(a, clock=clock, failures=1)
    one.ask()
    clock.now += 60
    one.begin(stream=True).leave()
    assert one.outcomes() == [["failure", "committed", "ignored"]]
    assert one.breakers["a"].usable()


def test_an_upstream_that_fails_two_of_three_requests_is_asked_for_its_half(upstream, proxy):
    turns = itertools.cycle([answer(), error(500), error(500)])

    def flaky(wire, request):
        next(turns)(wire, request)

    a, b = upstream(default=flaky), upstream()
    one = proxy(a, b, failures=10**6)
    assert [one.ask().status for _ in range(60)] == [200] * 60
    assert seen(a) == [30]


def test_a_timeout_does_not_count_if_another_attempt_succeeded_while_it_ran(upstream, proxy):
    a = upstream(hang(), default=answer())
    one = proxy(a, answer=0.5)
    slow = threading.Thread(target=one.ask)
    slow.start()
    a.wait_for(1)
    assert one.ask().status == 200
    slow.join(5)
    assert one.breakers["a"].circuit().failures == 0


# ------------------------------------------------------------------------------------ the final answer

SAID = {
    "closed": close_now(),
    "html": whole(200, b"<p>", content_type="text/html"),
    "silent": hang(),
    **{status: error(status) for status in (400, 401, 402, 403, 404, 422, 429, 500, 503, 529)},
}


@pytest.mark.parametrize(
    ("said", "status", "name"),
    [
        ([400, 529], 400, "a"),
        ([529, 400], 400, "b"),
        ([404, 400], 400, "b"),
        ([400, 404], 400, "a"),
        ([422, 401, "closed"], 422, "a"),
        ([401, 529], 529, "b"),
        ([529, 401], 529, "a"),
        ([500, 529], 529, "b"),
        ([429, 503, "closed"], 503, "b"),
        ([401, 403], 403, "b"),
        ([403, 402], 403, "a"),
        ([404, 529], 529, "b"),
        ([404, "closed"], 404, "a"),
        ([403, 400], 400, "b"),
        ([403, 429], 403, "a"),
        (["closed", 500], 500, "b"),
        (["silent", 500], 500, "b"),
        ([500, "silent"], 500, "a"),
        ([500, "silent", "silent"], 500, "a"),
    ],
)
def test_when_all_fail_the_client_gets_the_error_that_helps_it_most(upstream, proxy, said, status, name):
    given = proxy(*(upstream(SAID[one]) for one in said), answer=0.25 if "silent" in said else 5.0).ask()
    assert (given.status, given.upstream, given.attempts) == (status, name, len(said))


@pytest.mark.parametrize(
    ("said", "status", "type_"),
    [
        (["closed"], 502, "api_error"),
        ([401], 502, "api_error"),
        ([402, "closed"], 502, "api_error"),
        ([401, "silent"], 504, "timeout_error"),
        (["html"], 502, "api_error"),
        (["closed", "html"], 502, "api_error"),
        (["silent"], 504, "timeout_error"),
        (["silent", "closed"], 504, "timeout_error"),
        (["html", "silent"], 504, "timeout_error"),
    ],
)
def test_when_no_upstream_answered_at_all_the_error_is_our_own(upstream, proxy, said, status, type_):
    given = proxy(*(upstream(SAID[one]) for one in said), answer=0.25 if "silent" in said else 5.0).ask()
    assert (given.status, given.json()["error"]["type"]) == (status, type_)
    assert (given.upstream, given.attempts) == (None, len(said))
    assert given.header("content-type") == "application/json"
    assert given.json()["request_id"] == given.header("request-id")


ACCOUNT_ERRORS = [
    error(401, message="invalid key sk-test-a"),
    error(402, message="pay for sk-test-a"),
    error(403, message="the key sk-test-a is revoked"),
    error(403, "billing_error", message="sk-test-a"),
    error(400, message="Your credit balance is too low, sk-test-a"),
]


@pytest.mark.parametrize("reply", ACCOUNT_ERRORS)
def test_an_error_about_an_upstream_s_account_never_reaches_the_client_as_it_is(upstream, proxy, reply):
    given = proxy(upstream(reply)).ask()
    assert (given.status, given.json()["error"]["type"]) == (502, "api_error")
    assert "[redacted]" in given.json()["error"]["message"]
    assert "sk-test-a" not in given.body.decode()
    assert given.header("x-should-retry") == "false"


@pytest.mark.parametrize("reply", ACCOUNT_ERRORS)
def test_a_client_may_retry_where_only_some_accounts_are_out(upstream, proxy, reply):
    given = proxy(upstream(reply), upstream(close_now())).ask()
    assert given.status == 502
    assert given.header("x-should-retry") is None


def test_an_error_status_whose_body_stalls_is_decided_by_the_status(upstream, proxy, monkeypatch):
    monkeypatch.setattr("aiproxy.proxy.attempt.ERROR_BODY_SECONDS", 0.2)
    stalled = whole(529, b'{"type":"error"', then="hang", cut_at=5)
    one = proxy(upstream(stalled), upstream(stalled), answer=30.0, first_byte=30.0)
    began = time.monotonic()
    given = one.ask()
    assert time.monotonic() - began < 2
    assert (given.status, given.json()["error"]["type"]) == (529, "overloaded_error")
    assert one.outcomes() == [["ignored"], ["ignored"]]


def test_an_upstream_s_error_comes_back_verbatim(upstream, proxy):
    body = b'{"type":"error", "error":{"type":"invalid_request_error","message":"\\u00e9 \xc3\xa9  "}}\n'
    headers = [
        ("request-id", "req_1"),
        ("x-should-retry", "false"),
        ("anthropic-ratelimit-tokens-reset", "2026-11-22T00:00:00Z"),
        ("content-type", "application/json; charset=utf-8"),
        ("set-cookie", "a=b"),
        ("server", "cloudflare"),
        ("x-aiproxy-upstream", "another proxy's"),
    ]
    given = proxy(upstream(whole(422, body, headers=headers))).ask()
    assert (given.status, given.body) == (422, body)
    length = ("content-length", str(len(body)))
    ours = [("x-aiproxy-upstream", "a"), ("x-aiproxy-attempts", "1")]
    assert sorted(given.headers) == sorted([*headers[:4], length, *ours])


@pytest.mark.parametrize("body", [b"", b"<h1>Bad gateway</h1>", b"\xff\x00"])
def test_an_error_body_of_another_shape_comes_back_as_it_is(upstream, proxy, body):
    given = proxy(upstream(whole(502, body, content_type="text/html"))).ask()
    assert (given.status, given.body, given.header("content-type")) == (502, body, "text/html")


def test_an_upstream_s_token_does_not_come_back_in_its_error(upstream, proxy):
    given = proxy(upstream(error(401, message="invalid key sk-test-a"))).ask()
    assert b"sk-test-a" not in given.body
    assert given.header("content-length") == str(len(given.body))


def test_our_own_errors_name_no_upstream_address(upstream, proxy):
    a = upstream(close_now())
    given = proxy(a, f"http://{HOST}:{dead_port()}", "http://name.invalid").ask()
    assert given.status == 502
    assert not any(part in given.body for part in (HOST.encode(), str(a.port).encode(), b"name.invalid"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reply", [answer(), error(400)])
def test_a_request_id_is_added_only_where_there_is_none(upstream, proxy, reply, stream):
    assert proxy(upstream(reply)).ask(stream).header("request-id").startswith("req_fake")
    bare = events(message_events()) if stream else whole(200, MESSAGE)
    assert proxy(upstream(bare)).ask(stream).header("request-id").startswith("req_")


# -------------------------------------------------------------------------------- sizes and encodings


def pouring(head, piece, times):
    """A head, then one piece so many times, made while it is sent."""

    def reply(wire, request):
        wire.send(b"HTTP/1.1 " + head + b"\r\n\r\n")
        for _ in range(times):
            wire.send(piece)

    return reply


JSON_200 = b"200 OK\r\ncontent-type: application/json\r\n"
EVENTS_200 = b"200 OK\r\ncontent-type: text/event-stream\r\n"


def test_an_answer_of_64_mb_passes_and_a_larger_one_is_a_fault(upstream, proxy):
    fill = b'{"type":"message","a":"' + b"x" * (MB - 23)
    sizes = {"b": 64 * MB, "a": 64 * MB + 1}

    def sized(size):
        def reply(wire, request):
            wire.send(b"HTTP/1.1 " + JSON_200 + b"content-length: %d\r\n\r\n" % size + fill)
            piece = b"x" * MB
            for _ in range(62):
                wire.send(piece)
            wire.send(b"x" * (size - 63 * MB - 2) + b'"}')

        return reply

    one = proxy(upstream(sized(sizes["a"])), upstream(sized(sizes["b"])))
    given = one.ask()
    assert (given.upstream, len(given.body)) == ("b", sizes["b"])
    assert one.outcomes() == [["failure"], ["success"]]


@pytest.mark.parametrize("status", [b"400 Bad", b"529 Overloaded"])
def test_an_error_body_over_16_mb_is_replaced_by_one_of_ours(upstream, proxy, status):
    head = status + b"\r\ncontent-type: application/json\r\ncontent-length: %d" % (17 * MB)
    one = proxy(upstream(pouring(head, b"x" * MB, 17)))
    given = one.ask()
    assert given.status == int(status[:3])
    assert given.json()["type"] == "error"
    assert one.outcomes() == [["ignored"]]


def test_an_error_body_of_16_mb_passes(upstream, proxy):
    head = b"400 Bad\r\ncontent-type: application/json\r\ncontent-length: %d" % (16 * MB)
    given = proxy(upstream(pouring(head, b"x" * MB, 16))).ask()
    assert (given.status, len(given.body)) == (400, 16 * MB)


def test_what_comes_before_the_first_content_is_bounded(upstream, proxy):
    comment = b":" + b"x" * (MB - 3) + b"\n\n"

    def reply(wire, request):
        pouring(EVENTS_200 + b"connection: close", comment, 64)(wire, request)
        wire.send(b"".join(message_events()))
        wire.close()

    one = proxy(upstream(reply), upstream())
    assert one.ask(stream=True).upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]


def test_a_zip_bomb_is_a_fault(upstream, proxy):
    bomb = gzip.compress(b"{") + gzip.compress(b" " * MB) * 65 + gzip.compress(b"}")
    one = proxy(upstream(whole(200, bomb, headers=[("content-encoding", "gzip")])), upstream())
    assert one.ask().upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "deflate"])
def test_an_answer_that_is_compressed_unasked_is_read_all_the_same(upstream, proxy, encoding):
    packed = zlib.compress(MESSAGE) if encoding == "deflate" else gzip.compress(MESSAGE)
    given = proxy(upstream(whole(200, packed, headers=[("content-encoding", encoding)]))).ask()
    assert (given.status, given.body) == (200, MESSAGE)
    assert given.header("content-encoding") is None
    assert given.header("content-length") == str(len(MESSAGE))


@pytest.mark.parametrize("encoding", ["identity", ""])
def test_an_answer_in_no_encoding_may_say_so(upstream, proxy, encoding):
    given = proxy(upstream(whole(200, MESSAGE, headers=[("content-encoding", encoding)]))).ask()
    assert (given.status, given.body) == (200, MESSAGE)


def test_an_error_that_is_compressed_is_told_in_clear(upstream, proxy):
    given = proxy(upstream(gzipped(b'{"error":{"type":"x"}}', status=400))).ask()
    assert (given.status, given.body) == (400, b'{"error":{"type":"x"}}')
    assert given.header("content-encoding") is None


# ------------------------------------------------------------------------- more rows of the policy


def test_a_timeout_counts_if_the_other_success_came_before_it(upstream, proxy):
    one = proxy(upstream(answer(), hang()), failures=1, answer=0.15)
    assert [one.ask().status, one.ask().status] == [200, 504]
    assert one.breakers["a"].circuit().state == "open"


COMMENT, COMMENT_LINE = b": wait\n\n", b":\n"


def test_a_stream_whose_content_comes_after_pings_and_comments_is_whole(upstream, proxy):
    stream = [COMMENT, PING, COMMENT, START, PING, *message_events()[2:]]
    given = proxy(upstream(events(stream, gap=0.1)), first_byte=0.35).ask(stream=True)
    assert (given.status, given.body) == (200, b"".join(stream))


ERROR_BODY = b'{"type":"error","error":{"type":"api_error","message":"the upstream\'s"}}'


INCOMPLETE = {
    "stalls": {"then": "hang", "cut_at": 20},
    "stalls_at_once": {"then": "hang", "cut_at": 0},
    "breaks_off": {"then": "cut", "cut_at": 20},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 500, 529])
@pytest.mark.parametrize("how", INCOMPLETE)
def test_an_error_whose_body_is_late_or_incomplete_is_replaced_by_ours_of_the_same_status(
    upstream, proxy, monkeypatch, stream, status, how
):
    monkeypatch.setattr("aiproxy.proxy.attempt.ERROR_BODY_SECONDS", 0.1)
    one = proxy(upstream(whole(status, ERROR_BODY, **INCOMPLETE[how])))
    began = time.monotonic()
    given = one.ask(stream)
    assert time.monotonic() - began < 2
    assert (given.status, given.upstream, given.ending) == (status, "a", "end")
    assert given.json()["type"] == "error"
    assert "the upstream's" not in given.json()["error"]["message"]
    assert given.header("content-type") == "application/json"
    assert given.header("content-length") == str(len(given.body))
    assert one.outcomes() == [["failure" if status == 500 else "ignored"]]


def test_an_error_body_that_trickles_is_awaited_no_longer(upstream, proxy, monkeypatch):
    monkeypatch.setattr("aiproxy.proxy.attempt.ERROR_BODY_SECONDS", 0.1)
    a = upstream(trickle(b"{" * 999, 0.01, content_type="application/json", status=529))
    began = time.monotonic()
    assert proxy(a, upstream()).ask().upstream == "b"
    assert 0.1 <= time.monotonic() - began < 2


def first(one):
    """Settings of an upstream that gets nearly all turns of the round robin."""
    return {"base_url": one, "weight": 90}


@pytest.fixture
def refusing(upstream, proxy, clock):
    """Upstream a, which has refused twenty requests over a minute that b answered, and b."""

    def start(*more, **settings):
        a, b = upstream(default=error(400)), upstream()
        one = proxy(first(a), b, *more, clock=clock, **settings)
        for _ in range(20):
            assert one.ask().upstream == "b"
            clock.now += 3.2
        return one, a, b

    return start


def test_after_its_next_success_such_an_upstream_is_asked_as_any_other(refusing, clock):
    one, a, _ = refusing()
    clock.now += 60
    a.script(answer())
    assert one.ask().upstream == "a"
    assert [one.ask().upstream for _ in range(3)] == ["b"] * 3
    assert seen(a) == [24]


def test_another_result_within_the_minute_shows_that_it_does_not_refuse_everything(upstream, proxy, clock):
    a, b = upstream(*[error(400)] * 10, error(500), default=error(400)), upstream()
    one = proxy(first(a), b, clock=clock)
    for _ in range(25):
        one.ask()
        clock.now += 4
    assert seen(a) == [25]


def test_the_refusals_of_such_an_upstream_do_not_stop_the_last_resort(upstream, refusing, clock):
    c = upstream(close_now())
    one, _, b = refusing({"base_url": c, "available_models": {"claude-x", "only-c"}}, failures=1)
    assert [one.ask().upstream for _ in range(3)] == ["b"] * 3  # c gets its turn, and its circuit opens
    b.script(error(500), error(500))
    clock.now += 60
    given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (200, "c", 3)


BOUND = {
    "thread": ({"thread": {"type": "continue", "previous_message_id": "msg_1"}}, {}),
    "container": ({"container": "container_1"}, {}),
    "file": ({"system": [{"type": "document", "source": {"type": "file", "file_id": "file_1"}}]}, {}),
    "workspace": ({}, {"anthropic-workspace-id": "wrkspc_1"}),
}


@pytest.mark.parametrize(
    ("said", "status", "asked"),
    [
        (error(401), 502, [1, 0]),
        (error(404), 404, [1, 0]),
        (error(429), 429, [1, 0]),
        (error(422), 422, [1, 0]),
        (error(500), 200, [1, 1]),
        (error(529), 200, [1, 1]),
        (close_now(), 200, [1, 1]),
    ],
    ids=["401", "404", "429", "422", "500", "529", "break"],
)
@pytest.mark.parametrize("names", BOUND)
def test_a_request_that_names_what_one_account_has_is_not_tried_elsewhere_after_a_4xx(
    upstream, proxy, names, said, status, asked
):
    members, headers = BOUND[names]
    a, b = upstream(said), upstream()
    assert proxy(a, b).ask(question={**QUESTION, **members}, headers=headers).status == status
    assert seen(a, b) == asked


def test_the_404_of_such_a_request_costs_its_model_nothing(upstream, proxy):
    a, b = upstream(*[error(404)] * 3), upstream()
    one = proxy(first(a), b)
    question = {**QUESTION, "container": "container_1"}
    assert [one.ask(question=question).status for _ in range(3)] == [404] * 3
    assert one.ask().upstream == "a"


@pytest.mark.parametrize(
    ("type_", "outcome"),
    [("api_error", "failure"), ("authentication_error", "failure"), ("overloaded_error", "ignored")],
)
def test_an_error_event_after_the_commit_ends_the_answer_at_once_and_counts_as_its_status(
    upstream, proxy, type_, outcome
):
    a, b = upstream(events([START, BLOCK, error_event(type_)], then="hang")), upstream()
    one = proxy(first(a), b)
    began = time.monotonic()
    given = one.ask(stream=True)
    assert time.monotonic() - began < 2
    assert (given.status, given.ending) == (200, "cut")
    assert given.body.endswith(error_event(type_))
    assert one.outcomes() == [[outcome], []]
    assert one.ask().upstream == ("b" if type_ == "overloaded_error" else "a")


@pytest.mark.parametrize("status", [429, 529])
def test_without_a_retry_after_the_backoff_of_the_model_is_2_s_and_doubles_to_300(
    upstream, proxy, clock, status
):
    a, b = upstream(), upstream()
    one = proxy(first(a), b, clock=clock, failures=1, cooldown=1800.0)
    for seconds in (2, 4, 8, 16, 32, 64, 128, 256, 300, 300):
        a.script(error(status))
        assert one.ask().upstream == "b"
        assert one.ask(question=OTHER_MODEL).upstream == "a"
        clock.now += seconds - 0.1
        assert one.ask().upstream == "b"
        clock.now += 0.1
    assert one.ask().upstream == "a"
    a.script(error(status))
    assert one.ask().upstream == "b"
    clock.now += 2  # the success has ended the doubling
    assert one.ask().upstream == "a"


def test_a_success_of_the_model_starts_the_count_of_its_404s_again(upstream, proxy):
    a, b = upstream(error(404), error(404), answer(), error(404), error(404)), upstream()
    one = proxy(first(a), b)
    assert [one.ask().upstream for _ in range(6)] == ["b", "b", "a", "b", "b", "a"]


def test_a_retry_after_that_is_a_date_reaches_the_client_in_seconds(upstream, proxy):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=31), usegmt=True)
    given = proxy(upstream(error(529, headers=[("retry-after", date)]))).ask()
    assert given.header("retry-after") in ("29", "30", "31")


@pytest.mark.parametrize(("value", "client_gets"), [("0.5", "1"), ("-5", None), ("soon", None), ("7", "7")])
@pytest.mark.parametrize("status", [400, 404])
def test_the_retry_after_of_an_error_about_the_request_is_its_own_in_whole_seconds(
    upstream, proxy, status, value, client_gets
):
    limit = upstream(error(429, headers=[("retry-after", "3")])) if status == 400 else upstream(close_now())
    given = proxy(limit, upstream(error(status, headers=[("retry-after", value)]))).ask()
    assert (given.status, given.header("retry-after")) == (status, client_gets)


def test_of_upstreams_in_backoff_the_one_due_first_is_asked_first_and_before_those_that_are_open(
    upstream, proxy, clock
):
    asked = []
    replies = [close_now(), *(error(529, headers=[("retry-after", value)]) for value in ("50", "20", "30"))]
    fakes = [upstream(noting(asked, name, reply)) for name, reply in zip("abcd", replies, strict=True)]
    for name, fake in zip("abcd", fakes, strict=True):
        fake.script(noting(asked, name, error(500)))
    one = proxy(*fakes, clock=clock, failures=1)
    assert one.ask().status == 529
    asked.clear()
    assert one.ask().status == 500
    assert asked == ["c", "d", "b", "a"]


def test_weights_hold_while_an_upstream_is_down(upstream, proxy):
    a, b, c = upstream(), upstream(), upstream(default=close_now())
    one = proxy({"base_url": a, "weight": 3}, b, {"base_url": c, "weight": 2}, failures=10**6)
    assert [one.ask().status for _ in range(24)] == [200] * 24
    assert seen(c) == [8]  # it pays for its turns
    assert [len(a.seen), len(b.seen)] == pytest.approx([18, 6], abs=1)


# --------------------------------------------------------------------------------------- bugs of ours


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_of_ours_is_a_500_that_no_upstream_is_charged_for(upstream, proxy, monkeypatch, stream):
    a, b = upstream(), upstream()
    one = proxy(a, b)
    monkeypatch.setattr("aiproxy.proxy.attempt.to_client", lambda *_: 1 / 0)
    given = one.ask(stream)
    assert (given.status, given.json()["error"]["type"]) == (500, "api_error")
    assert seen(a, b) == [1, 0]
    assert "success" not in one.outcomes("b")[0]
    assert "failure" not in one.outcomes("a")[0]
    if stream:
        a.wait_left()


def test_a_bug_of_ours_gives_a_trial_back(upstream, proxy, clock, monkeypatch):
    one = proxy(upstream(close_now()), clock=clock, failures=1)
    one.ask()
    clock.now += 60
    with monkeypatch.context() as broken:
        broken.setattr("aiproxy.proxy.attempt.members", lambda *_: 1 / 0)
        assert one.ask().status == 500
    assert one.breakers["a"].kinds == ["ordinary", "trial"]
    assert one.ask().status == 200


def test_a_bug_of_ours_after_a_refusal_charges_nobody(upstream, proxy, monkeypatch):
    one = proxy(upstream(error(400)), upstream())
    with monkeypatch.context() as broken:
        broken.setattr("aiproxy.proxy.attempt.Attempt._whole", lambda *_: 1 / 0)
        assert one.ask().status == 500
    assert one.outcomes() == [["ignored"], ["ignored"]]


# ------------------------------------------------------------------------------------------ all at once


def test_many_requests_at_once_settle_every_permit_and_get_their_own_answers(upstream, proxy):
    def echo(wire, request):
        text = request.json()["messages"][0]["content"]
        answer(text)(wire, request)

    limited = error(429, headers=[("retry-after", "0.01")])
    turns = itertools.cycle([echo, close_now(), echo, error(500), echo, limited])
    lock = threading.Lock()

    def moody(wire, request):
        with lock:
            reply = next(turns)
        reply(wire, request)

    upstreams = [upstream(default=reply) for reply in (moody, moody, echo)]
    one = proxy(*upstreams, failures=4, cooldown=0.01)
    wrong = []

    def client(n):
        for k in range(20):
            question = {**QUESTION, "messages": [{"role": "user", "content": f"{n}/{k}"}]}
            given = one.ask(stream=k % 2 == 0, question=question)
            if given.status != 200 or f"{n}/{k}" not in _text(given):
                wrong.append((given.status, given.body))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert wrong == []


def _text(given):
    if given.header("content-type") == "application/json":
        return given.json()["content"][0]["text"]
    deltas = [line for line in given.body.splitlines() if b"text_delta" in line]
    return "".join(json.loads(line.removeprefix(b"data: "))["delta"]["text"] for line in deltas)
