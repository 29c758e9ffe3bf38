"""Which address a request came from, as far as it can be trusted."""

import functools
import ipaddress
from collections.abc import Sequence

from ..config import Network

_NOWHERE = ipaddress.IPv4Address(0)


class Peers:
    """The peers that are believed, as nginx on this machine is. Thread-safe."""

    def __init__(self, trusted: Sequence[Network]) -> None:
        self._trusted = trusted
        #: The client's address, by that of the peer and by its `X-Forwarded-For`; see `_found`.
        self.client = functools.lru_cache(maxsize=1024)(self._found)

    def _found(self, peer: str, forwarded: str) -> str:
        """A peer that is trusted says who its own client is: the last address is the one that it added.

        Empty on a unix socket whose peer names none.
        """
        if peer and not any(_address(peer) in network for network in self._trusted):
            return peer
        last = forwarded.rpartition(",")[2].strip()
        return peer if _address(last) == _NOWHERE else last


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address that a text spells, 0.0.0.0 if it spells none."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return _NOWHERE
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
