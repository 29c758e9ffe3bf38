"""Backoffs and missing models of one upstream, on a clock that only moves when told."""

import pytest
from fakes import Clock

from aiproxy.upstreams.models import MOST_MODELS, ModelStates


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def models(clock):
    return ModelStates(cooldown=1800, clock=clock)


def limited(models, clock, seconds=None):
    """A 429 to an attempt that begins now; how long the backoff lasts."""
    return models.back_off("m", seconds, clock.now, is_last_resort=False)


@pytest.mark.parametrize(("asked", "lasts"), [(20, 20), (0.2, 1), (1e9, 1800)])
def test_a_backoff_lasts_as_the_upstream_says_within_bounds(models, clock, asked, lasts):
    limited(models, clock, asked)
    clock.now += lasts - 0.1
    assert not models.usable("m")
    assert models.usable("other")
    clock.now += 0.1
    assert models.usable("m")


def test_without_a_length_it_begins_with_two_seconds_and_doubles_to_five_minutes(models, clock):
    lengths = []
    for _ in range(10):
        lengths.append(limited(models, clock))
        clock.now += lengths[-1]
    assert lengths == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_attempts_that_ran_side_by_side_double_nothing(models, clock):
    began = clock.now
    for _ in range(50):
        assert models.back_off("m", None, began, is_last_resort=False) == 2
    clock.now += 2
    assert limited(models, clock) == 4


def test_a_last_resort_doubles_nothing(models, clock):
    limited(models, clock)
    clock.now += 1
    assert models.back_off("m", None, clock.now, is_last_resort=True) == 1
    clock.now += 1
    assert limited(models, clock) == 4


def test_a_success_ends_the_backoff_and_the_doubling(models, clock):
    limited(models, clock)
    clock.now += 2
    limited(models, clock)
    models.succeeded("m", clock.now)
    assert models.usable("m")
    assert limited(models, clock) == 2


def test_a_success_of_an_attempt_from_before_the_backoff_ends_nothing(models, clock):
    began = clock.now
    clock.now += 1
    limited(models, clock, 20)
    models.succeeded("m", began)
    assert not models.usable("m")


def test_of_two_backoffs_the_later_end_wins(models, clock):
    limited(models, clock, 30)
    limited(models, clock, 10)
    assert models.due("m") == clock.now + 30


def test_three_answers_in_a_row_that_a_model_is_missing_skip_it_for_the_cooldown(models, clock):
    assert [models.missing("m") for _ in range(3)] == [False, False, True]
    assert not models.usable("m")
    assert models.usable("other")
    clock.now += 1800
    assert models.usable("m")


def test_only_a_success_of_this_model_starts_the_count_again(models, clock):
    models.missing("m")
    models.missing("m")
    models.succeeded("other", clock.now)
    assert models.missing("m")
    models.succeeded("m", clock.now)
    assert [models.missing("m"), models.missing("m")] == [False, False]


def test_the_number_of_models_that_are_remembered_is_bounded(models, clock):
    limited(models, clock, 100)
    for number in range(MOST_MODELS):
        models.missing(f"invented-{number}")
    assert models.usable("m")


def test_a_person_can_end_all_of_it(models, clock):
    limited(models, clock, 100)
    models.clear()
    assert models.usable("m")


def test_a_missing_model_is_told_from_one_in_backoff_until_another_reason_comes(models, clock):
    for _ in range(3):
        models.missing("m")
    models.back_off("other", 100, clock.now, is_last_resort=False)
    assert models.not_there() == ["m"]
    models.follow({"m": 1800, "other": 100})  # the other workers know of the backoffs, not of their reasons
    assert (models.not_there(), set(models.backoffs())) == (["m"], {"m", "other"})
    clock.now += 1800
    assert models.not_there() == []
    models.follow({"m": 20})  # another worker's 429
    assert (models.not_there(), models.backoffs()) == ([], {"m": 20})
