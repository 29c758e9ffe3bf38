"""Every row of the failover policy, against upstreams on real sockets that break each rule of HTTP.

The application runs in process and is spoken to as WSGI, since no row depends on the client's wire. Each
breaker is a `Recorded` one: it keeps what every attempt was settled as, and complains about a permit that
is settled twice or never. Which error is about what is `tests/unit/test_policy.py`'s, how long a backoff
lasts `tests/unit/test_model_states.py`'s; here is what an attempt makes of it.
"""

import gzip
import itertools
import json
import socket
import threading
import time
import zlib
from pathlib import Path

import pytest
from fakes import (
    ERROR_TYPES,
    HOST,
    BeforeBody,
    Clock,
    answer,
    blackhole,
    close_now,
    dead_port,
    error,
    error_event,
    events,
    gzipped,
    hang,
    head_only,
    later,
    loopback_tls,
    message_events,
    raw,
    refuse_after_head,
    reset_now,
    stalled_upload,
    trickle,
    whole,
)
from in_process import MB, MESSAGE, QUESTION, Proxy
from timing import FAR, soon

from aiproxy.proxy import attempt
from aiproxy.transport import session


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


def first(one):
    """Settings of an upstream that gets nearly all turns of the round robin."""
    return {"base_url": one, "weight": 90}


def limited(status, retry_after):
    return error(status, headers=[("retry-after", retry_after)])


OTHER_MODEL = {**QUESTION, "model": "claude-y"}


# ---------------------------------------------------------------- what is no answer: the next one, counted

START, PING, BLOCK = message_events()[:3]
REDIRECT = [("location", "http://127.0.0.1:1/v1/messages")]
HEAD_200 = b"200 OK\r\ncontent-type: application/json\r\n"
HEAD_EVENTS = b"200 OK\r\ncontent-type: text/event-stream\r\n"
GZIP = [("content-encoding", "gzip")]


def sent(data):
    return raw(b"HTTP/1.1 " + data)


