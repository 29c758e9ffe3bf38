"""An upstream's token that a command prints, for clouds whose tokens live an hour.

One thread for each such upstream runs the command: at the start, before the token ends, and after a 401.
No request waits for it as long as another upstream can answer.
"""

import logging
import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from ..observability import logs
from ..observability.redaction import Redactor

#: Seconds that the command may take, and after which it is tried again when it failed.
TIMEOUT, AGAIN = 30.0, 10.0
#: The part of its lifetime after which a token is replaced.
_PART = 0.9
_TOKEN = re.compile(r"[!-~]+")
_LONGEST_REASON = 200


class TokenCommand:
    """Thread-safe."""

    def __init__(
        self, upstream: str, command: Sequence[str], lifetime: float, learn: Callable[[str], None]
    ) -> None:
        """`lifetime`: seconds that a token lives; `learn`: makes a token known to the log's redactor."""
        self.command = tuple(command)
        self.lifetime = lifetime
        self._upstream = upstream
        self._learn = learn
        self._changed = threading.Condition()
        self._token: str | None = None
        self._is_due = True
        self._was_refused = False  # the present token; another one is being fetched
        self._is_second = False  # the present token was fetched because of a 401
        self._is_stopped = False
        self._thread: threading.Thread | None = None

    @property
    def current(self) -> str | None:
        """The token, None while the first one is being fetched."""
        if self._thread is None:
            with self._changed:
                if self._thread is None and not self._is_stopped:
                    name = f"token of {self._upstream}"
                    self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                    self._thread.start()
        return self._token

    def refused(self, token: str) -> bool:
        """The upstream answered 401 to this token. Whether that is no fault of the upstream's account.

        A new token is fetched, unless this one was fetched because of a 401 itself.
        """
        with self._changed:
            if token == self._token:
                if self._is_second:
                    return False
                self._was_refused = self._is_due = True
                self._changed.notify_all()
            return True

    def await_new(self, old: str | None, pause: Callable[[float], None]) -> bool:
        """Wait for another token than `old`, at most as long as the command may take; whether it came.

        `pause` waits for so many seconds, and raises where the request is over.
        """
        ends = time.monotonic() + TIMEOUT
        while self.current in (old, None):
            if time.monotonic() > ends:
                return False
            pause(0.05)
        return True

    def stop(self) -> None:
        """No more tokens are needed."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            token = self._fetched()
            with self._changed:
                if self._is_stopped:
                    return
                self._is_due = False
                if token is not None:
                    self._is_second, self._was_refused = self._was_refused, False
                    self._token = token
                wait = AGAIN if token is None else self.lifetime * _PART
                self._changed.wait_for(lambda: self._is_due or self._is_stopped, wait)

    def _fetched(self) -> str | None:
        """What the command prints; None after a failure, which is logged."""
        try:
            done = subprocess.run(
                self.command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = getattr(error, "strerror", None) or f"no end within {TIMEOUT:.0f} s"
        else:
            token = done.stdout.decode(errors="replace").strip()
            if done.returncode == 0 and _TOKEN.fullmatch(token):
                self._learn(token)
                logs.line(logging.INFO, "token", upstream=self._upstream, result="fetched")
                return token
            said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            reason = f"exit code {done.returncode}: {said}" if done.returncode else "it printed no token"
        shown = Redactor(()).text(reason, _LONGEST_REASON)
        logs.line(logging.WARNING, "token", upstream=self._upstream, result="failed", reason=shown)
        return None
