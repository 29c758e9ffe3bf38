"""The Flask blueprint: HTTP in, HTTP out.

Reads the request and hands on one frozen `Request`; every error of our own leaves here in the API's
shape. Whatever answers before the body was read reads and drops it first: otherwise clients see a
broken pipe and nginx a 502 instead of the answer.
"""

import logging
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

import flask
from werkzeug.exceptions import HTTPException

from . import body, logs
from .attempt import Request
from .config import Config
from .errors import ApiError, status_line
from .forwarder import Forwarder
from .headers import Pairs
from .relay import Relay

#: What is read and thrown away of a body that is refused, in bytes and seconds.
_DRAIN_BYTES = 256 * 1024 * 1024
_DRAIN_SECONDS = 30.0
_PIECE = 1024 * 1024


def create_blueprint(config: Config, forwarder: Forwarder, redactor: logs.Redactor) -> flask.Blueprint:
    """The routes of the proxy."""
    blueprint = flask.Blueprint("proxy", __name__)

    @blueprint.before_app_request
    def identify() -> None:
        flask.g.request_id = f"req_{uuid.uuid4().hex[:24]}"

    # Without Flask's own answer to OPTIONS: every method but POST is a wrong one.
    @blueprint.post("/v1/messages", provide_automatic_options=False)
    def messages() -> flask.Response:
        began = time.monotonic()
        raw = _read_body(config.max_body)
        request = _request(body.read(raw), began)
        _log_arrival(request, redactor, config.logging.prompt_preview)
        reply = forwarder.forward(request, _cutter())
        return _response(reply.status, reply.headers, reply.body)

    @blueprint.app_errorhandler(ApiError)
    def ours(error: ApiError) -> flask.Response:
        return _refusal(error)

    @blueprint.app_errorhandler(HTTPException)
    def flasks(error: HTTPException) -> flask.Response:
        _drain()
        if error.code == 405:
            allowed = error.get_response().headers.get("Allow", "")
            message = f"{flask.request.method} is not allowed here, only {allowed} is."
            refusal = ApiError(405, "invalid_request_error", message)
            return _refusal(refusal, [("allow", allowed)])
        asked = f"{flask.request.method} {flask.request.path[:100]}"
        return _refusal(ApiError(404, "not_found_error", f"aiproxy does not serve {asked}."))

    @blueprint.app_errorhandler(Exception)
    def bug(error: Exception) -> flask.Response:
        logs.exception("bug", id=flask.g.request_id)
        return _refusal(ApiError(500, "api_error", "Internal error in aiproxy; its log tells more."))

    return blueprint


def _read_body(limit: int) -> bytes:
    """The request's body. Raises `ApiError` 413 over `limit` bytes, 400 if it breaks off."""
    declared = flask.request.content_length
    if declared is not None and declared > limit:
        raise _too_large(limit)
    pieces: list[bytes] = []
    total = 0
    while piece := _read_piece(_PIECE if declared is None else min(_PIECE, declared - total)):
        total += len(piece)
        if total > limit:
            raise _too_large(limit)
        pieces.append(piece)
    if declared is not None and total < declared:
        raise ApiError(400, "invalid_request_error", "The request body ended early.")
    return b"".join(pieces)


def _read_piece(size: int) -> bytes:
    try:
        piece: bytes = flask.request.environ["wsgi.input"].read(size)
    except Exception:  # gunicorn's many errors for bodies that break off or are badly chunked
        raise ApiError(400, "invalid_request_error", "The request body could not be read.") from None
    return piece


def _too_large(limit: int) -> ApiError:
    _drain()
    return ApiError(413, "request_too_large", f"The request body is larger than {limit / 1024 / 1024:g} MB.")


def _drain() -> None:
    """Read the rest of the body and throw it away, within bounds."""
    environ = flask.request.environ
    client: socket.socket | None = environ.get("gunicorn.socket")
    ends = time.monotonic() + _DRAIN_SECONDS
    left = _DRAIN_BYTES
    try:
        while left > 0 and (seconds := ends - time.monotonic()) > 0:
            if client is not None:
                client.settimeout(seconds)
            piece = environ["wsgi.input"].read(min(_PIECE, left))
            if not piece:
                break
            left -= len(piece)
    except Exception:
        return  # the client left, is too slow or sends nonsense: the answer may still reach it
    finally:
        if client is not None:
            client.settimeout(None)


def _request(read: body.Body, began: float) -> Request:
    environ = flask.request.environ
    headers = tuple(_client_headers(environ))
    secrets = tuple(
        value.removeprefix("Bearer ").removeprefix("bearer ").strip()
        for name, value in headers
        if name in ("authorization", "x-api-key", "proxy-authorization", "cookie")
    )
    return Request(
        id=flask.g.request_id,
        query=environ.get("QUERY_STRING", ""),
        headers=headers,
        body=read,
        secrets=secrets,
        began=began,
    )


def _client_headers(environ: dict[str, Any]) -> Pairs:
    """The request's headers out of the WSGI environment, which joins repeated ones with commas."""
    pairs = [
        (name[5:].replace("_", "-").lower(), value)
        for name, value in environ.items()
        if name.startswith("HTTP_") and isinstance(value, str)
    ]
    if environ.get("CONTENT_TYPE"):
        pairs.append(("content-type", environ["CONTENT_TYPE"]))
    return pairs


def _cutter() -> Callable[[], None]:
    """What breaks off the client's connection, so that it cannot take a stream's early end for a clean one.

    The plain socket's method, also where gunicorn itself speaks TLS: see `transport`. gunicorn then finds
    the connection broken when it writes the end of the body, and closes it.
    """
    client: socket.socket | None = flask.request.environ.get("gunicorn.socket")

    def cut() -> None:
        if client is None:
            raise ConnectionAbortedError("no connection to break off")
        try:
            socket.socket.shutdown(client, socket.SHUT_WR)
        except OSError:
            return  # gone already

    return cut


def _response(status: int, headers: Pairs, content: bytes | Relay) -> flask.Response:
    response = flask.Response(
        content, status=status_line(status), direct_passthrough=isinstance(content, Relay)
    )
    response.headers.clear()
    response.headers.extend(headers)
    if isinstance(content, bytes):
        response.headers["content-length"] = str(len(content))
    return response


def _refusal(error: ApiError, headers: Pairs | None = None) -> flask.Response:
    """An error of our own, which no upstream had a part in."""
    request_id = flask.g.request_id
    logs.line(logging.WARNING, "refused", id=request_id, status=error.status, reason=error.message)
    pairs = [("content-type", "application/json"), ("request-id", request_id), *(headers or [])]
    return _response(error.status, pairs, error.body(request_id))


def _log_arrival(request: Request, redactor: logs.Redactor, limit: int) -> None:
    preview = redactor.text(request.body.preview(limit + 4096), limit, request.secrets) if limit else None
    logs.line(
        logging.INFO,
        "request",
        id=request.id,
        model=request.body.model,
        stream=request.body.stream,
        bytes=len(request.body.raw),
        prompt=preview,
    )
