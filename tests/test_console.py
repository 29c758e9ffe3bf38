"""What those who run the proxy ask it: is it alive, is it ready; answered in time whatever else goes on."""

import contextlib
import signal
import statistics
import threading
import time

import pytest
from fakes import RawClient, error, events, message_events

from aiproxy.app import create_app
from aiproxy.config import ClientKey, Config, UpstreamSettings

ASK = {"model": "claude-x", "messages": [{"role": "user", "content": "Hi"}]}
SPOKEN = message_events(["one", "two"])
STREAMS = 248


class Clock:
    """Monotonic seconds that stand still until a test moves them."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def app_of(*fakes, clock=time.monotonic, **settings):
    upstreams = tuple(
        UpstreamSettings(name=chr(ord("a") + n), base_url=fake.url, token="sk-test-a")
        for n, fake in enumerate(fakes)
    )
    return create_app(Config(upstreams=upstreams, **settings), clock)


def look(app, path):
    reply = app.test_client().get(path)
    return reply.status_code, reply.get_data(as_text=True).strip()


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_and_readiness_need_no_key(upstream, path):
    app = app_of(upstream(), api_keys=(ClientKey("alice", "sk-test-alice"),))
    assert look(app, path)[0] == 200


def test_ready_means_that_some_upstream_is_usable(upstream):
    clock = Clock()
    bad, other = upstream(*[error(500)] * 8), upstream(*[error(500)] * 3)
    app = app_of(bad, other, clock=clock)
    ask = app.test_client()
    for _ in range(3):
        assert look(app, "/readyz") == (200, "ready")
        ask.post("/v1/messages", json=ASK)
    assert look(app, "/readyz") == (
        503,
        "no upstream is usable: all circuits are open or resting, the first for 1800 s more",
    )
    assert look(app, "/healthz") == (200, "ok")
    clock.now += 1800  # half-open: the next request is the trial
    assert look(app, "/readyz")[0] == 200


def test_a_resting_upstream_is_not_ready_until_its_time(upstream):
    clock = Clock()
    app = app_of(upstream(error(529, headers=[("retry-after", "20")])), clock=clock)
    app.test_client().post("/v1/messages", json=ASK)
    assert look(app, "/readyz")[0] == 503
    clock.now += 20
    assert look(app, "/readyz")[0] == 200


def test_a_drained_upstream_gets_no_request_not_even_as_the_last_resort(upstream):
    a, b = upstream(), upstream(*[error(500)] * 3)
    app = app_of(a, b)
    drained = app.extensions["aiproxy"].doors.balancer.upstreams[0]
    drained.draining = True
    assert [app.test_client().post("/v1/messages", json=ASK).status_code for _ in range(4)] == [500] * 3 + [
        200
    ]
    assert (len(a.seen), len(b.seen)) == (0, 4)
    for other in app.extensions["aiproxy"].doors.balancer.upstreams:
        other.draining = True
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        reply = app.test_client().post(path, json=ASK)
        assert (reply.status_code, reply.get_json()["error"]["type"]) == (529, "overloaded_error")
    assert app.test_client().get("/v1/models").status_code == 529
    assert look(app, "/readyz") == (503, "every upstream is being drained")


def test_a_stopping_worker_is_alive_and_not_ready(upstream, serve, config_of):
    gate = threading.Event()
    served = serve(
        config_of([upstream(events([*SPOKEN[:5], gate, *SPOKEN[5:]]))]),
        gunicorn_args=["--graceful-timeout", "20"],
    )
    with RawClient.to(served.url) as streaming, RawClient.to(served.url) as asking:
        streaming.post({**ASK, "stream": True})
        next(streaming.answer().pieces())
        asking.request("GET", "/readyz")
        assert asking.read().status == 200
        served.process.send_signal(signal.SIGTERM)
        served.wait_for_stderr("Handling signal: term")
        ready = 200
        with contextlib.suppress(Exception):  # the kept connection is closed once it has been used
            while ready == 200:
                asking.request("GET", "/readyz")
                ready = asking.read().status
        assert ready == 503
        gate.set()


def test_probes_are_answered_in_time_beside_as_many_streams_as_may_be(upstream, serve, config_of):
    """248 streams of 5 deltas a second each, which their clients leave in the sockets' buffers."""
    fake = upstream(default=events([*SPOKEN[:3], *[SPOKEN[2], 0.2] * 100]))
    served = serve(config_of([fake]))
    with contextlib.ExitStack() as stack:
        for _ in range(STREAMS):
            stack.enter_context(RawClient.to(served.url)).post({**ASK, "stream": True})
        fake.wait_for(STREAMS, timeout=20)
        probe = stack.enter_context(RawClient.to(served.url))
        took = []
        for path in ["/healthz", "/readyz"] * 30:
            began = time.perf_counter()
            probe.request("GET", path)
            assert probe.read().status == 200
            took.append(time.perf_counter() - began)
            threading.Event().wait(0.02)
        busy = stack.enter_context(RawClient.to(served.url))
        busy.post(ASK)
        assert busy.read().status == 529  # all of them are running
    assert statistics.quantiles(took, n=20)[-1] < 0.05, took
