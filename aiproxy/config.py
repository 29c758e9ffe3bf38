"""YAML file -> frozen, validated settings; every fault names its path, and all are told at once.

Each value of the file is a `_Value`, which knows its path. A reader is a function that makes a setting of
one or raises `_Fault`. The tables at the end say which reader takes which key, so a new setting is a line
in its Struct and a line in its table. No fault, warning or repr shows a token or a header's value.
"""

import difflib
import errno
import ipaddress
import json
import math
import os
import re
import ssl
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote, unquote, urlsplit

import msgspec
import yaml

K = TypeVar("K")
T = TypeVar("T")


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
        """Whether the text tells one of them; a digit or a word such as `yes` is none worth hiding."""
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


def content_of(path: Path) -> bytes:
    """The file's content, or so much of it that `load` finds it too large. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for a writer
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        return file.read(min(status.st_size, LARGEST) + 1)


def load(
    path: Path,
    environ: Mapping[str, str] = os.environ,
    content: bytes | None = None,
    was_good: bool = False,
) -> Config:
    """Read, check and freeze the configuration; raises `ConfigError` with all of its faults.

    `content`: the file's, where it has been read already. `was_good`: it has been in force, so that other
    files which are gone since are no reason to refuse it.
    """
    file = _File(path, environ, was_good)
    root = _parse(file, path, content)
    found = root.read(lambda value: value.fields(_CONFIG))
    if found is not None and "upstreams" not in found:
        root.fault("is missing, expected a list with at least one upstream", "upstreams")
    listen = found.pop("listen", None) if found is not None else None
    is_local = isinstance(listen, str)
    if found is not None and "api_keys" not in found and not found.get("allow_anonymous") and not is_local:
        _check_anonymous(root, found.get("bind", Config().bind))
    if found is None or file.faults:
        raise ConfigError(_in_order(file.faults))
    if listen is not None:
        found["unix_socket" if is_local else "port"] = listen
    substituted = Substituted(frozenset(file.substituted))
    return Config(**found, warnings=_in_order(file.warnings), substituted=substituted)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def check_addresses(config: Config, addresses: Iterable[Any]) -> None:
    """What is truly listened on, as sockets tell it: the command line may bind other addresses.

    Raises `ConfigError` where strangers would be served without keys. Unix sockets are no matter here.
    """
    hosts = [address[0] for address in addresses if isinstance(address, tuple)]
    if not config.may_serve_strangers and not all(map(is_loopback, hosts)):
        raise ConfigError(["bind: other machines may reach it: set api_keys, or allow_anonymous: true"])


def _check_anonymous(root: "_Value", bind: str | None) -> None:
    """Without keys whoever reaches the port spends the team's money."""
    if bind is not None and not is_loopback(bind):
        root.fault(
            f"is {_shown(bind, quoted=True)}, which other machines may reach, expected a loopback address, "
            "or api_keys, or allow_anonymous: true",
            "bind",
        )


# --- The file: from bytes to values that know their path ---

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
# What YAML finds by itself. Any other tag was written out, and none has a meaning here.
_TAGS = frozenset(_TAG + name for name in "map seq str int float bool null timestamp merge value".split())

_VARIABLE = re.compile(r"\$\{(?:([A-Za-z_][A-Za-z0-9_]*)\})?")

# A fault shows what it finds, and a secret may stand where none belongs: keys in the usual form, URLs with a
# password or a query, long runs of letters and digits.
_SECRET = re.compile(r"sk-[\w-]+|[\w+=]{32,}|\S*(?::|//)\S*@|[?#].*", re.DOTALL)
_LONGEST_SHOWN = 120
#: Bytes of a configuration; the parser takes seconds for so much.
LARGEST = 1024 * 1024


class _Fault(Exception):
    """What is wrong with the value being read and what is expected, without its path."""


class _NotGiven(Exception):
    """The value is as good as none: its default holds."""


class _File:
    """What all values of one file share: its name, its place, the environment, what was found so far.

    Faults and warnings come with their place, the index of a character in the file.
    """

    def __init__(self, path: Path, environ: Mapping[str, str], was_good: bool = False) -> None:
        name = str(path)
        self.name = name if name.isprintable() else json.dumps(name)
        self.directory = path.parent.absolute()
        self.environ = environ
        self.was_good = was_good
        self.substituted: set[str] = set()
        self.faults: list[tuple[int, str]] = []
        self.warnings: list[tuple[int, str]] = []


