"""Tokens that a command prints: fetched before the first use, before they end, and once at a 401."""

import re
import stat
import time

import pytest
from fakes import error

from aiproxy.app import create_app
from aiproxy.config import Config, UpstreamSettings, load
from aiproxy.upstreams.tokens import TokenCommand

ASK = {"model": "claude-x", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def command(tmp_path):
    """A command that prints sk-test-token-1, then -2, and so on; `runs` counts, `fail` makes it fail."""
    return Command(tmp_path)


class Command:
    def __init__(self, directory):
        self.path = directory / "print-token"
        self._count, self._broken = directory / "count", directory / "broken"
        self.path.write_text(
            "#!/bin/sh\n"
            f'echo x >>"{self._count}"\n'
            f'if [ -e "{self._broken}" ]; then echo "no login: sk-test-secret-of-the-cloud" >&2; exit 3; fi\n'
            f'echo "sk-test-token-$(wc -l <"{self._count}" | tr -d " ")"\n'
        )
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)

    @property
    def runs(self):
        return len(self._count.read_text().splitlines()) if self._count.exists() else 0

    def fail(self):
        self._broken.touch()

    def recover(self):
        self._broken.unlink()


def await_that(condition, limit=5.0):
    ends = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < ends, "it did not become true"
        time.sleep(0.01)


def client_of(command, *fakes):
    first, *others = fakes
    upstreams = [
        UpstreamSettings(
            name="cloud", base_url=first.url, auth="bearer", weight=100, token_command=(str(command.path),)
        ),
        *(
            UpstreamSettings(name=f"b{n}", base_url=fake.url, token="sk-test-b")
            for n, fake in enumerate(others)
        ),
    ]
    return create_app(Config(upstreams=tuple(upstreams))).test_client()


def ask(client):
    reply = client.post("/v1/messages", json=ASK)
    return reply.status_code, reply.headers.get("x-aiproxy-upstream"), reply.headers["x-aiproxy-attempts"]


def tokens_of(fake):
    return [dict(seen.headers).get("authorization") for seen in fake.seen]


def test_the_first_request_waits_for_the_token_where_there_is_no_other_upstream(upstream, command):
    fake = upstream()
    client = client_of(command, fake)
    assert ask(client)[:2] == (200, "cloud")
    assert ask(client)[0] == 200
    assert (tokens_of(fake), command.runs) == (["Bearer sk-test-token-1"] * 2, 1)


def test_another_upstream_answers_while_the_token_is_fetched(upstream, command):
    client = client_of(command, upstream(), upstream())
    assert ask(client)[:2] == (200, "b0")
    await_that(lambda: command.runs == 1)


def test_a_401_fetches_a_new_token_once_and_costs_nothing(upstream, command, capsys):
    cloud, other = upstream(error(401, "authentication_error")), upstream()
    client = client_of(command, cloud, other)
    ask(client)
    await_that(lambda: command.runs == 1)
    await_that(lambda: ask(client)[0] == 200 and tokens_of(cloud)[-1:] == ["Bearer sk-test-token-2"])
    assert (tokens_of(cloud)[0], command.runs) == ("Bearer sk-test-token-1", 2)
    said = capsys.readouterr().out
    assert 'fault=token detail="its token was refused, and is fetched anew" verdict=uncounted' in said
    assert "sk-test-token" not in said


def test_after_a_401_without_another_upstream_the_request_waits_for_the_new_token(upstream, command):
    cloud = upstream(error(401, "authentication_error"))
    assert ask(client_of(command, cloud)) == (200, "cloud", "3")
    assert tokens_of(cloud) == ["Bearer sk-test-token-1", "Bearer sk-test-token-2"]


def test_a_401_to_a_token_that_a_401_brought_is_the_account_s(upstream, command, capsys):
    cloud = upstream(*[error(401, "authentication_error")] * 4)
    client = client_of(command, cloud)
    assert ask(client)[0] == 502
    verdicts = re.findall(r" attempt .* verdict=(\w+)", capsys.readouterr().out)
    assert (verdicts, command.runs) == (["uncounted", "uncounted", "counted"], 2)
    assert ask(client)[0] == 502
    assert re.findall(r" attempt .* verdict=(\w+)", capsys.readouterr().out) == ["counted"]


def test_a_token_is_replaced_before_its_lifetime_is_over(command):
    learned = []
    tokens = TokenCommand("cloud", (str(command.path),), 0.5, learned.append)
    await_that(lambda: tokens.current == "sk-test-token-1")
    await_that(lambda: tokens.current == "sk-test-token-2", 2.0)
    tokens.stop()
    assert learned[:2] == ["sk-test-token-1", "sk-test-token-2"]


def test_a_failing_command_keeps_the_old_token_and_says_so_without_a_secret(command, capsys):
    create_app(Config())  # the log goes to standard output
    tokens = TokenCommand("cloud", (str(command.path),), 0.3, lambda token: None)
    await_that(lambda: tokens.current == "sk-test-token-1")
    command.fail()
    await_that(lambda: command.runs == 2)
    time.sleep(0.05)
    assert tokens.current == "sk-test-token-1"
    said = capsys.readouterr().out
    assert 'WARNING token upstream=cloud result=failed reason="exit code 3: no login: [redacted]"' in said
    tokens.stop()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["/no/such/command"], '"No such file or directory"'),
        (["true"], '"it printed no token"'),
        (["echo", "two words"], '"it printed no token"'),
        (["false"], '"exit code 1: "'),
    ],
)
def test_a_command_that_prints_no_token_is_a_failure(capsys, words, reason):
    create_app(Config())
    tokens = TokenCommand("cloud", words, 60, lambda token: None)
    assert tokens.current is None
    said = []
    await_that(
        lambda: said.append(capsys.readouterr().out) or f"result=failed reason={reason}" in "".join(said)
    )
    tokens.stop()


def test_it_stands_in_the_place_of_a_token(tmp_path):
    def upstream_of(text):
        (tmp_path / "config.yaml").write_text("upstreams: [{base_url: 'https://a.example', " + text + "}]")
        return load(tmp_path / "config.yaml").upstreams[0]

    found = upstream_of("token_command: [gcloud, auth, print-access-token], token_lifetime: 600")
    assert (found.token_command, found.token_lifetime) == (("gcloud", "auth", "print-access-token"), 600)
    with pytest.raises(Exception, match="expected one of both"):
        upstream_of("token: sk-test-a, token_command: [a]")
    with pytest.raises(Exception, match="token: is missing"):
        upstream_of("token_command: []")
