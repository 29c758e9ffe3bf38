"""The official TypeScript SDK through a real gunicorn and two misbehaving upstreams.

One gunicorn and one Node serve the module; each test starts the upstreams it needs, where both expect them.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from accounts import Account
from conftest import NOTHING_IS_SKIPPED, Output, serving
from fakes import HOST, SPOKEN, answer, close_now, error, events, free_port, whole

HERE = Path(__file__).parents[1] / "typescript"
READY = shutil.which("node") is not None and (HERE / "node_modules").is_dir()

pytestmark = pytest.mark.skipif(
    not READY and not NOTHING_IS_SKIPPED,
    reason="Node is missing, or `make test` has not installed tests/typescript",
)


@pytest.fixture(scope="module")
def ports():
    """Where the upstreams a, which is always asked first, b, and c, which must stream, are looked for."""
    return {name: free_port() for name in "abc"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, ports):
    """Run one scenario of client.mjs through the proxy."""
    upstreams = [
        {
            "name": name,
            "base_url": f"http://{HOST}:{port}",
            "token": f"sk-test-{name}",
            "weight": 1000 if name == "a" else 1,
            "available_models": ["claude-whole" if name == "c" else "claude-x"],
            "must_stream": name == "c",
        }
        for name, port in ports.items()
    ]
    config = {"breaker": {"failures": 10**6, "cooldown": 0}, "upstreams": upstreams}
    with (
        serving(tmp_path_factory.mktemp("typescript"), config) as proxy,
        subprocess.Popen(
            ["node", str(HERE / "client.mjs"), proxy.url],
            env={"PATH": os.environ["PATH"]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        ) as node,
    ):
        told = Output(node.stdout)

        def go(scenario, model="claude-x"):
            before = len(told.lines())
            node.stdin.write(f"{scenario} {model}\n")
            node.stdin.flush()
            return json.loads(told.wait_for("^{.*}$", 60, before)[0])

        yield go
        node.stdin.close()
        told.join()


@pytest.fixture
def at(upstream, ports):
    """Start one of the upstreams."""
    return lambda name, reply: upstream(default=reply, port=ports[name])


def test_a_message_is_created_though_the_first_upstream_fails(run, at):
    a, b = at("a", error(529)), at("b", answer("hello"))
    done = run("create")["done"]
    assert done["content"][0]["text"] == "hello"
    assert len(a.seen) == 1
    assert b.seen[0].header("x-api-key") == "sk-test-b"
    assert b.seen[0].header("authorization") is None
    assert b.seen[0].header("user-agent").startswith("Anthropic/JS")


def test_a_stream_arrives_live(run, at):
    paced = [each for one in SPOKEN for each in (one, 0.1)]
    at("a", close_now())
    at("b", events(paced))
    done = run("stream")["done"]
    assert done["message"]["content"][0]["text"] == "one two three"
    assert [text for text, _ in done["arrivals"]] == ["one ", "two ", "three"]
    times = [at for _, at in done["arrivals"]]
    assert times[2] - times[0] > 100  # milliseconds; in one piece they would come together


def test_an_upstream_that_must_stream_answers_whole(run, at):
    c = at("c", answer("whole"))
    assert run("create", "claude-whole")["done"]["content"][0]["text"] == "whole"
    assert c.seen[0].json()["stream"] is True


def test_the_tool_runner_s_threads_work_over_two_accounts(run, at):
    accounts = [Account(name, rounds=2) for name in "ab"]
    fakes = [at(each, account) for each, account in zip("ab", accounts, strict=True)]
    done = run("tools")["done"]
    assert done["content"][-1]["text"].endswith("after 5")
    assert [each.lost for each in accounts] == [0, 0]
    asked = [request.json()["thread"]["type"] for fake in fakes for request in fake.seen]
    assert asked == ["create", "continue", "continue"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "BadRequestError"),
        (404, "NotFoundError"),
        (429, "RateLimitError"),
        (529, "OverloadedError"),
    ],
)
def test_errors_are_the_right_class_and_unmodified(run, at, status, kind):
    said = error(status, message="said so", details={"error_code": "some_code"})
    at("a", said)
    at("b", said)
    failed = run("create")["failed"]
    assert (failed["kind"], failed["status"]) == (kind, status)
    assert failed["body"]["error"]["message"] == "said so"
    assert failed["body"]["request_id"] == failed["requestID"]


@pytest.mark.parametrize("scenario", ["stream", "events"])
def test_a_stream_that_breaks_is_an_error_and_no_message(run, at, scenario):
    at("a", events(SPOKEN[:5], then="cut"))
    failed = run(scenario)["failed"]
    assert "broke off" in json.dumps(failed)


def test_models_are_listed_page_by_page(run, at):
    a = at("a", answer())
    done = run("models")["done"]
    assert done["names"] == ["claude-x", "claude-whole"]
    assert done["one"]["id"] == "claude-x"
    assert a.seen == []


def test_tokens_are_counted(run, at):
    at("a", error(404))
    at("b", whole(200, b'{"input_tokens":7}'))
    assert run("countTokens")["done"] == {"input_tokens": 7}
