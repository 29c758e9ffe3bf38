"""The watcher: deadlines fire in time, in order and once; cancelled ones cost nothing."""

import contextlib
import gc
import os
import threading
import time
import weakref

import pytest

from aiproxy.transport.watch import Reason, Watcher

SOON = 0.05  # seconds
TOLERANCE = 0.15  # of a busy machine
LONG = 600.0


class Call:
    """What the watcher ends; notes when, why and by which thread."""

    def __init__(self, name="call", log=None):
        self.name = name
        self.reasons = []
        self.aborted = threading.Event()
        self._log = log

    def abort(self, reason):
        self.at = time.monotonic()
        self.thread = threading.current_thread()
        self.reasons.append(reason)
        if self._log is not None:
            self._log.append(self.name)
        self.aborted.set()


def watch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "watch"]


@pytest.mark.parametrize("reason", Reason)
def test_a_deadline_aborts_its_call_in_time_with_its_reason(reason):
    call = Call()
    began = time.monotonic()
    Watcher(patience=60).deadline(call, SOON, reason)
    assert call.aborted.wait(2)
    assert SOON <= call.at - began < SOON + TOLERANCE
    assert call.reasons == [reason]


def test_a_deadline_fires_once():
    watcher, call, later = Watcher(patience=60), Call(), Call()
    watcher.deadline(call, 0.0, Reason.TIMEOUT)
    watcher.deadline(later, SOON, Reason.TIMEOUT)
    assert later.aborted.wait(2)
    assert call.reasons == [Reason.TIMEOUT]


def test_a_cancelled_deadline_never_fires():
    watcher, cancelled, later = Watcher(patience=60), Call(), Call()
    deadline = watcher.deadline(cancelled, SOON / 2, Reason.TIMEOUT)
    watcher.deadline(later, SOON, Reason.TIMEOUT)
    deadline.cancel()
    assert later.aborted.wait(2)
    assert cancelled.reasons == []


def test_cancelling_again_or_after_the_time_is_harmless():
    watcher, first, second, third = Watcher(patience=60), Call(), Call(), Call()
    deadline = watcher.deadline(first, 0.0, Reason.TIMEOUT)
    assert first.aborted.wait(2)
    other = watcher.deadline(second, LONG, Reason.TIMEOUT)
    for _ in range(200):  # if each counted, the sweep would take them for so many
        deadline.cancel()
        other.cancel()
    watcher.deadline(third, SOON, Reason.TIMEOUT)
    assert third.aborted.wait(2)
    assert (first.reasons, second.reasons) == ([Reason.TIMEOUT], [])


def test_deadlines_fire_in_the_order_of_their_times_not_of_their_making():
    watcher, log = Watcher(patience=60), []
    delays = [0.12, 0.02, 0.08, 0.05, 0.1]
    calls = [Call(delay, log) for delay in delays]
    for call, delay in zip(calls, delays, strict=True):
        watcher.deadline(call, delay, Reason.TIMEOUT)
    assert calls[0].aborted.wait(2)
    assert log == sorted(delays)


def test_an_earlier_deadline_is_not_held_up_by_a_sleep_until_a_later_one():
    watcher, late, soon = Watcher(patience=60), Call(), Call()
    watcher.deadline(late, LONG, Reason.TIMEOUT)
    time.sleep(0.02)  # the thread sleeps by now
    began = time.monotonic()
    watcher.deadline(soon, SOON, Reason.CONNECT_TIMEOUT)
    assert soon.aborted.wait(2)
    assert soon.at - began < SOON + TOLERANCE
    assert late.reasons == []


def test_the_watch_goes_on_when_all_deadlines_are_through():
    watcher = Watcher(patience=60)
    for _ in range(3):
        call = Call()
        watcher.deadline(call, 0.01, Reason.TIMEOUT)
        assert call.aborted.wait(2)


def test_deadlines_of_the_same_moment_all_fire(monkeypatch):
    watcher = Watcher(patience=60)
    calls = [Call() for _ in range(50)]
    now = time.monotonic()
    with monkeypatch.context() as frozen:
        frozen.setattr("aiproxy.transport.watch.time.monotonic", lambda: now)
        for call in calls:
            watcher.deadline(call, SOON, Reason.TIMEOUT)
    assert all(call.aborted.wait(2) for call in calls)


