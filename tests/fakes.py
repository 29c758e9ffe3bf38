"""Fakes on real sockets: an upstream that misbehaves on demand, ports that do not answer, a bare client.

`FakeUpstream` owns a listening socket and its threads; a *reply* (any callable of a `Wire` and a `Seen`)
decides what one request gets back, byte by byte. In a reply's `headers` None takes a default header away.
`RawClient` is the other end: it knows when each piece arrived and how the body ended. h11 reads HTTP at both
ends; what is written is literal, so that it can be wrong. Waiting ends at once when the fake is stopped.
Nothing here knows the proxy.
"""

from __future__ import annotations

import contextlib
import http
import itertools
import json
import random
import select
import socket
import ssl
import struct
import threading
import time
import zlib
from collections import deque
from typing import NamedTuple
from urllib.parse import urlsplit

import h11
import trustme

HOST = "127.0.0.1"
PIECE = 65536
LARGEST_HEAD = 1 << 20
GATE_LIMIT = 10.0  # seconds; a gate that a failed test never opens
EVENT_STREAM = "text/event-stream; charset=utf-8"

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}

REASONS = {each.value: each.phrase for each in http.HTTPStatus} | {529: "Overloaded"}

_request_ids = itertools.count(1)


class Clock:
    """Seconds that stand still until a test moves them."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


def await_that(condition, limit=10.0):
    """Wait until it is true, at most `limit` seconds."""
    ends = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < ends, "it did not become true"
        threading.Event().wait(0.01)


class PeerLeft(Exception):
    """The connection ended while a reply was still using it; the fake's own threads take it quietly."""


class Ended(Exception):
    """No more bytes come from this socket."""


def _next_event(parser, recv):
    """What h11 reads next; raises `Ended` where the bytes end before."""
    while (event := parser.next_event()) is h11.NEED_DATA:
        data = recv()
        if not data:
            raise Ended
        parser.receive_data(data)
    return event


def _parser(role, begun):
    parser = h11.Connection(role, LARGEST_HEAD)
    if begun:
        parser.receive_data(begun)
    return parser


def _pairs(event):
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers.raw_items()]


def _first(headers, name):
    return next((value for key, value in headers if key.lower() == name.lower()), None)


# ---------------------------------------------------------------------------------------- the upstream


class Seen(NamedTuple):
    """One request as it came: path and query, headers in order and case, which connection (from 1)."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int

    def header(self, name):
        """The first header of that name, in any case."""
        return _first(self.headers, name)

    def every(self, name):
        """All values of that header, in order."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def json(self):
        """The body, parsed."""
        return json.loads(self.body)


class Connection:
    """One accepted connection: its own thread notices and notes its end, whoever ends it, once."""

    def __init__(self, sock, ordinal, changed):
        self.sock = sock
        self.ordinal = ordinal
        self.left_at = None
        self.is_over = False
        self._changed = changed

    def note_end(self, *, has_left):
        """Note that the peer, or this side, ended it, unless that is known."""
        with self._changed:
            if not self.is_over:
                self.is_over = True
                self.left_at = time.monotonic() if has_left else None
                self._changed.notify_all()

    def wait_over(self, seconds=None):
        """Whether it is over within so many seconds; without a number it is waited for."""
        if not self.is_over:
            poll = select.poll()
            poll.register(self.sock, select.POLLRDHUP)
            if poll.poll(None if seconds is None else seconds * 1000):
                self.note_end(has_left=True)
        return self.is_over

    def close(self):
        """Close for good; by FIN, or by RST if the peer sent something that was not read."""
        self.wait_over(0)
        self.sock.close()
        self.note_end(has_left=False)

    def shut(self):
        """End it from another thread: whatever blocks on the socket returns, and the owner closes."""
        self.note_end(has_left=False)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def secure(self, context):
        """Put TLS on it; a handshake that fails counts as the peer's leaving, and raises `PeerLeft`."""
        self.sock = context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        if self.is_over:  # shut() may have met the socket that was just replaced
            raise PeerLeft
        try:
            self.sock.do_handshake()
        except OSError as error:
            self.note_end(has_left=True)
            raise PeerLeft from error

    def recv(self):
        """The next bytes, or none when the connection is over, for whatever cause."""
        try:
            data = self.sock.recv(PIECE)
        except OSError:
            data = b""
        if not data:
            self.note_end(has_left=True)
        return data

    def send(self, data):
        """Send all of it; raises `PeerLeft` when the connection is over."""
        try:
            self.sock.sendall(data)
        except OSError as error:
            self.note_end(has_left=True)
            raise PeerLeft from error