class _Value:
    """One value of the file, with its path and its place; of a hidden one no fault shows the content."""

    def __init__(self, file: _File, node: yaml.Node, path: str = "", place: int = 0) -> None:
        self.file = file
        self.node = node
        self.path = path
        self.place = place
        self.hidden = False
        self._places: dict[str, int] = {}

    def fault(self, problem: str, key: str | None = None) -> None:
        """Note that this value, or the one under `key`, is not as it should be."""
        self._tell(self.file.faults, problem, key)

    def warn(self, text: str, key: str | None = None) -> None:
        """Note what is odd about this value, or about the one under `key`."""
        self._tell(self.file.warnings, text, key)

    def refuse(self, expected: str) -> NoReturn:
        """Raise the fault that says what the value is and what is expected of it."""
        raise _Fault(f"is {self.shown()}, expected {expected}")

    def read(self, reader: Callable[["_Value"], T]) -> T | None:
        """What `reader` makes of this value; None after a fault, which is noted."""
        try:
            return reader(self)
        except _Fault as fault:
            self.fault(str(fault))
            return None

    @property
    def is_null(self) -> bool:
        """Whether the value is left out: `key:`, `~` or `null`."""
        return self.node.tag == _TAG + "null"

    @property
    def is_mapping(self) -> bool:
        """Whether the value has keys."""
        return isinstance(self.node, yaml.MappingNode)

    @property
    def is_text(self) -> bool:
        """Whether YAML takes the value for a string, quoted or not."""
        return self.node.tag == _TAG + "str"

    @property
    def variables(self) -> list[str]:
        """The environment variables that the value names."""
        return [name for name in _VARIABLE.findall(self.literal()) if name]

    def shown(self) -> str:
        """The value as it is written in the file: a variable's name, never what it stands for."""
        node = self.node
        if node.tag not in _TAGS:
            return "a value with a YAML tag"
        if not isinstance(node, yaml.ScalarNode):
            return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
        if self.is_null:
            return "empty"
        # Where a colon was forgotten, the next line, perhaps the token's, is a part of this value.
        if self.hidden or node.start_mark.line != node.end_mark.line:
            return "a text that is not shown here"
        return _shown(node.value, quoted=self.is_text)

    def literal(self) -> str:
        """A scalar's characters as they stand in the file, whatever type YAML sees in them."""
        if not isinstance(self.node, yaml.ScalarNode) or self.is_null or self.node.tag not in _TAGS:
            self.refuse("text")
        text = str(self.node.value)
        if not _is_unicode(text):
            raise _Fault("has an escape that stands for no character, expected text")
        return text

    def text(self) -> str:
        """A scalar's characters with the variables replaced, without white space around them."""
        literal, environ = self.literal(), self.file.environ
        if "" in _VARIABLE.findall(literal):
            raise _Fault("has a ${ that names no environment variable, expected ${NAME}")
        if unset := [name for name in self.variables if name not in environ]:
            raise _Fault(f"names {_variables(unset)}, not set in the environment, expected it to be set")
        if garbled := [name for name in self.variables if not _is_unicode(environ[name])]:
            raise _Fault(f"names {_variables(garbled)}, not UTF-8 in the environment, expected text")
        self.file.substituted.update(environ[name] for name in self.variables)
        return _VARIABLE.sub(lambda match: environ[match[1]], literal).strip()

    def items(self) -> list["_Value"]:
        """The elements of a list."""
        if not isinstance(self.node, yaml.SequenceNode) or self.node.tag not in _TAGS:
            raise _Fault(f"is {self._kind()}, expected a list")
        return [self._child(node, node, f"{self.path}[{i}]") for i, node in enumerate(self.node.value)]

    def entries(self) -> list[tuple["_Value", "_Value"]]:
        """The keys and values of a mapping, those that a `<<` merges into it last; no key comes twice."""
        if not isinstance(self.node, yaml.MappingNode) or self.node.tag not in _TAGS:
            raise _Fault(f"is {self._kind()}, expected a mapping")
        found: dict[str, tuple[_Value, _Value]] = {}
        for mapping in _with_merged(self.node):
            for key, node in mapping.value if isinstance(mapping, yaml.MappingNode) else ():
                if not isinstance(key, yaml.ScalarNode):
                    self.fault(f"has {_Value(self.file, key).shown()} for a key, expected text")
                elif key.tag != _MERGE and key.value not in found:
                    path = _join(self.path, _cut(key.value) if self.hidden else _shown(key.value))
                    found[key.value] = (self._child(key, key, path), self._child(node, key, path))
                    self._places[key.value] = found[key.value][0].place
                elif key.tag != _MERGE and mapping is self.node:
                    first, again = (one.start_mark.line + 1 for one in (found[key.value][0].node, key))
                    self.fault(
                        f"is given twice, in line {first} and in line {again}, expected once", key.value
                    )
            if not isinstance(mapping, yaml.MappingNode):
                self.fault("merges something else with <<, expected a mapping")
        return list(found.values())

    def fields(self, readers: Mapping[str, Callable[["_Value"], Any]]) -> dict[str, Any]:
        """What its reader makes of each key that is given; None after a fault. Other keys are faults."""
        found: dict[str, Any] = {}
        for key, value in self.entries():
            name = key.node.value
            if name not in readers:
                self.fault(_unknown(name, readers), name)
            elif not value.is_null:
                try:
                    found[name] = value.read(readers[name])
                except _NotGiven:
                    continue
        return found

    def _child(self, node: yaml.Node, at: yaml.Node, path: str) -> "_Value":
        # What an alias or a merge brings in stands earlier in the file, and yet belongs here.
        child = _Value(self.file, node, path, max(self.place, at.start_mark.index))
        child.hidden = self.hidden
        return child

    def _kind(self) -> str:
        # Where a list or a mapping belongs, a single value may be a token after a forgotten colon.
        is_single = isinstance(self.node, yaml.ScalarNode) and self.node.tag in _TAGS and not self.is_null
        return "a single value" if is_single else self.shown()

    def _tell(self, told: list[tuple[int, str]], text: str, key: str | None) -> None:
        path = self.path if key is None else _join(self.path, _cut(key))
        place = self._places.get(key or "", self.place)
        told.append((place, f"{self.file.name}: {path}: {text}" if path else f"{self.file.name}: {text}"))


