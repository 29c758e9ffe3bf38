"""Ways in and out: forward proxies, CAs of an upstream's own, unix sockets; and an environment not heeded.

First the transport alone, with a fake in the place of the forward proxy. Then the whole proxy behind one
gunicorn on a unix socket, and a real forward proxy: tinyproxy.
"""

import base64
import contextlib
import os
import socket
import ssl
import subprocess
import threading
import time

import pytest
import trustme
from clients import ask, begin, failure
from conftest import needs, serving
from fakes import (
    ASK,
    HOST,
    LOOPBACK_CERT,
    SPOKEN,
    STREAM,
    FakeUpstream,
    RawClient,
    await_that,
    blackhole,
    close_now,
    dead_port,
    error,
    events,
    free_port,
    loopback_tls,
    message_json,
    raw,
    whole,
)

from aiproxy.app import create_app
from aiproxy.config import Config, UpstreamSettings
from aiproxy.policy import Fault

MESSAGE = message_json()


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory):
    """A file with some other CA."""
    path = tmp_path_factory.mktemp("other") / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    return str(path)


def tunnel_to(port):
    """A reply to CONNECT: open a tunnel to that port, until either side closes its end."""

    def reply(wire, seen):
        client = wire.connection
        with socket.create_connection((HOST, port)) as upstream:
            wire.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_copy, args=(lambda: upstream.recv(65536), client.sock))
            back.start()
            _copy(client.recv, upstream)
            back.join()

    return reply


def _copy(recv, to):
    with contextlib.suppress(OSError):
        while data := recv():
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)


# ---------------------------------------------------------------- a forward proxy, as the transport sees it


def test_a_plain_request_goes_to_the_forward_proxy_in_absolute_form_its_name_not_looked_up(
    transport, upstream
):
    egress = upstream()
    path = "/prefix/v1/messages?beta=true&x=a%20b+c%2F&z=%C3%A9"
    assert ask(transport, "http://api.invalid:8000", proxy=egress.url, path=path) == MESSAGE
    (seen,) = egress.seen
    assert (seen.method, seen.target) == ("POST", f"http://api.invalid:8000{path}")
    assert sorted((name.lower(), value) for name, value in seen.headers) == [
        ("accept-encoding", "identity"),
        ("content-length", "2"),
        ("host", "api.invalid:8000"),
        ("x-api-key", "sk-test-a"),
    ]


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("user:hunter2", "user:hunter2"),
        ("us%40er:p%3Aw%2F%23%25%20!", "us@er:p:w/#% !"),
        ("user", "user:"),
    ],
)
def test_the_forward_proxy_gets_the_password_that_is_meant(transport, upstream, bundle, written, sent):
    egress = upstream(whole(200, MESSAGE), error(403))
    proxy = egress.url.replace("//", f"//{written}@")
    ask(transport, "http://api.example.com", proxy=proxy)
    failure(transport, "https://api.example.com", proxy=proxy)
    expected = "Basic " + base64.b64encode(sent.encode()).decode()
    assert [seen.every("proxy-authorization") for seen in egress.seen] == [[expected]] * 2


