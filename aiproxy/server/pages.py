"""The pages' templates, and how they spell figures, times and money."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import msgspec

from ..ledger.rows import money

_WIDTH, _HEIGHT = 4, 40  # of a bar and of a chart, in the chart's own units


class Bar(msgspec.Struct, frozen=True):
    """One bar of a chart."""

    x: float
    y: float
    height: float


def template(name: str) -> jinja2.Template:
    """The template of a page."""
    return _ENVIRONMENT.get_template(name)


def _bars(values: Sequence[float | None], top: float) -> list[Bar]:
    """Bars below `top`, which is as high as a chart; what is not nothing can be seen."""
    return [
        Bar(n * _WIDTH, _HEIGHT - height, height)
        for n, value in enumerate(values)
        if value
        for height in [max(2.0, round(_HEIGHT * min(1.0, value / top), 1))]
    ]


def _top(values: Sequence[float | None]) -> float:
    """The largest, 0 of nothing."""
    return max((value for value in values if value), default=0)


def in_words(seconds: float) -> str:
    """Seconds as people say them: `0.35 s`, `12 s`, `5 min`, `3 h 20 min`, `4 d 2 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _count(number: int) -> str:
    """A number of at most four signs: `950`, `12 k`, `3.4 M`."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}" if number < 10 * size else f"{number / size:.0f} {unit}"
    return str(number)


def _clock(at: float, now: float) -> str:
    """The time of day, with the date where that may be another's."""
    if now - at > 12 * 3600:
        return _date(at)
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S")


def _minute(at: float) -> str:
    """The time of day to the minute, as a chart's axis has it."""
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M")


def _date(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(
    bars=_bars,
    top=_top,
    seconds=in_words,
    percent=_percent,
    count=_count,
    clock=_clock,
    minute=_minute,
    date=_date,
    money=money,
)
