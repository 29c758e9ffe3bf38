"""How it does: everything that the status page shows, as a page and as JSON. Knows no HTTP and no secret."""

from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec

from ..observability.history import Failed, Hour, Minute, record
from ..observability.metrics import Family
from ..upstreams.upstream import Upstream
from .pages import template

#: Seconds after which the page asks for itself again.
REFRESH = 5


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
    input_tokens: int  # cached ones included
    output_tokens: int
    backoffs: dict[str, float]  # seconds until each of these models is asked again
    limits_left: dict[str, float]  # of the scarcest rate limit, as a part of it, by model
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
    ledger: str | None  # why the ledger is not written


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


def rows(upstreams: Sequence[Upstream], snapshots: Sequence[Snapshot], now: float) -> list[Row]:
    """A row for each upstream, with what the workers of these snapshots counted; `now` is Unix time."""
    records = [
        record([each.hours[upstream.name] for each in snapshots if upstream.name in each.hours], now)
        for upstream in upstreams
    ]
    states = {upstream.name: upstream.state for upstream in upstreams}
    taking = {upstream.name for upstream in upstreams if states[upstream.name] != "draining"}
    weights = sum(upstream.weight for upstream in upstreams if upstream.name in taking)
    answers = sum(each.whole.answers for each in records)
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
            traffic_share=found.whole.answers / answers if answers else None,
            models=sorted(upstream.settings.available_models),
            must_stream=upstream.settings.must_stream,
            attempts=found.whole.attempts,
            failures=found.whole.failures,
            answers=found.whole.answers,
            first_byte=found.whole.first_byte,
            cache_read_share=found.whole.cache_read / found.whole.input if found.whole.input else None,
            input_tokens=found.whole.input,
            output_tokens=found.whole.output,
            backoffs=upstream.models.backoffs(),
            limits_left=upstream.rate_limits.shares(),
            last_failures=found.failures,
            minutes=found.minutes,
        )
        for upstream, found in zip(upstreams, records, strict=True)
        for circuit in [upstream.breaker.circuit()]
    ]


def as_json(status: Status) -> bytes:
    """The same facts for programs."""
    return msgspec.json.encode(status)


def as_html(status: Status) -> bytes:
    """The page."""
    return template("status.html").render(status=status, refresh=REFRESH).encode()
