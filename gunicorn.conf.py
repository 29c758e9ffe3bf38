"""gunicorn's settings for aiproxy. The command line and GUNICORN_CMD_ARGS win over this file."""

import json
import os
import shlex
import socket
import sys

from aiproxy.config import ConfigError, is_loopback, load, path_from

try:
    # Here, before any port is opened: a faulty configuration must stop the start.
    _config = load(path_from(os.environ))
except ConfigError as error:
    sys.exit(str(error))

bind = _config.address
worker_class = "gthread"
workers = 1
threads = 256  # one a request in flight, streams included
worker_connections = 2048  # kept-alive connections wait without a thread
timeout = 60  # seconds without a sign of life of the worker's main thread; no bound on requests
graceful_timeout = 600  # a running stream may end
keepalive = 75  # longer than nginx's 60 and the SDKs' 5, so that they close first
control_socket_disable = True


def on_starting(server):
    """The command line may bind another address than the configuration, which was checked."""
    hosts = [host for address in server.address for host in _hosts(address)]
    if not _config.may_serve_strangers and not all(map(is_loopback, hosts)):
        sys.exit("bind: other machines may reach it: set api_keys, or allow_anonymous: true")


def _hosts(address):
    """Where one of gunicorn's addresses listens: none for a unix socket."""
    if isinstance(address, int):  # fd://, a socket that was opened by whoever started this
        with socket.socket(fileno=os.dup(address)) as inherited:
            address = inherited.getsockname()
    return [address[0]] if isinstance(address, tuple) else []


def post_worker_init(worker):
    """Tell the application which worker serves it."""
    worker.wsgi.extensions["aiproxy"].serve(worker)


def worker_int(worker):
    """Ctrl-C: end at once. Running streams are cut off; gunicorn would wait for their threads."""
    os._exit(0)


def when_ready(server):
    """Say where it listens and how to try it."""
    for warning in _config.warnings:
        print(f"warning: {warning}", flush=True)
    if not _config.may_serve_strangers:
        print("warning: no api_keys are set: every user of this machine is served", flush=True)
    if _config.is_demo:
        print(
            "*** This is the demo: its upstreams answer in process, no account is used. "
            "Copy config.example.yaml to config.yaml and put in your own. ***",
            flush=True,
        )
    address = str(server.LISTENERS[0])
    print(f"aiproxy serves {address} - try: {_example(address)}", flush=True)


def _example(address):
    """A request by curl that an upstream of the configuration answers."""
    enabled = [upstream for upstream in _config.upstreams if upstream.enabled]
    models = sorted(name for upstream in enabled for name in upstream.available_models)
    question = {"role": "user", "content": "Hi"}
    body = {"model": (models or ["claude-opus-4-8"])[0], "max_tokens": 100, "messages": [question]}
    words = ["curl", f"{address}/v1/messages"]
    if address.startswith("unix:"):
        words = ["curl", "--unix-socket", address.removeprefix("unix:"), "http://localhost/v1/messages"]
    if not _config.is_demo:
        words += ["-H", "content-type: application/json", "-H", "anthropic-version: 2023-06-01"]
    if _config.api_keys:
        words += ["-H", "x-api-key: ONE-OF-YOUR-api_keys"]
    return shlex.join([*words, "-d", json.dumps(body, separators=(",", ":"))])
