"""Weighted round robin, the model filter, and the way one request takes."""

import itertools
import threading
from collections import Counter

import msgspec
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


class Progress:
    """What a request has met so far."""

    def __init__(self, may_ask_open_circuits=True):
        self.may_ask_open_circuits = may_ask_open_circuits


def walk(balancer, model="m", preferred=(), may_ask_open_circuits=True):
    return balancer.candidates(balancer.serving(model), model, Progress(may_ask_open_circuits), preferred)


def serve(balancer, down=(), model="m"):
    """The name of the upstream that answers one request; `down` ones fail each attempt."""
    for candidate in walk(balancer, model):
        if candidate.upstream.name not in down:
            candidate.succeed()
            return candidate.upstream.name
        candidate.fail()
    return None


def names(candidates):
    return [candidate.upstream.name for candidate in candidates]


def open_circuit(upstream):
    for _ in range(3):
        upstream.breaker.settle(upstream.breaker.acquire(), Outcome.FAILURE)


def test_the_order_is_nginx_s_smooth_one():
    balancer = Balancer([upstream("a", 5), upstream("b", 1), upstream("c", 1)])
    assert "".join(serve(balancer) for _ in range(14)) == "aabacaa" * 2


def test_weights_three_to_one_give_three_hundred_to_one_hundred():
    balancer = Balancer([upstream("a", 3), upstream("b", 1)])
    assert Counter(serve(balancer) for _ in range(400)) == {"a": 300, "b": 100}


def test_an_upstream_pays_for_its_turn_even_if_it_fails():
    flaky, other = upstream("flaky"), upstream("other")
    balancer = Balancer([flaky, other])
    asked = Counter()
    for _ in range(300):
        for candidate in walk(balancer):
            asked[candidate.upstream.name] += 1
            if candidate.upstream is other or asked["flaky"] % 3 == 0:
                candidate.succeed()
                break
            candidate.fail()
    assert asked["flaky"] == 150


@pytest.mark.parametrize("order", list(itertools.permutations("abx")))
@pytest.mark.parametrize("weight", [1, 2, 3, 10])
def test_the_others_keep_their_shares_while_an_upstream_fails(order, weight):
    made = {"a": upstream("a", 3), "b": upstream("b", 1), "x": upstream("x", weight)}
    for each in made.values():
        each.breaker.configure(10**6, 1800)  # its circuit never opens
    balancer = Balancer([made[name] for name in order])
    counts = Counter(serve(balancer, down="x") for _ in range(400))
    assert abs(counts["a"] - 300) <= 1
    assert counts["a"] + counts["b"] == 400


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
    assert sorted(names(walk(balancer))) == ["a", "b", "c"]


def test_an_open_upstream_is_passed_over_and_the_last_resort_is_the_one_due_first():
    clock = Clock()
    late, soon, closed = upstream("late", clock=clock), upstream("soon", clock=clock), upstream("closed")
    open_circuit(soon)
    clock.now += 10
    open_circuit(late)
    met = list(walk(Balancer([late, soon, closed])))
    assert names(met) == ["closed", "soon", "late"]
    assert [each.is_last_resort for each in met] == [False, True, True]


def test_upstreams_in_backoff_come_before_open_ones_and_the_one_due_first_leads():
    clock = Clock()
    opened, later, sooner = (upstream(name, clock=clock) for name in ("opened", "later", "sooner"))
    open_circuit(opened)
    later.models.back_off("m", 30.0, clock.now, False)
    sooner.models.back_off("m", 20.0, clock.now, False)
    assert names(walk(Balancer([opened, later, sooner]))) == ["sooner", "later", "opened"]


def test_open_circuits_are_left_alone_where_the_request_is_at_fault_and_backoffs_are_not():
    clock = Clock()
    opened, limited = upstream("opened", clock=clock), upstream("limited", clock=clock)
    open_circuit(opened)
    limited.models.back_off("m", 30.0, clock.now, False)
    balancer = Balancer([opened, limited])
    assert names(walk(balancer, may_ask_open_circuits=False)) == ["limited"]


def test_a_model_in_backoff_leaves_the_other_models_alone():
    clock = Clock()
    limited, other = upstream("limited", 100, clock=clock), upstream("other", clock=clock)
    limited.models.back_off("m", 30.0, clock.now, False)
    balancer = Balancer([limited, other])
    assert next(walk(balancer, "m")).upstream is other
    assert next(walk(balancer, "n")).upstream is limited
    clock.now += 30
    assert next(walk(balancer, "m")).upstream is limited


def test_an_upstream_that_is_due_takes_one_trial():
    clock = Clock()
    due, other = upstream("due", 100, clock=clock), upstream("other", 1)
    open_circuit(due)
    clock.now += 1800
    balancer = Balancer([due, other])
    first = next(walk(balancer))
    assert (first.upstream, first.kind) == (due, Pass.TRIAL)
    assert next(walk(balancer)).upstream is other


def test_preferred_upstreams_come_first_in_their_order_and_do_not_move_the_round_robin():
    made = [upstream("a", 5), upstream("b"), upstream("c")]
    balancer = Balancer(made)
    met = walk(balancer, preferred=[made[2], made[1]])
    assert names(met) == ["c", "b", "a"]
    assert "".join(serve(balancer) for _ in range(7)) == "aabacaa"


def test_a_preferred_upstream_that_is_open_is_passed_over():
    home, other = upstream("home"), upstream("other")
    open_circuit(home)
    assert names(walk(Balancer([home, other]), preferred=[home])) == ["other", "home"]


def test_a_candidate_is_settled_once():
    one = upstream("a")
    candidate = next(walk(Balancer([one])))
    for _ in range(5):
        candidate.fail()
    assert one.breaker.circuit().failures == 1


def test_each_is_asked_once_though_circuits_open_and_close_meanwhile():
    clock = Clock()
    backing_off, open_one = (upstream(name, clock=clock) for name in "ab")
    backing_off.breaker.back_off(backing_off.breaker.acquire(), 60)
    open_circuit(open_one)
    asked = []
    for candidate in walk(Balancer([backing_off, open_one])):
        asked.append(candidate.upstream.name)
        # Other requests' attempts, begun before, now open the one circuit and close the other.
        open_one.breaker.close()
        for _ in range(3):
            permit = backing_off.breaker.acquire_last_resort()
            backing_off.breaker.settle(msgspec.structs.replace(permit, kind=Pass.ORDINARY), Outcome.FAILURE)
    assert asked == ["a", "b"]
