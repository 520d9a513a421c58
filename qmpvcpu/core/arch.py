"""One row for each architecture: its names, and what its machines, firmware and guests do. Pure.

Code reads a value or an ability from a row; it never compares an architecture's name.
`architecture()` accepts both QEMU's name of a target and libvirt's names (`i386` and `i686`,
`ppc64` and `ppc64le`, `arm` and `armv7l`), so all rules and checks hold for both.

To add an architecture, add a row. Values were measured with QEMU 7.2, 10.0 and 11.1
(docs/qemu-facts.md).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final


class EntityKind(StrEnum):
    """What one `device_add` creates."""

    THREAD = "thread"
    #: A core with all of its threads.
    CORE = "core"
    #: A CPU whose core-id is unique in the whole machine.
    CPU = "cpu"


class Identity(StrEnum):
    """How files of the guest identify the vCPU of each of its CPUs."""

    #: `apicid` in /proc/cpuinfo of the CPUs that are online, the ACPI path of the others.
    APIC_ID = "apic-id"
    #: The ACPI path, `\\_SB_.CPUS.C005`: QEMU's index of the slot.
    ACPI_PATH = "acpi-path"
    #: A number that counts cores with a stride (`qom-get /machine vsmt`).
    PHYSICAL_ID = "physical-id"
    #: QEMU's core-id.
    CORE_ID = "core-id"
    #: A number in the device tree; its rank is the vCPU id, because all CPUs are there from the
    #: start.
    DEVICE_TREE = "device-tree"


_MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Architecture:
    """The properties of one architecture.

    Attributes:
        name: QEMU's name of the target, that of its program and of `query-target`.
        aliases: libvirt's names of guests that this target runs.
        runs_on: other targets whose QEMU can run its guests.
        package: Debian's package of its QEMU, for those that qmpvcpu looks for on a host.
        entity: what one `device_add` creates.
        can_plug: whether its usual machines have CPU hotplug.
        can_unplug: whether they can unplug a CPU.
        hotplug_machines: a pattern of the machine types whose vCPUs `core.machine.smp` can compute.
        machine_names: names with which only machine types of this architecture begin.
        default_machine: libvirt's default if the XML has none.
        levels: of -smp, outermost first, that its machines can have more than one of.
        computed_under_kvm: whether the computed vCPUs have been compared with QEMU under KVM.
        most_computed: every such machine supports up to this many vCPUs; more depends on version
            and CPU model.
        default_cpu: the default CPU model of a machine; None if it differs between versions.
        cpu_suffix: with this suffix the name of a CPU model is the `driver` of `device_add`; None
            if names are aliases ("POWER9") that differ between versions.
        has_numa: whether its machines support -numa.
        has_numa_mem: whether all of them support `-numa node,mem=`; elsewhere only old machine
            types do.
        has_node_always: whether the props of a slot have node 0 on a machine without NUMA.
        memory_alignment: bytes; the size of a machine's memory, and of a node's, is a multiple of
            it.
        device_bus: the bus of virtio devices, the suffix of their names.
        has_apic: whether vCPUs have x86 APIC ids, and unplug works through ACPI as on x86.
        reset_drops_unplug: whether a reset of the machine drops an unplug that was requested.
        saves_unplug: whether a machine's state includes pending unplugs: they go on after a
            restore.
        identity: how the guest's files identify its CPUs; None if they do not.
        identity_file: that file, in a CPU's folder in sysfs.
        lists_possible_cpus: whether the guest's agent also lists CPUs that are not plugged.
        boots_on_first: whether the guest's CPU 0 is vCPU 0 after a boot.
    """

    name: str
    aliases: tuple[str, ...] = ()
    runs_on: tuple[str, ...] = ()
    package: str | None = None
    entity: EntityKind = EntityKind.THREAD
    can_plug: bool = False
    can_unplug: bool = False
    hotplug_machines: str | None = None
    machine_names: tuple[str, ...] = ()
    default_machine: str = "virt"
    levels: tuple[str, ...] = ("sockets", "cores", "threads")
    computed_under_kvm: bool = False
    most_computed: int = 0
    default_cpu: str | None = None
    cpu_suffix: str | None = None
    has_numa: bool = True
    has_numa_mem: bool = False
    has_node_always: bool = False
    memory_alignment: int = _MIB
    device_bus: str = "pci"
    has_apic: bool = False
    reset_drops_unplug: bool = False
    saves_unplug: bool = False
    identity: Identity | None = None
    identity_file: str | None = None
    lists_possible_cpus: bool = False
    boots_on_first: bool = True

    def computes(self, machine: str) -> bool:
        """Whether `core.machine.smp` has the rules of this machine type."""
        return (
            self.hotplug_machines is not None
            and re.fullmatch(self.hotplug_machines, machine) is not None
        )

    def entity_size(self, threads: int) -> int:
        """How many vCPUs one `device_add` creates on a machine with so many threads in a core."""
        return threads if self.entity is EntityKind.CORE else 1


X86_64: Final = Architecture(
    "x86_64",
    package="qemu-system-x86",
    can_plug=True,
    can_unplug=True,
    hotplug_machines=r"pc|q35|pc-q35-\d+\.\d+|pc-i440fx-\d+\.\d+",
    machine_names=("pc", "q35"),
    default_machine="pc",
    levels=("sockets", "dies", "modules", "cores", "threads"),
    computed_under_kvm=True,
    most_computed=240,
    default_cpu="qemu64",
    cpu_suffix="-x86_64-cpu",
    has_apic=True,
    reset_drops_unplug=True,
    saves_unplug=True,
    identity=Identity.APIC_ID,
    identity_file="firmware_node/path",
)

I386: Final = replace(
    X86_64,
    name="i386",
    aliases=("i686",),
    runs_on=("x86_64",),
    package=None,
    machine_names=(),
    default_cpu="qemu32",
    cpu_suffix="-i386-cpu",
)

PPC64: Final = Architecture(
    "ppc64",
    aliases=("ppc64le",),
    package="qemu-system-ppc",
    entity=EntityKind.CORE,
    can_plug=True,
    can_unplug=True,
    hotplug_machines=r"pseries(-\d+\.\d+)?",
    machine_names=("pseries",),
    default_machine="pseries",
    most_computed=1024,
    has_node_always=True,
    memory_alignment=256 * _MIB,
    identity=Identity.PHYSICAL_ID,
    identity_file="physical_id",
    lists_possible_cpus=True,
)

ROWS: Final = (
    X86_64,
    I386,
    PPC64,
    Architecture(
        "s390x",
        package="qemu-system-misc",
        entity=EntityKind.CPU,
        can_plug=True,
        hotplug_machines=r"s390-ccw-virtio(-\d+\.\d+)?",
        machine_names=("s390-ccw-virtio",),
        default_machine="s390-ccw-virtio",
        levels=("drawers", "books", "sockets", "cores", "threads"),
        most_computed=248,
        default_cpu="qemu",
        cpu_suffix="-s390x-cpu",
        has_numa=False,
        device_bus="ccw",
        identity=Identity.CORE_ID,
        identity_file="address",
    ),
    Architecture(
        "loongarch64",
        package="qemu-system-misc",
        can_plug=True,
        can_unplug=True,
        hotplug_machines=r"virt(-\d+\.\d+)?",
        most_computed=256,
        default_cpu="la464",
        has_numa_mem=True,
        cpu_suffix="-loongarch-cpu",
        identity=Identity.ACPI_PATH,
        identity_file="firmware_node/path",
    ),
    Architecture(
        "aarch64",
        package="qemu-system-arm",
        identity=Identity.DEVICE_TREE,
        identity_file="of_node/reg",
    ),
    Architecture(
        "riscv64",
        package="qemu-system-misc",
        identity=Identity.DEVICE_TREE,
        identity_file="of_node/reg",
        boots_on_first=False,
    ),
    Architecture("arm", aliases=("armv6l", "armv7b", "armv7l"), runs_on=("aarch64",)),
    Architecture("hppa", aliases=("parisc", "parisc64")),
    Architecture("or1k", aliases=("or32",)),
    *(
        Architecture(name)
        for name in (
            *(
                "alpha",
                "avr",
                "m68k",
                "microblaze",
                "microblazeel",
                "mips",
                "mips64",
                "mips64el",
                "mipsel",
            ),
            *(
                "ppc",
                "riscv32",
                "rx",
                "sh4",
                "sh4eb",
                "sparc",
                "sparc64",
                "tricore",
                "xtensa",
                "xtensaeb",
            ),
        )
    ),
)

_BY_NAME: Final = {name: row for row in ROWS for name in (row.name, *row.aliases)}
#: Nothing is known about it, so nothing is refused because of it.
_UNKNOWN: Final = Architecture("", can_plug=True, can_unplug=True)


def architecture(name: str | None) -> Architecture:
    """The row of an architecture, by QEMU's name or one of libvirt's; a row without rules for an
    unknown name.
    """
    return _BY_NAME.get(name or "") or (replace(_UNKNOWN, name=name) if name else _UNKNOWN)


def architecture_of_machine(machine: str) -> Architecture | None:
    """The architecture of a machine type (`q35`, `pseries-10.0,cap-…`), if its name alone decides
    that.
    """
    name = machine.partition(",")[0] + "-"
    return next(
        (row for row in ROWS if any(name.startswith(word + "-") for word in row.machine_names)),
        None,
    )


def architecture_of_program(path: str) -> Architecture | None:
    """The architecture that a QEMU program is for, by its name (`/usr/bin/qemu-system-ppc64`)."""
    name = path.rpartition("/")[2]
    return (
        _BY_NAME.get(name.removeprefix("qemu-system-")) if name.startswith("qemu-system-") else None
    )


def programs_of(arch: str) -> tuple[str, ...]:
    """The targets whose QEMU runs guests of an architecture, its own first."""
    row = architecture(arch)
    return (row.name, *row.runs_on)


def examined() -> Sequence[Architecture]:
    """The architectures for whose QEMU qmpvcpu searches on a host."""
    return tuple(row for row in ROWS if row.package is not None)
