"""The shared `requests.Session` and the `Call`: one request to one upstream, which any thread may abort.

The exceptions of requests and urllib3 end here: callers see `CallFailed` with a `Fault` and a plain
detail that names no address. The thread that sends a call owns it and closes it; others may only
`abort` it.
"""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import requests
import urllib3

from ..api.headers import Pairs
from ..policy import Fault
from . import faults
from .connection import Adapter, Outgoing, Response, Way
from .demo import DemoAdapter
from .resolver import Resolver
from .watch import Reason, Watcher

PIECE = 65536  # bytes asked for at a time
#: Seconds after sending within which a kept connection that breaks was dead before: later than that the
#: request may have been served, and billed.
DEAD_WITHIN = 2.0
_DECODABLE = frozenset({"gzip", "x-gzip", "deflate"})

_FAULT_OF_REASON = {
    Reason.CONNECT_TIMEOUT: Fault.CONNECT,
    Reason.TIMEOUT: Fault.TIMEOUT,
    Reason.CLIENT_LEFT: Fault.CLIENT_LEFT,
    Reason.RESTART: Fault.RESTART,
}


class CallFailed(Exception):
    """A call that brought no answer, or none to its end."""

    def __init__(self, fault: Fault, detail: str, stale: bool = False) -> None:
        super().__init__(detail)
        self.fault = fault
        self.detail = detail
        #: A reused connection that broke before any byte of an answer: the upstream closed it idle.
        self.stale = stale


class _Aborted(Exception):
    """Raised in the owner's thread when its call was aborted before it had a socket."""


class Call:
    """One request to one upstream and its answer. `status`, `headers` and `pieces` are the owner's."""

    def __init__(self, watcher: Watcher, resolver: Resolver, connect_timeout: float, fresh: bool) -> None:
        """See `Transport.call`."""
        self.watcher = watcher
        self.resolver = resolver
        self.connect_timeout = connect_timeout
        self.fresh = fresh
        self.at_proxy = False  # on the way to a forward proxy, or waiting for its tunnel
        self.reused = False
        self.connected = False
        self.heard = False  # a byte of the answer arrived
        self.status = 0
        self.headers: Pairs = []
        self.decoded = False
        self._raw: Any = None  # urllib3's response
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._reason: Reason | None = None

    def abort(self, reason: Reason) -> None:
        """End the call from any thread; the first reason stays. Does not block."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
            if self._socket is not None:
                _shut(self._socket)

    def idle(self, seconds: float) -> None:
        """From now on wait at most `seconds` for each next bytes."""
        with self._lock:
            if self._socket is not None:
                self._socket.settimeout(seconds)

    def attach(self, sock: socket.socket) -> None:
        """Let `abort` reach the socket that the call uses from now on."""
        with self._lock:
            self._socket = sock
            if self._reason is not None:
                raise _Aborted

    def detach(self) -> None:
        """Take the socket out of `abort`'s reach: it is closed, or another call's next."""
        with self._lock:
            self._socket = None

    def pieces(self) -> Iterator[bytes]:
        """The body as it arrives, content encoding undone; to be read to its end by one reader.

        Raises `CallFailed`.
        """
        raw = self._raw
        try:
            if isinstance(raw, Response) and not self.decoded:
                yield from raw.pieces(PIECE)
            else:
                # Not stream(), which would wait for a full buffer.
                yield from iter(lambda: raw.read1(PIECE, decode_content=self.decoded), b"")
        except (urllib3.exceptions.HTTPError, OSError, http.client.HTTPException, ValueError) as error:
            raise self.failure(error) from None
        # A connection that was shut looks like the end of a body that only its close delimits.
        self.check()

    def check(self) -> None:
        """Raise `CallFailed` if the call was aborted."""
        if self._reason is not None:
            raise self.failure(None)

    def close(self) -> None:
        """Give the call up. A connection whose answer was not read to its end is closed, not kept."""
        self.detach()
        if self._raw is not None:
            self._raw.close()

    def answered(self, raw: Any) -> None:
        """Take the head of the answer, urllib3's."""
        self._raw = raw
        self.status = raw.status
        self.headers = [(name.lower(), value) for name, value in raw.headers.items()]
        encoding = raw.headers.get("content-encoding", "identity").strip().lower()
        if encoding in _DECODABLE:
            self.decoded = True
        elif encoding not in ("identity", "") and self.status < 400:  # an error is passed on as it is
            self.close()
            raise CallFailed(Fault.NO_ANSWER, f"content encoding {encoding[:20]} was not asked for")

    def failure(self, error: Exception | None) -> CallFailed:
        """What an exception of requests, urllib3 or the socket means."""
        if self._reason is not None:
            fault, detail = _FAULT_OF_REASON[self._reason], self._reason.value
            return CallFailed(fault, self._placed(detail) if fault is Fault.CONNECT else detail)
        if not self.connected:
            return CallFailed(
                Fault.CONNECT, faults.refused_tunnel(error) or self._placed(faults.plain(error))
            )
        if faults.is_timeout(error):
            return CallFailed(Fault.TIMEOUT, "silent for too long")
        is_recent = time.monotonic() - self._began < DEAD_WITHIN
        stale = self.reused and not self.heard and is_recent
        return CallFailed(Fault.BROKEN, faults.plain(error), stale=stale)

    def _placed(self, detail: str) -> str:
        """What kept the call from its upstream; the forward proxy's fault where it did not get past it."""
        return f"the forward proxy failed: {detail}" if self.at_proxy else detail


