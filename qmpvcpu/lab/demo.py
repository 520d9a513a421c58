"""`qmpvcpu demo`: show the main task on a guest of our own, which is removed afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qmpvcpu.app.qemus import DEMO_ARCH, examine_all, find_binaries, survives_unplug
from qmpvcpu.core.model import DomainState, format_ids
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain.connect import connect
from qmpvcpu.errors import VcpuFailed, VcpuRefused
from qmpvcpu.lab.guest import GuestImage, boot, find_image
from qmpvcpu.qemu.launch import run_qemu

Tell = Callable[[str], None]
#: Formats a state as lines.
Show = Callable[[DomainState], list[str]]

#: maxcpus has room to spare, because TCG never releases the context of a CPU (docs/qemu-facts.md).
_SMP = "4,sockets=2,cores=8,threads=1,maxcpus=16"
_VCPU = 12
_NUMA = [
    *(
        "-object",
        "memory-backend-ram,id=ram0,size=256M",
        "-object",
        "memory-backend-ram,id=ram1,size=256M",
    ),
    *("-numa", "node,nodeid=0,memdev=ram0", "-numa", "node,nodeid=1,memdev=ram1"),
    *("-numa", "cpu,node-id=0,socket-id=0", "-numa", "cpu,node-id=1,socket-id=1"),
]


async def run(tell: Tell, show: Show) -> dict[str, Any]:
    """Run the demonstration. Returns its results as JSON data.

    Args:
        tell: called with each line of the output.
        show: formats a state as lines.

    Raises:
        VcpuRefused: no QEMU was found.
        VcpuFailed: the guest's CPUs are not those that QEMU reports.
    """
    binaries = await examine_all([item for item in find_binaries() if item[1] == DEMO_ARCH])
    usable = [qemu for qemu in binaries if qemu.version is not None]
    if not usable:
        raise catalogue.NO_QEMU.error(arch=DEMO_ARCH)
    missing: list[str] = []
    unplugging = [qemu for qemu in usable if survives_unplug(qemu)]
    if not unplugging:
        missing.append("a QEMU that survives an x86 unplug under TCG: scripts/fetch-qemu 10.0")
    image: GuestImage | None = None
    try:
        image = find_image(DEMO_ARCH)
    except VcpuRefused as refused:
        missing.append(f"a Linux guest: {refused.hint}")
    if unplugging and image is not None:
        return await _with_linux(tell, show, unplugging[0].path, image)
    return await _paused(tell, show, usable[0].path, missing)


async def _with_linux(tell: Tell, show: Show, binary: str, image: GuestImage) -> dict[str, Any]:
    tell(
        f"booting Linux {image.facts['kernel_version']} with 2 NUMA nodes, 4 of 16 vCPUs, under TCG"
    )
    async with (
        boot(
            image, binary, ["-accel", "tcg,thread=multi", "-m", "512", "-smp", _SMP, *_NUMA]
        ) as guest,
        connect("demo", qmp=guest.qemu.qmp) as domain,
    ):
        for line in show(await domain.state()):
            tell(line)
        before = await guest.online()
        tell(f"the guest's own /sys/devices/system/cpu/online: {before}")

        tell(f"\n$ qmpvcpu setvcpu demo {_VCPU} --enable")
        plugged = await domain.enable(_VCPU)
        after = await guest.wait_online(5)
        node = await guest.shell(
            "cd /sys/devices/system/node; grep -l 4 node*/cpulist | cut -d/ -f1"
        )
        tell(f"vCPU {_VCPU}: {plugged.rows[0].state}, on NUMA node {plugged.rows[0].node}")
        tell(f"the guest's own /sys/devices/system/cpu/online: {after} (its cpu4 is on {node})")

        tell(f"\n$ qmpvcpu setvcpu demo {_VCPU} --disable")
        unplugged = await domain.disable(_VCPU)
        afterwards = await guest.online()
        tell(
            f"vCPU {_VCPU}: {unplugged.rows[0].state}, {unplugged.seconds * 1000:.0f} ms after it"
            " was asked"
        )
        tell(f"the guest's own /sys/devices/system/cpu/online: {afterwards}")
        present = await guest.shell("cat /sys/devices/system/cpu/present")
    if (before, after, afterwards, present) != ("0-3", "0-4", "0-3", "0-3"):
        raise VcpuFailed(
            f"the guest shows {before}, {after}, {afterwards} (present: {present})",
            hint="expected 0-3, 0-4, 0-3 (present: 0-3): run scripts/test and report this",
        )
    return {
        "guest": True,
        "online": [before, after, afterwards],
        "enabled": plugged.to_json(),
        "disabled": unplugged.to_json(),
        "missing": [],
    }


async def _paused(tell: Tell, show: Show, binary: str, missing: list[str]) -> dict[str, Any]:
    tell("a paused machine with 2 NUMA nodes and 4 of 16 vCPUs (no guest to boot: see below)")
    arguments = ["-S", "-nodefaults", "-display", "none", "-no-user-config", "-machine", "q35"]
    arguments += ["-accel", "tcg", "-m", "512", "-smp", _SMP, *_NUMA]
    async with run_qemu(binary, arguments) as qemu, connect("demo", qmp=qemu.qmp) as domain:
        tell(f"\n$ qmpvcpu setvcpu demo {_VCPU} --enable")
        plugged = await domain.enable(_VCPU)
        for line in show(await domain.state()):
            tell(line)
        tell(f"enabled now: vCPU {format_ids(domain.last_state.enabled_ids)}")
    for what in missing:
        tell(f"to see the unplug too, get {what}")
    return {
        "guest": False,
        "online": [],
        "enabled": plugged.to_json(),
        "disabled": None,
        "missing": missing,
    }
