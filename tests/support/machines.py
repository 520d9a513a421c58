"""A machine before it runs: -machine, -smp and -numa words, or a domain's XML, in; slots or
arguments out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmpvcpu import MachineLayout, MachineSpec, Probe, QemuVersion, Topology, parse_numa, parse_smp
from qmpvcpu.app.boot import command_line
from qmpvcpu.app.qemus import examine
from qmpvcpu.core.definition import Definition
from qmpvcpu.core.machine.boot_arguments import BootStyle, boot_args, machine_spec, qemu_arch
from qmpvcpu.core.machine.layout import (
    LayoutSource,
    QemuFacts,
    facts_of,
    parse_layout,
    predict_layout,
)
from qmpvcpu.core.machine.smp import is_proven, parse_machine, predict
from qmpvcpu.core.machine.versions import has_machine
from qmpvcpu.xml.document import read_domain
from tests.support.qemus import qemu_binary

Version = tuple[int, ...]


# -- arithmetic ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Computed:
    """`props` of each slot, in the order of vCPU ids; `sizes` are their numbers of vCPUs, `plugged`
    whether QEMU starts with them. `is_certain` is false for sizes that not every machine of its
    kind takes.
    """

    cpus: int
    topology: Topology
    props: list[dict[str, Any]]
    sizes: list[int]
    plugged: list[bool]
    is_certain: bool


def compute(
    arch: str, machine: str, version: Version, smp: str, numa: Sequence[str] = ()
) -> Computed:
    """What QEMU would make of these arguments. Raises VcpuRefused: it would decline them; the text
    says why.
    """
    found = predict(arch, machine, QemuVersion(*version), parse_smp(smp), parse_numa(numa))
    return Computed(
        found.cpus,
        found.topology,
        [dict(slot.props or {}) for slot in found.slots],
        [slot.vcpus_count for slot in found.slots],
        [slot.plugged for slot in found.slots],
        found.is_certain,
    )


def is_measured(arch: str, machine: str, version: Version) -> bool:
    """Whether the arithmetic was compared with this very QEMU."""
    return is_proven(arch, machine, QemuVersion(*version))


def has_machine_type(version: Version, machine: str) -> bool | None:
    """Whether a QEMU has it; None where only it can tell."""
    return has_machine(QemuVersion(*version), machine)


async def machine_types(arch: str, version: str) -> tuple[str, ...]:
    """Those of a real QEMU that have CPU hotplug."""
    found = await examine(qemu_binary(version, arch), arch)
    assert found.error is None
    return found.hotplug


# -- layouts ---------------------------------------------------------------------------------------


def spec(
    machine: str, smp: str, *, cpu: str | None = None, numa: Sequence[str] = (), accel: str = "tcg"
) -> MachineSpec:
    return MachineSpec(machine, parse_smp(smp), cpu, accel, parse_numa(numa))


def predicted(
    asked: MachineSpec,
    arch: str = "x86_64",
    known: Mapping[str, Any] | None = None,
    *,
    assume: bool = False,
    typed: bool = False,
    unseen: bool = False,
) -> MachineLayout | None:
    """The layout as far as arithmetic knows it; None where a QEMU has to be asked.

    `known` is what was learned of that QEMU before (see `learned`); `assume`: its CPU model is one
    that QEMU has; `typed`: the driver of `device_add` is wanted; `unseen`: it is of a QEMU whose
    version nobody knows. Raises
    VcpuRefused: QEMU would decline it.
    """
    facts = None if known is None else QemuFacts.from_json(known)
    return predict_layout(asked, arch, facts, assume=assume, typed=typed, unseen=unseen)


def answered(replies: Mapping[str, Any], *, source: str = "probed") -> MachineLayout:
    """The layout by the replies of a QEMU that was asked, by command. Raises VcpuConnectionError."""
    return parse_layout(replies, "tcg", LayoutSource(source))


def learned(
    asked: MachineSpec, layout: MachineLayout, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a layout teaches of its QEMU, as the cache keeps it."""
    return facts_of(
        asked, layout, None if before is None else QemuFacts.from_json(before)
    ).to_json()


def read_from_cache(kept: Any) -> dict[str, Any]:
    """What the cache keeps of a QEMU, read and written.

    Raises ValueError, TypeError, KeyError or AttributeError: it is damaged.
    """
    return QemuFacts.from_json(kept).to_json()


def merged(*words: tuple[str, str]) -> tuple[str, str]:
    """-machine and -smp as their words make them together: both as QEMU takes them. Raises
    VcpuUsageError.
    """
    machine, smp = parse_machine(words)
    return machine, str(smp)


# -- a guest that boots ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Boot:
    """QEMU's `arguments`, the QMP `commands` that follow, and their JSON. `started` are the first
    vCPU ids of what it boots with, in the order in which they come.
    """

    arguments: tuple[str, ...]
    commands: tuple[dict[str, Any], ...]
    json: list[Any]
    started: tuple[int, ...]
    messages: tuple[str, ...]

    def values(self, option: str) -> list[str]:
        """The values of this option, in order."""
        return [
            value
            for key, value in zip(self.arguments, self.arguments[1:], strict=False)
            if key == option
        ]


def boot(
    xml: str,
    known: Mapping[str, Any] | None = None,
    *,
    style: str = "device",
    incoming: str | None = None,
    machine_of: str | None = None,
) -> Boot:
    """The command line for a domain, `known` as for `predicted`; `machine_of`: QEMU's machine is
    that of another domain. Raises VcpuRefused.
    """
    definition, other = _definition(xml), _definition(machine_of or xml)
    layout = predicted(machine_spec(other), qemu_arch(other), known, assume=True)
    assert layout is not None, "arithmetic is enough"
    made = boot_args(definition, layout, BootStyle(style), incoming)
    return Boot(made.arguments, made.commands, made.to_json(), made.started, made.messages)


async def boot_with(
    xml: str, *, style: str = "device", incoming: str | None = None
) -> tuple[Probe, Boot]:
    """What the QEMU that a domain names makes of it, and the command line; it is asked where need
    be.
    """
    line = await command_line(_definition(xml), BootStyle(style), incoming=incoming)
    made = line.args
    return line.probe, Boot(
        made.arguments, made.commands, made.to_json(), made.started, made.messages
    )


def memory(xml: str) -> int | None:
    """Bytes. Raises VcpuRefused: it is not a size."""
    return _definition(xml).memory


def _definition(xml: str) -> Definition:
    return read_domain(xml.encode())[1]
