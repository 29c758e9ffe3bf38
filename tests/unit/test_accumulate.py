"""A whole event stream read into the one Message it spells, as Anthropic's own SDK reads it."""

import json
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpx2
import pytest
from anthropic.lib.streaming import _beta_messages, _messages

from aiproxy.api.accumulate import Accumulator, Malformed
from aiproxy.api.sse import Event

USAGE = {
    "input_tokens": 25,
    "cache_creation_input_tokens": 7,
    "cache_read_input_tokens": 11,
    "cache_creation": {"ephemeral_5m_input_tokens": 7, "ephemeral_1h_input_tokens": 0},
    "output_tokens": 1,
    "service_tier": "standard",
    "inference_geo": "eu",
}

MESSAGE: dict[str, Any] = {
    **{"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-a", "content": []},
    **{"stop_reason": None, "stop_sequence": None, "usage": USAGE},
}

TEXT = {"type": "text", "text": ""}
TOOL = {"type": "tool_use", "id": "toolu_1", "name": "search", "input": {}}
THINKING = {"type": "thinking", "thinking": "", "signature": ""}


def event(name: str, **fields: Any) -> Event:
    return Event(name.encode(), json.dumps({"type": name, **fields}).encode())


def started(index: int, block: dict[str, Any]) -> Event:
    return event("content_block_start", index=index, content_block=block)


def delta(index: int, kind: str, **fields: Any) -> Event:
    return event("content_block_delta", index=index, delta={"type": kind, **fields})


def stopped(index: int) -> Event:
    return event("content_block_stop", index=index)


def raw_delta(index: int, fields: bytes) -> Event:
    return Event(b"content_block_delta", b'{"index":%d,"delta":{%s}}' % (index, fields))


def ended(reason: str | None = "end_turn", output_tokens: int = 15, **fields: Any) -> Event:
    stop = {"stop_reason": reason, "stop_sequence": None}
    return event("message_delta", **{"delta": stop, "usage": {"output_tokens": output_tokens}, **fields})


def typed(text: str) -> Event:
    return delta(0, "text_delta", text=text)


def spelt(piece: str, index: int = 0) -> Event:
    """A piece of a tool's input."""
    return delta(index, "input_json_delta", partial_json=piece)


START = event("message_start", message=MESSAGE)
STOP = event("message_stop")


def collected(events: Iterable[Event], partial_strings: bool = False) -> Accumulator:
    collector = Accumulator(partial_strings)
    for one in events:
        collector.feed(one)
    return collector


def written(*middle: Event) -> bytes:
    """The Message that these events spell between `message_start` and `message_stop`."""
    return collected([START, *middle, STOP]).message()


def read(*middle: Event) -> Any:
    return json.loads(written(*middle))


def content(*middle: Event) -> Any:
    return read(*middle)["content"]


def tool_input(*pieces: str, partial_strings: bool = False) -> Any:
    """What becomes of a tool input that came in these pieces, and whether it was repaired."""
    collector = collected([START, started(0, TOOL), *map(spelt, pieces), stopped(0), STOP], partial_strings)
    return json.loads(collector.message())["content"][0]["input"], collector.repaired


# The whole


def test_a_stream_becomes_the_message_it_spells_and_values_keep_their_bytes() -> None:
    stream = [
        Event(
            b"message_start",
            b'{"message":{"z":1.10,"usage":{"y": 1E5,"x":1e400},"content": [ ] ,'
            b'"a":{"b" :  [1 ]},"n":"\\u00e9"}}',
        ),
        Event(b"content_block_start", b'{"index":0,"content_block":{"x":1.10,"text":"a","type":"text"}}'),
        Event(b"ping", b'{"type": "ping"}'),
        raw_delta(0, b'"type":"text_delta","text":"Hello"'),
        raw_delta(0, b'"type":"text_delta" , "text" : ", \\"you\\" \xc3\xa9\\u00e9" '),
        Event(b"content_block_stop", b'{"type":"content_block_stop","index":0}'),
        Event(b"message_delta", b'{"delta":{"k":1.50},"usage":{"w":2.0,"y":null},"j":{ "i":1e-400 }}'),
        Event(b"message_stop", b'{"type":"message_stop"}'),
    ]
    collector = collected(stream)
    assert (collector.complete, collector.error, collector.repaired) == (True, None, False)
    assert collector.message() == (
        b'{"z":1.10,"usage":{"y":1E5,"x":1e400,"w":2.0},'
        b'"content":[{"x":1.10,"text":"aHello, \\"you\\" \xc3\xa9\\u00e9","type":"text"}],'
        b'"a":{"b" :  [1 ]},"n":"\\u00e9","k":1.50,"j":{ "i":1e-400 }}'
    )


