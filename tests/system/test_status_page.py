"""The status page in headless Chromium, as a real gunicorn serves it."""

import base64
import json

import pytest
from chromium import Chromium
from conftest import needs
from fakes import ASK, RawClient, error

pytestmark = needs("chromium")

KEY = "sk-test-admin"
BASIC = "Basic " + base64.b64encode(f"anyone:{KEY}".encode()).decode()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


@pytest.fixture
def page(chromium, upstream, serve, config_of):
    """The page of a proxy whose upstream `a` has failed three times, open in the browser."""
    upstreams = [upstream(*[error(500, message="<b>Busy</b>")] * 3), upstream()]
    served = serve(config_of(upstreams, admin_key=KEY))
    with RawClient.to(served.url) as client:
        for _ in range(6):
            client.post(ASK)
            assert client.read().status == 200
    chromium.call("Network.setExtraHTTPHeaders", headers={"authorization": BASIC})
    chromium.call("Emulation.clearDeviceMetricsOverride")
    chromium.call("Emulation.setEmulatedMedia", features=[])
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    chromium.open(f"{served.url}/status")
    chromium.url = served.url
    return chromium


def states(page):
    return page.look(
        "[...document.querySelectorAll('article')].map(a => a.querySelector('.state').innerText)"
    )


def test_it_shows_what_happened_without_a_script_and_asks_nobody_else(page):
    asked = {event["request"]["url"] for event in page.logged("Network.requestWillBeSent")}
    assert asked - {"data:,"} == {f"{page.url}/status"}
    assert states(page) == ["circuit open", "in use"]
    text = page.look("document.body.innerText")
    assert "3 failures in a row; tried again in 30 min" in text
    assert text.count("status 500: <b>Busy</b>") == 3
    assert "100%, its weight asks for 50%" in text
    assert page.look("document.querySelectorAll('svg rect.badbar').length") >= 1
    assert page.logged("Log.entryAdded") == page.logged("Runtime.exceptionThrown") == []
    assert page.look("document.scripts.length") == 0


def test_it_refreshes_itself(page):
    page.wait_until_loaded_again()
    assert states(page) == ["circuit open", "in use"]


def test_its_buttons_close_a_circuit_and_take_an_upstream_out_and_back_in(page):
    for selector, after in [
        ("button[value=close]", ["in use", "in use"]),
        ("article:last-of-type button[value=drain]", ["draining", "in use"]),
        ("button[value=resume]", ["in use", "in use"]),
    ]:
        page.look("document.querySelectorAll('details').forEach(each => each.open = true)")
        page.click(selector)
        page.wait_for("Page.loadEventFired")
        assert states(page) == after


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_runs_over_the_edge(page, width):
    page.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
    )
    assert page.look("document.scrollingElement.scrollWidth") <= width
    assert page.look("parseFloat(getComputedStyle(document.querySelector('dd')).fontSize)") >= 14
    assert page.look("document.querySelector('button').getBoundingClientRect().height") >= 32


def test_it_is_dark_where_the_reader_wants_it_dark(page):
    def brightness(of):
        colour = page.look(f"getComputedStyle(document.body).{of}")
        return sum(json.loads(f"[{colour[colour.index('(') + 1 : -1]}]")[:3]) / 3

    assert brightness("backgroundColor") - brightness("color") > 180
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert brightness("color") - brightness("backgroundColor") > 180
