"""Shared state: what workers and machines know in common. The interface of a store, and the decisions on it.

Each worker decides on local copies: its own breakers. One thread per worker talks to the store. It sends
what changed here, reads all records once a second and when another worker changed one, and writes a
snapshot of this worker. A request waits for that thread only after a failure, before a trial and for the
owner of a message thread, for less than 0.1 s in all. Without the store every worker decides alone.
"""

import contextlib
import logging
import os
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import msgspec

from ..observability import logs
from .breaker import Breaker, Change, Event, Pass, Permit, View
from .models import ModelStates

#: What the gunicorn master puts into the environment of its workers: a random id, and the directory of the
#: local store, which there is only with several workers.
INSTANCE, STATE_DIRECTORY = "AIPROXY_INSTANCE", "AIPROXY_STATE_DIRECTORY"
#: Seconds between two reads of all records, two snapshots, and two attempts to reach the store.
PERIOD = 1.0
#: Seconds after which a trial ends whose worker does not renew it.
TRIAL = 5.0
#: Seconds that one request waits for the store, in all.
PATIENCE = 0.08
#: Seconds that the start of a worker waits for the store.
START = 0.5
#: Seconds for which no request waits, after one has waited in vain.
DOUBT = 1.0
#: Seconds after which a worker that writes no snapshot counts as ended.
SNAPSHOT = 5.0
#: Seconds for which the owner of a message is remembered, far longer than an idle thread lives.
OWNER = 3600.0
#: Seconds for which the row of an ended worker stays while no worker of its gunicorn runs.
_ENDED = 3600.0
#: Seconds until a worker whose trial was refused asks for one again.
_AGAIN = 0.1
#: Seconds for which a closed circuit is not opened again by a worker that only remembers it as open.
_CLOSED = 10.0
#: Rows of ended workers of one gunicorn that are kept before they are added up.
_ROWS = 8
#: Seconds after which the rows of the previous call are too old.
_ROWS_AGE = 60.0
#: Characters of an id of a message; a longer one is not remembered.
LONGEST_ID = 200
_T = TypeVar("_T")
#: Makes one snapshot of several.
Merge = Callable[[list[msgspec.Raw]], bytes]


class StoreError(Exception):
    """The store cannot be reached, or refuses; the message holds no secret."""


class Record(msgspec.Struct):
    """What the store holds of one upstream; times are the store's, in seconds."""

    failures: int = 0  # in a row
    open: float | None = None  # open until then; None: closed
    drained: float | None = None  # 1: by hand; 0: in use again
    closed: float = 0.0  # when it was closed last
    trial: str = ""  # whose trial runs
    backoffs: dict[str, float] = {}  # until when, by model; "" is the whole upstream


class Reading(msgspec.Struct, frozen=True):
    """All records at one moment; `epoch` is another one after the store has lost what it held."""

    epoch: str
    records: dict[str, Record]


