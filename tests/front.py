"""deploy/nginx.conf in front of something, as it ships: only addresses and paths are put in place.

`Front` runs nginx on it, `secure` connects to it. The surroundings are as unfriendly as a distribution's
nginx.conf may be: compression on for everything, and timeouts that are nginx's defaults.
"""

import grp
import os
import pwd
import re
import shlex
import socket
import ssl
import subprocess

import trustme
from conftest import ROOT
from fakes import HOST, RawClient, await_that, free_port

SHIPPED = (ROOT / "deploy" / "nginx.conf").read_text()
SEVERAL = (ROOT / "deploy" / "several-machines.conf").read_text()
NAME = "aiproxy.example.com"

_AUTHORITY = trustme.CA()
_CERTIFICATE = _AUTHORITY.issue_cert(NAME)
# nginx's own default wherever it matters here, so that one that deploy/nginx.conf does not set is scaled too.
_DEFAULTS = "proxy_read_timeout proxy_send_timeout proxy_connect_timeout send_timeout client_body_timeout"
_MAIN = """
daemon off; worker_processes 1; pid {folder}/pid; user {user} {group};
events {{ worker_connections 1024; }}
http {{
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  gzip on; gzip_types *; gzip_min_length 0; gzip_proxied any; proxy_buffering on; access_log off;
  {defaults}
  include {folder}/aiproxy;
}}
"""


class Front:
    """A running nginx: its ports, its access log. `instances` are the two ports it passes requests to."""

    def __init__(self, folder, instances, scale=1, several_machines=False):
        """`scale`: every time in the file is divided by that; `several_machines`: as README.md makes it."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.plain_port = free_port()
        self.authority = folder / "authority.pem"
        _AUTHORITY.cert_pem.write_to_path(self.authority)
        _CERTIFICATE.private_key_and_cert_chain_pem.write_to_path(folder / "certificate.pem")
        shipped = for_several_machines() if several_machines else SHIPPED
        (folder / "aiproxy").write_text(_scaled(self._put_in_place(shipped, instances), scale))
        defaults = _scaled(" ".join(f"{name} 60s;" for name in _DEFAULTS.split()), scale)
        group = grp.getgrgid(os.getgid()).gr_name
        main = _MAIN.format(
            folder=folder, defaults=defaults, user=pwd.getpwuid(os.getuid()).pw_name, group=group
        )
        (folder / "nginx.conf").write_text(main)

    def _put_in_place(self, text, instances):
        """The text with this machine's addresses and paths; IPv6 is not everywhere."""
        places = {
            r"listen \[::\]:.*;": "",
            r"listen 443": f"listen {HOST}:{self.port}",
            r"listen 80;": f"listen {HOST}:{self.plain_port};",
            r"(127\.0\.0\.1|10\.0\.0\.11):8081 ": f"{HOST}:{instances[0]} ",
            r"(127\.0\.0\.1:8082|10\.0\.0\.12:8081) ": f"{HOST}:{instances[1]} ",
            r"/etc/letsencrypt/live/.*;": f"{self.folder}/certificate.pem;",
            r"/var/log/nginx": str(self.folder),
        }
        text = re.sub(r".*server 10\.0\.0\.13.*\n", "", text)
        for pattern, place in places.items():
            text, times = re.subn(pattern, place, text)
            assert times, pattern
        return text

    @property
    def url(self):
        """Where it serves."""
        return f"https://{NAME}:{self.port}"

    def log(self, count):
        """The access log, of so many lines: nginx writes one after the client has its answer."""
        path = self.folder / "aiproxy.access.log"
        await_that(lambda: len(path.read_text().splitlines()) >= count)
        return path.read_text().splitlines()

    def __enter__(self):
        errors = self.folder / "error.log"
        self._process = subprocess.Popen(["nginx", "-c", str(self.folder / "nginx.conf"), "-e", str(errors)])

        def accepts():
            assert self._process.poll() is None, errors.read_text()
            with socket.socket() as sock:
                return sock.connect_ex((HOST, self.plain_port)) == 0

        await_that(accepts)
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(10)

    def client(self, timeout=10.0):
        """A client of HTTP/1.1 under TLS that checks the certificate."""
        context = ssl.create_default_context(cafile=str(self.authority))
        sock = socket.create_connection((HOST, self.port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return RawClient.on(context.wrap_socket(sock, server_hostname=NAME))

    def curl(self, *arguments):
        """A curl command that speaks HTTP/2 to it."""
        resolve = ["--resolve", f"{NAME}:{self.port}:{HOST}", "--cacert", str(self.authority)]
        return ["curl", "--silent", "--show-error", "--http2", "--max-time", "10", *resolve, *arguments]


def for_several_machines():
    """nginx.conf after the `sed` of deploy/README.md, and several-machines.conf beside it."""
    readme = (ROOT / "deploy" / "README.md").read_text()
    found = re.search(r"^(sed -e .*) /opt/aiproxy/deploy/nginx.conf >", readme, re.MULTILINE)
    assert found
    edited = subprocess.run(
        shlex.split(found[1]), input=SHIPPED, capture_output=True, text=True, check=True
    ).stdout.replace("YOUR.NAME", NAME)
    assert edited.count("upstream aiproxy") == 0
    return SEVERAL + edited


def _scaled(text, scale):
    """Each time in seconds divided; the lifetime of TLS sessions does not matter."""
    return re.sub(r"(?<!=)\b(\d+)s;", lambda found: f"{int(found[1]) * 1000 // scale}ms;", text)
