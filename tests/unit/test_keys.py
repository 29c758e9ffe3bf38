"""How client keys, budgets, prices and the ledger are read from the configuration."""

import hashlib

import pytest

from aiproxy.config import Budget, ConfigError, KeyLimits, LedgerSettings, Price, Secret, load

DIGEST = hashlib.sha256(b"sk-test-a").hexdigest()


@pytest.fixture
def loaded(tmp_path):
    def read(text, upstream="", **environ):
        path = tmp_path / "config.yaml"
        path.write_text(f'upstreams: [{{base_url: "demo://answers"{upstream}}}]\n{text}')
        return load(path, environ)

    return read


@pytest.mark.parametrize(
    ("defaults", "own", "limits"),
    [
        ("budget: {daily: 20}", "budget: {monthly: 5}", KeyLimits(Budget(monthly=5))),  # all of it
        ("budget: {daily: 20}", "budget: {}", KeyLimits()),
        ("budget: {daily: 20}", "budget: {daily: 0}", KeyLimits(Budget(daily=0))),
        ("max_in_flight: 3, max_wait: 2", "max_wait: 0", KeyLimits(max_in_flight=3, max_wait=0)),
        ("models: [a, b]", 'models: ["*"]', KeyLimits(models=("*",))),
        ("budget: {daily: 20}", "max_in_flight: 1", KeyLimits(Budget(daily=20), max_in_flight=1)),
    ],
)
def test_a_setting_of_a_key_takes_the_place_of_the_default(loaded, defaults, own, limits):
    keys = f"[{{name: a, key: sk-test-a, {own}}}, sk-test-b]"
    config = loaded(f"key_defaults: {{{defaults}}}\napi_keys: {keys}")
    assert config.api_keys[0].limits == limits
    assert config.api_keys[1].limits != limits


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        (f"[{{name: a, key: sk-test-a}}, {{name: b, key_sha256: {DIGEST}}}]", "the same key as one before"),
        (f"[{{name: a, key: sk-test-a, key_sha256: {DIGEST.upper()}}}]", "the same key as one before"),
        (f"[{{name: a, key_sha256: [{DIGEST}, {DIGEST[:-1]}]}}]", "is not a SHA-256 in hexadecimal"),
        ('[{name: a, key: [sk-test-a, ""]}]', "is blank, expected a key"),
        ("[{name: a, key: sk-test-a}, {name: a, key: sk-test-b}]", "another key's name too"),
        ("[{name: a, key: sk-test-a, expires: 2027-01-31 10:00:00}]", "the last valid day"),
        ("[{name: a, key: sk-test-a, max_in_flight: 1.5}]", "a whole number, 1 or more"),
        ("[{name: a, key: sk-test-a, budget: {daily: .inf}}]", "a number, 0 or more"),
        ("[{name: a, key: sk-test-a, budget: {daily: .nan}}]", "a number, 0 or more"),
        ("[{name: a, key: sk-test-a, models: [7]}]", "the name of a model"),
    ],
)
def test_keys_that_could_be_read_in_two_ways_are_refused(loaded, keys, fault):
    with pytest.raises(ConfigError) as caught:
        loaded(f"api_keys: {keys}")
    assert fault in str(caught.value)
    assert "sk-test" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("{input: 10, output: 15}", Price(10, 15, 1, 12.5, 20, 10)),
        (
            "{input: 3, output: 15, cache_read: 0, cache_write_5m: 1, cache_write_1h: 2, web_search: 0}",
            Price(3, 15, 0, 1, 2, 0),
        ),
        ('{input: "${IN}", output: 0.000001}', Price(20, 0.000001, 2, 25, 40, 10)),
    ],
)
def test_kinds_that_a_price_leaves_out_cost_their_usual_part_of_the_input(loaded, text, price):
    config = loaded(
        f'prices: {{"claude-*": {text}}}', f", prices: {{own: {text}}}, price_multiplier: 0.85", IN="20"
    )
    assert config.prices == {"claude-*": price}
    assert (config.upstreams[0].prices, config.upstreams[0].price_multiplier) == ({"own": price}, 0.85)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("prices: {x: {input: 1, output: 1, imput: 1}}", "did you mean input?"),
        ("prices: {x: {input: -1, output: 1}}", "a number, 0 or more"),
        ("prices: {x: 3}", "prices.x: is a single value"),
        ("ledger_days: 0", "1 or more"),
        ("fail_closed: maybe", "true or false"),
        ("budget: 5", "budget: is a single value"),
        ("budget: {yearly: 5}", "budget.yearly: is no setting"),
    ],
)
def test_faults_of_prices_and_budgets_name_their_place(loaded, text, fault):
    with pytest.raises(ConfigError) as caught:
        loaded(text)
    assert fault in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "PostgreSQL"])
def test_a_server_s_url_is_a_secret_that_keeps_its_days(loaded, scheme):
    url = f"{scheme}://me:sk-test-secret@db.example/ledger"
    config = loaded(f"ledger: {url}\nledger_days: 30")
    assert config.ledger == LedgerSettings(url=Secret(url), days=30)
    assert "sk-test" not in repr(config)
