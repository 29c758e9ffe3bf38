"""What workers share, by either store: each test has workers of its own, and a real file or server."""

import contextlib
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import redis
import trustme
from conftest import ROOT, needs
from fakes import ASK, HOST, Clock, await_that, free_port
from in_process import client_of
from redis_server import RedisServer

from aiproxy.config import LoggingSettings, StateUrl, UpstreamSettings
from aiproxy.observability import logs
from aiproxy.upstreams import shared_state
from aiproxy.upstreams.breaker import Breaker, Change, Event, Outcome, Pass
from aiproxy.upstreams.local_state import LocalStore
from aiproxy.upstreams.redis_state import RedisStore
from aiproxy.upstreams.shared_state import SharedState
from aiproxy.upstreams.upstream import Upstream

COOLDOWN = 30.0
SOON = 2.0  # seconds; a change is known to all within one, and this machine may be busy


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as one:
        yield one


@pytest.fixture
def server(running):
    """Empty, whatever the test before did to it."""
    running.do("FLUSHALL")
    return running


@pytest.fixture
def fragile(tmp_path):
    """One that a test may kill or pause."""
    with RedisServer(tmp_path) as one:
        yield one


@pytest.fixture(params=["local", pytest.param("redis", marks=needs("redis-server"))])
def store(request, tmp_path):
    """Makes one connection to the same store for each worker."""
    if request.param == "local":
        return lambda: LocalStore(str(tmp_path / "state"))
    server = request.getfixturevalue("server")
    return lambda: RedisStore(StateUrl(server.url))


def add_up(snapshots):
    """Snapshots that are numbers."""
    return b"%d" % sum(int(bytes(each)) for each in snapshots)


class Worker:
    """One worker: its state, its upstream `a`, its clock, which is hours away from the others'."""

    numbers = iter(range(1, 1000))

    def __init__(self, store, cooldown=COOLDOWN, instance=None, **settings):
        number = next(self.numbers)
        self.clock = Clock(number * 10_000.0)
        self.settings = UpstreamSettings(
            **{"name": "a", "base_url": "http://a.test", "token": "sk-test-a", **settings}
        )
        self.upstream = Upstream(self.settings, Breaker(3, cooldown, self.clock))
        self.state = SharedState(store, instance or f"instance{number}")
        self.state.share([self.upstream])
        self.state.start(lambda: b'{"worker": %d}' % number, add_up, lambda: True)

    @property
    def breaker(self):
        return self.upstream.breaker

    @property
    def circuit(self):
        return self.breaker.circuit()

    def settle(self, permit, outcome):
        change = self.breaker.settle(permit, outcome)
        if change is not None:
            self.upstream.shared.report(change, permit)
        return change

    def fail(self, times=1):
        for _ in range(times):
            self.settle(self.breaker.acquire(), Outcome.FAILURE)

    def close(self):
        """By hand."""
        self.upstream.reset()
        self.upstream.shared.report(Change(Event.CLOSED))

    def drain(self, draining=True):
        self.upstream.draining = draining
        self.upstream.shared.drain(draining)

    def try_again(self):
        """The permit of a trial, None where it may not be made."""
        permit = self.breaker.acquire()
        return permit if permit is not None and self.upstream.shared.may_try(permit) else None

    def trial(self, limit=10.0):
        """The permit of a trial as soon as it may be made."""
        permits = []

        def may_be_made():
            self.clock.now += 0.01
            permits.append(self.try_again())
            return permits[-1] is not None

        await_that(may_be_made, limit)
        return permits[-1]

    @property
    def is_alone(self):
        return self.state.call(lambda store: True) is None


@pytest.fixture
def start():
    """Start one more worker at a store."""
    with contextlib.ExitStack() as stack:

        def begin(store, wait=True, **settings):
            logs.configure(LoggingSettings())  # to where the test reads it
            one = Worker(store, **settings)
            stack.callback(one.state.stop)
            if wait:
                await_that(lambda: not one.is_alone)
            return one

        yield begin


