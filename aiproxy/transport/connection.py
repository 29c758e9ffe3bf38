"""Connections to upstreams: urllib3's pools and sockets, our own way of dialing, asking and listening.

urllib3 keeps connections, opens tunnels, speaks TLS and decodes. What goes out and how answers are read
is ours: with urllib3 and http.client a request takes twice as long. A connection belongs to one
`Caller` at a time, whose thread does all that blocks here; any other may abort it.
"""

import base64
import contextlib
import functools
import http.client
import queue
import re
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Protocol
from urllib.parse import quote, unquote_to_bytes, urlsplit

import msgspec
import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from ..api.headers import Pairs
from .resolver import Address, Resolver
from .watch import Reason, Watcher

POOL = 1024  # kept connections a host; more than any worker has threads
_LONGEST_LINE = 65536  # bytes, http.client's own bound
_LARGEST_HEAD = 32768  # bytes of an answer's header lines
_MOST_INTERIM = 10  # interim answers before the final one
_JOINED = 65536  # bytes of a body that are copied to go out together with the head

# As the official SDKs do: NATs drop connections that are silent for long, and a whole answer may be
# silent for ten minutes.
_SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5),
]

_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
_REQUEST_LINE = re.compile(r"[A-Z]+ [!-~]+ HTTP/1\.1")
_NAME = re.compile(r"[!-9;-~]+")
_DIGITS = re.compile(r"[0-9]{1,19}")
_CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,16}")
_BREAKING = re.compile(r"[\0\r\n]")


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


#: How an upstream is reached: its URL, its forward proxy, its CA bundle.
Way = tuple[str, str | None, str | None]


class Caller(Protocol):
    """Whose request a connection carries: what it must know, and what it is told on the way."""

    watcher: Watcher
    resolver: Resolver
    connect_timeout: float
    fresh: bool  # a kept connection will not do
    reused: bool
    connected: bool
    heard: bool  # a byte of the answer arrived
    at_proxy: bool  # on the way to a forward proxy, or waiting for its tunnel

    def abort(self, reason: Reason) -> None:
        """End it from any thread."""

    def attach(self, sock: socket.socket) -> None:
        """Let `abort` reach this socket; raises if it was called before."""

    def detach(self) -> None:
        """Take the socket out of `abort`'s reach."""

    def check(self) -> None:
        """Raise if it was aborted."""


