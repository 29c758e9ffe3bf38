"""Sessions and their upstreams: what names one, where it goes, what that saves; other requests beside it."""

import itertools
import json
import random
import re
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import responses
from fakes import Clock, error, message_json

from aiproxy.api import body
from aiproxy.app import create_app
from aiproxy.config import ClientKey, Config, LoggingSettings, Secret, UpstreamSettings
from aiproxy.upstreams.affinity import key_of, rank
from aiproxy.upstreams.breaker import Breaker
from aiproxy.upstreams.upstream import Upstream

SESSION = "6f9f2a4e-1c1b-4f0e-9d55-0a3f8f6f7a11"
OTHER = "b7c1d2e3-aaaa-4bbb-8ccc-1234567890ab"
EPHEMERAL = {"type": "ephemeral"}
WEIGHTS = {"a": 5, "b": 3, "c": 2}


class Accounts:
    """Upstreams that answer in process: `reply` gets an account's name and what it is asked."""

    def __init__(self):
        self.reply = lambda name, asked: (200, message_json())
        self.asked = []

    def exchange(self, request):
        name = urlsplit(request.url).hostname.removesuffix(".test")
        self.asked.append(name)
        status, content = self.reply(name, json.loads(request.body))
        return status, {}, content

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


def key(asked, headers=(), setting="prompt_cache", client="alice"):
    raw = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    return key_of(setting, client, headers, body.read(raw))


def upstreams_of(weights):
    settings = [UpstreamSettings(name=name, base_url="", weight=weight) for name, weight in weights.items()]
    return [Upstream(each, Breaker(3, 1800, Clock())) for each in settings]


def ranking(session, weights=WEIGHTS, client=""):
    """The names of the upstreams in a session's order."""
    found = rank(upstreams_of(weights), key(request_of(session), client=client))
    return [upstream.name for upstream in found]


def sessions(count, seed=1):
    draw = random.Random(seed)
    return [str(uuid.UUID(int=draw.getrandbits(128), version=4)) for _ in range(count)]


# ------------------------------------------------------------------------------- what names a session


def named_by_user_id(user_id):
    return request_of(metadata={"user_id": user_id})


IN_JSON = json.dumps({"device_id": "d" * 64, "account_uuid": "", "session_id": SESSION})
IN_OLD_FORM = f"user_{'0' * 64}_account_{OTHER}_session_{SESSION}"


@pytest.mark.parametrize(
    ("asked", "headers"),
    [
        (request_of(), [("x-claude-code-session-id", SESSION)]),
        (named_by_user_id(IN_JSON), []),
        (named_by_user_id(json.dumps({"session_id": SESSION}, indent=2)), []),
        (named_by_user_id(IN_OLD_FORM), []),
        (named_by_user_id(f"user_{'0' * 64}_account__session_{SESSION}"), []),
        (named_by_user_id(OTHER), [("x-claude-code-session-id", SESSION)]),
        (named_by_user_id(IN_JSON.replace(SESSION, OTHER)), [("x-claude-code-session-id", SESSION)]),
        (request_of(metadata=None), [("x-claude-code-session-id", SESSION)]),
        (request_of(metadata="no object"), [("x-claude-code-session-id", SESSION)]),
    ],
)
def test_a_session_is_named_by_the_header_else_by_the_user_id_in_either_form(asked, headers):
    assert key(asked, headers) == key(request_of(), [("x-claude-code-session-id", SESSION)]) is not None
    assert key(asked, headers) != key(request_of(), [("x-claude-code-session-id", OTHER)])


@pytest.mark.parametrize(
    "user_id",
    [
        "someone@example.com",
        f"user_x_session_{SESSION}_and_more",
        f"user_x_session_{SESSION[:-1]}",
        '{"device_id": "d"}',
        '{"session_id": ""}',
        '{"session_id": 5}',
        "{no JSON",
        "{" * 5000,
        '["session_id"]',
        '{"session_id": "\\ud800"}',
    ],
)
def test_any_other_user_id_counts_as_a_whole(user_id):
    mine, same = key(named_by_user_id(user_id)), key(named_by_user_id(user_id))
    assert mine == same is not None
    assert mine != key(named_by_user_id(user_id + "x"))
    assert rank(upstreams_of(WEIGHTS), mine)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"user_id": None}, {"user_id": ""}, {"user_id": 7}, {"user_id": {}}, [], "x", 1]
)
def test_without_a_name_there_is_no_session(metadata):
    assert key(request_of(metadata=metadata)) is None
    assert key(request_of(), [("x-claude-code-session-id", "")]) is None
    assert key(request_of(), [("x-claude-code-agent-id", SESSION)]) is None


