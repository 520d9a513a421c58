"""What each command of the contract does, as it was recorded: JSON, exit code, QMP, files. Wording
is left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qmpvcpu.core.model import format_ids
from tests.support.commands import cli
from tests.support.qemus import MACHINES, QEMUS, paused

DATA: Final = Path(__file__).parents[1] / "data" / "commands"
SMP: Final = "2,sockets=2,cores=2,threads=2,maxcpus=8"

#: Keys that hold wording, and those whose value differs from run to run.
_WORDING: Final = {"message", "hint", "detail", "description", "help"}
_VARYING: Final = {"seconds", "time", "pid", "thread_id", "cookie", "cpu", "last_cpu", "size"}
#: Random ids, processes and clocks in names and documents.
_RANDOM: Final = re.compile(
    r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\b[0-9a-f]{8}(?=-)|\b\d{3,}(\.\d+)?\b"
)
#: What a thread without a pin may run on.
_ALL_CPUS: Final = format_ids(os.sched_getaffinity(0))

XML: Final = """<domain type='qemu' id='1'>
  <name>web1</name>
  <memory unit='MiB'>512</memory>
  <!-- kept -->
  <vcpu placement='static' current='3'>8</vcpu>
  <vcpus>
    <vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>
    <vcpu id='1' enabled='yes' hotpluggable='no' order='2'/>
    <vcpu id='5' enabled='yes' hotpluggable='yes' order='3'/>
  </vcpus>
  <cputune><vcpupin vcpu='5' cpuset='0'/></cputune>
  <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>
  <cpu><topology sockets='2' cores='2' threads='2'/></cpu>
  <devices><emulator>{qemus}/10.0/bin/qemu-system-x86_64</emulator></devices>
