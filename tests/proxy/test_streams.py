"""Streams after their commit point: what reaches the client, when, and how it ends.

What is about pieces and verdicts runs in process; what is about the client's wire runs against a real
gunicorn.
"""

import itertools
import json
import random
import threading
import time
import zlib

import pytest
from fakes import RawClient, error_event, events, gzipped, message_events
from in_process import MB, QUESTION, Proxy
from timing import FAR, soon

EVENTS = message_events(["Hel", "lo ", "\N{GRINNING FACE}\u2028 event: message_stop"])
WHOLE = b"".join(EVENTS)
START, PING, BLOCK, DELTA = EVENTS[:4]
STOP = EVENTS[-1]
FRAMINGS = ["chunked", "length", "close"]
STREAMED = {**QUESTION, "stream": True}


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
def wire(serve, config_of):
    """Start a gunicorn before these upstreams; clients of it that have asked for a stream."""
    clients = []

    def start(*upstreams, **extra):
        served = serve(config_of(upstreams, **extra))

        def ask(question=None):
            clients.append(RawClient.to(served.url))
            clients[-1].post(question or STREAMED)
            return clients[-1]

        return served, ask

    yield start
    for client in clients:
        client.close()


def error_in(data):
    """The error that the last event of a body tells."""
    told, _, rest = data.rpartition(b"event: error\ndata: ")[2].partition(b"\n\n")
    assert rest == b""
    return json.loads(told)


# ------------------------------------------------------------------------------------ bytes as they come

SPELLINGS = {
    "the API's": WHOLE,
    "mixed line ends": b"\xef\xbb\xbf: hello\r\n\n"
    + WHOLE.replace(b"\n\n", b"\r\n\n")
    + b"id: 7\nretry: 5\n\n",
    "carriage returns": WHOLE.replace(b"\n", b"\r"),
    "no space after the colon": WHOLE.replace(b": {", b":{").replace(b"event: ", b"event:"),
    "data in several lines": WHOLE.replace(b'", "', b'",\ndata: "'),
    "events without a name": WHOLE.replace(STOP, b'data: {"type":"new"}\n\n: note\n\n' + STOP),
    "more after the stop": WHOLE + PING + b": bye\n\n",
    "blank lines": b"\n\n" + WHOLE.replace(b"\n\n", b"\n\n\n\n"),
}


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_bytes_arrive_as_they_were_sent_however_they_are_cut(upstream, proxy, spelling, framing):
    body = SPELLINGS[spelling]
    dice = random.Random(f"{spelling} {framing}")
    scripts = [[body[n : n + 1] for n in range(len(body))]]
    for count in (1, 5, 40):
        cuts = sorted(dice.sample(range(1, len(body)), count))
        scripts.append([body[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)])
    a = upstream(*(events(pieces, framing) for pieces in scripts))
    one = proxy(a)
    for pieces in scripts:
        given = one.ask(stream=True)
        assert (given.status, given.ending, given.body) == (200, "end", body), pieces
        assert all(piece.endswith((b"\n", b"\r")) for piece in given.pieces), pieces
    assert one.outcomes() == [["success"] * 4]
    assert framing == "close" or a.connections == 1


def test_headers_of_a_stream_come_back_and_its_length_does_not(upstream, proxy):
    a = upstream(
        events(EVENTS, "length", headers=[("request-id", "req_1"), ("x-new", "1"), ("set-cookie", "a=b")])
    )
    given = proxy(a).ask(stream=True)
    assert sorted(given.headers) == [
        ("content-type", "text/event-stream; charset=utf-8"),
        ("request-id", "req_1"),
        ("x-aiproxy-attempts", "1"),
        ("x-aiproxy-request-id", given.header("x-aiproxy-request-id")),
        ("x-aiproxy-upstream", "a"),
        ("x-new", "1"),
    ]


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_stream_that_is_compressed_unasked_is_relayed_in_clear_and_live(upstream, proxy, framing):
    gates = [threading.Event() for _ in EVENTS]
    packer = zlib.compressobj(wbits=31)
    pieces = []
    for data, gate in zip(EVENTS, gates, strict=True):
        packed = packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)
        pieces += [packed[:1], packed[1:], gate]
    pieces.append(packer.flush())
    one = proxy(upstream(events(pieces, framing, headers=[("content-encoding", "gzip")])))
    for gate in gates[:2]:
        gate.set()
    given = one.begin(stream=True)
    assert given.header("content-encoding") is None
    for n, gate in enumerate(gates[2:], 3):
        while len(given.body) < len(b"".join(EVENTS[:n])):
            assert given.next()
        assert given.body == b"".join(EVENTS[:n])
        gate.set()
    assert given.read().ending == "end"
    assert one.outcomes() == [["success"]]


