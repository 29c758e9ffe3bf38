"""One attempt at one upstream: send the request, and read up to the commit point.

Up to the commit point a failure costs the client nothing. From there on a `Stream` goes on.
"""

import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import Iterator
from typing import Self

import msgspec

from ..api import MESSAGES, sse
from ..api.accumulate import Accumulator, Malformed
from ..api.body import members, text
from ..api.headers import Pairs, media_type, seconds_of, to_client, to_upstream, value_of, with_betas
from ..api.usage import Usage
from ..config import Betas, Timeouts
from ..errors import error_body, type_of_status
from ..observability import logs
from ..observability.redaction import Redactor
from ..policy import Fault, Problem, status_of_type
from ..transport.failures import TransportError
from ..transport.session import Outgoing, Transport, UpstreamResponse
from ..transport.wait import Interrupted
from ..upstreams.balancer import Candidate
from .request import Request
from .stream import END_OF_BODY_SECONDS, Stream

#: Bytes of a whole answer, of a collected stream, and of what is held before a stream's commit point.
ANSWER_LIMIT = 64 * 1024 * 1024
#: Bytes of an error's body.
ERROR_LIMIT = 16 * 1024 * 1024
#: Seconds for which the body of an error status is awaited: the status alone decides.
ERROR_BODY_SECONDS = 2.0
#: Seconds after an attempt's begin from which a `ping` or a comment before the first content commits.
PATIENCE = 15.0
#: Bytes read of an answer of the wrong type, to show the log what it was.
_SAMPLE = 4096

_JSON, _EVENTS = "application/json", "text/event-stream"
_MEDIA_TYPE = re.compile(r"(?:text|application|image|audio|video|multipart)/[a-z0-9.+-]{1,40}")
_NO_BETAS = Betas()
_BEFORE_CONTENT = frozenset({b"message_start", b"ping"})
_PARTIAL_STRINGS = "fine-grained-tool-streaming-2025-05-14"


class Failure(msgspec.Struct, frozen=True):
    """An attempt that brought no answer; `headers` and `body` are those of an error that came."""

    problem: Problem
    detail: str
    headers: Pairs = []
    body: bytes = b""

    @classmethod
    def of(cls, fault: Fault, detail: str, body: bytes = b"") -> Self:
        """A failure that is not an error of the API's; `body`: what came instead, for the log."""
        return cls(Problem(fault), detail, body=body[:_SAMPLE])


class Answer(msgspec.Struct, frozen=True):
    """An attempt's answer, committed: whole, or a stream that goes on."""

    status: int
    headers: Pairs
    body: bytes | Stream


class Tools(msgspec.Struct, frozen=True):
    """What every attempt works with."""

    transport: Transport
    timeouts: Timeouts
    redactor: Redactor