class Store(Protocol):
    """One file or server. Only the state's thread calls it; each method raises `StoreError`."""

    interval: float | None  # seconds between two calls of `has_changed`; None: it calls `on_change`

    def connect(self, on_change: Callable[[], None]) -> None:
        """Connect, and write something: a store that takes no changes is of no use."""

    def disconnect(self) -> None:
        """Give the connection back; raises nothing."""

    def now(self) -> float:
        """The store's time in seconds, the same for all its workers."""

    def has_changed(self) -> bool:
        """Whether another worker has changed a record since the last call."""

    def problem(self) -> str | None:
        """Why changes by other workers do not arrive at once, None if they do."""

    def read(self, ids: Sequence[str]) -> Reading:
        """The records of these upstreams."""

    def count_failure(self, id_: str) -> int:
        """Add one to `failures` and return the count."""

    def put(self, id_: str, field: str, value: float, only_if_absent: bool = False) -> None:
        """Set `failures`, `open`, `drained` or `closed`."""

    def remove(self, id_: str, *fields: str) -> None:
        """Remove such fields, or `backoffs`, all of them."""

    def back_off(self, id_: str, model: str, until: float) -> None:
        """Set a backoff, unless it ends later already."""

    def end_backoff(self, id_: str, model: str) -> None:
        """Remove one backoff."""

    def take_trial(self, id_: str, token: str, seconds: float) -> bool:
        """Begin a trial where none runs and the circuit is not open; whether that was so."""

    def renew_trial(self, id_: str, seconds: float) -> None:
        """Prolong the trial."""

    def end_trial(self, id_: str) -> None:
        """Remove the trial."""

    def remember(self, message_id: str, upstream: str, seconds: float) -> None:
        """Note the owner of a message."""

    def owner(self, message_id: str) -> str | None:
        """The owner of a message."""

    def hold_places(
        self, client: str, worker: str, count: int, seconds: float, limit: int | None = None
    ) -> bool:
        """Note that a worker holds so many places of a client key, for so many seconds.

        With a `limit` only if all workers together then hold at most so many; whether that was so.
        """

    def write_row(self, worker: str, row: bytes) -> None:
        """Replace a worker's row; no other worker is notified."""

    def rows(self) -> dict[str, bytes]:
        """All rows by worker."""

    def replace_rows(self, workers: Sequence[str], worker: str = "", row: bytes = b"") -> None:
        """Remove these rows, and write another in their place, in one step."""


class Row(msgspec.Struct, frozen=True):
    """What one worker wrote of itself; `at` is the store's time."""

    at: float
    instance: str  # of which gunicorn: a random id
    has_ended: bool
    snapshot: msgspec.Raw

    def is_running(self, now: float) -> bool:
        """Whether its worker still writes."""
        return not self.has_ended and self.at > now - SNAPSHOT


class Rows(msgspec.Struct, frozen=True):
    """What the workers wrote: snapshots with the id of their gunicorn."""

    running: list[tuple[str, msgspec.Raw]] = []  # the other workers
    ended: list[tuple[str, msgspec.Raw]] = []  # workers that ended, of gunicorns that run
    silent: list[tuple[str, msgspec.Raw]] = []  # workers of gunicorns none of whose workers writes any more
    problem: str | None = None  # why the rows of other workers are not known


class Shared:
    """The other workers' side of one upstream; here, that of an upstream that no other worker knows."""

    def may_try(self, permit: Permit) -> bool:
        """Whether the trial that this permit allows may begin: if not, the permit has been given back."""
        return True

    def report(self, change: Change, permit: Permit | None = None) -> None:
        """Its circuit changed here, by an attempt with that permit or by hand."""

    def drain(self, draining: bool) -> None:
        """It was drained here, or taken back in."""

    def model_backed_off(self, model: str, seconds: float) -> None:
        """One model is not asked for so long."""

    def model_recovered(self, model: str) -> None:
        """The backoff of one model has ended early."""


class Sharing(Protocol):
    """What is shared of an upstream."""

    name: str
    breaker: Breaker
    draining: bool
    models: ModelStates
    shared: Shared

    @property
    def id(self) -> str:
        """The same in all processes that mean the same account."""


class State:
    """The state of a worker by itself, and the interface of `SharedState`. Thread-safe."""

    is_shared = False
    has_machines = False  # there may be other gunicorns
    instance = ""

    def __init__(self) -> None:
        self._places_lock = threading.Lock()
        self._places: Counter[str] = Counter()  # of this worker, by client key

    def share(self, upstreams: Sequence[Sharing]) -> None:
        """These upstreams are served from now on."""

    def start(self, snapshot: Callable[[], bytes], merge: Merge, is_busy: Callable[[], bool]) -> None:
        """This worker serves from now on.

        `snapshot` makes the JSON that describes it, `merge` makes one of several that ended workers wrote.
        """

    def stop(self) -> None:
        """It does not serve any longer."""

    def remember(self, message_id: str, upstream: str) -> None:
        """Note which upstream made a message of a thread."""

    def owner(self, message_id: str) -> str | None:
        """The name of the upstream that made the message, if another worker has noted it."""
        return None

    def rows(self) -> Rows:
        """What the other workers wrote."""
        return Rows()

    def acquire_place(self, client: str, limit: int) -> bool:
        """Take one of the places of a client key, of which there are `limit`; whether one was free."""
        with self._places_lock:
            is_free = self._places[client] < limit
            self._places[client] += is_free
            return is_free

    def release_place(self, client: str) -> None:
        """Give it back."""
        with self._places_lock:
            self._places[client] -= 1


