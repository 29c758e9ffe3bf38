"""`python -m aiproxy check`: what a person or ExecReload learns of a configuration, and its exit code."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from fakes import answer, error, whole

GOOD = """
api_keys: [{name: alice, key: sk-test-alice}]
upstreams:
  - {name: main, base_url: "https://api.example.com", token: sk-test-main, weight: 3}
  - {name: spare, base_url: "http://spare.example.com", token: sk-test-b, available_models: [claude-x]}
  - {name: old, base_url: "https://old.example.com", token: sk-test-old, enabled: false}
"""


def check(*arguments, **environ):
    return subprocess.run(
        [sys.executable, "-m", "aiproxy", "check", *map(str, arguments)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    return path


def test_a_good_file_is_summed_up_with_its_warnings_and_without_a_secret(path):
    done = check(path)
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            f"{path}: good",
            "  listens on 127.0.0.1:8080, serves clients with one of 1 api_keys",
            f"  keeps its ledger in {path.parent / 'ledger.db'}, for 400 days",
            "  upstream main: https://api.example.com, 75% of the requests, every model",
            "  upstream spare: http://spare.example.com, 25% of the requests, claude-x",
            "  upstream old: https://old.example.com, not enabled, every model",
        ],
    )
    assert "warning: " in done.stderr
    assert "upstreams[1].base_url" in done.stderr
    assert "sk-test" not in done.stdout + done.stderr


def test_all_faults_are_told_and_the_exit_code_is_1(path):
    path.write_text(GOOD.replace("weight: 3", "wieght: 3").replace("enabled: false", "enabled: maybe"))
    done = check(path)
    assert (done.returncode, done.stdout) == (1, "")
    assert [line.split(": ")[1:3] for line in done.stderr.splitlines()] == [
        ["line 4", "upstreams[0].wieght (main)"],
        ["line 6", "upstreams[2].enabled (old)"],
    ]
    assert "sk-test" not in done.stderr


def test_without_a_file_it_is_the_one_that_would_be_served(path, tmp_path):
    assert check(AIPROXY_CONFIG=str(path)).stdout.startswith(f"{path}: good")
    assert check(tmp_path / "none.yaml", AIPROXY_CONFIG=str(path)).returncode == 1


def test_a_wrong_command_is_told_how_to_use_it():
    done = subprocess.run(
        [sys.executable, "-m", "aiproxy", "serve"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "usage: python -m aiproxy" in done.stderr


def test_an_address_from_the_environment_is_not_shown(path):
    path.write_text("upstreams: [{name: a, base_url: 'https://a.test/${KEY}', token: sk-test-a}]")
    done = check(path, KEY="very-secret")
    assert "very-secret" not in done.stdout
    assert "upstream a: an address from the environment" in done.stdout


def test_a_base_url_with_the_api_s_path_is_a_fault_here_though_a_start_only_warns(path):
    path.write_text(GOOD.replace("https://old.example.com", "https://old.example.com/v1"))
    done = check(path)
    assert done.returncode == 1
    assert "upstreams[2].base_url (old): ends in /v1" in done.stderr


def test_keys_of_the_env_file_are_read(path):
    path.write_text("env_file: keys\n" + GOOD.replace("sk-test-main", '"${MAIN}"'))
    assert f"{path.parent / 'keys'}: cannot be read" in check(path).stderr
    (path.parent / "keys").write_text("MAIN=sk-test-of-the-file\n")
    assert check(path).returncode == 0


def test_it_runs_from_any_directory(path, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "aiproxy"), "check", str(path)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"{path}: good")


@pytest.mark.parametrize(("bind", "code"), [("127.0.0.1:8081", 0), ("[::1]:80", 0), ("0.0.0.0:8081", 1)])
def test_it_checks_the_address_of_gunicorn_s_command_line(path, bind, code):
    path.write_text('upstreams: [{base_url: "demo://answers"}]')
    done = check("--bind", bind, path)
    assert done.returncode == code
    assert f"listens on {bind}, serves whoever reaches it" in done.stdout or "set api_keys" in done.stderr


def test_it_asks_the_upstreams_and_says_in_words_what_is_wrong(path, upstream):
    good, refusing = (
        upstream(whole(body=b'{"input_tokens": 3}')),
        upstream(error(401, message="invalid x-api-key")),
    )
    uncounting = upstream(error(404), answer())
    lines = [
        f"  - {{name: {name}, base_url: '{fake.url}', token: sk-test-a, available_models: [claude-x]}}"
        for name, fake in (("good", good), ("uncounting", uncounting), ("refusing", refusing))
    ]
    path.write_text(
        "\n".join(["upstreams:", *lines, "  - {base_url: 'https://x.example', token: a, enabled: false}"])
    )
    done = check("--ask", path)
    asked = [line for line in done.stdout.splitlines() if line.startswith("  asked")]
    assert [re.sub(r"in [0-9.]+ s", "in S", line) for line in asked] == [
        "  asked good for claude-x: 200 in S",
        "  asked uncounting for claude-x: 200 in S",
        "  asked refusing for claude-x: 502 in S: An upstream refused aiproxy's own account there: "
        "invalid x-api-key",
    ]
    assert (done.returncode, uncounting.seen[1].json()["max_tokens"]) == (1, 1)