def packed(data):
    """The beginning of a gzip stream that spells this."""
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)


@pytest.mark.parametrize(
    "reply",
    [
        gzipped(EVENTS[:5], "text/event-stream"),
        events([packed(b"".join(EVENTS[:5])), b"\xff" * 20], headers=[("content-encoding", "gzip")]),
    ],
    ids=["cut", "rubbish"],
)
def test_a_compressed_stream_that_is_cut_or_turns_to_rubbish_is_a_break(upstream, proxy, reply):
    one = proxy(upstream(reply))
    assert one.ask(stream=True).ending == "cut"
    assert one.outcomes() == [["failure"]]


# ------------------------------------------------------------------------------------ the commit point


@pytest.mark.parametrize(
    "first",
    [
        [BLOCK],
        [DELTA],
        [START, BLOCK],
        [START, STOP],
        [b'event: new_kind\ndata: {"type":"new_kind"}\n\n'],
        [START.replace(b"\n", b"\r\n"), BLOCK.replace(b"\n", b"\r\n")],
    ],
)
def test_the_first_content_commits(upstream, proxy, first):
    gate = threading.Event()
    a, b = upstream(events([*first, gate], then="cut")), upstream()
    one = proxy(a, b, first_byte=0.3)
    given = one.begin(stream=True)
    assert (given.status, given.upstream) == (200, "a")
    assert [given.next() for _ in first] == first  # what was held comes first
    gate.set()
    assert given.read().body.startswith(b"".join(first))


def test_after_the_commit_point_only_idle_bounds_a_stream(upstream, proxy):
    a = upstream(events([*EVENTS[:3], 0.7, *EVENTS[3:]]))
    given = proxy(a, first_byte=0.6, answer=0.6).ask(stream=True)
    assert (given.body, given.ending) == (WHOLE, "end")


def test_an_event_of_over_4_mb_is_passed_on_while_it_arrives(upstream, proxy):
    gate = threading.Event()
    large = DELTA.replace(b"Hel", b"x" * 5 * MB)
    a = upstream(events([START, large[: 4 * MB + 1000], gate, large[4 * MB + 1000 :], *EVENTS[4:]], "length"))
    one = proxy(a)
    given = one.begin(stream=True)
    while sum(map(len, given.pieces)) < 4 * MB:
        given.next()
    gate.set()
    assert (given.read().body == START + large + b"".join(EVENTS[4:]), given.ending) == (True, "end")
    assert one.outcomes() == [["success"]]


# ------------------------------------------------------------------------------------ streams that break


def ends_of(data):
    """How many bytes of it are whole events."""
    return data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0


@pytest.mark.parametrize(
    ("framing", "torn"), [("chunked", False), ("chunked", True), ("length", False), ("close", False)]
)
def test_a_cut_stream_ends_in_an_error_event_wherever_it_is_cut(upstream, proxy, framing, torn):
    body = WHOLE[: -len(STOP)]
    places = sorted({*range(len(START + PING + BLOCK), len(body), 23), len(body) - 1, len(body)})
    replies = []
    for place in places:
        end = ends_of(body[:place])
        pieces = [body[:end], body[end:]] if end < len(body) else [body]
        cut_at = place - end if end < len(body) else None
        then = "end" if framing == "close" else "cut"
        if then == "end":
            pieces, cut_at = [body[:place]], None
        replies.append(events(pieces, framing, then=then, cut_at=cut_at, torn=torn and bool(cut_at)))
    a = upstream(*replies)
    one = proxy(a, failures=10**6)
    for place in places:
        given = one.ask(stream=True)
        end = ends_of(body[:place])
        assert given.body[:end] == body[:end]
        told = error_in(given.body[end:])
        assert (told["type"], told["error"]["type"]) == ("error", "api_error")
        assert told["request_id"].startswith("req_")
        assert str(a.port).encode() not in given.body
        assert given.ending == "cut"
    assert one.outcomes() == [["failure"] * len(places)]


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_clean_end_without_a_whole_message_stop_is_a_break(upstream, proxy, framing):
    one = proxy(upstream(*[events([*EVENTS[:-1], *last], framing) for last in ([], [STOP[:-1]])]))
    for _ in range(2):
        given = one.ask(stream=True)
        assert given.body.startswith(WHOLE[: -len(STOP)] + b"event: error\n")
        assert given.ending == "cut"
    assert one.outcomes() == [["failure"] * 2]


