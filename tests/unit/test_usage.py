"""The tokens that an answer says it used, whatever else it says."""

import json

import pytest

from aiproxy.api.body import members
from aiproxy.api.usage import Iteration, Tokens, Usage

ALL = {
    "input_tokens": 11,
    "output_tokens": 22,
    "cache_read_input_tokens": 33,
    "cache_creation_input_tokens": 44,
}


def figures(report):
    return {name: getattr(report, name) for name in ALL}


def of_answer(spelt):
    report = Usage()
    report.note_answer(members(spelt))
    return figures(report)


def of_events(*events):
    report = Usage()
    for name, data in events:
        report.note_event(name, data if isinstance(data, bytes) else json.dumps(data).encode())
    return figures(report)


def started(**usage):
    return b"message_start", {"type": "message_start", "message": {"id": "msg_1", "usage": usage}}


def delta(**usage):
    return b"message_delta", {"type": "message_delta", "delta": {}, "usage": usage}


def test_a_whole_answer_says_all_four():
    assert of_answer(json.dumps({"type": "message", "usage": {**ALL, "service_tier": "x"}}).encode()) == ALL


def test_what_an_answer_does_not_say_is_not_known():
    assert of_answer(b'{"usage": {"output_tokens": 0}}') == {**dict.fromkeys(ALL), "output_tokens": 0}
    assert of_answer(b'{"type":"message"}') == dict.fromkeys(ALL)


@pytest.mark.parametrize(
    "usage",
    [
        *(b"null", b"3", b"[]", b'"x"', b"{}", b"true"),
        *(b'{"input_tokens":null}', b'{"input_tokens":"7"}', b'{"input_tokens":-7}', b'{"input_tokens":[7]}'),
        *(b'{"input_tokens":7.5}', b'{"input_tokens":{"input_tokens":7}}', b'{"input_tokens":true}'),
        b'{"input_tokens":' + b"9" * 5000 + b"}",
    ],
)
def test_nonsense_is_no_figure_and_no_harm(usage):
    assert of_answer(b'{"type":"message","usage":' + usage + b"}") == dict.fromkeys(ALL)


ONES, ZEROS = dict.fromkeys(ALL, 1), dict.fromkeys(ALL, 0)
STREAMS = {
    "the latest holds": (
        [started(**ALL), delta(output_tokens=50), delta(output_tokens=99)],
        {**ALL, "output_tokens": 99},
    ),
    "also zero": ([started(**ALL), delta(**ZEROS)], ZEROS),
    "null and absent keep what came before": ([started(**ALL), delta(input_tokens=None), delta()], ALL),
    "a start's are the message's": ([(b"message_start", {"usage": ONES, "message": {"usage": ALL}})], ALL),
    "a delta's are the event's": ([(b"message_delta", {"usage": ALL, "message": {"usage": ONES}})], ALL),
}


@pytest.mark.parametrize(("events", "said"), STREAMS.values(), ids=STREAMS)
def test_a_stream_s_figures_are_cumulative(events, said):
    assert of_events(*events) == said


def test_a_stream_s_other_figures_are_cumulative_too():
    report = Usage()
    parts = {"ephemeral_5m_input_tokens": 40, "ephemeral_1h_input_tokens": 4}
    begun = started(**ALL, cache_creation=parts, speed="fast", service_tier="standard")
    searches = {"server_tool_use": {"web_search_requests": 2, "web_fetch_requests": 1}}
    entries = [{"type": "compaction", "input_tokens": 7}, {"type": "advisor_message", "model": "m"}]
    for name, data in (begun, delta(**searches, cache_creation=None), delta(iterations=entries, speed=None)):
        report.note_event(name, json.dumps(data).encode())
    assert report.tokens == Tokens(11, 22, 33, 40, 4)
    assert [report.server_tool_uses(f"web_{kind}_requests") for kind in ("search", "fetch")] == [2, 1]
    assert [report.says(*said) for said in (("speed", "fast"), ("inference_geo", "us"))] == [True, False]
    assert list(report.iterations) == [
        Iteration("compaction", None, Tokens(input=7)),
        Iteration("advisor_message", "m", Tokens()),
    ]


@pytest.mark.parametrize(
    ("written", "parts", "minutes", "hour"),
    [
        (44, None, 44, 0),
        (44, {"ephemeral_1h_input_tokens": 40}, 4, 40),
        (44, {"ephemeral_5m_input_tokens": 44}, 44, 0),
        (None, {"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 40}, 4, 40),
        (4, {"ephemeral_1h_input_tokens": 40}, 0, 40),
        (44, {"ephemeral_1h_input_tokens": "40"}, 44, 0),
        (44, [40], 44, 0),
    ],
)
def test_cache_writes_are_for_an_hour_where_the_breakdown_says_so(written, parts, minutes, hour):
    tokens = Usage(cache_creation_input_tokens=written, cache_creation=parts).tokens
    assert (tokens.cache_write_5m, tokens.cache_write_1h) == (minutes, hour)


@pytest.mark.parametrize("name", [b"message_start", b"message_delta"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"message": 3, "usage": 3}',
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"message":null}',
    ],
    ids=lambda data: data[:30],
)
def test_an_event_that_is_nonsense_does_no_harm(name, data):
    assert of_events(started(**ALL), (name, data)) == ALL