def test_a_session_belongs_to_the_client_that_names_it():
    assert key(request_of(SESSION), client="alice") != key(request_of(SESSION), client="bob")
    firsts = Counter(
        (ranking(one, client="alice")[0] == ranking(one, client="bob")[0]) for one in sessions(300)
    )
    assert 60 < firsts[True] < 180, "two clients' sessions of one name are spread as any two (38 %)"


def test_the_client_is_known_by_its_key_s_name_whichever_header_brings_it(accounts):
    keys = tuple(ClientKey(name, (Secret(f"key-of-{name}"),)) for name in ("alice", "bob"))
    client = accounts.client(WEIGHTS, api_keys=keys)
    for session in sessions(30):
        for name in ("alice", "bob"):
            forms = ([("x-api-key", f"key-of-{name}")], [("authorization", f"Bearer key-of-{name}")])
            homes = {home(client, request_of(session), form) for form in forms}
            assert homes == {ranking(session, client=name)[0]}


@pytest.mark.parametrize(
    "extra",
    [
        {"cache_control": EPHEMERAL},
        {"system": [{"type": "text", "text": "s", "cache_control": EPHEMERAL}]},
        {"tools": [{"name": "t", "input_schema": {}, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]},
        {"cache_control": None, "tools": [{"name": "t", "cache_control": EPHEMERAL}]},
    ],
)
def test_a_request_that_uses_cache_control_anywhere_stays_with_its_session(extra):
    asked = request_of(SESSION, cached=False, **extra)
    for raw in (json.dumps(asked), json.dumps(asked, separators=(",", ":")), json.dumps(asked, indent=1)):
        assert key(raw.encode()) is not None
    assert key(json.dumps(asked).replace('"cache_control":', '"cache_control" \n:').encode()) is not None


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"cache_control": None},
        {"system": [{"type": "text", "text": "s", "cache_control": None}]},
        {"system": 'use "cache_control": {"type": "ephemeral"} in your body'},
        {"system": '"cache_control":{'},
        {"system": "cache_control"},
        {"system": [{"type": "text", "text": "cache_control"}]},
        {"stop_sequences": ["cache_control", "{"]},
        {"metadata": {"user_id": IN_JSON, "cache_controls": 1, "my_cache_control": 2}},
    ],
)
@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":"), (" , ", "  :  ")])
def test_a_request_that_uses_no_cache_control_goes_anywhere(extra, separators):
    asked = {**request_of(SESSION, cached=False), **extra}
    for setting in ("prompt_cache", "prefix"):
        assert key(json.dumps(asked, separators=separators).encode(), setting=setting) is None


def test_none_switches_it_off(accounts):
    assert key(request_of(SESSION), setting="none") is None
    client = accounts.client({"a": 1, "b": 1}, affinity="none")
    assert [home(client, request_of(SESSION)) for _ in range(6)] == ["a", "b"] * 3


def test_prompt_cache_is_the_default(accounts):
    assert Config().affinity == "prompt_cache"
    client = accounts.client(WEIGHTS)
    for session in sessions(20):
        wanted = ranking(session)[0]
        assert {home(client, request_of(session)) for _ in range(3)} == {wanted}
        assert home(client, request_of(), [("X-Claude-Code-Session-Id", session)]) == wanted


def test_prompt_cache_leaves_requests_without_a_session_to_the_round_robin(accounts):
    client = accounts.client({"a": 1, "b": 1})
    assert [home(client, request_of()) for _ in range(6)] == ["a", "b"] * 3


# ------------------------------------------------------------------------------------------- `prefix`

TOOLS = [{"name": "get_weather", "input_schema": {"type": "object"}}]
CLAUDE_MD = "<system-reminder>" + "As you answer, follow CLAUDE.md. " * 400 + "</system-reminder>\n"


def conversation(turns=1, first="What is the weather?", mark="last", billing=None, **extra):
    """A conversation as it is sent at a turn; `mark` says where the cache breakpoints are."""
    messages = []
    for turn in range(turns):
        asked = first if turn == 0 else f"And on day {turn}?"
        messages.append({"role": "user", "content": [{"type": "text", "text": asked}]})
        messages.append({"role": "assistant", "content": "Rain."})
    messages.pop()
    system = [{"type": "text", "text": "You are Claude Code."}, {"type": "text", "text": "Be brief."}]
    if mark == "all":
        for block in [*system, *(message["content"][0] for message in messages[::2])]:
            block["cache_control"] = EPHEMERAL
    elif mark == "system":
        system[-1]["cache_control"] = EPHEMERAL
    elif mark == "last":
        messages[-1]["content"][0]["cache_control"] = EPHEMERAL
    elif mark == "top":
        extra = {"cache_control": EPHEMERAL, **extra}
    if billing:
        system.insert(0, {"type": "text", "text": f"x-anthropic-billing-header: cc={billing}"})
    return {"model": "m", "tools": TOOLS, "system": system, "messages": messages, **extra}