ANY_REQUEST = {
    "closed without a byte": close_now(),
    "reset without a byte": reset_now(),
    "closed before the body was read": refuse_after_head(),
    "died in the status line": sent(b"20"),
    "died in the head of a 200": sent(b"200 OK\r\ncontent-type: appl"),
    "died in the head of a 400": sent(b"400 Bad Request\r\ncontent-length: 0\r\n"),
    "died in the status line of a 529": sent(b"529 Overloaded"),
    "died after the head": head_only(content_type="application/json"),
    "died after the head of a stream": head_only(),
    "not HTTP": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "status 99": sent(b"099 Odd\r\ncontent-length: 0\r\n\r\n"),
    "a header of 100 KB": sent(b"200 OK\r\nx-a: " + b"a" * 100_000 + b"\r\n\r\n"),
    "a head of 33 KB": whole(200, MESSAGE, headers=[(f"x-{n}", "v" * 1000) for n in range(33)]),
    "a thousand headers": sent(b"200 OK\r\n" + b"x-a: 1\r\n" * 1000 + b"\r\n"),
    "eleven interim answers": raw(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 11, "keep"),
    "early hints and then nothing": sent(b"103 Early Hints\r\nlink: </a>\r\n\r\n"),
    "switching protocols": sent(b"101 Switching Protocols\r\nupgrade: h2c\r\n\r\n"),
    "HTML": whole(200, b"<h1>It works!</h1>", content_type="text/html"),
    "HTML that never comes": head_only(content_type="text/html", then="hang"),
    "no content type": whole(200, MESSAGE, headers=[("content-type", None)]),
    "an unknown content type": whole(200, MESSAGE, content_type="application/x-ndjson"),
    "no content": sent(b"204 No Content\r\n\r\n"),
    "empty JSON": whole(200, b""),
    "empty events": events([]),
    "an encoding nobody asked for": whole(200, MESSAGE, headers=[("content-encoding", "br")]),
    "gzip that is none": whole(200, MESSAGE, headers=GZIP),
    "gzip events that are none": events([START, BLOCK], headers=GZIP),
    "redirect 302": whole(302, b"<a>", headers=REDIRECT, content_type="text/html"),
    "redirect 308": whole(308, b"", headers=[("location", "/v1/messages")]),
    "redirect to nowhere": whole(302, b"", headers=[("location", "http://[/")]),
    "redirect whose body never ends": whole(302, b"x", headers=REDIRECT, then="hang"),
    "not modified": whole(304, b""),
    "multiple choices": whole(300, MESSAGE),
}
WHOLE = {
    "cut short by length": whole(200, MESSAGE, then="cut", cut_at=40),
    "cut short by length with a reset": whole(200, MESSAGE, then="reset", cut_at=40),
    "cut short of one byte": whole(200, MESSAGE + b" ", then="cut", cut_at=len(MESSAGE)),
    "cut short between chunks": whole(200, MESSAGE, framing="chunked", then="cut"),
    "cut short in a chunk": events(
        [MESSAGE], then="cut", cut_at=40, torn=True, content_type="application/json"
    ),
    "cut short by close": whole(200, MESSAGE, framing="close", then="cut", cut_at=40),
    "gzip cut short": whole(200, gzip.compress(MESSAGE)[:20], headers=GZIP),
    "a list": whole(200, b"[" + MESSAGE + b"]"),
    "null": whole(200, b"null"),
    "not JSON": whole(200, b"upstream connect error"),
    "JSON and more": whole(200, MESSAGE + MESSAGE),
    "nested too deeply": whole(200, b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "an object of another shape": whole(200, b'{"success":false,"message":"no"}'),
    "an object without a type": whole(200, b'{"id":"x"}'),
    "events unasked": events(message_events()),
    "an error without a type": whole(200, b'{"error":"out of order"}'),
    "an error spelt with escapes": whole(200, b'{"type":"\\u0065rror"}'),
    "a zip bomb": whole(
        200, gzip.compress(b"{") + gzip.compress(b" " * MB) * 65 + gzip.compress(b"}"), headers=GZIP
    ),
}
STREAM = {
    "died after message_start": events([START], then="cut"),
    "died after message_start by length": events([START], framing="length", then="cut"),
    "died after message_start by close": events([START], framing="close"),
    "reset after message_start and a ping": events([START, PING], then="reset"),
    "died in the first content": events([START, BLOCK], then="cut", cut_at=20),
    "died in a chunk of the first content": events([START, BLOCK], then="cut", cut_at=20, torn=True),
    "ended after message_start and a ping": events([START, PING]),
    "ended in the first content": events([START, BLOCK[:-1]]),
    "only comments": events([b": hello\n\n", b": again\n\n"]),
    "events without event lines": events([b"".join(message_events()).replace(b"event: ", b"x: ")]),
    "an error event that is no JSON": events([b"event: error\ndata: oops\n\n"]),
    "an error event with carriage returns": events([error_event("api_error").replace(b"\n", b"\r\n")]),
    "JSON though a stream was asked for": whole(200, MESSAGE),
    "JSON that breaks off": whole(200, MESSAGE, then="cut", cut_at=20),
}
CASES = [
    *(pytest.param(False, reply, id=name) for name, reply in {**ANY_REQUEST, **WHOLE}.items()),
    *(pytest.param(True, reply, id=f"stream: {name}") for name, reply in {**ANY_REQUEST, **STREAM}.items()),
]


@pytest.mark.parametrize(("stream", "reply"), CASES)
def test_what_is_no_answer_counts_and_the_next_upstream_answers(upstream, proxy, monkeypatch, stream, reply):
    monkeypatch.setattr("aiproxy.proxy.attempt.ERROR_BODY_SECONDS", 0.1)
    a, b = upstream(reply, default=answer("a")), upstream()
    one = proxy(a, b, answer=FAR, first_byte=FAR)
    with soon():
        given = one.ask(stream)
    assert (given.status, given.upstream, given.attempts, given.ending) == (200, "b", 2, "end")
    assert given.body == (b"".join(message_events(["ok"])) if stream else MESSAGE)
    assert seen(a, b) == [1, 1]
    assert one.outcomes() == [["failure"], ["success"]]


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (error(401), "failure"),
        (error(408), "failure"),
        (limited(500, "20"), "failure"),
        (error(503), "failure"),
        (error(999), "failure"),
        (limited(503, "20"), "backoff 20"),
        (error(429, details={"error_code": "enforced_spend_limit_reached"}), "backoff 60"),
        (limited(429, "20"), "ignored"),
        (error(529), "ignored"),
        (error(404), "ignored"),
        (error(400), "ignored"),
        (error(413), "ignored"),
        (error(499), "ignored"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_costs_what_the_policy_says_and_the_next_upstream_answers(
    upstream, proxy, reply, outcome, stream
):
    one = proxy(upstream(reply), upstream())
    given = one.ask(stream)
    assert (given.status, given.upstream, given.attempts) == (200, "b", 2)
    assert one.outcomes() == [[outcome], ["success"]]


def test_a_redirect_is_not_followed(upstream, proxy):
    elsewhere = upstream()
    a = upstream(whole(307, b"", headers=[("location", f"{elsewhere.url}/v1/messages")]))
    assert proxy(a).ask().status == 502
    assert seen(a, elsewhere) == [1, 0]


@pytest.mark.parametrize(("status", "times"), [(100, 1), (103, 10)])
def test_up_to_ten_interim_answers_are_skipped(upstream, proxy, status, times):
    interim = b"HTTP/1.1 %d Interim\r\nlink: </a>\r\n\r\n" % status
    head = b"HTTP/1.1 " + HEAD_200 + b"content-length: %d\r\n\r\n" % len(MESSAGE)
    a = upstream(raw(interim * times + head + MESSAGE, "keep"))
    one = proxy(a)
    assert (one.ask().body, one.ask().body) == (MESSAGE, MESSAGE)
    assert a.connections == 1


def test_a_head_of_31_kb_is_read(upstream, proxy):
    fields = [(f"x-{n}", "v" * 1000) for n in range(31)]
    assert proxy(upstream(whole(200, MESSAGE, headers=fields))).ask().status == 200


# -------------------------------------------------------------------------------- no connection at all


@pytest.mark.parametrize(
    "way", ["unknown name", "nobody listens", "full queue", "TLS that never shakes hands"]
)
def test_no_connection_within_the_connect_timeout_counts_and_the_next_upstream_answers(upstream, proxy, way):
    with blackhole() as full, socket.create_server((HOST, 0)) as silent:
        url = {
            "unknown name": "http://name.invalid",
            "nobody listens": f"http://{HOST}:{dead_port()}",
            "full queue": f"http://{HOST}:{full}",
            "TLS that never shakes hands": f"https://{HOST}:{silent.getsockname()[1]}",
        }[way]
        one = proxy(url, upstream(), connect=0.15, answer=FAR)
        with soon():
            given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (200, "b", 2)
    assert one.outcomes() == [["failure"], ["success"]]


@pytest.mark.parametrize("tls", [False, True], ids=["a port that speaks no TLS", "an unknown CA"])
def test_tls_that_fails_counts_and_sends_no_request(upstream, proxy, tls):
    a, b = upstream(tls=loopback_tls() if tls else None), upstream()
    one = proxy(a.url.replace("http:", "https:"), b)
    assert one.ask().upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]
    assert seen(a) == [0]


# ------------------------------------------------------------------------ a reused connection that is dead


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dies", [close_now(), reset_now()])
def test_a_stale_connection_costs_nothing(upstream, proxy, dies, stream):
    a, b = upstream(answer(), dies), upstream()
    one = proxy(first(a), b)
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
    one = proxy(first(a), b)
    one.ask()
    given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (200, "b", 2)
    assert [request.connection for request in a.seen] == [1, 1, 2]
    assert one.outcomes() == [["success", "failure"], ["success"]]


@pytest.mark.parametrize("byte", [b"H", b"HTTP/1.1 200 OK\r\n"])
def test_a_reused_connection_that_breaks_after_a_byte_is_not_stale(upstream, proxy, byte):
    a, b = upstream(answer(), raw(byte)), upstream()
    one = proxy(first(a), b)
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


def test_the_fresh_connection_has_only_what_is_left_of_the_time(upstream, proxy):
    asked = []

    def silent(wire, request):
        asked.append(time.monotonic())
        wire.hang()

    a = upstream(answer(), later(0.7, close_now()), silent)
    one = proxy(a, answer=1.0)
    one.ask()
    assert one.ask().status == 504
    assert a.wait_left(2) - asked[0] < 0.8


# ------------------------------------------------------------------------------------------- timeouts

TRICKLED_HEAD = b"HTTP/1.1 200 OK\r\n" + b"".join(b"x-%d: y\r\n" % n for n in range(200))
SILENT_WHOLE = {
    "no answer": hang(),
    "only a head": head_only(content_type="application/json", then="hang"),
    "a head that trickles": trickle(TRICKLED_HEAD, 0.01, content_type=None),
    "a body that trickles": trickle(MESSAGE * 9, 0.01, content_type="application/json"),
    "half a body": whole(200, MESSAGE, then="hang", cut_at=20),
    "a body that never closes": events(
        [MESSAGE], framing="close", then="hang", content_type="application/json"
    ),
    "a body whose last chunk is missing": whole(200, MESSAGE, framing="chunked", then="hang"),
}
SILENT_STREAM = {
    "no answer": hang(),
    "only a head": head_only(then="hang"),
    "a start that trickles": trickle(START * 9, 0.01),
    "half an event": events([START, BLOCK], cut_at=20, then="hang"),
    "content that trickles": events([START, *(BLOCK[n : n + 1] for n in range(len(BLOCK)))], gap=0.01),
    "a start and then silence": events([START, PING], then="hang"),
    "a start and then silence by close": events([START, PING], framing="close", then="hang"),
}
SILENT = [
    *(pytest.param(False, reply, id=name) for name, reply in SILENT_WHOLE.items()),
    *(pytest.param(True, reply, id=f"stream: {name}") for name, reply in SILENT_STREAM.items()),
]


@pytest.mark.parametrize(("stream", "reply"), SILENT)
def test_waiting_past_a_timeout_ends_the_attempt_and_counts(upstream, proxy, stream, reply):
    a = upstream(reply)
    one = proxy(a, **{"answer": FAR, "first_byte": FAR, "first_byte" if stream else "answer": 0.1})
    with soon():
        given = one.ask(stream, question={**QUESTION, "padding": "x" * 100_000})
    assert (given.status, given.json()["error"]["type"]) == (504, "timeout_error")
    assert one.outcomes() == [["failure"]]
    a.wait_left()


def test_signs_of_life_renew_the_silence_limit(upstream, proxy):
    signs = [PING, b": wait\n\n", b": wait\n", START]
    stream = [part for sign in (*signs, *message_events()[2:]) for part in (0.5 * (sign in signs), sign)]
    given = proxy(upstream(events(stream)), upstream(), first_byte=0.9).ask(stream=True)
    assert (given.upstream, given.body) == ("a", b"".join([*signs, *message_events()[2:]]))


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


def test_an_upload_that_the_upstream_does_not_read_ends_at_the_timeout(upstream, proxy):
    one = proxy(upstream(stalled_upload()), answer=0.15, first_byte=FAR)
    assert one.ask(question={**QUESTION, "padding": "x" * 16 * MB}).status == 504
    assert one.outcomes() == [["failure"]]


def test_a_whole_answer_is_not_bounded_by_first_byte(upstream, proxy):
    assert proxy(upstream(default=later(0.2, answer())), first_byte=0.1).ask().status == 200


def test_a_stream_is_bounded_by_answer_up_to_its_commit_point(upstream, proxy):
    assert proxy(upstream(events([START, *[PING, 0.05] * 400])), answer=0.1).ask(stream=True).status == 504


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


def test_connect_timeouts_do_not_count_as_timeouts(upstream, proxy):
    with blackhole() as port:
        dead = f"http://{HOST}:{port}"
        given = proxy(dead, dead, upstream(hang()), upstream(), connect=0.12, answer=0.3).ask()
        assert (given.status, given.upstream, given.attempts) == (200, "d", 4)
        assert proxy(dead, connect=0.12).ask().status == 502


def test_a_timeout_does_not_count_if_another_attempt_succeeded_while_it_ran(upstream, proxy):
    a = upstream(hang(), default=answer())
    one = proxy(a, answer=0.5)
    slow = threading.Thread(target=one.ask)
    slow.start()
    a.wait_for(1)
    assert one.ask().status == 200
    slow.join(5)
    assert one.breakers["a"].circuit().failures == 0


def test_the_times_that_the_tests_shorten_are_those_of_the_document():
    text = (Path(__file__).parents[2] / "docs" / "failover.md").read_text()
    assert f"dead within {session.DEAD_WITHIN:.0f} s of sending" in text
    assert f"later than {attempt.PATIENCE:.0f} s after the attempt's begin" in text
    assert f"error status is awaited for {attempt.ERROR_BODY_SECONDS:.0f} s at most" in text


# -------------------------------------------------------------------------------------- errors of requests


def test_no_client_can_close_an_upstream_for_others(upstream, proxy, clock):
    a, b = upstream(*[error(400)] * 30), upstream()
    one = proxy(first(a), b, clock=clock)
    assert [one.ask().upstream for _ in range(30)] == ["b"] * 30
    assert one.ask().upstream == "a"


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


def test_an_upstream_that_refuses_everything_for_a_minute_backs_off_for_a_minute(refusing, clock):
    one, a, _ = refusing()
    assert one.ask().upstream == "b"
    assert seen(a) == [20]
    clock.now += 60
    assert [one.ask().upstream for _ in range(2)] == ["b", "b"]
    assert seen(a) == [21]  # one refusal more, and it is in backoff again


def test_the_refusals_of_such_an_upstream_rank_last(refusing):
    one, _, b = refusing()
    b.script(error(404))
    given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (404, "b", 2)


def test_the_refusals_of_such_an_upstream_do_not_stop_the_last_resort(upstream, refusing, clock):
    c = upstream(close_now())
    one, _, b = refusing({"base_url": c, "available_models": {"claude-x", "only-c"}}, failures=1)
    assert [one.ask().upstream for _ in range(3)] == ["b"] * 3  # c gets its turn, and its circuit opens
    b.script(error(500), error(500))
    clock.now += 60
    given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (200, "c", 3)


def test_another_result_within_the_minute_shows_that_it_does_not_refuse_everything(upstream, proxy, clock):
    a, b = upstream(*[error(400)] * 10, error(500), default=error(400)), upstream()
    one = proxy(first(a), b, clock=clock)
    for _ in range(25):
        one.ask()
        clock.now += 4
    assert seen(a) == [25]


def test_a_thinking_block_of_another_conversation_reaches_the_client_at_once(upstream, proxy):
    one = proxy(upstream(error(400, message="messages.1: thinking block: prefix mismatch")), upstream())
    given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (400, "a", 1)
    assert one.outcomes() == [["ignored"], []]


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
        (error(429), 429, [1, 0]),
        (error(500), 200, [1, 1]),
        (close_now(), 200, [1, 1]),
    ],
    ids=["401", "429", "500", "break"],
)
@pytest.mark.parametrize("names", BOUND)
def test_a_request_that_names_what_one_account_has_is_not_tried_elsewhere_after_a_4xx(
    upstream, proxy, names, said, status, asked
):
    members, headers = BOUND[names]
    a, b = upstream(said), upstream()
    assert proxy(a, b).ask(question={**QUESTION, **members}, headers=headers).status == status
    assert seen(a, b) == asked


