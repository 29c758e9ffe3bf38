"""The Flask blueprint for those who run the proxy: is it alive, is it ready, how does it do.

Answered outside the gate for requests in flight, so that a busy proxy can still be looked at.
"""

import base64
import binascii
import hmac
import logging
import math
import time
from urllib.parse import parse_qs

import flask

from ..api.headers import Pairs
from ..errors import ApiError
from ..ledger.report import Report
from ..ledger.store import LedgerError
from ..observability import logs
from . import usage_page
from .routes import current_request, own_response, turn_away
from .runtime import Service
from .status import as_html, as_json
from .throttle import Throttle

_TEXT = "text/plain; charset=utf-8"
_FRESH = [("cache-control", "no-store")]
#: Bytes of a form; the page's own are far smaller.
_LARGEST_FORM = 4096
#: Nothing of another host, no script, no frame around it.
_PAGE = [
    *_FRESH,
    (
        "content-security-policy",
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; "
        "frame-ancestors 'none'; base-uri 'none'",
    ),
    ("referrer-policy", "same-origin"),
    ("x-content-type-options", "nosniff"),
]


def create_console(service: Service) -> flask.Blueprint:
    """The routes."""
    blueprint = flask.Blueprint("console", __name__)
    throttle = Throttle(time.monotonic)

    @blueprint.get("/healthz", provide_automatic_options=False)
    def healthz() -> flask.Response:
        """The process answers."""
        return own_response(200, b"ok\n", _FRESH, _TEXT)

    @blueprint.get("/readyz", provide_automatic_options=False)
    def readyz() -> flask.Response:
        """Some upstream is usable."""
        reason = service.unready()
        status, text = (200, "ready") if reason is None else (503, reason)
        return own_response(status, f"{text}\n".encode(), _FRESH, _TEXT)

    @blueprint.get("/metrics", provide_automatic_options=False)
    def metrics() -> flask.Response:
        """Figures for Prometheus."""
        body, type_ = service.exposition()
        return own_response(200, body, _FRESH, type_)

    @blueprint.get("/status", provide_automatic_options=False)
    def status() -> flask.Response:
        """The page, or the same as JSON."""
        if challenge := _challenge(throttle):
            return challenge
        wanted = flask.request.accept_mimetypes.best_match(["text/html", "application/json"], "text/html")
        if wanted == "application/json":
            return own_response(200, as_json(service.status()), _PAGE)
        page = as_html(service.status(), flask.request.args.getlist("open"))
        return own_response(200, page, _PAGE, "text/html; charset=utf-8")

    @blueprint.get("/usage", provide_automatic_options=False)
    def usage() -> flask.Response:
        """Who spent what."""
        if challenge := _challenge(throttle):
            return challenge
        query = usage_page.Query.of(flask.request.args)
        budgets = service.runtime.budgets
        limits = budgets.every() if budgets is not None else []
        problem = service.ledger.problem if service.ledger is not None else None
        page = usage_page.as_html(_report(service, query), query, time.time(), limits, problem)
        return own_response(200, page, _PAGE, "text/html; charset=utf-8")

    @blueprint.get("/usage.csv", provide_automatic_options=False)
    def usage_csv() -> flask.Response:
        """One table of that page."""
        if challenge := _challenge(throttle):
            return challenge
        query, table = usage_page.Query.of(flask.request.args), flask.request.args.get("table", "")
        content = usage_page.as_csv(_report(service, query), query, table)
        named = ("content-disposition", f'attachment; filename="aiproxy-{table}.csv"')
        return own_response(200, content, [*_PAGE, named], "text/csv; charset=utf-8")

    @blueprint.post("/status", provide_automatic_options=False)
    def act() -> flask.Response:
        """A button of the page."""
        if challenge := _challenge(throttle):
            return challenge
        _check_origin()
        form = parse_qs(current_request().body.read(_LARGEST_FORM).decode(errors="replace"))
        upstream, action = (form.get(name, [""])[0] for name in ("upstream", "action"))
        if not service.act(upstream, action):
            raise ApiError(400, "invalid_request_error", "No such upstream, or no such action.")
        return own_response(303, b"", [("location", "/status"), *_PAGE], _TEXT)

    return blueprint


def _report(service: Service, query: usage_page.Query) -> Report:
    """Raises `ApiError` 404 without a ledger, 503 where it cannot be read."""
    if service.ledger is None:
        raise ApiError(404, "not_found_error", "aiproxy keeps no ledger.")
    try:
        return service.ledger.read(lambda store: Report.of(store, time.time(), query.key, query.outcome))
    except LedgerError as error:
        raise ApiError(503, "api_error", f"The ledger cannot be read: {error}") from None


def _challenge(throttle: Throttle) -> flask.Response | None:
    """What a request without the admin key gets; None with it. Without such a setting there is no page."""
    key = current_request().runtime.config.admin_key
    if key is None:
        raise ApiError(404, "not_found_error", "aiproxy has no admin_key, and so no status page.")
    address, authorization = current_request().address, flask.request.headers.get("authorization", "")
    if seconds := throttle.must_wait(address):
        message = "Too many wrong passwords came from this address."
        raise ApiError(429, "rate_limit_error", message, retry_after=math.ceil(seconds))
    if hmac.compare_digest(_password(authorization), key.encode()):
        throttle.succeeded(address)
        return None
    if authorization:  # browsers ask without a password first
        throttle.failed(address)
    error = ApiError(401, "authentication_error", "The password is aiproxy's admin_key, the user any name.")
    headers: Pairs = [("www-authenticate", 'Basic realm="aiproxy", charset="UTF-8"'), *_FRESH]
    return turn_away(error, headers)


def _password(authorization: str) -> bytes:
    """That of HTTP Basic credentials (RFC 7617), empty where there is none."""
    scheme, _, credentials = authorization.partition(" ")
    try:
        decoded = base64.b64decode(credentials.strip(), validate=True)
    except (binascii.Error, ValueError):
        return b""
    return decoded.partition(b":")[2] if scheme.lower() == "basic" else b""


def _check_origin() -> None:
    """Browsers send the password along whatever page a form is on: only our own may use it.

    Raises `ApiError` 403.
    """
    own_origin = f"{flask.request.scheme}://{flask.request.host}"
    if flask.request.headers.get("origin") != own_origin:
        logs.line(logging.WARNING, "refused", path="/status", reason="the form is not this page's")
        raise ApiError(
            403,
            "permission_error",
            f"Only {own_origin} may do this. Behind nginx, set Host and X-Forwarded-Proto for aiproxy.",
        )