class _Answer(http.client.HTTPResponse):
    """Reads the head of an answer by itself, and a body that is not encoded.

    http.client takes a head for whole that ends in the middle, and has it parsed by the email package,
    which takes longer than all the rest of a response. Its bodies, and urllib3's, wait for whole chunks.
    """

    headers: Any

    def begin(self) -> None:
        version, status, reason = self._read_status()  # type: ignore[attr-defined]
        interim = 0
        # RFC 9110 section 15.2: a client skips interim answers; 101 is final.
        while 100 <= status < 200 and status != http.client.SWITCHING_PROTOCOLS:
            interim += 1
            if interim > _MOST_INTERIM:
                raise http.client.HTTPException("too many interim answers")
            self._fields()
            version, status, reason = self._read_status()  # type: ignore[attr-defined]
        if not version.startswith("HTTP/1."):
            raise http.client.UnknownProtocol(version)
        self.code = self.status = status
        self.reason = reason.strip()
        self.version = 10 if version == "HTTP/1.0" else 11
        self.headers = self._fields()
        self._frame()

    def _fields(self) -> urllib3.HTTPHeaderDict:
        """The header lines, each value as it was sent; a line that is none is left out."""
        fields = urllib3.HTTPHeaderDict()
        name, value, size = "", "", 0
        while (line := self.fp.readline(_LONGEST_LINE + 1)) not in (b"\r\n", b"\n"):
            size += len(line)
            if not line:
                raise http.client.IncompleteRead(b"")
            if size > _LARGEST_HEAD:
                raise http.client.HTTPException("the head is too large")
            text = line.decode("latin-1").rstrip("\r\n")
            if text[:1] in (" ", "\t"):  # RFC 9112 section 5.2: a folded line goes on, after a space
                value = " ".join((value, text.strip(" \t"))).strip(" \t")
                continue
            if name:
                fields.add(name, value)
            name, colon, value = text.partition(":")
            # RFC 9112 section 5.1: a proxy strips the white space that may not stand before the colon.
            name, value = name.rstrip(" \t") if colon else "", value.strip(" \t")
        if name:
            fields.add(name, value)
        return fields

    def pieces(self, size: int) -> Iterator[bytes]:
        """The body as it arrives, in pieces of at most `size` bytes, also of chunks that are not yet whole.

        Raises `http.client.IncompleteRead` where it ends early, `ValueError` where it is not chunked as it
        says it is.
        """
        if self.chunked:
            yield from self._chunks(size)
        else:
            yield from self._counted(self.length, size)
        self.close()

    def _chunks(self, size: int) -> Iterator[bytes]:
        """RFC 9112 section 7.1."""
        fp: Any = self.fp
        while left := _chunk_size(fp.readline(_LONGEST_LINE)):
            yield from self._counted(left, size)
            if fp.readline(3) not in (b"\r\n", b"\n"):
                raise http.client.IncompleteRead(b"")
        while fp.readline(_LONGEST_LINE) not in (b"\r\n", b"\n", b""):
            """Trailers are nobody's concern."""

    def _counted(self, left: int | None, size: int) -> Iterator[bytes]:
        """So many bytes; None: all until the connection is closed."""
        fp: Any = self.fp
        while left is None or left > 0:
            piece = fp.read1(size if left is None else min(left, size))
            if not piece:
                if left is None:
                    return
                raise http.client.IncompleteRead(b"")
            if left is not None:
                left -= len(piece)
            yield piece

    def _frame(self) -> None:
        """How the body ends (RFC 9112 section 6.3)."""
        codings = self.headers.get("transfer-encoding")
        self.chunked = codings is not None and codings.rpartition(",")[2].strip().lower() == "chunked"
        self.chunk_left = None
        self.length = None if codings is not None else _length(self.headers.get("content-length"))
        if self.status in (204, 304) or self.status < 200 or self._method == "HEAD":  # type: ignore[attr-defined]
            self.chunked, self.length = False, 0
        # Without either, only its close ends the body; where it is said twice, somebody may mean the other.
        unbounded = self.length is None and not self.chunked
        is_doubtful = (codings is not None) + len(self.headers.getlist("content-length")) > 1
        self.will_close = unbounded or is_doubtful or self._check_close()  # type: ignore[attr-defined]


def _length(told: str | None) -> int | None:
    """RFC 9112 section 6.3, rule 5: the same number again is that number, anything else none at all."""
    if told is None:
        return None
    numbers = {each.strip() for each in told.split(",")}
    number = numbers.pop()
    if numbers or not _DIGITS.fullmatch(number):
        raise http.client.HTTPException("no content-length")
    return int(number)


def _chunk_size(line: bytes) -> int:
    if not line.endswith(b"\n"):
        raise http.client.IncompleteRead(b"")
    size = line.partition(b";")[0].strip()
    if not _CHUNK_SIZE.fullmatch(size):
        raise ValueError("no chunk begins like that")
    return int(size, 16)


class Response(urllib3.HTTPResponse):
    """urllib3's, for its decoding and its way back to the pool."""

    def __init__(self, answer: _Answer, *args: Any, **kwargs: Any) -> None:
        super().__init__(answer, *args, **kwargs)
        self._answer = answer

    def pieces(self, size: int) -> Iterator[bytes]:
        """See `_Answer.pieces`. Read to its end, it gives the connection back to the pool."""
        yield from self._answer.pieces(size)
        self.release_conn()


