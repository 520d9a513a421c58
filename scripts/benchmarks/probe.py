"""What it costs to know a guest that does not run: predicted, from the cache, and asked of a
throwaway QEMU.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from qmpvcpu.app.cache import cache_folder
from qmpvcpu.app.probes import ProbeMode, find_layout, forget_probes
from qmpvcpu.core.machine.layout import LayoutSource, MachineSpec
from qmpvcpu.core.machine.numa import parse_numa
from qmpvcpu.core.machine.smp import parse_smp
from scripts.benchmarks.raw import RawQmp

NUMA = parse_numa(["node,cpus=0-7", "node,cpus=8-15"])
MACHINES = {
    "x86_64": (MachineSpec("q35", parse_smp("4,sockets=2,cores=8,maxcpus=16"), numa=NUMA), 16),
    "ppc64": (MachineSpec("pseries", parse_smp("8,cores=2,threads=8,maxcpus=16"), numa=NUMA), 256),
}


def bare(binary: str, spec: MachineSpec, memory: int) -> float:
    """Seconds from the start to the answer, with nothing around it."""
    words = [
        "-S",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-machine",
        spec.machine,
        "-accel",
        "tcg",
    ]
    words += ["-smp", str(spec.smp), "-m", f"{memory * len(spec.nodes)}M"]
    for node in spec.nodes:
        words += ["-object", f"memory-backend-ram,id=m{node.id},size={memory}M"]
        cpus = "".join(f",cpus={cpu}" for cpu in node.cpus)
        words += ["-numa", f"node,nodeid={node.id},memdev=m{node.id}{cpus}"]
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as sock:
        path = str(Path(folder) / "q")
        sock.bind(path)
        sock.listen()
        chardev = [
            "-chardev",
            f"socket,id=c,fd={sock.fileno()},server=on,wait=off",
            "-qmp",
            "chardev:c",
        ]
        began = time.perf_counter()
        process = subprocess.Popen(
            [binary, *chardev, *words],
            pass_fds=[sock.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with RawQmp(path) as qmp:
                qmp.command("query-hotpluggable-cpus")
                seconds = time.perf_counter() - began
        finally:
            process.kill()
            process.wait()
    return seconds


async def bench_probe(pairs: int) -> bool:
    """Predicted at most 2 ms, from the cache at most 5, asked at most 15 more than bare."""
    good = True
    with tempfile.TemporaryDirectory(prefix="qmpvcpu-bench-") as folder:
        (Path(folder) / "qemu").symlink_to(cache_folder() / "qemu")
        before = os.environ.get("QMPVCPU_CACHE")
        os.environ["QMPVCPU_CACHE"] = folder
        try:
            for arch, (spec, memory) in MACHINES.items():
                good &= await _bench(arch, spec, memory, pairs)
        finally:
            del os.environ["QMPVCPU_CACHE"]
            if before is not None:
                os.environ["QMPVCPU_CACHE"] = before
    return good


async def _bench(arch: str, spec: MachineSpec, memory: int, pairs: int) -> bool:
    binary = str(cache_folder() / "qemu" / "10.0" / "bin" / f"qemu-system-{arch}")
    times: dict[str, list[float]] = {"predicted": [], "cached": [], "probed": [], "bare": []}

    async def ours(source: str, mode: ProbeMode) -> None:
        began = time.perf_counter()
        found = await find_layout(spec, arch=arch, emulator=binary, mode=mode)
        times[source].append(time.perf_counter() - began)
        assert found.layout.source is LayoutSource(source), found.layout.source

    for number in range(pairs):
        if number % 2:
            times["bare"].append(bare(binary, spec, memory))
        forget_probes()
        await ours("probed", ProbeMode.ALWAYS)
        if not number % 2:
            times["bare"].append(bare(binary, spec, memory))
        await ours("cached", ProbeMode.ALWAYS)
        await ours("predicted", ProbeMode.AUTO)
    medians = {source: statistics.median(found) * 1000 for source, found in times.items()}
    pairs_of = zip(times["probed"], times["bare"], strict=True)
    more = statistics.median(ours - other for ours, other in pairs_of) * 1000
    good = medians["predicted"] <= 2 and medians["cached"] <= 5 and more <= 15
    known = (
        f"predicted {medians['predicted']:.2f} ms (at most 2), cached {medians['cached']:.2f}"
        " ms (5)"
    )
    asked = f"probed {medians['probed']:.1f}, bare {medians['bare']:.1f}, {more:.1f} ms more (15)"
    print(f"{arch}: {known}, {asked}: {'holds' if good else 'MISSED'}, {pairs} pairs", flush=True)
    return good
