"""What the log says, and what it never says: secrets, and lines that a stranger made up.

Every line of every test here is read by `read`, which takes nothing but the form that the README shows.
"""

import io
import json
import logging
import re
import sys
import time
import unicodedata
from datetime import datetime

import msgspec
import pytest
import yaml
from conftest import ROOT, Served
from fakes import (
    HOST,
    FakeUpstream,
    RawClient,
    answer,
    close_if_reused,
    error,
    error_event,
    event,
    events,
    free_port,
    hang,
    message_events,
    message_json,
    ping,
    raw,
    whole,
)

from aiproxy.app import create_app
from aiproxy.config import BreakerSettings, Config, LoggingSettings, UpstreamSettings
from aiproxy.observability import logs
from aiproxy.observability.redaction import Redactor

TOKEN = "Tk7/upstream+token=of&a<that>nobody-may-see"  # in no usual form, and full of what JSON may escape
KEY = "client_key_that_nobody_else_may_see"
BEARER = "client.bearer~token/that+nobody=may-see"
USAGE = {
    "input_tokens": 1200,
    "output_tokens": 34,
    "cache_read_input_tokens": 56000,
    "cache_creation_input_tokens": 789,
}
TOKENS = {"input_tokens": 1200, "output_tokens": 34, "cache_read_tokens": 56000, "cache_write_tokens": 789}

FIELD = r'([a-z_]+)=([A-Za-z0-9_./:@+-]+|"(?:[^"\\]|\\.)*")'
LINE = re.compile(
    rf"(\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z) (DEBUG|INFO|WARNING|ERROR) ([a-z]+)((?: {FIELD})*)"
)


class Line(dict):
    """One line's fields, as text, and what stands before them."""

    def __init__(self, text):
        found = LINE.fullmatch(text)
        assert found, f"no line of ours: {text!r}"
        self.time, self.level, self.event = found[1], found[2], found[3]
        pairs = re.findall(FIELD, found[4])
        super().__init__((name, json.loads(value) if value[0] == '"' else value) for name, value in pairs)
        assert len(self) == len(pairs), f"a field comes twice: {text!r}"


def read(text):
    """The lines of a log. Nothing in it may look like a line's end, or like a command to a terminal."""
    assert text == "" or text.endswith("\n")
    assert len(text.splitlines()) == text.count("\n")
    for sign in set(text) - {"\n"}:
        assert unicodedata.category(sign) not in ("Cc", "Cs", "Zl", "Zp"), f"U+{ord(sign):04X}"
        assert unicodedata.bidirectional(sign) not in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI")
    return [Line(line) for line in text.splitlines()]


@pytest.fixture(autouse=True)
def restored():
    """Logging as it was, since `configure` changes the process's."""
    logger = logging.getLogger("aiproxy")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)


@pytest.fixture
def log(capsys):
    """The lines since the last call."""

    def lines(*names):
        found = read(capsys.readouterr().out)
        return [line for line in found if not names or line.event in names]

    return lines


def in_process(*upstreams, clock=time.monotonic, **settings):
    """The application as gunicorn would load it, asked without a server."""
    spelt = [
        UpstreamSettings(**{"name": "abc"[n], "token": TOKEN, "weight": 10**6 if n == 0 else 1} | given)
        for n, given in enumerate(
            one if isinstance(one, dict) else {"base_url": one if isinstance(one, str) else one.url}
            for one in upstreams
        )
    ]
    return create_app(Config(upstreams=tuple(spelt), **settings), clock).test_client(use_cookies=False)


def ask(prompt="Hi", model="claude-x", **more):
    return {"model": model, "max_tokens": 16, "messages": [{"role": "user", "content": prompt}], **more}


# ------------------------------------------------------------------------------- the lines and their fields


def test_a_whole_answer_is_told_in_three_lines(upstream, log):
    fake = upstream(answer("Good day", usage=USAGE, headers=[("request-id", "req_011upstream")]))
    client = in_process({"base_url": fake.url, "model_mappings": {"claude-x": "claude-of-a"}})
    body = json.dumps(ask("How are you?")).encode()
    response = client.post("/v1/messages", data=body)
    request, attempt, done = log()
    assert [line.event for line in (request, attempt, done)] == ["request", "attempt", "done"]
    assert {line.level for line in (request, attempt, done)} == {"INFO"}
    assert re.fullmatch("req_[0-9a-f]{24}", request["id"])
    assert request == {
        "id": request["id"],
        "model": "claude-x",
        "stream": "false",
        "bytes": str(len(body)),
        "prompt": "How are you?",
    }
    assert 0 <= float(attempt.pop("first_byte")) < 5
    assert attempt == {
        "id": request["id"],
        "number": "1",
        "upstream": "a",
        "model": "claude-x",
        "upstream_model": "claude-of-a",
        "status": "200",
        "verdict": "answered",
        "upstream_request_id": "req_011upstream",
    }
    assert 0 <= float(done.pop("seconds")) < 5
    assert done == {
        "id": request["id"],
        "outcome": "complete",
        "model": "claude-x",
        "status": "200",
        "upstream": "a",
        "attempts": "1",
        "bytes": str(len(response.data)),
        **{name: str(count) for name, count in TOKENS.items()},
        "upstream_request_id": "req_011upstream",
    }
    assert response.headers["request-id"] == "req_011upstream"


def test_a_stream_s_bytes_and_tokens_are_those_that_went_by(upstream, log):
    spoken = message_events(["Good ", "day"], usage={**USAGE, "output_tokens": 99})
    spoken.insert(
        5, event("message_delta", {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 3}})
    )
    fake = upstream(events(spoken, headers=[("request-id", "req_s")]))
    response = in_process(fake).post("/v1/messages", json=ask(stream=True))
    assert response.data == b"".join(spoken)
    request, attempt, done = log()
    assert request["stream"] == "true"
    assert attempt["verdict"] == "answered"
    assert (done["outcome"], done["status"], done["bytes"]) == ("complete", "200", str(len(response.data)))
    assert {name: done[name] for name in TOKENS} == {
        **{name: str(count) for name, count in TOKENS.items()},
        "output_tokens": "99",
    }
    assert attempt["upstream_request_id"] == done["upstream_request_id"] == "req_s"