class SharedState(State):
    """See `State`."""

    is_shared = True

    def __init__(self, store: Store, instance: str) -> None:
        """`instance`: the random id of this gunicorn."""
        super().__init__()
        self._store = store
        self.has_machines = store.interval is None
        self.instance = instance
        self.worker = ""  # another one in each process
        self._circuits: dict[str, _Circuit] = {}
        self._snapshot: Callable[[], bytes] = lambda: b"null"
        self._merge: Merge = lambda snapshots: b"null"
        self._is_busy: Callable[[], bool] = lambda: False
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._turn = threading.Condition()
        self._orders: deque[tuple[Callable[[Store], Any], Future[Any]]] = deque()
        self._is_joined = False
        self._is_known = threading.Event()  # the records were read, or cannot be
        self._changed = True
        self._epoch = ""
        self._problem: str | None = None
        self._next = 0.0  # when the next read and the next snapshot are due
        self._doubted_until = 0.0
        self._waited = threading.local()
        self._rows = (float("-inf"), Rows())
        self._added_up = 0.0
        self._deaf: str | None = None

    # --- For requests ---

    def share(self, upstreams: Sequence[Sharing]) -> None:
        """See `State`. An upstream that leaves the configuration, or is new in it, is not drained."""
        old, circuits = dict(self._circuits), {}
        for upstream in upstreams:
            circuit = old.pop(upstream.id, None) or _Circuit(self, upstream)
            circuits[upstream.id] = circuit
            circuit.belong_to(upstream)
        self._circuits = circuits
        for circuit in old.values():
            circuit.end()
        self.look()

    def start(self, snapshot: Callable[[], bytes], merge: Merge, is_busy: Callable[[], bool]) -> None:
        """See `State`. Waits shortly for the records, so that the first request knows of open circuits."""
        self.worker = f"{self.instance}-{os.getpid()}-{secrets.token_hex(4)}"
        self._snapshot, self._merge, self._is_busy = snapshot, merge, is_busy
        self._thread = threading.Thread(target=self._run, name="state", daemon=True)
        self._thread.start()
        self._is_known.wait(START)

    def stop(self) -> None:
        """See `State`. Sends what is not sent yet, for at most a second."""
        self._stopped.set()
        with self._turn:
            self._turn.notify()
        if self._thread is not None:
            self._thread.join(PERIOD)

    def remember(self, message_id: str, upstream: str) -> None:
        """See `State`. Waits, because the client may continue the thread at once at another worker."""
        self.call(lambda store: store.remember(_key(message_id), upstream, OWNER))

    def owner(self, message_id: str) -> str | None:
        """See `State`."""
        return self.call(lambda store: store.owner(_key(message_id)))

    def rows(self) -> Rows:
        """See `State`. Where the store does not answer in time, as at the previous call."""
        rows = self.call(self._read_rows)
        if rows is not None:
            self._rows = (time.monotonic(), rows)
        read_at, rows = self._rows
        if not self._is_joined or read_at < time.monotonic() - _ROWS_AGE:
            return Rows(problem=self._problem or "the store does not answer")
        return rows

    def _read_rows(self, store: Store) -> Rows:
        now, seen = store.now(), _decoded(store.rows())
        seen.pop(self.worker, None)
        running = {name for name, row in seen.items() if row.is_running(now)}
        instances = {seen[name].instance for name in running} | {self.instance}
        rows = Rows(problem=self._deaf)
        for name, row in seen.items():
            if name in running:
                rows.running.append((row.instance, row.snapshot))
            elif row.instance in instances:
                rows.ended.append((row.instance, row.snapshot))
            elif not row.has_ended:
                rows.silent.append((row.instance, row.snapshot))
        return rows

    def acquire_place(self, client: str, limit: int) -> bool:
        """See `State`. Where the store does not answer in time, this worker's own count decides.

        What a worker holds is the truth, and is written to the store once a second: so an answer that comes
        too late costs no place.
        """
        if self._places[client] >= limit:
            return False
        ticket = _Ticket()

        def take(store: Store) -> bool:
            with self._places_lock:
                wanted = self._places[client] + 1
            is_free = store.hold_places(client, self.worker, wanted, SNAPSHOT, limit)
            with self._places_lock:
                ticket.is_granted = is_free and not ticket.is_given_up
                self._places[client] += ticket.is_granted
            return is_free

        is_free = self.call(take)
        with self._places_lock:
            if is_free is not None or ticket.is_granted:
                return ticket.is_granted
            ticket.is_given_up = True
        return super().acquire_place(client, limit)

    def release_place(self, client: str) -> None:
        """See `State`. Does not wait for the store."""
        super().release_place(client)
        self.send(lambda store: self._write_places(store, client))

    def _write_places(self, store: Store, client: str) -> None:
        with self._places_lock:
            count = self._places[client]
        store.hold_places(client, self.worker, count, SNAPSHOT)

    def send(self, operation: Callable[[Store], _T]) -> "Future[_T] | None":
        """Have it carried out by the state's thread; None where the store cannot be reached."""
        answer: Future[_T] = Future()
        with self._turn:
            if not self._is_joined:
                return None
            self._orders.append((operation, answer))
            self._turn.notify()
        return answer

    def call(self, operation: Callable[[Store], _T]) -> _T | None:
        """The operation's result; None where it does not come while this request may wait."""
        answer = self.send(operation)
        return None if answer is None else self.wait(answer)

    def wait(self, answer: "Future[_T]") -> _T | None:
        """The result; None where it does not come in time."""
        began = time.monotonic()
        since, waited = getattr(self._waited, "by", (began, 0.0))
        if began - since > DOUBT:  # another request, or a long one
            since, waited = began, 0.0
        patience = 0.0 if self.is_doubted else max(0.0, PATIENCE - waited)
        try:
            return answer.result(patience)
        except TimeoutError:
            if patience > 0:
                self._doubted_until = time.monotonic() + DOUBT
        except Exception:  # the state's thread has logged it
            return None
        finally:
            self._waited.by = since, waited + time.monotonic() - began
        return None

    @property
    def is_doubted(self) -> bool:
        """Whether a request has just waited in vain."""
        return time.monotonic() < self._doubted_until

    def look(self) -> None:
        """Read all records as soon as possible."""
        with self._turn:
            self._changed = True
            self._turn.notify()

    # --- The thread ---

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                if not self._is_joined:
                    self._join()
                self._carry_out()
                has_changed = self._store.has_changed()
                if time.monotonic() >= self._next:
                    self._beat()
                elif self._changed or has_changed:
                    self._look()
                self._pause()
            except StoreError as error:
                self._lose(str(error))
            except Exception:
                logs.exception("bug", thread="state")
                self._lose("bug")
        try:
            if self._is_joined:
                self._carry_out()
                self._write_row(has_ended=True)
        except StoreError:
            pass  # the row of this worker expires
        self._store.disconnect()

    def _join(self) -> None:
        self._store.connect(self.look)
        self._beat()
        with self._turn:
            self._is_joined = True
        self._problem = None
        self._is_known.set()
        logs.line(logging.INFO, "state", result="joined")

    def _lose(self, reason: str) -> None:
        """Every worker decides alone from now on, until the store can be reached again."""
        with self._turn:
            self._is_joined = False
            orders, self._orders = self._orders, deque()
        for _, answer in orders:
            answer.set_exception(StoreError(reason))
        if self._problem is None:
            text = "each worker decides alone"
            logs.line(logging.WARNING, "state", result="away", reason=reason, text=text)
        self._problem = reason
        self._is_known.set()
        self._store.disconnect()
        self._stopped.wait(PERIOD)

    def _pause(self) -> None:
        """Until there is something to do."""
        seconds = self._next - time.monotonic()
        if self._store.interval is not None and self._is_busy():
            seconds = min(seconds, self._store.interval)
        with self._turn:
            if not self._orders and not self._changed and not self._stopped.is_set() and seconds > 0:
                self._turn.wait(seconds)

    def _carry_out(self) -> None:
        while self._orders:
            with self._turn:
                operation, answer = self._orders.popleft()
            try:
                answer.set_result(operation(self._store))
            except BaseException as error:
                answer.set_exception(error)
                if isinstance(error, StoreError):
                    raise
                logs.exception("bug", thread="state")
            self._doubted_until = 0.0

    def _beat(self) -> None:
        """What is done once a second."""
        self._next = time.monotonic() + PERIOD
        for circuit in list(self._circuits.values()):
            circuit.send_again(self._store)
        self._look()
        for circuit in list(self._circuits.values()):
            circuit.renew(self._store)
        self._write_row()
        for client in [client for client, count in self._places.copy().items() if count]:
            self._write_places(self._store, client)
        if time.monotonic() > self._added_up + 60:
            self._added_up = time.monotonic()
            self._add_up(self._store)
        deaf = self._store.problem()
        if deaf is not None and self._deaf is None:
            text = "changes by other workers arrive a second late"
            logs.line(logging.WARNING, "state", result="deaf", reason=deaf, text=text)
        self._deaf = deaf

    def _look(self) -> None:
        """Read all records. A store that has lost what it held receives what this worker remembers."""
        self._changed = False
        circuits = dict(self._circuits)
        reading = self._store.read(list(circuits))
        if reading.epoch != self._epoch:
            for id_, circuit in circuits.items():
                circuit.restore(self._store, reading.records[id_])
            self._epoch = reading.epoch
            reading = self._store.read(list(circuits))
        now = self._store.now()
        for id_, circuit in circuits.items():
            circuit.follow(reading.records[id_], now)

    def _add_up(self, store: Store) -> None:
        """Replace many rows of ended workers by one; remove those of gunicorns that ended long ago."""
        now, seen = store.now(), _decoded(store.rows())
        running = {row.instance for row in seen.values() if row.is_running(now)}
        gone = [name for name, row in seen.items() if row.instance not in running and row.at < now - _ENDED]
        if gone:
            store.replace_rows(gone)
        old = {name: row for name, row in seen.items() if row.instance == self.instance and row.at < now - 60}
        key = f"rows {self.instance}"
        if len(old) > _ROWS and store.take_trial(key, self.worker, TRIAL):
            merged = self._merge([row.snapshot for row in old.values()])
            row = Row(now - 60, self.instance, True, msgspec.Raw(merged))
            store.replace_rows(list(old), f"{self.instance}-{secrets.token_hex(4)}", msgspec.json.encode(row))
            store.end_trial(key)

    def _write_row(self, has_ended: bool = False) -> None:
        row = Row(self._store.now(), self.instance, has_ended, msgspec.Raw(self._snapshot()))
        self._store.write_row(self.worker, msgspec.json.encode(row))


