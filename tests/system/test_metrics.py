"""Figures for Prometheus: what is counted under which labels, alone and shared among processes."""

import json
import os
import re
import signal
import threading

import pytest
import yaml
from conftest import ROOT
from fakes import RawClient, await_that
from prometheus_client.parser import text_string_to_metric_families

from aiproxy import __version__
from aiproxy.api.usage import Usage
from aiproxy.observability.metrics import STRANGERS, Figures, Metrics, exposition_of, merged

ODD = ['say "hi"', "two\nlines", "back\\slash", "back\\nslash", "cr\rlf", "{a=b},", "ünï 漢", " ", "nul\0"]
USED = Usage(input_tokens=5, output_tokens=7, cache_read_input_tokens=11, cache_creation_input_tokens=13)
STATES = ("closed", "half_open", "backoff", "open", "draining")


def parsed(body):
    """Every sample of an exposition: (name, labels) to value."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def figure(source, name, **labels):
    """One sample's value, None where it is not shown."""
    return parsed(source.exposition()[0]).get((f"aiproxy_{name}", frozenset(labels.items())))


def labels_of(source, metric, label):
    samples = parsed(source.exposition()[0])
    return {dict(labels)[label] for name, labels in samples if name == f"aiproxy_{metric}"}


def models(source):
    return labels_of(source, "requests_total", "model")


def circuits(source, upstream):
    """The states that an upstream is shown in, each with the number of workers."""
    found = {state: figure(source, "circuit_state", upstream=upstream, state=state) for state in STATES}
    return {state: workers for state, workers in found.items() if workers}


def busy(metrics):
    """Some of everything."""
    metrics.know_models(["claude-x"])
    metrics.request("claude-x", "complete", "me")
    metrics.attempt("one", "answered", 0.3)
    metrics.attempt("two", "counted", 0.1)
    metrics.answer("one", 12.0, USED)
    metrics.client_tokens("me", "claude-x", "complete", USED)
    metrics.stream_began()
    metrics.circuits({"one": "closed", "two": "open"})
    metrics.reloaded("applied")
    metrics.refused("billing_error", "me")
    metrics.rate_limits("one", {"claude-x": 0.5, "of a client": 0.1})
    metrics.cost("me", "claude-x", "complete", 0.25)
    metrics.ledger({("me", "daily"): 0.5}, 0)
    return metrics


EXPECTED = """
answer_seconds_count{upstream="one"} 2.0
answer_seconds_sum{upstream="one"} 401.5
answer_seconds_bucket{le="300.0",upstream="one"} 1.0
answer_seconds_bucket{le="600.0",upstream="one"} 2.0
attempts_total{upstream="one",verdict="answered"} 2.0
attempts_total{upstream="one",verdict="backoff"} 1.0
attempts_total{upstream="one",verdict="counted"} 1.0
circuit_state{state="closed",upstream="one"} 0.0
circuit_state{state="open",upstream="one"} 1.0
client_tokens_total{client="me",kind="cache_write",model="claude-x"} 13.0
client_tokens_total{client="anonymous",kind="input",model="claude-x"} 0.0
client_tokens_total{client="anonymous",kind="output",model="claude-x"} 1.0
first_byte_seconds_bucket{le="0.25",upstream="one"} 0.0
first_byte_seconds_bucket{le="0.5",upstream="one"} 1.0
first_byte_seconds_bucket{le="120.0",upstream="one"} 2.0
first_byte_seconds_count{upstream="one"} 2.0
first_byte_seconds_sum{upstream="one"} 70.3
reloads_total{result="applied"} 1.0
reloads_total{result="refused"} 0.0
requests_total{client="me",model="claude-x",outcome="complete"} 2.0
requests_total{client="anonymous",model="claude-x",outcome="error"} 1.0
requests_total{client="unknown",model="unknown",outcome="refused"} 1.0
streams_in_flight 1.0
tokens_total{kind="input",upstream="one"} 5.0
tokens_total{kind="output",upstream="one"} 107.0
tokens_total{kind="cache_read",upstream="one"} 11.0
tokens_total{kind="cache_write",upstream="one"} 13.0
"""


def test_each_figure_counts_under_its_labels():
    metrics = Metrics()
    metrics.know_models(["claude-x"])
    for model, outcome, client in (
        ("claude-x", "complete", "me"),
        ("claude-x", "complete", "me"),
        ("claude-x", "error", None),
        ("", "refused", "unknown"),
    ):
        metrics.request(model, outcome, client)
    for verdict, seconds in (("answered", 0.3), ("answered", 70.0), ("backoff", 0.01), ("counted", None)):
        metrics.attempt("one", verdict, seconds)
    metrics.answer("one", 400.0, USED)
    metrics.answer("one", 1.5, Usage(output_tokens=100))
    metrics.client_tokens("me", "claude-x", "complete", USED)
    metrics.client_tokens(None, "claude-x", "complete", Usage(output_tokens=1))
    metrics.stream_began()
    metrics.stream_began()
    metrics.stream_ended()
    metrics.circuits({"one": "closed", "two": "open"})
    metrics.circuits({"one": "open"})
    metrics.reloaded("applied")
    shown = metrics.exposition()[0].decode().splitlines()
    assert [line for line in EXPECTED.split("\n") if line and f"aiproxy_{line}" not in shown] == []
    assert labels_of(metrics, "circuit_state", "upstream") == {"one"}, "the other is gone"
    metrics.circuits({"one": "closed", "two": "half_open"})
    assert circuits(metrics, "two") == {"half_open": 1}


