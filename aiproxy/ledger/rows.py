"""The ledger's rows: one for each exchange that used tokens, and their sums by day."""

from datetime import UTC, datetime

import msgspec

#: The client of exchanges without a key.
ANONYMOUS = "anonymous"
_LONGEST = 200  # characters of a text that came from outside


class Exchange(msgspec.Struct, frozen=True):
    """One row. `at` is Unix time in seconds, when the exchange ended; `cost` is in nano-dollars."""

    id: str  # our request id: a row counts once, whatever is retried
    at: float
    client: str
    model: str  # the client's name
    upstream: str
    upstream_model: str
    request_class: str  # Claude Code's word for what the request is for; empty where it sends none
    input: int
    output: int
    cache_read: int
    cache_write_5m: int
    cache_write_1h: int
    web_searches: int
    web_fetches: int
    cost: int
    outcome: str
    seconds: float
    attempts: int
    is_estimated: int  # 0 or 1
    is_unpriced: int  # 1: a model had no price, and counts at the dearest
    upstream_request_id: str

    @property
    def day(self) -> str:
        """The day of `at`, UTC, such as 2026-11-27."""
        return day_of(self.at)


class Sums(msgspec.Struct, frozen=True):
    """What several exchanges used together; `cost` is in nano-dollars."""

    requests: int = 0
    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    web_searches: int = 0
    web_fetches: int = 0
    estimated: int = 0  # of `requests`
    unpriced: int = 0  # of `requests`
    cost: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*map(int.__add__, msgspec.structs.astuple(self), msgspec.structs.astuple(other)))

    @property
    def cache_read_share(self) -> float | None:
        """The part of all input that came from a prompt cache, None where there was no input."""
        every = self.input + self.cache_read + self.cache_write_5m + self.cache_write_1h
        return self.cache_read / every if every else None

    @classmethod
    def of(cls, row: Exchange) -> "Sums":
        """The sums of one row."""
        names = (name for name in cls.__struct_fields__ if name in row.__struct_fields__)
        figures = {name: getattr(row, name) for name in names}
        return cls(requests=1, estimated=row.is_estimated, unpriced=row.is_unpriced, **figures)


def day_of(at: float) -> str:
    """The day of a Unix time, UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def storable(text: str) -> str:
    """Text from outside as both databases take it: not too long, no NUL, no half of a surrogate pair."""
    return text[:_LONGEST].replace("\0", "").encode(errors="replace").decode()


def money(nano: int) -> str:
    """Nano-dollars for people, such as $12.30; small sums with more digits."""
    dollars = nano / 1e9
    return f"${dollars:,.2f}" if dollars >= 0.1 or not nano else f"${dollars:.6f}".rstrip("0")
