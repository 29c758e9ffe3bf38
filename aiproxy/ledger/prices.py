"""What tokens cost: Anthropic's prices, the configuration's, and the cost of what one answer used."""

import functools
from collections.abc import Iterable, Mapping

import msgspec

from ..api.usage import Tokens, Usage
from ..config import Price, UpstreamSettings

#: Nano-dollars in a dollar.
NANO = 10**9
_PICO = 1000  # pico-dollars in a nano-dollar: prices may have six digits after the point
_MILLION = 10**6
#: What one exchange costs at most, in nano-dollars: $100,000. An upstream may report nonsense, and the sums
#: of many such exchanges must still fit the 64 bits that databases have.
_MOST = 100_000 * NANO
#: How many times the price tokens of `speed: fast` cost, beside the exceptions.
_FAST, _FAST_OF = 2, {"claude-opus-4-6": 6, "claude-opus-4-7": 6}
#: Characters in all of names of models whose price is remembered.
_LONGEST_NAMES = 400
#: What tokens of `inference_geo: us` and of `service_tier: batch` cost, in millionths of the price.
_US, _BATCH = 1_100_000, 500_000

# Dollars per million tokens: input, output, cache read, cache write for 5 minutes, cache write for 1 hour.
# Keys are prefixes of model names, the longest decides. Read on 2026-11-27 in
# https://platform.claude.com/docs/en/about-claude/pricing and in the pages of the models there, as the
# multipliers above and $10 per 1,000 web searches.
_ANTHROPIC: dict[str, tuple[float, float, float, float, float]] = {
    "claude-fable-5-1": (10, 50, 0.25, 12.5, 20),
    "claude-mythos-5-1": (10, 50, 0.25, 12.5, 20),
    "claude-fable-5": (10, 50, 1, 12.5, 20),
    "claude-mythos-5": (10, 50, 1, 12.5, 20),
    "claude-opus-5-5": (4, 20, 0.2, 5, 8),
    "claude-opus-5": (5, 25, 0.5, 6.25, 10),
    "claude-opus-4-8": (5, 25, 0.5, 6.25, 10),
    "claude-opus-4-7": (5, 25, 0.5, 6.25, 10),
    "claude-opus-4-6": (5, 25, 0.5, 6.25, 10),
    "claude-opus-4-5": (5, 25, 0.5, 6.25, 10),
    "claude-opus-4": (15, 75, 1.5, 18.75, 30),  # 4 and 4.1
    "claude-3-opus": (15, 75, 1.5, 18.75, 30),
    "claude-sonnet-5-5": (2, 10, 0.1, 2.5, 4),
    "claude-sonnet-5": (2, 10, 0.2, 2.5, 4),
    "claude-sonnet-4": (3, 15, 0.3, 3.75, 6),  # 4, 4.5 and 4.6
    "claude-3-7-sonnet": (3, 15, 0.3, 3.75, 6),
    "claude-3-5-sonnet": (3, 15, 0.3, 3.75, 6),
    "claude-haiku-5-5": (0.1, 0.5, 0.01, 0.125, 0.2),
    "claude-haiku-4-5": (1, 5, 0.1, 1.25, 2),
    "claude-3-5-haiku": (0.8, 4, 0.08, 1, 1.6),
    "claude-3-haiku": (0.25, 1.25, 0.03, 0.3, 0.5),
}
#: Models whose prompts of more than so many tokens, cached ones included, have another price.
_LONG_PROMPT = 100_000
_ANTHROPIC_LONG = {"claude-haiku-5-5": (0.5, 2.5, 0.05, 0.625, 1.0)}


