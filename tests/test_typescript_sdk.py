"""The official TypeScript SDK through a real gunicorn and two misbehaving upstreams."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from accounts import Account
from fakes import answer, close_now, error, events, message_events, tool_use, whole

HERE = Path(__file__).parent / "typescript"
READY = shutil.which("node") is not None and (HERE / "node_modules").is_dir()

pytestmark = pytest.mark.skipif(
    not READY and os.environ.get("AIPROXY_REQUIRE_ALL") != "1",
    reason="Node is missing, or `make test` has not installed tests/typescript",
)


@pytest.fixture
def run(serve, config_of):
    """Run one scenario of client.mjs through a proxy in front of these upstreams."""

    def go(scenario, *upstreams, **settings):
        served = serve(config_of(upstreams, **settings))
        ran = subprocess.run(
            ["node", str(HERE / "client.mjs"), served.url, scenario],
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return json.loads(ran.stdout)

    return go


def test_a_message_is_created_though_the_first_upstream_fails(run, upstream):
    a, b = upstream(default=error(529)), upstream(default=answer("hello"))
    done = run("create", {"base_url": a, "weight": 9}, b)["done"]
    assert done["content"][0]["text"] == "hello"
    assert len(a.seen) == 1
    assert b.seen[0].header("x-api-key") == "sk-test-b"
    assert b.seen[0].header("authorization") is None
    assert b.seen[0].header("user-agent").startswith("Anthropic/JS")


def test_a_stream_arrives_live(run, upstream):
    paced = [each for one in message_events(["one ", "two ", "three"]) for each in (one, 0.1)]
    done = run("stream", upstream(default=close_now()), upstream(default=events(paced)))["done"]
    assert done["message"]["content"][0]["text"] == "one two three"
    assert [text for text, _ in done["arrivals"]] == ["one ", "two ", "three"]
    times = [at for _, at in done["arrivals"]]
    assert times[2] - times[0] > 100  # milliseconds; in one piece they would come together


def test_tool_input_is_put_together(run, upstream):
    one = upstream(default=answer("x", tool=tool_use()))
    content = run("stream", one)["done"]["message"]["content"]
    assert content[-1]["type"] == "tool_use"
    assert content[-1]["input"] == tool_use()["input"]


def test_an_upstream_that_must_stream_answers_whole(run, upstream):
    one = upstream(default=answer("whole"))
    assert run("create", {"base_url": one, "must_stream": True})["done"]["content"][0]["text"] == "whole"
    assert one.seen[0].json()["stream"] is True


def test_the_tool_runner_s_threads_work_over_two_accounts(run, upstream):
    accounts = [Account(name, rounds=2) for name in "ab"]
    fakes = [upstream(default=each) for each in accounts]
    done = run("tools", *fakes)["done"]
    assert done["content"][-1]["text"].endswith("after 5")
    assert [each.lost for each in accounts] == [0, 0]
    asked = [request.json()["thread"]["type"] for fake in fakes for request in fake.seen]
    assert asked == ["create", "continue", "continue"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "BadRequestError"),
        (401, "AuthenticationError"),
        (402, "PaymentRequiredError"),
        (403, "PermissionDeniedError"),
        (404, "NotFoundError"),
        (413, "ContentTooLargeError"),
        (429, "RateLimitError"),
        (500, "InternalServerError"),
        (529, "OverloadedError"),
    ],
)
def test_errors_are_the_right_class_and_unmodified(run, upstream, status, kind):
    said = error(status, message="said so", details={"error_code": "some_code"})
    failed = run("create", upstream(default=said), upstream(default=said))["failed"]
    assert (failed["kind"], failed["status"]) == (kind, status)
    assert failed["body"]["error"]["message"] == "said so"
    assert failed["body"]["request_id"] == failed["requestID"]


@pytest.mark.parametrize("scenario", ["stream", "events"])
def test_a_stream_that_breaks_is_an_error_and_no_message(run, upstream, scenario):
    failed = run(scenario, upstream(default=events(message_events(["one", "two"])[:5], then="cut")))["failed"]
    assert "broke off" in json.dumps(failed)


def test_no_upstream_at_all_is_a_server_error(run, upstream):
    failed = run("create", upstream(default=close_now()))["failed"]
    assert (failed["kind"], failed["status"]) == ("InternalServerError", 502)


def test_models_are_listed_page_by_page(run, upstream):
    one = upstream()
    done = run("models", {"base_url": one, "available_models": ["claude-a", "claude-b"]})["done"]
    assert done["names"] == ["claude-a", "claude-b"]
    assert done["one"]["id"] == "claude-a"
    assert one.seen == []


def test_tokens_are_counted(run, upstream):
    lacking = upstream(default=error(404))
    counting = upstream(default=whole(200, b'{"input_tokens":7}'))
    assert run("countTokens", lacking, counting)["done"] == {"input_tokens": 7}
