"""The status page's overview: a row for each upstream says how it does. The documented commands work."""

import re
import shlex
import subprocess
from html.parser import HTMLParser

import pytest
from chromium import Chromium
from conftest import ROOT, needs
from fakes import Clock, RawClient, error
from test_admin import ADMIN, ASK, app_of, basic, facts, press

from aiproxy.server.status import Snapshot, findings, rows

LIMITED = {"headers": [("retry-after", "260")]}


class Page(HTMLParser):
    """The text of each cell of the overview, of each folded and each open article, and of the axes."""

    def __init__(self, text):
        super().__init__()
        self.table, self.open, self.folded, self.axes, self._into = [[]], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "tr":
            self.table.append([])
        elif tag == "td":
            self._begin(self.table[-1])
        elif tag == "details":
            self._begin(self.open if "open" in given else self.folded)
        elif given.get("class") == "axis":
            self._begin(self.axes)

    def handle_data(self, data):
        if self._into is not None:
            self._into[-1] = f"{self._into[-1]} {data.strip()}".strip()

    def handle_endtag(self, tag):
        if tag in ("td", "summary", "div"):
            self._into = self._into if tag == "div" and self._into is self.table[-1] else None

    def _begin(self, into):
        into.append("")
        self._into = into


def page_of(app, query=""):
    page = Page(app.test_client().get(f"/status{query}", headers=basic(ADMIN)).text)
    page.table = [row for row in page.table if row]
    return page


def ask(app, times=1, **question):
    return [app.test_client().post("/v1/messages", json={**ASK, **question}) for _ in range(times)]


def upstreams_of(app):
    return {each.name: each for each in app.extensions["aiproxy"].runtime.balancer.upstreams}


def test_one_row_says_how_an_upstream_does(upstream):
    clock = Clock()
    app = app_of(upstream(*[error(500)] * 3), upstream(), admin_key=ADMIN, clock=clock)
    ask(app, 6)
    clock.now += 1080
    (a, b) = page_of(app).table
    assert a == [
        "a",
        "circuit open, tried again in 12 min",
        "0% , its weight asks for 50%",
        "-",
        "3 (100%)",
        "",
    ]
    assert b[:3] == ["b", "in use", "100% , its weight asks for 50%"]
    assert re.fullmatch(r"0\.\d\d s", b[3])
    assert b[4:] == ["0", ""]
    first, second = facts(app)["upstreams"]
    assert (first["words"], first["is_troubled"], first["error_share"]) == (a[1], True, 1.0)
    assert (second["words"], second["is_troubled"], second["error_share"]) == ("in use", False, 0.0)


def test_each_state_is_said_in_plain_words(upstream):
    clock = Clock()
    app = app_of(
        upstream(*[error(500)] * 3, error(503, headers=[("retry-after", "40")])), admin_key=ADMIN, clock=clock
    )

    def words():
        (row,) = page_of(app).table
        assert facts(app)["upstreams"][0]["words"] == row[1]
        return row[1]

    assert words() == "in use"
    ask(app, 3)
    assert words() == "circuit open, tried again in 30 min"
    press(app, "a", "drain")
    assert words() == "draining, circuit open for 30 min more"
    clock.now += 1800
    assert words() == "draining"
    press(app, "a", "resume")
    assert words() == "on trial"
    press(app, "a", "close")
    ask(app)
    assert words() == "backoff, tried again in 40 s"


def test_troubled_upstreams_come_first_and_are_unfolded_then_it_goes_by_name(upstream):
    app = app_of(*[upstream() for _ in range(30)], admin_key=ADMIN)
    for name in ("z", "c"):
        press(app, name, "drain")
    upstreams_of(app)["k"].models.back_off("claude-x", 60, 0.0, False)
    page = page_of(app)
    names = [row[0] for row in page.table]
    assert names[:3] == ["c", "k", "z"]
    assert names[3:] == sorted(names[3:])
    assert len(names) == 30
    assert [text.split()[0] for text in page.open] == ["c", "k", "z"]
    assert [text.split()[0] for text in page.folded] == names[3:]
    assert [row["name"] for row in facts(app)["upstreams"][:3]] == ["a", "b", "c"]  # as configured


def test_details_that_were_asked_for_come_first_and_stay_unfolded(upstream):
    app = app_of(upstream(), upstream(), upstream(), admin_key=ADMIN)
    press(app, "a", "drain")
    page = page_of(app, "?open=c&open=nobody")
    assert [text.split()[0] for text in page.open] == ["c", "a"]
    assert [text.split()[0] for text in page.folded] == ["b"]


def test_models_in_backoff_and_missing_ones_are_named_with_the_time_left(upstream):
    clock = Clock()
    missing = error(404, message="model: claude-gone")
    app = app_of(upstream(error(429, **LIMITED), *[missing] * 3), admin_key=ADMIN, clock=clock)
    ask(app, model="claude-busy")
    ask(app, 3, model="claude-gone")
    clock.now += 60
    (row,) = page_of(app).table
    assert row[1] == "in use"
    assert row[5] == "claude-busy backoff, 3 min more claude-gone missing, 29 min more"
    (told,) = facts(app)["upstreams"]
    assert told["backoffs"] == {"claude-busy": 200, "claude-gone": 1740}
    assert (told["missing_models"], told["is_troubled"]) == (["claude-gone"], True)
    press(app, "a", "close")
    assert facts(app)["upstreams"][0]["backoffs"] == {}


