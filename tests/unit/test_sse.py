"""Event framing."""

import random
import time
from itertools import pairwise

import pytest

from aiproxy.api import sse
from aiproxy.api.sse import Event, EventTooLarge, Framer, encode, parse

LINE_ENDS = (b"\n", b"\r\n", b"\r")

#: Two line ends, in every combination that is not one: `\r` and `\n` together are.
BLANK_LINES = (b"\n\n", b"\n\r", b"\n\r\n", b"\r\r", b"\r\r\n", b"\r\n\n", b"\r\n\r", b"\r\n\r\n")


def events(block: bytes) -> list[tuple[bytes, bytes]]:
    return [(event.name, event.data) for event in parse(block)]


def fed(framer: Framer, *pieces: bytes) -> list[bytes]:
    return [framer.feed(piece) for piece in pieces]


# parse


def test_an_event_is_its_name_and_its_data() -> None:
    assert list(parse(b'event: ping\ndata: {"type":"ping"}\n\n')) == [Event(b"ping", b'{"type":"ping"}')]


@pytest.mark.parametrize("end", LINE_ENDS)
def test_lines_may_end_in_any_of_three_ways(end: bytes) -> None:
    block = end.join([b"event: a", b"data: 1", b"", b"data: 2", b"data: 3", b"", b""])
    assert events(block) == [(b"a", b"1"), (b"", b"2\n3")]


def test_line_ends_may_be_mixed() -> None:
    assert events(b"event: a\rdata: 1\r\ndata: 2\n\r\ndata: 3\n\r") == [(b"a", b"1\n2"), (b"", b"3")]


def test_no_other_character_ends_a_line() -> None:
    data = '{"text":"\u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e"}'.encode()
    assert events(b"event: a\ndata: " + data + b"\n\n") == [(b"a", data)]


def test_data_lines_are_joined_by_a_line_feed() -> None:
    assert events(b"data: 1\r\ndata:\r\ndata: 3\r\n\r\n") == [(b"", b"1\n\n3")]


def test_only_one_space_after_the_colon_is_removed() -> None:
    assert events(b"event:a\ndata:  x \n\n") == [(b"a", b" x ")]


def test_a_value_may_hold_colons() -> None:
    assert events(b"event: a:b\ndata: {:}\n\n") == [(b"a:b", b"{:}")]


def test_comments_and_other_fields_are_skipped() -> None:
    block = b": data: no\n:\nid: 7\nretry: 100\nfoo: bar\nDATA: no\n data: no\nevent: a\ndata: 1\n\n"
    assert events(block) == [(b"a", b"1")]


def test_a_line_without_a_colon_is_a_field_with_an_empty_value() -> None:
    assert events(b"event: a\ndata\n\n") == [(b"a", b"")]


def test_the_last_name_stays() -> None:
    assert events(b"event: a\nevent: b\ndata: 1\n\n") == [(b"b", b"1")]


def test_a_name_does_not_outlive_its_event() -> None:
    assert events(b"event: a\ndata: 1\n\ndata: 2\n\n") == [(b"a", b"1"), (b"", b"2")]


def test_an_event_without_a_data_line_is_dropped_and_its_name_with_it() -> None:
    assert events(b"event: a\n\ndata: 1\n\n") == [(b"", b"1")]


def test_an_event_whose_data_line_is_empty_is_an_event() -> None:
    assert events(b"event: a\ndata:\n\n") == [(b"a", b"")]


@pytest.mark.parametrize("rest", [b"data: 2", b"data: 2\n", b"event: b\r\ndata: 2\r\n", b"data: 2\r"])
def test_a_final_event_without_a_blank_line_is_dropped(rest: bytes) -> None:
    assert events(b"data: 1\n\n" + rest) == [(b"", b"1")]


def test_blank_lines_alone_are_no_events() -> None:
    assert events(b"\n\r\n\r\n\n") == []
    assert events(b"") == []


def test_a_byte_order_mark_in_front_is_skipped() -> None:
    assert events(b"\xef\xbb\xbfdata: 1\n\n") == [(b"", b"1")]


# encode


def test_an_encoded_event_reads_as_it_was() -> None:
    assert encode("error", b'{"a":1}') == b'event: error\ndata: {"a":1}\n\n'
    assert events(encode("error", b'{"a":1}')) == [(b"error", b'{"a":1}')]


def test_encoded_data_of_several_lines_becomes_several_data_lines() -> None:
    assert encode("a", b"1\n2\r\n3\r4") == b"event: a\ndata: 1\ndata: 2\ndata: 3\ndata: 4\n\n"
    assert events(encode("a", b"1\n\n2\n")) == [(b"a", b"1\n\n2\n")]


# Framer


@pytest.mark.parametrize("blank", BLANK_LINES)
def test_a_piece_that_ends_in_a_blank_line_is_passed_on_without_a_copy(blank: bytes) -> None:
    piece = b"event: a\ndata: 1" + blank
    framer = Framer()
    assert framer.feed(piece) is piece
    assert framer.feed(piece) is piece
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


@pytest.mark.parametrize("blank", BLANK_LINES)
def test_a_blank_line_is_seen_wherever_it_is_cut(blank: bytes) -> None:
    block = b"data: 1" + blank
    for cut in range(1, len(block)):
        framer = Framer()
        assert b"".join(fed(framer, block[:cut], block[cut:])) == block
        assert framer.carried == 0
    framer = Framer()
    assert b"".join(fed(framer, *(bytes([byte]) for byte in block))) == block
    assert framer.carried == 0


@pytest.mark.parametrize("blank", BLANK_LINES)
def test_a_blank_line_is_seen_in_the_middle_of_a_piece(blank: bytes) -> None:
    block = b"data: 1" + blank
    assert fed(Framer(), block + b"data: 2") == [block]
    assert fed(Framer(), b"da", block[2:] + b"data: 2") == [b"", block]


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
    parts = [
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"data: x",
        b"data:",
        b"event: a",
        b": c",
        b"\xe2\x80\xa8",
        b"id: 1",
    ]
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


def test_a_large_event_ends_with_a_piece_that_ends_in_a_blank_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PASS_ON", 8)
    framer = Framer()
    assert fed(framer, b"data: 123", b"4\n\n") == [b"data: 123", b"4\n\n"]
    assert not framer.partial
    assert framer.feed(b"\n") == b"\n"


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
    assert not issubclass(EventTooLarge, OSError)


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
    assert (
        time.process_time() - started < 0.5
    )  # 0.03 s; searching all of it for every piece takes 1.4 and 22 s
