"""Which setting is read how: a reader for each kind, and tables that say which key takes which reader.

A new setting is a line in its Struct and a line in its table.
"""

import ipaddress
import math
import os
import re
import ssl
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import yaml

from .document import LARGEST, Fault, File, Value, in_order, parse, shown
from .keys import PRINTABLE_ASCII, api_keys, budget_of, key_limits, name_of, price_of, token_of, with_defaults
from .readers import (
    above_zero,
    boolean,
    hidden,
    list_of,
    mapping_of,
    one_of,
    or_default,
    section,
    whole,
    without_faults,
    zero_or_more,
)
from .settings import (
    LOOPBACK,
    Betas,
    BreakerSettings,
    Config,
    ConfigError,
    LedgerSettings,
    LoggingSettings,
    Network,
    Secret,
    StateUrl,
    Substituted,
    Timeouts,
    UpstreamSettings,
    is_loopback,
)
from .sources import Sources, env_file_of, read_sources, variables_of

# Underscores are for the names of containers.
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE | re.ASCII)
_IPV6 = re.compile(r"[0-9a-f:.]+(?:%[\w.-]+)?", re.IGNORECASE | re.ASCII)
_PORT = re.compile(r":?(?!0[0-9])([0-9]{1,5})")
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[^\]%]*\]|[^:/\[\]]*)(?::(?P<port>[0-9]{1,5}))?"
    r"(?:/[a-z0-9._~!$&'()*+,;=:@%/-]*)?",
    re.IGNORECASE | re.ASCII,
)
# gunicorn would drop a second slash, and all up to a second "unix:".
_UNIX_SOCKET = re.compile(r"unix:(/(?!/)(?:(?!unix:)[^\x00-\x1f\x7f])+)")
_MOST_WORKERS = 4  # for `auto`; more serve more only with a CPU to spare for each
_LONGEST_SOCKET = 107  # bytes; see unix(7)
#: RFC 3986 section 3.2.1.
_USERINFO = r"(?:[a-z0-9._~!$&'()*+,;=-]|%[0-9a-f]{2})"
_PROXY = re.compile(
    rf"http://(?:{_USERINFO}+(?::(?:{_USERINFO}|:)*)?@)?"
    r"(?P<host>\[[^\]%]*\]|[^:/@\[\]]*)(?::(?P<port>[0-9]{1,5}))?/?",
    re.IGNORECASE | re.ASCII,
)
_REDIS = re.compile(
    rf"(?:(?P<tls>rediss?)://(?:(?:{_USERINFO}|:)*@)?(?P<host>\[[^\]%]*\]|[^:/@?\[\]]+)(?::(?P<port>[0-9]{{1,5}}))?(?:/(?P<db>[0-9]{{1,5}})?)?"
    rf"|unix://(?:(?:{_USERINFO}|:)*@)?/[^\x00-\x20\x7f?#]+)"
    r"(?:\?(?:(?:db=[0-9]{1,5}|ssl_(?:ca_certs|certfile|keyfile)=[^\x00-\x20\x7f&#]+)(?:&|$))*)?",
    re.IGNORECASE | re.ASCII,
)
_DEMOS = ("demo://answers", "demo://failing")
_OLD_DEMO = "demo://overloaded"  # what demo://failing was called

#: RFC 9110 section 5.6.2, in lower case.
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9a-z]+")
_HEADER_VALUE = re.compile(r"[ -~\xa0-\xff]*")
#: Set by the proxy itself: the credential, of which one goes out, and the body's framing and coding.
_OWN_HEADERS = frozenset(
    "authorization x-api-key proxy-authorization cookie cookie2 host content-length content-type "
    "content-encoding transfer-encoding accept-encoding connection proxy-connection keep-alive expect te "
    "trailer upgrade http2-settings".split()
)


def _is_ipv6(text: str) -> bool:
    return bool(_IPV6.fullmatch(text)) and _is_address(ipaddress.IPv6Address, text)


def _is_host(text: str) -> bool:
    """Whether it is an IPv4 address or a host name, whose last label is no number (RFC 1123 section 2.1)."""
    labels = text.removesuffix(".").split(".")
    if labels[-1].isdigit():
        return _is_address(ipaddress.IPv4Address, text)
    return len(text) <= 253 and all(_LABEL.fullmatch(label) for label in labels)