def test_a_collected_stream_s_bytes_are_the_message_s(upstream, log):
    fake = upstream(events(message_events(["Good ", "day"], usage=USAGE)))
    client = in_process({"base_url": fake.url, "must_stream": True})
    response = client.post("/v1/messages", json=ask())
    request, _, done = log()
    assert request["stream"] == "false"
    assert (done["outcome"], done["bytes"]) == ("complete", str(len(response.data)))
    assert {name: done[name] for name in TOKENS} == {name: str(count) for name, count in TOKENS.items()}


def test_tokens_that_an_answer_does_not_name_are_left_out(upstream, log):
    fake = upstream(whole(200, b'{"type":"message","usage":{"output_tokens":7}}'))
    in_process(fake).post("/v1/messages", json=ask())
    (done,) = log("done")
    assert done.keys() & TOKENS.keys() == {"output_tokens"}


def test_each_attempt_has_a_line_and_one_id_joins_them_all(upstream, log):
    first, second, third = upstream(error(503, message="too busy")), upstream(raw(b"")), upstream()
    response = in_process(first, second, third).post("/v1/messages", json=ask())
    request, busy, broken, answered, done = log()
    assert {line["id"] for line in (busy, broken, answered, done)} == {request["id"]}
    assert [line["number"] for line in (busy, broken, answered)] == ["1", "2", "3"]
    assert [line["upstream"] for line in (busy, broken, answered, done)] == ["a", "b", "c", "c"]
    assert [line.level for line in (busy, broken, answered)] == ["WARNING", "WARNING", "INFO"]
    assert (busy["status"], busy["fault"], busy["verdict"]) == ("503", "error", "counted")
    assert json.loads(busy["error"])["error"]["message"] == "too busy"
    assert "status" not in broken
    assert (broken["fault"], broken["detail"]) == ("broken", "closed without an answer")
    assert (answered["verdict"], done["attempts"]) == ("answered", "3")
    ids = [line.get("upstream_request_id") for line in (busy, broken, answered, done)]
    assert ids == [ids[0], None, ids[2], ids[2]]
    assert ids[0] != ids[2] == response.headers["request-id"]


def test_requests_do_not_share_ids(upstream, log):
    client = in_process(upstream())
    for _ in range(5):
        client.post("/v1/messages", json=ask())
    assert len({line["id"] for line in log()}) == 5


def test_an_error_that_all_gave_is_the_request_s_end(upstream, log):
    first, second = upstream(error(500)), upstream(error(400, headers=[("request-id", "req_of_b")]))
    response = in_process(first, second).post("/v1/messages", json=ask())
    _, busy, refused, done = log()
    assert (busy["verdict"], refused["verdict"]) == ("counted", "refused")
    assert done.level == "WARNING"
    assert (done["outcome"], done["status"], done["upstream"]) == ("error", "400", "b")
    assert done["bytes"] == str(len(response.data))
    assert done["upstream_request_id"] == "req_of_b"


def test_an_error_of_our_own_has_the_id_that_the_client_sees(log):
    response = in_process(f"http://{HOST}:{free_port()}").post("/v1/messages", json=ask())
    request, attempt, done = log()
    assert (attempt["fault"], attempt["detail"]) == ("connect", "connection refused")
    assert (done["outcome"], done["status"]) == ("error", "502")
    assert "upstream" not in done
    assert response.headers["request-id"] == response.json["request_id"] == request["id"]


def test_a_refusal_has_a_line_with_its_reason(log):
    client = in_process("demo://answers")
    response = client.post("/v1/messages", data=b"[]")
    (refused,) = log()
    assert (refused.level, refused.event) == ("WARNING", "refused")
    assert refused == {
        "id": response.json["request_id"],
        "status": "400",
        "reason": response.json["error"]["message"],
    }


def test_a_reconnection_is_told(upstream, log):
    client = in_process(upstream(default=close_if_reused()))
    for _ in range(2):
        client.post("/v1/messages", json=ask())
    first, second = log("attempt")
    assert "reconnected" not in first
    assert second["reconnected"] == "true"


def test_an_upstream_that_streams_unasked_gets_a_hint(upstream, log):
    client = in_process(upstream(answer(), events(message_events())), upstream())
    client.post("/v1/messages", json=ask())
    assert log("hint") == []
    client.post("/v1/messages", json=ask())
    request, hint, attempt = log("request", "hint", "attempt")[:3]
    assert (hint.level, hint["upstream"], hint["id"]) == ("WARNING", "a", request["id"])
    assert "must_stream: true" in hint["text"]
    assert attempt["fault"] == "no_answer"


def test_a_tool_input_that_had_to_be_completed_is_told(upstream, log):
    cut = [
        *message_events(["x"])[:2],
        event(
            "content_block_start",
            {
                "type": "content_block_start",
                "index": 0,
                "content_block": {"type": "tool_use", "id": "toolu_1", "name": "t", "input": {}},
            },
        ),
        event(
            "content_block_delta",
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "input_json_delta", "partial_json": '{"a": 1, "b": "hel'},
            },
        ),
        *message_events(["x"])[-3:],
    ]
    client = in_process({"base_url": upstream(events(cut)).url, "must_stream": True})
    assert client.post("/v1/messages", json=ask()).json["content"][0]["input"] == {"a": 1}
    (repaired,) = log("repaired")
    assert repaired.level == "WARNING"


def test_a_circuit_s_life_is_told(upstream, log):
    now = [1000.0]
    fake = upstream(*[error(500)] * 4)
    client = in_process(fake, clock=lambda: now[0], breaker=BreakerSettings(failures=2, cooldown=60.0))
    for seconds in (0, 0, 0, 61, 0):
        now[0] += seconds
        client.post("/v1/messages", json=ask())
    lines = log("circuit", "done")
    told = [(line.event, line.get("state"), line.get("seconds")) for line in lines]
    assert told == [
        ("done", None, lines[0]["seconds"]),
        ("circuit", "open", "60.000"),
        ("done", None, lines[2]["seconds"]),
        ("circuit", "last_resort", None),  # the only one, so it is asked all the same
        ("done", None, lines[4]["seconds"]),
        ("circuit", "trial", None),
        ("circuit", "open", "60.000"),
        ("done", None, lines[7]["seconds"]),
        ("circuit", "last_resort", None),
        ("circuit", "closed", None),
        ("done", None, lines[10]["seconds"]),
    ]
    circuits = [line for line in lines if line.event == "circuit"]
    assert {line["upstream"] for line in circuits} == {"a"}
    assert {line.level for line in circuits if line["state"] != "closed"} == {"WARNING"}
    assert circuits[-1].level == "INFO"


