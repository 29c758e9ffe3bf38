"""Log lines: key=value text on standard output, without a secret and without forged lines.

What is said where: one line when a request arrives, one an attempt, one when the request is done, one
when a circuit changes. The request's id joins them.
"""

import io
import json
import logging
import re
import sys
import time
from collections.abc import Iterable
from typing import Any

Value = str | int | float | bool | None

_LOGGER = logging.getLogger("aiproxy")
_REDACTED = "[redacted]"

# Keys of the usual forms, also those of other people that a prompt may hold.
_KEY_FORMS = re.compile(r"\bsk-[A-Za-z0-9_-]{6,}|(?i:\bbearer\s+)[A-Za-z0-9._~+/=-]{16,}")
#: Characters of one field at most.
FIELD = 500

_PLAIN = re.compile(r"[A-Za-z0-9_.~-]+")
_BARE = re.compile(r"[A-Za-z0-9_./:@+-]+")
# What a terminal or a log viewer may take for a line's end or for a command.
_UNSAFE = re.compile(r"[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


_CONTROL = re.compile(rf"[\x00-\x1f]|{_UNSAFE.pattern}")


class Redactor:
    """Takes secrets out of text before it is logged or shown."""

    def __init__(self, tokens: Iterable[str], keys: Iterable[str] = ()) -> None:
        """`tokens`: the upstreams'; `keys`: the clients'."""
        tokens = _worth_hiding(tokens)
        self._secrets = [(secret, _core(secret)) for secret in (*tokens, *_worth_hiding(keys))]
        self._longest = max((len(secret) for secret, _ in self._secrets), default=0)
        self._tokens = re.compile(_any_of(tokens)) if tokens else None

    def text(self, text: str, limit: int, secrets: Iterable[str] = ()) -> str:
        """At most `limit` characters of `text`; `secrets` are the request's own.

        Redacts before it cuts, and drops what may be the first part of a secret at the cut.
        """
        own = _worth_hiding(secrets)
        longest = max(self._longest, *map(len, own), 64) * 6  # as long as escapes make it
        is_cut = len(text) > limit + longest
        shown = text[: limit + longest]
        # Hundreds of keys are looked for in each field; hardly any is there.
        hidden = [secret for secret, core in self._secrets if core in shown]
        hidden += [secret for secret in own if _core(secret) in shown]
        if hidden:  # before the usual forms, which may end in the middle of a secret
            shown = re.sub(_any_of(hidden), _REDACTED, shown)
        shown = _KEY_FORMS.sub(_REDACTED, shown)
        return (shown[:-longest] if is_cut else shown)[:limit]

    def line(self, level: int, event: str, secrets: Iterable[str], **fields: Value) -> None:
        """As `line`, for fields that strangers had a part in; a `prompt` is redacted and cut already."""
        if _LOGGER.isEnabledFor(level):
            shown = {
                name: self.text(value, FIELD, secrets)
                if isinstance(value, str) and name != "prompt"
                else value
                for name, value in fields.items()
            }
            line(level, event, **shown)

    def answer(self, body: bytes) -> bytes:
        """An upstream's error as the client may see it: the same bytes, less the upstream's own token."""
        if self._tokens is None:
            return body
        text = body.decode("latin-1")
        return self._tokens.sub(_REDACTED, text).encode("latin-1")


def _worth_hiding(secrets: Iterable[str]) -> list[str]:
    """All but stand-ins such as "x", "none" or "ollama": hiding those would blot out whole lines."""
    return [secret for secret in secrets if len(secret) >= 8 or (len(secret) >= 5 and not secret.isalpha())]


def _core(secret: str) -> str:
    """The longest part of a secret that no escaping changes."""
    return max(_PLAIN.findall(secret), key=len, default="")


def _any_of(secrets: list[str]) -> str:
    """A pattern for any of the secrets, the longest first, plain or as some JSON writer escapes it."""
    longest_first = sorted(set(secrets), key=len, reverse=True)
    return "|".join("".join(map(_escaped_or_not, secret)) for secret in longest_first)


def _escaped_or_not(sign: str) -> str:
    if sign.isalnum() and sign.isascii():
        return sign
    return rf"(?:\\?{re.escape(sign)}|\\u(?i:{ord(sign):04x}))"


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A prompt may hold what the terminal's encoding lacks; no line is worth losing for it.
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stdout)
    formatter = _Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    _LOGGER.handlers[:] = [handler]
    _LOGGER.propagate = False
    _LOGGER.setLevel(level.upper())
    # It quotes odd answers at length, which may hold anything; what matters of them is in our own lines.
    logging.getLogger("urllib3").setLevel(logging.ERROR)


class _Formatter(logging.Formatter):
    """Keeps what an exception says of a prompt from forging a line."""

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"  | {_CONTROL.sub(_as_escape, text)}" for text in lines)


def _written(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    if _BARE.fullmatch(text):
        return text
    return _UNSAFE.sub(_as_escape, json.dumps(text, ensure_ascii=False))


def _as_escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
