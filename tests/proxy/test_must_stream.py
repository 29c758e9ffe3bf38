"""`must_stream`: an upstream that only streams, before clients that want one Message.

Which events spell which Message is `tests/unit/test_accumulate.py`'s, how they are framed
`tests/unit/test_sse.py`'s; here is what the attempt makes of it.
"""

import json
import time

import pytest
from fakes import (
    answer,
    close_now,
    error_event,
    event,
    events,
    head_only,
    message_events,
    message_json,
    tool_use,
    trickle,
    whole,
)
from in_process import MB, MESSAGE, QUESTION, Proxy
from timing import FAR, soon

EVENTS = message_events()
START, PING, BLOCK, DELTA = EVENTS[:4]
STOP = EVENTS[-1]
FRAMINGS = ["chunked", "length", "close"]
FINE_GRAINED = {"anthropic-beta": "message-threads-2026-08-12,fine-grained-tool-streaming-2025-05-14"}


@pytest.fixture
def proxy():
    """Build a proxy before upstreams that are all marked `must_stream`, unless they come as settings."""
    made = []

    def make(*upstreams, **settings):
        marked = [
            one if isinstance(one, dict) else {"base_url": one, "must_stream": True} for one in upstreams
        ]
        made.append(Proxy(*marked, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def tool_input(*pieces):
    """The events of a Message whose tool input comes in these pieces."""
    block = event(
        "content_block_start",
        {"type": "content_block_start", "index": 0, "content_block": tool_use(input={})},
    ).replace(b'{"city": "Oslo", "days": 3}', b"{}")
    deltas = [
        event(
            "content_block_delta",
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "input_json_delta", "partial_json": piece},
            },
        )
        for piece in pieces
    ]
    return [START, block, *deltas, *EVENTS[-3:]]


# ------------------------------------------------------------------------------------ the one Message


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_client_that_wants_no_stream_gets_the_one_message_as_json(upstream, proxy, framing):
    a = upstream(events(message_events(["Hel", "lo"], tool=tool_use()), framing))
    one = proxy(a)
    given = one.ask()
    assert (given.status, given.ending) == (200, "end")
    assert given.json() == json.loads(message_json("Hello", tool=tool_use()))
    assert given.header("content-type") == "application/json"
    assert given.header("content-length") == str(len(given.body))
    assert one.outcomes() == [["success"]]


@pytest.mark.parametrize("stream", ["", ',"stream": false', ',"stream":null'])
def test_the_upstream_is_asked_for_a_stream_and_the_rest_of_the_body_is_untouched(upstream, proxy, stream):
    a = upstream()
    question = '{"model":"m" ,"messages":[ ], "x":1.10,"y":1e400' + stream + "}"
    assert proxy(a).ask(question=question.encode()).header("content-type") == "application/json"
    assert a.seen[0].body == b'{"model":"m","messages":[ ],"x":1.10,"y":1e400,"stream":true}'


def test_a_client_that_wants_a_stream_gets_the_upstream_s_as_it_is(upstream, proxy):
    odd = [*EVENTS[:4], b": note\r\n\r\n", PING, *EVENTS[4:]]
    a = upstream(events(odd))
    question = b'{ "stream" : true,\n"model":"m", "messages":[]}'
    given = proxy(a).ask(question=question)
    assert given.body == b"".join(odd)
    assert given.header("content-type") == "text/event-stream; charset=utf-8"
    assert a.seen[0].body == question


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 7, 6 * MB], ids=["byte by byte", "in small pieces", "at once"])
def test_however_it_is_cut_and_whatever_ends_its_lines_it_spells_the_same(upstream, proxy, size, ending):
    said = "\N{GRINNING FACE}é\u2028" + "x" * (4 * MB if size > MB else 10)
    body = b"".join(message_events([said[:1], said[1:]])).replace(b"\n", ending)
    given = proxy(upstream(events([body[n : n + size] for n in range(0, len(body), size)]))).ask()
    assert given.json()["content"][0]["text"] == said


