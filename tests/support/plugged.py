"""A guest that takes every unplug, in a QEMU that somebody else has started, and all that a command
can change.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmpvcpu.core.model import format_ids
from qmpvcpu.host.definition_files import Addresses, DefinitionFolder
from tests.support.ejecting import ejecting
from tests.support.fake_agent import FakeAgent, serve_agent
from tests.support.hosts import why_no_kvm
from tests.support.houses import House, house
from tests.support.waiting import until

#: Commands that change something, of this guest or its definition.
CHANGES = (
    "setvcpu web1 3,4 --enable",
    "setvcpu web1 3,4 --enable --config",
    "setvcpu web1 3,4 --enable --live --config",
    "setvcpu web1 1,2 --disable",
    "setvcpu web1 1,2 --disable --config",
    "setvcpu web1 1,2 --disable --live --config",
    "setvcpu web1 1,2 --disable --atomic --live --config",
    "setvcpus web1 5 --live --config",
    "setvcpus web1 1 --live --config",
    "setvcpus web1 8 --maximum --config",
    "apply web1 {files}/other.xml",
    "apply web1 {files}/other.xml --config",
    "apply web1 {files}/other.xml --live --config",
    "vcpupin web1 1 0",
    "vcpupin web1 1 0 --config",
    "vcpupin web1 1 0 --live --config",
    "guestvcpus web1 --cpulist 1 --disable --agent {agent}",
    "setvcpu web1 1 --disable --guest --agent {agent}",
    "setvcpus web1 1 --guest --agent {agent}",
    "define {files}/other.xml",
    "define {files}/other.xml --qmp {files}/no-socket",
    "define web1 --xml {files}/other.xml --agent {files}/no-socket",
    "define fresh --xml {files}/other.xml",
    "define fresh --qmp {qmp}",
    "undefine web1",
)
#: Commands that tell QEMU something.
TALKING = tuple(words for words in CHANGES if not re.search("define|(?<!live) --config", words))

NAME = "web1"
SLOTS = 6
PLUGGED = (1, 2)
#: What tells which of the guest's CPUs is which vCPU.
_PATH = "/sys/devices/system/cpu/cpu{}/firmware_node/path"


def document(enabled: set[int], name: str = NAME, note: str = "") -> bytes:
    rows = "".join(
        f"<vcpu id='{n}' enabled='{'yes' if n in enabled else 'no'}'"
        f" hotpluggable='{'yes' if n else 'no'}'/>"
        for n in range(SLOTS)
    )
    return f"""<domain type='kvm'><name>{name}</name><!-- {note} --><vcpu current='{len(enabled)}'>{SLOTS}</vcpu>
