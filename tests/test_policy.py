"""The policy table, row by row."""

import pytest

from aiproxy.policy import Charge, Fault, Rank, rule_for


@pytest.mark.parametrize("fault", [Fault.CONNECT, Fault.BROKEN, Fault.TIMEOUT, Fault.NO_ANSWER])
def test_faults_before_the_commit_point_move_on_and_count(fault):
    rule = rule_for(fault)
    assert (rule.next_upstream, rule.charge, rule.rank) == (True, Charge.FAILURE, Rank.NONE)


@pytest.mark.parametrize("fault", [Fault.CLIENT_LEFT, Fault.RESTART])
def test_what_is_not_the_upstream_s_fault_neither_moves_on_nor_counts(fault):
    rule = rule_for(fault)
    assert (rule.next_upstream, rule.charge) == (False, Charge.NOTHING)


@pytest.mark.parametrize("status", [401, 402, 408, 429, 500, 502, 503, 504, 529, 599])
def test_statuses_that_count(status):
    rule = rule_for(Fault.ERROR, status)
    assert (rule.next_upstream, rule.charge) == (True, Charge.FAILURE)


@pytest.mark.parametrize("status", [400, 403, 404, 409, 413, 422, 451])
def test_other_4xx_count_only_if_another_upstream_answers(status):
    rule = rule_for(Fault.ERROR, status)
    assert (rule.next_upstream, rule.charge) == (True, Charge.IF_ANOTHER_ANSWERS)


@pytest.mark.parametrize("status", [429, 503, 529])
def test_a_retry_after_makes_it_rest(status):
    assert rule_for(Fault.ERROR, status, 0.0).charge is Charge.REST
    assert rule_for(Fault.ERROR, status, 20.0).charge is Charge.REST


@pytest.mark.parametrize("status", [400, 401, 408, 500, 502])
def test_a_retry_after_on_other_statuses_changes_nothing(status):
    assert rule_for(Fault.ERROR, status, 20.0) == rule_for(Fault.ERROR, status)


def test_the_client_is_told_of_its_request_first_then_of_what_may_be_retried_then_of_accounts():
    ranks = [rule_for(Fault.ERROR, status).rank for status in (400, 413, 429, 529, 401, 402, 403)]
    assert ranks == [Rank.REQUEST] * 2 + [Rank.RETRYABLE] * 2 + [Rank.ACCOUNT] * 3
    assert Rank.REQUEST > Rank.RETRYABLE > Rank.ACCOUNT > Rank.NONE
