"""Which upstream a conversation belongs to, so that its prompt cache is found again.

Prompt caches belong to one account. A conversation that moves pays its whole prefix again, at 12 to 20
times the price, and loses its thinking blocks. Weighted rendezvous hashing gives each session its order
of upstreams: no table to keep, the same in every worker and on every machine, and when an upstream
fails, only its own sessions move.
"""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence

from ..api.body import Body, members, text
from ..api.headers import Pairs, value_of
from .upstream import Upstream

#: The settings of `affinity`.
NONE, PROMPT_CACHE, PREFIX = "none", "prompt_cache", "prefix"

# A key, not a text: inside a JSON string the closing quote would follow a backslash.
_USES_CACHE = re.compile(rb'"cache_control"\s*:(?!\s*null)')
_OLD_USER_ID = re.compile(r"_session_([0-9a-f-]{36})$")
_BILLING_BLOCK = "x-anthropic-billing-header"


def key_of(setting: str, client: str, headers: Iterable[tuple[str, str]], body: Body) -> str | None:
    """What the upstream of a request is to depend on; None: on nothing, any will do.

    `client` is the name of the client's key: a session belongs to the client that names it.
    """
    if setting == NONE or not _uses_cache(body.raw):
        return None
    session = _session(list(headers), body)
    if session is None and setting == PREFIX:
        with contextlib.suppress(RecursionError):  # nested too deeply: for an upstream to judge
            session = _prefix(body)
    return None if session is None else f"{client}\n{session}"


def _uses_cache(raw: bytes) -> bool:
    """Whether a body sets a cache breakpoint; most conversations do in their last message.

    The plain search comes first: it is ten times as fast as the expression.
    """
    last = raw.rfind(b'"cache_control"')
    return last >= 0 and (_USES_CACHE.match(raw, last) or _USES_CACHE.search(raw)) is not None


def rank(upstreams: Sequence[Upstream], key: str) -> list[Upstream]:
    """The upstreams in the order in which a key prefers them; first places are shared by weight.

    Weighted rendezvous hashing: each upstream draws a number from the key and its own name, the largest
    of -weight / ln(number) wins (https://en.wikipedia.org/wiki/Rendezvous_hashing#Weighted_rendezvous_hash).
    """
    return sorted(upstreams, key=lambda upstream: upstream.weight / math.log(_draw(key, upstream.name)))


def _draw(key: str, name: str) -> float:
    """A number between 0 and 1, exclusive, that only the key and the name decide."""
    digest = hashlib.blake2b(f"{key}\n{name}".encode(errors="replace"), digest_size=8).digest()
    return ((int.from_bytes(digest) >> 12) + 0.5) / 2**52  # 52 bits: more would round up to 1


def _session(headers: Pairs, body: Body) -> str | None:
    """The session that a request names: Claude Code's header, else what `metadata.user_id` says."""
    named = value_of(headers, "x-claude-code-session-id")
    if named:
        return named
    user_id = text(_members(body.members.get("metadata", b"")).get("user_id", b"")) or None
    if user_id is None:
        return None
    if user_id.startswith("{"):  # Claude Code from 2.1.78 on: JSON in a string
        session = text(_members(user_id.encode(errors="replace")).get("session_id", b""))
        return session or user_id
    old = _OLD_USER_ID.search(user_id)
    return old[1] if old else user_id


def _prefix(body: Body) -> str:
    """A hash of what stays the same from turn to turn: model, tools, system, first user message.

    The whole message, since a conversation's first lines are often a project's and not its own. Without
    the cache breakpoints, which wander as a conversation grows.
    """
    system = _loads(body.members.get("system", b""))
    parts = [
        body.members.get("model", b"").decode(errors="replace"),
        _uncached(_loads(body.members.get("tools", b""))),
        _uncached(_without_billing(system)),
        _uncached(_first_user_message(_loads(body.members.get("messages", b"")))),
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _without_billing(system: object) -> object:
    """The system prompt without a billing block in front, which differs from request to request."""
    if isinstance(system, list) and system and isinstance(system[0], dict):
        return system[1:] if str(system[0].get("text", "")).startswith(_BILLING_BLOCK) else system
    return system


def _first_user_message(messages: object) -> object:
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            # As a text block too, which is what it becomes once a breakpoint is put on it.
            return [{"type": "text", "text": content}] if isinstance(content, str) else content
    return None


def _uncached(blocks: object) -> object:
    """Blocks without their cache breakpoints."""
    if isinstance(blocks, list):
        return [_uncached(block) for block in blocks]
    if isinstance(blocks, dict):
        return {name: value for name, value in blocks.items() if name != "cache_control"}
    return blocks


def _loads(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _members(raw: bytes) -> dict[str, bytes]:
    try:
        return members(raw)
    except ValueError:
        return {}