def test_a_backoff_is_logged_with_its_model_and_seconds(upstream, log):
    client = in_process(upstream(error(429, headers=[("retry-after", "17")])), upstream())
    client.post("/v1/messages", json=ask())
    attempt, circuit = log("attempt", "circuit")[:2]
    assert attempt["verdict"] == "model_backoff"
    assert circuit == {"upstream": "a", "model": "claude-x", "state": "backoff", "seconds": "17.000"}


def test_a_bug_is_told_with_the_request_s_id_and_where_it_is(monkeypatch, capsys):
    def bug(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("aiproxy.proxy.attempt.to_upstream", bug)
    response = in_process("demo://answers").post("/v1/messages", json=ask())
    out = capsys.readouterr().out
    assert re.search(rf"^\S+ ERROR bug id={response.json['request_id']}$", out, re.MULTILINE)
    assert "ZeroDivisionError" in out
    assert "aiproxy/proxy/attempt.py" in out


# ------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["request", "headers", *["headers", "headers", "attempt"] * 2, "done", "refused"]),
        ("info", ["request", "attempt", "attempt", "done", "refused"]),
        ("warning", ["attempt", "refused"]),
        ("error", []),
    ],
)
def test_the_level_is_respected(upstream, log, level, expected):
    client = in_process(upstream(error(500)), upstream(), logging=LoggingSettings(level=level))
    client.post("/v1/messages", json=ask())
    client.get("/nowhere")
    assert [line.event for line in log()] == expected


def test_the_level_of_an_app_does_not_double_the_lines_of_the_next(upstream, log):
    for _ in range(3):
        client = in_process("demo://answers")
    client.post("/v1/messages", json=ask())
    assert [line.event for line in log()] == ["request", "attempt", "done"]


def test_without_a_preview_no_character_of_a_prompt_is_logged(upstream, capsys):
    client = in_process(upstream(), logging=LoggingSettings(level="debug", prompt_preview=0))
    client.post("/v1/messages", json=ask("xyzzy", system="plugh"))
    out = capsys.readouterr().out
    assert "prompt" not in out
    assert "xyzzy" not in out
    assert "plugh" not in out


@pytest.mark.parametrize("limit", [1, 5, 100, 5000])
def test_the_preview_has_as_many_characters_as_are_set(log, limit):
    prompt = "\U0001f600é\n\"'" + "x" * 6000
    client = in_process("demo://answers", logging=LoggingSettings(prompt_preview=limit))
    client.post("/v1/messages", json=ask(prompt))
    assert log("request")[0]["prompt"] == prompt[:limit]


def test_the_preview_is_of_the_last_user_text(log):
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "second"},
        {"role": "user", "content": [{"type": "text", "text": "third"}, {"type": "image", "source": {}}]},
        {"role": "assistant", "content": "fourth"},
    ]
    in_process("demo://answers").post("/v1/messages", json={**ask(), "messages": messages})
    assert log("request")[0]["prompt"] == "third"


@pytest.mark.parametrize(
    "messages", [None, 3, "x", [], [3], [{"role": "user"}], [{"role": "user", "content": [3]}]]
)
def test_a_body_without_a_prompt_has_an_empty_preview(log, messages):
    client = in_process("demo://answers")
    assert client.post("/v1/messages", json={**ask(), "messages": messages}).status_code == 200
    assert log("request")[0]["prompt"] == ""


@pytest.mark.parametrize("length", [499, 500, 501, 20_000])
@pytest.mark.parametrize("sign", ["x", "é", "\U0001f600", "\n"])
def test_an_error_s_first_500_characters_are_logged(upstream, log, length, sign):
    said = sign * length
    fake = upstream(whole(500, said.encode(), content_type="text/plain"))
    in_process(fake).post("/v1/messages", json=ask())
    assert log("attempt")[0]["error"] == said[:500]


def test_an_error_that_is_no_text_is_logged_all_the_same(upstream, log):
    fake = upstream(whole(500, b"\xff\xfe\x00garbage", content_type="application/octet-stream"))
    in_process(fake).post("/v1/messages", json=ask())
    assert log("attempt")[0]["error"] == "\ufffd\ufffd\x00garbage"


@pytest.mark.parametrize("place", ["model", "path", "id"])
def test_what_strangers_choose_does_not_make_endless_lines(upstream, capsys, place):
    endless = "x" * 60_000
    fake = upstream(answer(headers=[("request-id", endless)] if place == "id" else []))
    client = in_process({"base_url": fake.url, "available_models": ["claude-x"] if place == "model" else []})
    if place == "path":
        client.get("/" + endless)
    else:
        client.post("/v1/messages", json=ask(model=endless if place == "model" else "claude-x"))
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert max(map(len, lines)) < 2000


def test_lines_go_to_standard_output_whatever_its_encoding(monkeypatch, capsys):
    written = io.BytesIO()
    with monkeypatch.context() as narrow:
        narrow.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
        logs.configure(LoggingSettings())
        logs.line(logging.INFO, "request", prompt="größer \U0001f600")
        logs.line(logging.INFO, "done", outcome="complete")
    assert written.getvalue().count(b"\n") == 2
    assert b"request prompt=" in written.getvalue()
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------- forged lines

