"""`must_stream`: an upstream that only streams, before clients that want one Message.

Which events spell which Message is `test_collect`'s; here is what the attempt makes of it.
"""

import json
import threading
import time

import pytest
from fakes import (
    BeforeBody,
    Clock,
    RawClient,
    answer,
    close_now,
    error,
    error_event,
    event,
    events,
    gzipped,
    hang,
    head_only,
    later,
    message_events,
    message_json,
    ping,
    tool_use,
    trickle,
    whole,
)
from in_process import MB, MESSAGE, QUESTION, Proxy

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


def text_of(*pieces):
    """The deltas of one text block, each as its JSON is written here."""
    return [
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"text_delta","text":"' + piece + b'"}}\n\n'
        for piece in pieces
    ]


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


def test_the_upstream_is_asked_for_a_stream_and_the_rest_of_the_body_is_untouched(upstream, proxy):
    a = upstream()
    question = b'{"model":"m" ,"messages":[ ], "x":1.10,"y":1e400}'
    assert proxy(a).ask(question=question).status == 200
    assert a.seen[0].body == b'{"model":"m","messages":[ ],"x":1.10,"y":1e400,"stream":true}'
    assert a.seen[0].json()["stream"] is True


@pytest.mark.parametrize("stream", [b"false", b"null"])
def test_a_stream_member_that_says_no_is_replaced(upstream, proxy, stream):
    a = upstream()
    question = b'{"stream": ' + stream + b',"model":"m","messages":[]}'
    given = proxy(a).ask(question=question)
    assert given.header("content-type") == "application/json"
    assert a.seen[0].json()["stream"] is True


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_client_that_wants_a_stream_gets_the_upstream_s_as_it_is(upstream, proxy, framing):
    odd = [*EVENTS[:4], b": note\r\n\r\n", PING, *EVENTS[4:]]
    a = upstream(events(odd, framing))
    given = proxy(a).ask(stream=True)
    assert given.body == b"".join(odd)
    assert given.header("content-type") == "text/event-stream; charset=utf-8"


def test_a_stream_client_s_body_goes_on_byte_for_byte(upstream, proxy):
    a = upstream()
    question = b'{ "stream" : true,\n"model":"m", "messages":[]}'
    proxy(a).ask(question=question)
    assert a.seen[0].body == question


def test_the_answer_s_other_headers_come_back(upstream, proxy):
    headers = [("request-id", "req_1"), ("anthropic-ratelimit-tokens-limit", "9"), ("set-cookie", "a=b")]
    given = proxy(upstream(events(EVENTS, headers=headers))).ask()
    assert sorted(given.headers) == sorted(
        [
            *headers[:2],
            ("content-type", "application/json"),
            ("content-length", str(len(given.body))),
            ("x-aiproxy-upstream", "a"),
            ("x-aiproxy-attempts", "1"),
        ]
    )


def test_a_model_is_mapped_here_too(upstream, proxy):
    a = upstream(answer(model=None))
    one = proxy({"base_url": a, "must_stream": True, "model_mappings": {"claude-x": "theirs-1"}})
    assert one.ask().json()["model"] == "theirs-1"
    assert a.seen[0].json()["model"] == "theirs-1"


@pytest.mark.parametrize("ending", [b"\r\n", b"\r"])
def test_other_line_ends_spell_the_same(upstream, proxy, ending):
    body = b"".join(EVENTS).replace(b"\n", ending)
    a = upstream(events([body[n : n + 7] for n in range(0, len(body), 7)]))
    assert proxy(a).ask().json() == json.loads(MESSAGE)


def test_a_stream_compressed_unasked_is_read_all_the_same(upstream, proxy):
    given = proxy(upstream(gzipped(EVENTS, "text/event-stream"))).ask()
    assert given.json() == json.loads(MESSAGE)
    assert given.header("content-encoding") is None


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_an_emoji_split_over_pieces_and_deltas_stays_whole(upstream, proxy, framing, size):
    emoji = "\N{GRINNING FACE}".encode()
    deltas = text_of(b"a" + emoji, b"\\ud83d", b"\\ude00b", "é\u2028\x85".encode())
    body = b"".join([START, BLOCK, *deltas, *EVENTS[-3:]])
    a = upstream(events([body[n : n + size] for n in range(0, len(body), size)], framing))
    given = proxy(a).ask()
    assert given.json()["content"][0]["text"] == "a\N{GRINNING FACE}\N{GRINNING FACE}bé\u2028\x85"


def test_thirty_thousand_deltas_take_less_than_two_seconds(upstream, proxy):
    words = [b"w%d " % n for n in range(30_000)]
    body = b"".join([START, BLOCK, *text_of(*words), *EVENTS[-3:]])
    one = proxy(upstream(events([body[n : n + 16_384] for n in range(0, len(body), 16_384)])))
    began = time.thread_time()  # the proxy works in this thread, and the machine may be busy
    given = one.ask()
    assert given.json()["content"][0]["text"].encode() == b"".join(words)
    assert time.thread_time() - began < 2


