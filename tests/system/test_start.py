"""Starting and ending: `gunicorn wsgi:app` as users and service managers run it, and `make run`."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Served
from fakes import HOST, RawClient, events, free_port, hang, message_events
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ASK = {"model": "claude-x", "max_tokens": 16, "messages": [{"role": "user", "content": "Hi"}]}
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


def settings(*args, **env):
    """What gunicorn makes of its file, its command line and its environment."""
    told = gunicorn("--print-config", *args, **env)
    assert told.returncode == 0, told.stderr
    return dict(re.split(r"\s+= ", line, maxsplit=1) for line in told.stdout.splitlines() if " = " in line)


@pytest.fixture
def site(tmp_path):
    """A directory to start in that has all of the program and no config.yaml."""
    place = tmp_path / "site"
    place.mkdir()
    for name in ("wsgi.py", "gunicorn.conf.py", "aiproxy"):
        (place / name).symlink_to(ROOT / name)
    return place


@pytest.fixture
def example(tmp_path):
    """A configuration that starts: the demo."""
    path = tmp_path / "demo.yaml"
    path.write_text(f"listen: {free_port()}\nupstreams: [{{base_url: 'demo://answers'}}]\n")
    return str(path)


def try_line(served):
    """The line that says how to try it: the address that it names, and the command."""
    found = served.wait_for_log(READY)
    return found[1], found[2]


def run_as_a_user_would(command):
    """The status and body that the line's command brings, run by a shell."""
    assert shutil.which("curl"), "this test needs curl"
    ran = subprocess.run(
        ["sh", "-c", f"{command} --silent --show-error --max-time 5 --write-out '\n%{{http_code}}'"],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    body, _, status = ran.stdout.rpartition("\n")
    return int(status), json.loads(body)


@pytest.fixture
def said_when_ready(tmp_path, monkeypatch, capsys):
    """The lines that gunicorn.conf.py says when it serves these upstreams at these addresses."""

    def say(*upstreams, at=("http://127.0.0.1:8080",), anonymous=True):
        path = tmp_path / "config.yaml"
        path.write_text(
            yaml.safe_dump({"allow_anonymous": anonymous, "upstreams": list(upstreams)}, allow_unicode=True),
            encoding="utf-8",
        )
        monkeypatch.setenv("AIPROXY_CONFIG", str(path))
        told = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
        told["when_ready"](types.SimpleNamespace(LISTENERS=list(at)))
        return capsys.readouterr().out.splitlines()

    return say


def as_a_shell_reads(lines):
    """What curl would be called with: the URL, and the options as (name, value) pairs."""
    command = re.search(READY, lines[-1])[2]
    show = "curl() { printf '%s\\0' \"$@\"; }"
    ran = subprocess.run(["sh", "-c", f"{show}; {command}"], capture_output=True, text=True, check=True)
    args = ran.stdout.split("\0")[:-1]
    urls = [arg for n, arg in enumerate(args) if arg.startswith("http") and not args[n - 1].startswith("-")]
    assert len(urls) == 1, args
    options = list(itertools.pairwise(args))
    return urls[0], options


def real(**given):
    """An upstream's settings that is no demo."""
    return {"name": "one", "base_url": "http://127.0.0.1:1", "token": "sk-test-one", **given}


# ------------------------------------------------------------------------------------ starts that fail


@pytest.fixture(scope="module", autouse=True)
def port_in_use(tmp_path_factory):
    """Started with the first test, since gunicorn tries for some seconds."""
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = tmp_path_factory.mktemp("taken") / "config.yaml"
        path.write_text(f"listen: {port}\nupstreams: [{{base_url: 'demo://answers'}}]\n")
        command = [sys.executable, "-m", "gunicorn", "wsgi:app"]
        served = Served(command, ROOT, {"AIPROXY_CONFIG": str(path)}, port)
        try:
            yield served
        finally:
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
    assert try_line(served)[0] == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("args", [(), ("--check-config",), ("--preload",)], ids=["start", "check", "preload"])
def test_all_faults_are_told_in_a_line_each_before_any_port_is_opened(tmp_path, args):
    path = tmp_path / "faulty.yaml"
    with socket.socket() as taken:  # so that an attempt to open the port would be told too
        taken.bind((HOST, 0))
        taken.listen()
        path.write_text(TWO_FAULTS.format(port=taken.getsockname()[1]))
        ended = gunicorn(*args, AIPROXY_CONFIG=str(path))
    assert ended.returncode == 1
    first, second = ended.stderr.splitlines()
    assert first.startswith(f"{path}: line 3: colour: ")
    assert second.startswith(f"{path}: line 8: upstreams[0].weight (one): ")
    assert all("expected" in line for line in (first, second))
    assert ended.stdout == ""


def test_a_fault_that_only_the_worker_meets_ends_the_start_too(tmp_path):
    path, other = tmp_path / "faulty.yaml", tmp_path / "other.py"
    port = free_port()
    path.write_text(TWO_FAULTS.format(port=port))
    other.write_text(f"bind = '127.0.0.1:{port}'\ncontrol_socket_disable = True\n")
    ended = gunicorn("-c", str(other), AIPROXY_CONFIG=str(path))
    assert ended.returncode not in (0, 1)
    assert ended.stderr.count("Booting worker") == 1  # it is not tried again for ever
    assert ended.stderr.count("colour: ") == ended.stderr.count("upstreams[0].weight (one): ") == 1
    assert "Traceback" not in ended.stderr + ended.stdout


# ------------------------------------------------------------------------------------------- settings


def test_gunicorn_s_settings_are_those_of_its_file(example):
    found = settings(AIPROXY_CONFIG=example)
    port = re.search(r"listen: (\d+)", Path(example).read_text())[1]
    assert found["bind"] == f"['127.0.0.1:{port}']"
    assert found["worker_class"] == "aiproxy.server.worker.Worker"
    assert found["workers"] == "1"
    assert found["threads"] == "256"
    assert found["graceful_timeout"] == "600"
    assert found["keepalive"] == "75"
    assert found["control_socket_disable"] == "True"
    assert int(found["worker_connections"]) > 256


def test_the_command_line_and_its_environment_win(example):
    args = "--threads 7 --workers 2 --bind 127.0.0.1:1 --graceful-timeout 9"
    found = settings("--threads", "8", "--keep-alive", "3", AIPROXY_CONFIG=example, GUNICORN_CMD_ARGS=args)
    assert found["threads"] == "8"  # the command line over the environment
    assert found["workers"] == "2"
    assert found["bind"] == "['127.0.0.1:1']"
    assert found["graceful_timeout"] == "9"
    assert found["keepalive"] == "3"
    assert found["worker_class"] == "aiproxy.server.worker.Worker"


def test_another_bind_address_is_served_and_told(serve):
    port = free_port()
    served = serve(DEMO, wait=False, env={"GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{port}"})
    address, command = try_line(served)
    assert address == f"http://127.0.0.1:{port}"
    assert run_as_a_user_would(command)[0] == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, served.port), 1)


