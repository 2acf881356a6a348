"""Order in the house: maps that are true, errors with their condition, tests that stand alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

import nf4_pipeline
import pytest

ROOT: Final = Path(nf4_pipeline.__file__).parent
TESTS: Final = Path(__file__).parent
PACKAGES: Final = sorted(path.parent for path in ROOT.rglob("__init__.py"))
MODULES: Final = sorted(ROOT.rglob("*.py"))

_RAISES: Final = re.compile(r"^( *)Raises:\n((?:\1 +.*\n|\n)*)", re.M)
_ENTRY: Final = re.compile(r"^( *)(\w+): (.*(?:\n\1 +.*)*)", re.M)
_NO_CONDITION: Final = re.compile(r"(so )?(it|they|that|those)\b|there (is|are) (none|one)\b")
"""A condition that names nothing: who reads the line must not have to guess what "it" is."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT.parent).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text + "\n"


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_the_map_lists_every_module_and_nothing_else(package: Path) -> None:
    """Modules as `name.py`, packages as `name/`; what stands elsewhere is named with its folder."""
    text = ast.get_docstring(tree(package / "__init__.py")) or ""
    # A line of a map begins with the name; elsewhere in the text, `room/module.py` is no entry.
    listed = set(re.findall(r"(?<![\w/.])(\w+\.py|\w+/(?!\w))", text))
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert sorted(modules | rooms) == sorted(
        name for name in listed if name.endswith(".py") or name in rooms
    )


def conditions(path: Path) -> Iterator[tuple[str, str]]:
    """Every error in every "Raises" of a module, with what is said of it."""
    for text in docstrings(path):
        for section in _RAISES.finditer(text):
            for entry in _ENTRY.finditer(section[2]):
                yield entry[2], " ".join(entry[3].split())


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_every_error_has_its_condition(module: Path) -> None:
    vague = [
        f"{error}: {condition}"
        for error, condition in conditions(module)
        if _NO_CONDITION.match(condition) or len(condition.split()) < 3
    ]
    assert vague == []


def test_conditions_are_found() -> None:
    assert len([pair for module in MODULES for pair in conditions(module)]) > 80
    for vague in ("it is not.", "so it is, or it is no file.", "they differ.", "there is none."):
        assert _NO_CONDITION.match(vague)


def test_no_test_imports_another() -> None:
    imports = [
        (path.relative_to(TESTS).as_posix(), name)
        for path in sorted(TESTS.rglob("*.py"))
        for node in ast.walk(tree(path))
        for name in _imported(node)
    ]
    assert [found for found in imports if re.search(r"(^|\.)(test_|conftest)", found[1])] == []


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module or ''}.{alias.name}" for alias in node.names if node.module]
    return []


def modules_imported(module: ast.Module, known: Collection[str]) -> set[str]:
    """Those of some modules that one imports, anywhere in it, but for types alone."""
    found: set[str] = set()
    left: list[ast.AST] = [module]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            left += node.orelse
            continue
        left += ast.iter_child_nodes(node)
        for name in _imported(node):
            found.add(name if name in known else name.rpartition(".")[0])
    return found & set(known)


def circle_in(imports: Mapping[str, Collection[str]]) -> list[str]:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Nor by an import in a function; that of `import-linter` sees rooms alone."""
    names = {
        name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for path in MODULES
    }
    imports = {name: modules_imported(tree(path), names) - {name} for name, path in names.items()}
    assert sum(map(len, imports.values())) > 1000
    assert circle_in(imports) == []


@pytest.mark.parametrize(
    ("importing", "imported"),
    [
        ("import nf4_pipeline.b", {"nf4_pipeline.b"}),
        ("from nf4_pipeline.b import c", {"nf4_pipeline.b"}),
        ("from nf4_pipeline import b", {"nf4_pipeline.b"}),
        ("def f():\n    from nf4_pipeline.b import c", {"nf4_pipeline.b"}),
        ("try:\n    import nf4_pipeline.b\nexcept ImportError:\n    pass", {"nf4_pipeline.b"}),
        ("if TYPE_CHECKING:\n    import nf4_pipeline.b", set()),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import nf4_pipeline.b", {"nf4_pipeline.b"}),
        ("import numpy as b", set()),
    ],
)
def test_circles_are_found(importing: str, imported: set[str]) -> None:
    known = ("nf4_pipeline.a", "nf4_pipeline.b", "nf4_pipeline.c")
    found = modules_imported(ast.parse(importing), known)
    assert found == imported
    circle = circle_in({known[0]: found, known[1]: {known[2]}, known[2]: {known[0]}})
    assert {*circle} == ({*known} if imported else set())


def test_tests_stand_where_their_modules_do() -> None:
    """A folder of tests is called as the package is that it tests."""
    others = {"campaigns", "contracts", "docs", "golden", "gpu", "support"}
    folders = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    rooms = {path.relative_to(ROOT).as_posix() for path in PACKAGES}
    assert folders - rooms - others == set()


def test_temporary_folders_are_made_where_they_are_also_cleared() -> None:
    """What a killed process leaves, the next one finds by its name."""
    makers = {
        name_of(module)
        for module in MODULES
        if re.search(r"\b(TemporaryDirectory|mkdtemp)\(", module.read_text("utf-8"))
    }
    assert makers == {"nf4_pipeline/processes/temporary.py"}
