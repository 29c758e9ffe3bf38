"""`create_app`: the WSGI application, and the service that is behind it."""

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping

import flask

from .config import Config
from .observability import logs
from .observability.metrics import Metrics
from .server.admin import create_console
from .server.routes import create_blueprint
from .server.runtime import Service
from .upstreams.shared_state import INSTANCE, STATE_DIRECTORY, SharedState, State


def create_app(
    config: Config, clock: Callable[[], float] = time.monotonic, environ: Mapping[str, str] = os.environ
) -> flask.Flask:
    """The WSGI application for a loaded configuration; `clock` is the circuit breakers'.

    `environ` holds what the gunicorn master has prepared for its workers; see `server.gunicorn_hooks`.

    `app.extensions["aiproxy"]` is its `Service`, which must be given the server that it serves and the
    file it is to follow.
    """
    service = Service(config, clock, Metrics(), _state(config, environ))
    app = flask.Flask("aiproxy", static_folder=None)
    app.url_map.merge_slashes = False  # a doubled slash is another path, no reason for a redirect
    app.register_blueprint(create_blueprint(service))
    app.register_blueprint(create_console(service))
    app.extensions["aiproxy"] = service
    return app


def _state(config: Config, environ: Mapping[str, str]) -> State:
    """The state; a store is imported only where it is used: a worker by itself does not pay for it."""
    instance = environ.get(INSTANCE) or secrets.token_hex(4)
    if config.state is None:
        if STATE_DIRECTORY not in environ:
            return State()
        from .upstreams.local_state import LocalStore  # noqa: PLC0415

        return SharedState(LocalStore(environ[STATE_DIRECTORY]), instance)
    try:
        from .upstreams.redis_state import RedisStore  # noqa: PLC0415
    except ImportError as error:
        logs.configure(config.logging)
        logs.line(logging.ERROR, "state", result="away", reason=f"{error}: pip install -r requirements.txt")
        return State()
    return SharedState(RedisStore(config.state), instance)
