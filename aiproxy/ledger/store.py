"""The ledger's tables, in SQLite or in PostgreSQL: the statements are the same for both.

`exchange` holds a row for each exchange, `daily` their sums by day, client, model and upstream. Both change
in one transaction, and a row that is there already changes neither: what is written twice counts once.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from ..config import LedgerSettings
from .rows import Exchange, Sums

#: Seconds that a statement waits for another process's transaction, and a connection for its server.
PATIENCE = 5.0
_COLUMNS, _SUMS = Exchange.__struct_fields__, Sums.__struct_fields__
_KEY = ("day", "client", "model", "upstream")
#: Rows of one INSERT: SQLite takes 32,766 values, PostgreSQL 65,535.
_ROWS = 500
_TYPES = {str: "TEXT", int: "BIGINT", float: "DOUBLE PRECISION"}
_SCHEMA = [
    "CREATE TABLE IF NOT EXISTS exchange ("
    + ", ".join(f"{name} {_TYPES[type_]} NOT NULL" for name, type_ in Exchange.__annotations__.items())
    + ", PRIMARY KEY (id))",
    "CREATE INDEX IF NOT EXISTS exchange_at ON exchange (at)",
    "CREATE INDEX IF NOT EXISTS exchange_client ON exchange (client, at)",
    "CREATE INDEX IF NOT EXISTS exchange_outcome ON exchange (outcome, at)",
    "CREATE TABLE IF NOT EXISTS daily ("
    + ", ".join(f"{name} TEXT NOT NULL" for name in _KEY)
    + ", "
    + ", ".join(f"{name} BIGINT NOT NULL" for name in _SUMS)
    + f", PRIMARY KEY ({', '.join(_KEY)}))",
    "CREATE TABLE IF NOT EXISTS announced (what TEXT PRIMARY KEY, at DOUBLE PRECISION NOT NULL)",
]


class LedgerError(Exception):
    """The ledger cannot be reached, or refuses; the message holds no password."""


class Store:
    """One connection, made at the first use and again after an error. For one thread at a time."""

    def __init__(self, settings: LedgerSettings) -> None:
        self._settings = settings
        self._connection: Any = None
        self._error: type[Exception] = sqlite3.Error
        self._mark = "?"
        self._inode = 0
        self._version: int | None = None
        if settings.url:
            psycopg = _psycopg()
            self._error, self._mark = psycopg.Error, "%s"

    def close(self) -> None:
        """Give the connection back; raises nothing."""
        connection, self._connection = self._connection, None
        self._version = None  # each connection counts for itself
        if connection is not None:
            with contextlib.suppress(self._error):
                connection.close()

    def write(self, rows: Sequence[Exchange]) -> None:
        """Add the rows that are not there yet."""
        with self._transaction() as run:
            added = set()
            for start in range(0, len(rows), _ROWS):
                batch = rows[start : start + _ROWS]
                values = ", ".join([f"({', '.join(['?'] * len(_COLUMNS))})"] * len(batch))
                statement = (
                    f"INSERT INTO exchange ({', '.join(_COLUMNS)}) VALUES {values} "
                    "ON CONFLICT DO NOTHING RETURNING id"
                )
                parameters = [value for row in batch for value in msgspec.structs.astuple(row)]
                added |= {id_ for (id_,) in run(statement, *parameters)}
            sums: dict[tuple[str, ...], Sums] = {}
            for row in rows:
                if row.id in added:
                    added.remove(row.id)  # the same row twice among these counts once
                    key: tuple[str, ...] = (row.day, row.client, row.model, row.upstream)
                    sums[key] = sums.get(key, Sums()) + Sums.of(row)
            for key in sorted(sums):  # in one order, else two writers could wait for each other
                self._add(run, key, sums[key])

    @staticmethod
    def _add(run: Any, key: tuple[str, ...], sums: Sums) -> None:
        marks = ", ".join(["?"] * (len(_KEY) + len(_SUMS)))
        changes = ", ".join(f"{name} = daily.{name} + excluded.{name}" for name in _SUMS)
        statement = (
            f"INSERT INTO daily ({', '.join(_KEY + _SUMS)}) VALUES ({marks}) "
            f"ON CONFLICT ({', '.join(_KEY)}) DO UPDATE SET {changes}"
        )
        run(statement, *key, *msgspec.structs.astuple(sums))

    def has_changed(self) -> bool:
        """Whether others may have written since the last call; only SQLite can say that they have not."""
        with self._transaction(is_read=True) as run:
            version = run("PRAGMA data_version")[0][0] if self._settings.file else None
        is_same, self._version = version is not None and version == self._version, version
        return not is_same

    def spent(self, since: str) -> dict[tuple[str, str], int]:
        """Nano-dollars by day and client, from the day `since` on."""
        statement = "SELECT day, client, SUM(cost) FROM daily WHERE day >= ? GROUP BY day, client"
        with self._transaction(is_read=True) as run:
            return {(day, client): int(cost) for day, client, cost in run(statement, since)}

    def sums(self, since: str, by: str) -> dict[str, Sums]:
        """Sums from the day `since` on, by `client`, `model`, `upstream` or `day`."""
        if by not in _KEY:
            raise ValueError(by)
        columns = ", ".join(f"SUM({name})" for name in _SUMS)
        statement = f"SELECT {by}, {columns} FROM daily WHERE day >= ? GROUP BY {by} ORDER BY {by}"
        with self._transaction(is_read=True) as run:
            return {name: Sums(*map(int, figures)) for name, *figures in run(statement, since)}

    def exchanges(self, limit: int, client: str | None = None, outcome: str | None = None) -> list[Exchange]:
        """The latest rows, of one client or outcome where that is given, latest first."""
        wanted = {"client": client, "outcome": outcome}
        given = {name: value for name, value in wanted.items() if value is not None}
        where = f"WHERE {' AND '.join(f'{name} = ?' for name in given)} " if given else ""
        statement = f"SELECT {', '.join(_COLUMNS)} FROM exchange {where}ORDER BY at DESC LIMIT ?"
        with self._transaction(is_read=True) as run:
            return [Exchange(*row) for row in run(statement, *given.values(), limit)]

    def announce(self, what: str, at: float, again_after: float) -> bool:
        """Note that this is announced; False where that was done in the `again_after` seconds before `at`."""
        statement = (
            "INSERT INTO announced VALUES (?, ?) ON CONFLICT (what) DO UPDATE SET at = excluded.at "
            "WHERE announced.at < excluded.at - ? RETURNING what"
        )
        with self._transaction() as run:
            return bool(run(statement, what, at, again_after))

    def forget(self, before: float, day: str, limit: int) -> int:
        """Remove at most `limit` rows older than `before`, and sums of earlier days than `day`."""
        statement = (
            "DELETE FROM exchange WHERE id IN (SELECT id FROM exchange WHERE at < ? LIMIT ?) RETURNING 1"
        )
        with self._transaction() as run:
            run("DELETE FROM daily WHERE day < ? RETURNING 1", day)
            run("DELETE FROM announced WHERE at < ? RETURNING 1", before)
            return len(run(statement, before, limit))

    @contextlib.contextmanager
    def _transaction(self, is_read: bool = False) -> Iterator[Any]:
        """A function that carries out statements, in one transaction. Raises `LedgerError`."""
        try:
            connection = self._connected()
            if self._settings.file and not is_read:
                connection.execute("BEGIN IMMEDIATE")
            yield self._run
            connection.commit()
        except (self._error, OSError) as error:
            self.close()  # SQLite rolls back with it
            raise LedgerError(self._reason(error)) from error

    def _run(self, statement: str, *parameters: Any) -> list[Any]:
        cursor = self._connection.execute(statement.replace("?", self._mark), parameters)
        return list(cursor) if cursor.description else []

    def _connected(self) -> Any:
        if self._settings.file and self._connection is not None and self._is_replaced():
            self.close()  # the file was removed, or another one was put in its place
        if self._connection is None:
            self._connection = self._sqlite() if self._settings.file else self._postgresql()
        return self._connection

    def _is_replaced(self) -> bool:
        try:
            return os.stat(self._settings.file).st_ino != self._inode
        except OSError:
            return True

    def _sqlite(self) -> sqlite3.Connection:
        """The file is for its owner alone: it says who spent what."""
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._settings.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        connection = sqlite3.connect(self._settings.file, timeout=PATIENCE, check_same_thread=False)
        try:
            if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                connection.execute("PRAGMA journal_mode = WAL")  # takes the file for itself
            connection.execute("PRAGMA synchronous = NORMAL")
            self._create(connection)
            self._inode = os.stat(self._settings.file).st_ino
        except BaseException:
            connection.close()
            raise
        return connection

    def _postgresql(self) -> Any:
        connection = _psycopg().connect(
            str(self._settings.url),
            connect_timeout=int(PATIENCE),
            options=f"-c statement_timeout={PATIENCE * 1000:.0f}",
            # Without these a lost network is noticed after a quarter of an hour, and an idle one never.
            tcp_user_timeout=int(PATIENCE * 1000),
            keepalives_idle=int(PATIENCE),
            keepalives_interval=1,
            keepalives_count=int(PATIENCE),
            application_name="aiproxy",
            prepare_threshold=None,  # a pooler may give each transaction another connection
        )
        try:
            connection.execute("SELECT pg_advisory_xact_lock(7105116)")  # two may create the tables at once
            self._create(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    @staticmethod
    def _create(connection: Any) -> None:
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.commit()

    def _reason(self, error: Exception) -> str:
        """In the database's words, without its password."""
        reason = " ".join(str(error).split())[:300].replace(self._settings.url or "\0", "...")
        password = urlsplit(self._settings.url).password
        return reason.replace(password, "...") if password else reason


def _psycopg() -> Any:
    """The driver, imported only where a server is used. Raises `LedgerError`."""
    try:
        import psycopg  # noqa: PLC0415
    except ImportError as error:
        raise LedgerError(f"{error}: pip install -r requirements.txt") from error
    return psycopg
