"""Places in flight of a client key, counted over several processes by the shared state."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
from redis_server import RedisServer

from aiproxy.config import Secret, StateUrl
from aiproxy.upstreams import shared_state
from aiproxy.upstreams.local_state import LocalStore
from aiproxy.upstreams.redis_state import RedisStore
from aiproxy.upstreams.shared_state import SharedState, State

LIMIT, PROCESSES, THREADS = 5, 4, 13
LIVES = 2.5  # seconds for which a worker counts that writes nothing any more


@pytest.fixture(autouse=True)
def short_lives(monkeypatch):
    monkeypatch.setattr(shared_state, "SNAPSHOT", LIVES)


@pytest.fixture(params=["sqlite", "redis"])
def store(request, tmp_path):
    """Makes a store of the same state in each process."""
    if request.param == "sqlite":
        return lambda: LocalStore(str(tmp_path))
    server = request.getfixturevalue("redis_server")
    return lambda: RedisStore(StateUrl(Secret(server.url)))


@pytest.fixture
def redis_server(tmp_path):
    with RedisServer(tmp_path) as server:
        yield server


def started(store):
    state = SharedState(store(), "one")
    state.start(lambda: b"null", lambda rows: b"null", lambda: True)
    return state


def compete(store, together, most, times):
    """Take and give back places in many threads; `most` is the largest number that was held at a time."""
    state = started(store)

    def work():
        for _ in range(times):
            if not state.acquire_place("alice", LIMIT):
                time.sleep(0.05)  # as a request that waits does
                continue
            with together.get_lock():
                together.value += 1
                most.value = max(most.value, together.value)
            time.sleep(0.01)
            with together.get_lock():
                together.value -= 1
            state.release_place("alice")

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state.stop()


def test_no_more_than_the_limit_are_held_by_all_processes_together(store):
    context = multiprocessing.get_context("fork")
    together, most = context.Value("i", 0), context.Value("i", 0)
    processes = [
        context.Process(target=compete, args=(store, together, most, 25), daemon=True)
        for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (most.value, together.value) == (LIMIT, 0)
    state = started(store)  # all of them came back
    assert [state.acquire_place("alice", LIMIT) for _ in range(LIMIT + 1)] == [True] * LIMIT + [False]
    state.stop()


def hold(store, ready):
    state = started(store)
    assert state.acquire_place("alice", 1)
    ready.set()
    time.sleep(60)


def test_the_places_of_a_killed_process_come_back(store):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(store, ready), daemon=True)
    process.start()
    assert ready.wait(10)
    state = started(store)
    assert not state.acquire_place("alice", 1)
    assert state.acquire_place("bob", 1)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    ends = time.monotonic() + LIVES + 3
    while not state.acquire_place("alice", 1):
        assert time.monotonic() < ends
        time.sleep(0.1)
    state.stop()


def test_a_place_that_is_held_for_long_stays_taken(store):
    one, other = started(store), started(store)
    assert one.acquire_place("alice", 1)
    ends = time.monotonic() + LIVES + 1
    while time.monotonic() < ends:
        assert not other.acquire_place("alice", 1)
        time.sleep(0.2)
    one.release_place("alice")
    ends = time.monotonic() + 1
    while not other.acquire_place("alice", 1):
        assert time.monotonic() < ends
        time.sleep(0.02)
    one.stop()
    other.stop()


def test_without_the_store_every_process_counts_for_itself(tmp_path):
    (tmp_path / "file").touch()
    state = started(lambda: LocalStore(str(tmp_path / "file" / "nowhere")))
    assert [state.acquire_place("alice", 2) for _ in range(3)] == [True, True, False]
    state.release_place("alice")
    assert state.acquire_place("alice", 2)
    state.stop()


def test_a_worker_by_itself_counts_by_key():
    state = State()
    assert [state.acquire_place("alice", 1), state.acquire_place("alice", 1)] == [True, False]
    assert state.acquire_place("bob", 1)
    state.release_place("alice")
    assert state.acquire_place("alice", 1)