@pytest.mark.parametrize(
    "reply",
    [
        *(events(EVENTS[:4], framing, then="hang") for framing in FRAMINGS),
        events([*EVENTS[:4], *(DELTA[n : n + 1] for n in range(len(DELTA) - 2)), 9.0], gap=0.01),
    ],
    ids=[*FRAMINGS, "a trickle that completes no event"],
)
def test_silence_after_the_commit_point_ends_in_a_timeout_error(upstream, proxy, reply):
    a, b = upstream(reply), upstream()
    one = proxy(a, b, idle=0.2)
    given = one.ask(stream=True)
    assert given.body.startswith(b"".join(EVENTS[:4]))
    assert error_in(given.body)["error"]["type"] == "timeout_error"
    assert (given.ending, given.upstream) == ("cut", "a")
    assert one.outcomes() == [["failure"], []]
    a.wait_left()


def test_each_piece_starts_the_idle_time_anew(upstream, proxy):
    one = proxy(upstream(events(EVENTS, gap=0.15)), idle=0.9)
    assert one.ask(stream=True).ending == "end"


@pytest.mark.parametrize(
    ("type_", "then", "line_end", "outcome"),
    [
        ("api_error", "end", "\n", "failure"),
        ("authentication_error", "cut", "\r\n", "failure"),
        ("overloaded_error", "hang", "\r", "ignored"),
    ],
)
def test_an_error_event_is_relayed_as_it_is_breaks_the_connection_and_counts_as_its_status(
    upstream, proxy, type_, then, line_end, outcome
):
    event = error_event(type_).replace(b"\n", line_end.encode())
    one = proxy({"base_url": upstream(events([*EVENTS[:4], event], then=then)), "weight": 9}, upstream())
    given = one.ask(stream=True)
    assert (given.body, given.ending) == (b"".join(EVENTS[:4]) + event, "cut")
    assert one.outcomes() == [[outcome], []]
    assert one.ask().upstream == ("b" if type_ == "overloaded_error" else "a")  # its model is in backoff


def test_an_event_over_16_mb_breaks_the_stream_without_completing_it(upstream, proxy):
    def pour(wire, request):
        wire.head(200, [("content-type", "text/event-stream"), ("connection", "close")])
        wire.send(START + BLOCK + b"event: content_block_delta\ndata: ")
        for _ in range(17):
            wire.send(b"x" * MB)
        wire.send(b"\n\n" + STOP)

    one = proxy(upstream(pour))
    given = one.ask(stream=True)
    assert given.ending == "cut"
    assert len(given.body) < 17 * MB
    assert not given.body.endswith((b"\n", b"\r"))
    assert one.outcomes() == [["failure"]]


def test_a_break_after_a_part_of_a_large_event_completes_nothing(upstream, proxy):
    large = DELTA.replace(b"Hel", b"x" * 6 * MB)
    one = proxy(upstream(events([START, BLOCK, large], then="cut", cut_at=5 * MB)))
    given = one.ask(stream=True)
    assert given.ending == "cut"
    assert b"event: error" not in given.body[-200:]
    assert given.body == (START + BLOCK + large)[: len(given.body)]


# ------------------------------------------------------------------------------- the end after message_stop


@pytest.mark.parametrize(
    "reply",
    [
        *(events(EVENTS, framing, then="hang") for framing in FRAMINGS),
        events([*EVENTS, *[b": bye\n\n"] * 500], gap=0.02),
        events(EVENTS, then="cut"),
        events(EVENTS, then="reset"),
        events([*EVENTS, error_event()]),
    ],
    ids=[*(f"silence by {framing}" for framing in FRAMINGS), "a trickle", "a break", "a reset", "an error"],
)
def test_what_follows_message_stop_holds_nobody_and_is_a_success(upstream, proxy, monkeypatch, reply):
    monkeypatch.setattr("aiproxy.proxy.stream.END_OF_BODY_SECONDS", 0.1)
    a = upstream(reply)
    one = proxy(a, idle=FAR)
    with soon():
        given = one.ask(stream=True)
    assert (given.body.startswith(WHOLE), given.ending) == (True, "end")
    assert one.outcomes() == [["success"]]