# -------------------------------------------------------------------------------- starts that succeed


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The example configuration, on another port."""
    port = free_port()
    home = tmp_path_factory.mktemp("home")
    text = (ROOT / "config.example.yaml").read_text(encoding="utf-8")
    path = home / "config.yaml"
    path.write_text(re.sub(r'(?m)^listen: ":8080"', f"listen: {port}", text), encoding="utf-8")
    env = {"PATH": os.environ["PATH"], "AIPROXY_CONFIG": str(path), "HOME": str(home)}
    served = Served([sys.executable, "-m", "gunicorn", "wsgi:app"], ROOT, env, port)
    served.home = home
    try:
        served.wait_until_ready()
        yield served
    finally:
        served.quit()


def test_the_demo_says_that_it_is_one(demo):
    try_line(demo)
    banner = [line for line in demo.stdout_lines() if "demo" in line]
    assert len(banner) == 1
    assert "config.yaml" in banner[0]


def test_the_ready_line_s_curl_command_works_in_the_demo(demo):
    address, command = try_line(demo)
    assert address == demo.url
    status, message = run_as_a_user_would(command)
    assert status == 200
    assert message["type"] == "message"
    demo.wait_for_log(r"attempt .* upstream=demo-failing .* status=500")
    demo.wait_for_log(r"done .* upstream=demo-answers")


def test_there_is_no_control_socket(demo):
    demo.wait_for_stderr("Booting worker")
    pids = [demo.process.pid, *children_of(demo.process.pid)]
    assert len(pids) == 2
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    listening = {row[6] for row in rows if row[3] == "00010000"}
    held = {os.readlink(fd) for pid in pids for fd in Path(f"/proc/{pid}/fd").iterdir()}
    assert not [inode for inode in listening if f"socket:[{inode}]" in held]
    assert sorted(path.name for path in demo.home.iterdir()) == ["config.yaml"]
    assert "ontrol socket" not in demo.stderr


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_real_upstream_is_served_without_a_banner_and_the_line_s_request_suits_it(
    config_of, serve, upstream
):
    fake = upstream()
    served = serve(config_of([fake], allow_anonymous=True))
    _, command = try_line(served)
    served.wait_for_stderr("Booting worker")
    assert len(served.stdout_lines()) == 1
    assert [line for line in served.stderr.splitlines() if "[INFO]" not in line] == []
    assert run_as_a_user_would(command)[0] == 200
    assert fake.seen[0].json().keys() >= {"model", "max_tokens", "messages"}
    # The API refuses a request without the one, and does not take a form for JSON.
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", fake.seen[0].header("anthropic-version") or "none")
    assert fake.seen[0].header("content-type") == "application/json"


def test_the_banner_comes_with_any_demo_upstream_that_is_on(said_when_ready):
    mixed = said_when_ready(real(), {"base_url": "demo://answers"})
    assert "demo" in mixed[0]
    assert len(mixed) == 2
    assert len(said_when_ready(real(), {"base_url": "demo://answers", "enabled": False})) == 1


def test_a_warning_of_the_configuration_is_told_at_the_start(said_when_ready):
    first, _ = said_when_ready(real(base_url="http://127.0.0.1:1/v1"))
    assert re.match(
        r"warning: .*config\.yaml: line \d+: upstreams\[0\]\.base_url(?: \(.*\))?: ends in /v1", first
    )


def test_a_loopback_address_without_keys_is_served_with_a_warning(said_when_ready):
    first, _ = said_when_ready(real(), anonymous=False)
    assert first == "warning: no api_keys are set: every user of this machine is served"


@pytest.mark.parametrize(
    "model", ["claude-x", 'it\'s "odd"', "back\\slash", "$HOME `id` %s", "größer \U0001f600"]
)
def test_the_ready_line_asks_for_a_model_that_is_served(said_when_ready, model):
    url, options = as_a_shell_reads(said_when_ready(real(), real(name="two", available_models=[model])))
    assert url == "http://127.0.0.1:8080/v1/messages"
    (body,) = [value for name, value in options if name in ("-d", "--data", "--json")]
    assert json.loads(body)["model"] == model


def test_the_ready_line_asks_for_no_model_of_an_upstream_that_is_off(said_when_ready):
    off = real(name="off", available_models=["claude-off"], enabled=False)
    assert "claude-off" not in said_when_ready(off, real(available_models=["claude-on"]))[-1]


def test_the_ready_line_knows_unix_sockets(said_when_ready):
    url, options = as_a_shell_reads(said_when_ready(real(), at=["unix:/run/aiproxy.sock"]))
    assert ("--unix-socket", "/run/aiproxy.sock") in options
    assert url.endswith("/v1/messages")


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_an_ipv6_address_is_served_and_told(serve):
    served = serve({"bind": "::1", **DEMO}, wait=False)
    address, command = try_line(served)
    assert address == f"http://[::1]:{served.port}"
    assert run_as_a_user_would(command)[0] == 200


def test_a_unix_socket_is_served_told_and_taken_away_at_the_end(serve, tmp_path):
    place = tmp_path / "a socket.sock"
    served = serve({**DEMO, "bind": "0.0.0.0", "listen": f"unix:{place}"}, wait=False)
    found = served.wait_for_log(r"^aiproxy serves (unix:.*) - try: (.*)$")
    assert found[1] == f"unix:{place}"
    assert run_as_a_user_would(found[2])[0] == 200
    assert "every user of this machine is served" in "\n".join(served.stdout_lines())
    served.ask_to_stop()
    assert served.wait_exit(4) == 0
    assert not place.exists()


# ------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize("busy", ["kept connection", "stream", "whole answer"])
def test_ctrl_c_ends_quickly_and_quietly(config_of, serve, upstream, busy):
    fake = upstream()
    served = serve(config_of([fake]), gunicorn_args=["--graceful-timeout", "600"])  # as in gunicorn.conf.py
    served.wait_for_stderr("Booting worker")
    with RawClient.to(served.url) as client:
        keep_busy(client, fake, busy)
        began = time.monotonic()
        os.killpg(served.process.pid, signal.SIGINT)  # a terminal sends it to all of them
        assert served.wait_exit(3) == 0
        assert time.monotonic() - began < 2
    said = served.stderr + "\n".join(served.stdout_lines())
    assert "Traceback" not in said
    assert not re.search(r"\[(WARNING|ERROR|CRITICAL)\]", said)


def test_ctrl_c_ends_quickly_while_many_connect(serve):
    # gunicorn's own handler waits for a lock that the very thread it interrupts holds to start a request.
    served = serve(DEMO, gunicorn_args=["--graceful-timeout", "600"])
    with RawClient.to(served.url) as client:
        client.request("GET", "/nowhere")
        assert client.read().status == 404
    over = threading.Event()

    def connect():
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for _ in range(200):
                stack.enter_context(socket.create_connection((HOST, served.port), 1))
            over.wait(9)

    threads = [threading.Thread(target=connect) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    try:
        os.killpg(served.process.pid, signal.SIGINT)
        assert served.wait_exit(3) == 0
    finally:
        over.set()
        for thread in threads:
            thread.join()


def keep_busy(client, fake, how):
    if how == "kept connection":
        client.post(ASK)
        assert client.read().status == 200
    elif how == "stream":
        fake.script(events(message_events()[:4], then="hang"))
        client.post({**ASK, "stream": True})
        assert next(client.answer().pieces()).data
    else:
        fake.script(hang())
        client.post(ASK)
        fake.wait_for(1)


def test_sigterm_ends_with_code_0_when_nothing_is_running(config_of, serve, upstream):
    served = serve(config_of([upstream()]))
    served.wait_for_stderr("Booting worker")
    served.ask_to_stop()
    assert served.wait_exit(4) == 0
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
    return subprocess.run(
        ["make", "--no-print-directory", *args],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )


def test_make_run_without_a_configuration_serves_the_example(checkout):
    assert make(checkout, "run").stdout == "wsgi:app with config.example.yaml\n"


def test_make_run_serves_config_yaml_where_there_is_one(checkout):
    (checkout / "config.yaml").touch()
    assert make(checkout, "run").stdout == "wsgi:app with no AIPROXY_CONFIG\n"


@pytest.mark.parametrize("present", [False, True])
def test_make_run_respects_aiproxy_config(checkout, present):
    if present:
        (checkout / "config.yaml").touch()
    assert make(checkout, "run", AIPROXY_CONFIG="mine.yaml").stdout == "wsgi:app with mine.yaml\n"


def test_make_run_fails_when_the_start_fails(checkout):
    assert make(checkout, "run", CODE="1").returncode != 0


def test_make_run_sets_up_first_and_only_when_needed(checkout):
    assert "pip install" not in make(checkout, "-n", "run").stdout
    (checkout / ".venv" / "installed").unlink()
    told = make(checkout, "-n", "run").stdout
    assert re.search(r"-m venv .venv\n.*pip install .*-r requirements\.txt\n", told)
    assert "requirements-dev" not in told


def test_make_run_sets_up_again_when_the_requirements_change(checkout):
    later = time.time() + 10
    os.utime(checkout / "requirements.txt", (later, later))
    assert "pip install" in make(checkout, "-n", "run").stdout


def test_make_test_checks_everything(checkout):
    (checkout / ".venv" / "installed-dev").touch()
    node = checkout / "tests" / "typescript"
    node.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "typescript" / "package-lock.json", node)
    told = make(checkout, "-n", "test").stdout
    for tool in ("ruff check .", "ruff format --check .", "mypy", "python -m pytest"):
        assert f".venv/bin/{tool}\n" in told


def requirements(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.name)
def test_requirements_are_pinned_exactly(path):
    for line in requirements(path.name):
        assert line == "-r requirements.txt" or re.fullmatch(r"[a-z0-9._-]+==[0-9][0-9a-z.+]*", line), line


def test_the_pins_are_what_is_tested():
    for line in requirements("requirements.txt") + requirements("requirements-dev.txt")[1:]:
        name, _, version = line.partition("==")
        assert importlib.metadata.version(name) == version


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.name)
def test_what_the_requirements_require_is_pinned_too(path):
    lines = {*requirements(path.name), *requirements("requirements.txt")} - {"-r requirements.txt"}
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines}
    needed = {
        canonicalize_name(requirement.name)
        for name in pinned
        for requirement in map(Requirement, importlib.metadata.requires(name) or ())
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    assert needed <= pinned


def test_a_closed_standard_output_fails_no_request(tmp_path):
    port = free_port()
    path = tmp_path / "config.yaml"
    path.write_text(f"listen: {port}\nupstreams: [{{base_url: 'demo://answers'}}]")
    command = ["bash", "-c", f"exec {sys.executable} -m gunicorn wsgi:app >&-"]
    served = Served(command, ROOT, {"PATH": os.environ["PATH"], "AIPROXY_CONFIG": str(path)}, port)
    try:
        served.wait_until_ready()
        with RawClient.to(served.url) as client:
            client.post(ASK)
            assert client.read().status == 200
    finally:
        served.quit()


# Last, so that it had its time: see the fixture.
def test_a_port_in_use_ends_the_start_and_says_which(port_in_use):
    code = port_in_use.wait_exit(10)
    assert code != 0
    assert f"('127.0.0.1', {port_in_use.port})" in port_in_use.stderr.splitlines()[-1]
    assert "in use" in port_in_use.stderr
    assert "Traceback" not in port_in_use.stderr
    assert port_in_use.stdout_lines() == []


@pytest.mark.parametrize("module", ["aiproxy.__main__", "wsgi"])
def test_an_older_python_gets_one_line(module):
    code = f"import sys; sys.version_info = (3, 10, 0); import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "aiproxy needs Python 3.11 or newer\n")
