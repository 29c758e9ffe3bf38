"""What the log says, and what it never says: secrets, and lines that a stranger made up.

Every line of every test here is read by `read`, which takes nothing but the form that the README shows.
"""

import contextlib
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
from fakes import (
    HOST,
    answer,
    close_if_reused,
    close_now,
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
from aiproxy.config import BreakerSettings, Config, LoggingSettings, Timeouts, UpstreamSettings
from aiproxy.observability import logs
from aiproxy.observability.redaction import Redactor

TOKEN = "Tk7/upstream+token=of&a<that>nobody-may-see"  # in no usual form, and full of what JSON may escape
KEY = "client_key_that_nobody_else_may_see"
BEARER = "client.bearer~token/that+nobody=may-see"
TOKENS = {"input_tokens": 1200, "output_tokens": 34, "cache_read_tokens": 56000, "cache_write_tokens": 789}
TOLD = {name: str(count) for name, count in TOKENS.items()}
USAGE = {
    name.replace("read", "read_input").replace("write", "creation_input"): n for name, n in TOKENS.items()
}

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


def assert_harmless(text):
    """Nothing may look like a line's end, or like a command to a terminal."""
    assert text == "" or text.endswith("\n")
    assert len(text.splitlines()) == text.count("\n")
    for sign in set(text) - {"\n"}:
        assert unicodedata.category(sign) not in ("Cc", "Cs", "Zl", "Zp"), f"U+{ord(sign):04X}"
        assert unicodedata.bidirectional(sign) not in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI")


def read(text):
    """The lines of a log."""
    assert_harmless(text)
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
    """The application as gunicorn would load it; upstreams are named a, b, ..., and a is asked first."""
    spelt = []
    for name, one in zip("abcd", upstreams, strict=False):
        given = one if isinstance(one, dict) else {"base_url": one}
        url = given["base_url"] if isinstance(given["base_url"], str) else given["base_url"].url
        usual = {"name": name, "token": TOKEN, "weight": 1 if spelt else 10**6}
        spelt.append(UpstreamSettings(**{**usual, **given, "base_url": url}))
    return create_app(Config(upstreams=tuple(spelt), **settings), clock).test_client(use_cookies=False)


def ask(prompt="Hi", model="claude-x", **more):
    return {"model": model, "max_tokens": 16, "messages": [{"role": "user", "content": prompt}], **more}


def post(client, asked, headers=()):
    """What a client gets whose connection may be broken off: the response and the body so far."""
    response = client.post("/v1/messages", json=asked, headers=headers, buffered=False)
    pieces = []
    with contextlib.suppress(ConnectionAbortedError):  # where there is no connection to break off
        pieces.extend(response.response)
    response.close()
    return response, b"".join(pieces)


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
        "address": "127.0.0.1",
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
        **TOLD,
        "upstream_request_id": "req_011upstream",
    }
    assert response.headers["request-id"] == "req_011upstream"


@pytest.mark.parametrize("must_stream", [False, True], ids=["a stream", "a collected stream"])
def test_a_stream_s_bytes_and_tokens_are_those_that_the_client_got(upstream, log, must_stream):
    early = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 3}}
    spoken = message_events(["Good ", "day"], usage=USAGE)
    spoken.insert(5, event("message_delta", early))
    fake = upstream(events(spoken, headers=[("request-id", "req_s")]))
    client = in_process({"base_url": fake, "must_stream": must_stream})
    response = client.post("/v1/messages", json=ask(stream=not must_stream))
    request, attempt, done = log()
    assert request["stream"] == ("false" if must_stream else "true")
    assert attempt["verdict"] == "answered"
    assert (done["outcome"], done["status"], done["bytes"]) == ("complete", "200", str(len(response.data)))
    assert {name: done[name] for name in TOKENS} == TOLD
    assert attempt["upstream_request_id"] == done["upstream_request_id"] == "req_s"


