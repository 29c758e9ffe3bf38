"""`create_app`: the WSGI application, and the service that is behind it."""

import time
from collections.abc import Callable

import flask

from .config import Config
from .console import create_console
from .service import Service
from .views import create_blueprint


def create_app(config: Config, clock: Callable[[], float] = time.monotonic) -> flask.Flask:
    """The WSGI application for a loaded configuration; `clock` is the circuit breakers'.

    `app.extensions["aiproxy"]` is its `Service`, which wants to be told which server it serves and which
    file it is to follow.
    """
    service = Service(config, clock)
    app = flask.Flask("aiproxy", static_folder=None)
    app.url_map.merge_slashes = False  # a doubled slash is another path, no reason for a redirect
    app.register_blueprint(create_blueprint(service))
    app.register_blueprint(create_console(service))
    app.extensions["aiproxy"] = service
    return app
