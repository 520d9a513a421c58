"""qmpvcpu: switch single virtual CPUs of a QEMU guest on and off, by id, straight over QMP.

    async with qmpvcpu.connect("/run/web1.qmp") as domain:
        outcome = await domain.vcpu(5, VcpuFlag.ENABLE)

The names below are loaded when they are first used: importing qmpvcpu costs next to nothing.
"""

from __future__ import annotations

from qmpvcpu._version import __version__

# Type checkers read this name as true; importing `typing` for it would cost more than the rest of
# this file.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from qmpvcpu.app.probes import Probe, ProbeMode, find_layout
    from qmpvcpu.app.start import destroy, start
    from qmpvcpu.core.machine.layout import MachineLayout, MachineSpec
    from qmpvcpu.core.machine.numa import parse_numa
    from qmpvcpu.core.machine.smp import parse_smp
    from qmpvcpu.core.migration.cookie import Cookie
    from qmpvcpu.core.migration.status import MigrationStatus
    from qmpvcpu.core.model import (
        DomainState,
        Entity,
        Event,
        EventKind,
        Outcome,
        Props,
        QemuVersion,
        Topology,
        Vcpu,
    )
    from qmpvcpu.core.planning.live import Plan
    from qmpvcpu.core.request import Request, parse_ids
    from qmpvcpu.domain import Domain, Events, Options
    from qmpvcpu.domain.connect import connect
    from qmpvcpu.domain.interrupted import Interrupted
    from qmpvcpu.domain.migration.move import Migrated
    from qmpvcpu.errors import (
        OutcomeKind,
        Refusal,
        VcpuConnectionError,
        VcpuError,
        VcpuFailed,
        VcpuOverflow,
        VcpuPartial,
        VcpuRefused,
        VcpuRejected,
        VcpuUsageError,
    )
    from qmpvcpu.flags import VcpuFlag
    from qmpvcpu.qemu.qmp_log import QmpLog

_HOMES = {
    "qmpvcpu.app.probes": ("Probe", "ProbeMode", "find_layout"),
    "qmpvcpu.app.start": ("destroy", "start"),
    "qmpvcpu.core.machine.layout": ("MachineLayout", "MachineSpec"),
    "qmpvcpu.core.machine.numa": ("parse_numa",),
    "qmpvcpu.core.machine.smp": ("parse_smp",),
    "qmpvcpu.core.model": (
        "DomainState",
        "Entity",
        "Event",
        "EventKind",
        "Outcome",
        "Props",
        "QemuVersion",
        "Topology",
        "Vcpu",
    ),
    "qmpvcpu.core.migration.cookie": ("Cookie",),
    "qmpvcpu.core.migration.status": ("MigrationStatus",),
    "qmpvcpu.core.planning.live": ("Plan",),
    "qmpvcpu.core.request": ("Request", "parse_ids"),
    "qmpvcpu.domain": ("Domain", "Events", "Options"),
    "qmpvcpu.domain.connect": ("connect",),
    "qmpvcpu.domain.interrupted": ("Interrupted",),
    "qmpvcpu.domain.migration.move": ("Migrated",),
    "qmpvcpu.errors": (
        "OutcomeKind",
        "Refusal",
        "VcpuConnectionError",
        "VcpuError",
        "VcpuFailed",
        "VcpuOverflow",
        "VcpuPartial",
        "VcpuRefused",
        "VcpuRejected",
        "VcpuUsageError",
    ),
    "qmpvcpu.flags": ("VcpuFlag",),
    "qmpvcpu.qemu.qmp_log": ("QmpLog",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "__version__",
    "connect",
    "Cookie",
    "Domain",
    "DomainState",
    "Entity",
    "Event",
    "EventKind",
    "Events",
    "Interrupted",
    "Migrated",
    "MigrationStatus",
    "Options",
    "Outcome",
    "OutcomeKind",
    "Plan",
    "Props",
    "QemuVersion",
    "QmpLog",
    "Refusal",
    "Request",
    "Topology",
    "Vcpu",
    "VcpuConnectionError",
    "VcpuError",
    "VcpuFailed",
    "VcpuFlag",
    "VcpuOverflow",
    "VcpuPartial",
    "VcpuRefused",
    "VcpuRejected",
    "VcpuUsageError",
    "destroy",
    "find_layout",
    "MachineLayout",
    "MachineSpec",
    "parse_ids",
    "parse_numa",
    "parse_smp",
    "Probe",
    "ProbeMode",
    "start",
]


def __getattr__(name: str) -> object:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