def test_of_many_models_the_overview_names_three(upstream):
    app = app_of(upstream(), admin_key=ADMIN)
    for n in range(9):
        upstreams_of(app)["a"].models.back_off(f"m{n}\ud800", 60, 0.0, False)
    assert page_of(app).table[0][5].count("backoff") == 3
    assert page_of(app).table[0][5].endswith("and 6 more")
    assert facts(app)["upstreams"][0]["backoffs"].keys() == {f"m{n} " for n in range(9)}


def test_what_another_worker_found_out_is_shown_too(upstream):
    app = app_of(upstream(), upstream(), admin_key=ADMIN)
    found = upstreams_of(app)

    def snapshot():
        known = {name: findings(each) for name, each in found.items()}
        return Snapshot("here:8080", 1, "1.0.0", "", 0.0, 0, hours={}, metrics=[], findings=known)

    for _ in range(3):
        found["a"].models.missing("claude-gone")
    found["b"].refusals.is_suspect = True
    found["b"].refusals.refused()
    other = snapshot()
    press(app, "b", "close")
    found["a"].models.clear()
    found["a"].models.follow({"claude-gone": 1800.0})  # all that the shared state says of it
    a, b = rows(list(found.values()), [snapshot(), other], 0.0)
    assert (a.missing_models, a.words) == (["claude-gone"], "in use")
    assert (b.state, b.words, b.circuit) == ("backoff", "backoff, tried again in 60 s", "closed")


def test_each_failure_shows_the_id_by_which_the_log_has_it(upstream, capsys):
    app = app_of(upstream(error(500), error(529)), admin_key=ADMIN)
    ids = [reply.headers["x-aiproxy-request-id"] for reply in ask(app, 2)]
    (row,) = facts(app)["upstreams"]
    assert [failure["id"] for failure in row["last_failures"]] == ids[::-1]
    log = capsys.readouterr().out
    page = app.test_client().get("/status", headers=basic(ADMIN)).text
    for id_ in ids:
        assert f" attempt id={id_} " in log
        assert id_ in page


def test_charts_say_from_when_to_when_they_go(upstream, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.0)  # 2027-01-15 08:00:00 UTC
    assert page_of(app_of(upstream(), admin_key=ADMIN)).axes == ["07:01 UTC 08:00 UTC"] * 2


def commands():
    """The documented curl commands by their action."""
    text = (ROOT / "docs/operations.md").read_text()
    return {re.search(r"action=(\w+)", line)[1]: line for line in re.findall(r"(?m)^curl -u .*", text)}


@needs("curl")
def test_the_documented_commands_drain_and_close(upstream, serve, config_of):
    served = serve(config_of([upstream(*[error(500)] * 3), upstream()], admin_key=str(ADMIN)))
    with RawClient.to(served.url) as client:
        for _ in range(6):
            client.post(ASK)
            client.read()

    def run(action, *more, origin=served.url):
        line = commands()[action].replace("origin: http://127.0.0.1:8081", f"origin: {origin}")
        line = (
            line.replace("http://127.0.0.1:8081", served.url)
            .replace("ADMIN_KEY", str(ADMIN))
            .replace("NAME", "a")
        )
        shown = ["-s", "-o", "/dev/null", "-w", "%{http_code}"]
        return subprocess.run(
            [*shlex.split(line), *more, *shown], capture_output=True, text=True, check=True
        ).stdout

    assert run("close", origin="https://elsewhere.example.com") == "403"
    assert run("close") == "303"
    served.wait_for_log("circuit upstream=a state=closed")
    assert run("drain") == "303"
    served.wait_for_log("status upstream=a action=drain")
    behind_nginx = ["-H", "host: proxy.example.com", "-H", "x-forwarded-proto: https"]
    assert run("drain", *behind_nginx) == "403"
    assert run("drain", *behind_nginx, origin="https://proxy.example.com") == "303"


@needs("chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_thirty_upstreams_are_readable_and_what_was_opened_stays_open(upstream, serve, tmp_path, width):
    fake = upstream()
    names = [f"an-upstream-with-a-long-name-{n:02}" for n in range(30)]
    settings = [{"name": name, "base_url": fake.url, "token": "sk-test-a"} for name in names]
    served = serve({"upstreams": settings, "admin_key": str(ADMIN)})
    with Chromium(tmp_path / "chromium") as page:
        page.call("Network.setExtraHTTPHeaders", headers=basic(ADMIN))
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        metrics = {"height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        page.call("Emulation.setDeviceMetricsOverride", width=width, **metrics)
        page.open(f"{served.url}/status")
        assert page.look("document.querySelectorAll('.overview tbody tr').length") == 30
        assert page.look("document.scrollingElement.scrollWidth") <= width
        assert page.look("document.querySelector('.overview').getBoundingClientRect().height") < 30 * 110
        page.click(".overview tbody tr:last-child a")
        page.wait_for("Page.loadEventFired")
        opened = "[...document.querySelectorAll('details[open] h2')].map(each => each.innerText)"
        assert page.look(opened) == [names[-1]]
        page.wait_until_loaded_again()
        assert page.look(opened) == [names[-1]]
