"""A real PostgreSQL server of its own, that can be stopped, killed and started again."""

import glob
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import psycopg
import pytest
from fakes import HOST, free_port

_BINARIES = sorted(glob.glob("/usr/lib/postgresql/*/bin")) or [
    os.path.dirname(shutil.which("postgres") or "")
]

needs_postgresql = pytest.mark.skipif(
    not _BINARIES[-1] and os.environ.get("AIPROXY_REQUIRE_ALL") != "1", reason="PostgreSQL is missing"
)


class PostgresqlServer:
    """Listens on a loopback port. PostgreSQL refuses to run as root, so root runs it as nobody."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"postgresql://tester@{HOST}:{self.port}/postgres"
        self._folder = Path(tempfile.mkdtemp(prefix="aiproxy-postgresql-"))
        self._as = ["setpriv", "--reuid=nobody", "--clear-groups"] if os.geteuid() == 0 else []
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self._as:
            shutil.chown(self._folder, "nobody")
        options = ["--username=tester", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"]
        self._run("initdb", *options, "--pgdata", str(self._folder / "data"))
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Start it on what it knew, and wait until it answers."""
        settings = ["fsync=off", f"unix_socket_directories={self._folder}", f"listen_addresses={HOST}"]
        options = [word for setting in settings for word in ("-c", setting)]
        command = [
            f"{_BINARIES[-1]}/postgres",
            "-D",
            str(self._folder / "data"),
            "-p",
            str(self.port),
            *options,
        ]
        self._process = subprocess.Popen(
            [*self._as, *command], cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        ends = time.monotonic() + 20
        while not self._answers():
            assert time.monotonic() < ends, "PostgreSQL does not start"
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """Stop it at once: connections break, and what was committed stays."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None

    def empty(self) -> None:
        """Remove the ledger's tables."""
        with psycopg.connect(self.url) as connection:
            connection.execute("DROP TABLE IF EXISTS exchange, daily, announced")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as, f"{_BINARIES[-1]}/{program}", *arguments]
        subprocess.run(command, cwd="/", check=True, stdout=subprocess.DEVNULL)
