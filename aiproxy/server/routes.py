"""The Flask blueprint: HTTP in, HTTP out.

Checks who asks, reads the request and hands on one frozen `Request`; every error of our own leaves here
in the API's shape. A request is in flight from its head until its response is closed.
"""

import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import flask
import msgspec
from werkzeug.exceptions import HTTPException

from ..api import MESSAGES, body, encoding
from ..api.headers import Pairs, value_of
from ..config import ClientKey
from ..errors import ApiError, new_request_id, status_line
from ..ledger.rows import ANONYMOUS, day_of
from ..observability import logs
from ..observability.redaction import Redactor
from ..proxy.exchange import Exchange, Reply
from ..proxy.request import Request
from ..transport.wait import Interrupted, Wait
from ..upstreams.message_threads import continued_message
from .auth import secrets_in
from .limits import Place
from .models import allowed_only
from .request_body import RequestBody
from .responses import Body, Response, response
from .runtime import Runtime, Service

#: Paths that clients and monitors probe; answered at once, in silence and to everyone.
_PROBES = ("/", "/api/hello")
_NO_BODY = body.Body(raw=b"", members={}, model="", stream=False)

Forward = Callable[[Exchange], Reply]


class Incoming(msgspec.Struct):
    """What a request came with. Flask's own proxies cost a microsecond at each touch."""

    id: str
    runtime: Runtime  # to the request's end, whatever becomes of the configuration
    environ: dict[str, Any]
    method: str
    path: str
    body: RequestBody
    client: str | None = None  # the name of the client's key, once it is known

    @property
    def address(self) -> str:
        """The client's."""
        environ = self.environ
        return self.runtime.peers.client(
            environ.get("REMOTE_ADDR", ""), environ.get("HTTP_X_FORWARDED_FOR", "")
        )


def create_blueprint(service: Service) -> flask.Blueprint:
    """The routes of the proxy."""
    blueprint = flask.Blueprint("proxy", __name__)

    # Without Flask's own answer to OPTIONS: it is a wrong method like any other.
    def route(path: str, method: str) -> Callable[[Callable[..., flask.Response]], Any]:
        return blueprint.route(path, methods=[method], provide_automatic_options=False)

    @blueprint.before_app_request
    def identify() -> None:
        request = flask.request
        environ, runtime = request.environ, service.runtime
        flask.g.incoming = Incoming(
            id=new_request_id(),
            runtime=runtime,
            environ=environ,
            method=request.method,
            path=request.path,
            body=RequestBody(environ),
        )

    @route(MESSAGES, "POST")
    def messages() -> flask.Response:
        incoming = current_request()
        return _forwarded(incoming, incoming.runtime.failover.messages)

    @route("/v1/messages/count_tokens", "POST")
    def count_tokens() -> flask.Response:
        incoming = current_request()
        return _forwarded(incoming, incoming.runtime.failover.count_tokens)

    @route("/v1/models", "GET")
    def model_list() -> flask.Response:
        incoming = current_request()
        key, forward = _check_key(incoming), incoming.runtime.failover.pass_on
        models = incoming.runtime.models.for_key(key)
        if not models.are_listed:
            return _forwarded(incoming, lambda exchange: allowed_only(forward(exchange), key))
        return own_response(200, models.page(flask.request.args))

    @route("/v1/models/<path:name>", "GET")
    def model(name: str) -> flask.Response:
        incoming = current_request()
        key = _check_key(incoming)
        models = incoming.runtime.models.for_key(key)
        if not models.are_listed:
            is_forbidden = key is not None and not key.limits.allow(name)
            if is_forbidden or {".", ".."} & set(name.split("/")):  # no way to other endpoints of the account
                raise ApiError(404, "not_found_error", f"model: {name}")
            forward = incoming.runtime.failover.pass_on
            return _forwarded(incoming, forward, f"/v1/models/{quote(name, safe='')}")
        return own_response(200, models.one(name))

    @route("/v1/usage", "GET")
    def usage() -> flask.Response:
        incoming = current_request()
        _check_key(incoming)
        if incoming.runtime.budgets is None:
            raise ApiError(404, "not_found_error", "aiproxy keeps no ledger.")
        return own_response(200, incoming.runtime.budgets.report(incoming.client or ANONYMOUS))

    for path in _PROBES:
        blueprint.add_url_rule(path, "probe", _probe, methods=["GET"], provide_automatic_options=False)
    _add_error_handlers(blueprint)
    return blueprint


