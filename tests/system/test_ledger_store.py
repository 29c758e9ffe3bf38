"""The ledger's tables and its writing thread, in SQLite and in PostgreSQL, with everything that can fail."""

import contextlib
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import msgspec
import pytest
from fakes import await_that
from ledger_rows import costs, random_rows, row
from postgresql_server import PostgresqlServer, needs_postgresql

from aiproxy.config import LedgerSettings, LoggingSettings, Secret
from aiproxy.ledger import ledger as ledger_module
from aiproxy.ledger.ledger import Ledger
from aiproxy.ledger.rows import Sums
from aiproxy.ledger.spending import periods
from aiproxy.ledger.store import LedgerError, Store
from aiproxy.observability import logs

NOW, DAY = 1_795_000_000.0, 24 * 3600


@pytest.fixture(scope="module")
def server():
    with PostgresqlServer() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=needs_postgresql)])
def settings(request, tmp_path):
    if request.param == "sqlite":
        return LedgerSettings(file=str(tmp_path / "ledger.db"))
    server = request.getfixturevalue("server")
    server.empty()
    return LedgerSettings(url=Secret(server.url))


@pytest.fixture
def file(tmp_path):
    return LedgerSettings(file=str(tmp_path / "ledger.db"))


@pytest.fixture
def running():
    """Starts ledgers; they are stopped at the end."""
    started = []

    def start(settings, clock=lambda: NOW):
        started.append(Ledger(settings, clock))
        started[-1].start(is_awaited=True)
        return started[-1]

    yield start
    for each in started:
        each.stop()


def written(settings, by="client"):
    """Nano-dollars as the sums have them, which must be those of the rows."""
    store = Store(settings)
    rows, sums = [], None
    while sums != (latest := store.sums("2000-01-01", by)):  # until nobody wrote between
        sums, rows = latest, store.exchanges(10**6)
    store.close()
    found = {name: each.cost for name, each in sums.items()}
    assert found == costs(rows, by)
    assert len({each.id for each in rows}) == len(rows)
    return found


def test_sums_by_anything_are_those_of_a_plain_sum(settings):
    rows = random_rows(700)
    store = Store(settings)
    store.write(rows)
    for by in ("client", "model", "upstream", "day"):
        assert written(settings, by) == costs(rows, by)
    everything = sum(store.sums("2000-01-01", "client").values(), start=Sums())
    assert everything == sum(map(Sums.of, rows), start=Sums())
    assert {row.id: row for row in store.exchanges(1000)} == {row.id: row for row in rows}
    store.close()


def test_a_row_counts_once_whatever_is_written_twice(settings):
    store, other = Store(settings), Store(settings)
    store.write([row(1), row(2), row(1)])
    store.write([row(2), row(3)])
    other.write([row(1), row(2), row(3), row(4)])
    assert written(settings) == {"alice": 4 * 1_500_000_000}
    for each in (store, other):
        each.close()


