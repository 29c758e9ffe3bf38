"""The configuration: what loads and as what, what is refused and in which words, and that no secret leaks."""

import os
import re
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import LOOPBACK_CERT

from aiproxy.config import (
    BreakerSettings,
    ClientKey,
    Config,
    ConfigError,
    LedgerSettings,
    LoggingSettings,
    Timeouts,
    UpstreamSettings,
    load,
    path_from,
)

EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"

UPSTREAMS = """
upstreams:
  - base_url: "demo://answers"
"""


#: The line, and the name of an upstream, where a fault stands.
_PLACE = re.compile(r"(?<!\S)line \d+: |(?<=[\]\w]) \([^)]*\)(?=: )")


def placeless(lines: Iterable[str]) -> tuple[str, ...]:
    """Faults or warnings without the lines and names of upstreams, which have a test of their own."""
    return tuple(_PLACE.sub("", line) for line in lines)


class Loader:
    """Writes a configuration to `config.yaml` in an empty directory and loads it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "config.yaml"

    def __call__(self, text: str | bytes, **environ: str) -> Config:
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(self.path, environ)

    def settings(self, text: str, **environ: str) -> Config:
        """Load top-level settings beside a demo upstream."""
        return self(text + UPSTREAMS, **environ)

    def upstream(self, *lines: str, **environ: str) -> UpstreamSettings:
        """Load one upstream; a URL and a token are put in where `lines` have none."""
        return self(one_upstream(*lines), **environ).upstreams[0]

    def faults(self, text: str | bytes, **environ: str) -> list[str]:
        """What is told about a file that must not load, without the file's name."""
        with pytest.raises(ConfigError) as caught:
            self(text, **environ)
        prefix = f"{self.path}: "
        assert all(fault.startswith(prefix) for fault in caught.value.faults)
        return [fault.removeprefix(prefix) for fault in placeless(caught.value.faults)]

    def fault(self, text: str | bytes, **environ: str) -> str:
        """The one fault of a file."""
        (fault,) = self.faults(text, **environ)
        return fault

    def warnings(self, text: str) -> list[str]:
        """What is odd about a file that loads, without the file's name."""
        return [line.removeprefix(f"{self.path}: ") for line in placeless(self(text).warnings)]


def one_upstream(*lines: str) -> str:
    given = {line.split(":")[0] for line in lines}
    spare = {"base_url": 'base_url: "https://api.example.com"', "token": "token: t0ken"}
    missing = [line for key, line in spare.items() if key not in given]
    return "upstreams:\n  - " + "\n    ".join([*missing, *lines]) + "\n"


def with_setting(path: str, value: str) -> str:
    """A file whose one odd thing is the value of the setting at this path, as it is written in YAML."""
    section, _, key = path.rpartition(".")
    if section == "upstreams[0]":
        return one_upstream(f"{key}: {value}")
    return (f"{section}:\n  {key}: {value}" if section else f"{key}: {value}") + UPSTREAMS


def setting_of(config: Config, path: str) -> Any:
    """The value that a configuration has at this path."""
    found: Any = config
    for key in path.removeprefix("upstreams[0].").split("."):
        found = getattr(config.upstreams[0] if path.startswith("upstreams") else found, key)
    return found


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    return Loader(tmp_path)


# --- Where the file is ---


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"AIPROXY_CONFIG": "/etc/aiproxy.yaml"}, "/etc/aiproxy.yaml"),
        ({"AIPROXY_CONFIG": ""}, "config.yaml"),
        ({}, "config.yaml"),
    ],
)
def test_the_file_is_the_one_that_the_environment_names(environ: dict[str, str], path: str) -> None:
    assert path_from(environ) == Path(path)


