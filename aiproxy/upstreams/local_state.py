"""The store of one gunicorn with several workers: two SQLite files in a directory of that gunicorn.

Snapshots have a file of their own, because each write would change the other file's `data_version`. A file
that was deleted is made anew under another name: SQLite removes the `-wal` file of a deleted file by its
name when its last connection is closed. A symbolic link names the file in use.
"""

import contextlib
import fcntl
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from .shared_state import Reading, Record, StoreError

#: The version of the tables below. An upgrade runs the old and the new version side by side.
SCHEMA = 1
#: Seconds that a statement waits for another process.
_BUSY = 0.5
_TABLES = """
CREATE TABLE epoch (id TEXT, joined INTEGER);
CREATE TABLE field (id TEXT, name TEXT, value REAL, PRIMARY KEY (id, name)) WITHOUT ROWID;
CREATE TABLE backoff (id TEXT, model TEXT, ends REAL, PRIMARY KEY (id, model)) WITHOUT ROWID;
CREATE TABLE trial (id TEXT PRIMARY KEY, token TEXT, ends REAL) WITHOUT ROWID;
CREATE TABLE owner (message TEXT PRIMARY KEY, upstream TEXT, ends REAL) WITHOUT ROWID;
CREATE INDEX owner_ends ON owner (ends);
"""


