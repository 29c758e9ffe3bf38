"""The upstreams that answer in process: a first run without an account must look like the real thing."""

import json

import pytest
import requests
from anthropic.types import Message

from aiproxy.api.accumulate import Accumulator
from aiproxy.api.sse import Framer, parse
from aiproxy.app import create_app
from aiproxy.config import Config, UpstreamSettings
from aiproxy.transport import demo

ASK = {"model": "claude-opus-4-8", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}
OURS = ("id",)  # made anew for each answer


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(demo, "PAUSE", 0)


def ask(place, body):
    request = requests.PreparedRequest()
    request.method, request.url = "POST", f"demo://{place}/v1/messages"
    request.headers = requests.structures.CaseInsensitiveDict()
    request.body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return demo.DemoAdapter().send(request).raw


def read(response):
    return b"".join(iter(lambda: response.read1(65536), b""))


def without(message, *names):
    return {name: value for name, value in message.items() if name not in names}


def collected(events):
    collector = Accumulator()
    for event in events:
        collector.feed(event)
    return json.loads(collector.message())


def app_of(*places, **settings):
    upstreams = [
        UpstreamSettings(name=place, base_url=f"demo://{place}", weight=weight, **settings)
        for place, weight in places
    ]
    return create_app(Config(upstreams=tuple(upstreams))).test_client()


def test_the_whole_answer_is_a_message_of_the_model_that_was_asked_for():
    response = ask("answers", ASK)
    assert (response.status, response.headers["content-type"]) == (200, "application/json")
    message = Message.model_validate_json(read(response))
    assert message.model == "claude-opus-4-8"
    assert "demo" in message.content[0].text
    assert message.usage.output_tokens > 0


def test_the_stream_is_well_formed_and_comes_in_many_pieces():
    response = ask("answers", {**ASK, "stream": True})
    pieces = list(iter(lambda: response.read1(65536), b""))
    framer = Framer()
    assert all(framer.feed(piece) == piece for piece in pieces)  # each piece is whole events
    names = [event.name.decode() for event in parse(b"".join(pieces))]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert names.count("content_block_delta") == len(names) - 5 > 5
    for event in parse(b"".join(pieces)):
        assert json.loads(event.data)["type"] == event.name.decode()


def test_the_stream_is_seen_to_stream_and_a_whole_answer_has_nothing_to_wait_for(monkeypatch):
    pauses = []
    monkeypatch.setattr("aiproxy.transport.demo.time.sleep", pauses.append)
    read(ask("answers", ASK))
    assert pauses == []
    read(ask("answers", {**ASK, "stream": True}))
    assert len(pauses) > 10


@pytest.mark.parametrize("place", ["failing", "overloaded"])  # the second is the old name
@pytest.mark.parametrize("stream", [False, True])
def test_the_failing_one_always_says_so_in_the_api_s_shape(place, stream):
    response = app_of((place, 1)).post("/v1/messages", json={**ASK, "stream": stream})
    assert (response.status_code, response.content_type) == (500, "application/json")
    assert response.json["error"]["type"] == "api_error"
    assert response.json["request_id"] == response.headers["request-id"]


def test_through_the_proxy_both_forms_arrive_whole():
    client = app_of(("answers", 1))
    whole = client.post("/v1/messages", json=ASK)
    stream = client.post("/v1/messages", json={**ASK, "stream": True})
    assert whole.content_type == "application/json"
    assert stream.content_type == "text/event-stream"
    assert without(collected(parse(stream.data)), *OURS) == without(whole.json, *OURS)
    assert whole.headers["x-aiproxy-upstream"] == "answers"


def test_a_first_run_shows_failover_and_then_the_open_circuit(capsys):
    client = app_of(("answers", 1), ("failing", 2))
    attempts = []
    for _ in range(8):
        response = client.post("/v1/messages", json=ASK)
        assert response.status_code == 200
        attempts.append(response.headers["x-aiproxy-attempts"])
    assert attempts[0] == "2"  # seen at once
    assert attempts.count("2") == 3
    assert attempts[-2:] == ["1", "1"]
    out = capsys.readouterr().out
    assert out.count("circuit upstream=failing state=open") == 1
