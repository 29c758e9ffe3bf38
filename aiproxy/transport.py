"""The shared `requests.Session` and the `Call`: one request to one upstream, which any thread may abort.

The only module that knows requests and urllib3. Their exceptions end here: callers see `CallFailed`
with a `Fault` and a plain detail that names no address. The thread that sends a call owns it and
closes it; others may only `abort` it.
"""

import base64
import contextlib
import http.client
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import msgspec
import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util import SKIP_HEADER

from .demo import DemoAdapter
from .headers import Pairs
from .policy import Fault
from .resolver import Address, Resolver
from .watch import Reason, Watcher

PIECE = 65536  # bytes asked for at a time
_LONGEST_LINE, _MOST_LINES = 65536, 100  # of an answer's head: http.client's own bounds
POOL = 1024  # kept connections a host; more than any worker has threads

# As the official SDKs do: NATs drop connections that are silent for long, and a whole answer may be
# silent for ten minutes.
_SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5),
]

_PRINTABLE = re.compile(r"[!-~]+")
# http.client's words.
_REFUSED_TUNNEL = re.compile(r"Tunnel connection failed: (\d+) ?(.*)", re.DOTALL)
# A reason of plain words, which holds neither an address nor a host with a domain.
_WORDS = re.compile(r"[A-Za-z][A-Za-z ']{0,59}")
# X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH, whose messages name the host.
_MISMATCHES = frozenset({62, 64})
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


class Outgoing(msgspec.Struct, frozen=True):
    """A request as it goes out, and its way: through a forward proxy, with CAs of the upstream's own."""

    method: str
    url: str
    headers: Pairs
    body: bytes
    proxy: str | None = None
    ca_bundle: str | None = None

    @property
    def is_forwarded(self) -> bool:
        """Whether the forward proxy reads and answers the request itself: there is no tunnel through it."""
        return self.proxy is not None and self.url.startswith("http:")


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
        self.target = ""  # as the client sent path and query; urllib3 would mend their escapes
        self.at_proxy = False  # on the way to a forward proxy, or waiting for its tunnel
        self.reused = False
        self.connected = False
        self.heard = False  # a byte of the answer arrived
        self.status = 0
        self.headers: Pairs = []
        self.decoded = False
        self._raw: Any = None  # urllib3's response
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
            if raw.chunked and raw.supports_chunked_reads():
                yield from raw.stream(PIECE, decode_content=self.decoded)
            else:
                # Without chunks, stream() would wait for a full buffer.
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
        elif encoding not in ("identity", ""):
            self.close()
            raise CallFailed(Fault.NO_ANSWER, f"content encoding {encoding[:20]} was not asked for")

    def failure(self, error: Exception | None) -> CallFailed:
        """What an exception of requests, urllib3 or the socket means."""
        if self._reason is not None:
            fault, detail = _FAULT_OF_REASON[self._reason], self._reason.value
            return CallFailed(fault, self._placed(detail) if fault is Fault.CONNECT else detail)
        if not self.connected:
            return CallFailed(Fault.CONNECT, _refused_tunnel(error) or self._placed(_plain(error)))
        if _is_timeout(error):
            return CallFailed(Fault.TIMEOUT, "silent for too long")
        return CallFailed(Fault.BROKEN, _plain(error), stale=self.reused and not self.heard)

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
        self._session.mount("http://", adapter := _Adapter())
        self._session.mount("https://", adapter)
        self._session.mount("demo://", DemoAdapter())

    def call(self, fresh: bool = False) -> Call:
        """A call to be sent; `fresh`: on a new connection, whatever the pool holds."""
        return Call(self._watcher, self._resolver, self.connect_timeout, fresh)

    def send(self, call: Call, outgoing: Outgoing) -> None:
        """Send a request and wait for the head of its answer. Raises `CallFailed`."""
        request = _prepared(outgoing)
        call.target = request.path_url
        if outgoing.is_forwarded:
            parts = urlsplit(outgoing.url)
            call.target = f"{parts.scheme}://{parts.netloc}{request.path_url}"
        _current.call = call
        try:
            # By the session's adapter: what `Session.send` does besides is not wanted here. Nothing of the
            # environment or of another client may slip in, no netrc, no proxies, no CA bundle and no
            # cookies, and a redirect is an answer like any other.
            raw: Any = self._session.get_adapter(outgoing.url).send(
                request,
                stream=True,
                timeout=(call.connect_timeout, None),
                proxies={"http": outgoing.proxy, "https": outgoing.proxy} if outgoing.proxy else {},
                verify=outgoing.ca_bundle or True,
            )
        except (
            _Aborted,
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            OSError,
            http.client.HTTPException,
        ) as error:
            call.detach()
            raise call.failure(error) from None
        finally:
            _current.call = None
        call.answered(raw)
        if outgoing.is_forwarded and _wants_password(raw):
            call.close()
            raise CallFailed(Fault.CONNECT, _refusal(call.status, raw.reason))

    def close(self) -> None:
        """Close the kept connections."""
        self._session.close()


