"""The command line: `python -m aiproxy check`, `usage` and `key`."""

import argparse
import base64
import hashlib
import io
import json
import os
import secrets
import sys
import time
from datetime import date
from pathlib import Path

from .app import create_app
from .config import (
    Config,
    ConfigError,
    LedgerSettings,
    LoggingSettings,
    Sources,
    UpstreamSettings,
    check_addresses,
    default_ledger,
    load,
    path_from,
)
from .ledger.report import BY, sums_as_csv, sums_as_text
from .ledger.spending import periods
from .ledger.store import LedgerError, Store

#: Where systemd keeps the ledger of the shipped unit.
_STATE_DIRECTORY = "/var/lib/aiproxy"
#: What an upstream that names no models is asked for.
_USUAL_MODEL = "claude-haiku-4-5"


def main(arguments: list[str]) -> int:
    """The exit code: 0, or 1 with what is wrong on standard error."""
    parser = argparse.ArgumentParser(prog="python -m aiproxy")
    commands = parser.add_subparsers(required=True, metavar="check | usage | key")
    check = commands.add_parser("check", help="list all faults of a configuration, or sum it up")
    check.add_argument("file", nargs="?", type=Path, help="default: $AIPROXY_CONFIG, else config.yaml")
    check.add_argument("--bind", metavar="ADDRESS:PORT", help="where gunicorn's command line lets it listen")
    check.add_argument("--ask", action="store_true", help="ask each upstream a cheap question")
    check.set_defaults(run=_check)
    usage = commands.add_parser("usage", help="what was spent, from the ledger of $AIPROXY_CONFIG")
    usage.add_argument("--by", choices=BY, default="key", help="default: key")
    usage.add_argument(
        "--since", type=_day, metavar="2026-11-01", help="default: the first of this month, UTC"
    )
    usage.add_argument("--csv", action="store_true", help="for a spreadsheet")
    usage.set_defaults(run=_usage)
    key = commands.add_parser("key", help="make a new client key")
    key.add_argument("name", help="what logs and the ledger call it")
    key.set_defaults(run=_key)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may have signs that the terminal lacks
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except (ConfigError, LedgerError) as error:
        print(error, file=sys.stderr)
        return 1


def _check(given: argparse.Namespace) -> int:
    file = given.file or path_from(os.environ)
    # What a shell puts together, `check <(...)`, can be read once.
    sources = Sources(file.read_bytes()) if file.is_fifo() else None
    config = load(file, sources=sources, is_check=True)
    if given.bind:
        host, _, port = given.bind.rpartition(":")
        check_addresses(config, [(host.strip("[]"), port)])
    for warning in config.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{file}: good\n{_summary(config, given.bind or config.address)}")
    answers = [_answers(config, each) for each in config.upstreams if each.enabled and given.ask]
    return 0 if all(answers) else 1


def _answers(config: Config, upstream: UpstreamSettings) -> bool:
    """Ask one upstream to count tokens, or where it cannot for one token; print what came of it."""
    alone = Config(
        upstreams=(upstream,), timeouts=config.timeouts, logging=LoggingSettings(level="error"), ledger=None
    )
    client = create_app(alone).test_client()
    model = next(iter([*sorted(upstream.available_models), *upstream.model_mappings]), _USUAL_MODEL)
    question = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
    began = time.monotonic()
    reply = client.post("/v1/messages/count_tokens", json=question)
    if reply.status_code == 404:
        reply = client.post("/v1/messages", json={**question, "max_tokens": 1})
    seconds = time.monotonic() - began
    error = (reply.get_json(silent=True) or {}).get("error", {})
    said = f": {error.get('message')}" if reply.status_code >= 400 else ""
    print(f"  asked {upstream.name} for {model}: {reply.status_code} in {seconds:.2f} s{said}")
    return reply.status_code < 400


def _usage(given: argparse.Namespace) -> int:
    ledger = _ledger(load(path_from(os.environ), was_good=True))
    since = given.since or periods(time.time())["monthly"].first
    store = Store(ledger)
    try:
        sums = store.sums(since, BY[given.by])
    finally:
        store.close()
    if given.csv:
        print(sums_as_csv(given.by, sums), end="")
    else:
        print(f"since {since}, UTC\n{sums_as_text(given.by, sums)}")
    return 0


def _ledger(config: Config) -> LedgerSettings:
    """The ledger that a service with this configuration writes. Raises `LedgerError`."""
    ledger = config.ledger
    if ledger is None:
        raise LedgerError("the configuration keeps no ledger")
    if ledger.url or os.path.exists(ledger.file):
        return ledger
    # Where nothing is named, systemd's state directory is the place, which only the unit knows of.
    usual = default_ledger(Path(_STATE_DIRECTORY), {})
    if ledger.file == default_ledger(path_from(os.environ).parent.absolute(), {}) and os.path.exists(usual):
        return LedgerSettings(file=usual)
    raise LedgerError(f"{ledger.file}: there is no such ledger (yet)")


def _key(given: argparse.Namespace) -> int:
    key = _new_key()
    digest = hashlib.sha256(key.encode()).hexdigest()
    print(
        f"The new key, which is shown only now:\n\n  {key}\n\n"
        "Add it to api_keys in the configuration. The file does not hold the key itself:\n\n"
        f"  - name: {json.dumps(given.name, ensure_ascii=False)}\n    key_sha256: {digest}\n\n"
        "For Claude Code set ANTHROPIC_AUTH_TOKEN to it: then it warns when a budget is nearly used."
    )
    return 0


def _new_key() -> str:
    """A random key in the form of an unsigned token (RFC 7519).

    Claude Code minds what a gateway says of budgets only where its ANTHROPIC_AUTH_TOKEN names this audience
    (seen in 2.1.332). Only the last part is secret; aiproxy knows the key by the digest of the whole.
    """
    parts = [b'{"alg":"none"}', b'{"aud":"claude-gateway"}', secrets.token_bytes(32)]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a day such as 2026-11-01") from None


def _summary(config: Config, address: str) -> str:
    enabled = [upstream for upstream in config.upstreams if upstream.enabled]
    total = sum(upstream.weight for upstream in enabled)
    clients = (
        f"clients with one of {len(config.api_keys)} api_keys" if config.api_keys else "whoever reaches it"
    )
    lines = [f"  listens on {address}, serves {clients}"]
    if config.state is not None:
        lines.append(f"  shares what it knows by way of {config.state.host}")
    if config.ledger is not None:
        where = config.ledger.file or "a PostgreSQL server"
        lines.append(f"  keeps its ledger in {where}, for {config.ledger.days} days")
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
