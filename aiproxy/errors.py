"""The Messages API's error types and bodies, and the exceptions of this package.

No exception here derives from `OSError`: gunicorn takes an `OSError` that leaves a response body for
the client's broken connection and hides it.
"""

import json
import os
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

#: HTTP status of each error type, https://docs.anthropic.com/en/api/errors.
STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


#: 4xx after which a retry can bring something else.
_RETRYABLE = frozenset({408, 409, 429})


class ApiError(Exception):
    """An answer of our own, in the API's shape; it names no upstream address and no key."""

    def __init__(
        self,
        status: int,
        type_: str,
        message: str,
        *,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Iterable[tuple[str, str]] = (),
    ) -> None:
        """`code`: the API's `error.details.error_code`; `retry_after` in seconds; `headers`: further ones."""
        super().__init__(message)
        self._headers = list(headers)
        self._retry_after = retry_after
        self.code = code
        self.status = status
        self.type = type_
        self.message = message

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Beside the usual ones. The SDKs obey `x-should-retry` before they look at the status; without it
        Claude Code repeats a request with a wrong key for minutes."""
        may_retry = self.type != "billing_error" and (self.status >= 500 or self.status in _RETRYABLE)
        headers = self._headers if may_retry else [*self._headers, ("x-should-retry", "false")]
        return headers if self._retry_after is None else [*headers, ("retry-after", str(self._retry_after))]

    def body(self, request_id: str) -> bytes:
        """The JSON body; `request_id` is also what the `request-id` header says."""
        return error_body(self.type, self.message, request_id, self.code)


def type_of_status(status: int) -> str:
    """The error type that goes with an HTTP status of 400 or more."""
    types = {known: type_ for type_, known in STATUS_OF_TYPE.items()}
    return types.get(status, "invalid_request_error" if status < 500 else "api_error")


def error_body(type_: str, message: str, request_id: str, code: str | None = None) -> bytes:
    """One error in the API's shape, as a JSON body or as the data of an `error` event."""
    error: dict[str, Any] = {"type": type_, "message": message}
    if code is not None:
        error["details"] = {"error_code": code}
    return json.dumps({"type": "error", "error": error, "request_id": request_id}).encode()


def too_large(limit: int, code: str | None = None) -> ApiError:
    """413 for a request body of more than `limit` bytes."""
    size = f"{limit / 1024 / 1024:g} MB" if limit >= 10_000 else f"{limit} bytes"
    return ApiError(413, "request_too_large", f"The request body is larger than {size}.", code=code)


def new_request_id() -> str:
    """What joins the lines of one request in the log, and what the client gets."""
    return f"req_{os.urandom(12).hex()}"


def status_line(status: int) -> str:
    """Status and reason phrase, for WSGI; 529 is the API's own."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"{status} {'Overloaded' if status == 529 else 'Unknown'}"
