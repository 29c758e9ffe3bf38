"""`python -m aiproxy check [FILE]`: whether a configuration can be served, without serving it."""

import argparse
import io
import os
import sys
from pathlib import Path

from .config import Config, ConfigError, Sources, load, path_from


def main(arguments: list[str]) -> int:
    """Exit code 0 with a summary, 1 with all faults."""
    parser = argparse.ArgumentParser(prog="python -m aiproxy")
    commands = parser.add_subparsers(required=True, metavar="check")
    check = commands.add_parser("check", help="list all faults of a configuration, or sum it up")
    check.add_argument("file", nargs="?", type=Path, help="default: $AIPROXY_CONFIG, else config.yaml")
    file = parser.parse_args(arguments).file or path_from(os.environ)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may have signs that the terminal lacks
    try:
        # What a shell puts together, `check <(...)`, can be read once.
        sources = Sources(file.read_bytes()) if file.is_fifo() else None
        config = load(file, sources=sources, is_check=True)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    for warning in config.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{file}: good\n{_summary(config)}")
    return 0


def _summary(config: Config) -> str:
    enabled = [upstream for upstream in config.upstreams if upstream.enabled]
    total = sum(upstream.weight for upstream in enabled)
    clients = (
        f"clients with one of {len(config.api_keys)} api_keys" if config.api_keys else "whoever reaches it"
    )
    lines = [f"  listens on {config.address}, serves {clients}"]
    if config.state is not None:
        lines.append(f"  shares what it knows by way of {config.state.host}")
    for upstream in config.upstreams:
        share = f"{upstream.weight / total:.0%} of the requests" if upstream.enabled else "not enabled"
        models = ", ".join(sorted(upstream.available_models)) or "every model"
        url = (
            "an address from the environment"
            if config.substituted.are_in(upstream.base_url)
            else upstream.base_url
        )
        lines.append(f"  upstream {upstream.name}: {url}, {share}, {_printable(models)}")
    return "\n".join(lines)


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else f"\\u{ord(sign):04x}" for sign in text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