def test_a_kept_connection_or_tunnel_that_is_dead_is_stale_and_a_new_one_is_made(transport, upstream, bundle):
    a = upstream(whole(200, MESSAGE), close_now(), tls=loopback_tls())
    tunnel = upstream(default=tunnel_to(a.port))
    plain = upstream(whole(200, MESSAGE), close_now())
    for url, egress in ((a.url, tunnel), ("http://a", plain)):
        ask(transport, url, proxy=egress.url, ca_bundle=bundle)
        failed = failure(transport, url, proxy=egress.url, ca_bundle=bundle)
        assert (failed.fault, failed.is_stale) == (Fault.BROKEN, True)
        assert ask(transport, url, proxy=egress.url, ca_bundle=bundle) == MESSAGE
        assert egress.connections == 2


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_the_connect_timeout_bounds_the_tunnel_and_what_follows_in_it(impatient, upstream, says):
    egress = upstream(raw(says, then="hang"))
    began = time.monotonic()
    failed = failure(impatient, f"https://{HOST}:1", proxy=egress.url)
    assert 0.14 <= time.monotonic() - began < 5
    by_proxy = "" if says.endswith(b"\r\n\r\n") else "the forward proxy failed: "
    assert (failed.fault, failed.detail) == (Fault.CONNECT, f"{by_proxy}no connection in time")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("407 Proxy Authentication Required", "407 Proxy Authentication Required"),
        ("407 Basic dXNlcjpodW50ZXIy", "407 Proxy Authentication Required"),
        ("403 Filtered", "403 Filtered"),
        ("503 10.0.0.1 is down", "503 Service Unavailable"),
        ("500 \x1b[2J", "500 Internal Server Error"),
        ("403 " + "no " * 99, "403 Forbidden"),
        ("204 No Content", "204 No Content"),
    ],
)
def test_a_refused_tunnel_is_told_plainly_and_without_an_address(transport, upstream, said, told):
    egress = upstream(raw(f"HTTP/1.1 {said}\r\ncontent-length: 0\r\n\r\n".encode("latin-1")))
    failed = failure(transport, "https://api.example.com", proxy=egress.url)
    assert (failed.fault, failed.detail) == (Fault.CONNECT, f"the forward proxy refused: {told}")


def wants(challenge):
    return whole(401, b"{}", headers=[("www-authenticate", challenge)])


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (whole(407, b"{}"), "407 Proxy Authentication Required"),
        (wants("Basic realm=x"), "401 Unauthorized"),
        (wants("basic"), "401 Unauthorized"),
        (wants("Bearer"), None),
        (error(401), None),
        (error(403), None),
    ],
    ids="407 Basic basic Bearer 401 403".split(),
)
def test_an_answer_to_a_plain_request_that_wants_a_password_is_the_forward_proxy_s_refusal(
    transport, upstream, reply, told
):
    url = upstream(default=reply).url
    direct = begin(transport, url)  # without a forward proxy it is an upstream's answer
    assert direct.status in (401, 403, 407)
    direct.close()
    if told is None:
        assert ask(transport, "http://api.example.com", proxy=url)
    else:
        failed = failure(transport, "http://api.example.com", proxy=url)
        assert (failed.fault, failed.detail) == (Fault.CONNECT, f"the forward proxy refused: {told}")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_forward_proxy_that_is_not_there_or_talks_nonsense_is_named_as_the_culprit(
    transport, impatient, upstream, scheme
):
    url = f"{scheme}://api.example.com"
    proxies = {
        "connection refused": f"http://{HOST}:{dead_port()}",
        "the host name was not found": "http://nowhere.invalid:3128",
    }
    if scheme == "https":
        proxies["closed without an answer"] = upstream(close_now()).url
        proxies["no valid HTTP ("] = upstream(raw(b"SSH-2.0-OpenSSH\r\n")).url
    failed = {detail: failure(transport, url, proxy=proxy) for detail, proxy in proxies.items()}
    with blackhole() as hole:
        failed["no connection in time"] = failure(impatient, url, proxy=f"http://{HOST}:{hole}")
    for detail, one in failed.items():
        assert one.fault is Fault.CONNECT
        assert one.detail.startswith(f"the forward proxy failed: {detail}")


# ------------------------------------------------------------------------------------ certificates, likewise


def test_a_ca_bundle_makes_its_upstream_s_certificate_good_and_nobody_else_s(
    transport, upstream, bundle, other_bundle
):
    a = upstream(tls=loopback_tls())
    assert ask(transport, a.url, ca_bundle=bundle) == MESSAGE  # the connection is kept
    for ca_bundle in (None, other_bundle):
        failed = failure(transport, a.url, ca_bundle=ca_bundle)
        assert failed.fault is Fault.CONNECT
        assert failed.detail == "the certificate does not verify: unable to get local issuer certificate"
    assert ask(transport, a.url, ca_bundle=bundle) == MESSAGE
    assert len(a.seen) == 2