@pytest.fixture
def worker(store, start):
    """Start one more worker; each test runs with either store."""
    return lambda **settings: start(store(), **settings)


def due(*workers):
    """Opened by the first, known to all, and due: a cooldown is the store's to measure."""
    workers[0].fail(3)
    for one in workers:
        await_that(lambda one=one: one.circuit.state != "closed")
    threading.Event().wait(0.2)
    for one in workers:
        one.clock.now += 0.2


def test_failures_of_several_workers_add_up_and_open_the_circuit_for_all_within_a_second(worker):
    a, b = worker(), worker()
    a.fail(2)
    b.fail()
    assert b.circuit.state == "open"
    await_that(lambda: a.circuit.state == "open", limit=SOON)
    assert a.circuit.seconds == pytest.approx(COOLDOWN, abs=5)


def test_a_success_resets_the_count_of_all(worker):
    a, b = worker(), worker()
    a.fail(2)
    await_that(lambda: b.circuit.failures == 2)
    b.settle(b.breaker.acquire(), Outcome.SUCCESS)
    await_that(lambda: a.circuit.failures == 0)
    a.fail()
    assert a.circuit.state == "closed"


def test_a_success_sends_nothing_where_nothing_failed(start, server):
    one = start(RedisStore(StateUrl(server.url)))
    before = server.do("INFO", "stats")["total_commands_processed"]
    for _ in range(2000):
        one.settle(one.breaker.acquire(), Outcome.SUCCESS)
    assert server.do("INFO", "stats")["total_commands_processed"] - before < 100


def test_one_worker_at_a_time_makes_a_trial(worker):
    a, b = worker(cooldown=0.15), worker(cooldown=0.15)
    due(a, b)
    trial = a.trial()
    assert trial.kind is Pass.TRIAL
    assert b.try_again() is None
    a.settle(trial, Outcome.IGNORED)
    b.trial(limit=SOON)


def test_a_good_trial_closes_the_circuit_for_all(worker):
    a, b = worker(cooldown=0.15), worker(cooldown=0.15)
    due(a, b)
    assert a.settle(a.trial(), Outcome.SUCCESS) == Change(Event.CLOSED)
    await_that(lambda: b.circuit.state == "closed", limit=SOON)
    assert b.breaker.acquire().kind is Pass.ORDINARY


def test_a_bad_trial_opens_the_circuit_again_before_another_worker_has_one(worker):
    a, b = worker(cooldown=0.15), worker(cooldown=0.15)
    due(a, b)
    trial = a.trial()
    for one in (a, b):
        one.breaker.configure(3, COOLDOWN)
    a.settle(trial, Outcome.FAILURE)
    assert b.try_again() is None
    await_that(lambda: b.circuit.state == "open", limit=SOON)


def test_the_trial_of_a_worker_that_died_ends_and_that_of_one_that_lives_does_not(worker, monkeypatch):
    monkeypatch.setattr(shared_state, "TRIAL", 2.5)
    a, b = worker(cooldown=0.15), worker(cooldown=0.15)
    due(a, b)
    a.trial()
    for _ in range(30):
        threading.Event().wait(0.1)
        b.clock.now += 0.1
        assert b.try_again() is None
    a.state.stop()
    b.trial()


def test_of_two_backoffs_the_later_end_wins(worker):
    a, b = worker(), worker()
    permits = [(a, a.breaker.acquire(), 20), (b, b.breaker.acquire(), 10)]
    for one, permit, seconds in permits:
        one.upstream.shared.report(
            one.breaker.back_off(permit, seconds) or Change(Event.BACKED_OFF, seconds), permit
        )
    for one in (a, b):
        await_that(lambda one=one: one.circuit.seconds == pytest.approx(20, abs=5))


def test_a_backoff_of_a_model_is_shared_until_the_model_answers(worker):
    a, b = worker(), worker()
    seconds = a.upstream.models.back_off("claude-x", 20, a.clock(), is_last_resort=False)
    a.upstream.shared.model_backed_off("claude-x", seconds)
    await_that(lambda: not b.upstream.usable("claude-x"), limit=SOON)
    assert b.upstream.usable("claude-y")
    assert b.upstream.models.succeeded("claude-x", b.clock())
    b.upstream.shared.model_recovered("claude-x")
    await_that(lambda: a.upstream.usable("claude-x"), limit=SOON)


