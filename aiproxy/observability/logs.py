"""Log lines: key=value text or JSON, without forged lines.

What is said where: one line when a request arrives, one an attempt, one when the request is done, one
when a circuit changes. The request's id joins them. The one handler spells them and writes them to
standard output or to a file; our own lines go to it directly, since three for each request would spend
a tenth of the request's time in the detours of `logging`.
"""

import contextlib
import functools
import io
import json
import logging
import math
import re
import sys
import time
import traceback
from collections.abc import Iterable
from typing import Any

import msgspec

from ..config import LoggingSettings
from .logfile import LogFile
from .redaction import FIELD, REDACTED, Redactor

Value = str | int | float | bool | None

_LOGGER = logging.getLogger("aiproxy")

#: Seconds between two complaints that the log cannot be written.
COMPLAINT = 60.0

_JSON = json.JSONEncoder(ensure_ascii=False, default=str)
_BARE = re.compile(r"[A-Za-z0-9_./:@+-]+")
# What a terminal or a log viewer may take for a line's end or for a command.
_UNSAFE = re.compile(r"[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_CONTROL = re.compile(rf"[\x00-\x1f]|{_UNSAFE.pattern}")


def redacted(redactor: Redactor, level: int, event: str, secrets: Iterable[str], **fields: Value) -> None:
    """As `line`, where strangers had a part; `prompt` and `headers` have been redacted and cut.

    Raises nothing: a fault of ours in here is logged as a bug, and the request goes on.
    """
    if not _LOGGER.isEnabledFor(level):
        return
    try:
        texts = {
            name: value
            for name, value in fields.items()
            if value is not None and isinstance(value, str) and name not in ("prompt", "headers")
        }
        if redactor.may_hold_secret("\n".join(texts.values()), secrets):
            fields |= {name: redactor.text(value, FIELD, secrets) for name, value in texts.items()}
        _handler().put(_Line(time.time(), logging.getLevelName(level), event, fields))
    except Exception:
        exception("bug", id=fields.get("id"))


def headers(
    redactor: Redactor, pairs: Iterable[tuple[str, str]], secrets: Iterable[str], **fields: Value
) -> None:
    """At debug level a line with all headers, those that are credentials redacted."""
    if _LOGGER.isEnabledFor(logging.DEBUG):
        shown = [
            redactor.text(f"{name}: {REDACTED if redactor.hides(name) else value}", FIELD, secrets)
            for name, value in pairs
        ]
        redacted(redactor, logging.DEBUG, "headers", secrets, **fields, headers="\n".join(shown))


def line(level: int, event: str, **fields: Value) -> None:
    """Write one line; fields that are None are left out. Values cannot break out of their place."""
    if _LOGGER.isEnabledFor(level):
        _handler().put(_Line(time.time(), logging.getLevelName(level), event, fields))


def circuit(upstream: str, state: str, seconds: float | None = None, by: str | None = None) -> None:
    """A circuit opened or closed, is tried, or is in backoff; `seconds` until the upstream is tried again.

    `by`: who found out, if it was not this process.
    """
    level = logging.INFO if state == "closed" else logging.WARNING
    line(level, "circuit", upstream=upstream, state=state, seconds=seconds or None, by=by)


def backoff(upstream: str, model: str | None, seconds: float) -> None:
    """An upstream, or one `model` of it, is not asked for so many seconds."""
    line(logging.WARNING, "circuit", upstream=upstream, model=model, state="backoff", seconds=seconds)


def exception(event: str, **fields: Value) -> None:
    """Write one line and the traceback of the exception in hand: a bug of ours."""
    trace = "".join(traceback.format_exception(sys.exception()))
    _handler().put(_Line(time.time(), "ERROR", event, fields, trace))


def dropped() -> int:
    """Lines that this process could not write."""
    return _handler().dropped


def configure(settings: LoggingSettings) -> None:
    """Send this package's lines where the settings say, and nowhere else.

    May be called again at any time: no line that another thread writes meanwhile is lost or comes twice.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A prompt may hold what the terminal's encoding lacks; no line is worth losing for it.
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = _handler()
    handler.direct(settings)
    _LOGGER.handlers[:] = [handler]
    _LOGGER.propagate = False
    _LOGGER.setLevel(settings.level.upper())
    # It quotes odd answers at length, which may hold anything; what matters of them is in our own lines.
    logging.getLogger("urllib3").setLevel(logging.ERROR)


def adopt(logger: logging.Logger) -> None:
    """Send a server's own lines where ours go, instead of to standard error, if that is a file or JSON.

    What else it writes to stays; where ours are plain text on standard output, all of it stays.
    """
    handler = _handler()
    others = [each for each in logger.handlers if each is not handler]
    if handler.is_plain:
        logger.handlers[:] = others
    else:
        logger.handlers[:] = [each for each in others if getattr(each, "stream", None) is not sys.stderr]
        logger.addHandler(handler)


def _handler() -> "_Handler":
    """The one of this process."""
    for handler in _LOGGER.handlers:
        if isinstance(handler, _Handler):
            return handler
    return _Handler()


class _Stdout:
    """Standard output as it was when it was chosen."""

    def __init__(self) -> None:
        self._stream = sys.stdout

    def write(self, line: str) -> None:
        if self._stream is None:  # it was closed before the start
            return
        self._stream.write(line)
        self._stream.flush()

    def close(self) -> None:
        """It is not ours to close."""


class _Handler(logging.Handler):
    """Spells each record and writes it; what cannot be written is reported on standard error and dropped."""

    def __init__(self) -> None:
        super().__init__()
        self._out: _Stdout | LogFile = _Stdout()
        self._spell = _as_text
        self._quiet_until = 0.0
        self.is_plain = True
        self.dropped = 0  # lines

    def direct(self, settings: LoggingSettings) -> None:
        """From the next line on, write as the settings say."""
        out = _Stdout() if settings.file is None else LogFile(settings.file)
        self.acquire()
        try:
            self._out.close()
            self._out = out
            self._spell = _as_json if settings.format == "json" else _as_text
            self._quiet_until = 0.0
            self.is_plain = settings.is_plain
        finally:
            self.release()

    def emit(self, record: logging.LogRecord) -> None:
        """Another package's record: its name, its process and what it says."""
        trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else None
        fields = {"pid": record.process, "message": record.getMessage()}
        self.put(_Line(record.created, record.levelname, record.name.partition(".")[0], fields, trace))

    def put(self, line: "_Line") -> None:
        """Spell a line and write it."""
        text = self._spell(line) + "\n"
        self.acquire()
        try:
            self._out.write(text)
        except OSError as error:
            self.dropped += 1
            self._complain(error)
        except ValueError:  # it was closed, and standard error most likely too
            self.dropped += 1
        finally:
            self.release()

    def _complain(self, error: OSError) -> None:
        now = time.monotonic()
        if now < self._quiet_until:
            return
        self._quiet_until = now + COMPLAINT
        with contextlib.suppress(OSError, ValueError):  # it may be closed, or as full
            print(f"cannot write the log: {error.strerror or error}", file=sys.stderr, flush=True)


class _Line(msgspec.Struct, frozen=True):
    """What one line says; `at` is Unix time, `trace` a traceback."""

    at: float
    level: str
    event: str
    fields: dict[str, Any]
    trace: str | None = None


def _time_of(line: _Line) -> str:
    """RFC 3339, in UTC."""
    return f"{_second(int(line.at))}.{int(line.at % 1 * 1000):03d}Z"


@functools.lru_cache(maxsize=2)
def _second(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))