# ------------------------------------------------------------- errors inside answers that say 200

TYPES = [*((type_, status) for status, type_ in ERROR_TYPES.items()), ("an_error_of_tomorrow", 500)]


@pytest.mark.parametrize("spelt", ["an event", "an event without a name", "a 200", "a 200 to a stream"])
@pytest.mark.parametrize(("type_", "status"), TYPES)
def test_an_error_in_a_200_counts_as_the_status_of_its_type(upstream, proxy, type_, status, spelt):
    data = json.dumps({"type": "error", "error": {"type": type_, "message": "no"}}).encode()
    event = (b"event: error\n" if spelt == "an event" else b"") + b"data: " + data + b"\n\n"
    theirs = [("request-id", "req_theirs")]
    reply = events([START, event], headers=theirs) if "event" in spelt else whole(200, data, theirs)
    one = proxy(upstream(reply))
    given = one.ask(stream=spelt != "a 200")
    if status in (401, 402):
        assert given.status == 502
    else:
        assert (given.status, given.body, given.ending) == (status, data, "end")
        assert given.header("request-id") == "req_theirs"
    assert given.header("content-type") == "application/json"
    assert one.outcomes() == [["failure" if status in (401, 402, 500, 504) else "ignored"]]


@pytest.mark.parametrize("extra", [b'"error":null', b'"content":["error"]'])
def test_an_answer_is_not_taken_for_an_error_without_cause(upstream, proxy, extra):
    body = b'{"type":"message",' + extra + b"}"
    given = proxy(upstream(whole(200, body))).ask()
    assert (given.status, given.body) == (200, body)


