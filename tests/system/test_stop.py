"""A worker that stops: new requests are refused at once, those that run get their time and a proper end."""

import contextlib
import os
import signal
import socket
import threading
import time

import pytest
from fakes import ASK, HOST, SPOKEN, STREAM, RawClient, await_that, events, hang


def grace(seconds):
    return {"gunicorn_args": ["--graceful-timeout", str(seconds)]}


def refuses(port):
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) != 0


def test_new_connections_are_refused_within_a_second_while_a_stream_goes_on(upstream, serve, config_of):
    gate = threading.Event()
    served = serve(config_of([upstream(events([*SPOKEN[:5], gate, *SPOKEN[5:]]))]), **grace(30))
    with RawClient.to(served.url) as client:
        client.post(STREAM)
        got = client.answer()
        next(got.pieces())
        served.ask_to_stop()
        await_that(lambda: refuses(served.port), limit=1)
        gate.set()
        assert (got.read().ending, got.body) == ("end", b"".join(SPOKEN))
    assert served.wait_exit() == 0


@pytest.mark.parametrize("body", [STREAM, ASK], ids=["stream", "whole"])
def test_what_still_runs_before_the_end_is_told_and_counts_against_nobody(upstream, serve, config_of, body):
    a = upstream(events(SPOKEN[:5], then="hang") if body is STREAM else hang())
    served = serve(config_of([a], breaker={"failures": 1}), **grace(4))
    with RawClient.to(served.url) as client:
        client.post(body)
        a.wait_for(1)
        served.ask_to_stop()
        began = time.monotonic()
        got = client.read()
        assert 1.9 < time.monotonic() - began < 3.9  # two seconds before the end
    assert b"overloaded_error" in got.body
    assert (got.status, got.ending) == ((200, "cut") if body is STREAM else (529, "end"))
    assert served.wait_exit() == 0
    assert " circuit " not in "\n".join(served.stdout_lines())


def test_who_waits_to_be_accepted_when_it_stops_is_still_answered(upstream, serve, config_of):
    served = serve(config_of([upstream()]), **grace(10))
    with RawClient.to(served.url) as client:  # it is up, and would not miss a signal any more
        client.request("GET", "/")
        assert client.read().status == 200
    (worker,) = served.workers()
    with contextlib.ExitStack() as stack:
        os.kill(worker, signal.SIGSTOP)
        clients = [stack.enter_context(RawClient.to(served.url)) for _ in range(8)]
        for client in clients:
            client.post(ASK)
        served.ask_to_stop()
        served.wait_for_stderr("Handling signal: term")
        os.kill(worker, signal.SIGCONT)
        assert [client.read().status for client in clients] == [200] * 8
    assert served.wait_exit() == 0


def test_an_upload_that_stalls_until_the_end_is_told_of_the_restart(upstream, serve, config_of):
    a = upstream()
    served = serve(config_of([a]), **grace(3))
    with RawClient.to(served.url) as client:
        client.begin_upload("POST /v1/messages HTTP/1.1\r\nhost: x\r\n", 1000)
        served.ask_to_stop()
        got = client.read()
    assert (got.status, got.json()["error"]["type"]) == (529, "overloaded_error")
    assert (served.wait_exit(), len(a.seen)) == (0, 0)


def test_a_connection_that_has_sent_nothing_does_not_hold_up_the_end(upstream, serve, config_of):
    """gunicorn hands such a connection from its thread to the event loop after 5 s."""
    served = serve(config_of([upstream()]), **grace(20))
    with socket.create_connection((HOST, served.port)):
        threading.Event().wait(5.5)
        began = time.monotonic()
        served.ask_to_stop()
        assert served.wait_exit() == 0
    assert time.monotonic() - began < 10