def prefix_key(asked):
    return key(asked, setting="prefix")


def test_prefix_keys_a_conversation_without_a_session_by_what_stays_the_same():
    assert prefix_key(conversation(1)) is not None
    assert len({prefix_key(conversation(turns)) for turns in range(1, 9)}) == 1


def test_prefix_uses_the_session_where_there_is_one():
    with_session = key(request_of(SESSION))
    assert prefix_key(request_of(SESSION)) == with_session
    assert prefix_key({**conversation(), "metadata": {"user_id": IN_JSON}}) == with_session


@pytest.mark.parametrize(
    "other",
    [
        conversation(first="What is the time?"),
        conversation(model="n"),
        conversation(tools=[]),
        conversation(system="You are a pirate."),
        conversation(system=[{"type": "text", "text": "You are Claude Code."}]),
        conversation(first="What is the weather? "),
    ],
)
def test_prefix_tells_conversations_apart_by_model_tools_system_and_first_message(other):
    assert prefix_key(other) != prefix_key(conversation()) is not None


def test_prefix_tells_conversations_of_one_project_apart():
    # CLAUDE.md opens the first message of each.
    first_lines = [conversation(first=f"{CLAUDE_MD}Fix bug {number}.") for number in range(50)]
    assert len({prefix_key(asked) for asked in first_lines}) == 50


def test_prefix_ignores_the_billing_block_in_front():
    keys = {prefix_key(conversation(turns, billing=f"v{turns}")) for turns in range(1, 5)}
    assert keys == {prefix_key(conversation())}


def test_prefix_counts_the_billing_header_s_words_anywhere_else():
    later = conversation()
    later["system"].append({"type": "text", "text": "x-anthropic-billing-header: cc=1"})
    assert prefix_key(later) != prefix_key(conversation())


@pytest.mark.parametrize("mark", ["all", "system", "top"])
def test_prefix_ignores_where_the_cache_breakpoints_are(mark):
    assert prefix_key(conversation(3, mark=mark)) == prefix_key(conversation(1))


def test_prefix_ignores_a_breakpoint_that_a_tool_has_or_has_not():
    marked = conversation(tools=[{**TOOLS[0], "cache_control": EPHEMERAL}])
    assert prefix_key(marked) == prefix_key(conversation())


def test_prefix_goes_by_the_first_message_of_the_user_s():
    keys = set()
    for role, content in (("assistant", "Hello."), ("system", "It is Monday."), ("system", "It is Tuesday.")):
        asked = conversation(2)
        asked["messages"].insert(0, {"role": role, "content": content})
        keys.add(prefix_key(asked))
    assert keys == {prefix_key(conversation())}


def test_prefix_takes_a_text_for_its_one_block():
    as_text = conversation()
    as_text["messages"] = [{"role": "user", "content": "What is the weather?"}]
    as_text["cache_control"] = EPHEMERAL
    assert prefix_key(as_text) == prefix_key(conversation(mark="top"))


@pytest.mark.parametrize(
    "odd",
    [
        {"messages": None},
        {"messages": []},
        {"messages": ["text"]},
        {"messages": [{"role": "assistant", "content": "prefill"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [1, "two", None]}]},
        {"messages": [{"role": "user"}]},
        {"system": [None]},
        {"system": []},
        {"system": {"text": 1}},
        {"system": [{"text": None}]},
    ],
)
def test_prefix_takes_whatever_a_body_may_hold(odd, accounts):
    asked = {**conversation(mark="top"), **odd}
    client = accounts.client(WEIGHTS, affinity="prefix")
    assert len({home(client, asked) for _ in range(4)}) == 1


@pytest.mark.parametrize("where", ["messages", "system", "tools"])
def test_prefix_leaves_what_is_nested_too_deeply_to_an_upstream(accounts, where):
    nested = json.loads("[" * 700 + "]" * 700)
    asked = conversation(mark="top", **{where: nested} if where != "messages" else {})
    asked["messages"][0]["content"] = nested if where == "messages" else "Hi"
    assert home(accounts.client(WEIGHTS, affinity="prefix"), asked)