def test_an_error_and_a_stop_in_one_piece_are_an_error(upstream, proxy):
    last = error_event("overloaded_error") + b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    given = proxy(upstream(events([*message_events(["one "])[:4], last]))).ask(stream=True)
    assert given.ending == "cut"


# ---------------------------------------------------------------------------------- backoffs, retry-after


@pytest.mark.parametrize(
    ("reply", "lasts"),
    [
        (limited(429, "20"), 20),
        (error(529), 2),
        (events([START, error_event("rate_limit_error")], headers=[("retry-after", "20")]), 20),
    ],
    ids=["429", "529 that does not say when", "an error event"],
)
def test_a_limit_is_a_backoff_of_the_model(upstream, proxy, clock, reply, lasts):
    one = proxy(first(upstream(reply)), upstream(), clock=clock, failures=1)
    assert one.ask(stream=True).upstream == "b"
    assert one.ask(question=OTHER_MODEL).upstream == "a"
    clock.now += lasts - 0.1
    assert one.ask().upstream == "b"
    clock.now += 0.2
    assert one.ask().upstream == "a"
    assert one.breakers["a"].kinds == ["ordinary"] * 3


@pytest.mark.parametrize(
    ("reply", "lasts"),
    [(limited(503, "20"), 20), (error(429, details={"error_code": "contract_spend_limit_reached"}), 1800)],
    ids=["503", "spend limit"],
)
def test_a_backoff_of_the_upstream_is_one_of_all_models(upstream, proxy, clock, reply, lasts):
    one = proxy(first(upstream(reply)), upstream(), clock=clock, failures=1, cooldown=1800.0)
    assert one.ask().upstream == "b"
    clock.now += lasts - 1
    assert one.ask(question=OTHER_MODEL).upstream == "b"
    clock.now += 1
    assert one.ask().upstream == "a"


