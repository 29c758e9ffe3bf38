"""Connections to upstreams: requests' adapter, with urllib3's pools and connections on watched sockets.

urllib3 keeps connections, opens tunnels, speaks TLS and decodes. What is different here: sockets wait as
`wait` says, connecting is bounded as a whole, and heads are read more strictly than http.client does.
"""

import base64
import errno
import http.client
import os
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.ssl_ import create_urllib3_context

from .resolver import Address, Resolver
from .wait import ConnectTimeout, WatchedSocket, WatchedTlsSocket, current

POOL = 1024  # kept connections per host, and hosts; more than any worker has threads
_LONGEST_LINE = 65536  # bytes, http.client's own bound
_LARGEST_HEAD = 32768  # bytes of an answer's header lines
_MOST_INTERIM = 10  # interim answers before the final one
_JOINED = 65536  # bytes of a body that goes out together with its head

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
_NOT_PRINTABLE = re.compile("[^!-~]")
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: (.*))?")
_DIGITS = re.compile(r"[0-9]{1,19}")
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,16})[ \t]*(?:;.*)?\r?\n", re.DOTALL)

_resolver = Resolver()

#: How an upstream is reached: its URL, its forward proxy, its CA bundle.
Way = tuple[str, str | None, str | None]


class HttpAnswer(http.client.HTTPResponse):
    """http.client's response, with a `begin` of its own.

    http.client skips no interim answer but 100, takes a head for whole that ends in the middle, and has it
    parsed by the email package, which takes longer than all the rest of a response.
    """

    headers: Any
    fp: Any
    #: Bytes came behind the end of the body: the next answer on this connection could not be trusted.
    has_bytes_behind = False

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._socket = sock
        sock.sending.answer = self

    def begin(self) -> None:
        """Read the head of the final answer. Raises `http.client.HTTPException` if it is not one."""
        if self.fp.peek(1):
            self._socket.sending.is_answered = True
        for _ in range(_MOST_INTERIM + 1):
            self.version, self.status, self.reason = self._status_line()
            fields = self._fields()
            # RFC 9110 section 15.2: a client skips interim answers; 101 is final.
            if self.status >= 200 or self.status == http.client.SWITCHING_PROTOCOLS:
                break
        else:
            raise http.client.HTTPException("too many interim answers")
        self.code = self.status
        self.headers = self.msg = http.client.HTTPMessage()
        framing: dict[str, list[str]] = {"transfer-encoding": [], "content-length": [], "connection": []}
        for name, value in fields:
            self.headers[name] = value
            if (values := framing.get(name.lower())) is not None:
                values.append(value)
        self._frame(*framing.values())

    def _status_line(self) -> tuple[int, int, str]:
        line = self._line()
        if not line:
            raise http.client.RemoteDisconnected("closed without an answer")
        found = _STATUS_LINE.fullmatch(line.rstrip())
        if found is None:
            raise http.client.BadStatusLine("")
        return 10 + int(found[1]), int(found[2]), (found[3] or "").strip()

    def _fields(self) -> list[tuple[str, str]]:
        """The header lines, each value as it was sent; a line without a colon is left out."""
        fields: list[tuple[str, str]] = []
        name, value, size = "", "", 0
        while (text := self._line()).strip("\r\n"):
            size += len(text)
            if size > _LARGEST_HEAD:
                raise http.client.HTTPException("the head is too large")
            text = text.rstrip("\r\n")
            if text[0] in " \t":  # RFC 9112 section 5.2: a folded line goes on, after a space
                value = " ".join((value, text.strip(" \t"))).strip(" \t")
                continue
            fields.append((name, value))
            name, colon, value = text.partition(":")
            # RFC 9112 section 5.1: a proxy strips the white space that may not stand before the colon.
            name, value = name.rstrip(" \t") if colon else "", value.strip(" \t")
        if not text:
            raise http.client.IncompleteRead(b"")
        fields.append((name, value))
        return [pair for pair in fields if pair[0]]

    def _line(self) -> str:
        """The next line with its end, empty at the end of the connection."""
        line = self.fp.readline(_LONGEST_LINE + 1)
        if len(line) > _LONGEST_LINE:
            raise http.client.LineTooLong("head")
        if line and not line.endswith(b"\n"):
            raise http.client.IncompleteRead(b"")
        return str(line, "latin-1")

    def _frame(self, codings: list[str], lengths: list[str], options: list[str]) -> None:
        """How the body ends (RFC 9112 section 6.3)."""
        self.chunked = bool(codings) and codings[0].rpartition(",")[2].strip().lower() == "chunked"
        self.chunk_left = None
        self.length = _length(lengths) if lengths and not codings else None
        if self.status in (204, 304) or self.status < 200 or self._method == "HEAD":  # type: ignore[attr-defined]
            self.chunked, self.length = False, 0
        option = ",".join(options).lower()
        self.will_close = (
            (self.length is None and not self.chunked)  # only its close ends the body
            or len(codings) + len(lengths) > 1  # said twice: somebody may mean the other
            or self.status == http.client.SWITCHING_PROTOCOLS
            or "close" in option
            or (self.version == 10 and "keep-alive" not in option)
        )

    # http.client has no public way to read chunk sizes strictly, or to look behind the end of a body.

    def _read_next_chunk_size(self) -> int:
        """RFC 9112 section 7.1; http.client's own takes `0x5`, `+5` and `-5` for sizes."""
        size = _CHUNK_SIZE.fullmatch(self.fp.readline(_LONGEST_LINE))
        if size is None:
            raise ValueError("not the size of a chunk")
        return int(size[1], 16)

    def _close_conn(self) -> None:
        """The body is over."""
        if self.fp is not None and not self.will_close:
            self._socket.is_looked_into = True
            self.has_bytes_behind = bool(self.fp.peek(1)) or self._socket.pending() > 0
            self._socket.is_looked_into = False
        super()._close_conn()  # type: ignore[misc]


