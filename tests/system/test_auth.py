"""Client keys: who is let in, what the log says of them, where they never go, and starts without any."""

import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from fakes import ASK, RawClient, answer, error, free_port
from in_process import client_of as any_client_of

from aiproxy.config import ClientKey, Secret

# In no form that looks like a key to those who do not know it.
ALICE, BOB = "alice.8f3kd92mm1xw", 'b"ob\\77xk20dk1ss'
KEYS = (ClientKey("alice", (Secret(ALICE),)), ClientKey("bob", (Secret(BOB),)))
MODEL = ASK["model"]


def client_of(upstream, keys=KEYS, auth="x-api-key", models=(), **settings):
    one = {
        "base_url": upstream,
        "token": "sk-test-upstream",
        "auth": auth,
        "available_models": frozenset(models),
    }
    return any_client_of(one, api_keys=keys, **settings)


def ask(client, headers, prompt="Hi", path="/v1/messages", model=MODEL):
    body = {**ASK, "model": model, "messages": [{"role": "user", "content": prompt}]}
    return client.post(path, json=body, headers=headers)


def bearer(key, scheme="Bearer"):
    return ("authorization", f"{scheme} {key}")


def x_api_key(key):
    return ("x-api-key", key)


# ------------------------------------------------------------------------------------- who is let in


@pytest.mark.parametrize(
    "headers",
    [
        [x_api_key(ALICE)],
        [x_api_key(f"  {ALICE} ")],
        [bearer(ALICE)],
        [bearer(ALICE, "bEaReR")],
        [bearer(f"  {ALICE} ")],
        [x_api_key(ALICE), bearer("sk-ant-foreign")],
        [x_api_key("sk-ant-foreign"), bearer(ALICE)],
        [x_api_key(ALICE), bearer(ALICE)],
        [x_api_key(""), bearer(ALICE)],
        [x_api_key(ALICE), ("authorization", "Basic Zm9vOmJhcg==")],
    ],
)
def test_a_good_key_is_let_in_whatever_stands_beside_it(upstream, headers):
    assert ask(client_of(upstream()), headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [x_api_key("")],
        [x_api_key("wrong")],
        [bearer("wrong")],
        [x_api_key(ALICE[:-1])],
        [x_api_key(ALICE + "x")],
        [x_api_key("wrong"), bearer("wrong too")],
        [("authorization", "Basic " + base64.b64encode(f"alice:{ALICE}".encode()).decode())],
        [("authorization", f"Basic {ALICE}")],
        [("cookie", f"x-api-key={ALICE}")],
        [x_api_key("schlüssel")],
        [bearer("\xff\xfe")],
    ],
)
def test_without_a_good_key_it_is_the_api_s_401_and_no_upstream_is_asked(upstream, headers):
    fake = upstream()
    reply = ask(client_of(fake), headers)
    assert reply.status_code == 401
    assert reply.headers["x-should-retry"] == "false"
    told = reply.get_json()
    assert (told["type"], told["error"]["type"]) == ("error", "authentication_error")
    assert told["request_id"] == reply.headers["request-id"]
    assert fake.connections == 0


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/messages"),
        ("POST", "/v1/messages/count_tokens"),
        ("GET", "/v1/models"),
        ("GET", f"/v1/models/{MODEL}"),
    ],
)
@pytest.mark.parametrize("models", [(), (MODEL,)])
def test_every_endpoint_wants_a_key(upstream, method, path, models):
    fake = upstream()
    client = client_of(fake, models=models)
    body = {"json": {"model": MODEL, "messages": []}} if method == "POST" else {}
    assert client.open(path, method=method, **body).status_code == 401
    assert fake.connections == 0
    assert client.open(path, method=method, headers=[bearer(BOB)], **body).status_code == 200


def test_without_keys_everyone_is_let_in(upstream):
    client = client_of(upstream(), keys=())
    assert ask(client, []).status_code == 200
    assert ask(client, [x_api_key("anything")]).status_code == 200


# ---------------------------------------------------------------------- the log, upstreams and clients


