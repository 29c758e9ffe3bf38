"""gunicorn's settings for aiproxy. The command line and GUNICORN_CMD_ARGS win over this file."""

from aiproxy.server.gunicorn_hooks import Hooks

_hooks = Hooks()

bind = _hooks.config.address
worker_class = "aiproxy.server.worker.Worker"  # gthread's, which stops without losing a request
workers = _hooks.config.workers
threads = 256  # one a request in flight, streams included
worker_connections = 2048  # kept-alive connections wait without a thread
timeout = 60  # seconds without a sign of life of the worker's main thread; no bound on requests
graceful_timeout = 600  # a running stream may end
limit_request_field_size = 65536  # bytes of one header field; Claude Code's hints can be long
keepalive = 75  # longer than nginx's 60 and the SDKs' 5, so that they close first
control_socket_disable = True
logger_class = "aiproxy.server.gunicorn_hooks.ServerLog"
accesslog = None  # aiproxy's own lines say more: upstream, attempts, tokens, how a stream ended

on_starting = _hooks.on_starting
when_ready = _hooks.when_ready
ssl_context = _hooks.ssl_context
