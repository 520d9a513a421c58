"""A state folder with one defined domain, `web1`, and its scripted QEMU."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import qmpvcpu
from qmpvcpu.host.definition_files import Addresses, DefinitionFolder
from qmpvcpu.xml.document import read_domain
from tests.support.fake_qemu import FakeQemu
from tests.support.fake_qmp import serve

XML = b"""<domain type='kvm'>
  <name>web1</name>
  <!-- kept -->
  <vcpu current='1'>4</vcpu>
  <vcpus>
    <vcpu id='0' enabled='yes' hotpluggable='no'/>
    <vcpu id='1' enabled='no' hotpluggable='yes'/>
    <vcpu id='2' enabled='no' hotpluggable='yes'/>
    <vcpu id='3' enabled='no' hotpluggable='yes'/>
  </vcpus>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
</domain>
"""


def enabling(number: int) -> bytes:
    """`XML` with one more vCPU enabled."""
    changed = XML.replace(b"id='%d' enabled='no'" % number, b"id='%d' enabled='yes'" % number)
    return changed.replace(b"t='1'>", b"t='2'>")


class Home:
    """`tmp_path`/state is where `QMPVCPU_STATE` must lead."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self._folder = DefinitionFolder(tmp_path / "state")
        self.define(XML)

    def define(self, xml: bytes, *qmp: str) -> None:
        self._folder.define("web1", xml, Addresses(qmp))

    @property
    def folder(self) -> Path:
        return self._folder.folder

    @property
    def path(self) -> Path:
        return self.folder / "web1.xml"

    @property
    def xml(self) -> bytes:
        return self.path.read_bytes()

    def leftovers(self) -> list[Path]:
        """Files that were staged and are still there."""
        return [path for path in self.folder.iterdir() if path.name.startswith(".")]

    def enabled(self) -> tuple[int, ...]:
        """The vCPUs that its definition enables."""
        return read_domain(self.xml)[1].enabled_ids

    @asynccontextmanager
    async def running(self, qemu: FakeQemu) -> AsyncIterator[qmpvcpu.Domain]:
        async with serve(self.tmp_path, qemu.script) as path:
            self.define(self.xml, path)
            async with qmpvcpu.connect("web1") as domain:
                yield domain
        assert self.leftovers() == []

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[qmpvcpu.Domain]:
        async with qmpvcpu.connect("web1") as domain:
            yield domain
        assert self.leftovers() == []
