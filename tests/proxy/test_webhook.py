"""Texts on their way to a webhook."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from aiproxy.config import LoggingSettings
from aiproxy.observability import logs, webhook
from aiproxy.observability.webhook import Webhook


@pytest.fixture
def hook(monkeypatch):
    """A server that answers with these statuses, then with 200; `posts` are what it got."""
    monkeypatch.setattr(webhook, "PAUSES", (0.01, 0.01, 0.01))
    servers = []

    def start(*statuses):
        left = list(statuses)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                server.posts.append((self.path, self.headers["content-type"], json.loads(body)))
                self.send_response(left.pop(0) if left else 200)
                self.send_header("content-length", "0")
                self.end_headers()
                server.arrived.release()

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        server.posts, server.arrived = [], threading.Semaphore(0)
        server.url = f"http://127.0.0.1:{server.server_port}/services/sk-test-hook"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def await_posts(server, count):
    for _ in range(count):
        assert server.arrived.acquire(timeout=5)


def test_a_text_is_posted_as_json(hook):
    server = hook()
    Webhook().send(server.url, "The circuit is open.")
    await_posts(server, 1)
    assert server.posts == [("/services/sk-test-hook", "application/json", {"text": "The circuit is open."})]


def test_what_is_refused_is_tried_four_times_in_all_and_the_next_text_follows(hook, capsys):
    logs.configure(LoggingSettings())
    server = hook(500, 404, 503, 500)
    sender = Webhook()
    sender.send(server.url, "one")
    sender.send(server.url, "two")
    await_posts(server, 5)
    assert [post[2]["text"] for post in server.posts] == ["one"] * 4 + ["two"]
    said = capsys.readouterr().out
    assert 'webhook result=failed reason="status 500" text=one' in said
    assert "sk-test-hook" not in said


def test_a_webhook_that_hangs_or_is_gone_keeps_nobody(hook):
    sender = Webhook()
    for _ in range(200):
        sender.send("http://127.0.0.1:9/gone", "text")