def _add_error_handlers(blueprint: flask.Blueprint) -> None:
    @blueprint.app_errorhandler(ApiError)
    def on_api_error(error: ApiError) -> flask.Response:
        return turn_away(error)

    @blueprint.app_errorhandler(HTTPException)
    def on_http_error(error: HTTPException) -> flask.Response:
        if error.code == 405:
            allowed = error.get_response().headers.get("Allow", "")
            message = f"{flask.request.method} is not allowed here, only {allowed} is."
            return turn_away(ApiError(405, "invalid_request_error", message), [("allow", allowed)])
        if flask.request.path.startswith("/v1/v1/"):
            # Claude Code shows a 404 as a wrong model, a 400 word for word.
            message = "ANTHROPIC_BASE_URL must not end in /v1: the client adds it by itself."
            return turn_away(ApiError(400, "invalid_request_error", message))
        asked = f"{flask.request.method} {flask.request.path[:100]}"
        return turn_away(ApiError(404, "not_found_error", f"aiproxy does not serve {asked}."))

    @blueprint.app_errorhandler(Exception)
    def on_bug(error: Exception) -> flask.Response:
        logs.exception("bug", id=current_request().id)
        return turn_away(ApiError(500, "api_error", "Internal error in aiproxy; see its log."))


def current_request() -> Incoming:
    """The request at hand."""
    incoming: Incoming = flask.g.incoming
    return incoming


def _probe() -> flask.Response:
    logs.line(logging.DEBUG, "probe", path=flask.request.path)
    return own_response(200, b"aiproxy\n", type_="text/plain")


def _forwarded(incoming: Incoming, forward: Forward, path: str | None = None) -> flask.Response:
    """Take a place in flight, send the request on, to `path` if it is not the client's, and answer."""
    began = time.monotonic()
    runtime = incoming.runtime
    key = _check_key(incoming)  # before anything that others could miss
    place = runtime.in_flight.acquire()
    if place is None:
        busy = ApiError(529, "overloaded_error", "aiproxy has as many requests in flight as it may have.")
        return turn_away(busy, [("retry-after", "1")])
    exchange: Exchange | None = None
    try:
        if incoming.path == MESSAGES and runtime.budgets is not None:
            runtime.budgets.check(incoming.client)
        request = _request(incoming, key, began)
        if path is not None:
            request = msgspec.structs.replace(request, path=path)
        exchange = Exchange(request, runtime.journal, runtime.owners)
        try:
            _check_limits(request, key, place, runtime)
            reply = forward(exchange)
        except Interrupted:  # while it waited for a place of its key
            reply = exchange.best_failure()
        return _answer(reply, exchange, place, incoming)
    except ApiError as error:
        try:
            return _refusal(error)  # in its place in flight: what reads a body away takes a thread
        finally:
            place.release()
    except BaseException:
        if exchange is not None:
            exchange.finish(0, is_complete=False)
        place.release()
        raise


def _answer(reply: Reply, exchange: Exchange, place: Place, incoming: Incoming) -> flask.Response:
    """The response, whose close ends the exchange and gives the place in flight back."""

    def on_close(sent: int, is_complete: bool) -> None:
        try:
            exchange.finish(sent, is_complete)
        finally:
            place.release()
            incoming.body.end()

    client: socket.socket | None = incoming.environ.get("gunicorn.socket")
    body = Body(reply.body, client, incoming.method == "HEAD", on_close)
    return response(reply.status, reply.headers, body, reply.length)


def _check_key(incoming: Incoming) -> ClientKey | None:
    """The client's key, None where none is required. Raises `ApiError` 401."""
    keys = incoming.runtime.keys
    if not keys.are_required:
        return None
    key = keys.owner(_client_headers(incoming.environ))
    if key is None:
        raise ApiError(401, "authentication_error", "The key is not one of aiproxy's.")
    incoming.client = key.name
    expires = key.limits.expires
    if expires is not None and day_of(time.time()) > expires.isoformat():
        raise ApiError(401, "authentication_error", f"The key {key.name} was valid until {expires}.")
    return key