FORGED = "2026-11-22T00:00:00.000Z INFO done id=req_forged outcome=complete"
NASTY = {
    "newline": f"a\n{FORGED}\n",
    "carriage return": f"a\r{FORGED}\r",
    "both": f"a\r\n{FORGED}",
    "next line": f"a\x85{FORGED}",
    "line separator": f"a\u2028{FORGED}\u2029",
    "vertical": f"a\x0b{FORGED}\x0cb\x1cc\x1dd\x1ee",
    "quote": f'a" outcome=complete status=200 x="{FORGED}',
    "backslash": 'a\\" status=200 x="\\',
    "spaces": "a status=200 outcome=complete",
    "equals": "status=200",
    "escape": "\x1b[2J\x1b[1;1H\x1b]0;title\x07\x1bc",
    "one byte escape": "\x9b2J\x9d0;title\x9c",
    "backspace": "secret\x08\x08\x08\x08\x08\x08public\x7f",
    "null": "a\x00b",
    "turned around": "a\u202eetelpmoc=emoctuo\u202c \u2066x\u2069",
    "byte order": "\ufeffa",
    "percent": "%s %d %(name)s {x} %",
    "empty": "",
    "emoji": "\U0001f600\u200d\U0001f525 größer 漢字",
}
nasty = pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)


@nasty
def test_a_value_is_read_back_as_it_was_and_stays_in_its_place(log, text):
    logs.configure(LoggingSettings())
    logs.line(logging.INFO, "request", first=text, second=None, third="x", fourth=1.5, fifth=True, sixth=7)
    (line,) = log()
    assert line == {"first": text, "third": "x", "fourth": "1.500", "fifth": "true", "sixth": "7"}


@nasty
def test_a_prompt_cannot_forge_a_line(upstream, log, text):
    client = in_process(upstream())
    client.post("/v1/messages", data=json.dumps(ask(text)))
    request, attempt, done = log()
    assert request["prompt"] in (text[:100], "")  # none where half a surrogate pair stands
    assert {line["id"] for line in (attempt, done)} == {request["id"]}


@nasty
@pytest.mark.parametrize("served", [True, False])
def test_a_model_s_name_cannot_forge_a_line(upstream, log, text, served):
    one = {"base_url": upstream().url, "available_models": [] if served else ["claude-x"]}
    response = in_process(one).post("/v1/messages", data=json.dumps(ask(model=text)))
    lines = log()
    if text == "":
        assert [line.event for line in lines] == ["refused"]
    elif served:
        assert [line.event for line in lines] == ["request", "attempt", "done"]
        assert lines[0]["model"] == lines[1]["model"] == lines[1]["upstream_model"] == text
    else:
        assert [line.event for line in lines] == ["request", "refused"]
        assert lines[1]["reason"].endswith(text)
        assert json.loads(response.data)["error"]["message"].endswith(text)


@nasty
@pytest.mark.parametrize("way", ["body", "event", "json"])
def test_an_upstream_s_error_cannot_forge_a_line(upstream, log, text, way):
    fault = json.dumps({"type": "error", "error": {"type": "api_error", "message": text}}).encode()
    reply = {
        "body": whole(500, text.encode(errors="replace"), content_type="text/html"),
        "event": events([b"event: error\ndata: " + fault + b"\n\n"]),
        "json": whole(200, fault),
    }[way]
    in_process(upstream(reply)).post("/v1/messages", json=ask(stream=way == "event"))
    assert [line.event for line in log()] == ["request", "attempt", "done"]


@pytest.mark.parametrize(
    "value", ['a" status=200', "a\xa0\x85b\x9b2J", "x" * 3000, "a\tb", "%s", "a\r\n folded INFO done id=1"]
)
@pytest.mark.parametrize("name", ["request-id", "content-type", "content-encoding", "location"])
def test_an_upstream_s_headers_cannot_forge_a_line(upstream, log, name, value):
    for status in (200, 302, 500):
        fake = upstream(whole(status, message_json(), [(name, value)]))
        in_process(fake).post("/v1/messages", json=ask())
    assert {line.event for line in log()} <= {"request", "attempt", "done"}


@pytest.mark.parametrize(
    "status", ["HTTP/1.1 200 \x1b[2J\r\n", "HTTP/1.1 999 a\x85b\r\n", "\x1b[2J\n\n", "a" * 70_000]
)
def test_an_upstream_that_speaks_no_http_cannot_forge_a_line(upstream, log, status):
    fake = upstream(raw(status.encode("latin-1") + b"content-length: 0\r\n\r\n"))
    in_process(fake).post("/v1/messages", json=ask())
    assert [line.event for line in log()] == ["request", "attempt", "done"]


@pytest.mark.parametrize("text", [text for text in NASTY.values() if "\ud800" not in text and text], ids=repr)
def test_a_path_cannot_forge_a_line(log, text):
    client = in_process("demo://answers")
    response = client.get("/" + "".join(f"%{byte:02x}" for byte in text.encode()))
    (refused,) = log()
    assert refused == {
        "id": response.json["request_id"],
        "status": "404",
        "reason": response.json["error"]["message"],
    }
    assert text[:60] in refused["reason"]


def test_a_path_that_is_no_utf_8_cannot_forge_a_line(log):
    in_process("demo://answers").get("/%ff%fe%0a%ed%a0%80")
    (refused,) = log()
    assert refused.event == "refused"


def test_a_bug_s_own_text_cannot_forge_a_line(monkeypatch, capsys):
    def bug(*args, **kwargs):
        raise ValueError(f"about this prompt:\n{FORGED}\r{FORGED}\x1b[2J")

    monkeypatch.setattr("aiproxy.proxy.attempt.to_upstream", bug)
    in_process("demo://answers").post("/v1/messages", json=ask())
    out = capsys.readouterr().out
    assert "about this prompt" in out
    assert [line for line in out.splitlines() if line.startswith(FORGED)] == []
    assert "\x1b" not in out


# ------------------------------------------------------------------------------------------- redaction


def in_parts(secret):
    """The parts of a secret that would help a thief: all but a few of its characters."""
    half = len(secret) // 2
    return [secret[:half], secret[-half:]]


def assert_without(text, *secrets):
    for secret in secrets:
        for part in in_parts(secret):
            assert part not in text


