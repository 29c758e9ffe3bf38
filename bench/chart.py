"""The picture for the README: what the others cost by aiproxy's cost, on a scale of powers of ten."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from bench.results import AIPROXY, COSTS, NGINX, ROWS, Rounds, of

mpl.use("Agg")
from matplotlib import pyplot as plt

_COLOURS = {AIPROXY: "#1f6feb", NGINX: "#2da44e"}
_OTHERS = ["#b35900", "#8250df", "#bf3989"]


def draw(rounds: Rounds, names: Sequence[str], path: Path) -> None:
    """One field a figure, one bar a proxy."""
    rows = [*COSTS, ROWS[5]]
    colours = {**dict(zip([n for n in names if n not in _COLOURS], _OTHERS, strict=False)), **_COLOURS}
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, fields = plt.subplots(2, 2, figsize=(9, 1.2 + 0.75 * len(names)), constrained_layout=True)
    for field, row in zip(fields.flat, rows, strict=True):
        found = [(name, of(rounds, name, row.figure)) for name in reversed(names)]
        shown = [(name, each) for name, each in found if each is not None]
        medians = [each.median for _, each in shown]
        whiskers = [[e.median - e.low for _, e in shown], [e.high - e.median for _, e in shown]]
        bars = field.barh(
            [name for name, _ in shown],
            medians,
            xerr=whiskers,
            color=[colours[name] for name, _ in shown],
            height=0.65,
            error_kw={"ecolor": "#57606a", "elinewidth": 1, "capsize": 2},
        )
        field.bar_label(bars, [f" {each:.3g}" for each in medians], padding=6)
        field.set_title(row.title, loc="left", fontsize=12, fontweight="bold")
        field.set_xscale("log")
        field.set_xlim(min(medians) / 3, max(medians) * 4)
        field.grid(axis="x", color="#d0d7de", linewidth=0.6)
        field.set_axisbelow(True)
        field.tick_params(axis="y", length=0)
    figure.suptitle("Less is better. Logarithmic scale; whiskers: range of the rounds", fontsize=11)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)