def test_the_exposition_is_prometheus_text_about_nothing_else():
    body, content_type = busy(Metrics()).exposition()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    text = (ROOT / "docs/operations.md").read_text()
    documented = re.findall(
        r"^\| `(aiproxy_\w+)`(?:, `(aiproxy_\w+)`)? \|",
        text,
        re.MULTILINE,
    )
    names = {name for row in documented for name in row if name}
    assert set(re.findall(r"# TYPE (\S+) ", body.decode())) == names
    assert b"_created" not in body


def test_a_configured_model_has_its_name_and_another_once_it_was_answered():
    metrics = Metrics()
    metrics.know_models(["claude-x", "m" * 200])
    metrics.request("claude-x", "error", None)
    metrics.request("m" * 200, "refused", None)
    metrics.request("claude-new", "error", None)
    assert models(metrics) == {"claude-x", "m" * 200, "other"}
    metrics.request("claude-new", "complete", None)
    metrics.request("claude-new", "error", None)
    assert figure(metrics, "requests_total", model="claude-new", outcome="error", client="anonymous") == 1


def test_a_client_cannot_make_up_more_than_so_many_models():
    metrics = Metrics()
    metrics.know_models(["claude-x"])
    for number in range(STRANGERS + 50):
        metrics.request(f"made-up-{number}", "complete", "me")
        metrics.client_tokens("me", f"made-up-{number}", "complete", USED)
    metrics.request("claude-x", "complete", "me")
    assert len(models(metrics)) == STRANGERS + 2
    assert models(metrics) >= {"other", "claude-x", f"made-up-{STRANGERS - 1}"}
    assert figure(metrics, "requests_total", model="other", outcome="complete", client="me") == 50
    assert len(labels_of(metrics, "client_tokens_total", "model")) == STRANGERS + 1


@pytest.mark.parametrize("model", ["x" * 101, "x\ud800"])
def test_what_cannot_be_a_models_name_is_never_shown(model):
    metrics = Metrics()
    metrics.request(model, "complete", None)
    assert models(metrics) == {"other"}


@pytest.mark.parametrize(("name", "shown"), [*((name, name) for name in ODD), ("x\ud800", "x?")])
def test_odd_characters_in_names_do_not_break_the_exposition(name, shown):
    metrics = Metrics()
    metrics.know_models([name])
    metrics.request(name, "complete", name)
    metrics.attempt(name, "answered", 0.1)
    metrics.answer(name, 1.0, USED)
    metrics.circuits({name: "closed"})
    assert figure(metrics, "requests_total", model=shown, outcome="complete", client=shown) == 1
    assert figure(metrics, "attempts_total", upstream=shown, verdict="answered") == 1
    assert figure(metrics, "tokens_total", upstream=shown, kind="output") == 7
    assert circuits(metrics, shown) == {"closed": 1}


def test_threads_lose_no_count():
    metrics = Metrics()
    metrics.know_models(["claude-x"])

    def count():
        for _ in range(500):
            metrics.request("claude-x", "complete", "me")
            metrics.attempt("one", "answered", 1.0)
            metrics.answer("one", 1.0, USED)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert figure(metrics, "requests_total", model="claude-x", outcome="complete", client="me") == 4000
    assert figure(metrics, "first_byte_seconds_count", upstream="one") == 4000
    assert figure(metrics, "tokens_total", upstream="one", kind="cache_read") == 44000


# Several workers


class Together:
    """Workers of one gunicorn, some of which may have ended."""

    def __init__(self, running, ended=()):
        self.running, self.ended = running, ended

    def exposition(self):
        running, ended = ([each.families() for each in some] for some in (self.running, self.ended))
        return exposition_of([Figures(None, running, ended)])


def test_figures_of_workers_are_added_up_and_an_ended_one_s_counters_stay():
    first, second = busy(Metrics()), busy(Metrics())
    second.circuits({"one": "open"})
    both, one = Together([first, second]), Together([first], [second])
    for each in (both, one):
        assert figure(each, "requests_total", model="claude-x", outcome="complete", client="me") == 2
        assert figure(each, "first_byte_seconds_bucket", upstream="one", le="0.5") == 2
        assert figure(each, "answer_seconds_count", upstream="one") == 2
        assert figure(each, "tokens_total", upstream="one", kind="input") == 10
        assert figure(each, "build_info", version=__version__) == 1
        assert figure(each, "reloads_total", result="applied") == 1
    assert [figure(each, "streams_in_flight") for each in (both, one)] == [2, 1]
    assert circuits(both, "one") == {"closed": 1, "open": 1}
    assert circuits(one, "one") == {"closed": 1}
    once = exposition_of([Figures(None, [], [merged([], [first.families(), second.families()])])])
    assert parsed(once[0]) == parsed(Together([], [first, second]).exposition()[0])