def test_the_environment_is_the_process_s_own_unless_given(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIPROXY_TEST_PORT", "1234")
    loader.path.write_text('listen: "${AIPROXY_TEST_PORT}"' + UPSTREAMS)
    assert load(loader.path).port == 1234


# --- What loads ---


def test_everything_but_the_upstreams_has_a_default(loader: Loader) -> None:
    config = loader(one_upstream())
    assert (config.bind, config.port, config.max_body_mb, config.warnings) == ("127.0.0.1", 8080, 32, ())
    assert (config.workers, config.affinity, config.max_in_flight) == (1, "prompt_cache", None)
    assert (config.state, config.unix_socket, config.admin_key, config.api_keys) == (None, None, None, ())
    assert config.timeouts == Timeouts(connect=5, first_byte=120, answer=600, idle=120)
    assert config.breaker == BreakerSettings(failures=3, cooldown=1800)
    assert config.logging == LoggingSettings(level="info", prompt_preview=100, format="text", file=None)
    (upstream,) = config.upstreams
    assert (upstream.name, upstream.base_url) == ("api.example.com", "https://api.example.com")
    assert (upstream.auth, upstream.weight, upstream.enabled) == ("x-api-key", 1, True)
    assert (upstream.model_mappings, upstream.available_models, upstream.headers) == ({}, frozenset(), {})
    assert (upstream.must_stream, upstream.proxy, upstream.ca_bundle) == (False, None, None)


def test_every_setting_is_read(loader: Loader) -> None:
    config = loader(
        """
        bind: "::1"
        listen: ":9000"
        max_body_mb: 1.5
        timeouts: {connect: 0.5, first_byte: 1, answer: 2.5, idle: 3}
        breaker: {failures: 5.0, cooldown: 0}
        logging: {level: DEBUG, prompt_preview: 0, format: JSON, file: /dev/null}
        affinity: prefix
        max_in_flight: 7
        workers: 2
        admin_key: adm1n
        upstreams:
          - name: primary
            base_url: "https://api.example.com/claude/"
            token: t0ken
            auth: bearer
            weight: 10
            enabled: true
            model_mappings: {"claude-opus": "claude-opus-4-8"}
            available_models: ["claude-opus"]
            must_stream: true
            headers: {X-Team: "blue"}
          - {name: spare, base_url: "https://10.0.0.7:8080", token: t0ken, enabled: false}
        """
    )
    primary = UpstreamSettings(
        name="primary",
        base_url="https://api.example.com/claude",
        token="t0ken",
        auth="bearer",
        weight=10,
        model_mappings={"claude-opus": "claude-opus-4-8"},
        available_models=frozenset({"claude-opus"}),
        must_stream=True,
        headers={"x-team": "blue"},
    )
    spare = UpstreamSettings(name="spare", base_url="https://10.0.0.7:8080", token="t0ken", enabled=False)
    assert config == Config(
        bind="::1",
        port=9000,
        max_body_mb=1.5,
        timeouts=Timeouts(connect=0.5, first_byte=1, answer=2.5, idle=3),
        breaker=BreakerSettings(failures=5, cooldown=0),
        logging=LoggingSettings(level="debug", prompt_preview=0, format="json", file="/dev/null"),
        affinity="prefix",
        max_in_flight=7,
        ledger=LedgerSettings(file=str(loader.path.parent / "ledger.db")),
        workers=2,
        admin_key="adm1n",
        upstreams=(primary, spare),
    )
    assert config.max_body == 1_572_864
    assert [type(config.breaker.failures), type(config.timeouts.idle)] == [int, float]


def test_a_file_of_the_go_program_loads_unchanged(loader: Loader) -> None:
    config = loader(
        """
        # Server bind address
        bind: "127.0.0.1"
        listen: ":8642"

        upstreams:
          - name: "Team API"
            base_url: "https://api.example.com/"
            token: "sk-"
            weight: 10
            model_mappings:
              "claude-opus": "claude-opus-4-8"
            available_models:
              - "claude-opus"
            must_stream: true
          - name: "黑与白"
            base_url: "https://gateway.example.com/claude"
            token: "sk-"
            weight: 0
            model_mappings: {}
            available_models: []
          - name: ""
            base_url: "https://third.example.com"
            token: "sk-"
        """
    )
    assert (config.address, len(config.upstreams)) == ("127.0.0.1:8642", 3)
    assert config.upstreams[0].model_mappings == {"claude-opus": "claude-opus-4-8"}
    assert [each.must_stream for each in config.upstreams] == [True, False, False]
    assert [each.weight for each in config.upstreams] == [10, 1, 1]
    assert [each.name for each in config.upstreams] == [
        "Team%20API",
        "%E9%BB%91%E4%B8%8E%E7%99%BD",
        "third.example.com",
    ]


def test_the_example_file_is_a_demo_with_the_defaults_and_shows_a_failover_soon() -> None:
    config = load(EXAMPLE, {})
    assert config.is_demo
    assert config.warnings == ()
    assert msgspec.structs.replace(config, upstreams=(), ledger=None) == Config()
    found = {each.name: (each.base_url, each.weight) for each in config.upstreams}
    assert found == {"demo-answers": ("demo://answers", 1), "demo-failing": ("demo://failing", 2)}


def test_the_real_upstreams_of_the_example_load_once_they_are_uncommented(loader: Loader) -> None:
    text = re.sub(r"(?m)^  # (?=- |  )", "  ", EXAMPLE.read_text())
    (loader.path.parent / "company-ca.pem").write_text(LOOPBACK_CERT)
    environ = {"ANTHROPIC_API_KEY": "k1", "GATEWAY_TOKEN": "k2", "TEAM": "blue", "EGRESS_PASSWORD": "p"}
    config = loader(text, **environ)
    *_, anthropic, gateway = config.upstreams
    assert (len(config.upstreams), config.warnings) == (4, ())
    assert anthropic == UpstreamSettings(name="anthropic", base_url="https://api.anthropic.com", token="k1")
    assert (gateway.auth, gateway.token, gateway.headers) == ("bearer", "k2", {"x-team": "blue"})
    assert gateway.base_url.endswith("/anthropic")
    assert gateway.available_models == set(gateway.model_mappings)


def test_the_example_shows_every_setting() -> None:
    shown = set(re.findall(r"(?m)^[ #-]*([a-z_]+):", EXAMPLE.read_text()))
    structs = (Config, Timeouts, BreakerSettings, LoggingSettings, UpstreamSettings)
    known = {name for struct in structs for name in struct.__struct_fields__}
    assert known - {"port", "unix_socket", "warnings", "substituted"} | {"listen"} <= shown


def test_only_an_enabled_demo_upstream_makes_a_demo(loader: Loader) -> None:
    assert loader(UPSTREAMS).is_demo
    assert not loader(one_upstream()).is_demo
    off = '  - {name: off, base_url: "demo://answers", enabled: false}\n'
    assert not loader(one_upstream() + off).is_demo


@pytest.mark.parametrize(
    "text",
    [
        "bind:\nlisten: ~\nmax_body_mb: null\ntimeouts:\nbreaker: ~\nlogging:\n",
        "timeouts: {connect: ~, idle: }\nbreaker: {failures: ~}\nlogging: {level: ~, prompt_preview: ~}\n",
        'bind: ""\nlisten: ""\ntimeouts: {}\n',
    ],
)
def test_null_or_an_empty_address_stands_for_the_default(loader: Loader, text: str) -> None:
    assert loader.settings(text) == loader(UPSTREAMS)


def test_null_stands_for_an_upstream_s_defaults(loader: Loader) -> None:
    optional = "name auth weight enabled model_mappings available_models must_stream headers".split()
    assert loader.upstream(*(f"{key}:" for key in optional)) == loader.upstream()


def test_a_byte_order_mark_and_windows_line_ends_are_no_fault(loader: Loader) -> None:
    assert loader(b"\xef\xbb\xbf" + UPSTREAMS.replace("\n", "\r\n").encode()) == loader(UPSTREAMS)


def test_anchors_and_merges_work_and_what_an_upstream_says_itself_wins(loader: Loader) -> None:
    config = loader(
        """
        upstreams:
          - &first {name: a, base_url: "http://a", token: t0ken, weight: 3, headers: &h {x-a: "1"}}
          - {<<: *first, name: b, weight: 5}
          - {<<: [{weight: 7}, *first], name: c, headers: {<<: *h, x-b: "2"}}
        """
    )
    assert [each.weight for each in config.upstreams] == [3, 5, 7]
    assert [each.base_url for each in config.upstreams] == ["http://a"] * 3
    assert config.upstreams[2].headers == {"x-a": "1", "x-b": "2"}


# --- The file as a whole ---


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"# nothing\n", "is empty, expected settings as in config.example.yaml"),
        (b"~\n", "is empty, expected a mapping"),
        (b"- a\n", "is a list, expected a mapping"),
        (b"t0ken\n", "is a single value, expected a mapping"),
        (b"!x {}\n", "is a value with a YAML tag, expected a mapping"),
        (b"\xff\xfea\x00", "is not UTF-8 (byte 1), expected text in UTF-8"),
        (b"bind: x\nlisten: y\x07", "line 2, column 10: has the character U+0007, expected text"),
        (b"- " * 1_000, "is nested too deeply, expected a few levels"),
        (b'bind: "\\UFFFFFFFF"', "is not valid YAML, expected settings as in config.example.yaml"),
        ("bind: localhost", "upstreams: is missing, expected a list with at least one upstream"),
        ("breaker: {}\nupstreams:", "upstreams: is missing, expected a list with at least one upstream"),
        ("upstreams: []", "upstreams: is an empty list, expected at least one upstream"),
        ("upstreams: {a: b}", "upstreams: is a mapping, expected a list"),
        ("upstreams: t0ken", "upstreams: is a single value, expected a list"),
        ("upstreams: [~]", "upstreams[0]: is empty, expected a mapping"),
        ("upstreams: [t0ken]", "upstreams[0]: is a single value, expected a mapping"),
        (one_upstream("enabled: false"), "upstreams: has no upstream that is enabled, expected at least one"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_plain_line(
    loader: Loader, text: str | bytes, told: str
) -> None:
    assert loader.fault(text) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: b: t0ken", "line 1, column 5: is not valid YAML: mapping values are not allowed here"),
        ("bind: x\n\tlisten: t0ken", r"line 2, column 1: is not valid YAML: .*'\\t' that cannot start any"),
        ("bind: x\ntoken: 't0ken", r"line 2, column 14: .*unexpected end of stream \(begun in line 2\)"),
        ("bind: x\ntoken t0ken\n", "line 3, column 1: .*could not find expected ':'"),
        ("token: *t0ken", "line 1, column 8: is not valid YAML: found undefined alias ..."),
        ("token: !t0ken!x y", "line 1, column 8: .*found undefined tag handle ..."),
        ("a: &t0ken 1\nb: &t0ken 2", "line 2, column 4: .*found duplicate anchor ...; first occurrence"),
        ("bind: x\n---\nbind: t0ken", "line 2, column 1: .*another document"),
    ],
)
def test_a_syntax_fault_names_line_and_column_and_shows_nothing_of_the_line(
    loader: Loader, text: str, told: str
) -> None:
    fault = loader.fault(text)
    assert re.match(told, fault), fault
    assert "t0ken" not in fault
    assert fault.isprintable()


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        pytest.param(
            lambda path: None,
            "there is no such file, expected one: copy config.example.yaml there, or set AIPROXY_CONFIG",
            id="nothing",
        ),
        pytest.param(Path.mkdir, "cannot be read (Is a directory), expected a readable file", id="directory"),
        pytest.param(os.mkfifo, "cannot be read (no regular file), expected a readable file", id="FIFO"),
        pytest.param(huge, "is larger than 1 MB, expected a configuration", id="1 TB"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(
    loader: Loader, make: Callable[[Path], None], told: str
) -> None:
    make(loader.path)
    with pytest.raises(ConfigError) as caught:
        load(loader.path, {})
    assert str(caught.value) == f"{loader.path}: {told}"


def test_a_file_name_with_a_line_break_stays_on_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "a\nb.yaml", {})
    assert "\n" not in str(caught.value)


