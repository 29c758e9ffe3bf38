"""Simulated accounts that hold message threads, for the tests of both SDKs."""

import itertools

from fakes import error, events, message_events, message_json, tool_use, whole

#: The details of the 404 of an account that does not hold a thread.
LOST = {"error_code": "thread_not_found", "previous_message_id": "msg_x"}


class Account:
    """A reply that holds threads as one account does: a message of another account's is not found.

    Asks for a tool until a conversation has `rounds` replies.
    """

    def __init__(self, name, rounds=0):
        self.name = name
        self.held = {}
        self.lost = 0
        self._rounds = rounds
        self._number = itertools.count(1)

    def __call__(self, wire, seen):
        asked = seen.json()
        thread = asked.get("thread") or {"type": None}
        history = asked["messages"]
        if thread["type"] == "continue":
            if thread["previous_message_id"] not in self.held:
                self.lost += 1
                error(404, message="Thread not found.", details=LOST)(wire, seen)
                return
            assert not {"system", "tools"} & set(asked)
            history = self.held[thread["previous_message_id"]] + history
        number = next(self._number)
        made = f"msg_{self.name}_{number}"
        replies = sum(message["role"] == "assistant" for message in history)
        tool = tool_use(id=f"toolu_{self.name}_{number}") if replies < self._rounds else None
        text = f"{self.name} after {len(history)}"
        if thread["type"]:
            self.held[made] = [*history, {"role": "assistant", "content": text}]
        if asked.get("stream"):
            events(message_events([text], tool=tool, id=made))(wire, seen)
        else:
            whole(200, message_json(text, tool=tool, id=made))(wire, seen)
