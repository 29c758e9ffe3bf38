"""The failover policy: what a failure is about decides what it costs and whether another upstream is asked.

Only data and pure functions: no I/O, no state. docs/failover.md shows the same as one table.
"""

import re
from enum import IntEnum, StrEnum

import msgspec

from .errors import STATUS_OF_TYPE


class Fault(StrEnum):
    """How an attempt failed before its commit point; the words of the log."""

    CONNECT = "connect"  # DNS, TCP, TLS, forward proxy: nothing of the request was sent
    BROKEN = "broken"  # the answer broke off before the commit point, or was over the size limits
    TIMEOUT = "timeout"  # the request was sent, and no answer came in time
    NO_ANSWER = "no_answer"  # a status below 400 with something that is not a Messages API answer
    TOKEN = "token"  # the upstream's token is being fetched anew
    ERROR = "error"  # an error answer: an HTTP status of 400 or more, or an error in a 200
    CLIENT_LEFT = "client_left"
    RESTART = "restart"  # the worker process stops


class Cost(StrEnum):
    """What a failure costs the upstream; the words of the log and of the metrics."""

    NONE = "uncounted"
    FAILURE = "counted"  # one failure for the circuit breaker
    LATE = "counted_unless_alive"  # one failure, unless another attempt succeeded while this one ran
    UPSTREAM_BACKOFF = "backoff"  # the upstream is not asked until a given time
    MODEL_BACKOFF = "model_backoff"  # it is not asked for this model until a given time
    MODEL_MISSING = "model_missing"  # three in a row and it is not asked for this model for the cooldown
    REFUSED = "refused"  # nothing; but an upstream that refuses everything is noticed


class Rank(IntEnum):
    """Which failure the client gets when all attempts failed: the highest, of equals the latest."""

    NONE = 0  # the upstream sent no error
    ACCOUNT = 1  # about the upstream's own account; never sent as it is
    SUSPECT = 2  # an error about the request, of an upstream that refuses everything
    LACKING = 3  # about something that this upstream does not have
    RETRYABLE = 4  # a client may try again
    REQUEST = 5  # about the request


class Problem(msgspec.Struct, frozen=True):
    """A failure as the policy sees it. The fields after `fault` are set for `Fault.ERROR` only."""

    fault: Fault
    status: int | None = None  # HTTP; for an error in a 200 the status of its type
    type: str = ""  # `error.type`
    message: str = ""
    code: str = ""  # `error.details.error_code`
    retry_after: float | None = None  # seconds; None where the header is absent or makes no sense


class Decision(msgspec.Struct, frozen=True):
    """What follows from a failure."""

    try_next: bool
    cost: Cost
    rank: Rank = Rank.NONE
    backoff: float | None = None  # seconds; None: the length is not given by the upstream


#: A request is given up at this many timeouts: each attempt that timed out may be billed.
MOST_TIMEOUTS = 2

_SPEND_LIMIT_CODES = frozenset({"enforced_spend_limit_reached", "contract_spend_limit_reached"})
_ACCOUNT_TYPES = frozenset({"authentication_error", "billing_error"})
#: Error codes of a 400 that are about the account or its workspace (SDK 2.14.0).
_ACCOUNT_CODES = frozenset(
    "organization_on_hold organization_not_eligible workspace_human_review_disabled region_not_supported "
    "cmek_not_approved".split()
)
_ACCOUNT_403 = re.compile(r"\b(?:revoked|suspended|disabled|expired|credits?|billing)\b", re.IGNORECASE)
_ACCOUNT_400 = re.compile(
    r"\bcredit balance\b|\bcredits?\b.{0,40}\b(?:low|exhausted|insufficient|required)\b"
    r"|\b(?:insufficient|no|out of) credits?\b|\busage limits?\b"
    r"|\borgani[sz]ation\b.{0,60}\b(?:on hold|disabled)\b",
    re.IGNORECASE,
)
#: What an error quotes may be the client's words: they must not make a request's fault the account's.
_QUOTED = re.compile(r"""(?<![A-Za-z])'[^']*'(?![A-Za-z])|"[^"]*"|`[^`]*`""")
_BOUND_THINKING = re.compile(r"bound to a different conversation|prefix mismatch", re.IGNORECASE)
#: 4xx that say what one upstream lacks rather than what is wrong with the request.
_LACKING = frozenset({405, 413})

