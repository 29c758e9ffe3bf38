"""Four workers that share their state: two gunicorns of two workers and Redis, or one of four and SQLite.

All real. test_shared_state.py shows in small what they share; this is how it looks from outside. A figure of
another worker may be a second old, and any worker may answer: so one read must show all that is awaited.
"""

import contextlib
import itertools
import os
import resource
import signal
import socket
import threading
import time
from base64 import b64encode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import begin_to_serve, needs
from fakes import ASK, HOST, SPOKEN, STREAM, FakeUpstream, RawClient, answer, await_that, error, events
from front import Front
from redis_server import RedisServer

pytestmark = needs("redis-server")

ADMIN = "sk-test-admin-000000"
COOLDOWN = 1.0
BASIC = ("authorization", "Basic " + b64encode(f"x:{ADMIN}".encode()).decode())
KEY = ("x-api-key", "sk-test-client-0000")


class Upstream:
    """Two accounts, of which `a` may be down or torn; counts what `a` is asked."""

    def __init__(self):
        self.down = threading.Event()
        self.go_on = threading.Event()
        self.a = FakeUpstream(default=self._reply)
        self.b = FakeUpstream(default=answer())

    def _reply(self, wire, seen):
        if self.down.is_set():
            error(500)(wire, seen)
        elif seen.json().get("stream"):
            events([*SPOKEN[:4], self.go_on, *SPOKEN[4:]])(wire, seen)
        else:
            answer()(wire, seen)


class Cluster:
    """Two gunicorns of two workers, or one of four without `redis`; `ask` sends a request to one of them."""

    def __init__(self, folder, upstreams, redis=None, database=0, **settings):
        config = {
            "state": f"redis://{HOST}:{redis.port}/{database}" if redis else "local",
            "admin_key": ADMIN,
            "breaker": {"cooldown": COOLDOWN},
            "logging": {"prompt_preview": 0},
            "upstreams": [
                {"name": name, "base_url": one.url, "token": f"sk-test-{name}"}
                for name, one in upstreams.items()
            ],
            **settings,
        }
        self.redis = redis
        self.answered = 0
        self._lock = threading.Lock()
        workers = 2 if redis else 4
        options = {"gunicorn_args": ["--graceful-timeout", "5"], "env": {"TMPDIR": str(folder)}}
        self.served = [
            begin_to_serve(folder / f"config-{n}.yaml", config, workers=workers, wait=False, **options)
            for n in range(4 // workers)
        ]
        for one in self.served:
            one.wait_until_ready()
        # Each worker of both has reached the store.
        await_that(lambda: all(self.count(one, "result=joined") == workers for one in self.served), limit=20)

    def count(self, one, text):
        return sum(text in line for line in one.stdout_lines())

    def ask(self, number=0, body=ASK):
        """The answer's status and the upstream that gave it, and the seconds that it took."""
        began = time.monotonic()
        with RawClient.to(self.served[number % len(self.served)].url) as client:
            client.post(body)
            got = client.read()
        with self._lock:
            self.answered += got.status == 200
        return got.status, got.header("x-aiproxy-upstream"), time.monotonic() - began

    def at_once(self, requests, clients, body=ASK):
        """So many requests by so many clients, to both in turn: how often which outcome, and the seconds."""
        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(self.ask, range(requests), itertools.repeat(body)))
        return Counter(each[:2] for each in found), time.monotonic() - began

    def status(self, number=0):
        with RawClient.to(self.served[number].url) as client:
            client.request("GET", "/status", headers=[BASIC, ("accept", "application/json")])
            return client.read().json()

    def press(self, action, upstream="a"):
        with RawClient.to(self.served[0].url) as client:
            form = f"upstream={upstream}&action={action}".encode()
            client.request("POST", "/status", form, [BASIC, ("origin", f"http://{HOST}")])
            assert client.read().status == 303

    def close(self):
        for one in self.served:
            one.ask_to_stop()
        for one in self.served:
            one.stop()


