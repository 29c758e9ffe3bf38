"""From figures to words: medians with their range, ratios, goals, the text of RESULTS.md. No I/O."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.measure import APART, CLIENTS, STREAMS, Figures
from bench.traffic import RATE

#: The figures of each target, round by round; a target that failed in a round is not in it.
Rounds = Sequence[dict[str, Figures]]

AIPROXY, TWO_WORKERS, DIRECT = "aiproxy", "aiproxy, 2 workers", "direct"
NGINX, IN_MEMORY = "nginx", "nginx, bodies in memory"
ROUTER, PORTKEY = "claude-code-router", "Portkey"


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    figure: str
    title: str


ROWS = [
    Row("small_ms", "CPU ms a request of 1 KB"),
    Row("large_ms", "CPU ms a request of 300 KB"),
    Row("delta_us", "CPU µs a delta"),
    Row("delay_p99_ms", "delta delay p99, ms"),
    Row("first_byte_p99_ms", "first byte p99 under that load, ms"),
    Row("memory_mb", "memory, MB"),
]
#: What a ratio is told of; the others are compared by difference, or by themselves.
COSTS = ROWS[:3]
_MORE = [
    Row("delay_p50_ms", "delta delay p50, ms"),
    Row("first_byte_p50_ms", "first byte p50, ms"),
    Row("deltas_percent", "deltas that came in time, %"),
    Row("small_per_second", "requests of 1 KB a second"),
    Row("large_per_second", "requests of 300 KB a second"),
    Row("full_speed_per_second", "requests of 1 KB a second, at full speed"),
    Row("full_speed_ms", "CPU ms a request of 1 KB, at full speed"),
]
_LOAD = [
    Row("full_speed_clients_us", "clients, CPU µs a request of 1 KB, at full speed"),
    Row("full_speed_upstream_us", "upstream, CPU µs a request of 1 KB, at full speed"),
    Row("small_clients_us", "clients, CPU µs a request of 1 KB"),
    Row("small_upstream_us", "upstream, CPU µs a request of 1 KB"),
    Row("large_clients_us", "clients, CPU µs a request of 300 KB"),
    Row("large_upstream_us", "upstream, CPU µs a request of 300 KB"),
    Row("stream_clients_percent", "clients with the streams, % of a core"),
    Row("stream_upstream_percent", "upstream with the streams, % of a core"),
    Row("upstream_late_p99_ms", "upstream sends a delta late by, p99 ms"),
]


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, and their range."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return _short(self.median)
        return f"{_short(self.median)} ({_short(self.low)}-{_short(self.high)})"


@dataclass(frozen=True)
class Goal:
    """A bound that a figure of aiproxy's is held against; `found` is None if nobody could tell."""

    title: str
    bound: float
    unit: str
    found: Spread | None

    @property
    def is_met(self) -> bool | None:
        """By the median."""
        return None if self.found is None else self.found.median <= self.bound


def spread(values: Sequence[float]) -> Spread | None:
    """None of no values."""
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def of(rounds: Rounds, target: str, figure: str) -> Spread | None:
    """One figure of one target over the rounds."""
    return spread([each[target][figure] for each in rounds if figure in each.get(target, {})])


def compared(
    rounds: Rounds, figure: str, ones: str, others: str, how: Callable[[float, float], float]
) -> Spread | None:
    """One target's figure by another's, each pair from one round: machines change from minute to minute."""
    pairs = [(each.get(ones, {}), each.get(others, {})) for each in rounds]
    return spread(
        [how(one[figure], other[figure]) for one, other in pairs if figure in one and other.get(figure)]
    )


def ratio(rounds: Rounds, figure: str, ones: str, others: str) -> Spread | None:
    """One target's figure divided by another's."""
    return compared(rounds, figure, ones, others, lambda one, other: one / other)


def difference(rounds: Rounds, figure: str, ones: str, others: str) -> Spread | None:
    """One target's figure less another's."""
    return compared(rounds, figure, ones, others, lambda one, other: one - other)


