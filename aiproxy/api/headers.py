"""What crosses the proxy, each way: pure functions over ordered (name, value) pairs.

Names are lower case throughout. Everything crosses that is not listed here, unknown `anthropic-*`
headers included: no allowlist, so that what the API adds tomorrow passes today.
"""

import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

#: Header fields: names in lower case, and values.
Pairs = list[tuple[str, str]]

#: RFC 9110 section 7.6.1, and what proxies are known to send in spite of it.
HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    "trailers transfer-encoding upgrade http2-settings".split()
)

#: Of the client's own hop, of its identity, or set anew for the upstream.
_REQUEST_ONLY_HERE = frozenset(
    "host content-length content-encoding expect origin cookie cookie2 authorization x-api-key "
    "accept-encoding forwarded via x-real-ip x-litellm-end-user-id".split()
)
#: The last two are a front gateway's, and say who the user is.
_REQUEST_PREFIXES_ONLY_HERE = ("x-forwarded-", "cf-", "x-claude-gateway-user-", "x-auth-request-")

#: Of the upstream's own hop; length and encoding are set anew from the bytes that go out.
_RESPONSE_ONLY_HERE = frozenset("content-length set-cookie set-cookie2 server date alt-svc".split())

_LONGEST = 1e9  # seconds of a `retry-after`, some thirty years

# What gunicorn accepts in a response; anything else would turn a good answer into a 500.
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


def to_upstream(
    client: Iterable[tuple[str, str]],
    credential: tuple[str, str],
    extra: Pairs,
    removed: frozenset[str] = frozenset(),
) -> Pairs:
    """The request headers an upstream gets.

    `credential` is the upstream's own, the only one that goes out; `extra` are those its configuration
    adds, which replace the client's of the same name; `removed` are names that it does not get.
    """
    dropped = _named_by_connection(client) | HOP_BY_HOP | _REQUEST_ONLY_HERE | removed
    dropped |= {name for name, _ in extra}
    kept = [
        (name, value)
        for name, value in client
        if name not in dropped and not name.startswith(_REQUEST_PREFIXES_ONLY_HERE)
    ]
    return [*kept, *extra, ("accept-encoding", "identity"), credential]


def with_betas(headers: Pairs, drop: Iterable[str], add: Iterable[str]) -> Pairs:
    """The headers with other values of `anthropic-beta`, without one where none is left."""
    named = [beta.strip() for name, value in headers if name == "anthropic-beta" for beta in value.split(",")]
    left = dict.fromkeys([*(beta for beta in named if beta and beta not in drop), *add])
    others = [pair for pair in headers if pair[0] != "anthropic-beta"]
    return [*others, ("anthropic-beta", ",".join(left))] if left else others


def to_client(upstream: Pairs, decoded: bool = False) -> Pairs:
    """The response headers a client gets; `decoded` says that the body lost its content encoding."""
    dropped = _named_by_connection(upstream) | HOP_BY_HOP | _RESPONSE_ONLY_HERE
    if decoded:
        dropped |= {"content-encoding"}
    return [
        (name, value)
        for name, value in map(_in_whole_seconds, upstream)
        if name not in dropped
        and value is not None
        and not name.startswith("x-aiproxy-")  # another aiproxy's: ours takes their place
        and _TOKEN.fullmatch(name)
        and _VALUE.fullmatch(value)
    ]


def value_of(pairs: Iterable[tuple[str, str]], name: str) -> str | None:
    """The first value of a header."""
    for key, value in pairs:
        if key == name:
            return value
    return None


def media_type(pairs: Iterable[tuple[str, str]]) -> str:
    """The content type without its parameters, in lower case; empty where there is none."""
    return (value_of(pairs, "content-type") or "").partition(";")[0].strip().lower()


def _in_whole_seconds(pair: tuple[str, str]) -> tuple[str, str | None]:
    """A `retry-after` as Claude Code reads it, in whole seconds; without a value where it makes no sense."""
    name, value = pair
    if name == "retry-after":
        seconds = seconds_of(value)
        return name, None if seconds is None else str(math.ceil(seconds))
    if name == "retry-after-ms":
        return name, value if value.isascii() and value.isdigit() else None
    return pair


def _named_by_connection(pairs: Iterable[tuple[str, str]]) -> frozenset[str]:
    """The headers that `Connection` makes hop-by-hop."""
    named = ",".join(value for name, value in pairs if name == "connection").lower()
    return frozenset(name.strip() for name in named.split(","))


def seconds_of(retry_after: str | None, now: datetime | None = None) -> float | None:
    """The seconds a `retry-after` header asks for: a number or an HTTP date (RFC 9110 section 10.2.3).

    Never negative; None where there is none or it makes no sense, as a negative or endless time.
    """
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after if "_" not in retry_after else "")
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
        except (ValueError, OverflowError):
            return None
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - (now or datetime.now(UTC))).total_seconds()
        seconds = max(0.0, seconds)  # a date in the past
    return min(seconds, _LONGEST) if 0 <= seconds < math.inf else None
