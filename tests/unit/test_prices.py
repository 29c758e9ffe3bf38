"""What answers cost, compared with an arithmetic of its own."""

import random
import tracemalloc
from fractions import Fraction

import msgspec
import pytest

from aiproxy.api.usage import Tokens, Usage
from aiproxy.config import Price, UpstreamSettings
from aiproxy.ledger.prices import Prices

CUSTOM = {"claude-test": Price(3, 15, 0.3, 3.75, 6, 10), "claude-other-*": Price(1, 2, 0.1, 1.25, 2, 20)}
KINDS = ("input_tokens", "output_tokens", "cache_read_input_tokens")


def prices(custom=CUSTOM, **upstream):
    settings = UpstreamSettings(name="a", base_url="https://a.example", **upstream)
    return Prices(custom, [settings])


def nano(usage, upstream_model="claude-test", model="claude-test", of=None):
    return (of or prices()).bill(Usage(**usage), "a", upstream_model, model).nano


def dollars(text):
    return round(Fraction(text) * 10**9)


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        ({"input_tokens": 1_000_000}, "3"),
        ({"output_tokens": 1_000_000}, "15"),
        ({"cache_read_input_tokens": 1_000_000}, "0.3"),
        ({"cache_creation_input_tokens": 1_000_000}, "3.75"),
        (
            {
                "cache_creation_input_tokens": 1_000_000,
                "cache_creation": {"ephemeral_1h_input_tokens": 1_000_000, "ephemeral_5m_input_tokens": 0},
            },
            "6",
        ),
        (
            {
                "cache_creation_input_tokens": 1_000_000,
                "cache_creation": {
                    "ephemeral_1h_input_tokens": 400_000,
                    "ephemeral_5m_input_tokens": 600_000,
                },
            },
            "4.65",
        ),
        ({"cache_creation": {"ephemeral_5m_input_tokens": 1_000_000}}, "3.75"),
        ({"server_tool_use": {"web_search_requests": 3, "web_fetch_requests": 9}}, "0.03"),
        ({"input_tokens": 1_000_000, "speed": "fast"}, "6"),
        ({"input_tokens": 1_000_000, "speed": "standard", "inference_geo": "global"}, "3"),
        ({"input_tokens": 1_000_000, "inference_geo": "us"}, "3.3"),
        ({"input_tokens": 1_000_000, "service_tier": "batch"}, "1.5"),
        ({"input_tokens": 1}, "0.000003"),
        ({}, "0"),
    ],
)
def test_each_kind_has_its_price(usage, cost):
    assert nano(usage) == dollars(cost)


@pytest.mark.parametrize(
    ("iterations", "cost"),
    [
        ([{"type": "message", "input_tokens": 9}], "3"),
        ([{"type": "compaction", "input_tokens": 1_000_000}], "6"),
        ([{"type": "advisor_message", "model": "claude-other-1", "output_tokens": 1_000_000}], "5"),
        ([{"type": "fallback_message", "model": "claude-other-1", "input_tokens": 9}], "1"),
        (
            [
                {"type": "message", "model": "claude-test", "input_tokens": 5},
                {"type": "compaction", "input_tokens": 1_000_000},
                {"type": "fallback_message", "model": "claude-other-1", "input_tokens": 9},
            ],
            "4",
        ),
        ([None, 7, "x", {}, {"type": 5}, {"type": "compaction", "input_tokens": "many", "self": 1}], "3"),
        ("nonsense", "3"),
    ],
)
def test_iterations_add_what_the_sums_leave_out(iterations, cost):
    assert nano({"input_tokens": 1_000_000, "iterations": iterations}) == dollars(cost)


def test_tokens_of_iterations_are_part_of_the_bill():
    usage = Usage(input_tokens=5, iterations=[{"type": "compaction", "input_tokens": 7, "output_tokens": 2}])
    assert prices().bill(usage, "a", "claude-test", "claude-test").tokens == Tokens(input=12, output=2)


@pytest.mark.parametrize(
    ("upstream_model", "model", "cost"),
    [
        ("claude-test", "claude-other-1", "3"),  # the upstream's name first
        ("unheard", "claude-other-1", "1"),  # then the client's
        ("claude-sonnet-5-5", "claude-test", "2"),  # Anthropic's own price
        ("us.anthropic.claude-opus-5-5-v1:0", "x", "4"),
        ("claude-opus-5", "x", "5"),
        ("claude-opus-4-20250514", "x", "15"),
        ("claude-haiku-4-5-20251001", "x", "1"),
        ("claude-3-5-haiku-latest", "x", "0.8"),
        ("unheard", "unheard too", "15"),  # the dearest
    ],
)
def test_a_price_is_found_by_the_upstream_s_model_then_by_the_client_s(upstream_model, model, cost):
    assert nano({"input_tokens": 1_000_000}, upstream_model, model) == dollars(cost)