def test_prefix_keeps_a_conversation_where_it_began(accounts):
    client = accounts.client(WEIGHTS, affinity="prefix")
    for number in range(20):
        first = f"Question {number}"
        assert len({home(client, conversation(turns, first=first)) for turns in range(1, 5)}) == 1
    assert set(accounts.asked) == set("abc")


def test_prefix_leaves_requests_without_cache_control_to_the_round_robin(accounts):
    client = accounts.client({"a": 1, "b": 1}, affinity="prefix")
    assert [home(client, conversation(mark=None)) for _ in range(6)] == ["a", "b"] * 3


# --------------------------------------------------------------------------------------- where it goes


def test_ten_thousand_sessions_are_spread_within_three_percent_of_the_weights():
    upstreams = upstreams_of(WEIGHTS)
    firsts = Counter(rank(upstreams, f"alice\n{one}")[0].name for one in sessions(10_000, seed=0))
    for name, weight in WEIGHTS.items():
        assert abs(firsts[name] / (1000 * weight) - 1) < 0.03


def test_those_of_one_upstream_have_their_second_choice_by_weight_too():
    upstreams = upstreams_of({"a": 1, "b": 3, "c": 1})
    orders = [[one.name for one in rank(upstreams, session)] for session in sessions(10_000)]
    seconds = Counter(order[1] for order in orders if order[0] == "a")
    assert 2.6 < seconds["b"] / seconds["c"] < 3.4


def test_an_upstream_more_takes_its_share_and_moves_no_other_session():
    for session in sessions(500):
        before, after = ranking(session), ranking(session, {**WEIGHTS, "d": 4})
        assert [name for name in after if name != "d"] == before


def test_the_order_in_the_configuration_is_irrelevant():
    for session in sessions(50):
        orders = {tuple(ranking(session, dict(order))) for order in itertools.permutations(WEIGHTS.items())}
        assert len(orders) == 1


def test_equal_weights_of_any_size_are_the_same():
    for session in sessions(50):
        assert ranking(session, dict.fromkeys("abc", 1)) == ranking(session, dict.fromkeys("abc", 1000))


def test_the_ranking_is_the_same_in_every_process():
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from aiproxy.upstreams.affinity import rank\n"
        "from aiproxy.config import UpstreamSettings\n"
        "from aiproxy.upstreams.breaker import Breaker\n"
        "from aiproxy.upstreams.upstream import Upstream\n"
        "breaker = Breaker(3, 1800, int)\n"
        f"made = [Upstream(UpstreamSettings(n, '', weight=w), breaker) for n, w in {WEIGHTS}.items()]\n"
        f"print([[one.name for one in rank(made, session)] for session in {sessions(100)}])"
    )
    ran = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    said = {process.communicate()[0] for process in ran}
    here = [[one.name for one in rank(upstreams_of(WEIGHTS), session)] for session in sessions(100)]
    assert said == {f"{here}\n"}


@pytest.mark.parametrize("digest", [b"\0" * 8, b"\xff" * 8])
def test_no_draw_is_out_of_bounds(monkeypatch, digest):
    class Blake:
        def __init__(self, *_, **__):
            pass

        def digest(self):
            return digest

    monkeypatch.setattr("hashlib.blake2b", Blake)
    assert len(rank(upstreams_of(WEIGHTS), "any")) == 3


def test_other_requests_keep_the_round_robin_exactly_beside_sessions(accounts):
    client = accounts.client({"a": 3, "b": 1})
    draw = random.Random(7)
    named = sessions(50)
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
    named = sessions(60, seed=4)
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


def test_a_home_that_rests_is_passed_over_for_as_long_as_it_said(upstream):
    clock = Clock()
    session = next(one for one in sessions(50) if ranking(one)[:2] == ["b", "a"])
    fakes = {name: upstream() for name in WEIGHTS}
    fakes["b"].script(error(429, headers=[("retry-after", "60")]))
    config = Config(
        upstreams=tuple(
            UpstreamSettings(name=name, base_url=fakes[name].url, token="t", weight=weight)
            for name, weight in WEIGHTS.items()
        )
    )
    client = create_app(config, clock).test_client()
    assert [home(client, request_of(session)) for _ in range(3)] == ["a"] * 3
    clock.now += 59
    assert home(client, request_of(session)) == "a"
    clock.now += 1
    assert home(client, request_of(session)) == "b"
    assert len(fakes["b"].seen) == 2