class _Ticket:
    """One try for a place of a client key: granted by the state's thread, or given up by the request's."""

    def __init__(self) -> None:
        self.is_granted = False
        self.is_given_up = False


class _Circuit(Shared):
    """See `Shared`. While changes of this worker are on their way, it does not follow the store."""

    def __init__(self, state: SharedState, upstream: Sharing) -> None:
        self.id = upstream.id
        self._state = state
        self._upstream = upstream
        self._lock = threading.Lock()
        self._pending = 0
        self._runs_trial = False
        self._granted_until = 0.0  # a trial was granted too late for its request
        self._unsent: dict[str, Callable[[Store], Any]] = {}
        self._closed_at = -_CLOSED

    def belong_to(self, upstream: Sharing) -> None:
        """This upstream stands for the account from now on. A reload ends a drain."""
        old, self._upstream = self._upstream, upstream
        upstream.shared = self
        if old.draining and not upstream.draining:
            self.drain(False)

    def end(self) -> None:
        """The upstream is not configured any more."""
        if self._upstream.draining:
            self.drain(False)

    # --- For requests ---

    def may_try(self, permit: Permit) -> bool:
        """See `Shared`. Where the store is out of reach, every worker has its own trial."""
        if time.monotonic() >= self._granted_until:
            if self._state.is_doubted:
                return True
            answer = self._state.send(self._take_trial)
            if answer is not None and not self._state.wait(answer) and self._is_refused(answer):
                self._upstream.breaker.defer(permit, _AGAIN)
                return False
        self._granted_until = 0.0
        self._runs_trial = True
        return True

    def _take_trial(self, store: Store) -> bool:
        granted = store.take_trial(self.id, self._state.worker, TRIAL)
        if granted:
            self._granted_until = time.monotonic() + TRIAL / 2
        return granted

    def _is_refused(self, answer: "Future[bool]") -> bool:
        """Whether another worker has the trial, or may have it: no answer yet."""
        return not answer.done() or (answer.exception() is None and not answer.result())

    def report(self, change: Change, permit: Permit | None = None) -> None:
        """See `Shared`."""
        is_trial = permit is not None and permit.kind is Pass.TRIAL
        holds_trial = is_trial and self._runs_trial
        if is_trial or change.event is Event.CLOSED:
            self._runs_trial, self._granted_until = False, 0.0
        if change.event is Event.CLOSED:
            self._closed_at = time.monotonic()
            self._send("circuit", self._close)
        elif change.event is Event.RECOVERED:
            self._send("", lambda store: store.remove(self.id, "failures"))
        elif change.event is Event.RETURNED:
            if holds_trial:  # not where this worker decided alone: then it may be another worker's
                self._send("", lambda store: store.end_trial(self.id))
        elif change.event is Event.BACKED_OFF:
            self._back_off("", change.seconds, holds_trial)
        elif is_trial:
            self._send("circuit", lambda store: self._open_again(store, change.seconds))
        else:
            answer = self._send("failure", lambda store: self._count(store, change))
            if answer is not None:
                self._state.wait(answer)

    def _count(self, store: Store, change: Change) -> None:
        """One more failure; whoever reaches the threshold opens the circuit for all."""
        breaker = self._upstream.breaker
        count = store.count_failure(self.id)
        if change.event is Event.OPENED or count >= breaker.threshold:
            store.put(self.id, "open", store.now() + breaker.cooldown, only_if_absent=True)
            opened = breaker.reach(count)
            if opened is not None:
                logs.circuit(self._upstream.name, opened.event, opened.seconds)

    def _close(self, store: Store) -> None:
        store.remove(self.id, "open", "failures", "backoffs")
        store.put(self.id, "closed", store.now())
        store.end_trial(self.id)

    def _open_again(self, store: Store, seconds: float) -> None:
        """First the record, so that a trial that begins next sees it."""
        store.put(self.id, "open", store.now() + seconds)
        store.count_failure(self.id)
        store.end_trial(self.id)

    def _back_off(self, model: str, seconds: float, ends_trial: bool = False) -> None:
        ends = time.monotonic() + seconds

        def back_off(store: Store) -> None:
            store.back_off(self.id, model, store.now() + ends - time.monotonic())
            if ends_trial:
                store.end_trial(self.id)

        self._send(f"backoff {model}", back_off)

    def drain(self, draining: bool) -> None:
        """See `Shared`."""
        self._send("drain", lambda store: store.put(self.id, "drained", float(draining)))

    def model_backed_off(self, model: str, seconds: float) -> None:
        """See `Shared`."""
        self._back_off(model, seconds)

    def model_recovered(self, model: str) -> None:
        """See `Shared`."""
        self._send(f"backoff {model}", lambda store: store.end_backoff(self.id, model))

    def _send(self, kind: str, operation: Callable[[Store], Any]) -> "Future[Any] | None":
        """Send a change. One that does not arrive is sent later, the latest of each kind."""
        with self._lock:
            self._pending += 1
        answer = self._state.send(operation)

        def done(answer: "Future[Any] | None") -> None:
            with self._lock:
                self._pending -= 1
                if (answer is None or answer.exception() is not None) and kind not in ("", "failure"):
                    self._unsent[kind] = operation
            self._state.look()  # what came meanwhile was not followed

        if answer is None:
            done(None)
        else:
            answer.add_done_callback(done)
        return answer

    # --- For the state's thread ---

    def send_again(self, store: Store) -> None:
        """What did not arrive while the store was out of reach."""
        for kind in list(self._unsent):
            self._unsent[kind](store)
            del self._unsent[kind]

    def restore(self, store: Store, record: Record) -> None:
        """Write what this worker remembers, unless another one has just closed the circuit."""
        view, now = self._upstream.breaker.view(), store.now()
        if self._upstream.draining:
            store.put(self.id, "drained", 1.0, only_if_absent=True)
        if self._closed_at > time.monotonic() - _CLOSED and view.open_for is None:
            self._close(store)
        if record.closed > now - _CLOSED:
            return
        if view.failures:
            store.put(self.id, "failures", view.failures, only_if_absent=True)
        if view.open_for is not None:
            store.put(self.id, "open", now + view.open_for, only_if_absent=True)
        for model, seconds in {"": view.backoff_for, **self._upstream.models.backoffs()}.items():
            if seconds > 0:
                store.back_off(self.id, model, now + seconds)

    def renew(self, store: Store) -> None:
        """Keep the trial that runs here."""
        if self._runs_trial:
            store.renew_trial(self.id, TRIAL)

    def follow(self, record: Record, now: float) -> None:
        """Take over what all workers together know."""
        upstream = self._upstream
        if record.open is not None and record.open - now > upstream.breaker.cooldown + 1:
            self._state.send(self._shorten)  # the cooldown has become shorter since
        with self._lock:
            if self._pending:
                return
            if record.trial != self._state.worker:
                self._runs_trial = False
            change = upstream.breaker.follow(self._view(record, now))
            backoffs = {model: until - now for model, until in record.backoffs.items() if model}
            upstream.models.follow(backoffs)
            was_draining, upstream.draining = upstream.draining, bool(record.drained)
        if change is not None:
            logs.circuit(upstream.name, change.event, change.seconds, by="another process")
        if was_draining != upstream.draining:
            action = "drain" if upstream.draining else "resume"
            logs.line(logging.WARNING, "status", upstream=upstream.name, action=action, by="another process")

    def _shorten(self, store: Store) -> None:
        store.put(self.id, "open", store.now() + self._upstream.breaker.cooldown)

    def _view(self, record: Record, now: float) -> View:
        runs_elsewhere = record.trial not in ("", self._state.worker)
        return View(
            failures=record.failures,
            open_for=None if record.open is None else max(0.0, record.open - now),
            backoff_for=max(0.0, record.backoffs.get("", 0.0) - now),
            trial_for=TRIAL if runs_elsewhere else 0.0,
        )


def _decoded(rows: Mapping[str, bytes]) -> dict[str, Row]:
    """The rows, but for those that another version wrote in another form."""
    found = {}
    for worker, row in rows.items():
        with contextlib.suppress(msgspec.DecodeError):
            found[worker] = msgspec.json.decode(row, type=Row)
    return found


def _key(message_id: str) -> str:
    """An id as a store can hold it: an upstream or a client may send half a surrogate pair."""
    return message_id[:LONGEST_ID].encode(errors="backslashreplace").decode()
