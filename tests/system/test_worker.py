"""gunicorn's worker as aiproxy has it: on one core, and each on its own."""

import contextlib
import os
import socket
import time

import pytest
from conftest import serving
from fakes import HOST, RawClient, await_that


@pytest.mark.parametrize("workers", [1, 2])
def test_each_worker_keeps_to_a_core_of_its_own(upstream, serve, config_of, workers):
    served = serve(config_of([upstream()], workers=workers))

    def cores():
        return [os.sched_getaffinity(pid) for pid in served.workers()]

    await_that(lambda: [len(each) for each in cores()] == [1] * workers)
    assert len(set.union(*cores())) == min(workers, len(os.sched_getaffinity(0)))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("demo"), {"upstreams": [{"base_url": "demo://answers"}]}) as served:
        yield served


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST / HTTP/1.1\r\nhost: a\r\nx-api-key sk-test-secret-0001\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: a\r\nAuthorization= Bearer sk-test-secret-0001\r\n\r\n", 400),
        (b"sk-test-secret-0001\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: sk-test-secret-0001\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nx: " + b"sk-test-secret-0001" * 4000 + b"\r\n\r\n", 431),
        (b"POST /" + b"sk-test-secret-0001" * 500 + b" HTTP/1.1\r\n\r\n", 414),
    ],
)
def test_what_gunicorn_cannot_read_is_refused_in_the_api_s_shape_and_repeated_nowhere(
    shared, request_, status
):
    with RawClient.to(shared.url) as client:
        client.send(request_)
        got = client.read()
    assert got.status == status
    assert got.header("x-should-retry") == ("false" if status < 500 else None)
    error = got.json()
    assert error["error"]["type"] == "invalid_request_error"
    assert error["request_id"] == got.header("request-id")
    shared.wait_for_log(f"refused id={error['request_id']} status={status} ")
    assert "secret" not in got.body.decode() + "".join(shared.stdout_lines()) + shared.stderr


def test_requests_that_cannot_be_read_do_not_hold_up_the_accepting_of_others(shared):
    """gunicorn's main thread would wait two seconds for each of these clients to close its connection."""
    with contextlib.ExitStack() as stack:
        odd = [stack.enter_context(socket.create_connection((HOST, shared.port))) for _ in range(5)]
        for sock in odd:
            sock.sendall(b"GET / HTTP/1.1\r\nbad header\r\n\r\n")
        for sock in odd:
            assert sock.recv(12) == b"HTTP/1.1 400"
        began = time.monotonic()
        with RawClient.to(shared.url) as client:
            client.request("GET", "/")
            assert client.read().status == 200
        assert time.monotonic() - began < 2
