"""Posts short texts to a webhook of Slack, Mattermost or Teams: one thread, few retries, never in the way."""

import logging
import queue
import threading
import time

import requests

from . import logs

#: Texts that wait, at most; further ones are dropped.
_WAITING = 50
#: Seconds between the tries, and for the connection and the answer of each.
PAUSES = (1.0, 5.0, 25.0)
_TIMEOUT = (5.0, 10.0)


class Webhook:
    """Thread-safe."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[str, str]] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None

    def send(self, url: str, text: str) -> None:
        """Have the text posted; returns at once."""
        try:
            self._queue.put_nowait((url, text))
        except queue.Full:
            logs.line(logging.WARNING, "webhook", result="dropped", text=text)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        with requests.Session() as session:
            session.trust_env = False
            while True:
                self._post(session, *self._queue.get())

    def _post(self, session: requests.Session, url: str, text: str) -> None:
        """No line of the log holds the URL: who knows it may post there."""
        problem = ""
        for pause in (0.0, *PAUSES):
            time.sleep(pause)
            try:
                answer = session.post(url, json={"text": text}, timeout=_TIMEOUT, allow_redirects=False)
            except requests.RequestException as error:
                problem = type(error).__name__
                continue
            if answer.status_code < 300:
                logs.line(logging.INFO, "webhook", result="posted", text=text)
                return
            problem = f"status {answer.status_code}"
        logs.line(logging.WARNING, "webhook", result="failed", reason=problem, text=text)
