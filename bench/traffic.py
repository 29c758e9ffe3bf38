"""The load: builds the two C programs, writes the requests that the clients send, runs both.

The programs are in c/; they only need a C compiler and Linux.
"""

import json
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BUILT = HERE / ".build"
RATE = 50  # deltas a second in each stream
MODEL = "claude-opus"

# As Anthropic's SDKs and Claude Code send them.
HEADERS = {
    "content-type": "application/json",
    "accept": "application/json",
    "accept-encoding": "identity",
    "user-agent": "bench/1",
    "anthropic-version": "2023-06-01",
    "x-api-key": "sk-test-client-0000",
}


class TrafficError(Exception):
    """The clients could not do their work; the text says what they met."""


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return shutil.which(os.environ.get("CC", "cc"))


def build() -> None:
    """Compile what is older than its sources."""
    found = compiler()
    if found is None:
        raise TrafficError("a C compiler is missing: apt-get install gcc libc6-dev")
    BUILT.mkdir(exist_ok=True)
    for name in ("upstream", "clients"):
        sources = [HERE / "c" / f"{name}.c", HERE / "c" / "wire.h"]
        target = BUILT / name
        if target.exists() and all(target.stat().st_mtime > each.stat().st_mtime for each in sources):
            continue
        with tempfile.TemporaryDirectory(dir=BUILT) as folder:  # others may build at the same time
            made = Path(folder) / name
            subprocess.run([found, "-O2", "-Wall", "-Wextra", "-o", made, sources[0]], check=True)
            made.replace(target)


@contextmanager
def upstream() -> Iterator[tuple[int, int]]:
    """The stand-in upstream: its process id and its port."""
    process = subprocess.Popen([BUILT / "upstream", str(RATE)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def run(mode: str, *arguments: object, mark: Callable[[int], None]) -> dict[str, Any]:
    """Run the clients; `mark` is called with their process id wherever a part begins or ends."""
    command = [str(BUILT / "clients"), mode, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = ""
    try:
        for line in process.stdout:
            if line.strip() in {"begin", "end"}:
                mark(process.pid)
            else:
                told = line
        _, complaint = process.communicate()
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0 or not told:
        raise TrafficError(complaint.strip() or f"the clients ended with {process.returncode}")
    found: dict[str, Any] = json.loads(told)
    if found["failed"]:
        raise TrafficError(f"{found['failed']} answers were wrong; the first: {complaint.strip()}")
    return found


def wire(headers: Mapping[str, str], body: bytes) -> bytes:
    """The whole request as it goes over the wire."""
    lines = [f"{name}: {value}" for name, value in {**HEADERS, **headers}.items()]
    head = "\r\n".join(
        ["POST /v1/messages HTTP/1.1", "host: 127.0.0.1", *lines, f"content-length: {len(body)}"]
    )
    return head.encode() + b"\r\n\r\n" + body


def small(deltas: int | None = None, model: str = MODEL) -> bytes:
    """A body of 1 KB: one question; with `deltas`, one that asks for a stream of so many."""
    question = ("Tell me in plain words what a proxy does, and why it may answer late. " * 20)[:870]
    body: dict[str, object] = {"model": model, "max_tokens": deltas or 1024}
    body["messages"] = [{"role": "user", "content": question}]
    if deltas is not None:
        body["stream"] = True
    return _json(body)


def large(size: int = 300_000, model: str = MODEL) -> bytes:
    """A body of 300 KB: a long session of Claude Code's, with tools, cached blocks and its session id."""
    cached = {"cache_control": {"type": "ephemeral"}}
    user = {"device_id": uuid.uuid4().hex, "account_uuid": "", "session_id": str(uuid.uuid4())}
    frame = {
        "system": [{"type": "text", "text": _prose(12_000), **cached}],
        "tools": [_tool(number) for number in range(20)],
        "metadata": {"user_id": json.dumps(user)},
        "max_tokens": 32_000,
    }
    turns: list[dict[str, object]] = []
    length = len(_json({"model": model, "messages": turns, **frame}))
    while length < size:
        turn = _turn(len(turns))
        turns += turn
        length += len(_json(turn))
    turns[-1]["content"][-1] |= cached  # type: ignore[index]
    return _json({"model": model, "messages": turns, **frame})


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _prose(length: int) -> str:
    line = 'Read the file first, then say "why" - a path like C:\\tmp, a tab\tand\nlines of naïve text. '
    return (line * (length // len(line) + 1))[:length]


def _tool(number: int) -> dict[str, object]:
    text = {"type": "string", "description": _prose(200)}
    schema = {"type": "object", "properties": {"path": text, "pattern": text}, "required": ["path"]}
    return {"name": f"Tool{number}", "description": _prose(1500), "input_schema": schema}


def _turn(number: int) -> list[dict[str, object]]:
    use = {"type": "tool_use", "id": f"toolu_{number:024}", "name": "Tool1", "input": {"path": "src/main.py"}}
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": _prose(3000)}
    return [
        {"role": "user", "content": [{"type": "text", "text": _prose(300)}]},
        {"role": "assistant", "content": [{"type": "text", "text": _prose(400)}, use]},
        {"role": "user", "content": [result]},
        {"role": "assistant", "content": [{"type": "text", "text": _prose(200)}]},
        {"role": "user", "content": [{"type": "text", "text": _prose(100)}]},
    ]
