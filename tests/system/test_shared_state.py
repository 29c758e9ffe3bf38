"""What processes share by way of a Redis server: each test has two of them, and a real server."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import trustme
from conftest import ROOT
from fakes import HOST, Clock, free_port
from redis_server import RedisServer, needs_redis

from aiproxy.app import create_app
from aiproxy.config import Config, LoggingSettings, StateUrl, UpstreamSettings
from aiproxy.observability import logs
from aiproxy.upstreams import redis_state
from aiproxy.upstreams.breaker import Breaker, Change, Event, Outcome, Pass
from aiproxy.upstreams.redis_state import RedisState
from aiproxy.upstreams.upstream import Upstream

pytestmark = needs_redis
COOLDOWN = 30.0


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as one:
        yield one


@pytest.fixture
def server(running):
    """Empty, and as it should be whatever the test before did to it."""
    running.do("FLUSHALL")
    return running


@pytest.fixture
def fragile(tmp_path):
    """One that a test may kill or pause."""
    with RedisServer(tmp_path) as one:
        yield one


class Process:
    """One process: its state, its upstream `a`, its clock, which is hours away from the others'."""

    numbers = iter(range(1, 1000))

    def __init__(self, url, **settings):
        number = next(self.numbers)
        self.clock = Clock(number * 10_000.0)
        self.settings = UpstreamSettings(
            **{"name": "a", "base_url": "http://a.test", "token": "sk-test-a", **settings}
        )
        self.upstream = Upstream(self.settings, Breaker(3, COOLDOWN, self.clock))
        self.state = RedisState(StateUrl(url))
        self.state.share([self.upstream])
        self.server = f"vm{number}:8080"

    @property
    def breaker(self):
        return self.upstream.breaker

    def start(self, answers=None):
        self.state.start(self.server, answers or {})
        return self

    def joined(self):
        await_that(lambda: not away(self))
        return self

    def settle(self, permit, outcome):
        change = self.breaker.settle(permit, outcome)
        if change is not None:
            self.upstream.shared.report(change, permit)
        return change

    def told(self):
        """What was done here until now, the server has heard, and this process has its answer."""
        self.state._replies(("PING",))

    def fail(self, times=1):
        for _ in range(times):
            self.settle(self.breaker.acquire(), Outcome.FAILURE)

    def try_again(self):
        """The permit of a trial, None where it may not be made."""
        permit = self.breaker.acquire()
        return permit if permit is not None and self.upstream.shared.may_try(permit) else None

    def trial(self, limit=3.0):
        """Try again for so many seconds, each time after the time for which it was put off."""
        ends = time.monotonic() + limit
        while (permit := self.try_again()) is None:
            assert time.monotonic() < ends, "it may not be tried"
            self.clock.now += redis_state._AGAIN
        return permit


@pytest.fixture
def process(server):
    """Start one more process, at the usual server or at another."""
    with contextlib.ExitStack() as stack:

        def start(url=None, wait=True, answers=None, **settings):
            logs.configure(LoggingSettings())  # to where the test reads it
            one = Process(url or server.url, **settings).start(answers)
            stack.callback(one.state.stop)
            return one.joined() if wait else one

        yield start


def await_that(condition, limit=3.0):
    """Until it is true, at most `limit` seconds."""
    ends = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < ends, "it did not become true"
        threading.Event().wait(0.005)


def state_of(one):
    return one.breaker.circuit().state


def open_and_due(*processes):
    """Opened by the first, known to all, and due."""
    processes[0].fail(3)
    processes[0].told()
    for one in processes:
        await_that(lambda one=one: state_of(one) != "closed")
    # What is due is the server's to say, which has a clock of its own.
    for one in processes:
        one.clock.now += COOLDOWN


def test_failures_of_several_processes_add_up(process):
    a, b = process(), process()
    a.fail(2)
    await_that(lambda: b.breaker.circuit().failures == 2)
    b.fail()
    assert state_of(b) == "open"
    await_that(lambda: state_of(a) == "open", limit=1.0)


def test_an_opening_is_known_everywhere_for_as_long_as_it_lasts(process):
    a, b = process(), process()
    a.fail(3)
    await_that(lambda: state_of(b) == "open", limit=1.0)
    assert b.breaker.circuit().seconds == pytest.approx(COOLDOWN, abs=1)
    b.clock.now += COOLDOWN - 1
    assert state_of(b) == "open"
    b.clock.now += 1
    assert state_of(b) == "half_open"


