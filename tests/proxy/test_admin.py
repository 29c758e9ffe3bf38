"""What those who run the proxy ask it: is it alive, is it ready; answered in time whatever else goes on."""

import base64
import contextlib
import signal
import statistics
import threading
import time

import pytest
from fakes import Clock, RawClient, error, events, message_events

from aiproxy.app import create_app
from aiproxy.config import ClientKey, Config, Secret, UpstreamSettings

ASK = {"model": "claude-x", "messages": [{"role": "user", "content": "Hi"}]}
SPOKEN = message_events(["one", "two"])
STREAMS = 248


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
    app = app_of(upstream(), api_keys=(ClientKey("alice", (Secret("sk-test-alice"),)),))
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
        "no upstream is usable: all circuits are open or in backoff, the first for 1800 s more",
    )
    assert look(app, "/healthz") == (200, "ok")
    clock.now += 1800  # half-open: the next request is the trial
    assert look(app, "/readyz")[0] == 200


def test_an_upstream_in_backoff_is_not_ready_until_its_time(upstream):
    clock = Clock()
    app = app_of(upstream(error(503, headers=[("retry-after", "20")])), clock=clock)
    app.test_client().post("/v1/messages", json=ASK)
    assert look(app, "/readyz")[0] == 503
    clock.now += 20
    assert look(app, "/readyz")[0] == 200


def test_a_drained_upstream_gets_no_request_not_even_as_the_last_resort(upstream):
    a, b = upstream(), upstream(*[error(500)] * 3)
    app = app_of(a, b)
    drained = app.extensions["aiproxy"].runtime.balancer.upstreams[0]
    drained.draining = True
    assert [app.test_client().post("/v1/messages", json=ASK).status_code for _ in range(4)] == [500] * 3 + [
        200
    ]
    assert (len(a.seen), len(b.seen)) == (0, 4)
    for other in app.extensions["aiproxy"].runtime.balancer.upstreams:
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
    assert statistics.median(took) < 0.5, took


# ------------------------------------------------------------------------------------- the status page


ADMIN = Secret("sk-test-admin")


def basic(password, user="anyone"):
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def press(app, upstream, action, **headers):
    """Press a button of the page, as a browser would unless headers say otherwise."""
    sent = {"origin": "http://localhost", **basic(ADMIN), **headers}
    return app.test_client().post("/status", data={"upstream": upstream, "action": action}, headers=sent)


def facts(app):
    headers = {"accept": "application/json", **basic(ADMIN)}
    return app.test_client().get("/status", headers=headers).get_json()


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_an_admin_key_there_is_no_page(upstream, method):
    app = app_of(upstream(), api_keys=(ClientKey("alice", (Secret("sk-test-alice"),)),))
    reply = app.test_client().open("/status", method=method, headers=basic("sk-test-alice"))
    assert (reply.status_code, reply.get_json()["error"]["type"]) == (404, "not_found_error")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        basic(""),
        basic("sk-test-admi"),
        basic("sk-test-\u00e4dmin"),
        {"authorization": "Basic"},
        {"authorization": "Basic \u00e4"},
        {"authorization": "Bearer sk-test-admin"},
        {"x-api-key": "sk-test-admin"},
        basic("sk-test-alice"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_the_admin_key_as_password_it_is_not_shown(upstream, method, headers):
    app = app_of(upstream(), admin_key=ADMIN, api_keys=(ClientKey("alice", (Secret("sk-test-alice"),)),))
    sent = {"origin": "http://localhost", **headers}
    reply = app.test_client().open(
        "/status", method=method, headers=sent, data={"upstream": "a", "action": "drain"}
    )
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"].startswith('Basic realm="aiproxy"')
    assert facts(app)["upstreams"][0]["state"] == "closed"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "text/html"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html"),
        ("application/json, text/html;q=0.5", "application/json"),
        ("image/png", "text/html"),
    ],
)
def test_it_is_a_page_or_the_same_as_json_by_accept(upstream, accept, kind):
    app = app_of(upstream(), admin_key=ADMIN)
    headers = {**basic(ADMIN), **({"accept": accept} if accept else {})}
    reply = app.test_client().get("/status", headers=headers)
    assert (reply.status_code, reply.mimetype) == (200, kind)
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
    assert reply.headers["cache-control"] == "no-store"


def test_page_and_json_tell_the_same_facts_and_no_secret(upstream):
    a, b = upstream(), upstream(*[error(500, message="<script>busy sk-test-a</script>")] * 3)
    app = app_of(a, b, admin_key=ADMIN)
    ask = app.test_client()
    for _ in range(6):
        assert ask.post("/v1/messages", json=ASK).status_code == 200
    told = facts(app)
    first, second = told["upstreams"]
    assert (first["name"], first["state"], first["answers"], first["traffic_share"]) == (
        "a",
        "closed",
        6,
        1.0,
    )
    assert first["first_byte"] > 0
    assert (second["state"], second["failures"], second["failures_in_a_row"]) == ("open", 3, 3)
    assert 1790 < second["tried_again_in"] <= 1800
    assert [failure["reason"] for failure in second["last_failures"]] == [
        "status 500: <script>busy [redacted]</script>"
    ] * 3
    assert sum(minute["failures"] for minute in second["minutes"]) == 3
    page = ask.get("/status", headers=basic(ADMIN)).get_data(as_text=True)
    assert "3 failures in a row; tried again in 30 min" in page
    assert "&lt;script&gt;busy [redacted]&lt;/script&gt;" in page
    assert "<script" not in page
    assert "sk-test" not in page + str(told)


