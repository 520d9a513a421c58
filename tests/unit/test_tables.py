"""The tables are the only places of their kind: architectures in core/arch, versions in quirks and
versions.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import QemuVersion
from qmpvcpu.core.arch import ROWS, architecture, architecture_of_machine, examined
from qmpvcpu.core.machine import versions
from qmpvcpu.core.quirks import QUIRKS, Trigger

HOUSE = Path(qmpvcpu.__file__).parent
NAMES = frozenset(name for row in ROWS for name in (row.name, *row.aliases))
ARCH_TABLE = {"core/arch.py"}
VERSION_TABLES = {"core/quirks.py", "core/machine/versions.py"}
ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def names_an_architecture(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in NAMES


def last_name(node: ast.AST) -> str:
    """`version` of `self.state.version`; of a call, the function's."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=called):
            return last_name(called)
    return ""


def is_a_version(node: ast.AST) -> bool:
    name = last_name(node)
    return name in ("qemu", "compat", "QemuVersion") or "version" in name.lower()


def compares_versions(node: ast.AST) -> bool:
    """A literal version, or one that is put in order with another or looked up among others."""
    if isinstance(node, ast.Call) and last_name(node) == "QemuVersion":
        return any(isinstance(argument, ast.Constant) for argument in node.args)
    if not isinstance(node, ast.Compare):
        return False
    is_order = any(isinstance(operator, ORDER) for operator in node.ops)
    is_equality = any(
        isinstance(operator, (ast.Eq, ast.NotEq, ast.In, ast.NotIn)) for operator in node.ops
    )
    sides = [node.left, *node.comparators]
    # A cgroup hierarchy has a version too: V1 or V2.
    is_cgroup = any(last_name(side) in ("V1", "V2", "_V1", "_V2") for side in sides)
    return (is_order or (is_equality and not is_cgroup)) and any(
        is_a_version(side) for side in sides
    )


def places(found, allowed: set[str], folder: Path = HOUSE) -> list[str]:
    lines = []
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if name in allowed:
            continue
        tree = ast.parse(path.read_text())
        lines += [f"{name}:{node.lineno}" for node in ast.walk(tree) if found(node)]
    return lines


def test_an_architecture_is_named_in_its_table_alone():
    assert places(names_an_architecture, ARCH_TABLE) == []


def test_a_version_is_compared_in_the_two_tables_alone():
    assert places(compares_versions, VERSION_TABLES) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('is_x86 = state.arch == "x86_64"', names_an_architecture),
        ('if arch.startswith("ppc64"): pass', names_an_architecture),
        ('TABLE = {"i686": 1}', names_an_architecture),
        ("old = state.version < FIXED", compares_versions),
        ("old = FIXED > state.qemu", compares_versions),
        ("FIXED = QemuVersion(9, 2)", compares_versions),
        ("same = layout.version == known", compares_versions),
    ],
)
def test_these_tests_find_a_comparison_that_is_put_elsewhere(tmp_path, line, found):
    (tmp_path / "elsewhere.py").write_text(f"{line}\n")
    assert places(found, set(), tmp_path) == ["elsewhere.py:1"]


# -- architectures ---------------------------------------------------------------------------------


def test_every_name_has_one_row():
    names = [name for row in ROWS for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "target"),
    [("i686", "i386"), ("ppc64le", "ppc64"), ("armv7l", "arm"), ("armv6l", "arm")],
)
def test_libvirts_name_gives_qemus_row(name, target):
    assert architecture(name) is architecture(target)


def test_nothing_is_forbidden_to_an_unknown_architecture():
    row = architecture("vax")
    assert (row.name, row.can_plug, row.can_unplug, row.identity) == ("vax", True, True, None)


def test_what_cannot_plug_cannot_unplug():
    assert not [row.name for row in ROWS if row.can_unplug and not row.can_plug]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_can_plug_names_the_machines_that_do(row):
    assert (row.hotplug_machines is not None) == row.can_plug


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_can_plug_says_how_many_slots_are_computed(row):
    assert bool(row.most_computed) == row.can_plug


