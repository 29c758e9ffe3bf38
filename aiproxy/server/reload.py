"""The configuration file while the service runs: followed, compared with what is in force, kept if good.

A thread of each worker looks at the file's content, so that a rewrite, a rename onto it and a switched
symbolic link are all the same. What taking a configuration up means is the service's matter.
"""

import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Protocol, Self

import msgspec

from ..config import ClientKey, Config, ConfigError, StateUrl, UpstreamSettings, content_of, load
from ..observability import logs

#: Seconds between two looks. A change is taken up at the second look that finds it: at the first an
#: editor may be in the middle of writing.
LOOK = 0.75
#: Looks until a configuration that was refused is tried again.
_LOOKS_REFUSED = 2
#: Where `LastGood` is: the number of a file descriptor.
LAST_GOOD = "AIPROXY_LAST_GOOD"

#: Settings that gunicorn reads once, at its start.
_NEED_RESTART = ("bind", "listen", "workers", "state")
#: Told otherwise: warnings by themselves, the others as `listen`.
_LEFT_OUT = ("warnings", "port", "unix_socket", "substituted")
_LENGTH = struct.Struct("Q")
_LONGEST_SHOWN = 60


class Service(Protocol):
    """Who works with the configuration."""

    def apply(self, config: Config, content: bytes) -> None: ...

    def refuse(self, faults: Iterable[str]) -> None: ...

    def update_gauges(self) -> None: ...


class LastGood:
    """The content of the configuration that was in force last, in memory that all workers share.

    A worker that is started while the file is faulty takes this one, so that a bad edit by day and a
    crash by night do not end the service. A memory file, since keys may stand in there.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def create(cls, content: bytes, environ: MutableMapping[str, str]) -> None:
        """In gunicorn's master, before it forks workers: they inherit it, and find it by `environ`."""
        descriptor = os.memfd_create("aiproxy-config")
        environ[LAST_GOOD] = str(descriptor)
        cls(descriptor).keep(content)

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self | None:
        """The one that the master created, None under another server."""
        return cls(int(environ[LAST_GOOD])) if LAST_GOOD in environ else None

    def keep(self, content: bytes) -> None:
        """Remember the content: in one write, in the middle of which no process is killed."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            os.pwrite(self._descriptor, _LENGTH.pack(len(content)) + content, 0)
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def content(self) -> bytes:
        """What was kept last."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            (length,) = _LENGTH.unpack(os.pread(self._descriptor, _LENGTH.size, 0))
            return os.pread(self._descriptor, length, _LENGTH.size)
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


class Start(msgspec.Struct, frozen=True):
    """What a worker starts with."""

    config: Config
    content: bytes  # the configuration's
    found: bytes | None  # the file's as it was found, None where it could not be read
    faults: tuple[str, ...] = ()  # why that is not in force


def start(path: Path, last_good: LastGood | None) -> Start:
    """The file's configuration, else the last good one. Raises `ConfigError` where there is neither."""
    found = _content(path)
    try:
        return Start(load(path, content=found), found or b"", found)
    except ConfigError as error:
        if last_good is None:
            raise
        content = last_good.content()
        return Start(load(path, content=content, was_good=True), content, found, error.faults)


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
        content = _content(self._path)
        self._patience -= 1
        is_due = content != self._handled or (self._refused and self._patience <= 0)
        if content == self._seen and is_due:
            self._handled = content
            self._handle(content)
        self._seen = content

    def _handle(self, content: bytes | None) -> None:
        began = time.monotonic()
        try:
            config = load(self._path, content=content)
            if content is None:
                return  # it is there again: the next look reads it
            self._service.apply(config, content)
        except ConfigError as error:
            if error.faults != self._refused:
                self._service.refuse(error.faults)
            self._refused = error.faults
            # A large file that is faulty shall not keep the parser busy.
            self._patience = _LOOKS_REFUSED + int(20 * (time.monotonic() - began) / LOOK)
        else:
            self._refused = ()
            if self._last_good is not None:
                self._last_good.keep(content)

    def _run(self) -> None:
        while not self._stopped.wait(LOOK):
            try:
                self.look()
                self._service.update_gauges()
            except Exception:  # a bug must not end the following
                logs.exception("bug", thread="reload")


def _content(path: Path) -> bytes | None:
    try:
        return content_of(path)
    except OSError:
        return None


def changes(old: Config, new: Config) -> list[str]:
    """What is different, a line for each setting, in the order of the settings; secrets only as changed."""
    trees = [{"listen": each.unix_socket or each.port, **_shown(each)} for each in (old, new)]
    told = [(path, _difference(was, now), path in _NEED_RESTART) for path, was, now in _changes("", *trees)]
    return [
        f"{path}: {'changed' if _is_secret(difference, old, new) else difference}"
        f"{' (needs a restart)' if needs_restart else ''}"
        for path, difference, needs_restart in told
    ]


def _is_secret(told: str, old: Config, new: Config) -> bool:
    """Whether it tells what an environment variable stood for: that may be a key wherever it stands."""
    return old.substituted.are_in(told) or new.substituted.are_in(told)


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
    was, now = map(_told, (old, new))
    return f"{was} -> {now}" if len(was) + len(now) <= _LONGEST_SHOWN else "changed"


def _told(value: Any) -> str:
    if value is None:
        return "not set"
    return ", ".join(sorted(value)) or "none" if isinstance(value, frozenset) else str(value)


class _Secret(msgspec.Struct, frozen=True):
    """What may be compared and not shown."""

    value: Any


def _shown(setting: Any) -> Any:
    """Settings as a tree of dicts, those in a list by their names, secrets behind a mask."""
    if isinstance(setting, ClientKey | StateUrl):
        return _Secret(setting)
    if isinstance(setting, tuple):
        return {each.name: _shown(each) for each in setting}
    if not isinstance(setting, msgspec.Struct):
        return setting
    masked = dict(setting.__rich_repr__()) if isinstance(setting, UpstreamSettings) else {}
    return {
        name: _shown(value) if masked.get(name, value) == value else _Secret(value)
        for name in setting.__struct_fields__
        if name not in _LEFT_OUT
        for value in [getattr(setting, name)]
    }
