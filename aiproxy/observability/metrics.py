"""Figures for Prometheus: what is counted, under which labels, how those of several workers are put together.

Labels are bounded: what a client sends becomes one only where an upstream has answered to it, and then
for a limited number of names. Each worker counts for itself.
"""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .. import __version__
from ..api.usage import Usage

#: Models that no configuration names and that are yet counted by name, for each process.
STRANGERS = 50
#: Characters of such a model's name; a longer one is no model's.
_LONGEST = 100
#: Kinds of tokens and the figures of a report that they are.
_KINDS = {
    "input": "input_tokens",
    "output": "output_tokens",
    "cache_read": "cache_read_input_tokens",
    "cache_write": "cache_creation_input_tokens",
}
_UNKNOWN, _OTHER = "unknown", "other"
_CIRCUIT_STATES = ("closed", "half_open", "backoff", "open", "draining")
_RELOADS = "aiproxy_reloads_total"
#: Of several workers the largest figure is shown, not the sum: each one applies the same reload, and knows
#: the same budgets.
_LARGEST = (
    "aiproxy_build_info",
    "aiproxy_budget_used_ratio",
    "aiproxy_last_reload_success",
    "aiproxy_last_reload_timestamp_seconds",
    "aiproxy_rate_limit_left_ratio",
    _RELOADS,
)
_FIRST_BYTE = (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120)
_ANSWER = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 450, 600)


class _Answers(msgspec.Struct, frozen=True):
    """One upstream's figures about its answers."""

    seconds: Histogram
    input: Counter
    output: Counter
    cache_read: Counter
    cache_write: Counter


class Family(msgspec.Struct, frozen=True):
    """One metric with its samples: name, labels and value."""

    name: str
    documentation: str
    type: str
    samples: list[tuple[str, dict[str, str], float]]


class Figures(msgspec.Struct, frozen=True):
    """What the workers of one gunicorn counted; `machine` is a label, None adds none."""

    machine: str | None
    running: Sequence[list[Family]]
    ended: Sequence[list[Family]] = ()


