"""A real Redis server that can be paused, killed and started again, with nothing left of what it knew."""

import contextlib
import signal
import subprocess

import redis
from fakes import HOST, await_that, free_port


class RedisServer:
    """Listens on a port of its own; `options` are further ones of redis-server's command line."""

    def __init__(self, folder, *options):
        self.port = free_port()
        self.url = f"redis://{HOST}:{self.port}/0"
        self._command = ["redis-server", "--bind", HOST, "--port", str(self.port), "--save", ""]
        self._command += ["--dir", str(folder), *options]
        self._client = redis.Redis(HOST, self.port, decode_responses=True, protocol=2)
        self._process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.kill()
        self._client.close()

    def start(self):
        """Empty, and waited for."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

        def answers():
            assert self._process is not None
            assert self._process.poll() is None, "the server ended"
            with contextlib.suppress(redis.ConnectionError):
                return bool(self._client.ping())
            return False

        await_that(answers)

    def kill(self):
        """At once; a paused one too."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self):
        """From now on it answers nobody, and its connections stay."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self):
        """It answers again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def do(self, *command):
        """What the server replies."""
        return self._client.execute_command(*command)