def test_what_is_done_by_hand_reaches_all_and_whoever_comes_later_and_a_reload_ends_a_drain(worker):
    a, b = worker(), worker()
    a.fail(3)
    await_that(lambda: b.circuit.state == "open")
    b.close()
    await_that(lambda: a.circuit.state == "closed", limit=SOON)
    a.drain()
    await_that(lambda: b.upstream.draining, limit=SOON)
    c = worker()
    await_that(lambda: c.upstream.draining, limit=SOON)
    b.state.share([Upstream(b.settings, b.breaker)])
    await_that(lambda: not a.upstream.draining and not c.upstream.draining, limit=SOON)


def test_an_upstream_that_was_drained_and_taken_out_of_the_file_comes_back_in_use(worker):
    a, b = worker(), worker()
    a.drain()
    await_that(lambda: b.upstream.draining)
    for one in (a, b):
        one.state.share([])
    back = Upstream(a.settings, a.breaker)
    a.state.share([back])
    threading.Event().wait(0.2)
    assert not back.draining


def test_who_starts_knows_of_open_circuits_before_its_first_request(worker, monkeypatch):
    worker().fail(3)
    monkeypatch.setattr(shared_state, "START", 3.0)
    assert worker(wait=False).circuit.state == "open"


def test_another_account_of_the_same_name_is_another_upstream(worker):
    a, b = worker(), worker(token="sk-test-another")
    a.fail(3)
    threading.Event().wait(0.3)
    assert b.circuit.state == "closed"


def test_the_owner_of_a_thread_is_known_to_all_whatever_its_id(worker):
    a, b = worker(), worker()
    a.state.remember("msg_1", "a")
    a.state.remember("msg_\ud800", "a")
    assert [b.state.owner(each) for each in ("msg_1", "msg_\ud800", "msg_2")] == ["a", "a", None]


def test_snapshots_reach_all_and_those_of_ended_workers_stay(worker):
    a, b, c = worker(instance="one"), worker(instance="one"), worker(instance="two")
    await_that(lambda: [len(each.state.rows().running) for each in (a, b, c)] == [2, 2, 2])
    a.state.stop()
    rows = b.state.rows()
    assert [instance for instance, _ in rows.ended] == ["one"]
    assert [instance for instance, _ in rows.running] == ["two"]
    c.state.stop()
    assert [len(each) for each in (b.state.rows().running, b.state.rows().ended)] == [0, 1]


def test_a_row_in_another_form_is_left_out(worker):
    one = worker()
    one.state.call(lambda store: store.write_row("newer", b'{"version":2}'))
    assert one.state.rows().problem is None


def test_nothing_in_the_store_shows_a_key(start, server, tmp_path):
    settings = {"token": "sk-test-very-secret", "headers": {"x-team": "sk-test-header-secret"}}
    for store in (LocalStore(str(tmp_path / "state")), RedisStore(StateUrl(server.url))):
        one = start(store, **settings)
        one.fail(3)
        one.state.remember("msg_1", "a")
    contents = [path.read_bytes() for path in (tmp_path / "state").iterdir()]
    with redis.Redis(HOST, server.port) as client:
        contents += [client.dump(key) for key in client.scan_iter()]
    assert len(contents) > 6
    assert not [each for each in contents if b"secret" in each]


def test_two_machines_of_the_same_name_and_port_are_told_apart(server):
    demo = {"base_url": "demo://answers"}
    clients = [client_of(demo, state=StateUrl(server.url)) for _ in range(2)]
    for client in clients:
        client.application.extensions["aiproxy"].serve(4, [("127.0.0.1", 8081)])

    def machines():
        return set(re.findall(r'aiproxy_build_info{machine="([^"]+)"', clients[0].get("/metrics").text))

    await_that(lambda: len(machines()) > 1)
    assert {machine.partition("#")[0] for machine in machines()} == {f"{socket.gethostname()}:8081"}