@pytest.mark.parametrize(
    ("name", "url"), [("other.example.com", "https://localhost"), ("10.1.2.3", "https://127.0.0.1")]
)
def test_a_certificate_for_another_host_is_told_without_a_name(transport, upstream, tmp_path, name, url):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    a = upstream(tls=context)
    failed = failure(transport, f"{url}:{a.port}", ca_bundle=str(tmp_path / "ca.pem"))
    assert (failed.fault, failed.detail) == (
        Fault.CONNECT,
        "the certificate does not verify: it is for another host",
    )


def test_a_ca_bundle_is_read_once_until_a_new_configuration_is_in_force(transport, upstream, tmp_path):
    a = upstream(default=whole(200, MESSAGE, headers=[("connection", "close")]), tls=loopback_tls())
    path = tmp_path / "ca.pem"
    path.write_text(LOOPBACK_CERT)
    assert ask(transport, a.url, ca_bundle=str(path)) == MESSAGE
    path.unlink()
    assert ask(transport, a.url, ca_bundle=str(path)) == MESSAGE
    transport.keep_only([(a.url, None, str(path))])
    failed = failure(transport, a.url, ca_bundle=str(path))
    assert (failed.fault, failed.detail) == (Fault.CONNECT, "no such file or directory")
    path.write_text(LOOPBACK_CERT)
    assert ask(transport, a.url, ca_bundle=str(path)) == MESSAGE


# ---------------------------------------------------------------------------- the log, and what clients see


@pytest.mark.parametrize("echoed", ["p%40ss-of-egress", "p@ss-of-egress", "dXNlcjpwQHNzLW9mLWVncmVzcw=="])
def test_a_forward_proxy_that_echoes_its_password_leaks_it_to_no_log_and_no_client(upstream, capsys, echoed):
    egress = upstream(default=error(400, message=f"who is {echoed}?"))
    proxy = egress.url.replace("//", "//user:p%40ss-of-egress@")
    listed = UpstreamSettings(name="a", base_url="http://api", token="sk-test-a", proxy=proxy)
    reply = create_app(Config(upstreams=(listed,))).test_client().post("/v1/messages", json=ASK)
    assert reply.status_code == 400
    said = capsys.readouterr().out
    assert "who is" in said
    assert "who is" in reply.text
    assert echoed not in said
    assert echoed not in reply.text


# ------------------------------------------------ gunicorn on a unix socket, tinyproxy, a hostile environment

USER, PASSWORD = "gateway", "hunter2-of.egress"
TINYPROXY = """
Port {port}
Listen {host}
Timeout 600
LogFile "{folder}/log"
BasicAuth {user} {password}
"""


def is_open(port):
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == 0


@pytest.fixture(scope="module")
def tinyproxy(tmp_path_factory):
    """Its port, and the file of its log."""
    port, folder = free_port(), tmp_path_factory.mktemp("tinyproxy")
    config = folder / "tinyproxy.conf"
    config.write_text(TINYPROXY.format(port=port, host=HOST, folder=folder, user=USER, password=PASSWORD))
    with subprocess.Popen(["tinyproxy", "-d", "-c", str(config)], stdout=subprocess.DEVNULL) as process:
        try:
            await_that(lambda: is_open(port))
            yield port, folder / "log"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def fakes():
    """The upstreams: a plain one, one under TLS, and a spare one that answers where another fails."""
    with FakeUpstream() as plain, FakeUpstream(tls=loopback_tls()) as secure, FakeUpstream() as spare:
        yield {"plain": plain, "tunnel": secure, "direct": secure, "spare": spare}


