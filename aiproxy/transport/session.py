"""The shared `requests.Session`, and one upstream's response on it.

The exceptions of requests and urllib3 end here: callers see `TransportError` with a `Fault` and a plain
detail that names no address.
"""

import contextlib
import http.client
import time
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import requests
import urllib3
from urllib3.util import SKIP_HEADER

from ..api.headers import Pairs
from ..policy import Fault
from . import failures, wait
from .connection import Adapter, Way
from .demo import DemoAdapter
from .failures import TransportError
from .wait import Interrupted, Sending, Wait

PIECE = 65536  # bytes asked for at a time
#: Seconds after sending within which a kept connection that breaks was dead before: later than that the
#: request may have been served, and billed.
DEAD_WITHIN = 2.0
_NO_TIMEOUT: Any = urllib3.Timeout()  # the `Wait` has them all
_DECODABLE = frozenset({"gzip", "x-gzip", "deflate"})
_ERRORS = (
    Interrupted,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    OSError,
    http.client.HTTPException,
)


class Outgoing(msgspec.Struct, frozen=True):
    """A request as it goes out, and its way: through a forward proxy, with CAs of the upstream's own."""

    method: str
    url: str
    headers: Pairs  # each name once
    body: bytes
    proxy: str | None = None
    ca_bundle: str | None = None

    @property
    def is_forwarded(self) -> bool:
        """Whether the forward proxy reads and answers the request itself: there is no tunnel through it."""
        return self.proxy is not None and self.url.startswith("http:")

    def prepared(self) -> requests.PreparedRequest:
        """Field by field: `PreparedRequest.prepare` costs as much as sending a small request."""
        request = requests.PreparedRequest()
        request.method, request.url, request.body = self.method, self.url, self.body or None
        headers: Any = dict(self.headers)
        headers.setdefault("user-agent", SKIP_HEADER)  # else urllib3 adds its own
        if self.body or self.method == "POST":
            headers["Content-Length"] = str(len(self.body))  # spelled as requests looks for it
        request.headers = headers
        return request


class _NoCookies(requests.cookies.RequestsCookieJar):
    """Stores nothing: what an upstream sets for one client must not reach another."""

    def extract_cookies(self, response: Any, request: Any) -> None:
        """See above."""


class _Session(requests.Session):
    """A session that takes nothing from the environment, stores no cookies and follows no redirects."""

    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False
        self.headers.clear()
        self.cookies = _NoCookies()

    def get_redirect_target(self, resp: requests.Response) -> None:
        """A redirect is an answer like any other; `send` would read all of its body to prepare the next."""


class UpstreamResponse:
    """An upstream's response whose head has come. `close` it in every case."""

    def __init__(self, sending: Sending, response: requests.Response) -> None:
        """Raises `TransportError` where the body could not be decoded."""
        self.status = response.status_code
        self.headers: Pairs = [(name.lower(), value) for name, value in response.raw.headers.items()]
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        #: Whether `pieces` undoes a content encoding.
        self.is_decoded = encoding in _DECODABLE
        self._sending = sending
        self._raw = response.raw  # urllib3's response
        if not self.is_decoded and encoding not in ("identity", "") and self.status < 400:
            self.close()
            raise TransportError(Fault.NO_ANSWER, f"content encoding {encoding[:20]} was not asked for")

    def pieces(self) -> Iterator[bytes]:
        """The body as it arrives, content encoding undone; to be read to its end by one reader.

        Raises `TransportError`.
        """
        answer = self._sending.answer
        try:
            if answer is None or self.is_decoded:
                while piece := self._raw.read1(PIECE, decode_content=self.is_decoded):
                    yield piece
            else:
                # http.client's response, below urllib3's: its read1 costs a third, and hands out a chunk's
                # bytes as they come. It does not check the length.
                while piece := answer.read1(PIECE):
                    yield piece
                if answer.length:
                    raise http.client.IncompleteRead(b"", answer.length)
        except (*_ERRORS, ValueError) as error:
            raise failure(self._sending, error) from None
        self._release(answer)

    def close(self) -> None:
        """Give the response up. A connection whose answer was not read to its end is closed, not kept."""
        self._sending.wait.release()
        with contextlib.suppress(OSError):
            self._raw.close()

    def _release(self, answer: Any) -> None:
        """The body was read to its end: give the connection back, unless what follows is doubtful."""
        if answer is not None:
            answer.close()
        if answer is not None and answer.has_bytes_behind:
            self.close()
        else:
            self._sending.wait.release()
            self._raw.release_conn()


class Transport:
    """Sends requests over one shared session; thread-safe."""

    def __init__(self, connect_timeout: float) -> None:
        #: Bounds DNS, TCP, a forward proxy's tunnel and TLS together, in seconds.
        self.connect_timeout = connect_timeout
        self._session = _Session()
        self._adapter = Adapter()
        self._session.mount("http://", self._adapter)
        self._session.mount("https://", self._adapter)
        self._session.mount("demo://", DemoAdapter())

    def send(self, outgoing: Outgoing, waiting: Wait, is_fresh: bool = False) -> UpstreamResponse:
        """Send a request and wait for the head of its answer. Raises `TransportError`.

        `is_fresh`: on a new connection, whatever the pool holds.
        """
        sending = Sending(waiting, self.connect_timeout, is_fresh)
        wait.begin(sending)
        try:
            response = self._session.send(
                outgoing.prepared(),
                stream=True,
                timeout=_NO_TIMEOUT,
                allow_redirects=False,
                proxies={"http": outgoing.proxy, "https": outgoing.proxy} if outgoing.proxy else {},
                verify=outgoing.ca_bundle or True,
            )
        except _ERRORS as error:
            waiting.release()
            raise failure(sending, error) from None
        answer = UpstreamResponse(sending, response)
        if outgoing.is_forwarded and failures.wants_password(answer.status, response.headers):
            answer.close()
            raise TransportError(Fault.CONNECT, failures.refusal(answer.status, response.reason))
        return answer

    def keep_only(self, ways: Iterable[Way]) -> None:
        """Close the kept connections to upstreams that are not reached in one of these ways any more."""
        self._adapter.keep_only(ways)

    def close(self) -> None:
        """Close the kept connections."""
        self._session.close()


def failure(sending: Sending, error: Exception) -> TransportError:
    """What an exception of requests, urllib3, the socket or the wait means."""
    if isinstance(error, Interrupted) and error.fault is not Fault.CONNECT:
        return TransportError(error.fault, error.detail, is_connected=sending.is_connected)
    if failures.has_closed_pool(error):  # by a reload, between taking the pool and taking a connection
        return TransportError(Fault.BROKEN, failures.plain(error), is_stale=not sending.is_fresh)
    if not sending.is_connected:
        return TransportError(Fault.CONNECT, failures.refused_tunnel(error) or _placed(sending, error))
    is_recent = time.monotonic() - sending.began < DEAD_WITHIN
    is_stale = sending.is_reused and not sending.is_answered and is_recent
    return TransportError(Fault.BROKEN, failures.plain(error), is_stale)


def _placed(sending: Sending, error: Exception) -> str:
    """What kept a request from its upstream; the forward proxy's fault where it did not get past it."""
    detail = failures.plain(error)
    return f"the forward proxy failed: {detail}" if sending.is_at_proxy else detail
