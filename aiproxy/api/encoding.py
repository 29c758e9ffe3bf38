"""Compressed request bodies: `content-encoding` gzip and deflate, undone within bounds.

The API takes such bodies, and Claude Code can send them. The limit counts decoded bytes, and a body is never
decoded far beyond it.
"""

import zlib

from ..errors import ApiError, too_large

_PIECE = 1024 * 1024  # bytes decoded at a time; zlib lets other threads run meanwhile
#: `zlib.decompressobj`'s window bits for a header of gzip's, of zlib's, and for none.
_GZIP, _ZLIB, _RAW = 31, 15, -15


def decode(raw: bytes, coding: str, limit: int) -> bytes:
    """The body that was encoded, at most `limit` bytes of it.

    `coding`: the value of `content-encoding`. Raises `ApiError`: 400 for a coding that is not known or does
    not fit the body, 413 over `limit`.
    """
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return raw
    if coding not in ("gzip", "x-gzip", "deflate"):
        message = "content-encoding: only gzip and deflate are supported."
        raise ApiError(400, "invalid_request_error", message, code="request_body_encoding_unsupported")
    bits = _GZIP if coding != "deflate" else _ZLIB if _has_zlib_header(raw) else _RAW
    decoder = zlib.decompressobj(bits)
    pieces: list[bytes] = []
    size = 0
    try:
        rest = raw
        while not decoder.eof:
            piece = decoder.decompress(rest, min(_PIECE, limit - size + 1))
            rest = decoder.unconsumed_tail
            size += len(piece)
            if size > limit:
                raise too_large(limit, "request_body_too_large_after_decoding")
            if not piece and not rest and not decoder.eof:
                raise _invalid(coding)
            pieces.append(piece)
    except zlib.error:
        raise _invalid(coding) from None
    if decoder.unused_data:
        raise _invalid(coding)
    return b"".join(pieces)


def _has_zlib_header(raw: bytes) -> bool:
    """RFC 1950 section 2.2: the two bytes are a multiple of 31. Some clients send no header at all."""
    return len(raw) >= 2 and raw[0] & 0x0F == 8 and (raw[0] << 8 | raw[1]) % 31 == 0


def _invalid(coding: str) -> ApiError:
    message = f"content-encoding: the body is not valid {coding}."
    return ApiError(400, "invalid_request_error", message, code="request_body_encoding_invalid")
