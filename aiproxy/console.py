"""The Flask blueprint for those who run the proxy: is it alive, is it ready.

Answered outside the gate for requests in flight, so that a busy proxy can still be looked at.
"""

import flask

from .service import Service
from .views import own

_TEXT = "text/plain; charset=utf-8"
_FRESH = [("cache-control", "no-store")]


def create_console(service: Service) -> flask.Blueprint:
    """The routes."""
    blueprint = flask.Blueprint("console", __name__)

    @blueprint.get("/healthz", provide_automatic_options=False)
    def healthz() -> flask.Response:
        """The process answers."""
        return own(200, b"ok\n", _FRESH, _TEXT)

    @blueprint.get("/readyz", provide_automatic_options=False)
    def readyz() -> flask.Response:
        """Some upstream is usable."""
        reason = service.unready()
        status, text = (200, "ready") if reason is None else (503, reason)
        return own(status, f"{text}\n".encode(), _FRESH, _TEXT)

    @blueprint.get("/metrics", provide_automatic_options=False)
    def metrics() -> flask.Response:
        """Figures for Prometheus."""
        service.take_stock()
        body, type_ = service.metrics.exposition()
        return own(200, body, _FRESH, type_)

    return blueprint