def test_a_call_may_set_a_deadline_while_it_is_aborted():
    watcher, other = Watcher(patience=60), Call()

    class Chained(Call):
        def abort(self, reason):
            watcher.deadline(other, 0.01, reason)
            super().abort(reason)

    watcher.deadline(Chained(), 0.01, Reason.TIMEOUT)
    assert other.aborted.wait(2)


def test_many_cancelled_deadlines_do_not_pile_up():
    watcher = Watcher(patience=60)
    made = [weakref.ref(watcher.deadline(Call(), LONG, Reason.TIMEOUT)) for _ in range(64)]
    for ref in made:
        ref().cancel()
    for _ in range(5000):
        deadline = watcher.deadline(Call(), LONG, Reason.TIMEOUT)
        made.append(weakref.ref(deadline))
        deadline.cancel()
    del deadline
    gc.collect()
    assert sum(ref() is not None for ref in made) < 200


def test_a_cancelled_deadline_lets_go_of_its_call():
    watcher, call = Watcher(patience=60), Call()
    ref = weakref.ref(call)
    deadline = watcher.deadline(call, LONG, Reason.TIMEOUT)
    deadline.cancel()
    del call
    gc.collect()
    assert ref() is None


def test_a_sweep_keeps_what_is_not_cancelled():
    watcher, log = Watcher(patience=60), []
    kept = [Call(n, log) for n in range(10)]
    for n, call in enumerate(kept):
        watcher.deadline(call, SOON + n / 200, Reason.TIMEOUT)
        for _ in range(300):
            watcher.deadline(Call(), LONG, Reason.TIMEOUT).cancel()
    assert kept[-1].aborted.wait(2)
    assert log == list(range(10))


def test_cancelling_many_among_many_that_stay_is_not_quadratic():
    watcher = Watcher(patience=60)
    deadlines = [watcher.deadline(Call(), LONG + n % 7, Reason.TIMEOUT) for n in range(20_000)]
    began = time.monotonic()
    for deadline in deadlines[::2]:
        deadline.cancel()
    assert time.monotonic() - began < 1.0


def test_no_thread_runs_before_the_first_deadline_and_one_after_it():
    before = len(watch_threads())
    watcher, call = Watcher(patience=60), Call()
    assert len(watch_threads()) == before
    for _ in range(20):
        watcher.deadline(Call(), LONG, Reason.TIMEOUT)
    assert len(watch_threads()) == before + 1
    watcher.deadline(call, 0.0, Reason.TIMEOUT)
    assert call.aborted.wait(2)
    assert call.thread.daemon  # it must not keep a worker from ending


def test_threads_may_set_and_cancel_deadlines_at_once():
    watcher = Watcher(patience=60)
    fired, cancelled = [], []

    def work():
        for n in range(300):
            call = Call()
            deadline = watcher.deadline(call, LONG if n % 2 else 0.02, Reason.TIMEOUT)
            if n % 2:
                deadline.cancel()
                cancelled.append(call)
            else:
                fired.append(call)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(call.aborted.wait(2) for call in fired)
    assert {len(call.reasons) for call in fired} == {1}
    assert not any(call.reasons for call in cancelled)


def test_a_thread_that_cannot_be_started_is_started_by_the_next_deadline(monkeypatch):
    def no_more_threads(thread):
        raise RuntimeError("can't start new thread")

    watcher, call = Watcher(patience=60), Call()
    with monkeypatch.context() as exhausted:
        exhausted.setattr(threading.Thread, "start", no_more_threads)
        with contextlib.suppress(RuntimeError):
            watcher.deadline(Call(), LONG, Reason.TIMEOUT)
    watcher.deadline(call, 0.0, Reason.TIMEOUT)
    assert call.aborted.wait(1)


def test_a_closed_watcher_leaves_no_thread_and_no_descriptor_and_watches_nothing_more():
    descriptors, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    watcher, call = Watcher(patience=60), Call()
    watcher.deadline(call, LONG, Reason.TIMEOUT)
    (thread,) = set(threading.enumerate()) - threads
    watcher.close()
    thread.join(5)
    assert not thread.is_alive()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    watcher.deadline(call, 0.0, Reason.TIMEOUT).cancel()
    assert not call.aborted.is_set()