def test_what_is_not_of_the_message_is_skipped_wherever_it_comes() -> None:
    early = [event("message_stop"), Event(b"content_block_start", b"{"), ended("refusal")]
    noise = [event("ping"), Event(b"ping", b""), Event(b"news", b"not JSON"), event("news", index=0)]
    nameless = [Event(b"", typed("no").data), Event(b"", STOP.data)]
    late = [typed("no"), event("error"), Event(b"message_start", b"{"), ended("refusal")]
    middle = [started(0, TEXT), typed("a"), stopped(0), ended()]
    noisy = [one for step in [START, *middle] for one in [*noise, step, *nameless]]
    collector = collected([*early, *noisy, STOP, *late])
    assert collector.message() == written(*middle)
    assert collector.error is None


def test_a_message_without_content_is_one() -> None:
    assert read() == MESSAGE


@pytest.mark.parametrize("before", [[], [START], [START, started(0, TEXT)]])
def test_an_error_event_is_kept_as_it_came(before: list[Event]) -> None:
    data = b'{"type":"error", "error":{"type":"overloaded_error","message":"Overloaded"}}'
    collector = collected([*before, Event(b"error", data), Event(b"error", b"{}"), STOP])
    assert collector.error == data
    assert not collector.complete
    with pytest.raises(Malformed):
        collector.message()


def test_a_stream_without_message_stop_is_no_message() -> None:
    collector = collected([START, started(0, TEXT), stopped(0), ended()])
    assert not collector.complete
    with pytest.raises(Malformed):
        collector.message()


# Text, thinking, compaction


@pytest.mark.parametrize(
    ("block", "deltas", "text"),
    [
        (b'{"type":"text","text":"a\\n"}', [typed("b"), typed("c")], "a\nbc"),
        (b'{"type":"text"}', [typed("b")], "b"),
        (b'{"type":"text","text":null}', [typed("b")], "b"),
        (
            b'{"type":"text","text":""}',
            [raw_delta(0, rb'"type":"text_delta","text":"\ud83d"'), typed("\ude00")],
            "😀",
        ),
    ],
    ids=["appended", "absent", "null", "an emoji split over two deltas"],
)
def test_text_is_appended_to_what_the_start_had(block: bytes, deltas: list[Event], text: str) -> None:
    start = Event(b"content_block_start", b'{"index":0,"content_block":%s}' % block)
    assert content(start, *deltas) == [{"type": "text", "text": text}]


def test_half_an_emoji_is_carried_as_it_is() -> None:
    whole = written(started(0, TEXT), raw_delta(0, rb'"type":"text_delta","text":"a\ud83d"'))
    assert rb'"text":"a\ud83d"' in whole
    whole = written(started(0, {"type": "text", "text": "\ud83d"}), stopped(0))
    assert rb'"text": "\ud83d"' in whole


def test_citations_are_added_to_a_list_that_is_made_where_there_is_none() -> None:
    one, two = {"cited_text": "a"}, {"cited_text": "b"}
    deltas = [delta(0, "citations_delta", citation=one), delta(0, "citations_delta", citation=two)]
    assert content(started(0, TEXT), *deltas) == [{**TEXT, "citations": [one, two]}]
    for empty in (b"null", b"[ ]"):
        block = b'{"index":0,"content_block":{"type":"text","text":"","citations":%s}}' % empty
        assert content(Event(b"content_block_start", block), *deltas) == [{**TEXT, "citations": [one, two]}]
    assert content(started(0, {**TEXT, "citations": [two, two]}), *deltas) == [
        {**TEXT, "citations": [two, two, one, two]}
    ]


def test_a_compaction_is_assigned() -> None:
    block = {"type": "compaction", "content": None, "encrypted_content": "old"}
    first = delta(0, "compaction_delta", content="a")
    assert content(started(0, block), first) == [{**block, "content": "a"}]
    second = delta(0, "compaction_delta", content="b", encrypted_content=None)
    assert content(started(0, block), first, second) == [{**block, "content": "b", "encrypted_content": None}]


# Tool input


