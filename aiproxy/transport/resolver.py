"""Host names to addresses, in bounded time.

`getaddrinfo` cannot be interrupted and waits as long as resolv.conf says. So each lookup has a thread
of its own, which callers that want the same name share, and leave behind when their time is up.
"""

import ipaddress
import socket
import threading
from concurrent.futures import Future
from typing import Any

#: As `socket.getaddrinfo` gives them: family, kind, protocol, canonical name, address.
Address = tuple[int, int, int, str, Any]


class Resolver:
    """Thread-safe. At most one thread a name, however many callers wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[tuple[str, int], Future[list[Address]]] = {}

    def resolve(self, host: str, port: int, seconds: float) -> list[Address]:
        """The addresses of `host`, in the system's order of preference.

        Raises `socket.gaierror`, and `TimeoutError` after `seconds`.
        """
        if _is_address(host):
            return _look_up(host, port)
        return self._lookup(host, port).result(max(0.0, seconds))

    def _lookup(self, host: str, port: int) -> "Future[list[Address]]":
        with self._lock:
            running = self._running.get((host, port))
            if running is None:
                running = Future()
                arguments = (host, port, running)
                threading.Thread(target=self._run, args=arguments, name="resolve", daemon=True).start()
                self._running[host, port] = running
            return running

    def _run(self, host: str, port: int, future: "Future[list[Address]]") -> None:
        try:
            future.set_result(_look_up(host, port))
        except Exception as error:  # whatever it is, callers wait for it
            future.set_exception(error)
        finally:
            with self._lock:
                del self._running[host, port]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _look_up(host: str, port: int) -> list[Address]:
    try:
        return list(socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM))
    except ValueError:  # a label that IDNA refuses, a null character
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from None