def assert_unsaid(said, key):
    """Neither as it is nor as JSON or a log value spells it."""
    forms = [key]
    for _ in range(3):
        forms.append(json.dumps(forms[-1])[1:-1])
    assert [form for form in forms if form in said] == []


@pytest.mark.parametrize(("name", "key"), [("alice", ALICE), ("bob", BOB)])
@pytest.mark.parametrize("form", [x_api_key, bearer])
def test_the_log_has_the_key_s_name_and_never_the_key(upstream, capsys, name, key, form):
    for asking in KEYS:
        ask(client_of(upstream()), [form(asking.keys[0])], prompt=f"my key is {key}, keep it")
    ask(client_of(upstream(error(400, message=f"what is {key}?"))), [form(key)], model=key)
    said = capsys.readouterr().out
    assert f"client={name} " in said
    assert said.count("my key is [redacted], keep it") == 2
    assert "what is [redacted]?" in said
    assert_unsaid(said, key)


def test_the_end_of_a_request_is_logged_and_counted_by_client_and_model(upstream, capsys):
    usage = {"input_tokens": 5, "output_tokens": 7}
    client = client_of(upstream(answer(usage=usage)))
    assert ask(client, [x_api_key(ALICE)]).status_code == 200
    [done] = [line for line in capsys.readouterr().out.splitlines() if " done " in line]
    assert f" client=alice model={MODEL} " in done
    figures = client.get("/metrics", headers=[x_api_key(ALICE)]).text
    for kind, tokens in (("input", 5), ("output", 7)):
        labels = f'client="alice",kind="{kind}",model="{MODEL}"'
        assert f"aiproxy_client_tokens_total{{{labels}}} {tokens}.0" in figures


@pytest.mark.parametrize("headers", [[x_api_key("wrong-key-1234")], [bearer("wrong-key-1234", "bearer")]])
def test_a_wrong_key_is_refused_in_one_line_that_does_not_show_it(upstream, capsys, headers):
    ask(client_of(upstream()), headers, prompt="secret prompt")
    [line] = capsys.readouterr().out.splitlines()
    assert " refused " in line
    assert "status=401" in line
    assert [secret for secret in ("wrong-key-1234", "secret prompt") if secret in line] == []