def test_one_large_block_costs_no_more_than_its_size(upstream, proxy):
    pieces = ["[", *['"' + "x" * 20_000 + '",'] * 400, "1]"]
    one = proxy(upstream(events([b"".join(tool_input(*pieces))])))
    began = time.thread_time()  # the proxy works in this thread, and the machine may be busy
    assert len(one.ask().json()["content"][0]["input"]) == 401
    assert time.thread_time() - began < 2


def test_one_event_of_several_mb_is_read_as_a_whole(upstream, proxy):
    body = b"".join([START, BLOCK, *text_of(b"x" * 6 * MB), *EVENTS[-3:]])
    given = proxy(upstream(events([body]))).ask()
    assert given.json()["content"][0]["text"] == "x" * 6 * MB


# -------------------------------------------------------------------------- tool inputs that are cut off


@pytest.mark.parametrize(("headers", "input_"), [({}, {"a": 1}), (FINE_GRAINED, {"a": 1, "b": "hel"})])
def test_a_tool_input_that_is_cut_off_is_completed_as_the_sdk_would(upstream, proxy, headers, input_):
    one = proxy(upstream(events(tool_input('{"a":1,', '"b":"hel'))))
    assert one.ask(headers=headers).json()["content"][0]["input"] == input_
    assert one.outcomes() == [["success"]]


def test_a_tool_input_that_is_no_json_is_no_answer(upstream, proxy):
    one = proxy(upstream(events(tool_input('{"a":1, oops}'))), upstream())
    given = one.ask()
    assert (given.status, given.upstream) == (200, "b")
    assert one.outcomes() == [["failure"], ["success"]]


# -------------------------------------------------------------------------------------- what goes wrong

NO_MESSAGE = {
    "closed": close_now(),
    "head_only": head_only(),
    "empty": events([]),
    "ended_before_message_stop": events(EVENTS[:-1]),
    "ended_before_message_stop_by_length": events(EVENTS[:-1], "length"),
    "ended_before_message_stop_by_close": events(EVENTS[:-1], "close"),
    "a_message_stop_that_is_not_whole": events([*EVENTS[:-1], STOP[:-1]]),
    "cut": events(EVENTS[:5], then="cut"),
    "cut_by_length": events(EVENTS[:5], "length", then="cut"),
    "reset": events(EVENTS[:5], then="reset"),
    "torn": events(EVENTS[:6], then="cut", cut_at=20, torn=True),
    "only_message_stop": events([STOP]),
    "no_message_start": events(EVENTS[1:]),
    "two_message_starts": events([START, *EVENTS]),
    "not_json": events([START, b"event: content_block_start\ndata: oops\n\n", *EVENTS[3:]]),
    "a_delta_for_no_block": events([START, DELTA, *EVENTS[-3:]]),
    "html": whole(200, b"<p>", content_type="text/html"),
    "json_though_a_stream_was_asked_for": whole(200, MESSAGE),
    "an_error_event_that_is_no_json": events([START, b"event: error\ndata: oops\n\n"]),
    "gzip_that_is_none": events(EVENTS, headers=[("content-encoding", "gzip")]),
    "an_event_over_16_mb": events(
        [START, BLOCK, b"event: x\ndata: ", *[b"x" * MB] * 17, b"\n\n", *EVENTS[3:]]
    ),
}


@pytest.mark.parametrize("reply", NO_MESSAGE.values(), ids=NO_MESSAGE)
def test_a_stream_that_spells_no_message_counts_and_the_next_upstream_answers(upstream, proxy, reply):
    one = proxy(upstream(reply), upstream())
    given = one.ask()
    assert (given.status, given.upstream, given.attempts) == (200, "b", 2)
    assert given.json() == json.loads(MESSAGE)
    assert one.outcomes() == [["failure"], ["success"]]


@pytest.mark.parametrize("name", ["ended_before_message_stop", "cut", "two_message_starts", "not_json"])
def test_a_stream_that_spells_no_message_is_a_502_when_there_is_no_other(upstream, proxy, name):
    given = proxy(upstream(NO_MESSAGE[name])).ask()
    assert (given.status, given.json()["error"]["type"]) == (502, "api_error")
    assert given.json()["request_id"] == given.header("request-id")


def test_the_next_upstream_may_be_an_ordinary_one_and_the_other_way_round(upstream, proxy):
    a, b = upstream(events(EVENTS[:5], then="cut")), upstream(answer("b"), error(500))
    one = proxy(a, {"base_url": b})
    assert one.ask().json()["content"][0]["text"] == "b"
    assert (a.seen[0].json()["stream"], b.seen[0].json()) == (True, QUESTION)
    a.script(answer("a"), answer("a"))
    assert [one.ask().json()["content"][0]["text"] for _ in range(2)] == ["a", "a"]