def test_a_model_without_a_price_is_marked():
    assert not prices().bill(Usage(input_tokens=1), "a", "unheard", "unheard").is_priced
    assert prices().bill(Usage(input_tokens=1), "a", "unheard", "claude-test").is_priced


def test_the_dearest_price_may_be_a_configured_one():
    dear = {"gold": Price(1000, 5000, 1, 1, 1)}
    assert nano({"output_tokens": 1_000_000}, "unheard", of=prices(dear)) == dollars("5000")


def test_an_upstream_s_own_price_and_multiplier_count_first():
    own = prices(prices={"claude-test": Price(2, 4, 0, 0, 0)}, price_multiplier=0.85)
    assert nano({"input_tokens": 1_000_000}, of=own) == dollars("1.7")
    assert nano({"output_tokens": 1_000_000}, "claude-other-1", of=own) == dollars("1.7")
    assert nano({"server_tool_use": {"web_search_requests": 1000}}, of=own) == dollars("8.5")


def test_long_names_that_clients_make_up_are_not_kept_in_memory():
    one = prices()
    tracemalloc.start()
    for n in range(100):
        one.estimate(Tokens(input=1), "a", f"claude-{n}" + "x" * 200_000, "claude-test")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1_000_000


@pytest.mark.parametrize(("prompt", "cost"), [(100_000, "0.01"), (100_001, "0.0500005")])
def test_long_prompts_of_haiku_5_5_have_another_price(prompt, cost):
    assert nano({"input_tokens": prompt}, "claude-haiku-5-5") == dollars(cost)
    cached = {"input_tokens": 1, "cache_read_input_tokens": prompt - 1}
    assert (nano(cached, "claude-haiku-5-5") > dollars("0.002")) == (prompt > 100_000)


def test_the_prompt_of_a_tool_loop_is_its_longest_iteration():
    turns = [{"type": "message", "input_tokens": 60_000}, {"type": "message", "input_tokens": 70_000}]
    assert nano({"input_tokens": 130_000, "iterations": turns}, "claude-haiku-5-5") == dollars("0.013")


@pytest.mark.parametrize(
    ("model", "times"),
    [("claude-opus-4-6", 6), ("claude-opus-4-7", 6), ("claude-opus-4-8", 2), ("claude-opus-5-5", 2)],
)
def test_fast_mode_costs_a_multiple(model, times):
    usage = {"input_tokens": 1_000_000, "output_tokens": 1000}
    assert nano({**usage, "speed": "fast"}, model) == times * nano(usage, model)


#: What the clerk below knows of prices: dollars per million tokens, and per thousand searches.
LIST = {
    "claude-test": (3, 15, "0.3", "3.75", 6, 10),
    "claude-other-1": (1, 2, "0.1", "1.25", 2, 20),
    "claude-sonnet-5-20260101": (2, 10, "0.2", "2.5", 4, 10),
    "claude-opus-4-7": (5, 25, "0.5", "6.25", 10, 10),
}


def random_counts(dice):
    """The members of `usage` that any iteration has, too; some have no breakdown of cache writes."""
    counts = {kind: dice.randrange(10 ** dice.randrange(1, 8)) for kind in KINDS}
    minutes, hour = dice.randrange(10**6), dice.choice([0, dice.randrange(10**6)])
    counts["cache_creation_input_tokens"] = minutes + hour
    if hour or dice.random() < 0.5:
        parts = {"ephemeral_5m_input_tokens": minutes, "ephemeral_1h_input_tokens": hour}
        counts["cache_creation"] = parts
    return counts


def random_usage(dice):
    kinds = ("message", "compaction", "advisor_message", "fallback_message")
    entries = [{"type": dice.choice(kinds), **random_counts(dice)} for _ in range(dice.randrange(4))]
    for entry in entries:
        if entry["type"] in kinds[2:]:
            entry["model"] = dice.choice(list(LIST))
    return {
        **random_counts(dice),
        "iterations": dice.choice([entries, None]),
        "server_tool_use": dice.choice([None, {"web_search_requests": dice.randrange(9)}]),
        "speed": dice.choice([None, "standard", "fast"]),
        "inference_geo": dice.choice([None, "global", "us"]),
        "service_tier": dice.choice([None, "standard", "batch"]),
    }


