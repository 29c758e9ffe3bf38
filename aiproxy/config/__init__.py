"""YAML file -> frozen, validated settings; every fault names its path, and all are reported at once."""

from .schema import load
from .settings import (
    BreakerSettings,
    ClientKey,
    Config,
    ConfigError,
    LoggingSettings,
    StateUrl,
    Substituted,
    Timeouts,
    UpstreamSettings,
    check_addresses,
    path_from,
)
from .sources import Sources, read_sources

__all__ = [
    "BreakerSettings",
    "ClientKey",
    "Config",
    "ConfigError",
    "LoggingSettings",
    "Sources",
    "StateUrl",
    "Substituted",
    "Timeouts",
    "UpstreamSettings",
    "check_addresses",
    "load",
    "path_from",
    "read_sources",
]
