"""What is here and what is missing (`doctor`), and what one guest can and cannot do
(`doctor DOMAIN`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from qmpvcpu.app.cache import cache_folder
from qmpvcpu.app.qemus import DEMO_ARCH, QemuBinary, examine_all, find_binaries, survives_unplug
from qmpvcpu.core.arch import examined
from qmpvcpu.core.model import DomainState, Entity, format_ids, grouped
from qmpvcpu.domain import Domain
from qmpvcpu.errors import Refusal
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.host.rights import kvm_state, rights


@dataclass(frozen=True, slots=True)
class HostReport:
    """`doctor`: QEMUs, KVM, rights and guests of this host; `missing` has pairs of what is missing
    and its cure.
    """

    qemus: tuple[QemuBinary, ...]
    kvm: bool
    kvm_reason: str | None
    rights: dict[str, Any]
    guests: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """The document of `doctor --json`."""
        return {
            "qemus": [qemu.to_json() for qemu in self.qemus],
            "kvm": {"usable": self.kvm, "reason": self.kvm_reason},
            "rights": self.rights,
            "guests": list(self.guests),
            "missing": [{"what": what, "cure": cure} for what, cure in self.missing],
        }

    def lines(self) -> list[str]:
        """The lines to print."""
        lines = []
        for qemu in self.qemus:
            text = f"QEMU {qemu.version}" if qemu.version else f"does not run: {qemu.error}"
            lines.append(f"{qemu.path}: {text}")
            if qemu.version:
                families = _families(qemu.hotplug)
                lines.append(
                    f"    CPU hotplug on: {families}"
                    if families
                    else "    no machine type of this QEMU can hotplug CPUs"
                )
        if not self.qemus:
            lines.append("this host has no QEMU")
        lines.append(f"KVM: {'usable' if self.kvm else self.kvm_reason}")
        user = "root" if self.rights["root"] else "an ordinary user"
        may = "may" if self.rights["sys_nice"] else "may not"
        lines.append(f"rights: {user}, {may} set real-time schedulers (CAP_SYS_NICE)")
        lines += [
            f"cgroup {version}: {', '.join(names)}"
            for version, names in self.rights["cgroup"].items()
            if names
        ]
        lines.append(f"test guests: {', '.join(self.guests) or 'none built'}")
        lines += [f"missing: {what}\n    cure: {cure}" for what, cure in self.missing]
        return lines


def _families(machines: Sequence[str]) -> str:
    """Machine types, one for each family: of `pc-q35-2.4` … `pc-q35-7.2` the newest."""
    newest: dict[str, tuple[list[int], str]] = {}
    for name in machines:
        family = re.sub(r"-\d+(\.\d+)+$", "", name)
        number = [int(n) for n in re.findall(r"\d+", name[len(family) :])]
        newest[family] = max(newest.get(family, ([], name)), (number, name))
    return ", ".join(name for _, name in (newest[family] for family in sorted(newest)))


async def examine_host() -> HostReport:
    """Examine this host; each QEMU is started for a moment."""
    qemus = tuple(await examine_all(find_binaries()))
    usable, reason = kvm_state()
    guests = tuple(
        sorted(path.parent.name for path in (cache_folder() / "guests").glob("[!.]*/guest.json"))
    )
    return HostReport(
        qemus, usable, reason, rights(), guests, tuple(_missing(qemus, usable, reason, guests))
    )


def _missing(
    qemus: Sequence[QemuBinary], kvm: bool, reason: str | None, guests: Sequence[str]
) -> list[tuple[str, str]]:
    running = [qemu for qemu in qemus if qemu.version]
    there = {qemu.arch for qemu in running}
    lacking = grouped((row.package, row.name) for row in examined() if row.name not in there)
    found = [
        (f"no QEMU for {', '.join(names)}", f"apt-get install --no-install-recommends {package}")
        for package, names in lacking.items()
    ]
    survives = any(qemu.arch == DEMO_ARCH and survives_unplug(qemu) for qemu in running)
    kvm_cure = f"adduser {os.environ.get('USER', 'USER')} kvm, then log in again"
    if reason is not None and reason.startswith("there is no"):
        kvm_cure = (
            "modprobe kvm_intel (or kvm_amd), with virtualization on in the firmware; TCG"
            " works without"
        )
    checks = (
        (
            survives,
            "no QEMU that survives an x86 unplug under TCG (10.0 or later)",
            "scripts/fetch-qemu 10.0",
        ),
        (
            DEMO_ARCH in guests,
            "no test guest for `qmpvcpu demo`",
            f"scripts/build-guest {DEMO_ARCH}",
        ),
        (kvm, f"KVM: {reason}", kvm_cure),
        (
            find_spec("shtab") is not None,
            "`qmpvcpu completion` needs shtab",
            "pip install 'qmpvcpu[cli]'",
        ),
    )
    return found + [(what, cure) for is_there, what, cure in checks if not is_there]


@dataclass(frozen=True, slots=True)
class DomainReport:
    """`doctor DOMAIN`: what this guest can and cannot do, and what could kill its QEMU."""

    state: DomainState
    can: tuple[str, ...]
    cannot: tuple[str, ...]
    kills: tuple[str, ...]
    #: Where the guest's machine differs from its definition.
    differences: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document of `doctor DOMAIN --json`."""
        state = self.state
        return {
            "domain": state.name,
            "arch": state.arch,
            "machine": state.machine,
            "accel": state.accel,
            "version": str(state.version),
            "can": list(self.can),
            "cannot": list(self.cannot),
            "kills": list(self.kills),
            "differences": list(self.differences),
        }

    def lines(self) -> list[str]:
        """The lines to print."""
        state = self.state
        return [
            f"{state.name}: {state.arch}, {state.machine}, QEMU {state.version}, {state.accel}",
            *(f"can: {text}" for text in self.can),
            *(f"cannot: {text}" for text in self.cannot),
            *(f"KILLS QEMU: {text}" for text in self.kills),
            *(f"differs from its definition: {text}" for text in self.differences),
        ]


