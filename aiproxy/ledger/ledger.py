"""The ledger of one process: rows are queued by requests and written by one thread.

A request never waits for the disk or the server. Rows that could not be written stay in the queue and are
tried again; only when it is full are new ones dropped, and counted.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import TypeVar

from ..config import LedgerSettings
from ..observability import logs
from .rows import Exchange, day_of
from .spending import Spending, periods
from .store import LedgerError, Store

#: Seconds between two batches, and between two looks at what others have spent. A process that is killed
#: loses what it has spent in this time.
BATCH = 0.5
#: Rows that wait to be written, at most.
QUEUE = 10_000
#: Seconds for which a start waits for the sums, and a stop for the last batch.
_START, _STOP = 2.0, 3.0
#: Seconds after which sums that could not be read count as out of reach.
_OLD = 10.0
#: Seconds between two looks for rows that are too old, and how many are removed at a time.
_RETENTION, _FORGOTTEN = 3600.0, 1000
_DAY = 24 * 3600
_T = TypeVar("_T")


class Ledger:
    """Thread-safe."""

    def __init__(self, settings: LedgerSettings, clock: Callable[[], float]) -> None:
        """`clock`: Unix time."""
        self.spending = Spending()
        self.dropped = 0  # rows
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._queue: deque[Exchange] = deque()
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._is_read = threading.Event()
        self._problem: str | None = None
        self._read_at = self._tidied_at = float("-inf")
        self._read_from = "9999"  # the first day of the sums; earlier ones count when the clock is set back
        self._unread: Counter[tuple[str, str]] = Counter()  # written, and not in the sums yet

    @property
    def problem(self) -> str | None:
        """Why rows are not written at present, None if they are."""
        return self._problem

    @property
    def is_out_of_reach(self) -> bool:
        """Whether the sums are too old to hold budgets against."""
        return time.monotonic() - self._read_at > _OLD

    def start(self, is_awaited: bool) -> None:
        """Begin to write; `is_awaited`: return when the sums are known, or after a short time."""
        self._ensure_thread()
        if is_awaited:
            self._is_read.wait(_START)

    def stop(self) -> None:
        """Write what is left, for a short time at most."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_STOP)

    def add(self, row: Exchange) -> None:
        """Have a row written. Its cost counts at once."""
        self.spending.add(row.client, row.at, row.cost)
        with self._lock:
            is_full = len(self._queue) >= QUEUE
            if not is_full:
                self._queue.append(row)
            self.dropped += is_full
        self._ensure_thread()

    def read(self, question: Callable[[Store], _T]) -> _T:
        """The answer to a question, on a connection of its own. Raises `LedgerError`."""
        store = Store(self._settings)
        try:
            return question(store)
        finally:
            store.close()

    def _ensure_thread(self) -> None:
        """It is started by the first to need it, in the process that serves, and never twice."""
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._stopped.is_set():
                    self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        store: Store | None = None
        while True:
            is_last = self._stopped.is_set()
            try:
                store = store or Store(self._settings)
                self._turn(store)
                self._note(None)
            except LedgerError as error:
                self._note(str(error))
            except Exception:  # a bug must not end the writing
                logs.exception("bug", thread="ledger")
                with self._lock:
                    self.dropped += len(self._queue)
                    self._queue.clear()
            if is_last:
                break
            self._stopped.wait(BATCH)
        if store is not None:
            store.close()
        with self._lock:
            if self._queue:
                self.dropped += len(self._queue)
                logs.line(logging.ERROR, "ledger", result="dropped", rows=len(self._queue))
                self._queue.clear()

    def _turn(self, store: Store) -> None:
        self._write(store)
        first = min(period.first for period in periods(self._clock()).values())
        if store.has_changed() or self._unread or first < self._read_from:
            self.spending.replace(store.spent(first), self._unread)
            self._unread.clear()
            self._read_from = first
        now = self._read_at = time.monotonic()
        self._is_read.set()
        if now >= self._tidied_at + _RETENTION:
            before = self._clock() - self._settings.days * _DAY
            # Budgets need the sums of their periods, for however few days rows are kept.
            if store.forget(before, min(first, day_of(before)), _FORGOTTEN) < _FORGOTTEN:
                self._tidied_at = now

    def _write(self, store: Store) -> None:
        with self._lock:
            rows = list(self._queue)
        if not rows:
            return
        store.write(rows)
        for row in rows:
            self._unread[row.day, row.client] += row.cost
        with self._lock:
            for _ in rows:
                self._queue.popleft()

    def _note(self, problem: str | None) -> None:
        """Say once that the ledger is out of reach, and once that it is back."""
        if problem is None and self._problem is not None:
            logs.line(logging.INFO, "ledger", result="back", dropped=self.dropped or None)
        elif problem is not None and self._problem is None:
            logs.line(logging.ERROR, "ledger", result="away", reason=problem)
        self._problem = problem