</domain>
"""


@dataclass(frozen=True)
class Scenario:
    """`qemu`: architecture, version and `-smp` of one that runs as {qmp} with its agent's socket as
    {agent}.
    """

    commands: Sequence[str]
    qemu: tuple[str, str, str] | None = None


SCENARIOS: Final = {
    "socket": Scenario(
        (
            "vcpuinfo {qmp}",
            "vcpucount {qmp}",
            "vcpucount {qmp} --current --live",
            "vcpucount {qmp} --config",
            "setvcpu {qmp} 5",
            "setvcpu {qmp} 5 --enable --dry-run",
            "setvcpu {qmp} 5 --enable",
            "setvcpu {qmp} 5 --enable",
            "setvcpu {qmp} 2-3,6 --enable",
            "setvcpu {qmp} 0 --disable",
            "setvcpu {qmp} 9 --enable",
            "setvcpu {qmp} 5x --enable",
            "setvcpu {qmp} 5 --enable --disable",
            "setvcpu {qmp} 5 --enable --config",
            "setvcpu {qmp} 6 --disable --timeout 0 --force",
            "setvcpu {qmp} 6 --enable --timeout 0",
            "setvcpu {qmp} 3 --disable --async --force",
            "vcpuinfo {qmp}",
            "setvcpus {qmp} 7 --timeout 1",
            "setvcpus {qmp} 9",
            "setvcpus {qmp} 1 --dry-run",
            "setvcpus {qmp} 8 --maximum",
            "dumpxml {qmp}",
            "dumpxml {qmp} --dialect rfc --detail full",
            "dumpxml {qmp} --dialect rfc --detail minimal",
            "guestvcpus {qmp}",
            "setvcpu {qmp} 1 --disable --guest",
            "vcpupin {qmp}",
            "vcpupin {qmp} 1 0",
            "vcpupin {qmp} 1",
            "vcpupin {qmp} 1 r",
            "vcpupin {qmp} 9 0",
            "apply {qmp} {dir}/web1.xml --dry-run",
            "migrate-begin {qmp}",
        ),
        ("x86_64", "11.1", SMP),
    ),
    "cores": Scenario(
        (
            "vcpuinfo {qmp}",
            "setvcpu {qmp} 4 --enable",
            "setvcpu {qmp} 4 --core --enable",
            "setvcpu {qmp} 6 --core --enable --timeout 5",
            "setvcpus {qmp} 8",
            "setvcpus {qmp} 5",
            "setvcpu {qmp} 4-5 --disable --timeout 60",
            "setvcpus {qmp} 2 --timeout 60",
            "dumpxml {qmp} --dialect rfc --detail cell",
            "vcpuinfo {qmp}",
        ),
        ("ppc64", "11.1", "2,cores=4,threads=2,maxcpus=8"),
    ),
    "file": Scenario(
        (
            "vcpuinfo {dir}/web1.xml",
            "vcpuinfo {dir}/web1.xml --live",
            "vcpucount {dir}/web1.xml",
            "dumpxml {dir}/web1.xml",
            "dumpxml {dir}/web1.xml --dialect rfc --detail full",
            "setvcpu {dir}/web1.xml 3 --enable --dry-run",
            "setvcpu {dir}/web1.xml 3 --enable",
            "setvcpu {dir}/web1.xml 1 --disable",
            "setvcpu {dir}/web1.xml 3 --disable",
            "setvcpus {dir}/web1.xml 6 --hotpluggable",
            "setvcpus {dir}/web1.xml 16 --maximum --config",
            "setvcpus {dir}/web1.xml 2",
            "vcpupin {dir}/web1.xml 2 0",
            "vcpupin {dir}/web1.xml 2 r",
            "apply {dir}/web1.xml {dir}/other.xml",
            "probe {dir}/web1.xml --emulator {qemus}/10.0/bin/qemu-system-x86_64",
            "probe {dir}/web1.xml --probe never --emulator {qemus}/10.0/bin/qemu-system-x86_64",
            "boot-args {dir}/web1.xml --emulator {qemus}/10.0/bin/qemu-system-x86_64",
            "boot-args {dir}/web1.xml --style qmp --emulator {qemus}/10.0/bin/qemu-system-x86_64",
            "probe --machine q35 --smp 2,maxcpus=4 --emulator {qemus}/10.0/bin/qemu-system-x86_64",
            "probe --machine q35 --smp 010,maxcpus=4 --emulator"
            " {qemus}/10.0/bin/qemu-system-x86_64",
            "vcpuinfo {dir}/none.xml",
            "vcpuinfo nobody",
            "setvcpu",
            "nonsense",
        )
    ),
    "defined": Scenario(
        (
            "list",
            "define web1 --qmp {qmp}",
            "list",
            "vcpuinfo web1",
            "vcpuinfo web1 --config",
            "setvcpu web1 5 --enable --live --config",
            "setvcpu web1 6 --enable",
            "setvcpu web1 7 --enable --config",
            "setvcpu web1 6 --enable --live --config",
            "vcpupin web1 5 0 --live --config",
            "setvcpus web1 7 --live --config",
            "apply web1 {dir}/other.xml --config",
            "apply web1 {dir}/other.xml --live --dry-run",
            "define web1 --xml {dir}/other.xml",
            "dumpxml web1 --inactive",
            "dumpxml web1",
            "doctor web1",
            "start web1",
            "destroy web1",
            "undefine web1",
            "undefine web1",
        ),
        ("x86_64", "10.0", SMP),
    ),
    "started": Scenario(
        (
            "define {dir}/web1.xml",
            "start web1",
            "start web1",
            "undefine web1",
            "vcpuinfo web1",
            "setvcpu web1 3 --enable --live --config",
            "setvcpu web1 4 --enable",
            "migrate-begin web1",
            "save web1 {dir}/saved",
            "list",
            "restore {dir}/saved",
            "vcpuinfo web1",
            "restore {dir}/saved",
            "destroy web1",
            "destroy web1",
            "undefine web1",
            "list",
        )
    ),
}


class House:
    """A state folder, and what a command did to it."""

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        self._folder = folder
        self._names = names | {"dir": str(folder), "qemus": str(QEMUS)}
        self._before: dict[str, list[str]] = {}

    async def record(self, command: str) -> dict[str, Any]:
        """Run it; its exit code, JSON, QMP and the files that it left."""
        log = self._folder / "qmp.log"
        run = await cli("--json", "--qmp-log", str(log), *command.format(**self._names).split())
        sent = [row["message"] for row in _rows(log) if row["direction"] == "send"]
        log.unlink(missing_ok=True)
        words = [message for message in sent if not _is_query(message["execute"])]
        return {
            "command": command,
            "code": run.code,
            "json": self._plain(json.loads(run.stdout)),
            "sent": [
                [message["execute"], self._plain(message.get("arguments", {}))] for message in words
            ],
            "asked": sorted(
                {message["execute"] for message in sent} - {message["execute"] for message in words}
            ),
            "files": self._changed(),
        }

    def _changed(self) -> dict[str, list[str] | None]:
        """Mode and text of each file that is another since the command before; None for one that is
        gone.
        """
        state = (path for path in (self._folder / "state").rglob("*") if "log" not in path.parts)
        paths = sorted(path for path in (*state, *self._folder.glob("*.xml")) if path.is_file())
        now = {self._text(str(path.relative_to(self._folder))): self._file(path) for path in paths}
        before, self._before = self._before, now
        gone = dict.fromkeys(before.keys() - now.keys())
        return {name: what for name, what in now.items() if before.get(name) != what} | gone

    def _file(self, path: Path) -> list[str]:
        content = path.read_text(errors="replace") if path.name not in ("pid", "command") else ""
        return [oct(path.stat().st_mode & 0o777), self._text(content)]

    def _plain(self, value: Any, key: str = "") -> Any:
        if key in _WORDING:
            return None
        if key == "messages":
            return len(value)
        if key == "refusals" and isinstance(value, str):
            # A plan has the texts alone.
            return None
        if key in _VARYING and value is not None:
            return "#"
        if isinstance(value, dict):
            return {name: self._plain(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [self._plain(item, key) for item in value]
        return self._text(value) if isinstance(value, str) else value

    def _text(self, text: str) -> str:
        if text == _ALL_CPUS:
            return "{all}"
        for name in ("qmp", "agent", "dir", "qemus"):
            if name in self._names:
                text = text.replace(self._names[name], f"{{{name}}}")
        return _RANDOM.sub("#", text)


def _rows(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def _is_query(command: str) -> bool:
    return command.startswith(("query-", "qom-", "device-list", "x-query", "qmp_capabilities"))


async def record(scenario: Scenario, folder: Path) -> list[dict[str, Any]]:
    """Run its commands, one after the other; `folder`/state is where `QMPVCPU_STATE` must lead."""
    text = XML.format(qemus=QEMUS)
    (folder / "web1.xml").write_text(text)
    (folder / "other.xml").write_text(text.replace("id='5' enabled='yes'", "id='6' enabled='yes'"))
    async with _running(scenario) as names:
        house = House(folder, names)
        try:
            return [await house.record(command) for command in scenario.commands]
        finally:
            await cli("destroy", "web1")


@asynccontextmanager
async def _running(scenario: Scenario) -> AsyncIterator[dict[str, str]]:
    if scenario.qemu is None:
        yield {}
        return
    arch, version, smp = scenario.qemu
    async with paused(arch, version, smp, machine=MACHINES[arch]) as qemu:
        yield {"qmp": qemu.qmp}


def lines(records: Sequence[dict[str, Any]]) -> str:
    """As they are kept: a JSON document a line."""
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in records)
