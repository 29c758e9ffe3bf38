"""Bounds on the time that something takes: wide, since the machine may be busy."""

import contextlib
import time

#: Seconds for a limit that must not be the one that ends a wait.
FAR = 60.0


@contextlib.contextmanager
def soon():
    """What is done here must not take until `FAR`."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < FAR / 2
