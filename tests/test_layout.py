"""The README's list of modules: complete, and none imports from one below itself."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_ROW = re.compile(r"^\| (?:`(\w+)/`)? ?\| `(\w+)` \|", re.MULTILINE)


def listed():
    """The modules' full names, in the README's order."""
    package, found = "", []
    text = (ROOT / "README.md").read_text()
    for begun, module in _ROW.findall(text[text.index("## Architecture") :]):
        package = begun or package
        found.append(f"aiproxy.{module}" if package == "aiproxy" else f"aiproxy.{package}.{module}")
    return found


def there_are():
    for path in (ROOT / "aiproxy").rglob("*.py"):
        if not path.stem.startswith("__"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(module, modules):
    """Which of the modules this one imports."""
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            yield from {base, *(f"{base}.{each.name}" for each in node.names)} & set(modules)


def test_every_module_is_listed_once():
    assert sorted(listed()) == sorted(there_are())


@pytest.mark.parametrize("module", sorted(there_are()))
def test_a_module_imports_only_from_those_above_it_in_the_list(module):
    order = listed()
    assert [each for each in imported(module, order) if order.index(each) >= order.index(module)] == []
