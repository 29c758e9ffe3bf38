"""`create_app`: the one place where objects are built and joined."""

import time
from collections.abc import Callable

import flask

from . import logs
from .attempt import Tools
from .balancer import Balancer
from .breaker import Breaker
from .config import Config
from .forwarder import Forwarder
from .transport import Transport
from .upstream import Upstream
from .views import create_blueprint
from .watch import Watcher


def create_app(config: Config, clock: Callable[[], float] = time.monotonic) -> flask.Flask:
    """The WSGI application for a loaded configuration; `clock` is the circuit breakers'."""
    logs.configure(config.logging.level)
    enabled = [settings for settings in config.upstreams if settings.enabled]
    upstreams = [
        Upstream(settings, Breaker(config.breaker.failures, config.breaker.cooldown, clock))
        for settings in enabled
    ]
    watcher = Watcher()
    transport = Transport(watcher, config.timeouts.connect)
    redactor = logs.Redactor(settings.token for settings in config.upstreams)
    forwarder = Forwarder(Balancer(upstreams), Tools(transport, watcher, config.timeouts), redactor)
    app = flask.Flask("aiproxy", static_folder=None)
    app.url_map.merge_slashes = False  # a doubled slash is another path, no reason for a redirect
    app.register_blueprint(create_blueprint(config, forwarder, redactor))
    return app