# --- The store is out of reach ---


def test_a_store_that_is_not_there_at_the_start_is_logged_once_and_joined_later(capsys, fragile, start):
    fragile.kill()
    one = start(RedisStore(StateUrl(fragile.url)), wait=False)
    one.fail(3)
    assert one.circuit.state == "open"
    threading.Event().wait(1.2)
    fragile.start()
    said = []
    await_that(lambda: said.append(capsys.readouterr().out) or "result=joined" in "".join(said))
    assert ["".join(said).count(f"result={each}") for each in ("away", "joined")] == [1, 1]
    b = start(RedisStore(StateUrl(fragile.url)))
    await_that(lambda: b.circuit.state == "open", limit=SOON)


def test_without_the_store_each_worker_makes_its_own_trials_at_once(fragile, start):
    one = start(RedisStore(StateUrl(fragile.url)))
    fragile.kill()
    one.fail(3)
    one.clock.now += COOLDOWN
    began = time.monotonic()
    one.settle(one.try_again(), Outcome.SUCCESS)
    assert time.monotonic() - began < 0.4
    assert one.circuit.state == "closed"


def test_a_server_that_hangs_costs_a_request_less_than_a_tenth_of_a_second(fragile, start):
    one = start(RedisStore(StateUrl(fragile.url)), cooldown=0.15)
    due(one)
    fragile.pause()
    began = time.monotonic()
    assert one.state.owner("msg_1") is None
    one.state.remember("msg_1", "a")
    one.try_again()
    one.breaker.close()
    one.fail(3)
    assert time.monotonic() - began < 0.4, "only one of these six may wait, for at most 0.1 s"
    fragile.resume()
    await_that(lambda: not one.is_alone)


@pytest.mark.parametrize("is_empty", [False, True])
def test_what_was_done_by_hand_while_the_server_was_lost_is_done_for_all(fragile, start, is_empty):
    a, b = (start(RedisStore(StateUrl(fragile.url))) for _ in "ab")
    a.fail(3)
    await_that(lambda: b.circuit.state == "open")
    fragile.pause()
    a.close()
    a.drain()
    if is_empty:
        fragile.kill()
        fragile.start()
    else:
        threading.Event().wait(1.0)
        fragile.resume()
    await_that(lambda: b.circuit.state == "closed" and b.upstream.draining)
    assert a.circuit.state == "closed"
    assert a.upstream.draining


def empty(request, tmp_path):
    """Remove everything from the usual store."""
    if "redis" in request.node.name:
        request.getfixturevalue("server").do("FLUSHALL")
    else:
        for path in (tmp_path / "state").iterdir():
            path.unlink()


def test_a_store_that_was_emptied_learns_what_the_workers_remember(request, worker, tmp_path):
    a, b = worker(), worker()
    a.fail(3)
    b.drain()
    seconds = a.upstream.models.back_off("claude-x", 20, a.clock(), is_last_resort=False)
    a.upstream.shared.model_backed_off("claude-x", seconds)
    await_that(lambda: b.circuit.state == "open" and a.upstream.draining)
    empty(request, tmp_path)
    c = worker()
    await_that(
        lambda: c.circuit.state == "open" and c.upstream.draining and not c.upstream.usable("claude-x")
    )
    assert (a.circuit.state, b.circuit.state) == ("open", "open")


def test_a_store_that_takes_no_changes_is_out_of_reach_until_it_does(request, capsys, worker, tmp_path):
    one = worker()
    if "redis" in request.node.name:
        server = request.getfixturevalue("server")
        server.do("REPLICAOF", HOST, free_port())
    else:
        files = [each for each in (tmp_path / "state").iterdir() if each.suffix == ".sqlite"]
        for path in {each.resolve() for each in files}:
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content[:18] + b"\3" + content[19:])  # SQLite's mark of a file that is read only
    try:
        await_that(lambda: one.is_alone)
        one.fail(3)
        assert one.circuit.state == "open"
        threading.Event().wait(1.5)
    finally:
        if "redis" in request.node.name:
            server.do("REPLICAOF", "NO", "ONE")
        else:
            empty(request, tmp_path)
    await_that(lambda: not one.is_alone)
    out = capsys.readouterr().out
    assert out.count("result=away") == 1
    assert "bug" not in out