class LocalStore:
    """Its time is the machine's monotonic clock."""

    interval: float | None = 0.05

    def __init__(self, directory: str) -> None:
        """`directory`: of this gunicorn, writable for its workers."""
        self._directory = Path(directory)
        self._link = self._directory / f"state-{SCHEMA}.sqlite"
        self._connection: sqlite3.Connection | None = None
        self._version = 0
        self._inodes: list[int] = []
        self._compared = 0.0

    def connect(self, on_change: Callable[[], None]) -> None:
        with _errors():
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self._directory / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not all(path.exists() for path in self._files()):
                    self._create()
                self._inodes = [path.stat().st_ino for path in self._files()]
                self._connection = _open(*self._files())
        self._run("UPDATE epoch SET joined = joined + 1")

    def _files(self) -> list[Path]:
        """The two files in use."""
        path = self._link.resolve()
        return [path, path.with_suffix(".snapshots")]

    def _create(self) -> None:
        name = f"state-{SCHEMA}-{secrets.token_hex(4)}"
        path = self._directory / f"{name}.sqlite"
        with contextlib.closing(_open(path, path.with_suffix(".snapshots"))) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA snapshots.journal_mode = WAL")
            connection.executescript(_TABLES)
            connection.execute("INSERT INTO epoch VALUES (?, 0)", [name])
            connection.execute("CREATE TABLE snapshots.row (worker TEXT PRIMARY KEY, content BLOB)")
            places = "client TEXT, worker TEXT, count INTEGER, ends REAL, PRIMARY KEY (client, worker)"
            connection.execute(f"CREATE TABLE snapshots.place ({places}) WITHOUT ROWID")
        new = self._directory / f"{name}.link"
        new.symlink_to(path.name)
        new.replace(self._link)

    def disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def now(self) -> float:
        return time.monotonic()

    def has_changed(self) -> bool:
        """Once a second it also finds out whether the files are still in their place."""
        if time.monotonic() > self._compared + 1:
            self._compared = time.monotonic()
            with _errors():
                if [path.stat().st_ino for path in self._files()] != self._inodes:
                    raise StoreError("the file was replaced")
        ((version,),) = self._run("PRAGMA main.data_version")
        was, self._version = self._version, version
        return bool(was != version)

    def problem(self) -> str | None:
        return None

    def read(self, ids: Sequence[str]) -> Reading:
        with self._transaction("BEGIN"):
            ((epoch,),) = self._run("SELECT id FROM epoch")
            fields = self._run("SELECT id, name, value FROM field")
            trials = self._run("SELECT id, token FROM trial WHERE ends > ?", self.now())
            backoffs = self._run("SELECT id, model, ends FROM backoff WHERE ends > ?", self.now())
        found: dict[str, dict[str, Any]] = {id_: {"backoffs": {}} for id_ in ids}
        for id_, name, value in [*fields, *((id_, "trial", token) for id_, token in trials)]:
            found.get(id_, {})[name] = value
        for id_, model, ends in backoffs:
            if id_ in found:
                found[id_]["backoffs"][model] = ends
        return Reading(
            epoch, {id_: msgspec.convert(each, Record, strict=False) for id_, each in found.items()}
        )

    def count_failure(self, id_: str) -> int:
        statement = (
            "INSERT INTO field VALUES (?, 'failures', 1) "
            "ON CONFLICT DO UPDATE SET value = value + 1 RETURNING value"
        )
        ((count,),) = self._run(statement, id_)
        return int(count)

    def put(self, id_: str, field: str, value: float, only_if_absent: bool = False) -> None:
        self._run(
            f"INSERT OR {'IGNORE' if only_if_absent else 'REPLACE'} INTO field VALUES (?, ?, ?)",
            id_,
            field,
            value,
        )

    def remove(self, id_: str, *fields: str) -> None:
        for field in fields:
            self._run("DELETE FROM field WHERE id = ? AND name = ?", id_, field)
        if "backoffs" in fields:
            self._run("DELETE FROM backoff WHERE id = ?", id_)

    def back_off(self, id_: str, model: str, until: float) -> None:
        statement = (
            "INSERT INTO backoff VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET ends = max(ends, excluded.ends)"
        )
        self._run("DELETE FROM backoff WHERE ends < ?", self.now())
        self._run(statement, id_, model, until)

    def end_backoff(self, id_: str, model: str) -> None:
        self._run("DELETE FROM backoff WHERE id = ? AND model = ?", id_, model)

    def take_trial(self, id_: str, token: str, seconds: float) -> bool:
        now = self.now()
        with self._transaction("BEGIN IMMEDIATE"):
            if self._run("SELECT 1 FROM field WHERE id = ? AND name = 'open' AND value > ?", id_, now):
                return False
            self._run("DELETE FROM trial WHERE ends <= ?", now)
            statement = "INSERT OR IGNORE INTO trial VALUES (?, ?, ?) RETURNING 1"
            return bool(self._run(statement, id_, token, now + seconds))

    def renew_trial(self, id_: str, seconds: float) -> None:
        self._run("UPDATE trial SET ends = ? WHERE id = ?", self.now() + seconds, id_)

    def end_trial(self, id_: str) -> None:
        self._run("DELETE FROM trial WHERE id = ?", id_)

    def remember(self, message_id: str, upstream: str, seconds: float) -> None:
        """The time of each statement is bounded: some expired messages are removed with it."""
        now = self.now()
        expired = "SELECT message FROM owner WHERE ends < ? LIMIT 10"
        with self._transaction("BEGIN IMMEDIATE"):
            self._run(f"DELETE FROM owner WHERE message IN ({expired})", now)
            self._run("INSERT OR REPLACE INTO owner VALUES (?, ?, ?)", message_id, upstream, now + seconds)

    def owner(self, message_id: str) -> str | None:
        found = self._run("SELECT upstream FROM owner WHERE message = ? AND ends > ?", message_id, self.now())
        return found[0][0] if found else None

    def hold_places(
        self, client: str, worker: str, count: int, seconds: float, limit: int | None = None
    ) -> bool:
        now = self.now()
        with self._transaction("BEGIN IMMEDIATE"):
            self._run("DELETE FROM snapshots.place WHERE ends < ?", now)
            others = "SELECT total(count) FROM snapshots.place WHERE client = ? AND worker != ?"
            if limit is not None and self._run(others, client, worker)[0][0] + count > limit:
                return False
            row = (client, worker, count, now + seconds)
            self._run("INSERT OR REPLACE INTO snapshots.place VALUES (?, ?, ?, ?)", *row)
        return True

    def write_row(self, worker: str, row: bytes) -> None:
        self._run("INSERT OR REPLACE INTO snapshots.row VALUES (?, ?)", worker, row)

    def rows(self) -> dict[str, bytes]:
        return dict(self._run("SELECT worker, content FROM snapshots.row"))

    def replace_rows(self, workers: Sequence[str], worker: str = "", row: bytes = b"") -> None:
        with self._transaction("BEGIN IMMEDIATE"):
            for each in workers:
                self._run("DELETE FROM snapshots.row WHERE worker = ?", each)
            if worker:
                self.write_row(worker, row)

    def _run(self, statement: str, *values: Any) -> list[Any]:
        with _errors():
            if self._connection is None:
                raise StoreError("not connected")
            return self._connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        self._run(begin)
        try:
            yield
        except BaseException:
            with contextlib.suppress(StoreError):
                self._run("ROLLBACK")
            raise
        self._run("COMMIT")


def _open(path: Path, snapshots: Path) -> sqlite3.Connection:
    """Both files, by one connection that commits each statement, without waiting for the disk."""
    connection = sqlite3.connect(path, timeout=_BUSY, isolation_level=None)
    connection.execute("ATTACH ? AS snapshots", [str(snapshots)])
    connection.execute("PRAGMA main.synchronous = OFF")
    connection.execute("PRAGMA snapshots.synchronous = OFF")
    return connection


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreError(str(error)) from error