class Transport:
    """Sends calls over one shared session; thread-safe."""

    def __init__(self, watcher: Watcher, connect_timeout: float) -> None:
        #: Bounds DNS, TCP, a forward proxy's tunnel and TLS together, in seconds.
        self.connect_timeout = connect_timeout
        self._watcher = watcher
        self._resolver = Resolver()
        self._session = requests.Session()
        self._adapter = Adapter()
        self._session.mount("http://", self._adapter)
        self._session.mount("https://", self._adapter)
        self._session.mount("demo://", DemoAdapter())

    def call(self, fresh: bool = False) -> Call:
        """A call to be sent; `fresh`: on a new connection, whatever the pool holds."""
        return Call(self._watcher, self._resolver, self.connect_timeout, fresh)

    def send(self, call: Call, outgoing: Outgoing) -> None:
        """Send a request and wait for the head of its answer. Raises `CallFailed`."""
        try:
            raw = self._exchange(call, outgoing)
        except (
            _Aborted,
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            OSError,
            http.client.HTTPException,
        ) as error:
            call.detach()
            raise call.failure(error) from None
        call.answered(raw)
        if outgoing.is_forwarded and faults.wants_password(raw.status, raw.headers):
            call.close()
            raise CallFailed(Fault.CONNECT, faults.refusal(raw.status, raw.reason))

    def keep_only(self, ways: Iterable[Way]) -> None:
        """Close the kept connections of all other upstreams; those in use are closed when they come back."""
        self._adapter.keep_only(ways)

    def close(self) -> None:
        """Close the kept connections."""
        self._session.close()

    def _exchange(self, call: Call, outgoing: Outgoing) -> Any:
        """urllib3's response; of requests only the adapter.

        What `Session.send` does besides is not wanted here. Nothing of the environment or of another
        client may slip in, no netrc, no proxies, no CA bundle and no cookies, and a redirect is an answer
        like any other.
        """
        adapter = self._session.get_adapter(outgoing.url)
        if isinstance(adapter, Adapter):
            return adapter.exchange(call, outgoing)
        return adapter.send(_prepared(outgoing))


def _prepared(outgoing: Outgoing) -> requests.PreparedRequest:
    """The request as an adapter that is not ours wants it."""
    request = requests.PreparedRequest()
    request.method, request.url, request.body = outgoing.method, outgoing.url, outgoing.body
    return request


def _shut(sock: socket.socket) -> None:
    """Wake whoever blocks on the socket.

    The plain socket's method on purpose: a TLS socket's own drops the TLS layer first, and what is
    sent in that gap goes out in clear.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