def clerk(usage, asked):
    """Dollars of the whole of `usage`, by an arithmetic that shares nothing with the product's."""
    model, total = asked, Fraction(0)

    def part(counts, of):
        rates = [Fraction(each) / 10**6 for each in LIST[of][:5]]
        hour = counts.get("cache_creation", {}).get("ephemeral_1h_input_tokens", 0)
        numbers = [*(counts[kind] for kind in KINDS), counts["cache_creation_input_tokens"] - hour, hour]
        cost = sum(number * rate for number, rate in zip(numbers, rates, strict=True))
        if usage["speed"] == "fast":
            cost *= 6 if of == "claude-opus-4-7" else 2
        if usage["inference_geo"] == "us":
            cost *= Fraction("1.1")
        return cost / 2 if usage["service_tier"] == "batch" else cost

    for entry in usage["iterations"] or []:
        if entry["type"] == "compaction":
            total += part(entry, asked)
        elif entry["type"] == "advisor_message":
            total += part(entry, entry["model"])
        elif entry["type"] == "fallback_message":
            model = entry["model"]
    searches = (usage["server_tool_use"] or {}).get("web_search_requests", 0)
    return total + part(usage, model) + searches * Fraction(LIST[model][5]) / 1000


@pytest.mark.parametrize("multiplier", ["1", "0.85"])
def test_random_usages_with_iterations_cost_what_a_clerk_says_to_the_nano_dollar(multiplier):
    dice, one = random.Random(11), prices(price_multiplier=float(multiplier))
    for _ in range(2000):
        usage, asked = random_usage(dice), dice.choice(list(LIST))
        exact = clerk(usage, asked) * Fraction(multiplier) * 10**9
        assert abs(nano(usage, asked, asked, one) - exact) <= Fraction(501, 1000), usage


def random_json(dice, depth=0):
    """Anything that an upstream may send in the place of a figure."""
    kind = dice.randrange(9 if depth < 4 else 7)
    if kind == 7:
        return [random_json(dice, depth + 1) for _ in range(dice.randrange(4))]
    if kind == 8:
        return {dice.choice(WORDS): random_json(dice, depth + 1) for _ in range(dice.randrange(4))}
    return dice.choice([None, True, -1, 10**30, 1e300, "7", "", "claude-test", "compaction", "fast", 5, -0.0])


WORDS = [*KINDS, "cache_creation_input_tokens", "cache_creation", "ephemeral_1h_input_tokens", "iterations",
         "ephemeral_5m_input_tokens", "server_tool_use", "web_search_requests", "web_fetch_requests", "speed",
         "type", "model", "self", "figures", "_figures", "message_id", ""]  # fmt: skip


def test_random_nonsense_for_usage_raises_nothing_and_costs_no_less_than_nothing():
    dice, one = random.Random(13), prices()
    for _ in range(5000):
        report = Usage()
        for _ in range(2):
            usage = {dice.choice(WORDS): random_json(dice) for _ in range(dice.randrange(6))}
            if dice.random() < 0.5:
                usage["iterations"] = [{"type": dice.choice(["compaction", "advisor_message"]), **usage}]
            message = msgspec.json.encode({"usage": usage, "message": {"usage": usage}})
            report.note_event(dice.choice([b"message_start", b"message_delta"]), message)
        bill = one.bill(report, "a", "claude-test", "claude-test")
        assert min(bill.nano, bill.web_searches, bill.web_fetches, *msgspec.structs.astuple(bill.tokens)) >= 0


def test_the_highest_figures_that_are_believed_do_not_overflow_a_row():
    most = dict.fromkeys([*KINDS, "cache_creation_input_tokens"], 10**11 - 1)
    usage = {**most, "iterations": [{"type": "compaction", **most}] * 100, "speed": "fast"}
    bill = prices().bill(Usage(**usage), "a", "claude-opus-4-7", "x")
    assert bill.nano == 10**14
    assert max(msgspec.structs.astuple(bill.tokens)) == 10**11


@pytest.mark.parametrize(
    "value",
    [
        -1,
        10**30,
        True,
        "5",
        1.5,
        [],
        {},
        [[[[1]]]],
        {"web_search_requests": -1},
        {"web_search_requests": "x"},
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "name",
    [*KINDS, "cache_creation_input_tokens", "cache_creation", "server_tool_use", "speed", "inference_geo",
     "service_tier", "iterations", "self"],
)  # fmt: skip
def test_hostile_usage_costs_nothing_and_raises_nothing(name, value):
    assert nano({name: value}) == 0