class Metrics:
    """Thread-safe, and cheap enough for the path of each request."""

    def __init__(self) -> None:
        self._define()
        self._lock = threading.Lock()
        self._models: frozenset[str] = frozenset()
        self._strangers: set[str] = set()
        self._states: dict[str, str] = {}
        self._budget_labels: set[tuple[str, str]] = set()
        # What `labels` gives, found without its lock and its checks.
        self._request_counters: dict[tuple[str, str, str | None], Counter] = {}
        self._attempt_counters: dict[tuple[str, str], Counter] = {}
        self._client_counters: dict[tuple[str | None, str], dict[str, Counter]] = {}
        self._cost_counters: dict[tuple[str | None, str], Counter] = {}
        self._first_bytes: dict[str, Histogram] = {}
        self._answers: dict[str, _Answers] = {}
        for result in ("applied", "refused"):
            self._reloads.labels(result).set(0)

    def know_models(self, names: Iterable[str]) -> None:
        """The models that the configuration names; each is counted by its name."""
        self._models = frozenset(names)

    def attempt(self, upstream: str, verdict: str, first_byte: float | None) -> None:
        """One finished attempt; `first_byte`: seconds to the answer's head, shown of good answers only."""
        counter = self._attempt_counters.get((upstream, verdict))
        if counter is None:
            counter = self._attempts.labels(_clean(upstream), verdict)
            self._attempt_counters[upstream, verdict] = counter
        counter.inc()
        if first_byte is not None and verdict == "answered":
            histogram = self._first_bytes.get(upstream)
            if histogram is None:
                histogram = self._first_bytes[upstream] = self._first_byte.labels(_clean(upstream))
            histogram.observe(first_byte)

    def client_tokens(self, client: str | None, model: str, outcome: str, report: Usage) -> None:
        """The tokens of one exchange; the labels are those of `request`."""
        label = model if model in self._models else self._stranger(model, outcome)
        counters = self._client_counters.get((client, label))
        if counters is None:
            who = "anonymous" if client is None else _clean(client)
            counters = {kind: self._client_tokens.labels(who, _clean(label), kind) for kind in _KINDS}
            self._client_counters[client, label] = counters
        for kind, name in _KINDS.items():
            if tokens := getattr(report, name):
                counters[kind].inc(tokens)

    def cost(self, client: str | None, model: str, outcome: str, dollars: float) -> None:
        """What an exchange cost; the labels are those of `client_tokens`."""
        label = model if model in self._models else self._stranger(model, outcome)
        counter = self._cost_counters.get((client, label))
        if counter is None:
            who = "anonymous" if client is None else _clean(client)
            counter = self._cost_counters[client, label] = self._costs.labels(who, _clean(label))
        counter.inc(dollars)

    def request(self, model: str, outcome: str, client: str | None) -> None:
        """One finished or refused request; `model` is empty where unknown, `client` None without a key."""
        label = model if model in self._models else self._stranger(model, outcome)
        counter = self._request_counters.get((label, outcome, client))
        if counter is None:
            who = "anonymous" if client is None else _clean(client)
            counter = self._requests.labels(_clean(label), outcome, who)
            self._request_counters[label, outcome, client] = counter
        counter.inc()

    def refused(self, reason: str, client: str | None) -> None:
        """A request that aiproxy itself refused; `reason` is the type of its error."""
        self._refusals.labels(reason, "unknown" if client is None else _clean(client)).inc()

    def rate_limits(self, upstream: str, left: Mapping[str, float]) -> None:
        """What is left of an upstream's rate limits, by model, as a part of each."""
        for model, share in left.items():
            if model in self._models:  # the names of others are the clients'
                self._limits_left.labels(_clean(upstream), _clean(model)).set(share)

    def load(self, in_flight: int, limit: int, dropped_lines: int) -> None:
        """Requests in flight, how many there may be, and lines of the log that could not be written."""
        self._in_flight.set(in_flight)
        self._limit.set(limit)
        self._dropped_lines.set(dropped_lines)

    def answer(self, upstream: str, seconds: float, report: Usage) -> None:
        """An answer that an upstream gave: seconds in all and the tokens that it says it used."""
        figures = self._answers.get(upstream)
        if figures is None:
            figures = self._answers[upstream] = self._answers_of(_clean(upstream))
        figures.seconds.observe(seconds)
        if report.input_tokens:
            figures.input.inc(report.input_tokens)
        if report.output_tokens:
            figures.output.inc(report.output_tokens)
        if report.cache_read_input_tokens:
            figures.cache_read.inc(report.cache_read_input_tokens)
        if report.cache_creation_input_tokens:
            figures.cache_write.inc(report.cache_creation_input_tokens)

    def stream_began(self) -> None:
        """A stream is on its way to a client."""
        self._streams.inc()

    def stream_ended(self) -> None:
        """It is no longer."""
        self._streams.dec()

    def circuits(self, states: Mapping[str, str]) -> None:
        """Each upstream's circuit state; upstreams that are missing here are shown no longer."""
        with self._lock:
            if states == self._states:
                return
            for upstream in states.keys() | self._states.keys():
                self._circuit(upstream, self._states.get(upstream), states.get(upstream))
            self._states = dict(states)

    def ledger(self, budgets: Mapping[tuple[str, str], float], dropped_rows: int) -> None:
        """How much of each budget is spent, by client and period; others are shown no longer."""
        with self._lock:
            for client, period in self._budget_labels - budgets.keys():
                self._budgets.remove(_clean(client), period)
            self._budget_labels = set(budgets)
        for (client, period), share in budgets.items():
            self._budgets.labels(_clean(client), period).set(share)
        self._dropped_rows.set(dropped_rows)

    def reloaded(self, result: str) -> None:
        """A changed configuration was found, and is in force ("applied") or is not ("refused")."""
        self._reloads.labels(result).inc()
        self._last_reload.set(time.time())
        self._last_reload_success.set(result == "applied")

    def exposition(self) -> tuple[bytes, str]:
        """Body and content type of the answer to Prometheus."""
        return exposition_of([Figures(None, [self.families()])])

    def families(self) -> list[Family]:
        """The figures of this worker."""
        return [
            Family(
                metric.name,
                metric.documentation,
                metric.type,
                # When a series began is of no use here: several workers have several times.
                [
                    (each.name, each.labels, each.value)
                    for each in metric.samples
                    if "_created" not in each.name
                ],
            )
            for metric in self._registry.collect()
        ]

    def start_from(self, others: Iterable[list[Family]]) -> None:
        """Take over reloads and names of models from the other workers of this gunicorn.

        A worker that starts later has seen no earlier reload, and has no names of its own to give away.
        """
        reloads = {"applied": 0.0, "refused": 0.0}
        samples = (sample for families in others for family in families for sample in family.samples)
        for name, labels, value in samples:
            if name == _RELOADS:
                reloads[labels["result"]] = max(value, reloads.get(labels["result"], 0.0))
            elif name == "aiproxy_requests_total":
                self._strangers.add(labels["model"])
        self._strangers -= {_UNKNOWN, _OTHER}
        for result, count in reloads.items():
            self._reloads.labels(result).set(count)

    def _define(self) -> None:
        """What there is. A registry of its own, so that applications in one process share nothing."""
        self._registry = CollectorRegistry()
        into = self._registry
        self._requests = Counter(
            "aiproxy_requests_total",
            "Requests that are done or were refused, by model, outcome and name of the client's key.",
            ("model", "outcome", "client"),
            registry=into,
        )
        self._refusals = Counter(
            "aiproxy_refused_total",
            "Requests that aiproxy itself refused, by type of the error and name of the client's key.",
            ("reason", "client"),
            registry=into,
        )
        self._attempts = Counter(
            "aiproxy_attempts_total",
            "Attempts at upstreams, by verdict: answered, or what the failure cost the upstream.",
            ("upstream", "verdict"),
            registry=into,
        )
        self._first_byte = Histogram(
            "aiproxy_first_byte_seconds",
            "Seconds from an attempt's start to the head of the upstream's answer, good answers only.",
            ("upstream",),
            registry=into,
            buckets=_FIRST_BYTE,
        )
        self._answer = Histogram(
            "aiproxy_answer_seconds",
            "Seconds that an upstream's answer took in all, to its last byte.",
            ("upstream",),
            registry=into,
            buckets=_ANSWER,
        )
        self._tokens = Counter(
            "aiproxy_tokens_total",
            "Tokens that upstreams say they used: input (beside the cache), output, cache_read, cache_write.",
            ("upstream", "kind"),
            registry=into,
        )
        self._client_tokens = Counter(
            "aiproxy_client_tokens_total",
            "Tokens that upstreams say they used, by name of the client's key and model that it asked for.",
            ("client", "model", "kind"),
            registry=into,
        )
        self._costs = Counter(
            "aiproxy_cost_dollars_total",
            "What exchanges cost, by name of the client's key and model that it asked for.",
            ("client", "model"),
            registry=into,
        )
        self._define_gauges(into)

    def _define_gauges(self, into: CollectorRegistry) -> None:
        self._streams = Gauge(
            "aiproxy_streams_in_flight",
            "Streams on their way to a client.",
            registry=into,
        )
        Gauge(
            "aiproxy_build_info",
            "1, with the version as a label.",
            ("version",),
            registry=into,
        ).labels(__version__).set(1)
        self._circuits = Gauge(
            "aiproxy_circuit_state",
            "Worker processes in which the upstream's circuit is in the state: 1 or 0 with one worker.",
            ("upstream", "state"),
            registry=into,
        )
        self._budgets = Gauge(
            "aiproxy_budget_used_ratio",
            "The part of a budget that is spent, by name of the client's key; of all keys together: all.",
            ("client", "period"),
            registry=into,
        )
        self._in_flight = Gauge("aiproxy_in_flight", "Requests in flight.", registry=into)
        self._limit = Gauge(
            "aiproxy_in_flight_limit", "How many may be in flight; more get 529.", registry=into
        )
        self._limits_left = Gauge(
            "aiproxy_rate_limit_left_ratio",
            "What is left of the scarcest of an upstream's rate limits for a model, as a part of it.",
            ("upstream", "model"),
            registry=into,
        )
        self._dropped_lines = Gauge(
            "aiproxy_log_dropped_lines",
            "Lines of the log that could not be written, and were dropped.",
            registry=into,
        )
        self._last_reload = Gauge(
            "aiproxy_last_reload_timestamp_seconds",
            "When a changed configuration was found last, Unix time; 0: not since the start.",
            registry=into,
        )
        self._last_reload_success = Gauge(
            "aiproxy_last_reload_success",
            "1: the configuration file as it is now is in force; 0: it was refused.",
            registry=into,
        )
        self._last_reload_success.set(1)
        self._dropped_rows = Gauge(
            "aiproxy_ledger_dropped_rows",
            "Rows of the ledger that were dropped, since it could not be written for a long time.",
            registry=into,
        )
        # A gauge, because only a gauge can begin where the other workers are.
        self._reloads = Gauge(
            _RELOADS,
            "Changed configurations found, by result: applied or refused.",
            ("result",),
            registry=into,
        )

    def _answers_of(self, upstream: str) -> _Answers:
        return _Answers(
            seconds=self._answer.labels(upstream),
            input=self._tokens.labels(upstream, "input"),
            output=self._tokens.labels(upstream, "output"),
            cache_read=self._tokens.labels(upstream, "cache_read"),
            cache_write=self._tokens.labels(upstream, "cache_write"),
        )

    def _stranger(self, model: str, outcome: str) -> str:
        """The label of a model that no configuration names."""
        if model in self._strangers:
            return model
        if not model:
            return _UNKNOWN
        if outcome != "complete" or len(model) > _LONGEST or model != _clean(model):
            return _OTHER
        with self._lock:
            if len(self._strangers - self._models) < STRANGERS:
                self._strangers.add(model)
        return model if model in self._strangers else _OTHER

    def _circuit(self, upstream: str, before: str | None, now: str | None) -> None:
        if before == now:
            return
        name = _clean(upstream)
        if before is None:
            for state in _CIRCUIT_STATES:
                self._circuits.labels(name, state).set(0)
        # The new one first: between the two an upstream is shown in both rather than in none.
        if now is not None:
            self._circuits.labels(name, now).set(1)
        if before is not None:
            self._circuits.labels(name, before).set(0)