SECRETS = {
    "usual form": "sk-ant-api03-abcdefghijklmnopqrstuvwxyz_0123456789-AA",
    "no form": "0123456789abcdef0123456789abcdef",
    "with signs": TOKEN,
    "with a quote": 'quote"and\\backslash/and&more<of>that',
    "a part of the other": "abcdefghij",
}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("whose", ["upstream's", "request's"])
def test_a_secret_is_redacted_wherever_it_stands(secret, whose):
    redactor = Redactor([secret] if whose == "upstream's" else ["another-token"])
    own = [secret] if whose == "request's" else []
    for text in (
        secret,
        f"key: {secret}.",
        f"{secret}{secret}",
        f"x{secret}y",
        f"Bearer {secret}",
        f'"{secret}"',
    ):
        assert_without(redactor.text(text, 500, own), secret)


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("whose", ["upstream's", "request's"])
def test_no_part_of_a_secret_is_left_at_the_cut(secret, whose):
    redactor = Redactor([secret] if whose == "upstream's" else [])
    own = [secret] if whose == "request's" else []
    for at in range(100 - len(secret) - 12, 101):
        text = redactor.text("." * at + secret + "." * 5000, 100, own)
        assert len(text) <= 100
        assert secret[:4] not in text, at


@pytest.mark.parametrize("whose", ["upstream's", "request's"])
@pytest.mark.parametrize("length", [20, 108, 400])
@pytest.mark.parametrize("limit", [100, 500])
def test_no_part_of_a_secret_is_left_at_the_cut_where_many_were_redacted_before(whose, length, limit):
    secret = ("Aq7" * length)[:length]
    redactor = Redactor([secret] if whose == "upstream's" else [])
    own = [secret] if whose == "request's" else []
    for shift in range(0, length, 7):
        text = redactor.text("." * shift + secret * 1000, limit, own)
        assert "Aq7A" not in text


JSON_WAYS = {
    "plain": lambda text: json.dumps(text)[1:-1],
    "slashes": lambda text: json.dumps(text)[1:-1].replace("/", "\\/"),  # as PHP writes it
    "html": lambda text: re.sub(
        r"[&<>]", lambda one: f"\\u{ord(one[0]):04x}", json.dumps(text)[1:-1]
    ),  # as Go
    "upper": lambda text: re.sub(
        r"[+'&<>]", lambda one: f"\\u{ord(one[0]):04X}", json.dumps(text)[1:-1]
    ),  # .NET
}


@pytest.mark.parametrize("way", JSON_WAYS.values(), ids=JSON_WAYS)
@pytest.mark.parametrize("secret", [TOKEN, SECRETS["with a quote"]])
@pytest.mark.parametrize("whose", ["upstream's", "request's"])
def test_a_secret_is_redacted_in_json_too(way, secret, whose):
    redactor = Redactor([secret] if whose == "upstream's" else [])
    own = [secret] if whose == "request's" else []
    assert_without(redactor.text(f'{{"error":"bad key {way(secret)}"}}', 500, own), way(secret), secret)


def test_keys_of_the_usual_forms_are_redacted_whosever_they_are():
    redactor = Redactor([])
    text = "use sk-ant-api03-AbCdEf_123-x or Authorization: bearer eyJhbGciOi.J9.x-y_z~1 please"
    assert redactor.text(text, 500) == "use [redacted] or Authorization: [redacted] please"


def test_what_is_no_secret_is_not_redacted():
    redactor = Redactor(["another-token"])
    text = "the bearer of bad news asks x about risk-free desk-work and sk-8 boards"
    assert redactor.text(text, 500, ["x", "any"]) == text


@pytest.mark.parametrize("own", ["Tk7/upstream", "upstream+token", "nobody-may-see"])
def test_a_client_cannot_uncover_an_upstream_s_token_by_a_key_that_is_a_part_of_it(own):
    text = Redactor([TOKEN]).text(f"bad key {TOKEN}", 500, [own])
    assert text == "bad key [redacted]"


def test_of_tokens_that_begin_alike_each_is_redacted_whole():
    redactor = Redactor(["token-of-a", "token-of-a-and-more", "token"])
    assert redactor.text("token-of-a-and-more", 500) == "[redacted]"


@pytest.mark.parametrize("token", ["x", "1", "none", "error", "ollama"])
def test_a_stand_in_token_blots_out_neither_the_log_nor_the_client_s_error(upstream, log, token):
    said = b'{"type":"error","error":{"type":"api_error","message":"next 1 or none: ollama pull"},"id":"1x"}'
    client = in_process({"base_url": upstream(whole(500, said)).url, "token": token})
    assert client.post("/v1/messages", json=ask()).data == said
    assert log("attempt")[0]["error"] == said.decode()


def test_an_error_without_a_secret_in_it_passes_byte_for_byte():
    body = bytes(range(256)) * 40 + "größer \u2028".encode()
    assert Redactor([TOKEN, "no-such-token"]).answer(body) == body
    assert Redactor([]).answer(body) == body


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_s_copy_of_an_error_is_without_the_upstream_s_token(upstream, stream):
    fake = upstream(error(400, message=f"{TOKEN} is no key", headers=[("request-id", "req_1")]))
    response = in_process(fake).post("/v1/messages", json=ask(stream=stream))
    assert (response.status_code, response.json["error"]["message"]) == (400, "[redacted] is no key")
    assert response.content_length == len(response.data)


@pytest.mark.parametrize("status", [200, 400])
def test_a_client_never_sees_the_upstream_s_token_in_a_header(upstream, status):
    echoed = [("x-echo", f"{TOKEN} was sent"), ("x-plain", "as it is")]
    got = in_process(upstream(whole(status, message_json(), headers=echoed))).post("/v1/messages", json=ask())
    assert got.status_code == status
    assert (got.headers["x-echo"], got.headers["x-plain"]) == ("[redacted] was sent", "as it is")


def test_a_client_never_sees_the_upstream_s_token_in_an_error_in_the_middle(upstream):
    spoken = message_events(["one", "two"])
    reply = events([*spoken[:4], error_event(message=f"{TOKEN} is exhausted")])
    got = in_process(upstream(reply)).post("/v1/messages", json=ask(stream=True), buffered=False)
    pieces = []
    with pytest.raises(ConnectionAbortedError):  # where there is no connection to break off
        pieces.extend(got.response)
    got.close()
    assert b"[redacted] is exhausted" in b"".join(pieces)
    assert TOKEN.encode() not in b"".join(pieces)


def test_only_the_token_goes_from_the_client_s_copy():
    said = Redactor([TOKEN]).answer(f'{{"error":"{TOKEN} is wrong"}}'.encode())
    assert said == b'{"error":"[redacted] is wrong"}'