async def examine_domain(domain: Domain) -> DomainReport:
    """Find out what this guest can and cannot do now, by planning the same requests; nothing is
    changed.

    Raises:
        VcpuError: the running guest cannot be asked.
    """
    state = await domain.state(VcpuFlag.LIVE)
    can: list[str] = []
    cannot: list[str] = []
    kills: list[str] = []
    empty = [entity for entity in state.entities if not entity.plugged]
    pluggable = [entity for entity in empty if entity.hotpluggable]
    unpluggable = [entity for entity in state.entities if entity.plugged and entity.hotpluggable]
    fixed = [entity for entity in state.entities if entity.plugged and not entity.hotpluggable]
    if not state.can_plug:
        cannot.append("plug or unplug: this machine has no CPU hotplug")
    elif not empty:
        cannot.append("plug: every slot is filled")
    elif pluggable:
        plan = await domain.plan_enable(pluggable[0].ids, live=True, place=False)
        unit = max(len(entity.ids) for entity in state.entities)
        grain = f", {unit} vCPUs (one core) at a time" if unit > 1 else ""
        _judge(f"plug vCPU {_all_ids(empty)}{grain}", plan.refusals, can, cannot, kills)
    if state.can_unplug:
        if unpluggable:
            plan = await domain.plan_disable(unpluggable[-1].ids, live=True, fallback=False)
            what = f"unplug vCPU {_all_ids(unpluggable)}"
            _judge(what, plan.refusals, can, cannot, kills, condition=", if the guest agrees")
        cannot += [f"unplug {entity.label}: it holds the boot CPU" for entity in fixed]
    elif state.can_plug:
        cannot.append(f"unplug: {state.machine} cannot unplug CPUs")
    if state.threads_shared:
        cannot.append("place vCPUs: all of them share one thread (-accel tcg,thread=single)")
    if (why := await domain.agent_refusal()) is not None:
        cannot.append(f"switch vCPUs in the guest: {why.message}")
    kills += domain.plugs_left()
    return DomainReport(state, tuple(can), tuple(cannot), tuple(dict.fromkeys(kills)))


def _judge(
    what: str,
    refusals: Sequence[Refusal],
    can: list[str],
    cannot: list[str],
    kills: list[str],
    *,
    condition: str = "",
) -> None:
    """Add an operation to the list that its refusals put it in: `can`, `cannot`, `kills`."""
    if not refusals:
        can.append(what + condition)
    cannot.extend(f"{what}: {refusal.message}" for refusal in refusals)
    kills.extend(refusal.message for refusal in refusals if refusal.code == "kills-qemu")


def _all_ids(entities: Iterable[Entity]) -> str:
    return format_ids(number for entity in entities for number in entity.ids)