def _as_text(line: _Line) -> str:
    pairs = [f"{name}={_written(value)}" for name, value in line.fields.items() if value is not None]
    text = " ".join([_time_of(line), line.level, line.event, *pairs])
    if line.trace is None:
        return text
    # What an exception says of a prompt must not forge a line.
    return "\n".join([text, *(f"  | {_CONTROL.sub(_as_escape, each)}" for each in line.trace.splitlines())])


def _as_json(line: _Line) -> str:
    shown = {"time": _time_of(line), "level": line.level, "event": line.event}
    shown |= {name: _json_value(value) for name, value in line.fields.items() if value is not None}
    if line.trace is not None:
        shown["traceback"] = line.trace.rstrip("\n")
    return _UNSAFE.sub(_as_json_escape, _JSON.encode(shown))


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3) if math.isfinite(value) else str(value)
    return value


def _written(value: Value) -> str:
    if value is True or value is False:
        return "true" if value else "false"
    if type(value) is float:
        return f"{value:.3f}"
    text = str(value)
    if _BARE.fullmatch(text):
        return text
    return _UNSAFE.sub(_as_escape, _JSON.encode(text))


def _as_escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _as_json_escape(found: re.Match[str]) -> str:
    """Half a surrogate pair stands for no character, and strict readers refuse the line for it."""
    return "\ufffd" if "\ud800" <= found[0] <= "\udfff" else _as_escape(found)
