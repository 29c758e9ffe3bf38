"""The configuration file: from bytes to values that know their path and their place.

What is wrong with a value is noted, not raised, so that all faults are reported at once, in the order of the
file. No fault and no warning shows what looks like a secret.
"""

import difflib
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from .settings import ConfigError

T = TypeVar("T")

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


class Fault(Exception):
    """What is wrong with the value being read and what is expected, without its path."""


class NotGiven(Exception):
    """The value is as good as none: its default holds."""


class File:
    """What all values of one file share: its name, its place, the environment, what was found so far.

    Faults and warnings come with their place, the index of a character in the file.
    """

    def __init__(
        self, path: Path, environ: Mapping[str, str], was_good: bool = False, is_check: bool = False
    ) -> None:
        name = str(path)
        self.name = name if name.isprintable() else json.dumps(name)
        self.directory = path.parent.absolute()
        self.environ = environ
        self.was_good = was_good
        self.is_check = is_check  # nothing is served: what an old file may hold is a fault, too
        self.text = ""
        self.substituted: set[str] = set()
        self.faults: list[tuple[int, str]] = []
        self.warnings: list[tuple[int, str]] = []

    def line_of(self, place: int) -> int:
        """The number of the line that a place is in, from 1."""
        return self.text.count("\n", 0, place) + 1


class Value:
    """One value of the file, with its path and its place; of a hidden one no fault shows the content."""

    def __init__(self, file: File, node: yaml.Node, path: str = "", place: int = 0) -> None:
        self.file = file
        self.node = node
        self.path = path
        self.place = place
        self.hidden = False
        self.label = ""  # what people call the part of the file that it belongs to: an upstream's name
        self._places: dict[str, int] = {}

    def fault(self, problem: str, key: str | None = None) -> None:
        """Note that this value, or the one under `key`, is not as it should be."""
        self._note(self.file.faults, problem, key)

    def warn(self, text: str, key: str | None = None) -> None:
        """Note what is odd about this value, or about the one under `key`."""
        self._note(self.file.warnings, text, key)

    def refuse(self, expected: str) -> NoReturn:
        """Raise the fault that says what the value is and what is expected of it."""
        raise Fault(f"is {self.shown()}, expected {expected}")

    def read(self, reader: Callable[["Value"], T]) -> T | None:
        """What `reader` makes of this value; None after a fault, which is noted."""
        try:
            return reader(self)
        except Fault as fault:
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
    def is_list(self) -> bool:
        """Whether the value has elements."""
        return isinstance(self.node, yaml.SequenceNode)

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
        return shown(node.value, quoted=self.is_text)

    def literal(self) -> str:
        """A scalar's characters as they stand in the file, whatever type YAML sees in them."""
        if not isinstance(self.node, yaml.ScalarNode) or self.is_null or self.node.tag not in _TAGS:
            self.refuse("text")
        text = str(self.node.value)
        if not _is_unicode(text):
            raise Fault("has an escape that stands for no character, expected text")
        return text

    def text(self) -> str:
        """A scalar's characters with the variables replaced, without white space around them."""
        literal, environ = self.literal(), self.file.environ
        if "" in _VARIABLE.findall(literal):
            raise Fault("has a ${ that names no environment variable, expected ${NAME}")
        if unset := [name for name in self.variables if name not in environ]:
            raise Fault(f"names {variables(unset)}, not set in the environment, expected it to be set")
        if garbled := [name for name in self.variables if not _is_unicode(environ[name])]:
            raise Fault(f"names {variables(garbled)}, not UTF-8 in the environment, expected text")
        self.file.substituted.update(environ[name] for name in self.variables)
        return _VARIABLE.sub(lambda match: environ[match[1]], literal).strip()

    def items(self) -> list["Value"]:
        """The elements of a list."""
        if not isinstance(self.node, yaml.SequenceNode) or self.node.tag not in _TAGS:
            raise Fault(f"is {self._kind()}, expected a list")
        return [self._child(node, node, f"{self.path}[{i}]") for i, node in enumerate(self.node.value)]

    def entries(self) -> list[tuple["Value", "Value"]]:
        """The keys and values of a mapping, those that a `<<` merges into it last; no key comes twice."""
        if not isinstance(self.node, yaml.MappingNode) or self.node.tag not in _TAGS:
            raise Fault(f"is {self._kind()}, expected a mapping")
        found: dict[str, tuple[Value, Value]] = {}
        for mapping in _with_merged(self.node):
            for key, node in mapping.value if isinstance(mapping, yaml.MappingNode) else ():
                if not isinstance(key, yaml.ScalarNode):
                    self.fault(f"has {Value(self.file, key).shown()} for a key, expected text")
                elif key.tag != _MERGE and key.value not in found:
                    path = _join(self.path, _cut(key.value) if self.hidden else shown(key.value))
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

    def fields(self, readers: Mapping[str, Callable[["Value"], Any]]) -> dict[str, Any]:
        """What its reader makes of each key that is given; None after a fault. Other keys are faults."""
        found: dict[str, Any] = {}
        for key, value in self.entries():
            name = key.node.value
            if name not in readers:
                self.fault(_unknown(name, readers), name)
            elif not value.is_null:
                try:
                    found[name] = value.read(readers[name])
                except NotGiven:
                    continue
        return found

    def _child(self, node: yaml.Node, at: yaml.Node, path: str) -> "Value":
        # What an alias or a merge brings in stands earlier in the file, and yet belongs here.
        child = Value(self.file, node, path, max(self.place, at.start_mark.index))
        child.hidden, child.label = self.hidden, self.label
        return child

    def _kind(self) -> str:
        # Where a list or a mapping belongs, a single value may be a token after a forgotten colon.
        is_single = isinstance(self.node, yaml.ScalarNode) and self.node.tag in _TAGS and not self.is_null
        return "a single value" if is_single else self.shown()

    def _note(self, notes: list[tuple[int, str]], text: str, key: str | None) -> None:
        path = self.path if key is None else _join(self.path, _cut(key))
        place = self._places.get(key or "", self.place)
        if not path:
            notes.append((place, f"{self.file.name}: {text}"))
            return
        label = f" ({self.label})" if self.label else ""
        notes.append((place, f"{self.file.name}: line {self.file.line_of(place)}: {path}{label}: {text}"))


def content_of(path: Path) -> bytes:
    """The file's content, or so much of it that `load` finds it too large. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for a writer
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        return file.read(min(status.st_size, LARGEST) + 1)


def parse(file: File, path: Path, content: bytes | None) -> Value:
    """The file's one document, as a tree: nothing is built from it yet, so aliases cost nothing."""
    try:
        content = content_of(path) if content is None else content
        if len(content) > LARGEST:
            raise ConfigError([f"{file.name}: is larger than 1 MB, expected a configuration"])
        text = file.text = content.decode("utf-8-sig")
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
            return Value(file, node)
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


def shown(text: str, quoted: bool = False) -> str:
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
    return shown(name) + ("..." if rest else "")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def variables(names: Iterable[str]) -> str:
    """Environment variables, as they are written in the file."""
    return ", ".join(f"${{{name}}}" for name in names)


def _is_unicode(text: str) -> bool:
    # Half a surrogate pair: an escape in the file, or a byte of the environment that is not UTF-8.
    return not re.search(r"[\ud800-\udfff]", text)


def in_order(notes: list[tuple[int, str]]) -> tuple[str, ...]:
    """The notes, in the order of its places in the file."""
    return tuple(line for _, line in sorted(notes, key=lambda each: each[0]))
