"""Sessions and their upstreams: what names one, and in which order it prefers them."""

import json
import random
import uuid
from collections import Counter

import pytest
from fakes import Clock

from aiproxy.api import body
from aiproxy.config import UpstreamSettings
from aiproxy.upstreams.affinity import key_of, rank
from aiproxy.upstreams.breaker import Breaker
from aiproxy.upstreams.upstream import Upstream

SESSION = "6f9f2a4e-1c1b-4f0e-9d55-0a3f8f6f7a11"
OTHER = "b7c1d2e3-aaaa-4bbb-8ccc-1234567890ab"
EPHEMERAL = {"type": "ephemeral"}
WEIGHTS = {"a": 5, "b": 3, "c": 2}


def request_of(session=None, cached=True, **extra):
    """A request's body; `session` as Claude Code names it."""
    named = {} if session is None else {"metadata": {"user_id": json.dumps({"session_id": session})}}
    content = [{"type": "text", "text": "Hi", **({"cache_control": EPHEMERAL} if cached else {})}]
    return {"model": "m", "messages": [{"role": "user", "content": content}], **named, **extra}


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


ODD_USER_IDS = [
    *[
        "someone@example.com",
        f"user_x_session_{SESSION}_and_more",
        f"user_x_session_{SESSION[:-1]}",
        "{" * 5000,
    ],
    *['{"device_id": "d"}', '{"session_id": ""}', '{"session_id": 5}', "{no JSON", '["session_id"]'],
    '{"session_id": "\\ud800"}',
]


@pytest.mark.parametrize("user_id", ODD_USER_IDS, ids=lambda user_id: user_id[:30])
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


# ------------------------------------------------------------------------------------------- `prefix`


TOOLS = [{"name": "get_weather", "input_schema": {"type": "object"}}]


def conversation(turns=1, first="What is the weather?", mark="last", billing=None, **extra):
    """A conversation as it is sent at a turn; `mark` says where the cache breakpoints are."""
    messages = []
    for turn in range(turns):
        asked = first if turn == 0 else f"And on day {turn}?"
        messages.append({"role": "user", "content": [{"type": "text", "text": asked}]})
        messages.append({"role": "assistant", "content": "Rain."})
    messages.pop()
    system = [{"type": "text", "text": "You are Claude Code."}, {"type": "text", "text": "Be brief."}]
    marked = {
        "all": [*system, *(message["content"][0] for message in messages[::2])],
        "system": system[-1:],
        "last": [messages[-1]["content"][0]],
        "top": [extra],
    }[mark]
    for block in marked:
        block["cache_control"] = EPHEMERAL
    if billing:
        system.insert(0, {"type": "text", "text": f"x-anthropic-billing-header: cc={billing}"})
    return {"model": "m", "tools": TOOLS, "system": system, "messages": messages, **extra}


def prefix_key(asked):
    return key(asked, setting="prefix")


SAME = {
    "a later turn": conversation(9),
    "breakpoints in all blocks": conversation(3, mark="all"),
    "a breakpoint in the system prompt": conversation(3, mark="system"),
    "a breakpoint at the top": conversation(3, mark="top"),
    "a breakpoint in a tool": conversation(tools=[{**TOOLS[0], "cache_control": EPHEMERAL}]),
    "a billing block in front": conversation(2, billing="v2"),
    "a text for its one block": conversation(
        mark="top", messages=[{"role": "user", "content": "What is the weather?"}]
    ),
    "an assistant's message before the user's": conversation(
        mark="top", messages=[{"role": "assistant", "content": "Hello."}, *conversation()["messages"]]
    ),
    "a system message before the user's": conversation(
        mark="top", messages=[{"role": "system", "content": "It is Monday."}, *conversation()["messages"]]
    ),
}


@pytest.mark.parametrize("asked", SAME.values(), ids=SAME)
def test_prefix_keys_a_conversation_without_a_session_by_what_stays_the_same(asked):
    assert prefix_key(asked) == prefix_key(conversation()) is not None


def test_prefix_uses_the_session_where_there_is_one():
    assert prefix_key({**conversation(), "metadata": {"user_id": IN_JSON}}) == key(request_of(SESSION))


CLAUDE_MD = "<system-reminder>" + "As you answer, follow CLAUDE.md. " * 400 + "</system-reminder>\n"
BILLING_WORDS = {"type": "text", "text": "x-anthropic-billing-header: cc=1"}
OTHERS = {
    "model": conversation(model="n"),
    "tools": conversation(tools=[]),
    "system": conversation(system="You are a pirate."),
    "a block less in the system prompt": conversation(system=conversation()["system"][:1]),
    "the billing words elsewhere": conversation(system=[*conversation()["system"], BILLING_WORDS]),
    "first message": conversation(first="What is the weather? "),
    "first message behind CLAUDE.md": conversation(first=f"{CLAUDE_MD}Fix bug 1."),
    "another one behind CLAUDE.md": conversation(first=f"{CLAUDE_MD}Fix bug 2."),
}


def test_prefix_tells_conversations_apart_by_model_tools_system_and_first_message():
    keys = {prefix_key(asked) for asked in [conversation(), *OTHERS.values()]}
    assert len(keys - {None}) == len(OTHERS) + 1


DEEP = json.loads("[" * 700 + "]" * 700)


@pytest.mark.parametrize(
    "odd",
    [
        *({"messages": value} for value in (None, [], ["text"], [{"role": "user"}])),
        *({"messages": [{"role": "user", "content": content}]} for content in (None, [1, "two", None], DEEP)),
        *({"system": value} for value in ([None], [], {"text": 1}, [{"text": None}], DEEP)),
        {"tools": DEEP},
    ],
)
def test_prefix_takes_whatever_a_body_may_hold(odd):
    asked = {**conversation(mark="top"), **odd}
    assert prefix_key(asked) == prefix_key(json.loads(json.dumps(asked)))


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


def test_an_upstream_more_in_another_order_takes_its_share_and_moves_no_other_session():
    for session in sessions(500):
        before, after = ranking(session), ranking(session, {"d": 4, **dict(reversed(WEIGHTS.items()))})
        assert [name for name in after if name != "d"] == before


def test_the_ranking_is_the_same_in_every_process_and_version():
    assert ["".join(ranking(session)) for session in sessions(8)] == [
        "acb",
        "cab",
        "abc",
        "acb",
        "acb",
        "cab",
        "abc",
        "abc",
    ]


@pytest.mark.parametrize("digest", [b"\0" * 8, b"\xff" * 8])
def test_no_draw_is_out_of_bounds(monkeypatch, digest):
    class Blake:
        def __init__(self, *_, **__):
            pass

        def digest(self):
            return digest

    monkeypatch.setattr("hashlib.blake2b", Blake)
    assert len(rank(upstreams_of(WEIGHTS), "any")) == 3