def test_three_answers_that_a_model_is_missing_skip_this_model_only_for_the_cooldown(upstream, proxy, clock):
    a, b = upstream(*[error(404)] * 3), upstream()
    one = proxy(first(a), b, clock=clock, cooldown=1800.0)
    assert [one.ask().upstream for _ in range(4)] == ["b"] * 4
    assert seen(a) == [3]
    assert one.ask(question=OTHER_MODEL).upstream == "a"
    clock.now += 1800
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
    replies = [limited(429, value) for value in values]
    given = proxy(*map(upstream, replies)).ask()
    assert given.status == 429
    assert given.header("retry-after") == told


def test_a_retry_after_in_milliseconds_does_not_contradict_the_one_told(upstream, proxy):
    long = [("retry-after", "30"), ("retry-after-ms", "30000")]
    short = [("retry-after", "5")]
    given = proxy(*(upstream(error(429, headers=headers)) for headers in (short, long))).ask()
    assert (given.header("retry-after"), given.header("retry-after-ms")) == ("5", None)


@pytest.mark.parametrize(("value", "client_gets"), [("0.5", "1"), ("-5", None), ("soon", None), ("7", "7")])
@pytest.mark.parametrize("status", [400, 404])
def test_the_retry_after_of_an_error_about_the_request_is_its_own_in_whole_seconds(
    upstream, proxy, status, value, client_gets
):
    limit = upstream(limited(429, "3")) if status == 400 else upstream(close_now())
    given = proxy(limit, upstream(limited(status, value))).ask()
    assert (given.status, given.header("retry-after")) == (status, client_gets)


