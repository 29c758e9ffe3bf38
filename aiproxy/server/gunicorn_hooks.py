"""What aiproxy does in gunicorn's master process: before ports are opened, and once they are.

The only module that knows the master.
"""

import atexit
import contextlib
import errno
import json
import logging
import os
import secrets
import shlex
import shutil
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gunicorn.glogging import Logger

from ..config import Config, ConfigError, check_addresses, path_from
from ..ledger.store import LedgerError, Store
from ..observability import logs
from ..upstreams.shared_state import INSTANCE, STATE_DIRECTORY
from .client import TlsClientSocket
from .reload import LastGood, start

#: How often an address that is in use is tried, once a second.
_TRIES = 5
_HINTS = {
    errno.EADDRINUSE: "`ss -ltnp` shows who listens there; end it, or set another `listen`",
    errno.EACCES: "a port below 1024 needs a permission; set another `listen`, with nginx in front",
    errno.EADDRNOTAVAIL: "it is not an address of this machine; set another `bind`",
}


class ServerLog(Logger):  # type: ignore[misc]
    """gunicorn's own log, which follows ours into a file and into JSON; set up anew at each reload."""

    def setup(self, cfg: Any) -> None:
        """See gunicorn's."""
        super().setup(cfg)
        logs.adopt(self.error_log)


class Hooks:
    """gunicorn's hooks, by their names there."""

    def __init__(self) -> None:
        """Ends the process where the configuration is faulty: now no port is open yet."""
        try:
            begun = start(path_from(os.environ), last_good=None)
        except ConfigError as error:
            sys.exit(str(error))
        self._directory = _runtime_directory()
        LastGood.create(self._directory, begun.sources, os.environ)
        self.config: Config = begun.config
        logs.configure(self.config.logging)

    def on_starting(self, server: Any) -> None:
        """Before any port is opened: the command line may set other addresses, users and workers."""
        self._check(server.address)
        if "GUNICORN_FD" not in os.environ and "LISTEN_FDS" not in os.environ:  # no sockets were inherited
            for address in server.address:
                _check_free(address)
        file = self.config.logging.file
        if file and server.cfg.uid != os.geteuid():
            with contextlib.suppress(OSError):  # a device, say
                os.chown(file, server.cfg.uid, server.cfg.gid)
        for path in (self._directory, *self._directory.glob("accepted-*")):
            if server.cfg.uid != os.geteuid():
                os.chown(path, server.cfg.uid, server.cfg.gid)
        self._prepare_ledger(server.cfg)
        # The environment may be that of the gunicorn that this one takes the place of.
        os.environ[INSTANCE] = secrets.token_hex(4)
        os.environ.pop(STATE_DIRECTORY, None)
        if server.cfg.workers > 1 and self.config.state is None:
            os.environ[STATE_DIRECTORY] = self._state_directory(server.cfg)

    def _prepare_ledger(self, cfg: Any) -> None:
        """Make the ledger's file, for the workers' user. Without it nobody could be held to a budget.

        A server may be away for a moment; the workers go on trying.
        """
        ledger = self.config.ledger
        if ledger is None or not ledger.file:
            return
        store = Store(ledger)
        try:
            store.has_changed()
        except LedgerError as error:
            reason = f"ledger: {ledger.file} cannot be written ({error})"
            if self.config.has_budgets:
                sys.exit(f"{reason}, and there are budgets: name another file in `ledger:`, or mend this one")
            self._say(f"{reason}: what is spent is not recorded", logging.WARNING)
        finally:
            store.close()
        if cfg.uid != os.geteuid():
            for path in Path(ledger.file).parent.glob(f"{Path(ledger.file).name}*"):
                os.chown(path, cfg.uid, cfg.gid)

    def _state_directory(self, cfg: Any) -> str:
        """A directory of the workers' user for the local store, in the instance's runtime directory."""
        directory = self._directory / "state"
        directory.mkdir(mode=0o700, exist_ok=True)
        os.chown(directory, cfg.uid, cfg.gid)
        return str(directory)

    def when_ready(self, server: Any) -> None:
        """Say where it listens and how to try it; sockets that were inherited are known only here."""
        self._check(listener.sock.getsockname() for listener in server.LISTENERS if hasattr(listener, "sock"))
        for warning in self.config.warnings:
            self._say(warning, logging.WARNING)
        if not self.config.may_serve_strangers:
            self._say("no api_keys are set: every user of this machine is served", logging.WARNING)
        if self.config.is_demo:
            self._say(
                "*** This is the demo: its upstreams answer in process, no account is used. "
                "Copy config.example.yaml to config.yaml and put in your own. ***"
            )
        address = str(server.LISTENERS[0])
        self._say(f"aiproxy serves {address} - try: {_example(self.config, address)}")

    def ssl_context(self, config: Any, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        """gunicorn's context, for connections on which requests can wait; only where it speaks TLS itself."""
        context = default()
        context.sslsocket_class = TlsClientSocket
        return context

    def _check(self, addresses: Iterable[Any]) -> None:
        try:
            check_addresses(self.config, addresses)
        except ConfigError as error:
            sys.exit(str(error))

    def _say(self, text: str, level: int = logging.INFO) -> None:
        """Printed as it stands for whoever reads along; a line of the log where that is a file or JSON."""
        if not self.config.logging.is_plain:
            logs.line(level, "start", message=text)
        else:
            print(f"warning: {text}" if level == logging.WARNING else text, flush=True)


def _check_free(address: Any) -> None:
    """Whether the address can be listened on. A server that is just ending has a moment to give it up."""
    if not isinstance(address, tuple):
        return
    for _ in range(_TRIES):
        error = _refusal(address)
        if error is None or error.errno != errno.EADDRINUSE:
            break
        time.sleep(1)
    if error is not None:
        hint = _HINTS.get(error.errno or 0, "set another `bind` or `listen`")
        sys.exit(f"{address[0]}:{address[1]} cannot be listened on ({error.strerror}): {hint}")


def _refusal(address: tuple[str, int]) -> OSError | None:
    """Why nobody can listen there; None if one can."""
    with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return error
    return None


def _runtime_directory() -> Path:
    """The instance's own: systemd's `RUNTIME_DIRECTORY`, else one that ends with this process."""
    if given := os.environ.get("RUNTIME_DIRECTORY"):
        directory = Path(given.partition(":")[0])
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory
    made = tempfile.mkdtemp(prefix="aiproxy-")
    atexit.register(_remove, made, os.getpid())
    return Path(made)


def _remove(folder: str, owner: int) -> None:
    """At the end of the master, not of a worker."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _example(config: Config, address: str) -> str:
    """A request by curl that an upstream of the configuration answers."""
    enabled = [upstream for upstream in config.upstreams if upstream.enabled]
    models = sorted(name for upstream in enabled for name in upstream.available_models)
    question = {"role": "user", "content": "Hi"}
    body = {"model": (models or ["claude-opus-4-8"])[0], "max_tokens": 100, "messages": [question]}
    words = ["curl", f"{address}/v1/messages"]
    if address.startswith("unix:"):
        words = ["curl", "--unix-socket", address.removeprefix("unix:"), "http://localhost/v1/messages"]
    if not config.is_demo:
        words += ["-H", "content-type: application/json", "-H", "anthropic-version: 2023-06-01"]
    if config.api_keys:
        words += ["-H", "x-api-key: ONE-OF-YOUR-api_keys"]
    return shlex.join([*words, "-d", json.dumps(body, separators=(",", ":"))])