@pytest.fixture(scope="module")
def served(tmp_path_factory, tinyproxy, fakes):
    """One gunicorn on a unix socket, whose upstreams are each asked by a model of their own."""
    home = tmp_path_factory.mktemp("home")
    (home / "ca.pem").write_text(LOOPBACK_CERT)
    trustme.CA().cert_pem.write_to_path(str(home / "other.pem"))
    plain, secure = fakes["plain"].url, fakes["tunnel"].url
    # Percent-encoded where it need not be, so that it is seen to be decoded.
    good = f"http://{USER}:%68unter2-of.egress@{HOST}:{tinyproxy[0]}"
    wrong = f"http://{USER}:hunter2-of-yesterday@{HOST}:{tinyproxy[0]}"
    ways = {
        "plain": {"base_url": plain, "proxy": good},
        "tunnel": {"base_url": secure, "proxy": good, "ca_bundle": "ca.pem"},
        "tunnel-untrusted": {"base_url": secure, "proxy": good},
        "tunnel-nowhere": {"base_url": f"https://{HOST}:{dead_port()}", "proxy": good},
        "plain-wrong": {"base_url": plain, "proxy": wrong},
        "tunnel-wrong": {"base_url": secure, "proxy": wrong, "ca_bundle": "ca.pem"},
        "direct": {"base_url": secure, "ca_bundle": "ca.pem"},
        "direct-untrusted": {"base_url": secure},
        "direct-mistrusted": {"base_url": secure, "ca_bundle": "other.pem"},
    }
    upstreams = [
        {"name": name, "token": f"sk-test-{name}", "weight": 9999, "available_models": [name], **way}
        for name, way in ways.items()
    ]
    upstreams.append({"name": "spare", "token": "sk-test-spare", "base_url": fakes["spare"].url})
    config = {
        "listen": f"unix:{home}/aiproxy.sock",
        "bind": "0.0.0.0",  # counts for nothing
        "breaker": {"failures": 99},
        "affinity": "none",
        "upstreams": upstreams,
    }
    nowhere = f"http://{HOST}:{dead_port()}"
    env = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"), nowhere)
    # These would make the fakes' certificates good where the configuration does not.
    env |= dict.fromkeys(("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"), str(home / "ca.pem"))
    with serving(home, config, env=env, wait=False) as one:
        one.socket = f"{home}/aiproxy.sock"
        one.wait_for_log(r"^aiproxy serves unix:")
        yield one


def client_of(served):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(served.socket)
    return RawClient.on(sock)


def asked(served, model, **body):
    """The answer for that model, and the line of the first attempt at it."""
    since = len(served.stdout_lines())
    with client_of(served) as client:
        client.post({**ASK, "model": model, **body})
        got = client.read()
    line = served.wait_for_log(r" attempt .* number=1 .*", since=since)[0]
    served.wait_for_log(r" done ", since=since)
    return got, line


@needs("tinyproxy")
@pytest.mark.parametrize("model", ["plain", "tunnel", "direct"])
def test_an_upstream_is_reached_through_a_real_forward_proxy_or_by_a_ca_of_its_own(
    served, fakes, tinyproxy, model
):
    fake = fakes[model]
    before = len(fake.seen)
    got, _ = asked(served, model)
    assert (got.status, got.header("x-aiproxy-upstream")) == (200, model)
    (seen,) = fake.seen[before:]
    assert (seen.target, seen.header("x-api-key")) == ("/v1/messages", f"sk-test-{model}")
    assert (seen.header("via") is not None) == (model == "plain")  # it did come through
    assert seen.header("proxy-authorization") is None
    log = tinyproxy[1].read_text()
    assert model != "tunnel" or f"CONNECT {HOST}:{fake.port}" in log
    assert "sk-test-tunnel" not in log


@needs("tinyproxy")
@pytest.mark.parametrize("model", ["plain", "tunnel"])
def test_a_stream_comes_live_through_a_real_forward_proxy(served, fakes, model):
    gate = threading.Event()
    fakes[model].script(events([*SPOKEN[:4], gate, *SPOKEN[4:]]))
    with client_of(served) as client:
        client.post({**STREAM, "model": model})
        pieces = (answer := client.answer()).pieces()
        while b"one" not in answer.body:
            next(pieces)
        assert b"two" not in answer.body
        gate.set()
        answer.read()
    assert (answer.body, answer.ending) == (b"".join(SPOKEN), "end")