def test_each_attempt_has_a_line_and_one_id_joins_them_all(upstream, log):
    first, second = upstream(error(503, message="too busy")), upstream(raw(b""))
    third = upstream(error(400, headers=[("request-id", "req_of_c")]))
    response = in_process(first, second, third).post("/v1/messages", json=ask())
    request, busy, broken, refused, done = log()
    assert {line["id"] for line in (busy, broken, refused, done)} == {request["id"]}
    assert [line["number"] for line in (busy, broken, refused)] == ["1", "2", "3"]
    assert [line["upstream"] for line in (busy, broken, refused, done)] == ["a", "b", "c", "c"]
    assert {line.level for line in (busy, broken, refused, done)} == {"WARNING"}
    assert (busy["status"], busy["fault"], busy["verdict"]) == ("503", "error", "counted")
    assert json.loads(busy["error"])["error"]["message"] == "too busy"
    assert "status" not in broken
    assert (broken["fault"], broken["detail"]) == ("broken", "closed without an answer")
    assert (refused["verdict"], done["attempts"]) == ("refused", "3")
    assert (done["outcome"], done["status"], done["bytes"]) == ("error", "400", str(len(response.data)))
    ids = [line.get("upstream_request_id") for line in (busy, broken, refused, done)]
    assert ids[1:] == [None, "req_of_c", "req_of_c"]
    assert ids[0].startswith("req_fake")


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
        "id": response.headers["x-aiproxy-request-id"],
        "address": "127.0.0.1",
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
    tool = {"type": "tool_use", "id": "toolu_1", "name": "t", "input": {}}
    piece = {"type": "input_json_delta", "partial_json": '{"a": 1, "b": "hel'}
    cut = [
        event("content_block_start", {"type": "content_block_start", "index": 0, "content_block": tool}),
        event("content_block_delta", {"type": "content_block_delta", "index": 0, "delta": piece}),
    ]
    spoken = message_events(["x"])
    fake = upstream(events([*spoken[:2], *cut, *spoken[-3:]]))
    client = in_process({"base_url": fake, "must_stream": True})
    assert client.post("/v1/messages", json=ask()).json["content"][0]["input"] == {"a": 1}
    (repaired,) = log("repaired")
    assert repaired.level == "WARNING"


def test_a_circuit_s_life_is_told(upstream, log):
    now = [1000.0]
    fake = upstream(*[error(500)] * 4)
    client = in_process(fake, clock=lambda: now[0], breaker=BreakerSettings(failures=2, cooldown=60.0))
    told, verdicts = [], []
    for seconds in (0, 0, 0, 61, 0):
        now[0] += seconds
        client.post("/v1/messages", json=ask())
        lines = log("circuit", "attempt")
        told.append([line for line in lines if line.event == "circuit"])
        verdicts += [line["verdict"] for line in lines if line.event == "attempt"]
    assert verdicts == ["counted", "counted", "uncounted", "counted", "answered"]
    assert [[(line["state"], line.get("seconds")) for line in lines] for lines in told] == [
        [],
        [("open", "60.000")],
        [("last_resort", None)],  # the only one, so it is asked all the same
        [("trial", None), ("open", "60.000")],
        [("last_resort", None), ("closed", None)],
    ]
    circuits = [line for lines in told for line in lines]
    assert {line["upstream"] for line in circuits} == {"a"}
    assert [line.level for line in circuits] == ["WARNING"] * 5 + ["INFO"]


def test_a_backoff_is_logged_with_its_model_and_seconds(upstream, log):
    client = in_process(upstream(error(429, headers=[("retry-after", "17")])), upstream())
    client.post("/v1/messages", json=ask())
    attempt, circuit = log("attempt", "circuit")[:2]
    assert attempt["verdict"] == "model_backoff"
    assert circuit == {"upstream": "a", "model": "claude-x", "state": "backoff", "seconds": "17.000"}


SPOKEN = message_events(["one ", "two ", "three"], usage=USAGE)


@pytest.mark.parametrize(
    ("reply", "outcome", "sent"),
    [
        (events(SPOKEN), "complete", SPOKEN),
        (events(SPOKEN, then="cut"), "complete", SPOKEN),  # after message_stop nothing is missing
        (events(SPOKEN[:5], then="cut"), "broken", SPOKEN[:5]),
        (events(SPOKEN[:5]), "broken", SPOKEN[:5]),
        (events(SPOKEN[:6], then="cut", cut_at=20), "broken", SPOKEN[:5]),
        (events(SPOKEN[:5], then="hang"), "silent", SPOKEN[:5]),
        (events([*SPOKEN[:5], error_event()]), "error_event", [*SPOKEN[:5], error_event()]),
    ],
    ids="complete complete-cut cut clean-end half-event silent error".split(),
)
def test_how_a_stream_ended_is_told_with_what_the_client_got(upstream, log, reply, outcome, sent):
    client = in_process(upstream(reply), timeouts=Timeouts(idle=0.3))
    response, body = post(client, ask(stream=True))
    attempt, done = log("attempt", "done")
    assert attempt["verdict"] == "answered"
    assert (done["outcome"], done["status"], done["upstream"]) == (outcome, "200", "a")
    assert done.level == ("INFO" if outcome == "complete" else "WARNING")
    assert body.startswith(b"".join(sent))
    assert (response.status_code, done["bytes"]) == (200, str(len(body)))
    assert done["input_tokens"] == "1200"
    assert done["output_tokens"] == ("34" if outcome == "complete" else "1")
    assert "detail" in done or outcome not in ("broken", "silent")


