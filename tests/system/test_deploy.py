"""What deploy/ ships: its nginx.conf in front of the application, its unit, its README."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, Served, needs
from fakes import (
    ASK,
    HOST,
    SPOKEN,
    STREAM,
    FakeUpstream,
    RawClient,
    answer,
    close_now,
    dead_port,
    events,
    free_port,
    hang,
    later,
    whole,
)
from front import SHIPPED, Front

from aiproxy.config import Config, UpstreamSettings, load

UNIT = (ROOT / "deploy" / "aiproxy@.service").read_text()
README = (ROOT / "deploy" / "README.md").read_text()
SESSION = "x-claude-code-session-id"


@pytest.fixture(scope="module")
def fake():
    with FakeUpstream() as one:
        yield one


@pytest.fixture(scope="module")
def served(fake, tmp_path_factory):
    """The application, by the unit's own command line; both instances are this one process."""
    config = tmp_path_factory.mktemp("aiproxy") / "config.yaml"
    config.write_text(f"upstreams: [{{base_url: '{fake.url}', token: sk-test-a}}]\nbreaker: {{failures: 99}}")
    port, other = free_port(), free_port()
    command = re.search(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)[1]
    command = command.replace("/opt/aiproxy/.venv/bin/gunicorn", f"{sys.executable} -m gunicorn")
    command = command.replace("127.0.0.1:808%i", f"{HOST}:{port} --bind {HOST}:{other}")
    command = command.replace("/run/aiproxy/%i", str(config.parent)) + " --graceful-timeout 2"
    one = Served(shlex.split(command), ROOT, {"AIPROXY_CONFIG": str(config)}, port)
    one.other_port = other
    try:
        one.wait_until_ready()
        yield one
    finally:
        one.stop()
        print("\n".join(one.stdout_lines()), one.stderr, sep="\n")


@pytest.fixture(scope="module")
def front(served, tmp_path_factory):
    """deploy/nginx.conf in front of the application."""
    with Front(tmp_path_factory.mktemp("nginx"), (served.port, served.other_port)) as one:
        yield one


@pytest.fixture
def bare(tmp_path, upstream):
    """deploy/nginx.conf in front of two fakes, which show what an instance gets to see."""
    one, two = upstream(), upstream()
    with Front(tmp_path / "nginx", (one.port, two.port)) as nginx:
        nginx.instances = one, two
        yield nginx


def asked(front, body=ASK, target="/v1/messages", headers=(), method="POST"):
    """One request over a connection of its own."""
    with front.client() as client:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        client.request(method, target, data, [("content-type", "application/json"), *headers])
        return client.read()


def sessions(count):
    return [[(SESSION, f"session-{n}")] for n in range(count)]


@needs("nginx")
def test_each_event_reaches_the_client_before_the_next_is_sent_and_uncompressed(front, fake):
    gates = [threading.Event() for _ in SPOKEN[4:]]
    fake.script(
        events([*SPOKEN[:4], *(item for pair in zip(gates, SPOKEN[4:], strict=True) for item in pair)])
    )
    with front.client() as client:
        client.post(STREAM, headers=[("accept-encoding", "gzip, deflate, br")])
        got = client.answer()
        pieces = got.pieces()
        for n, gate in enumerate(gates, 4):
            while got.body != b"".join(SPOKEN[:n]):
                next(pieces)
            gate.set()
        got.read()
    assert (got.status, got.ending, got.body) == (200, "end", b"".join(SPOKEN))
    assert got.header("content-encoding") is None


@needs("nginx")
def test_events_are_live_over_http_2_too(front, fake):
    gate = threading.Event()
    fake.script(events([*SPOKEN[:5], gate, *SPOKEN[5:]]))
    command = front.curl("--no-buffer", f"{front.url}/v1/messages", "--data", json.dumps(STREAM))
    with subprocess.Popen([*command, "--write-out", "HTTP/%{http_version}"], stdout=subprocess.PIPE) as curl:
        early = b""
        while b"one" not in early:
            early += os.read(curl.stdout.fileno(), 65536)
        gate.set()
        rest = curl.stdout.read()
    assert b"message_stop" not in early
    assert early + rest == b"".join(SPOKEN) + b"HTTP/2"


@needs("nginx")
def test_a_stream_that_breaks_off_does_not_end_well(front, fake):
    fake.script(events(SPOKEN[:6], then="cut"), events(SPOKEN[:6], then="cut"))
    got = asked(front, STREAM)
    assert b"event: error" in got.body
    assert got.ending in ("cut", "reset")
    command = front.curl("--output", os.devnull, f"{front.url}/v1/messages", "--data", json.dumps(STREAM))
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode != 0


@needs("nginx")
def test_a_body_of_30_mb_passes_whole(front, fake):
    body = json.dumps({**ASK, "padding": "x" * 30 * 1024 * 1024}).encode()
    before = len(fake.seen)
    assert asked(front, body).status == 200
    assert fake.seen[before].body == body