_UPSTREAM_FAILURE = Decision(try_next=True, cost=Cost.FAILURE)
_STOP = Decision(try_next=False, cost=Cost.NONE)
_FAULTS = {
    Fault.CONNECT: _UPSTREAM_FAILURE,
    Fault.BROKEN: _UPSTREAM_FAILURE,
    Fault.NO_ANSWER: _UPSTREAM_FAILURE,
    Fault.TIMEOUT: Decision(try_next=True, cost=Cost.LATE),
    Fault.TOKEN: Decision(try_next=True, cost=Cost.NONE),
    Fault.CLIENT_LEFT: _STOP,
    Fault.RESTART: _STOP,
}
_RETRYABLE = Decision(try_next=True, cost=Cost.FAILURE, rank=Rank.RETRYABLE)
_ACCOUNT = Decision(try_next=True, cost=Cost.FAILURE, rank=Rank.ACCOUNT)
_MODEL_MISSING = Decision(try_next=True, cost=Cost.MODEL_MISSING, rank=Rank.LACKING)
_REFUSED = Decision(try_next=True, cost=Cost.REFUSED, rank=Rank.REQUEST)
_REFUSED_AS_LACKING = Decision(try_next=True, cost=Cost.REFUSED, rank=Rank.LACKING)
_FINAL = Decision(try_next=False, cost=Cost.NONE, rank=Rank.REQUEST)


def decide(problem: Problem, models: tuple[str, ...] = (), is_bound: bool = False) -> Decision:
    """What follows from a failure.

    `models`: the names of the model asked for, the client's and the upstream's. `is_bound`: the request
    names a thread, a container, a file or a workspace, which only one account has; no other account can do
    better after a 4xx.
    """
    if problem.fault is not Fault.ERROR or problem.status is None:
        if problem.fault is Fault.TOKEN and is_bound:
            return _STOP  # the request waits for the token
        return _FAULTS.get(problem.fault, _UPSTREAM_FAILURE)
    decision = _error(problem, problem.status, models)
    if is_bound and problem.status < 500:
        costs_nothing = problem.status == 404
        return Decision(
            try_next=False,
            cost=Cost.NONE if costs_nothing else decision.cost,
            rank=Rank.REQUEST if costs_nothing else decision.rank,
            backoff=decision.backoff,
        )
    return decision


def _error(problem: Problem, status: int, models: tuple[str, ...]) -> Decision:
    if status in (429, 529):
        return _limit(problem)
    if status == 503 and is_usable(problem.retry_after):
        return Decision(
            try_next=True, cost=Cost.UPSTREAM_BACKOFF, rank=Rank.RETRYABLE, backoff=problem.retry_after
        )
    if status >= 500 or status == 408:
        return _RETRYABLE
    if _is_about_account(problem, status):
        return _ACCOUNT
    if status == 404 or (status == 403 and names_model(problem.message, models)):
        return _MODEL_MISSING
    if status == 400 and _BOUND_THINKING.search(problem.message):
        return _FINAL
    return _REFUSED_AS_LACKING if status in _LACKING else _REFUSED


def _limit(problem: Problem) -> Decision:
    """429 and 529: the upstream, or one model of it, has no capacity now."""
    if problem.status == 429 and problem.code in _SPEND_LIMIT_CODES:
        return Decision(try_next=True, cost=Cost.UPSTREAM_BACKOFF, rank=Rank.RETRYABLE)
    backoff = problem.retry_after if is_usable(problem.retry_after) else None
    return Decision(try_next=True, cost=Cost.MODEL_BACKOFF, rank=Rank.RETRYABLE, backoff=backoff)


def _is_about_account(problem: Problem, status: int) -> bool:
    if status in (401, 402):
        return True
    message = _QUOTED.sub("", problem.message)
    if status == 403:
        return problem.type in _ACCOUNT_TYPES or _ACCOUNT_403.search(message) is not None
    if status == 400:
        return problem.code in _ACCOUNT_CODES or _ACCOUNT_400.search(message) is not None
    return False


def is_usable(retry_after: float | None) -> bool:
    """Whether a `retry-after` in seconds says when to come back: absent, 0 and nonsense do not."""
    return retry_after is not None and 0 < retry_after < float("inf")


def names_model(message: str, models: tuple[str, ...]) -> bool:
    """Whether an error message names one of the models."""
    return any(model and model in message for model in models)


def status_of_type(type_: str) -> int:
    """The HTTP status of an error type; 500 where the type is unknown."""
    return STATUS_OF_TYPE.get(type_, 500)
