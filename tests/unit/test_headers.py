"""What crosses the proxy, each way."""

from datetime import UTC, datetime

import pytest

from aiproxy.api.headers import media_type, seconds_of, to_client, to_upstream, with_betas

CREDENTIAL = ("x-api-key", "sk-test-upstream")


def up(*pairs, extra=(), removed=()):
    return to_upstream(pairs, CREDENTIAL, list(extra), frozenset(removed))


@pytest.mark.parametrize(
    "name",
    (
        "anthropic-version anthropic-beta anthropic-workspace-id anthropic-something-new user-agent "
        "x-stainless-retry-count x-claude-code-session-id x-app traceparent content-type accept"
    ).split(),
)
def test_what_the_client_sent_goes_on(name):
    assert (name, "v") in up((name, "v"))


@pytest.mark.parametrize(
    "name",
    (
        "connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade "
        "host content-length expect origin cookie authorization x-api-key accept-encoding forwarded via "
        "x-forwarded-for x-forwarded-host x-forwarded-anything x-real-ip cf-connecting-ip cf-ray "
        # who the user is
        "x-claude-gateway-user-id x-claude-gateway-user-email x-litellm-end-user-id x-auth-request-user "
        "x-auth-request-email x-forwarded-email x-forwarded-user"
    ).split(),
)
def test_what_belongs_to_the_client_s_hop_stays_here(name):
    assert sorted(up((name, "theirs"))) == [("accept-encoding", "identity"), CREDENTIAL]


def test_headers_that_connection_names_stay_here():
    sent = up(("connection", "X-One, close"), ("x-one", "1"), ("x-two", "2"))
    assert [name for name, _ in sent if name.startswith("x-") and name != "x-api-key"] == ["x-two"]
    assert to_client([("connection", "x-hop"), ("x-hop", "1")]) == []


def test_configured_headers_replace_the_client_s():
    sent = up(("x-team", "client"), extra=[("x-team", "configured")])
    assert [value for name, value in sent if name == "x-team"] == ["configured"]


def test_configured_headers_are_removed_and_may_be_added_anew():
    sent = up(("x-team", "client"), ("x-other", "1"), extra=[("x-new", "2")], removed=["x-team", "x-new"])
    assert {"x-other": "1", "x-new": "2"}.items() <= dict(sent).items()
    assert "x-team" not in dict(sent)


@pytest.mark.parametrize(
    ("sent", "drop", "add", "left"),
    [
        (["a,b"], ["a"], [], "b"),
        (["a, b", "c"], ["b"], ["d"], "a,c,d"),
        (["a"], ["a"], [], None),
        ([], [], ["d"], "d"),
        (["a,d"], [], ["d"], "a,d"),
        (["a,d"], ["d"], ["d"], "a,d"),
        ([" , "], [], [], None),
    ],
)
def test_betas_are_dropped_and_added(sent, drop, add, left):
    headers = [("x-one", "1"), *(("anthropic-beta", value) for value in sent)]
    assert dict(with_betas(headers, drop, add)) == {
        "x-one": "1",
        **({} if left is None else {"anthropic-beta": left}),
    }


@pytest.mark.parametrize(
    "name",
    (
        "connection keep-alive transfer-encoding upgrade trailer content-length set-cookie server date "
        "alt-svc x-aiproxy-upstream"
    ).split(),
)
def test_what_belongs_to_the_upstream_s_hop_stays_here(name):
    assert to_client([(name, "v")]) == []


def test_everything_else_comes_back_repeated_headers_included_unless_it_is_no_header():
    pairs = [("request-id", "req_1"), ("x-good", "caf\xe9"), ("x-a", "1"), ("x-a", "2")]
    assert to_client([*pairs, ("x-bell", "a\x07b"), ("bad name", "v")]) == pairs


def test_the_content_encoding_stays_unless_it_was_undone():
    assert to_client([("content-encoding", "gzip")]) == [("content-encoding", "gzip")]
    assert to_client([("content-encoding", "gzip")], decoded=True) == []


def test_the_media_type_is_told_without_its_parameters():
    assert media_type([("content-type", "Text/Event-Stream; charset=utf-8")]) == "text/event-stream"
    assert media_type([]) == ""


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *[("20", 20.0), ("1.5", 1.5), ("0", 0.0), ("1e300", 1e9)],
        *[("Sun, 22 Nov 2026 12:01:00 GMT", 60.0), ("Sun, 22 Nov 2026 11:00:00 GMT", 0.0)],
        *((value, None) for value in ("-3", "inf", "1_0", "1e999", "soon", "20 seconds", "nan", "", None)),
        *((value, None) for value in ("9" * 5000 + "x", "Thu, 01 Jan 99999 00:00:00 GMT")),
        ("Mon, 01 Jan 2026 00:00:00 +99999999999999999999", None),
    ],
)
def test_retry_after_is_seconds_or_an_http_date(value, seconds):
    assert seconds_of(value, datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)) == seconds


@pytest.mark.parametrize(
    ("name", "value", "sent"),
    [
        ("retry-after", "20", "20"),
        ("retry-after", "0", "0"),
        ("retry-after", "1.2", "2"),
        ("retry-after", "Fri, 31 Dec 1999 23:59:59 GMT", "0"),
        *(("retry-after", value, None) for value in ("inf", "nan", "-5", "soon", "")),
        ("retry-after-ms", "1500", "1500"),
        *(("retry-after-ms", value, None) for value in ("1.5", "-1", "inf")),
    ],
)
def test_a_client_gets_retry_after_as_a_whole_number_or_not_at_all(name, value, sent):
    assert dict(to_client([(name, value)])).get(name) == sent
