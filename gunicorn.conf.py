"""gunicorn's settings for aiproxy. The command line and GUNICORN_CMD_ARGS win over this file."""

import contextlib
import json
import logging
import os
import shlex
import signal
import sys

from gunicorn.glogging import Logger

from aiproxy import logs
from aiproxy.config import ConfigError, is_loopback, load, path_from

try:
    # Here, before any port is opened: a faulty configuration must stop the start.
    _config = load(path_from(os.environ))
except ConfigError as error:
    sys.exit(str(error))

logs.configure(_config.logging)


class ServerLog(Logger):
    """gunicorn's own log, which follows ours into a file and into JSON; set up anew at each reload."""

    def setup(self, cfg):
        super().setup(cfg)
        logs.adopt(self.error_log)


bind = _config.address
worker_class = "gthread"
workers = 1
threads = 256  # one a request in flight, streams included
worker_connections = 2048  # kept-alive connections wait without a thread
timeout = 60  # seconds without a sign of life of the worker's main thread; no bound on requests
graceful_timeout = 600  # a running stream may end
keepalive = 75  # longer than nginx's 60 and the SDKs' 5, so that they close first
control_socket_disable = True
logger_class = ServerLog
accesslog = None  # aiproxy's own lines say more: upstream, attempts, tokens, how a stream ended


def on_starting(server):
    """Before any port is opened: the command line may set another address or user than expected."""
    _check_addresses(address for address in server.address if isinstance(address, tuple))
    if _config.logging.file and server.cfg.uid != os.geteuid():
        with contextlib.suppress(OSError):  # a device, say
            os.chown(_config.logging.file, server.cfg.uid, server.cfg.gid)


def _check_addresses(addresses):
    """Without keys, none that other machines may reach; unix sockets are no matter here."""
    hosts = [address[0] for address in addresses if isinstance(address, tuple)]
    if not _config.may_serve_strangers and not all(map(is_loopback, hosts)):
        sys.exit("bind: other machines may reach it: set api_keys, or allow_anonymous: true")


def post_worker_init(worker):
    """Tell the application which worker serves it, and let Ctrl-C end it at once.

    Running streams are cut off then. gunicorn's own handler would wait for their threads, and for ever
    where it interrupts the main thread in the middle of handing a request to one.
    """
    worker.wsgi.extensions["aiproxy"].serve(worker)
    for interrupt in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(interrupt, lambda *_: os._exit(0))


def when_ready(server):
    """Say where it listens and how to try it; sockets that were inherited are known only here."""
    _check_addresses(
        listener.sock.getsockname() for listener in server.LISTENERS if hasattr(listener, "sock")
    )
    for warning in _config.warnings:
        _say(warning, logging.WARNING)
    if not _config.may_serve_strangers:
        _say("no api_keys are set: every user of this machine is served", logging.WARNING)
    if _config.is_demo:
        _say(
            "*** This is the demo: its upstreams answer in process, no account is used. "
            "Copy config.example.yaml to config.yaml and put in your own. ***"
        )
    address = str(server.LISTENERS[0])
    _say(f"aiproxy serves {address} - try: {_example(address)}")


def _say(text, level=logging.INFO):
    """Printed as it stands for whoever reads along; a line of the log where that is a file or JSON."""
    if not _config.logging.is_plain:
        logs.line(level, "start", message=text)
    else:
        print(f"warning: {text}" if level == logging.WARNING else text, flush=True)


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
