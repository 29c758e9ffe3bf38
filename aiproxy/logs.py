"""Log lines: key=value text on standard output, without a secret and without forged lines.

What is said where: one line when a request arrives, one an attempt, one when the request is done, one
when a circuit changes. The request's id joins them.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Iterable

Value = str | int | float | bool | None

_LOGGER = logging.getLogger("aiproxy")
_REDACTED = "[redacted]"

# Keys of the usual forms, also those of other people that a prompt may hold.
_KEY_FORMS = r"\bsk-[A-Za-z0-9_-]{6,}|(?i:\bbearer\s+)[A-Za-z0-9._~+/=-]{16,}"
# A client's stand-in key such as "x" is no secret, and redacting it would blot out whole lines.
_SHORTEST_SECRET = 6

_BARE = re.compile(r"[A-Za-z0-9_./:@+-]+")
# What a terminal or a log viewer may take for a line's end or for a command.
_UNSAFE = re.compile(r"[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class Redactor:
    """Takes secrets out of text before it is logged or shown."""

    def __init__(self, secrets: Iterable[str]) -> None:
        """`secrets`: the upstreams' tokens."""
        known = [
            re.escape(form) for secret in secrets if secret for form in {secret, json.dumps(secret)[1:-1]}
        ]
        known.sort(key=len, reverse=True)
        self._known = re.compile("|".join(known)) if known else None
        self._any = re.compile("|".join([*known, _KEY_FORMS]))

    def text(self, text: str, limit: int, secrets: Iterable[str] = ()) -> str:
        """At most `limit` characters of `text`; `secrets` are the request's own.

        Redacts before it cuts, else the first half of a key would stay.
        """
        text = text[: limit + 4096]
        for secret in secrets:
            if len(secret) >= _SHORTEST_SECRET:
                text = text.replace(secret, _REDACTED)
        return self._any.sub(_REDACTED, text)[:limit]

    def answer(self, body: bytes) -> bytes:
        """An upstream's error as the client may see it: the same bytes, less the upstream's own token."""
        if self._known is None:
            return body
        text = body.decode("latin-1")
        return self._known.sub(_REDACTED, text).encode("latin-1")


def line(level: int, event: str, **fields: Value) -> None:
    """Write one line; fields that are None are left out. Values cannot break out of their place."""
    if _LOGGER.isEnabledFor(level):
        parts = [f"{name}={_written(value)}" for name, value in fields.items() if value is not None]
        _LOGGER.log(level, "%s", " ".join([event, *parts]))


def circuit(upstream: str, state: str, seconds: float | None = None) -> None:
    """A circuit that opened, rests, is tried or closed; `seconds` until the upstream is tried again."""
    level = logging.INFO if state == "closed" else logging.WARNING
    line(level, "circuit", upstream=upstream, state=state, seconds=seconds or None)


def exception(event: str, **fields: Value) -> None:
    """Write one line and the traceback of the exception in hand: a bug of ours."""
    parts = [f"{name}={_written(value)}" for name, value in fields.items() if value is not None]
    _LOGGER.exception("%s", " ".join([event, *parts]))


def configure(level: str) -> None:
    """Send this package's lines of at least `level` to standard output, and nowhere else."""
    handler = logging.StreamHandler(sys.stdout)
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    _LOGGER.handlers[:] = [handler]
    _LOGGER.propagate = False
    _LOGGER.setLevel(level.upper())
    # It quotes odd answers at length, which may hold anything; what matters of them is in our own lines.
    logging.getLogger("urllib3").setLevel(logging.ERROR)


def _written(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    if _BARE.fullmatch(text):
        return text
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))