def test_a_broken_stream_is_a_failure_with_its_reason(upstream):
    app = app_of(upstream(events(SPOKEN[:5], then="cut")), admin_key=ADMIN)
    with pytest.raises(ConnectionAbortedError):
        _ = app.test_client().post("/v1/messages", json={**ASK, "stream": True}).data
    (row,) = facts(app)["upstreams"]
    assert (row["attempts"], row["answers"], row["failures"]) == (1, 1, 1)
    assert row["last_failures"][0]["reason"].startswith("broke off in the middle: ")


def test_a_drained_upstream_s_circuit_is_told_too(upstream):
    app = app_of(upstream(*[error(500)] * 3), upstream(), admin_key=ADMIN)
    for _ in range(6):
        app.test_client().post("/v1/messages", json=ASK)
    press(app, "a", "drain")
    first, second = facts(app)["upstreams"]
    assert (first["state"], first["circuit"], first["weight_share"]) == ("draining", "open", 0)
    assert second["weight_share"] == 1
    page = app.test_client().get("/status", headers=basic(ADMIN)).get_data(as_text=True)
    assert "circuit open for 30 min more" in page
    press(app, "a", "close")
    assert (facts(app)["upstreams"][0]["state"], facts(app)["upstreams"][0]["circuit"]) == (
        "draining",
        "closed",
    )


def test_its_buttons_do_what_they_say(upstream):
    a, b = upstream(*[error(500)] * 3), upstream()
    app = app_of(a, b, admin_key=ADMIN)
    ask = app.test_client()
    for _ in range(6):
        ask.post("/v1/messages", json=ASK)
    assert facts(app)["upstreams"][0]["state"] == "open"
    reply = press(app, "a", "close")
    assert (reply.status_code, reply.headers["location"]) == (303, "/status")
    assert facts(app)["upstreams"][0]["state"] == "closed"
    press(app, "b", "drain")
    assert facts(app)["upstreams"][1]["state"] == "draining"
    served_by = [ask.post("/v1/messages", json=ASK).headers["x-aiproxy-upstream"] for _ in range(4)]
    assert served_by == ["a"] * 4
    press(app, "b", "resume")
    served_by = [ask.post("/v1/messages", json=ASK).headers["x-aiproxy-upstream"] for _ in range(4)]
    assert set(served_by) == {"a", "b"}


@pytest.mark.parametrize(
    "form",
    [{}, {"upstream": "a"}, {"upstream": "a", "action": "delete"}, {"upstream": "z", "action": "drain"}],
)
def test_a_form_that_makes_no_sense_changes_nothing(upstream, form):
    app = app_of(upstream(), admin_key=ADMIN)
    headers = {"origin": "http://localhost", **basic(ADMIN)}
    assert app.test_client().post("/status", data=form, headers=headers).status_code == 400
    assert facts(app)["upstreams"][0]["state"] == "closed"


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "null",
        "http://evil.example",
        "http://localhost.evil.example",
        "http://localhost:81",
        "https://localhost",
    ],
)
def test_a_form_of_another_page_changes_nothing(upstream, origin):
    app = app_of(upstream(), admin_key=ADMIN)
    reply = press(app, "a", "drain", origin=origin)
    assert (reply.status_code, reply.get_json()["error"]["type"]) == (403, "permission_error")
    without = {"data": {"upstream": "a", "action": "drain"}, "headers": basic(ADMIN)}
    assert app.test_client().post("/status", **without).status_code == 403
    assert facts(app)["upstreams"][0]["state"] == "closed"


def test_a_wrong_password_is_told_in_the_log(upstream, capsys):
    app = app_of(upstream(), admin_key=ADMIN)
    assert app.test_client().get("/status", headers=basic("sk-test-guess")).status_code == 401
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " refused " in line]
    assert "status=401" in line
    assert "guess" not in line


def test_a_failure_of_another_day_is_shown_with_its_date(upstream, monkeypatch):
    now = 1_800_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    app = app_of(upstream(error(529)), admin_key=ADMIN)
    app.test_client().post("/v1/messages", json=ASK)
    now += 3 * 24 * 3600
    page = app.test_client().get("/status", headers=basic(ADMIN)).text
    assert "<time>2027-01-15 08:00:00 UTC</time>" in page


def test_after_five_wrong_passwords_an_address_must_wait(upstream):
    app = app_of(upstream(), admin_key=ADMIN)
    ask = app.test_client()
    statuses = [ask.get("/status", headers=basic("wrong")).status_code for _ in range(6)]
    assert statuses == [401] * 5 + [429]
    reply = ask.get("/status", headers=basic(ADMIN))
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
    other = {"environ_overrides": {"REMOTE_ADDR": "127.0.0.2"}, "headers": basic(ADMIN)}
    assert ask.get("/status", **other).status_code == 200
    figures = ask.get("/metrics").get_data(as_text=True)
    assert 'aiproxy_refused_total{client="unknown",reason="authentication_error"} 5.0' in figures
