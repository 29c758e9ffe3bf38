"""The store of workers on several machines: Redis or Valkey, version 6.2 or later.

Beside the connection for commands, a thread listens to a channel, on which each change of a record is
published. Times are the server's: clocks of machines differ.
"""

import contextlib
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..config import StateUrl
from .shared_state import Reading, Record, StoreError

#: Seconds for which the server may be silent before it counts as out of reach.
SILENCE = 0.5
#: Seconds after which the thread that listens looks whether it is to stop.
_LISTEN = 0.25
#: Seconds of silence after which it asks whether the server is there; after twice as many it is not.
_PING = 5.0
#: Seconds for which the records of an upstream outlive the last worker that serves it.
_FORGOTTEN = 7 * 24 * 3600
_PREFIX = "aiproxy:"
_EPOCH, _ROWS = f"{_PREFIX}epoch", f"{_PREFIX}rows"


class RedisStore:
    """See `Store`."""

    interval: float | None = None

    def __init__(self, settings: StateUrl) -> None:
        self._settings = settings
        self._client = _client(settings.url)
        database = self._client.get_connection_kwargs().get("db") or 0
        self._channel = f"{_PREFIX}{database}:changes"  # channels belong to no database
        self._name = b""  # another one in each process
        self._offset = 0.0  # from the monotonic clock to the server's
        self._stopped = threading.Event()
        self._deaf: str | None = None

    def connect(self, on_change: Callable[[], None]) -> None:
        self._run(("SET", f"{_PREFIX}joined", 1, "EX", 60))
        self._name, self._deaf = secrets.token_hex(8).encode(), None
        self._stopped = threading.Event()
        arguments = (on_change, self._stopped)
        threading.Thread(target=self._listen, args=arguments, name="state, listening", daemon=True).start()

    def disconnect(self) -> None:
        self._stopped.set()
        self._client.connection_pool.disconnect()

    def now(self) -> float:
        return time.monotonic() + self._offset

    def has_changed(self) -> bool:
        """`on_change` is called instead."""
        return False

    def problem(self) -> str | None:
        return self._deaf

    def read(self, ids: Sequence[str]) -> Reading:
        commands: list[tuple[Any, ...]] = [
            ("TIME",),
            ("SET", _EPOCH, secrets.token_hex(8), "NX"),
            ("GET", _EPOCH),
        ]
        for id_ in ids:
            commands += [("HGETALL", _fields(id_)), ("GET", _trial(id_))]
            commands += [("ZRANGE", _backoffs(id_), 0, -1, "WITHSCORES")]
            commands += [("EXPIRE", _fields(id_), _FORGOTTEN)]
        (seconds, microseconds), _, epoch, *replies = self._run(*commands)
        self._offset = float(seconds) + float(microseconds) / 1e6 - time.monotonic()
        found = {id_: _record(*replies[4 * n : 4 * n + 3]) for n, id_ in enumerate(ids)}
        return Reading(_text(epoch), found)

    def count_failure(self, id_: str) -> int:
        return int(self._change(("HINCRBY", _fields(id_), "failures", 1))[0])

    def put(self, id_: str, field: str, value: float, only_if_absent: bool = False) -> None:
        """Counts are whole numbers here."""
        command = "HSETNX" if only_if_absent else "HSET"
        self._change((command, _fields(id_), field, int(value) if field == "failures" else value))

    def remove(self, id_: str, *fields: str) -> None:
        self._change(
            ("HDEL", _fields(id_), *fields), *([("DEL", _backoffs(id_))] if "backoffs" in fields else [])
        )

    def back_off(self, id_: str, model: str, until: float) -> None:
        key = _backoffs(id_)
        self._change(
            ("ZREMRANGEBYSCORE", key, "-inf", self.now()),
            ("ZADD", key, "GT", until, _word(model)),
            ("EXPIRE", key, _FORGOTTEN),
        )

    def end_backoff(self, id_: str, model: str) -> None:
        self._change(("ZREM", _backoffs(id_), _word(model)))

    def take_trial(self, id_: str, token: str, seconds: float) -> bool:
        """Whoever opens a circuit again ends its own trial only after that."""
        set_ = ("SET", _trial(id_), token, "NX", "PX", int(seconds * 1000))
        was_set, ends = self._change(set_, ("HGET", _fields(id_), "open"))
        if was_set and ends is not None and float(ends) > self.now():
            self.end_trial(id_)
            return False
        return bool(was_set)

    def renew_trial(self, id_: str, seconds: float) -> None:
        self._run(("PEXPIRE", _trial(id_), int(seconds * 1000)))

    def end_trial(self, id_: str) -> None:
        self._change(("DEL", _trial(id_)))

    def remember(self, message_id: str, upstream: str, seconds: float) -> None:
        self._run(("SET", f"{_PREFIX}owner:{message_id}", _word(upstream), "PX", int(seconds * 1000)))

    def owner(self, message_id: str) -> str | None:
        (found,) = self._run(("GET", f"{_PREFIX}owner:{message_id}"))
        return None if found is None else _text(found)

    def hold_places(
        self, client: str, worker: str, count: int, seconds: float, limit: int | None = None
    ) -> bool:
        key = _word(f"{_PREFIX}places:{client}")
        with self._errors(), self._client.pipeline() as pipe:
            while True:
                pipe.watch(key)  # type: ignore[no-untyped-call] # another's change makes `execute` fail
                now, fields = self.now(), _pairs(pipe.hgetall(key))
                found = {_text(name): _text(value).split() for name, value in fields}
                ended = [name for name, (_, ends) in found.items() if float(ends) < now]
                others = found.keys() - {worker, *ended}
                if limit is not None and sum(int(found[name][0]) for name in others) + count > limit:
                    return False
                pipe.multi()
                pipe.hset(key, worker, f"{count} {now + seconds}")
                if ended:
                    pipe.hdel(key, *ended)
                pipe.expire(key, _FORGOTTEN)
                with contextlib.suppress(redis.WatchError):
                    pipe.execute()
                    return True

    def write_row(self, worker: str, row: bytes) -> None:
        self._run(("HSET", _ROWS, worker, row))

    def rows(self) -> dict[str, bytes]:
        (found,) = self._run(("HGETALL", _ROWS))
        return {_text(worker): row for worker, row in _pairs(found)}

    def replace_rows(self, workers: Sequence[str], worker: str = "", row: bytes = b"") -> None:
        self._run(("HDEL", _ROWS, *workers), *([("HSET", _ROWS, worker, row)] if worker else []))

    # --- The server ---

    def _change(self, *commands: tuple[Any, ...]) -> list[Any]:
        """As `_run`, and notify the other workers, which otherwise read the change within a second."""
        replies = self._run(*commands)
        with self._errors(), contextlib.suppress(redis.exceptions.NoPermissionError):
            self._client.publish(self._channel, self._name)
        return replies

    def _run(self, *commands: tuple[Any, ...]) -> list[Any]:
        """All commands in one transaction; the replies as the server sends them."""
        with self._errors():
            pipe = self._client.pipeline(transaction=len(commands) > 1)
            for command in commands:
                pipe.execute_command(*command)  # type: ignore[no-untyped-call]
            return list(pipe.execute())

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError) as error:
            raise StoreError(self._reason(error)) from error

    def _reason(self, error: Exception) -> str:
        """In the server's words, without its password."""
        reason = " ".join(str(error).split())[:200]
        password = re.escape(self._settings.password or "")
        return re.sub(rf"(?<!\w){password}(?!\w)", "...", reason) if password else reason

    # --- The thread that listens ---

    def _listen(self, on_change: Callable[[], None], stopped: threading.Event) -> None:
        """A connection that breaks once is replaced; one that is refused again is a problem."""
        with contextlib.closing(_client(self._settings.url)) as client:
            while not stopped.is_set():
                began = time.monotonic()
                try:
                    options = {"ignore_subscribe_messages": True}
                    with client.pubsub(**options) as subscription:  # type: ignore[no-untyped-call]
                        subscription.subscribe(self._channel)
                        self._listen_to(subscription, on_change, stopped)
                except (redis.RedisError, OSError) as error:
                    is_refused = time.monotonic() < began + _LISTEN and not stopped.is_set()
                    self._deaf = self._reason(error) if is_refused else None
                    stopped.wait(1.0)

    def _listen_to(self, subscription: Any, on_change: Callable[[], None], stopped: threading.Event) -> None:
        """Until the connection breaks, or nothing answers on it."""
        received = asked = time.monotonic()
        while not stopped.is_set():
            message = subscription.get_message(timeout=_LISTEN)
            now = time.monotonic()
            self._deaf = None
            if message is not None:
                received = now
                if message["type"] == "message" and message["data"] != self._name:
                    on_change()
            elif now > received + 2 * _PING:
                return
            elif now > max(received, asked) + _PING:
                asked = now
                subscription.ping()