# -------------------------------------------------------------------------- tool inputs that are cut off


@pytest.mark.parametrize(("headers", "input_"), [({}, {"a": 1}), (FINE_GRAINED, {"a": 1, "b": "hel"})])
def test_a_tool_input_that_is_cut_off_is_completed_as_the_sdk_would(upstream, proxy, headers, input_):
    one = proxy(upstream(events(tool_input('{"a":1,', '"b":"hel'))))
    assert one.ask(headers=headers).json()["content"][0]["input"] == input_
    assert one.outcomes() == [["success"]]


# -------------------------------------------------------------------------------------- what goes wrong


def over_64_mb(wire, request):
    wire.head(200, [("content-type", "text/event-stream"), ("connection", "close")])
    wire.send(START + BLOCK)
    comment = b": " + b"x" * (MB - 4) + b"\n\n"
    for _ in range(64):
        wire.send(comment)
    wire.send(b"".join(EVENTS[3:]))


NO_MESSAGE = {
    "closed": close_now(),
    "only a head": head_only(),
    "empty": events([]),
    "ended before message_stop": events(EVENTS[:-1]),
    "ended before message_stop by length": events(EVENTS[:-1], "length"),
    "ended before message_stop by close": events(EVENTS[:-1], "close"),
    "a message_stop that is not whole": events([*EVENTS[:-1], STOP[:-1]]),
    "cut": events(EVENTS[:5], then="cut"),
    "reset": events(EVENTS[:5], then="reset"),
    "torn": events(EVENTS[:6], then="cut", cut_at=20, torn=True),
    "no message_start": events(EVENTS[1:]),
    "two message_starts": events([START, *EVENTS]),
    "a tool input that is no JSON": events(tool_input('{"a":1, oops}')),
    "HTML": whole(200, b"<p>", content_type="text/html"),
    "JSON though a stream was asked for": whole(200, MESSAGE),
    "an error event that is no JSON": events([START, b"event: error\ndata: oops\n\n"]),
    "an error event in the middle": events([*EVENTS[:5], error_event("api_error")]),
    "gzip that is none": events(EVENTS, headers=[("content-encoding", "gzip")]),
    "an event over 16 MB": events(
        [START, BLOCK, b"event: x\ndata: ", *[b"x" * MB] * 17, b"\n\n", *EVENTS[3:]]
    ),
    "more than 64 MB": over_64_mb,
}


@pytest.mark.parametrize("reply", NO_MESSAGE.values(), ids=NO_MESSAGE)
def test_a_stream_that_spells_no_message_counts_and_the_next_upstream_answers(upstream, proxy, reply):
    one = proxy(upstream(reply), upstream())
    given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (200, "b", 2)
    assert given.json() == json.loads(MESSAGE)
    assert one.outcomes() == [["failure"], ["success"]]


def test_a_stream_that_spells_no_message_is_a_502_when_there_is_no_other(upstream, proxy):
    given = proxy(upstream(NO_MESSAGE["two message_starts"])).ask()
    assert (given.status, given.json()["error"]["type"]) == (502, "api_error")
    assert given.json()["request_id"] == given.header("request-id")


def test_the_next_upstream_may_be_an_ordinary_one(upstream, proxy):
    a, b = upstream(events(EVENTS[:5], then="cut")), upstream(answer("b"))
    assert proxy(a, {"base_url": b}).ask().json()["content"][0]["text"] == "b"
    assert (a.seen[0].json()["stream"], b.seen[0].json()) == (True, QUESTION)


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize(
    ("type_", "status"), [("invalid_request_error", 400), ("overloaded_error", 529), ("of_tomorrow", 500)]
)
def test_an_error_event_wherever_it_comes_has_the_status_of_its_type(upstream, proxy, type_, status, before):
    told = error_event(type_)
    one = proxy(upstream(events([*EVENTS[:before], told], headers=[("request-id", "req_theirs")])))
    given = one.ask()
    assert (given.status, given.body) == (status, told.split(b"data: ")[1].strip())
    assert given.header("content-type") == "application/json"
    assert given.header("request-id") == "req_theirs"
    assert one.outcomes() == [["ignored" if status in (400, 529) else "failure"]]


