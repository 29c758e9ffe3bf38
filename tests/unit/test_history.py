"""The last hour, minute by minute: what is counted where, what is forgotten, what a clock may do."""

import pytest
from fakes import Clock

from aiproxy.api.usage import Usage
from aiproxy.observability.history import FAILURES, MINUTES, Counted, History, Hour, record


@pytest.fixture
def clock():
    return Clock(1_000_000 * 60.0)


@pytest.fixture
def history(clock):
    return History(clock)


@pytest.fixture
def of(history, clock):
    """The last hour of one upstream."""
    return lambda name: record([history.hours().get(name, Hour())], clock.now)


def test_nothing_yet_is_an_hour_of_nothing(history, of):
    found = of("a")
    assert len(found.minutes) == MINUTES
    assert (found.whole, found.whole.first_byte, found.failures) == (Counted(), None, [])


def test_each_minute_has_its_own_figures_and_the_latest_is_last(history, clock, of):
    history.attempt("a", 1.0)
    clock.now += 120
    history.attempt("a", 4.0)
    history.attempt("a")
    history.failed("a", "claude-x", "status 529", "req_1")
    minutes = of("a").minutes
    assert [(each.attempts, each.failures, each.answers) for each in minutes[-3:]] == [
        (1, 0, 1),
        (0, 0, 0),
        (2, 1, 1),
    ]
    assert minutes[-3].first_byte == pytest.approx(1.0, rel=0.15)
    assert minutes[-2].first_byte is None
    assert minutes[-1].first_byte == pytest.approx(4.0, rel=0.15)


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.05, 2.0, 119.0, 1e6])
def test_a_median_is_right_to_an_eighth_within_the_sensible_range(history, seconds, of):
    for _ in range(9):
        history.attempt("a", seconds)
    for outlier in (0.02, 90.0):
        history.attempt("a", outlier)
    median = of("a").whole.first_byte
    if 0.01 <= seconds <= 400:
        assert median == pytest.approx(seconds, rel=0.125)
    else:
        assert median > 0


def test_after_an_hour_it_is_forgotten(history, clock, of):
    history.attempt("a", 1.0)
    history.used("a", Usage(input_tokens=7))
    clock.now += 60 * (MINUTES - 1)
    assert (of("a").whole.answers, of("a").whole.input) == (1, 7)
    clock.now += 60
    assert (of("a").whole.answers, of("a").whole.input) == (0, 0)


def test_the_last_failures_are_told_latest_first_and_cut(history, clock, of):
    for n in range(FAILURES + 3):
        clock.now += 1
        history.failed("a", "m" * 1000, f"reason {n} " + "x" * 1000, f"req_{n}")
    failures = of("a").failures
    assert [failure.reason[:8] for failure in failures] == [f"reason {n}" for n in range(7, 2, -1)]
    assert (
        {len(failure.reason) for failure in failures} == {len(failure.model) for failure in failures} == {200}
    )
    assert failures[0].at == clock.now


def test_tokens_add_up_and_cached_ones_are_input_too(history, of):
    for _ in range(2):
        history.used(
            "a",
            Usage(
                input_tokens=10, output_tokens=5, cache_read_input_tokens=80, cache_creation_input_tokens=10
            ),
        )
    history.used("a", Usage())
    assert of("a").whole == Counted(input=200, output=10, cache_read=160)


def test_what_several_processes_counted_adds_up(clock):
    one, two = History(clock), History(clock)
    for history, seconds in ((one, 0.5), (two, 8.0), (two, 8.0)):
        history.attempt("a", seconds)
    one.failed("a", "claude-x", "first", "req_1")
    clock.now += 61
    two.attempt("a")
    two.failed("a", "claude-x", "second", "req_2")
    found = record([one.hours()["a"], two.hours()["a"]], clock.now)
    assert (found.whole.attempts, found.whole.failures, found.whole.answers) == (4, 2, 3)
    assert found.whole.first_byte == pytest.approx(8.0, rel=0.125)
    assert [(each.attempts, each.failures) for each in found.minutes[-2:]] == [(3, 1), (1, 1)]
    assert [(each.reason, each.id) for each in found.failures] == [("second", "req_2"), ("first", "req_1")]


@pytest.mark.parametrize("jump", [-3600.0 * 24 * 365, -90.0, 3600.0 * 24 * 365])
def test_a_clock_that_jumps_loses_minutes_and_nothing_else(history, clock, jump, of):
    history.attempt("a", 1.0)
    clock.now += jump
    history.attempt("a", 2.0)
    history.failed("a", "claude-x", "reason", "req_1")
    assert of("a").minutes[-1].attempts == 1
    clock.now -= jump
    for _ in range(3 * MINUTES):
        clock.now += 60
        history.attempt("a", 2.0)
        assert 1 <= of("a").whole.attempts <= MINUTES


def test_upstreams_that_are_no_more_are_forgotten(history, of):
    history.attempt("a", 1.0)
    history.attempt("b", 1.0)
    history.keep(["b", "c"])
    assert [of(name).whole.answers for name in "abc"] == [0, 1, 0]


def test_what_strangers_sent_can_be_shown_anywhere(history, of):
    history.failed("a", "claude-\ud800", "one\ntwo\u202ethree\x1b[2J", "req_1")
    (failure,) = of("a").failures
    assert (failure.model, failure.reason) == ("claude- ", "one two three [2J")
