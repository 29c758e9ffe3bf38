"""The settings, frozen, with their defaults; no repr shows a token or a header's value."""

import ipaddress
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec


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


class ClientKey(msgspec.Struct, frozen=True):
    """A key that clients may use; logs show its name, never the key."""

    name: str
    key: str

    def __repr__(self) -> str:
        return f"ClientKey(name={self.name!r}, key='...')"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """As `UpstreamSettings.__rich_repr__`."""
        return [("name", self.name), ("key", "...")]


class StateUrl(msgspec.Struct, frozen=True):
    """Where processes share what they know: a Redis server's URL, with its password."""

    url: str

    def __repr__(self) -> str:
        return "StateUrl('...')"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """As `UpstreamSettings.__rich_repr__`."""
        return [("url", "...")]

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

    values: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return "Substituted(...)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """As `UpstreamSettings.__rich_repr__`."""
        return [("values", "...")]

    def are_in(self, text: str) -> bool:
        """Whether the text shows one of them; a digit or a word such as `yes` is none worth hiding."""
        return any(len(value) >= 4 and value in text for value in self.values)


class UpstreamSettings(msgspec.Struct, frozen=True):
    """One upstream, enabled or not.

    `base_url` has no trailing slash. `model_mappings` goes from the client's model names to the upstream's,
    `available_models` are client names (none listed: every model), header names are in lower case. `proxy`
    is the http:// URL of a forward proxy, with its password; `ca_bundle` the absolute path of a file.
    """

    name: str
    base_url: str
    token: str = ""
    auth: str = "x-api-key"
    weight: int = 1
    enabled: bool = True
    model_mappings: dict[str, str] = {}
    available_models: frozenset[str] = frozenset()
    must_stream: bool = False
    headers: dict[str, str] = {}
    proxy: str | None = None
    ca_bundle: str | None = None

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"UpstreamSettings({fields})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """All fields without their secrets; msgspec's own would hand them to whatever prints prettily."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        fields["token"] = "..." if self.token else ""
        fields["headers"] = dict.fromkeys(self.headers, "...")
        fields["proxy"] = "..." if self.proxy else None
        return list(fields.items())


class Config(msgspec.Struct, frozen=True):
    """The whole configuration; `warnings` are lines for the log, about what is odd and yet served.

    Where there is a `unix_socket` (its absolute path), `bind` and `port` count for nothing. `state` is
    where processes share what they know, None if each is by itself.
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
    max_in_flight: int | None = None
    workers: int = 1
    state: StateUrl | None = None
    env_file: str | None = None
    admin_key: ClientKey | None = None
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
    def address(self) -> str:
        """What gunicorn binds, such as `127.0.0.1:8080`, `[::1]:8080` or `unix:/run/aiproxy.sock`."""
        if self.unix_socket is not None:
            return f"unix:{self.unix_socket}"
        return f"[{self.bind}]:{self.port}" if ":" in self.bind else f"{self.bind}:{self.port}"

    @property
    def max_body(self) -> int:
        """The largest request body that is taken, in bytes."""
        return int(self.max_body_mb * 1024 * 1024)


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