def _client(url: str) -> "redis.Redis":
    """One attempt at each command, and no more patience than `SILENCE`."""
    keepalive = {} if url.lower().startswith("unix:") else {"socket_keepalive": True}
    return redis.Redis.from_url(
        url,
        socket_timeout=SILENCE,
        socket_connect_timeout=SILENCE,
        health_check_interval=0,  # of a subscription it would not notice that nobody answers
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        **keepalive,
    )


def _record(fields: Any, trial: Any, backoffs: Any) -> Record:
    """What the server holds of one upstream."""
    found: dict[str, Any] = {_text(name): _text(value) for name, value in _pairs(fields)}
    found["trial"] = _text(trial or b"")
    found["backoffs"] = {_text(model): float(ends) for model, ends in _pairs(backoffs)}
    try:
        return msgspec.convert(found, Record, strict=False)
    except msgspec.ValidationError as error:
        raise StoreError(f"the records are of another kind: {error}") from error


def _pairs(reply: Any) -> list[tuple[Any, Any]]:
    """A reply that redis-py has made a mapping or a list of pairs of, or a flat list."""
    if isinstance(reply, dict):
        return list(reply.items())
    if reply and not isinstance(reply[0], bytes):
        return list(reply)
    return list(zip(reply[::2], reply[1::2], strict=True))


def _text(reply: bytes) -> str:
    return reply.decode(errors="replace")


def _word(text: str) -> bytes:
    return text.encode(errors="backslashreplace")


def _fields(id_: str) -> bytes:
    return _word(f"{_PREFIX}circuit:{id_}")


def _backoffs(id_: str) -> bytes:
    return _word(f"{_PREFIX}backoffs:{id_}")


def _trial(id_: str) -> bytes:
    return _word(f"{_PREFIX}trial:{id_}")
