"""The clients' keys."""

import hashlib
from collections.abc import Iterable

from ..config import ClientKey, all_digests


class ClientKeys:
    """The configured client keys; none configured lets everyone in."""

    def __init__(self, keys: Iterable[ClientKey]) -> None:
        self._owners = {bytes.fromhex(digest): key for key in keys for digest in all_digests(key)}

    @property
    def are_required(self) -> bool:
        """Whether a request must bring a key."""
        return bool(self._owners)

    def owner(self, headers: Iterable[tuple[str, str]]) -> ClientKey | None:
        """The key that a request brings, None if it brings no good one.

        Clients send a key as `x-api-key` or as `Authorization: Bearer`, or two at once, of which one may
        be meant for somebody else: any good one will do. What is looked up is a SHA-256, so that the time
        of a comparison reveals nothing of a key.
        """
        found = None
        for credential in credentials(headers):
            digest = hashlib.sha256(credential.encode(errors="surrogateescape")).digest()
            found = self._owners.get(digest, found)
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
