"""What a request and a delta cost, in Python calls: a figure that no machine's mood changes.

Whoever exceeds a bound has made the proxy more expensive for everybody: look at bench/NOTES.md before
raising it.
"""

import cProfile
import json
import pstats
import sys

import pytest
from fakes import events, message_events

from aiproxy.app import create_app
from aiproxy.config import Config, UpstreamSettings

counted_on_3_11 = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="the profiler of other Pythons counts other calls"
)

ASK = {"model": "claude-x", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def calls_of(upstream):
    """How many calls it takes to serve these requests, by this thread."""

    def count(replies, asked):
        fake = upstream(*replies)
        mapped = {"claude-x": "claude-y"}
        one = UpstreamSettings(name="a", base_url=fake.url, token="sk-test-aaaaaaaa", model_mappings=mapped)
        client = create_app(Config(upstreams=(one,))).test_client()

        def ask():
            body = json.dumps(asked).encode()
            reply = client.post("/v1/messages", data=body, content_type="application/json")
            assert (reply.status_code, bool(reply.data)) == (200, True)

        for _ in range(2):
            ask()  # imports, caches, the connection
        counts = []
        for _ in range(3):
            profile = cProfile.Profile()
            profile.enable()
            ask()
            profile.disable()
            counts.append(pstats.Stats(profile).total_calls)
        return min(counts)  # some requests take a dozen calls more, by chance

    return count


def stream(deltas):
    return events(message_events([f"word {n} " for n in range(deltas)]), gap=0.001)


@counted_on_3_11
def test_a_request_takes_at_most_2300_calls(calls_of):
    assert calls_of([], ASK) <= 2300


@counted_on_3_11
def test_a_delta_takes_at_most_37_calls(calls_of):
    few, many = (calls_of([stream(n)] * 3, {**ASK, "stream": True}) for n in (20, 120))
    assert (many - few) / 100 <= 37


def test_a_large_body_costs_no_more_calls_than_a_small_one(calls_of):
    turns = [{"role": role, "content": "x" * 2000} for _ in range(75) for role in ("assistant", "user")]
    large = calls_of([], {**ASK, "messages": turns, "metadata": {"user_id": "someone"}})
    assert large < calls_of([], ASK) + 300
