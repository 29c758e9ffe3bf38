"""Compressed request bodies."""

import gzip
import json
import zlib

import pytest

from aiproxy.api.encoding import decode
from aiproxy.app import create_app
from aiproxy.config import Config, UpstreamSettings
from aiproxy.errors import ApiError

MB = 1024 * 1024
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi " * 1000}]}).encode()


def raw_deflate(body):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "sent"),
    [
        ("", BODY),
        ("identity", BODY),
        ("gzip", gzip.compress(BODY)),
        (" GZIP ", gzip.compress(BODY)),
        ("x-gzip", gzip.compress(BODY)),
        ("deflate", zlib.compress(BODY)),
        ("deflate", raw_deflate(BODY)),
    ],
)
def test_known_codings_are_undone(coding, sent):
    assert decode(sent, coding, MB) == BODY


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "chunked", "none"])
def test_other_codings_are_refused(coding):
    with pytest.raises(ApiError) as refused:
        decode(BODY, coding, MB)
    assert (refused.value.status, refused.value.code) == (400, "request_body_encoding_unsupported")


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize(
    "break_it",
    [lambda packed: BODY, lambda packed: packed[:-5], lambda packed: packed + b"x", lambda packed: b""],
    ids=["plain JSON", "cut short", "followed by more", "empty"],
)
def test_a_body_that_does_not_fit_its_coding_is_refused(coding, break_it):
    packed = gzip.compress(BODY) if coding == "gzip" else zlib.compress(BODY)
    with pytest.raises(ApiError) as refused:
        decode(break_it(packed), coding, MB)
    assert (refused.value.status, refused.value.code) == (400, "request_body_encoding_invalid")


@pytest.mark.parametrize(("limit", "accepted"), [(len(BODY), True), (len(BODY) - 1, False)])
def test_the_limit_counts_decoded_bytes(limit, accepted):
    if accepted:
        assert decode(gzip.compress(BODY), "gzip", limit) == BODY
        return
    with pytest.raises(ApiError) as refused:
        decode(gzip.compress(BODY), "gzip", limit)
    assert (refused.value.status, refused.value.code) == (413, "request_body_too_large_after_decoding")


def test_a_bomb_is_refused_before_it_is_decoded():
    bomb = gzip.compress(b" " * (64 * MB))
    with pytest.raises(ApiError) as refused:
        decode(bomb, "gzip", 4 * MB)
    assert refused.value.status == 413


def test_a_refusal_has_the_api_s_code_and_no_retry():
    one = UpstreamSettings(name="a", base_url="demo://answers")
    client = create_app(Config(upstreams=(one,))).test_client()
    reply = client.post("/v1/messages", data=BODY, headers={"content-encoding": "br"})
    assert reply.status_code == 400
    assert reply.json["error"]["details"] == {"error_code": "request_body_encoding_unsupported"}
    assert reply.headers["x-should-retry"] == "false"
