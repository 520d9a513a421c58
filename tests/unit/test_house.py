"""Rules of this suite, held by its syntax trees: tests judge what qmpvcpu does by its public names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qmpvcpu

TESTS = Path(__file__).resolve().parents[1]
#: Faces that a user imports by name.
FACES = {"qmpvcpu.cli", "qmpvcpu.sync", "qmpvcpu.pytest_plugin"}
PUBLIC_MODULES = FACES | {"qmpvcpu"}
#: Tests of a part by itself: the tables that a mend is a row of, and the ground that nothing public shows.
PARTS = {
    "unit/test_aio.py": ("qmpvcpu.aio",),
    "unit/test_tables.py": ("qmpvcpu.core.arch", "qmpvcpu.core.quirks", "qmpvcpu.core.machine"),
}
#: Files that still import what is private. A file that no longer does is to leave this list.
NOT_YET = frozenset(
    {
        "unit/test_interrupted.py",
        "app/test_kills.py",
        "conftest.py",
        "guest/cgroup_driver.py",
        "guest/conftest.py",
        "guest/test_agent_guest.py",
        "guest/test_cgroup_guest.py",
        "guest/test_libvirt_guest.py",
        "guest/test_migrate_guest.py",
        "guest/test_start_guest.py",
        "qemu/conftest.py",
        "qemu/test_cgroup_real.py",
        "qemu/test_definition_real.py",
        "qemu/test_differential_real.py",
        "qemu/test_libvirt_real.py",
        "qemu/test_libvirt_scripted.py",
        "qemu/test_libvirt_trouble.py",
        "qemu/test_libvirtd_real.py",
        "qemu/test_migrate_real.py",
        "qemu/test_place_real.py",
        "qemu/test_probe_real.py",
        "qemu/test_save_real.py",
        "qemu/test_smp_real.py",
        "qemu/test_start_real.py",
        "qemu/test_two_hosts.py",
        "qemu/test_whole_call_real.py",
        "unit/test_agent.py",
        "unit/test_cache.py",
        "unit/test_definitions.py",
        "unit/test_domain_xml.py",
        "unit/test_folder.py",
        "unit/test_json_and_errors.py",
        "unit/test_libvirt_threads.py",
        "unit/test_listen.py",
        "unit/test_monitor.py",
        "unit/test_monitor_anything.py",
        "unit/test_pending.py",
        "unit/test_vcpus_schema.py",
        "unit/test_xml_source.py",
    }
)


def private_imports(path: Path) -> set[str]:
    """The names that a file imports from within qmpvcpu."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names} - PUBLIC_MODULES
        elif isinstance(node, ast.ImportFrom) and node.module not in FACES:
            # `from qmpvcpu.errors import VcpuError` is the long way to a public name.
            found |= {f"{node.module}.{name.name}" for name in node.names if name.name not in qmpvcpu.__all__}
    return {name for name in found if name.partition(".")[0] == "qmpvcpu"}


FILES = {
    str(path.relative_to(TESTS)): path
    for path in sorted(TESTS.rglob("*.py"))
    if "support" not in path.relative_to(TESTS).parts
}


@pytest.mark.parametrize("name", sorted(FILES.keys() - NOT_YET))
def test_a_test_imports_public_names_and_those_of_support(name):
    parts = PARTS.get(name, ())
    assert [found for found in sorted(private_imports(FILES[name])) if not found.startswith(parts or "-")] == []


@pytest.mark.parametrize("name", sorted(NOT_YET))
def test_a_file_that_no_longer_needs_private_names_leaves_the_list(name):
    assert private_imports(FILES[name])
