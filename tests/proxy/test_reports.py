"""No log line, figure, page or row of the ledger fails a request."""

import pytest
from fakes import error

from aiproxy.app import create_app
from aiproxy.config import Config, LedgerSettings, UpstreamSettings
from aiproxy.ledger.ledger import Ledger
from aiproxy.observability.history import History
from aiproxy.observability.metrics import Metrics
from aiproxy.observability.redaction import Redactor

ASK = {"model": "claude-x", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]}


def broken(*_, **__):
    raise RuntimeError("this report is broken")


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def question(request):
    return {**ASK, "stream": request.param}


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Redactor, "may_hold_secret"),
        (Metrics, "request"),
        (Metrics, "attempt"),
        (Metrics, "answer"),
        (Metrics, "stream_began"),
        (Metrics, "refused"),
        (Metrics, "cost"),
        (History, "attempt"),
        (History, "failed"),
        (Ledger, "add"),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_a_report_that_raises_fails_no_request(tmp_path, upstream, monkeypatch, question, owner, name):
    upstreams = tuple(
        UpstreamSettings(name=name_, base_url=fake.url, token="sk-test-a")
        for name_, fake in (("a", upstream(error(500))), ("b", upstream()))
    )
    ledger = LedgerSettings(file=str(tmp_path / "ledger.db"))
    client = create_app(Config(upstreams=upstreams, ledger=ledger)).test_client()
    monkeypatch.setattr(owner, name, broken)
    reply = client.post("/v1/messages", json=question)
    assert reply.status_code == 200
    assert b"message_stop" in reply.data if question["stream"] else reply.json["type"] == "message"
    assert client.post("/v1/messages", json=[]).status_code == 400
    assert client.get("/healthz").status_code == 200