def test_all_faults_are_told_at_once_in_the_order_of_the_file_with_lines_and_names(loader: Loader) -> None:
    text = """affinity: none
logging: {level: loud}
upstreams:
  - {weight: ten, name: "a'b"}
  - {token: t0ken, base_url: "http://a", naem: x}
  - name: gateway
    base_url: "http://a"
    token: t0ken
    enabled: 1
lissten: 1
bind: "[::1]:80"
affinity: none
"""
    loader.path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(loader.path, {})
    told = [
        "line 1: affinity: is given twice, in line 1 and in line 12, expected once",
        'line 2: logging.level: is "loud", expected debug, info, warning or error',
        "line 4: upstreams[0].base_url (a'b): is missing, expected a URL such as https://api.anthropic.com",
        "line 4: upstreams[0].token (a'b): is missing, expected a key, such as ${ANTHROPIC_API_KEY}",
        'line 4: upstreams[0].weight (a\'b): is "ten", expected a whole number',
        "line 4: upstreams[0].name (a'b): is \"a'b\", expected a name without quotes and control characters",
        "line 5: upstreams[1].naem: is no setting, did you mean name?",
        "line 9: upstreams[2].enabled (gateway): is 1, expected true or false",
        "line 10: lissten: is no setting, did you mean listen?",
        'line 11: bind: is "[::1]:80", with a port, expected an address alone: the port goes into listen',
    ]
    assert caught.value.faults == tuple(f"{loader.path}: {line}" for line in told)
    assert str(caught.value) == "\n".join(caught.value.faults)


def test_what_a_merge_brings_in_is_told_where_it_is_used(loader: Loader) -> None:
    text = """
upstreams:
  - &a {name: a, base_url: "http://a", token: t0ken, weight: x, naem: a}
  - {<<: *a, name: b}
"""
    assert [fault.split(":")[0] for fault in loader.faults(text)] == [
        "upstreams[0].weight",
        "upstreams[0].naem",
        "upstreams[1].weight",
        "upstreams[1].naem",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
        + "upstreams: *a29",
        "a0: &a0 {bind: x}\n"
        + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30))
        + "<<: *a29",
        "&a\n<<: *a\nupstreams: &u [*u, *a]\ntimeouts: *a",
        "upstreams:\n  - &a {<<: [*a, *a], model_mappings: *a, available_models: [*a], headers: *a}",
    ],
    ids=["lists that multiply", "merges that multiply", "circles", "circles in an upstream"],
)
def test_aliases_that_multiply_or_run_in_circles_end_in_faults(loader: Loader, text: str) -> None:
    faults = loader.faults(text)
    assert len(faults) < 100
    assert all(len(fault) < 300 for fault in faults)


# --- Variables ---


def test_a_variable_is_taken_from_the_environment_wherever_a_text_may_stand(loader: Loader) -> None:
    upstream = loader.upstream(
        "name: ${N}",
        'base_url: "https://${HOST}:${PORT}/a"',
        'token: "k-${KEY}-${KEY}"',
        'auth: "${AUTH}"',
        'model_mappings: {a: "${N}-b"}',
        'available_models: ["${A}"]',
        'headers: {x-a: "a ${N}"}',
        **{"N": "n", "HOST": "h", "PORT": "81", "KEY": "1", "AUTH": "bearer", "A": "a"},
    )
    assert upstream == UpstreamSettings(
        name="n",
        base_url="https://h:81/a",
        token="k-1-1",
        auth="bearer",
        model_mappings={"a": "n-b"},
        available_models=frozenset({"a"}),
        headers={"x-a": "a n"},
    )


def test_numbers_and_booleans_from_the_environment_are_converted(loader: Loader) -> None:
    config = loader(
        'listen: "${PORT}"\nmax_body_mb: ${MB}\ntimeouts: {idle: "${S}"}\n'
        + one_upstream("weight: ${N}", 'enabled: "${YES}"', "must_stream: ${NO}"),
        **{"PORT": "81", "MB": "1.5", "N": "7", "S": ".5\n", "YES": "True", "NO": "off"},
    )
    upstream = config.upstreams[0]
    assert (config.port, config.max_body_mb, config.timeouts.idle) == (81, 1.5, 0.5)
    assert (upstream.weight, upstream.enabled, upstream.must_stream) == (7, True, False)


