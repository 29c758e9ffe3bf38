"""Starting and ending: `gunicorn wsgi:app` as users and service managers run it, and `make run`."""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import yaml
from conftest import ROOT, Served, begin_to_serve, needs, serving
from fakes import ASK, HOST, SPOKEN, STREAM, RawClient, events, free_port, hang
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

READY = r"^aiproxy serves (\S+) - try: (.*)$"
DEMO = {"upstreams": [{"base_url": "demo://answers"}]}
TWO_FAULTS = """\
bind: 127.0.0.1
listen: {port}
colour: blue
upstreams:
  - name: one
    base_url: "http://127.0.0.1:1"
    token: "sk-test-one"
    weight: heavy
"""


def gunicorn(*args, directory=ROOT, **env):
    """Run it to its end, which must come by itself."""
    return subprocess.run(
        [sys.executable, "-m", "gunicorn", *args, "wsgi:app"],
        cwd=directory,
        env={"PATH": os.environ["PATH"], **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )


@pytest.fixture
def site(tmp_path):
    """A directory to start in that has all of the program and no config.yaml."""
    place = tmp_path / "site"
    place.mkdir()
    for name in ("wsgi.py", "gunicorn.conf.py", "aiproxy"):
        (place / name).symlink_to(ROOT / name)
    return place


def assert_the_line_works(line):
    """The command of the line that says how to try it, run by a shell, brings a message."""
    ran = subprocess.run(
        ["sh", "-c", f"{line[2]} --silent --show-error --max-time 10"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert json.loads(ran.stdout)["type"] == "message"


# ------------------------------------------------------------------------------------ starts that fail


@pytest.fixture(scope="module", autouse=True)
def port_in_use(tmp_path_factory):
    """Started with the first test, since gunicorn tries for some seconds."""
    with socket.create_server((HOST, 0)) as taken:
        path = tmp_path_factory.mktemp("taken") / "config.yaml"
        served = begin_to_serve(path, {"listen": taken.getsockname()[1], **DEMO}, wait=False)
        yield served
        served.quit()


def test_a_named_configuration_that_is_missing_stops_the_start_with_one_line(tmp_path):
    ended = gunicorn(AIPROXY_CONFIG=str(tmp_path / "nowhere.yaml"))
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"{tmp_path}/nowhere.yaml: there is no such file")
    assert ended.stdout == ""


@pytest.mark.parametrize("env", [{}, {"AIPROXY_CONFIG": ""}], ids=["unset", "empty"])
def test_without_any_configuration_there_is_no_silent_demo(site, env):
    ended = gunicorn(directory=site, **env)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("config.yaml: there is no such file")


def test_without_a_name_config_yaml_is_served(site, serve):
    port = free_port()
    (site / "config.yaml").write_text(f"listen: {port}\nupstreams: [{{base_url: 'demo://answers'}}]\n")
    served = serve(f"listen: {port}\n", app_dir=site, env={"AIPROXY_CONFIG": ""})
    assert served.wait_for_log(READY)[1] == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("args", [(), ("--check-config",), ("--preload",)], ids=["start", "check", "preload"])
def test_all_faults_are_told_in_a_line_each_before_any_port_is_opened(tmp_path, args):
    path = tmp_path / "faulty.yaml"
    with socket.create_server((HOST, 0)) as taken:  # so that an attempt to open the port would be told too
        path.write_text(TWO_FAULTS.format(port=taken.getsockname()[1]))
        ended = gunicorn(*args, AIPROXY_CONFIG=str(path))
    assert (ended.returncode, ended.stdout) == (1, "")
    first, second = ended.stderr.splitlines()
    assert first.startswith(f"{path}: line 3: colour: ")
    assert second.startswith(f"{path}: line 8: upstreams[0].weight (one): ")
    assert all("expected" in line for line in (first, second))


# ------------------------------------------------------------------------------------------- settings


def test_gunicorn_s_settings_are_those_of_its_file_and_the_command_line_wins(tmp_path):
    path, port = tmp_path / "demo.yaml", free_port()
    path.write_text(yaml.safe_dump({"listen": port, **DEMO}))

    def settings(*args, **env):
        told = gunicorn("--print-config", *args, AIPROXY_CONFIG=str(path), **env).stdout
        found = dict(re.split(r"\s+= ", line, maxsplit=1) for line in told.splitlines() if " = " in line)
        assert found["worker_class"] == "aiproxy.server.worker.Worker"
        assert found["control_socket_disable"] == "True"
        return [found[name] for name in ("bind", "workers", "threads", "graceful_timeout")]

    assert settings() == [f"['127.0.0.1:{port}']", "1", "256", "600"]
    given = "--threads 7 --workers 2 --bind 127.0.0.1:1 --graceful-timeout 9"
    # The command line wins over the environment, and both over the file.
    assert settings("--threads", "8", GUNICORN_CMD_ARGS=given) == ["['127.0.0.1:1']", "2", "8", "9"]


# -------------------------------------------------------------------------------- starts that succeed


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The example configuration, on another port."""
    home = tmp_path_factory.mktemp("home")
    text = (ROOT / "config.example.yaml").read_text(encoding="utf-8")
    text = re.sub(r'(?m)^listen: ":8080"', f"listen: {free_port()}", text)
    with serving(home, text, env={"HOME": str(home)}) as served:
        yield served


@needs("curl")
def test_the_demo_says_that_it_is_one_and_its_line_s_command_shows_a_failover(demo):
    line = demo.wait_for_log(READY)
    assert line[1] == demo.url
    [banner] = [line for line in demo.stdout_lines() if "demo" in line]
    assert "config.yaml" in banner
    assert_the_line_works(line)
    demo.wait_for_log(r"attempt .* upstream=demo-failing .* status=500")
    demo.wait_for_log(r"done .* upstream=demo-answers")


@needs("curl")
def test_a_real_upstream_is_served_without_a_banner_and_the_line_s_request_suits_it(
    config_of, serve, upstream
):
    fake, model = upstream(), 'it\'s "odd" $HOME `id` back\\slash \U0001f600'
    served = serve(config_of([{"base_url": fake, "available_models": [model]}], allow_anonymous=True))
    line = served.wait_for_log(READY)
    served.wait_for_stderr("Booting worker")
    assert len(served.stdout_lines()) == 1
    assert [line for line in served.stderr.splitlines() if "[INFO]" not in line] == []
    assert_the_line_works(line)
    asked = fake.seen[0].json()
    assert (asked["model"], asked.keys() >= {"max_tokens", "messages"}) == (model, True)
    # The API refuses a request without the one, and does not take a form for JSON.
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", fake.seen[0].header("anthropic-version") or "none")
    assert fake.seen[0].header("content-type") == "application/json"


def test_a_warning_of_the_configuration_is_told_at_the_start(serve):
    served = serve({"upstreams": [{"base_url": "http://127.0.0.1:1/v1", "token": "sk-test-one"}]})
    served.wait_for_log(
        r"^warning: .*config-1\.yaml: line \d+: upstreams\[0\]\.base_url(?: \(.*\))?: ends in /v1"
    )


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


@needs("curl")
@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_an_ipv6_address_is_served_and_told(serve):
    served = serve({"bind": "::1", **DEMO}, wait=False)
    line = served.wait_for_log(READY)
    assert line[1] == f"http://[::1]:{served.port}"
    assert_the_line_works(line)


@needs("curl")
def test_a_unix_socket_is_served_told_and_taken_away_at_the_end(serve, tmp_path):
    place = tmp_path / "a socket.sock"
    served = serve({**DEMO, "bind": "0.0.0.0", "listen": f"unix:{place}"}, wait=False)
    line = served.wait_for_log(r"^aiproxy serves (unix:.*) - try: (.*)$")
    assert line[1] == f"unix:{place}"
    assert_the_line_works(line)
    assert "every user of this machine is served" in "\n".join(served.stdout_lines())
    served.ask_to_stop()
    assert served.wait_exit(5) == 0
    assert not place.exists()


def test_a_closed_standard_output_fails_no_request(tmp_path):
    port, path = free_port(), tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"listen": port, **DEMO}))
    command = ["bash", "-c", f"exec {sys.executable} -m gunicorn wsgi:app >&-"]
    served = Served(command, ROOT, {"AIPROXY_CONFIG": str(path)}, port)
    try:
        served.wait_until_ready()
        with RawClient.to(served.url) as client:
            client.post(ASK)
            assert client.read().status == 200
    finally:
        served.quit()


# ------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize("busy", ["kept connection", "stream", "whole answer"])
def test_ctrl_c_ends_quickly_and_quietly(config_of, serve, upstream, busy):
    fake = upstream()
    served = serve(config_of([fake]), gunicorn_args=["--graceful-timeout", "600"])  # as in gunicorn.conf.py
    served.wait_for_stderr("Booting worker")
    with RawClient.to(served.url) as client:
        keep_busy(client, fake, busy)
        os.killpg(served.process.pid, signal.SIGINT)  # a terminal sends it to all of them
        assert served.wait_exit(5) == 0
    said = served.stderr + "\n".join(served.stdout_lines())
    assert "Traceback" not in said
    assert not re.search(r"\[(WARNING|ERROR|CRITICAL)\]", said)


def test_ctrl_c_ends_quickly_while_many_connect(serve):
    # gunicorn's own handler waits for a lock that the very thread it interrupts holds to start a request.
    served = serve(DEMO, gunicorn_args=["--graceful-timeout", "600"])
    with RawClient.to(served.url) as client:
        client.request("GET", "/nowhere")
        assert client.read().status == 404
    over, begun = threading.Event(), threading.Semaphore(0)

    def connect():
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for _ in range(200):
                stack.enter_context(socket.create_connection((HOST, served.port), 1))
                begun.release()
            over.wait(9)

    threads = [threading.Thread(target=connect) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        assert begun.acquire(timeout=5)
    try:
        os.killpg(served.process.pid, signal.SIGINT)
        assert served.wait_exit(5) == 0
    finally:
        over.set()
        for thread in threads:
            thread.join()


def keep_busy(client, fake, how):
    if how == "kept connection":
        client.post(ASK)
        assert client.read().status == 200
    elif how == "stream":
        fake.script(events(SPOKEN[:4], then="hang"))
        client.post(STREAM)
        assert next(client.answer().pieces()).data
    else:
        fake.script(hang())
        client.post(ASK)
        fake.wait_for(1)


def test_sigterm_ends_with_code_0_when_nothing_is_running(config_of, serve, upstream):
    served = serve(config_of([upstream()]))
    with RawClient.to(served.url) as client:  # it is up, and would not miss a signal any more
        keep_busy(client, None, "kept connection")
    served.ask_to_stop()
    assert served.wait_exit(5) == 0
    assert "Traceback" not in served.stderr


# ------------------------------------------------------------------------------- make, requirements


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose virtual environment has a gunicorn that only says how it was called."""
    place = tmp_path / "checkout"
    (place / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "config.example.yaml"):
        shutil.copy(ROOT / name, place / name)
    stub = place / ".venv" / "bin" / "gunicorn"
    stub.write_text('#!/bin/sh\necho "$@ with ${AIPROXY_CONFIG-no AIPROXY_CONFIG}"\nexit ${CODE:-0}\n')
    stub.chmod(0o755)
    (place / ".venv" / "installed").touch()
    return place


def make(place, *args, **env):
    environment = {"PATH": os.environ["PATH"], **env}
    command = ["make", "--no-print-directory", *args]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


def test_make_run_serves_what_aiproxy_config_names_else_config_yaml_else_the_example(checkout):
    assert make(checkout, "run").stdout == "wsgi:app with config.example.yaml\n"
    assert make(checkout, "run", AIPROXY_CONFIG="mine.yaml").stdout == "wsgi:app with mine.yaml\n"
    (checkout / "config.yaml").touch()
    assert make(checkout, "run").stdout == "wsgi:app with no AIPROXY_CONFIG\n"
    assert make(checkout, "run", AIPROXY_CONFIG="mine.yaml").stdout == "wsgi:app with mine.yaml\n"
    assert make(checkout, "run", CODE="1").returncode != 0


def test_make_run_sets_up_first_and_again_when_the_requirements_change(checkout):
    assert "pip install" not in make(checkout, "-n", "run").stdout
    later = time.time() + 10
    os.utime(checkout / "requirements.txt", (later, later))
    assert "pip install" in make(checkout, "-n", "run").stdout
    (checkout / ".venv" / "installed").unlink()
    told = make(checkout, "-n", "run").stdout
    assert re.search(r"-m venv .venv\n.*pip install .*-r requirements\.txt\n", told)
    assert "requirements-dev" not in told


def test_make_test_checks_everything(checkout):
    (checkout / ".venv" / "installed-dev").touch()
    node = checkout / "tests" / "typescript"
    node.mkdir(parents=True)
    (node / "package-lock.json").touch()
    told = make(checkout, "-n", "test").stdout
    for tool in ("ruff check .", "ruff format --check .", "mypy", "python -m pytest"):
        assert f".venv/bin/{tool}\n" in told


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_all_requirements_are_pinned_to_what_is_tested(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    if "-r requirements.txt" in lines:
        lines += (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line.strip() and line[0] not in "#-")
    assert pins == {name: importlib.metadata.version(name) for name in pins}
    needed = {
        canonicalize_name(requirement.name)
        for name in pins
        for requirement in map(Requirement, importlib.metadata.requires(name) or ())
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    assert needed <= {canonicalize_name(name) for name in pins}


# Last, so that it had its time: see the fixture.
def test_a_port_in_use_ends_the_start_with_one_line_that_says_what_to_do(port_in_use):
    assert port_in_use.wait_exit() == 1
    (line,) = [line for line in port_in_use.stderr.splitlines() if " [INFO] " not in line]
    assert line == (
        f"127.0.0.1:{port_in_use.port} cannot be listened on (Address already in use): "
        "`ss -ltnp` shows who listens there; end it, or set another `listen`"
    )
    assert port_in_use.stdout_lines() == []


@pytest.mark.parametrize("module", ["aiproxy.__main__", "aiproxy.command_line", "wsgi"])
def test_an_older_python_gets_one_line(module):
    code = f"import sys; sys.version_info = (3, 10, 0); import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "aiproxy needs Python 3.11 or newer\n")