# ------------------------------------------------------------------------ the circuit and the last resort


def test_three_failures_in_a_row_open_the_circuit_and_a_trial_closes_it(upstream, proxy, clock):
    a, b = upstream(*[close_now()] * 3), upstream()
    one = proxy(first(a), b, clock=clock)
    assert [one.ask().upstream for _ in range(6)] == ["b"] * 6
    assert seen(a) == [3]
    clock.now += 60
    assert [one.ask().upstream for _ in range(3)] == ["a"] * 3
    assert one.breakers["a"].kinds == ["ordinary"] * 3 + ["trial"] + ["ordinary"] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_success_as_the_last_resort_closes_the_circuit_a_stream_at_its_commit_point(a_open, stream):
    one = a_open(close_now())
    given = one.begin(stream)
    assert given.upstream == "a"
    assert one.breakers["a"].usable()
    given.leave()


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
    [close_now(), error(401), limited(429, "9"), whole(200, b"no"), hang(), error(404), error(413)],
    ids=["break", "401", "429", "no answer", "timeout", "404", "413"],
)
def test_the_last_resort_comes_after_failures_and_after_what_one_upstream_lacks(a_open, reply):
    given = a_open(reply).ask()
    assert (given.status, given.upstream, given.attempts) == (200, "a", 2)


def test_the_last_resort_does_not_come_after_a_second_timeout(a_open):
    given = a_open(hang(), hang()).ask()
    assert (given.status, given.attempts) == (504, 2)