def test_keys_replaced_text_and_other_dollars_are_not_replaced(loader: Loader) -> None:
    upstream = loader.upstream('model_mappings: {"${A}": "${A}", b: "$B{B}$$"}', A="${B}", B="x")
    assert upstream.model_mappings == {"${A}": "${B}", "b": "$B{B}$$"}


def test_what_variables_stand_for_is_known_and_not_shown(loader: Loader) -> None:
    config = loader("upstreams: [{base_url: 'https://a.test/${KEY}', token: sk-test-a}]", KEY="very-secret")
    assert config.substituted.are_in("https://a.test/very-secret/")
    assert "very-secret" not in repr(config.substituted)
    assert not config.substituted.are_in("https://a.test/")


def test_a_variable_of_the_env_file_wins_over_the_environment(loader: Loader, tmp_path: Path) -> None:
    lines = ["# people", "", "ONE = 'sk-test one'", 'export TWO="sk-test-two"', "THREE=sk-test=three "]
    (tmp_path / "keys").write_text("\n".join(lines))
    keys = "[{name: a, key: '${TWO}'}, {name: b, key: '${THREE}'}, {name: c, key: '${FOUR}'}]"
    config = loader.settings(f"env_file: keys\napi_keys: {keys}", TWO="not this", FOUR="sk-test-four")
    assert [each.keys for each in config.api_keys] == [
        ("sk-test-two",),
        ("sk-test=three",),
        ("sk-test-four",),
    ]
    assert "sk-test" not in repr(config)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"A=1\nsk-test-secret\n", "line 2: is not of the form NAME=value"),
        (b"9=sk-test-secret", "line 1: is not of the form NAME=value"),
        (b"A=sk-test-secret\nA=2", "line 2: A is given twice, expected once"),
        (b"A=sk-test-secret\xff", "is not UTF-8 (byte 17), expected text in UTF-8"),
        (b"#" * 1_100_000, "is larger than 1 MB, expected NAME=value lines"),
        (None, "cannot be read, expected the env_file that the configuration names"),
    ],
)
def test_a_faulty_env_file_is_told_without_a_value(
    loader: Loader, tmp_path: Path, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        loader.settings("env_file: keys")
    assert caught.value.faults == (f"{tmp_path / 'keys'}: {told}",)


# --- Values of one setting ---

ABOVE_ZERO = ["max_body_mb", "timeouts.connect", "timeouts.first_byte", "timeouts.answer", "timeouts.idle"]

#: A setting, a value as it is written, what becomes of it.
ACCEPTED: list[tuple[str, str, Any]] = [
    ("bind", '"[::1]"', "::1"),
    ("bind", "fe80::1%eth0\nallow_anonymous: true", "fe80::1%eth0"),
    ("bind", "proxy_1.example.com\nallow_anonymous: true", "proxy_1.example.com"),
    ("port", '":81"', 81),
    ("port", ":81", 81),
    ("port", '"0"', 0),
    ("port", "65535", 65535),
    *((path, "0.25", 0.25) for path in ABOVE_ZERO),
    ("timeouts.idle", '"7"', 7),
    ("timeouts.idle", "1e3", 1000),
    ("timeouts.idle", ".5", 0.5),
    ("breaker.failures", "1", 1),
    ("breaker.cooldown", "0.5", 0.5),
    ("logging.level", "Warning", "warning"),
    ("logging.level", "ERROR", "error"),
    ("upstreams[0].base_url", "https://api.anthropic.com//", "https://api.anthropic.com"),
    ("upstreams[0].base_url", "HTTPS://API.Example.com/A", "https://API.Example.com/A"),
    ("upstreams[0].base_url", "http://[::1]:8081/a/b-c/", "http://[::1]:8081/a/b-c"),
    ("upstreams[0].base_url", "http://my_service:1", "http://my_service:1"),
    ("upstreams[0].base_url", "http://10.0.0.1/a@b%20c", "http://10.0.0.1/a@b%20c"),
    ("upstreams[0].name", "a=b;c,d(e)", "a=b;c,d(e)"),
    ("upstreams[0].name", "100%", "100%"),
    ("upstreams[0].name", "Team API", "Team%20API"),
    ("upstreams[0].token", "0123456789", "0123456789"),
    ("upstreams[0].token", '" t0ken\\n"', "t0ken"),
    ("upstreams[0].token", '"a/b+c=:;\'~!"', "a/b+c=:;'~!"),
    ("upstreams[0].auth", "Bearer", "bearer"),
    ("upstreams[0].auth", "x-api-key", "x-api-key"),
    ("upstreams[0].weight", "0", 1),
    ("upstreams[0].weight", "-5", 1),
    ("upstreams[0].weight", "2.0", 2),
    ("upstreams[0].must_stream", "yes", True),
    ("upstreams[0].enabled", "True", True),
    ("upstreams[0].must_stream", "off", False),
    ("upstreams[0].headers", '{X-Team: "Blue é", x-empty: ""}', {"x-team": "Blue é", "x-empty": ""}),
    ("upstreams[0].headers", "{x-number: 007, User-Agent: a}", {"x-number": "007", "user-agent": "a"}),
    ("upstreams[0].proxy", "HTTP://egress.example.com/", "http://egress.example.com"),
    ("upstreams[0].proxy", "http://[::1]:8888", "http://[::1]:8888"),
    ("upstreams[0].proxy", "http://user@egress", "http://user@egress"),
    ("upstreams[0].proxy", "http://us%40er:!$&'()*+,;=:x@a:1", "http://us%40er:!$&'()*+,;=:x@a:1"),
]


@pytest.mark.parametrize(("path", "written", "stored"), ACCEPTED)
def test_a_setting_takes_a_value(loader: Loader, path: str, written: str, stored: Any) -> None:
    config = loader(with_setting(path.replace("port", "listen"), written))
    assert setting_of(config, path) == stored


BASE_URL = "upstreams[0].base_url"
HTTP = "http:// or https:// and a host"

#: A setting, what it expects, and values that it refuses, as they are written.
REFUSED = [
    ("bind", "an IP address or a host name", '"*" 256.0.0.1 1.2.3 http://a unix:/a -a a..b ":::" "${E}"'),
    ("bind", "an address alone: the port goes into listen", '127.0.0.1:80 "[::1]:80" a:80 ":80"'),
    ("listen", '":8080" or 8080: the address goes into bind', '0.0.0.0:80 "[::]:80" a:80 "::80"'),
    ("listen", "a port from 0 to 65535", '65536 -1 80.0 true 0x50 080 "x" "\\uff18"'),
    ("max_in_flight", "a whole number, 1 or more", "0"),
    ("affinity", "none, prompt_cache or prefix", "sticky"),
    ("workers", "a whole number, 1 or more, or auto", "0 -1 1.5 many"),
    ("timeouts.idle", "a number above 0", '-1 true .nan .inf nan ten 1:30 ""'),
    *((path, "a number above 0", "0") for path in ABOVE_ZERO),
    ("timeouts.connect", "at most 1000000000", "1000000001 1e999"),  # no socket takes much more
    ("breaker.failures", "a whole number, 1 or more", "0 1.5 true"),
    ("breaker.cooldown", "a number, 0 or more", "-1 .nan"),
    ("logging.prompt_preview", "a whole number, 0 or more", "-1 0.5 010"),
    ("logging.level", "debug, info, warning or error", 'warn critical 10 true ""'),
    ("timeouts", "a mapping", "5 []"),
    ("upstreams[0].auth", "x-api-key or bearer", "basic"),
    ("upstreams[0].weight", "a whole number", 'ten 1.5 true ""'),
    ("upstreams[0].weight", "text", "[1]"),
    ("upstreams[0].enabled", "true or false", '1 "true" maybe "" "${ONE}"'),
    ("upstreams[0].must_stream", "true or false", "0"),
    ("upstreams[0].model_mappings", "a mapping", "[a] a"),
    ("upstreams[0].available_models", "a list", "{a:b} a"),
    ("upstreams[0].headers", "a mapping", "[a] a"),
    ("upstreams[0].name", "a name without quotes", 'a"b a\'b a`b "a\\nb" "\\x85" "\\x7f" "${E}"'),
    (BASE_URL, HTTP, "api.anthropic.com ftp://a http:/a http:// http:///v1 http://:80 http://a:0 http://a:b"),
    (BASE_URL, HTTP, 'http://a:65536 "http://a:" "http://[::1" http://[a] http://[fe80::1%eth0] http://::1'),
    (BASE_URL, HTTP, 'http://1.2.3 http://a..b http://ä "http:\\\\a" "http://a\\x20b" "http://a/b\\x20c" ""'),
    (BASE_URL, "demo://answers or demo://failing", "demo:answers demo:// demo://other"),
]


@pytest.mark.parametrize(
    ("path", "expected", "written"),
    [(path, expected, value) for path, expected, values in REFUSED for value in values.split()],
)
def test_a_setting_refuses_a_value_and_says_what_it_expects(
    loader: Loader, path: str, expected: str, written: str
) -> None:
    fault = loader.fault(with_setting(path, written), E="", ONE="1")
    assert fault.startswith(f"{path}: is ")
    assert f", expected {expected}" in fault


NO_SOCKETS = ["", *r"/ aiproxy.sock ./a ~/a //run/a /a\0 /a/unix:/b".split(), "/" + "x" * 107, "/" + "é" * 54]
NO_STATES = [
    *"localhost:6379 http://:t0ken@a redis:// redis://:t0ken@ redis://:t0ken@a:65536 unix:// t0ken".split(),
    *"redis://:t0ken@a/zero redis://a?password=t0ken ${SECRET}".split(),
    "redis://:t0ken x@a",
]

#: Top-level settings, and the beginning of their fault.
FAULTS = [
    ("lisen: 80", "lisen: is no setting, did you mean listen?"),
    ("timeouts: {conect: 1}", "timeouts.conect: is no setting, did you mean connect?"),
    ('logging: {"": x}', 'logging."": is no setting, expected one of level, prompt_preview, format, file'),
    ('logging: {"a\\nb": x}', "logging.a...: is no setting, expected one of level, "),
    ('"<<": {}', "<<: is no setting, expected one of bind, listen, max_body_mb, "),
    ("listen: 1\n? [a]\n: b", "has a list for a key, expected text"),
    ("<<: x", "merges something else with <<, expected a mapping"),
    ("breaker:\n  cooldown: 1\n  cooldown: 1", "breaker.cooldown: is given twice, in line 2 and in line 3, "),
    # What is found is shown on one line, if it is short, and a variable by its name.
    ('max_body_mb: "a\\nb"', 'max_body_mb: is "a\\nb", expected a number above 0'),
    ("max_body_mb: " + "a" * 500, "max_body_mb: is a text of 500 characters, expected a number above 0"),
    ("max_body_mb: !a b", "max_body_mb: is a value with a YAML tag, expected text"),
    ("max_body_mb: ${SECRET}", 'max_body_mb: is "${SECRET}", expected a number above 0'),
    ('listen: ":${SECRET}"', 'listen: is ":${SECRET}", expected a port'),
    ('bind: "${SECRET}:80"', 'bind: is "${SECRET}:80", with a port, '),
    ("logging: {level: '${SECRET}'}", 'logging.level: is "${SECRET}", expected debug'),
    # Files.
    ("logging: {file: no/a.log}", 'logging.file: is "no/a.log", in a directory that does not exist, '),
    ("logging: {file: .}", 'logging.file: is ".", a directory, expected the path of a file'),
    ('logging: {file: ""}', 'logging.file: is "", expected the path of a file'),
    ('logging: {file: "a\\0b"}', 'logging.file: is "a\\u0000b", expected the path of a file'),
    *((f'listen: "unix:{path}"', 'listen: is "unix:') for path in NO_SOCKETS),
    # Client keys, and where shared state is.
    ("api_keys: []", "api_keys: is an empty list, expected at least one key"),
    ("api_keys: t0ken", "api_keys: is a single value, expected a list"),
    ('api_keys: [""]', "api_keys[0]: is blank, expected a key"),
    ("api_keys: [[t0ken]]", "api_keys[0]: is a list, expected text"),
    ('api_keys: ["t0ken with spaces"]', "api_keys[0]: has a space"),
    ("api_keys: [{name: alice}]", "api_keys[0].key: is missing"),
    ("api_keys: [{key: t0ken}]", "api_keys[0].name: is missing"),
    ("api_keys: [{name: a, key: t0ken-1}, {name: a, key: t0ken-2}]", "api_keys[1].name: is another key's"),
    ("api_keys: [t0ken, t0ken]", "api_keys[1]: is the same key as one before"),
    ("admin_key: [t0ken]", "admin_key: is a list, expected text"),
    ("admin_key: t0ken x", "admin_key: has a space"),
    *((f'state: "{url}"', "state: is neither local nor the URL of a Redis server, ") for url in NO_STATES),
]

_NOT_SET = "not set in the environment, expected it to be set"
_QUOTES = "expected the name of a model: put it in quotes"
_NO_NAME = "token: has a ${ that names no environment variable, expected ${NAME}"
_EMPTY = "token: names ${EMPTY}, empty in the environment, expected a key"
_NO_KEY = "token: has a space or a character that is not printable ASCII, expected a key alone"
_PASSWORD = "base_url: has a user name or a password, expected scheme, host, port and path only"
_QUERY = "base_url: has a query or a fragment, expected scheme, host, port and path only"
_NO_HTTP = "proxy: does not begin with http://, expected http://HOST:PORT: no other kind is supported"
_NO_PROXY = "proxy: is no URL of a forward proxy, expected http://HOST:PORT or "
_NO_USE = "is of no use to a demo, which makes no connection, expected none"
_OWN = "is a header that the proxy sets itself, expected another one"
_NO_VALUE = "headers.x-a: has a character that no header can hold, expected one printable line in Latin-1"

OWN_HEADERS = (
    "authorization x-api-key host content-length transfer-encoding connection accept-encoding cookie expect "
    "te upgrade keep-alive proxy-authorization content-type content-encoding Trailer X-Api-Key"
).split()

NO_PROXIES = [
    *"/ u:t0ken@ :t0ken@a u:t0ken@a:0 u:t0ken@a:x u:t0ken@a/b u:t0ken@[a] u:t0ken@a_b-".split(),
    *"u:t0ken@a?b u:t0ken@b@a u:t0ken/b@a u:t0ken#b@a u:t0ken%@a u:t0kené@a u:${SECRET}@a:0".split(),
    "u:t0ken x@a",
]

#: Lines of an upstream whose token is `t0ken` unless they give one, and the beginning of their fault.
UPSTREAM_FAULTS = [
    ("baseurl: x", "baseurl: is no setting, did you mean base_url?"),
    ("base_url:", "base_url: is missing, expected a URL such as https://api.anthropic.com"),
    ('token: ""', "token: is missing, expected a key, such as ${ANTHROPIC_API_KEY}"),
    ("base_url: demo://other\ntoken:", 'base_url: is "demo://other", expected demo://answers or demo://'),
    ("base_url: demo://answers\nproxy: http://a", f"proxy: {_NO_USE}"),
    ("base_url: demo://answers\nca_bundle: ca.pem", f"ca_bundle: {_NO_USE}"),
    ("model_mappings: {a: b, a: c}", "model_mappings.a: is given twice, in line 4 and in line 4, "),
    ("headers: {x-a: t, X-A: t}", "headers.X-A: is given twice, in upper and in lower case, expected once"),
    # Variables.
    ('token: "${NO}"', f"token: names ${{NO}}, {_NOT_SET}"),
    ("enabled: ${NO}", f"enabled: names ${{NO}}, {_NOT_SET}"),
    ('headers: {x-a: "${NO}"}', f"headers.x-a: names ${{NO}}, {_NOT_SET}"),
    ('model_mappings: {a: "${NO}"}', f"model_mappings.a: names ${{NO}}, {_NOT_SET}"),
    ('available_models: [a, "${NO}"]', f"available_models[1]: names ${{NO}}, {_NOT_SET}"),
    ('token: "${NO}${SECRET}${NEITHER}"', f"token: names ${{NO}}, ${{NEITHER}}, {_NOT_SET}"),
    *((f'token: "{value}"', _NO_NAME) for value in ["${}", "${1A}", "${SECRET:-b}", "t0ken${SECRET"]),
    ('token: "${EMPTY}"', _EMPTY),
    ('token: "${EMPTY}"\nbase_url: demo://answers', _EMPTY),
    ('model_mappings: {a: "${BAD}"}', "model_mappings.a: names ${BAD}, not UTF-8 in the environment, "),
    ('model_mappings: {a: "\\ud800"}', "model_mappings.a: has an escape that stands for no character, "),
    # Models.
    ("model_mappings: {a: 2024-01-01}", f"model_mappings.a: is 2024-01-01, {_QUOTES}"),
    ("model_mappings: {a: true}", f"model_mappings.a: is true, {_QUOTES}"),
    ("model_mappings: {a: }", "model_mappings.a: is empty, expected text"),
    ('model_mappings: {a: "${EMPTY}"}', 'model_mappings.a: is "${EMPTY}", expected the name of a model'),
    ("model_mappings: {4.5: a}", f"model_mappings.4.5: is 4.5, {_QUOTES}"),
    ('model_mappings: {"": a}', 'model_mappings."": is "", expected the name of a model'),
    ("available_models: [a, 4]", f"available_models[1]: is 4, {_QUOTES}"),
    ('available_models: [a, ""]', 'available_models[1]: is "", expected the name of a model'),
    # Certificates.
    ("ca_bundle: no.pem", 'ca_bundle: is "no.pem", which cannot be read (No such file or directory), '),
    ("ca_bundle: config.yaml", 'ca_bundle: is "config.yaml", which holds no certificate, expected '),
    ("ca_bundle: empty.pem", 'ca_bundle: is "empty.pem", which holds no certificate, expected '),
    ("ca_bundle: .", 'ca_bundle: is ".", which '),
    ('ca_bundle: ""', 'ca_bundle: is "", expected the path of a file with certificates in PEM'),
    ('ca_bundle: "a\\0b"', 'ca_bundle: is "a\\u0000b", expected the path of a file with certificates'),
    # Secrets, where they belong and where they do not.
    *((f'token: "{key}"', _NO_KEY) for key in ["Bearer t0ken", r"t0ken\nx", "t0kén", r"t0ken\x7f", "黑"]),
    ('token: " "', "token: is blank, expected a key"),
    ("token: [t0ken]", "token: is a list, expected text"),
    ("token: {t0ken: t0ken}", "token: is a mapping, expected text"),
    ("token: !t0ken x", "token: is a value with a YAML tag, expected text"),
    ("tokens: t0ken", "tokens: is no setting, did you mean token?"),
    ('"token=t0ken": x', "token...: is no setting"),
    ('"token:t0ken": x', "token...: is no setting"),
    ("weight: a\n  token=t0ken", "weight: is a text that is not shown here, expected a whole number"),
    ("weight: sk-ant-t0ken", 'weight: is "...", expected a whole number'),
    ("weight: " + "t0ken" * 7, 'weight: is "...", expected a whole number'),
    ("weight: https://u:t0ken@a", 'weight: is "...a", expected a whole number'),
    ("model_mappings: {sk-t0ken: 1}", "model_mappings....: is 1, expected the name of a model"),
    ("available_models: t0ken", "available_models: is a single value, expected a list"),
    *((f'base_url: "https://{rest}"', _PASSWORD) for rest in ["user:t0ken@a", "t0ken@a/b"]),
    *((f'base_url: "https://a{rest}"', _QUERY) for rest in ["/b?key=t0ken", "?t0ken", "#t0ken"]),
    ('base_url: "https://user:t0ken/@a"', 'base_url: is "...a", expected http:// or https:// and a host'),
    ('base_url: "user:t0ken@a"', 'base_url: is "...a", expected http:// or https:// and a host'),
    *((f'proxy: "{url}"', _NO_HTTP) for url in "https://u:t0ken@a socks5://a t0ken:3128 ${SECRET}".split()),
    *((f'proxy: "http://{rest}"', _NO_PROXY) for rest in NO_PROXIES),
    # Headers.
    ("headers: t0ken", "headers: is a single value, expected a mapping"),
    ("headers: [t0ken]", "headers: is a list, expected a mapping"),
    ("headers: {x-a: [t0ken]}", "headers.x-a: is a list, expected text"),
    ("headers: {x-a: {t0ken: t0ken}}", "headers.x-a: is a mapping, expected text"),
    ('headers: {"x-a:t0ken": b}', "headers.x-a...: is no name of a header, expected letters, digits and "),
    ('headers: {"x-a: t0ken": b}', "headers.x-a...: is no name of a header, expected letters, digits and "),
    *((f'headers: {{"{name}": t0ken}}', f"headers.{name}: {_OWN}") for name in OWN_HEADERS),
    *((f'headers: {{"{name}": t0ken}}', "headers.") for name in ["x a", r"x\na", "é", "", "${SECRET}"]),
    *((f'headers: {{x-a: "{value}"}}', _NO_VALUE) for value in r"t0ken\nb a\rb a\0b a\tb 黑 a\x85b".split()),
]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        *((text + UPSTREAMS, told) for text, told in FAULTS),
        *((one_upstream(*lines.split("\n")), f"upstreams[0].{told}") for lines, told in UPSTREAM_FAULTS),
    ],
)
def test_a_fault_says_what_is_wrong_with_which_setting_and_shows_no_secret(
    loader: Loader, text: str, told: str
) -> None:
    (loader.path.parent / "ca.pem").write_text(LOOPBACK_CERT)
    (loader.path.parent / "empty.pem").touch()
    fault = loader.fault(text, SECRET="t0ken", EMPTY=" \n", BAD="\udcff")
    assert fault.startswith(told)
    assert "t0ken" not in fault


