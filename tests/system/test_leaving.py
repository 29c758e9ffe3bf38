"""Clients that leave: their upstream's connection is closed within a second, and nothing is counted.

One gunicorn serves most tests; each starts the upstream it needs where that gunicorn looks for it.
"""

import contextlib
import os
import random
import threading
import time
from pathlib import Path

import pytest
from conftest import NOTHING_IS_SKIPPED, serving
from fakes import (
    ASK,
    HOST,
    SPOKEN,
    STREAM,
    RawClient,
    answer,
    blackhole,
    error,
    events,
    free_port,
    hang,
    later,
)

# Ten thousand requests in all where nothing may be left out; a twentieth of that in the daily run.
EACH, STAYING, LEAVING = (1250, 120, 60) if NOTHING_IS_SKIPPED else (62, 60, 30)
LEFT = r" done .*outcome=client_left "

SILENCES = {
    "before the head of a stream": (STREAM, hang()),
    "in the middle of a stream": (STREAM, events(SPOKEN[:5], then="hang")),
    "before a stream's first content": (STREAM, events(SPOKEN[:1], then="hang")),
    "while a whole answer is made": (ASK, hang()),
    "while a stream is collected": ({**ASK, "model": "claude-whole"}, events(SPOKEN[:5], then="hang")),
}
WAYS = {"close": RawClient.close, "reset": RawClient.reset, "half close": RawClient.half_close}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    """In front of one upstream, that must stream what is asked of `claude-whole`."""
    port = free_port()
    at = {"base_url": f"http://{HOST}:{port}", "token": "sk-test-a"}
    upstreams = [
        {"name": "a", "available_models": ["claude-x"], **at},
        {"name": "b", "available_models": ["claude-whole"], "must_stream": True, **at},
    ]
    config = {"breaker": {"failures": 10**6, "cooldown": 0}, "upstreams": upstreams}
    with serving(tmp_path_factory.mktemp("leaving"), config) as served:
        served.upstream_port = port
        yield served


@pytest.fixture
def at(upstream, proxy):
    """Start the upstream that the proxy asks."""
    return lambda *script, **options: upstream(*script, port=proxy.upstream_port, **options)


@contextlib.contextmanager
def asking(url, body):
    """A client that has asked and now waits."""
    with RawClient.to(url, timeout=10) as client:
        client.post(body)
        yield client


def left_within(fake, connection, client, way=RawClient.close):
    """Seconds from the client's leaving to the upstream's seeing the end of its connection."""
    began = time.monotonic()
    way(client)
    return fake.wait_left(connection, timeout=5) - began


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("silence", SILENCES.values(), ids=SILENCES)
def test_the_upstream_is_let_go_within_a_second_however_silent_it_is(proxy, at, silence, way):
    body, reply = silence
    a = at(default=reply)
    since = len(proxy.stdout_lines())
    with asking(proxy.url, body) as client:
        a.wait_for(1)
        assert left_within(a, 1, client, way) < 1
    proxy.wait_for_log(LEFT, since=since)


def test_a_client_that_only_closed_its_side_does_not_see_its_stream_end_well(proxy, at):
    at(events(SPOKEN[:5], then="hang"))
    since = len(proxy.stdout_lines())
    with asking(proxy.url, STREAM) as client:
        got = client.answer()
        next(got.pieces())
        client.half_close()
        assert got.read().ending in ("cut", "reset")
    proxy.wait_for_log(LEFT, since=since)


def test_leaving_counts_against_nobody_and_frees_the_place(upstream, serve, config_of):
    a = upstream(*[hang()] * 4, default=answer())
    served = serve(config_of([a], max_in_flight=2, breaker={"failures": 1}))
    for n in range(4):
        with asking(served.url, STREAM if n % 2 else ASK) as client:
            a.wait_for(n + 1)
            left_within(a, n + 1, client)
        served.wait_for_log(LEFT, since=len(served.stdout_lines()) - 1)
    with asking(served.url, ASK) as client:
        assert client.read().status == 200
    assert not [line for line in served.stdout_lines() if " circuit " in line]


def test_leaving_while_connecting_ends_the_request_and_asks_no_other(upstream, serve, config_of):
    other = upstream()
    with blackhole() as port:
        first = {"base_url": f"http://{HOST}:{port}", "weight": 9}
        served = serve(config_of([first, other], timeouts={"connect": 5}))
        with asking(served.url, ASK) as client:
            served.wait_for_log(r" request ")
            client.close()
        served.wait_for_log(LEFT, timeout=2)
    assert other.seen == []


def test_leaving_during_failover_ends_it(upstream, serve, config_of):
    a, b, c = upstream(default=error(500)), upstream(default=hang()), upstream()
    served = serve(config_of([{"base_url": a, "weight": 9}, {"base_url": b, "weight": 3}, c]))
    with asking(served.url, ASK) as client:
        b.wait_for(1)
        assert left_within(b, 1, client) < 1
    served.wait_for_log(LEFT)
    assert c.seen == []


def in_threads(work, arguments):
    threads = [threading.Thread(target=work, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_many_requests_leave_no_descriptor_and_no_watch_behind(upstream, serve, config_of):
    a = upstream(default=answer())
    served = serve(config_of([a], logging={"level": "error"}))
    worker = int(served.wait_for_stderr(r"Booting worker with pid: (\d+)")[1])
    descriptors = Path(f"/proc/{worker}/fd")

    def work(seed, requests):
        chance = random.Random(seed)
        with contextlib.ExitStack() as stack:
            client = None
            for _ in range(requests):
                client = client or stack.enter_context(RawClient.to(served.url, timeout=20))
                what = chance.random()
                client.post(b"{}" if what < 0.1 else STREAM if what < 0.4 else ASK)
                if chance.random() < 0.1:
                    client.close()
                    client = None
                else:
                    assert client.read().status in (200, 400)

    work(0, 100)
    before = settled(descriptors)
    in_threads(work, [(seed, EACH) for seed in range(1, 9)])
    # Kept connections to the upstream are as many as were busy at once; all else is given back.
    assert settled(descriptors) <= before + 2 * 8


def settled(descriptors):
    """How many there are, once their number no longer falls."""
    counts = [len(os.listdir(descriptors))]
    while len(counts) < 8 or counts[-1] < counts[-8]:
        threading.Event().wait(0.05)
        counts.append(len(os.listdir(descriptors)))
    return counts[-1]


def test_leaving_at_any_moment_hurts_nobody_else(upstream, serve, config_of):
    a = upstream(default=later(0.005, answer("mine", model=None)))
    served = serve(config_of([a], logging={"level": "error"}))
    wrong = []

    def leave(seed):
        chance = random.Random(seed)
        for _ in range(LEAVING):
            with asking(served.url, chance.choice([ASK, STREAM])):
                threading.Event().wait(chance.random() * 0.012)

    def stay(seed):
        with RawClient.to(served.url, timeout=20) as client:
            for n in range(STAYING):
                name = f"model-{seed}-{n}"
                client.post({**ASK, "model": name})
                got = client.read()
                if got.status != 200 or got.json()["model"] != name:
                    wrong.append((name, got.status, got.body))

    in_threads(lambda work, seed: work(seed), [(work, seed) for work in (leave, stay) for seed in range(6)])
    assert wrong == []