def test_a_client_that_leaves_is_told_and_is_no_warning(upstream, log):
    client = in_process(upstream(events([*SPOKEN[:4], *[ping(), 0.01] * 200])))
    response = client.post("/v1/messages", json=ask(stream=True), buffered=False)
    next(iter(response.response))
    response.close()
    (done,) = log("done")
    assert (done["outcome"], done.level) == ("client_left", "INFO")


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


def test_without_a_preview_no_character_of_a_prompt_is_logged(upstream, capsys):
    client = in_process(upstream(), logging=LoggingSettings(level="debug", prompt_preview=0))
    client.post("/v1/messages", json=ask("xyzzy", system="plugh"))
    out = capsys.readouterr().out
    assert "prompt" not in out
    assert "xyzzy" not in out
    assert "plugh" not in out


@pytest.mark.parametrize("limit", [1, 100, 5000])
def test_the_preview_has_as_many_characters_as_are_set(log, limit):
    prompt = "\U0001f600é\n\"'" + "x" * 6000
    client = in_process("demo://answers", logging=LoggingSettings(prompt_preview=limit))
    client.post("/v1/messages", json=ask(prompt))
    assert log("request")[0]["prompt"] == prompt[:limit]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"x" * 500, "x" * 500),
        ("\U0001f600".encode() * 501, "\U0001f600" * 500),
        (b"\n" * 20_000, "\n" * 500),
        (b"\xff\xfe\x00garbage", "\ufffd\ufffd\x00garbage"),
    ],
    ids=["500", "501", "20,000", "no text"],
)
def test_an_error_s_first_500_characters_are_logged(upstream, log, said, told):
    fake = upstream(whole(500, said, content_type="application/octet-stream"))
    in_process(fake).post("/v1/messages", json=ask())
    assert log("attempt")[0]["error"] == told


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

JSON = LoggingSettings(format="json")


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_a_value_is_read_back_as_it_was_and_stays_in_its_place(log, objects, text):
    logs.configure(LoggingSettings())
    logs.line(logging.INFO, "request", first=text, second=None, third="x", fourth=1.5, fifth=True, sixth=7)
    (line,) = log()
    assert line == {"first": text, "third": "x", "fourth": "1.500", "fifth": "true", "sixth": "7"}
    logs.configure(JSON)
    logs.line(logging.INFO, "done", text=text, outcome="complete")
    (line,) = objects()
    assert (line["text"], line["outcome"]) == (re.sub(r"[\ud800-\udfff]", "\ufffd", text), "complete")


HOSTILE = f'a" status=200\n{FORGED}\r{FORGED}\x85{FORGED}\u2028\x1b[2J'


def test_neither_a_prompt_nor_a_model_s_name_can_forge_a_line(upstream, log):
    client = in_process(upstream())
    client.post("/v1/messages", json=ask(HOSTILE, model=HOSTILE))
    request, attempt, done = log()
    assert (request["prompt"], request["model"], attempt["upstream_model"]) == (
        HOSTILE[:100],
        HOSTILE,
        HOSTILE,
    )
    assert {line["id"] for line in (attempt, done)} == {request["id"]}
    unserved = in_process({"base_url": upstream(), "available_models": ["claude-x"]})
    unserved.post("/v1/messages", json=ask(model=HOSTILE))
    assert [line.event for line in log()] == ["request", "refused"]


FAULT = json.dumps({"type": "error", "error": {"type": "api_error", "message": HOSTILE}}).encode()


@pytest.mark.parametrize(
    "reply",
    [
        whole(500, HOSTILE.encode(), content_type="text/html"),
        whole(200, FAULT),
        events([b"event: error\ndata: " + FAULT + b"\n\n"]),
        *(
            raw(head.encode("latin-1") + b"content-length: 0\r\n\r\n")
            for head in ["HTTP/1.1 200 \x1b[2J\r\n", "HTTP/1.1 999 a\x85b\r\n", "\x1b[2J\n\n", "a" * 70_000]
        ),
        *(
            whole(status, message_json(), [(name, 'a" status=200\xa0\x85b\x9b2J\r\n folded INFO done id=1')])
            for status in (200, 302, 500)
            for name in ("request-id", "content-type", "content-encoding", "location")
        ),
    ],
)
def test_an_upstream_cannot_forge_a_line(upstream, log, reply):
    in_process(upstream(reply)).post("/v1/messages", json=ask(stream=True))
    assert [line.event for line in log()] == ["request", "attempt", "done"]


