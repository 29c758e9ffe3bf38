"""The clients' keys, compared in constant time."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping


class ClientKeys:
    """The configured client keys; none configured lets everyone in. Keeps digests only, never a key."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        """`keys`: name to key."""
        self._digests = {name: _digest(key) for name, key in keys.items()}

    @property
    def are_required(self) -> bool:
        """Whether a request must bring a key."""
        return bool(self._digests)

    def owner(self, headers: Iterable[tuple[str, str]]) -> str | None:
        """The name of the key that a request brings, None if it brings no good one.

        Clients send a key as `x-api-key` or as `Authorization: Bearer`, or two at once, of which one may
        be meant for somebody else: any good one will do. Every key is compared with every other, so that
        the time reveals nothing.
        """
        found = None
        for credential in credentials(headers):
            presented = _digest(credential)
            for name, digest in self._digests.items():
                if hmac.compare_digest(presented, digest):
                    found = name
        return found


def secrets_in(headers: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """All that a request brings and no log may show, useless credentials and cookies included."""
    found: list[str] = []
    for name, value in headers:
        if name in ("x-api-key", "authorization", "proxy-authorization"):
            found += [value.strip(), value.strip().partition(" ")[2].strip()]
        elif name == "cookie":
            found += [value.strip(), *(part.partition("=")[2].strip() for part in value.split(";"))]
    return tuple(secret for secret in found if secret)


def credentials(headers: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """The credentials in a request's headers, whose names are in lower case."""
    found = []
    for name, value in headers:
        if name == "x-api-key":
            found.append(value.strip())
        elif name == "authorization":
            scheme, _, credential = value.strip().partition(" ")
            found.append(credential.strip() if scheme.lower() == "bearer" else value.strip())
    return tuple(credential for credential in found if credential)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
