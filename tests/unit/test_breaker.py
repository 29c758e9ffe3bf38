"""The circuit breaker, on a clock that only moves when told."""

import pytest
from fakes import Clock

from aiproxy.upstreams.breaker import Breaker, Change, Event, Outcome, Pass


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return Breaker(failures=3, cooldown=1800, clock=clock)


def fail(breaker, times=1):
    change = None
    for _ in range(times):
        change = breaker.settle(breaker.acquire(), Outcome.FAILURE)
    return change


def open_and_wait(breaker, clock):
    fail(breaker, 3)
    clock.now += 1800


def test_three_failures_in_a_row_open_it_for_the_cooldown(breaker, clock):
    assert fail(breaker, 2) == Change(Event.FAILED)
    assert breaker.usable()
    assert fail(breaker) == Change(Event.OPENED, 1800)
    assert breaker.acquire() is None
    clock.now += 1799.9
    assert breaker.acquire() is None
    clock.now += 0.1
    assert breaker.acquire().kind is Pass.TRIAL


def test_a_success_between_failures_starts_the_count_again(breaker):
    fail(breaker, 2)
    breaker.settle(breaker.acquire(), Outcome.SUCCESS)
    fail(breaker, 2)
    assert breaker.usable()


def test_a_success_whose_attempt_began_before_the_latest_failure_resets_nothing(breaker):
    early = breaker.acquire()
    fail(breaker, 2)
    breaker.settle(early, Outcome.SUCCESS)
    fail(breaker)
    assert not breaker.usable()


def test_an_ignored_attempt_changes_nothing(breaker):
    fail(breaker, 2)
    breaker.settle(breaker.acquire(), Outcome.IGNORED)
    fail(breaker)
    assert not breaker.usable()


def test_one_trial_at_a_time(breaker, clock):
    open_and_wait(breaker, clock)
    trial = breaker.acquire()
    assert breaker.acquire() is None
    breaker.settle(trial, Outcome.IGNORED)
    assert breaker.acquire().kind is Pass.TRIAL


def test_a_good_trial_closes_it(breaker, clock):
    open_and_wait(breaker, clock)
    assert breaker.settle(breaker.acquire(), Outcome.SUCCESS) == Change(Event.CLOSED)
    assert breaker.acquire().kind is Pass.ORDINARY
    assert fail(breaker, 2) == Change(Event.FAILED)


def test_a_failed_trial_opens_it_again_for_the_whole_cooldown(breaker, clock):
    open_and_wait(breaker, clock)
    assert breaker.settle(breaker.acquire(), Outcome.FAILURE) == Change(Event.OPENED, 1800)
    clock.now += 1799
    assert not breaker.usable()
    clock.now += 1
    assert breaker.usable()


def test_a_trial_is_a_success_at_its_commit_point_and_its_later_break_one_failure(breaker, clock):
    open_and_wait(breaker, clock)
    permit, change = breaker.commit(breaker.acquire())
    assert change == Change(Event.CLOSED)
    assert permit.kind is Pass.ORDINARY
    breaker.settle(permit, Outcome.FAILURE)
    assert breaker.usable()
    fail(breaker, 2)
    assert not breaker.usable()


def test_an_ordinary_permit_is_no_success_at_its_commit_point(breaker):
    fail(breaker, 2)
    permit, change = breaker.commit(breaker.acquire())
    assert change is None
    breaker.settle(permit, Outcome.FAILURE)
    assert not breaker.usable()


def test_a_late_result_from_before_the_opening_is_dropped(breaker, clock):
    late = [breaker.acquire() for _ in range(3)]
    open_and_wait(breaker, clock)
    for permit in late[:2]:
        breaker.settle(permit, Outcome.FAILURE)
    assert breaker.usable()
    breaker.settle(late[2], Outcome.SUCCESS)
    assert breaker.acquire().kind is Pass.TRIAL


def test_a_late_result_from_before_the_closing_is_dropped(breaker, clock):
    late = breaker.acquire()
    open_and_wait(breaker, clock)
    breaker.settle(breaker.acquire(), Outcome.SUCCESS)
    fail(breaker, 2)
    breaker.settle(late, Outcome.FAILURE)
    assert breaker.usable()


def test_a_last_resort_success_closes_it(breaker):
    fail(breaker, 3)
    permit = breaker.acquire_last_resort()
    assert permit.kind is Pass.LAST_RESORT
    assert breaker.settle(permit, Outcome.SUCCESS) == Change(Event.CLOSED)
    assert breaker.usable()


def test_a_last_resort_failure_changes_nothing(breaker, clock):
    fail(breaker, 3)
    clock.now += 1000
    breaker.settle(breaker.acquire_last_resort(), Outcome.FAILURE)
    breaker.back_off(breaker.acquire_last_resort(), 1800)
    clock.now += 800
    assert breaker.usable()


def test_a_last_resort_attempt_leaves_the_running_trial_alone(breaker, clock):
    open_and_wait(breaker, clock)
    breaker.acquire()
    breaker.settle(breaker.acquire_last_resort(), Outcome.FAILURE)
    assert breaker.acquire() is None


def test_a_backoff_lasts_as_long_as_asked_and_counts_nothing(breaker, clock):
    fail(breaker, 2)
    assert breaker.back_off(breaker.acquire(), 20) == Change(Event.BACKED_OFF, 20)
    assert not breaker.usable()
    assert breaker.due() == clock.now + 20
    clock.now += 20
    assert breaker.acquire().kind is Pass.ORDINARY
    fail(breaker)
    assert not breaker.usable()


def test_a_backoff_lasts_no_longer_than_the_cooldown(breaker, clock):
    breaker.back_off(breaker.acquire(), 1e9)
    clock.now += 1800
    assert breaker.usable()


def test_of_two_backoffs_the_later_end_wins(breaker, clock):
    first, second = breaker.acquire(), breaker.acquire()
    breaker.back_off(first, 30)
    breaker.back_off(second, 10)
    clock.now += 29
    assert not breaker.usable()
    clock.now += 1
    assert breaker.usable()


def test_a_trial_that_met_a_backoff_is_tried_again_after_it(breaker, clock):
    open_and_wait(breaker, clock)
    breaker.back_off(breaker.acquire(), 5)
    assert not breaker.usable()
    clock.now += 5
    assert breaker.acquire().kind is Pass.TRIAL


def test_a_backoff_of_no_seconds_is_none(breaker):
    assert breaker.back_off(breaker.acquire(), 0) is None
    assert breaker.usable()


def test_a_timeout_counts_as_a_failure(breaker):
    for _ in range(3):
        breaker.settle(breaker.acquire(), Outcome.TIMEOUT)
    assert not breaker.usable()


def test_a_timeout_does_not_count_if_another_attempt_succeeded_while_it_ran(breaker):
    for _ in range(5):
        slow, other = breaker.acquire(), breaker.acquire()
        breaker.settle(other, Outcome.SUCCESS)
        breaker.settle(slow, Outcome.TIMEOUT)
    assert breaker.circuit().failures == 0


def test_a_success_from_before_a_timed_out_attempt_began_does_not_excuse_it(breaker):
    breaker.settle(breaker.acquire(), Outcome.SUCCESS)
    breaker.settle(breaker.acquire(), Outcome.TIMEOUT)
    assert breaker.circuit().failures == 1
