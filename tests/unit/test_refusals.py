"""An upstream that refuses everything, on a clock that only moves when told."""

import pytest
from fakes import Clock

from aiproxy.upstreams.refusals import Refusals


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def refusals(clock):
    return Refusals(clock)


def refuse(refusals, clock, times, seconds):
    """So many refusals, evenly over so many seconds; whether a backoff began."""
    began = [refusals.refused()]
    for _ in range(times - 1):
        clock.now += seconds / (times - 1)
        began.append(refusals.refused())
    return any(began)


def test_twenty_refusals_over_a_minute_back_it_off_for_a_minute(refusals, clock):
    assert refuse(refusals, clock, 20, 61)
    assert not refusals.usable()
    assert refusals.is_suspect
    clock.now += 60
    assert refusals.usable()


@pytest.mark.parametrize(("times", "seconds"), [(19, 60), (19, 600), (1000, 59)])
def test_fewer_or_within_a_shorter_time_do_nothing(refusals, clock, times, seconds):
    assert not refuse(refusals, clock, times, seconds)
    assert refusals.usable()


@pytest.mark.parametrize("is_success", [True, False])
def test_any_other_result_starts_the_count_again(refusals, clock, is_success):
    refuse(refusals, clock, 19, 59)
    refusals.other_result(is_success)
    clock.now += 10
    assert not refusals.refused()
    assert refusals.usable()


def test_after_the_backoff_one_more_refusal_begins_the_next(refusals, clock):
    refuse(refusals, clock, 20, 61)
    clock.now += 60
    assert refusals.refused()
    assert not refusals.usable()


def test_only_a_success_ends_the_suspicion(refusals, clock):
    refuse(refusals, clock, 20, 61)
    refusals.other_result(is_success=False)
    assert refusals.is_suspect
    refusals.other_result(is_success=True)
    assert not refusals.is_suspect
    assert refusals.usable()
