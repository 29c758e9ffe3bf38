"""YAML file -> frozen, validated settings; every fault names its path, and all are told at once."""

from .document import content_of
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

__all__ = [
    "BreakerSettings",
    "ClientKey",
    "Config",
    "ConfigError",
    "LoggingSettings",
    "StateUrl",
    "Substituted",
    "Timeouts",
    "UpstreamSettings",
    "check_addresses",
    "content_of",
    "load",
    "path_from",
]
