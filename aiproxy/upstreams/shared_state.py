"""What processes that serve together know in common: the interface, and what a process by itself has.

One process has nobody to tell, and pays for nothing of this. `redis_state` is for several.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from .breaker import Breaker, Change, Permit


class Shared(Protocol):
    """One upstream, of which other processes are to know too."""

    def may_try(self, permit: Permit) -> bool:
        """Whether the trial that this permit allows may begin: if not, the permit has been given back."""

    def report(self, change: Change, permit: Permit | None = None) -> None:
        """Its circuit changed here, by an attempt with that permit or by hand."""

    def drain(self, draining: bool) -> None:
        """It was taken out by hand, or back in."""


class Unshared:
    """An upstream of a process by itself."""

    def may_try(self, permit: Permit) -> bool:
        """Nobody else tries it."""
        return True

    def report(self, change: Change, permit: Permit | None = None) -> None:
        """There is nobody to tell."""

    def drain(self, draining: bool) -> None:
        """There is nobody to tell."""


class Sharing(Protocol):
    """What is shared of an upstream."""

    name: str
    breaker: Breaker
    draining: bool
    shared: Shared

    @property
    def id(self) -> str:
        """The same in all processes that mean the same account."""


class Replies(msgspec.Struct, frozen=True):
    """What other processes answered, by what people call them; nothing where one did not answer."""

    answers: dict[str, bytes] = {}
    problem: str | None = None  # why nobody could be asked


#: What a process answers to a question, by the question's name.
Answers = Mapping[str, Callable[[], bytes]]


class State(Protocol):
    """The whole. Thread-safe; no call takes longer than a tenth of a second, but for `ask`."""

    #: Whether there may be other processes.
    is_shared: bool

    def share(self, upstreams: Sequence[Sharing]) -> None:
        """From now on these are served; what is known in common of others does not matter here."""

    def start(self, server: str, answers: Answers) -> None:
        """This process serves from now on; `server` is what people call the gunicorn that it belongs to."""

    def stop(self) -> None:
        """It does no longer."""

    def remember(self, message_id: str, upstream: str) -> None:
        """Which upstream made a message of a thread."""

    def owner(self, message_id: str) -> str | None:
        """The name of the upstream that made the message, if any process knows."""

    def ask(self, question: str, once_a_server: bool = False) -> Replies:
        """What the other processes answer; of each other server only one of them, where that is enough."""


class Alone:
    """The state of a process by itself."""

    is_shared = False

    def share(self, upstreams: Sequence[Sharing]) -> None:
        """Nothing is shared."""

    def start(self, server: str, answers: Answers) -> None:
        """Nobody will ask."""

    def stop(self) -> None:
        """Nothing runs."""

    def remember(self, message_id: str, upstream: str) -> None:
        """What this process itself remembers is `threads`' matter."""

    def owner(self, message_id: str) -> str | None:
        """Nobody else knows."""
        return None

    def ask(self, question: str, once_a_server: bool = False) -> Replies:
        """Nobody answers."""
        return Replies()
