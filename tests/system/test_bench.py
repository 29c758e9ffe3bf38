"""The benchmark's arithmetic, its books, and one tiny run of it against this checkout's aiproxy."""

import subprocess
import sys

import pytest
from conftest import needs
from fakes import answer, error

from bench import processes, results, traffic
from bench.measure import Plan, measure
from bench.results import AIPROXY, NGINX, Spread
from bench.targets import TARGETS

needs_compiler = needs(traffic.compiler() or "cc")
TINY = Plan(warm=0.05, requests=0.15, full_speed=0.1, opening=0.1, steady=0.2, probing=0.2, idle=0.2)


def test_ratios_are_of_figures_of_the_same_round():
    rounds = [
        {AIPROXY: {"small_ms": 2.0}, NGINX: {"small_ms": 1.0}},
        {AIPROXY: {"small_ms": 9.0}, NGINX: {"small_ms": 3.0}},
        {AIPROXY: {"small_ms": 100.0}},  # nginx failed in this one
    ]
    assert results.ratio(rounds, "small_ms", AIPROXY, NGINX) == Spread(2.5, 2, 3)
    assert results.difference(rounds, "small_ms", AIPROXY, NGINX) == Spread(3.5, 1, 6)
    assert results.ratio(rounds, "delta_us", AIPROXY, NGINX) is None


def test_goals_tell_what_is_met_what_is_not_and_what_nobody_measured():
    rounds = [{AIPROXY: {"small_ms": 23.0, "memory_mb": 71.0}, NGINX: {"small_ms": 1.0}}]
    goals = {each.title: each.is_met for each in results.goals(rounds)}
    assert goals["CPU a request of 1 KB, by nginx's"] is True
    assert goals["memory at 100 streams"] is False
    assert goals["CPU when idle"] is None


def test_cpu_time_counts_living_and_ended_descendants():
    burn = "import time\nwhile time.process_time() < {}: pass\n"
    script = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {burn.format(0.2)!r}])
child = subprocess.Popen([sys.executable, "-c", {burn.format(0.2)!r} + "print(flush=True); input()"],
    stdin=subprocess.PIPE)
input()
"""
    python = [sys.executable, "-c", script]
    with subprocess.Popen(python, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()  # the second child has done its work
        assert 0.4 <= processes.cpu(process.pid) < 2
        assert len(processes.tree(process.pid)) == 2
        assert processes.memory_mb(process.pid) > 2
        process.stdin.close()


@needs_compiler
def test_a_tiny_run_measures_aiproxy():
    traffic.build()
    target = next(each for each in TARGETS if each.name == AIPROXY)
    found = measure(target, TINY)
    for row in results.ROWS:
        assert found[row.figure] > 0, row.title
    assert found["deltas_percent"] > 0
    assert found["unfinished"] == 0


@needs_compiler
def test_clients_and_upstream_do_without_a_proxy(tmp_path):
    traffic.build()
    marks = []
    stream, probe = tmp_path / "stream", tmp_path / "probe"
    stream.write_bytes(traffic.wire({}, traffic.small(30)))
    probe.write_bytes(traffic.wire({}, traffic.small(2)))
    with traffic.upstream() as (_, port):
        found = traffic.run("streams", port, 10, 0.05, 0.1, 0.1, 50, stream, probe, mark=marks.append)
    assert len(marks) == 4
    assert 40 <= found["deltas"] <= 60  # 10 streams, 50 a second, 0.1 seconds
    assert found["first_bytes"]["count"] == found["probes"] == 5
    assert 0 <= found["delays"]["p50"] <= found["delays"]["p99"] < 50
    assert found["unfinished"] == 0


@needs_compiler
def test_an_error_and_an_answer_without_the_mark_end_the_run(tmp_path, upstream):
    traffic.build()
    request = tmp_path / "request"
    request.write_bytes(traffic.wire({}, traffic.small()))
    mark = "@t0000000000000000001.00000000;"
    for fake in (upstream(default=error(529, message=mark)), upstream(default=answer("no mark"))):
        with pytest.raises(traffic.TrafficError, match="answers were wrong"):
            traffic.run("requests", fake.port, 1, 0, 0, 5, 3, request, mark=lambda _: None)
