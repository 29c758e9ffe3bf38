"""gunicorn's settings for aiproxy. The command line and GUNICORN_CMD_ARGS win over this file."""

import importlib
import json
import os
import shlex
import shutil
import sys
import tempfile

from aiproxy.config import ConfigError, check_addresses, path_from
from aiproxy.reload import LastGood, start

METRICS = "PROMETHEUS_MULTIPROC_DIR"

try:
    # Here, before any port is opened: a faulty configuration must stop the start.
    _begun = start(path_from(os.environ), last_good=None)
except ConfigError as error:
    sys.exit(str(error))
_config = _begun.config
LastGood.create(_begun.content, os.environ)

bind = _config.address
worker_class = "aiproxy.worker.Worker"  # gthread's, which stops without losing a request
workers = 1
threads = 256  # one a request in flight, streams included
worker_connections = 2048  # kept-alive connections wait without a thread
timeout = 60  # seconds without a sign of life of the worker's main thread; no bound on requests
graceful_timeout = 600  # a running stream may end
keepalive = 75  # longer than nginx's 60 and the SDKs' 5, so that they close first
control_socket_disable = True


def on_starting(server):
    """Before any port is opened: the command line may bind another address than the configuration."""
    _check(server.address)
    _share_figures(server)


def _share_figures(server):
    """Where several workers share what /metrics tells: prometheus-client looks for it when first imported.

    In memory: a file on a full disk, mapped as these are, would kill the process that writes to it.
    """
    os.environ.pop(METRICS, None)  # of the gunicorn that this one takes the place of
    if server.cfg.workers > 1:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        os.environ[METRICS] = tempfile.mkdtemp(prefix="aiproxy-metrics-", dir=memory)


def child_exit(server, worker):
    """What a worker counted stays, its streams in flight do not."""
    if METRICS in os.environ:
        importlib.import_module("aiproxy.metrics").process_ended(worker.pid)  # not sooner: see above


def on_exit(server):
    """The figures end with this gunicorn; another one that took its place has its own."""
    if METRICS in os.environ:
        shutil.rmtree(os.environ[METRICS], ignore_errors=True)


def _check(addresses):
    try:
        check_addresses(_config, addresses)
    except ConfigError as error:
        sys.exit(str(error))


def when_ready(server):
    """Say where it listens and how to try it; sockets that were inherited are known only here."""
    _check(listener.sock.getsockname() for listener in server.LISTENERS if hasattr(listener, "sock"))
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
