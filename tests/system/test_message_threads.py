"""Message threads and what else lives on one account: where such requests go, and where they do not."""

import itertools
import json
import threading

import anthropic
import in_process
import pytest
from accounts import LOST, Account
from anthropic import beta_tool
from fakes import (
    ASK,
    Clock,
    close_now,
    error,
    events,
    message_events,
    whole,
)

from aiproxy.upstreams import message_threads as threads
from aiproxy.upstreams.message_threads import Owners
from aiproxy.upstreams.shared_state import State

CREATE = {"type": "create"}


def client_of(*upstreams, weights=(), clock=None, must_stream=False, **settings):
    """Upstreams are named a, b, ...; the first is asked first, and far more often if it weighs more."""
    listed = [
        {"base_url": one, "weight": weight, "must_stream": must_stream}
        for one, weight in zip(upstreams, [*weights, 1, 1, 1], strict=False)
    ]
    return in_process.client_of(*listed, clock=clock or Clock(), **settings)


def ask(client, thread=None, stream=False, headers=(), **extra):
    body = {**ASK, **extra, **({"stream": True} if stream else {})}
    if thread is not None:
        body["thread"] = thread
    return client.post("/v1/messages", json=body, headers=list(headers))


def following(message_id):
    return {"type": "continue", "previous_message_id": message_id}


def id_of(reply):
    """The id of the message that an answer brought, streamed or whole."""
    assert reply.status_code == 200, reply.data
    if reply.mimetype == "application/json":
        return reply.get_json()["id"]
    data = reply.data.split(b"data: ", 1)[1].split(b"\n", 1)[0]
    return json.loads(data)["message"]["id"]


def maker(reply):
    return reply.headers["x-aiproxy-upstream"]


def attempts(reply):
    return int(reply.headers["x-aiproxy-attempts"])


# ------------------------------------------------------------------------------------- whose thread it is


@pytest.mark.parametrize("must_stream", [False, True])
@pytest.mark.parametrize("created_by_stream", [False, True])
@pytest.mark.parametrize("continued_by_stream", [False, True])
def test_a_thread_goes_on_where_it_was_made(upstream, must_stream, created_by_stream, continued_by_stream):
    accounts = [Account(name) for name in "ab"]
    client = client_of(*(upstream(default=each) for each in accounts), must_stream=must_stream)
    latest = {}
    for _ in range(5):
        reply = ask(client, CREATE, created_by_stream)
        latest[id_of(reply)] = maker(reply)
    assert sorted(latest.values()) == ["a", "a", "a", "b", "b"]
    for _ in range(2):
        for made, owner in list(latest.items()):
            reply = ask(client, following(made), continued_by_stream)
            assert (maker(reply), attempts(reply)) == (owner, 1)
            latest[id_of(reply)] = latest.pop(made)
    assert [each.lost for each in accounts] == [0, 0]


def test_a_thread_goes_on_where_it_was_made_whatever_the_session_s_home(upstream):
    client = client_of(*(upstream(default=Account(name)) for name in "ab"))
    session = {
        "headers": [("x-claude-code-session-id", "6f9f2a4e-1c1b-4f0e-9d55-0a3f8f6f7a11")],
        "cache_control": {"type": "ephemeral"},
    }
    home = maker(ask(client, CREATE, **session))
    made, owner = home, home
    while owner == home:
        reply = ask(client, CREATE)
        made, owner = id_of(reply), maker(reply)
    assert maker(ask(client, following(made), **session)) == owner


def test_the_owner_is_known_as_soon_as_the_client_has_seen_the_message_s_end(upstream):
    # A client need not wait for the body's end, which the upstream may keep open.
    gate = threading.Event()
    first = upstream(events([*message_events(id="msg_a_1"), gate]))
    client = client_of(first, upstream(default=error(404, details=LOST)))
    body = {**ASK, "stream": True, "thread": CREATE}
    stream = client.post("/v1/messages", json=body, buffered=False)
    pieces = stream.iter_encoded()
    while b"event: message_stop" not in next(pieces):
        pass
    reply = ask(client, following("msg_a_1"))
    gate.set()
    assert list(pieces) == []
    stream.close()
    assert (reply.status_code, maker(reply)) == (200, "a")