@pytest.mark.parametrize("row", examined(), ids=lambda row: row.name)
def test_a_machine_name_leads_back_to_its_row(row):
    for name in row.machine_names:
        assert architecture_of_machine(f"{name}-10.0,usb=off") is row


@pytest.mark.parametrize(
    ("machine", "target"),
    [
        ("q35", "x86_64"),
        ("pc-q35-7.2", "x86_64"),
        ("pc", "x86_64"),
        ("pc-i440fx-10.0", "x86_64"),
        ("pseries,cap-cfpc=broken", "ppc64"),
        ("s390-ccw-virtio-8.2", "s390x"),
    ],
)
def test_the_machine_tells_its_target(machine, target):
    assert architecture_of_machine(machine) is architecture(target)


@pytest.mark.parametrize("family", versions._OLDEST_TYPES)
def test_what_is_known_of_a_machine_family_is_known_of_one_architecture(family):
    """Two targets that are one in this (i386 and x86_64) have one pattern. Others need tables of
    their own.
    """
    patterns = {row.hotplug_machines for row in ROWS if row.computes(f"{family}-9.0")}
    assert len(patterns) == 1


def test_a_machine_that_several_targets_have_tells_none():
    assert architecture_of_machine("virt") is None


# -- defects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", QUIRKS, ids=lambda row: row.id)
def test_a_defect_is_told_whole(row):
    assert row.effect
    assert row.seen
    assert row.triggers
    assert bool(row.message and row.hint) == row.is_refused


@pytest.mark.parametrize("row", QUIRKS, ids=lambda row: row.id)
def test_a_defect_is_in_the_versions_where_it_was_seen_and_not_where_it_is_fixed(row):
    for text in row.seen:
        assert row.is_in(QemuVersion(*map(int, text.split("."))))
    assert row.fixed is None or not row.is_in(row.fixed)


@pytest.mark.parametrize("row", [row for row in QUIRKS if row.came is None], ids=lambda row: row.id)
def test_an_older_version_counts_as_having_it(row):
    assert row.is_in(QemuVersion(6, 0))


@pytest.mark.parametrize("row", QUIRKS, ids=lambda row: row.id)
@pytest.mark.parametrize(("alias", "target"), [("i686", "i386"), ("ppc64le", "ppc64")])
def test_a_domain_of_libvirts_meets_every_defect_of_its_target(row, alias, target):
    accel, version = row.accel or "kvm", QemuVersion(*map(int, row.seen[0].split(".")))
    assert row.affects(alias, accel, version) == row.affects(target, accel, version)


def test_ids_are_unique():
    assert len({row.id for row in QUIRKS}) == len(QUIRKS)


def test_what_a_reset_sets_off_is_never_refused():
    assert not [row.id for row in QUIRKS if Trigger.RESET in row.triggers and row.is_refused]


# -- versions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "around"),
    [((8, 2), [(7, 2), (10, 0)]), ((10, 1, 3), [(10, 0), (11, 1)]), ((7, 1), []), ((11, 2), [])],
)
def test_an_unmeasured_version_lies_between_two_measured_ones(version, around):
    assert list(versions.enclosing(QemuVersion(*version))) == [
        QemuVersion(*each) for each in around
    ]


@pytest.mark.parametrize(("machine", "rules"), [("pc-q35-6.1", (6, 1)), ("q35", (10, 0))])
def test_a_machine_type_keeps_the_rules_of_its_own_version(machine, rules):
    assert versions.compat_version(machine, QemuVersion(10, 0, 2)) == QemuVersion(*rules)


@pytest.mark.parametrize(
    ("machine", "version"),
    [
        ("pc-q35-10.0", (10, 0)),
        ("pseries-7.2", (7, 2)),
        ("s390-ccw-virtio-11.1", (11, 1)),
        ("q35", (0, 0)),
        ("pc-i440fx-bookworm", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_the_oldest_qemu_that_has_a_machine(machine, version):
    assert versions.oldest_with(machine) == QemuVersion(*version)
