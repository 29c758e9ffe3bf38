"""Conversations stay where their prompt cache is, and other requests go round beside them."""

import json
import random
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import pytest
import responses
from fakes import Clock, message_json

from aiproxy.app import create_app
from aiproxy.config import ClientKey, Config, LoggingSettings, Secret, UpstreamSettings
from aiproxy.upstreams.affinity import rank
from aiproxy.upstreams.breaker import Breaker
from aiproxy.upstreams.upstream import Upstream

EPHEMERAL = {"type": "ephemeral"}
WEIGHTS = {"a": 5, "b": 3, "c": 2}
SESSIONS = [f"6f9f2a4e-1c1b-4f0e-9d55-0a3f8f6f{number:04x}" for number in range(60)]


class Accounts:
    """Upstreams that answer in process: `reply` gets an account's name and what it is asked."""

    def __init__(self):
        self.reply = lambda name, asked: (200, message_json())
        self.left = {}  # by account: what is left of 100 requests
        self.asked = []

    def exchange(self, request):
        name = urlsplit(request.url).hostname.removesuffix(".test")
        self.asked.append(name)
        status, content = self.reply(name, json.loads(request.body))
        reset = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()
        limits = {"limit": "100", "remaining": str(self.left.get(name)), "reset": reset}
        headers = {f"anthropic-ratelimit-requests-{what}": value for what, value in limits.items()}
        return status, headers if name in self.left else {}, content

    def client(self, weights, affinity="prompt_cache", clock=None, models=None, **settings):
        """The proxy in front of them."""
        upstreams = [
            UpstreamSettings(
                name=name,
                base_url=f"http://{name}.test",
                token=f"sk-test-{name}",
                weight=weight,
                available_models=frozenset((models or {}).get(name, ())),
            )
            for name, weight in weights.items()
        ]
        quiet = LoggingSettings(level="error")
        config = Config(upstreams=tuple(upstreams), affinity=affinity, logging=quiet, **settings)
        return create_app(config, clock or Clock()).test_client()


@pytest.fixture
def accounts():
    accounts = Accounts()
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        every = re.compile(r"http://\w+\.test/")
        mock.add_callback(responses.POST, every, accounts.exchange, content_type="application/json")
        yield accounts


def request_of(session=None, cached=True, model="m", **extra):
    """A request's body; `session` as Claude Code names it."""
    named = {} if session is None else {"metadata": {"user_id": json.dumps({"session_id": session})}}
    content = [{"type": "text", "text": "Hi", **({"cache_control": EPHEMERAL} if cached else {})}]
    return {"model": model, "messages": [{"role": "user", "content": content}], **named, **extra}


def home(client, asked, headers=()):
    """The upstream that answers."""
    reply = client.post("/v1/messages", json=asked, headers=list(headers), buffered=True)
    assert reply.status_code == 200, reply.data
    return reply.headers["x-aiproxy-upstream"]


def ranking(session, weights=WEIGHTS, client=""):
    """The names of the upstreams in a session's order."""
    settings = [UpstreamSettings(name=name, base_url="", weight=weight) for name, weight in weights.items()]
    upstreams = [Upstream(each, Breaker(3, 1800, Clock())) for each in settings]
    return [upstream.name for upstream in rank(upstreams, f"{client}\n{session}")]


def test_prompt_cache_is_the_default_and_keeps_a_session_at_its_home(accounts):
    client = accounts.client(WEIGHTS)
    for session in SESSIONS[:20]:
        wanted = ranking(session)[0]
        assert {home(client, request_of(session)) for _ in range(3)} == {wanted}
        assert home(client, request_of(), [("X-Claude-Code-Session-Id", session)]) == wanted


def test_a_session_is_its_client_s_by_the_key_s_name_whichever_header_brings_it(accounts):
    keys = tuple(ClientKey(name, (Secret(f"key-of-{name}"),)) for name in ("alice", "bob"))
    client = accounts.client(WEIGHTS, api_keys=keys)
    for session in SESSIONS[:30]:
        for name in ("alice", "bob"):
            forms = ([("x-api-key", f"key-of-{name}")], [("authorization", f"Bearer key-of-{name}")])
            homes = {home(client, request_of(session), form) for form in forms}
            assert homes == {ranking(session, client=name)[0]}


@pytest.mark.parametrize(
    ("affinity", "asked"),
    [("none", request_of(SESSIONS[0])), ("prompt_cache", request_of()), ("prefix", request_of(cached=False))],
    ids=["none", "prompt_cache without a session", "prefix without cache_control"],
)
def test_without_affinity_the_round_robin_has_its_way(accounts, affinity, asked):
    client = accounts.client({"a": 1, "b": 1}, affinity=affinity)
    assert [home(client, asked) for _ in range(6)] == ["a", "b"] * 3


def test_prefix_keeps_a_conversation_where_it_began(accounts):
    client = accounts.client(WEIGHTS, affinity="prefix")
    for number in range(20):
        first = {"role": "user", "content": f"Question {number}"}
        turns = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And now?"}]
        asked = [request_of(cache_control=EPHEMERAL) | {"messages": [first, *turns * n]} for n in range(3)]
        assert len({home(client, each) for each in asked}) == 1
    assert set(accounts.asked) == set("abc")


