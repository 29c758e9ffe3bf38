"""One target, once: starts it, sends it the load, reads what that cost."""

import math
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import processes, traffic
from bench.targets import Running, Target, serve

CLIENTS = 16
#: Seconds between the requests of one client, where it gets its answers in time.
APART = {"small": CLIENTS / 200, "large": CLIENTS / 100}
STREAMS = 100
PROBES = 40  # new streams a second beside the others
PROBE_DELTAS = 5

#: What one run of one target found, by name.
Figures = dict[str, float]


@dataclass(frozen=True)
class Plan:
    """How long each part takes, in seconds."""

    warm: float = 0.3
    requests: float = 1.6
    full_speed: float = 0.8
    opening: float = 0.8
    steady: float = 2.3
    probing: float = 2.3
    idle: float = 3.0

    @property
    def deltas(self) -> int:
        """So many that the stream which began first outlasts the last part."""
        return math.ceil((self.opening + self.steady + self.probing + 0.5) * traffic.RATE)


@dataclass
class _Meter:
    """CPU clocks of the proxy, the clients and the upstream at each mark; memory after the second."""

    proxy: int | None
    upstream: int
    marks: list[tuple[float, float, float, float]] = field(default_factory=list)
    memory: float = 0.0

    def __call__(self, clients: int) -> None:
        proxy = processes.cpu(self.proxy) if self.proxy else 0.0
        self.marks.append((time.monotonic(), proxy, processes.cpu(clients), processes.cpu(self.upstream)))
        if len(self.marks) == 2 and self.proxy:
            self.memory = processes.memory_mb(self.proxy)

    def spent(self) -> tuple[float, float, float, float]:
        """Seconds between the first two marks: of the clock, then CPU of proxy, clients and upstream."""
        first, second = self.marks[0], self.marks[1]
        one, two, three, four = (after - before for before, after in zip(first, second, strict=True))
        return one, two, three, four


def measure(target: Target, plan: Plan, idle: bool = False) -> Figures:
    """All parts of the plan against one target that is started anew."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        traffic.upstream() as (upstream, upstream_port),
    ):
        folder = Path(name)
        (folder / "target").mkdir()
        with serve(target, folder / "target", upstream_port) as running:
            bench = _Bench(folder, running, upstream, target.headers(upstream_port))
            large = [traffic.large() for _ in range(CLIENTS)]
            figures = bench.requests("large", APART["large"], large, plan.warm, plan.requests)
            if target.only_large:
                return figures
            small = [traffic.small()]
            figures |= bench.requests("small", APART["small"], small, plan.warm, plan.requests)
            figures |= bench.requests("full_speed", 0, small, plan.warm, plan.full_speed)
            figures |= bench.streams(plan)
            if idle and running.pid:
                figures["idle_percent"] = _idle(running.pid, plan.idle)
            return figures


class _Bench:
    """The parts of the plan, against one target that serves."""

    def __init__(self, folder: Path, running: Running, upstream: int, headers: dict[str, str]) -> None:
        self._folder = folder
        self._running = running
        self._upstream = upstream
        self._headers = headers

    def requests(self, name: str, apart: float, bodies: list[bytes], warm: float, seconds: float) -> Figures:
        """Clients that ask one thing after the other: CPU ms a request, and how many a second."""
        meter = _Meter(self._running.pid, self._upstream)
        times = (apart, warm, seconds)
        files = self._files(name, bodies)
        found = traffic.run("requests", self._running.port, CLIENTS, *times, 0, *files, mark=meter)
        _, cpu, clients, upstream = meter.spent()
        if not found["requests"]:
            raise traffic.TrafficError(f"no answer in {seconds} s")
        return {
            f"{name}_ms": cpu * 1000 / found["requests"],
            f"{name}_per_second": found["requests"] / found["seconds"],
            f"{name}_clients_us": clients * 1e6 / found["requests"],
            f"{name}_upstream_us": upstream * 1e6 / found["requests"],
        }

    def streams(self, plan: Plan) -> Figures:
        """Many streams at once, watched, then new ones beside them."""
        meter = _Meter(self._running.pid, self._upstream)
        bodies = [traffic.small(plan.deltas), traffic.small(PROBE_DELTAS)]
        parts = (STREAMS, plan.opening, plan.steady, plan.probing, PROBES)
        found = traffic.run("streams", self._running.port, *parts, *self._files("stream", bodies), mark=meter)
        seconds, cpu, clients, upstream = meter.spent()
        figures = {
            "delta_us": cpu * 1e6 / max(found["deltas"], 1),
            "delay_p50_ms": found["delays"]["p50"],
            "delay_p99_ms": found["delays"]["p99"],
            "first_byte_p50_ms": found["first_bytes"]["p50"],
            "first_byte_p99_ms": found["first_bytes"]["p99"],
            "memory_mb": meter.memory,
            "deltas_percent": 100 * found["deltas"] / (STREAMS * traffic.RATE * found["seconds"]),
            "unfinished": found["unfinished"],
            "upstream_late_p99_ms": found["lateness"]["p99"],
            "stream_clients_percent": 100 * clients / seconds,
            "stream_upstream_percent": 100 * upstream / seconds,
        }
        # The clients write -1 where nothing came.
        return {name: value for name, value in figures.items() if value >= 0}

    def _files(self, name: str, bodies: list[bytes]) -> list[Path]:
        paths = [self._folder / f"{name}-{number}" for number in range(len(bodies))]
        for path, body in zip(paths, bodies, strict=True):
            path.write_bytes(traffic.wire(self._headers, body))
        return paths


def _idle(pid: int, seconds: float) -> float:
    """Percent of a core that the tree uses without any request."""
    time.sleep(seconds / 4)
    before, begun = processes.cpu(pid), time.monotonic()
    time.sleep(seconds)
    return 100 * (processes.cpu(pid) - before) / (time.monotonic() - begun)


def machine() -> dict[str, Any]:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown"
    )
    return {"CPU": model, "cores": os.cpu_count(), "kernel": ".".join(os.uname().release.split(".")[:2])}
