"""Readers for client keys, for what each may do and spend, and for prices."""

import datetime
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from .document import Fault, Value, variables
from .readers import hidden, list_of, number, section, whole, without_faults, zero_or_more
from .settings import Budget, ClientKey, KeyLimits, Price, Secret

PRINTABLE_ASCII = re.compile(r"[!-~]+")
_DIGEST = re.compile(r"[0-9a-f]{64}", re.IGNORECASE)
#: Seconds that a request may wait for a place of its key.
_LONGEST_WAIT = 10
#: What Anthropic charges for the other kinds of tokens, as a part of the price of input; see
#: https://platform.claude.com/docs/en/about-claude/pricing.
_PARTS_OF_INPUT = {"cache_read": 0.1, "cache_write_5m": 1.25, "cache_write_1h": 2.0}


def name_of(value: Value) -> str:
    """A name as it goes out in a header; what cannot stand in one is percent-encoded, not refused.

    Names with spaces and in any script are common in files that were written for the Go program.
    """
    text = value.text()
    if not text or re.search(r"[\x00-\x1f\x7f-\x9f\"'`]", text):
        value.refuse("a name without quotes and control characters")
    if not PRINTABLE_ASCII.fullmatch(text):
        value.warn("is not printable ASCII without spaces: headers and logs show it percent-encoded")
    return quote(text, safe="!#$%&()*+,/:;<=>?@[\\]^{|}~")


def token_of(value: Value) -> Secret:
    """A key, of an upstream or of a client."""
    text = value.text()
    if not text:
        named = variables(value.variables)
        raise Fault(
            f"names {named}, empty in the environment, expected a key"
            if named
            else "is blank, expected a key"
        )
    if not PRINTABLE_ASCII.fullmatch(text):
        raise Fault("has a space or a character that is not printable ASCII, expected a key alone")
    return Secret(text)


def _digest_of(value: Value) -> str:
    text = value.text()
    if not _DIGEST.fullmatch(text):
        raise Fault("is not a SHA-256 in hexadecimal, expected 64 digits")
    return text.lower()


def _one_or_more(reader: Callable[[Value], Any]) -> Callable[[Value], tuple[Any, ...]]:
    """A reader of one value or of a list of them: of the old and of the new key during a rotation."""

    def read(value: Value) -> tuple[Any, ...]:
        if not value.is_list:
            return (reader(value),)
        found = list_of(reader)(value)
        if not value.items():
            raise Fault("is an empty list, expected at least one")
        return tuple(found)

    return read


def _model(value: Value) -> str:
    name = value.text()
    if not name or not value.is_text:
        value.refuse("the name of a model")
    return name


def _models(value: Value) -> tuple[str, ...]:
    models = tuple(list_of(_model)(value))
    if not value.items():
        raise Fault("is an empty list, expected at least one model; leave it out to allow every model")
    return models


def _expires(value: Value) -> datetime.date:
    text = value.text()
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        return value.refuse("the last valid day, such as 2027-01-31")


budget_of = section(Budget, dict.fromkeys(("daily", "weekly", "monthly"), zero_or_more))

_LIMITS: dict[str, Callable[[Value], Any]] = {
    "budget": budget_of,
    "models": _models,
    "max_in_flight": whole("a whole number, 1 or more", 1),
    "max_wait": number(f"a number from 0 to {_LONGEST_WAIT}", lambda number: 0 <= number <= _LONGEST_WAIT),
    "expires": _expires,
}
_KEY = {
    "name": name_of,
    "key": hidden(_one_or_more(token_of)),
    "key_sha256": hidden(_one_or_more(_digest_of)),
    **_LIMITS,
}


def key_limits(value: Value) -> dict[str, Any]:
    """`key_defaults`: the limits of keys that do not set their own."""
    return without_faults(value.fields(_LIMITS))


def api_keys(value: Value) -> list[tuple[ClientKey, dict[str, Any]]]:
    """The client keys, each with the limits that it sets itself.

    One without a name is called after its place in the list.
    """
    items = value.items()
    if not items:
        raise Fault("is an empty list, expected at least one key; leave it out to serve without keys")
    found: list[tuple[ClientKey, dict[str, Any]]] = []
    names: set[str] = set()
    digests: set[str] = set()
    for number_, item in enumerate(items, start=1):
        item.hidden = not item.is_mapping
        key, limits = item.read(_client_key) or (None, {})
        if key is None or not (key.keys or key.digests):
            continue
        name = key.name or f"key-{number_}"
        if name in names:
            item.fault("is another key's name too, expected one of its own", "name")
        for digest in all_digests(ClientKey(name, key.keys, key.digests)):
            if digest in digests:
                item.fault("is the same key as one before, expected each once")
            digests.add(digest)
        names.add(name)
        found.append((ClientKey(name, key.keys, key.digests), limits))
    return found


def all_digests(key: ClientKey) -> list[str]:
    """The SHA-256 of each of its keys, in hexadecimal."""
    return [*(hashlib.sha256(each.encode()).hexdigest() for each in key.keys), *key.digests]


def with_defaults(
    keys: list[tuple[ClientKey, dict[str, Any]]], defaults: Mapping[str, Any]
) -> tuple[ClientKey, ...]:
    """The keys with their limits: a setting of `key_defaults` holds where the key has none of that name."""
    return tuple(
        ClientKey(key.name, key.keys, key.digests, KeyLimits(**{**defaults, **limits}))
        for key, limits in keys
    )


def _client_key(value: Value) -> tuple[ClientKey, dict[str, Any]]:
    """A key alone, or a mapping."""
    if not value.is_mapping:
        return ClientKey("", (token_of(value),)), {}
    found = value.fields(_KEY)
    if "name" not in found:
        value.fault("is missing, expected a name and a key", "name")
    if "key" not in found and "key_sha256" not in found:
        value.fault("is missing, expected a name and a key, or key_sha256", "key")
    name, keys, digests = (found.pop(each, None) for each in ("name", "key", "key_sha256"))
    return ClientKey(name or "", keys or (), digests or ()), without_faults(found)


_PRICE = dict.fromkeys(
    ("input", "output", "cache_read", "cache_write_5m", "cache_write_1h", "web_search"), zero_or_more
)


def price_of(value: Value) -> Price:
    """The price of a model; kinds of cached tokens that are left out cost their usual part of the input's."""
    found = without_faults(value.fields(_PRICE))
    for key in ("input", "output"):
        if key not in found:
            value.fault("is missing, expected dollars per million tokens", key)
    usual = {kind: found.get("input", 0.0) * part for kind, part in _PARTS_OF_INPUT.items()}
    return Price(**{"input": 0.0, "output": 0.0, **usual, **found})
