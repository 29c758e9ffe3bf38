"""Fixtures that start things on real sockets and see to it that they end with the test.

`upstream` starts fake upstreams, `config_of` spells a configuration that points at them, `serve` runs the
proxy as users do: gunicorn in a process of its own. `serving` does so for the tests of a module that share
one. What the fakes do is in `fakes.py`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from fakes import HOST, LOOPBACK_CERT, FakeUpstream, await_that, free_port
from flask.testing import FlaskClient

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT = 20.0  # seconds
STOP_LIMIT = 5.0
QUIT_LIMIT = 0.4
NOTHING_IS_SKIPPED = os.environ.get("AIPROXY_REQUIRE_ALL") == "1"

if str(ROOT) not in sys.path:  # `pytest` alone leaves it out, `python -m pytest` does not
    sys.path.insert(0, str(ROOT))


def needs(program):
    """Skip a test where that program is missing, unless nothing may be skipped."""
    is_missing = shutil.which(program) is None
    return pytest.mark.skipif(is_missing and not NOTHING_IS_SKIPPED, reason=f"{program} is missing")


class Output:
    """What a process writes to one pipe, line by line; a thread of its own collects it to the end."""

    def __init__(self, pipe):
        self._pipe = pipe
        self._lines = []
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._collect, name="output")
        self._thread.start()

    def lines(self):
        """All lines so far, without their line ends."""
        with self._changed:
            return list(self._lines)

    def wait_for(self, regex, timeout, since):
        """Wait for a line, from number `since` on, that the expression is found in."""
        pattern = re.compile(regex)
        limit = time.monotonic() + timeout
        with self._changed:
            while True:
                for line in self._lines[since:]:
                    if match := pattern.search(line):
                        return match
                since = max(since, len(self._lines))
                left = limit - time.monotonic()
                if self._ended or left <= 0:
                    why = "the process ended" if self._ended else f"{timeout} s went by"
                    raise AssertionError(f"{why} without /{regex}/ in:\n" + "\n".join(self._lines))
                self._changed.wait(left)

    def join(self):
        """Wait until the pipe ended."""
        self._thread.join(STOP_LIMIT)

    def _collect(self):
        with self._pipe:
            for line in self._pipe:
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class Served:
    """A gunicorn that runs: its address, its process, what it wrote."""

    def __init__(self, command, directory, env, port):
        self.port = port
        self.config = Path(env["AIPROXY_CONFIG"])
        self._asked = False
        self.process = subprocess.Popen(
            command,
            cwd=directory,
            env={"PATH": os.environ["PATH"], **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # a process group of its own, workers included, that can be killed as one
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._stdout = Output(self.process.stdout)
        self._stderr = Output(self.process.stderr)

    @property
    def url(self):
        """Where it serves: `http://127.0.0.1:port`."""
        return f"http://{HOST}:{self.port}"

    def workers(self):
        """The process ids of its workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def stdout_lines(self):
        """The lines on standard output so far: the proxy's own log."""
        return self._stdout.lines()

    @property
    def stderr(self):
        """Standard error so far: gunicorn's log."""
        return "\n".join(self._stderr.lines())

    def wait_for_log(self, regex, timeout=10.0, since=0):
        """Wait for a line of standard output; `since` skips so many, say `len(stdout_lines())` before."""
        return self._stdout.wait_for(regex, timeout, since)

    def wait_for_stderr(self, regex, timeout=10.0, since=0):
        """Wait for a line of standard error, likewise."""
        return self._stderr.wait_for(regex, timeout, since)

    def wait_until_ready(self):
        """Wait until the port accepts; fails at once when the process ends instead."""

        def accepts():
            assert self.process.poll() is None, f"the start ended:\n{self.stderr}"
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection((HOST, self.port), 1).close()
                return True
            return False

        await_that(accepts, START_LIMIT)

    def wait_exit(self, timeout=START_LIMIT):
        """Wait until the process ended by itself and all it wrote was read; its exit code."""
        code = self.process.wait(timeout)
        self._stdout.join()
        self._stderr.join()
        return code

    def ask_to_stop(self):
        """Send SIGTERM, once."""
        if not self._asked:
            self._asked = True
            self.process.terminate()

    def ask_to_quit(self):
        """Send SIGQUIT, which cuts off what still runs, unless it was asked to stop."""
        if not self._asked:
            self._asked = True
            self.process.send_signal(signal.SIGQUIT)

    def quit(self):
        """End it at once. A worker that is only starting misses every signal but SIGKILL."""
        self.ask_to_quit()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(QUIT_LIMIT)
        if self.process.poll() is None:
            for worker in self.workers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
        self.stop()

    def stop(self):
        """SIGTERM, after five seconds SIGKILL to its process group; its exit code. Again does no harm."""
        self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_LIMIT)
        with contextlib.suppress(ProcessLookupError):  # workers that outlived the arbiter, or all of it
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.wait_exit(STOP_LIMIT)