@pytest.fixture(scope="module")
def upstreams():
    both = Upstream()
    with both.a, both.b:
        yield both


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as one:
        yield one


@pytest.fixture(scope="module", params=["redis", "local"])
def whole(request, tmp_path_factory, upstreams, redis):
    folder, both = tmp_path_factory.mktemp("cluster"), {"a": upstreams.a, "b": upstreams.b}
    cluster = Cluster(folder, both, redis if request.param == "redis" else None)
    yield cluster
    cluster.close()
    assert not list(folder.glob("aiproxy-*")), "a directory was not removed"


@pytest.fixture
def cluster(whole, upstreams):
    """With all circuits closed, known to all, whatever the test before did."""
    upstreams.down.clear()
    upstreams.go_on.set()
    whole.press("resume")
    whole.press("close")
    await_that(lambda: views(whole) == {"closed"})
    yield whole
    upstreams.down.clear()
    upstreams.go_on.set()


def metrics(cluster, number=0):
    with RawClient.to(cluster.served[number].url) as client:
        client.request("GET", "/metrics")
        return client.read().body.decode().splitlines()


def views(cluster, upstream="a"):
    """How all four workers see a circuit, by way of the sum in the metrics."""
    found = Counter()
    for line in metrics(cluster):
        if line.startswith("aiproxy_circuit_state{") and f'upstream="{upstream}"' in line:
            found[line.partition('state="')[2].partition('"')[0]] += float(line.rpartition(" ")[2])
    # A worker that is changing its mind is shown in two states, one that has just started in none.
    return {state for state, count in found.items() if count} if sum(found.values()) == 4 else {"unclear"}


def answers_by_machine(cluster, model):
    """How many answers for that model /metrics of the last gunicorn shows, by the machine's port."""
    found = Counter()
    for line in metrics(cluster, -1):
        if line.startswith("aiproxy_requests_total{") and f'model="{model}"' in line:
            machine = line.partition('machine="')[2].partition('"')[0]
            found[machine.rpartition(":")[2]] += float(line.rpartition(" ")[2])
    return found


def test_a_dead_upstream_is_asked_three_times_and_what_was_in_flight_by_all_together(cluster, upstreams):
    upstreams.down.set()
    before = len(upstreams.a.seen)
    clients = 12
    outcomes, seconds = cluster.at_once(120, clients)
    assert outcomes == {(200, "b"): 120}
    assert len(upstreams.a.seen) - before <= 3 + clients + int(seconds / COOLDOWN)  # one trial a cooldown


def test_one_of_fifty_requests_at_a_time_is_the_trial_and_success_is_known_to_all(cluster, upstreams):
    upstreams.down.set()
    cluster.at_once(12, 4)
    await_that(lambda: views(cluster) == {"half_open"})
    before = len(upstreams.a.seen)
    outcomes, seconds = cluster.at_once(50, 50)
    assert outcomes == {(200, "b"): 50}
    assert 1 <= len(upstreams.a.seen) - before <= 1 + int(seconds / COOLDOWN)
    upstreams.down.clear()
    await_that(lambda: views(cluster) == {"half_open"})
    await_that(lambda: cluster.ask()[1] == "a" or cluster.ask(1)[1] == "a")
    await_that(lambda: views(cluster) == {"closed"})


def test_the_page_of_one_shows_the_traffic_of_all(cluster):
    cluster.at_once(40, 4)
    ports = {str(one.port) for one in cluster.served}

    def shows_all():
        status = cluster.status(-1)
        assert status["problem"] is None
        return (
            sum(row["answers"] for row in status["upstreams"]) == cluster.answered
            and len({each["worker"] for each in status["workers"]}) == 4
            and {each["server"].rpartition(":")[2] for each in status["workers"]} == ports
            and status["silent"] == []
        )

    await_that(shows_all)