@pytest.mark.parametrize(
    ("header", "scheme"),
    [
        ("x-api-key", ""),
        ("x-api-key", "Bearer "),
        ("authorization", ""),
        ("authorization", "Bearer "),
        ("authorization", "bearer "),
        ("authorization", "BEARER "),
        ("authorization", "Bearer   "),
        ("authorization", "Basic "),
        ("proxy-authorization", "Basic "),
        ("cookie", ""),
    ],
)
def test_a_client_s_credential_is_redacted_in_its_own_prompt_and_in_errors(upstream, log, header, scheme):
    secret = "c2VjcmV0LXNlY3JldA"
    fake = upstream(error(500, message=f"who is {secret}?"))
    in_process(fake).post("/v1/messages", json=ask(f"my key is {secret}."), headers={header: scheme + secret})
    request, attempt, _ = log()
    assert request["prompt"] == "my key is [redacted]."
    assert "who is [redacted]?" in attempt["error"]


@pytest.mark.parametrize("place", ["model", "unserved model", "path", "id"])
def test_no_field_shows_a_credential(upstream, log, place):
    fake = upstream(answer(headers=[("request-id", f"req-{TOKEN}")]))
    served = ["claude-x"] if place == "unserved model" else []
    client = in_process({"base_url": fake.url, "available_models": served})
    headers = {"x-api-key": KEY, "authorization": f"Bearer {BEARER}"}
    if place == "path":
        client.get(f"/v1/{KEY}?key={BEARER}", headers=headers)
    else:
        model = f"{KEY} {BEARER}" if "model" in place else "claude-x"
        client.post("/v1/messages", json=ask(model=model), headers=headers)
    lines = log()
    assert lines
    for line in lines:
        assert_without(str(dict(line)), TOKEN, KEY, BEARER)


# --------------------------------------------------------------------- a full run of a real gunicorn


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    ports = {name: free_port() for name in "abcd"}
    config = {
        "listen": free_port(),
        "max_body_mb": 1,
        "timeouts": {"connect": 1, "first_byte": 0.4, "answer": 0.4, "idle": 0.3},
        "breaker": {"failures": 10**6, "cooldown": 0},
        "logging": {"level": "debug", "prompt_preview": 400},
        "upstreams": [
            {
                "name": name,
                "base_url": f"http://{HOST}:{port}",
                "token": f"{TOKEN}-{name}",
                "auth": "bearer" if name == "b" else "x-api-key",
                "weight": 10**6 if name in "ac" else 1,
                "available_models": ["claude-must"] if name in "cd" else [],
                "must_stream": name in "cd",
            }
            for name, port in ports.items()
        ],
    }
    path = tmp_path_factory.mktemp("logs") / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "gunicorn", "wsgi:app", "--graceful-timeout", "2"]
    served = Served(command, ROOT, {"AIPROXY_CONFIG": str(path)}, config["listen"])
    served.ports = ports
    try:
        served.wait_until_ready()
        served.wait_for_log("^aiproxy serves ")
        yield served
    finally:
        served.quit()


class Says:
    """An upstream's reply to every request, which a test may change."""

    def __init__(self):
        self.reply = answer()

    def __call__(self, wire, seen):
        self.reply(wire, seen)


def fake(name):
    @pytest.fixture(name=name)
    def start(proxy):
        says = Says()
        with FakeUpstream(port=proxy.ports[name], default=says) as upstream:
            upstream.says = says
            yield upstream

    return start


fixture_a, fixture_b, fixture_c, fixture_d = map(fake, "abcd")


def served_lines(proxy, since, last="done"):
    """The lines from number `since` on, which end with one of this event."""
    proxy.wait_for_log(rf" {last} ", since=since)
    return [Line(line) for line in proxy.stdout_lines()[since:]]


SPOKEN = message_events(["one ", "two ", "three"], usage=USAGE)


@pytest.mark.parametrize(
    ("reply", "outcome", "sent"),
    [
        (events(SPOKEN), "complete", SPOKEN),
        (events(SPOKEN, then="cut"), "complete", SPOKEN),  # after message_stop nothing is missing
        (events(SPOKEN[:5], then="cut"), "broken", SPOKEN[:5]),
        (events(SPOKEN[:5], then="reset"), "broken", SPOKEN[:5]),
        (events(SPOKEN[:5]), "broken", SPOKEN[:5]),
        (events(SPOKEN[:6], then="cut", cut_at=20), "broken", SPOKEN[:5]),
        (events(SPOKEN[:5], then="hang"), "silent", SPOKEN[:5]),
        (events([*SPOKEN[:5], error_event()]), "error_event", [*SPOKEN[:5], error_event()]),
        (events([*SPOKEN[:5], error_event()], then="cut"), "error_event", [*SPOKEN[:5], error_event()]),
    ],
    ids="complete complete-cut cut reset clean-end half-event silent error error-cut".split(),
)
def test_how_a_stream_ended_is_told_with_what_the_client_got(proxy, a, reply, outcome, sent):
    a.script(reply)
    since = len(proxy.stdout_lines())
    with RawClient.to(proxy.url) as client:
        client.post(ask(stream=True))
        got = client.read()
    *_, attempt, done = [line for line in served_lines(proxy, since) if line.event != "circuit"]
    assert attempt["verdict"] == "answered"
    assert (done["outcome"], done["status"], done["upstream"]) == (outcome, "200", "a")
    assert done.level == ("INFO" if outcome == "complete" else "WARNING")
    assert got.body.startswith(b"".join(sent))
    assert done["bytes"] == str(len(got.body))
    assert done["input_tokens"] == "1200"
    assert done["output_tokens"] == ("34" if outcome == "complete" else "1")
    assert "detail" in done or outcome not in ("broken", "silent")


def test_a_client_that_leaves_is_told_and_is_no_warning(proxy, a):
    a.script(events([*SPOKEN[:4], *[ping(), 0.01] * 200]))
    since = len(proxy.stdout_lines())
    with RawClient.to(proxy.url) as client:
        client.post(ask(stream=True))
        next(client.answer().pieces())
        client.reset()
    done = served_lines(proxy, since)[-1]
    assert (done["outcome"], done.level) == ("client_left", "INFO")