@pytest.mark.parametrize("path", [HOSTILE.encode(), b"\xff\xfe\n\xed\xa0\x80"], ids=["hostile", "no UTF-8"])
def test_a_path_cannot_forge_a_line(log, path):
    client = in_process("demo://answers")
    response = client.get("/" + "".join(f"%{byte:02x}" for byte in path))
    (refused,) = log()
    assert (refused["status"], refused["reason"]) == ("404", response.json["error"]["message"])


@pytest.mark.parametrize("settings", [LoggingSettings(), JSON], ids=["text", "json"])
def test_a_bug_s_own_text_cannot_forge_a_line(monkeypatch, capsys, settings):
    def bug(*args, **kwargs):
        raise ValueError(f"about this prompt:\n{FORGED}\r{FORGED}\x1b[2J")

    monkeypatch.setattr("aiproxy.proxy.attempt.to_upstream", bug)
    response = in_process("demo://answers", logging=settings).post("/v1/messages", json=ask())
    out = capsys.readouterr().out
    assert "about this prompt" in out
    assert [line for line in out.splitlines() if line.startswith(FORGED)] == []
    assert "\x1b" not in out
    if settings is JSON:
        (line,) = [one for one in map(json.loads, out.splitlines()) if one["event"] == "bug"]
        assert (line["id"], line["level"]) == (response.json["request_id"], "ERROR")
        assert line["traceback"].startswith("Traceback (most recent call last):\n")


# ------------------------------------------------------------------------------------------- secrets


def assert_without(text, *secrets):
    """Neither half of a secret may be left."""
    for secret in secrets:
        half = len(secret) // 2
        assert secret[:half] not in text
        assert secret[-half:] not in text


@pytest.mark.parametrize("token", ["x", "1", "none", "error", "ollama"])
def test_a_stand_in_token_blots_out_neither_the_log_nor_the_client_s_error(upstream, log, token):
    said = b'{"type":"error","error":{"type":"api_error","message":"next 1 or none: ollama pull"},"id":"1x"}'
    client = in_process({"base_url": upstream(whole(500, said)).url, "token": token})
    assert client.post("/v1/messages", json=ask()).data == said
    assert log("attempt")[0]["error"] == said.decode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_never_sees_the_upstream_s_token_in_an_error_or_a_header(upstream, stream):
    echoed = [("x-echo", f"{TOKEN} was sent"), ("x-plain", "as it is")]
    fake = upstream(error(400, message=f"{TOKEN} is no key", headers=echoed), answer(headers=echoed))
    client = in_process(fake)
    refused = client.post("/v1/messages", json=ask(stream=stream))
    assert (refused.status_code, refused.json["error"]["message"]) == (400, "[redacted] is no key")
    assert refused.content_length == len(refused.data)
    for got in (refused, client.post("/v1/messages", json=ask(stream=stream))):
        assert (got.headers["x-echo"], got.headers["x-plain"]) == ("[redacted] was sent", "as it is")


def test_a_client_never_sees_the_upstream_s_token_in_an_error_in_the_middle(upstream):
    reply = events([*SPOKEN[:4], error_event(message=f"{TOKEN} is exhausted")])
    _, body = post(in_process(upstream(reply)), ask(stream=True))
    assert b"[redacted] is exhausted" in body
    assert TOKEN.encode() not in body