def test_other_requests_keep_the_round_robin_exactly_beside_sessions(accounts):
    client = accounts.client({"a": 3, "b": 1})
    draw = random.Random(7)
    named = SESSIONS[:50]
    asked = [request_of(cached=False)] * 400 + [request_of(session) for session in named * 3]
    draw.shuffle(asked)
    spread = Counter()
    for each in asked:
        spread["metadata" in each, home(client, each)] += 1
    assert (spread[False, "a"], spread[False, "b"]) == (300, 100)
    homes = Counter(ranking(session, {"a": 3, "b": 1})[0] for session in named)
    assert (spread[True, "a"], spread[True, "b"]) == (3 * homes["a"], 3 * homes["b"])


def test_an_account_that_fails_moves_only_its_own_sessions_and_they_come_home(accounts):
    clock = Clock()
    client = accounts.client(WEIGHTS, clock=clock)
    named = SESSIONS
    rankings = {session: ranking(session) for session in named}
    assert {session: home(client, request_of(session)) for session in named} == {
        session: order[0] for session, order in rankings.items()
    }
    assert len({tuple(order) for order in rankings.values()}) == 6, "each order is some session's"

    accounts.reply = lambda name, asked: (500, b"{}") if name == "b" else (200, message_json())
    accounts.asked.clear()
    for _ in range(2):
        for session, order in rankings.items():
            assert home(client, request_of(session)) == next(name for name in order if name != "b")
    assert accounts.asked.count("b") == 3, "its circuit opened, and then the next in rank was the first asked"

    accounts.reply = lambda name, asked: (200, message_json())
    assert {home(client, request_of(one)) for one in named if rankings[one][0] == "b"} == {"a", "c"}
    clock.now += 1800
    for _ in range(2):
        for session, order in rankings.items():
            assert home(client, request_of(session)) == order[0]


def test_a_session_goes_only_where_its_model_is_served(accounts):
    client = accounts.client(WEIGHTS, models={"a": ["x"], "b": ["x", "y"], "c": ["y"]})
    for session in SESSIONS[:30]:
        order = ranking(session)
        for model, serving in (("x", "ab"), ("y", "bc")):
            wanted = next(name for name in order if name in serving)
            assert home(client, request_of(session, model=model)) == wanted
    accounts.reply = lambda name, asked: (500, b"{}")
    accounts.asked.clear()
    assert (
        client.post("/v1/messages", json=request_of(SESSIONS[0], model="x"), buffered=True).status_code == 500
    )
    assert sorted(accounts.asked) == ["a", "b"]


def later_turn(session):
    """A request with a turn of the model's in it."""
    turns = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And now?"}]
    asked = request_of(session)
    return asked | {"messages": [*asked["messages"], *turns]}


def sessions_at(name):
    """Sessions that have their home there."""
    return [session for session in SESSIONS if ranking(session)[0] == name]


def test_new_conversations_avoid_an_upstream_whose_rate_limit_is_nearly_used_up(accounts):
    clock = Clock()
    client = accounts.client(WEIGHTS, clock=clock)
    begun, new, *_ = sessions_at("a")
    accounts.left = {"a": 5}
    assert home(client, request_of(begun)) == "a"  # its answer says how little is left
    assert home(client, request_of(new)) == ranking(new)[1]
    assert home(client, later_turn(begun)) == "a"
    assert {home(client, request_of()) for _ in range(20)} == {"b", "c"}
    assert home(client, request_of(new, model="n")) == "a"  # a limit is one model's
    clock.now += 61
    accounts.left = {}
    assert home(client, later_turn(new)) == ranking(new)[1]  # where its cache is by now
    assert home(client, request_of(sessions_at("a")[2])) == "a"
    assert "a" in {home(client, request_of()) for _ in range(20)}


def test_a_compacted_conversation_may_leave_an_upstream_with_little_left(accounts):
    client = accounts.client(WEIGHTS)
    session = sessions_at("a")[0]
    accounts.left = {"a": 5}
    assert home(client, request_of(session)) == "a"
    assert home(client, later_turn(session)) == "a"
    assert (
        home(client, later_turn(session), [("X-Claude-Code-Context-Compacted", "1")]) == ranking(session)[1]
    )
    assert home(client, later_turn(session)) == ranking(session)[1]


def test_where_little_is_left_everywhere_conversations_go_home(accounts):
    client = accounts.client(WEIGHTS)
    accounts.left = dict.fromkeys("abc", 5)
    for name in "abc":
        assert home(client, request_of(sessions_at(name)[0])) == name
    for name in "abc":
        assert home(client, request_of(sessions_at(name)[1])) == name


def test_an_upstream_with_little_left_still_answers_where_the_others_fail(accounts):
    client = accounts.client(WEIGHTS)
    accounts.left = {"a": 5}
    first, second, *_ = sessions_at("a")
    assert home(client, request_of(first)) == "a"
    accounts.reply = lambda name, asked: (200, message_json()) if name == "a" else (500, b"{}")
    assert home(client, request_of(second)) == "a"
