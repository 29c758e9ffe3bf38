"""What is measured: one adapter for each proxy, that tells how to start it in front of an upstream.

A peer that is not installed says so and is left out. Every one of them writes its usual log to a file.
"""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.traffic import HEADERS, MODEL, small

HERE = Path(__file__).parent
ROOT = HERE.parent
PEERS = HERE / "peers"
MODULES = PEERS / "node_modules"
UPSTREAM_MODEL = "claude-opus-4-8"

# gunicorn's settings are to be the default ones.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "GUNICORN_CMD_ARGS"}


@dataclass(frozen=True)
class Command:
    """How a proxy is started."""

    arguments: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A proxy, or none at all: `start` then is None, and the clients talk to the upstream.

    `start` writes the configuration into a folder of its own and gets the port to listen on and the
    upstream's. `headers` are what its clients must send beside the usual ones. `only_large`: nothing but
    the requests of 300 KB is measured.
    """

    name: str
    missing: Callable[[], bool]
    version: Callable[[], str]
    start: Callable[[Path, int, int], Command] | None = None
    headers: Callable[[int], dict[str, str]] = lambda _: {}
    only_large: bool = False


@dataclass(frozen=True)
class Running:
    """A proxy that serves; `pid` is the root of its tree of processes, None without a proxy."""

    port: int
    pid: int | None


@contextmanager
def serve(target: Target, folder: Path, upstream: int) -> Iterator[Running]:
    """Start it, wait for its first good answer, stop it."""
    if target.start is None:
        yield Running(upstream, None)
        return
    port = _free_port()
    command = target.start(folder, port, upstream)
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command.arguments,
            cwd=ROOT,
            env={**_ENVIRONMENT, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the whole tree can be ended, and Ctrl-C is ours alone
        )
    try:
        _await_answer(process, port, target.headers(upstream), folder / "output")
        yield Running(port, process.pid)
    finally:
        _end(process)


def _await_answer(
    process: subprocess.Popen[bytes], port: int, headers: Mapping[str, str], output: Path
) -> None:
    limit = time.monotonic() + 120
    found = "nothing"
    while time.monotonic() < limit and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("POST", "/v1/messages", small(), {**HEADERS, **headers})
            answer = connection.getresponse()
            found = f"{answer.status} {answer.read(500)!r}"
            if answer.status == 200:
                return
        except (OSError, http.client.HTTPException) as error:
            found = str(error)
        finally:
            connection.close()
        time.sleep(0.1)
    raise RuntimeError(f"does not serve: {found}\n{output.read_text(errors='replace')[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to its own session: nothing of it needs to be seen out."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _output_of(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return (ran.stdout + ran.stderr).strip()


def _aiproxy(workers: int = 1, **settings: object) -> Callable[[Path, int, int], Command]:
    """With the default settings but for `settings`; a model mapping, so that bodies are rewritten."""

    def start(folder: Path, port: int, upstream: int) -> Command:
        mapped = {MODEL: UPSTREAM_MODEL}
        one = {"name": "bench", "base_url": f"http://127.0.0.1:{upstream}", "token": "sk-test-upstream-0000"}
        config = {"listen": port, "upstreams": [{**one, "model_mappings": mapped}], **settings}
        (folder / "config.yaml").write_text(json.dumps(config))  # which is YAML too
        gunicorn = str(ROOT / ".venv" / "bin" / "gunicorn")
        more = ["--workers", str(workers)] if workers > 1 else []
        return Command([gunicorn, *more, "wsgi:app"], {"AIPROXY_CONFIG": str(folder / "config.yaml")})

    return start


def _aiproxy_version() -> str:
    """The latest commit that touched what is measured."""
    git = ["git", "-C", str(ROOT)]
    measured = ["--", "aiproxy", "gunicorn.conf.py", "wsgi.py", "requirements.txt"]
    commit = _output_of(*git, "log", "-1", "--format=%h", *measured)
    return f"{commit}, changed" if _output_of(*git, "status", "--porcelain", *measured) else commit


_NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; {user}
events {{ worker_connections 1024; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  client_max_body_size 64m; {more}
  upstream api {{ server 127.0.0.1:{upstream}; keepalive 128; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://api; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


def _nginx(more: str = "") -> Callable[[Path, int, int], Command]:
    """A plain reverse proxy with one worker, and `more` settings."""

    def start(folder: Path, port: int, upstream: int) -> Command:
        user = "user root;" if os.geteuid() == 0 else ""  # else its worker could not enter the folder
        values = {"folder": folder, "port": port, "upstream": upstream, "user": user, "more": more}
        (folder / "nginx.conf").write_text(_NGINX.format(**values))
        return Command(["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")])

    return start


def _no_nginx() -> bool:
    return shutil.which("nginx") is None


def _nginx_version() -> str:
    return _output_of("nginx", "-v").rpartition("/")[2]


def _claude_code_router(folder: Path, port: int, upstream: int) -> Command:
    """Its "Anthropic" transformer alone makes it pass requests on without translating them."""
    home = folder / ".claude-code-router"
    home.mkdir()
    provider = {
        "name": "bench",
        "api_base_url": f"http://127.0.0.1:{upstream}/v1/messages",
        "api_key": "sk-test-upstream-0000",
        "models": [UPSTREAM_MODEL],
        "transformer": {"use": ["Anthropic"]},
    }
    config = {
        "PORT": port,
        "LOG_LEVEL": "info",
        "NON_INTERACTIVE_MODE": True,
        "Providers": [provider],
        "Router": {"default": f"bench,{UPSTREAM_MODEL}"},
    }
    (home / "config.json").write_text(json.dumps(config))
    script = MODULES / "@musistudio" / "claude-code-router" / "dist" / "cli.js"
    return Command(["node", str(script), "start"], {"HOME": str(folder), "NODE_ENV": "production"})


def _portkey(folder: Path, port: int, upstream: int) -> Command:
    script = MODULES / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    return Command(["node", str(script), f"--port={port}", "--headless"], {"NODE_ENV": "production"})


def _portkey_headers(upstream: int) -> dict[str, str]:
    return {"x-portkey-provider": "anthropic", "x-portkey-custom-host": f"http://127.0.0.1:{upstream}/v1"}


def _litellm(folder: Path, port: int, upstream: int) -> Command:
    model = {"model": f"anthropic/{UPSTREAM_MODEL}", "api_key": "sk-test-upstream-0000"}
    model["api_base"] = f"http://127.0.0.1:{upstream}"
    config = {"model_list": [{"model_name": MODEL, "litellm_params": model}]}
    (folder / "config.yaml").write_text(json.dumps(config))
    litellm = str(PEERS / ".venv" / "bin" / "litellm")
    settings = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": HEADERS["x-api-key"]}
    words = ["--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    return Command([litellm, *words, "--telemetry", "False"], settings)


def _module_version(name: str) -> Callable[[], str]:
    return lambda: json.loads((MODULES / name / "package.json").read_text())["version"]


def _no_module(name: str) -> Callable[[], bool]:
    return lambda: shutil.which("node") is None or not (MODULES / name).is_dir()


def _litellm_version() -> str:
    found = next((PEERS / ".venv").glob("lib/*/site-packages/litellm-*.dist-info"))
    return found.name.removeprefix("litellm-").removesuffix(".dist-info")


TARGETS = [
    Target("direct", lambda: False, lambda: "no proxy"),
    Target("nginx", _no_nginx, _nginx_version, _nginx()),
    Target(
        "nginx, bodies in memory",
        _no_nginx,
        _nginx_version,
        _nginx("client_body_buffer_size 1m;"),
        only_large=True,
    ),
    Target("aiproxy", lambda: False, _aiproxy_version, _aiproxy()),
    Target("aiproxy, no ledger", lambda: False, _aiproxy_version, _aiproxy(ledger="none")),
    Target("aiproxy, 2 workers", lambda: False, _aiproxy_version, _aiproxy(2)),
    Target(
        "claude-code-router",
        _no_module("@musistudio/claude-code-router"),
        _module_version("@musistudio/claude-code-router"),
        _claude_code_router,
    ),
    Target(
        "Portkey",
        _no_module("@portkey-ai/gateway"),
        _module_version("@portkey-ai/gateway"),
        _portkey,
        _portkey_headers,
    ),
    Target("LiteLLM", lambda: not (PEERS / ".venv" / "bin" / "litellm").exists(), _litellm_version, _litellm),
]
