"""What follows from each way an attempt can fail: the failover policy, as data.

Whether another upstream is tried, what it costs the one that failed, and which of several failures
the client is told when all fail. No code here does anything.
"""

from enum import Enum, IntEnum

import msgspec


class Fault(Enum):
    """How an attempt failed before its commit point."""

    CONNECT = "connect"  # DNS, TCP, TLS: nothing of the request was sent
    BROKEN = "broken"  # died before the commit point, cut short, over the size limits
    TIMEOUT = "timeout"  # sent, and no answer in time
    NO_ANSWER = "no_answer"  # a status below 400 that is no Messages API answer
    ERROR = "error"  # an error answer: an HTTP status of 400 or more, or an error in a 200
    CLIENT_LEFT = "client_left"
    RESTART = "restart"  # this process ends


class Charge(Enum):
    """What a failure costs the upstream's circuit breaker."""

    NOTHING = "uncounted"
    FAILURE = "counted"
    REST = "rests"  # it said when to come back: it rests until then, and nothing is counted
    IF_ANOTHER_ANSWERS = "undecided"  # counted if another upstream then answers the request


class Rank(IntEnum):
    """Which failure the client is told when all fail: the highest, of equals the latest."""

    NONE = 0  # no error answer of the upstream's
    ACCOUNT = 1  # about the upstream's own account: the client's key is not at fault
    RETRYABLE = 2  # a client may try again
    REQUEST = 3  # about the request


class Rule(msgspec.Struct, frozen=True):
    """One row of the policy."""

    next_upstream: bool
    charge: Charge
    rank: Rank = Rank.NONE


#: One timeout a request is followed by another upstream; each attempt may be billed.
TIMEOUTS_A_REQUEST = 2

_FAULTS = {
    Fault.CONNECT: Rule(next_upstream=True, charge=Charge.FAILURE),
    Fault.BROKEN: Rule(next_upstream=True, charge=Charge.FAILURE),
    Fault.TIMEOUT: Rule(next_upstream=True, charge=Charge.FAILURE),
    Fault.NO_ANSWER: Rule(next_upstream=True, charge=Charge.FAILURE),
    Fault.CLIENT_LEFT: Rule(next_upstream=False, charge=Charge.NOTHING),
    Fault.RESTART: Rule(next_upstream=False, charge=Charge.NOTHING),
}

_ABOUT_THE_REQUEST = Rule(next_upstream=True, charge=Charge.IF_ANOTHER_ANSWERS, rank=Rank.REQUEST)
_MAY_RETRY = Rule(next_upstream=True, charge=Charge.FAILURE, rank=Rank.RETRYABLE)
_RESTS = Rule(next_upstream=True, charge=Charge.REST, rank=Rank.RETRYABLE)

_STATUSES = {
    401: Rule(next_upstream=True, charge=Charge.FAILURE, rank=Rank.ACCOUNT),
    402: Rule(next_upstream=True, charge=Charge.FAILURE, rank=Rank.ACCOUNT),
    # Charged like any other 4xx, and yet about the upstream's account.
    403: Rule(next_upstream=True, charge=Charge.IF_ANOTHER_ANSWERS, rank=Rank.ACCOUNT),
    408: _MAY_RETRY,
    429: _MAY_RETRY,
}

#: Statuses whose `retry-after` is taken at its word.
_RESTING = frozenset({429, 503, 529})

#: The 404 of an account that does not hold the thread: the client then sends the whole conversation.
THREAD_NOT_FOUND = Rule(next_upstream=False, charge=Charge.NOTHING, rank=Rank.REQUEST)


def rule_for(
    fault: Fault, status: int | None = None, retry_after: float | None = None, is_bound: bool = False
) -> Rule:
    """The row for a failure; `status` goes with `Fault.ERROR`, `retry_after` is in seconds.

    `is_bound`: the request names something that only one account has (a container, a file, a thread, a
    workspace), so that no other account can do better at a 4xx.
    """
    if fault is not Fault.ERROR:
        return _FAULTS[fault]
    rests = status in _RESTING and retry_after is not None
    if status is None or status >= 500:
        return _RESTS if rests else _MAY_RETRY
    rule = _RESTS if rests else _STATUSES.get(status, _ABOUT_THE_REQUEST)
    return msgspec.structs.replace(rule, next_upstream=False) if is_bound else rule