@pytest.mark.parametrize(
    ("header", "scheme"),
    [
        ("x-api-key", ""),
        ("authorization", ""),
        ("authorization", "Bearer "),
        ("authorization", "BEARER   "),
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


def echo(status=400, where="body"):
    """An upstream that says back everything it was told, its own key first."""

    def reply(wire, seen):
        told = " ".join(f"{name}: {value}" for name, value in reversed(seen.headers)) + seen.body.decode()
        line = told.replace("\r", " ").replace("\n", " ")
        said = {
            "body": whole(status, told.encode(), content_type="text/plain"),
            "json": error(status, message=told),
            "event": events([*message_events()[:1], error_event("api_error", told)]),
            "late event": events([*SPOKEN[:5], error_event("api_error", told)]),
        }
        (said.get(where) or whole(status, b"{}", [(where, line)]))(wire, seen)

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
    hang(),
    close_now(),
]
STREAM_FAILURES = [
    *[echo(200, where) for where in ("event", "late event", "body")],
    events(SPOKEN[:5], then="cut"),
    events(SPOKEN[:5], then="hang"),
    events(SPOKEN[:1], then="cut"),
]


def test_every_kind_of_failure_shows_no_secret_and_no_line_of_a_stranger(upstream, capsys):
    keys = [KEY, BEARER, f"session-{KEY}-cookie", f"{KEY}-of-a-proxy"]
    headers = [
        ("x-api-key", KEY),
        ("authorization", f"Bearer {BEARER}"),
        ("cookie", keys[2]),
        ("proxy-authorization", f"Basic {keys[3]}"),
        ("x-mine", f"{TOKEN}-a"),
    ]
    prompt = f"{FORGED}\n{FORGED}\u2028{KEY} {BEARER} {TOKEN}-a {TOKEN}-b"
    said = []

    def repeat(wire, seen):
        said[-1](wire, seen)

    a, b = upstream(default=repeat), upstream(default=repeat)
    own = [{"base_url": a, "token": f"{TOKEN}-a"}, {"base_url": b, "token": f"{TOKEN}-b", "auth": "bearer"}]
    settings = {
        "timeouts": Timeouts(connect=1, first_byte=0.4, answer=0.4, idle=0.3),
        "breaker": BreakerSettings(failures=10**6, cooldown=0),
        "logging": LoggingSettings(level="debug", prompt_preview=400),
    }
    plain = in_process(*own, **settings)
    collecting = in_process(*({**one, "must_stream": True} for one in own), **settings)
    asked = [
        *((plain, ask(prompt), reply) for reply in FAILURES),
        *((plain, ask(prompt, stream=True), reply) for reply in STREAM_FAILURES),
        *((collecting, ask(prompt), reply) for reply in STREAM_FAILURES),
    ]
    for client, question, reply in asked:
        said.append(reply)
        post(client, question, headers)
    for one in (a, b):
        one.stop()
    post(plain, ask(prompt), headers)
    told = capsys.readouterr().out
    lines = read(told)
    assert len(lines) > 3 * len(FAILURES)
    assert all(line["id"] != "req_forged" for line in lines if line.event != "circuit")
    assert_without(told, *keys, f"{TOKEN}-a", f"{TOKEN}-b")
    assert json.dumps(TOKEN)[1:-1] not in told


# ------------------------------------------------------------------------------------------------ JSON


@pytest.fixture
def objects(capsys):
    """The lines since the last call, each a JSON object; what strict readers refuse is no JSON."""

    def read_json():
        text = capsys.readouterr().out
        assert_harmless(text)
        return [msgspec.json.decode(line.encode()) for line in text.splitlines()]

    return read_json


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


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_in_json_a_float_that_is_no_number_is_a_text(objects, number):
    logs.configure(JSON)
    logs.line(logging.INFO, "done", seconds=number)
    assert objects()[0]["seconds"] == str(number)


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


CREDENTIALS = "x-api-key authorization cookie proxy-authorization x-goog-api-key x-auth-token".split()


def test_at_debug_level_the_headers_of_all_three_are_shown_without_credentials(upstream, log):
    echoed = [("set-cookie", "a=b"), ("x-echo", f"{TOKEN} and {KEY}"), ("x-plain", "as it is")]
    own = {"x-team": "blue", "x-gate": "long-enough-for-a-secret-value"}
    fake = upstream(answer(headers=echoed))
    client = in_process({"base_url": fake, "headers": own}, logging=LoggingSettings(level="debug"))
    sent = {
        **{**dict.fromkeys(CREDENTIALS, "short"), "x-api-key": KEY},  # of no form that gives it away
        **{"anthropic-beta": "one,two", "x-mine": f"{KEY}!", "anthropic-ratelimit-tokens-limit": "9"},
    }
    response = client.post("/v1/messages", json=ask(), headers=sent)
    lines = log("headers")
    assert {line.level for line in lines} == {"DEBUG"}
    assert len({line["id"] for line in lines}) == 1
    assert [line.get("upstream") for line in lines] == [None, "a", "a"]
    shown = {of: dict(pairs) for of, pairs in headers_of(lines).items()}
    assert list(shown) == ["client", "upstream_request", "upstream_answer"]
    told = {**dict.fromkeys(CREDENTIALS, "[redacted]"), "x-mine": "[redacted]!"}
    assert shown["client"].items() >= {**sent, **told}.items()
    asked, answered = shown["upstream_request"], shown["upstream_answer"]
    assert {asked["x-api-key"], asked["x-gate"], asked["x-team"]} == {"[redacted]"}
    assert (answered["set-cookie"], answered["x-echo"]) == ("[redacted]", "[redacted] and [redacted]")
    assert answered["x-plain"] == response.headers["x-plain"] == "as it is"


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
