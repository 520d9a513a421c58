"""Every command, by group: its module, and what it does in a few words.

Only the module of the command that was typed is loaded, because it loads what the command needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Final

from qmpvcpu.cli.options import Command

#: By the title of a group and the name of a command. `--help` lists them in this order.
GROUPS: Final[Mapping[str, Mapping[str, tuple[str, str]]]] = {
    "vCPUs": {
        "vcpuinfo": ("counts", "show every vCPU: id, place, state"),
        "vcpucount": ("counts", "count vCPUs, as virsh does"),
        "setvcpu": ("vcpus", "enable, disable or query single vCPUs by id"),
        "setvcpus": (
            "vcpus",
            "have so many vCPUs enabled: the lowest are added, the highest removed",
        ),
        "apply": (
            "apply",
            "make the domain's vCPUs what <vcpus> in FILE says, as one transaction",
        ),
        "vcpupin": ("vcpus", "show or set the host CPUs of a vCPU's thread, as virsh does"),
        "guestvcpus": (
            "vcpus",
            "show or switch the guest's own CPUs, by the guest's own ids, as virsh does",
        ),
        "watch": ("watch", "report what happens to the vCPUs, line by line, until interrupted"),
    },
    "Definitions": {
        "define": ("define", "define a domain from an XML file, or from a running QEMU"),
        "undefine": ("define", "remove a domain's definition; its last XML is kept"),
        "list": ("definitions", "list the domains that are defined, and whether they run"),
        "dumpxml": ("definitions", "print the domain's XML, with its vCPUs as they are"),
    },
    "Start and end": {
        "probe": ("boot", "show what the vCPUs of a guest that does not run will be"),
        "boot-args": ("boot", "print QEMU's command line for a guest with the vCPUs of its XML"),
        "start": (
            "boot",
            "start a defined domain with exactly the vCPUs of its XML, in the background",
        ),
        "destroy": ("boot", "end the QEMU of a domain that `start` has started, at once"),
        "save": ("migrate", "write a running guest to a file, and end its QEMU"),
        "restore": ("migrate", "start a saved guest again, with exactly its vCPUs; the file stays"),
    },
    "Migration": {
        "migrate": ("migrate", "take a running guest to another QEMU, and verify it there"),
        "migrate-begin": (
            "migrate",
            "first phase, at the source: print the cookie, which describes the guest",
        ),
        "migrate-prepare": (
            "migrate",
            "second phase, at the destination: start or check it; prints its URI",
        ),
        "migrate-perform": ("migrate", "third phase, at the source: hand the guest over"),
        "migrate-finish": (
            "migrate",
            "fourth phase, at the destination: verify the guest, and let it run",
        ),
        "migrate-cancel": (
            "migrate",
            "end a migration: the source goes on, a destination that has not run ends",
        ),
    },
    "Host and tests": {
        "doctor": (
            "doctor",
            "check this host: QEMUs, machines that can hotplug, KVM, rights, what is missing",
        ),
        "compare": (
            "compare",
            "run one request on a guest of ours and on the same under libvirt, side by side",
        ),
        "demo": ("demo", "boot a small guest, enable a vCPU in it, disable it again"),
        "completion": ("completion", "print a completion script for a shell"),
    },
}

_ROWS: Final = {name: row for rows in GROUPS.values() for name, row in rows.items()}
#: The names of all commands.
NAMES: Final = tuple(_ROWS)
#: The commands that work on libvirt's domains (-c URI).
WITH_LIBVIRT: Final = (
    *("apply", "doctor", "dumpxml", "guestvcpus", "list", "setvcpu", "setvcpus"),
    *("vcpucount", "vcpuinfo", "vcpupin", "watch"),
)


def summary(name: str) -> str:
    """Return what a command does, in a few words."""
    return _ROWS[name][1]


def load(name: str) -> Command:
    """Return a command."""
    found = getattr(import_module(f"{__name__}.{_ROWS[name][0]}"), name.replace("-", "_"))
    assert isinstance(found, Command)
    return found