class Wire:
    """What a reply writes on: the raw connection, with the few HTTP framings at hand."""

    def __init__(self, connection):
        self.connection = connection
        self.closing = False  # the head said `connection: close`
        self.send = connection.send  # literal bytes

    def head(self, status, headers=()):
        """Send a status line and exactly these headers."""
        pairs = list(headers)
        self.closing = (_first(pairs, "connection") or "").lower() == "close"
        self.send(_head(f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}", pairs))

    def chunk(self, data):
        """Send one chunk of a chunked body; nothing for no bytes, since an empty chunk would end it."""
        if data:
            self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self):
        """End a chunked body."""
        self.send(b"0\r\n\r\n")

    def close(self):
        """Close the connection (FIN; under TLS without a close_notify)."""
        self.connection.close()

    def reset(self):
        """Break the connection (RST)."""
        with contextlib.suppress(OSError):
            _break_at_close(self.connection.sock)
        self.connection.close()

    def hang(self, seconds=None):
        """Say nothing until the peer leaves or the server stops (then True), at most that many seconds."""
        return self.connection.wait_over(seconds)

    def pause(self, item):
        """Wait so many seconds, or for that gate to open; raises `PeerLeft` if the connection ends before."""
        if isinstance(item, threading.Event):
            limit = time.monotonic() + GATE_LIMIT
            while not item.wait(0.005) and not self.hang(0):
                assert time.monotonic() < limit, "a gate in a reply was never opened"
            item = 0
        if self.hang(item):
            raise PeerLeft

    def drain(self):
        """Half-close, then read and throw away until the peer is done: the polite way to refuse an upload."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.connection.sock, socket.SHUT_WR)
        while self.connection.recv():
            pass


def _head(first, headers):
    lines = [first, *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def _break_at_close(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class BeforeBody:
    """Marks a reply that is given after the request's head, the body unread; then the connection closes."""

    def __init__(self, reply):
        self._reply = reply

    def __call__(self, wire, seen):
        self._reply(wire, seen)