def _length(lengths: list[str]) -> int:
    """RFC 9112 section 6.3, rule 5: the same number again is that number, anything else is an error."""
    number = lengths[0]
    if len(lengths) > 1 or "," in number:
        numbers = {each.strip() for each in ",".join(lengths).split(",")}
        number = numbers.pop() if len(numbers) == 1 else ""
    if not _DIGITS.fullmatch(number):
        raise http.client.HTTPException("not a content-length")
    return int(number)


class _Connection(HTTPConnection):
    """A connection on watched sockets, whose connecting is bounded as a whole."""

    response_class = HttpAnswer
    sock: Any
    _is_head_held = False
    _head = b""

    @property
    def is_connected(self) -> bool:
        """Whether a kept connection will do; urllib3 asks when it takes one from the pool."""
        sending = current()
        sending.is_reused = not sending.is_fresh and super().is_connected
        return sending.is_reused

    def request(self, method: str, url: str, body: Any = None, *args: Any, **kwargs: Any) -> None:
        """Send a request; a small body goes out in one segment with the head."""
        if self.is_closed:
            self.connect()
        sending = self.sock.sending = current()
        sending.is_connected = True
        self._is_head_held = 0 < len(body or b"") <= _JOINED  # copying a large one costs more than it saves
        self._head = b""
        super().request(method, url, body, *args, **kwargs)

    def send(self, data: Any) -> None:
        """Called by http.client once with the head, and by urllib3 once with the body."""
        if self._is_head_held:
            self._head, self._is_head_held = data, False
            return
        head, self._head = self._head, b""
        super().send(head + data if head else data)

    def connect(self) -> None:
        """Connect within the connect timeout: name, TCP, tunnel and TLS together."""
        sending = current()
        sending.is_reused = False
        sending.is_at_proxy = self.proxy is not None
        sending.wait.connect_by = time.monotonic() + sending.connect_timeout
        try:
            super().connect()
        finally:
            sending.wait.connect_by = float("inf")
        sending.is_at_proxy = False

    def _new_conn(self) -> socket.socket:
        """urllib3's own would neither see the client leave nor bound the look-up; it has no public way."""
        wait = current().wait
        ends = wait.connect_by
        failed: OSError | None = None
        try:
            addresses = _resolver.resolve(self._dns_host, self.port, ends - time.monotonic())
            for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
                # Each address may take its share of the time that is left.
                now = time.monotonic()
                wait.connect_by = now + max(0.0, ends - now) / left
                try:
                    sock = _dial(address, self.socket_options or ())
                except OSError as error:
                    failed = error
                else:
                    wait.connect_by = ends
                    return sock
        except OSError as error:
            failed = error
        raise urllib3.exceptions.NewConnectionError(self, "no connection") from failed


def _dial(address: Address, options: Iterable[Any]) -> WatchedSocket:
    """A connected socket. Raises `OSError`, and `TimeoutError` where the next address is to be tried."""
    family, kind, protocol, _, place = address
    sock = WatchedSocket(family, kind, protocol)
    sock.sending = current()
    wait = sock.sending.wait
    try:
        for option in options:
            sock.setsockopt(*option)
        sock.setblocking(False)
        error = sock.connect_ex(place)
        if error == errno.EINPROGRESS:
            wait.until(sock.fileno(), select.POLLOUT)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except BaseException as failed:
        wait.release()
        sock.close()
        if isinstance(failed, ConnectTimeout):
            raise TimeoutError from None
        raise
    if error:
        wait.release()
        sock.close()
        raise OSError(error, os.strerror(error))
    return sock


