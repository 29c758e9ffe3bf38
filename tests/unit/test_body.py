"""Reading and splicing request bodies."""

import json
import time

import pytest

from aiproxy.api import body
from aiproxy.errors import ApiError


def test_an_unspliced_body_is_the_very_same_bytes():
    raw = b' { "model" : "m" ,\n "n": 1.10, "stream":true } '
    assert body.read(raw).spliced("m", stream=True) is raw


def test_splicing_the_model_keeps_every_other_value_s_bytes():
    raw = (
        b'{"model":"m","a": 1.10 ,"b":1e400,"c":123456789012345678901234567890,'
        b'"d":{"x" : [1, 2]},"e":"\\u00e9"}'
    )
    spliced = body.read(raw).spliced("mapped", stream=False)
    assert spliced == (
        b'{"model":"mapped","a":1.10,"b":1e400,"c":123456789012345678901234567890,'
        b'"d":{"x" : [1, 2]},"e":"\\u00e9"}'
    )


def test_splicing_the_stream_adds_or_replaces_it():
    assert body.read(b'{"model":"m"}').spliced("m", stream=True) == b'{"model":"m","stream":true}'
    assert (
        body.read(b'{"stream":false,"model":"m"}').spliced("m", stream=True) == b'{"stream":true,"model":"m"}'
    )


def test_of_other_duplicate_keys_the_last_one_stays():
    assert body.read(b'{"model":"a","x":1,"x":2}').spliced("c", stream=False) == b'{"model":"c","x":2}'


def of_members(count):
    return b'{"model":"m",' + b",".join(b'"x%d":1' % n for n in range(count)) + b"}"


REFUSED = {
    "not a JSON object": [
        *[b"", b"[]", b"null", b'"model"', b"not json", b'{"model":"m"', b'{"model":"m"} x', b"\xff\xfe{}"],
        *[b'{"model":"m","x":NaN}', b'{"model":"m","x":"\\ud800"}', b'{"\\ud800":1,"model":"m"}'],
        b'{"model":"m","x":["\\udc00 "]}',
    ],
    "nested too deeply": [
        b'{"model":"m","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"x":' * 200_000 + b"1" + b"}" * 200_000,
    ],
    "model": [b"{}", *[b'{"model":%s}' % value for value in (b"1", b"null", b'""', b'["m"]', b'"a\xff"')]],
    "stream": [b'{"model":"m","stream":%s}' % value for value in (b'"true"', b"1", b"{}")],
    "given twice": [b'{"model":"a","model":"a"}', b'{"model":"a","stream":true,"stream":false}'],
    "too many members": [of_members(1000), of_members(1_000_000)],
}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        pytest.param(raw, said, id=raw[:40].decode(errors="replace"))
        for said, bodies in REFUSED.items()
        for raw in bodies
    ],
)
def test_a_body_that_is_no_request_is_refused_at_once(raw, said):
    began = time.process_time()
    with pytest.raises(ApiError, match=said) as refused:
        body.read(raw)
    assert (refused.value.status, refused.value.type) == (400, "invalid_request_error")
    assert time.process_time() - began < 0.2


def test_a_body_of_a_thousand_members_is_one():
    assert body.read(of_members(999)).model == "m"


@pytest.mark.parametrize(
    ("spelt", "stream"),
    [(b"", False), (b',"stream":null', False), (b',"stream":false', False), (b',"stream":true', True)],
)
def test_stream_may_be_absent_null_or_explicit(spelt, stream):
    assert body.read(b'{"model":"m"' + spelt + b"}").stream is stream


def preview(messages):
    return body.read(json.dumps({"model": "m", "messages": messages}).encode()).preview()


def test_the_preview_is_the_last_user_text():
    assert preview([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]) == "one"
    blocks = [{"type": "text", "text": "first"}, {"type": "image"}, {"type": "text", "text": "last"}]
    assert preview([{"role": "user", "content": "one"}, {"role": "user", "content": blocks}]) == "last"


def test_what_tools_answered_does_not_hide_the_last_user_text():
    asked = {"role": "user", "content": [{"type": "text", "text": "one"}]}
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "a", "input": {}}]}
    nested = [{"type": "text", "text": "a tool's"}]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": nested}]}
    assert preview([asked, use, result, use, result]) == "one"


@pytest.mark.parametrize("last", [{"content": "one", "role": "user"}, {"role": "user", "content": "one"}])
def test_the_last_message_is_found_in_any_order_of_its_members(last):
    nested = {"role": "assistant", "content": [{"role": "user"}, {"a": {"role": "user", "content": 1}}]}
    assert (
        preview([last])
        == preview([last, nested])
        == preview([nested, {**last, "more": {"role": 1}}])
        == "one"
    )


@pytest.mark.parametrize(
    "messages", [[], None, "x", [1], [{"role": "user"}], [{"role": "user", "content": 5}]]
)
def test_a_preview_of_odd_messages_is_empty(messages):
    assert preview(messages) == ""