def test_a_tool_input_replaces_the_one_of_the_start() -> None:
    assert content(started(0, {**TOOL, "input": {"a": 1}}), spelt('{"b":2}')) == [{**TOOL, "input": {"b": 2}}]


@pytest.mark.parametrize("pieces", [[], ["", ""]])
def test_without_any_input_the_one_of_the_start_stays(pieces: list[str]) -> None:
    block = {**TOOL, "input": {"a": 1}}
    collector = collected([START, started(0, block), *map(spelt, pieces), stopped(0), STOP])
    assert json.loads(collector.message())["content"] == [block]
    assert not collector.repaired


def test_a_tool_input_keeps_its_bytes() -> None:
    source = '{"b": 1.10,"a":1e400, "n":123456789012345678901234567890,"u":"\\u00e9é"}'
    assert b'"input":' + source.encode() in written(started(0, TOOL), spelt(source))


def test_an_emoji_split_over_two_pieces_of_a_tool_input_is_joined() -> None:
    halves = [rb"{\"a\":\"\ud83d", rb"\ude00\"}"]  # in the wire's own escapes
    deltas = [raw_delta(0, b'"type":"input_json_delta","partial_json":"%s"' % half) for half in halves]
    assert content(started(0, TOOL), *deltas)[0]["input"] == {"a": "😀"}


def test_half_an_emoji_in_a_tool_input_is_escaped() -> None:
    assert tool_input('{"a":"\ud83d"}') == ({"a": "\ud83d"}, False)
    assert tool_input('{"a":"\\ud83d"}') == ({"a": "\ud83d"}, False)


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ('{"a":1,"b":"hel', {"a": 1}),
        ('{"a":[1,2,{"b":[', {"a": [1, 2, {"b": []}]}),
        ('{"a":1,"n":1.5e', {"a": 1}),
        ('{"a":[null,false,n', {"a": [None, False]}),
        (' { "a" : [ 1 , 2 ] , "b" ', {"a": [1, 2]}),
        ('{"', {}),
        ("[", []),
        (" \n", {}),
        ('{"a":{},"c":[[]],"d":[{}],"e":"}],{["', {"a": {}, "c": [[]], "d": [{}], "e": "}],{["}),
        ('{"a":"\\"","b":"\\\\","c":"\\u00e9"', {"a": '"', "b": "\\", "c": "é"}),
    ],
)
def test_a_tool_input_that_was_cut_off_keeps_what_was_whole(source: str, value: Any) -> None:
    assert tool_input(source) == (value, True)
    assert tool_input(*source) == (value, True)  # a character a piece


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ('{"a":["b","hel ', {"a": ["b", "hel "]}),
        ('{"a":"hel\\uD83D\\', {"a": "hel"}),
        ('{"a":"hel\\ud83d!', {"a": "hel\ud83d!"}),
        ('{"a":"hel\\\\ud83d', {"a": "hel\\ud83d"}),
        ('{"a":"é😀', {"a": "é😀"}),
        ('{"a":1,"hel', {"a": 1}),
        ('{"a":1,"b":tru', {"a": 1}),
    ],
)
def test_partial_strings_keep_what_came_of_the_last_one(source: str, value: Any) -> None:
    assert tool_input(source, partial_strings=True) == (value, True)


@pytest.mark.parametrize("partial_strings", [True, False])
@pytest.mark.parametrize(
    "source",
    [
        *["oops", "tru", '"hel', ",", "{,", "[,", "{1:2", "{'a':1", '1,"input":2', '{"a":1, oops}'],
        *['{"a":1, oops', '{"a":1,}', '{"a":1,,', '{"a":1}}', '{"a":1} {', '{"a":[1}', '{"a":[}', '{"a"}'],
        *['{"a" 1', '{"a" "b', '{"a":1 "b', '{"a":01', '{"a":.5', '{"a":1x', '{"a":tru ', '{"a":1.,'],
        *['{"a":NaN', '{"a":-Infinity}', '{"a":"\\x', '{"a":"\\u00","b', '{"a":"b\nc', '{"a":\x0b1'],
        *["[" * 20_000, "[" * 20_000 + "]" * 20_000, '{"a":' * 20_000],
    ],
    ids=lambda source: repr(source)[:20],
)
def test_a_tool_input_that_is_neither_json_nor_its_beginning_is_refused(
    source: str, partial_strings: bool
) -> None:
    with pytest.raises(Malformed):
        tool_input(source, partial_strings=partial_strings)