@pytest.mark.parametrize("rights", [["&*", "-subscribe"], ["resetchannels"]])
def test_who_may_not_listen_says_so_and_reads_once_a_second(capsys, start, server, rights):
    server.do("ACL", "SETUSER", "half", "on", ">sk-test-half", "~aiproxy:*", "+@all", *rights)
    try:
        half = StateUrl(f"redis://half:sk-test-half@{HOST}:{server.port}/0")
        a, b = start(RedisStore(half)), start(RedisStore(StateUrl(server.url)))
        b.fail(3)
        await_that(lambda: a.circuit.state == "open")
        await_that(lambda: a.state.rows().problem is not None)
        a.close()
        await_that(lambda: b.circuit.state == "closed")
        out = capsys.readouterr().out
        assert out.count("result=deaf") == 1
        assert "result=away" not in out
        assert "sk-test-half" not in out
    finally:
        server.do("ACL", "DELUSER", "half")


def test_a_refused_password_is_logged_without_it(capsys, start, tmp_path):
    with RedisServer(tmp_path) as guarded:
        guarded.do("CONFIG", "SET", "requirepass", "test-password")
        wrong = guarded.url.replace("//", "//:wrong-test-password@")
        refused = start(RedisStore(StateUrl(wrong)), wait=False)
        said = []
        await_that(lambda: said.append(capsys.readouterr().out) or "result=away" in "".join(said))
        assert "wrong-test-password" not in "".join(said)
        right = start(RedisStore(StateUrl(guarded.url.replace("//", "//:test-password@"))))
        refused.state.stop()
        right.state.stop()


def test_a_unix_socket_and_tls_with_an_own_authority(start, tmp_path):
    authority, folder = trustme.CA(), tmp_path / "tls"
    folder.mkdir()
    certificate = authority.issue_cert("localhost", HOST)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    port = free_port()
    options = ["--tls-port", str(port), "--tls-cert-file", f"{folder}/cert.pem"]
    options += ["--tls-key-file", f"{folder}/key.pem", "--tls-ca-cert-file", f"{folder}/ca.pem"]
    options += ["--tls-auth-clients", "no", "--unixsocket", f"{tmp_path}/redis.sock"]
    with RedisServer(tmp_path, *options):
        secure = start(RedisStore(StateUrl(f"rediss://localhost:{port}/0?ssl_ca_certs={folder}/ca.pem")))
        local = start(RedisStore(StateUrl(f"unix://{tmp_path}/redis.sock?db=0")))
        secure.fail(3)
        await_that(lambda: local.circuit.state == "open", limit=SOON)
        secure.state.stop()
        # redis-py would not close a TLS connection that it tried again when the server had gone.
        for thread in threading.enumerate():
            if thread.name == "state, listening":
                thread.join(0.6)


def test_databases_are_apart(start, server):
    a = start(RedisStore(StateUrl(server.url)))
    b = start(RedisStore(StateUrl(server.url.replace("/0", "/1"))))
    a.fail(3)
    threading.Event().wait(1.2)
    assert b.circuit.state == "closed"
    server.do("FLUSHALL")


def test_without_the_package_the_log_says_what_to_install_and_the_process_serves(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "aiproxy.upstreams.redis_state")
    client = client_of({"base_url": "demo://answers"}, state=StateUrl("redis://localhost/0"))
    assert "pip install -r requirements.txt" in capsys.readouterr().out
    assert client.post("/v1/messages", json=ASK).status_code == 200


def test_a_worker_by_itself_loads_no_store():
    code = "import sys, aiproxy.app; sys.exit(bool({'redis', 'psycopg'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
