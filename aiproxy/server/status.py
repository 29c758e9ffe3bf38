"""How it does: everything that the status page shows, as a page and as JSON. Knows no HTTP and no secret."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import jinja2
import msgspec

from ..observability.history import Failed, History, Hour, Minute, Tokens
from ..observability.metrics import Family
from ..upstreams.upstream import Upstream

#: Seconds after which the page asks for itself again.
REFRESH = 5

_WIDTH, _HEIGHT = 4, 40  # of a minute's bar and of a chart, in the chart's own units


class Row(msgspec.Struct, frozen=True):
    """One upstream; figures are the last hour's, shares are parts of 1, None where there is nothing yet."""

    name: str
    host: str
    state: str  # the circuit's (closed, half_open, open, backoff), or draining
    circuit: str  # the circuit's in any case
    tried_again_in: float  # seconds; 0 where it is in use
    failures_in_a_row: int
    weight: int
    weight_share: float
    traffic_share: float | None
    models: list[str]  # none: every model
    must_stream: bool
    attempts: int
    failures: int
    answers: int
    first_byte: float | None  # the median, in seconds
    cache_read_share: float | None
    tokens: Tokens
    last_failures: list[Failed]
    minutes: list[Minute]


class Snapshot(msgspec.Struct, frozen=True):
    """What one worker knows of itself and has counted, as the others read it."""

    server: str  # what people call its gunicorn: the machine, and where it listens
    worker: int  # process id
    version: str
    configuration: str  # its digest
    began: float
    in_flight: int
    hours: dict[str, Hour]
    metrics: list[Family]


class Worker(msgspec.Struct, frozen=True):
    """One worker; `answers` are the last hour's."""

    server: str
    worker: int
    version: str
    configuration: str
    began: float
    in_flight: int
    answers: int


class Status(msgspec.Struct, frozen=True):
    """The whole; times are Unix time."""

    version: str
    now: float
    began: float
    configuration: str  # its digest
    taken_up: float
    faults: tuple[str, ...]  # why the file as it is now is not in force
    worker: int  # process id of the one that answers
    in_flight: int
    upstreams: list[Row]
    workers: list[Worker]  # whose figures are in here
    is_shared: bool  # whether it is of all workers of all machines
    silent: list[str]  # workers whose snapshots are missing
    problem: str | None  # why no other worker could be asked


def put_together(snapshots: Sequence[Snapshot]) -> list[Worker]:
    """The workers that sent a snapshot, by server."""
    workers = [
        Worker(
            server=snapshot.server,
            worker=snapshot.worker,
            version=snapshot.version,
            configuration=snapshot.configuration,
            began=snapshot.began,
            in_flight=snapshot.in_flight,
            answers=sum(
                minute.answers for hour in snapshot.hours.values() for minute in hour.minutes.values()
            ),
        )
        for snapshot in snapshots
    ]
    return sorted(workers, key=lambda worker: (worker.server, worker.worker))


def rows(upstreams: Sequence[Upstream], history: History, others: Sequence[Snapshot] = ()) -> list[Row]:
    """A row for each upstream, with what `others` counted."""
    hours = [snapshot.hours for snapshot in others]
    records = {upstream.name: history.of(upstream.name, hours) for upstream in upstreams}
    states = {upstream.name: upstream.state for upstream in upstreams}
    taking = {upstream.name for upstream in upstreams if states[upstream.name] != "draining"}
    weights = sum(upstream.weight for upstream in upstreams if upstream.name in taking)
    answers = sum(record.answers for record in records.values())
    return [
        Row(
            name=upstream.name,
            host=urlsplit(upstream.settings.base_url).netloc,
            state=states[upstream.name],
            circuit=circuit.state,
            tried_again_in=circuit.seconds,
            failures_in_a_row=circuit.failures,
            weight=upstream.weight,
            weight_share=upstream.weight / weights if upstream.name in taking else 0.0,
            traffic_share=record.answers / answers if answers else None,
            models=sorted(upstream.settings.available_models),
            must_stream=upstream.settings.must_stream,
            attempts=record.attempts,
            failures=record.failed,
            answers=record.answers,
            first_byte=record.first_byte,
            cache_read_share=record.cache_read_share,
            tokens=record.tokens,
            last_failures=record.failures,
            minutes=record.minutes,
        )
        for upstream in upstreams
        for record, circuit in [(records[upstream.name], upstream.breaker.circuit())]
    ]


def as_json(status: Status) -> bytes:
    """The same facts for programs."""
    return msgspec.json.encode(status)


def as_html(status: Status) -> bytes:
    """The page."""
    return _TEMPLATE.render(status=status, refresh=REFRESH).encode()


class Bar(msgspec.Struct, frozen=True):
    """One minute in a chart."""

    x: float
    y: float
    height: float


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


def _seconds(seconds: float) -> str:
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
    bars=_bars, top=_top, seconds=_seconds, percent=_percent, count=_count, clock=_clock, date=_date
)
_TEMPLATE = _ENVIRONMENT.get_template("status.html")