@pytest.mark.parametrize("before", [0, 1, 2, 5])
@pytest.mark.parametrize(
    ("type_", "status"),
    [
        ("invalid_request_error", 400),
        ("request_too_large", 413),
        ("rate_limit_error", 429),
        ("api_error", 500),
        ("timeout_error", 504),
        ("overloaded_error", 529),
        ("an_error_of_tomorrow", 500),
    ],
)
def test_an_error_event_wherever_it_comes_has_the_status_of_its_type(upstream, proxy, type_, status, before):
    told = error_event(type_)
    one = proxy(upstream(events([*EVENTS[:before], told], headers=[("request-id", "req_theirs")])))
    given = one.ask()
    assert (given.status, given.body) == (status, told.split(b"data: ")[1].strip())
    assert given.header("content-type") == "application/json"
    assert given.header("request-id") == "req_theirs"
    assert one.outcomes() == [["ignored" if status in (400, 413, 429, 529) else "failure"]]


def test_after_an_error_event_in_the_middle_the_next_upstream_answers(upstream, proxy):
    one = proxy(upstream(events([*EVENTS[:5], error_event("api_error")])), upstream())
    assert one.ask().upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]


def test_an_error_event_with_a_retry_after_is_a_backoff(upstream, proxy):
    clock = Clock()
    reply = events([*EVENTS[:5], error_event()], headers=[("retry-after", "20")])
    one = proxy({"base_url": upstream(reply), "weight": 9, "must_stream": True}, upstream(), clock=clock)
    assert one.ask().upstream == "b"
    clock.now += 19.9
    assert one.ask().upstream == "b"
    clock.now += 0.1
    assert one.ask().upstream == "a"


def test_an_error_status_is_an_error_as_anywhere(upstream, proxy):
    given = proxy(upstream(error(400, message="no"))).ask()
    assert (given.status, given.json()["error"]["message"]) == (400, "no")


def test_a_stream_over_64_mb_is_a_fault(upstream, proxy):
    def pour(wire, request):
        wire.head(200, [("content-type", "text/event-stream"), ("connection", "close")])
        wire.send(START + BLOCK)
        comment = b": " + b"x" * (MB - 4) + b"\n\n"
        for _ in range(64):
            wire.send(comment)
        wire.send(b"".join(EVENTS[3:]))

    one = proxy(upstream(pour), upstream())
    assert one.ask().upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]


def test_a_bug_of_ours_is_a_500_that_nobody_is_charged_for(upstream, proxy, monkeypatch):
    a, b = upstream(), upstream()
    one = proxy(a, b)
    monkeypatch.setattr("aiproxy.proxy.attempt.Accumulator.feed", lambda *_: 1 / 0)
    given = one.ask()
    assert (given.status, given.json()["error"]["type"]) == (500, "api_error")
    assert one.outcomes() == [["ignored"], []]
    a.wait_left()


# -------------------------------------------------------------------------------------------- timeouts


@pytest.mark.parametrize("framing", FRAMINGS)
def test_silence_in_the_middle_ends_at_the_idle_timeout(upstream, proxy, framing):
    a = upstream(events(EVENTS[:5], framing, then="hang"))
    one = proxy(a, idle=0.12)
    began = time.monotonic()
    assert one.ask().status == 504
    assert 0.12 <= time.monotonic() - began < 3
    assert one.outcomes() == [["failure"]]
    a.wait_left()


@pytest.mark.parametrize(
    "reply", [hang(), BeforeBody(hang()), trickle(b"HTTP/1.1 200 OK\r\n" * 9, 0.01, content_type=None)]
)
def test_silence_before_the_head_ends_at_the_first_byte_timeout(upstream, proxy, reply):
    one = proxy(upstream(reply), first_byte=0.12)
    began = time.monotonic()
    assert one.ask().status == 504
    assert 0.12 <= time.monotonic() - began < 3
    assert one.outcomes() == [["failure"]]


@pytest.mark.parametrize("items", [[*EVENTS[:4], *[DELTA] * 500], [PING] * 500, [b": note\n\n"] * 500])
def test_a_stream_that_goes_on_for_ever_ends_at_the_answer_timeout(upstream, proxy, items):
    a = upstream(events(items, gap=0.01))
    one = proxy(a, answer=0.15)
    began = time.monotonic()
    assert one.ask().status == 504
    assert 0.15 <= time.monotonic() - began < 3
    assert one.outcomes() == [["failure"]]
    a.wait_left()