def _parse(file: _File, path: Path, content: bytes | None) -> _Value:
    """The file's one document, as a tree: nothing is built from it yet, so aliases cost nothing."""
    try:
        content = content_of(path) if content is None else content
        if len(content) > LARGEST:
            raise ConfigError([f"{file.name}: is larger than 1 MB, expected a configuration"])
        text = content.decode("utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        problem = "there is no such file, expected one: copy config.example.yaml there, or set AIPROXY_CONFIG"
    except OSError as error:
        problem = f"cannot be read ({error.strerror}), expected a readable file"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 (byte {error.start + 1}), expected text in UTF-8"
    except yaml.reader.ReaderError as error:
        character = f"U+{error.character:04X}"
        problem = f"{_line_and_column(text, error.position)}: has the character {character}, expected text"
    except yaml.MarkedYAMLError as error:
        problem = _syntax(error)
    except RecursionError:
        problem = "is nested too deeply, expected a few levels"
    except (yaml.YAMLError, ValueError, OverflowError):  # such as an escape beyond Unicode
        problem = "is not valid YAML, expected settings as in config.example.yaml"
    else:
        if node is not None:
            return _Value(file, node)
        problem = "is empty, expected settings as in config.example.yaml"
    raise ConfigError([f"{file.name}: {problem}"])


def _syntax(error: yaml.MarkedYAMLError) -> str:
    """A syntax fault in one line; without PyYAML's excerpt and without names, which may be a token's."""
    said = ", ".join(part for part in (error.context, error.problem) if part)
    problem = "is not valid YAML: " + re.sub(r"'(?![<\\])[^']{2,}'", "...", said)
    mark, context = error.problem_mark, error.context_mark
    begun = f" (begun in line {context.line + 1})" if context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}{begun}" if mark else problem


def _line_and_column(text: str, index: int) -> str:
    before = text[:index]
    return f"line {before.count(chr(10)) + 1}, column {index - before.rfind(chr(10))}"


