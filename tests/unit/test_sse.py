"""Event framing."""

import random
import time
from itertools import pairwise

import pytest

from aiproxy.api import sse
from aiproxy.api.sse import EventTooLarge, Framer, encode, parse

LINE_ENDS = (b"\n", b"\r\n", b"\r")

#: Two line ends, in every combination that is not one: `\r` and `\n` together are.
BLANK_LINES = (b"\n\n", b"\n\r", b"\n\r\n", b"\r\r", b"\r\r\n", b"\r\n\n", b"\r\n\r", b"\r\n\r\n")


def events(block: bytes) -> list[tuple[bytes, bytes]]:
    return [(event.name, event.data) for event in parse(block)]


def fed(framer: Framer, *pieces: bytes) -> list[bytes]:
    return [framer.feed(piece) for piece in pieces]


# parse


SEPARATORS = '{"text":"\u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e"}'.encode()
BLOCKS = {
    "a name and data": (b'event: ping\ndata: {"type":"ping"}\n\n', [(b"ping", b'{"type":"ping"}')]),
    "line feeds": (b"event: a\ndata: 1\n\ndata: 2\ndata: 3\n\n", [(b"a", b"1"), (b"", b"2\n3")]),
    "carriage returns": (b"event: a\rdata: 1\r\rdata: 2\rdata: 3\r\r", [(b"a", b"1"), (b"", b"2\n3")]),
    "both": (b"event: a\r\ndata: 1\r\n\r\ndata: 2\r\n\r\n", [(b"a", b"1"), (b"", b"2")]),
    "mixed line ends": (b"event: a\rdata: 1\r\ndata: 2\n\r\ndata: 3\n\r", [(b"a", b"1\n2"), (b"", b"3")]),
    "no other character ends a line": (b"event: a\ndata: " + SEPARATORS + b"\n\n", [(b"a", SEPARATORS)]),
    "an empty data line among others": (b"data: 1\r\ndata:\r\ndata: 3\r\n\r\n", [(b"", b"1\n\n3")]),
    "only one space goes": (b"event:a\ndata:  x \n\n", [(b"a", b" x ")]),
    "a value with colons": (b"event: a:b\ndata: {:}\n\n", [(b"a:b", b"{:}")]),
    "comments and other fields": (
        b": data: no\n:\nid: 7\nfoo: bar\nDATA: no\n data: no\ndata: 1\n\n",
        [(b"", b"1")],
    ),
    "a line without a colon": (b"event: a\ndata\n\n", [(b"a", b"")]),
    "the last name stays": (b"event: a\nevent: b\ndata: 1\n\n", [(b"b", b"1")]),
    "an event without data is dropped with its name": (b"event: a\n\ndata: 1\n\n", [(b"", b"1")]),
    "an empty data line": (b"event: a\ndata:\n\n", [(b"a", b"")]),
    "a last event without a blank line": (b"data: 1\n\nevent: b\r\ndata: 2\r\n", [(b"", b"1")]),
    "blank lines": (b"\n\r\n\r\n\n", []),
    "nothing": (b"", []),
    "a byte order mark": (b"\xef\xbb\xbfdata: 1\n\n", [(b"", b"1")]),
}


@pytest.mark.parametrize(("block", "read"), BLOCKS.values(), ids=BLOCKS)
def test_a_block_reads_as_these_events(block: bytes, read: list[tuple[bytes, bytes]]) -> None:
    assert events(block) == read


# encode


def test_an_encoded_event_reads_as_it_was() -> None:
    assert encode("error", b'{"a":1}') == b'event: error\ndata: {"a":1}\n\n'
    assert encode("a", b"1\n2\r\n3\r4") == b"event: a\ndata: 1\ndata: 2\ndata: 3\ndata: 4\n\n"
    assert events(encode("a", b"1\n\n2\n")) == [(b"a", b"1\n\n2\n")]


# Framer


@pytest.mark.parametrize("blank", BLANK_LINES)
def test_a_blank_line_is_seen_wherever_it_is_cut_and_nothing_is_copied(blank: bytes) -> None:
    block = b"data: 1" + blank
    framer = Framer()
    assert framer.feed(block) is block
    assert fed(framer, block + b"data: 2", b"\n\n") == [block, b"data: 2\n\n"]
    for cut in range(1, len(block)):
        assert b"".join(fed(framer, block[:cut], block[cut:])) == block
        assert framer.carried == 0
    assert b"".join(fed(framer, *(bytes([byte]) for byte in block))) == block
    assert framer.carried == 0


def test_a_line_s_end_is_no_blank_line() -> None:
    for end in LINE_ENDS:
        assert fed(Framer(), b"data: 1" + end, b"data: 2" + end) == [b"", b""]
    assert fed(Framer(), b"data: 1\r", b"\n", b"\r", b"\n") == [b"", b"", b"data: 1\r\n\r", b"\n"]


def test_what_follows_the_last_blank_line_is_carried() -> None:
    framer = Framer()
    assert framer.feed(b"data: 1\n\ndata: 2\n\ndata: 3\n") == b"data: 1\n\ndata: 2\n\n"
    assert framer.carried == 8
    assert framer.feed(b"") == b""
    assert framer.feed(b"\ndata: 4") == b"data: 3\n\n"
    assert framer.carried == 7


