"""How it does: everything that the status page shows, as a page and as JSON. Knows no HTTP and no secret."""

from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec

from ..observability.history import MINUTES, Failed, Hour, Minute, Record, printable, record
from ..observability.metrics import Family
from ..upstreams.upstream import Upstream
from .pages import in_words, template

#: Seconds after which the page asks for itself again.
REFRESH = 5
#: What the states are called on the page.
_STATES = {
    "closed": "in use",
    "half_open": "on trial",
    "backoff": "backoff",
    "open": "circuit open",
    "draining": "draining",
}


class Row(msgspec.Struct, frozen=True):
    """One upstream; figures are the last hour's, shares are parts of 1, None where there is nothing yet."""

    name: str
    host: str
    state: str  # the circuit's (closed, half_open, open, backoff), or draining
    words: str  # the state in plain words, with the time until it is tried again
    is_troubled: bool  # not in use, or not asked for some model
    circuit: str  # the circuit's in any case
    tried_again_in: float  # seconds; 0 where it is in use
    failures_in_a_row: int
    refuses_for: float  # seconds for which it is not asked because it refused every request; else 0
    weight: int
    weight_share: float
    traffic_share: float | None
    models: list[str]  # none: every model
    must_stream: bool
    attempts: int
    failures: int
    error_share: float | None  # failures as a part of the attempts
    answers: int
    first_byte: float | None  # the median, in seconds
    cache_read_share: float | None
    input_tokens: int  # cached ones included
    output_tokens: int
    backoffs: dict[str, float]  # seconds until each of these models is asked again
    missing_models: list[str]  # those of them that it does not have
    limits_left: dict[str, float]  # of the scarcest rate limit, as a part of it, by model
    last_failures: list[Failed]
    minutes: list[Minute]


class Findings(msgspec.Struct, frozen=True):
    """What one worker has found out of an upstream and the shared state does not hold."""

    missing_models: list[str]
    refuses_for: float  # seconds


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
    findings: dict[str, Findings] = {}


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


def findings(upstream: Upstream) -> Findings:
    """Those of this worker."""
    return Findings(
        missing_models=[printable(model) for model in upstream.models.not_there()],
        refuses_for=max(0.0, upstream.refusals.due - upstream.breaker.clock()),
    )


def rows(upstreams: Sequence[Upstream], snapshots: Sequence[Snapshot], now: float) -> list[Row]:
    """A row for each upstream, with what the workers of these snapshots counted; `now` is Unix time."""
    records = {
        name: record([each.hours[name] for each in snapshots if name in each.hours], now)
        for name in (upstream.name for upstream in upstreams)
    }
    weights = sum(upstream.weight for upstream in upstreams if not upstream.draining)
    answers = sum(each.whole.answers for each in records.values())
    return [
        _row(
            upstream,
            records[upstream.name],
            [each.findings[upstream.name] for each in snapshots if upstream.name in each.findings],
            0.0 if upstream.draining else upstream.weight / weights,
            records[upstream.name].whole.answers / answers if answers else None,
        )
        for upstream in upstreams
    ]


def _row(
    upstream: Upstream, found: Record, known: list[Findings], weight_share: float, traffic_share: float | None
) -> Row:
    circuit, whole = upstream.breaker.circuit(), found.whole
    backoffs = {printable(model): seconds for model, seconds in upstream.models.backoffs().items()}
    missing = {model for each in known for model in each.missing_models}
    refuses_for = max((each.refuses_for for each in known), default=0.0)
    waits_for = max(circuit.seconds, refuses_for)
    is_refusing = circuit.state == "closed" and refuses_for > 0
    state = "draining" if upstream.draining else "backoff" if is_refusing else circuit.state.value
    return Row(
        name=upstream.name,
        host=urlsplit(upstream.settings.base_url).netloc,
        state=state,
        words=_words(state, circuit.state, waits_for),
        is_troubled=state != "closed" or bool(backoffs),
        circuit=circuit.state,
        tried_again_in=waits_for,
        failures_in_a_row=circuit.failures,
        refuses_for=refuses_for,
        weight=upstream.weight,
        weight_share=weight_share,
        traffic_share=traffic_share,
        models=sorted(upstream.settings.available_models),
        must_stream=upstream.settings.must_stream,
        attempts=whole.attempts,
        failures=whole.failures,
        error_share=min(1.0, whole.failures / whole.attempts) if whole.attempts else None,
        answers=whole.answers,
        first_byte=whole.first_byte,
        cache_read_share=whole.cache_read / whole.input if whole.input else None,
        input_tokens=whole.input,
        output_tokens=whole.output,
        backoffs=backoffs,
        missing_models=[model for model in backoffs if model in missing],
        limits_left=upstream.rate_limits.shares(),
        last_failures=found.failures,
        minutes=found.minutes,
    )


def _words(state: str, circuit: str, seconds: float) -> str:
    """A state in plain words; `seconds` until the upstream is tried again."""
    if state in ("open", "backoff"):
        return f"{_STATES[state]}, tried again in {in_words(seconds)}"
    if state == "draining" and circuit == "open":
        return f"draining, circuit open for {in_words(seconds)} more"
    return _STATES[state]


def as_json(status: Status) -> bytes:
    """The same facts for programs."""
    return msgspec.json.encode(status)


def as_html(status: Status, opened: Sequence[str] = ()) -> bytes:
    """The page, troubled upstreams first; the details of these and of the `opened` ones are unfolded."""
    page = template("status.html").render(
        status=status,
        upstreams=sorted(status.upstreams, key=lambda row: (not row.is_troubled, row.name.casefold())),
        opened=opened,
        states=_STATES,
        refresh=REFRESH,
        hour_began=(status.now // 60 - MINUTES + 1) * 60,
    )
    return page.encode()
