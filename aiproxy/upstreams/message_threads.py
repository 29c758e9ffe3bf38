"""Message threads: which account holds the thread that a request continues.

A thread lives on the account that made it, and a request that continues it names the last message's id.
So the ids of answers to requests with a `thread` are remembered, within bounds.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable

from ..api.body import Body, members, text
from .shared_state import LONGEST_ID, OWNER, State

#: Messages remembered; the oldest go first.
LIMIT = 10_000
#: Seconds for which one is remembered.
LIFETIME = OWNER


class Owners:
    """Which upstream made a message. Thread-safe."""

    def __init__(self, clock: Callable[[], float], state: State) -> None:
        """`clock`: monotonic seconds; `state`: what other processes remember."""
        self._clock = clock
        self._state = state
        self._lock = threading.Lock()
        self._owners: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def note(self, message_id: str, upstream: str) -> None:
        """Remember that `upstream` made the message, unless its id is longer than any real one."""
        if len(message_id) > LONGEST_ID:
            return
        with self._lock:
            self._owners[message_id] = (upstream, self._clock() + LIFETIME)
            self._owners.move_to_end(message_id)
            while len(self._owners) > LIMIT:
                self._owners.popitem(last=False)
        self._state.remember(message_id, upstream)

    def owner(self, message_id: str) -> str | None:
        """The name of the upstream that made the message, if it is remembered."""
        with self._lock:
            upstream, expires = self._owners.get(message_id, (None, 0.0))
        return upstream if self._clock() < expires else self._state.owner(message_id)


def uses_thread(body: Body) -> bool:
    """Whether a request creates or continues a thread."""
    return body.members.get("thread", b"null") != b"null"


def continued_message(body: Body) -> str | None:
    """The id of the message that a request continues, None if it continues none."""
    try:
        thread = members(body.members.get("thread", b""))
    except ValueError:
        return None
    if text(thread.get("type", b"")) != "continue":
        return None
    return text(thread.get("previous_message_id", b""))