def test_a_count_is_authoritative_also_where_a_process_missed_the_success_between(process):
    a, b = process(), process()
    a.fail(2)
    await_that(lambda: b.breaker.circuit().failures == 2)
    b.settle(b.breaker.acquire(), Outcome.SUCCESS)
    await_that(lambda: a.breaker.circuit().failures == 0)
    a.fail()
    await_that(lambda: b.breaker.circuit().failures == 1)
    assert state_of(a) == state_of(b) == "closed"


def test_success_costs_no_round_trip(process, server):
    one = process()
    before = server.scripts_run()
    began = time.monotonic()
    for _ in range(2000):
        one.settle(one.breaker.acquire(), Outcome.SUCCESS)
    looks = (time.monotonic() - began) / redis_state.LOOK + 1
    assert server.scripts_run() - before <= looks


@pytest.fixture
def short_cooldown(monkeypatch):
    """Cooldowns are the server's to measure, so they are truly waited for."""
    monkeypatch.setattr("test_state.COOLDOWN", 0.15)


def due(*processes):
    open_and_due(*processes)
    threading.Event().wait(COOLDOWN + 0.01)


def test_one_process_at_a_time_makes_a_trial(process, short_cooldown):
    a, b = process(), process()
    due(a, b)
    trial = a.trial()
    assert trial.kind is Pass.TRIAL
    assert b.try_again() is None
    a.settle(trial, Outcome.IGNORED)
    b.trial(limit=1.0)


def test_a_good_trial_closes_it_for_all(process, short_cooldown):
    a, b = process(), process()
    due(a, b)
    assert a.settle(a.trial(), Outcome.SUCCESS) == Change(Event.CLOSED)
    await_that(lambda: state_of(b) == "closed", limit=1.0)
    assert b.breaker.acquire().kind is Pass.ORDINARY


def test_a_bad_trial_opens_it_again_for_all(process, short_cooldown):
    a, b = process(), process()
    due(a, b)
    a.settle(a.trial(), Outcome.FAILURE)
    await_that(lambda: b.breaker.circuit().failures == 4)
    assert state_of(b) == "open"


def test_a_trial_of_a_process_that_died_is_anothers_soon(process, short_cooldown, monkeypatch):
    monkeypatch.setattr(redis_state, "LEASE", 0.3)
    a, b = process(), process()
    due(a, b)
    a.trial()
    a.state.stop()
    assert b.try_again() is None
    b.trial()


def test_a_trial_goes_on_for_as_long_as_its_process_lives(process, short_cooldown, monkeypatch):
    monkeypatch.setattr(redis_state, "LEASE", 0.4)
    monkeypatch.setattr(redis_state, "LOOK", 0.1)
    a, b = process(), process()
    due(a, b)
    a.trial()
    for _ in range(12):
        threading.Event().wait(0.1)
        b.clock.now += 0.1
        assert b.try_again() is None


def test_a_late_result_of_a_trial_that_was_given_away_changes_nothing(process, short_cooldown, monkeypatch):
    monkeypatch.setattr(redis_state, "LEASE", 0.05)
    a, b = process(), process()
    due(a, b)
    late = a.trial()
    threading.Event().wait(0.06)
    b.settle(b.trial(), Outcome.SUCCESS)
    await_that(lambda: state_of(a) == "closed")
    assert a.settle(late, Outcome.FAILURE) is None
    assert state_of(b) == "closed"


def test_a_rest_is_shared_and_the_later_one_holds(process):
    a, b = process(), process()
    permits = [(a, a.breaker.acquire(), 20), (b, b.breaker.acquire(), 10)]
    for one, permit, seconds in permits:
        one.upstream.shared.report(
            one.breaker.back_off(permit, seconds) or Change(Event.BACKED_OFF, seconds), permit
        )
    for one in (a, b):
        await_that(lambda one=one: one.breaker.circuit().seconds == pytest.approx(20, abs=1))


def test_closing_by_hand_reaches_all(process):
    a, b = process(), process()
    a.fail(3)
    await_that(lambda: state_of(b) == "open")
    b.breaker.close()
    b.upstream.shared.report(Change(Event.CLOSED))
    await_that(lambda: state_of(a) == "closed", limit=1.0)


def test_draining_reaches_all_and_whoever_comes_later_and_ends_with_a_reload_anywhere(process):
    a, b = process(), process()
    a.upstream.draining = True
    a.upstream.shared.drain(True)
    await_that(lambda: b.upstream.draining, limit=1.0)
    c = process()
    await_that(lambda: c.upstream.draining)
    b.state.share([Upstream(b.settings, b.breaker)])
    await_that(lambda: not a.upstream.draining, limit=1.0)
    await_that(lambda: not c.upstream.draining, limit=1.0)


