"""Secrets and what becomes of them in a text for the log, and in an error for a client."""

import json
import re

import pytest

from aiproxy.observability.redaction import Redactor

TOKEN = "Tk7/upstream+token=of&a<that>nobody-may-see"  # in no usual form, and full of what JSON may escape

SECRETS = {
    "usual form": "sk-ant-api03-abcdefghijklmnopqrstuvwxyz_0123456789-AA",
    "no form": "0123456789abcdef0123456789abcdef",
    "with signs": TOKEN,
    "with a quote": 'quote"and\\backslash/and&more<of>that',
    "short": "abcdefghij",
}


def redacted(text, secret, whose, limit=500):
    """The text without a secret that is an upstream's, or the request's own."""
    redactor = Redactor([secret] if whose == "upstream's" else ["another-token"])
    return redactor.text(text, limit, [secret] if whose == "request's" else [])


whosever = pytest.mark.parametrize("whose", ["upstream's", "request's"])


@whosever
@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("form", ["%s", "key: %s.", "x%sy", "Bearer %s", '"%s"'])
def test_a_secret_is_redacted_wherever_it_stands(secret, whose, form):
    assert "[redacted]" in redacted(form % secret, secret, whose)
    half = len(secret) // 2
    for text in (redacted(form % secret, secret, whose), redacted(secret + form % secret, secret, whose)):
        assert secret[:half] not in text
        assert secret[-half:] not in text


@whosever
@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_no_part_of_a_secret_is_left_at_the_cut(secret, whose):
    for at in range(100 - len(secret) - 12, 101):
        text = redacted("." * at + secret + "." * 5000, secret, whose, limit=100)
        assert len(text) <= 100
        assert secret[:4] not in text, at


@whosever
@pytest.mark.parametrize("length", [20, 108, 400])
@pytest.mark.parametrize("limit", [100, 500])
def test_no_part_of_a_secret_is_left_at_the_cut_where_many_were_redacted_before(whose, length, limit):
    secret = ("Aq7" * length)[:length]
    for shift in range(0, length, 7):
        assert "Aq7A" not in redacted("." * shift + secret * 1000, secret, whose, limit)


JSON_WAYS = {"plain": "", "as PHP writes it": "/", "as Go writes it": "&<>", "as .NET writes it": "+'&<>"}


@whosever
@pytest.mark.parametrize("escaped", JSON_WAYS.values(), ids=JSON_WAYS)
@pytest.mark.parametrize("secret", [TOKEN, SECRETS["with a quote"]])
def test_a_secret_is_redacted_in_json_too(escaped, secret, whose):
    spelt = json.dumps(secret)[1:-1]
    for sign in escaped:
        spelt = spelt.replace(sign, "\\/" if sign == "/" else f"\\u{ord(sign):04x}")
    upper = re.sub(r"\\u\w{4}", lambda found: found[0].upper().replace("U", "u"), spelt)
    for each in {spelt, upper}:
        text = redacted(f'{{"error":"bad key {each}"}}', secret, whose)
        assert text == '{"error":"bad key [redacted]"}'


def test_keys_of_the_usual_forms_are_redacted_whosever_they_are():
    redactor = Redactor([])
    text = "use sk-ant-api03-AbCdEf_123-x or Authorization: bearer eyJhbGciOi.J9.x-y_z~1 please"
    assert redactor.text(text, 500) == "use [redacted] or Authorization: [redacted] please"


def test_what_is_no_secret_is_not_redacted():
    redactor = Redactor(["another-token"])
    text = "the bearer of bad news asks x about risk-free desk-work and sk-8 boards"
    assert redactor.text(text, 500, ["x", "any"]) == text


@pytest.mark.parametrize("own", ["Tk7/upstream", "upstream+token", "nobody-may-see"])
def test_a_client_cannot_uncover_an_upstream_s_token_by_a_key_that_is_a_part_of_it(own):
    text = Redactor([TOKEN]).text(f"bad key {TOKEN}", 500, [own])
    assert text == "bad key [redacted]"


def test_of_tokens_that_begin_alike_each_is_redacted_whole():
    redactor = Redactor(["token-of-a", "token-of-a-and-more", "token"])
    assert redactor.text("token-of-a-and-more", 500) == "[redacted]"


def test_an_error_without_a_secret_in_it_passes_byte_for_byte():
    body = bytes(range(256)) * 40 + "größer \u2028".encode()
    assert Redactor([TOKEN, "no-such-token"]).answer(body) == body
    assert Redactor([]).answer(body) == body


def test_only_the_token_goes_from_the_client_s_copy():
    said = Redactor([TOKEN]).answer(f'{{"error":"{TOKEN} is wrong"}}'.encode())
    assert said == b'{"error":"[redacted] is wrong"}'
