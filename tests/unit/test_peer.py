"""The client's address, as far as it can be trusted."""

import ipaddress

import pytest

from aiproxy.config import LOOPBACK
from aiproxy.server.peer import Peers

TRUSTED = (*LOOPBACK, ipaddress.ip_network("10.0.0.0/24"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("203.0.113.9", None, "203.0.113.9"),
        ("203.0.113.9", "198.51.100.1", "203.0.113.9"),  # anybody can send the header
        ("127.0.0.1", None, "127.0.0.1"),
        ("127.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("::1", "2001:db8::1", "2001:db8::1"),
        ("10.0.0.7", "6.6.6.6, 198.51.100.1", "198.51.100.1"),  # the last one is the peer's own word
        ("::ffff:127.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("10.0.1.7", "198.51.100.1", "10.0.1.7"),
        ("127.0.0.1", "unknown", "127.0.0.1"),
        ("127.0.0.1", "a b\n2026 INFO forged", "127.0.0.1"),
        ("", "198.51.100.1", "198.51.100.1"),  # a unix socket
        ("", None, ""),
    ],
)
def test_only_a_trusted_peer_says_who_its_client_is(peer, forwarded, address):
    assert Peers(TRUSTED).client(peer, forwarded or "") == address
