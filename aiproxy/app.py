"""`create_app`: the WSGI application, and the service that is behind it."""

import logging
import time
from collections.abc import Callable

import flask

from .config import Config
from .observability import logs
from .observability.metrics import Metrics
from .server.admin import create_console
from .server.routes import create_blueprint
from .server.runtime import Service
from .upstreams.shared_state import Alone, State


def create_app(
    config: Config, clock: Callable[[], float] = time.monotonic, metrics_directory: str | None = None
) -> flask.Flask:
    """The WSGI application for a loaded configuration; `clock` is the circuit breakers'.

    `metrics_directory` is where the workers share their figures, None for a process by itself.

    `app.extensions["aiproxy"]` is its `Service`, which wants to be told which server it serves and which
    file it is to follow.
    """
    service = Service(config, clock, Metrics(metrics_directory), _state(config))
    app = flask.Flask("aiproxy", static_folder=None)
    app.url_map.merge_slashes = False  # a doubled slash is another path, no reason for a redirect
    app.register_blueprint(create_blueprint(service))
    app.register_blueprint(create_console(service))
    app.extensions["aiproxy"] = service
    return app


def _state(config: Config) -> State:
    """Imported only where it is wanted: a process by itself does not pay for it."""
    if config.state is None:
        return Alone()
    try:
        from .upstreams.redis_state import RedisState  # noqa: PLC0415
    except ImportError as error:
        logs.configure(config.logging)
        logs.line(logging.ERROR, "state", result="away", reason=f"{error}: pip install -r requirements.txt")
        return Alone()
    return RedisState(config.state)
