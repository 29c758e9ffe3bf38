"""gunicorn's settings for aiproxy. The command line and GUNICORN_CMD_ARGS win over this file."""

import os
import sys

from aiproxy.config import ConfigError, load, path_from

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


def when_ready(server):
    """Say where it listens and how to try it."""
    for warning in _config.warnings:
        print(f"warning: {warning}", flush=True)
    if _config.is_demo:
        print(
            "*** This is the demo: its upstreams answer in process, no account is used. "
            "Copy config.example.yaml to config.yaml and put in your own. ***",
            flush=True,
        )
    model = next(
        (name for upstream in _config.upstreams for name in upstream.available_models), "claude-opus-4-8"
    )
    body = f'{{"model":"{model}","max_tokens":100,"messages":[{{"role":"user","content":"Hi"}}]}}'
    address = server.LISTENERS[0]
    print(f"aiproxy serves {address} - try: curl {address}/v1/messages -d '{body}'", flush=True)
