"""Four workers that share their state: two gunicorns of two workers and Redis, or one of four and SQLite.

All real. test_state.py shows in small what they share; this is how it looks from outside.
"""

import contextlib
import itertools
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, Served
from fakes import (
    HOST,
    FakeUpstream,
    RawClient,
    answer,
    error,
    events,
    free_port,
    message_events,
)
from front import Front, needs_nginx
from redis_server import RedisServer, needs_redis

pytestmark = needs_redis

ADMIN = "sk-test-admin-000000"
ASK = {"model": "claude-x", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
COOLDOWN = 1.0
BASIC = ("authorization", "Basic " + b64encode(f"x:{ADMIN}".encode()).decode())


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
            spoken = message_events(["one", "two"])
            events([*spoken[:4], self.go_on, *spoken[4:]])(wire, seen)
        else:
            answer()(wire, seen)


class Cluster:
    """Two gunicorns of two workers, or one of four without `redis`; `ask` sends a request to one of them."""

    def __init__(self, folder, upstreams, redis=None, database=0, **settings):
        self.folder = folder
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
        self.served = []
        for number in (1, 2) if redis else (1,):
            port = free_port()
            path = folder / f"config-{number}.yaml"
            path.write_text(json.dumps({"listen": port, **config}))
            command = [sys.executable, "-m", "gunicorn", "--graceful-timeout", "5"]
            command += ["--workers", "2" if redis else "4"]
            environment = {"PATH": os.environ["PATH"], "AIPROXY_CONFIG": str(path)}
            environment["TMPDIR"] = str(folder)
            self.served.append(Served([*command, "wsgi:app"], ROOT, environment, port))
        for one in self.served:
            one.wait_until_ready()
        self.await_joined(2 if redis else 4)

    def await_joined(self, times):
        """Each worker of both has reached the server so many times in all, counted by gunicorn."""
        limit = time.monotonic() + 10
        while any(self.count(one, "result=joined") < times for one in self.served):
            assert time.monotonic() < limit, [one.stdout_lines() for one in self.served]
            threading.Event().wait(0.02)

    def count(self, one, text):
        return sum(text in line for line in one.stdout_lines())

    def ask(self, number=0, body=ASK):
        """The answer's status and the upstream that gave it, and the seconds that it took."""
        began = time.monotonic()
        with RawClient.to(self.served[number % len(self.served)].url, timeout=10) as client:
            client.post(body)
            got = client.read()
        return got.status, got.header("x-aiproxy-upstream"), time.monotonic() - began

    def at_once(self, requests, clients, body=ASK):
        """So many requests by so many clients, to both in turn: how often which outcome, the slowest."""
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(self.ask, range(requests), itertools.repeat(body)))
        return Counter(each[:2] for each in found), max(each[2] for each in found)

    def status(self, number=0):
        with RawClient.to(self.served[number].url) as client:
            client.request("GET", "/status", headers=[BASIC, ("accept", "application/json")])
            return client.read().json()

    def press(self, action, upstream="a"):
        one = self.served[0]
        with RawClient.to(one.url) as client:
            form = f"upstream={upstream}&action={action}".encode()
            headers = [BASIC, ("origin", f"http://127.0.0.1:{one.port}"), ("host", f"127.0.0.1:{one.port}")]
            client.send(
                b"POST /status HTTP/1.1\r\n"
                + "".join(f"{name}: {value}\r\n" for name, value in headers).encode()
                + b"content-length: %d\r\n\r\n%b" % (len(form), form)
            )
            assert client.read().status == 303

    def close(self):
        for one in self.served:
            one.ask_to_quit()
        for one in self.served:
            one.quit()


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


def await_that(condition, limit=5.0):
    ends = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < ends, "it did not become true"
        threading.Event().wait(0.02)


def test_a_dead_upstream_is_asked_three_times_and_what_was_in_flight_by_all_together(cluster, upstreams):
    upstreams.down.set()
    before = len(upstreams.a.seen)
    clients = 12
    outcomes, _ = cluster.at_once(120, clients)
    assert outcomes == {(200, "b"): 120}
    assert len(upstreams.a.seen) - before <= 3 + clients


