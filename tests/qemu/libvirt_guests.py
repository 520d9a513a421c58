"""Guests that libvirt and we start alike."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.support.ejecting import firmware
from tests.support.qemus import qemu_binary
from tests.support.waiting import until_blocking, within

__all__ = [
    "EJECTING",
    "NUMA",
    "PPC64",
    "SPARSE",
    "firmware",
    "numa",
    "qemu_of",
    "start_until",
    "suspend",
]


def numa(
    kind: str = "qemu",
    loader: str = "",
    vcpus: str = "<vcpu current='3'>16</vcpu>",
    name: str = "web1",
) -> str:
    """x86_64: two nodes, each a socket of four cores of two threads."""
    loader = f"<loader readonly='yes' type='rom'>{loader}</loader>" if loader else ""
    return f"""<domain type='{kind}'><name>{name}</name><memory unit='MiB'>128</memory>{vcpus}
<os><type arch='x86_64' machine='q35'>hvm</type>{loader}</os><features><acpi/></features>
<cpu mode='custom' check='none'><model>qemu64</model><topology sockets='2' cores='4' threads='2'/><numa>
<cell id='0' cpus='0-7' memory='64' unit='MiB'/><cell id='1' cpus='8-15' memory='64' unit='MiB'/></numa></cpu>
<devices><emulator>{qemu_binary("10.0", "x86_64")}</emulator></devices></domain>"""


NUMA = numa()
#: Enabled vCPUs with holes, as libvirt starts them: -smp 2, then device_add.
SPARSE = numa(
    vcpus="<vcpu current='4'>16</vcpu><vcpus><vcpu id='0' enabled='yes' hotpluggable='no'"
    " order='1'/>"
    "<vcpu id='1' enabled='yes' hotpluggable='no' order='2'/>"
    "<vcpu id='9' enabled='yes' hotpluggable='yes' order='3'/>"
    "<vcpu id='4' enabled='yes' hotpluggable='yes' order='4'/>"
    + "".join(
        f"<vcpu id='{n}' enabled='no' hotpluggable='yes'/>"
        for n in (2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15)
    )
    + "</vcpus>"
)
PPC64 = f"""<domain type='qemu'><name>power1</name><memory unit='MiB'>512</memory><vcpu current='8'>40</vcpu>
<os><type arch='ppc64' machine='pseries'>hvm</type></os><cpu><topology sockets='1' cores='5' threads='8'/></cpu>
<devices><emulator>{qemu_binary("10.0", "ppc64")}</emulator></devices></domain>"""


#: Eight vCPUs, two of which cannot be unplugged.
EJECTING = (
    "<vcpu current='8'>16</vcpu><vcpus>"
    + "".join(
        f"<vcpu id='{n}' enabled='{'yes' if n < 8 else 'no'}'"
        f" hotpluggable='{'no' if n < 2 else 'yes'}'/>"
        for n in range(16)
    )
    + "</vcpus>"
)


def qemu_of(daemon, name: str = "web1") -> int:
    """The pid of this daemon's guest: another daemon's, of a test run next to this one, may have
    its name.
    """
    folders = [
        Path(f"/proc/{daemon.pid}/root/run/libvirt/qemu"),
        daemon.folder,
    ]  # root's has mounts of its own
    (file, *_) = [file for folder in folders for file in folder.rglob(f"{name}.pid")]
    return int(file.read_text())


#: The command line, which tells when it makes a call of libvirt's.
TELLS = """
import sys
import libvirt
import libvirt_qemu
from qmpvcpu.cli import main

owner, _, name = sys.argv.pop(1).rpartition(".")
call = getattr(eval(owner), name)

def telling(*given):
    print("asks libvirt", file=sys.stderr, flush=True)
    return call(*given)

setattr(eval(owner), name, telling)
sys.exit(main())
"""


async def start_until(call: str, *words: str) -> asyncio.subprocess.Process:
    """A command that makes this call, of a guest that does not answer it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", TELLS, call, *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await within(process.stderr.readuntil(b"asks libvirt\n"), f"it waits for {call}")
    return process


def suspend(domain) -> None:
    """Pause a guest of `firmware`, once it ejects: before that QEMU declines every unplug. Blocks."""
    domain.setVcpu("15", 1, 1)

    def ejects() -> bool:
        try:
            domain.setVcpu("15", 0, 1)
        except Exception as error:
            if "not supported device" not in str(error):
                raise
            return False
        return True

    until_blocking(ejects, "the firmware ejects")
    domain.suspend()