@pytest.mark.parametrize("auth", ["x-api-key", "bearer"])
@pytest.mark.parametrize(
    "headers",
    [
        [x_api_key(ALICE), bearer("sk-ant-foreign")],
        [x_api_key("sk-ant-foreign"), bearer(ALICE, "bearer")],
        [x_api_key(ALICE), ("proxy-authorization", f"Bearer {ALICE}"), ("cookie", f"key={ALICE}")],
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/models"])
def test_the_client_s_key_never_reaches_an_upstream(upstream, auth, headers, path):
    fake = upstream()
    client = client_of(fake, auth=auth)
    reply = client.get(path, headers=headers) if path == "/v1/models" else ask(client, headers, path=path)
    assert reply.status_code == 200
    [seen] = fake.seen
    assert ALICE not in str(seen.headers) + seen.target + seen.body.decode()
    assert "sk-ant-foreign" not in str(seen.headers)
    token = "sk-test-upstream"
    expected = ([token], []) if auth == "x-api-key" else ([], [f"Bearer {token}"])
    assert (seen.every("x-api-key"), seen.every("authorization")) == expected


# -------------------------------------------------------------------------------------- on the wire


def _memory(served, field):
    """Kilobytes of the worker's memory."""
    pid = served.process.pid
    worker = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    lines = Path(f"/proc/{worker}/status").read_text().splitlines()
    return worker, int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def test_a_large_upload_with_a_wrong_key_sees_its_401_and_is_not_kept(upstream, serve, config_of):
    fake = upstream()
    served = serve(config_of([fake], api_keys=[ALICE]))
    with RawClient.to(served.url) as client:  # what a first upload makes grow stays; it is not the body
        client.post(b" " * (4 << 20), headers=[x_api_key("wrong")])
        assert client.read().status == 401
    worker, before = _memory(served, "VmRSS")
    Path(f"/proc/{worker}/clear_refs").write_text("5")  # the peak starts anew
    body = b'{"model": "claude-x", "padding": "' + b"x" * (30 << 20) + b'"}'
    with RawClient.to(served.url) as client:
        client.post(body, headers=[x_api_key("wrong")])
        refused = client.read()
    assert (refused.status, refused.ending) == (401, "end")
    assert refused.json()["error"]["type"] == "authentication_error"
    assert _memory(served, "VmHWM")[1] - before < 8 << 10
    with RawClient.to(served.url) as client:
        client.request("POST", "/v1/messages", body[:1_000_000], [x_api_key("wrong")], chunked=True)
        assert client.read().status == 401
    with RawClient.to(served.url) as client:
        client.post({"model": MODEL}, headers=[("AUTHORIZATION", f"BEARER {ALICE}")])
        assert client.read().status == 200
        for foreign in ("schl\xfcssel", "\xff\xfe"):
            client.post({"model": MODEL}, headers=[x_api_key(foreign)])
            assert client.read().status == 401
    assert len(fake.seen) == 1
    assert ALICE not in "\n".join([*served.stdout_lines(), served.stderr])


# -------------------------------------------------------------------------------- starts without keys


def test_the_configuration_refuses_other_machines_without_keys(upstream, serve, config_of):
    served = serve(config_of([upstream()], bind="0.0.0.0"), wait=False)
    assert served.wait_exit() == 1
    [line] = served.stderr.splitlines()
    for part in ('bind: is "0.0.0.0"', "api_keys", "allow_anonymous"):
        assert part in line


def test_so_does_a_start_whose_bind_is_gunicorn_s(upstream, serve, config_of):
    config, port = config_of([upstream()]), free_port()
    starts = [
        serve(config, wait=False, gunicorn_args=["--bind", f"0.0.0.0:{port}"]),
        serve(config, wait=False, gunicorn_args=["-b", f"127.0.0.1:{port}", "-b", f"[::]:{port}"]),
        serve(config, wait=False, env={"GUNICORN_CMD_ARGS": f"--bind 0.0.0.0:{port}"}),
        serve(config, wait=False, env={"GUNICORN_CMD_ARGS": f"--bind :{port}"}),
    ]
    for served in starts:
        assert served.wait_exit() == 1
        assert "Listening" not in served.stderr
        last = served.stderr.splitlines()[-1]
        assert "api_keys" in last
        assert "allow_anonymous: true" in last


def test_so_does_a_start_on_a_socket_that_it_inherits(upstream, config_of, tmp_path):
    # As systemd or a supervisor opens it: then no address tells who may reach it.
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config_of([upstream()])))
    gunicorn = [sys.executable, "-m", "gunicorn", "wsgi:app"]
    # systemd's protocol: sockets from number 3 on, meant for this very process.
    activated = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); "
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    with socket.create_server(("0.0.0.0", 0)) as opened:
        number = str(opened.fileno())
        for command in (
            [*gunicorn, "--bind", f"fd://{number}"],
            [sys.executable, "-c", activated, number, *gunicorn],
        ):
            ended = subprocess.run(
                command,
                cwd=ROOT,
                env={"PATH": os.environ["PATH"], "AIPROXY_CONFIG": str(path)},
                pass_fds=[opened.fileno()],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            assert "allow_anonymous: true" in ended.stderr


def test_keys_or_allow_anonymous_let_it_start_for_other_machines_and_loopback_warns(
    upstream, serve, config_of
):
    fake, port = upstream(), free_port()
    given = {"GUNICORN_CMD_ARGS": f"--bind 0.0.0.0:{port}"}
    starts = {
        "keys": serve(config_of([fake], api_keys=[ALICE], listen=port), env=given, wait=False),
        "anonymous": serve(config_of([fake], bind="0.0.0.0", allow_anonymous=True), wait=False),
        "loopback": serve(config_of([fake]), wait=False),
    }
    warning = "warning: no api_keys"
    for served in starts.values():
        served.wait_for_log("aiproxy serves")
        served.wait_until_ready()
    warned = {how for how, one in starts.items() if any(warning in line for line in one.stdout_lines())}
    assert warned == {"loopback"}
    assert not any(ALICE in line for one in starts.values() for line in one.stdout_lines())