class _TlsConnection(_Connection, HTTPSConnection):
    """The same over TLS, through a tunnel where there is a forward proxy."""

    def _tunnel(self) -> None:
        super()._tunnel()
        current().is_at_proxy = False


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


_POOLS = {"http": _Pool, "https": _TlsPool}


class Adapter(HTTPAdapter):
    """requests' adapter with the pools above. What it overrides are requests' documented hooks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[Any, HTTPConnectionPool] = {}
        self._contexts: dict[str | None, ssl.SSLContext] = {}
        super().__init__(POOL, POOL)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Make the pools of upstreams that are reached directly."""
        super().init_poolmanager(*args, socket_options=_SOCKET_OPTIONS, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """The pools of upstreams that are reached through a forward proxy."""
        manager = super().proxy_manager_for(proxy, socket_options=_SOCKET_OPTIONS, **kwargs)
        manager.pool_classes_by_scheme = _POOLS
        return manager

    def proxy_headers(self, proxy: str) -> dict[str, str]:
        """The password for a forward proxy; requests itself cannot send what is not Latin-1."""
        return {"Proxy-Authorization": f"Basic {sent}"} if (sent := credentials(proxy)) else {}

    def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
        """One `SSLContext` per CA bundle: requests and urllib3 would make one per connection."""
        host, tls = super().build_connection_pool_key_attributes(request, verify, cert)
        if host["scheme"] == "https":
            context = self._context(verify if isinstance(verify, str) else None)
            tls = {"cert_reqs": "CERT_REQUIRED", "ssl_context": context}
        return host, tls

    def get_connection_with_tls_context(
        self, request: Any, verify: Any, proxies: Any = None, cert: Any = None
    ) -> Any:
        """The pool of an upstream; requests' own takes as long as a small request to find it again."""
        key = (_place(request.url), verify, (proxies or {}).get("http"))
        pool = self._pools.get(key)
        if pool is None:
            with self._lock:  # another thread must not meet a manager with urllib3's own pools
                made: Any = super().get_connection_with_tls_context(request, verify, proxies, cert)
                pool = self._pools[key] = made
        return pool

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """The context has it all; urllib3 would read the bundle again for each connection."""

    def request_url(self, request: Any, proxies: Any) -> str:
        """Path and query, or the whole URL for a forward proxy that reads the request itself.

        A raw byte that the client sent, which WSGI spells as a character of Latin-1, is escaped.
        """
        place = _place(request.url)
        target = request.url.removeprefix(place).partition("#")[0] or "/"
        if _NOT_PRINTABLE.search(target):
            target = quote(target, safe=_PRINTABLE, encoding="latin-1")
        return f"{place}{target}" if proxies and place.startswith("http:") else target

    def build_response(self, req: Any, resp: Any) -> requests.Response:
        """requests' response without its copy of the headers, its cookies and its guess of an encoding."""
        response = requests.Response()
        response.status_code, response.reason = resp.status, resp.reason
        response.headers, response.raw = resp.headers, resp
        response.request, response.url = req, req.url
        return response

    def keep_only(self, ways: Iterable[Way]) -> None:
        """Close the kept connections to upstreams that are not reached in one of these ways any more.

        Those in use are closed when they come back. CA bundles are read again for new connections.
        """
        staying = {(_place(url), bundle or True, proxy) for url, proxy, bundle in ways}
        with self._lock:
            self._contexts.clear()
            for key in list(self._pools):
                if key not in staying or key[1] is not True:
                    self._pools.pop(key).close()
            self.close()  # the managers forget their pools; those that stay are kept here

    def _context(self, bundle: str | None) -> ssl.SSLContext:
        """Raises `OSError` where the bundle cannot be read."""
        context = self._contexts.get(bundle)
        if context is None:
            context = create_urllib3_context()
            context.sslsocket_class = WatchedTlsSocket
            context.load_verify_locations(bundle or requests.adapters.DEFAULT_CA_BUNDLE_PATH)
            self._contexts[bundle] = context
        return context


def credentials(proxy: str) -> str | None:
    """A forward proxy's user and password as they are sent: what the percent-escapes stand for, in Base64.

    Byte for byte (RFC 7617); requests itself cannot send what is not Latin-1.
    """
    user, has_user, _ = urlsplit(proxy).netloc.rpartition("@")
    if not has_user:
        return None
    name, _, password = (unquote_to_bytes(part) for part in user.partition(":"))
    return base64.b64encode(name + b":" + password).decode()


def _place(url: str) -> str:
    """Scheme, host and port of a URL, as they are written."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"