def test_when_all_are_open_each_is_still_tried(accounts):
    client = accounts.client(WEIGHTS)
    accounts.reply = lambda name, asked: (500, b"{}")
    for session in sessions(12):
        accounts.asked.clear()
        client.post("/v1/messages", json=request_of(session), buffered=True)
        assert sorted(accounts.asked) == ["a", "b", "c"]
    accounts.reply = lambda name, asked: (200, message_json())
    assert home(client, request_of(SESSION))


def test_a_session_goes_only_where_its_model_is_served(accounts):
    client = accounts.client(WEIGHTS, models={"a": ["x"], "b": ["x", "y"], "c": ["y"]})
    for session in sessions(30):
        order = ranking(session)
        for model, serving in (("x", "ab"), ("y", "bc")):
            wanted = next(name for name in order if name in serving)
            assert home(client, request_of(session, model=model)) == wanted
    accounts.reply = lambda name, asked: (500, b"{}")
    accounts.asked.clear()
    assert client.post("/v1/messages", json=request_of(SESSION, model="x"), buffered=True).status_code == 500
    assert sorted(accounts.asked) == ["a", "b"]


# ------------------------------------------------------------------------------------ what that saves

SYSTEM_TOKENS, FIRST_TOKENS, TURN_TOKENS = 4000, 1500, 350


class Cache:
    """One account's prompt cache, and what its user pays; times are of no account here."""

    def __init__(self):
        self._prefixes = set()
        self.uncached = 0
        self.cached = 0

    def bill(self, asked):
        """Charge one request: what an earlier one brought in front is read, the rest is written."""
        parts = [(json.dumps(asked["system"]), SYSTEM_TOKENS)]
        for message in asked["messages"]:
            parts.append((json.dumps(message), TURN_TOKENS if len(parts) > 1 else FIRST_TOKENS))
        prefix = ""
        for part, tokens in parts:
            prefix += part
            if prefix in self._prefixes:
                self.cached += tokens
            else:
                self.uncached += tokens
                self._prefixes.add(prefix)


def conversations(count=50, turns=20):
    """The requests of that many conversations, side by side: each round has one of each, in any order."""
    draw = random.Random(11)
    histories = {session: [] for session in sessions(count, seed=3)}
    for turn in range(turns):
        order = list(histories)
        draw.shuffle(order)
        for session in order:
            histories[session].append({"role": "user", "content": f"{session}, turn {turn}"})
            yield {**request_of(session), "system": "You help.", "messages": histories[session]} | {
                "cache_control": EPHEMERAL
            }
            histories[session].append({"role": "assistant", "content": f"answer {turn}"})


def billed(accounts, weights, affinity):
    """Tokens of all accounts: not read from a cache, read from one, and their price in input tokens."""
    caches = {name: Cache() for name in weights}

    def reply(name, asked):
        caches[name].bill(asked)
        return 200, message_json()

    accounts.reply = reply
    client = accounts.client(weights, affinity)
    for asked in conversations():
        home(client, asked)
    uncached, cached = (sum(getattr(one, kind) for one in caches.values()) for kind in ("uncached", "cached"))
    return uncached, cached, uncached * 1.25 + cached * 0.1


@pytest.fixture(scope="module")
def alone():
    """What one account bills when all conversations go straight to it."""
    cache = Cache()
    for asked in conversations():
        cache.bill(asked)
    return cache.uncached, cache.cached, cache.uncached * 1.25 + cache.cached * 0.1


def told(how, figures, alone):
    times = [f"{mine / one:.2f}" for mine, one in zip(figures[::2], alone[::2], strict=True)]
    print(
        f"{how}: {figures[0]:,} uncached input tokens ({times[0]} times a single account's), "
        f"{figures[1]:,} cached, price {figures[2]:,.0f} ({times[1]} times)"
    )


def test_with_affinity_three_accounts_bill_what_one_would(accounts, alone):
    figures = billed(accounts, WEIGHTS, "prompt_cache")
    told("one account", alone, alone)
    told("affinity", figures, alone)
    assert figures[0] <= 1.1 * alone[0]
    assert figures[2] <= 1.1 * alone[2]
    assert set(accounts.asked) == set(WEIGHTS)


def test_without_affinity_they_bill_many_times_that(accounts, alone):
    figures = billed(accounts, WEIGHTS, "none")
    told("no affinity", figures, alone)
    assert figures[0] > 2 * alone[0]
    assert figures[2] > 1.5 * alone[2]
