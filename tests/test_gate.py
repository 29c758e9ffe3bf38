"""The gate: so many requests in flight, one more is turned away, and no place is lost or given out twice."""

import sys
import threading

import pytest

from aiproxy.app import create_app
from aiproxy.config import Config, UpstreamSettings
from aiproxy.server.gate import SPARE, Gate
from aiproxy.server.service import DEFAULT_THREADS


def gate_of(limit):
    return Gate(limit)


def taken(gate):
    """Take all places that are left."""
    return list(iter(gate.enter, None))


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_as_many_are_let_in_as_configured_and_then_none(limit):
    gate = gate_of(limit)
    assert [gate.enter() is not None for _ in range(limit + 2)] == [True] * limit + [False] * 2


def test_a_place_that_was_left_is_given_out_again():
    gate = gate_of(2)
    first, second = taken(gate)
    first.leave()
    assert len(taken(gate)) == 1
    second.leave()
    assert len(taken(gate)) == 1


def test_leaving_twice_is_leaving_once():
    gate = gate_of(2)
    first, second = taken(gate)
    for _ in range(3):
        first.leave()
    third = gate.enter()
    assert gate.enter() is None
    first.leave()  # its place is another's by now
    assert gate.enter() is None
    second.leave()
    third.leave()
    assert len(taken(gate)) == 2


def test_one_that_was_turned_away_took_no_place():
    gate = gate_of(1)
    slot = gate.enter()
    for _ in range(5):
        assert gate.enter() is None
    slot.leave()
    assert len(taken(gate)) == 1


@pytest.mark.parametrize(
    ("threads", "places"), [(256, 248), (16, 8), (10, 2), (9, 1), (8, 1), (2, 1), (1, 1)]
)
def test_without_a_limit_of_its_own_some_threads_are_kept_free_and_one_request_is_let_in(threads, places):
    gate = gate_of(None)
    gate.serve_with(threads)
    assert len(taken(gate)) == places == max(1, threads - SPARE)


@pytest.mark.parametrize("threads", [1, 4, 10, 256])
def test_a_configured_limit_stays_whatever_the_threads(threads):
    gate = gate_of(3)
    gate.serve_with(threads)
    assert len(taken(gate)) == 3


def test_before_it_is_told_how_many_threads_serve_it_one_is_let_in():
    assert len(taken(gate_of(None))) == 1


def test_who_is_inside_stays_when_the_limit_is_told_late():
    gate = gate_of(None)
    slot = gate.enter()
    gate.serve_with(SPARE + 3)
    assert len(taken(gate)) == 2
    slot.leave()
    assert len(taken(gate)) == 1


@pytest.mark.parametrize(("limit", "places"), [(None, DEFAULT_THREADS - SPARE), (5, 5)])
def test_an_application_has_the_configured_gate(limit, places):
    upstream = UpstreamSettings(name="a", base_url="demo://answers", token="sk-test-a")
    app = create_app(Config(upstreams=(upstream,), max_in_flight=limit))
    assert len(taken(app.extensions["aiproxy"]._gate)) == places


def test_threads_never_exceed_the_limit_and_lose_no_place():
    gate = gate_of(3)
    inside, highest, turned_away = [], [], []
    start = threading.Barrier(8)

    def come_and_go():
        start.wait()
        for _ in range(1000):
            slot = gate.enter()
            if slot is None:
                turned_away.append(1)
                continue
            inside.append(1)
            highest.append(len(inside))
            inside.pop()
            slot.leave()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=come_and_go) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert max(highest) <= 3
    assert len(highest) + len(turned_away) == 8000
    assert len(taken(gate)) == 3
