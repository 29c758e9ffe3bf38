"""The official SDK against a real gunicorn, through upstreams that misbehave.

One gunicorn serves all tests. Its upstreams have fixed ports, on which each test starts fakes of its own:
`a` always comes before `b`; `c` and `d` answer streams only. Circuits never open here.
"""

import json
import sys
import threading

import anthropic
import pytest
import yaml
from conftest import ROOT, Served
from fakes import (
    FakeUpstream,
    answer,
    close_now,
    error,
    error_event,
    events,
    free_port,
    gzipped,
    hang,
    head_only,
    message_events,
    message_json,
    ping,
    reset_now,
    tool_use,
    whole,
)

KEY = "sk-client-key-that-nobody-else-may-see"
ASK = {"model": "claude-x", "max_tokens": 16, "messages": [{"role": "user", "content": "Hi"}]}
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
            "base_url": f"http://127.0.0.1:{port}",
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
        "listen": free_port(),
        "max_body_mb": 1,
        "timeouts": {"connect": 2, "first_byte": 5, "answer": 5, "idle": 0.6},
        "breaker": {"failures": 10**6, "cooldown": 0},
        "upstreams": upstreams,
    }
    path = tmp_path_factory.mktemp("sdk") / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "gunicorn", "wsgi:app", "--graceful-timeout", "2"]
    served = Served(command, ROOT, {"AIPROXY_CONFIG": str(path)}, config["listen"])
    served.ports = ports
    try:
        served.wait_until_ready()
        yield served
    finally:
        served.quit()


def fake(name):
    @pytest.fixture(name=name)
    def start(proxy):
        with FakeUpstream(port=proxy.ports[name]) as upstream:
            yield upstream

    return start


fixture_a, fixture_b, fixture_c, fixture_d = map(fake, "abcd")


@pytest.fixture(scope="module")
def client(proxy):
    with anthropic.Anthropic(base_url=proxy.url, api_key=KEY, max_retries=0, timeout=8) as client:
        yield client


def refusal(status, type_, message, details=None):
    """An error's bytes as no serializer of ours would write them, and the same parsed."""
    request_id = f"req_{type_}"
    shown = {"details": details, "message": message, "type": type_} if details else {"message": message}
    body = {"request_id": request_id, "error": {"type": type_, **shown}, "type": "error"}
    spelt = json.dumps(body, ensure_ascii=False, indent=3).encode() + b"\r\n"
    return whole(status, spelt, [("request-id", request_id)]), spelt, body


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
    [
        close_now(),
        reset_now(),
        error(529),
        error(500),
        error(401),
        error(400),
        whole(200, message_json("half"), then="cut", cut_at=40),
        whole(200, b"<html>welcome to our wifi</html>", content_type="text/html"),
        whole(200, b""),
        whole(200, b'{"type":"error","error":{"type":"overloaded_error","message":"x"}}'),
        events(message_events(["un", "asked"])),
        whole(302, b"", [("location", "http://127.0.0.1:1/")]),
    ],
    ids="close reset 529 500 401 400 cut html empty error-in-200 unasked-stream redirect".split(),
)
def test_create_never_sees_the_first_upstream_fail(client, a, b, first):
    a.script(first)
    b.script(answer("from b"))
    raw = client.messages.with_raw_response.create(**ASK)
    assert raw.parse().content[0].text == "from b"
    assert raw.headers["x-aiproxy-upstream"] == "b"
    assert raw.headers["x-aiproxy-attempts"] == "2"
    assert [len(a.seen), len(b.seen)] == [1, 1]
    assert a.seen[0].body == b.seen[0].body


def test_create_reads_an_answer_that_was_compressed_unasked(client, a):
    a.script(gzipped(message_json(TEXT)))
    assert client.messages.create(**ASK).content[0].text == TEXT
    assert a.seen[0].every("accept-encoding") == ["identity"]


def test_the_model_s_name_is_mapped_for_each_upstream(client, a, b):
    a.script(error(503))
    b.script(answer("mapped", model=None))
    message = client.messages.create(**{**ASK, "model": "claude-mapped"})
    assert message.model == "claude-of-b"
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
    assert final.usage == plain.usage
    assert (final.id, final.stop_reason) == (plain.id, plain.stop_reason)
    assert [one.json().get("stream") for one in a.seen] == [True, None]