def test_a_tool_input_is_judged_when_the_message_stops_though_its_block_did_not() -> None:
    collector = collected([START, started(0, TOOL), spelt('{"a":[1'), STOP])
    assert json.loads(collector.message())["content"] == [{**TOOL, "input": {"a": [1]}}]
    assert collector.repaired
    with pytest.raises(Malformed):
        collected([START, started(0, TOOL), spelt("{oops"), stopped(0)]).feed(STOP)


def test_tool_inputs_are_kept_apart_by_index() -> None:
    pieces = [spelt('{"a"', 0), spelt('{"b"', 1), spelt(":1}", 0), spelt(":2}", 1)]
    blocks = content(started(0, TOOL), started(1, TOOL), *pieces, stopped(1), stopped(0))
    assert [block["input"] for block in blocks] == [{"a": 1}, {"b": 2}]


# All blocks


def test_unknown_blocks_and_members_keep_their_bytes() -> None:
    block = (
        b'{"type":"hologram" , "b":1.10,\n"a":[1e400, {"z":0,"y":"\\u00e9"}],"\\ud800":123456789012345678901}'
    )
    start = Event(b"content_block_start", b'{"index":0,"content_block": %s }' % block)
    assert b'"content":[%s]' % block in written(start, delta(0, "beam_delta", beam=1), stopped(0))
    grows = Event(b"content_block_start", b'{"index":0,"content_block":{"\\ud800":1e400,"type":"text"}}')
    assert b'{"\\ud800":1e400,"type":"text","text":"b"}' in written(grows, typed("b"))


FITS = {
    "text": {"text_delta", "citations_delta"},
    "thinking": {"thinking_delta", "signature_delta"},
    "tool_use": {"input_json_delta"},
    "compaction": {"compaction_delta"},
}


@pytest.mark.parametrize("kind", [*FITS, "redacted_thinking", "hologram"])
def test_a_delta_that_is_unknown_or_does_not_fit_is_ignored(kind: str) -> None:
    strings = dict.fromkeys(["text", "thinking", "signature", "content", "partial_json"], "{oops")
    names = {"sound_delta", *set().union(*FITS.values())} - FITS.get(kind, set())
    misfits = [delta(0, name, citation={}, **strings) for name in sorted(names)]
    nameless = event("content_block_delta", index=0, delta={"type": None})
    block = {"type": kind, "text": "", "thinking": "", "signature": "", "input": {}, "content": None}
    assert content(started(0, block), *misfits, nameless, stopped(0)) == [block]


def test_blocks_stand_where_their_index_says() -> None:
    starts = [started(index, {"type": "text", "text": str(index)}) for index in (10, 2, 0, 1)]
    grown = [
        delta(2, "text_delta", text="C"),
        delta(0, "text_delta", text="A"),
        delta(10, "text_delta", text="D"),
    ]
    assert [block["text"] for block in content(*starts, *grown)] == ["0A", "1", "2C", "10D"]


def test_content_that_came_with_message_start_stays_in_front() -> None:
    start = event("message_start", message={**MESSAGE, "content": [{"n": 1}, {"n": 2}]})
    message = collected([start, started(2, TEXT), STOP]).message()
    assert json.loads(message)["content"] == [{"n": 1}, {"n": 2}, TEXT]


# message_delta


def test_stop_members_are_assigned_even_when_null() -> None:
    first = {"stop_reason": "stop_sequence", "stop_sequence": "END", "stop_details": {"a": 1}}
    second = {"stop_reason": None, "stop_sequence": None, "stop_details": None}
    assert {**MESSAGE, **first} == read(event("message_delta", delta=first))
    assert {**MESSAGE, **second} == read(
        event("message_delta", delta=first), event("message_delta", delta=second)
    )


def test_everything_else_in_a_message_delta_is_assigned_unless_null() -> None:
    begun = {**MESSAGE, "container": {"id": "c0"}, "context_management": {"n": 0}}
    start = event("message_start", message=begun)
    nothing = ended(delta={"container": None, "wonder": None}, context_management=None, miracle=None)
    assert json.loads(collected([start, nothing, STOP]).message()) == {
        **begun,
        "usage": {**USAGE, "output_tokens": 15},
    }
    something = ended(delta={"container": {"id": "c1"}, "wonder": 0}, context_management={}, miracle=False)
    assert json.loads(collected([start, something, STOP]).message()) == {
        **begun,
        "usage": {**USAGE, "output_tokens": 15},
        **{"container": {"id": "c1"}, "wonder": 0, "context_management": {}, "miracle": False},
    }