def _is_address(kind: Callable[[str], object], text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _bind(value: Value) -> str:
    text = value.text()
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if _is_ipv6(bare) or _is_host(text):
        return bare
    if re.fullmatch(r".*:[0-9]+", text):
        raise Fault(f"is {value.shown()}, with a port, expected an address alone: the port goes into listen")
    return value.refuse("an IP address or a host name, such as 127.0.0.1, or 0.0.0.0 for all")


def _listen(value: Value) -> int | str:
    """A port, or the path of a unix socket."""
    text = value.text()
    if text.startswith("unix:"):
        return _unix_socket(value, text)
    port = _PORT.fullmatch(text)
    if port and int(port[1]) <= 65535:
        return int(port[1])
    if re.fullmatch(r".+:[0-9]+", text):
        raise Fault(
            f'is {value.shown()}, with an address, expected ":8080" or 8080: the address goes into bind'
        )
    return value.refuse('a port from 0 to 65535, such as ":8080" or 8080')


def _unix_socket(value: Value, text: str) -> str:
    path = _UNIX_SOCKET.fullmatch(text)
    if not path or len(path[1].encode()) > _LONGEST_SOCKET:
        value.refuse(
            f"an absolute path of at most {_LONGEST_SOCKET} bytes, such as unix:/run/aiproxy/aiproxy.sock"
        )
    if os.path.exists(path[1]) and not stat.S_ISSOCK(os.stat(path[1]).st_mode):
        raise Fault(f"is {value.shown()}, which is there and is no socket, expected a path for one")
    if not os.path.isdir(os.path.dirname(path[1])):
        value.warn("is in a directory that does not exist yet")
    return path[1]


def _network(value: Value) -> Network:
    try:
        return ipaddress.ip_network(value.text())
    except ValueError:
        return value.refuse("an address or a network, such as 10.0.0.5 or 10.0.0.0/24")


def _base_url(value: Value) -> str:
    text = value.text().rstrip("/")
    if "?" in text or "#" in text:
        raise Fault("has a query or a fragment, expected scheme, host, port and path only")
    if "@" in text.partition("://")[2].partition("/")[0]:
        raise Fault("has a user name or a password, expected scheme, host, port and path only")
    if text.startswith("demo:"):
        if text not in (*_DEMOS, _OLD_DEMO):
            value.fault(f"is {value.shown()}, expected {' or '.join(_DEMOS)}")
            return "demo:"  # still no upstream that needs a token
        return text
    parts = _URL.fullmatch(text)
    if not parts or not _is_url_host(parts["host"]) or not 0 < int(parts["port"] or 443) <= 65535:
        return value.refuse("http:// or https:// and a host, such as https://api.anthropic.com")
    if ending := re.search(r"/v1(/messages)?$", text):
        note = value.fault if value.file.is_check else value.warn
        note(
            f"ends in {ending[0]}: base_url is what ANTHROPIC_BASE_URL would be, /v1/messages is appended "
            "to it as it stands"
        )
    return parts["scheme"].lower() + text[len(parts["scheme"]) :]


def _proxy(value: Value) -> Secret:
    """The URL of a forward proxy; it may hold a password, so no fault shows it."""
    text = value.text()
    if not text.lower().startswith("http://"):
        raise Fault("does not begin with http://, expected http://HOST:PORT: no other kind is supported")
    parts = _PROXY.fullmatch(text)
    if not parts or not _is_url_host(parts["host"]) or not 0 < int(parts["port"] or 80) <= 65535:
        raise Fault(
            "is no URL of a forward proxy, expected http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, with "
            "other signs than letters, digits and -._~ of user and password percent-encoded"
        )
    return Secret("http" + text[len("http") :].rstrip("/"))


def _state(value: Value) -> StateUrl | None:
    """It may hold a password, so no fault shows it."""
    text = value.text()
    if text.lower() in ("local", "memory"):  # the second is the old name
        return None
    parts = _REDIS.fullmatch(text)
    if not parts or (parts["host"] and not _is_url_host(parts["host"])) or int(parts["port"] or 6379) > 65535:
        raise Fault(
            "is neither local nor the URL of a Redis server, expected redis://HOST:PORT/DATABASE, "
            "rediss://:PASSWORD@HOST:PORT or unix:///PATH, with other signs than letters, digits and -._~ of "
            "user and password percent-encoded"
        )
    return StateUrl(Secret(text))


def _ca_bundle(value: Value) -> str:
    """A file of certificates; a relative path starts from the configuration file's directory."""
    text = value.text()
    if not text or not text.isprintable():
        value.refuse("the path of a file with certificates in PEM")
    path = str(value.file.directory / text)
    if value.file.was_good:
        return path
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError:
        pass
    except OSError as error:
        raise Fault(
            f"is {value.shown()}, which cannot be read ({error.strerror}), expected a file with certificates "
            "in PEM"
        ) from None
    if not context.cert_store_stats()["x509"]:
        raise Fault(f"is {value.shown()}, which holds no certificate, expected certificates in PEM")
    return path


def _is_url_host(host: str) -> bool:
    return _is_ipv6(host[1:-1]) if host.startswith("[") else _is_host(host)


def _weight(value: Value) -> int:
    return max(1, whole("a whole number")(value))


def _model(value: Value) -> str:
    return _model_name(value, value.text())


def _model_key(value: Value) -> str:
    return _model_name(value, value.literal())


def _model_name(value: Value, name: str) -> str:
    if not name:
        value.refuse("the name of a model")
    if not value.is_text:
        value.refuse("the name of a model: put it in quotes")
    return name


def _header_name(value: Value) -> str:
    name = value.literal().lower()
    if not _HEADER_NAME.fullmatch(name):
        raise Fault("is no name of a header, expected letters, digits and hyphens")
    if name in _OWN_HEADERS:
        raise Fault("is a header that the proxy sets itself, expected another one")
    return name


def _removed_header(value: Value) -> str:
    name = value.text().lower()
    if not _HEADER_NAME.fullmatch(name):
        raise Fault("is no name of a header, expected letters, digits and hyphens")
    return name


def _word(value: Value) -> str:
    """A word of a command."""
    text = value.text()
    if not text or "\0" in text:
        value.refuse("a word of the command")
    return text


def _beta(value: Value) -> str:
    text = value.text()
    if not re.fullmatch(r"[\w.-]+", text, re.ASCII):
        value.refuse("the name of a beta, such as context-1m-2025-08-07")
    return text


def _betas(value: Value) -> tuple[str, ...]:
    return tuple(list_of(_beta)(value))


def _header_value(value: Value) -> Secret:
    text = value.text()
    if not _HEADER_VALUE.fullmatch(text):
        raise Fault("has a character that no header can hold, expected one printable line in Latin-1")
    return Secret(text)


def _log_file(value: Value) -> str:
    """The absolute path of a file that can be written, or made; it is not made yet."""
    text = value.text()
    if not text or not text.isprintable():
        value.refuse("the path of a file")
    path = Path(os.path.abspath(value.file.directory / text))
    if value.file.was_good:
        return str(path)
    if path.is_dir():
        raise Fault(f"is {value.shown()}, a directory, expected the path of a file")
    if not path.parent.is_dir():
        raise Fault(f"is {value.shown()}, in a directory that does not exist, expected one that does")
    if not (os.access(path, os.W_OK) if path.exists() else os.access(path.parent, os.W_OK | os.X_OK)):
        raise Fault(f"is {value.shown()}, which cannot be written, expected a file that can")
    return str(path)


def _env_file(value: Value) -> str:
    """The name of a file of NAME=value lines; `load` has read it by now."""
    if not value.is_text or not (name := value.literal().strip()) or not name.isprintable():
        value.refuse("the path of a file with NAME=value lines")
    return name


def _workers(value: Value) -> int:
    """A number, or `auto` for one per core that this process may use, at most `_MOST_WORKERS`."""
    if value.text().lower() == "auto":
        return min(_cores(), _MOST_WORKERS)
    return whole("a whole number, 1 or more, or auto", 1)(value)


def _cores() -> int:
    """The cores that this process may use, by its affinity and by its control group's quota (cgroups v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        quota, period = Path(f"/sys/fs/cgroup{group}/cpu.max").read_text().split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # another version of cgroups, or no quota: "max"
        return cores


def _admin_key(value: Value) -> Secret:
    return token_of(value)


def _ledger(value: Value) -> LedgerSettings | None:
    """`sqlite` for the usual file, `none`, a path, or a PostgreSQL server's URL, which no fault shows."""
    text = value.text()
    if text.lower() == "none":
        return None
    if text.lower() == "sqlite":
        return LedgerSettings(file=default_ledger(value.file.directory, value.file.environ))
    if text.lower().startswith(("postgresql://", "postgres://")):
        return LedgerSettings(url=Secret(text))
    if "://" in text or not text or not text.isprintable():
        raise Fault(
            "is none of sqlite, none, the path of a file and postgresql://USER:PASSWORD@HOST/DATABASE"
        )
    path = value.file.directory / text
    if path.is_dir() or not path.parent.is_dir():
        raise Fault("is a directory, or in one that does not exist, expected the path of a file")
    return LedgerSettings(file=str(path))


def default_ledger(directory: Path, environ: Mapping[str, str]) -> str:
    """The usual file: in systemd's state directory, which instances share, else beside the configuration."""
    state = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return str(Path(state or directory) / "ledger.db")


def _webhook(value: Value) -> Secret:
    """Its path is often a secret, so no fault shows it."""
    text = value.text()
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or not PRINTABLE_ASCII.fullmatch(text):
        raise Fault("is not the URL of a webhook, expected https://HOST/PATH")
    return Secret(text)


def _upstream(value: Value) -> UpstreamSettings:
    value.label = _label(value)
    found = value.fields(_UPSTREAM)
    base_url = found.get("base_url") or ""
    if "base_url" not in found:
        value.fault("is missing, expected a URL such as https://api.anthropic.com", "base_url")
    if "token" not in found and not found.get("token_command") and not base_url.startswith("demo:"):
        value.fault("is missing, expected a key, such as ${ANTHROPIC_API_KEY}", "token")
    if found.get("token") and found.get("token_command"):
        value.fault("is of no use beside token, expected one of both", "token_command")
    _check_way(value, base_url, found)
    available = found.get("available_models")
    for model in found.get("model_mappings") or ():
        if available and model not in available:
            said = f"maps {shown(model, quoted=True)}, which can never be used: available_models lacks it"
            value.warn(said, "model_mappings")
    if "name" not in found:
        found["name"] = urlsplit(base_url).hostname
    return UpstreamSettings(**{"name": "", "base_url": ""} | without_faults(found))


def _label(value: Value) -> str:
    """An upstream's name as a fault may show it, empty where there is none."""
    pairs = value.node.value if value.is_mapping else ()
    names = [each.value for key, each in pairs if key.value == "name" and isinstance(each, yaml.ScalarNode)]
    return shown(names[0]) if names and "${" not in names[0] else ""


def _check_way(value: Value, base_url: str, found: Mapping[str, Any]) -> None:
    """Whether an upstream's `proxy` and `ca_bundle` can be of use."""
    for key in ("proxy", "ca_bundle"):
        if key in found and base_url.startswith("demo:"):
            value.fault("is of no use to a demo, which makes no connection, expected none", key)
    if base_url.startswith("http:") and not is_loopback(urlsplit(base_url).hostname or ""):
        value.warn("is http:// to another host: the token goes over the network in clear", "base_url")
    if "ca_bundle" in found and base_url.startswith("http:"):
        value.warn("is of no use: base_url is http://, which knows no certificates", "ca_bundle")


def _upstreams(value: Value) -> tuple[UpstreamSettings, ...]:
    items = value.items()
    if not items:
        raise Fault("is an empty list, expected at least one upstream")
    upstreams: list[UpstreamSettings] = []
    owners: dict[str, str] = {}
    for item in items:
        upstream = item.read(_upstream)
        if upstream is None:
            continue
        upstreams.append(upstream)
        owner = owners.setdefault(upstream.name, item.path)
        if upstream.name and owner != item.path:
            problem = (
                f"is the name of {owner} too, expected a name for each (else it is the host of base_url)"
            )
            item.fault(problem, "name")
    if len(upstreams) == len(items) and not any(upstream.enabled for upstream in upstreams):
        raise Fault("has no upstream that is enabled, expected at least one")
    return tuple(upstreams)


# --- Which reader takes which key; the defaults are in the Structs ---

_UPSTREAM: dict[str, Callable[[Value], Any]] = {
    "name": or_default(name_of),
    "base_url": _base_url,
    "token": or_default(hidden(token_of)),
    "auth": one_of("x-api-key", "bearer"),
    "weight": _weight,
    "enabled": boolean,
    "model_mappings": mapping_of(_model_key, _model),
    "available_models": lambda value: frozenset(list_of(_model)(value)),
    "must_stream": boolean,
    "headers": hidden(mapping_of(_header_name, _header_value)),
    "proxy": hidden(_proxy),
    "ca_bundle": _ca_bundle,
    "prices": mapping_of(_model_key, price_of),
    "price_multiplier": above_zero,
    "token_command": lambda value: tuple(list_of(_word)(value)),
    "token_lifetime": above_zero,
    "betas": section(Betas, {"drop": _betas, "add": _betas}),
    "remove_headers": lambda value: frozenset(list_of(_removed_header)(value)),
    "organization": name_of,
}

_TIMEOUTS = {"connect": above_zero, "first_byte": above_zero, "answer": above_zero, "idle": above_zero}

_BREAKER = {"failures": whole("a whole number, 1 or more", 1), "cooldown": zero_or_more}

_LOGGING: dict[str, Callable[[Value], Any]] = {
    "level": one_of("debug", "info", "warning", "error"),
    "prompt_preview": whole("a whole number, 0 or more", 0),
    "format": one_of("text", "json"),
    "file": _log_file,
}

_CONFIG: dict[str, Callable[[Value], Any]] = {
    "bind": or_default(_bind),
    "listen": or_default(_listen),
    "max_body_mb": above_zero,
    "timeouts": section(Timeouts, _TIMEOUTS),
    "breaker": section(BreakerSettings, _BREAKER),
    "logging": section(LoggingSettings, _LOGGING),
    "api_keys": api_keys,
    "key_defaults": key_limits,
    "allow_anonymous": boolean,
    "affinity": one_of("none", "prompt_cache", "prefix"),
    "max_in_flight": whole("a whole number, 1 or more", 1),
    "fallback_models": mapping_of(_model_key, _model),
    "trusted_proxies": lambda value: (*LOOPBACK, *list_of(_network)(value)),
    "workers": _workers,
    "state": hidden(_state),
    "env_file": _env_file,
    "admin_key": hidden(_admin_key),
    "ledger": hidden(_ledger),
    "ledger_days": whole("a whole number, 1 or more", 1),
    "prices": mapping_of(_model_key, price_of),
    "budget": budget_of,
    "fail_closed": boolean,
    "webhook": hidden(_webhook),
    "upstreams": _upstreams,
}


def load(
    path: Path,
    environ: Mapping[str, str] = os.environ,
    sources: Sources | None = None,
    was_good: bool = False,
    is_check: bool = False,
) -> Config:
    """Read, check and freeze the configuration; raises `ConfigError` with all of its faults.

    `sources`: what has been read already. `was_good`: it has been in force, so that other files which are
    gone since are no reason to refuse it. `is_check`: it is not to be served; faults that old files may have
    are reported, too.
    """
    sources = read_sources(path) if sources is None else sources
    file = File(path, environ, was_good, is_check)
    root = parse(file, path, sources.config)
    if env_file := env_file_of(sources.config or b""):
        file.environ = {**environ, **_variables(path.parent / env_file, sources.env)}
    found = root.read(lambda value: value.fields(_CONFIG))
    if found is not None and "upstreams" not in found:
        root.fault("is missing, expected a list with at least one upstream", "upstreams")
    listen = found.pop("listen", None) if found is not None else None
    is_local = isinstance(listen, str)
    if found is not None and "api_keys" not in found and not found.get("allow_anonymous") and not is_local:
        _check_anonymous(root, found.get("bind", Config().bind))
    if found is None or file.faults:
        raise ConfigError(in_order(file.faults))
    if listen is not None:
        found["unix_socket" if is_local else "port"] = listen
    found["api_keys"] = with_defaults(found.get("api_keys", []), found.pop("key_defaults", {}))
    found["ledger"] = _with_days(found, found.pop("ledger_days", None), file)
    substituted = Substituted(frozenset(map(Secret, file.substituted)))
    config = Config(**found, warnings=in_order(file.warnings), substituted=substituted)
    if config.has_budgets and config.ledger is None:
        raise ConfigError([f"{file.name}: ledger: is none, expected a ledger, since there are budgets"])
    return config


def _with_days(found: Mapping[str, Any], days: int | None, file: File) -> LedgerSettings | None:
    """The ledger, which is the usual file where the configuration names none."""
    usual = LedgerSettings(file=default_ledger(file.directory, file.environ))
    ledger: LedgerSettings | None = found.get("ledger", usual)
    return msgspec.structs.replace(ledger, days=days) if ledger is not None and days else ledger


def _variables(path: Path, content: bytes | None) -> dict[str, str]:
    """The variables of the `env_file`. Raises `ConfigError`."""
    if content is None:
        raise ConfigError([f"{path}: cannot be read, expected the env_file that the configuration names"])
    if len(content) > LARGEST:
        raise ConfigError([f"{path}: is larger than 1 MB, expected NAME=value lines"])
    return variables_of(str(path), content)


def _check_anonymous(root: Value, bind: str | None) -> None:
    """Without keys whoever reaches the port spends the team's money."""
    if bind is not None and not is_loopback(bind):
        root.fault(
            f"is {shown(bind, quoted=True)}, which other machines may reach, expected a loopback address, "
            "or api_keys, or allow_anonymous: true",
            "bind",
        )