def test_events_arrive_while_the_upstream_is_still_speaking(client, a):
    spoken = message_events(["one ", "two ", "three"])
    gates = [threading.Event() for _ in range(2)]
    # message_start, ping, content_block_start, then the deltas
    a.script(events([*spoken[:4], gates[0], spoken[4], gates[1], *spoken[5:]]))
    with client.messages.stream(**ASK) as stream:
        text = stream.text_stream
        assert next(text) == "one "
        gates[0].set()
        assert next(text) == "two "
        gates[1].set()
        assert list(text) == ["three"]


@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
def test_raw_events_come_in_order_and_the_body_byte_for_byte(client, a, framing):
    spoken = [
        *message_events(["o", "k"])[:3],
        b": a comment\n\n",
        b'event: from_the_future\r\ndata: {"type":"from_the_future"}\r\n\r\n',
        ping(),
        *message_events(["o", "k"])[3:],
    ]
    a.script(events(spoken, framing), events(spoken, framing))
    with client.messages.with_streaming_response.create(**ASK, stream=True) as raw:
        assert b"".join(raw.iter_bytes()) == b"".join(spoken)
        assert raw.headers["content-type"] == "text/event-stream; charset=utf-8"
    with client.messages.create(**ASK, stream=True) as stream:
        names = [one.type for one in stream]
    assert names == [
        "message_start",
        "content_block_start",
        "from_the_future",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize(
    "first",
    [
        close_now(),
        error(529),
        head_only(then="cut"),
        events(message_events(["never seen"])[:2], then="cut"),
        events(message_events(["never seen"])[:2], then="reset"),
        events([*message_events(["never seen"])[:2], error_event()]),
        events(message_events(["never seen"])[:2]),
        whole(200, message_json("not a stream")),
    ],
    ids="close 529 head-only cut reset error-event clean-early-end json".split(),
)
def test_a_stream_that_fails_before_its_first_content_costs_nothing(client, a, b, first):
    a.script(first)
    b.script(answer("from b"))
    with client.messages.stream(**ASK) as stream:
        assert stream.get_final_text() == "from b"
        assert stream.response.headers["x-aiproxy-attempts"] == "2"


def cut(stop, then, **options):
    return events(message_events(["one ", "two ", "three"])[:stop], then=then, **options)


@pytest.mark.parametrize(
    ("broken", "type_"),
    [
        (cut(4, "cut"), "api_error"),
        (cut(4, "reset"), "api_error"),
        (cut(5, "cut", cut_at=30), "api_error"),
        (cut(5, "cut", cut_at=30, torn=True), "api_error"),
        (cut(5, "end"), "api_error"),  # a clean end without message_stop is none
        (cut(8, "end"), "api_error"),  # even after message_delta said end_turn
        (cut(8, "cut", framing="length"), "api_error"),
        (cut(8, "end", framing="close"), "api_error"),
        (cut(5, "hang"), "timeout_error"),
        (events([*message_events(["one ", "two "])[:5], error_event()], then="cut"), "overloaded_error"),
        (events([*message_events(["one ", "two "])[:5], error_event()]), "overloaded_error"),
    ],
    ids="cut reset mid-event mid-chunk clean no-stop length close silence error-cut error".split(),
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
    assert caught.value.status_code == 200
    assert caught.value.type == type_
    assert got[0] == "one "
    assert b.seen == []  # the client had seen a part: nobody else is asked


def test_a_stream_that_begins_with_an_error_event_everywhere_is_raised_as_its_status(client, a, b):
    for one in (a, b):
        one.script(events([*message_events()[:1], error_event("rate_limit_error", "slow down")]))
    with pytest.raises(anthropic.RateLimitError) as caught, client.messages.stream(**ASK):
        pass
    assert caught.value.body == {
        "type": "error",
        "error": {"type": "rate_limit_error", "message": "slow down"},
    }
    assert caught.value.request_id


def test_a_client_may_leave_a_stream_and_use_its_connection_pool_again(client, a):
    spoken = message_events(["one ", "two "])
    a.script(events(spoken[:4], then="hang"), answer("again"))
    with client.messages.stream(**ASK) as stream:
        assert next(stream.text_stream) == "one "
    assert client.messages.create(**ASK).content[0].text == "again"


# ----------------------------------------------------------------------------------------- tool use


@pytest.mark.parametrize("model", ["claude-x", "claude-must"])
def test_create_gives_a_tool_s_input_whole(client, a, c, model):
    given = {"city": "Ålesund", "days": 3, "deep": {"list": [1.5, None, True, "\U0001f600"]}, "empty": {}}
    for one in (a, c):
        one.script(answer("let me see", tool=tool_use(input=given)))
    message = client.messages.create(**{**ASK, "model": model}, tools=[TOOL])
    assert message.stop_reason == "tool_use"
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert message.content[1].input == given
    assert message.content[1].id == "toolu_01Fake"
    sent = (a.seen + c.seen)[0].json()
    assert sent["tools"] == [TOOL]


def test_the_stream_helper_gives_a_tool_s_input_whole(client, a):
    given = {"city": "Ålesund", "days": 3}
    a.script(answer("let me see", tool=tool_use(input=given)))
    with client.messages.stream(**ASK, tools=[TOOL]) as stream:
        partial = "".join(one.partial_json for one in stream if one.type == "input_json")
        final = stream.get_final_message()
    assert json.loads(partial) == final.content[1].input == given


def test_a_tool_runner_without_threads_runs_its_tools(client, a, b):
    cities = []

    @anthropic.beta_tool
    def get_weather(city: str, days: int) -> str:
        """The weather somewhere.

        Args:
            city: where
            days: how many
        """
        cities.append((city, days))
        return "snow"

    a.script(answer(tool=tool_use()), error(529))
    b.script(answer("It snows."))
    runner = client.beta.messages.tool_runner(**ASK, tools=[get_weather], thread=False)
    assert runner.until_done().content[0].text == "It snows."
    assert cities == [("Oslo", 3)]
    assert b.seen[0].json()["messages"][-1]["content"][0]["content"] == "snow"


def test_a_tool_runner_drops_its_thread_when_the_upstreams_know_none(client, a, b):
    @anthropic.beta_tool
    def get_weather(city: str, days: int) -> str:
        """The weather somewhere.

        Args:
            city: where
            days: how many
        """
        return f"snow in {city} for {days} days"

    no_threads = error(400, details={"error_code": "thread_unsupported_request"})
    a.script(no_threads, answer(tool=tool_use()), answer("It snows."))
    b.script(no_threads)
    runner = client.beta.messages.tool_runner(**ASK, tools=[get_weather])
    assert runner.until_done().content[0].text == "It snows."
    assert [("thread" in one.json()) for one in a.seen] == [True, False, False]
    assert a.seen[0].header("anthropic-beta") == "message-threads-2026-08-12"


# -------------------------------------------------------------------------------------- must_stream


def test_create_through_a_must_stream_upstream_gives_the_message_that_the_events_spell(client, c, d):
    c.script(cut(5, "cut"))
    d.script(events(message_events([TEXT[:7], TEXT[7:]], usage={"output_tokens": 77})))
    raw = client.messages.with_raw_response.create(**MUST)
    message = raw.parse()
    assert message.content[0].text == TEXT
    assert message.usage.output_tokens == 77
    assert message.stop_reason == "end_turn"
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["x-aiproxy-upstream"] == "d"
    assert [one.json()["stream"] for one in c.seen + d.seen] == [True, True]


def test_a_must_stream_upstream_s_stream_reaches_who_asked_for_one(client, c):
    c.script(events(message_events(["as ", "it ", "is"])))
    with client.messages.stream(**MUST) as stream:
        assert list(stream.text_stream) == ["as ", "it ", "is"]


def test_an_error_event_behind_must_stream_is_raised_as_its_status(client, c, d):
    for one in (c, d):
        one.script(events([*message_events(["one "])[:4], error_event()]))
    with pytest.raises(anthropic.OverloadedError) as caught:
        client.messages.create(**MUST)
    assert caught.value.body["error"] == {"type": "overloaded_error", "message": "Overloaded"}


def test_must_stream_upstreams_that_all_break_off_raise_a_server_error(client, c, d):
    for one in (c, d):
        one.script(cut(5, "cut"))
    with pytest.raises(anthropic.InternalServerError) as caught:
        client.messages.create(**MUST)
    assert (caught.value.status_code, caught.value.type) == (502, "api_error")
    assert caught.value.request_id == caught.value.body["request_id"]


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
    first, _, _ = refusal(status, type_, "what a says")
    second, spelt, body = refusal(
        status, type_, f"what b says: {TEXT}", {"error_code": "some_code", "n": 1.50}
    )
    a.script(first)
    b.script(second)
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(**ASK, stream=stream)
    raised = caught.value
    assert type(raised) is class_
    assert raised.status_code == status
    assert raised.request_id == body["request_id"]
    assert raised.body == body
    assert raised.error_code == "some_code"
    assert raised.response.headers["x-aiproxy-attempts"] == "2"
    if not stream:
        assert raised.response.content == spelt


@pytest.mark.parametrize(
    ("status", "message", "details"),
    [
        (400, "prompt is too long: 210000 tokens > 200000 maximum", None),
        (400, "x", {"error_code": "image_dimensions_too_large", "until": None}),
        (404, "model: claude-x", {"error_code": "thread_not_found"}),
        (413, "x", {"error_code": "request_body_too_large_after_decoding"}),
        (429, "x", {"error_code": "enforced_spend_limit_reached"}),
    ],
)
def test_old_wording_and_new_details_pass_unmodified(client, a, b, status, message, details):
    same, spelt, body = refusal(status, CLASSES[status][1], message, details)
    a.script(same)
    b.script(same)
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(**ASK)
    assert caught.value.response.content == spelt
    assert caught.value.api_message == message
    assert caught.value.error_code == (details or {}).get("error_code")
    assert caught.value.body == body


@pytest.mark.parametrize("status", [401, 402])
def test_an_error_about_an_upstream_s_account_is_a_server_error_that_is_not_retried(proxy, a, b, status):
    for fake in (a, b):
        fake.script(*[error(status, message="the account is out")] * 3)
    with (
        anthropic.Anthropic(base_url=proxy.url, api_key="any-text", max_retries=2) as client,
        pytest.raises(anthropic.InternalServerError) as caught,
    ):
        client.messages.create(**ASK)
    assert caught.value.status_code == 502
    assert "the account is out" in caught.value.api_message
    assert caught.value.response.headers["x-aiproxy-attempts"] == "2"
    assert len(a.seen) + len(b.seen) == 2


def test_the_sdk_s_own_retries_see_retry_hints(proxy, a, b):
    a.script(error(529, headers=[("retry-after-ms", "1")]), answer("second time"))
    b.script(error(529, headers=[("retry-after-ms", "1"), ("x-should-retry", "true")]))
    with anthropic.Anthropic(base_url=proxy.url, api_key=KEY, max_retries=1, timeout=8) as client:
        assert client.messages.create(**ASK).content[0].text == "second time"
    assert [one.header("x-stainless-retry-count") for one in a.seen] == ["0", "1"]


def test_x_should_retry_false_stops_the_sdk(proxy, a, b):
    for one in (a, b):
        one.script(error(529, headers=[("x-should-retry", "false")]))
    patient = anthropic.Anthropic(base_url=proxy.url, api_key=KEY, max_retries=2, timeout=8)
    with patient as client, pytest.raises(anthropic.OverloadedError):
        client.messages.create(**ASK)
    assert len(a.seen) == 1


def test_a_model_that_nobody_serves_is_raised_as_not_found_by_its_name(client):
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(**{**ASK, "model": "gpt-nonsense"})
    assert caught.value.type == "not_found_error"
    assert "gpt-nonsense" in caught.value.api_message
    assert caught.value.request_id == caught.value.body["request_id"]


def test_a_body_over_the_limit_is_raised_as_too_large(client, a):
    messages = [{"role": "user", "content": "x" * 3 * 1024 * 1024}]
    with pytest.raises(anthropic.ContentTooLargeError) as caught:
        client.messages.create(**{**ASK, "messages": messages})
    assert caught.value.type == "request_too_large"
    assert caught.value.request_id == caught.value.body["request_id"]
    assert a.seen == []


def test_no_upstream_at_all_is_raised_as_a_server_error_that_names_none(client, proxy):
    with pytest.raises(anthropic.InternalServerError) as caught:
        client.messages.create(**ASK)
    assert (caught.value.status_code, caught.value.type) == (502, "api_error")
    assert caught.value.request_id == caught.value.body["request_id"]
    told = caught.value.response.text + str(caught.value.response.headers)
    assert "127.0.0.1" not in told
    assert all(str(port) not in told for port in proxy.ports.values())


# ------------------------------------------------------------------------------- what crosses the proxy


@pytest.mark.parametrize("header", ["bearer", "x-api-key", "both"])
def test_each_way_of_sending_the_key_is_taken_and_replaced(proxy, a, b, header):
    extra = {} if header == "bearer" else {"x-api-key": KEY}
    if header == "x-api-key":
        extra["authorization"] = anthropic.Omit()  # as SDKs before 2.0 did
    a.script(error(529))
    with anthropic.Anthropic(
        base_url=proxy.url, api_key=KEY, max_retries=0, timeout=8, default_headers=extra
    ) as client:
        client.messages.create(**ASK)
    assert a.seen[0].every("x-api-key") == ["sk-upstream-token-a"]
    assert a.seen[0].every("authorization") == []
    assert b.seen[0].every("authorization") == ["Bearer sk-upstream-token-b"]
    assert b.seen[0].every("x-api-key") == []
    assert KEY not in str(a.seen + b.seen)


def test_the_query_and_the_beta_header_reach_the_upstream(client, a):
    client.beta.messages.create(
        **ASK, betas=["interleaved-thinking-2025-05-14", "made-up-2030-01-01"], extra_query={"beta": "true"}
    )
    assert a.seen[0].target == "/v1/messages?beta=true"
    assert a.seen[0].header("anthropic-beta") == "interleaved-thinking-2025-05-14,made-up-2030-01-01"


def test_the_sdk_s_own_headers_pass(client, a):
    with client.messages.stream(
        **ASK, extra_headers={"anthropic-workspace-id": "wrkspc_1", "x-claude-code-session-id": "s-1"}
    ) as stream:
        stream.until_done()
    seen = a.seen[0]
    assert seen.every("anthropic-version") == ["2026-10-21"]
    assert seen.every("user-agent") == [f"Anthropic/Python {anthropic.__version__}"]
    assert seen.every("x-stainless-helper-method") == ["stream"]
    assert seen.every("x-stainless-retry-count") == ["0"]
    assert seen.every("accept") == ["application/json"]
    assert seen.every("content-type") == ["application/json"]
    assert seen.every("anthropic-workspace-id") == ["wrkspc_1"]
    assert seen.every("x-claude-code-session-id") == ["s-1"]


def test_an_unspliced_body_reaches_the_upstream_byte_for_byte(client, a, monkeypatch):
    sent = []

    def note(request):
        sent.append(request.read())

    monkeypatch.setattr(client._client, "event_hooks", {"request": [note], "response": []})
    client.messages.create(**ASK, system=[{"type": "text", "text": TEXT}], stop_sequences=["\u2029"])
    assert a.seen[0].body == sent[0]


def test_many_requests_at_once_get_their_own_answers(client, a):
    a.script(*[answer(f"answer {n}", model=None) for n in range(24)])
    got = []

    def ask(n):
        if n % 2:
            with client.messages.stream(**ASK) as stream:
                got.append(stream.get_final_text())
        else:
            got.append(client.messages.create(**ASK).content[0].text)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(f"answer {n}" for n in range(24))


def test_a_client_that_gives_up_harms_nobody_else(proxy, a):
    a.script(hang())
    hasty = anthropic.Anthropic(base_url=proxy.url, api_key=KEY, max_retries=0, timeout=0.2)
    with hasty, pytest.raises(anthropic.APITimeoutError):
        hasty.messages.create(**ASK)
    with anthropic.Anthropic(base_url=proxy.url, api_key=KEY, max_retries=0, timeout=8) as client:
        assert client.messages.create(**ASK).content[0].text == "ok"