class _Current(threading.local):
    """The call that this thread is sending: urllib3 offers no way to hand it to a connection."""

    call: Call | None = None


_current = _Current()


class _Answer(http.client.HTTPResponse):
    """Notes the first byte of an answer, and reads its head by itself.

    http.client takes a head for whole that ends in the middle, and has it parsed by the email package,
    which takes longer than all the rest of a response.
    """

    def begin(self) -> None:
        if _current.call is not None and self.fp.peek(1):
            _current.call.heard = True
        version, status, reason = self._read_status()  # type: ignore[attr-defined]
        while status == http.client.CONTINUE:
            self._fields()
            version, status, reason = self._read_status()  # type: ignore[attr-defined]
        if not version.startswith("HTTP/1."):
            raise http.client.UnknownProtocol(version)
        self.code = self.status = status
        self.reason = reason.strip()
        self.version = 10 if version == "HTTP/1.0" else 11
        self.headers = self.msg = self._fields()
        self._frame()

    def _fields(self) -> http.client.HTTPMessage:
        """The header lines, each value as it was sent; a line that is none is left out."""
        fields = http.client.HTTPMessage()
        name, value, count = "", "", 0
        while (line := self.fp.readline(_LONGEST_LINE + 1)) not in (b"\r\n", b"\n"):
            count += 1
            if not line:
                raise http.client.IncompleteRead(b"")
            if len(line) > _LONGEST_LINE or count > _MOST_LINES:
                raise http.client.HTTPException("the head is too large")
            text = line.decode("latin-1").rstrip("\r\n")
            if text[:1] in (" ", "\t"):  # RFC 9112 section 5.2: a folded line goes on
                value += f"\r\n{text}"
                continue
            if name:
                fields.set_raw(name, value)
            name, colon, value = text.partition(":")
            name, value = name if colon else "", value.strip(" \t")
        if name:
            fields.set_raw(name, value)
        return fields

    def _frame(self) -> None:
        """How the body ends (RFC 9112 section 6.3)."""
        self.chunked = (self.headers.get("transfer-encoding") or "").lower() == "chunked"
        self.chunk_left = None
        length = self.headers.get("content-length") or ""
        self.length = int(length) if length.isdecimal() and not self.chunked else None
        if self.status in (204, 304) or self.status < 200 or self._method == "HEAD":  # type: ignore[attr-defined]
            self.length = 0
        # Without either, only its close ends the body.
        unbounded = self.length is None and not self.chunked
        self.will_close = unbounded or self._check_close()  # type: ignore[attr-defined]


class _Connection(HTTPConnection):
    """A connection whose socket the current call can abort, and whose connecting is bounded as a whole."""

    response_class = _Answer
    _call: Call | None = None
    _handle: socket.socket | None = None

    def connect(self) -> None:
        call = _current.call
        assert call is not None
        deadline = call.watcher.deadline(call, call.connect_timeout, Reason.CONNECT_TIMEOUT)
        try:
            super().connect()
            self._use(call)
        except BaseException:
            call.detach()
            raise
        finally:
            deadline.cancel()
            if self._handle is not None:
                self._handle.close()

    def request(self, method: str, url: str, *args: Any, **kwargs: Any) -> None:
        call = _current.call
        assert call is not None
        if _PRINTABLE.fullmatch(call.target):
            url = call.target
        if self.sock is None:
            self.connect()
        elif not call.connected:
            call.reused = True
            self._use(call)
        self.timeout = None  # else the connect timeout would bound the upload too
        super().request(method, url, *args, **kwargs)

    def let_go(self) -> None:
        """Before the connection goes back to the pool: a late abort must not hit the next call."""
        if self._call is not None:
            self._call.detach()
            self._call = None

    def _use(self, call: Call) -> None:
        call.connected = True
        self._call = call
        call.attach(self.sock)

    def _new_conn(self) -> socket.socket:
        call = _current.call
        assert call is not None
        failed: OSError | None = None
        call.at_proxy = self.proxy is not None
        try:
            addresses = call.resolver.resolve(self._dns_host, self.port, call.connect_timeout, call.check)
            for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
                try:
                    sock = self._dial(call, address, call.connect_timeout / left)
                except OSError as error:
                    failed = error
                else:
                    call.at_proxy = self.proxy_is_tunneling
                    return sock
        except OSError as error:
            failed = error
        raise urllib3.exceptions.NewConnectionError(self, "no connection") from failed

    def _dial(self, call: Call, address: Address, seconds: float) -> socket.socket:
        family, kind, protocol, _, place = address
        sock = socket.socket(family, kind, protocol)
        try:
            for option in self.socket_options or ():
                sock.setsockopt(*option)
            sock.settimeout(seconds)
            if self._handle is not None:
                self._handle.close()
            # TLS takes the socket object away; a duplicate reaches the connection all the same.
            self._handle = sock.dup()
            call.attach(self._handle)
            sock.connect(place)
        except BaseException:
            sock.close()
            raise
        return sock