class Attempt:
    """Used by one thread at a time: the request's."""

    def __init__(self, tools: Tools, candidate: Candidate, request: Request) -> None:
        self.upstream = candidate.upstream
        self.usage = Usage()
        self.status: int | None = None
        self.upstream_request_id: str | None = None
        self.first_byte: float | None = None  # seconds from the attempt's start to the answer's head
        self.reconnected = False
        self.token: str | None = None  # the upstream's, that was sent
        self.was_sent = False  # the upstream may have got the request
        self.model = candidate.upstream.model_for(request.body.model)
        self._tools = tools
        self._request = request
        self.candidate = candidate
        self._asks_for_message = asks_for_message = request.path == MESSAGES
        must_stream = candidate.upstream.settings.must_stream and asks_for_message
        self._accumulates = must_stream and not request.body.stream
        self._streams = must_stream or (request.body.stream and asks_for_message)
        self._wait = request.wait
        self._began = time.monotonic()
        self._response: UpstreamResponse | None = None

    def run(self) -> Answer | Failure:
        """Ask the upstream, up to the commit point. The permit is still to be settled."""
        streaming = False
        try:
            outcome = self._run()
            streaming = isinstance(outcome, Answer) and isinstance(outcome.body, Stream)
        except (TransportError, Interrupted) as failed:
            self.was_sent |= isinstance(failed, TransportError) and failed.is_connected
            outcome = Failure.of(failed.fault, failed.detail)
        except sse.EventTooLarge:
            outcome = Failure.of(Fault.BROKEN, "an event is over the size limit")
        finally:
            if self._response is not None and not streaming:
                self._response.close()
        return outcome

    def _run(self) -> Answer | Failure:
        self.token = self.upstream.token
        if self.token is None:
            return Failure.of(Fault.TOKEN, "its token is being fetched")
        response = self._response = self._send(self.token)
        self.was_sent = True
        self.first_byte = time.monotonic() - self._began
        self.status = response.status
        self.upstream_request_id = value_of(response.headers, "request-id")
        self.upstream.rate_limits.note(self.model, response.headers)
        self._log_headers("upstream_answer", response.headers)
        if response.status >= 400:
            return self._error_status(response)
        if not 200 <= response.status < 300:
            return Failure.of(Fault.NO_ANSWER, f"status {response.status}")
        kind = media_type(response.headers)
        if kind != (_EVENTS if self._streams else _JSON):
            return self._wrong_type(response, kind)
        if not self._streams:
            return self._whole(response)
        return self._accumulated(response) if self._accumulates else self._stream(response)

    def _send(self, token: str) -> UpstreamResponse:
        """Send the request; once more on a fresh connection if a kept one turns out to be dead."""
        body = self._request.body.spliced(self.model, self._streams or self._request.body.stream)
        settings = self.upstream.settings
        extra, credential = self.upstream.extra_headers, self.upstream.credential(token)
        headers = to_upstream(self._request.headers, credential, extra, settings.remove_headers)
        if settings.betas != _NO_BETAS:
            headers = with_betas(headers, settings.betas.drop, settings.betas.add)
        url = self.upstream.url(self._request.path, self._request.query)
        outgoing = Outgoing(self._request.method, url, headers, body, settings.proxy, settings.ca_bundle)
        self._log_headers("upstream_request", headers)
        timeouts = self._tools.timeouts
        self._wait.limit(timeouts.answer, timeouts.first_byte if self._streams else None)
        try:
            return self._tools.transport.send(outgoing, self._wait)
        except TransportError as failed:
            if not failed.is_stale:
                raise
        self.reconnected = True
        return self._tools.transport.send(outgoing, self._wait, is_fresh=True)

    def _log_headers(self, of: str, headers: Pairs) -> None:
        logs.headers(
            self._tools.redactor,
            headers,
            self._request.secrets,
            id=self._request.id,
            of=of,
            upstream=self.upstream.name,
        )

    def _whole(self, response: UpstreamResponse) -> Answer | Failure:
        body = _read(response, ANSWER_LIMIT)
        try:
            message = members(body)
        except ValueError:
            return Failure.of(Fault.NO_ANSWER, "the body is no JSON object", body=body)
        if _is_error(message):
            return self._error(None, body, response.headers)
        if self._asks_for_message and text(message.get("type", b"")) != "message":
            return Failure.of(Fault.NO_ANSWER, "the body is not a Message", body=body)
        self.usage.note_answer(message)
        return Answer(response.status, to_client(response.headers, response.is_decoded), body)

    def _accumulated(self, response: UpstreamResponse) -> Answer | Failure:
        """`must_stream`: read the whole event stream and answer with the Message it spells."""
        self._wait.expect(self._tools.timeouts.idle)
        betas = value_of(self._request.headers, "anthropic-beta") or ""
        accumulator = Accumulator(partial_strings=_PARTIAL_STRINGS in betas)
        framer = sse.Framer(pass_on=False)
        try:
            pieces = response.pieces()
            for piece in _limited(pieces, ANSWER_LIMIT):
                block = framer.feed(piece)
                if block or framer.ends_in_comment:
                    self._wait.renew()
                for event in sse.parse(block):
                    self._wait.check()  # accumulating takes time, and the total counts it
                    accumulator.feed(event)
                    if event.name in (b"message_start", b"message_delta"):
                        self.usage.note_event(event.name, event.data)
                if accumulator.error is not None:
                    return self._error_event(accumulator.error, response.headers)
                if accumulator.complete:
                    self._await_end(pieces)
                    break
            message = accumulator.message()
        except Malformed as malformed:
            return Failure.of(Fault.NO_ANSWER, f"no Message: {malformed}")
        if accumulator.repaired:
            logs.line(logging.WARNING, "repaired", id=self._request.id, what="a tool input that was cut off")
        headers = [
            pair for pair in to_client(response.headers, response.is_decoded) if pair[0] != "content-type"
        ]
        return Answer(response.status, [*headers, ("content-type", _JSON)], message)

    def _await_end(self, pieces: Iterator[bytes]) -> None:
        """Give an upstream that said all a moment to end the body, so that its connection can be kept."""
        self._wait.limit(END_OF_BODY_SECONDS)
        with contextlib.suppress(TransportError):
            next(pieces, None)

    def _stream(self, response: UpstreamResponse) -> Answer | Failure:
        """Read up to the commit point: the first event that is neither `message_start` nor `ping`.

        A `ping` or a comment later than `PATIENCE` commits, too: a client must not wait longer for a sign of
        life. So does an event that is too large to be held (`framer.partial`). Each whole event or comment
        line renews the silence limit.
        """
        framer = sse.Framer()
        pieces = response.pieces()
        held: deque[bytes] = deque()
        for piece in _limited(pieces, ANSWER_LIMIT):
            block = framer.feed(piece)
            if not block and not framer.ends_in_comment:
                continue
            self._wait.renew()
            if block:
                held.append(block)
            events = list(sse.parse(block))
            for event in events:
                if event.name == b"message_start":  # what it reports is billed even if nothing follows
                    self.usage.note_event(event.name, event.data)
            content = next((each for each in events if each.name not in _BEFORE_CONTENT), None)
            if content is not None and (content.name == b"error" or _is_error_data(content)):
                return self._error_event(content.data, response.headers)
            if content is not None and not content.name:
                detail = "the events have no `event:` lines"
                return Failure.of(Fault.NO_ANSWER, detail, body=content.data)
            is_sign_of_life = not events or any(each.name == b"ping" for each in events)
            is_late = time.monotonic() - self._began > PATIENCE and is_sign_of_life and held
            if content is not None or framer.partial or is_late:
                stream = Stream(self._wait, response, pieces, held, framer, self.usage)
                return self._commit(response, stream)
        return Failure.of(Fault.NO_ANSWER, "the stream ended before its first content")

    def _commit(self, response: UpstreamResponse, stream: Stream) -> Answer:
        self._wait.limit(silence=self._tools.timeouts.idle)
        self.candidate.commit()
        return Answer(response.status, to_client(response.headers, response.is_decoded), stream)

    def _wrong_type(self, response: UpstreamResponse, kind: str) -> Failure:
        """An answer that is neither the JSON nor the events that were asked for."""
        shown = kind if _MEDIA_TYPE.fullmatch(kind) else "missing or odd"
        detail = f"content type {shown} instead of {_EVENTS if self._streams else _JSON}"
        if kind == _EVENTS:
            logs.line(
                logging.WARNING,
                "hint",
                id=self._request.id,
                upstream=self.upstream.name,
                text="it streams though not asked to: set must_stream: true for it",
            )
            return Failure.of(Fault.NO_ANSWER, detail)
        self._wait.limit(ERROR_BODY_SECONDS)  # the head has decided already
        body = b""
        try:
            body = _read(response, ERROR_LIMIT) if kind == _JSON else _sample(response)
            if kind == _JSON and _is_error(members(body)):
                return self._error(None, body, response.headers)
        except TransportError as failed:
            if failed.fault in (Fault.CLIENT_LEFT, Fault.RESTART):
                raise
        except ValueError:
            """It is not an error of the API's."""
        return Failure.of(Fault.NO_ANSWER, detail, body=body)

    def _error_status(self, response: UpstreamResponse) -> Failure:
        """An error by its HTTP status. A body that is late or incomplete is replaced by one of ours."""
        self._wait.limit(ERROR_BODY_SECONDS)
        try:
            return self._error(response.status, _read(response, ERROR_LIMIT), response.headers)
        except TransportError as failed:
            if failed.fault in (Fault.CLIENT_LEFT, Fault.RESTART):
                raise
        message = f"The upstream answered with status {response.status} and no complete error."
        body = error_body(type_of_status(response.status), message, self._request.id)
        kept = [pair for pair in response.headers if pair[0] not in ("content-type", "content-encoding")]
        return self._error(response.status, body, [*kept, ("content-type", _JSON)])

    def _error(self, status: int | None, body: bytes, headers: Pairs) -> Failure:
        """An error answer; without an HTTP `status` of 400 or more, its type says which one it counts as."""
        problem = problem_of(body, status, seconds_of(value_of(headers, "retry-after")))
        command = self.upstream.token_command
        if problem.status == 401 and command is not None and command.refused(self.token or ""):
            return Failure.of(Fault.TOKEN, "its token was refused, and is fetched anew", body)
        is_decoded = self._response is not None and self._response.is_decoded
        return Failure(problem, f"status {problem.status}", to_client(headers, is_decoded), body)

    def _error_event(self, data: bytes, headers: Pairs) -> Failure:
        """An `error` event before the commit point: the error that it would have been without a stream."""
        try:
            members(data)
        except ValueError:
            return Failure.of(Fault.NO_ANSWER, "an error event that is not a JSON object", body=data)
        kept = [pair for pair in headers if pair[0] != "content-type"]
        return self._error(None, data, [*kept, ("content-type", _JSON)])