# --- The address ---


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("listen: 80", "127.0.0.1:80"),
        ('bind: "::"\nallow_anonymous: true', "[::]:8080"),
        ("bind: localhost", "localhost:8080"),
        ('listen: "unix:/run/aiproxy/aiproxy.sock"', "unix:/run/aiproxy/aiproxy.sock"),
        ('listen: "unix:/with space/é"', "unix:/with space/é"),
        (f'listen: "unix:/{"x" * 106}"', f"unix:/{'x' * 106}"),
        ('listen: "unix:/run/a"\nbind: "0.0.0.0"', "unix:/run/a"),
    ],
    ids=["port", "IPv6", "host name", "socket", "any characters", "longest path", "bind beside a socket"],
)
def test_the_address_is_bind_and_port_or_a_unix_socket(loader: Loader, text: str, address: str) -> None:
    assert loader.settings(text).address == address


def test_a_socket_s_path_that_is_taken_by_a_file_is_a_fault_and_a_missing_directory_only_odd(
    tmp_path: Path, loader: Loader
) -> None:
    (tmp_path / "taken").touch()
    assert "is there and is no socket" in loader.fault(f'listen: "unix:{tmp_path}/taken"{UPSTREAMS}')
    assert loader.warnings(f'listen: "unix:{tmp_path}/none/a.sock"{UPSTREAMS}') == [
        "listen: is in a directory that does not exist yet"
    ]


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "10.1.2.3", "proxy.example.com"])
def test_without_keys_only_a_loopback_address_is_served(loader: Loader, bind: str) -> None:
    told = (
        f'bind: is "{bind}", which other machines may reach, expected a loopback address, or api_keys, or '
        "allow_anonymous: true"
    )
    assert loader.fault(f'bind: "{bind}"{UPSTREAMS}') == told
    assert loader.fault(f'bind: "{bind}"\nallow_anonymous: false{UPSTREAMS}') == told
    assert loader.settings(f'bind: "{bind}"\nallow_anonymous: true').bind == bind
    assert loader.settings(f'bind: "{bind}"\napi_keys: [t0ken]').bind == bind


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_a_loopback_address_is_served_without_keys(loader: Loader, bind: str) -> None:
    assert loader.settings(f'bind: "{bind}"').may_serve_strangers is False