def test_a_worker_that_starts_later_goes_on_where_the_others_are():
    first, second = Metrics(), Metrics()
    for _ in range(3):
        first.reloaded("applied")
    for n in range(STRANGERS):
        first.request(f"made-up-{n}", "complete", None)
    second.start_from([first.families()])
    second.reloaded("applied")
    assert figure(Together([second], [first]), "reloads_total", result="applied") == 4
    second.request("one-more", "complete", None)
    assert models(second) == {"other"}


def test_an_upstream_vanishes_when_the_last_worker_forgot_it():
    first, second = Metrics(), Metrics()
    both = Together([first, second])
    for each in (first, second):
        each.circuits({"one": "closed", "two": "open"})
    first.circuits({"one": "closed"})
    assert circuits(both, "two") == {"open": 1}
    second.circuits({"one": "closed"})
    assert labels_of(both, "circuit_state", "upstream") == {"one"}
    assert circuits(both, "one") == {"closed": 2}


def test_a_refused_file_counts_once_however_many_workers_start_while_it_lies_there(
    serve, config_of, upstream
):
    served = serve(config_of([upstream()]), workers=2)

    def await_figure(text):
        def is_shown():
            with RawClient.to(served.url) as client:
                client.request("GET", "/metrics")
                return text in client.read().body.decode()

        await_that(is_shown)

    def await_refusals(count):
        await_that(lambda: sum("result=refused" in line for line in served.stdout_lines()) == count)
        await_figure('aiproxy_reloads_total{result="refused"} 1.0')

    await_figure('aiproxy_circuit_state{state="closed",upstream="a"} 2.0')  # both are there
    served.config.write_text("upstreams: []")
    await_refusals(2)
    os.kill(min(served.workers()), signal.SIGKILL)
    await_refusals(3)


# What deploy/ makes of the figures

#: Labels that Prometheus itself adds or that mark a histogram's buckets.
ADDED = {"instance", "job", "le", "up"}


def dashboard():
    return json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())


def alerts():
    (group,) = yaml.safe_load((ROOT / "deploy/alerts.yaml").read_text())["groups"]
    return group["rules"]


def queries():
    """Every expression, and beside it the labels that texts about its result use."""
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield target["expr"], set(re.findall(r"{{\s*(\w+)\s*}}", target["legendFormat"]))
    for rule in alerts():
        yield rule["expr"], set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))


def shown_labels():
    """Metric name to its labels and their values, after some traffic."""
    metrics = busy(Metrics())
    for outcome in ("error", "error_event", "broken", "silent", "refused"):
        metrics.request("claude-x", outcome, None)
    found = {}
    for name, labels in parsed(metrics.exposition()[0]):
        for label, value in labels:
            found.setdefault(name, {}).setdefault(label, set()).add(value)
        found.setdefault(name, {})
    return found


def test_dashboard_and_alerts_ask_for_what_there_is():
    shown = shown_labels()
    for expression, told in queries():
        names = set(re.findall(r"\baiproxy_\w+", expression))
        if expression.startswith("up{"):  # Prometheus's own
            continue
        assert names
        assert names <= shown.keys()
        known = ADDED.union(*(shown[name] for name in names))
        grouped = re.findall(r"\bby \(([^)]*)\)", expression)
        used = {label.strip() for labels in grouped for label in labels.split(",")}
        assert used <= known
        # What an aggregation leaves is all that a legend can tell.
        assert told <= used


def test_dashboard_and_alerts_select_by_values_that_occur():
    shown = shown_labels()
    selections = 0
    for expression, _ in queries():
        for name, selectors in re.findall(r"\b(aiproxy_\w+)\{([^}]*)\}", expression):
            for label, value in re.findall(r'(\w+)\s*(?:=~|!=|=)\s*"([^"]*)"', selectors):
                assert set(value.split("|")) <= shown[name][label]
                selections += 1
    assert selections > 10


def test_every_figure_is_on_the_dashboard():
    asked = " ".join(target["expr"] for panel in dashboard()["panels"] for target in panel["targets"])
    families = re.findall(r"# TYPE (\S+)", Metrics().exposition()[0].decode())
    assert [name for name in families if name not in asked] == []


def test_the_dashboard_can_be_imported_anywhere():
    board = dashboard()
    (variable,) = board["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    sources = [part["datasource"] for panel in board["panels"] for part in (panel, *panel["targets"])]
    assert all(source == {"type": "prometheus", "uid": f"${{{variable['name']}}}"} for source in sources)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert "id" not in board


def test_each_alert_says_what_to_do():
    assert len(alerts()) == 7
    for rule in alerts():
        assert re.fullmatch(r"[1-9]\d*m", rule["for"])
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert len(rule["annotations"]["description"]) > 100
