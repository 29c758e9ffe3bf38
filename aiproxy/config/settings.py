"""The settings, frozen, with their defaults. What is secret is a `Secret`, which masks itself."""

import datetime
import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
LOOPBACK: tuple[Network, ...] = (ipaddress.IPv4Network("127.0.0.0/8"), ipaddress.IPv6Network("::1/128"))


class Timeouts(msgspec.Struct, frozen=True):
    """How long an upstream may take, in seconds; all may be fractions.

    `first_byte` and `answer` are totals that a trickle of bytes does not prolong, `idle` is the longest
    wait for the next bytes of a stream.
    """

    connect: float = 5.0
    first_byte: float = 120.0
    answer: float = 600.0
    idle: float = 120.0


class BreakerSettings(msgspec.Struct, frozen=True):
    """After how many failures in a row a circuit opens, and for how many seconds (0: tried again at once)."""

    failures: int = 3
    cooldown: float = 1800.0


class LoggingSettings(msgspec.Struct, frozen=True):
    """The lowest level that is logged, in lower case; how many characters of a prompt (0: none).

    `format` is text or json; `file` is an absolute path, None for standard output.
    """

    level: str = "info"
    prompt_preview: int = 100
    format: str = "text"
    file: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the log is text on standard output, as a terminal wants it."""
        return self.format == "text" and self.file is None


class Secret(str):
    """A text that no log, error or page may show; whoever sends it uses it as the string that it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'...'"


class Budget(msgspec.Struct, frozen=True):
    """What may be spent, in dollars, in a day, in a week from Monday on and in a month, all UTC."""

    daily: float | None = None
    weekly: float | None = None
    monthly: float | None = None


class KeyLimits(msgspec.Struct, frozen=True):
    """How far a client key may go. `models` are client names, `*` at the end stands for any ending.

    `max_wait`: seconds that a request beyond `max_in_flight` waits. `expires` is the last valid day, UTC.
    """

    budget: Budget = Budget()
    models: tuple[str, ...] = ()  # none: every model
    max_in_flight: int | None = None
    max_wait: float = 0.0
    expires: datetime.date | None = None

    def allow(self, model: str) -> bool:
        """Whether the key may name this model."""
        return not self.models or any(
            model.startswith(each[:-1]) if each.endswith("*") else model == each for each in self.models
        )


class ClientKey(msgspec.Struct, frozen=True):
    """A name with the keys that go by it: several during a rotation; logs show the name only.

    `digests` are SHA-256 in hexadecimal, of keys that the file does not hold.
    """

    name: str
    keys: tuple[Secret, ...] = ()
    digests: tuple[str, ...] = ()
    limits: KeyLimits = KeyLimits()


class Price(msgspec.Struct, frozen=True):
    """Dollars per million tokens of each kind; `web_search` is per thousand searches."""

    input: float
    output: float
    cache_read: float
    cache_write_5m: float
    cache_write_1h: float
    web_search: float = 10.0


class LedgerSettings(msgspec.Struct, frozen=True):
    """Where the ledger is kept: an SQLite file (its absolute path) or a PostgreSQL server (its URL).

    Exchanges are removed after `days`.
    """

    file: str = ""
    url: Secret = Secret()
    days: int = 400


class StateUrl(msgspec.Struct, frozen=True):
    """Where processes share what they know: a Redis server's URL, with its password."""

    url: Secret

    @property
    def host(self) -> str:
        """Without user, password and options."""
        parts = urlsplit(self.url)
        return parts.netloc.rpartition("@")[2] or parts.path

    @property
    def password(self) -> str:
        """As it is sent, empty where there is none."""
        return unquote(urlsplit(self.url).password or "")


class Substituted(msgspec.Struct, frozen=True):
    """What environment variables stood for in the file: what of it is secret only they know who set them."""

    values: frozenset[Secret] = frozenset()

    def are_in(self, text: str) -> bool:
        """Whether the text shows one of them; a digit or a word such as `yes` is none worth hiding."""
        return any(len(value) >= 4 and value in text for value in self.values)


class Betas(msgspec.Struct, frozen=True):
    """Which values of `anthropic-beta` an upstream does not get, and which it gets in any case."""

    drop: tuple[str, ...] = ()
    add: tuple[str, ...] = ()