@needs("nginx")
@pytest.mark.parametrize(("size", "whose"), [(33, "32 MB"), (513, "512 MB")], ids=["aiproxy's", "nginx's"])
def test_a_body_too_large_is_refused_in_the_api_s_shape(front, fake, size, whose):
    before = len(fake.seen)
    with front.client() as client:
        head = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: {size << 20}\r\n\r\n"
        client.send(head.encode())
        with contextlib.suppress(OSError):  # nginx may answer before it has read all
            for _ in range(min(size, 33)):
                client.send(b" " * (1 << 20))
        got = client.read()
    told = got.json()
    assert (got.status, told["type"], told["error"]["type"]) == (413, "error", "request_too_large")
    assert whose in told["error"]["message"]
    assert got.header("content-type") == "application/json"
    assert len(fake.seen) == before


@needs("nginx")
@pytest.mark.parametrize("body", [ASK, STREAM], ids=["whole", "stream"])
def test_a_client_that_leaves_is_noticed_within_a_second(front, fake, body):
    fake.script(hang())
    seen = len(fake.seen)
    with front.client() as client:
        client.post(body)
        fake.wait_for(seen + 1)
        began = time.monotonic()
    assert fake.wait_left(fake.seen[-1].connection) - began < 1


@needs("nginx")
@pytest.mark.parametrize(
    ("body", "reply"),
    [(ASK, later(0.75, answer())), (STREAM, events([*SPOKEN[:5], 0.75, *SPOKEN[5:]]))],
    ids=["whole", "stream"],
)
def test_a_silence_of_150_seconds_survives(served, fake, tmp_path, body, reply):
    # A 200th of all times, those that the file leaves at nginx's default included: 60 s would be 0.3 s.
    with Front(tmp_path / "nginx", (served.port, served.other_port), scale=200) as front:
        fake.script(reply)
        got = asked(front, body)
    assert (got.status, got.ending) == (200, "end")


def test_nginx_waits_longer_than_aiproxy_may_take():
    waits = int(re.search(r"proxy_read_timeout (\d+)s;", SHIPPED)[1])
    timeouts = Config(upstreams=(UpstreamSettings(name="a", base_url="http://a", token=""),)).timeouts
    assert waits > 2 * (timeouts.answer + timeouts.connect)
    assert waits > timeouts.idle


@needs("nginx")
def test_aiproxy_is_told_how_the_client_asked(bare):
    forged = [("x-forwarded-for", "192.0.2.1"), ("x-forwarded-proto", "gopher")]
    assert asked(bare, b"", "/v1/models?limit=2", forged, "GET").status == 200
    (seen,) = [seen for fake in bare.instances for seen in fake.seen]
    assert (seen.method, seen.target) == ("GET", "/v1/models?limit=2")
    told = {"host": HOST, "x-forwarded-for": HOST, "x-forwarded-proto": "https", "connection": "close"}
    assert {name: seen.every(name) for name in told} == {name: [value] for name, value in told.items()}


@needs("nginx")
def test_a_stopped_instance_costs_nothing(served, fake, tmp_path):
    for n, instances in enumerate([(dead_port(), served.port), (served.port, dead_port())]):
        with Front(tmp_path / f"nginx-{n}", instances) as front:
            assert [asked(front, headers=each).status for each in sessions(24)] == [200] * 24
            assert 0 < len([line for line in front.log(24) if ", " in line]) < 24


@needs("nginx")
def test_a_post_that_was_sent_is_never_sent_again(tmp_path, upstream):
    fakes = [upstream(default=close_now()) for _ in "ab"]
    with Front(tmp_path / "nginx", tuple(each.port for each in fakes)) as front:
        replies = [asked(front, headers=each) for each in sessions(6)]
    assert [reply.status for reply in replies] == [502] * 6
    assert sum(len(each.seen) for each in fakes) == 6
    assert replies[0].json()["error"]["type"] == "api_error"


@needs("nginx")
def test_no_instance_at_all_is_a_502_in_the_api_s_shape_and_no_longer_than_that(tmp_path):
    ports = dead_port(), dead_port()
    with Front(tmp_path / "nginx", ports) as front:
        for port in ports:
            got = asked(front)
            assert (got.status, got.json()["error"]["type"]) == (502, "api_error")
            assert got.header("content-type") == "application/json"
            with FakeUpstream(port=port):
                assert asked(front).status == 200