# ------------------------------------------------------------------------------------ the client leaves


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4])
def test_a_client_that_leaves_counts_neither_way_and_leaks_nothing(upstream, proxy, taken):
    a = upstream(events(EVENTS[:4], then="hang"))
    one = proxy(a)
    given = one.begin(stream=True)
    for n in range(taken):
        assert given.next() == EVENTS[n]
    given.leave()
    given.leave()
    a.wait_left()
    assert one.outcomes() == [["ignored"]]


def test_a_client_that_leaves_after_message_stop_had_a_success(upstream, proxy):
    a = upstream(events(EVENTS, then="hang"))
    one = proxy(a)
    given = one.begin(stream=True)
    while STOP not in given.pieces:
        assert given.next()
    given.leave()
    a.wait_left()
    assert one.outcomes() == [["success"]]


def test_a_client_that_leaves_upon_the_upstream_s_error_event_does_not_undo_it(upstream, proxy):
    a = upstream(events([*EVENTS[:4], error_event("api_error")], then="hang"))
    one = proxy(a)
    given = one.begin(stream=True)
    while error_event("api_error") not in given.pieces:
        assert given.next()
    given.leave()
    a.wait_left()
    assert one.outcomes() == [["failure"]]


def test_a_client_that_leaves_while_a_whole_answer_is_written_is_logged_as_one_that_left(
    upstream, proxy, capsys
):
    one = proxy(upstream())
    one.begin().leave()
    assert " outcome=client_left " in capsys.readouterr().out
    assert one.ask().status == 200
    assert " outcome=complete " in capsys.readouterr().out


def test_a_stream_that_is_closed_twice_is_settled_and_logged_once(upstream, proxy, capsys):
    one = proxy(upstream(events(EVENTS), events(EVENTS[:5], then="cut")))
    for outcome in ("complete", "broken"):
        given = one.ask(stream=True)
        given.leave()
        given.next()
        lines = [line for line in capsys.readouterr().out.splitlines() if " done " in line]
        assert [f"outcome={outcome}" in line for line in lines] == [True]
    assert one.outcomes() == [["success", "failure"]]


# ----------------------------------------------------------------------------------------- on the wire


def test_each_event_arrives_before_the_next_is_sent(upstream, wire):
    items = [*EVENTS[:4], PING, *EVENTS[4:]]
    gates = {framing: [threading.Event() for _ in items] for framing in FRAMINGS}
    gated = {
        framing: [one for pair in zip(items, gates[framing], strict=True) for one in pair]
        for framing in FRAMINGS
    }
    _, ask = wire(upstream(*(events(gated[framing], framing) for framing in FRAMINGS)))
    for framing in FRAMINGS:
        for gate in gates[framing][:2]:  # message_start and the first ping are held back
            gate.set()
        got = ask().answer()
        pieces = got.pieces()
        for n, gate in enumerate(gates[framing][2:], 3):
            while len(got.body) < len(b"".join(items[:n])):
                next(pieces)
            assert got.body == b"".join(items[:n])
            gate.set()
        assert list(pieces) == []
        assert got.ending == "end"


def test_a_broken_stream_does_not_end_cleanly_on_the_wire(upstream, wire):
    broken = [
        events(EVENTS[:5], then="cut"),
        events(EVENTS[:5], then="reset"),
        events(EVENTS[:5]),
        events(EVENTS[:6], then="cut", cut_at=15),
        events(EVENTS[:5], then="hang"),
    ]
    _, ask = wire(upstream(*broken), timeouts={"idle": 0.3}, breaker={"failures": 99})
    for type_ in ["api_error"] * 4 + ["timeout_error"]:
        client = ask()
        got = client.read()
        assert got.body.startswith(b"".join(EVENTS[:5]) + b"event: error\n")
        assert error_in(got.body)["error"]["type"] == type_
        assert got.ending in ("cut", "reset")
        assert not bytes(client.raw).endswith(b"0\r\n\r\n")


def test_a_client_that_does_not_close_after_a_break_holds_up_nobody(upstream, wire):
    broken = [events(EVENTS[:5], then="cut")] * 4
    served, ask = wire(upstream(*broken), breaker={"failures": 99})
    began = [time.monotonic()]
    # Their sockets stay open, and gunicorn's main thread, which alone accepts, waits for them to close.
    for ending in ["cut"] * 4 + ["end"]:
        assert ask().read().ending == ending
        began.append(time.monotonic())
    assert max(after - before for before, after in itertools.pairwise(began)) < 1.7
    assert "Traceback" not in served.stderr + "\n".join(served.stdout_lines())