def test_a_message_made_without_a_thread_is_not_remembered(upstream):
    client = client_of(upstream(default=Account("a")), upstream(default=Account("b")))
    for extra in ({}, {"thread": None}):
        plain = ask(client, **extra)
        wrong = ask(client, following(id_of(plain)))
        assert (maker(plain), maker(wrong), wrong.status_code) == ("a", "b", 404)


# ----------------------------------------------------------------------------- threads that are not found

NOT_FOUND = (
    b'{"type":"error", "error":{"type":"not_found_error","message":"Thread  not found",'
    b' "details":{"error_code":"thread_not_found"}},"request_id":"req_1"}'
)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_thread_s_404_comes_back_verbatim_after_one_attempt(upstream, stream):
    headers = [("request-id", "req_1"), ("x-should-retry", "false")]
    other = upstream()
    reply = ask(client_of(upstream(whole(404, NOT_FOUND, headers)), other), following("msg_x"), stream)
    assert (reply.status_code, reply.data, attempts(reply)) == (404, NOT_FOUND, 1)
    assert [reply.headers[name] for name, _ in headers] == [value for _, value in headers]
    assert other.connections == 0


def test_an_unknown_thread_goes_anywhere_and_its_404_is_not_counted(upstream, capsys):
    client = client_of(*(upstream(default=Account(name)) for name in "abc"))
    assert [maker(ask(client, following("msg_x"))) for _ in range(12)] == ["a", "b", "c"] * 4
    said = capsys.readouterr().out
    assert "circuit" not in said
    assert said.count("verdict=uncounted") == 12


@pytest.mark.parametrize(
    ("failures", "attempts_made"),
    [
        ([error(500)] * 3, (2, 2, 2, 1)),
        ([error(529)], (2, 1, 1)),  # its model is in backoff from then on
        ([close_now()] * 4, (2, 2, 2, 1)),  # a kept connection that is dead is tried again
    ],
)
def test_when_the_owner_is_down_the_client_learns_that_the_thread_is_not_found(
    upstream, failures, attempts_made
):
    # It then sends the whole conversation, which any other can answer.
    owner = upstream(default=Account("a"))
    client = client_of(owner, upstream(default=Account("b")))
    made = id_of(ask(client, CREATE))
    owner.script(*failures)
    for tried in attempts_made:
        reply = ask(client, following(made))
        assert (reply.status_code, attempts(reply)) == (404, tried)
        assert reply.get_json()["error"]["details"] == LOST
    again = ask(client, CREATE)
    assert maker(again) == "b"
    assert maker(ask(client, following(id_of(again)))) == "b"


# --------------------------------------------------------------------------------------- what is remembered


def test_the_latest_messages_are_remembered_and_no_more(monkeypatch):
    assert threads.LIMIT <= 100_000
    monkeypatch.setattr(threads, "LIMIT", 2)
    owners = Owners(Clock(), State())
    for message, name in (("one", "a"), ("two", "a"), ("one", "b"), ("three", "a")):
        owners.note(message, name)
    assert [owners.owner(message) for message in ("one", "two", "three")] == ["b", None, "a"]


def test_a_message_is_remembered_for_its_time_from_the_latest_note():
    assert threads.LIFETIME >= 300, "an idle thread lives five minutes"
    clock = Clock()
    owners = Owners(clock, State())
    owners.note("one", "a")
    clock.now += threads.LIFETIME - 1
    assert owners.owner("one") == "a"
    owners.note("two", "b")
    clock.now += 1
    assert (owners.owner("one"), owners.owner("two")) == (None, "b")
    owners.note("one", "b")
    clock.now += threads.LIFETIME - 1
    assert (owners.owner("one"), owners.owner("two")) == ("b", None)


# ---------------------------------------------------------------------------- the newest SDK's tool runner

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@beta_tool
def get_weather(city: str, days: int) -> str:
    """Say what the weather will be."""
    return f"Rain in {city} for {days} days."


def run_tools(url, prompt, tool=get_weather, **options):
    messages = [{"role": "user", "content": prompt}]
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client:
        return client.beta.messages.tool_runner(
            model="claude-x", max_tokens=100, system="You help.", tools=[tool], messages=messages, **options
        ).until_done()


