"""Redaction: secrets are taken out of text before it is logged or shown."""

import re
from collections.abc import Iterable, Sequence

REDACTED = "[redacted]"
#: Characters of one field at most, and of one header.
FIELD = 500

# Keys of the usual forms, also those of other people that a prompt may hold.
_KEY_FORMS = re.compile(r"\bsk-[A-Za-z0-9_-]{6,}|(?i:\bbearer\s+)[A-Za-z0-9._~+/=-]{16,}")
# Headers whose value is, or may well be, a credential; rate limits are counted in `tokens`.
_SECRET_HEADER = re.compile(
    r"authorization|cookie|(?:^|[-_])(?:[a-z]*(?:key|token|secret|passw(?:or)?d|passphrase|pwd)|pass|auth|jwt"
    r"|credentials?|sig(?:nature)?|session|sid)(?:$|[-_])",
    re.IGNORECASE,
)
#: Of that form, and no credential: Claude Code's name for a conversation.
_HARMLESS_HEADER = "x-claude-code-session-id"
_PLAIN = re.compile(r"[A-Za-z0-9_.~-]+")


class Redactor:
    """Takes secrets out of text before it is logged or shown."""

    def __init__(self, tokens: Iterable[str], keys: Iterable[str] = (), headers: Iterable[str] = ()) -> None:
        """`tokens`: the upstreams'; `keys`: the clients'; `headers`: names of those that are configured."""
        self._headers = frozenset(headers)
        self._known = _worth_hiding(tokens)
        self._keys = _worth_hiding(keys)
        self._learn()

    def learn(self, token: str) -> None:
        """Hide another token from now on, which a command has printed. Called by one thread at a time."""
        self._known = [*self._known, *_worth_hiding([token])]
        self._learn()

    def _learn(self) -> None:
        self._secrets = [(secret, _core(secret)) for secret in (*self._known, *self._keys)]
        self._longest = max((len(secret) for secret, _ in self._secrets), default=0)
        self._tokens = re.compile(_any_of(self._known)) if self._known else None

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
            shown = re.sub(_any_of(hidden), REDACTED, shown)
        if _may_hold_key(shown):
            shown = _KEY_FORMS.sub(REDACTED, shown)
        return (shown[:-longest] if is_cut else shown)[:limit]

    def may_hold_secret(self, text: str, secrets: Iterable[str]) -> bool:
        """Whether any of the fields that the text joins may hold a secret or be too long; seldom so."""
        return (
            len(text) > FIELD
            or _may_hold_key(text)
            or any(core in text for _, core in self._secrets)
            or any(_core(secret) in text for secret in _worth_hiding(secrets))
        )

    def hides(self, header: str) -> bool:
        """Whether the value of a header of that name is, or may well be, a credential."""
        if header == _HARMLESS_HEADER:
            return False
        return header in self._headers or _SECRET_HEADER.search(header) is not None

    def pairs(self, headers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """An answer's headers as the client may see them, less the upstream's own token."""
        if self._tokens is None or not self._tokens.search("\n".join(value for _, value in headers)):
            return list(headers)
        return [(name, self._tokens.sub(REDACTED, value)) for name, value in headers]

    def answer(self, body: bytes) -> bytes:
        """An upstream's error as the client may see it: the same bytes, less the upstream's own token."""
        if self._tokens is None:
            return body
        text = body.decode("latin-1")
        return self._tokens.sub(REDACTED, text).encode("latin-1")


def _may_hold_key(text: str) -> bool:
    """Whether it is worth looking for keys of the usual forms: a search that costs little."""
    return "sk-" in text or "bearer" in text.lower()


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