def _check_limits(request: Request, key: ClientKey | None, place: Place, runtime: Runtime) -> None:
    """Whether the key may have what the request asks for, and now. Raises `ApiError`, `Interrupted`."""
    if key is None:
        return
    if key.limits.models and request.body.model:
        for model in request.body.named_models():
            if not key.limits.allow(model):
                message = f"The key {key.name} may not use the model {model[:100]}."
                raise ApiError(403, "permission_error", message)
    if request.path == MESSAGES:
        runtime.key_places.acquire(key, place, request.wait)


def _request(incoming: Incoming, key: ClientKey | None, began: float) -> Request:
    """Read the request and log it."""
    runtime, environ = incoming.runtime, incoming.environ
    headers = tuple(_client_headers(environ))
    if incoming.method == "POST":
        limit = runtime.config.max_body
        coding = value_of(headers, "content-encoding") or ""
        read = body.read(encoding.decode(incoming.body.read(limit), coding, limit))
    else:
        incoming.body.discard()
        read = _NO_BODY
        headers = tuple(pair for pair in headers if not pair[0].startswith("content-"))
    request = Request(
        id=incoming.id,
        method="GET" if incoming.method == "HEAD" else incoming.method,
        path=incoming.path,
        query=environ.get("QUERY_STRING", ""),
        headers=headers,
        body=read,
        client=incoming.client,
        secrets=secrets_in(headers),
        began=began,
        wait=_wait(incoming),
        fallback_model=_fallback_model(read, key, runtime.config.fallback_models),
        budget_headers=runtime.budgets.headers(incoming.client) if runtime.budgets is not None else [],
    )
    preview = runtime.config.logging.prompt_preview
    _log_request(request, runtime.journal.redactor, preview, incoming.address)
    return request


def _fallback_model(read: body.Body, key: ClientKey | None, models: Mapping[str, str]) -> str | None:
    """The model to be asked where every upstream lacks capacity for the first one; None for none."""
    model = models.get(read.model)
    if model is None or (key is not None and not key.limits.allow(model)):
        return None
    return None if read.has_thinking or continued_message(read) is not None else model


def _wait(incoming: Incoming) -> Wait:
    """The wait of the client's connection; one that watches no client where the server is not our worker."""
    serving = getattr(incoming.environ.get("gunicorn.socket"), "serving", None)
    return serving.wait if serving is not None else Wait(None, incoming.runtime.shutdown)


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


def own_response(
    status: int, content: bytes, headers: Pairs | None = None, type_: str = "application/json"
) -> flask.Response:
    """An answer that no upstream had a part in."""
    id_ = current_request().id
    pairs = [("content-type", type_), ("request-id", id_), ("x-aiproxy-request-id", id_), *(headers or [])]
    made = Response(content, status=status_line(status))
    made.headers.clear()
    made.headers.extend([*pairs, ("content-length", str(len(content)))])
    return made


def turn_away(error: ApiError, headers: Pairs | None = None) -> flask.Response:
    """As `_refusal`, for a request that has no place in flight.

    To read and discard its body occupies a thread. Only a few requests may do so at once; the connections
    of the others are closed with their bodies unread.
    """
    incoming = current_request()
    place = incoming.runtime.discards.acquire()
    if place is None:
        incoming.body.give_up()
        return _refusal(error, headers)
    try:
        return _refusal(error, headers)
    finally:
        place.release()


def _refusal(error: ApiError, headers: Pairs | None = None) -> flask.Response:
    """An error of our own, after what is left of the request's body has been read and dropped."""
    incoming = current_request()
    incoming.body.discard()
    secrets = secrets_in(_client_headers(incoming.environ))
    incoming.runtime.journal.refused(
        incoming.id, incoming.path, secrets, error, incoming.client, incoming.address
    )
    response = own_response(error.status, error.body(incoming.id), [*error.headers, *(headers or [])])
    response.call_on_close(incoming.body.end)
    return response


def _log_request(request: Request, redactor: Redactor, limit: int, address: str) -> None:
    preview = redactor.text(request.body.preview(), limit, request.secrets) if limit else None
    logs.redacted(
        redactor,
        logging.INFO,
        "request",
        request.secrets,
        id=request.id,
        path=request.path if request.path != MESSAGES else None,
        client=request.client,
        address=address or None,
        model=request.body.model or None,
        stream=request.body.stream,
        bytes=len(request.body.raw),
        prompt=preview if request.body.model else None,
    )
    logs.headers(redactor, request.headers, request.secrets, id=request.id, of="client")
