"""YAML file -> frozen, validated settings; every fault names its path, and all are reported at once."""

from .keys import all_digests
from .schema import default_ledger, load
from .settings import (
    BreakerSettings,
    Budget,
    ClientKey,
    Config,
    ConfigError,
    KeyLimits,
    LedgerSettings,
    LoggingSettings,
    Price,
    Secret,
    StateUrl,
    Substituted,
    Timeouts,
    UpstreamSettings,
    check_addresses,
    path_from,
    secrets_in,
)
from .sources import Sources, read_sources

__all__ = [
    "BreakerSettings",
    "Budget",
    "ClientKey",
    "Config",
    "ConfigError",
    "KeyLimits",
    "LedgerSettings",
    "LoggingSettings",
    "Price",
    "Secret",
    "Sources",
    "StateUrl",
    "Substituted",
    "Timeouts",
    "UpstreamSettings",
    "all_digests",
    "check_addresses",
    "default_ledger",
    "load",
    "path_from",
    "read_sources",
    "secrets_in",
]