def test_an_upstream_that_was_drained_and_taken_out_of_the_file_comes_back_in_use(process):
    a, b = process(), process()
    a.upstream.draining = True
    a.upstream.shared.drain(True)
    await_that(lambda: b.upstream.draining, limit=1.0)
    for one in (a, b):
        one.state.share([])
    a.told()
    back = Upstream(a.settings, a.breaker)
    a.state.share([back])
    a.state._look()
    assert not back.draining


def test_a_shorter_cooldown_holds_for_all(process):
    a, b = process(), process()
    a.fail(3)
    await_that(lambda: state_of(b) == "open")
    a.breaker.configure(3, 5.0)
    a.state.share([Upstream(a.settings, a.breaker)])
    await_that(lambda: b.breaker.circuit().seconds <= 5.0)
    a.clock.now += 5.0
    a.told()
    a.state._look()
    assert a.breaker.circuit().seconds <= 5.0


def test_who_starts_knows_of_open_circuits_before_its_first_request(process, monkeypatch):
    a = process()
    a.fail(3)
    a.told()
    monkeypatch.setattr(redis_state, "PATIENCE", 3.0)
    assert state_of(process(wait=False)) == "open"


def test_another_account_of_the_same_name_is_another_upstream(process):
    a, b = process(), process(token="sk-test-another")
    a.fail(3)
    a.state.ask("nothing")  # the server has handled what came before
    b.state._look()
    assert state_of(b) == "closed"


def test_nothing_in_the_server_tells_a_key(process, server):
    one = process(token="sk-test-very-secret", headers={"x-team": "sk-test-header-secret"})
    one.fail(3)
    one.state.remember("msg_1", "a")
    keys = server.do("KEYS", "*")
    assert len(keys) == 3
    values = [server.do("HGETALL", key) for key in keys if "circuit" in key]
    assert "secret" not in repr([keys, values, server.do("ZRANGE", "aiproxy:workers", 0, -1)])


def test_who_cannot_hear_looks_once_a_second(process, monkeypatch):
    monkeypatch.setattr(RedisState, "_listen", lambda state: None)
    a, b = process(), process()
    a.fail(3)
    await_that(lambda: state_of(b) == "open", limit=redis_state.LOOK + 0.5)


def test_an_older_message_that_arrives_late_changes_nothing(process, server):
    a, b = process(), process()
    heard = []
    circuit = b.upstream.shared
    original = circuit.heard
    await_that(lambda: server.do("PUBSUB", "NUMSUB", b.state._channel) == [b.state._channel, 2])
    circuit.heard = lambda seen: (heard.append(seen), original(seen))
    a.fail(3)
    await_that(lambda: len(heard) == 3)
    original(heard[0])
    assert state_of(b) == "open"


def test_thread_owners_are_shared_and_forgotten_in_time(process, server):
    a, b = process(), process()
    a.state.remember("msg_1", "a")
    assert b.state.owner("msg_1") == "a"
    assert b.state.owner("msg_2") is None
    assert 3500 < server.do("TTL", "aiproxy:owner:msg_1") <= 3600


def test_an_id_that_is_no_text_harms_nobody(capsys, process):
    """JSON can spell half a surrogate pair, which no encoding can."""
    a, b = process(), process()
    a.state.remember("msg_\ud800", "a")
    assert b.state.owner("msg_\ud800") == "a"
    assert not away(a)
    assert "bug" not in capsys.readouterr().out


def test_all_answer_a_question_and_who_is_silent_is_named(process):
    def answer():
        return b'{"x": 1}'

    a, b = process(answers={"status": answer}), process(answers={"status": answer})
    c = process(answers={})
    a.state._replies(("ZADD", "aiproxy:workers", 10**14, "no name of a process"))
    heard = a.state.ask("status")
    pid = os.getpid()
    assert heard.answers == {f"{b.server}, worker {pid}": b'{"x": 1}', f"{c.server}, worker {pid}": b""}
    assert heard.problem is None
    c.state.stop()
    assert list(b.state.ask("status", once_a_server=True).answers.values()) == [b'{"x": 1}']


def test_what_another_version_says_is_no_bug(capsys, process, server):
    one = process()
    await_that(lambda: server.do("PUBLISH", one.state._channel, '{"view": "none"}'))
    one.state.ask("nothing")
    assert "bug" not in capsys.readouterr().out