class FakeUpstream:
    """A threaded HTTP/1.1 server on 127.0.0.1 that gives each request the next reply of its script.

    When the script is used up, `default` answers (an ordinary `answer()` unless given). `port` reuses a port,
    so that an upstream can come back where it was; `tls` is a server-side context, such as `loopback_tls()`.
    """

    def __init__(self, *script, default=None, tls=None, port=0):
        self.seen = []
        self.port = port
        self._queue = deque(script)
        self._default = default or answer()
        self._tls = tls
        self._changed = threading.Condition()
        self._connections = []
        self._threads = []
        self._listener = None

    @property
    def url(self):
        """Where it listens: `http://127.0.0.1:port`."""
        return f"{'https' if self._tls else 'http'}://{HOST}:{self.port}"

    @property
    def connections(self):
        """How many TCP connections were accepted so far."""
        return len(self._connections)

    @property
    def open_connections(self):
        """How many of them neither side has closed."""
        return sum(not connection.is_over for connection in self._connections)

    def script(self, *replies):
        """Queue further replies, one a request."""
        with self._changed:
            self._queue.extend(replies)

    def wait_for(self, n, timeout=10.0):
        """Wait until `n` requests were seen, since the start."""
        with self._changed:
            came = self._changed.wait_for(lambda: len(self.seen) >= n, timeout)
            assert came, f"{len(self.seen)} of {n} requests came in {timeout} s"

    def wait_left(self, connection=1, timeout=10.0):
        """Wait until the peer closed that connection (the first is 1); the `time.monotonic()` when it did.

        A half-close counts. It is an error if this side closed first.
        """
        place = connection - 1
        with self._changed:
            over = self._changed.wait_for(
                lambda: len(self._connections) > place and self._connections[place].is_over, timeout
            )
            assert over, f"the peer did not leave connection {connection} in {timeout} s"
            left_at = self._connections[place].left_at
        assert left_at is not None, f"connection {connection} was closed by the fake itself"
        return left_at

    def __enter__(self):
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((HOST, self.port))
        self._listener.listen(512)
        self.port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name=f"fake-upstream-{self.port}")
        self._acceptor.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Close the port and every connection, and wait for the threads; more than once does no harm."""
        if self._listener is None:
            return
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        self._listener = None
        for connection in self._connections:
            connection.shut()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive(), f"{thread.name} did not end: a reply does not heed wire.hang()"

    def _accept(self):
        with contextlib.suppress(OSError):  # until it is shut down
            while True:
                sock, _ = self._listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._changed:
                    connection = Connection(sock, len(self._connections) + 1, self._changed)
                    self._connections.append(connection)
                name = f"fake-upstream-{self.port}-{connection.ordinal}"
                self._threads.append(threading.Thread(target=self._serve, args=(connection,), name=name))
                self._threads[-1].start()

    def _serve(self, connection):
        with contextlib.closing(connection), contextlib.suppress(PeerLeft, Ended):
            if self._tls:
                connection.secure(self._tls)
            rest = b""
            while rest is not None:
                rest = self._one(connection, rest)

    def _one(self, connection, begun):
        """Read a request and reply; what has come behind it, None when the connection is to be closed."""
        parser = _parser(h11.SERVER, begun)
        try:
            head = _next_event(parser, connection.recv)
            with self._changed:
                reply = self._queue.popleft() if self._queue else self._default
            body = bytearray()
            is_early = isinstance(reply, BeforeBody)
            while not is_early and isinstance(event := _next_event(parser, connection.recv), h11.Data):
                body += event.data
        except h11.RemoteProtocolError:  # for instance TLS where none is expected: refused, as nginx does
            connection.send(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")
            return None
        method, target = head.method.decode(), head.target.decode("latin-1")
        seen = Seen(method, target, _pairs(head), bytes(body), connection.ordinal)
        with self._changed:
            self.seen.append(seen)
            self._changed.notify_all()
        wire = Wire(connection)
        reply(wire, seen)
        asked = (seen.header("connection") or "").lower()
        over = is_early or wire.closing or connection.is_over or asked == "close"
        return None if over or head.http_version != b"1.1" else parser.trailing_data[0]


# ------------------------------------------------------------------------------ what the API would say


def event(name, data):
    """One server-sent event, as the API writes it."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def ping():
    """The API's keep-alive event."""
    return event("ping", {"type": "ping"})


def error_event(type="overloaded_error", message="Overloaded"):
    """An error that comes inside a stream, after its 200."""
    return event("error", {"type": "error", "error": {"type": type, "message": message}})


def tool_use(name="get_weather", input=None, id="toolu_01Fake"):
    """A tool_use block for `message_json`, `message_events` and `answer`."""
    return {"type": "tool_use", "id": id, "name": name, "input": dict(input or {"city": "Oslo", "days": 3})}


def _message(text, model, usage, tool, id):
    content = [{"type": "text", "text": text}]
    return {
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [*content, dict(tool)] if tool else content,
        "stop_reason": "tool_use" if tool else "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 10,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 5,
            **(usage or {}),
        },
    }


def message_json(text="ok", model="claude-x", usage=None, tool=None, id="msg_01Fake"):
    """A whole Message; `message_events` of the same arguments spells an equal one."""
    return json.dumps(_message(text, model, usage, tool, id), ensure_ascii=False).encode()


