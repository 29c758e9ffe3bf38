"""Weighted round robin, the model filter, and the way one request takes."""

import itertools
import threading
from collections import Counter

import pytest
from fakes import Clock

from aiproxy.config import UpstreamSettings
from aiproxy.upstreams.balancer import Balancer
from aiproxy.upstreams.breaker import Breaker, Outcome, Pass
from aiproxy.upstreams.upstream import Upstream


def upstream(name, weight=1, available=(), mappings=None, clock=None):
    settings = UpstreamSettings(
        name=name,
        base_url=f"http://{name}.test",
        token="sk-test-token",
        weight=weight,
        available_models=frozenset(available),
        model_mappings=mappings or {},
    )
    return Upstream(settings, Breaker(3, 1800, clock or Clock()))


def walk(balancer, model="m", preferred=()):
    return balancer.candidates(balancer.serving(model), preferred)


def serve(balancer, down=(), model="m"):
    """The name of the upstream that answers one request; `down` ones fail each attempt."""
    way = walk(balancer, model)
    while (choice := way.next(last_resort=True)) is not None:
        failed = choice.upstream.name in down
        choice.settle(Outcome.FAILURE if failed else Outcome.SUCCESS)
        if not failed:
            return choice.upstream.name
    return None


def test_the_order_is_nginx_s_smooth_one():
    balancer = Balancer([upstream("a", 5), upstream("b", 1), upstream("c", 1)])
    assert "".join(serve(balancer) for _ in range(14)) == "aabacaa" * 2


def test_weights_three_to_one_give_three_hundred_to_one_hundred():
    balancer = Balancer([upstream("a", 3), upstream("b", 1)])
    assert Counter(serve(balancer) for _ in range(400)) == {"a": 300, "b": 100}


@pytest.mark.parametrize("order", list(itertools.permutations("abx")))
@pytest.mark.parametrize("weight", [1, 2, 3, 10])
def test_weights_hold_while_a_third_upstream_is_down(order, weight):
    made = {"a": upstream("a", 3), "b": upstream("b", 1), "x": upstream("x", weight)}
    balancer = Balancer([made[name] for name in order])
    assert Counter(serve(balancer, down="x") for _ in range(400)) == {"a": 300, "b": 100}


def test_weights_hold_under_many_threads():
    balancer = Balancer([upstream("a", 3), upstream("b", 1)])
    counts = Counter()
    lock = threading.Lock()

    def work():
        mine = Counter(serve(balancer) for _ in range(500))
        with lock:
            counts.update(mine)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == {"a": 3000, "b": 1000}


def test_only_upstreams_that_serve_the_model_are_candidates():
    balancer = Balancer([upstream("a", available=["x"]), upstream("b", available=["y"]), upstream("c")])
    assert {serve(balancer, model="x") for _ in range(4)} == {"a", "c"}
    assert Balancer([upstream("a", available=["x"])]).serving("y") == []


def test_the_filter_looks_at_the_client_s_name_of_a_model_not_at_the_mapped_one():
    mapped = upstream("a", available=["opus"], mappings={"opus": "opus-4"})
    assert mapped.serves("opus")
    assert not mapped.serves("opus-4")
    assert mapped.model_for("opus") == "opus-4"
    assert mapped.model_for("other") == "other"


def test_a_request_meets_each_upstream_at_most_once():
    balancer = Balancer([upstream("a", 10), upstream("b"), upstream("c")])
    way = walk(balancer)
    met = []
    while (choice := way.next(last_resort=True)) is not None:
        met.append(choice.upstream.name)
    assert sorted(met) == ["a", "b", "c"]


def test_an_open_upstream_is_passed_over_and_the_last_resort_comes_soonest_due_first():
    clock = Clock()
    late, soon, closed = upstream("late", clock=clock), upstream("soon", clock=clock), upstream("closed")
    for _ in range(3):
        soon.breaker.settle(soon.breaker.acquire(), Outcome.FAILURE)
    clock.now += 10
    for _ in range(3):
        late.breaker.settle(late.breaker.acquire(), Outcome.FAILURE)
    way = walk(Balancer([late, soon, closed]))
    assert way.next(last_resort=True).upstream is closed
    choice = way.next(last_resort=True)
    assert (choice.upstream, choice.kind) == (soon, Pass.LAST_RESORT)
    assert way.next(last_resort=True).upstream is late
    assert way.next(last_resort=True) is None


def test_without_leave_the_open_ones_are_left_alone():
    opened = upstream("a")
    for _ in range(3):
        opened.breaker.settle(opened.breaker.acquire(), Outcome.FAILURE)
    assert walk(Balancer([opened])).next(last_resort=False) is None


def test_an_upstream_that_is_due_takes_one_trial():
    clock = Clock()
    due, other = upstream("due", 100, clock=clock), upstream("other", 1)
    for _ in range(3):
        due.breaker.settle(due.breaker.acquire(), Outcome.FAILURE)
    clock.now += 1800
    balancer = Balancer([due, other])
    first = walk(balancer).next(last_resort=True)
    assert (first.upstream, first.kind) == (due, Pass.TRIAL)
    assert walk(balancer).next(last_resort=True).upstream is other


def test_preferred_upstreams_come_first_in_their_order_and_move_no_cursor():
    made = [upstream("a", 5), upstream("b"), upstream("c")]
    balancer = Balancer(made)
    way = walk(balancer, preferred=[made[2], made[1]])
    met = [way.next(last_resort=True).upstream.name for _ in range(3)]
    assert met == ["c", "b", "a"]
    assert "".join(serve(balancer) for _ in range(7)) == "aabacaa"


def test_a_preferred_upstream_that_is_open_is_passed_over():
    home, other = upstream("home"), upstream("other")
    for _ in range(3):
        home.breaker.settle(home.breaker.acquire(), Outcome.FAILURE)
    way = walk(Balancer([home, other]), preferred=[home])
    assert [way.next(last_resort=True).upstream for _ in range(2)] == [other, home]