def test_a_message_delta_never_replaces_type_content_or_usage_as_they_stand() -> None:
    wrong = {"type": "x", "content": [1], "usage": {"input_tokens": 0}, "delta": {}}
    message = read(started(0, TEXT), event("message_delta", delta=wrong, content=[2], usage={}))
    assert message == {**MESSAGE, "content": [TEXT]}


def test_usage_is_overwritten_and_never_added() -> None:
    usages: list[dict[str, Any]] = [
        {"output_tokens": 5, "input_tokens": 30, "server_tool_use": {"web_search_requests": 1}},
        {"output_tokens": 9, "input_tokens": None, "cache_read_input_tokens": 0, "server_tool_use": {"n": 2}},
        {"output_tokens": None, "iterations": [{"a": 1}], "future": "x"},
    ]
    message = read(*(ended(usage=usage) for usage in usages))
    assert message["usage"] == {
        **USAGE,
        "output_tokens": 9,
        "input_tokens": 30,
        "cache_read_input_tokens": 0,
        "server_tool_use": {"n": 2},
        "iterations": [{"a": 1}],
        "future": "x",
    }
    assert list(message["usage"])[:7] == list(USAGE)


@pytest.mark.parametrize("start", [{"id": "m"}, {"id": "m", "usage": None}])
def test_usage_is_made_where_message_start_has_none(start: dict[str, Any]) -> None:
    message = collected([event("message_start", message=start), ended(), STOP]).message()
    assert json.loads(message)["usage"] == {"output_tokens": 15}


@pytest.mark.parametrize("usage", [{"usage": None}, {"usage": {}}, {}])
def test_a_message_delta_without_figures_leaves_usage_as_it_is(usage: dict[str, Any]) -> None:
    nothing = event("message_delta", delta={}, **usage)
    assert read(nothing) == MESSAGE
    message = collected([event("message_start", message={"id": "m"}), nothing, STOP]).message()
    assert json.loads(message) == {"id": "m", "content": []}


# What is no Message

