"""Rules of the house and of this suite, held by their syntax trees."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import qmpvcpu

TESTS = Path(__file__).resolve().parents[1]
#: Faces that a user imports by name.
FACES = {"qmpvcpu.cli", "qmpvcpu.sync", "qmpvcpu.pytest_plugin"}
PUBLIC_MODULES = FACES | {"qmpvcpu"}
#: Tests of a part by itself: the tables that a mend is a row of, and the ground that nothing public
#: shows.
PARTS = {
    "unit/test_aio.py": ("qmpvcpu.aio",),
    "unit/test_catalogue.py": ("qmpvcpu.core.rules.catalogue",),
    "unit/test_tables.py": ("qmpvcpu.core.arch", "qmpvcpu.core.quirks", "qmpvcpu.core.machine"),
}


def private_imports(path: Path) -> set[str]:
    """The names that a file imports from within qmpvcpu."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names} - PUBLIC_MODULES
        elif isinstance(node, ast.ImportFrom) and node.module not in FACES:
            # `from qmpvcpu.errors import VcpuError` is the long way to a public name.
            found |= {
                f"{node.module}.{name.name}"
                for name in node.names
                if name.name not in qmpvcpu.__all__
            }
    return {name for name in found if name.partition(".")[0] == "qmpvcpu"}


FILES = {
    str(path.relative_to(TESTS)): path
    for path in sorted(TESTS.rglob("*.py"))
    if "support" not in path.relative_to(TESTS).parts
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_test_imports_public_names_and_those_of_support(name):
    parts = PARTS.get(name, ())
    assert [
        found
        for found in sorted(private_imports(FILES[name]))
        if not found.startswith(parts or "-")
    ] == []


PRODUCT = Path(qmpvcpu.__file__).parent


def public_classes() -> Counter[str]:
    """How many public classes have each name, those inside of other classes and of functions too."""
    nodes = (
        node for path in PRODUCT.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
    )
    return Counter(
        n.name for n in nodes if isinstance(n, ast.ClassDef) and not n.name.startswith("_")
    )


def test_one_name_means_one_class():
    assert {name for name, count in public_classes().items() if count > 1} == set()


def function_imports(path: Path) -> list[str]:
    """Imports inside of functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    functions = (node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [
        ast.unparse(n)
        for f in functions
        for n in ast.walk(f)
        if isinstance(n, ast.Import | ast.ImportFrom)
    ]


def test_only_the_command_line_and_the_face_import_inside_of_functions():
    may = {PRODUCT / "__init__.py", *(PRODUCT / "cli").rglob("*.py")}
    found = {str(path): function_imports(path) for path in PRODUCT.rglob("*.py") if path not in may}
    assert {name: imports for name, imports in found.items() if imports} == {}
