"""The ledger under several real gunicorns: one truth, nothing doubled, budgets held."""

import contextlib
import os
import signal
import threading
import time
from collections import Counter

import pytest
from fakes import ASK, Ended, RawClient, answer, await_that, later
from ledger_rows import costs
from postgresql_server import PostgresqlServer, needs_postgresql

from aiproxy.config import LedgerSettings, Secret
from aiproxy.ledger.store import Store

USAGE = {"input_tokens": 1000, "output_tokens": 100}
COST = 1000 * 3000 + 100 * 15_000  # nano-dollars of one answer, at the prices below
PRICES = {"claude-x": {"input": 3, "output": 15}}


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=needs_postgresql)])
def settings(request, tmp_path):
    if request.param == "sqlite":
        yield LedgerSettings(file=str(tmp_path / "ledger.db"))
        return
    with PostgresqlServer() as server:
        yield LedgerSettings(url=Secret(server.url))


def configuration(config_of, fake, settings, **limits):
    keys = [{"name": "alice", "key": "sk-test-alice", **limits}, {"name": "bob", "key": "sk-test-bob"}]
    ledger = settings.url or settings.file
    return config_of([fake], api_keys=keys, ledger=str(ledger), prices=PRICES, workers=2)


def ask(served, name="alice"):
    """The status of one request, None where the connection broke."""
    with contextlib.suppress(OSError, Ended), RawClient.to(served.url) as client:
        client.post(ASK, headers=[("x-api-key", f"sk-test-{name}")])
        return client.read().status
    return None


def at_once(clients, times, served, name="alice"):
    """How many requests ended with which status, of so many clients that ask so many times each."""
    outcomes = Counter()

    def work(number):
        for n in range(times):
            outcomes[ask(served[(number + n) % len(served)], name)] += 1

    threads = [threading.Thread(target=work, args=[number]) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def rows_of(settings):
    store = Store(settings)
    try:
        rows = store.exchanges(10**6)
        sums = {name: each.cost for name, each in store.sums("2000-01-01", "client").items()}
    finally:
        store.close()
    return rows, sums


def test_two_gunicorns_of_two_workers_have_one_ledger(serve, config_of, upstream, settings):
    fake = upstream(default=answer(usage=USAGE))
    config = configuration(config_of, fake, settings)
    served = [serve(config), serve(config)]
    assert at_once(8, 20, served) == {200: 160}
    assert at_once(4, 10, served, "bob") == {200: 40}
    await_that(lambda: len(rows_of(settings)[0]) == 200)
    rows, sums = rows_of(settings)
    assert sums == costs(rows, "client") == {"alice": 160 * COST, "bob": 40 * COST}
    assert len({each.id for each in rows}) == 200

    def spent(one):
        with RawClient.to(one.url) as client:
            client.request("GET", "/v1/usage", headers=[("x-api-key", "sk-test-alice")])
            return client.read().json()["spent"]["daily"]

    for one in served * 3:
        await_that(lambda one=one: spent(one) == 160 * COST / 1e9)


def test_a_budget_is_exceeded_by_what_was_in_flight_and_one_second_of_others(
    serve, config_of, upstream, settings
):
    fake = upstream(default=later(0.1, answer(usage=USAGE)))
    limit = 60 * COST / 1e9
    config = configuration(config_of, fake, settings, budget={"daily": limit})
    served = [serve(config), serve(config)]
    answered, ends = [], time.monotonic() + 6  # when each answered request began and ended

    def work(number):
        began = time.monotonic()
        while began < ends and ask(served[number % 2]) == 200:
            answered.append((began, time.monotonic()))
            began = time.monotonic()

    threads = [threading.Thread(target=work, args=[number]) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    passed_at = sorted(ended for _, ended in answered)[59]  # the 60th answer used the budget up
    assert max(began for began, _ in answered) <= passed_at + 1.2
    await_that(lambda: len(rows_of(settings)[0]) == len(answered))
    assert ask(served[0]) == ask(served[1]) == 429
    assert ask(served[0], "bob") == 200


def test_a_killed_worker_loses_half_a_second_at_most_and_doubles_nothing(
    serve, config_of, upstream, settings
):
    fake = upstream(default=answer(usage=USAGE))
    served = serve(configuration(config_of, fake, settings))
    ended, over = [], threading.Event()

    def work():
        while not over.is_set():
            if ask(served) == 200:
                ended.append(time.monotonic())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    killed_at = time.monotonic()
    for pid in served.workers():
        os.kill(pid, signal.SIGKILL)
    await_that(lambda: sum(at > killed_at for at in ended) > 20)
    over.set()
    for thread in threads:
        thread.join()
    # A request that was cut off by the kill may have been answered, too.
    await_that(lambda: len(rows_of(settings)[0]) >= sum(at > killed_at for at in ended))
    time.sleep(0.6)
    rows, sums = rows_of(settings)
    assert sums == costs(rows, "client") == {"alice": len(rows) * COST}
    late = sum(killed_at - 0.6 < at <= killed_at for at in ended)
    assert len(ended) - late <= len(rows) <= len(ended) + len(threads)


@pytest.mark.parametrize("budget", [None, {"daily": 1}], ids=["", "with a budget"])
def test_a_start_with_a_ledger_that_cannot_be_written(serve, config_of, upstream, tmp_path, budget):
    file = tmp_path / "ledger.db"
    file.write_text("this is not a database, and it is long enough to be looked at")
    config = config_of([upstream()], ledger=str(file), **({"budget": budget} if budget else {}))
    served = serve(config, wait=budget is None)
    if budget is None:
        assert ask(served) == 200
        said = "\n".join(served.stdout_lines())
        assert "cannot be written (file is not a database): what is spent is not recorded" in said
    else:
        assert served.wait_exit() != 0
        (line,) = [line for line in served.stderr.splitlines() if "ledger" in line]
        assert "cannot be written (file is not a database), and there are budgets" in line
    assert "Traceback" not in served.stderr