# --- The server is out of reach ---


def test_a_server_that_is_not_there_at_the_start_is_told_once_and_joined_later(capsys, fragile, process):
    fragile.kill()
    one = process(fragile.url, wait=False)
    await_that(lambda: "result=away" in capsys.readouterr().out)
    one.fail(3)
    assert state_of(one) == "open"
    threading.Event().wait(1.2)
    assert "away" not in capsys.readouterr().out
    fragile.start()
    one.joined()
    await_that(lambda: "result=joined" in capsys.readouterr().out)


def test_without_the_server_each_process_makes_its_own_trials_at_once(fragile, process):
    one = process(fragile.url)
    fragile.kill()
    await_that(lambda: away(one))
    one.fail(3)
    one.clock.now += COOLDOWN
    began = time.monotonic()
    trial = one.try_again()
    one.settle(trial, Outcome.SUCCESS)
    assert time.monotonic() - began < 0.05
    assert state_of(one) == "closed"


def test_a_server_that_was_restarted_empty_learns_what_the_processes_remember(fragile, process):
    a, b = process(fragile.url), process(fragile.url)
    a.fail(3)
    b.upstream.draining = True
    b.upstream.shared.drain(True)
    await_that(lambda: state_of(b) == "open" and a.upstream.draining)
    fragile.kill()
    fragile.start()
    c = process(fragile.url)
    await_that(lambda: state_of(c) == "open" and c.upstream.draining)
    assert c.breaker.circuit().seconds == pytest.approx(COOLDOWN, abs=2)
    assert (state_of(a), state_of(b)) == ("open", "open")


def test_what_was_flushed_is_restored_too(process, server):
    a, b = process(), process()
    a.fail(3)
    server.do("FLUSHALL")
    await_that(lambda: server.do("KEYS", "aiproxy:circuit:*"))
    assert (state_of(a), state_of(b)) == ("open", "open")


class Cable:
    """What lies between one process and the server, and can be cut."""

    def __init__(self, port):
        self._server = port
        self._ends = []
        self._frozen = []
        self.delay = 0.0  # seconds, of each answer
        self.port = free_port()
        self.mend()

    def mend(self):
        self._listener = socket.create_server((HOST, self.port))
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def cut(self):
        for one in [self._listener, *self._ends]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._ends = []

    def freeze(self):
        """What goes over the connections that there are is lost, and nobody is told."""
        self._frozen += self._ends

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((HOST, self._server))
                self._ends += [near, far]
                threading.Thread(target=self._carry, args=(near, far), daemon=True).start()
                threading.Thread(target=self._carry, args=(far, near, True), daemon=True).start()

    def _carry(self, source, target, is_answer=False):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_answer:
                    threading.Event().wait(self.delay)
                if target not in self._frozen:
                    target.sendall(data)


@pytest.fixture
def cable(server):
    one = Cable(server.port)
    yield one
    one.cut()


def away(one):
    return not one.state.put(redis_state._Order([("PING",)]))


def test_what_a_request_waits_for_is_together_less_than_a_tenth_of_a_second(process, cable):
    one = process(f"redis://{HOST}:{cable.port}/0")
    one.breaker.configure(100, COOLDOWN)
    cable.delay = 0.015  # each answer comes in time
    began = time.monotonic()
    one.fail(8)
    assert 0.03 < time.monotonic() - began < 0.1
    assert not one.state.is_doubted


@pytest.mark.parametrize(
    ("rights", "word"), [(["&*", "-subscribe"], "subscribe"), (["resetchannels"], "channel")]
)
def test_who_may_not_hear_of_others_says_so_and_looks(capsys, process, server, rights, word):
    server.do("ACL", "SETUSER", "half", "on", ">sk-test-half", "~aiproxy:*", "+@all", *rights)
    try:
        a, b = process(f"redis://half:sk-test-half@{HOST}:{server.port}/0"), process()
        b.fail(3)
        await_that(lambda: state_of(a) == "open")
        await_that(lambda: a.state.ask("status").problem is not None)
        assert word in a.state.ask("status").problem
        a.breaker.close()
        a.upstream.shared.report(Change(Event.CLOSED))
        await_that(lambda: state_of(b) == "closed")
        assert not away(a)
        out = capsys.readouterr().out
        assert out.count("result=deaf") == 1
        assert "result=away" not in out
        assert "sk-test-half" not in out
    finally:
        server.do("ACL", "DELUSER", "half")


