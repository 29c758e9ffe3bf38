"""Message threads and what else lives on one account: where such requests go, and where they do not."""

import itertools
import json
import threading

import anthropic
import in_process
import pytest
from accounts import LOST, Account
from anthropic import beta_tool
from conftest import ROOT
from fakes import (
    ASK,
    Clock,
    close_now,
    error,
    error_event,
    event,
    events,
    message_events,
    whole,
)

from aiproxy.config import BreakerSettings
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


def test_continuing_moves_no_turn_of_the_others(upstream):
    client = client_of(*(upstream(default=Account(name)) for name in "ab"))
    made = id_of(ask(client, CREATE))
    turns = []
    for _ in range(6):
        turns.append(maker(ask(client)))
        made = id_of(ask(client, following(made)))
    assert turns == ["b", "a"] * 3


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


@pytest.mark.parametrize(
    "thread",
    ["x", 5, [], {}, {"type": 5}, following(None), following(["msg_a_1"]), following(""), {"type": "fork"}],
    ids=str,
)
def test_whatever_a_thread_may_hold_goes_to_an_upstream_as_it_is(upstream, thread):
    fake = upstream()
    reply = ask(client_of(fake, upstream()), thread)
    assert (reply.status_code, attempts(reply)) == (200, 1)
    assert fake.seen[0].json()["thread"] == thread


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


def test_so_does_one_that_comes_as_a_stream_s_first_event(upstream):
    stream = events([message_events()[0], event("error", json.loads(NOT_FOUND))])
    other = upstream()
    reply = ask(client_of(upstream(stream), other), following("msg_x"), stream=True)
    assert (reply.status_code, reply.mimetype, attempts(reply)) == (404, "application/json", 1)
    assert reply.get_json() == json.loads(NOT_FOUND)
    assert other.connections == 0


def test_an_unknown_thread_goes_anywhere_and_its_404_is_not_counted(upstream, capsys):
    client = client_of(*(upstream(default=Account(name)) for name in "abc"))
    assert [maker(ask(client, following("msg_x"))) for _ in range(12)] == ["a", "b", "c"] * 4
    said = capsys.readouterr().out
    assert "circuit" not in said
    assert said.count("verdict=uncounted") == 12


def test_nor_does_it_wipe_out_the_failures_before_it(upstream):
    fake = upstream(error(500), error(500), error(404, details=LOST), error(500))
    client = client_of(fake, upstream(), weights=[1000])
    for thread in (None, None, following("msg_x"), None):
        ask(client, thread)
    assert maker(ask(client)) == "b"
    assert len(fake.seen) == 4


@pytest.mark.parametrize(
    ("thread", "refusal"),
    [
        (None, error(404, details=LOST)),
        (CREATE, error(404, details=LOST)),
        (CREATE, error(400)),
        (following("msg_x"), error(500)),
        (following("msg_x"), close_now()),
    ],
)
def test_a_request_that_continues_no_thread_or_met_a_failure_is_tried_elsewhere(upstream, thread, refusal):
    reply = ask(client_of(upstream(refusal), upstream()), thread)
    assert (reply.status_code, maker(reply), attempts(reply)) == (200, "b", 2)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "thread_already_continued"),
        (400, "thread_unsupported_request"),
        (404, "thread_not_found"),
        (403, None),
        (429, None),
    ],
)
def test_what_the_owner_refuses_no_other_is_asked(upstream, status, code):
    owner, other = upstream(default=Account("a")), upstream()
    client = client_of(owner, other)
    made = id_of(ask(client, CREATE))
    owner.script(error(status, message="no", details={"error_code": code} if code else None))
    reply = ask(client, following(made))
    assert (reply.status_code, reply.get_json()["error"]["message"], attempts(reply)) == (status, "no", 1)
    assert other.connections == 0


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