def message_events(text_pieces=("o", "k"), model="claude-x", usage=None, tool=None, id="msg_01Fake"):
    """The events of one Message: message_start, ping, a text block, for `tool` a tool_use block, the end."""
    message = _message("".join(text_pieces), model, usage, tool, id)
    begun = {**message, "content": [], "stop_reason": None, "usage": {**message["usage"], "output_tokens": 1}}
    out = [event("message_start", {"type": "message_start", "message": begun}), ping()]
    deltas = [{"type": "text_delta", "text": piece} for piece in text_pieces]
    out += _block(0, {"type": "text", "text": ""}, deltas)
    if tool:
        spelt = json.dumps(tool["input"])
        pieces = ["", *(spelt[at : at + 7] for at in range(0, len(spelt), 7))]
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
        out += _block(1, {**tool, "input": {}}, deltas)
    final = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    tokens = {"output_tokens": message["usage"]["output_tokens"]}
    out.append(event("message_delta", {"type": "message_delta", "delta": final, "usage": tokens}))
    out.append(event("message_stop", {"type": "message_stop"}))
    return out


def _block(index, start, deltas):
    kind = {"type": "content_block_start", "index": index, "content_block": start}
    out = [event("content_block_start", kind)]
    for delta in deltas:
        kind = {"type": "content_block_delta", "index": index, "delta": delta}
        out.append(event("content_block_delta", kind))
    out.append(event("content_block_stop", {"type": "content_block_stop", "index": index}))
    return out


#: What most tests ask, whole and as a stream, and an answer: the first piece of its text is SPOKEN[3].
ASK = {"model": "claude-x", "max_tokens": 16, "messages": [{"role": "user", "content": "Hi"}]}
STREAM = {**ASK, "stream": True}
SPOKEN = message_events(["one ", "two ", "three"])


# ---------------------------------------------------------------------------------- ready-made replies


def _override(defaults, headers):
    given = list(headers)
    names = {name.lower() for name, _ in given}
    pairs = [*((name, value) for name, value in defaults if name.lower() not in names), *given]
    return [(name, value) for name, value in pairs if value is not None]


def _new_request_id():
    return f"req_fake{next(_request_ids):06d}"


def _asks_for_stream(seen):
    try:
        return bool(seen.json()["stream"])
    except (ValueError, KeyError, TypeError):
        return False


def answer(text="ok", model="claude-x", usage=None, tool=None, headers=()):
    """A Message, or its event stream if the request asks for one; `model=None` echoes the request's model."""
    pieces = [text[at : at + 5] for at in range(0, len(text), 5)]

    def reply(wire, seen):
        name = seen.json()["model"] if model is None else model
        named = _override([("request-id", _new_request_id())], headers)
        if _asks_for_stream(seen):
            events(message_events(pieces, name, usage, tool), headers=named)(wire, seen)
        else:
            whole(200, message_json(text, name, usage, tool), headers=named)(wire, seen)

    return reply


def whole(status=200, body=b"", headers=(), content_type="application/json", framing="length", **options):
    """One body in one piece; `options` are further ones of `events`."""
    return events([body], framing, status=status, headers=headers, content_type=content_type, **options)


def error(status, type=None, message="the fake upstream refuses", headers=(), details=None):
    """An error in the API's shape; its `request_id` is that of the `request-id` header."""
    given = list(headers)
    fault = {"type": type or ERROR_TYPES.get(status, "api_error"), "message": message}

    def reply(wire, seen):
        pairs = _override([("request-id", _new_request_id())], given)
        shown = {**fault, "details": details} if details else fault
        body = {"type": "error", "error": shown, "request_id": _first(pairs, "request-id")}
        whole(status, json.dumps(body).encode(), pairs)(wire, seen)

    return reply