def _with_merged(node: yaml.Node) -> list[yaml.Node]:
    """The mapping, then those it merges, in the order in which they win.

    Each comes once: what it has to give was given then, and so neither a circle nor a bomb of aliases
    makes this long.
    """
    found: dict[int, yaml.Node] = {}
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if id(one) in found:
            continue
        found[id(one)] = one
        if isinstance(one, yaml.MappingNode):
            merged = [value for key, value in one.value if key.tag == _MERGE]
            listed = [value.value if isinstance(value, yaml.SequenceNode) else [value] for value in merged]
            waiting.extend(reversed([each for group in listed for each in group]))
    return list(found.values())


def _unknown(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
    return f"is no setting, {hint}"


def _shown(text: str, quoted: bool = False) -> str:
    """Text as a fault may show it: on one line, not too long, without what looks like a secret."""
    if len(text) > _LONGEST_SHOWN:
        return f"a text of {len(text)} characters"
    text = _SECRET.sub("...", text)
    if not text or not text.isprintable():
        return json.dumps(text)
    return f'"{text}"' if quoted else text


def _cut(key: str) -> str:
    """A key that may be more than one: where no space follows the colon, YAML takes `token:value` for one."""
    name, *rest = re.split(r"[:=\s]", key, maxsplit=1)
    return _shown(name) + ("..." if rest else "")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _variables(names: Iterable[str]) -> str:
    return ", ".join(f"${{{name}}}" for name in names)


def _is_unicode(text: str) -> bool:
    # Half a surrogate pair: an escape in the file, or a byte of the environment that is not UTF-8.
    return not re.search(r"[\ud800-\udfff]", text)


def _in_order(told: list[tuple[int, str]]) -> tuple[str, ...]:
    return tuple(line for _, line in sorted(told, key=lambda each: each[0]))


# --- Readers for any setting ---

_NUMBER = re.compile(r"[-+]?(?!0[0-9])([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
# Thirty years in seconds: sockets refuse much longer timeouts, and no number here has a use for more.
_LARGEST = 10**9

# YAML 1.1's, as PyYAML and Go read them.
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _number(expected: str, fits: Callable[[float], bool]) -> Callable[[_Value], float]:
    """A reader of numbers, quoted ones too; it goes by their text, since YAML takes `1:30` for 90."""

    def read(value: _Value) -> float:
        text = value.text()
        number = float(text) if _NUMBER.fullmatch(text) else math.nan
        if number > _LARGEST:
            value.refuse(f"at most {_LARGEST}")
        if not fits(number):
            value.refuse(expected)
        return number

    return read


def _whole(expected: str, least: int = -_LARGEST) -> Callable[[_Value], int]:
    number = _number(expected, lambda number: number.is_integer() and number >= least)
    return lambda value: int(number(value))


_above_zero = _number("a number above 0", lambda number: number > 0)
_zero_or_more = _number("a number, 0 or more", lambda number: number >= 0)


def _boolean(value: _Value) -> bool:
    """True or false; in quotes only if it comes from the environment, which knows nothing but text."""
    text = value.text().lower()
    if text not in _BOOLEANS or (value.is_text and not value.variables):
        value.refuse("true or false")
    return _BOOLEANS[text]


def _one_of(*choices: str) -> Callable[[_Value], str]:
    """A reader of one of these words, in lower or upper case."""

    def read(value: _Value) -> str:
        text = value.text().lower()
        if text not in choices:
            value.refuse(f"{', '.join(choices[:-1])} or {choices[-1]}")
        return text

    return read


def _list_of(reader: Callable[[_Value], T]) -> Callable[[_Value], list[T]]:
    """A reader of lists; elements with a fault are left out."""
    return lambda value: [each for item in value.items() if (each := item.read(reader)) is not None]


def _mapping_of(
    key_reader: Callable[[_Value], K], reader: Callable[[_Value], T]
) -> Callable[[_Value], dict[K, T]]:
    """A reader of mappings whose keys are free; entries with a fault are left out."""

    def read(value: _Value) -> dict[K, T]:
        found: dict[K, T] = {}
        for key, member in value.entries():
            name, content = key.read(key_reader), member.read(reader)
            if name in found:
                member.fault("is given twice, in upper and in lower case, expected once")
            elif name is not None and content is not None:
                found[name] = content
        return found

    return read


def _section(
    struct: Callable[..., T], readers: Mapping[str, Callable[[_Value], Any]]
) -> Callable[[_Value], T]:
    """A reader of a mapping of settings: what is not given has the Struct's default."""
    return lambda value: struct(**_without_faults(value.fields(readers)))


def _without_faults(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value is not None}


def _hidden(reader: Callable[[_Value], T]) -> Callable[[_Value], T]:
    """The same reader for secrets: no fault shows the value or anything under it."""

    def read(value: _Value) -> T:
        value.hidden = True
        return reader(value)

    return read


def _or_default(reader: Callable[[_Value], T]) -> Callable[[_Value], T]:
    """The same reader for a text that counts as not given when it is empty, as it did in the Go program."""

    def read(value: _Value) -> T:
        if value.is_text and value.literal() == "":
            raise _NotGiven
        return reader(value)

    return read


# --- Readers for one setting each ---

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
_DEMOS = ("demo://answers", "demo://overloaded")

_PRINTABLE_ASCII = re.compile(r"[!-~]+")
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


def _bind(value: _Value) -> str:
    text = value.text()
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if _is_ipv6(bare) or _is_host(text):
        return bare
    if re.fullmatch(r".*:[0-9]+", text):
        raise _Fault(f"is {value.shown()}, with a port, expected an address alone: the port goes into listen")
    return value.refuse("an IP address or a host name, such as 127.0.0.1, or 0.0.0.0 for all")


def _listen(value: _Value) -> int | str:
    """A port, or the path of a unix socket."""
    text = value.text()
    if text.startswith("unix:"):
        return _unix_socket(value, text)
    port = _PORT.fullmatch(text)
    if port and int(port[1]) <= 65535:
        return int(port[1])
    if re.fullmatch(r".+:[0-9]+", text):
        raise _Fault(
            f'is {value.shown()}, with an address, expected ":8080" or 8080: the address goes into bind'
        )
    return value.refuse('a port from 0 to 65535, such as ":8080" or 8080')


def _unix_socket(value: _Value, text: str) -> str:
    path = _UNIX_SOCKET.fullmatch(text)
    if not path or len(path[1].encode()) > _LONGEST_SOCKET:
        value.refuse(
            f"an absolute path of at most {_LONGEST_SOCKET} bytes, such as unix:/run/aiproxy/aiproxy.sock"
        )
    if os.path.exists(path[1]) and not stat.S_ISSOCK(os.stat(path[1]).st_mode):
        raise _Fault(f"is {value.shown()}, which is there and is no socket, expected a path for one")
    if not os.path.isdir(os.path.dirname(path[1])):
        value.warn("is in a directory that does not exist yet")
    return path[1]


def _base_url(value: _Value) -> str:
    text = value.text().rstrip("/")
    if "?" in text or "#" in text:
        raise _Fault("has a query or a fragment, expected scheme, host, port and path only")
    if "@" in text.partition("://")[2].partition("/")[0]:
        raise _Fault("has a user name or a password, expected scheme, host, port and path only")
    if text.startswith("demo:"):
        if text not in _DEMOS:
            value.fault(f"is {value.shown()}, expected {' or '.join(_DEMOS)}")
            return "demo:"  # still no upstream that needs a token
        return text
    parts = _URL.fullmatch(text)
    if not parts or not _is_url_host(parts["host"]) or not 0 < int(parts["port"] or 443) <= 65535:
        return value.refuse("http:// or https:// and a host, such as https://api.anthropic.com")
    if ending := re.search(r"/v1(/messages)?$", text):
        value.warn(
            f"ends in {ending[0]}: base_url is what ANTHROPIC_BASE_URL would be, /v1/messages is appended "
            "to it as it stands"
        )
    return parts["scheme"].lower() + text[len(parts["scheme"]) :]


def _proxy(value: _Value) -> str:
    """The URL of a forward proxy; it may hold a password, so no fault shows it."""
    text = value.text()
    if not text.lower().startswith("http://"):
        raise _Fault("does not begin with http://, expected http://HOST:PORT: no other kind is supported")
    parts = _PROXY.fullmatch(text)
    if not parts or not _is_url_host(parts["host"]) or not 0 < int(parts["port"] or 80) <= 65535:
        raise _Fault(
            "is no URL of a forward proxy, expected http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, with "
            "other signs than letters, digits and -._~ of user and password percent-encoded"
        )
    return "http" + text[len("http") :].rstrip("/")


def _state(value: _Value) -> StateUrl | None:
    """It may hold a password, so no fault shows it."""
    text = value.text()
    if text.lower() == "memory":
        return None
    parts = _REDIS.fullmatch(text)
    if not parts or (parts["host"] and not _is_url_host(parts["host"])) or int(parts["port"] or 6379) > 65535:
        raise _Fault(
            "is neither memory nor the URL of a Redis server, expected redis://HOST:PORT/DATABASE, "
            "rediss://:PASSWORD@HOST:PORT or unix:///PATH, with other signs than letters, digits and -._~ of "
            "user and password percent-encoded"
        )
    return StateUrl(text)


def _ca_bundle(value: _Value) -> str:
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
        raise _Fault(
            f"is {value.shown()}, which cannot be read ({error.strerror}), expected a file with certificates "
            "in PEM"
        ) from None
    if not context.cert_store_stats()["x509"]:
        raise _Fault(f"is {value.shown()}, which holds no certificate, expected certificates in PEM")
    return path


def _is_url_host(host: str) -> bool:
    return _is_ipv6(host[1:-1]) if host.startswith("[") else _is_host(host)


def _name(value: _Value) -> str:
    """A name as it goes out in a header; what cannot stand in one is percent-encoded, not refused.

    Names with spaces and in any script are common in files that were written for the Go program.
    """
    text = value.text()
    if not text or re.search(r"[\x00-\x1f\x7f-\x9f\"'`]", text):
        value.refuse("a name without quotes and control characters")
    if not _PRINTABLE_ASCII.fullmatch(text):
        value.warn("is not printable ASCII without spaces: headers and logs show it percent-encoded")
    return quote(text, safe="!#$%&()*+,/:;<=>?@[\\]^{|}~")


def _token(value: _Value) -> str:
    text = value.text()
    if not text:
        named = _variables(value.variables)
        raise _Fault(
            f"names {named}, empty in the environment, expected a key"
            if named
            else "is blank, expected a key"
        )
    if not _PRINTABLE_ASCII.fullmatch(text):
        raise _Fault("has a space or a character that is not printable ASCII, expected a key alone")
    return text


def _weight(value: _Value) -> int:
    return max(1, _whole("a whole number")(value))


def _model(value: _Value) -> str:
    return _model_name(value, value.text())


def _model_key(value: _Value) -> str:
    return _model_name(value, value.literal())


def _model_name(value: _Value, name: str) -> str:
    if not name:
        value.refuse("the name of a model")
    if not value.is_text:
        value.refuse("the name of a model: put it in quotes")
    return name


def _header_name(value: _Value) -> str:
    name = value.literal().lower()
    if not _HEADER_NAME.fullmatch(name):
        raise _Fault("is no name of a header, expected letters, digits and hyphens")
    if name in _OWN_HEADERS:
        raise _Fault("is a header that the proxy sets itself, expected another one")
    return name


def _header_value(value: _Value) -> str:
    text = value.text()
    if not _HEADER_VALUE.fullmatch(text):
        raise _Fault("has a character that no header can hold, expected one printable line in Latin-1")
    return text


def _log_file(value: _Value) -> str:
    """The absolute path of a file that can be written, or made; it is not made yet."""
    text = value.text()
    if not text or not text.isprintable():
        value.refuse("the path of a file")
    path = Path(os.path.abspath(value.file.directory / text))
    if value.file.was_good:
        return str(path)
    if path.is_dir():
        raise _Fault(f"is {value.shown()}, a directory, expected the path of a file")
    if not path.parent.is_dir():
        raise _Fault(f"is {value.shown()}, in a directory that does not exist, expected one that does")
    if not (os.access(path, os.W_OK) if path.exists() else os.access(path.parent, os.W_OK | os.X_OK)):
        raise _Fault(f"is {value.shown()}, which cannot be written, expected a file that can")
    return str(path)


def _client_key(value: _Value) -> ClientKey:
    """A key alone, or `{name, key}`; one without a name is called after its place."""
    if not value.is_mapping:
        return ClientKey("", _token(value))
    found = value.fields({"name": _name, "key": _hidden(_token)})
    for key in ("name", "key"):
        if key not in found:
            value.fault("is missing, expected a name and a key", key)
    return ClientKey(found.get("name") or "", found.get("key") or "")


def _workers(value: _Value) -> int:
    """A number, or `auto` for one a core of those that this process may use."""
    if value.text().lower() == "auto":
        return len(os.sched_getaffinity(0))
    return _whole("a whole number, 1 or more, or auto", 1)(value)


def _admin_key(value: _Value) -> ClientKey:
    return ClientKey("admin", _token(value))


def _api_keys(value: _Value) -> tuple[ClientKey, ...]:
    items = value.items()
    if not items:
        raise _Fault("is an empty list, expected at least one key; leave it out to serve without keys")
    keys: list[ClientKey] = []
    for number, item in enumerate(items, start=1):
        item.hidden = not item.is_mapping
        read = item.read(_client_key)
        if read is None or not read.key:
            continue
        key = ClientKey(read.name or f"key-{number}", read.key)
        if any(other.name == key.name for other in keys):
            item.fault("is another key's name too, expected one of its own", "name")
        if any(other.key == key.key for other in keys):
            item.fault("is the same key as one before, expected each once")
        keys.append(key)
    return tuple(keys)


def _upstream(value: _Value) -> UpstreamSettings:
    found = value.fields(_UPSTREAM)
    base_url = found.get("base_url") or ""
    if "base_url" not in found:
        value.fault("is missing, expected a URL such as https://api.anthropic.com", "base_url")
    if "token" not in found and not base_url.startswith("demo:"):
        value.fault("is missing, expected a key, such as ${ANTHROPIC_API_KEY}", "token")
    _check_way(value, base_url, found)
    available = found.get("available_models")
    for model in found.get("model_mappings") or ():
        if available and model not in available:
            said = f"maps {_shown(model, quoted=True)}, which can never be used: available_models lacks it"
            value.warn(said, "model_mappings")
    if "name" not in found:
        found["name"] = urlsplit(base_url).hostname
    return UpstreamSettings(**{"name": "", "base_url": ""} | _without_faults(found))


def _check_way(value: _Value, base_url: str, found: Mapping[str, Any]) -> None:
    """Whether an upstream's `proxy` and `ca_bundle` can be of use."""
    for key in ("proxy", "ca_bundle"):
        if key in found and base_url.startswith("demo:"):
            value.fault("is of no use to a demo, which makes no connection, expected none", key)
    if "ca_bundle" in found and base_url.startswith("http:"):
        value.warn("is of no use: base_url is http://, which knows no certificates", "ca_bundle")


def _upstreams(value: _Value) -> tuple[UpstreamSettings, ...]:
    items = value.items()
    if not items:
        raise _Fault("is an empty list, expected at least one upstream")
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
        raise _Fault("has no upstream that is enabled, expected at least one")
    return tuple(upstreams)


# --- Which reader takes which key; the defaults are in the Structs ---

_UPSTREAM: dict[str, Callable[[_Value], Any]] = {
    "name": _or_default(_name),
    "base_url": _base_url,
    "token": _or_default(_hidden(_token)),
    "auth": _one_of("x-api-key", "bearer"),
    "weight": _weight,
    "enabled": _boolean,
    "model_mappings": _mapping_of(_model_key, _model),
    "available_models": lambda value: frozenset(_list_of(_model)(value)),
    "must_stream": _boolean,
    "headers": _hidden(_mapping_of(_header_name, _header_value)),
    "proxy": _hidden(_proxy),
    "ca_bundle": _ca_bundle,
}

_TIMEOUTS = {"connect": _above_zero, "first_byte": _above_zero, "answer": _above_zero, "idle": _above_zero}

_BREAKER = {"failures": _whole("a whole number, 1 or more", 1), "cooldown": _zero_or_more}

_LOGGING: dict[str, Callable[[_Value], Any]] = {
    "level": _one_of("debug", "info", "warning", "error"),
    "prompt_preview": _whole("a whole number, 0 or more", 0),
    "format": _one_of("text", "json"),
    "file": _log_file,
}

_CONFIG: dict[str, Callable[[_Value], Any]] = {
    "bind": _or_default(_bind),
    "listen": _or_default(_listen),
    "max_body_mb": _above_zero,
    "timeouts": _section(Timeouts, _TIMEOUTS),
    "breaker": _section(BreakerSettings, _BREAKER),
    "logging": _section(LoggingSettings, _LOGGING),
    "api_keys": _api_keys,
    "allow_anonymous": _boolean,
    "affinity": _one_of("none", "prompt_cache", "prefix"),
    "max_in_flight": _whole("a whole number, 1 or more", 1),
    "workers": _workers,
    "state": _hidden(_state),
    "admin_key": _hidden(_admin_key),
    "upstreams": _upstreams,
}