def test_one_of_fifty_requests_at_a_time_is_the_trial_and_success_is_known_to_all(cluster, upstreams):
    upstreams.down.set()
    cluster.at_once(12, 4)
    await_that(lambda: views(cluster) == {"half_open"})
    before = len(upstreams.a.seen)
    outcomes, _ = cluster.at_once(50, 50)
    assert outcomes == {(200, "b"): 50}
    assert len(upstreams.a.seen) - before == 1
    upstreams.down.clear()
    await_that(lambda: views(cluster) == {"half_open"})
    await_that(lambda: cluster.ask()[1] == "a" or cluster.ask(1)[1] == "a")
    await_that(lambda: views(cluster) == {"closed"}, limit=2.0)


def test_the_page_of_one_shows_the_traffic_of_all(cluster):
    threading.Event().wait(1.1)
    before = {row["name"]: row["answers"] for row in cluster.status()["upstreams"]}
    cluster.at_once(40, 4)

    def answers():
        return sum(row["answers"] for row in cluster.status(-1)["upstreams"])

    await_that(lambda: answers() == sum(before.values()) + 40, limit=2.0)
    status = cluster.status(-1)
    assert len({each["worker"] for each in status["workers"]}) == 4
    ports = {each["server"].rpartition(":")[2] for each in status["workers"]}
    assert ports == {str(one.port) for one in cluster.served}
    assert (status["silent"], status["problem"]) == ([], None)


def test_the_metrics_of_one_are_the_sum_of_all_each_machine_named(cluster):
    def answered():
        """By machine, the answers for a model that only this test asks for: nothing was counted before."""
        found = Counter()
        for line in metrics(cluster, -1):
            if line.startswith("aiproxy_requests_total{") and 'model="claude-summed"' in line:
                machine = line.partition('machine="')[2].partition('"')[0]
                found[machine.rpartition(":")[2]] += float(line.rpartition(" ")[2])
        return found

    cluster.at_once(40, 4, {**ASK, "model": "claude-summed"})
    expected = {str(one.port): 20 for one in cluster.served} if cluster.redis else {"": 40}
    # One read shows all: the next may be answered by a worker whose copy is older.
    await_that(lambda: answered() == expected)


def test_a_drained_upstream_is_asked_by_nobody(cluster, upstreams):
    cluster.press("drain")
    await_that(lambda: views(cluster) == {"draining"}, limit=2.0)
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
            threading.Event().wait(0.01)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()


def test_a_worker_that_was_killed_has_counted(cluster):
    def answered():
        return sum(float(line.split()[-1]) for line in metrics(cluster) if "requests_total{" in line)

    cluster.at_once(40, 4)
    threading.Event().wait(1.2)
    before = answered()
    pid = cluster.served[0].workers()[0]
    os.kill(pid, signal.SIGKILL)
    await_that(lambda: pid not in cluster.served[0].workers())
    threading.Event().wait(6.0)  # until its row counts as that of an ended worker
    assert answered() == before
    await_that(lambda: len(cluster.status()["workers"]) == 4)
    assert cluster.status()["silent"] == []


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
    one = Cluster(tmp_path, {"a": upstreams.a, "b": upstreams.b})
    with contextlib.closing(one):
        (directory,) = tmp_path.glob("aiproxy-*/state")
        assert directory.stat().st_mode & 0o777 == 0o700
        with Load(one) as load:
            threading.Event().wait(0.3)
            if how == "delete":
                for path in directory.iterdir():
                    path.unlink()
            else:
                for pid in one.served[0].workers():
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, -1))
            await_that(lambda: sum(lost(one)) == 4)
            threading.Event().wait(0.5)
            for pid in one.served[0].workers():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (-1, -1))
            await_that(lambda: sum(joined(one)) >= 8)
        assert set(load.outcomes) == {200}
        assert load.slowest < 1.0
        assert sum(lost(one)) == 4, "each logs it once"
        assert len(one.status()["workers"]) == 4
        assert one.count(one.served[0], "Traceback") == 0


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_the_server_goes_and_comes_back_under_load_without_one_failed_request(cluster, upstreams, how):
    if cluster.redis is None:
        return
    before = [sum(lost(cluster)), sum(joined(cluster))]
    with Load(cluster) as load:
        upstreams.down.set()  # so that there are changes to report
        threading.Event().wait(0.2)
        getattr(cluster.redis, how)()
        await_that(lambda: sum(lost(cluster)) == before[0] + 4)
        upstreams.down.clear()
        threading.Event().wait(0.5)
        upstreams.down.set()
        {"kill": cluster.redis.start, "pause": cluster.redis.resume}[how]()
        await_that(lambda: sum(joined(cluster)) == before[1] + 4)
        threading.Event().wait(0.5)
    assert set(load.outcomes) == {200}
    assert sum(load.outcomes.values()) > 50
    assert load.slowest < 1.0
    assert sum(lost(cluster)) == before[0] + 4, "each logs it once"
    cluster.press("close")
    await_that(lambda: views(cluster) == {"closed"})