def events(
    items,
    framing="chunked",
    gap=0.0,
    then="end",
    cut_at=None,
    *,
    torn=False,
    status=200,
    headers=(),
    content_type=EVENT_STREAM,
):
    """A stream, each event sent by itself; `gap` seconds between them.

    An item that is a number is a pause in seconds, one that is a `threading.Event` a gate to wait for. `then`
    says what follows the last event: the framing's own end, a FIN without it ("cut"), a RST, or silence.
    `cut_at` sends only so many bytes of the last event, as a well-formed chunk; with `torn` the cut falls
    inside a chunk whose size promised the whole event.
    """
    sent = list(items)
    if cut_at is not None:
        sent[-1] = sent[-1][:cut_at]
    length = sum(len(item) for item in (sent if then == "end" else items) if isinstance(item, bytes))
    if then != "end" and cut_at is None:
        length += 64  # else a body of known length would be complete before the break
    framed = {
        "chunked": ("transfer-encoding", "chunked"),
        "length": ("content-length", str(length)),
        "close": ("connection", "close"),
    }[framing]
    pairs = _override([("content-type", content_type), framed], headers)

    def reply(wire, seen):
        wire.head(status, pairs)
        if seen.method == "HEAD":
            return
        for n, item in enumerate(sent):
            if n and gap:
                wire.pause(gap)
            if not isinstance(item, bytes):
                wire.pause(item)
            elif framing != "chunked":
                wire.send(item)
            elif torn and n == len(sent) - 1:
                wire.send(b"%x\r\n%b" % (len(items[n]), item))
            else:
                wire.chunk(item)
        if then != "end":
            _END[then](wire)
        elif framing == "chunked":
            wire.end()

    return reply


_END = {
    "cut": Wire.close,
    "close": Wire.close,
    "reset": Wire.reset,
    "hang": Wire.hang,
    "keep": lambda wire: None,
}


def raw(data, then="close"):
    """Literal bytes, head and all."""

    def reply(wire, seen):
        wire.send(data)
        _END[then](wire)

    return reply


def close_now():
    """Read the request, then close without a byte."""
    return raw(b"", "close")


def reset_now():
    """Read the request, then break the connection without a byte."""
    return raw(b"", "reset")


def hang():
    """Never answer; ends when the peer leaves."""
    return raw(b"", "hang")


def refuse_after_head():
    """Close without a byte as soon as the request's head was read, its body unread."""
    return BeforeBody(close_now())


def stalled_upload():
    """Read the request's head and then nothing more, not even its body; ends when the peer leaves.

    A FIN waits behind whatever the full receive buffer has no room for, so only a RST is noticed then.
    """
    return BeforeBody(hang())


def early_refusal(status, drain=False, headers=()):
    """An error before the request's body is read, then a close; `drain` reads the body away first.

    Without `drain` the unread body makes the close a RST; nginx drains.
    """
    refusal = error(status, headers=[*headers, ("connection", "close")])

    def reply(wire, seen):
        refusal(wire, seen)
        if drain:
            wire.drain()

    return BeforeBody(reply)


def head_only(status=200, then="cut", content_type=EVENT_STREAM, headers=()):
    """The head of an answer, and no byte of its body."""
    return events([], then=then, status=status, headers=headers, content_type=content_type)


class close_if_reused:
    """Answers the first request on a connection; closes, without a byte, when another comes on the same one.

    Use one object as `default`, so that it meets every request; `closed` counts.
    """

    def __init__(self, reply=None):
        self.closed = 0
        self._reply = reply or answer()
        self._met = set()
        self._lock = threading.Lock()

    def __call__(self, wire, seen):
        with self._lock:
            again = seen.connection in self._met
            self._met.add(seen.connection)
            self.closed += again
        if again:
            wire.close()
        else:
            self._reply(wire, seen)


def later(item, reply):
    """Give that reply after so many seconds, or when the gate opens."""

    def delayed(wire, seen):
        wire.pause(item)
        reply(wire, seen)

    return delayed