def echo(status=400, where="body", **options):
    """An upstream that says back everything it was told, its own key first."""

    def reply(wire, seen):
        told = " ".join(f"{name}: {value}" for name, value in reversed(seen.headers)) + seen.body.decode()
        if where == "body":
            whole(status, told.encode(), content_type="text/plain", **options)(wire, seen)
        elif where == "json":
            error(status, message=told)(wire, seen)
        elif where == "event":
            events([*message_events()[:1], error_event("api_error", told)])(wire, seen)
        elif where == "late event":
            events([*SPOKEN[:5], error_event("api_error", told)])(wire, seen)
        else:
            line = told.replace("\r", " ").replace("\n", " ")
            whole(status, b"{}", [(where, line)])(wire, seen)

    return reply


def cut_border_echo(at):
    """An error in which the upstream's own key crosses character `at`, at all its places."""

    def reply(wire, seen):
        key = seen.header("x-api-key") or seen.header("authorization")
        whole(500, ("." * at + key).encode(), content_type="text/plain")(wire, seen)

    return reply


FAILURES = [
    *[echo(status, where) for status in (400, 401, 429, 500, 529) for where in ("body", "json")],
    echo(200, "body"),
    echo(302, "location"),
    echo(500, "request-id"),
    echo(500, "retry-after"),
    *[cut_border_echo(at) for at in range(440, 501, 9)],
    raw(b""),
    raw(f"HTTP/1.1 200 {TOKEN}-a\r\n\r\n".encode()),
    raw(f"{TOKEN}-a is no HTTP\r\n\r\n".encode()),
    whole(200, f"<html>{TOKEN}-a".encode(), content_type="text/html"),
    whole(200, message_json("half"), then="cut", cut_at=40),
    events(message_events(["un", "asked"])),
]
STREAM_FAILURES = [
    *[echo(200, where) for where in ("event", "late event", "body")],
    events(SPOKEN[:5], then="cut"),
    events(SPOKEN[:5], then="hang"),
    events(SPOKEN[:1], then="cut"),
    events([*SPOKEN[:3], 0.5]),
]
ARRIVALS = [
    b"GET /v1/%(key)s?key=%(key)s HTTP/1.1\r\nhost: x\r\nx-api-key: %(key)s\r\n\r\n",
    b"DELETE /v1/messages?key=%(key)s HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %(key)s\r\n\r\n",
    b"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: %(key)s\r\ncontent-length: 40\r\n\r\n"
    b'{"api_key":"%(key)s"}                  ',
    b"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: %(key)s\r\ntransfer-encoding: chunked\r\n\r\n"
    b"%(key)s\r\n",
    b"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: %(key)s\r\ncontent-length: 99999999\r\n\r\n%(key)s",
]


def test_a_full_run_with_every_kind_of_failure_shows_no_secret_and_no_line_of_a_stranger(proxy, a, b, c, d):
    keys = [KEY, BEARER, f"session-{KEY}-cookie", f"{KEY}-of-a-proxy"]
    headers = [
        ("x-api-key", KEY),
        ("authorization", f"Bearer {BEARER}"),
        ("cookie", keys[2]),
        ("proxy-authorization", f"Basic {keys[3]}"),
        ("x-mine", f"{TOKEN}-a"),
    ]
    prompt = f"{FORGED}\n{FORGED}\u2028{KEY} {BEARER} {TOKEN}-a {TOKEN}-b"
    since = len(proxy.stdout_lines())
    for reply in FAILURES:
        a.says.reply = b.says.reply = reply
        with RawClient.to(proxy.url) as client:
            client.post(ask(prompt), headers=headers)
            client.read()
    for reply in STREAM_FAILURES:
        for model in ("claude-x", "claude-must"):
            a.says.reply = b.says.reply = c.says.reply = d.says.reply = reply
            with RawClient.to(proxy.url) as client:
                client.post(ask(prompt, model, stream=model == "claude-x"), headers=headers)
                client.read()
    for arrival in ARRIVALS:
        with RawClient.to(proxy.url) as client:
            client.send(arrival % {b"key": KEY.encode()})
            client.half_close()
            client.wait_closed()
    a.says.reply = b.says.reply = hang()
    with RawClient.to(proxy.url) as client:
        client.post(ask(prompt), headers=headers)
        assert client.read().status == 504
    for one in (a, b, c, d):
        one.stop()
    with RawClient.to(proxy.url) as client:
        client.post(ask(prompt), headers=headers)
        assert client.read().status == 502
    told = proxy.stdout_lines()[since:]
    assert len(told) > 3 * len(FAILURES)
    lines = [line for line in told if line.startswith("2")]
    assert lines == told  # no traceback, nothing but lines of ours
    assert all(Line(line)["id"] != "req_forged" for line in lines if " circuit " not in line)
    everything = "\n".join(told) + proxy.stderr
    assert_without(everything, *keys, *(f"{TOKEN}-{name}" for name in "abcd"))
    assert json.dumps(TOKEN)[1:-1] not in everything


# ------------------------------------------------------------------------------------------------ JSON


@pytest.fixture
def objects(capsys):
    """The lines since the last call, each a JSON object; what strict readers refuse is no JSON."""

    def read_json():
        text = capsys.readouterr().out
        assert len(text.splitlines()) == text.count("\n")
        return [msgspec.json.decode(line.encode()) for line in text.splitlines()]

    return read_json


JSON = LoggingSettings(format="json")