UNTRUSTED = 'detail="the certificate does not verify: unable to get local issuer certificate"'


@needs("tinyproxy")
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("plain-wrong", 'detail="the forward proxy refused: 401 Unauthorized"'),
        ("tunnel-wrong", 'detail="the forward proxy refused: 401 Unauthorized"'),
        ("tunnel-nowhere", 'detail="the forward proxy refused: 500 '),
        # Neither another bundle nor anything of the environment makes a certificate good.
        ("direct-untrusted", UNTRUSTED),
        ("direct-mistrusted", UNTRUSTED),
        ("tunnel-untrusted", UNTRUSTED),
    ],
)
def test_a_way_that_does_not_work_has_a_plain_reason_and_another_upstream_answers(
    served, fakes, model, reason
):
    before = [len(fakes[one].seen) for one in ("plain", "tunnel")]
    got, line = asked(served, model)
    assert (got.status, got.header("x-aiproxy-upstream")) == (200, "spare")
    assert f"upstream={model} " in line
    assert f"fault=connect {reason}" in line
    assert "verdict=counted" in line
    assert [len(fakes[one].seen) for one in ("plain", "tunnel")] == before
    sent = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    said = "\n".join(served.stdout_lines()) + served.stderr
    assert [secret for secret in ("%68unter2", "hunter2", sent) if secret in said] == []


@needs("tinyproxy")
@pytest.mark.parametrize("model", ["plain", "tunnel"])
def test_a_client_that_leaves_its_unix_socket_ends_the_request_through_a_forward_proxy(served, fakes, model):
    fake = fakes[model]
    fake.script(events(SPOKEN[:4], then="hang"))  # tinyproxy itself notices it only then
    since = len(served.stdout_lines())
    with client_of(served) as client:
        client.post({**STREAM, "model": model})
        next(client.answer().pieces())
        began = time.monotonic()
    assert fake.wait_left(fake.seen[-1].connection) - began < 1
    served.wait_for_log(r" done .*outcome=client_left ", since=since)


NGINX = """
daemon off; user root; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://unix:{socket}:; proxy_http_version 1.1; proxy_buffering off; }}
  }}
}}
"""


@needs("tinyproxy")
@needs("nginx")
def test_nginx_reaches_the_unix_socket(served, fakes, tmp_path):
    port, config = free_port(), tmp_path / "nginx.conf"
    config.write_text(NGINX.format(folder=tmp_path, port=port, socket=served.socket))
    target = "/v1/messages?beta=true&x=%20"
    with subprocess.Popen(["nginx", "-c", str(config), "-e", str(tmp_path / "error.log")]) as nginx:
        try:
            await_that(lambda: is_open(port))
            with RawClient(HOST, port) as client:
                client.post({**ASK, "model": "plain"}, target)
                assert client.read().status == 200
        finally:
            nginx.terminate()
    assert fakes["plain"].seen[-1].target == target


def test_a_unix_socket_is_given_up_on_sigterm_while_a_stream_runs_on(serve, config_of, upstream, tmp_path):
    gate = threading.Event()
    a = upstream(events([*SPOKEN[:4], gate, *SPOKEN[4:]]))
    served = serve(config_of([a], listen=f"unix:{tmp_path}/aiproxy.sock"), wait=False)
    served.socket = f"{tmp_path}/aiproxy.sock"
    served.wait_for_log(r"^aiproxy serves unix:")
    with client_of(served) as client:
        client.post(STREAM)
        answer = client.answer()
        next(answer.pieces())
        served.ask_to_stop()
        await_that(lambda: not os.path.exists(served.socket), limit=1.0)
        gate.set()
        assert answer.read().ending == "end"
    assert served.wait_exit(5) == 0
    assert "Traceback" not in served.stderr