def test_a_second_timeout_is_a_504(upstream, proxy):
    silent = events(EVENTS[:5], then="hang")
    a, b, c = upstream(silent), upstream(silent), upstream()
    given = proxy(a, b, c, idle=0.15).ask()
    assert (given.status, given.json()["error"]["type"], given.attempts) == (504, "timeout_error", 2)


def test_first_byte_does_not_bound_a_stream_that_has_begun(upstream, proxy):
    one = proxy(upstream(events(EVENTS, gap=0.04)), first_byte=0.2)
    assert one.ask().status == 200


def test_answer_does_not_bound_a_stream_that_is_not_collected(upstream, proxy):
    one = proxy(upstream(events(EVENTS, gap=0.03)), answer=0.1)
    assert one.ask(stream=True).ending == "end"


def test_first_byte_bounds_a_stream_that_is_not_collected_to_its_commit_point(upstream, proxy):
    one = proxy(upstream(events([START, PING], then="hang")), first_byte=0.1)
    assert one.ask(stream=True).status == 504


def test_after_a_timeout_the_next_upstream_answers(upstream, proxy):
    one = proxy(upstream(events(EVENTS[:5], then="hang")), upstream(), idle=0.3)
    assert one.ask().upstream == "b"
    assert one.outcomes() == [["failure"], ["success"]]


# ------------------------------------------------------------------------------------ the end of the body


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_the_connection_is_used_again(upstream, proxy, framing):
    a = upstream(default=events(EVENTS, framing))
    one = proxy(a)
    assert [one.ask().status for _ in range(4)] == [200] * 4
    assert a.connections == 1


def test_the_connection_is_used_again_where_the_end_comes_a_little_later(upstream, proxy):
    a = upstream(default=events([*EVENTS, 0.02]))
    one = proxy(a)
    assert [one.ask().status for _ in range(3)] == [200] * 3
    assert a.connections == 1


@pytest.mark.parametrize("then", ["hang", "cut", "reset"])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_what_follows_message_stop_holds_nobody_and_is_no_failure(
    upstream, proxy, monkeypatch, framing, then
):
    monkeypatch.setattr("aiproxy.proxy.attempt.END_OF_BODY_SECONDS", 0.1)
    a = upstream(events(EVENTS, framing, then=then))
    one = proxy(a)
    began = time.monotonic()
    assert one.ask().json() == json.loads(MESSAGE)
    assert time.monotonic() - began < 3
    assert one.ask().status == 200
    assert one.outcomes() == [["success", "success"]]
    assert a.connections == 2


def test_an_endless_trickle_after_message_stop_holds_nobody(upstream, proxy, monkeypatch):
    monkeypatch.setattr("aiproxy.proxy.attempt.END_OF_BODY_SECONDS", 0.1)
    a = upstream(events([*EVENTS, *[PING] * 500], gap=0.02))
    one = proxy(a)
    began = time.monotonic()
    assert one.ask().json() == json.loads(MESSAGE)
    assert time.monotonic() - began < 3
    a.wait_left()


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


def test_a_stale_connection_costs_nothing_here_either(upstream, proxy):
    a = upstream(answer(), close_now())
    one = proxy(a)
    assert [one.ask().status, one.ask().status] == [200, 200]
    assert [request.connection for request in a.seen] == [1, 1, 2]
    assert one.outcomes() == [["success", "success"]]


def test_a_good_trial_closes_the_circuit_only_when_the_message_is_whole(upstream, proxy):
    clock, gate = Clock(), threading.Event()
    a = upstream(close_now(), events([*EVENTS[:5], gate, *EVENTS[5:]]))
    one = proxy(a, clock=clock, failures=1)
    assert one.ask().status == 502
    clock.now += 60
    given = []
    asking = threading.Thread(target=lambda: given.append(one.ask()))
    asking.start()
    a.wait_for(2)
    assert not one.breakers["a"].usable()
    gate.set()
    asking.join(5)
    assert given[0].status == 200
    assert one.breakers["a"].usable()
    assert one.outcomes() == [["failure", "success"]]


# ----------------------------------------------------------------------------------------- on the wire


def test_over_a_real_server_it_is_json_and_a_stream_by_turns(upstream, serve, config_of):
    a = upstream(default=later(0.01, answer("Hi")))
    served = serve(config_of([{"base_url": a, "must_stream": True}]))
    with RawClient.to(served.url) as client:
        client.post(QUESTION)
        one = client.read()
        client.post({**QUESTION, "stream": True})
        other = client.read()
    assert (one.status, one.header("content-type"), one.ending) == (200, "application/json", "end")
    assert one.json() == json.loads(message_json("Hi"))
    assert (other.status, other.header("content-type")) == (200, "text/event-stream; charset=utf-8")
    assert other.body == b"".join(message_events(["Hi"]))
    assert ping() in other.body
    assert a.connections == 1
