"""The catalogue of reasons and who uses it, by the syntax tree: no text fails only when it is
needed.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Final

import pytest

import qmpvcpu
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.catalogue import Reason

HOUSE: Final = Path(qmpvcpu.__file__).parent
CATALOGUE: Final = HOUSE / "core/rules/catalogue.py"
ROWS: Final = {name: row for name, row in vars(catalogue).items() if isinstance(row, Reason)}
TREES: Final = {path: ast.parse(path.read_text()) for path in sorted(HOUSE.rglob("*.py"))}
USERS: Final = [path for path in TREES if path != CATALOGUE]
#: Codes that had two meanings before there was a catalogue, and are stable.
OF_TWO_TOPICS: Final = {"place", "feature"}


def fields_of(row: Reason) -> set[str]:
    """The names that a call gives, `ids` apart."""
    found = Formatter().parse(row.text + (row.hint or ""))
    return {re.split(r"[.\[]", name)[0] for _, name, _, _ in found if name} - {"ids"}


def row_of(node: ast.expr) -> str | None:
    """`RANGE` of `catalogue.RANGE`."""
    match node:
        case ast.Attribute(value=ast.Name(id="catalogue"), attr=name) if name in ROWS:
            return str(name)
    return None


def called(call: ast.Call) -> ast.expr:
    """The row of a call of it, `.error` or not."""
    match call.func:
        case ast.Attribute(value=row, attr="error"):
            return row
    return call.func


def wrong(row: Reason, call: ast.Call) -> str | None:
    """In what a call does not give what the row needs."""
    given = {word.arg for word in call.keywords}
    if given != fields_of(row):
        return f"gives {given}, and the text has {fields_of(row)}"
    if "{ids}" in row.text + (row.hint or "") and not call.args:
        return "gives no ids, and the text names them"
    return None


@cache
def uses(path: Path) -> list[tuple[str, str | None]]:
    """Each use of a row in a file, and what is wrong with it; a table or a loop calls its rows as
    `reason(…)`.
    """
    found: list[tuple[str, str | None]] = []
    nodes = list(ast.walk(TREES[path]))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    direct = {called(call): call for call in calls if row_of(called(call))}
    read = {
        node.value
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr in Reason._fields
    }
    for node in nodes:
        if not isinstance(node, ast.Attribute) or (name := row_of(node)) is None:
            continue
        if node in direct or node in read:
            found.append((name, wrong(ROWS[name], direct[node]) if node in direct else None))
            continue
        functions = [
            one for one in nodes if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        around = [one for one in functions if one.lineno <= node.lineno <= (one.end_lineno or 0)]
        inside = [
            call
            for call in ast.walk(around[-1] if around else TREES[path])
            if isinstance(call, ast.Call)
        ]
        by_name = [
            call
            for call in inside
            if isinstance(at := called(call), ast.Name) and at.id == "reason"
        ]
        fits = any(wrong(ROWS[name], call) is None for call in by_name)
        found.append(
            (
                name,
                None if fits else "is given to nobody who calls it as `reason(…)` with its fields",
            )
        )
    return found


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(HOUSE)))
def test_each_call_gives_the_fields_of_its_row(path: Path) -> None:
    assert [(name, fault) for name, fault in uses(path) if fault is not None] == []


def test_every_row_is_used() -> None:
    assert set(ROWS) - {name for path in USERS for name, _ in uses(path)} == set()


def test_refusals_are_made_of_rows() -> None:
    makers = {
        (str(path.relative_to(HOUSE)), name)
        for path, tree in TREES.items()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and (name := ast.unparse(call.func).split(".")[-1]) in ("Refusal", "Reason")
    }
    assert makers == {
        ("core/rules/catalogue.py", "Refusal"),
        ("core/rules/catalogue.py", "Reason"),
        # The rows of QEMU's defects.
        ("core/rules/hotplug.py", "Reason"),
    }


def test_codes_have_one_topic() -> None:
    topic = ""
    topics: dict[str, set[str]] = {}
    for line in CATALOGUE.read_text().splitlines():
        if line.startswith("# -- "):
            topic = line
        elif (name := line.partition(" ")[0]) in ROWS:
            topics.setdefault(ROWS[name].code, set()).add(topic)
    assert {code for code, found in topics.items() if len(found) > 1} == OF_TWO_TOPICS


def test_a_text_is_formatted_once() -> None:
    assert str(catalogue.UNREADABLE(why="'{here}' is wrong").message).endswith("'{here}' is wrong")


def test_lists_of_numbers_are_written_as_virsh_does() -> None:
    refusal = catalogue.CONFIG_ORDER((1, 2, 3), behind=[5, 6])
    assert refusal.ids == (1, 2, 3)
    assert "vCPU 1-3 cannot change" in refusal.message
    assert refusal.hint is not None and refusal.hint.startswith("change 5-6 with it")
