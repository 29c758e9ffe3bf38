"""The policy table, row by row."""

import pytest

from aiproxy.policy import Cost, Decision, Fault, Problem, Rank, decide

MODELS = ("claude-x", "their-claude-x")


def error(status, message="no", type_="", code="", retry_after=None):
    return Problem(Fault.ERROR, status, type_, message, code, retry_after)


@pytest.mark.parametrize("fault", [Fault.CONNECT, Fault.BROKEN, Fault.NO_ANSWER])
def test_no_valid_answer_is_a_failure_of_the_upstream(fault):
    assert decide(Problem(fault)) == Decision(try_next=True, cost=Cost.FAILURE)


def test_a_timeout_counts_unless_the_upstream_answered_another_request_meanwhile():
    assert decide(Problem(Fault.TIMEOUT)) == Decision(try_next=True, cost=Cost.LATE)


@pytest.mark.parametrize("fault", [Fault.CLIENT_LEFT, Fault.RESTART])
def test_a_client_that_leaves_and_a_shutdown_cost_nothing_and_end_the_request(fault):
    assert decide(Problem(fault)) == Decision(try_next=False, cost=Cost.NONE)


@pytest.mark.parametrize("status", [408, 500, 504, 599])
@pytest.mark.parametrize("is_bound", [False, True])
def test_5xx_and_408_are_failures_of_the_upstream(status, is_bound):
    decision = decide(error(status), MODELS, is_bound)
    try_next = status != 408 or not is_bound
    assert decision == Decision(try_next=try_next, cost=Cost.FAILURE, rank=Rank.RETRYABLE)


def test_a_503_that_says_when_to_come_back_is_a_backoff_of_the_upstream():
    decision = decide(error(503, retry_after=20.0))
    assert (decision.cost, decision.backoff, decision.rank) == (Cost.UPSTREAM_BACKOFF, 20.0, Rank.RETRYABLE)
    assert decide(error(503, retry_after=0.0)).cost is Cost.FAILURE


@pytest.mark.parametrize(
    "problem",
    [
        error(401),
        error(402),
        error(403, type_="authentication_error"),
        error(403, type_="billing_error"),
        *(error(403, f"Your key is {word}.") for word in ("revoked", "suspended", "disabled", "expired")),
        error(403, "Out of credits"),
        error(403, "See your Billing page"),
        error(400, "Your credit balance is too low to access the Anthropic API."),
        error(400, "You have reached your specified API usage limits. You will regain access on 2026-12-01."),
        error(400, "You have reached your specified workspace API usage limits."),
        error(400, "This organization has been disabled."),
        error(400, "Your organization is on hold"),
        error(400, "Your organization's credit balance isn't sufficient"),
        error(400, "no", code="organization_on_hold"),
        error(400, "no", code="cmek_not_approved"),
    ],
)
def test_an_error_about_the_account_is_a_failure_and_is_not_shown(problem):
    assert decide(problem, MODELS) == Decision(try_next=True, cost=Cost.FAILURE, rank=Rank.ACCOUNT)


@pytest.mark.parametrize(
    "problem",
    [
        error(400, "tools.0.name: 'usage limits' is not a valid name"),
        error(400, 'messages.0: unknown role "credit balance"'),
        error(403, "no access to `billing`"),
    ],
)
def test_the_client_s_own_words_in_an_error_do_not_make_it_one_about_the_account(problem):
    assert decide(problem, MODELS).cost is Cost.REFUSED


@pytest.mark.parametrize("code", ["enforced_spend_limit_reached", "contract_spend_limit_reached"])
def test_a_spend_limit_is_a_backoff_of_the_whole_upstream_for_the_cooldown(code):
    decision = decide(error(429, code=code))
    assert (decision.try_next, decision.cost, decision.backoff) == (True, Cost.UPSTREAM_BACKOFF, None)


@pytest.mark.parametrize("status", [429, 529])
@pytest.mark.parametrize(
    ("retry_after", "backoff"),
    [(20.0, 20.0), (None, None), (0.0, None), (-1.0, None), (float("inf"), None), (float("nan"), None)],
)
def test_a_limit_is_a_backoff_of_the_model(status, retry_after, backoff):
    decision = decide(error(status, retry_after=retry_after), MODELS)
    assert decision == Decision(try_next=True, cost=Cost.MODEL_BACKOFF, rank=Rank.RETRYABLE, backoff=backoff)


@pytest.mark.parametrize(
    "problem", [error(404), error(403, "No access to claude-x"), error(403, "their-claude-x is not for you")]
)
def test_a_model_that_is_missing_is_counted_for_this_model(problem):
    decision = decide(problem, MODELS)
    assert decision == Decision(try_next=True, cost=Cost.MODEL_MISSING, rank=Rank.LACKING)


@pytest.mark.parametrize("status", [400, 403, 409, 415, 422, 451])
def test_any_other_4xx_is_about_the_request_and_costs_nothing(status):
    assert decide(error(status), MODELS) == Decision(try_next=True, cost=Cost.REFUSED, rank=Rank.REQUEST)


@pytest.mark.parametrize("status", [405, 413])
def test_405_and_413_say_what_one_upstream_lacks(status):
    assert decide(error(status), MODELS) == Decision(try_next=True, cost=Cost.REFUSED, rank=Rank.LACKING)


@pytest.mark.parametrize(
    "message", ["thinking: block is bound to a different conversation", "thinking: prefix mismatch"]
)
def test_a_thinking_block_of_another_conversation_reaches_the_client_at_once(message):
    assert decide(error(400, message)) == Decision(try_next=False, cost=Cost.NONE, rank=Rank.REQUEST)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 429])
def test_a_bound_request_is_not_tried_elsewhere_after_a_4xx(status):
    bound, free = decide(error(status), MODELS, is_bound=True), decide(error(status), MODELS)
    assert not bound.try_next
    assert bound.cost is (Cost.NONE if status == 404 else free.cost)


def test_the_client_gets_errors_about_the_request_first_then_what_may_be_retried_then_what_is_lacking():
    ranks = [decide(error(status), MODELS).rank for status in (400, 429, 404, 401)]
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) == 4