NO_STARTS = [
    event("message_start"),
    event("message_start", message=[]),
    event("message_start", message={"content": {}}),
    Event(b"message_start", b"{"),
    Event(b"message_start", b'{"message":{"a":NaN}}'),
    Event(b"message_start", b'{"message":{"a":"\xff"}}'),
]
AFTER_START = [
    [START],
    [Event(b"content_block_delta", b"[]")],
    [Event(b"message_delta", b"null")],
    [Event(b"message_stop", b"{")],
    [Event(b"content_block_start", b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}")],
    [event("content_block_start", index=0)],
    [event("content_block_start", content_block=TEXT)],
    [started(0, TEXT), started(0, TEXT)],
    [event("content_block_start", index=0, content_block="text")],
    *([event("content_block_start", index=index, content_block=TEXT)] for index in ("0", -1, 0.5, 10**400)),
    [started(0, {"type": "fallback"})],
    [started(0, {"type": "fallback", "to": {"model": None}})],
    [typed("a")],
    [stopped(0)],
    [started(0, TEXT), delta(1, "text_delta", text="a")],
    [started(0, TEXT), event("content_block_delta", index=0)],
    [started(0, TEXT), event("content_block_delta", index=0, delta={})],
    [started(0, TEXT), delta(0, "text_delta")],
    [started(0, TEXT), delta(0, "text_delta", text=None)],
    [started(0, {"type": "text", "text": 1}), typed("a")],
    [started(0, TEXT), delta(0, "citations_delta")],
    [started(0, {**TEXT, "citations": "x"}), delta(0, "citations_delta", citation={})],
    [started(0, THINKING), delta(0, "thinking_delta", text="a")],
    [started(0, THINKING), delta(0, "signature_delta")],
    [started(0, TOOL), delta(0, "input_json_delta", partial_json={})],
    [event("message_delta", usage={})],
    [event("message_delta", delta=[])],
    [event("message_delta", delta={}, usage=[])],
]


@pytest.mark.parametrize("stream", [*([one] for one in NO_STARTS), *([START, *rest] for rest in AFTER_START)])
def test_a_stream_that_spells_no_message_is_malformed(stream: list[Event]) -> None:
    collector = collected(stream[:-1])
    with pytest.raises(Malformed) as caught:
        collector.feed(stream[-1])
    assert len(str(caught.value)) < 80


@pytest.mark.parametrize(
    "stream",
    [
        [started(0, TOOL), spelt('{"a":"correct horse battery"x'), STOP],
        [Event(b"content_block_delta", b'{"a":"correct horse battery')],
        [Event(b"content_block_delta", b'{"a":"correct horse battery\xff"}')],
    ],
)
def test_malformed_says_nothing_of_the_conversation(stream: list[Event]) -> None:
    with pytest.raises(Malformed) as caught:
        collected([START, *stream])
    assert "horse" not in str(caught.value)


# As Anthropic's own SDK reads it


def by_the_sdk(stream: list[Event]) -> Any:
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for one in stream:
        if one.name != b"ping":
            snapshot = _messages.accumulate_event(
                event=json.loads(one.data), current_snapshot=snapshot, json_bufs=buffers
            )
    return snapshot.to_dict(mode="json")


def by_the_beta_sdk(stream: list[Event], beta: str = "") -> Any:
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    headers = httpx2.Headers({"anthropic-beta": beta})
    for one in stream:
        if one.name != b"ping":
            snapshot = _beta_messages.accumulate_event(
                event=json.loads(one.data),
                current_snapshot=snapshot,
                json_bufs=buffers,
                request_headers=headers,
            )
    return snapshot.to_dict(mode="json")


def without_none(value: Any) -> Any:
    """The SDK's objects have all the fields they know, with None where none came."""
    if isinstance(value, dict):
        return {name: without_none(one) for name, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


CITATION = {
    **{"type": "char_location", "cited_text": "green", "document_index": 0, "document_title": "Grass"},
    **{"start_char_index": 0, "end_char_index": 5},
}
SEARCHED = {
    "type": "web_search_tool_result",
    "tool_use_id": "srvtoolu_1",
    "content": [
        {"type": "web_search_result", "title": "W", "url": "https://a.test/", "encrypted_content": "RW"}
    ],
}
THOUGHTS = [
    started(0, THINKING),
    delta(0, "thinking_delta", thinking="Let me "),
    delta(0, "thinking_delta", thinking="see.\n", estimated_tokens=3),
    delta(0, "signature_delta", signature="no"),
    delta(0, "signature_delta", signature="c2lnbmVk"),
    stopped(0),
    started(1, {"type": "redacted_thinking", "data": "ZGF0YQ=="}),
    stopped(1),
    started(2, {**TEXT, "citations": []}),
    delta(2, "text_delta", text="Hello, "),
    event("ping"),
    delta(2, "text_delta", text="wörld 😀"),
    delta(2, "citations_delta", citation=CITATION),
    stopped(2),
    ended("stop_sequence", delta={"stop_reason": "stop_sequence", "stop_sequence": "END"}),
]
TOOLS = [
    started(0, {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}}),
    spelt('{"query":'),
    spelt(' "weather"}'),
    stopped(0),
    started(1, SEARCHED),
    stopped(1),
    started(2, TOOL),
    spelt("", 2),
    spelt('{"query": "a \\"b\\" 😀', 2),
    spelt('", "n": [1, 2.5, null, true], "o": {}}', 2),
    stopped(2),
    ended("tool_use", usage={"input_tokens": 120, "cache_creation_input_tokens": None, "output_tokens": 33}),
]
FALLBACK = {"type": "fallback", "from": {"model": "claude-a"}, "to": {"model": "claude-b"}}
BETA = [
    started(0, FALLBACK),
    stopped(0),
    started(1, {"type": "compaction", "content": None, "encrypted_content": None}),
    delta(1, "compaction_delta", content="So far: nothing.", encrypted_content="RW5j"),
    stopped(1),
    started(2, {"type": "mcp_tool_use", "id": "mcptoolu_1", "name": "n", "server_name": "s", "input": {}}),
    spelt('{"a":1}', 2),
    stopped(2),
    ended(usage={"output_tokens": 7}, context_management={"applied_edits": []}, input_transformations=[]),
]


@pytest.mark.parametrize(
    ("middle", "sdk"),
    [
        (THOUGHTS, by_the_sdk),
        (THOUGHTS, by_the_beta_sdk),
        (TOOLS, by_the_sdk),
        (TOOLS, by_the_beta_sdk),
        (BETA, by_the_beta_sdk),
    ],
)
def test_the_sdk_reads_the_same_message(middle: list[Event], sdk: Callable[[list[Event]], Any]) -> None:
    stream = [START, *middle, STOP]
    assert without_none(json.loads(collected(stream).message())) == without_none(sdk(stream))


@pytest.mark.parametrize("beta", ["", "fine-grained-tool-streaming-2025-05-14"])
def test_a_tool_input_is_repaired_as_the_sdk_does_wherever_it_is_cut(beta: str) -> None:
    source = ' {"a":1,"b":"h\\u00e9\\n\\ud83d\\ude00\\\\u é",'
    source += '"c":[1,-2.5e+1,true,null,{"d":[]},{}],"e":{"f":{"g":"h"}}}'
    for end in range(2, len(source) + 1):
        cut = delta(0, "input_json_delta", partial_json=source[:end])
        stream = [START, started(0, TOOL), cut, stopped(0), ended("max_tokens"), STOP]
        collector = collected(stream, partial_strings=bool(beta))
        ours, theirs = json.loads(collector.message()), by_the_beta_sdk(stream, beta)
        assert ours["content"][0]["input"] == theirs["content"][0]["input"], source[:end]
        assert collector.repaired == (end < len(source))


# Whatever comes, and what it costs

INSERTS = [
    *(sign.encode() for sign in '" \\ { } [ , : null NaN \x00 1e9 \\ud800'.split()),
    b"\xff",
    b"[" * 3000,
]


def damaged(stream: list[Event], chance: random.Random) -> list[Event]:
    """A copy in which something is dropped, doubled, swapped, cut out, overwritten or inserted."""
    damaged = list(stream)
    for _ in range(chance.randint(1, 3)):
        at, other = chance.randrange(len(damaged)), chance.randrange(len(damaged))
        name, data = damaged[at].name, damaged[at].data
        start = chance.randint(0, len(data))
        insert = chance.choice(INSERTS)
        match chance.randrange(6):
            case 0:
                del damaged[at]
            case 1:
                damaged.insert(other, damaged[at])
            case 2:
                damaged[at], damaged[other] = damaged[other], damaged[at]
            case 3:
                damaged[at] = Event(name, data[:start] + data[start + chance.randint(1, 9) :])
            case 4:
                damaged[at] = Event(name, data[:start] + insert + data[start + len(insert) :])
            case 5:
                damaged[at] = Event(name, data[:start] + insert + data[start:])
    return damaged


def test_whatever_comes_the_result_is_json_or_malformed() -> None:
    blocks = [*TOOLS[6:11], started(3, {"type": "compaction"}), delta(3, "compaction_delta", content="x")]
    stream = [START, *THOUGHTS[:8], *blocks, started(4, FALLBACK), ended(), STOP]
    collected(stream).message()
    messages = 0
    for seed in range(1500):
        collector = Accumulator(partial_strings=seed % 2 == 0)
        for one in damaged(stream, random.Random(seed)):
            try:
                collector.feed(one)
            except Malformed:
                continue  # feeding on after it makes no sense and yet raises nothing else
        if collector.complete:
            assert isinstance(json.loads(collector.message().decode()), dict), seed
            messages += 1
    assert 100 < messages < 1500


def seconds_for(*events: Event) -> float:
    began = time.process_time()
    collected(events).message()
    return time.process_time() - began


COSTLY = {
    "many deltas": [started(0, TEXT), *[typed("Hello there")] * 30_000],
    "ever new members of message_delta": [
        event("message_delta", delta={f"a{n}": 1}, usage={f"u{n}": n}, **{f"b{n}": 2}) for n in range(10_000)
    ],
    "a block that is stopped again and again": [
        started(0, TOOL),
        spelt('{"a":['),
        *[spelt("1,"), stopped(0)] * 5_000,
        spelt("1]}"),
    ],
}


@pytest.mark.parametrize("middle", COSTLY.values(), ids=COSTLY)
def test_a_stream_costs_no_more_than_its_size(middle: list[Event]) -> None:
    assert seconds_for(START, *middle, STOP) < 2  # 0.3 s; copying what came before takes far longer


def test_a_tool_input_of_very_many_tokens_that_was_cut_off_is_refused_in_bounded_time() -> None:
    dense = '{"a":[' + "1," * 400_000
    began = time.process_time()
    with pytest.raises(Malformed):
        seconds_for(START, started(0, TOOL), delta(0, "input_json_delta", partial_json=dense), STOP)
    assert time.process_time() - began < 2
