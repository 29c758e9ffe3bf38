"""The benchmark: `python -m bench`. Starts each target in turn, several rounds, and writes what it found."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import results, traffic
from bench.measure import Figures, Plan, machine, measure
from bench.targets import TARGETS, Target

HERE = Path(__file__).parent
QUICK = Plan(warm=0.2, requests=1.0, full_speed=0.3, opening=0.5, steady=0.5, probing=0.5, idle=1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if a target failed in any round."""
    options = _options(arguments)
    traffic.build()
    wanted = [each for each in TARGETS if not options.only or each.name in options.only]
    targets = [each for each in wanted if not each.missing()]
    missing = [each.name for each in wanted if each.missing()]
    for name in missing:
        print(f"{name} is not installed: see bench/README.md")
    plan = QUICK if options.quick else Plan()
    load = os.getloadavg()[0]
    begun = time.monotonic()
    rounds = [_round(number, targets, plan) for number in range(1, options.rounds + 1)]
    facts = _facts(targets, load, time.monotonic() - begun)
    _write(options.output, rounds, [each.name for each in targets], facts, missing)
    return 0 if all(len(each) == len(targets) for each in rounds) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, help="how often each target is measured (3; 1 if quick)")
    parser.add_argument(
        "--only", action="append", metavar="TARGET", help="leave out the others; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="to see that it runs: its figures are rough")
    parser.add_argument(
        "--output", type=Path, default=HERE, metavar="FOLDER", help="for RESULTS.md and the chart"
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def _round(number: int, targets: Sequence[Target], plan: Plan) -> dict[str, Figures]:
    found: dict[str, Figures] = {}
    for target in targets:
        begun = time.monotonic()
        try:
            found[target.name] = measure(target, plan, idle=target.name == results.AIPROXY)
        except (traffic.TrafficError, RuntimeError) as error:
            print(f"round {number}: {target.name} failed: {error}", file=sys.stderr)
            continue
        each = found[target.name]
        shown = ", ".join(f"{row.title} {each[row.figure]:.3g}" for row in results.ROWS if row.figure in each)
        print(f"round {number}, {time.monotonic() - begun:.0f} s: {target.name}: {shown}", flush=True)
    return found


def _facts(targets: Sequence[Target], load: float, seconds: float) -> dict[str, str]:
    versions = {each.name: each.version() for each in targets if each.start is not None}
    facts = {name: str(value) for name, value in machine().items()}
    when = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "took": f"{seconds:.0f} s"}
    facts["load average before"] = f"{load:.2f}"
    return {**facts, "Python": sys.version.split()[0], **versions, **when}


def _write(
    folder: Path, rounds: results.Rounds, names: Sequence[str], facts: dict[str, str], missing: Sequence[str]
) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "RESULTS.md").write_text(results.text(rounds, names, facts, missing))
    (folder / "results.json").write_text(json.dumps({"facts": facts, "rounds": rounds}, indent=1) + "\n")
    shown = [name for name in names if name not in {results.DIRECT, results.TWO_WORKERS, results.IN_MEMORY}]
    if shown:
        from bench.chart import draw  # noqa: PLC0415 - matplotlib is only needed here

        draw(rounds, shown, folder / "results.png")
    print(f"written: {folder / 'RESULTS.md'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    sys.exit(main())
