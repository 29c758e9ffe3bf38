"""What a configuration is read from: its file, and the file of NAME=value lines that it may name."""

import functools
import hashlib
import re
from pathlib import Path

import msgspec
import yaml

from .document import content_of
from .settings import ConfigError

_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")


class Sources(msgspec.Struct, frozen=True):
    """Both files as they were read at one time; None for one that is not there, or not named."""

    config: bytes | None = None
    env: bytes | None = None

    @property
    def digest(self) -> str:
        """A name for this content, by which people compare two."""
        content = (self.config or b"") + (b"" if self.env is None else b"\0" + self.env)
        return hashlib.sha256(content).hexdigest()[:12]


def read_sources(path: Path) -> Sources:
    """The configuration file and its `env_file`, as far as they can be read."""
    config = _content(path)
    env_file = env_file_of(config) if config is not None else None
    return Sources(config, _content(path.parent / env_file) if env_file is not None else None)


@functools.lru_cache(maxsize=2)
def env_file_of(config: bytes) -> str | None:
    """The `env_file` that a configuration names; None also where the configuration is not valid YAML."""
    try:
        node = yaml.compose(config.decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError):
        return None
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == "env_file" and isinstance(value, yaml.ScalarNode) and value.tag.endswith(":str"):
            return str(value.value).strip() or None
    return None


def variables_of(name: str, content: bytes) -> dict[str, str]:
    """The variables of an `env_file`, which is called `name`.

    A line is `NAME=value`, with `export` before it and quotes around the value if one likes; empty lines and
    lines that begin with `#` are skipped. Raises `ConfigError` with all faults, without any value.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"{name}: is not UTF-8 (byte {error.start + 1}), expected text in UTF-8"]
        ) from None
    found: dict[str, str] = {}
    faults = []
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        parts = _LINE.fullmatch(stripped)
        if parts is None:
            faults.append(f"{name}: line {number}: is not of the form NAME=value")
        elif parts[1] in found:
            faults.append(f"{name}: line {number}: {parts[1]} is given twice, expected once")
        else:
            quoted = _QUOTED.fullmatch(parts[2])
            found[parts[1]] = (quoted[1] or quoted[2] or "") if quoted else parts[2]
    if faults:
        raise ConfigError(faults)
    return found


def _content(path: Path) -> bytes | None:
    try:
        return content_of(path)
    except OSError:
        return None
