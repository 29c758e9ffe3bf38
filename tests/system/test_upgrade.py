"""An upgrade under load loses nothing: two instances behind nginx in turn, or one that replaces itself.

All the while twenty streams are live and a request comes every 20 ms, each on a connection of its own.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, Served, needs
from fakes import (
    ASK,
    STREAM,
    Ended,
    FakeUpstream,
    RawClient,
    await_that,
    events,
    free_port,
    message_events,
    whole,
)
from front import Front

WORDS = message_events(["word "] * 8)
STREAMS = 20
EVERY = 0.02  # seconds from one request to the next
CLOSE = ("connection", "close")
BOOTING = "Booting worker with pid: "

_streamed = events(WORDS, gap=0.06)  # about a second
_answered = whole(200, b'{"type":"message","content":[]}')


def reply(wire, seen):
    (_streamed if seen.json().get("stream") else _answered)(wire, seen)


@pytest.fixture
def config(tmp_path):
    """The configuration of a service whose one upstream streams for about a second."""
    with FakeUpstream(default=reply) as fake:
        path = tmp_path / "config.yaml"
        path.write_text(
            f"upstreams: [{{base_url: '{fake.url}', token: sk-test-a}}]\nlogging: {{level: warning}}"
        )
        yield path


def started(config, port, *arguments):
    """One instance, not waited for. `python -m gunicorn` could not replace itself, the script can."""
    script = str(Path(sys.executable).parent / "gunicorn")
    command = [script, "--bind", f"127.0.0.1:{port}", "--graceful-timeout", "8"]
    return Served([*command, *arguments, "wsgi:app"], ROOT, {"AIPROXY_CONFIG": str(config)}, port)


class Load:
    """Twenty streams at any time, and a request every 20 ms; `outcomes` counts what they met.

    `connect` gives a new client. What went well is "stream" or "request", all else is told as it is.
    """

    def __init__(self, connect):
        self.outcomes = Counter()
        self._connect = connect
        self._over = threading.Event()
        self._names = itertools.count()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._keep_streaming) for _ in range(STREAMS)]
        self._threads.append(threading.Thread(target=self._keep_asking))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, streams):
        """Wait until so many more streams have ended."""
        until = self.outcomes["stream"] + streams
        await_that(lambda: self.outcomes["stream"] >= until, limit=30)

    def _keep_streaming(self):
        while not self._over.is_set():
            self._one(STREAM, lambda got: got.body == b"".join(WORDS), "stream")

    def _keep_asking(self):
        asking = []
        began = time.monotonic()
        for n in itertools.count(1):
            if self._over.wait(began + n * EVERY - time.monotonic()):
                break
            thread = threading.Thread(target=self._one, args=(ASK, lambda got: True, "request"))
            thread.start()
            asking.append(thread)
        for thread in asking:
            thread.join()

    def _one(self, body, is_well, name):
        session = ("x-claude-code-session-id", f"session-{next(self._names)}")
        try:
            with self._connect() as client:
                client.post(body, headers=[session, CLOSE])
                got = client.read()
                well = (got.status, got.ending) == (200, "end") and is_well(got)
                outcome = name if well else f"{name}: {got.status} {got.ending} {got.body[-200:]!r}"
        except (OSError, Ended) as error:
            outcome = f"{name}: {error!r}"
        with self._lock:
            self.outcomes[outcome] += 1
        if outcome != name:  # do not go round in haste
            self._over.wait(EVERY)


def assert_nothing_lost(load, seconds):
    assert set(load.outcomes) == {"stream", "request"}, load.outcomes
    assert load.outcomes["request"] > seconds / EVERY / 4  # they did come all the while


@needs("nginx")
def test_two_instances_restarted_in_turn_lose_nothing(config, tmp_path):
    ports = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        instances = [started(config, port) for port in ports]
        for instance in instances:
            stack.callback(instance.stop)
            instance.wait_until_ready()
        nginx = stack.enter_context(Front(tmp_path / "nginx", ports))
        began = time.monotonic()
        with Load(nginx.client) as load:
            load.wait_for(streams=STREAMS)
            for instance in instances:  # as `systemctl restart` does it
                instance.ask_to_stop()
                assert instance.wait_exit() == 0
                successor = started(config, instance.port)
                stack.callback(successor.stop)
                successor.wait_until_ready()
                answers(instance.port)
            load.wait_for(streams=STREAMS)
            seconds = time.monotonic() - began
    assert_nothing_lost(load, seconds)


def test_an_instance_that_replaces_itself_loses_nothing(config, tmp_path):
    port, pid = free_port(), tmp_path / "pid"
    with contextlib.ExitStack() as stack:
        service = started(config, port, "--pid", str(pid))
        stack.callback(service.stop)
        service.wait_until_ready()
        answers(port)
        old, worker = int(pid.read_text()), service.wait_for_stderr(BOOTING + r"(\d+)")[1]
        began = time.monotonic()
        with Load(lambda: RawClient("127.0.0.1", port, 10)) as load:
            load.wait_for(streams=STREAMS)
            os.kill(old, signal.SIGUSR2)
            service.wait_for_stderr(rf"{BOOTING}(?!{worker}$)")
            new = int((tmp_path / "pid.2").read_text())
            os.kill(old, signal.SIGTERM)
            assert service.process.wait(10) == 0
            load.wait_for(streams=STREAMS)
            seconds = time.monotonic() - began
        assert_nothing_lost(load, seconds)
        # The new master has taken over the old one's name.
        await_that(lambda: pid.exists() and pid.read_text().strip() == str(new))
        os.kill(new, signal.SIGTERM)
        service.wait_for_stderr("Shutting down: Master$")


def answers(port):
    """The unit's own question before it counts as started."""
    command = ["curl", "--silent", "--fail", "--max-time", "10", f"http://127.0.0.1:{port}/"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
