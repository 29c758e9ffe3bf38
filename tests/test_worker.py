"""gunicorn's worker as aiproxy has it: on one core, and each on its own."""

import os
import threading
import time

import pytest


@pytest.mark.parametrize("workers", [1, 2])
def test_each_worker_keeps_to_a_core_of_its_own(upstream, serve, config_of, workers):
    served = serve(config_of([upstream()], workers=workers))
    cores = []
    limit = time.monotonic() + 5
    while len(cores) < workers or any(len(each) != 1 for each in cores):
        assert time.monotonic() < limit, cores
        threading.Event().wait(0.05)
        cores = [os.sched_getaffinity(pid) for pid in served.workers()]
    assert len(set.union(*cores)) == min(workers, len(os.sched_getaffinity(0)))