@needs("nginx")
def test_a_slow_upload_waits_at_nginx(bare):
    with bare.client() as slow:
        slow.send(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        assert asked(bare).status == 200
        assert sum(fake.connections for fake in bare.instances) == 1
        slow.send(b" " * 7 + b"}")
        slow.answer()
    assert sum(fake.connections for fake in bare.instances) == 2


@needs("nginx")
def test_a_conversation_or_a_client_without_a_session_stays_with_one_instance_and_many_are_spread(bare):
    for n in [*range(25), *range(25)]:  # by turns, an odd number would not come round to the same
        for header, value in ((SESSION, "session-{}"), ("x-api-key", "{}"), ("authorization", "Bearer {}")):
            assert asked(bare, headers=[(header, value.format(n))]).status == 200
    for header in (SESSION, "x-api-key", "authorization"):
        one, two = ({seen.header(header) for seen in fake.seen} - {None} for fake in bare.instances)
        assert one.isdisjoint(two)
        assert min(len(one), len(two)) >= 2


@needs("nginx")
@pytest.mark.parametrize(
    "target", ["/metrics", "/status", "/status/", "/status/x", "//metrics", "/%6detrics?x", "/v1/../status"]
)
def test_what_is_for_the_operator_is_not_served_to_the_world(bare, target):
    got = asked(bare, b"", target, method="GET")
    assert (got.status, got.json()["error"]["type"]) == (404, "not_found_error")
    assert [fake.seen for fake in bare.instances] == [[], []]


@needs("nginx")
def test_an_answer_cannot_command_nginx(bare):
    commands = [("x-accel-redirect", "/elsewhere"), ("x-accel-buffering", "yes"), ("x-accel-limit-rate", "1")]
    for fake in bare.instances:
        fake.script(whole(200, b"x" * 5000, commands))
    assert asked(bare).body == b"x" * 5000


@needs("nginx")
def test_a_header_field_of_40_kb_and_an_answer_head_of_24_kb_pass_nginx_and_aiproxy(front, fake):
    fake.script(answer(headers=[("x-large", "y" * 24 * 1024)]))
    before = len(fake.seen)
    got = asked(front, headers=[("x-large", "x" * 40 * 1024)])
    assert (got.status, got.header("x-large")) == (200, "y" * 24 * 1024)
    assert fake.seen[before].header("x-large") == "x" * 40 * 1024


@needs("nginx")
def test_the_access_log_names_the_request_and_no_secret(bare):
    for fake in bare.instances:
        fake.script(answer(headers=[("request-id", "req_of_the_upstream")]))
    secrets = [("x-api-key", "sk-test-secret"), ("referer", "https://secret"), ("user-agent", "secret")]
    body = {**ASK, "messages": [{"role": "user", "content": "a secret"}]}
    asked(bare, body, "/v1/messages?key=secret", secrets)
    [line] = bare.log(1)
    assert "secret" not in line
    assert 'path="/v1/messages" status=200 ' in line
    assert 'id="req_of_the_upstream"' in line


@needs("nginx")
def test_plain_http_is_refused_and_never_passed_on(bare):
    with RawClient(HOST, bare.plain_port) as client:
        client.post(ASK)
        got = client.read()
    assert (got.status, got.json()["error"]["type"]) == (403, "permission_error")
    with RawClient(HOST, bare.plain_port) as client:  # a renewal's question, to a folder that is not there
        client.request("GET", "/.well-known/acme-challenge/x")
        assert client.read().status == 404
    assert [fake.seen for fake in bare.instances] == [[], []]


# ----------------------------------------------------------------------------------------- the unit


@pytest.fixture
def unit(tmp_path: Path):
    """The unit as an instance, with commands that are there: systemd looks for them."""
    text = re.sub(r"/opt/aiproxy/.venv/bin/\w+", sys.executable, UNIT)
    path = tmp_path / "aiproxy@1.service"
    path.write_text(text.replace("/opt/aiproxy", str(ROOT)).replace("/usr/bin/curl", shutil.which("curl")))
    return path


def analyzed(*arguments):
    return subprocess.run(
        ["systemd-analyze", *arguments], check=False, capture_output=True, text=True, timeout=30
    )


@needs("systemd-analyze")
def test_systemd_finds_no_fault_in_the_unit(unit):
    ran = analyzed("verify", "--man=no", str(unit))
    # It may have something to say about the machine's own units.
    said = [line for line in (ran.stdout + ran.stderr).splitlines() if "aiproxy" in line]
    assert (ran.returncode, said) == (0, [])


@needs("systemd-analyze")
def test_the_unit_is_exposed_at_most_3_of_10(unit):
    ran = analyzed("security", "--offline=true", "--threshold=30", str(unit))
    assert ran.returncode == 0, ran.stdout
    assert float(re.search(r"Overall exposure level.*: ([\d.]+)", ran.stdout)[1]) <= 3.0


def test_the_unit_gives_running_answers_their_time():
    stop = int(re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)[1])
    grace = int(
        re.search(r"^graceful_timeout = (\d+)", (ROOT / "gunicorn.conf.py").read_text(), re.MULTILINE)[1]
    )
    assert stop > grace


def test_the_instances_listen_where_nginx_asks():
    port = re.search(r"--bind (127\.0\.0\.1:808)%i ", UNIT)[1]
    assert re.findall(r"^    server ([\d.:]+) ", SHIPPED, re.MULTILINE) == [f"{port}{n}" for n in (1, 2)]


# --------------------------------------------------------------------------------------- the README


def test_the_readme_s_configuration_loads(tmp_path):
    text = re.search(r"cat >/etc/aiproxy/config.yaml <<'END'\n(.*?)\nEND\n", README, re.DOTALL)[1]
    keys = re.search(r"cat >/etc/aiproxy/keys <<END\n(.*?)\nEND\n", README, re.DOTALL)[1]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    (tmp_path / "keys").write_text(re.sub("=.*", "=sk-test-x", keys))
    config = load(path, {})
    assert config.api_keys  # nginx makes the address public: whoever finds it would spend the money
