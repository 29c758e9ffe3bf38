"""`create_app`: the one place where objects are built and joined."""

import time
from collections.abc import Callable
from typing import Any

import flask

from . import logs
from .attempt import Tools
from .balancer import Balancer
from .breaker import Breaker
from .config import Config
from .forwarder import Forwarder
from .gate import SPARE, Gate
from .keys import Keys
from .models import Models
from .threads import Owners
from .transport import Transport
from .upstream import Upstream
from .views import Doors, create_blueprint
from .watch import Watcher

#: gunicorn.conf.py's; what another server or the command line sets is told by `Gate.serve_with`.
DEFAULT_THREADS = 256


class Service:
    """What the application and the server that runs it tell each other."""

    def __init__(self, gate: Gate, watcher: Watcher, transport: Transport) -> None:
        self._gate = gate
        self._watcher = watcher
        self._transport = transport

    def serve(self, worker: Any) -> None:
        """`worker`: gunicorn's, once it is up."""
        self._gate.serve_with(worker.cfg.threads)
        self._watcher.attend(worker, worker.cfg.graceful_timeout)

    def close(self) -> None:
        """Give back the thread, its descriptors and the kept connections."""
        self._watcher.close()
        self._transport.close()


def create_app(config: Config, clock: Callable[[], float] = time.monotonic) -> flask.Flask:
    """The WSGI application for a loaded configuration; `clock` is the circuit breakers'.

    `app.extensions["aiproxy"]` is its `Service`, which wants to be told which worker serves it.
    """
    logs.configure(config.logging)
    enabled = [settings for settings in config.upstreams if settings.enabled]
    upstreams = [
        Upstream(settings, Breaker(config.breaker.failures, config.breaker.cooldown, clock))
        for settings in enabled
    ]
    watcher = Watcher(patience=config.timeouts.idle)
    redactor = logs.Redactor(
        tokens=[each.token for each in config.upstreams] + _header_secrets(config),
        keys=[each.key for each in config.api_keys],
    )
    tools = Tools(Transport(watcher, config.timeouts.connect), watcher, config.timeouts, redactor)
    gate = Gate(config.max_in_flight)
    gate.serve_with(DEFAULT_THREADS)
    doors = Doors(
        config=config,
        forwarder=Forwarder(Balancer(upstreams), tools, Owners(clock), config.affinity, redactor),
        models=Models(enabled),
        keys=Keys({each.name: each.key for each in config.api_keys}),
        gate=gate,
        drains=Gate(SPARE // 2),
        watcher=watcher,
        redactor=redactor,
    )
    app = flask.Flask("aiproxy", static_folder=None)
    app.url_map.merge_slashes = False  # a doubled slash is another path, no reason for a redirect
    app.register_blueprint(create_blueprint(doors))
    app.extensions["aiproxy"] = Service(gate, watcher, tools.transport)
    return app


def _header_secrets(config: Config) -> list[str]:
    """Configured header values that may be keys: a team's name is too short for one."""
    values = [value for upstream in config.upstreams for value in upstream.headers.values()]
    return [value for value in values if len(value) >= 16]