class _Connection(HTTPConnection):
    """A connection whose socket its caller can abort, and whose connecting is bounded as a whole."""

    caller: Caller | None = None
    _handle: socket.socket | None = None

    def connect(self) -> None:
        caller = self._caller
        deadline = caller.watcher.deadline(caller, caller.connect_timeout, Reason.CONNECT_TIMEOUT)
        try:
            super().connect()
            self.use()
        except BaseException:
            caller.detach()
            raise
        finally:
            deadline.cancel()
            if self._handle is not None:
                self._handle.close()

    def use(self) -> None:
        """Let the caller have the socket, which waits as long as it takes from now on."""
        self._caller.connected = True
        self._caller.attach(self.sock)
        self.sock.settimeout(None)

    def say(self, head: bytes, body: bytes) -> None:
        """Send a request."""
        # Whoever closes its end while we send may have answered before: a 413, say. TLS has a name of its own
        # for a broken pipe.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            if len(body) <= _JOINED:
                self.sock.sendall(head + body)
            else:
                self.sock.sendall(head)
                self.sock.sendall(body)

    def hear(self, method: str, pool: HTTPConnectionPool) -> Response:
        """Wait for the head of the answer. Read to its end, it gives the connection back to the pool."""
        answer = _Answer(self.sock, method=method)
        try:
            if answer.fp.peek(1):
                self._caller.heard = True
            answer.begin()
            if answer.will_close:
                self.close()  # the answer's own file stays
            return Response(
                answer,
                answer.headers,
                answer.status,
                version=answer.version,
                reason=answer.reason,
                preload_content=False,
                decode_content=False,
                original_response=answer,
                pool=pool,
                connection=self,
                request_method=method,
            )
        except BaseException:
            answer.close()
            raise

    def release(self) -> None:
        """Before the connection goes back to the pool: a late abort must not hit the next call."""
        if self.caller is not None:
            self.caller.detach()
            self.caller = None

    @property
    def _caller(self) -> Caller:
        assert self.caller is not None
        return self.caller

    def _new_conn(self) -> socket.socket:
        caller = self._caller
        failed: OSError | None = None
        caller.at_proxy = self.proxy is not None
        try:
            addresses = caller.resolver.resolve(
                self._dns_host, self.port, caller.connect_timeout, caller.check
            )
            for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
                try:
                    sock = self._dial(address, caller.connect_timeout / left)
                except OSError as error:
                    failed = error
                else:
                    caller.at_proxy = self.proxy_is_tunneling
                    return sock
        except OSError as error:
            failed = error
        raise urllib3.exceptions.NewConnectionError(self, "no connection") from failed

    def _dial(self, address: Address, seconds: float) -> socket.socket:
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
            self._caller.attach(self._handle)
            sock.connect(place)
        except BaseException:
            sock.close()
            raise
        return sock


class _TlsConnection(_Connection, HTTPSConnection):
    """The same over TLS, through a tunnel where there is a forward proxy."""

    def _tunnel(self) -> None:
        super()._tunnel()
        self._caller.check()  # what was cut off in the answer's head passes for a tunnel
        self._caller.at_proxy = False


class _Pool(HTTPConnectionPool):
    """The connections to one upstream, or to a forward proxy that plain requests go to."""

    ConnectionCls = _Connection
    is_left = False  # no upstream is reached this way any more

    def exchange(self, caller: Caller, outgoing: Outgoing) -> urllib3.HTTPResponse:
        """Send a request and wait for the head of its answer.

        Not `urlopen`, whose retries, redirects and timeouts of its own are not wanted here.
        """
        head = self._head(outgoing)
        connection: Any = self._get_conn()
        try:
            connection.caller = caller
            self._open(connection, caller)
            connection.say(head, outgoing.body)
            response: urllib3.HTTPResponse = connection.hear(outgoing.method, self)
        except BaseException:
            connection.close()
            self._put_conn(None)
            raise
        return response

    def _open(self, connection: _Connection, caller: Caller) -> None:
        if caller.fresh:
            connection.close()
        if not connection.is_closed:
            caller.reused = True
            connection.use()
        elif self.proxy is not None and self.scheme == "https":
            self._prepare_proxy(connection)  # connects it, through a tunnel
        else:
            connection.connect()

    def _head(self, outgoing: Outgoing) -> bytes:
        forwarded = outgoing.is_forwarded
        host = urlsplit(outgoing.url).netloc if forwarded else self._authority
        pairs = [("Host", host), *outgoing.headers]
        if "accept-encoding" not in dict(outgoing.headers):
            pairs.insert(1, ("Accept-Encoding", "identity"))
        if outgoing.body or outgoing.method == "POST":
            pairs.append(("Content-Length", str(len(outgoing.body))))
        if forwarded:
            pairs.extend(self.proxy_headers.items())
        return _spelled(f"{outgoing.method} {_target(outgoing)} HTTP/1.1", pairs)

    @functools.cached_property
    def _authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host.rstrip(".")
        return host if self.port == self.ConnectionCls.default_port else f"{host}:{self.port}"

    def leave(self) -> None:
        """Close the kept connections, and those in use when they come back. Whoever asks may still ask."""
        self.is_left = True
        kept: Any = self.pool
        with contextlib.suppress(queue.Empty):
            while True:
                if (connection := kept.get(block=False)) is not None:
                    connection.close()

    def _put_conn(self, conn: Any) -> None:
        if conn is not None:
            conn.release()
        if conn is not None and self.is_left:
            conn.close()
        super()._put_conn(conn)