# --- A machine goes ---


def refuses(port):
    try:
        socket.create_connection((HOST, port), 1).close()
    except OSError:
        return True
    return False


@needs_nginx
def test_behind_nginx_a_machine_that_is_killed_takes_only_its_own_streams_with_it(tmp_path, upstreams, redis):
    upstreams.go_on.clear()
    upstreams.down.clear()
    machines = Cluster(tmp_path, {"a": upstreams.a}, redis, 1, api_keys=["sk-test-client-0000"])
    key = ("x-api-key", "sk-test-client-0000")
    ports = tuple(one.port for one in machines.served)
    with (
        contextlib.closing(machines),
        Front(tmp_path / "nginx", ports, several_machines=True) as front,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(front.client()) for _ in range(12)]
        for client in clients:
            client.post({**ASK, "stream": True}, headers=[key])
        streams = [client.answer() for client in clients]
        assert {stream.status for stream in streams} == {200}
        dead, alive = machines.served
        for pid in [dead.process.pid, *dead.workers()]:
            os.kill(pid, signal.SIGKILL)
        await_that(lambda: refuses(dead.port))
        upstreams.go_on.set()
        endings = Counter()
        for stream in streams:
            stream.read()
            endings[stream.ending == "end" and b"message_stop" in stream.body] += 1
        assert endings == {True: 6, False: 6}
        for _ in range(20):
            with front.client() as client:
                client.post(ASK, headers=[key])
                assert client.read().status == 200
        assert alive.process.poll() is None
        await_that(lambda: len(machines.status(1)["silent"]) == 2, limit=7.0)


@needs_nginx
def test_a_machine_that_is_stopped_loses_nothing_on_kept_connections(tmp_path, upstreams, redis):
    upstreams.go_on.set()
    upstreams.down.clear()
    machines = Cluster(tmp_path, {"a": upstreams.a}, redis, 2, api_keys=["sk-test-client-0000"])
    key = ("x-api-key", "sk-test-client-0000")
    ports = tuple(one.port for one in machines.served)
    outcomes = Counter()
    over = threading.Event()

    def keep_asking(client):
        while not over.is_set():
            client.post(ASK, headers=[key])
            outcomes[client.read().status] += 1
            threading.Event().wait(0.005)

    with (
        contextlib.closing(machines),
        Front(tmp_path / "nginx", ports, several_machines=True) as front,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(front.client()) for _ in range(6)]
        threads = [threading.Thread(target=keep_asking, args=[client]) for client in clients]
        for thread in threads:
            thread.start()
        threading.Event().wait(0.5)
        machines.served[0].ask_to_stop()
        assert machines.served[0].wait_exit() == 0
        status = machines.status(1)
        assert (len(status["workers"]), status["silent"]) == (2, [])
        threading.Event().wait(0.3)
        over.set()
        for thread in threads:
            thread.join()
    assert set(outcomes) == {200}
    assert outcomes[200] > 100
