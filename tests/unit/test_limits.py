"""Requests in flight: so many, one more is turned away, and no place is lost or given out twice."""

import sys
import threading

import pytest

from aiproxy.app import create_app
from aiproxy.config import Config, UpstreamSettings
from aiproxy.server.limits import SPARE, InFlight
from aiproxy.server.runtime import DEFAULT_THREADS


def gate_of(limit):
    return InFlight(limit)


def taken(in_flight):
    """Take all places that are left."""
    return list(iter(in_flight.acquire, None))


@pytest.mark.parametrize("limit", [1, 7])
def test_as_many_are_let_in_as_configured_and_a_place_is_given_out_again(limit):
    in_flight = gate_of(limit)
    places = taken(in_flight)
    assert len(places) == limit
    for _ in range(3):
        assert in_flight.acquire() is None  # one that is turned away takes no place
    places[0].release()
    assert len(taken(in_flight)) == 1


def test_leaving_twice_is_leaving_once():
    in_flight = gate_of(2)
    first, second = taken(in_flight)
    for _ in range(3):
        first.release()
    third = in_flight.acquire()
    assert in_flight.acquire() is None
    first.release()  # its place is another's by now
    assert in_flight.acquire() is None
    second.release()
    third.release()
    assert len(taken(in_flight)) == 2


@pytest.mark.parametrize(
    ("threads", "places"), [(256, 248), (16, 8), (10, 2), (9, 1), (8, 1), (2, 1), (1, 1)]
)
def test_without_a_limit_of_its_own_some_threads_are_kept_free_and_one_request_is_let_in(threads, places):
    in_flight = gate_of(None)
    in_flight.set_threads(threads)
    assert len(taken(in_flight)) == places == max(1, threads - SPARE)


@pytest.mark.parametrize("threads", [1, 256])
def test_a_configured_limit_stays_whatever_the_threads(threads):
    in_flight = gate_of(3)
    in_flight.set_threads(threads)
    assert len(taken(in_flight)) == 3


def test_who_is_inside_stays_when_the_limit_is_told_late():
    in_flight = gate_of(None)
    place = in_flight.acquire()
    in_flight.set_threads(SPARE + 3)
    assert len(taken(in_flight)) == 2
    place.release()
    assert len(taken(in_flight)) == 1


@pytest.mark.parametrize(("limit", "places"), [(None, DEFAULT_THREADS - SPARE), (5, 5)])
def test_an_application_has_the_configured_gate(limit, places):
    upstream = UpstreamSettings(name="a", base_url="demo://answers", token="sk-test-a")
    app = create_app(Config(upstreams=(upstream,), max_in_flight=limit))
    assert len(taken(app.extensions["aiproxy"].runtime.in_flight)) == places


def test_threads_never_exceed_the_limit_and_lose_no_place():
    in_flight = gate_of(3)
    inside, highest, turned_away = [], [], []
    start = threading.Barrier(8)

    def come_and_go():
        start.wait()
        for _ in range(1000):
            place = in_flight.acquire()
            if place is None:
                turned_away.append(1)
                continue
            inside.append(1)
            highest.append(len(inside))
            inside.pop()
            place.release()

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
    assert len(taken(in_flight)) == 3
