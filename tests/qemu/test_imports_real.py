"""What a command does not need is not imported: the lists are in tests/data/imports.

QMPVCPU_RECORD=1 writes them; git shows what differs.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.imported import imported
from tests.support.qemus import MACHINES, qemu_binary, running

pytestmark = pytest.mark.qemu

LISTS = Path(__file__).parents[1] / "data" / "imports"
XML = """<domain type='qemu'><name>d</name><vcpu current='2'>8</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"""


def check(name, words, folder):
    environment = {
        **os.environ,
        "QMPVCPU_STATE": str(folder / "state"),
        "QMPVCPU_CACHE": str(folder / "cache"),
    }
    found = imported(words, environment)
    file = LISTS / f"{name}.txt"
    if "QMPVCPU_RECORD" in os.environ:
        file.write_text("".join(f"{module}\n" for module in found))
    assert found == file.read_text().split()


def test_the_version_loads_next_to_nothing(tmp_path):
    check("version", ["--version"], tmp_path)


def test_a_definition_is_counted_without_qmp(tmp_path):
    (tmp_path / "d.xml").write_text(XML)
    check("vcpucount-file", ["vcpucount", str(tmp_path / "d.xml")], tmp_path)


async def test_a_guest_is_counted_and_changed_without_xml(tmp_path):
    arguments = [
        *MACHINES["x86_64"],
        "-S",
        "-nodefaults",
        "-display",
        "none",
        "-smp",
        "1,maxcpus=4",
    ]
    async with running(qemu_binary("10.0", "x86_64"), arguments) as qemu:
        check("vcpucount-socket", ["vcpucount", str(qemu.qmp)], tmp_path)
        check("setvcpu-socket", ["setvcpu", str(qemu.qmp), "1", "--enable"], tmp_path)
