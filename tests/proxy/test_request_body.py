"""The request's body on its way in: read whole under limits, or read away, as gunicorn has it.

gunicorn's own parser reads the head, from a real socket; its environment goes to `RequestBody`.
"""

import contextlib
import itertools
import socket
import struct
import threading
import time

import pytest
from gunicorn.config import Config
from gunicorn.http import get_parser
from gunicorn.http.errors import NoMoreData
from gunicorn.http.wsgi import create

from aiproxy.errors import ApiError
from aiproxy.server import client as client_module
from aiproxy.server import request_body as upload
from aiproxy.server.client import ClientSocket, Serving
from aiproxy.server.request_body import RequestBody
from aiproxy.transport.wait import Shutdown, Wait

MB = 1024 * 1024
LIMIT = MB
FRAMINGS = ["length", "chunked"]


class Connection:
    """A client's end of a connection, and what gunicorn makes of the other."""

    def __init__(self, stack):
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.client = stack.enter_context(socket.create_connection(listener.getsockname()))
        accepted = listener.accept()[0]
        self.server = stack.enter_context(ClientSocket(fileno=accepted.detach()))
        self.client.settimeout(5)
        self.shutdown = stack.enter_context(contextlib.closing(Shutdown()))
        self._settings = Config()
        self._settings.set("forwarded_allow_ips", "")
        self._parser = get_parser(self._settings, self.server, ("127.0.0.1", 1))

    def send(self, data):
        self.client.sendall(data)

    def begin(self, framing="length", size=0):
        """Send a request's head; what the server makes of it."""
        length = f"content-length: {size}" if framing == "length" else "transfer-encoding: chunked"
        self.send(f"POST /v1/messages HTTP/1.1\r\nhost: x\r\n{length}\r\n\r\n".encode())
        return self.next_upload()

    def next_upload(self):
        """As the worker does: gunicorn reads the head, what follows is read in a wait."""
        self.server.serving = None
        self.server.setblocking(True)
        request = next(self._parser)
        self.server.serving = Serving(Wait(self.server, self.shutdown), 60)
        self.server.setblocking(False)
        address = ("127.0.0.1", 1)
        environ = create(request, self.server, address, address, self._settings)[1]
        environ["gunicorn.socket"] = self.server  # as gunicorn's gthread worker has it
        return RequestBody(environ)

    def is_at_its_end(self):
        """Whether nothing that could be a request follows."""
        with pytest.raises((NoMoreData, StopIteration)):
            self.next_upload()
        return True


@pytest.fixture
def connection():
    with contextlib.ExitStack() as stack:
        yield Connection(stack)


