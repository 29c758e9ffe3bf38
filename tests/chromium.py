"""A headless Chromium, driven by its DevTools protocol through two pipes: no driver and no port."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections import deque

LIMIT = 15.0  # seconds for anything it is asked for
_FLAGS = "--headless=new --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe --hide-scrollbars"


class Chromium:
    """One browser with one page. `log` has all events since the page was opened."""

    def __init__(self, directory):
        self.log = []
        self._events = deque()  # those that nobody has waited for yet
        to_it, self._out = os.pipe()
        self._in, from_it = os.pipe()
        # The protocol's own descriptors are 3 and 4; the shell puts them there.
        command = f'exec chromium {_FLAGS} --user-data-dir="$0" about:blank 3<&{to_it} 4>&{from_it}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, str(directory)],
            pass_fds=[to_it, from_it],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_it)
        os.close(from_it)
        self._answers = {}
        self._buffer = b""
        self._number = 0
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self.call("Browser.close")
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method, **parameters):
        """Do what the protocol calls `method`, and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while self._number not in self._answers:
            self._read()
        answer = self._answers.pop(self._number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def wait_for(self, method):
        """The next event of that name; those before it are dropped."""
        limit = time.monotonic() + LIMIT
        while True:
            while self._events:
                event = self._events.popleft()
                if event["method"] == method:
                    return event["params"]
            assert time.monotonic() < limit, f"no {method}"
            self._read()

    def open(self, url):
        """Go there, and wait until the page is loaded."""
        self.log.clear()
        self._events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")

    def logged(self, method):
        """The events of that name since the page was opened."""
        return [event["params"] for event in self.log if event["method"] == method]

    def wait_until_loaded_again(self):
        """Wait until a button or the page itself has brought the next one."""
        self._events.clear()
        self.wait_for("Page.loadEventFired")

    def look(self, expression):
        """What a JavaScript expression gives on the page; works where the page itself runs none."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def click(self, selector):
        """Click on the middle of the first element that the selector finds, as a person would.

        What that brings about can then be waited for.
        """
        self._events.clear()
        place = self.look(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView();"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )

    def _read(self):
        data = os.read(self._in, 1 << 20)
        assert data, "Chromium ended"
        *messages, self._buffer = (self._buffer + data).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self.log.append(message)
                self._events.append(message)