class UpstreamSettings(msgspec.Struct, frozen=True):
    """One upstream, enabled or not.

    `base_url` has no trailing slash. `model_mappings` goes from the client's model names to the upstream's,
    `available_models` are client names (none listed: every model), header names are in lower case. `proxy`
    is the http:// URL of a forward proxy, with its password; `ca_bundle` the absolute path of a file.
    `prices` are this upstream's own, by model; every cost is multiplied by `price_multiplier`.
    `token_command` prints the token, which lives for `token_lifetime` seconds. `remove_headers`: names of
    request headers that it does not get. Upstreams of one `organization` share thinking blocks and caches.
    """

    name: str
    base_url: str
    token: Secret = Secret()
    auth: str = "x-api-key"
    weight: int = 1
    enabled: bool = True
    model_mappings: dict[str, str] = {}
    available_models: frozenset[str] = frozenset()
    must_stream: bool = False
    headers: dict[str, Secret] = {}
    proxy: Secret | None = None
    ca_bundle: str | None = None
    prices: dict[str, Price] = {}
    price_multiplier: float = 1.0
    token_command: tuple[str, ...] = ()
    token_lifetime: float = 3000.0
    betas: Betas = Betas()
    remove_headers: frozenset[str] = frozenset()
    organization: str = ""


class Config(msgspec.Struct, frozen=True):
    """The whole configuration; `warnings` are lines for the log, about what is odd and yet served.

    Where there is a `unix_socket` (its absolute path), `bind` and `port` count for nothing. `state` is
    where processes share what they know, None if each is by itself. `fallback_models`: what is asked where
    every upstream lacks capacity for the first model. Peers in `trusted_proxies` say who their own client is.
    `budget` is that of all clients together.
    `fail_closed`: while the ledger is out of reach nobody who has a budget is served.
    """

    bind: str = "127.0.0.1"
    port: int = 8080
    unix_socket: str | None = None
    max_body_mb: float = 32
    timeouts: Timeouts = Timeouts()
    breaker: BreakerSettings = BreakerSettings()
    logging: LoggingSettings = LoggingSettings()
    api_keys: tuple[ClientKey, ...] = ()
    allow_anonymous: bool = False
    affinity: str = "prompt_cache"
    fallback_models: dict[str, str] = {}
    max_in_flight: int | None = None
    trusted_proxies: tuple[Network, ...] = LOOPBACK
    workers: int = 1
    state: StateUrl | None = None
    env_file: str | None = None
    admin_key: Secret | None = None
    ledger: LedgerSettings | None = None
    prices: dict[str, Price] = {}
    budget: Budget = Budget()
    fail_closed: bool = False
    webhook: Secret | None = None
    upstreams: tuple[UpstreamSettings, ...] = ()
    warnings: tuple[str, ...] = ()
    substituted: Substituted = Substituted()

    @property
    def is_demo(self) -> bool:
        """Whether some enabled upstream is one that answers in process."""
        return any(each.enabled and each.base_url.startswith("demo://") for each in self.upstreams)

    @property
    def may_serve_strangers(self) -> bool:
        """Whether it may be reachable from other machines: clients bring keys, or none are wanted."""
        return bool(self.api_keys) or self.allow_anonymous

    @property
    def has_budgets(self) -> bool:
        """Whether anybody's spending is limited."""
        return any(each != Budget() for each in (self.budget, *(key.limits.budget for key in self.api_keys)))

    @property
    def address(self) -> str:
        """What gunicorn binds, such as `127.0.0.1:8080`, `[::1]:8080` or `unix:/run/aiproxy.sock`."""
        if self.unix_socket is not None:
            return f"unix:{self.unix_socket}"
        return f"[{self.bind}]:{self.port}" if ":" in self.bind else f"{self.bind}:{self.port}"

    @property
    def max_body(self) -> int:
        """The largest request body that is taken, in bytes."""
        return int(self.max_body_mb * 1024 * 1024)


def secrets_in(setting: Any) -> Iterator[Secret]:
    """Every `Secret` of the settings, at any depth."""
    if isinstance(setting, Secret):
        yield setting
    elif isinstance(setting, msgspec.Struct):
        for name in setting.__struct_fields__:
            yield from secrets_in(getattr(setting, name))
    elif isinstance(setting, dict):
        for value in setting.values():
            yield from secrets_in(value)
    elif isinstance(setting, tuple | frozenset):
        for value in setting:
            yield from secrets_in(value)


class ConfigError(Exception):
    """The configuration cannot be served; `faults` are plain lines, in the order of the file."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


def path_from(environ: Mapping[str, str]) -> Path:
    """The file that `AIPROXY_CONFIG` names, else `config.yaml` in the working directory."""
    return Path(environ.get("AIPROXY_CONFIG") or "config.yaml")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def check_addresses(config: Config, addresses: Iterable[Any]) -> None:
    """Check the addresses that sockets really listen on: the command line may bind others.

    Raises `ConfigError` where strangers would be served without keys. Unix sockets are no matter here.
    """
    hosts = [address[0] for address in addresses if isinstance(address, tuple)]
    if not config.may_serve_strangers and not all(map(is_loopback, hosts)):
        raise ConfigError(["bind: other machines may reach it: set api_keys, or allow_anonymous: true"])
