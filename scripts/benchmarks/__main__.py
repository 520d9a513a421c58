"""scripts/bench: ratios of medians of interleaved pairs, in one run and one interpreter; nothing is
a timed test.

scripts/bench                 everything
scripts/bench import enable   only these: import, probe, enable, pin, fill, drain, six, libvirt
scripts/bench tricks          without each trick for speed
scripts/bench --against REF   this tree and an earlier commit, in turns
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import qmpvcpu
from qmpvcpu.app.cache import cache_folder
from qmpvcpu.host.rights import kvm_state
from qmpvcpu.lab.guest import boot, find_image
from scripts.benchmarks.against_libvirt import bench_libvirt
from scripts.benchmarks.machines import eject_firmware, machine, slots_of
from scripts.benchmarks.probe import bench_probe
from scripts.benchmarks.raw import RawQmp

PAIRS = 30


def report(
    name: str, ours: list[float], other: list[float], limit: float | None, *, unit: str = "ms"
) -> bool:
    a, b = statistics.median(ours), statistics.median(other)
    ratio = a / b
    verdict = (
        ""
        if limit is None
        else f"  (at most {limit:.2f}: {'holds' if ratio <= limit else 'MISSED'})"
    )
    print(
        f"{name}: {a * 1000:.2f} / {b * 1000:.2f} {unit} = {ratio:.2f}{verdict}, {len(ours)} pairs",
        flush=True,
    )
    return limit is None or ratio <= limit


def timed_process(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def bench_import() -> bool:
    """`import qmpvcpu` against `import qemu.qmp`, and `qmpvcpu --version` against `python -c pass`."""
    python = sys.executable
    ours, qemu_qmp, version, nothing = [], [], [], []
    command = Path(python).with_name("qmpvcpu")
    for _ in range(PAIRS):
        ours.append(timed_process([python, "-c", "import qmpvcpu"]))
        qemu_qmp.append(timed_process([python, "-c", "import qemu.qmp"]))
        version.append(timed_process([str(command), "--version"]))
        nothing.append(timed_process([python, "-c", "pass"]))
    good = report("import qmpvcpu / import qemu.qmp", ours, qemu_qmp, 1.3)
    return report("qmpvcpu --version / python -c pass", version, nothing, 3.0) and good


async def bench_enable(accel: str) -> bool:
    """One enable over a held connection / device_add + query-cpus-fast on a bare socket, each pair
    on two QEMUs.

    Two equal machines are filled in step, ours and raw taking turns to go first, so that both see
    the same growth, and taking turns at the machines. Where a QEMU's threads and memory come to lie
    is luck, hence the many rounds.
    """
    ours, raw = [], []
    for round_number in range(12):
        async with machine(accel, "1,maxcpus=17") as one, machine(accel, "1,maxcpus=17") as other:
            left, right = (one, other) if round_number // 2 % 2 else (other, one)
            with RawQmp(right.qmp) as bare:
                async with qmpvcpu.connect(left.qmp) as domain:
                    for number, entity in enumerate(slots_of(await domain.state())):

                        async def we() -> None:
                            began = time.perf_counter()
                            await domain.enable(entity.id)  # noqa: B023
                            ours.append(time.perf_counter() - began)

                        async def they() -> None:
                            began = time.perf_counter()
                            bare.device_add(entity)  # noqa: B023
                            bare.command("query-cpus-fast")
                            raw.append(time.perf_counter() - began)

                        turns: list[Callable[[], Awaitable[None]]] = [we, they]
                        for turn in turns if (number + round_number) % 2 else reversed(turns):
                            await turn()
    return report(f"{accel}: one enable / raw device_add + query-cpus-fast", ours, raw, 1.25)


PINNED = """<domain type='qemu'><name>d</name><vcpu current='1'>17</vcpu><cputune>{}</cputune>
<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"""


async def bench_pin(accel: str, folder: Path) -> bool:
    """One enable whose vCPU is pinned / one whose definition says nothing of it, on two machines in
    turns.
    """
    pinned, plain = folder / "pinned.xml", folder / "plain.xml"
    host = sorted(os.sched_getaffinity(0))
    rows = (f"<vcpupin vcpu='{n}' cpuset='{host[n % len(host)]}'/>" for n in range(17))
    pinned.write_text(PINNED.format("".join(rows)))
    plain.write_text(PINNED.format(""))
    times: dict[Path, list[float]] = {pinned: [], plain: []}
    for round_number in range(12):
        async with machine(accel, "1,maxcpus=17") as one, machine(accel, "1,maxcpus=17") as other:
            first, second = (one, other) if round_number // 2 % 2 else (other, one)
            async with (
                qmpvcpu.connect(qmp=first.qmp, xml=str(pinned)) as left,
                qmpvcpu.connect(qmp=second.qmp, xml=str(plain)) as right,
            ):
                for number, entity in enumerate(slots_of(await left.state())):
                    turns = [(left, pinned), (right, plain)]
                    for domain, kind in turns if (number + round_number) % 2 else reversed(turns):
                        began = time.perf_counter()
                        await domain.enable(entity.id)
                        times[kind].append(time.perf_counter() - began)
    return report(f"{accel}: one enable, pinned / not", times[pinned], times[plain], 1.15)


async def bench_fill(accel: str, pairs: int) -> bool:
    """1 to 240 in one call / the same commands written at once to a bare socket and then read."""
    ours, raw = [], []
    for number in range(pairs):
        async with (
            machine(accel, "1,maxcpus=240") as left,
            machine(accel, "1,maxcpus=240") as right,
        ):
            with RawQmp(right.qmp) as bare:
                async with qmpvcpu.connect(left.qmp) as domain:
                    entities = slots_of(await domain.state())

                    async def we() -> None:
                        began = time.perf_counter()
                        await domain.set_vcpus(240)
                        ours.append(time.perf_counter() - began)

                    async def they() -> None:
                        began = time.perf_counter()
                        bare.pipeline(entities)  # noqa: B023
                        raw.append(time.perf_counter() - began)

                    turns: list[Callable[[], Awaitable[None]]] = [we, they]
                    for turn in turns if number % 2 else reversed(turns):
                        await turn()
    return report(f"{accel}: set_vcpus(240) from 1 / raw pipelined", ours, raw, 1.10)


async def bench_drain(pairs: int, folder: Path) -> bool:
    """240 to 1 in one call / all device_del written at once to a bare socket, then asked until one
    CPU is left.

    Both machines run a firmware that does nothing but eject; each pair on two machines, in turns.
    """
    ours, raw = [], []
    firmware = ["-bios", str(eject_firmware(folder))]
    for number in range(pairs):
        async with (
            machine("kvm", "1,maxcpus=240", *firmware) as left,
            machine("kvm", "1,maxcpus=240", *firmware) as right,
        ):
            with RawQmp(right.qmp) as bare:
                async with qmpvcpu.connect(left.qmp) as domain:
                    entities = slots_of(await domain.state())
                    await domain.set_vcpus(240)
                    bare.pipeline(entities)

                    async def we() -> None:
                        began = time.perf_counter()
                        outcome = await domain.set_vcpus(1)
                        ours.append(time.perf_counter() - began)
                        assert len(outcome.changed_ids) == 239

                    async def they() -> None:
                        began = time.perf_counter()
                        bare.unplug(entities)  # noqa: B023
                        raw.append(time.perf_counter() - began)

                    turns: list[Callable[[], Awaitable[None]]] = [we, they]
                    for turn in turns if number % 2 else reversed(turns):
                        await turn()
    return report("kvm: set_vcpus(1) from 240 / raw parallel device_del", ours, raw, 1.25)


SIX = [2, 3, 4, 5, 6, 7]


async def six(
    domain: qmpvcpu.Domain,
    rounds: int,
    plug: Callable[[], Awaitable[object]],
    times: tuple[list, list],
):
    """Six disabled in one call, and in six calls one after the other, in turns."""

    async def one_call() -> None:
        await domain.disable(SIX)

    async def six_calls() -> None:
        for number in SIX:
            await domain.disable(number)

    turns = [(one_call, times[0]), (six_calls, times[1])]
    for number in range(rounds):
        for turn, taken in turns if number % 2 else reversed(turns):
            await plug()
            began = time.perf_counter()
            await turn()
            taken.append(time.perf_counter() - began)


async def bench_six_ejecting(pairs: int, folder: Path) -> bool:
    """On the firmware that ejects at once, where what is measured is the asking and the waiting."""
    times: tuple[list, list] = [], []
    async with (
        machine("kvm", "2,maxcpus=8", "-bios", str(eject_firmware(folder))) as qemu,
        qmpvcpu.connect(qemu.qmp) as domain,
    ):
        await six(domain, pairs, lambda: domain.enable(SIX), times)
    return report("kvm: six disabled in one call / in six calls", *times, 0.6)


async def bench_six_linux(pairs: int) -> bool:
    """On Linux, whose kernel takes CPUs down one after the other however they were asked: no limit."""
    times: tuple[list, list] = [], []
    rounds = 6  # the contexts of TCG run out: a new guest every so often
    binary = cache_folder() / "qemu" / "10.0" / "bin" / "qemu-system-x86_64"
    arguments = [
        "-accel",
        "tcg,thread=multi",
        "-m",
        "512",
        "-smp",
        "2,sockets=1,cores=100,threads=1,maxcpus=100",
    ]
    hung = 0
    while len(times[0]) < pairs:
        async with (
            boot(find_image("x86_64"), str(binary), arguments) as guest,
            qmpvcpu.connect(guest.qemu.qmp) as domain,
        ):

            async def plug() -> None:
                await domain.enable(SIX)
                await guest.wait_online(8, timeout=20)

            try:
                await six(domain, min(rounds, pairs - len(times[0])), plug, times)
            except qmpvcpu.VcpuFailed as error:
                hung += 1
                print(f"tcg, Linux: a guest was given up: {error}"[:150], flush=True)
                if hung > 3:
                    raise
    return report("tcg, Linux: six disabled in one call / in six calls", *times, None)


def main() -> int:
    chosen = sys.argv[1:] or ["import", "probe", "enable", "pin", "fill", "drain", "six", "libvirt"]
    if chosen[0] == "--against":
        from scripts.benchmarks import against

        pairs = int(os.environ.get("QMPVCPU_BENCH_PAIRS", against.PAIRS))
        return 0 if asyncio.run(against.bench_against(chosen[1], pairs)) else 1
    if chosen[0] == "tricks":
        from scripts.benchmarks import against, tricks

        asyncio.run(tricks.bench_tricks(int(os.environ.get("QMPVCPU_BENCH_PAIRS", against.PAIRS))))
        return 0
    pairs = int(os.environ.get("QMPVCPU_BENCH_PAIRS", PAIRS))
    good = True
    if "import" in chosen:
        good &= bench_import()
    if "probe" in chosen:
        good &= asyncio.run(bench_probe(pairs))
    kvm, why = kvm_state()
    for accel in ("kvm", "tcg"):
        for name in ("enable", "pin", "fill"):
            if name not in chosen:
                continue
            if accel == "kvm" and not kvm:
                print(f"kvm: {name}: not measured ({why})")
                continue
            with tempfile.TemporaryDirectory() as folder:
                bench = {
                    "enable": lambda: bench_enable(accel),  # noqa: B023
                    "pin": lambda: bench_pin(accel, Path(folder)),  # noqa: B023
                    "fill": lambda: bench_fill(accel, pairs),  # noqa: B023
                }[name]
                good &= asyncio.run(bench())
    with tempfile.TemporaryDirectory() as folder:
        ejecting = {"drain": bench_drain, "six": bench_six_ejecting}
        for name in chosen:
            if name in ejecting and kvm:
                good &= asyncio.run(ejecting[name](pairs, Path(folder)))
            elif name in ejecting:
                print(f"kvm: {name}: not measured ({why})")
    if "six" in chosen:
        good &= asyncio.run(bench_six_linux(pairs))
    if "libvirt" in chosen:
        if not kvm:
            print(f"kvm: libvirt: not measured ({why})")
        with tempfile.TemporaryDirectory() as folder:
            kinds = ["kvm", "qemu"] if kvm else ["qemu"]
            good &= bench_libvirt(report, kinds, pairs, eject_firmware(Path(folder)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