def test_owners_are_noted_and_asked_from_any_thread():
    owners = Owners(Clock(), State())

    def work(name):
        for number in range(2000):
            owners.note(f"msg_{name}_{number}", name)
            assert owners.owner(f"msg_{name}_{number}") == name

    workers = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


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


def test_the_tool_runner_recovers_when_the_proxy_has_forgotten_the_owner(
    upstream, serve, config_of, tmp_path
):
    app = "import os\nfrom aiproxy.upstreams import message_threads\nmessage_threads.LIFETIME = -1.0\n"
    app += "from aiproxy.app import create_app\nfrom aiproxy.config import load, path_from\n"
    app += "app = create_app(load(path_from(os.environ)))\n"
    (tmp_path / "wsgi.py").write_text(app)
    accounts = [Account(name, rounds=4) for name in "ab"]
    served = serve(
        config_of([upstream(default=each) for each in accounts]),
        app_dir=tmp_path,
        gunicorn_args=["-c", str(ROOT / "gunicorn.conf.py")],
        env={"PYTHONPATH": str(ROOT)},
    )
    assert run_tools(served.url, "Weather?").content[0].text.endswith(" after 9")
    lost = sum(each.lost for each in accounts)
    assert lost > 0
    done = [line for line in served.stdout_lines() if " done " in line and "status=404" in line]
    assert len(done) == lost
    assert all("attempts=1" in line for line in done)


# ----------------------------------------------------------------------------- what only one account has


def asking_with(block):
    return {"messages": [{"role": "user", "content": [block]}]}


BOUND = [
    ({"container": "container_01"}, []),
    ({"container": {"id": "container_01", "skills": []}}, []),
    ({}, [("anthropic-workspace-id", "wrkspc_01")]),
    (asking_with({"type": "document", "source": {"type": "file", "file_id": "file_01"}}), []),
    (asking_with({"type": "container_upload", "file_id": "file_01"}), []),
]


@pytest.mark.parametrize(("extra", "headers"), BOUND)
def test_what_only_one_account_has_is_failed_over_on_a_failure_and_not_on_a_4xx(upstream, extra, headers):
    first, other = upstream(), upstream()
    client = client_of(first, other, weights=[1000], breaker=BreakerSettings(failures=99))
    for status in (400, 401, 402, 403, 404, 408, 409, 413, 422, 429):
        first.script(error(status, message="not mine"))
        reply = ask(client, headers=headers, **extra)
        assert reply.status_code == (502 if status in (401, 402) else status)
        assert reply.get_json()["error"]["message"].endswith("not mine")
        assert attempts(reply) == 1
    assert other.connections == 0
    for failure in (error(500), error(503), events([error_event("api_error")]), close_now()):
        first, other = upstream(failure), upstream()
        reply = ask(client_of(first, other), headers=headers, stream=True, **extra)
        assert (reply.status_code, maker(reply), attempts(reply)) == (200, "b", 2)


@pytest.mark.parametrize(
    ("extra", "headers"),
    [
        ({"container": None}, []),
        (asking_with({"type": "text", "text": 't "file_id": "f"'}), []),
        ({"messages": [{"role": "user", "content": '"file_id"'}]}, []),
        (asking_with({"type": "x", "file_id": None}), []),
        ({"metadata": {"user_id": "container"}}, []),
        ({}, [("anthropic-version", "2023-06-01"), ("anthropic-user-id", "1")]),
    ],
)
def test_any_other_request_is_failed_over_on_a_4xx_too(upstream, extra, headers):
    for status in (400, 404, 429):
        client = client_of(upstream(error(status)), upstream())
        assert maker(ask(client, headers=headers, **extra)) == "b"


def test_a_404_of_a_bound_request_is_not_counted(upstream):
    client = client_of(fake := upstream(*[error(404)] * 4), upstream(), weights=[1000])
    for _ in range(4):
        ask(client, container="container_01")
    assert maker(ask(client)) == "a"
    assert len(fake.seen) == 5