def goals(rounds: Rounds) -> list[Goal]:
    """What aiproxy is meant to cost at most."""

    def times(title: str, bound: float, figure: str, other: str) -> Goal:
        return Goal(f"{title}, by {other}'s", bound, "times", ratio(rounds, figure, AIPROXY, other))

    def after(title: str, bound: float, figure: str) -> Goal:
        return Goal(f"{title}, less nginx's", bound, "ms", difference(rounds, figure, AIPROXY, NGINX))

    def two(title: str, figure: str) -> Goal:
        found = ratio(rounds, figure, TWO_WORKERS, AIPROXY)
        return Goal(f"{title}, two workers by one", 1.1, "times", found)

    return [
        times("CPU a request of 1 KB", 24, "small_ms", NGINX),
        times("CPU a request of 1 KB", 0.5, "small_ms", ROUTER),
        times("CPU a request of 1 KB", 0.5, "small_ms", PORTKEY),
        times("CPU a request of 300 KB", 6, "large_ms", NGINX),
        times("CPU a delta", 3, "delta_us", NGINX),
        times("CPU a delta", 0.6, "delta_us", ROUTER),
        after("delta delay p99", 3, "delay_p99_ms"),
        after("first byte p99", 10, "first_byte_p99_ms"),
        Goal("memory at 100 streams", 70, "MB", of(rounds, AIPROXY, "memory_mb")),
        two("CPU a request of 1 KB", "small_ms"),
        two("CPU a request of 300 KB", "large_ms"),
        two("CPU a delta", "delta_us"),
        Goal("CPU when idle", 0.1, "% of a core", of(rounds, AIPROXY, "idle_percent")),
    ]


def text(rounds: Rounds, names: Sequence[str], facts: dict[str, str], missing: Sequence[str]) -> str:
    """RESULTS.md: `names` are the targets in their order, `facts` tell of machine and versions."""
    proxies = [name for name in names if name != DIRECT]
    parts = [
        "# Results",
        "Written by `make bench`; [README.md](README.md) tells what is measured and how.",
        *([f"Not installed, so not in here: {', '.join(missing)}."] if missing else []),
        f"Medians of {len(rounds)} round(s), with their range. Requests: {CLIENTS} clients, "
        f"{CLIENTS / APART['small']:.0f} a second of 1 KB, {CLIENTS / APART['large']:.0f} of 300 KB. "
        f"Streams: {STREAMS} at once, {RATE} deltas a second each. CPU time is that of the whole proxy, "
        f"memory the PSS of its processes. `{NGINX}` writes bodies above 16 KB to a file and reads them "
        f"again, as is its default; `{IN_MEMORY}` is spared that, and measured with such requests only.",
        _table(rounds, proxies, ROWS),
        "![aiproxy's cost by the others'](results.png)",
        "## aiproxy by the others",
        "Each ratio is of two figures of one round; below 1 aiproxy costs less.",
        _ratios(rounds, [name for name in proxies if name not in {AIPROXY, TWO_WORKERS}]),
        "## Goals",
        _goals(goals(rounds)),
        "## Beside that",
        f"`{DIRECT}` is without a proxy: what clients and upstream can do, and the delay that they add.",
        _table(rounds, names, [*ROWS[3:5], *_MORE]),
        "## What the load itself costs",
        _table(rounds, names, _LOAD),
        "## Where",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rounds: Rounds, names: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [["", *names], ["---"] * (len(names) + 1)]
    lines += [[row.title, *(_cell(of(rounds, name, row.figure)) for name in names)] for row in rows]
    return _markdown(lines)


def _ratios(rounds: Rounds, others: Sequence[str]) -> str:
    lines = [["", *others], ["---"] * (len(others) + 1)]
    for row in [*COSTS, ROWS[5]]:
        cells = [_cell(ratio(rounds, row.figure, AIPROXY, name)) for name in others]
        lines.append([row.title.replace(" ms", "").replace(" µs", "").replace(", MB", ""), *cells])
    return _markdown(lines)


def _goals(found: Sequence[Goal]) -> str:
    words = {True: "yes", False: "no", None: "not measured"}
    lines = [["aiproxy's", "at most", "found", "met"], ["---"] * 4]
    lines += [
        [each.title, f"{each.bound:g} {each.unit}", _cell(each.found), words[each.is_met]] for each in found
    ]
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(found: Spread | None) -> str:
    return "-" if found is None else str(found)


def _short(number: float) -> str:
    """Three digits that count."""
    if number == 0:
        return "0"
    if abs(number) >= 100:
        return f"{number:.0f}"
    return f"{number:.3g}"