def test_several_writers_at_once_lose_and_double_nothing(settings):
    batches = [random_rows(300, seed, f"w{seed}") for seed in range(4)]
    shared = random_rows(100, 9, "shared")

    def write(rows):
        store = Store(settings)
        for start in range(0, len(rows), 40):
            store.write(rows[start : start + 40])
            store.write(shared)
        store.close()

    first = Store(settings)
    first.has_changed()  # the tables are there
    first.close()
    threads = [threading.Thread(target=write, args=[rows]) for rows in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written(settings) == costs([*shared, *(each for rows in batches for each in rows)], "client")


def test_several_processes_agree_within_a_second_and_across_restarts(settings, running):
    one, other = running(settings), running(settings)
    rows = random_rows(60)
    for n, each in enumerate(rows):
        (one, other)[n % 2].add(each)
    month = periods(NOW)["monthly"]
    total = sum(costs(rows, "client").values())
    await_that(lambda: one.spending.of(None, month) == other.spending.of(None, month) == total)
    one.stop()
    again = running(settings)
    assert again.spending.of("alice", month) == costs(rows, "client")["alice"]


def test_processes_that_fail_and_start_again_at_random_agree_with_a_plain_sum(settings, running, monkeypatch):
    """A commit that fails after it was done, or before, or a read that fails: nothing counts twice."""
    dice, write, spent = random.Random(23), Store.write, Store.spent

    def flaky(method):
        def fail(self, *arguments):
            when = dice.random()
            if when < 0.2:
                raise LedgerError("away before it was done")
            found = method(self, *arguments)
            if when < 0.4:
                raise LedgerError("away after it was done")
            return found

        return fail

    monkeypatch.setattr(ledger_module, "BATCH", 0.01)
    monkeypatch.setattr(Store, "write", flaky(write))
    monkeypatch.setattr(Store, "spent", flaky(spent))
    rows = random_rows(300)
    processes = [running(settings) for _ in range(3)]
    for each in rows:
        dice.choice(processes).add(each)
        if dice.random() < 0.1:
            time.sleep(0.01)
        if dice.random() < 0.02:
            place = dice.randrange(3)
            await_that(lambda place=place: processes[place].problem is None)
            monkeypatch.setattr(Store, "write", write)  # the last batch of a stop is tried once
            processes[place].stop()
            monkeypatch.setattr(Store, "write", flaky(write))
            processes[place] = running(settings)
    monkeypatch.undo()
    month, wanted = periods(NOW)["monthly"], costs(rows, "client")
    for each in processes:
        await_that(lambda each=each: each.spending.of(None, month) == sum(wanted.values()))
        assert {client: each.spending.of(client, month) for client in wanted} == wanted
    assert written(settings) == wanted


def test_what_a_process_adds_counts_at_once_and_never_twice(settings, running):
    ledger, day = running(settings), periods(NOW)["daily"]
    seen = set()
    for n in range(40):
        ledger.add(row(n, at=NOW, cost=1))
        seen.add(ledger.spending.of("alice", day) - n)
        time.sleep(0.03)  # over two batches
    assert seen == {1}
    await_that(lambda: written(settings) == {"alice": 40})
    assert ledger.spending.of("alice", day) == 40


def test_rows_of_the_other_day_belong_to_it_when_midnight_passes_and_the_clock_is_set_back(settings, running):
    clock = [1_795_046_399.0]  # 2026-11-18T23:59:59
    ledger = running(settings, lambda: clock[0])
    ledger.add(row(1, at=clock[0], cost=1))
    clock[0] += 2
    ledger.add(row(2, at=clock[0], cost=10))
    assert ledger.spending.of("alice", periods(clock[0])["daily"]) == 10
    clock[0] -= 3600
    ledger.add(row(3, at=clock[0], cost=100))
    await_that(lambda: written(settings, "day") == {"2026-11-18": 101, "2026-11-19": 10})
    assert ledger.spending.of("alice", periods(clock[0])["daily"]) == 101
    assert ledger.spending.of("alice", periods(clock[0])["weekly"]) == 111


def test_what_others_wrote_while_there_was_no_connection_is_noticed(settings):
    """SQLite counts changes for each connection alone, from the same figure on."""
    one, other = Store(settings), Store(settings)
    one.has_changed()
    one.close()
    other.write([row(1)])
    assert one.has_changed()
    for each in (one, other):
        each.close()


def test_old_rows_are_removed(settings):
    store = Store(settings)
    store.write([row(n, at=NOW - n * 24 * 3600) for n in range(10)])
    assert store.forget(NOW - 5 * 24 * 3600, "2026-11-13", 3) == 3
    assert store.forget(NOW - 5 * 24 * 3600, "2026-11-13", 3) == 1
    assert sorted(row.id for row in store.exchanges(99)) == [f"req_{n}" for n in range(6)]
    assert sum(each.requests for each in store.sums("2000-01-01", "client").values()) == 6
    store.close()


def test_a_month_counts_to_its_end_for_however_few_days_rows_are_kept(settings, running):
    now = 1_795_780_800.0  # 2026-11-27T12:00:00
    store = Store(settings)
    store.write([row(1, at=now - 25 * DAY, cost=7), row(2, at=now - 60 * DAY), row(3, at=now, cost=1)])
    ledger = running(msgspec.structs.replace(settings, days=2), lambda: now)
    await_that(lambda: [each.id for each in store.exchanges(9)] == ["req_3"])
    ledger.add(row(4, at=now, cost=1))
    await_that(lambda: len(store.exchanges(9)) == 2 and ledger.problem is None)
    again = running(settings, lambda: now)
    for each in (ledger, again):
        assert each.spending.of("alice", periods(now)["monthly"]) == 9
    assert set(store.sums("2000-01-01", "day")) == {"2026-11-02", "2026-11-27"}
    store.close()


def test_a_clock_that_is_set_back_over_the_end_of_a_month_finds_the_month_s_spending(settings, running):
    clock = [1_796_083_230.0]  # 2026-12-01T00:00:30
    store = Store(settings)
    store.write([row(1, at=clock[0] - 26 * DAY, cost=70)])
    store.close()
    ledger = running(settings, lambda: clock[0])
    assert ledger.spending.of("alice", periods(clock[0])["monthly"]) == 0
    clock[0] -= 60
    await_that(lambda: ledger.spending.of("alice", periods(clock[0])["monthly"]) == 70, 2)


def test_a_thing_is_announced_once(settings):
    one, other = Store(settings), Store(settings)
    assert [one.announce("x", NOW, 60), other.announce("x", NOW + 59, 60)] == [True, False]
    assert other.announce("x", NOW + 61, 60)
    assert one.announce("y", NOW, 60)
    for each in (one, other):
        each.close()


# --- What can fail ---


def listen(capsys):
    """What the log says of the ledger from now on, one word for each line."""
    logs.configure(LoggingSettings())
    lines = []

    def results():
        lines.extend(line for line in capsys.readouterr().out.splitlines() if " ledger result=" in line)
        return [line.partition(" result=")[2].split()[0] for line in lines]

    return results


def test_a_locked_file_delays_rows_and_nothing_else(file, running, capsys, monkeypatch):
    said = listen(capsys)
    monkeypatch.setattr("aiproxy.ledger.store.PATIENCE", 0.1)
    ledger = running(file)
    backup = sqlite3.connect(file.file, isolation_level=None)
    backup.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    for n in range(100):
        ledger.add(row(n))
    assert time.monotonic() - began < 0.1
    await_that(lambda: ledger.problem is not None)
    backup.execute("ROLLBACK")
    backup.close()
    await_that(lambda: written(file) == {"alice": 150_000_000_000})
    await_that(lambda: said() == ["away", "back"])


def test_rows_that_a_stop_cannot_write_are_counted_and_named(file, running, capsys, monkeypatch):
    said = listen(capsys)
    monkeypatch.setattr("aiproxy.ledger.store.PATIENCE", 0.1)
    ledger = running(file)
    with contextlib.closing(sqlite3.connect(file.file, isolation_level=None)) as backup:
        backup.execute("BEGIN EXCLUSIVE")
        for n in range(5):
            ledger.add(row(n))
        ledger.stop()
    assert ledger.dropped == 5
    assert said() == ["away", "dropped"]


def test_a_full_disk_delays_rows_until_there_is_room(file, running, capsys):
    said = listen(capsys)
    ledger = running(file)
    ledger.add(row(0))
    await_that(lambda: written(file) == {"alice": 1_500_000_000})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        for n in range(500):
            ledger.add(row(n))
        await_that(lambda: ledger.problem is not None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    await_that(lambda: written(file) == {"alice": 500 * 1_500_000_000})
    await_that(lambda: said() == ["away", "back"])


def test_a_file_that_is_removed_is_made_anew(file, running, tmp_path):
    ledger = running(file)
    ledger.add(row(1))
    await_that(lambda: written(file) == {"alice": 1_500_000_000})
    for path in tmp_path.iterdir():
        path.unlink()
    ledger.add(row(2))
    await_that(lambda: (tmp_path / "ledger.db").exists() and written(file) == {"alice": 1_500_000_000})


def test_a_file_that_was_restored_from_a_copy_is_read(file, running, tmp_path):
    ledger, day = running(file), periods(NOW)["daily"]
    copy = Store(LedgerSettings(file=str(tmp_path / "copy.db")))
    copy.write([row(1, at=NOW, cost=70)])
    copy.close()
    for path in tmp_path.glob("ledger.db-*"):
        path.unlink()
    (tmp_path / "copy.db").replace(file.file)
    await_that(lambda: ledger.spending.of("alice", day) == 70, 3)


def test_a_full_queue_drops_rows_and_counts_them(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "QUEUE", 10)
    ledger = Ledger(LedgerSettings(file=str(tmp_path / "nowhere" / "ledger.db")), lambda: NOW)
    for n in range(15):
        ledger.add(row(n, at=NOW))
    assert ledger.dropped == 5
    assert ledger.spending.of("alice", periods(NOW)["daily"]) == 15 * 1_500_000_000
    ledger.stop()


@needs_postgresql
def test_a_server_that_is_away_delays_rows_and_nothing_else(server, running, capsys):
    said = listen(capsys)
    server.empty()
    settings = LedgerSettings(url=Secret(server.url))
    ledger = running(settings)
    ledger.add(row(0))
    await_that(lambda: written(settings) == {"alice": 1_500_000_000})
    server.kill()
    for n in range(50):
        ledger.add(row(n))
    await_that(lambda: ledger.problem is not None)
    with pytest.raises(LedgerError):
        ledger.read(lambda store: store.sums("2000-01-01", "client"))
    server.start()
    await_that(lambda: ledger.problem is None, 10)
    await_that(lambda: written(settings) == {"alice": 50 * 1_500_000_000})
    await_that(lambda: said() == ["away", "back"])


# Run in a network of its own, which is taken down.
LOST_NETWORK = """
import fcntl, socket, struct, time
from fakes import await_that
from ledger_rows import row
from postgresql_server import PostgresqlServer
from aiproxy.config import LedgerSettings, Secret
from aiproxy.ledger import ledger, store

def network(is_up):
    with socket.socket() as any_socket:  # 0x8914: SIOCSIFFLAGS, whose flag 1 is IFF_UP
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", is_up))

store.PATIENCE = 1.0
network(True)
with PostgresqlServer() as server:
    kept = ledger.Ledger(LedgerSettings(url=Secret(server.url)), time.time)
    kept.start(is_awaited=True)
    network(False)
    kept.add(row(1))
    await_that(lambda: kept.problem is not None, 6)
    network(True)
    await_that(lambda: kept.problem is None and not kept.is_out_of_reach, 6)
    assert kept.read(lambda found: [each.id for each in found.exchanges(9)]) == ["req_1"]
    kept.stop()
"""


@needs_postgresql
def test_a_lost_network_is_noticed_as_soon_as_a_server_that_is_gone():
    alone = ["unshare", "--net"]
    if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not make a network of its own")
    command = [*alone, sys.executable, "-c", LOST_NETWORK]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, timeout=40, env=environ)


def test_no_reason_shows_the_password():
    url = "postgresql://someone:sk-test-password@127.0.0.1:1/nowhere"
    with pytest.raises(LedgerError) as caught:
        Store(LedgerSettings(url=Secret(url))).has_changed()
    assert "sk-test-password" not in str(caught.value)
    with pytest.raises(LedgerError) as caught:
        Store(LedgerSettings(url=Secret("postgresql://a:sk-test-password@host:port/x"))).has_changed()
    assert "sk-test-password" not in str(caught.value)