@pytest.mark.parametrize("status", [400, 422])
def test_open_circuits_are_left_alone_after_an_error_about_the_request(a_open, status):
    given = a_open(error(status), close_now()).ask()
    assert (given.status, given.upstream, given.attempts) == (status, "b", 2)


def test_an_upstream_in_backoff_is_asked_also_after_an_error_about_the_request(upstream, proxy, clock):
    a, b = upstream(limited(429, "50")), upstream(answer(), error(400))
    one = proxy(first(a), b, clock=clock)
    assert one.ask().upstream == "b"
    given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (200, "a", 2)
    assert one.breakers["a"].usable()


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
        ([422, 401, "closed"], 422, "a"),
        ([401, 529], 529, "b"),
        ([500, 529], 529, "b"),
        ([429, 503, "closed"], 503, "b"),
        ([401, 403], 403, "b"),
        ([404, 529], 529, "b"),
        ([404, "closed"], 404, "a"),
        (["silent", 500], 500, "b"),
        ([500, "silent", "silent"], 500, "a"),
        # Those that only aiproxy can answer.
        (["closed", "html"], 502, None),
        ([401], 502, None),
        ([402, "closed"], 502, None),
        ([401, "silent"], 504, None),
        (["silent", "closed"], 504, None),
        (["html", "silent"], 504, None),
    ],
)
def test_when_all_fail_the_client_gets_the_error_that_helps_it_most(upstream, proxy, said, status, name):
    given = proxy(*(upstream(SAID[one]) for one in said), answer=0.25 if "silent" in said else 5.0).ask()
    assert (given.status, given.upstream, given.attempts) == (status, name, len(said))
    if name is None:
        assert given.json()["error"]["type"] == ("timeout_error" if status == 504 else "api_error")
        assert given.header("content-type") == "application/json"
        assert given.json()["request_id"] == given.header("request-id")


ACCOUNT_ERRORS = [
    error(401, message="invalid key sk-test-a"),
    error(400, message="Your credit balance is too low, sk-test-a"),
]


@pytest.mark.parametrize("reply", ACCOUNT_ERRORS)
def test_an_error_about_an_upstream_s_account_never_reaches_the_client_as_it_is(upstream, proxy, reply):
    given = proxy(upstream(reply)).ask()
    assert (given.status, given.json()["error"]["type"]) == (502, "api_error")
    assert "[redacted]" in given.json()["error"]["message"]
    assert "sk-test-a" not in given.body.decode()
    assert given.header("content-length") == str(len(given.body))
    assert given.header("x-should-retry") == "false"
    # A client may retry where only some accounts are out.
    given = proxy(upstream(reply), upstream(close_now())).ask()
    assert (given.status, given.header("x-should-retry")) == (502, None)


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
    id_ = ("x-aiproxy-request-id", given.header("x-aiproxy-request-id"))
    ours = [("x-aiproxy-upstream", "a"), ("x-aiproxy-attempts", "1"), id_]
    assert sorted(given.headers) == sorted([*headers[:4], length, *ours])


@pytest.mark.parametrize("body", [b"", b"<h1>Bad gateway</h1>", b"\xff\x00"])
def test_an_error_body_of_another_shape_comes_back_as_it_is(upstream, proxy, body):
    given = proxy(upstream(whole(502, body, content_type="text/html"))).ask()
    assert (given.status, given.body, given.header("content-type")) == (502, body, "text/html")


ERROR_BODY = b'{"type":"error","error":{"type":"api_error","message":"the upstream\'s"}}'

INCOMPLETE = {
    "stalls": lambda status: whole(status, ERROR_BODY, then="hang", cut_at=20),
    "stalls at once": lambda status: whole(status, ERROR_BODY, then="hang", cut_at=0),
    "breaks off": lambda status: whole(status, ERROR_BODY, then="cut", cut_at=20),
    "trickles": lambda status: trickle(b"{" * 999, 0.01, content_type="application/json", status=status),
}


@pytest.mark.parametrize("status", [400, 500, 529])
@pytest.mark.parametrize("how", INCOMPLETE)
def test_an_error_whose_body_is_late_or_incomplete_is_replaced_by_ours_of_the_same_status(
    upstream, proxy, monkeypatch, status, how
):
    monkeypatch.setattr("aiproxy.proxy.attempt.ERROR_BODY_SECONDS", 0.1)
    one = proxy(upstream(INCOMPLETE[how](status)), answer=FAR)
    with soon():
        given = one.ask()
    assert (given.status, given.upstream, given.ending) == (status, "a", "end")
    assert given.json()["type"] == "error"
    assert "the upstream's" not in given.json()["error"]["message"]
    assert given.header("content-type") == "application/json"
    assert given.header("content-length") == str(len(given.body))
    assert one.outcomes() == [["failure" if status == 500 else "ignored"]]


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