def _read(response: UpstreamResponse, limit: int) -> bytes:
    """The body, which must end by its own framing. Raises `TransportError`, also over `limit` bytes."""
    return b"".join(_limited(response.pieces(), limit))


def _sample(response: UpstreamResponse) -> bytes:
    """The beginning of a body that is of no use but to the log."""
    return next(response.pieces(), b"")[:_SAMPLE]


def _limited(pieces: Iterator[bytes], limit: int) -> Iterator[bytes]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > limit:
            raise TransportError(Fault.BROKEN, "the answer is over the size limit")
        yield piece


def _is_error(message: dict[str, bytes]) -> bool:
    """Whether a JSON body is an error, whatever its HTTP status says."""
    return text(message.get("type", b"null")) == "error" or message.get("error", b"null") != b"null"


def _is_error_data(event: sse.Event) -> bool:
    """Whether an event that has no name is an error."""
    try:
        return not event.name and _is_error(members(event.data))
    except ValueError:
        return False


def problem_of(body: bytes, status: int | None = None, retry_after: float | None = None) -> Problem:
    """An error by its body, as far as that has the API's shape; without a `status` its type says which."""
    try:
        error = members(members(body).get("error", b""))
    except ValueError:
        error = {}
    try:
        code = text(members(error.get("details", b"")).get("error_code", b"")) or ""
    except ValueError:
        code = ""
    type_, message = (text(error.get(name, b"")) or "" for name in ("type", "message"))
    status = status_of_type(type_) if status is None else status
    return Problem(Fault.ERROR, status, type_, message, code, retry_after)