class _TlsPool(_Pool, HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


_POOLS = {"http": _Pool, "https": _TlsPool}


class Adapter(HTTPAdapter):
    """Mounts the pools above, for upstreams that are reached directly and through a forward proxy."""

    def __init__(self) -> None:
        self._managing = threading.Lock()
        self._kept: dict[tuple[str, str, str | None, str | None], _Pool] = {}
        super().__init__(POOL, POOL)

    def exchange(self, caller: Caller, outgoing: Outgoing) -> urllib3.HTTPResponse:
        """Send a request and wait for the head of its answer, whose body is still to be read."""
        return self._pool(outgoing).exchange(caller, outgoing)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, socket_options=_SOCKET_OPTIONS, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        with self._managing:  # else another thread could meet a manager with urllib3's own pools
            manager = super().proxy_manager_for(proxy, socket_options=_SOCKET_OPTIONS, **kwargs)
            manager.pool_classes_by_scheme = _POOLS
        return manager

    def proxy_headers(self, proxy: str) -> dict[str, str]:
        return {"Proxy-Authorization": f"Basic {sent}"} if (sent := credentials(proxy)) else {}

    def keep_only(self, ways: Iterable[Way]) -> None:
        """See `_Pool.leave`."""
        staying = {_place(url, proxy, ca_bundle) for url, proxy, ca_bundle in ways}
        for way in set(self._kept) - staying:
            self._kept.pop(way).leave()

    def _pool(self, outgoing: Outgoing) -> _Pool:
        parts = urlsplit(outgoing.url)
        verify = outgoing.ca_bundle or True
        way = _place(outgoing.url, outgoing.proxy, outgoing.ca_bundle)
        pool = self._kept.get(way)
        if pool is None:
            request = requests.PreparedRequest()
            request.url = outgoing.url
            proxies = {parts.scheme: outgoing.proxy} if outgoing.proxy else {}
            made: Any = self.get_connection_with_tls_context(request, verify, proxies)
            pool = self._kept[way] = made
            pool.is_left = False
        if parts.scheme == "https":
            self.cert_verify(pool, outgoing.url, verify, None)  # type: ignore[no-untyped-call]
        return pool


def _place(url: str, proxy: str | None, ca_bundle: str | None) -> tuple[str, str, str | None, str | None]:
    """What requests must have in common to share connections."""
    parts = urlsplit(url)
    return parts.scheme, parts.netloc, proxy, ca_bundle


def credentials(proxy: str) -> str | None:
    """A forward proxy's user and password as they are sent: what the percent-escapes stand for, in Base64.

    Byte for byte (RFC 7617); requests itself cannot send what is not Latin-1.
    """
    user, has_user, _ = urlsplit(proxy).netloc.rpartition("@")
    if not has_user:
        return None
    name, _, password = (unquote_to_bytes(part) for part in user.partition(":"))
    return base64.b64encode(name + b":" + password).decode()


def _target(outgoing: Outgoing) -> str:
    """Path and query as they are given; urllib3 would mend their escapes.

    Only what no request line can hold is escaped: a raw byte that the client sent, which WSGI spells as a
    character of Latin-1.
    """
    parts = urlsplit(outgoing.url)
    path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    path = quote(path, safe=_PRINTABLE, encoding="latin-1")
    return f"{parts.scheme}://{parts.netloc}{path}" if outgoing.is_forwarded else path


def _spelled(request_line: str, pairs: Pairs) -> bytes:
    """The head of a request. Raises `ValueError` if more could be read in it than is meant."""
    if not _REQUEST_LINE.fullmatch(request_line):
        raise ValueError("no request line can be made of this method and URL")
    lines = [request_line]
    for name, value in pairs:
        if not _NAME.fullmatch(name) or _BREAKING.search(value):
            raise ValueError(f"the header {name!r} cannot be sent as it is")
        lines.append(f"{name}: {value}")
    return "\r\n".join((*lines, "\r\n")).encode("latin-1")
