"""YAML file -> frozen, validated settings; every fault names its path, and all are reported at once."""

from .keys import all_digests
from .schema import default_ledger, load
from .settings import (
    LOOPBACK,
    BreakerSettings,
    Budget,
    ClientKey,
    Config,
    ConfigError,
    KeyLimits,
    LedgerSettings,
    LoggingSettings,
    Network,
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
    "LOOPBACK",
    "BreakerSettings",
    "Budget",
    "ClientKey",
    "Config",
    "ConfigError",
    "KeyLimits",
    "LedgerSettings",
    "LoggingSettings",
    "Network",
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
