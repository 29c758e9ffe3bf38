"""Does memory stay flat? `python -m bench.memory` sends much to aiproxy and reads its resident size.

20,000 requests of 300 KB and 2,000 streams in ten parts, after a warm-up of two such parts, by which the
server has all its threads. Takes minutes.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import processes, traffic
from bench.measure import CLIENTS, STREAMS
from bench.results import AIPROXY
from bench.targets import TARGETS, Running, serve

PARTS = 10
WARM_UP = 2
DELTAS = 50
BOUND = 5.0  # percent
_LIMIT = 600  # seconds for one part


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if the resident size moved by 5 % or more from the warm-up to the end."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--streams", type=int, default=2_000)
    options = parser.parse_args(arguments)
    traffic.build()
    target = next(each for each in TARGETS if each.name == AIPROXY)
    with tempfile.TemporaryDirectory(prefix="bench-") as name, traffic.upstream() as (_, upstream):
        folder = Path(name)
        with serve(target, folder, upstream) as running:
            sizes = []
            for number in range(1 - WARM_UP, PARTS + 1):
                sizes.append(_part(running, folder, options.requests // PARTS, options.streams // PARTS))
                which = f"part {number} of {PARTS}" if number > 0 else "warming up"
                print(f"after {which}: {sizes[-1]:.1f} MB resident", flush=True)
    drift = 100 * (sizes[-1] / sizes[WARM_UP - 1] - 1)
    print(f"{options.requests} requests of 300 KB and {options.streams} streams: {drift:+.1f} %")
    return 0 if abs(drift) < BOUND else 1


def _part(running: Running, folder: Path, requests: int, streams: int) -> float:
    """Send so many; then the resident size in MB."""
    assert running.pid is not None
    files = []
    for number in range(CLIENTS):
        files.append(folder / f"large-{number}")
        files[-1].write_bytes(traffic.wire({}, traffic.large()))
    stream = folder / "stream"
    stream.write_bytes(traffic.wire({}, traffic.small(DELTAS)))
    for clients, count, paths in ((CLIENTS, requests, files), (STREAMS, streams, [stream])):
        traffic.run("requests", running.port, clients, 0, 0, _LIMIT, count, *paths, mark=lambda _: None)
    return processes.resident_mb(running.pid)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    sys.exit(main())