def test_the_metrics_of_one_are_the_sum_of_all_each_machine_named(cluster):
    cluster.at_once(40, 4, {**ASK, "model": "claude-summed"})
    expected = {str(one.port): 20 for one in cluster.served} if cluster.redis else {"": 40}
    await_that(lambda: answers_by_machine(cluster, "claude-summed") == expected)


def test_a_drained_upstream_is_asked_by_nobody(cluster, upstreams):
    cluster.press("drain")
    await_that(lambda: views(cluster) == {"draining"})
    before = len(upstreams.a.seen)
    outcomes, _ = cluster.at_once(40, 4)
    assert outcomes == {(200, "b"): 40}
    assert len(upstreams.a.seen) == before


# --- The server goes ---


def lost(cluster):
    return [cluster.count(one, "state result=away") for one in cluster.served]


def joined(cluster):
    return [cluster.count(one, "state result=joined") for one in cluster.served]


class Load:
    """Requests all the while, to both, by four clients; who got what, and how slow the slowest was."""

    def __init__(self, cluster):
        self.outcomes = Counter()
        self.slowest = 0.0
        self._cluster = cluster
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=[n]) for n in range(4)]

    def _run(self, number):
        while not self._over.is_set():
            status, _, seconds = self._cluster.ask(number)
            self.outcomes[status] += 1
            self.slowest = max(self.slowest, seconds)
            self._over.wait(0.01)

    def go_on(self):
        """Wait until so many more have their answers."""
        until = self.outcomes.total() + 40
        await_that(lambda: self.outcomes.total() >= until)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        self.go_on()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()


def test_a_worker_that_was_killed_has_counted(cluster):
    def answered():
        return answers_by_machine(cluster, "claude-killed").total()

    def names():
        return {each["worker"] for each in cluster.status()["workers"]}

    cluster.at_once(40, 4, {**ASK, "model": "claude-killed"})
    await_that(lambda: answered() == 40)
    before = names()
    os.kill(cluster.served[0].workers()[0], signal.SIGKILL)
    # Its row counts as that of an ended worker after some seconds, and another has taken its place.
    await_that(lambda: len(names()) == 4 and names() != before, limit=20)
    await_that(lambda: cluster.status()["silent"] == [], limit=20)
    await_that(lambda: answered() == 40)


@pytest.mark.parametrize("workers", [1, 2])
def test_several_workers_keep_their_files_in_the_runtime_directory(tmp_path, upstreams, serve, workers):
    environment = {"RUNTIME_DIRECTORY": str(tmp_path / "run"), "TMPDIR": str(tmp_path)}
    upstream = {"name": "a", "base_url": upstreams.a.url, "token": "sk-test-a"}
    served = serve({"upstreams": [upstream]}, workers=workers, env=environment)
    with RawClient.to(served.url) as client:
        client.request("GET", "/metrics")
        assert client.read().status == 200
    if workers == 1:
        assert not (tmp_path / "run" / "state").exists()
    else:
        assert (tmp_path / "run" / "state").stat().st_mode & 0o777 == 0o700
        assert list((tmp_path / "run" / "state").glob("*.sqlite"))
    assert not list(tmp_path.glob("aiproxy-*"))


@pytest.mark.parametrize("how", ["delete", "fill"])
def test_the_files_go_and_come_back_under_load_without_one_failed_request(tmp_path, upstreams, how):
    upstreams.down.set()
    with contextlib.closing(Cluster(tmp_path, {"a": upstreams.a, "b": upstreams.b})) as one:
        (directory,) = tmp_path.glob("aiproxy-*/state")
        assert directory.stat().st_mode & 0o777 == 0o700
        with Load(one) as load:
            if how == "delete":
                for path in directory.iterdir():
                    path.unlink()
            else:
                limit_files(one, 0)
            await_that(lambda: sum(lost(one)) == 4)
            load.go_on()
            limit_files(one, -1)
            await_that(lambda: sum(joined(one)) >= 8)
        assert set(load.outcomes) == {200}
        assert load.slowest < 2
        assert sum(lost(one)) == 4, "each logs it once"
        await_that(lambda: len(one.status()["workers"]) == 4)
        assert one.count(one.served[0], "Traceback") == 0


