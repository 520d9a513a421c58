"""Hotplug cases as data: tests/cases/*.toml, checked key by key. `run_case` carries one out.

docs/contributing.md, "Add a case", has an example of every part.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CASES = Path(__file__).resolve().parents[1] / "cases"

MACHINE = {
    "recording",
    "plugged",
    "process",
    "accel",
    "threads",
    "version",
    "arch",
    "status",
    "firmware",
    "qom",
    "x2apic",
    "stopped",
}
QEMU = {"device_add", "device_del", "when", "other_devices", "first", "status"}
GUEST = {
    "offline",
    "appears",
    "as_online",
    "fixed",
    "disabled",
    "silent",
    "garbage",
    "errors",
    "lies",
}
EXPECT = {
    "agent",
    "commands",
    "diff",
    "error",
    "exit",
    "hint",
    "json",
    "libvirt",
    "message",
    "messages",
    "offline",
    "online",
    "outcome",
    "pending",
    "plugged",
    "refusals",
    "rewritten",
    "seconds_below",
    "stderr",
    "stdout",
    "xml",
    "xml_contains",
}
STEP = {"request", "qemu", "guest", "expect"}
CASE = STEP | {"name", "machine", "definition", "domain", "file", "steps", "rows"}
FILE = {"machine", "guest", "definition", "case"}
WHEN = {"command", "nth", "do"}


@dataclass
class Step:
    """One run of the command line, and what is changed before it."""

    request: str
    qemu: dict[str, Any]
    guest: dict[str, Any]
    expect: dict[str, Any]


@dataclass
class Case:
    """One case: where it stands, its world, and its steps."""

    id: str
    machine: dict[str, Any]
    steps: list[Step]
    guest: dict[str, Any] | None = None
    definition: str | None = None
    domain: str = "name"
    file: str | None = None


class CaseError(Exception):
    """A case file has what no case has."""


def _check(where: str, table: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(table.keys() - known):
        raise CaseError(
            f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )


def _step(where: str, table: dict[str, Any]) -> Step:
    step = Step(
        table["request"], table.get("qemu", {}), table.get("guest", {}), table.get("expect", {})
    )
    _check(f"{where}: qemu", step.qemu, QEMU)
    _check(f"{where}: guest", step.guest, GUEST)
    _check(f"{where}: expect", step.expect, EXPECT)
    for rule in step.qemu.get("when", ()):
        _check(f"{where}: qemu.when", rule, WHEN)
    return step


def _with_rows(where: str, tables: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A case with `rows` stands for one case a row, whose tables are laid over its own."""
    for table in tables:
        rows = table.pop("rows", [{}])
        for row in rows:
            _check(f"{where}: rows of {table.get('name')}", row, CASE - {"steps", "rows"})
            made = table | row
            if "name" in table and "name" in row:
                made["name"] = f"{table['name']}: {row['name']}"
            for name in ("machine", "qemu", "guest", "expect"):
                if name in table and name in row:
                    made[name] = table[name] | row[name]
            yield made


def load(path: Path) -> list[Case]:
    """The cases of one file.

    Raises:
        CaseError: it has a key that no case has, or a case without a name, request or expectation.
    """
    text = tomllib.loads(path.read_text())
    _check(path.name, text, FILE)
    _check(f"{path.name}: machine", text.get("machine", {}), MACHINE)
    cases = []
    for table in _with_rows(path.name, text["case"]):
        where = f"{path.name}: {table.get('name', 'a case without a name')}"
        _check(where, table, CASE)
        machine = text.get("machine", {}) | table.get("machine", {})
        _check(f"{where}: machine", machine, MACHINE)
        for step in table.get("steps", ()):
            _check(f"{where}: steps", step, STEP)
        if "name" not in table or ("request" in table) == ("steps" in table):
            raise CaseError(f"{where}: a case has a name, and either a request or steps")
        tables = table.get("steps", [table])
        steps = [_step(where, step) for step in tables]
        if not any(step.expect for step in steps):
            raise CaseError(f"{where}: nothing is expected")
        guest = table.get("guest", text.get("guest"))
        cases.append(
            Case(
                f"{path.stem}::{table['name']}",
                machine,
                steps,
                guest if guest is not None or not any(step.guest for step in steps) else {},
                table.get("definition", text.get("definition")),
                table.get("domain", "name"),
                table.get("file"),
            )
        )
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            raise CaseError(f"{path.name}: two cases have the name {case.id.partition('::')[2]}")
        seen.add(case.id)
    return cases


def load_all() -> list[Case]:
    return [case for path in sorted(CASES.glob("*.toml")) for case in load(path)]