def spelt(framing, *pieces):
    """The body's bytes on the wire."""
    if framing == "length":
        return b"".join(pieces)
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@contextlib.contextmanager
def meanwhile(work):
    """Run `work` in a thread of its own, to its end."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextlib.contextmanager
def trickle(connection, pieces, every):
    """Send a piece every so many seconds until the block ends or the connection does."""
    over = threading.Event()

    def send():
        with contextlib.suppress(OSError):
            for piece in pieces:
                connection.send(piece)
                if over.wait(every):
                    return

    with meanwhile(send):
        try:
            yield
        finally:
            over.set()


def refusal(act):
    """What the client is told, and the seconds until it is."""
    began = time.monotonic()
    with pytest.raises(ApiError) as caught:
        act()
    return caught.value, time.monotonic() - began


# ------------------------------------------------------------------------------------------ read whole


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("sizes", [(), (1, 1, 1), (70_000, 5), (LIMIT - 1, 1)])
def test_a_body_is_read_whole(connection, framing, sizes):
    pieces = [bytes([97 + n]) * size for n, size in enumerate(sizes)]
    read = connection.begin(framing, sum(sizes))
    with meanwhile(lambda: connection.send(spelt(framing, *pieces))):
        assert read.read(LIMIT) == b"".join(pieces)


def test_no_body_is_not_waited_for_nor_read_away(connection):
    connection.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
    read = connection.next_upload()
    assert read.read(LIMIT) == b""
    read.discard()


@pytest.mark.parametrize("framing", FRAMINGS)
def test_what_follows_a_body_is_the_next_request_s(connection, framing):
    read = connection.begin(framing, 5)
    second = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\n\r\nsecond"
    connection.send(spelt(framing, b"first") + second)
    assert read.read(LIMIT) == b"first"
    read.discard()
    assert connection.next_upload().read(LIMIT) == b"second"


def test_without_gunicorn_s_socket_it_reads_all_the_same():
    class Input:
        left = b"hello"

        def read(self, size):
            data, self.left = self.left[:size], self.left[size:]
            return data

    environ = {"wsgi.input": Input(), "CONTENT_LENGTH": "5"}
    assert RequestBody(environ).read(LIMIT) == b"hello"


# ------------------------------------------------------------------------------------------- too large


def test_a_declared_length_over_the_limit_is_refused_before_a_byte_was_read(connection):
    read = connection.begin(size=LIMIT + 1)
    told, seconds = refusal(lambda: read.read(LIMIT))
    assert (told.status, told.type) == (413, "request_too_large")
    assert "1 MB" in told.message
    assert seconds < 5


def test_a_chunked_body_is_refused_as_soon_as_it_is_over_the_limit(connection):
    read = connection.begin("chunked")
    endless = itertools.repeat(b"%x\r\n%b\r\n" % (65536, b"x" * 65536))
    with trickle(connection, endless, 0.0):
        told, _ = refusal(lambda: read.read(LIMIT))
        connection.client.shutdown(socket.SHUT_RDWR)  # ends a send that waits for room
    assert (told.status, told.type) == (413, "request_too_large")


@pytest.mark.parametrize("framing", FRAMINGS)
def test_what_is_left_of_a_too_large_body_is_read_away_and_the_connection_goes_on(connection, framing):
    size = 5 * LIMIT
    read = connection.begin(framing, size)
    follows = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nnext"
    with meanwhile(lambda: connection.send(spelt(framing, *[b"x" * LIMIT] * 5) + follows)):
        refusal(lambda: read.read(LIMIT))
        read.discard()
    assert connection.next_upload().read(LIMIT) == b"next"


# ------------------------------------------------------------------------------- silence and broken bodies


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("sent", [0, 3])
def test_a_body_that_falls_silent_is_a_408(connection, monkeypatch, framing, sent):
    monkeypatch.setattr(client_module, "UPLOAD_SILENCE", 0.1)
    read = connection.begin(framing, 10)
    connection.send((b"" if framing == "length" or not sent else b"a\r\n") + b"x" * sent)
    told, seconds = refusal(lambda: read.read(LIMIT))
    assert (told.status, told.type) == (408, "timeout_error")
    assert 0.1 <= seconds < 5
    # The rest will not come either: nobody waits for it again, and the answer can be sent.
    began = time.monotonic()
    read.discard()
    assert time.monotonic() - began < 5
    connection.server.sendall(b"408")
    assert connection.client.recv(9) == b"408"


@pytest.mark.parametrize("framing", FRAMINGS)
def test_an_upload_ends_when_the_worker_stops(connection, framing):
    read = connection.begin(framing, 10)
    connection.send(b"xxx" if framing == "length" else b"a\r\nxxx")
    with meanwhile(connection.shutdown.end_waits):
        told, seconds = refusal(lambda: read.read(LIMIT))
    assert (told.status, told.type) == (529, "overloaded_error")
    assert seconds < 5
    read.discard()  # what is left is not read away
    connection.server.sendall(b"529")
    assert connection.client.recv(9) == b"529"


def test_a_body_that_comes_slowly_but_steadily_may_take_longer_than_that(connection, monkeypatch):
    monkeypatch.setattr(client_module, "UPLOAD_SILENCE", 1.0)
    read = connection.begin(size=12)
    began = time.monotonic()
    with trickle(connection, [b"x"] * 12, 0.1):
        assert read.read(LIMIT) == b"x" * 12
    assert time.monotonic() - began > 1.0


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("way", ["fin", "rst"])
def test_a_body_that_breaks_off_is_a_400(connection, framing, way):
    read = connection.begin(framing, 10)
    connection.send(b"xxx" if framing == "length" else b"a\r\nxxx")
    if way == "rst":
        connection.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.client.close()
    told, seconds = refusal(lambda: read.read(LIMIT))
    assert (told.status, told.type) == (400, "invalid_request_error")
    assert seconds < 5
    read.discard()


def test_a_badly_chunked_body_is_a_400_and_nothing_after_it_is_read(connection):
    read = connection.begin("chunked")
    connection.send(b"2\r\n{}\r\nzz\r\nPOST / HTTP/1.1\r\n\r\n")
    told, _ = refusal(lambda: read.read(LIMIT))
    assert told.status == 400
    began = time.monotonic()
    read.discard()
    assert time.monotonic() - began < 5


# ---------------------------------------------------------------------------------------- thrown away


def test_a_body_that_was_read_is_not_waited_for_again(connection):
    read = connection.begin(size=5)
    connection.send(b"hello")
    read.read(LIMIT)
    began = time.monotonic()
    read.discard()
    assert time.monotonic() - began < 5


def test_no_more_than_so_many_bytes_are_thrown_away(connection, monkeypatch):
    monkeypatch.setattr(upload, "DISCARD_BYTES", 2 * MB)
    read = connection.begin(size=10**9)
    sent = 0

    def send():
        nonlocal sent
        with contextlib.suppress(OSError):
            while True:
                sent += connection.client.send(b"x" * 65536)

    with meanwhile(send):
        read.discard()
        connection.server.shutdown(socket.SHUT_RDWR)
        connection.server.close()
    assert 2 * MB <= sent < 16 * MB  # the rest fits into the sockets' buffers


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("every", [0.01, None])
def test_a_refused_body_that_trickles_or_stops_is_given_up_and_the_answer_can_be_sent(
    connection, monkeypatch, framing, every
):
    monkeypatch.setattr(upload, "DISCARD_SECONDS", 0.2)
    read = connection.begin(framing, MB)
    trickled = itertools.repeat(spelt(framing, b"x").removesuffix(b"0\r\n\r\n"))
    began = time.monotonic()
    with trickle(connection, trickled if every else [b"1\r\nx"], every or 0):
        read.discard()
        seconds = time.monotonic() - began
        connection.server.sendall(b"529")
        assert connection.client.recv(9) == b"529"
    assert 0.2 <= seconds < 5


def test_a_refused_body_whose_client_leaves_is_not_waited_for(connection):
    read = connection.begin(size=MB)
    connection.send(b"x" * 1000)
    connection.client.close()
    began = time.monotonic()
    read.discard()
    assert time.monotonic() - began < 5
    assert connection.is_at_its_end()
