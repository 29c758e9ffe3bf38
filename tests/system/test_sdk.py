"""The official SDK against a real gunicorn, through upstreams that misbehave.

One gunicorn serves all tests. Its upstreams have fixed ports, on which each test starts fakes of its own:
`a` always comes before `b`; `c` and `d` answer streams only. Circuits never open here.
"""

import json
import threading

import anthropic
import pytest
from conftest import serving
from fakes import (
    ASK,
    HOST,
    SPOKEN,
    FakeUpstream,
    answer,
    close_now,
    error,
    error_event,
    events,
    free_port,
    message_events,
    message_json,
    tool_use,
    whole,
)

KEY = "sk-client-key-that-nobody-else-may-see"
MUST = {**ASK, "model": "claude-must"}
TOOL = {
    "name": "get_weather",
    "description": "The weather somewhere.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
FIRST = 1_000_000  # its weight against 1: the other gets a turn only when this one fails
TEXT = 'Schnee \u2028 \U0001f600 and a \\ "quote"'


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    ports = {name: free_port() for name in "abcd"}
    upstreams = [
        {
            "name": name,
            "base_url": f"http://{HOST}:{port}",
            "token": f"sk-upstream-token-{name}",
            "auth": "bearer" if name == "b" else "x-api-key",
            "weight": FIRST if name in "ac" else 1,
            "must_stream": name in "cd",
            "available_models": ["claude-must"] if name in "cd" else ["claude-x", "claude-mapped"],
            "model_mappings": {"claude-mapped": f"claude-of-{name}"} if name in "ab" else {},
        }
        for name, port in ports.items()
    ]
    config = {
        "max_body_mb": 1,
        "timeouts": {"connect": 2, "first_byte": 10, "answer": 10, "idle": 1},
        "breaker": {"failures": 10**6, "cooldown": 0},
        "upstreams": upstreams,
    }
    with serving(tmp_path_factory.mktemp("sdk"), config) as served:
        served.ports = ports
        yield served


def fake(name):
    @pytest.fixture(name=name)
    def start(proxy):
        with FakeUpstream(port=proxy.ports[name]) as upstream:
            yield upstream

    return start


fixture_a, fixture_b, fixture_c, fixture_d = map(fake, "abcd")


def client_of(proxy, **options):
    options = {"max_retries": 0, "timeout": 20, **options}
    return anthropic.Anthropic(base_url=proxy.url, api_key=KEY, **options)


@pytest.fixture(scope="module")
def client(proxy):
    with client_of(proxy) as client:
        yield client


# ------------------------------------------------------------------------------------- whole answers


def test_create_returns_the_upstream_s_message(client, a, b):
    a.script(whole(200, message_json(TEXT, "claude-of-the-upstream"), [("request-id", "req_of_a")]))
    message = client.messages.create(**ASK)
    assert message.content[0].text == TEXT
    assert (message.model, message.stop_reason) == ("claude-of-the-upstream", "end_turn")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (10, 5)
    assert message._request_id == "req_of_a"
    assert b.seen == []


@pytest.mark.parametrize(
    "first",
    [close_now(), error(529), whole(200, message_json("half"), then="cut", cut_at=40), whole(200, b"<html>")],
    ids="close 529 cut html".split(),
)
def test_create_never_sees_the_first_upstream_fail(client, a, b, first):
    a.script(first)
    b.script(answer("mapped", model=None))
    raw = client.messages.with_raw_response.create(**{**ASK, "model": "claude-mapped"})
    assert raw.parse().model == "claude-of-b"
    assert (raw.headers["x-aiproxy-upstream"], raw.headers["x-aiproxy-attempts"]) == ("b", "2")
    assert [one.json()["model"] for one in a.seen + b.seen] == ["claude-of-a", "claude-of-b"]


# ------------------------------------------------------------------------------------------- streams


def test_the_stream_helper_gives_text_and_the_same_final_message_as_create(client, a):
    pieces = [TEXT[at : at + 3] for at in range(0, len(TEXT), 3)]
    a.script(events(message_events(pieces)), whole(200, message_json(TEXT)))
    with client.messages.stream(**ASK) as stream:
        assert list(stream.text_stream) == pieces
        final = stream.get_final_message()
    plain = client.messages.create(**ASK)
    assert final.content[0].text == plain.content[0].text == TEXT
    assert (final.id, final.stop_reason, final.usage) == (plain.id, plain.stop_reason, plain.usage)


def test_events_arrive_while_the_upstream_is_still_speaking(client, a):
    gates = [threading.Event() for _ in range(2)]
    a.script(events([*SPOKEN[:4], gates[0], SPOKEN[4], gates[1], *SPOKEN[5:]]))
    with client.messages.stream(**ASK) as stream:
        text = stream.text_stream
        assert next(text) == "one "
        gates[0].set()
        assert next(text) == "two "
        gates[1].set()
        assert list(text) == ["three"]


@pytest.mark.parametrize(
    "first",
    [error(529), events(SPOKEN[:2], then="cut"), events([*SPOKEN[:2], error_event()]), events(SPOKEN[:2])],
    ids="529 cut error-event clean-early-end".split(),
)
def test_a_stream_that_fails_before_its_first_content_costs_nothing(client, a, b, first):
    a.script(first)
    b.script(answer("from b"))
    with client.messages.stream(**ASK) as stream:
        assert stream.get_final_text() == "from b"
        assert stream.response.headers["x-aiproxy-attempts"] == "2"


@pytest.mark.parametrize(
    ("broken", "type_"),
    [
        (events(SPOKEN[:4], then="cut"), "api_error"),
        (events(SPOKEN[:5], then="cut", cut_at=30), "api_error"),
        (events(SPOKEN[:5], then="cut", cut_at=30, torn=True), "api_error"),
        (events(SPOKEN[:5]), "api_error"),  # a clean end without message_stop is none
        (events(SPOKEN[:8]), "api_error"),  # even after message_delta said end_turn
        (events(SPOKEN[:8], framing="close"), "api_error"),
        (events(SPOKEN[:5], then="hang"), "timeout_error"),
        (events([*SPOKEN[:5], error_event()]), "overloaded_error"),
    ],
    ids="cut mid-event mid-chunk clean no-stop close silence error".split(),
)
@pytest.mark.parametrize("way", ["helper", "raw"])
def test_a_broken_stream_raises_and_is_never_taken_for_a_message(client, a, b, broken, type_, way):
    a.script(broken)
    got = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        if way == "helper":
            with client.messages.stream(**ASK) as stream:
                got.extend(stream.text_stream)
                stream.get_final_message()
        else:
            for one in client.messages.create(**ASK, stream=True):
                if one.type == "content_block_delta":
                    got.append(one.delta.text)
    assert (caught.value.status_code, caught.value.type) == (200, type_)
    assert got[0] == "one "
    assert b.seen == []  # the client had seen a part: nobody else is asked


# ----------------------------------------------------------------------------------------- tool use


@pytest.mark.parametrize("model", ["claude-x", "claude-must"])
def test_a_tool_s_input_comes_whole_by_create_and_by_the_stream_helper(client, a, c, model):
    given = {"city": "Ålesund", "days": 3, "deep": {"list": [1.5, None, True, "\U0001f600"]}, "empty": {}}
    for one in (a, c):
        one.script(*[answer("let me see", tool=tool_use(input=given))] * 2)
    message = client.messages.create(**{**ASK, "model": model}, tools=[TOOL])
    assert message.stop_reason == "tool_use"
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert (message.content[1].input, message.content[1].id) == (given, "toolu_01Fake")
    with client.messages.stream(**{**ASK, "model": model}, tools=[TOOL]) as stream:
        partial = "".join(one.partial_json for one in stream if one.type == "input_json")
        assert json.loads(partial) == stream.get_final_message().content[1].input == given
    assert (a.seen + c.seen)[0].json()["tools"] == [TOOL]


@anthropic.beta_tool
def get_weather(city: str, days: int) -> str:
    """The weather somewhere.

    Args:
        city: where
        days: how many
    """
    return f"snow in {city} for {days} days"


def test_a_tool_runner_without_threads_runs_its_tools(client, a, b):
    a.script(answer(tool=tool_use()), error(529))
    b.script(answer("It snows."))
    runner = client.beta.messages.tool_runner(**ASK, tools=[get_weather], thread=False)
    assert runner.until_done().content[0].text == "It snows."
    result = b.seen[0].json()["messages"][-1]["content"][0]
    assert result["content"] == "snow in Oslo for 3 days"


def test_a_tool_runner_drops_its_thread_when_the_upstreams_know_none(client, a, b):
    no_threads = error(400, details={"error_code": "thread_unsupported_request"})
    a.script(no_threads, answer(tool=tool_use()), answer("It snows."))
    b.script(no_threads)
    runner = client.beta.messages.tool_runner(**ASK, tools=[get_weather])
    assert runner.until_done().content[0].text == "It snows."
    assert [("thread" in one.json()) for one in a.seen] == [True, False, False]
    assert a.seen[0].header("anthropic-beta") == "message-threads-2026-08-12"


# -------------------------------------------------------------------------------------- must_stream


def test_create_through_a_must_stream_upstream_gives_the_message_that_the_events_spell(client, c, d):
    c.script(events(SPOKEN[:5], then="cut"))
    d.script(events(message_events([TEXT[:7], TEXT[7:]], usage={"output_tokens": 77})))
    raw = client.messages.with_raw_response.create(**MUST)
    message = raw.parse()
    assert (message.content[0].text, message.usage.output_tokens) == (TEXT, 77)
    assert message.stop_reason == "end_turn"
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["x-aiproxy-upstream"] == "d"
    assert [one.json()["stream"] for one in c.seen + d.seen] == [True, True]


# --------------------------------------------------------------------------------------------- errors

CLASSES = {
    400: (anthropic.BadRequestError, "invalid_request_error"),
    403: (anthropic.PermissionDeniedError, "permission_error"),
    404: (anthropic.NotFoundError, "not_found_error"),
    409: (anthropic.ConflictError, "conflict_error"),
    413: (anthropic.ContentTooLargeError, "request_too_large"),
    422: (anthropic.UnprocessableEntityError, "invalid_request_error"),
    429: (anthropic.RateLimitError, "rate_limit_error"),
    500: (anthropic.InternalServerError, "api_error"),
    504: (anthropic.GatewayTimeoutError, "timeout_error"),
    529: (anthropic.OverloadedError, "overloaded_error"),
}


@pytest.mark.parametrize("status", CLASSES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_errors_are_raised_as_the_sdk_s_own_class_with_their_bytes(client, a, b, status, stream):
    class_, type_ = CLASSES[status]
    details = {"error_code": "some_code", "n": 1.50}
    fault = {"details": details, "message": f"what b says: {TEXT}", "type": type_}
    body = {"request_id": "req_b", "error": fault, "type": "error"}
    spelt = (
        json.dumps(body, ensure_ascii=False, indent=3).encode() + b"\r\n"
    )  # as no serializer of ours would
    a.script(error(status, message="what a says"))
    b.script(whole(status, spelt, [("request-id", "req_b")]))
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(**ASK, stream=stream)
    raised = caught.value
    assert type(raised) is class_
    assert (raised.status_code, raised.request_id, raised.error_code) == (status, "req_b", "some_code")
    assert raised.body == body
    assert raised.response.headers["x-aiproxy-attempts"] == "2"
    assert stream or raised.response.content == spelt


@pytest.mark.parametrize("status", [401, 402])
def test_an_error_about_an_upstream_s_account_is_a_server_error_that_is_not_retried(proxy, a, b, status):
    for one in (a, b):
        one.script(*[error(status, message="the account is out")] * 3)
    with client_of(proxy, max_retries=2) as client, pytest.raises(anthropic.InternalServerError) as caught:
        client.messages.create(**ASK)
    assert caught.value.status_code == 502
    assert "the account is out" in caught.value.api_message
    assert len(a.seen) + len(b.seen) == 2


def test_the_sdk_s_own_retries_heed_an_upstream_s_hints(proxy, a, b):
    a.script(error(529, headers=[("retry-after-ms", "1")]), answer("second time"))
    b.script(error(529, headers=[("retry-after-ms", "1"), ("x-should-retry", "true")]))
    with client_of(proxy, max_retries=1) as client:
        assert client.messages.create(**ASK).content[0].text == "second time"
        assert [one.header("x-stainless-retry-count") for one in a.seen] == ["0", "1"]
        for one in (a, b):
            one.script(error(529, headers=[("x-should-retry", "false")]))
        with pytest.raises(anthropic.OverloadedError):
            client.messages.create(**ASK)
    assert len(a.seen) == 3


def test_errors_of_our_own_are_raised_as_the_sdk_s_classes_and_name_no_upstream(client, proxy):
    large = [{"role": "user", "content": "x" * 3 * 1024 * 1024}]
    for change, class_, type_ in (
        ({"model": "gpt-nonsense"}, anthropic.NotFoundError, "not_found_error"),
        ({"messages": large}, anthropic.ContentTooLargeError, "request_too_large"),
        ({}, anthropic.InternalServerError, "api_error"),  # no upstream runs
    ):
        with pytest.raises(class_) as caught:
            client.messages.create(**{**ASK, **change})
        raised = caught.value
        assert raised.type == type_
        assert change.get("model", "") in raised.api_message
        assert raised.request_id == raised.body["request_id"]
        told = raised.response.text + str(raised.response.headers)
        assert [part for part in (HOST, *map(str, proxy.ports.values())) if part in told] == []


# ------------------------------------------------------------------------------- what crosses the proxy


@pytest.mark.parametrize("header", ["bearer", "x-api-key", "both"])
def test_each_way_of_sending_the_key_is_taken_and_replaced(proxy, a, b, header):
    extra = {} if header == "bearer" else {"x-api-key": KEY}
    if header == "x-api-key":
        extra["authorization"] = anthropic.Omit()  # as SDKs before 2.0 did
    a.script(error(529))
    with client_of(proxy, default_headers=extra) as client:
        client.messages.create(**ASK)
    keys = [[one.seen[0].every(name) for name in ("x-api-key", "authorization")] for one in (a, b)]
    assert keys == [[["sk-upstream-token-a"], []], [[], ["Bearer sk-upstream-token-b"]]]
    assert KEY not in str(a.seen + b.seen)
