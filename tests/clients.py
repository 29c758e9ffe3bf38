"""Waits for tests of what waits: of clients that stay, and of clients that leave when told to."""

import socket

from aiproxy.transport.wait import Shutdown, Wait

_never = Shutdown()


def unwatched() -> Wait:
    """The wait of a request that nothing but its own limits ends."""
    return Wait(None, _never)


class Leaving:
    """A client's connection whose other side can leave."""

    def __init__(self) -> None:
        self._here, self._there = socket.socketpair()
        self.wait = Wait(self._here, _never)

    def leave(self) -> None:
        """Close the other side."""
        self._there.close()

    def __enter__(self) -> "Leaving":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both sides."""
        self._there.close()
        self._here.close()