class _TlsConnection(_Connection, HTTPSConnection):
    """The same over TLS, through a tunnel where there is a forward proxy."""

    def _tunnel(self) -> None:
        call = _current.call
        assert call is not None
        super()._tunnel()
        call.check()  # what was cut off in the answer's head passes for a tunnel
        call.at_proxy = False


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection = super()._get_conn(timeout)
        if _current.call is not None and _current.call.fresh:
            connection.close()
        return connection

    def _put_conn(self, conn: Any) -> None:
        if conn is not None:
            conn.let_go()
        super()._put_conn(conn)


class _TlsPool(_Pool, HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


_POOLS = {"http": _Pool, "https": _TlsPool}


class _Adapter(HTTPAdapter):
    """Mounts the connections above, direct ones and those through a forward proxy."""

    def __init__(self) -> None:
        self._managing = threading.Lock()
        self._kept: dict[tuple[str, str | None, bool | str | None], Any] = {}
        super().__init__(POOL, POOL)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, socket_options=_SOCKET_OPTIONS, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        with self._managing:  # else another thread could meet a manager with urllib3's own pools
            manager = super().proxy_manager_for(proxy, socket_options=_SOCKET_OPTIONS, **kwargs)
            manager.pool_classes_by_scheme = _POOLS
        return manager

    def get_connection_with_tls_context(
        self, request: Any, verify: Any, proxies: Any = None, cert: Any = None
    ) -> Any:
        """The pool of an upstream, which requests would look for anew with each request."""
        way = (request.url[: -len(request.path_url)], (proxies or {}).get("http"), verify)
        pool = self._kept.get(way)
        if pool is None:
            pool = super().get_connection_with_tls_context(request, verify, proxies, cert)
            self._kept[way] = pool
        return pool

    def build_response(self, req: Any, resp: Any) -> Any:
        """urllib3's response as it is: what requests' own adds to it, nobody asks for."""
        return resp

    def proxy_headers(self, proxy: str) -> dict[str, str]:
        return {"Proxy-Authorization": f"Basic {sent}"} if (sent := credentials(proxy)) else {}


def credentials(proxy: str) -> str | None:
    """A forward proxy's user and password as they are sent: what the percent-escapes stand for, in Base64.

    Byte for byte (RFC 7617); requests itself cannot send what is not Latin-1.
    """
    user, has_user, _ = urlsplit(proxy).netloc.rpartition("@")
    if not has_user:
        return None
    name, _, password = (unquote_to_bytes(part) for part in user.partition(":"))
    return base64.b64encode(name + b":" + password).decode()


def _prepared(outgoing: Outgoing) -> requests.PreparedRequest:
    """The request as it is given: requests' own preparation would mend it."""
    request = requests.PreparedRequest()
    request.method = outgoing.method
    request.url = outgoing.url
    headers: Any = {"user-agent": SKIP_HEADER, **dict(outgoing.headers)}  # else urllib3 would add its own
    request.headers = headers
    if outgoing.body:
        headers["Content-Length"] = str(len(outgoing.body))
        request.body = outgoing.body
    return request


def _shut(sock: socket.socket) -> None:
    """Wake whoever blocks on the socket.

    The plain socket's method on purpose: a TLS socket's own drops the TLS layer first, and what is
    sent in that gap goes out in clear.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


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


def _is_timeout(error: Exception | None) -> bool:
    return any(
        isinstance(cause, TimeoutError | urllib3.exceptions.ReadTimeoutError) for cause in _chain(error)
    )


def _wants_password(raw: Any) -> bool:
    """Whether a forward proxy asks for a user and a password; tinyproxy does so as if it were the upstream.

    The API itself never asks for basic authentication.
    """
    challenge = raw.headers.get("www-authenticate", "").lower()
    return bool(raw.status == 407 or (raw.status == 401 and challenge.startswith("basic")))


def _refused_tunnel(error: Exception | None) -> str | None:
    """What a forward proxy said instead of opening a tunnel, None if it did not refuse."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and (told := _REFUSED_TUNNEL.fullmatch(str(cause))):
            return _refusal(int(told[1]), told[2])
    return None


def _refusal(status: int, reason: str | None) -> str:
    """A forward proxy's refusal; its own words only where they can hold no address and no secret."""
    if not _WORDS.fullmatch(reason or ""):
        reason = http.client.responses.get(status, "")
    return f"the forward proxy refused: {status} {reason}".rstrip()


def _plain(error: Exception | None) -> str:
    """One plain phrase for the log; never an address."""
    for cause in reversed(list(_chain(error))):
        if isinstance(cause, ssl.SSLCertVerificationError):
            mismatch = cause.verify_code in _MISMATCHES
            told = "it is for another host" if mismatch else cause.verify_message
            return f"the certificate does not verify: {told}"
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed: {(cause.reason or 'unknown').lower().replace('_', ' ')}"
        if isinstance(cause, socket.gaierror):
            return "the host name was not found"
        if isinstance(cause, TimeoutError):
            return "no connection in time"
        if isinstance(cause, OSError) and "TLS CA certificate bundle" in str(cause):  # requests' words
            return "the CA bundle is not there any more"
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
    return "the answer was cut short" if error is None else f"no valid HTTP ({type(error).__name__})"
