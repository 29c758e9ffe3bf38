"""The configuration file while the service runs: followed, compared with what is in force, kept if good.

A thread of each worker looks at the file's content, so that a rewrite, a rename onto it and a switched
symbolic link are all the same. What taking a configuration up means is the service's matter.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Protocol, Self

import msgspec

from ..config import Config, ConfigError, Sources, StateUrl, load, read_sources, secrets_in
from ..observability import logs

#: Seconds between two looks. A change is taken up at the second look that finds it: at the first an
#: editor may be in the middle of writing.
LOOK = 0.75
#: Looks until a configuration that was refused is tried again.
_LOOKS_REFUSED = 2
#: The environment variable that names `LastGood`'s file.
LAST_GOOD = "AIPROXY_LAST_GOOD"

#: Settings that gunicorn reads once, at its start.
_NEED_RESTART = ("bind", "listen", "workers", "state", "ledger")
#: Shown otherwise: warnings by themselves, the others as `listen`.
_LEFT_OUT = ("warnings", "port", "unix_socket", "substituted")
_LONGEST_SHOWN = 60


class Service(Protocol):
    """Who works with the configuration."""

    def apply(self, config: Config, digest: str) -> None: ...

    def refuse(self, faults: Iterable[str]) -> None: ...

    def update_gauges(self) -> None: ...

    def alert(self) -> None: ...


class LastGood:
    """The text of the configuration that was accepted last, in a file that all workers share.

    A worker that starts while the configuration is faulty serves this one, so that a bad edit by day and a
    crash by night do not end the service.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def create(cls, directory: Path, sources: Sources, environ: MutableMapping[str, str]) -> None:
        """In gunicorn's master, before it starts workers: they find it by `environ`."""
        path = directory / "accepted-configuration"
        cls(path).keep(sources)
        environ[LAST_GOOD] = str(path)

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self | None:
        """The one that the master created, None under another server."""
        return cls(Path(environ[LAST_GOOD])) if environ.get(LAST_GOOD) else None

    def keep(self, sources: Sources) -> None:
        """Replace the text; a reader gets the old or the new one. Keys may stand in there: mode 0600."""
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(msgspec.msgpack.encode(sources))
        new.replace(self._path)

    def sources(self) -> Sources | None:
        """What was kept last, None where it cannot be read."""
        try:
            return msgspec.msgpack.decode(self._path.read_bytes(), type=Sources)
        except (OSError, msgspec.DecodeError):
            return None


class Start(msgspec.Struct, frozen=True):
    """What a worker starts with."""

    config: Config
    sources: Sources  # the configuration's
    found: Sources  # the files as they were found
    faults: tuple[str, ...] = ()  # why these are not in force


def start(path: Path, last_good: LastGood | None) -> Start:
    """The file's configuration, else the last good one. Raises `ConfigError` where there is neither."""
    found = read_sources(path)
    try:
        return Start(load(path, sources=found), found, found)
    except ConfigError as error:
        sources = last_good.sources() if last_good is not None else None
        if sources is None:
            raise
        return Start(load(path, sources=sources, was_good=True), sources, found, error.faults)


class Follower:
    """Follows one file; `look` is all that its thread does."""

    def __init__(self, path: Path, begun: "Start", service: Service, last_good: LastGood | None) -> None:
        self._path = path
        self._handled = begun.found
        self._seen = begun.found
        self._refused = begun.faults
        self._patience = _LOOKS_REFUSED
        self._service = service
        self._last_good = last_good
        self._stopped = threading.Event()

    def start(self) -> None:
        """Look from now on."""
        threading.Thread(target=self._run, name="reload", daemon=True).start()

    def stop(self) -> None:
        """Look no longer."""
        self._stopped.set()

    def look(self) -> None:
        """Handle a content that was there at the last look too, and is not the one handled last.

        One that was refused is handled again from time to time: the fault may have been in another file.
        """
        found = read_sources(self._path)
        self._patience -= 1
        is_due = found != self._handled or (self._refused and self._patience <= 0)
        if found == self._seen and is_due:
            self._handled = found
            self._handle(found)
        self._seen = found

    def _handle(self, found: Sources) -> None:
        began = time.monotonic()
        try:
            config = load(self._path, sources=found)
            if found.config is None:
                return  # it is there again: the next look reads it
            self._service.apply(config, found.digest)
        except ConfigError as error:
            if error.faults != self._refused:
                self._service.refuse(error.faults)
            self._refused = error.faults
            # A large file that is faulty shall not keep the parser busy.
            self._patience = _LOOKS_REFUSED + int(20 * (time.monotonic() - began) / LOOK)
            return
        self._refused = ()
        if self._last_good is not None:
            try:
                self._last_good.keep(found)
            except OSError as error:
                reason = f"the accepted configuration cannot be kept: {error.strerror}"
                logs.line(logging.WARNING, "reload", warning=reason)

    def _run(self) -> None:
        while not self._stopped.wait(LOOK):
            try:
                self.look()
                self._service.update_gauges()
                self._service.alert()
            except Exception:  # a bug must not end the following
                logs.exception("bug", thread="reload")


def changes(old: Config, new: Config) -> list[str]:
    """What is different, a line for each setting, in the order of the settings; secrets only as changed."""
    trees = [{"listen": each.unix_socket or each.port, **_shown(each)} for each in (old, new)]
    found = [
        (path, _difference(was, now), path.partition(".")[0] in _NEED_RESTART)
        for path, was, now in _changes("", *trees)
    ]
    return [
        f"{path}: {'changed' if _is_secret(difference, old, new) else difference}"
        f"{' (needs a restart)' if needs_restart else ''}"
        for path, difference, needs_restart in found
    ]


def _is_secret(text: str, old: Config, new: Config) -> bool:
    """Whether it shows what a variable stood for: that may be a key wherever it stands."""
    return old.substituted.are_in(text) or new.substituted.are_in(text)


def _changes(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """The paths of settings that differ, with what they were and are."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _changes(f"{path}.{name}" if path else name, old.get(name), new.get(name))
    else:
        yield path, old, new


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict | _Secret) or isinstance(new, dict | _Secret):
        return "added" if old is None else "removed" if new is None else "changed"
    was, now = map(_as_text, (old, new))
    return f"{was} -> {now}" if len(was) + len(now) <= _LONGEST_SHOWN else "changed"


def _as_text(value: Any) -> str:
    if value is None:
        return "not set"
    return ", ".join(sorted(value)) or "none" if isinstance(value, frozenset | tuple) else str(value)


class _Secret(msgspec.Struct, frozen=True):
    """What may be compared and not shown."""

    value: Any


def _shown(setting: Any) -> Any:
    """Settings as a tree of dicts, those in a list by their names, secrets behind a mask."""
    if isinstance(setting, tuple) and any(isinstance(each, msgspec.Struct) for each in setting):
        return {each.name: _shown(each) for each in setting}
    if isinstance(setting, msgspec.Struct) and not isinstance(setting, StateUrl):
        return {
            name: _shown(getattr(setting, name))
            for name in setting.__struct_fields__
            if name not in _LEFT_OUT
        }
    if any(secrets_in(setting)):
        return _Secret(setting)
    if isinstance(setting, dict):
        return {name: _shown(value) for name, value in setting.items()}
    return setting
