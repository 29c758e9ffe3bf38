"""How an exchange ended: the words of the log and of the metrics."""

from enum import StrEnum


class Outcome(StrEnum):
    """The values of `outcome`."""

    COMPLETE = "complete"
    ERROR = "error"  # all attempts failed
    CLIENT_LEFT = "client_left"
    RESTART = "restart"  # this process stops
    ERROR_EVENT = "error_event"  # the upstream sent one in the middle of a stream
    BROKEN = "broken"  # the upstream broke off a stream
    SILENT = "silent"  # the upstream fell silent in the middle of a stream
