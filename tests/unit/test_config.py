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
    LoggingSettings,
    Timeouts,
    UpstreamSettings,
    load,
    path_from,
    readers,
    schema,
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


def one_upstream(*lines: str) -> str:
    given = {line.split(":")[0] for line in lines}
    spare = {"base_url": 'base_url: "https://api.example.com"', "token": "token: t0ken"}
    missing = [line for key, line in spare.items() if key not in given]
    return "upstreams:\n  - " + "\n    ".join([*missing, *lines]) + "\n"


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    return Loader(tmp_path)


# --- Where the file is ---


def test_the_file_is_the_one_that_the_environment_names() -> None:
    assert path_from({"AIPROXY_CONFIG": "/etc/aiproxy.yaml"}) == Path("/etc/aiproxy.yaml")


@pytest.mark.parametrize("environ", [{}, {"AIPROXY_CONFIG": ""}])
def test_without_a_name_the_file_is_config_yaml_in_the_working_directory(environ: dict[str, str]) -> None:
    assert path_from(environ) == Path("config.yaml")


def test_the_environment_is_the_process_s_own_unless_given(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIPROXY_TEST_PORT", "1234")
    loader.path.write_text('listen: "${AIPROXY_TEST_PORT}"' + UPSTREAMS)
    assert load(loader.path).port == 1234


# --- What loads ---


def test_everything_but_the_upstreams_has_a_default(loader: Loader) -> None:
    config = loader(UPSTREAMS)
    assert config == Config(upstreams=(UpstreamSettings(name="answers", base_url="demo://answers"),))
    assert (config.bind, config.port, config.max_body_mb, config.warnings) == ("127.0.0.1", 8080, 32, ())
    assert config.timeouts == Timeouts(connect=5, first_byte=120, answer=600, idle=120)
    assert config.breaker == BreakerSettings(failures=3, cooldown=1800)
    assert config.logging == LoggingSettings(level="info", prompt_preview=100, format="text", file=None)


def test_an_upstream_has_defaults(loader: Loader) -> None:
    assert loader.upstream() == UpstreamSettings(
        name="api.example.com",
        base_url="https://api.example.com",
        token="t0ken",
        auth="x-api-key",
        weight=1,
        enabled=True,
        model_mappings={},
        available_models=frozenset(),
        must_stream=False,
        headers={},
        proxy=None,
        ca_bundle=None,
    )


def test_every_setting_is_read(loader: Loader) -> None:
    config = loader(
        """
        bind: "::1"
        listen: ":9000"
        max_body_mb: 1.5
        timeouts: {connect: 0.5, first_byte: 1, answer: 2.5, idle: 3}
        breaker: {failures: 5, cooldown: 0}
        logging: {level: DEBUG, prompt_preview: 0, format: JSON, file: /dev/null}
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
        upstreams=(primary, spare),
    )
    assert config.max_body == 1_572_864


def test_numbers_and_texts_have_the_types_that_the_settings_declare(loader: Loader) -> None:
    config = loader.settings("timeouts: {idle: 3}\nbreaker: {failures: 2.0}\nlisten: 80\nmax_body_mb: 8")
    assert msgspec.convert(msgspec.to_builtins(config), Config) == config
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
    assert config.upstreams[0].base_url == "https://api.example.com"
    assert config.upstreams[2].name == "third.example.com"


def test_the_example_file_is_a_demo_with_the_defaults_and_shows_a_failover_soon() -> None:
    config = load(EXAMPLE, {})
    assert config.is_demo
    assert config.warnings == ()
    assert msgspec.structs.replace(config, upstreams=()) == Config()
    found = {each.name: (each.base_url, each.weight) for each in config.upstreams}
    assert found == {
        "demo-answers": ("demo://answers", 1),
        "demo-failing": ("demo://failing", 2),
    }


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
    structs: list[type[msgspec.Struct]] = [
        Config,
        Timeouts,
        BreakerSettings,
        LoggingSettings,
        UpstreamSettings,
    ]
    known = {name for struct in structs for name in struct.__struct_fields__} - {
        "port",
        "unix_socket",
        "warnings",
        "substituted",
    }
    assert known | {"listen"} <= shown


@pytest.mark.parametrize(
    "base_url", ["demo://answers", "demo://failing", "demo://overloaded", "demo://answers/"]
)
def test_a_demo_upstream_needs_no_token(loader: Loader, base_url: str) -> None:
    upstream = loader.upstream(f'base_url: "{base_url}"', "token:")
    assert (upstream.base_url, upstream.token) == (base_url.rstrip("/"), "")


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
        (b"", "is empty, expected settings as in config.example.yaml"),
        (b"# nothing\n", "is empty, expected settings as in config.example.yaml"),
        (b"~\n", "is empty, expected a mapping"),
        (b"- a\n", "is a list, expected a mapping"),
        (b"t0ken\n", "is a single value, expected a mapping"),
        (b"!x {}\n", "is a value with a YAML tag, expected a mapping"),
        (b"\xff\xfea\x00", "is not UTF-8 (byte 1), expected text in UTF-8"),
        (b"bind: \x00", "line 1, column 7: has the character U+0000, expected text"),
        (b"bind: x\nlisten: y\x07", "line 2, column 10: has the character U+0007, expected text"),
        (b"- " * 1_000, "is nested too deeply, expected a few levels"),
        (b'bind: "\\UFFFFFFFF"', "is not valid YAML, expected settings as in config.example.yaml"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_plain_line(loader: Loader, text: bytes, told: str) -> None:
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
        ("token: {a: ${t0ken}}", "line 1, column 13: is not valid YAML"),
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


def test_a_missing_file_s_line_says_how_to_get_one(loader: Loader) -> None:
    with pytest.raises(ConfigError, match=r"no such file, .*copy config\.example\.yaml") as caught:
        load(loader.path, {})
    assert str(caught.value).startswith(f"{loader.path}: ")
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {})
    assert str(caught.value) == f"{tmp_path}: cannot be read (Is a directory), expected a readable file"


def test_an_unreadable_file_is_one_plain_line(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(os, "open", refuse)
    assert loader.fault(UPSTREAMS) == "cannot be read (Permission denied), expected a readable file"


@pytest.mark.parametrize("first", ["bind: localhost", "listen: 80", "breaker: {}"])
def test_a_file_without_upstreams_is_told_so(loader: Loader, first: str) -> None:
    for text in (first, f"{first}\nupstreams:"):
        assert loader.fault(text) == "upstreams: is missing, expected a list with at least one upstream"


def test_a_file_name_with_a_line_break_stays_on_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "a\nb.yaml", {})
    assert "\n" not in str(caught.value)


def test_all_faults_are_told_at_once_in_the_order_of_the_file(loader: Loader) -> None:
    text = """
logging: {level: loud}
upstreams:
  - {weight: ten, name: "a'b"}
  - {token: t0ken, base_url: "http://a", naem: x}
  - {token: t0ken, base_url: "http://a", enabled: 1}
lissten: 1
bind: "[::1]:80"
"""
    assert loader.faults(text) == [
        'logging.level: is "loud", expected debug, info, warning or error',
        "upstreams[0].base_url: is missing, expected a URL such as https://api.anthropic.com",
        "upstreams[0].token: is missing, expected a key, such as ${ANTHROPIC_API_KEY}",
        'upstreams[0].weight: is "ten", expected a whole number',
        'upstreams[0].name: is "a\'b", expected a name without quotes and control characters',
        "upstreams[1].naem: is no setting, did you mean name?",
        "upstreams[2].name: is the name of upstreams[1] too, expected a name for each "
        "(else it is the host of base_url)",
        "upstreams[2].enabled: is 1, expected true or false",
        "lissten: is no setting, did you mean listen?",
        'bind: is "[::1]:80", with a port, expected an address alone: the port goes into listen',
    ]


def test_a_fault_has_its_line_and_the_name_of_its_upstream(loader: Loader) -> None:
    text = """
    breaker: {failures: 0}
    upstreams:
      - name: gateway
        base_url: "https://gateway.example.com"
        token: sk-test-a
        weigth: 3
      - {base_url: "https://b.example.com", auth: basic}
    """
    with pytest.raises(ConfigError) as caught:
        loader(text)
    assert [fault.removeprefix(f"{loader.path}: ").partition(": is")[0] for fault in caught.value.faults] == [
        "line 2: breaker.failures",
        "line 7: upstreams[0].weigth (gateway)",
        "line 8: upstreams[1].token",
        "line 8: upstreams[1].auth",
    ]


def test_the_error_s_text_is_its_faults_a_line_each() -> None:
    error = ConfigError(iter(["one", "two"]))
    assert (error.faults, str(error)) == (("one", "two"), "one\ntwo")


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


# --- Keys ---


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lisen: 80" + UPSTREAMS, "lisen: is no setting, did you mean listen?"),
        ("timeouts: {conect: 1}" + UPSTREAMS, "timeouts.conect: is no setting, did you mean connect?"),
        ("breaker: {cool_down: 1}" + UPSTREAMS, "breaker.cool_down: is no setting, did you mean cooldown?"),
        ("logging: {lvl: info}" + UPSTREAMS, "logging.lvl: is no setting, did you mean level?"),
        (one_upstream("baseurl: x"), "upstreams[0].baseurl: is no setting, did you mean base_url?"),
        (
            "logging: {on: info}" + UPSTREAMS,
            "logging.on: is no setting, expected one of level, prompt_preview, format, file",
        ),
        (
            'logging: {"": x}' + UPSTREAMS,
            'logging."": is no setting, expected one of level, prompt_preview, format, file',
        ),
        (
            'logging: {"a\\nb": x}' + UPSTREAMS,
            "logging.a...: is no setting, expected one of level, prompt_preview, format, file",
        ),
        ('"<<": {}' + UPSTREAMS, "<<: is no setting, expected one of bind, listen, max_body_mb, "),
        ("listen: 1\n? [a]\n: b" + UPSTREAMS, "has a list for a key, expected text"),
        ("<<: x" + UPSTREAMS, "merges something else with <<, expected a mapping"),
    ],
)
def test_an_unknown_key_is_a_fault_at_every_level(loader: Loader, text: str, told: str) -> None:
    assert loader.fault(text).startswith(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "listen: 1\naffinity: none\nlisten: 2" + UPSTREAMS,
            "listen: is given twice, in line 1 and in line 3, ",
        ),
        (
            "timeouts:\n  idle: 1\n  idle: 1" + UPSTREAMS,
            "timeouts.idle: is given twice, in line 2 and in line 3, ",
        ),
        (one_upstream("weight: 1", "weight: 2"), "upstreams[0].weight: is given twice, in line 4 and in "),
        (
            one_upstream("model_mappings: {a: b, a: c}"),
            "upstreams[0].model_mappings.a: is given twice, in line 4 and in line 4, expected once",
        ),
        (one_upstream("headers: {x-a: t, x-a: t}"), "upstreams[0].headers.x-a: is given twice, in line 4 "),
        (
            one_upstream("headers: {x-a: t, X-A: t}"),
            "upstreams[0].headers.X-A: is given twice, in upper and in lower case, expected once",
        ),
    ],
)
def test_a_key_that_comes_twice_is_a_fault_with_its_lines(loader: Loader, text: str, told: str) -> None:
    assert loader.fault(text).startswith(told)


def test_a_key_that_comes_twice_is_told_in_its_place(loader: Loader) -> None:
    faults = loader.faults("bind: 1\nlisten: 80\nlisten: 81\nbreaker: 1" + UPSTREAMS)
    assert [fault.split(":")[0] for fault in faults] == ["bind", "listen", "breaker"]


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
        N="n",
        HOST="h",
        PORT="81",
        KEY="1",
        AUTH="bearer",
        A="a",
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
        'listen: "${PORT}"\nmax_body_mb: ${MB}\nbreaker: {failures: "${N}"}\ntimeouts: {idle: "${S}"}\n'
        + one_upstream("weight: ${N}", 'enabled: "${YES}"', "must_stream: ${NO}"),
        PORT="81",
        MB="1.5",
        N="7",
        S=".5\n",
        YES="True",
        NO="off",
    )
    assert (config.port, config.max_body_mb, config.breaker.failures, config.timeouts.idle) == (
        81,
        1.5,
        7,
        0.5,
    )
    assert (config.upstreams[0].weight, config.upstreams[0].enabled) == (7, True)
    assert not config.upstreams[0].must_stream


def test_replaced_text_is_not_replaced_again_and_other_dollars_stay(loader: Loader) -> None:
    upstream = loader.upstream('model_mappings: {a: "${A}", b: "$B{B}$$"}', A="${B}", B="x")
    assert upstream.model_mappings == {"a": "${B}", "b": "$B{B}$$"}


def test_keys_are_not_replaced(loader: Loader) -> None:
    assert loader.upstream('model_mappings: {"${A}": b}', A="a").model_mappings == {"${A}": "b"}


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ('token: "${NOWHERE}"', "token"),
        ('base_url: "http://${NOWHERE}/"', "base_url"),
        ("weight: ${NOWHERE}", "weight"),
        ("enabled: ${NOWHERE}", "enabled"),
        ('headers: {x-a: "${NOWHERE}"}', "headers.x-a"),
        ('model_mappings: {a: "${NOWHERE}"}', "model_mappings.a"),
        ('available_models: [a, "${NOWHERE}"]', "available_models[1]"),
    ],
)
def test_a_variable_that_is_not_set_is_a_fault_that_names_it(loader: Loader, line: str, path: str) -> None:
    told = f"upstreams[0].{path}: names ${{NOWHERE}}, not set in the environment, expected it to be set"
    assert loader.fault(one_upstream(line)) == told


def test_all_variables_that_a_value_lacks_are_named(loader: Loader) -> None:
    assert loader.fault(one_upstream('token: "${A}${B}${C}"'), B="x").startswith(
        "upstreams[0].token: names ${A}, ${C}, not set"
    )


@pytest.mark.parametrize("value", ["${}", "${1A}", "${A B}", "${A:-b}", "a${A"])
def test_a_variable_without_a_proper_name_is_a_fault(loader: Loader, value: str) -> None:
    told = "upstreams[0].token: has a ${ that names no environment variable, expected ${NAME}"
    assert loader.fault(one_upstream(f'token: "{value}"'), A="a") == told


@pytest.mark.parametrize("value", ["", " \n"])
def test_an_empty_variable_is_no_token(loader: Loader, value: str) -> None:
    for lines in (['token: "${KEY}"'], ['token: "${KEY}"', 'base_url: "demo://answers"']):
        told = "upstreams[0].token: names ${KEY}, empty in the environment, expected a key"
        assert loader.fault(one_upstream(*lines), KEY=value) == told


def test_a_variable_that_is_not_utf_8_is_a_fault(loader: Loader) -> None:
    told = "upstreams[0].model_mappings.a: names ${A}, not UTF-8 in the environment, expected text"
    assert loader.fault(one_upstream('model_mappings: {a: "${A}"}'), A="\udcff") == told


def test_an_escape_that_is_no_character_is_a_fault(loader: Loader) -> None:
    told = "upstreams[0].model_mappings.a: has an escape that stands for no character, expected text"
    assert loader.fault(one_upstream('model_mappings: {a: "\\ud800"}')) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_body_mb: ${V}", 'max_body_mb: is "${V}", expected a number above 0'),
        ("timeouts: {idle: '${V}'}", 'timeouts.idle: is "${V}", expected a number above 0'),
        ('listen: ":${V}"', 'listen: is ":${V}", expected a port from 0 to 65535, such as ":8080" or 8080'),
        ('bind: "${V}:80"', 'bind: is "${V}:80", with a port, '),
        ("logging: {level: '${V}'}", 'logging.level: is "${V}", expected debug'),
    ],
)
def test_a_fault_shows_the_variable_and_not_what_it_stands_for(loader: Loader, text: str, told: str) -> None:
    fault = loader.fault(f"{text}\n{UPSTREAMS}", V="hunter2")
    assert fault.startswith(told)
    assert "hunter2" not in fault


# --- The address ---


@pytest.mark.parametrize(
    ("bind", "address"),
    [
        ("127.0.0.1", "127.0.0.1:8080"),
        ("0.0.0.0", "0.0.0.0:8080"),
        ("::1", "[::1]:8080"),
        ("[::1]", "[::1]:8080"),
        ("::", "[::]:8080"),
        ("fe80::1%eth0", "[fe80::1%eth0]:8080"),
        ("localhost", "localhost:8080"),
        ("proxy_1.example.com", "proxy_1.example.com:8080"),
    ],
)
def test_bind_is_an_address_or_a_host_name(loader: Loader, bind: str, address: str) -> None:
    assert loader.settings(f'bind: "{bind}"\nallow_anonymous: true').address == address


@pytest.mark.parametrize("bind", ["127.0.0.1:8080", "[::1]:8080", "localhost:8080", ":8080"])
def test_a_bind_with_a_port_points_to_listen(loader: Loader, bind: str) -> None:
    told = f'bind: is "{bind}", with a port, expected an address alone: the port goes into listen'
    assert loader.fault(f'bind: "{bind}"{UPSTREAMS}') == told


@pytest.mark.parametrize(
    "bind",
    ["*", "256.0.0.1", "1.2.3", "a b", "http://a", "[127.0.0.1]", "-a", "a..b", ":::", "${E}", "unix:/a"],
)
def test_anything_else_is_no_bind(loader: Loader, bind: str) -> None:
    told = f'bind: is "{bind}", expected an IP address or a host name'
    assert loader.fault(f'bind: "{bind}"{UPSTREAMS}', E="").startswith(told)


@pytest.mark.parametrize(
    ("listen", "port"), [('":81"', 81), (":81", 81), ('"81"', 81), ("81", 81), ("0", 0), ("65535", 65535)]
)
def test_listen_is_a_port_with_or_without_a_colon(loader: Loader, listen: str, port: int) -> None:
    assert loader.settings(f"listen: {listen}").port == port


@pytest.mark.parametrize("listen", ["0.0.0.0:8080", "[::]:8080", "localhost:80", "::80"])
def test_a_listen_with_an_address_points_to_bind(loader: Loader, listen: str) -> None:
    told = f'listen: is "{listen}", with an address, expected ":8080" or 8080: the address goes into bind'
    assert loader.fault(f'listen: "{listen}"{UPSTREAMS}') == told


@pytest.mark.parametrize(
    "listen", ["65536", "-1", "80.0", "true", "0x50", "080", '" "', "' x'", "[80]", '"\\uff18"']
)
def test_anything_else_is_no_port(loader: Loader, listen: str) -> None:
    assert loader.fault(f"listen: {listen}{UPSTREAMS}").startswith("listen: is ")


# --- Numbers, booleans and choices ---

ABOVE_ZERO = ["max_body_mb", "timeouts.connect", "timeouts.first_byte", "timeouts.answer", "timeouts.idle"]


def setting(path: str, value: str) -> str:
    *sections, key = path.split(".")
    text = f"{key}: {value}"
    return (f"{sections[0]}:\n  {text}" if sections else text) + "\n" + UPSTREAMS


def found(config: Config, path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = getattr(value, key)
    return value


@pytest.mark.parametrize("path", ABOVE_ZERO)
@pytest.mark.parametrize(
    "value", ["0", "-1", "true", ".nan", "nan", ".inf", "1e999", "ten", "1:30", "[1]", '""']
)
def test_a_size_or_a_timeout_is_a_finite_number_above_zero(loader: Loader, path: str, value: str) -> None:
    assert loader.fault(setting(path, value)).startswith(f"{path}: is ")


@pytest.mark.parametrize("path", ABOVE_ZERO)
@pytest.mark.parametrize(
    ("value", "number"), [("0.25", 0.25), ("7", 7), ('"7"', 7), ("1e3", 1000), (".5", 0.5)]
)
def test_a_size_or_a_timeout_may_be_a_fraction(loader: Loader, path: str, value: str, number: float) -> None:
    assert found(loader(setting(path, value)), path) == number


def test_a_number_that_no_socket_could_take_is_a_fault(loader: Loader) -> None:
    told = "timeouts.connect: is 1000000001, expected at most 1000000000"
    assert loader.fault(setting("timeouts.connect", "1000000001")) == told


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("breaker.failures", "0", "a whole number, 1 or more"),
        ("breaker.failures", "1.5", "a whole number, 1 or more"),
        ("breaker.failures", "true", "a whole number, 1 or more"),
        ("breaker.cooldown", "-1", "a number, 0 or more"),
        ("breaker.cooldown", ".nan", "a number, 0 or more"),
        ("logging.prompt_preview", "-1", "a whole number, 0 or more"),
        ("logging.prompt_preview", "0.5", "a whole number, 0 or more"),
        ("logging.prompt_preview", "010", "a whole number, 0 or more"),
        ("timeouts", "5", "a mapping"),
        ("breaker", "[]", "a mapping"),
        ("logging", "info", "a mapping"),
    ],
)
def test_a_value_of_the_wrong_kind_is_a_fault(loader: Loader, path: str, value: str, expected: str) -> None:
    fault = loader.fault(setting(path, value))
    assert fault.startswith(f"{path}: is ")
    assert fault.endswith(f", expected {expected}")


@pytest.mark.parametrize(
    ("path", "value", "number"),
    [
        ("breaker.failures", "1", 1),
        ("breaker.cooldown", "0", 0),
        ("breaker.cooldown", "0.5", 0.5),
        ("logging.prompt_preview", "0", 0),
    ],
)
def test_the_least_value_of_a_number_is_taken(loader: Loader, path: str, value: str, number: float) -> None:
    assert found(loader(setting(path, value)), path) == number


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_a_level_may_be_in_lower_or_upper_case(loader: Loader, level: str) -> None:
    for written in (level, level.upper(), level.title()):
        assert loader.settings(f"logging: {{level: {written}}}").logging.level == level


@pytest.mark.parametrize("level", ["warn", "critical", "10", "true", '""'])
def test_there_are_no_other_levels(loader: Loader, level: str) -> None:
    fault = loader.fault(setting("logging.level", level))
    assert fault.endswith(", expected debug, info, warning or error")


def test_a_log_file_s_path_is_absolute_or_relative_to_the_configuration_file(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = loader.path.parent
    (here / "logs").mkdir()
    for written, path in [("a.log", here / "a.log"), ("logs/../b", here / "b"), (f"{here}/c", here / "c")]:
        assert loader.settings(f"logging: {{file: {written}}}").logging.file == str(path)
    monkeypatch.chdir(here)
    loader.path.write_text("logging: {file: logs/a.log}" + UPSTREAMS)
    assert load(Path(loader.path.name), {}).logging.file == str(here / "logs/a.log")


def test_loading_makes_no_log_file(loader: Loader) -> None:
    loader.settings("logging: {file: a.log}")
    assert os.listdir(loader.path.parent) == [loader.path.name]


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("no/a.log", 'is "no/a.log", in a directory that does not exist, expected one that does'),
        (".", 'is ".", a directory, expected the path of a file'),
        ('""', 'is "", expected the path of a file'),
        ('"a\\0b"', 'is "a\\u0000b", expected the path of a file'),
        ("[a]", "is a list, expected text"),
    ],
)
def test_a_log_file_that_cannot_be_written_is_a_fault(loader: Loader, file: str, told: str) -> None:
    assert loader.fault(setting("logging.file", file)) == f"logging.file: {told}"


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
    assert loader.fault(setting("logging.file", "a.log")) == told


def test_a_value_is_shown_on_one_line_and_in_full_only_when_it_is_short(loader: Loader) -> None:
    assert (
        loader.fault(setting("max_body_mb", '"a\\nb"'))
        == 'max_body_mb: is "a\\nb", expected a number above 0'
    )
    told = "max_body_mb: is a text of 500 characters, expected a number above 0"
    assert loader.fault(setting("max_body_mb", "a" * 500)) == told
    tagged = "max_body_mb: is a value with a YAML tag, expected text"
    assert loader.fault(setting("max_body_mb", "!a b")) == tagged


# --- Upstreams ---


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("upstreams: []", "upstreams: is an empty list, expected at least one upstream"),
        ("upstreams: {a: b}", "upstreams: is a mapping, expected a list"),
        ("upstreams: t0ken", "upstreams: is a single value, expected a list"),
        ("upstreams: [~]", "upstreams[0]: is empty, expected a mapping"),
        ("upstreams: [t0ken]", "upstreams[0]: is a single value, expected a mapping"),
        ("upstreams: [[]]", "upstreams[0]: is a list, expected a mapping"),
        (one_upstream("enabled: false"), "upstreams: has no upstream that is enabled, expected at least one"),
        (
            one_upstream("base_url:"),
            "upstreams[0].base_url: is missing, expected a URL such as https://api.anthropic.com",
        ),
        (
            one_upstream("token:"),
            "upstreams[0].token: is missing, expected a key, such as ${ANTHROPIC_API_KEY}",
        ),
        (
            one_upstream('token: ""'),
            "upstreams[0].token: is missing, expected a key, such as ${ANTHROPIC_API_KEY}",
        ),
    ],
)
def test_there_is_at_least_one_whole_upstream(loader: Loader, text: str, told: str) -> None:
    assert loader.fault(text) == told


@pytest.mark.parametrize(
    ("written", "base_url", "name"),
    [
        ("https://api.anthropic.com", "https://api.anthropic.com", "api.anthropic.com"),
        ("https://api.anthropic.com/", "https://api.anthropic.com", "api.anthropic.com"),
        ("https://api.anthropic.com//", "https://api.anthropic.com", "api.anthropic.com"),
        ("HTTPS://API.Example.com/A", "https://API.Example.com/A", "api.example.com"),
        ("http://localhost:8081/a/b-c/", "http://localhost:8081/a/b-c", "localhost"),
        ("http://[::1]:8081", "http://[::1]:8081", "::1"),
        ("http://my_service:1", "http://my_service:1", "my_service"),
        ("http://10.0.0.1/a@b%20c", "http://10.0.0.1/a@b%20c", "10.0.0.1"),
        ("demo://overloaded", "demo://overloaded", "overloaded"),
    ],
)
def test_a_base_url_loses_its_trailing_slash_and_gives_the_name(
    loader: Loader, written: str, base_url: str, name: str
) -> None:
    upstream = loader.upstream(f'base_url: "{written}"')
    assert (upstream.base_url, upstream.name) == (base_url, name)


@pytest.mark.parametrize(
    "base_url",
    [
        "api.anthropic.com",
        "ftp://a",
        "http://",
        "http:///v1",
        "http:/a",
        "http://:80",
        "http://a:0",
        "http://a:65536",
        "http://a:b",
        "http://a:",
        "http://a b",
        "http://a/b c",
        "http://[::1",
        "http://[a]",
        "http://[fe80::1%eth0]",
        "http://::1",
        "http://1.2.3",
        "http://a..b",
        "http://ä",
        "http:\\\\\\\\a",
        "",
        "demo:answers",
        "demo://",
        "demo://other",
        "demo://[",
    ],
)
def test_anything_else_is_no_base_url(loader: Loader, base_url: str) -> None:
    assert loader.fault(one_upstream(f'base_url: "{base_url}"')).startswith("upstreams[0].base_url: is ")


@pytest.mark.parametrize("base_url", ["demo://other", "demo:", "demo://"])
def test_an_unknown_demo_is_told_which_there_are_and_asked_for_no_token(
    loader: Loader, base_url: str
) -> None:
    told = f'upstreams[0].base_url: is "{base_url}", expected demo://answers or demo://failing'
    assert loader.fault(one_upstream(f'base_url: "{base_url}"', "token:")) == told


@pytest.mark.parametrize(
    ("base_url", "told"),
    [
        (
            "https://user:hunter2@a",
            "has a user name or a password, expected scheme, host, port and path only",
        ),
        ("https://hunter2@a/b", "has a user name or a password, expected scheme, host, port and path only"),
        ("https://a/b?key=hunter2", "has a query or a fragment, expected scheme, host, port and path only"),
        ("https://a?hunter2", "has a query or a fragment, expected scheme, host, port and path only"),
        ("https://a#hunter2", "has a query or a fragment, expected scheme, host, port and path only"),
        ("https://user:hunter2/@a", "is "),
        ("https:/user:hunter2@a", "is "),
        ("user:hunter2@a", "is "),
    ],
)
def test_a_password_or_a_query_in_a_base_url_is_refused_and_not_shown(
    loader: Loader, base_url: str, told: str
) -> None:
    fault = loader.fault(one_upstream(f'base_url: "{base_url}"'))
    assert fault.startswith(f"upstreams[0].base_url: {told}")
    assert "hunter2" not in fault


@pytest.mark.parametrize("ending", ["/v1", "/v1/messages"])
def test_a_base_url_with_the_api_s_path_is_loaded_as_written_with_a_warning(
    loader: Loader, ending: str
) -> None:
    config = loader(one_upstream(f'base_url: "https://a{ending}/"'))
    assert config.upstreams[0].base_url == f"https://a{ending}"
    assert placeless(config.warnings) == (
        f"{loader.path}: upstreams[0].base_url: ends in {ending}: "
        "base_url is what ANTHROPIC_BASE_URL would be, /v1/messages is appended to it as it stands",
    )


@pytest.mark.parametrize("path", ["", "/av1", "/v1/a", "/v1beta"])
def test_any_other_path_is_no_reason_for_a_warning(loader: Loader, path: str) -> None:
    assert loader(one_upstream(f'base_url: "https://a{path}"')).warnings == ()


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


@pytest.mark.parametrize("name", ["a", "eu-1", "a=b;c,d(e)", "1", "100%"])
def test_a_name_of_printable_ascii_is_taken_as_it_is(loader: Loader, name: str) -> None:
    config = loader(one_upstream(f"name: {name}"))
    assert (config.upstreams[0].name, config.warnings) == (name, ())


@pytest.mark.parametrize(
    ("name", "sent"), [("Team API", "Team%20API"), ("黑与白", "%E9%BB%91%E4%B8%8E%E7%99%BD"), ("é", "%C3%A9")]
)
def test_a_name_that_no_header_can_hold_is_percent_encoded_with_a_warning(
    loader: Loader, name: str, sent: str
) -> None:
    config = loader(one_upstream(f"name: {name}"))
    assert config.upstreams[0].name == sent
    assert placeless(config.warnings) == (
        f"{loader.path}: upstreams[0].name: is not printable ASCII without spaces: "
        "headers and logs show it percent-encoded",
    )


@pytest.mark.parametrize(
    "name",
    ['"a\\nb"', '"a\\tb"', '"a\\0"', '"a\\x7f"', '"a\\x85b"', 'a"b', "a'b", "a`b", "[a]", '" "', '"${E}"'],
)
def test_a_name_with_quotes_or_control_characters_is_a_fault(loader: Loader, name: str) -> None:
    assert loader.fault(one_upstream(f"name: {name}"), E="").startswith("upstreams[0].name: is ")


@pytest.mark.parametrize("token", ["t0ken", " t0ken\n", "12345", "a/b+c=:;'\"~!"])
def test_a_token_is_taken_without_white_space_around_it(loader: Loader, token: str) -> None:
    assert loader.upstream('token: "${KEY}"', KEY=token).token == token.strip()


def test_a_token_of_digits_needs_no_quotes(loader: Loader) -> None:
    assert loader.upstream("token: 0123456789").token == "0123456789"


@pytest.mark.parametrize(
    "token", ["Bearer t0ken", "t0ken\\nx", "t0ken\\tx", "t0kén", "t0ken\\x7f", "t0ken\\0", "黑"]
)
def test_a_token_that_no_header_can_hold_is_a_fault_that_does_not_show_it(loader: Loader, token: str) -> None:
    told = "upstreams[0].token: has a space or a character that is not printable ASCII, expected a key alone"
    assert loader.fault(one_upstream(f'token: "{token}"')) == told


def test_a_blank_token_is_a_fault(loader: Loader) -> None:
    assert loader.fault(one_upstream('token: " "')) == "upstreams[0].token: is blank, expected a key"


@pytest.mark.parametrize(
    ("auth", "stored"), [("bearer", "bearer"), ("x-api-key", "x-api-key"), ("Bearer", "bearer")]
)
def test_auth_is_one_of_two(loader: Loader, auth: str, stored: str) -> None:
    assert loader.upstream(f"auth: {auth}").auth == stored


def test_there_is_no_other_auth(loader: Loader) -> None:
    told = 'upstreams[0].auth: is "basic", expected x-api-key or bearer'
    assert loader.fault(one_upstream("auth: basic")) == told


@pytest.mark.parametrize(("weight", "stored"), [("3", 3), ('"10"', 10), ("0", 1), ("-5", 1), ("2.0", 2)])
def test_a_weight_of_zero_or_less_counts_as_one(loader: Loader, weight: str, stored: int) -> None:
    assert loader.upstream(f"weight: {weight}").weight == stored


@pytest.mark.parametrize("weight", ["ten", "1.5", "true", "[1]", ".inf", "-.inf", '""'])
def test_a_weight_is_a_whole_number(loader: Loader, weight: str) -> None:
    fault = loader.fault(one_upstream(f"weight: {weight}"))
    assert fault.startswith("upstreams[0].weight: is ")


@pytest.mark.parametrize("key", ["enabled", "must_stream"])
@pytest.mark.parametrize("value", ["1", "0", '"true"', "maybe", "[true]", '""', '"${ONE}"'])
def test_a_switch_is_true_or_false(loader: Loader, key: str, value: str) -> None:
    fault = loader.fault(one_upstream(f"{key}: {value}"), ONE="1")
    assert fault.startswith(f"upstreams[0].{key}: is ")


@pytest.mark.parametrize(
    ("value", "stored"), [("true", True), ("False", False), ("yes", True), ("off", False)]
)
def test_a_switch_may_be_in_any_of_yaml_s_words(loader: Loader, value: str, stored: bool) -> None:
    assert loader.upstream(f"must_stream: {value}").must_stream is stored


@pytest.mark.parametrize("key", ["model_mappings", "available_models", "headers"])
def test_a_collection_of_the_wrong_kind_is_a_fault(loader: Loader, key: str) -> None:
    wrong = "{a: b}" if key == "available_models" else "[a]"
    for value in (wrong, "a"):
        fault = loader.fault(one_upstream(f"{key}: {value}"))
        assert re.fullmatch(rf"upstreams\[0\]\.{key}: is a .*, expected a (list|mapping)", fault)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("model_mappings: {a: 4}", "model_mappings.a"),
        ("model_mappings: {a: 2024-01-01}", "model_mappings.a"),
        ("model_mappings: {a: true}", "model_mappings.a"),
        ("model_mappings: {a: }", "model_mappings.a"),
        ('model_mappings: {a: ""}', "model_mappings.a"),
        ('model_mappings: {a: "${E}"}', "model_mappings.a"),
        ("model_mappings: {a: [b]}", "model_mappings.a"),
        ("model_mappings: {4.5: a}", "model_mappings.4.5"),
        ("model_mappings: {on: a}", "model_mappings.on"),
        ('model_mappings: {"": a}', 'model_mappings.""'),
        ("available_models: [a, 4]", "available_models[1]"),
        ("available_models: [a, ~]", "available_models[1]"),
        ('available_models: [a, ""]', "available_models[1]"),
        ("available_models: [a, {b: c}]", "available_models[1]"),
    ],
)
def test_the_name_of_a_model_is_a_text_that_is_not_empty(loader: Loader, line: str, path: str) -> None:
    assert loader.fault(one_upstream(line), E="").startswith(f"upstreams[0].{path}: is ")


def test_a_mapping_that_can_never_be_used_is_a_warning(loader: Loader) -> None:
    config = loader(one_upstream("model_mappings: {a: b, c: d}", "available_models: [a, e]"))
    assert config.upstreams[0].model_mappings == {"a": "b", "c": "d"}
    assert placeless(config.warnings) == (
        f"{loader.path}: upstreams[0].model_mappings: "
        'maps "c", which can never be used: available_models lacks it',
    )


def test_a_mapping_beside_no_list_of_models_is_no_reason_for_a_warning(loader: Loader) -> None:
    assert loader(one_upstream("model_mappings: {a: b}", "available_models: []")).warnings == ()


def test_headers_are_taken_in_lower_case_and_numbers_as_they_are_written(loader: Loader) -> None:
    upstream = loader.upstream('headers: {X-Team: "Blue é", x-empty: "", x-number: 007, User-Agent: a}')
    assert upstream.headers == {"x-team": "Blue é", "x-empty": "", "x-number": "007", "user-agent": "a"}


@pytest.mark.parametrize(
    "name",
    "authorization x-api-key host content-length transfer-encoding connection accept-encoding cookie expect "
    "te upgrade keep-alive proxy-authorization content-type content-encoding trailer".split(),
)
def test_a_header_that_would_break_the_credential_or_the_framing_is_a_fault(
    loader: Loader, name: str
) -> None:
    for written in (name, name.title()):
        fault = loader.fault(one_upstream(f"headers: {{{written}: t0ken}}"))
        assert (
            fault
            == f"upstreams[0].headers.{written}: is a header that the proxy sets itself, expected another one"
        )


@pytest.mark.parametrize("name", ["x a", "x:a", "x\\na", "é", "", "x(a)", "${A}"])
def test_the_name_of_a_header_is_a_token(loader: Loader, name: str) -> None:
    fault = loader.fault(one_upstream(f'headers: {{"{name}": t0ken}}'))
    assert fault.startswith("upstreams[0].headers.")
    assert "is no name of a header" in fault


@pytest.mark.parametrize("value", ["a\\nb", "a\\rb", "a\\0b", "a\\tb", "a\\x7f", "黑", "a\\x85b"])
def test_the_value_of_a_header_is_one_printable_line(loader: Loader, value: str) -> None:
    assert loader.fault(one_upstream(f'headers: {{x-a: "{value}"}}')).startswith(
        "upstreams[0].headers.x-a: has a character that no header can hold"
    )


# --- Ways in and out ---


@pytest.mark.parametrize("path", ["/run/aiproxy/aiproxy.sock", "/a", "/with space/é", "/" + "x" * 106])
def test_listen_may_be_a_unix_socket(loader: Loader, path: str) -> None:
    config = loader.settings(f'listen: "unix:{path}"')
    assert (config.unix_socket, config.address) == (path, f"unix:{path}")


def test_without_a_unix_socket_there_is_none(loader: Loader) -> None:
    config = loader.settings("listen: 80")
    assert (config.unix_socket, config.address) == (None, "127.0.0.1:80")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "aiproxy.sock",
        "./a",
        "~/a",
        "//run/a",
        "///run/a",
        "/a\\0",
        "/a\\n/",
        "/a/unix:/b",
        "/" + "x" * 107,
    ],
)
def test_anything_else_is_no_unix_socket(loader: Loader, path: str) -> None:
    fault = loader.fault(f'listen: "unix:{path}"{UPSTREAMS}')
    assert re.fullmatch(
        'listen: is "unix:.*", expected an absolute path of at most 107 bytes, '
        "such as unix:/run/aiproxy/aiproxy.sock",
        fault,
    )


def test_a_unix_socket_s_path_is_bounded_in_bytes(loader: Loader) -> None:
    assert "107 bytes" in loader.fault(f'listen: "unix:/{"é" * 54}"{UPSTREAMS}')


def test_beside_a_unix_socket_bind_counts_for_nothing_and_no_keys_are_demanded(loader: Loader) -> None:
    config = loader.settings('listen: "unix:/run/a"\nbind: "0.0.0.0"')
    assert (config.address, config.may_serve_strangers) == ("unix:/run/a", False)


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("http://egress:3128", "http://egress:3128"),
        ("HTTP://egress.example.com/", "http://egress.example.com"),
        ("http://[::1]:8888", "http://[::1]:8888"),
        ("http://10.0.0.1:1", "http://10.0.0.1:1"),
        ("http://user@egress", "http://user@egress"),
        ("http://user:@egress", "http://user:@egress"),
        (
            "http://us%40er:p%3A%2F!$&'()*+,;=:x@egress:3128",
            "http://us%40er:p%3A%2F!$&'()*+,;=:x@egress:3128",
        ),
    ],
)
def test_a_proxy_is_an_http_url(loader: Loader, written: str, stored: str) -> None:
    assert loader.upstream(f'proxy: "{written}"').proxy == stored
    assert loader.upstream('proxy: "${EGRESS}"', EGRESS=written).proxy == stored


@pytest.mark.parametrize(
    "proxy", ["https://u:t0ken@a", "socks5://u:t0ken@a", "u:t0ken@a:1", "t0ken:3128", "//t0ken", ""]
)
def test_any_other_kind_of_proxy_is_told_to_be_unsupported(loader: Loader, proxy: str) -> None:
    told = "does not begin with http://, expected http://HOST:PORT: no other kind is supported"
    assert loader.fault(one_upstream(f'proxy: "{proxy}"')) == f"upstreams[0].proxy: {told}"


@pytest.mark.parametrize(
    "proxy",
    [
        "http://",
        "http:///",
        "http://u:t0ken@",
        "http://:t0ken@a",
        "http://u:t0ken@a:0",
        "http://u:t0ken@a:65536",
        "http://u:t0ken@a:x",
        "http://u:t0ken@a/b",
        "http://u:t0ken@a?b",
        "http://u:t0ken@[a]",
        "http://u:t0ken@a_b-",
        "http://u:t0ken@b@a",
        "http://u:t0ken/b@a",
        "http://u:t0ken#b@a",
        "http://u:t0ken%@a",
        "http://u:t0ken%zz@a",
        "http://u:t0ken x@a",
        "http://u:t0kené@a",
    ],
)
def test_a_proxy_that_is_no_whole_url_is_a_fault_that_does_not_show_it(loader: Loader, proxy: str) -> None:
    for told in (
        loader.fault(one_upstream(f'proxy: "{proxy}"')),
        loader.fault(one_upstream('proxy: "${EGRESS}"'), EGRESS=proxy),
    ):
        assert told.startswith(
            "upstreams[0].proxy: is no URL of a forward proxy, expected http://HOST:PORT or "
        )
        assert "percent-encoded" in told
        assert "t0ken" not in told


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


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (
            "nowhere.pem",
            'is "nowhere.pem", which cannot be read (No such file or directory), expected a file',
        ),
        ("config.yaml", 'is "config.yaml", which holds no certificate, expected certificates in PEM'),
        ("empty.pem", 'is "empty.pem", which holds no certificate, expected certificates in PEM'),
        (".", 'is ".", which '),
        ("''", 'is "", expected the path of a file with certificates in PEM'),
        ('"a\\0b"', "expected the path of a file"),
        ("[a.pem]", "is a list, expected text"),
    ],
)
def test_a_ca_bundle_that_is_none_is_a_fault(loader: Loader, written: str, told: str) -> None:
    (loader.path.parent / "empty.pem").touch()
    fault = loader.fault(one_upstream(f"ca_bundle: {written}"))
    assert fault.startswith("upstreams[0].ca_bundle: ")
    assert told in fault


def test_a_ca_bundle_for_an_upstream_without_tls_is_a_warning(loader: Loader) -> None:
    (loader.path.parent / "ca.pem").write_text(LOOPBACK_CERT)
    (warning,) = loader(one_upstream('base_url: "http://127.0.0.1"', "ca_bundle: ca.pem")).warnings
    told = "upstreams[0].ca_bundle: is of no use: base_url is http://, which knows no certificates"
    assert warning.endswith(told)
    assert loader(one_upstream("ca_bundle: ca.pem")).warnings == ()


@pytest.mark.parametrize("line", ['proxy: "http://a"', "ca_bundle: ca.pem"])
def test_a_demo_has_no_way_out(loader: Loader, line: str) -> None:
    (loader.path.parent / "ca.pem").write_text(LOOPBACK_CERT)
    told = "is of no use to a demo, which makes no connection, expected none"
    assert loader.fault(one_upstream('base_url: "demo://answers"', line)).endswith(told)


# --- Secrets ---


@pytest.mark.parametrize(
    "lines",
    [
        ['token: "t0ken x"'],
        ["token: [t0ken]"],
        ["token: {t0ken: t0ken}"],
        ["token: !t0ken x"],
        ['token: "t0ken${NOWHERE}"'],
        ['token: "t0ken${A"'],
        ["headers: t0ken"],
        ["headers: [t0ken]"],
        ["headers: {x-a: [t0ken]}"],
        ["headers: {x-a: {t0ken: t0ken}}"],
        ["headers: {x-a:t0ken}"],
        ['headers: {"x-a: t0ken": b}'],
        ['headers: {x-a: "t0ken\\n"}', "weight: x"],
        ["headers: {authorization: t0ken}"],
        ["tokens: t0ken"],
        ['"token=t0ken": x'],
        ['"token:t0ken": x'],
        ["weight: a", "  token=t0ken"],
        ["weight: sk-ant-t0ken"],
        ["weight: " + "t0ken" * 7],
        ["bind: x", "weight: https://u:t0ken@a"],
        ["model_mappings: {sk-t0ken: 1}"],
        ["available_models: t0ken"],
    ],
)
def test_no_fault_shows_a_secret_wherever_it_stands(loader: Loader, lines: list[str]) -> None:
    faults = loader.faults(
        one_upstream("token: spare", *lines) if lines[0][:5] != "token" else one_upstream(*lines)
    )
    assert faults
    assert "t0ken" not in "".join(faults)


def test_a_new_setting_that_is_marked_as_hidden_is_shown_by_no_reader(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = readers.hidden(readers.list_of(readers.above_zero))
    monkeypatch.setitem(schema._CONFIG, "api_keys", reader)
    assert loader.faults("api_keys: [t0ken, 1]" + UPSTREAMS) == [
        "api_keys[0]: is a text that is not shown here, expected a number above 0"
    ]


def test_no_printed_form_of_the_settings_shows_a_secret(loader: Loader) -> None:
    config = loader(one_upstream("headers: {x-key: hunter2}", 'proxy: "http://u:t0ken-2@egress"'))
    upstream = config.upstreams[0]
    forms: list[Callable[[Any], str]] = [repr, str, lambda value: f"{value} {[value]} {(value,)!s}"]
    for form in forms:
        for value in (config, upstream, config.upstreams):
            assert "t0ken" not in form(value)
            assert "hunter2" not in form(value)
    assert "t0ken" not in str(upstream.__rich_repr__())
    assert "hunter2" not in str(upstream.__rich_repr__())
    assert "name='api.example.com'" in repr(config)
    assert "headers={'x-key': '...'}" in repr(config)


@pytest.mark.parametrize("text", ["token: 't0ken", "- t0ken", "\x00t0ken", one_upstream("token: t0ken x")])
def test_the_traceback_of_a_fault_shows_no_secret(loader: Loader, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loader(text)
    assert "t0ken" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


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


def test_client_keys_are_strings_or_have_a_name(loader: Loader) -> None:
    config = loader.settings(
        'api_keys: [t0ken-1, {name: alice, key: "${A}"}, "t0ken-3"]',
        A="t0ken-2",
    )
    assert config.api_keys == (
        ClientKey("key-1", "t0ken-1"),
        ClientKey("alice", "t0ken-2"),
        ClientKey("key-3", "t0ken-3"),
    )
    assert "t0ken" not in repr(config)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("api_keys: []", "api_keys: is an empty list, expected at least one key"),
        ("api_keys: t0ken", "api_keys: is a single value, expected a list"),
        ('api_keys: [""]', "api_keys[0]: is blank, expected a key"),
        ("api_keys: [[t0ken]]", "api_keys[0]: is a list, expected text"),
        ('api_keys: ["t0ken with spaces"]', "api_keys[0]: has a space"),
        ("api_keys: [{name: alice}]", "api_keys[0].key: is missing"),
        ("api_keys: [{key: t0ken}]", "api_keys[0].name: is missing"),
        ("api_keys: [{name: a, kye: t0ken}]", "api_keys[0].kye: is no setting, did you mean key?"),
        ("api_keys: [{name: a, key: t0ken-1}, {name: a, key: t0ken-2}]", "api_keys[1].name: is another"),
        ("api_keys: [t0ken, t0ken]", "api_keys[1]: is the same key"),
        ("allow_anonymous: maybe", "allow_anonymous: "),
        ("affinity: sticky", 'affinity: is "sticky", expected none, prompt_cache or prefix'),
        ("max_in_flight: 0", "max_in_flight: is 0, expected a whole number, 1 or more"),
    ],
)
def test_faults_of_client_keys_and_routing_are_told_without_a_key(
    loader: Loader, text: str, told: str
) -> None:
    faults = loader.faults(text + UPSTREAMS)
    assert any(fault.startswith(told) for fault in faults), faults
    assert "t0ken" not in "".join(faults)


@pytest.mark.parametrize(
    ("spelt", "cores", "quota", "workers"),
    [
        ("1", 2, "max 100000", 1),
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


@pytest.mark.parametrize("spelt", ["0", "-1", "1.5", "many", "[]"])
def test_other_workers_are_a_fault(tmp_path, spelt):
    path = tmp_path / "config.yaml"
    path.write_text(f"workers: {spelt}\nupstreams: [{{base_url: 'demo://answers'}}]\n")
    with pytest.raises(ConfigError, match="workers: is "):
        load(path)


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


def test_state_is_memory_unless_given(loader: Loader) -> None:
    assert loader.settings("").state is None
    assert loader.settings("state: memory").state is None


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        "http://:t0ken@a",
        "redis://",
        "redis://:t0ken@",
        "redis://:t0ken@a:65536",
        "redis://:t0ken@a/zero",
        "redis://a?password=t0ken",
        "redis://:t0 ken@a",
        "unix://",
        "t0ken",
    ],
)
def test_any_other_state_is_a_fault_that_does_not_show_it(loader: Loader, url: str) -> None:
    for told in (
        loader.fault(f'state: "{url}"{UPSTREAMS}'),
        loader.fault(f'state: "${{STATE}}"{UPSTREAMS}', STATE=url),
    ):
        assert told.startswith("state: is neither local nor the URL of a Redis server, expected ")
        assert "t0ken" not in told


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="cannot be read \\(no regular file\\)"):
        load(tmp_path / "config.yaml", {})


def test_a_file_of_more_than_a_megabyte_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="is larger than 1 MB"):
        load(path, {})


def test_a_socket_s_path_that_is_taken_by_a_file_is_a_fault_and_a_missing_directory_only_odd(
    tmp_path: Path, loader: Loader
) -> None:
    (tmp_path / "taken").touch()
    assert "is there and is no socket" in loader.fault(f'listen: "unix:{tmp_path}/taken"{UPSTREAMS}')
    config = loader.settings(f'listen: "unix:{tmp_path}/none/a.sock"')
    told = f"{loader.path}: listen: is in a directory that does not exist yet"
    assert placeless(config.warnings) == (told,)


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


def test_what_variables_stand_for_is_known_and_not_shown(loader: Loader) -> None:
    config = loader("upstreams: [{base_url: 'https://a.test/${KEY}', token: sk-test-a}]", KEY="very-secret")
    assert config.substituted.are_in("https://a.test/very-secret/")
    assert "very-secret" not in repr(config.substituted)
    assert not config.substituted.are_in("https://a.test/")


# --------------------------------------------------------------------------------- the file of variables


def test_a_variable_of_the_env_file_wins_over_the_environment(loader: Loader, tmp_path: Path) -> None:
    lines = ["# people", "", "ONE = 'sk-test one'", 'export TWO="sk-test-two"', "THREE=sk-test=three "]
    (tmp_path / "keys").write_text("\n".join(lines))
    keys = "[{name: a, key: '${TWO}'}, {name: b, key: '${THREE}'}, {name: c, key: '${FOUR}'}]"
    config = loader.settings(f"env_file: keys\napi_keys: {keys}", TWO="not this", FOUR="sk-test-four")
    assert [each.key for each in config.api_keys] == ["sk-test-two", "sk-test=three", "sk-test-four"]
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


@pytest.mark.parametrize(
    ("base_url", "warns"),
    [
        ("http://gateway.example.com", True),
        ("http://10.0.0.7:80", True),
        ("http://127.0.0.1:1", False),
        ("http://localhost:1", False),
        ("http://[::1]:1", False),
        ("https://gateway.example.com", False),
    ],
)
def test_a_token_that_goes_in_clear_to_another_host_draws_a_warning(
    loader: Loader, base_url: str, warns: bool
) -> None:
    warnings = loader(one_upstream(f'base_url: "{base_url}"')).warnings
    assert [each.partition(": ")[2] for each in placeless(warnings)] == [
        "upstreams[0].base_url: is http:// to another host: the token goes over the network in clear"
    ] * warns