def test_blank_lines_between_events_are_not_held_back() -> None:
    framer = Framer()
    assert fed(framer, b"\n", b"\r", b"\r\n", b"data: 1\r\n\r", b"\n", b"\n") == [
        b"\n",
        b"\r",
        b"\r\n",
        b"data: 1\r\n\r",
        b"\n",
        b"\n",
    ]
    assert not framer.partial


def test_however_a_stream_is_cut_bytes_and_events_stay_the_same() -> None:
    parts = [b"\n", b"\r", b"\r\n", b"\n\n", b"data: x", b"data:", b"event: a", b": c", b"\xe2\x80\xa8"]
    for seed in range(500):
        chance = random.Random(seed)
        stream = b"".join(chance.choices(parts, k=20))
        cuts = sorted({0, len(stream), *(chance.randint(0, len(stream)) for _ in range(8))})
        framer = Framer()
        blocks = fed(framer, *(stream[start:end] for start, end in pairwise(cuts)))
        passed_on = b"".join(blocks)
        assert stream.startswith(passed_on), seed
        assert len(passed_on) + framer.carried == len(stream), seed
        assert [event for block in blocks for event in parse(block)] == list(parse(stream)), seed


def test_a_large_event_is_passed_on_in_parts() -> None:
    framer = Framer()
    piece = b"x" * 65536
    sent = framer.feed(b"data: ") + b"".join(framer.feed(piece) for _ in range(64))
    assert len(sent) == 64 * 65536 + 6 > sse.PASS_ON
    assert framer.carried == 0
    assert framer.partial
    assert framer.feed(b"more") == b"more"  # the rest of it is not held back any more
    assert framer.partial
    assert framer.feed(b"\n\ndata: 2") == b"\n\n"
    assert not framer.partial
    assert framer.carried == 7


def test_a_blank_line_cut_in_two_ends_a_large_event_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PASS_ON", 8)
    framer = Framer()
    assert fed(framer, b"data: 12", b"3") == [b"", b"data: 123"]
    assert fed(framer, b"4\n") == [b"4\n"]
    assert framer.partial
    assert fed(framer, b"\n") == [b"\n"]
    assert not framer.partial


def test_an_event_of_exactly_the_limit_is_not_passed_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PASS_ON", 8)
    framer = Framer()
    assert framer.feed(b"data: 12") == b""
    assert (framer.carried, framer.partial) == (8, False)


def test_an_end_that_is_too_large_to_be_carried_goes_along_with_what_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse, "PASS_ON", 8)
    framer = Framer()
    assert framer.feed(b"data: 1\n\ndata: 234") == b"data: 1\n\ndata: 234"
    assert framer.partial


def test_nothing_partial_comes_out_when_only_whole_events_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PASS_ON", 8)
    framer = Framer(pass_on=False)
    assert fed(framer, b"data: 12", b"345678") == [b"", b""]
    assert (framer.carried, framer.partial) == (14, False)
    assert framer.feed(b"9\n\nd") == b"data: 123456789\n\n"


@pytest.mark.parametrize("pass_on", [True, False])
def test_an_event_over_the_size_limit_is_refused(pass_on: bool) -> None:
    framer = Framer(pass_on)
    framer.feed(b"data: 1\n\n" + b"x" * (sse.MAX_EVENT - 1))
    framer.feed(b"x")
    with pytest.raises(EventTooLarge):
        framer.feed(b"x")


@pytest.mark.parametrize("pass_on", [True, False])
@pytest.mark.parametrize(
    ("pieces", "fits"),
    [
        ([b"x" * 14 + b"\n\n"], True),
        ([b"x" * 15 + b"\n\n"], False),
        ([b"x" * 8, b"x" * 6 + b"\n\n"], True),
        ([b"x" * 8, b"x" * 6 + b"\n\ny"], True),
        ([b"x" * 8, b"x" * 7 + b"\n\n"], False),  # its end came in time, and yet it was too large
        ([b"x" * 13, b"\r\n", b"\r\n"], False),
        ([b"x" * 8, b"x\n\n" + b"y" * 16], True),
        ([b"x" * 8, b"x\n\n" + b"y" * 17], False),
        ([b"x" * 8, b"x\n\n" + b"y" * 15 + b"\n\nz"], False),
        ([b"x" * 8 + b"\n", b"\n" + b"y" * 16], True),
        ([b"x" * 8 + b"\n", b"\n" + b"y" * 17], False),
        ([b"xxxx\n\n"] * 9, True),
        ([b"xxxx\n\n" * 9], True),
    ],
)
def test_the_size_limit_is_about_each_event_by_itself(
    pieces: list[bytes], fits: bool, pass_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "PASS_ON", 4)
    monkeypatch.setattr(sse, "MAX_EVENT", 16)
    framer = Framer(pass_on)
    if fits:
        fed(framer, *pieces)
    else:
        with pytest.raises(EventTooLarge):
            fed(framer, *pieces)


@pytest.mark.parametrize("pass_on", [True, False])
def test_a_large_event_in_small_pieces_takes_linear_time(pass_on: bool) -> None:
    framer = Framer(pass_on)
    piece = b"x" * 8192
    started = time.process_time()
    passed_on = sum(len(framer.feed(piece)) for _ in range(2047)) + len(framer.feed(b"\n\n"))
    assert passed_on == 2047 * 8192 + 2
    # 0.03 s; searching all of it for every piece takes 1.4 and 22 s.
    assert time.process_time() - started < 0.5
