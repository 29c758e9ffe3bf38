"""Rows of the ledger for tests, and a plain sum over them."""

import random
from collections import Counter

from aiproxy.ledger.rows import Exchange, day_of

KINDS = ("input", "output", "cache_read", "cache_write_5m", "cache_write_1h")


def row(number, at=1_795_000_000.0, **changes):
    """One exchange, which cost $1.50 unless changes say otherwise."""
    fields = {
        "id": f"req_{number}",
        "at": at,
        "client": "alice",
        "model": "claude-opus-5-5",
        "upstream": "team",
        "upstream_model": "claude-opus-5-5",
        "request_class": "main",
        "input": 100,
        "output": 20,
        "cache_read": 300,
        "cache_write_5m": 40,
        "cache_write_1h": 5,
        "web_searches": 1,
        "web_fetches": 0,
        "cost": 1_500_000_000,
        "outcome": "complete",
        "seconds": 2.5,
        "attempts": 1,
        "is_estimated": 0,
        "is_unpriced": 0,
        "upstream_request_id": f"req_up_{number}",
    }
    return Exchange(**{**fields, **changes})


def random_rows(count, seed=1, prefix="req"):
    """Exchanges of several days, clients, models and upstreams."""
    dice = random.Random(seed)
    return [
        row(
            n,
            id=f"{prefix}_{n}",
            at=1_795_000_000 + dice.random() * 5 * 24 * 3600,
            client=dice.choice(["alice", "bob", "carol"]),
            model=dice.choice(["opus", "sonnet"]),
            upstream=dice.choice(["team", "relay"]),
            cost=dice.randrange(10**10),
            is_estimated=dice.randrange(2),
            **{kind: dice.randrange(10**5) for kind in KINDS},
        )
        for n in range(count)
    ]


def costs(rows, by):
    """Nano-dollars by the day, or by another column."""
    found = Counter()
    for each in rows:
        found[day_of(each.at) if by == "day" else getattr(each, by)] += each.cost
    return dict(found)