def trickle(data, every, size=1, content_type=EVENT_STREAM, status=200):
    """Send `size` bytes of a body every so many seconds, chunked; without a content type as literal bytes."""
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    if content_type is not None:
        paced = [item for piece in pieces for item in (piece, every)]
        return events(paced, status=status, content_type=content_type)

    def reply(wire, seen):
        for piece in pieces:
            wire.send(piece)
            wire.pause(every)

    return reply


def gzipped(data, content_type="application/json", headers=(), **options):
    """A body compressed though nobody asked; a list is sent chunked, each piece readable when it arrives."""
    pieces = [data] if isinstance(data, bytes) else data
    packer = zlib.compressobj(wbits=31)
    packed = [packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) for piece in pieces]
    packed.append(packer.flush())
    pairs = [*headers, ("content-encoding", "gzip")]
    if isinstance(data, bytes):
        return whole(body=b"".join(packed), headers=pairs, content_type=content_type, **options)
    return events(packed, headers=pairs, content_type=content_type, **options)


# ------------------------------------------------------------------------------ ports and certificates

# Below the range from which the kernel takes ports for outgoing connections and for bind(0).
_begin = random.SystemRandom().randrange(10240, 32000)
_ports = iter([*range(_begin, 32000), *range(10240, _begin)])


