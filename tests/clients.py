"""Requests by a transport alone, and their waits: of clients that stay, and of clients that leave."""

import contextlib
import socket

import pytest
from fakes import FakeUpstream

from aiproxy.transport.failures import TransportError
from aiproxy.transport.session import Outgoing
from aiproxy.transport.wait import Shutdown, Wait

_never = Shutdown()


def unwatched():
    """The wait of a request that nothing but its own limits ends."""
    return Wait(None, _never)


class Leaving:
    """A client's connection whose other side can leave."""

    def __init__(self):
        self._here, self._there = socket.socketpair()
        self.wait = Wait(self._here, _never)

    def leave(self):
        """Close the other side."""
        self._there.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close both sides."""
        self._there.close()
        self._here.close()


def begin(transport, upstream, *, proxy=None, ca_bundle=None, path="/v1/messages", body=b"{}", wait=None):
    """A response whose head has come; `upstream` is a fake or a URL."""
    url = upstream.url if isinstance(upstream, FakeUpstream) else upstream
    headers = [("x-api-key", "sk-test-a")]
    outgoing = Outgoing("POST", url + path, headers, body, proxy, ca_bundle)
    return transport.send(outgoing, wait or unwatched())


def ask(transport, upstream, **options):
    """The whole body of an answer."""
    with contextlib.closing(begin(transport, upstream, **options)) as response:
        return b"".join(response.pieces())


def failure(transport, upstream, **options):
    """What went wrong on the way to the end of an answer."""
    with pytest.raises(TransportError) as failed:
        ask(transport, upstream, **options)
    return failed.value