<vcpus>{rows}</vcpus><cputune><vcpupin vcpu='3' cpuset='0'/></cputune>
<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>
""".encode()


@dataclass(frozen=True)
class Picture:
    """All that a command can change: plugged vCPUs, CPUs of their threads, definitions, the guest's
    own CPUs.
    """

    plugged: frozenset[int]
    pins: tuple[tuple[int, tuple[int, ...]], ...]
    definitions: tuple[tuple[str, bytes | None, bytes | None], ...]
    online: tuple[int, ...]


class Plugged:
    """A house with a QEMU that is not its own, whose guest only ejects CPUs, and a scripted agent."""

    NAMES = (NAME, "fresh")

    def __init__(self, house: House, stack: AsyncExitStack) -> None:
        self.house = house
        self._stack = stack
        self.qemu: Any = None
        #: Known only where it is named: it does not see which vCPUs come and go.
        self.agent = FakeAgent()
        self.agent_address = ""
        self._plugs = 0

    async def _start_qemu(self) -> None:
        await self._stack.aclose()
        is_kvm = why_no_kvm() is None
        kind = (
            {"accel": "kvm", "version": "10.0"} if is_kvm else {"accel": "tcg", "version": "11.1"}
        )
        self.agent_address = await self._stack.enter_async_context(
            serve_agent(self.house.files, self.agent)
        )
        self.qemu = await self._stack.enter_async_context(
            ejecting(f"1,maxcpus={SLOTS}", monitors=("qmp", "qmp2"), **kind)
        )
        self.house.places |= {"agent": Path(self.agent_address), "qmp": self.qemu.folder / "qmp2"}
        self._plugs = 0
        # Its guest is never idle: it must not take the CPU from the commands that are tested.
        for row in await self.qemu.execute("query-cpus-fast"):
            os.setpriority(os.PRIO_PROCESS, row["thread-id"], 19)

    # -- truth

    async def _slots(self) -> list[dict[str, Any]]:
        rows = await self.qemu.execute("query-hotpluggable-cpus")
        keys = ("node-id", "socket-id", "die-id", "cluster-id", "core-id", "thread-id")
        return sorted(rows, key=lambda row: [row["props"].get(key, 0) for key in keys])

    async def plugged(self) -> frozenset[int]:
        """As QEMU has it."""
        return frozenset(
            number for number, row in enumerate(await self._slots()) if "qom-path" in row
        )

    async def pins(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """As the kernel has it."""
        found = []
        for row in await self.qemu.execute("query-cpus-fast"):
            with suppress(OSError):
                found.append(
                    (row["cpu-index"], tuple(sorted(os.sched_getaffinity(row["thread-id"]))))
                )
        return tuple(sorted(found))

    def definitions(self) -> tuple[tuple[str, bytes | None, bytes | None], ...]:
        """Name, XML and sockets of each that there can be."""
        return tuple((name, *self.house.files_of(name)) for name in self.NAMES)

    async def picture(self) -> Picture:
        return Picture(
            await self.plugged(),
            await self.pins(),
            self.definitions(),
            tuple(number for number, online in self.agent.online.items() if online),
        )

    # -- before each command

    async def reset(self) -> None:
        """As it was in the beginning."""
        # Under TCG a QEMU can take only so many plugs.
        if (
            self.qemu is None
            or self.qemu.has_exited
            or (why_no_kvm() is not None and self._plugs > 20)
        ):
            await self._start_qemu()
        for row in await self._slots():
            if "peripheral" in (path := row.get("qom-path", "")):
                await self.qemu.remove(path.rpartition("/")[2])
        for number in PLUGGED:
            row = (await self._slots())[number]
            await self.qemu.plug(row["type"], f"vcpu{number}", row["props"])
        self._plugs += 2 * len(PLUGGED)
        self.agent.online = dict.fromkeys((0, *PLUGGED), True)
        files = {_PATH.format(number): b"\\_SB_.CPUS.C%03X\n" % number for number in range(SLOTS)}
        # Of one socket, the number of the APIC is that of the core.
        rows = "".join(f"processor: {number}\napicid: {number}\n\n" for number in (0, *PLUGGED))
        self.agent.files = {**files, "/proc/cpuinfo": rows.encode()}
        definitions = DefinitionFolder(self.house.state)
        for name in self.NAMES:
            for path in definitions.folder.glob(f"{name}.*"):
                path.unlink()
        sockets = tuple(str(self.qemu.folder / name) for name in ("qmp", "qmp2"))
        definitions.define(NAME, document({0, *PLUGGED}, note="old"), Addresses(sockets))
        (self.house.files / "other.xml").write_bytes(document({0, 1, 3, 4}, note="new"))

    # -- after each command

    async def says_what_is(self, *, may_pend: bool = False, all_of_it: bool = True) -> None:
        """`vcpuinfo` says what is so, and holds still, and so does `list`. With `may_pend` an
        unplug may be shown as pending that QEMU was never asked for.
        """

        async def holds_still() -> bool:
            before = await self.plugged()
            report = await self.house.json(
                "vcpuinfo", NAME, "--live", "--agent", self.agent_address
            )
            pins = await self.pins() if all_of_it else ()
            rows = (await self.house.json("list"))["domains"] if all_of_it else []
            if await self.plugged() != before:
                return False  # an unplug has just ended
            vcpus = {row["id"]: row for row in report["vcpus"]}
            assert {
                number for number, row in vcpus.items() if row["state"] == "enabled"
            } == before, report
            for number, cpus in pins:
                # A thread may outlive the vCPU in its slot for a moment.
                assert number not in before or vcpus[number]["pin"] == format_ids(cpus), (
                    number,
                    vcpus[number],
                )
            if all_of_it:
                mine = [(row["active"], row["current"]) for row in rows if row["name"] == NAME]
                assert mine == [(True, len(before))], rows
            return may_pend or not any(row["pending"] for row in report["vcpus"])

        await until(holds_still, "nothing is pending")
        if not all_of_it:
            return
        if self._is_defined():
            config = await self.house.json("vcpuinfo", NAME, "--config")
            enabled = {row["id"] for row in config["vcpus"] if row["state"] == "enabled"}
            assert enabled == self.house.enabled_in_the_definition(NAME)

    def _is_defined(self) -> bool:
        return self.house.files_of(NAME)[0] is not None


@asynccontextmanager
async def plugged() -> AsyncIterator[Plugged]:
    async with house() as made, AsyncExitStack() as stack:
        yield Plugged(made, stack)
