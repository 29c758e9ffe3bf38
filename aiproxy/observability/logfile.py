"""A log file that several processes append to: whole lines, whatever rotates it.

Each line is one `write` with O_APPEND, which the kernel does not mix with another process's. Whoever
owns a `LogFile` sees to it that one thread at a time uses it.
"""

import os

# A pipe without a reader must not hold up a request; files are not concerned.
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
_MODE = 0o640


class LogFile:
    """Opened with its first line; opened anew when the file was renamed or removed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._identity = (0, 0)  # device and inode of what is open
        self._torn = False  # the disk was full in the middle of a line

    def write(self, line: str) -> None:
        """Append a line with its end.

        Raises `OSError` where that fails, and where the file was renamed and there can be no new one:
        the line then stands in the renamed one.
        """
        failed: OSError | None = None
        try:
            self._follow()
        except OSError as error:
            failed = error
        if self._descriptor is not None:
            self._append(self._descriptor, line.encode(errors="backslashreplace"))
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Give the descriptor back; idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _follow(self) -> None:
        if self._descriptor is not None and _identity_of(self._path) == self._identity:
            return
        try:
            opened = os.open(self._path, _FLAGS, _MODE)
        except OSError:
            if self._descriptor is not None and os.fstat(self._descriptor).st_nlink == 0:
                self.close()  # what is written to a removed file is lost and fills the disk
            raise
        self.close()
        status = os.fstat(opened)
        self._descriptor, self._identity, self._torn = opened, (status.st_dev, status.st_ino), False

    def _append(self, descriptor: int, line: bytes) -> None:
        if self._torn and os.fstat(descriptor).st_size > 0:  # it may have been emptied since
            line = b"\n" + line
        written = 0
        try:
            while written < len(line):
                written += os.write(descriptor, line[written:])
        finally:
            if written:
                self._torn = written < len(line)


def _identity_of(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
