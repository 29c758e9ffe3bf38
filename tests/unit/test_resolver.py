"""Names to addresses: in bounded time, with one lookup for all who wait."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from aiproxy.transport import resolver
from aiproxy.transport.resolver import Resolver

NOT_FOUND = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
FOUND = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 443))]


class Lookups:
    """A `getaddrinfo` that waits for `gate`, but for `ready` names, and then gives or raises `answer`."""

    def __init__(self):
        self.gate = threading.Event()
        self.answer = FOUND
        self.ready = set()
        self.asked = []
        self.began = threading.Semaphore(0)

    def __call__(self, host, port, *args, **kwargs):
        self.asked.append((host, port))
        self.began.release()
        assert host in self.ready or self.gate.wait(10)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return list(self.answer)


@pytest.fixture
def lookups(monkeypatch):
    fake = Lookups()
    monkeypatch.setattr(socket, "getaddrinfo", fake)
    yield fake
    fake.gate.set()  # the threads left behind end
    for thread in resolve_threads():
        thread.join(2)


def resolve_threads():
    return [thread for thread in threading.enumerate() if thread.name == "resolve"]


@pytest.mark.parametrize("answer", [FOUND, NOT_FOUND], ids=["found", "not found"])
def test_all_who_want_a_name_share_one_lookup(lookups, answer):
    lookups.answer = answer
    one, ready = Resolver(), threading.Barrier(21)

    def resolve():
        ready.wait(5)
        return one.resolve("api.example", 443, 5)

    with ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(resolve) for _ in range(20)]
        ready.wait(5)
        assert lookups.began.acquire(timeout=5)
        time.sleep(0.2)  # the others come while it runs
        lookups.gate.set()
        assert [each.exception() or each.result() for each in waiting] == [answer] * 20
    assert lookups.asked == [("api.example", 443)]


@pytest.mark.parametrize("other", [("api.example", 443), ("hangs.example", 8443)])
def test_other_names_and_ports_do_not_wait_for_one_that_hangs(lookups, other):
    one = Resolver()
    with pytest.raises(TimeoutError):
        one.resolve("hangs.example", 443, 0.02)
    lookups.ready.add(other[0])
    assert one.resolve(*other, 1) == FOUND
    assert lookups.asked == [("hangs.example", 443), other]


def test_a_name_is_looked_up_anew_when_nobody_waits_after_a_failure_too(lookups):
    lookups.gate.set()
    one = Resolver()
    failure = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    for lookups.answer in (FOUND, failure, FOUND):
        if lookups.answer is failure:
            with pytest.raises(socket.gaierror):
                one.resolve("api.example", 443, 5)
        else:
            assert one.resolve("api.example", 443, 5) == FOUND
        for thread in resolve_threads():
            thread.join(2)
    assert lookups.asked == [("api.example", 443)] * 3


def test_lookups_that_hang_end_in_a_timeout_and_do_not_pile_up_in_threads(lookups):
    one = Resolver()
    for _ in range(5):
        with pytest.raises(TimeoutError):
            one.resolve("api.example", 443, 0.01)
    assert len(lookups.asked) == 1
    (thread,) = resolve_threads()
    assert thread.daemon  # it does not keep a process from ending


def test_the_next_caller_takes_the_late_answer_of_a_lookup_that_others_gave_up(lookups):
    one = Resolver()
    with pytest.raises(TimeoutError):
        one.resolve("api.example", 443, 0.01)
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(one.resolve, "api.example", 443, 5)
        lookups.gate.set()
        assert later.result() == FOUND


@pytest.mark.parametrize("name", ["a" * 64 + ".example", "a..example", ".example", "\u2028.example"])
def test_a_name_that_cannot_be_one_is_not_found_at_once(name):
    with pytest.raises(socket.gaierror):
        Resolver().resolve(name, 443, 5)


def test_a_lookup_that_fails_in_an_unknown_way_does_not_hold_up_those_who_wait(lookups):
    lookups.answer = RuntimeError("unknown")
    lookups.gate.set()
    with pytest.raises(RuntimeError):
        Resolver().resolve("api.example", 443, 5)


@pytest.mark.parametrize(
    ("host", "family", "address"),
    [
        ("127.0.0.1", socket.AF_INET, "127.0.0.1"),
        ("::1", socket.AF_INET6, "::1"),
        ("[::1]", socket.AF_INET6, "::1"),
        ("::ffff:192.0.2.1", socket.AF_INET6, "::ffff:192.0.2.1"),
    ],
)
def test_a_literal_address_takes_no_thread(monkeypatch, host, family, address):
    def no_thread(*args, **kwargs):
        raise AssertionError("a thread was started")

    monkeypatch.setattr(resolver.threading, "Thread", no_thread)
    found = Resolver().resolve(host, 8443, 0)
    assert [(one[0], one[4][:2]) for one in found] == [(family, (address, 8443))]


def test_a_thread_that_cannot_be_started_is_started_by_the_next_caller(lookups, monkeypatch):
    def no_more_threads(thread):
        raise RuntimeError("can't start new thread")

    lookups.gate.set()
    one = Resolver()
    with monkeypatch.context() as exhausted:
        exhausted.setattr(threading.Thread, "start", no_more_threads)
        with contextlib.suppress(RuntimeError, OSError):
            one.resolve("api.example", 443, 0.05)
    assert one.resolve("api.example", 443, 1) == FOUND