def exposition_of(instances: Iterable[Figures]) -> tuple[bytes, str]:
    """Body and content type of the answer to Prometheus, of all workers of these gunicorns."""
    metrics: dict[str, Metric] = {}
    for instance in instances:
        label = {} if instance.machine is None else {"machine": instance.machine}
        for family in merged(instance.running, instance.ended):
            metric = metrics.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for name, labels, value in family.samples:
                metric.add_sample(name, {**labels, **label}, value)
    for metric in metrics.values():
        if metric.name == _RELOADS:
            metric.name, metric.type = _RELOADS.removesuffix("_total"), "counter"
        elif metric.name == "aiproxy_circuit_state":
            # An upstream that no worker knows any more is in no state.
            known = {sample.labels["upstream"] for sample in metric.samples if sample.value}
            metric.samples = [each for each in metric.samples if each.labels["upstream"] in known]
    return generate_latest(_Collected(sorted(metrics.values(), key=_name))), CONTENT_TYPE_PLAIN_0_0_4


def merged(running: Iterable[list[Family]], ended: Iterable[list[Family]] = ()) -> list[Family]:
    """The figures of several workers together: of ended ones only what they counted."""
    found: dict[str, Family] = {}
    places: dict[tuple[str, tuple[tuple[str, str], ...]], int] = {}
    workers = [(family, True) for one in running for family in one]
    workers += [(family, False) for one in ended for family in one]
    for family, is_running in workers:
        if not is_running and family.type == "gauge" and family.name not in _LARGEST:
            continue
        target = found.setdefault(family.name, Family(family.name, family.documentation, family.type, []))
        for name, labels, value in family.samples:
            key = (name, tuple(labels.items()))
            if key not in places:
                places[key] = len(target.samples)
                target.samples.append((name, labels, value))
                continue
            place = places[key]
            before = target.samples[place][2]
            together = max(before, value) if name in _LARGEST else before + value
            target.samples[place] = (name, labels, together)
    return list(found.values())


def _name(metric: Metric) -> str:
    return str(metric.name)


class _Collected(Collector):
    """Metrics that are there already."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        """See `Collector.collect`."""
        return self._metrics


def _clean(name: str) -> str:
    """The name without lone surrogates, which no exposition can carry."""
    return name.encode(errors="replace").decode()
