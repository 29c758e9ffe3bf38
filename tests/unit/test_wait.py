"""What ends a wait: the upstream's socket, the client's hang-up, the worker's shutdown, and limits."""

import contextlib
import os
import select
import socket
import threading
import time

import pytest
from clients import Leaving, unwatched

from aiproxy.policy import Fault
from aiproxy.transport.wait import (
    ClientLeft,
    ConnectTimeout,
    DeadlineExceeded,
    Shutdown,
    ShuttingDown,
    Silent,
    Wait,
)


@pytest.fixture
def pair():
    """Two ends of a connection, the first the upstream's."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(end) for end in socket.socketpair()]


@pytest.fixture
def shutdown():
    with contextlib.closing(Shutdown()) as one:
        yield one


def readable(wait, pair):
    wait.until(pair[1].fileno(), select.POLLIN)


def seconds_until(expected, act, *arguments):
    began = time.monotonic()
    with pytest.raises(expected):
        act(*arguments)
    return time.monotonic() - began


def test_a_wait_ends_when_the_upstream_is_ready(pair):
    pair[0].send(b"x")
    readable(unwatched(), pair)


def test_a_wait_ends_with_an_upstream_that_is_reset(pair):
    pair[0].close()
    readable(unwatched(), pair)  # the read that follows says what happened


@pytest.mark.parametrize("way", [socket.SHUT_WR, socket.SHUT_RDWR], ids=["stops sending", "leaves"])
def test_a_client_that_leaves_or_stops_sending_ends_the_wait_and_the_request(pair, way):
    here, there = socket.socketpair()
    with here, there, contextlib.closing(Shutdown()) as shutdown:
        wait = Wait(here, shutdown)
        there.shutdown(way)
        assert seconds_until(ClientLeft, readable, wait, pair) < 5
        assert wait.ended is Fault.CLIENT_LEFT


def test_it_does_so_while_the_upstream_has_data(pair):
    pair[0].send(b"x")
    with Leaving() as client:
        client.leave()
        with pytest.raises(ClientLeft):
            readable(client.wait, pair)


def test_what_the_client_sends_meanwhile_ends_nothing(pair):
    here, there = socket.socketpair()
    with here, there, contextlib.closing(Shutdown()) as shutdown:
        wait = Wait(here, shutdown)
        there.send(b"the next request")
        wait.limit(total=0.05)
        with pytest.raises(DeadlineExceeded):
            readable(wait, pair)


def test_shutdown_ends_waits_that_run_and_those_that_begin_later(pair, shutdown):
    running, later = Wait(None, shutdown), Wait(None, shutdown)
    timer = threading.Timer(0.05, shutdown.end_waits)
    timer.start()
    assert seconds_until(ShuttingDown, readable, running, pair) < 5
    assert seconds_until(ShuttingDown, readable, later, pair) < 5
    assert (running.ended, later.ended) == (Fault.RESTART, Fault.RESTART)
    timer.join()


class Timer:
    """Stands in for `threading.Timer`: notes what it is asked."""

    def __init__(self, seconds, act):
        self.seconds, self.act = seconds, act
        self.asked = []

    def start(self):
        self.asked.append("start")

    def cancel(self):
        self.asked.append("cancel")


@pytest.mark.parametrize(("graceful", "ends_after"), [(30, 28), (4, 2), (0.2, 0.1)])
def test_a_stopping_worker_ends_waits_two_seconds_before_its_end_or_halfway(
    monkeypatch, graceful, ends_after
):
    made = []
    monkeypatch.setattr("threading.Timer", lambda *given: made.append(Timer(*given)) or made[-1])
    shutdown = Shutdown()
    shutdown.begin(graceful)
    shutdown.close()
    (timer,) = made
    assert (timer.seconds, timer.act, timer.asked) == (ends_after, shutdown.end_waits, ["start", "cancel"])


def test_workers_share_no_shutdown(pair):
    """It is made at its first use, after the fork."""
    shutdown = Shutdown()
    before = len(os.listdir("/proc/self/fd"))
    first = shutdown.fileno()
    assert (shutdown.fileno(), len(os.listdir("/proc/self/fd"))) == (first, before + 1)
    shutdown.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_total_is_not_prolonged_by_events(pair):
    wait = unwatched()
    wait.limit(total=0.1, silence=5)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        while True:
            pair[0].send(b"x")
            readable(wait, pair)
            pair[1].recv(1)
            wait.renew()
    assert 0.1 <= time.monotonic() - began < 5


def test_silence_is_renewed_by_events_alone(pair):
    wait = unwatched()
    wait.limit(silence=0.1)
    pair[0].send(b"x" * 1000)
    began = time.monotonic()
    with pytest.raises(Silent):
        while True:
            readable(wait, pair)  # bytes come all the time, and no event
            pair[1].recv(1)
            time.sleep(0.001)
    assert 0.1 <= time.monotonic() - began < 5


def test_silence_does_not_count_what_passes_between_a_renewal_and_the_next_wait(pair):
    wait = unwatched()
    wait.limit(silence=0.1)
    wait.renew()
    time.sleep(0.15)  # the client took its time
    pair[0].send(b"x")
    readable(wait, pair)


def test_the_earliest_limit_ends_the_wait(pair):
    wait = unwatched()
    wait.limit(total=60, silence=60)
    wait.connect_by = time.monotonic() + 0.02
    assert seconds_until(ConnectTimeout, readable, wait, pair) < 5


def test_a_new_limit_takes_the_place_of_the_old(pair):
    wait = unwatched()
    wait.limit(total=0.01, silence=0.01)
    wait.limit()
    time.sleep(0.02)
    pair[0].send(b"x")
    readable(wait, pair)


def test_a_check_raises_what_a_wait_would(pair, shutdown):
    with Leaving() as client:
        client.wait.check()
        pair[0].send(b"x")
        readable(client.wait, pair)
        client.wait.check()  # that the upstream is ready ends nothing
        client.leave()
        with pytest.raises(ClientLeft):
            client.wait.check()
    wait = Wait(None, shutdown)
    wait.limit(total=0.0)
    with pytest.raises(DeadlineExceeded):
        wait.check()
    wait.limit()
    shutdown.end_waits()
    with pytest.raises(ShuttingDown):
        wait.check()


def test_a_released_descriptor_ends_nothing_any_more(pair):
    wait, (ours, theirs) = unwatched(), socket.socketpair()
    with ours, theirs:
        ours.send(b"x")
        wait.until(theirs.fileno(), select.POLLIN)
        wait.release()
        wait.limit(total=0.02)
        with pytest.raises(DeadlineExceeded):
            readable(wait, pair)


@pytest.mark.parametrize("may_leave", [False, True])
def test_waiting_for_the_client_itself_ends_with_it(pair, shutdown, may_leave):
    wait = Wait(pair[1], shutdown)
    assert seconds_until(Silent, wait.for_client, select.POLLIN, 0.02, may_leave) < 5
    pair[0].send(b"x")
    wait.for_client(select.POLLIN, 1, may_leave)
    pair[0].shutdown(socket.SHUT_WR)
    if may_leave:  # what it sent before is still to be read
        wait.for_client(select.POLLIN, 1, may_leave)
    else:
        with pytest.raises(ClientLeft):
            wait.for_client(select.POLLIN, 1, may_leave)
    shutdown.end_waits()
    with pytest.raises(ShuttingDown):
        wait.for_client(select.POLLIN, 1, may_leave)
