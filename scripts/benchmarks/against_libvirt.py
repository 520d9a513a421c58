"""Ours against libvirt's API, on equal guests, in turns: one plug, 1 to 240, and 8 to 2 where the
guest ejects.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import qmpvcpu
from qmpvcpu.app.cache import cache_folder
from qmpvcpu.lab.compare import LibvirtSide, our_side
from qmpvcpu.lab.libvirtd import run_libvirtd
from scripts.benchmarks.machines import machine, slots_of
from scripts.benchmarks.raw import RawQmp

__all__ = ["bench_libvirt"]

#: Rounds of one plug each: so many plugs a guest.
PLUGS = 16
#: Seconds for a firmware to be where it ejects.
READY = 0.5


def guest(kind: str, maxcpus: int, current: int, loader: Path | None = None) -> bytes:
    """x86_64; with a firmware that ejects, all but the first two can be unplugged."""
    emulator = cache_folder() / "qemu" / "10.0" / "bin" / "qemu-system-x86_64"
    rom = f"<loader readonly='yes' type='rom'>{loader}</loader>" if loader is not None else ""
    rows = ""
    if loader is not None:
        states = (
            (n, "yes" if n < current else "no", "no" if n < 2 else "yes") for n in range(maxcpus)
        )
        rows = "".join(
            f"<vcpu id='{n}' enabled='{on}' hotpluggable='{can}'/>" for n, on, can in states
        )
        rows = f"<vcpus>{rows}</vcpus>"
    return f"""<domain type='{kind}'><name>bench</name><memory unit='MiB'>64</memory>
<vcpu current='{current}'>{maxcpus}</vcpu>{rows}<os><type arch='x86_64' machine='q35'>hvm</type>{rom}</os>
<features><acpi/></features><cpu mode='custom' check='none'><model>qemu64</model>
<topology sockets='1' cores='{maxcpus}' threads='1'/></cpu><devices><emulator>{emulator}</emulator>
<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>""".encode()


async def timed(side: LibvirtSide, call: Callable) -> float:
    """The call's own time, measured in its thread."""

    def work() -> float:
        began = time.perf_counter()
        call(side.guest.domain)
        return time.perf_counter() - began

    return await side.connection.change("the call", work)


class Pair:
    """One guest of ours and one of libvirt's."""

    def __init__(self, ours, theirs: LibvirtSide) -> None:
        self.domain = ours.domain
        self._theirs = theirs

    async def libvirt(self, call: Callable) -> float:
        return await timed(self._theirs, call)

    @staticmethod
    async def ours(work) -> float:
        began = time.perf_counter()
        await work
        return time.perf_counter() - began


async def pair(stack: AsyncExitStack, daemon, xml: bytes) -> Pair:
    return Pair(
        await stack.enter_async_context(our_side(xml, log=False)),
        await stack.enter_async_context(LibvirtSide.run(daemon, xml, log=False)),
    )


async def one_plug(daemon, kind: str, pairs: int) -> tuple[list[float], list[float]]:
    ours, theirs = [], []
    while len(ours) < pairs:
        async with AsyncExitStack() as stack:
            both = await pair(stack, daemon, guest(kind, PLUGS + 1, 1))
            for number in range(1, PLUGS + 1):
                turns = [
                    lambda: both.ours(both.domain.enable(number, live=True)),  # noqa: B023
                    lambda: both.libvirt(lambda domain: domain.setVcpu(str(number), 1, 1)),  # noqa: B023
                ]
                for turn in (0, 1) if number % 2 else (1, 0):
                    (ours, theirs)[turn].append(await turns[turn]())
    return ours, theirs


async def raw_plugs(daemon, kind: str, pairs: int) -> list[float]:
    """device_add, and a query that shows it, by a bare socket, one after the other: QEMU at its
    best.
    """
    times: list[float] = []
    xml = guest(kind, PLUGS + 1, 1)
    while len(times) < pairs:
        async with our_side(xml, log=False) as ours, LibvirtSide.run(daemon, xml, log=False):
            slots = slots_of(await ours.domain.state())
            with RawQmp(ours.second_qmp) as bare:
                for entity in slots:
                    began = time.perf_counter()
                    bare.device_add(entity)
                    bare.command("query-cpus-fast")
                    times.append(time.perf_counter() - began)
    return times


async def bulk(daemon, xml: bytes, count: int, pairs: int) -> tuple[list[float], list[float]]:
    """One guest at a time: the one that ejects spins, and would take a CPU from the other."""
    ours, theirs = [], []
    for number in range(pairs):
        for turn in (0, 1) if number % 2 else (1, 0):
            async with AsyncExitStack() as stack:
                if turn == 0:
                    side = await stack.enter_async_context(our_side(xml, log=False))
                    await asyncio.sleep(READY)
                    # What the first call of a process loads is no part of it.
                    await side.domain.plan_set_vcpus(count, live=True)
                    ours.append(await Pair.ours(side.domain.set_vcpus(count, live=True)))
                else:
                    other = await stack.enter_async_context(LibvirtSide.run(daemon, xml, log=False))
                    await asyncio.sleep(READY)
                    call = timed(other, lambda domain: domain.setVcpusFlags(count, 1))
                    theirs.append(await call)
    return ours, theirs


async def raw_unplugs(kind: str, firmware: Path, pairs: int) -> list[float]:
    """All six device_del written at once to a bare socket, then asked until two CPUs are left: what
    QEMU takes.
    """
    times = []
    for _ in range(pairs):
        async with machine(kind, "2,maxcpus=16", "-bios", str(firmware)) as qemu:
            async with qmpvcpu.connect(qemu.qmp) as domain:
                entities = slots_of(await domain.state())[:6]
                await domain.enable([entity.id for entity in entities])
            await asyncio.sleep(READY)
            with RawQmp(qemu.qmp) as bare:
                began = time.perf_counter()
                bare.unplug(entities, left=2)
                times.append(time.perf_counter() - began)
    return times


def bench_libvirt(
    report: Callable[..., bool], kinds: list[str], pairs: int, firmware: Path
) -> bool:
    """Under KVM with what is expected, under TCG without."""

    async def run() -> bool:
        good = True
        async with run_libvirtd() as daemon:
            for kind in kinds:
                kvm = kind == "kvm"
                accel = "kvm" if kvm else "tcg"
                times = await one_plug(daemon, kind, max(pairs, 6 * PLUGS))
                good &= report(
                    f"{accel}: one plug / libvirt's setVcpu", *times, 1 / 1.3 if kvm else None
                )
                bare = await raw_plugs(daemon, kind, 6 * PLUGS)
                report(
                    f"{accel}: by a bare socket, nothing in between / libvirt's",
                    bare,
                    times[1],
                    None,
                )
                times = await bulk(daemon, guest(kind, 240, 1), 240, max(pairs // 3, 1))
                good &= report(
                    f"{accel}: 1 to 240 / libvirt's setVcpusFlags", *times, 1 / 3 if kvm else None
                )
                if kvm:
                    # Under TCG libvirt does not see the end: there is nothing to compare.
                    times = await bulk(daemon, guest(kind, 16, 8, firmware), 2, pairs)
                    good &= report(f"{accel}: 8 to 2 / libvirt's setVcpusFlags", *times, 1 / 2.5)
                    bare = await raw_unplugs(kind, firmware, pairs)
                    report(
                        f"{accel}: the same by a bare socket, all at once / libvirt's",
                        bare,
                        times[1],
                        None,
                    )
        return good

    return asyncio.run(run())