def threads_of(fake):
    return [request.json()["thread"]["type"] for request in fake.seen]


def test_the_tool_runner_s_threads_work_over_two_accounts(upstream, serve, config_of):
    accounts = [Account(name, rounds=2) for name in "ab"]
    fakes = [upstream(default=each) for each in accounts]
    served = serve(config_of([{"base_url": fakes[0], "must_stream": True}, fakes[1]]))
    finals = []

    def run(stream):
        for number in range(2):
            final = run_tools(served.url, f"Weather {number}?", stream=stream)
            finals.append(final.content[0].text)

    workers = [threading.Thread(target=run, args=(stream,)) for stream in (False, True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # A prompt, and twice a reply and a tool's result: the account held what the client did not send again.
    assert sorted(finals) == ["a after 5"] * 2 + ["b after 5"] * 2
    assert [each.lost for each in accounts] == [0, 0]
    assert [sorted(threads_of(fake)) for fake in fakes] == [["continue"] * 4 + ["create"] * 2] * 2
    for request in (request for fake in fakes for request in fake.seen):
        assert "message-threads-2026-08-12" in request.header("anthropic-beta")
        first = request.json()["thread"]["type"] == "create"
        assert [key in request.json() for key in ("system", "tools")] == [first] * 2
        assert len(request.json()["messages"]) == 1


def test_the_tool_runner_recovers_when_its_account_has_lost_the_thread(upstream, serve, config_of):
    accounts = [Account(name, rounds=3) for name in "ab"]
    fakes = [upstream(default=each) for each in accounts]
    served = serve(config_of(fakes))
    calls = itertools.count()

    @beta_tool
    def get_weather(city: str, days: int) -> str:
        """Say what the weather will be."""
        if next(calls) in (1, 4):
            for account in accounts:
                account.held.clear()
        return f"Rain in {city} for {days} days."

    # Each new thread begins on the next account, with all that was said so far.
    for stream in (False, True):
        final = run_tools(served.url, "Weather?", get_weather, stream=stream)
        assert final.content[0].text == "b after 7"
        assert threads_of(fakes[0])[-3:] == ["create", "continue", "continue"]
        assert threads_of(fakes[1])[-2:] == ["create", "continue"]
    assert [each.lost for each in accounts] == [2, 0]
    said = "\n".join(served.stdout_lines())
    assert said.count("status=404") == 4, "for each one attempt and one request"
    assert "circuit" not in said


# ----------------------------------------------------------------------------- what only one account has


def asking_with(block):
    return {"messages": [{"role": "user", "content": [block]}]}


@pytest.mark.parametrize(
    ("is_bound", "extra", "headers"),
    [
        (True, {"container": "container_01"}, []),
        (True, {"container": {"id": "container_01", "skills": []}}, []),
        (True, {}, [("anthropic-workspace-id", "wrkspc_01")]),
        (True, asking_with({"type": "document", "source": {"type": "file", "file_id": "file_01"}}), []),
        (True, asking_with({"type": "container_upload", "file_id": "file_01"}), []),
        (True, {"thread": following("msg_x")}, []),
        (False, {"thread": CREATE}, []),
        (False, {"thread": {"type": "continue", "previous_message_id": ["msg_a_1"]}}, []),
        (False, {"thread": 5}, []),
        (False, {"container": None}, []),
        (False, asking_with({"type": "text", "text": 't "file_id": "f"'}), []),
        (False, {"messages": [{"role": "user", "content": '"file_id"'}]}, []),
        (False, {"metadata": {"user_id": "container"}}, []),
        (False, {}, [("anthropic-version", "2023-06-01"), ("anthropic-user-id", "1")]),
    ],
)
def test_what_only_one_account_has_is_failed_over_on_a_failure_and_not_on_a_4xx(
    upstream, is_bound, extra, headers
):
    for refusal, goes_on in ((error(404), not is_bound), (error(429), not is_bound), (error(500), True)):
        first = upstream(refusal)
        reply = ask(client_of(first, upstream()), headers=headers, **extra)
        assert (attempts(reply), maker(reply)) == ((2, "b") if goes_on else (1, "a"))
        sent = first.seen[0].json()
        assert {name: sent[name] for name in extra} == extra