def test_a_circuit_that_was_closed_in_isolation_is_closed_for_all(process, cable):
    a, b = process(f"redis://{HOST}:{cable.port}/0"), process()
    a.fail(3)
    await_that(lambda: state_of(b) == "open")
    cable.cut()
    await_that(lambda: away(a))
    a.breaker.close()
    a.upstream.shared.report(Change(Event.CLOSED))
    cable.mend()
    await_that(lambda: state_of(b) == "closed")


@pytest.mark.parametrize("is_empty", [False, True])
def test_what_was_done_by_hand_while_the_server_was_lost_is_done_for_all(fragile, process, is_empty):
    a, b = process(fragile.url), process(fragile.url)
    a.fail(3)
    await_that(lambda: state_of(b) == "open")
    fragile.pause()
    a.breaker.close()
    a.upstream.shared.report(Change(Event.CLOSED))  # nobody knows yet that this will not be heard
    a.upstream.draining = True
    a.upstream.shared.drain(True)
    await_that(lambda: away(a) and away(b))
    if is_empty:
        fragile.kill()
        fragile.start()
    else:
        fragile.resume()
    await_that(lambda: state_of(b) == "closed" and b.upstream.draining, limit=5.0)
    assert state_of(a) == "closed"
    assert a.upstream.draining


def test_what_was_undone_by_hand_stays_undone_where_others_remember_it(fragile, process):
    a, b = process(fragile.url), process(fragile.url)
    a.fail(3)
    a.upstream.draining = True
    a.upstream.shared.drain(True)
    await_that(lambda: state_of(b) == "open" and b.upstream.draining)
    fragile.kill()
    await_that(lambda: away(a) and away(b))
    a.breaker.close()
    a.upstream.shared.report(Change(Event.CLOSED))
    a.upstream.draining = False
    a.upstream.shared.drain(False)
    fragile.start()
    await_that(lambda: state_of(b) == "closed" and not b.upstream.draining, limit=5.0)
    assert state_of(a) == "closed"
    assert not a.upstream.draining


def test_who_hears_nothing_because_its_connection_died_in_silence_listens_anew(process, cable, monkeypatch):
    monkeypatch.setattr(redis_state, "_PING", 0.2)
    a, b = process(f"redis://{HOST}:{cable.port}/0", answers={"status": lambda: b"{}"}), process()
    assert list(b.state.ask("status").answers.values()) == [b"{}"]
    cable.freeze()
    await_that(lambda: list(b.state.ask("status").answers.values()) == [b"{}"], limit=8.0)
    assert not away(a)


def test_a_connection_that_has_nothing_to_say_is_kept(process, server, monkeypatch):
    monkeypatch.setattr(redis_state, "_PING", 0.1)
    monkeypatch.setattr(redis_state, "_LISTEN", 0.02)
    a, b = (process(answers={"status": lambda: b"{}"}) for _ in "ab")
    for one in (a, b):  # so both listen
        await_that(lambda one=one: b"{}" in one.state.ask("status").answers.values())
    began = server.do("INFO", "stats")["total_connections_received"]
    threading.Event().wait(1.0)
    assert server.do("INFO", "stats")["total_connections_received"] == began


def test_a_circuit_that_was_opened_in_isolation_is_not_opened_for_all(process, cable):
    """Who was cut off from the server may have been cut off from the upstreams too."""
    a, b = process(f"redis://{HOST}:{cable.port}/0"), process()
    b.fail()
    await_that(lambda: a.breaker.circuit().failures == 1)
    cable.cut()
    await_that(lambda: away(a))
    a.fail(2)
    assert state_of(a) == "open"
    cable.mend()
    await_that(lambda: state_of(a) == "closed")
    assert state_of(b) == "closed"


def test_a_server_that_hangs_costs_a_request_less_than_a_tenth_of_a_second(fragile, process, short_cooldown):
    one = process(fragile.url)
    due(one)
    fragile.pause()
    began = time.monotonic()
    assert one.state.owner("msg_1") is None
    assert one.try_again() is None
    one.state.remember("msg_1", "a")
    one.breaker.close()
    one.fail(3)
    assert time.monotonic() - began < 0.1
    await_that(lambda: away(one))
    fragile.resume()
    one.joined()


def slow(one, monkeypatch):
    """The server answers, but not in the time that a request waits."""
    with monkeypatch.context() as patched:
        patched.setattr(redis_state, "LEAVE_WAIT", 0.0)
        assert one.try_again() is None
        one.state.ask("nothing")  # what was asked before is answered
    one.clock.now += redis_state._AGAIN


