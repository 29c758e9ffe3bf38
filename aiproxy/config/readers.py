"""Readers for any setting: functions that make a setting of a value, or raise `Fault`."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .document import NotGiven, Value

K = TypeVar("K")
T = TypeVar("T")

_NUMBER = re.compile(r"[-+]?(?!0[0-9])([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
# Thirty years in seconds: sockets refuse much longer timeouts, and no number here has a use for more.
_LARGEST = 10**9

# YAML 1.1's, as PyYAML and Go read them.
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def number(expected: str, fits: Callable[[float], bool]) -> Callable[[Value], float]:
    """A reader of numbers, quoted ones too; it goes by their text, since YAML takes `1:30` for 90."""

    def read(value: Value) -> float:
        text = value.text()
        found = float(text) if _NUMBER.fullmatch(text) else math.nan
        if found > _LARGEST:
            value.refuse(f"at most {_LARGEST}")
        if not fits(found):
            value.refuse(expected)
        return found

    return read


def whole(expected: str, least: int = -_LARGEST) -> Callable[[Value], int]:
    """A reader of whole numbers from `least` on."""
    read = number(expected, lambda found: found.is_integer() and found >= least)
    return lambda value: int(read(value))


above_zero = number("a number above 0", lambda found: found > 0)
zero_or_more = number("a number, 0 or more", lambda found: found >= 0)


def boolean(value: Value) -> bool:
    """True or false; in quotes only if it comes from the environment, which knows nothing but text."""
    text = value.text().lower()
    if text not in _BOOLEANS or (value.is_text and not value.variables):
        value.refuse("true or false")
    return _BOOLEANS[text]


def one_of(*choices: str) -> Callable[[Value], str]:
    """A reader of one of these words, in lower or upper case."""

    def read(value: Value) -> str:
        text = value.text().lower()
        if text not in choices:
            value.refuse(f"{', '.join(choices[:-1])} or {choices[-1]}")
        return text

    return read


def list_of(reader: Callable[[Value], T]) -> Callable[[Value], list[T]]:
    """A reader of lists; elements with a fault are left out."""
    return lambda value: [each for item in value.items() if (each := item.read(reader)) is not None]


def mapping_of(
    key_reader: Callable[[Value], K], reader: Callable[[Value], T]
) -> Callable[[Value], dict[K, T]]:
    """A reader of mappings whose keys are free; entries with a fault are left out."""

    def read(value: Value) -> dict[K, T]:
        found: dict[K, T] = {}
        for key, member in value.entries():
            name, content = key.read(key_reader), member.read(reader)
            if name in found:
                member.fault("is given twice, in upper and in lower case, expected once")
            elif name is not None and content is not None:
                found[name] = content
        return found

    return read


def section(struct: Callable[..., T], readers: Mapping[str, Callable[[Value], Any]]) -> Callable[[Value], T]:
    """A reader of a mapping of settings: what is not given has the Struct's default."""
    return lambda value: struct(**without_faults(value.fields(readers)))


def without_faults(found: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that could be read; for those that could not a fault is noted."""
    return {key: value for key, value in found.items() if value is not None}


def hidden(reader: Callable[[Value], T]) -> Callable[[Value], T]:
    """The same reader for secrets: no fault shows the value or anything under it."""

    def read(value: Value) -> T:
        value.hidden = True
        return reader(value)

    return read


def or_default(reader: Callable[[Value], T]) -> Callable[[Value], T]:
    """The same reader for a text that counts as not given when it is empty, as it did in the Go program."""

    def read(value: Value) -> T:
        if value.is_text and value.literal() == "":
            raise NotGiven
        return reader(value)

    return read
