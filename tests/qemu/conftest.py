"""Paused machines of every kind, by architecture and version."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from qmpvcpu.qemu.process import QemuProcess, run_qemu
from tests.conftest import qemu_binary

MACHINES = {
    "x86_64": ["-machine", "q35"],
    "ppc64": ["-machine", "pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken"],
    "s390x": ["-machine", "s390-ccw-virtio"],
    "loongarch64": ["-machine", "virt"],
    "aarch64": ["-machine", "virt", "-cpu", "cortex-a57"],
    "riscv64": ["-machine", "virt"],
}


@asynccontextmanager
async def paused(
    arch: str,
    version: str,
    smp: str,
    extra: Sequence[str] = (),
    *,
    accel: str = "tcg",
    machine: Sequence[str] = (),
) -> AsyncIterator[QemuProcess]:
    arguments = ["-S", "-nodefaults", "-display", "none", "-no-user-config", "-accel", accel, "-smp", smp]
    arguments += [*(machine or MACHINES[arch]), *extra]
    async with run_qemu(qemu_binary(version, arch), arguments) as qemu:
        yield qemu
