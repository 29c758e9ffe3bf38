"""`demo://` upstreams: a requests transport adapter that answers in process, without an account.

`demo://answers` answers every request, streamed or whole; `demo://failing` always fails, so that a first run
shows failover and the circuit breaker.
"""

import io
import json
import re
import time
import uuid
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

from ..api import MESSAGES
from ..api.body import members, text
from ..api.sse import encode
from ..errors import error_body

#: Seconds before each word of a streamed answer, so that it is seen to stream.
PAUSE = 0.03

_TEXT = (
    "This is aiproxy's demo upstream: the answer was made in process and cost nothing. "
    "Put your real upstreams into config.yaml and start again."
)


class DemoAdapter(HTTPAdapter):
    """Answers messages requests to `demo://answers` and `demo://failing`."""

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        """See `requests.adapters.HTTPAdapter.send`; the body is a stream."""
        request_id = f"req_demo_{uuid.uuid4().hex[:16]}"
        asked = members(bytes(request.body or b"{}"))  # type: ignore[arg-type]
        model = text(asked.get("model", b"")) or ""
        address = urlsplit(request.url or "")
        if address.path != MESSAGES:
            status, content_type = 404, "application/json"
            pieces = [error_body("not_found_error", "The demo upstreams have messages only.", request_id)]
        elif address.hostname in ("failing", "overloaded"):  # the second is the old name
            status, content_type = 500, "application/json"
            pieces = [error_body("api_error", "This demo upstream always fails.", request_id)]
        elif asked.get("stream") == b"true":
            status, content_type = 200, "text/event-stream"
            pieces = _events(model)
        else:
            status, content_type = 200, "application/json"
            pieces = [json.dumps(_message(model, _TEXT)).encode()]
        answer = urllib3.HTTPResponse(
            body=_Pieces(pieces),
            status=status,
            headers={"content-type": content_type, "request-id": request_id},
            preload_content=False,
        )
        return self.build_response(request, answer)


class _Pieces(io.RawIOBase):
    """A body that arrives a piece at a time."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def read1(self, size: int = -1) -> bytes:
        if len(self._pieces) > 1:
            time.sleep(PAUSE)
        return self._pieces.pop(0) if self._pieces else b""


def _message(model: str, text: str) -> dict[str, Any]:
    return {
        "id": f"msg_demo_{uuid.uuid4().hex[:16]}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": len(text.split())},
    }


def _events(model: str) -> list[bytes]:
    """The same message as an event stream, a delta a word."""
    message = _message(model, _TEXT)
    start = {**message, "content": [], "stop_reason": None, "usage": {"input_tokens": 0, "output_tokens": 0}}
    words = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
        for word in re.findall(r"\S+\s*", _TEXT)
    ]
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *words,
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": message["usage"]},
        {"type": "message_stop"},
    ]
    return [encode(event["type"], json.dumps(event).encode()) for event in events]