def free_port():
    """A port of 127.0.0.1 that refuses connections until a server of this run listens there.

    It stays bound until the run ends. Servers set SO_REUSEADDR and may listen on it all the same; other test
    runs, which look for a free one without that option, leave it alone.
    """
    for port in _ports:
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind((HOST, port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.detach()
            return port
    raise AssertionError("no port is free")


dead_port = free_port


@contextlib.contextmanager
def blackhole():
    """A port of 127.0.0.1 where connect() hangs: its listener's queue is full and nobody accepts."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((HOST, 0))
        listener.listen(0)
        for _ in range(16):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            if not select.select([], [filler], [], 0.05)[1]:
                break
        else:
            raise AssertionError("the listener's queue does not fill")
        port = listener.getsockname()[1]
        yield port


# Made anew in each run; trusted by nobody who is not told to.
_AUTHORITY = trustme.CA()
LOOPBACK_CERT = _AUTHORITY.cert_pem.bytes().decode()


def loopback_tls():
    """A server context for `FakeUpstream(tls=...)`; clients trust it by `LOOPBACK_CERT` (PEM text)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _AUTHORITY.issue_cert(HOST, "localhost").configure_cert(context)
    return context


# ------------------------------------------------------------------------------------------ the client


class Piece(NamedTuple):
    """A piece of a body: a whole chunk if it is chunked, else what one read gave; `at` is monotonic."""

    at: float
    data: bytes


class Answer:
    """An answer whose head was read; its body comes by `pieces()` or `read()`.

    `ending`, once the body was read: "end" by its own framing, "cut" by a FIN before that, "reset" by a RST
    before that, "close" by a FIN where the head promised no other end. `body` keeps what came before a cut.
    """

    def __init__(self, client):
        self._client = client
        self._parser = _parser(h11.CLIENT, bytes(client.raw[client.taken :]))
        self._parser.send(h11.Request(method=client.method, target="/", headers=[("host", HOST)]))
        self._parser.send(h11.EndOfMessage())
        self.interim = []
        while isinstance(head := _next_event(self._parser, client.recv), h11.InformationalResponse):
            self.interim.append(head.status_code)
        self.status = head.status_code
        self.reason = head.reason.decode("latin-1")
        self.headers = _pairs(head)
        self.got = []
        self.ending = None

    def header(self, name):
        """The first header of that name, in any case."""
        return _first(self.headers, name)

    @property
    def body(self):
        """What was read of the body so far, without its framing."""
        return b"".join(piece.data for piece in self.got)

    def json(self):
        """The body, parsed."""
        return json.loads(self.body)

    def read(self):
        """Read the body to its end, whatever that is."""
        for _ in self.pieces():
            pass
        return self

    def pieces(self):
        """The rest of the body, piece by piece, each as soon as it is there."""
        for data in self._data():
            self.got.append(Piece(self._client.at, data))
            yield self.got[-1]

    def _data(self):
        is_chunked = self.header("transfer-encoding") is not None
        data = bytearray()
        try:
            while isinstance(event := _next_event(self._parser, self._client.recv), h11.Data):
                data += event.data
                if event.chunk_end or not is_chunked:
                    yield bytes(data)
                    data.clear()
            self.ending = "end"
            self._client.taken = len(self._client.raw) - len(self._parser.trailing_data[0])
        except Ended:
            is_framed = is_chunked or self.header("content-length") is not None
            self.ending = "reset" if self._client.was_reset else "cut" if is_framed else "close"
            if data:
                yield bytes(data)


class RawClient:
    """A client on a bare socket: sends what it is told, and tells bytes, times and endings apart.

    `raw` keeps every byte received, `taken` so many of them belong to answers that were read, and `at` is
    when the latest came. Each read waits at most `timeout` seconds and then raises `TimeoutError`.
    """

    def __init__(self, host, port, timeout=10.0):
        sock = socket.create_connection((host, port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._adopt(sock)

    def _adopt(self, sock):
        self.sock = sock
        self.raw = bytearray()
        self.taken = 0
        self.at = 0.0
        self.was_reset = False
        self.method = "POST"

    @classmethod
    def to(cls, url, timeout=10.0):
        """Connect to where that URL points."""
        parts = urlsplit(url)
        return cls(parts.hostname or HOST, parts.port or 80, timeout)

    @classmethod
    def on(cls, sock):
        """Use a socket that is connected already, for instance one under TLS."""
        client = cls.__new__(cls)
        client._adopt(sock)
        return client

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def send(self, data):
        """Send literal bytes."""
        self.sock.sendall(data)

    def begin_upload(self, head, length):
        """Send a head (without the last blank line), and wait until the server asks for the body."""
        self.send(f"{head}expect: 100-continue\r\ncontent-length: {length}\r\n\r\n".encode())
        assert select.select([self.sock], [], [], self.sock.gettimeout())[0], "the server asks for no body"

    def request(self, method, target, body=b"", headers=(), chunked=False):
        """Send a request with `host`, the framing, and exactly the headers given; a mapping goes as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        pairs = [("host", HOST), *headers]
        if chunked:
            pairs.append(("transfer-encoding", "chunked"))
            halves = (data[: len(data) // 2], data[len(data) // 2 :])
            data = b"".join(b"%x\r\n%b\r\n" % (len(half), half) for half in halves if half) + b"0\r\n\r\n"
        elif data or method not in {"GET", "HEAD"}:
            pairs.append(("content-length", str(len(data))))
        self.method = method
        self.send(_head(f"{method} {target} HTTP/1.1", pairs) + data)

    def post(self, body, target="/v1/messages", headers=()):
        """Send a JSON request to the Messages API."""
        self.request("POST", target, body, _override([("content-type", "application/json")], headers))

    def answer(self):
        """Read the next answer's head; raises `Ended` when the server closes without one."""
        return Answer(self)

    def read(self):
        """Read the next answer, head and body."""
        return self.answer().read()

    def wait_closed(self):
        """Wait until the server closed, throwing away what comes before; the `time.monotonic()` of it."""
        while self.recv():
            pass
        return time.monotonic()

    def close(self):
        """Leave (FIN)."""
        self.sock.close()

    def half_close(self):
        """Say that nothing more will be sent, and go on listening."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self):
        """Leave by breaking the connection (RST)."""
        _break_at_close(self.sock)
        self.sock.close()

    def recv(self):
        """What comes next; none when the server closed."""
        try:
            data = self.sock.recv(PIECE)
        except (ConnectionResetError, BrokenPipeError):
            self.was_reset = True
            return b""
        self.at = time.monotonic()
        self.raw += data
        return data