def limit_files(cluster, size):
    """Let the workers' files grow to so many bytes, as a full disk would."""
    for pid in cluster.served[0].workers():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, -1))


@pytest.mark.parametrize("how", ["kill", "pause"])
@pytest.mark.parametrize("whole", ["redis"], indirect=True)
def test_the_server_goes_and_comes_back_under_load_without_one_failed_request(cluster, upstreams, how):
    before = sum(lost(cluster)), sum(joined(cluster))
    with Load(cluster) as load:
        upstreams.down.set()  # so that there are changes to report
        load.go_on()
        getattr(cluster.redis, how)()
        await_that(lambda: sum(lost(cluster)) == before[0] + 4)
        upstreams.down.clear()
        load.go_on()
        upstreams.down.set()
        {"kill": cluster.redis.start, "pause": cluster.redis.resume}[how]()
        await_that(lambda: sum(joined(cluster)) == before[1] + 4)
        load.go_on()
    assert set(load.outcomes) == {200}
    assert load.slowest < 2
    assert sum(lost(cluster)) == before[0] + 4, "each logs it once"
    cluster.press("close")
    await_that(lambda: views(cluster) == {"closed"})


# --- A machine goes ---


def refuses(port):
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) != 0


@contextlib.contextmanager
def behind_nginx(folder, upstreams, redis, database):
    """Two machines, and nginx in front of them."""
    upstreams.down.clear()
    machines = Cluster(folder, {"a": upstreams.a}, redis, database, api_keys=[KEY[1]])
    ports = tuple(one.port for one in machines.served)
    with contextlib.closing(machines), Front(folder / "nginx", ports, several_machines=True) as front:
        yield machines, front


@needs("nginx")
def test_behind_nginx_a_machine_that_is_killed_takes_only_its_own_streams_with_it(tmp_path, upstreams, redis):
    upstreams.go_on.clear()
    with behind_nginx(tmp_path, upstreams, redis, 1) as (machines, front), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(front.client()) for _ in range(12)]
        for client in clients:
            client.post(STREAM, headers=[KEY])
        streams = [client.answer() for client in clients]
        assert {stream.status for stream in streams} == {200}
        dead, alive = machines.served
        for pid in [dead.process.pid, *dead.workers()]:
            os.kill(pid, signal.SIGKILL)
        await_that(lambda: refuses(dead.port))
        upstreams.go_on.set()
        ended_well = [b"message_stop" in stream.read().body and stream.ending == "end" for stream in streams]
        assert Counter(ended_well) == {True: 6, False: 6}
        for _ in range(20):
            with front.client() as client:
                client.post(ASK, headers=[KEY])
                assert client.read().status == 200
        assert alive.process.poll() is None
        await_that(lambda: len(machines.status(1)["silent"]) == 2, limit=15)


@needs("nginx")
def test_a_machine_that_is_stopped_loses_nothing_on_kept_connections(tmp_path, upstreams, redis):
    outcomes, over = Counter(), threading.Event()

    def keep_asking(client):
        while not over.is_set():
            client.post(ASK, headers=[KEY])
            outcomes[client.read().status] += 1
            over.wait(0.005)

    with behind_nginx(tmp_path, upstreams, redis, 2) as (machines, front), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(front.client()) for _ in range(6)]
        threads = [threading.Thread(target=keep_asking, args=[client]) for client in clients]
        for thread in threads:
            thread.start()
        await_that(lambda: outcomes.total() > 100)
        machines.served[0].ask_to_stop()
        assert machines.served[0].wait_exit() == 0
        await_that(lambda: len(machines.status(1)["workers"]) == 2)
        assert machines.status(1)["silent"] == []
        asked = outcomes.total()
        await_that(lambda: outcomes.total() > asked + 50)
        over.set()
        for thread in threads:
            thread.join()
    assert set(outcomes) == {200}
