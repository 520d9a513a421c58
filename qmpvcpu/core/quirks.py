"""One row for each known defect of QEMU: where it is, what triggers it, its effect, what to do
instead. Pure.

To add a defect, add a row: `core.rules.hotplug` and `core.migration.leaving` refuse what a row with
`is_refused` describes, unless the request is forced. The first table of docs/qemu-facts.md is
printed from the rows (`scripts/quirks-table`). Versions are those in which the behaviour was
measured. A version between one with a defect and one without it counts as having it, and so does
every version before the oldest one with it, unless `came` gives the first version with it.

Only this module and `core.machine.versions` compare QEMU versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final

from qmpvcpu.core.arch import I386, PPC64, X86_64, Architecture, architecture
from qmpvcpu.core.model import DomainState, QemuVersion


class Trigger(StrEnum):
    """What triggers a defect."""

    PLUG = "plug"
    UNPLUG = "unplug"
    MIGRATE = "migrate"
    #: `system_reset`, which qmpvcpu never sends.
    RESET = "reset"


class Fact(StrEnum):
    """A further condition of a defect."""

    #: A vCPU was unplugged before.
    AFTER_UNPLUG = "after-unplug"
    #: `-accel tcg,thread=single`.
    SINGLE_THREAD = "single-thread"
    #: `-accel tcg,thread=multi`, or not known.
    MULTI_THREAD = "multi-thread"
    #: An APIC id of 255 or more, with a CPU model that is not known to have x2apic.
    APIC_255 = "apic-255"
    #: The firmware still runs.
    FIRMWARE = "firmware"
    #: Certainly fewer TCG contexts are left than vCPUs are to be plugged.
    NO_CONTEXTS = "no-contexts"
    #: More than one vCPU is plugged.
    SEVERAL_VCPUS = "several-vcpus"
    #: OVMF with SMM has started the guest, and has run.
    SMM = "smm"
    #: The guest's CPU hotplug block is still in its legacy mode.
    LEGACY_HOTPLUG = "legacy-hotplug"
    #: QEMU may not write to a memory backend (`readonly=on`, `rom` not off).
    READ_ONLY_MEMORY = "read-only-memory"


@dataclass(frozen=True, slots=True)
class Quirk:
    """One defect.

    Attributes:
        id: its name.
        arches: the architectures that have it; empty: all of them.
        accel: the accelerator that has it, None: every one.
        triggers: what triggers it.
        facts: further conditions, all of which must be true.
        seen: the versions in which it was measured.
        came: the first version with it, or the one after the last that was measured without it.
        fixed: the first version that was measured without it, or is known to have the fix; None:
            not known.
        effect: what happens, for a reader of the documentation.
        is_refused: whether qmpvcpu refuses what triggers it, unless that is forced.
        message: the refusal's text, with the fields `{version}`, `{used}` and `{maxcpus}` of the
            guest.
        hint: what to do instead.
        code: the refusal's code.
    """

    id: str
    effect: str
    triggers: tuple[Trigger, ...]
    seen: tuple[str, ...]
    fixed: QemuVersion | None = None
    came: QemuVersion | None = None
    arches: tuple[Architecture, ...] = ()
    accel: str | None = None
    facts: frozenset[Fact] = frozenset()
    is_refused: bool = False
    message: str = ""
    hint: str = ""
    code: str = "kills-qemu"

    def is_in(self, version: QemuVersion | None) -> bool:
        """Whether a QEMU of this version counts as having it; an unknown version does."""
        if version is None:
            return True
        return (self.came is None or self.came <= version) and (
            self.fixed is None or version < self.fixed
        )

    def affects(self, arch: str | None, accel: str | None, version: QemuVersion | None) -> bool:
        """Whether it can affect a guest of this architecture (QEMU's or libvirt's name)."""
        if self.accel is not None and accel != self.accel:
            return False
        return (not self.arches or architecture(arch) in self.arches) and self.is_in(version)


_X86: Final = (X86_64, I386)
_PPC64: Final = (PPC64,)
_PLUG: Final = (Trigger.PLUG,)
_UNPLUG: Final = (Trigger.UNPLUG,)
_MIGRATE: Final = (Trigger.MIGRATE,)

QUIRKS: Final = (
    Quirk(
        "x86-tcg-unplug",
        "QEMU crashes after an unplug, or at the next plug",
        _UNPLUG,
        ("7.2",),
        fixed=QemuVersion(10, 0),
        arches=_X86,
        accel="tcg",
        is_refused=True,
        message="QEMU {version} under TCG crashes after the unplug of an x86 CPU, or at the next"
        " plug",
        hint="use QEMU 10 or KVM",
    ),
    Quirk(
        "x86-tcg-plug-after-unplug",
        "QEMU crashes at a plug after an unplug",
        _PLUG,
        ("7.2",),
        fixed=QemuVersion(10, 0),
        arches=_X86,
        accel="tcg",
        facts=frozenset({Fact.AFTER_UNPLUG}),
        is_refused=True,
        message="QEMU {version} under TCG crashes at a plug after an unplug",
        hint="restart the guest, or use QEMU 10",
    ),
    Quirk(
        "x86-tcg-single-thread-unplug",
        "`qemu_thread_join` aborts QEMU once the guest has ejected the CPU",
        _UNPLUG,
        ("7.2", "10.0", "11.1"),
        arches=_X86,
        accel="tcg",
        facts=frozenset({Fact.SINGLE_THREAD}),
        is_refused=True,
        message=(
            "QEMU {version} with -accel tcg,thread=single aborts at the unplug of a CPU"
            " (qemu_thread_join)"
        ),
        hint="start the guest with -accel tcg,thread=multi",
    ),
    Quirk(
        "ppc64-tcg-single-thread-unplug",
        "QEMU never answers the `device_del` of a core, nor anything after it; before the guest"
        " runs, too",
        _UNPLUG,
        ("7.2", "10.0", "11.1"),
        arches=_PPC64,
        accel="tcg",
        facts=frozenset({Fact.SINGLE_THREAD}),
        is_refused=True,
        message="QEMU {version} with -accel tcg,thread=single hangs for good at the unplug of a"
        " core",
        hint="start the guest with -accel tcg,thread=multi",
    ),
    Quirk(
        "tcg-contexts",
        "each vCPU plugged uses up one of maxcpus TCG contexts for good, boot CPUs included;"
        " when all are used, `tcg_register_thread` aborts QEMU. With 1 of maxcpus=2 that is the"
        " second round of plug and unplug; of maxcpus=4 the fourth",
        _PLUG,
        ("7.2", "10.0", "11.1"),
        accel="tcg",
        facts=frozenset({Fact.MULTI_THREAD, Fact.NO_CONTEXTS}),
        is_refused=True,
        message=(
            "QEMU under TCG never frees the context of an unplugged CPU: at least {used} of"
            " {maxcpus} are used up, and QEMU aborts (tcg_register_thread) when they run out"
        ),
        hint="restart the guest; a larger maxcpus delays this",
    ),
    Quirk(
        "x86-tcg-apic-255",
        "plugging a CPU with APIC id 255 or more aborts QEMU without x2apic in the CPU model; 11.1"
        " gives an error",
        _PLUG,
        ("10.0",),
        fixed=QemuVersion(11, 1),
        arches=_X86,
        accel="tcg",
        facts=frozenset({Fact.APIC_255}),
        is_refused=True,
        message=(
            "QEMU {version} under TCG aborts when a CPU with APIC id 255 or more is plugged and"
            " the CPU model has no x2apic"
        ),
        hint="start the guest with -cpu max, or with QEMU 11.1",
    ),
    Quirk(
        "x86-tcg-smm-plug",
        "one plug into a running guest that OVMF with SMM has started hangs it: its CPUs stay in"
        " SMM. Plugs under -S before `cont` are safe",
        _PLUG,
        ("10.0", "11.1"),
        arches=_X86,
        accel="tcg",
        facts=frozenset({Fact.SMM}),
        is_refused=True,
        message=(
            "OVMF with SMM runs this guest: under TCG a CPU that is plugged now hangs it for"
            " good (its CPUs stay in SMM)"
        ),
        hint="plug it before the guest runs (-S), or start the guest with OVMF without SMM"
        " (-machine smm=off)",
        code="hangs-guest",
    ),
    Quirk(
        "x86-legacy-hotplug",
        "QEMU rejects every unplug until firmware or the kernel leaves the legacy mode of the"
        " CPU hotplug block (`qom-get /machine/acpi-device cpu-hotplug-legacy`). A kernel with"
        " ACPI does that while it boots; with acpi=off, and on machine types up to 2.6, nothing"
        " does. 11.1 has no such property: it accepts the unplug, which then never ends",
        _UNPLUG,
        ("7.2", "10.0"),
        fixed=QemuVersion(11, 1),
        arches=_X86,
        facts=frozenset({Fact.LEGACY_HOTPLUG}),
        is_refused=True,
        message=(
            "QEMU rejects every unplug of a CPU, because the guest's CPU hotplug block is still in"
            " its legacy mode"
        ),
        hint="boot a kernel with ACPI, which leaves that mode; acpi=off and machine types up to"
        " 2.6 keep it",
        code="legacy-hotplug",
    ),
    Quirk(
        "x86-tcg-no-deleted-event",
        "QEMU sends no DEVICE_DELETED for the CPU itself, only for its lapic: a query shows the"
        " end of an unplug. 11.1 sends it late, at a later plug",
        _UNPLUG,
        ("7.2", "10.0", "11.1"),
        arches=_X86,
        accel="tcg",
    ),
    Quirk(
        "ppc64-tcg-firmware-unplug",
        "unplugging a core while the firmware (SLOF) runs crashes QEMU, or the next `system_reset`"
        " does",
        _UNPLUG,
        ("7.2", "10.0"),
        fixed=QemuVersion(11, 1),
        arches=_PPC64,
        accel="tcg",
        facts=frozenset({Fact.FIRMWARE}),
        is_refused=True,
        message=(
            "QEMU {version} under TCG crashes at or after the unplug of a ppc64 core while the"
            " firmware (SLOF) runs"
        ),
        hint="wait until the guest's kernel runs",
    ),
    Quirk(
        "ppc64-tcg-unplug-deadlock",
        "the guest hangs, and QEMU from the next `stop` on (only KILL ends it), about once in"
        " 100 unplugs on a busy host (none of 510 on an idle one): the vCPU that releases a core"
        " waits for the end of the core's thread (`pthread_join`), that thread waits for a third"
        " vCPU's exclusive work, and the third waits for the first",
        _UNPLUG,
        ("10.0",),
        arches=_PPC64,
        accel="tcg",
        facts=frozenset({Fact.MULTI_THREAD}),
    ),
    Quirk(
        "ppc64-tcg-unplug-race",
        "QEMU dies as the guest releases a core (`qemu_mutex_lock_impl: Assertion"
        " mutex->initialized`, `double free or corruption`), about once in 100 unplugs on a busy"
        " host (none of 510 on an idle one)",
        _UNPLUG,
        ("10.0",),
        arches=_PPC64,
        accel="tcg",
        facts=frozenset({Fact.MULTI_THREAD}),
    ),
    Quirk(
        "ppc64-tcg-reset-after-unplug",
        "`system_reset` after any unplug aborts QEMU (`qemu_mutex_lock_impl`,"
        " `__pthread_tpp_change_priority`), with Linux running too; qmpvcpu never resets a guest",
        (Trigger.RESET,),
        ("10.0",),
        fixed=QemuVersion(11, 1),
        arches=_PPC64,
        accel="tcg",
        facts=frozenset({Fact.AFTER_UNPLUG}),
    ),
    Quirk(
        "ppc64-tcg-decrementer",
        'the decrementer is not migrated ("target/ppc: Migrate DECR SPR"): an idle Linux usually'
        " hangs at the first migration, a busy one after several",
        _MIGRATE,
        ("7.2",),
        fixed=QemuVersion(8, 2),
        arches=_PPC64,
        accel="tcg",
        is_refused=True,
        message=(
            "QEMU {version} under TCG does not migrate the decrementer, and a Linux guest hangs,"
            " at once or some migrations later (seen with 7.2; not with 11.1)"
        ),
        hint="use QEMU 11.1 or KVM",
        code="decrementer",
    ),
    Quirk(
        "ppc64-tcg-one-cpu",
        "after a migration no interrupt reaches any vCPU but the first, and a Linux with more"
        " online hangs (`env->quiesced` is not migrated, gitlab issue 3079)",
        _MIGRATE,
        ("10.0",),
        came=QemuVersion(8, 2),
        fixed=QemuVersion(11, 1),
        arches=_PPC64,
        accel="tcg",
        facts=frozenset({Fact.SEVERAL_VCPUS}),
        is_refused=True,
        message=(
            "QEMU {version} under TCG: after a migration no interrupt reaches any vCPU but the"
            " first, and a Linux guest hangs (seen with 10.0; not with 11.1)"
        ),
        hint=(
            "`migrate` takes the other CPUs offline for it if the guest's agent is known on both"
            " sides (--agent ADDR or a definition with it, and --dest-agent ADDR or a"
            " destination by name); or use QEMU 11.1 or KVM"
        ),
        code="one-cpu",
    ),
    Quirk(
        "x86-tcg-migrate-after-unplug",
        "a migration after an unplug never gets past `setup`: QEMU's RCU thread waits for a reader"
        " for good",
        _MIGRATE,
        ("10.0",),
        fixed=QemuVersion(11, 1),
        arches=_X86,
        accel="tcg",
        facts=frozenset({Fact.AFTER_UNPLUG}),
        is_refused=True,
        message=(
            "QEMU {version} under TCG never gets past 'setup' once a vCPU was unplugged (seen with"
            " 10.0)"
        ),
        hint="use QEMU 11.1 or KVM",
        code="setup",
    ),
    Quirk(
        "ppc64-tcg-migrate-after-unplug",
        "a migration after a core was unplugged aborts QEMU, under -S too"
        " (`qemu_mutex_lock_impl: Assertion mutex->initialized`)",
        _MIGRATE,
        ("7.2", "10.0"),
        fixed=QemuVersion(11, 1),
        arches=_PPC64,
        accel="tcg",
        facts=frozenset({Fact.AFTER_UNPLUG}),
        is_refused=True,
        message=(
            "QEMU {version} under TCG aborts at a migration once a core was unplugged (seen with"
            " 7.2, 10.0; not with 11.1), and the guest is lost"
        ),
        hint="use QEMU 11.1 or KVM",
        code="unplugged",
    ),
    Quirk(
        "read-only-memory",
        "a memory backend with readonly=on (of an nvdimm) is migrated like all memory, and the"
        " receiving QEMU dies of SIGSEGV when it writes to it, unless every page is zero",
        _MIGRATE,
        ("7.2", "10.0", "11.1"),
        facts=frozenset({Fact.READ_ONLY_MEMORY}),
        is_refused=True,
        message="the receiving QEMU would crash: it writes to read-only memory",
        hint="start the guest with rom=off for that backend (QEMU 8.2), or without it",
        code="read-only-memory",
    ),
    Quirk(
        "x86-plug-into-leaving",
        "a plug into a slot whose last CPU was removed, but whose thread has not ended yet, ends"
        " QEMU (`savevm_state_handler_insert: Detected duplicate SaveStateEntry: id=cpu_common`,"
        " exit code 1). Only clients that compete for one vCPU trigger it: `query-cpus-fast`"
        " lists the CPU until its thread ends, and qmpvcpu waits for that after every unplug of"
        " its own processes",
        _PLUG,
        ("10.0", "11.1"),
        arches=_X86,
        accel="kvm",
    ),
    Quirk(
        "kvm-stats-descriptor",
        "each plug and unplug leaves one descriptor (`kvm-vcpu-stats`) open in QEMU",
        _UNPLUG,
        ("10.0", "11.1"),
        came=QemuVersion(8, 0),
        accel="kvm",
    ),
)


def quirk(name: str) -> Quirk:
    """The row with this id."""
    return next(row for row in QUIRKS if row.id == name)


@lru_cache
def refused_on(arch: str, accel: str | None, version: QemuVersion | None) -> tuple[Quirk, ...]:
    """The refused defects that can affect such a guest; cached, because every plug calls this."""
    return tuple(row for row in QUIRKS if row.is_refused and row.affects(arch, accel, version))


def set_off(state: DomainState, trigger: Trigger, facts: Mapping[Fact, bool]) -> list[Quirk]:
    """The refused defects that this trigger and these facts meet on this guest."""
    return [
        row
        for row in refused_on(state.arch, state.accel, state.version)
        if trigger in row.triggers and all(facts.get(fact) for fact in row.facts)
    ]


def decides(state: DomainState, fact: Fact) -> bool:
    """Whether a refusal on this guest depends on this fact, which so must be queried."""
    return any(fact in row.facts for row in refused_on(state.arch, state.accel, state.version))


def contexts_run_out(state: DomainState) -> bool:
    """Whether each vCPU that is plugged uses up one of maxcpus TCG contexts."""
    return state.accel == "tcg" and state.can_unplug and state.threads_shared is not True