def _fill_in(config, port):
    """The YAML text with an address in it, and the port; a text that names its own is left alone."""
    if not isinstance(config, str):
        whole = {"bind": HOST, "listen": port, **config}
        listen = str(whole["listen"]).removeprefix(":")
        return yaml.safe_dump(whole, sort_keys=False), 0 if listen.startswith("unix:") else int(listen)
    given = re.search(r'^listen:\s*"?:?(\d+)', config, re.MULTILINE)
    if given:
        return config, int(given[1])
    return f"bind: {HOST}\nlisten: {port}\n{config}", port


def begin_to_serve(path, config, *, workers=None, gunicorn_args=(), app_dir=ROOT, env=None, wait=True):
    """Write a configuration (a mapping, or YAML text) to that path and serve it by a real gunicorn.

    The address is filled in unless given. `wait=False` does not wait for the port, for starts that fail. The
    environment holds PATH, AIPROXY_CONFIG and `env`, nothing else. `app_dir` has another wsgi.py to serve.
    """
    text, port = _fill_in(config, free_port())
    path.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "gunicorn", "wsgi:app", "--graceful-timeout", "2"]
    command += ["--workers", str(workers)] if workers else []
    served = Served([*command, *gunicorn_args], app_dir, {"AIPROXY_CONFIG": str(path), **(env or {})}, port)
    if wait:
        try:
            served.wait_until_ready()
        except AssertionError:
            served.quit()
            raise
    return served


@contextlib.contextmanager
def serving(folder, config, **options):
    """Serve a configuration, as `begin_to_serve` does, for the tests of a module."""
    served = begin_to_serve(folder / "config.yaml", config, **options)
    try:
        yield served
    finally:
        served.quit()


@pytest.fixture
def serve(tmp_path):
    """Serve configurations, as `begin_to_serve` does; all stop at the end of the test."""
    started = []

    def start(config, **options):
        path = tmp_path / f"config-{len(started) + 1}.yaml"
        started.append(begin_to_serve(path, config, **options))
        return started[-1]

    yield start
    for served in started:
        served.ask_to_quit()  # all of them first, so that they end side by side
    for served in started:
        served.quit()
        # pytest shows this for a test that failed.
        print(f"--- {served.url} ended with {served.process.returncode}; its standard output:")
        print("\n".join(served.stdout_lines()), served.stderr, sep="\n--- its standard error:\n")


@pytest.fixture
def upstream():
    """Start a `FakeUpstream` of these replies; all stop at the end of the test."""
    with contextlib.ExitStack() as stack:

        def start(*script, **options):
            return stack.enter_context(FakeUpstream(*script, **options))

        yield start


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """The file that makes the fakes' certificates verify."""
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    path.write_text(LOOPBACK_CERT)
    return str(path)


@pytest.fixture
def config_of():
    """Spell a configuration: upstreams, named a, b, ... with tokens sk-test-a, ..., and more top-level keys.

    An upstream is a `FakeUpstream`, or its settings, where a `FakeUpstream` may stand as `base_url`.
    """

    def spell(upstreams, **extra):
        spelt = []
        for name, one in zip("abcdefgh", upstreams, strict=False):
            given = {"base_url": one} if isinstance(one, FakeUpstream) else one
            settings = {"name": name, "token": f"sk-test-{name}", **given}
            if isinstance(settings["base_url"], FakeUpstream):
                settings["base_url"] = settings["base_url"].url
            spelt.append(settings)
        return {"upstreams": spelt, **extra}

    return spell


@pytest.fixture(autouse=True)
def close_apps(monkeypatch):
    """Give back what the applications that a test builds hold: a thread, descriptors, connections."""
    from aiproxy.app import Service

    built = []

    def build(*args):
        built.append(Service(*args))
        return built[-1]

    monkeypatch.setattr("aiproxy.app.Service", build)
    yield
    for service in built:
        service.close()


@pytest.fixture(autouse=True)
def close_responses(monkeypatch):
    """Let Flask's test client read and close each response, as a server does."""
    monkeypatch.setattr(FlaskClient, "open", functools.partialmethod(FlaskClient.open, buffered=True))


def _transport(connect):
    @pytest.fixture
    def start():
        from aiproxy.transport.session import Transport

        with contextlib.closing(Transport(connect)) as one:
            yield one

    return start


transport = _transport(30.0)
impatient = _transport(0.15)  # its connect timeout is short