def test_in_json_a_field_has_its_type(objects, upstream):
    fake = upstream(error(500), answer("Good day", usage=USAGE))
    client = in_process(fake, {"base_url": fake.url, "name": "b"}, logging=JSON)
    began = time.time()
    client.post("/v1/messages", json=ask("Hi"))
    lines = objects()
    assert [line["event"] for line in lines] == ["request", "attempt", "attempt", "done"]
    assert [line["level"] for line in lines] == ["INFO", "WARNING", "INFO", "INFO"]
    for line in lines:
        assert list(line)[:3] == ["time", "level", "event"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert abs(datetime.fromisoformat(line["time"]).timestamp() - began) < 5
        assert None not in line.values()
    request, failed, answered, done = lines
    assert request["stream"] is False
    assert isinstance(request["bytes"], int)
    assert (failed["number"], failed["status"], answered["number"]) == (1, 500, 2)
    assert isinstance(done["seconds"], float)
    assert done["seconds"] == round(done["seconds"], 3)
    assert {name: done[name] for name in TOKENS} == TOKENS
    assert "reconnected" not in answered


@nasty
def test_in_json_a_value_is_read_back_as_it_was_and_stays_in_its_place(objects, text):
    logs.configure(JSON)
    logs.line(logging.INFO, "done", text=text, outcome="complete")
    (line,) = objects()
    assert line["text"] == re.sub(r"[\ud800-\udfff]", "\ufffd", text)
    assert line["outcome"] == "complete"


@nasty
def test_in_json_no_sign_reaches_a_terminal_that_is_a_command_to_it(capsys, text):
    logs.configure(JSON)
    logs.line(logging.INFO, "done", text=text)
    written = capsys.readouterr().out
    for sign in set(written) - {"\n"}:
        assert unicodedata.category(sign) not in ("Cc", "Cs", "Zl", "Zp"), f"U+{ord(sign):04X}"
        assert unicodedata.bidirectional(sign) not in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_in_json_a_float_that_is_no_number_is_a_text(objects, number):
    logs.configure(JSON)
    logs.line(logging.INFO, "done", seconds=number)
    assert objects()[0]["seconds"] == str(number)


def test_in_json_a_bug_is_one_line(monkeypatch, objects):
    def bug(*args, **kwargs):
        raise ValueError(f"about this prompt:\n{FORGED}\r{FORGED}\x1b[2J")

    monkeypatch.setattr("aiproxy.proxy.attempt.to_upstream", bug)
    response = in_process("demo://answers", logging=JSON).post("/v1/messages", json=ask())
    (line,) = [line for line in objects() if line["event"] == "bug"]
    assert (line["id"], line["level"]) == (response.json["request_id"], "ERROR")
    assert line["traceback"].startswith("Traceback (most recent call last):\n")
    assert line["traceback"].endswith("\x1b[2J")


@pytest.mark.parametrize("settings", [LoggingSettings(), JSON], ids=["text", "json"])
def test_what_another_logger_says_has_its_name_for_an_event(capsys, settings):
    logs.configure(settings)
    other = logging.Logger("gunicorn.error")
    other.addHandler(logging.getLogger("aiproxy").handlers[0])
    other.info("Listening at: %s\n%s", "http://[::1]:8080", FORGED)
    told = capsys.readouterr().out
    (line,) = [json.loads(told)] if settings is JSON else read(told)
    assert told.count("gunicorn") == 1
    assert line["message"] == f"Listening at: http://[::1]:8080\n{FORGED}"


# --------------------------------------------------------------------------------------------- headers


def headers_of(lines):
    """What each `headers` line shows: whose they are, then the pairs."""
    return {
        line["of"]: [tuple(pair.split(": ", 1)) for pair in line["headers"].split("\n")] for line in lines
    }


def test_at_debug_level_the_headers_of_all_three_are_shown_without_credentials(upstream, log):
    echoed = [("set-cookie", "a=b"), ("x-echo", f"{TOKEN} and {KEY}"), ("x-plain", "as it is")]
    fake = upstream(answer(headers=echoed))
    settings = {
        "base_url": fake.url,
        "headers": {"x-team": "blue", "x-gate": "long-enough-for-a-secret-value"},
    }
    client = in_process(settings, logging=LoggingSettings(level="debug"))
    sent = {
        "x-api-key": KEY,
        "authorization": "Bearer short",
        "cookie": "c=d",
        "proxy-authorization": "Basic e",
        "x-goog-api-key": "f",
        "x-auth-token": "g",
        "anthropic-beta": "one,two",
        "x-mine": f"{KEY}!",
        "anthropic-ratelimit-tokens-limit": "9",
    }
    response = client.post("/v1/messages", json=ask(), headers=sent)
    lines = log("headers")
    assert {line.level for line in lines} == {"DEBUG"}
    assert len({line["id"] for line in lines}) == 1
    assert [line.get("upstream") for line in lines] == [None, "a", "a"]
    shown = {of: dict(pairs) for of, pairs in headers_of(lines).items()}
    assert list(shown) == ["client", "upstream_request", "upstream_answer"]
    hidden = ["x-api-key", "authorization", "cookie", "proxy-authorization", "x-goog-api-key", "x-auth-token"]
    assert {shown["client"][name] for name in hidden} == {"[redacted]"}
    assert shown["client"]["anthropic-beta"] == "one,two"
    assert shown["client"]["x-mine"] == "[redacted]!"
    assert shown["client"]["anthropic-ratelimit-tokens-limit"] == "9"
    asked = shown["upstream_request"]
    assert {asked["x-api-key"], asked["x-gate"], asked["x-team"]} == {"[redacted]"}
    answered = shown["upstream_answer"]
    assert answered["set-cookie"] == "[redacted]"
    assert answered["x-echo"] == "[redacted] and [redacted]"
    assert answered["x-plain"] == response.headers["x-plain"] == "as it is"


def test_the_headers_are_those_that_went_out(upstream, log):
    fake = upstream()
    in_process(fake, logging=LoggingSettings(level="debug")).post("/v1/messages", json=ask())
    shown = dict(headers_of(log("headers"))["upstream_request"])
    seen = dict(fake.seen[0].headers)
    assert {name: value for name, value in shown.items() if value != "[redacted]"}.items() <= seen.items()
    assert {name.lower() for name in seen} - set(shown) <= {"host", "content-length"}


def test_above_debug_level_no_header_is_looked_at(monkeypatch, upstream, log):
    monkeypatch.setattr(Redactor, "text", lambda *args: "[looked at]")
    redactor = Redactor([])
    logs.configure(LoggingSettings())
    logs.headers(redactor, iter(lambda: pytest.fail("looked at"), None), (), id="req_1", of="client")
    assert log() == []


def test_a_long_header_is_cut_and_a_header_s_name_is_redacted_too(log):
    redactor = Redactor([TOKEN])
    logs.configure(LoggingSettings(level="debug"))
    logs.headers(redactor, [("x-long", "y" * 9000), (f"x-{KEY}", "z")], [KEY], id="req_1", of="client")
    (line,) = log()
    assert line["headers"] == "x-long: " + "y" * (logs.FIELD - 8) + "\nx-[redacted]: [redacted]"