def test_leave_that_comes_too_late_is_for_the_next_request(process, short_cooldown, monkeypatch):
    """Else an upstream would never come back where the server is a few hundredths of a second away."""
    a, b = process(), process()
    due(a, b)
    slow(a, monkeypatch)
    assert a.state.is_doubted
    trial = a.try_again()
    assert trial.kind is Pass.TRIAL
    assert b.try_again() is None
    assert a.settle(trial, Outcome.SUCCESS) == Change(Event.CLOSED)
    await_that(lambda: state_of(b) == "closed", limit=1.0)


def test_leave_that_comes_too_late_and_is_not_used_is_another_s_soon(process, short_cooldown, monkeypatch):
    monkeypatch.setattr(redis_state, "LEASE", 0.4)
    monkeypatch.setattr(redis_state, "LOOK", 0.1)
    a, b = process(), process()
    due(a, b)
    slow(a, monkeypatch)
    b.trial()
    assert a.try_again() is None


def test_leave_that_comes_too_late_ends_with_the_circuit(process, short_cooldown, monkeypatch):
    a, b = process(), process()
    due(a, b)
    slow(a, monkeypatch)
    a.breaker.close()
    a.upstream.shared.report(Change(Event.CLOSED))
    await_that(lambda: state_of(b) == "closed", limit=1.0)
    due(a, b)
    b.trial()
    assert a.try_again() is None


def test_a_refused_password_is_told_without_it(capsys, process, tmp_path):
    with RedisServer(tmp_path) as guarded:
        guarded.do("CONFIG", "SET", "requirepass", "test-password")
        wrong = guarded.url.replace("//", "//:wrong-test-password@")
        refused = process(wrong, wait=False)
        line = ""

        def told():
            nonlocal line
            line += capsys.readouterr().out
            return "result=away" in line

        await_that(told)
        assert "wrong-test-password" not in line
        right = process(guarded.url.replace("//", "//:test-password@"))
        refused.state.stop()
        right.state.stop()


def test_a_unix_socket_and_tls_with_an_own_authority(process, tmp_path):
    authority, folder = trustme.CA(), tmp_path / "tls"
    folder.mkdir()
    certificate = authority.issue_cert("localhost", HOST)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    port = free_port()
    options = ["--tls-port", str(port), "--tls-cert-file", f"{folder}/cert.pem"]
    options += ["--tls-key-file", f"{folder}/key.pem", "--tls-ca-cert-file", f"{folder}/ca.pem"]
    options += ["--tls-auth-clients", "no", "--unixsocket", f"{tmp_path}/redis.sock"]
    with RedisServer(tmp_path, *options):
        secure = process(f"rediss://localhost:{port}/0?ssl_ca_certs={folder}/ca.pem")
        local = process(f"unix://{tmp_path}/redis.sock?db=0")
        secure.fail(3)
        await_that(lambda: state_of(local) == "open", limit=1.0)
        secure.state.stop()
        # redis-py would leave a TLS connection half open that it tried again when the server had gone.
        for thread in threading.enumerate():
            if thread.name == "state, listening":
                thread.join(0.6)


def test_databases_are_apart(process, server):
    a, b = process(), process(server.url.replace("/0", "/1"))
    a.fail(3)
    b.state.ask("nothing")
    b.state._look()
    assert state_of(b) == "closed"
    server.do("FLUSHALL")


def test_without_the_package_the_log_says_what_to_install_and_the_process_serves(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "aiproxy.upstreams.redis_state")
    one = UpstreamSettings(name="a", base_url="demo://answers")
    app = create_app(Config(upstreams=(one,), state=StateUrl("redis://localhost/0")))
    assert "pip install -r requirements.txt" in capsys.readouterr().out
    ask = {"model": "claude-x", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    assert app.test_client().post("/v1/messages", json=ask).status_code == 200


def test_a_process_by_itself_does_not_even_load_the_package():
    code = "import sys, aiproxy.app; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_server_that_was_made_a_replica_is_out_of_reach_until_it_is_the_master_again(
    capsys, fragile, process
):
    one = process(fragile.url)
    fragile.do("REPLICAOF", HOST, free_port())
    await_that(lambda: away(one))
    one.fail(3)
    assert state_of(one) == "open"
    fragile.do("REPLICAOF", "NO", "ONE")
    one.joined()
    assert capsys.readouterr().out.count("result=away") == 1
