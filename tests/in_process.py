"""The proxy in process, spoken to as WSGI, with breakers that keep what each attempt was settled as.

They complain about a permit that is settled twice or never.
"""

import json
import time
from unittest.mock import patch

from fakes import FakeUpstream, message_json
from werkzeug.test import create_environ

from aiproxy.app import create_app
from aiproxy.config import BreakerSettings, Config, Timeouts, UpstreamSettings
from aiproxy.server import runtime as service
from aiproxy.transport import connection
from aiproxy.transport.session import Transport
from aiproxy.upstreams.breaker import Breaker, Outcome

MB = 1024 * 1024
QUESTION = {"model": "claude-x", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]}
MESSAGE = message_json()


class Recorded(Breaker):
    """A breaker that keeps the outcomes of its permits, and which are still out."""

    def __init__(self, *args):
        super().__init__(*args)
        self.outcomes = []
        self.kinds = []
        self.out = []

    def acquire(self):
        return self._given(super().acquire())

    def acquire_last_resort(self):
        return self._given(super().acquire_last_resort())

    def commit(self, permit):
        exchanged, change = super().commit(permit)
        if exchanged is not permit:
            self._back(permit, "committed")
            self.out.append(exchanged)
        return exchanged, change

    def settle(self, permit, outcome):
        self._back(permit, "failure" if outcome is Outcome.TIMEOUT else outcome.value)
        return super().settle(permit, outcome)

    def back_off(self, permit, seconds):
        self._back(permit, f"backoff {seconds:g}")
        return super().back_off(permit, seconds)

    def _given(self, permit):
        if permit is not None:
            self.kinds.append(permit.kind.value)
            self.out.append(permit)
        return permit

    def _back(self, permit, outcome):
        self.out.remove(permit)  # raises for a permit that was given back before
        self.outcomes.append(outcome)


class WsgiAnswer:
    """What the application answers: a status, headers, and a body that is taken a piece at a time."""

    def __init__(self, app, environ):
        self.pieces = []
        self.ending = None  # "end", or "cut" where the client's connection would be broken off
        self._iterable = app(environ, self._start)
        self._iterator = iter(self._iterable)

    def _start(self, status, headers, exc_info=None):
        self.status = int(status.split(" ")[0])
        self.headers = headers

    def header(self, name):
        return next((value for key, value in self.headers if key.lower() == name), None)

    def next(self):
        """The next piece of the body, None after the last."""
        try:
            self.pieces.append(next(self._iterator))
        except StopIteration:
            self.ending = "end"
        except ConnectionAbortedError:
            self.ending = "cut"
        return None if self.ending else self.pieces[-1]

    def read(self):
        """Take all of the body and close it, as a server does."""
        while self.next() is not None:
            pass
        self.leave()
        return self

    def leave(self):
        """Close the body, read to its end or not."""
        self._iterable.close()

    @property
    def body(self):
        return b"".join(self.pieces)

    def json(self):
        return json.loads(self.body)

    @property
    def upstream(self):
        return self.header("x-aiproxy-upstream")

    @property
    def attempts(self):
        return int(self.header("x-aiproxy-attempts"))


class Proxy:
    """The application with upstreams named a, b, ...: each a `FakeUpstream`, a URL, or settings."""

    def __init__(self, *upstreams, clock=time.monotonic, failures=3, cooldown=60.0, limits=(), **timeouts):
        self._breakers = []
        self._transports = []
        settings = tuple(_settings(chr(97 + n), one) for n, one in enumerate(upstreams))
        with (
            patch.object(service, "Breaker", lambda *args: self._kept(self._breakers, Recorded(*args))),
            patch.object(service, "Transport", lambda *args: self._kept(self._transports, Transport(*args))),
            # A pool is filled with as many blanks, which takes its time.
            patch.object(connection, "POOL", 16),
        ):
            self.app = create_app(
                Config(
                    upstreams=settings,
                    breaker=BreakerSettings(failures=failures, cooldown=cooldown),
                    timeouts=Timeouts(
                        **{"connect": 2.0, "first_byte": 5.0, "answer": 5.0, "idle": 5.0, **timeouts}
                    ),
                ),
                clock,
            )
        self.breakers = dict(zip((one.name for one in settings), self._breakers, strict=True))

    @staticmethod
    def _kept(list_, made):
        list_.append(made)
        return made

    def ask(self, stream=False, question=None, headers=None, query=""):
        """Ask and take the whole answer."""
        return self.begin(stream, question, headers, query).read()

    def begin(self, stream=False, question=None, headers=None, query=""):
        """Ask; the answer's body is still to be read."""
        if not isinstance(question, bytes):
            question = json.dumps({**(question or QUESTION), **({"stream": True} if stream else {})}).encode()
        environ = create_environ(
            "/v1/messages",
            query_string=query,
            method="POST",
            data=question,
            content_type="application/json",
            headers=headers,
        )
        return WsgiAnswer(self.app, environ)

    def outcomes(self, *names):
        """What the attempts at these upstreams (all of them unless named) were settled as."""
        return [self.breakers[name].outcomes for name in names or self.breakers]

    def close(self):
        """Nothing may be left: no permit out, no connection."""
        for transport in self._transports:
            transport.close()
        assert {name: breaker.out for name, breaker in self.breakers.items() if breaker.out} == {}


def client_of(*upstreams, clock=time.monotonic, **settings):
    """A Flask client of the application; upstreams are as for `Proxy`, settings those of `Config`."""
    listed = tuple(_settings(chr(97 + n), one) for n, one in enumerate(upstreams))
    return create_app(Config(upstreams=listed, **settings), clock).test_client()


def _settings(name, one):
    given = one if isinstance(one, dict) else {"base_url": one}
    base_url = given.get("base_url", "http://127.0.0.1:9")
    url = base_url.url if isinstance(base_url, FakeUpstream) else base_url
    return UpstreamSettings(**{"name": name, "token": f"sk-test-{name}", **given, "base_url": url})