# --- Files ---


def test_a_log_file_s_path_is_absolute_or_relative_to_the_configuration_file_and_not_made(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = loader.path.parent
    (here / "logs").mkdir()
    for written, path in [("a.log", here / "a.log"), ("logs/../b", here / "b"), (f"{here}/c", here / "c")]:
        assert loader.settings(f"logging: {{file: {written}}}").logging.file == str(path)
    monkeypatch.chdir(here)
    loader.path = Path("config.yaml")
    assert loader.settings("logging: {file: logs/a.log}").logging.file == str(here / "logs/a.log")
    assert set(os.listdir(here)) == {"config.yaml", "logs"}


@pytest.mark.parametrize("exists", [True, False])
def test_a_log_file_without_permission_is_a_fault(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    log = loader.path.parent / "a.log"
    if exists:
        log.touch()
    refused = log if exists else log.parent
    # Root, whom tests may be run by, has every permission.
    monkeypatch.setattr("os.access", lambda path, mode: not (path == refused and mode & os.W_OK))
    told = 'logging.file: is "a.log", which cannot be written, expected a file that can'
    assert loader.fault(with_setting("logging.file", "a.log")) == told


def test_a_ca_bundle_s_path_starts_from_the_configuration_s_directory(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = loader.path.parent
    (directory / "ca.pem").write_text(LOOPBACK_CERT)
    whole = str(directory / "ca.pem")
    assert loader.upstream("ca_bundle: ca.pem").ca_bundle == whole
    assert loader.upstream(f"ca_bundle: {whole}").ca_bundle == whole
    monkeypatch.chdir(directory)
    loader.path = Path("config.yaml")
    assert loader.upstream("ca_bundle: ./ca.pem").ca_bundle == whole


def test_other_files_that_are_gone_are_no_fault_of_a_configuration_that_was_good(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    one = "{base_url: 'https://a.test', token: sk-test-a, ca_bundle: gone.pem}"
    path.write_text(f"logging: {{file: gone/a.log}}\nupstreams: [{one}]")
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert len(caught.value.faults) == 2
    config = load(path, {}, was_good=True)
    assert config.upstreams[0].ca_bundle == str(tmp_path / "gone.pem")
    assert config.logging.file == str(tmp_path / "gone/a.log")


# --- Upstreams ---


@pytest.mark.parametrize("demo", ["answers", "failing", "overloaded"])
def test_a_demo_upstream_needs_no_token(loader: Loader, demo: str) -> None:
    upstream = loader.upstream(f'base_url: "demo://{demo}/"', "token:")
    assert (upstream.base_url, upstream.token) == (f"demo://{demo}", "")


@pytest.mark.parametrize(
    ("base_url", "name"),
    [
        ("HTTPS://API.Example.com/a", "api.example.com"),
        ("http://[::1]:1", "::1"),
        ("demo://failing", "failing"),
    ],
)
def test_an_upstream_without_a_name_is_called_after_its_host(
    loader: Loader, base_url: str, name: str
) -> None:
    assert loader.upstream(f'base_url: "{base_url}"').name == name


@pytest.mark.parametrize("first", ["name: b", 'base_url: "https://b"'])
@pytest.mark.parametrize("second", ["name: b", 'base_url: "https://b/c"'])
def test_names_are_unique_also_those_that_the_host_gives(loader: Loader, first: str, second: str) -> None:
    text = one_upstream(first) + one_upstream(second).removeprefix("upstreams:\n")
    assert loader.fault(text) == (
        "upstreams[1].name: is the name of upstreams[0] too, expected a name for each "
        "(else it is the host of base_url)"
    )


def test_two_names_with_faults_are_not_told_to_be_the_same(loader: Loader) -> None:
    text = one_upstream('name: "\'"') + one_upstream('name: "\'"').removeprefix("upstreams:\n")
    assert len(loader.faults(text)) == 2


_ENCODED = "name: is not printable ASCII without spaces: headers and logs show it percent-encoded"
_NO_TLS = "ca_bundle: is of no use: base_url is http://, which knows no certificates"
_UNUSED = 'model_mappings: maps "c", which can never be used: available_models lacks it'
_IN_CLEAR = "base_url: is http:// to another host: the token goes over the network in clear"


def ends_in(path: str) -> str:
    told = "base_url is what ANTHROPIC_BASE_URL would be, /v1/messages is appended to it as it stands"
    return f"base_url: ends in {path}: {told}"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("base_url: https://a/v1/", ends_in("/v1")),
        ("base_url: https://a/v1/messages", ends_in("/v1/messages")),
        ("base_url: https://a/v1beta", None),
        ("base_url: https://a/av1", None),
        ("base_url: http://gateway.example.com", _IN_CLEAR),
        ("base_url: http://10.0.0.7:80", _IN_CLEAR),
        ("base_url: http://127.0.0.1:1", None),
        ("base_url: http://localhost:1", None),
        ("base_url: http://[::1]:1", None),
        ("base_url: http://127.0.0.1\nca_bundle: ca.pem", _NO_TLS),
        ("ca_bundle: ca.pem", None),
        ("name: 黑与白", _ENCODED),
        ("name: a=b;c,d(e)%", None),
        ("model_mappings: {a: b, c: d}\navailable_models: [a, e]", _UNUSED),
        ("model_mappings: {a: b}\navailable_models: []", None),
    ],
)
def test_what_is_odd_about_an_upstream_is_a_warning(loader: Loader, lines: str, told: str | None) -> None:
    (loader.path.parent / "ca.pem").write_text(LOOPBACK_CERT)
    expected = [] if told is None else [f"upstreams[0].{told}"]
    assert loader.warnings(one_upstream(*lines.split("\n"))) == expected


# --- Secrets ---


def test_no_printed_form_of_the_settings_shows_a_secret(loader: Loader) -> None:
    config = loader(one_upstream("headers: {x-key: hunter2}", 'proxy: "http://u:t0ken-2@egress"'))
    upstream = config.upstreams[0]
    forms: list[Callable[[Any], str]] = [repr, str, lambda value: f"{value} {[value]} {(value,)!s}"]
    shown = [form(value) for form in forms for value in (config, upstream, config.upstreams)]
    for text in (*shown, str(upstream.__rich_repr__())):
        assert "t0ken" not in text
        assert "hunter2" not in text
    assert "name='api.example.com'" in repr(config)
    assert "headers={'x-key': '...'}" in repr(config)


@pytest.mark.parametrize("text", ["token: 't0ken", "- t0ken", "\x00t0ken", one_upstream("token: t0ken x")])
def test_the_traceback_of_a_fault_shows_no_secret(loader: Loader, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loader(text)
    assert "t0ken" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


# --- Client keys, workers, shared state ---


def test_client_keys_are_strings_or_have_a_name(loader: Loader) -> None:
    config = loader.settings('api_keys: [t0ken-1, {name: alice, key: "${A}"}, "t0ken-3"]', A="t0ken-2")
    assert config.api_keys == (
        ClientKey("key-1", ("t0ken-1",)),
        ClientKey("alice", ("t0ken-2",)),
        ClientKey("key-3", ("t0ken-3",)),
    )
    assert "t0ken" not in repr(config)


@pytest.mark.parametrize(
    ("spelt", "cores", "quota", "workers"),
    [
        ("40", 2, "max 100000", 40),
        ("auto", 2, "max 100000", 2),
        ("AUTO", 64, "max 100000", 4),
        ("auto", 3, "150000 100000", 2),
        ("auto", 3, "10000 100000", 1),
        ("auto", 3, None, 3),
    ],
)
def test_workers_are_a_number_or_one_per_core_that_may_be_used(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, spelt: str, cores: int, quota: str | None, workers: int
) -> None:
    def read_text(path: Path, *_: object) -> str:
        if path == Path("/proc/self/cgroup"):
            return "0::/system.slice/aiproxy.service\n"
        assert path == Path("/sys/fs/cgroup/system.slice/aiproxy.service/cpu.max")
        if quota is None:
            raise FileNotFoundError
        return f"{quota}\n"

    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("pathlib.Path.read_text", read_text)
    assert loader.settings(f"workers: {spelt}").workers == workers


@pytest.mark.parametrize(
    ("url", "host", "password"),
    [
        ("redis://localhost:6379/0", "localhost:6379", ""),
        ("redis://:p%40ss@redis.example.com", "redis.example.com", "p@ss"),
        ("rediss://user:word@[::1]:6380/1?ssl_ca_certs=/etc/ca.pem", "[::1]:6380", "word"),
        ("unix:///run/redis/redis.sock?db=2", "/run/redis/redis.sock", ""),
        ("unix://:word@/run/redis.sock", "/run/redis.sock", "word"),
    ],
)
def test_state_may_be_a_redis_server(loader: Loader, url: str, host: str, password: str) -> None:
    state = loader.settings(f'state: "{url}"').state
    assert state is not None
    assert (state.url, state.host, state.password) == (url, host, password)
    assert not password or password not in repr(loader.settings('state: "${STATE}"', STATE=url))


@pytest.mark.parametrize("name", ["local", "memory"])
def test_state_may_be_local_also_under_its_old_name(loader: Loader, name: str) -> None:
    assert loader.settings(f"state: {name}").state is None
