"""The list of modules in docs/architecture.md: complete, and none imports from one below itself."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_ROW = re.compile(r"^\| (?:`(\w+)/`)? ?\| `(\w+)` \|", re.MULTILINE)


def listed():
    """The modules' full names, in the document's order."""
    package, found = "", []
    text = (ROOT / "docs" / "architecture.md").read_text()
    for begun, module in _ROW.findall(text[text.index("## Modules") :]):
        package = begun or package
        found.append(f"aiproxy.{module}" if package == "aiproxy" else f"aiproxy.{package}.{module}")
    return found


def there_are():
    for path in (ROOT / "aiproxy").rglob("*.py"):
        if not path.stem.startswith("__"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(module, modules):
    """Which of the modules this one imports; a package stands for the last of its modules."""
    last = {each.rpartition(".")[0]: each for each in modules} | {each: each for each in modules}
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = ".".join([*module.split(".")[: -node.level], node.module or ""]).rstrip(".")
            base = base if node.level else node.module
            names = [f"{base}.{each.name}" for each in node.names]
            known = [each for each in names if each in last]
            found = known if len(known) == len(names) else [*known, base]
        elif isinstance(node, ast.Import):
            found = [each.name for each in node.names]
        else:
            found = [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        yield from (last[each] for each in found if each in last and each != "aiproxy")


def test_every_module_is_listed_once():
    assert sorted(listed()) == sorted(there_are())


@pytest.mark.parametrize("module", sorted(there_are()))
def test_a_module_imports_only_from_those_above_it_in_the_list(module):
    order = listed()
    assert [each for each in imported(module, order) if order.index(each) >= order.index(module)] == []