def test_an_answer_of_64_mb_passes_and_a_larger_one_is_a_fault(upstream, proxy):
    fill = b'{"type":"message","a":"' + b"x" * (MB - 23)
    sizes = {"b": 64 * MB, "a": 64 * MB + 1}

    def sized(size):
        def reply(wire, request):
            wire.send(b"HTTP/1.1 " + HEAD_200 + b"content-length: %d\r\n\r\n" % size + fill)
            piece = b"x" * MB
            for _ in range(62):
                wire.send(piece)
            wire.send(b"x" * (size - 63 * MB - 2) + b'"}')

        return reply

    one = proxy(upstream(sized(sizes["a"])), upstream(sized(sizes["b"])))
    given = one.ask()
    assert (given.upstream, len(given.body)) == ("b", sizes["b"])
    assert one.outcomes() == [["failure"], ["success"]]


def pouring(head, piece, times):
    """A head, then one piece so many times, made while it is sent."""

    def reply(wire, request):
        wire.send(b"HTTP/1.1 " + head + b"\r\n\r\n")
        for _ in range(times):
            wire.send(piece)

    return reply


@pytest.mark.parametrize(("size", "passes"), [(16, True), (17, False)])
def test_an_error_body_of_16_mb_passes_and_a_larger_one_is_replaced_by_one_of_ours(
    upstream, proxy, size, passes
):
    head = b"400 Bad\r\ncontent-type: application/json\r\ncontent-length: %d" % (size * MB)
    one = proxy(upstream(pouring(head, b"x" * MB, size)))
    given = one.ask()
    assert (given.status, len(given.body) == size * MB) == (400, passes)
    assert passes or given.json()["type"] == "error"
    assert one.outcomes() == [["ignored"]]


def test_what_comes_before_the_first_content_is_bounded(upstream, proxy):
    comment = b":" + b"x" * (MB - 3) + b"\n\n"

    def reply(wire, request):
        pouring(HEAD_EVENTS + b"connection: close", comment, 64)(wire, request)
        wire.send(b"".join(message_events()))
        wire.close()

    one = proxy(upstream(reply), upstream())
    assert one.ask(stream=True).upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "deflate", "identity", ""])
def test_an_answer_that_is_compressed_unasked_is_read_all_the_same(upstream, proxy, encoding):
    pack = {"deflate": zlib.compress, "identity": bytes, "": bytes}.get(encoding, gzip.compress)
    packed = pack(MESSAGE)
    given = proxy(upstream(whole(200, packed, headers=[("content-encoding", encoding)]))).ask()
    assert (given.status, given.body) == (200, MESSAGE)
    assert given.header("content-length") == str(len(MESSAGE))


def test_an_error_that_is_compressed_is_told_in_clear(upstream, proxy):
    given = proxy(upstream(gzipped(b'{"error":{"type":"x"}}', status=400))).ask()
    assert (given.status, given.body) == (400, b'{"error":{"type":"x"}}')
    assert given.header("content-encoding") is None


# --------------------------------------------------------------------------------------- bugs of ours


@pytest.mark.parametrize(
    ("place", "reply", "stream"),
    [
        ("attempt.to_upstream", answer(), False),
        ("attempt._read", answer(), False),
        ("attempt.to_client", answer(), True),
        ("attempt.Accumulator.message", answer(), None),
        ("exchange.decide", error(500), False),
        ("failover.Attempt", answer(), False),
    ],
)
def test_a_bug_of_ours_is_a_500_that_charges_no_upstream_and_gives_the_permit_back(
    upstream, proxy, monkeypatch, place, reply, stream
):
    a, b = upstream(reply), upstream()
    one = proxy({"base_url": a, "must_stream": stream is None}, b)
    monkeypatch.setattr(f"aiproxy.proxy.{place}", lambda *_, **__: 1 / 0)
    given = one.ask(bool(stream))
    assert (given.status, given.json()["error"]["type"]) == (500, "api_error")
    assert one.outcomes() == [["ignored"], []]
    assert seen(b) == [0]


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
