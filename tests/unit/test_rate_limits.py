"""What an upstream's answers say of its rate limits."""

from datetime import UTC, datetime

import pytest
from fakes import Clock

from aiproxy.upstreams.rate_limits import RateLimits

NOW = 1_800_000_000.0


def headers(kind, remaining, limit, seconds):
    """The three headers of one limit that is reset in `seconds`."""
    reset = datetime.fromtimestamp(NOW + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    values = {"limit": limit, "remaining": remaining, "reset": reset}
    return [(f"anthropic-ratelimit-{kind}-{what}", str(value)) for what, value in values.items()]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limits(clock):
    return RateLimits(clock, lambda: NOW)


@pytest.mark.parametrize(("remaining", "is_low"), [(0, True), (9, True), (10, False), (100, False)])
def test_a_model_is_low_under_a_tenth_of_its_limit(limits, remaining, is_low):
    limits.note("m", headers("requests", remaining, 100, 60))
    assert limits.is_low("m") is is_low
    assert limits.was_low is is_low
    assert not limits.is_low("another model")


def test_the_scarcest_limit_counts(limits):
    scarce = headers("output-tokens", 500, 10_000, 60)
    limits.note("m", [*headers("requests", 99, 100, 60), *scarce, *headers("input-tokens", 7, 10, 60)])
    assert limits.shares() == {"m": 0.05}


def test_it_is_low_until_the_reset_or_a_better_answer(limits, clock):
    limits.note("m", headers("requests", 1, 100, 60))
    clock.now += 59
    assert limits.is_low("m")
    clock.now += 1
    assert not limits.is_low("m")
    assert limits.shares() == {"m": 1.0}
    limits.note("n", headers("requests", 1, 100, 60))
    limits.note("n", headers("requests", 50, 100, 60))
    assert not limits.is_low("n")


def test_a_reset_in_the_far_future_counts_for_an_hour(limits, clock):
    limits.note("m", headers("requests", 1, 100, 10_000_000))
    clock.now += 3599
    assert limits.is_low("m")
    clock.now += 1
    assert not limits.is_low("m")


@pytest.mark.parametrize(
    "found",
    [
        [],
        headers("requests", 0, 0, 60),
        headers("requests", "none", 100, 60),
        headers("requests", 0, 100, 60)[:2],
        [*headers("requests", 0, 100, 60)[:2], ("anthropic-ratelimit-requests-reset", "soon")],
        headers("cats", 0, 100, 60),
    ],
    ids=["none", "a limit of 0", "no number", "no reset", "no date", "another kind"],
)
def test_what_says_nothing_is_passed_over(limits, found):
    limits.note("m", found)
    assert limits.shares() == {}
    assert not limits.was_low


def test_an_answer_without_headers_changes_nothing(limits):
    limits.note("m", headers("requests", 1, 100, 60))
    limits.note("m", [("content-type", "application/json")])
    assert limits.is_low("m")


def test_only_so_many_models_are_remembered(limits):
    for number in range(300):
        limits.note(f"model {number}", headers("requests", 1, 100, 60))
    assert len(limits.shares()) == 200
    assert limits.is_low("model 299")
    assert not limits.is_low("model 0")