class Bill(msgspec.Struct, frozen=True):
    """What was used, and its cost in pico-dollars. `is_priced`: every model had a price of its own."""

    tokens: Tokens = Tokens()
    web_searches: int = 0
    web_fetches: int = 0
    pico: int = 0
    is_priced: bool = True

    def __add__(self, other: "Bill") -> "Bill":
        return Bill(
            self.tokens + other.tokens,
            self.web_searches + other.web_searches,
            self.web_fetches + other.web_fetches,
            self.pico + other.pico,
            self.is_priced and other.is_priced,
        )

    @property
    def nano(self) -> int:
        """The cost in nano-dollars, rounded half up."""
        nano = (self.pico + _PICO // 2) // _PICO
        return nano if nano < _MOST else _MOST


class Rates(msgspec.Struct, frozen=True):
    """A price in pico-dollars, for each kind of `Tokens` and for a web search."""

    input: int
    output: int
    cache_read: int
    cache_write_5m: int
    cache_write_1h: int
    web_search: int
    is_known: bool  # not the dearest price for want of one

    @classmethod
    def of(cls, price: Price, multiplier: float, is_known: bool) -> "Rates":
        """The rates of a price in dollars."""
        dollars = (price.input, price.output, price.cache_read, price.cache_write_5m, price.cache_write_1h)
        tokens = [round(each * _MILLION * multiplier) for each in dollars]
        search = round(price.web_search * NANO * _PICO / 1000 * multiplier)
        return cls(tokens[0], tokens[1], tokens[2], tokens[3], tokens[4], search, is_known)

    def cost(self, tokens: Tokens) -> int:
        """Pico-dollars."""
        return (
            tokens.input * self.input
            + tokens.output * self.output
            + tokens.cache_read * self.cache_read
            + tokens.cache_write_5m * self.cache_write_5m
            + tokens.cache_write_1h * self.cache_write_1h
        )


class Prices:
    """The prices of one configuration. Thread-safe."""

    def __init__(self, prices: Mapping[str, Price], upstreams: Iterable[UpstreamSettings]) -> None:
        """`prices`: the configuration's, by name of a model, or by prefix where the name ends in `*`."""
        upstreams = list(upstreams)
        self._tables = {each.name: [_Table(each.prices), _Table(prices)] for each in upstreams}
        self._multipliers = {each.name: each.price_multiplier for each in upstreams}
        known = [Price(*kinds) for kinds in _ANTHROPIC.values()]
        known += [
            price for table in (prices, *(each.prices for each in upstreams)) for price in table.values()
        ]
        self._dearest = max(known, key=lambda price: (price.output, price.input))
        self._found_before = functools.lru_cache(maxsize=1024)(self._found)

    def bill(self, usage: Usage, upstream: str, upstream_model: str, model: str) -> Bill:
        """What an answer used and what it costs.

        `iterations` says what the sums at the top level leave out: `compaction` costs what the model asked
        for costs, an `advisor_message` its own model's price. Where a `fallback_message` stands, its model
        gave the answer, and the sums cost that model's price.
        """
        names: tuple[str, ...] = (upstream_model, model)
        longest_prompt = 0
        beside = []
        for entry in usage.iterations:
            if entry.type == "compaction":
                beside.append(self._part(usage, upstream, (upstream_model, model), entry.tokens))
            elif entry.type == "advisor_message":
                beside.append(self._part(usage, upstream, (entry.model or upstream_model,), entry.tokens))
            else:
                longest_prompt = max(longest_prompt, entry.tokens.prompt)
                if entry.type == "fallback_message" and entry.model:
                    names = (entry.model,)
        bill = self._part(usage, upstream, names, usage.tokens, longest_prompt)
        if searches := usage.server_tool_uses("web_search_requests"):
            rates = self._rates(upstream, names, False)
            beside.append(Bill(Tokens(), searches, pico=searches * rates.web_search))
        if fetches := usage.server_tool_uses("web_fetch_requests"):
            beside.append(Bill(Tokens(), web_fetches=fetches))
        return sum(beside, start=bill) if beside else bill

    def estimate(self, tokens: Tokens, upstream: str, upstream_model: str, model: str) -> Bill:
        """What tokens cost that no answer has reported."""
        return self._part(Usage(), upstream, (upstream_model, model), tokens)

    def _part(
        self, usage: Usage, upstream: str, names: tuple[str, ...], tokens: Tokens, longest_prompt: int = 0
    ) -> Bill:
        """What some tokens of an answer cost; `longest_prompt` of the iterations that they are the sum of."""
        rates = self._rates(upstream, names, (longest_prompt or tokens.prompt) > _LONG_PROMPT)
        pico = rates.cost(tokens)
        if usage.says("speed", "fast"):
            pico *= next((times for name, times in _FAST_OF.items() if name in names[0]), _FAST)
        if usage.says("inference_geo", "us"):
            pico = pico * _US // _MILLION
        if usage.says("service_tier", "batch"):
            pico = pico * _BATCH // _MILLION
        return Bill(tokens, pico=pico, is_priced=rates.is_known)

    def _rates(self, upstream: str, names: tuple[str, ...], is_long: bool) -> Rates:
        """As `_found`, which is remembered for names of usual lengths: clients choose them."""
        is_usual = len("".join(names)) <= _LONGEST_NAMES
        return (self._found_before if is_usual else self._found)(upstream, names, is_long)

    def _found(self, upstream: str, names: tuple[str, ...], is_long: bool) -> Rates:
        """Those of the first name that has a price; else the dearest that there are."""
        multiplier = self._multipliers.get(upstream, 1.0)
        for name in names:
            for table in self._tables.get(upstream, ()):
                if price := table.find(name):
                    return Rates.of(price, multiplier, is_known=True)
            if price := _built_in(name, is_long):
                return Rates.of(price, multiplier, is_known=True)
        return Rates.of(self._dearest, multiplier, is_known=False)


class _Table:
    """Prices by exact name, and by prefix where the name ends in `*`: the longest prefix decides."""

    def __init__(self, prices: Mapping[str, Price]) -> None:
        self._exact = dict(prices)
        prefixes = [(name[:-1], price) for name, price in prices.items() if name.endswith("*")]
        self._prefixes = sorted(prefixes, key=lambda each: len(each[0]), reverse=True)

    def find(self, name: str) -> Price | None:
        """The price of a model."""
        prefixed = (price for prefix, price in self._prefixes if name.startswith(prefix))
        return self._exact.get(name) or next(prefixed, None)


def _built_in(name: str, is_long: bool) -> Price | None:
    """Anthropic's price; a cloud may put its own words before the model's name."""
    bare = name[max(0, name.find("claude-")) :]
    prefix = max(filter(bare.startswith, _ANTHROPIC), key=len, default="")
    table = _ANTHROPIC_LONG if is_long and prefix in _ANTHROPIC_LONG else _ANTHROPIC
    return Price(*table[prefix]) if prefix else None
