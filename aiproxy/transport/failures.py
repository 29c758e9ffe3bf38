"""What it means that a request brought no answer, in plain words for the log.

Exceptions of requests, urllib3, http.client and the socket, and what a forward proxy says instead of
passing a request on. No phrase names an address or holds a secret.
"""

import http.client
import re
import socket
import ssl
from collections.abc import Iterator, Mapping

import urllib3

from ..policy import Fault
from .wait import Interrupted

# http.client's words.
_REFUSED_TUNNEL = re.compile(r"Tunnel connection failed: (\d+) ?(.*)", re.DOTALL)
# A reason of plain words, which holds neither an address nor a host with a domain.
_WORDS = re.compile(r"[A-Za-z][A-Za-z ']{0,59}")
# X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH, whose messages name the host.
_MISMATCHES = frozenset({62, 64})


class TransportError(Exception):
    """A request brought no answer, or none to its end."""

    def __init__(self, fault: Fault, detail: str, is_stale: bool = False, is_connected: bool = True) -> None:
        """`detail` names no address."""
        super().__init__(detail)
        self.fault = fault
        self.detail = detail
        #: A kept connection broke before any byte of an answer: the upstream had closed it.
        self.is_stale = is_stale
        #: The upstream may have got the request.
        self.is_connected = is_connected


def has_closed_pool(error: Exception) -> bool:
    """Whether the pool of connections had been closed; nothing was sent then."""
    return any(isinstance(cause, urllib3.exceptions.ClosedPoolError) for cause in _chain(error))


def wants_password(status: int, headers: Mapping[str, str]) -> bool:
    """Whether a forward proxy asks for a user and a password; tinyproxy does so as if it were the upstream.

    The API itself never asks for basic authentication.
    """
    challenge = headers.get("www-authenticate", "").lower()
    return status == 407 or (status == 401 and challenge.startswith("basic"))


def refused_tunnel(error: Exception | None) -> str | None:
    """What a forward proxy said instead of opening a tunnel, None if it did not refuse."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and (found := _REFUSED_TUNNEL.fullmatch(str(cause))):
            return refusal(int(found[1]), found[2])
    return None


def refusal(status: int, reason: str | None) -> str:
    """A forward proxy's refusal; its own words only where they can hold no address and no secret."""
    if not _WORDS.fullmatch(reason or ""):
        reason = http.client.responses.get(status, "")
    return f"the forward proxy refused: {status} {reason}".rstrip()


def plain(error: Exception) -> str:
    """One plain phrase for an exception and what caused it."""
    for cause in reversed(list(_chain(error))):
        if isinstance(cause, Interrupted):
            return cause.detail
        if isinstance(cause, ssl.SSLCertVerificationError):
            mismatch = cause.verify_code in _MISMATCHES
            why = "it is for another host" if mismatch else cause.verify_message
            return f"the certificate does not verify: {why}"
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed: {(cause.reason or 'unknown').lower().replace('_', ' ')}"
        if isinstance(cause, socket.gaierror):
            return "the host name was not found"
        if isinstance(cause, TimeoutError):
            return "no connection in time"
        if isinstance(cause, http.client.RemoteDisconnected):
            return "closed without an answer"
        if isinstance(cause, http.client.IncompleteRead | urllib3.exceptions.IncompleteRead):
            return "the answer was cut short"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        if isinstance(cause, urllib3.exceptions.DecodeError):
            return "the answer's content encoding is broken"
        if isinstance(cause, urllib3.exceptions.ProtocolError) and "prematurely" in str(cause):
            return "the answer was cut short"
    return f"no valid HTTP ({type(error).__name__})"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what caused it, outermost first; libraries hide causes in three places."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        error = waiting.pop(0)
        if isinstance(error, BaseException) and id(error) not in seen:
            seen.add(id(error))
            yield error
            waiting += [error.__cause__, getattr(error, "reason", None), *error.args, error.__context__]