# -------------------------------------------------------------------------------------------- timeouts


@pytest.mark.parametrize(
    ("reply", "limit"),
    [
        (trickle(b"HTTP/1.1 200 OK\r\n" * 999, 0.01, content_type=None), "first_byte"),
        *((events(EVENTS[:5], framing, then="hang"), "idle") for framing in FRAMINGS),
        (events([*EVENTS[:4], *[DELTA] * 500], gap=0.01), "answer"),
        (events([PING] * 500, gap=0.01), "answer"),
        (events([b": note\n\n"] * 500, gap=0.01), "answer"),
    ],
    ids=["head", *(f"silence by {framing}" for framing in FRAMINGS), "deltas", "pings", "comments"],
)
def test_the_head_comes_within_first_byte_events_within_idle_and_all_within_answer(
    upstream, proxy, reply, limit
):
    a = upstream(reply)
    one = proxy(a, **{"first_byte": FAR, "idle": FAR, "answer": FAR, limit: 0.15})
    with soon():
        assert one.ask().status == 504
    assert one.outcomes() == [["failure"]]
    a.wait_left()


def test_each_event_and_comment_starts_the_idle_time_anew(upstream, proxy):
    slow = [part for one in [*EVENTS[:5], b": wait\n", *EVENTS[5:]] for part in (one, 0.15)]
    assert proxy(upstream(events(slow)), idle=0.8).ask().status == 200


def test_answer_bounds_the_computing_too(upstream, proxy, monkeypatch):
    def slowly(*_):
        time.sleep(0.1)

    monkeypatch.setattr("aiproxy.proxy.attempt.Accumulator.feed", slowly)
    assert proxy(upstream(events([b"".join(EVENTS)])), answer=0.3).ask().status == 504


def test_first_byte_does_not_bound_a_stream_that_has_begun(upstream, proxy):
    one = proxy(upstream(events([*EVENTS[:4], 0.6, *EVENTS[4:]])), first_byte=0.5)
    assert one.ask().status == 200


# ------------------------------------------------------------------------------------ the end of the body


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_the_connection_is_used_again(upstream, proxy, framing):
    a = upstream(default=events(EVENTS, framing))
    one = proxy(a)
    assert [one.ask().status for _ in range(4)] == [200] * 4
    assert a.connections == 1


@pytest.mark.parametrize(
    "reply",
    [
        *(events(EVENTS, framing, then="hang") for framing in FRAMINGS),
        events(EVENTS, then="cut"),
        events(EVENTS, then="reset"),
        events([*EVENTS, *[PING] * 500], gap=0.02),
    ],
    ids=[*FRAMINGS, "cut", "reset", "an endless trickle"],
)
def test_what_follows_message_stop_holds_nobody_and_is_no_failure(upstream, proxy, monkeypatch, reply):
    monkeypatch.setattr("aiproxy.proxy.attempt.END_OF_BODY_SECONDS", 0.1)
    a = upstream(reply)
    one = proxy(a, answer=FAR, idle=FAR)
    with soon():
        assert one.ask().json() == json.loads(MESSAGE)
    assert one.ask().status == 200
    assert one.outcomes() == [["success", "success"]]
    assert a.connections == 2


def test_the_answer_timeout_while_waiting_for_the_end_of_the_body_does_no_harm(upstream, proxy):
    one = proxy(upstream(events(EVENTS, then="hang")), upstream(), answer=0.3)
    given = one.ask()
    assert (given.status, given.upstream) == (200, "a")
    assert one.outcomes() == [["success"], []]


def test_a_connection_is_not_used_again_after_an_error_event(upstream, proxy):
    a = upstream(events([START, error_event()], then="hang"), answer())
    one = proxy(a)
    assert [one.ask().status, one.ask().status] == [529, 200]
    assert a.connections == 2
