"""The guest's own view of its CPUs, checked, and which vCPU each of them is. Pure.

The guest is not trusted: an impossible answer is an error, and a CPU's identity counts only if it
names a vCPU that this domain has, and no other CPU names the same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from qmpvcpu.core.arch import Identity, architecture
from qmpvcpu.core.model import DomainState, grouped
from qmpvcpu.errors import VcpuConnectionError

#: More logical CPUs than any guest has (Linux: NR_CPUS is 8192 at most).
_MOST: Final = 65536


@dataclass(frozen=True, slots=True)
class GuestCpu:
    """One CPU as the guest sees it. `logical_id` is the guest's own number, not the vCPU id."""

    logical_id: int
    online: bool
    can_offline: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """One row of `guestvcpus --json`."""
        return {
            "logical_id": self.logical_id,
            "online": self.online,
            "can_offline": self.can_offline,
        }


@dataclass(frozen=True, slots=True)
class GuestView:
    """The guest's CPUs, and which vCPU each one is.

    `by_vcpu` has the vCPUs whose guest CPU is known. `assumed` is true if nothing in the guest
    identified them: then the guest's ids are taken for vCPU ids, and only if no other reading is
    possible. `strays` is how many of the present CPUs are not identified. `all_online` are vCPUs
    that are online whichever CPU each of them is.
    """

    cpus: tuple[GuestCpu, ...]
    by_vcpu: Mapping[int, GuestCpu]
    assumed: bool = False
    strays: int = 0
    all_online: frozenset[int] = frozenset()

    def online(self, vcpu_id: int) -> bool | None:
        """Whether the guest runs on it; None where that is not known."""
        cpu = self.by_vcpu.get(vcpu_id)
        return cpu.online if cpu is not None else True if vcpu_id in self.all_online else None

    @property
    def online_ids(self) -> frozenset[int]:
        """The guest's own ids of the CPUs that are online."""
        return frozenset(cpu.logical_id for cpu in self.cpus if cpu.online)

    @property
    def own(self) -> GuestView:
        """The same, by the guest's own ids instead of vCPU ids."""
        return GuestView(self.cpus, {cpu.logical_id: cpu for cpu in self.cpus})

    def switched(self, vcpus: Iterable[int], online: bool) -> GuestView:
        """The same, with these vCPUs online or offline."""
        followed = {vcpu: replace(self.by_vcpu[vcpu], online=online) for vcpu in vcpus}
        rows = {cpu.logical_id: cpu for cpu in (*self.cpus, *followed.values())}
        return replace(self, cpus=tuple(rows.values()), by_vcpu={**self.by_vcpu, **followed})

    def to_json(self) -> dict[str, Any]:
        """The document of `guestvcpus --json`: both the guest's ids and the vCPU ids, null where
        not known.
        """
        return {
            "cpus": [cpu.to_json() | {"vcpu": self.vcpu_of(cpu.logical_id)} for cpu in self.cpus],
            "assumed": self.assumed,
        }

    def vcpu_of(self, logical_id: int) -> int | None:
        """The vCPU that is the guest's CPU of this id."""
        return next(
            (vcpu for vcpu, cpu in self.by_vcpu.items() if cpu.logical_id == logical_id), None
        )


def parse_guest_vcpus(reply: object, most: int = _MOST) -> tuple[GuestCpu, ...]:
    """`guest-get-vcpus`, ascending by logical id (QGA `GuestLogicalProcessor`); `most` is how many
    there can be.

    Raises:
        VcpuConnectionError: the answer cannot be true.
    """
    if not isinstance(reply, list):
        raise _nonsense("it is not a list")
    if len(reply) > most:
        raise _nonsense(f"it has {len(reply)} CPUs, but the guest can have {most}")
    found: dict[int, GuestCpu] = {}
    for row in reply:
        if not isinstance(row, dict):
            raise _nonsense("an entry is not an object")
        number, online, can_offline = (
            row.get("logical-id"),
            row.get("online"),
            row.get("can-offline"),
        )
        if type(number) is not int or not 0 <= number < _MOST or type(online) is not bool:
            raise _nonsense("a CPU has no id or no state")
        if number in found:
            raise _nonsense(f"it has CPU {number} twice")
        found[number] = GuestCpu(number, online, can_offline if type(can_offline) is bool else None)
    if not any(cpu.online for cpu in found.values()):
        raise _nonsense("no CPU is online")
    return tuple(found[number] for number in sorted(found))


def _nonsense(what: str) -> VcpuConnectionError:
    return VcpuConnectionError(
        f"the guest agent's list of CPUs is wrong: {what}",
        reason="malformed",
        hint="look at the guest agent's version, or leave out --agent (agent=)",
        libvirt="VIR_ERR_AGENT_UNRESPONSIVE",
    )


def is_port_open(chardevs: object, path: str) -> bool | None:
    """Whether the guest has opened the port behind a unix socket, by `query-chardev`; None if that
    does not say.

    `frontend-open` is the state of a virtio port (7.2 to 11.1); it is always true for a serial
    port.
    """
    for row in chardevs if isinstance(chardevs, list) else ():
        filename = row.get("filename") if isinstance(row, dict) else None
        # Options follow the path: ",server=on".
        if isinstance(filename, str) and f"{filename.removeprefix('disconnected:')},".startswith(
            f"unix:{path},"
        ):
            is_open = row.get("frontend-open")
            return is_open if isinstance(is_open, bool) else None
    return None


def most_guest_cpus(state: DomainState) -> int:
    """How many CPUs the guest can list."""
    # If the ids of cores are further apart than a core has threads, there are more possible CPUs
    # than vCPUs.
    return state.maxcpus * 8 if architecture(state.arch).lists_possible_cpus else state.maxcpus


#: Most bytes of a file about all CPUs (x86's /proc/cpuinfo: 1.5 KB each), and of a file about one.
_OF_ALL: Final = 8 * 1024 * 1024
_OF_ONE: Final = 4096

_SYSFS: Final = "/sys/devices/system/cpu/cpu{}/{}"
CPUINFO: Final = "/proc/cpuinfo"
PRESENT: Final = "/sys/devices/system/cpu/present"


def identity_files(state: DomainState, cpus: Iterable[GuestCpu]) -> dict[str, int | None]:
    """Files of the guest that identify its CPUs: path -> logical id, None for a file about all of
    them.

    `core.arch.Identity` describes them.
    """
    row = architecture(state.arch)
    if row.identity_file is None:
        return {}
    by_apic = row.identity is Identity.APIC_ID
    files: dict[str, int | None] = {
        _SYSFS.format(cpu.logical_id, row.identity_file): cpu.logical_id
        for cpu in cpus
        if not (by_apic and cpu.online)
    }
    if by_apic:
        return {CPUINFO: None, **files}
    # The file of a CPU that is not present is left over from another CPU.
    return {PRESENT: None, **files} if row.lists_possible_cpus else files


def identity_limits(state: DomainState, cpus: Iterable[GuestCpu]) -> dict[str, int]:
    """The same files -> the most bytes that each can have."""
    return {
        path: _OF_ALL if n is None else _OF_ONE for path, n in identity_files(state, cpus).items()
    }


_ACPI_PATH: Final = re.compile(r"\.C([0-9A-F]{3})\s*\Z")


def identify(
    state: DomainState,
    cpus: Sequence[GuestCpu],
    files: Mapping[str, bytes | None],
    *,
    vsmt: int | None = None,
) -> GuestView:
    """Join the guest's CPUs and the vCPUs.

    Args:
        state: from QEMU; only a vCPU that is enabled can be in the guest.
        cpus: `guest-get-vcpus`.
        files: contents of `identity_files`, None or missing for one that could not be read.
        vsmt: ppc64: how far the ids of two cores are apart in the guest (`qom-get /machine vsmt`).
    """
    wanted = identity_files(state, cpus)
    present = _cpu_list(files.get(PRESENT))
    there = [cpu for cpu in cpus if present is None or cpu.logical_id in present]
    facts = _facts(
        state, {n: files.get(path) for path, n in wanted.items() if n is not None}, files, vsmt
    )
    if not facts:
        return _assume(state, cpus, there)
    named = grouped((facts.get(cpu.logical_id), cpu) for cpu in there)
    by_vcpu = {n: named[n][0] for n in state.enabled_ids if len(named.get(n, ())) == 1}
    return GuestView(
        tuple(cpus), by_vcpu, strays=len(there) - len(by_vcpu), all_online=_all_online(state, cpus)
    )


def _all_online(state: DomainState, cpus: Sequence[GuestCpu]) -> frozenset[int]:
    """All plugged vCPUs, if as many CPUs are online; else none."""
    enabled = state.enabled_ids
    return frozenset(enabled if sum(cpu.online for cpu in cpus) == len(enabled) else ())


def newcomers(before: GuestView, now: GuestView, *, lists_all: bool) -> tuple[GuestCpu, ...]:
    """The CPUs that are new in the guest between two views. If they are as many as were plugged,
    they are the plugged vCPUs, whichever is which.

    Args:
        before, now: the two views.
        lists_all: the guest always lists every possible CPU (ppc64): a CPU is new if it has come
            online.
    """
    known = before.online_ids if lists_all else frozenset(cpu.logical_id for cpu in before.cpus)
    return tuple(
        cpu for cpu in now.cpus if cpu.logical_id not in known and (cpu.online or not lists_all)
    )


def _facts(
    state: DomainState,
    contents: Mapping[int, bytes | None],
    files: Mapping[str, bytes | None],
    vsmt: int | None,
) -> dict[int, int]:
    """Logical id -> vCPU id, from the guest's files; not yet checked against the enabled vCPUs.

    `contents` is the content of each CPU's own file, by logical id.
    """
    identity = architecture(state.arch).identity
    if identity is Identity.APIC_ID:
        by_apic = {state.x86_apic_id(entity): entity.id for entity in state.entities}
        apics = _cpuinfo_apic_ids(files.get(CPUINFO) or b"")
        return {n: by_apic[apic] for n, apic in apics.items() if apic in by_apic} | _by_acpi_path(
            contents
        )
    if identity is Identity.ACPI_PATH:
        return _by_acpi_path(contents)
    if identity is Identity.DEVICE_TREE:
        return _by_rank(
            {n: _number(text, big_endian=True) for n, text in contents.items()},
            len(state.enabled_ids),
        )
    numbers = {n: number for n, text in contents.items() if (number := _number(text)) is not None}
    if identity is Identity.CORE_ID:
        by_core = {
            e.props["core-id"]: e.id for e in state.entities if e.props and "core-id" in e.props
        }
        return {n: by_core[number] for n, number in numbers.items() if number in by_core}
    if vsmt is None:
        return {}  # not pseries: the meaning of the number is not known
    return {
        n: vcpu
        for n, number in numbers.items()
        if (vcpu := _of_physical(state, number, vsmt)) is not None
    }


def _by_acpi_path(contents: Mapping[int, bytes | None]) -> dict[int, int]:
    found = {
        n: _ACPI_PATH.search((text or b"")[:200].decode("ascii", "replace"))
        for n, text in contents.items()
    }
    return {n: int(match[1], 16) for n, match in found.items() if match}


def _cpuinfo_apic_ids(text: bytes) -> dict[int, int]:
    """Logical id -> APIC id, from x86's /proc/cpuinfo."""
    found: dict[int, int] = {}
    logical: int | None = None
    for match in _CPUINFO_LINE.finditer(text):
        if match[1] == b"processor":
            logical = int(match[2])
        elif logical is not None:
            found[logical] = int(match[2])
    return found


#: Not split into lines: 8 MiB that a malicious guest has made up would take seconds and some 500
#: MB.
_CPUINFO_LINE: Final = re.compile(
    rb"^(processor|apicid)[ \t]{0,20}:[ \t]{0,20}([0-9]{1,9})[ \t\r]{0,20}$", re.MULTILINE
)


def _cpu_list(content: bytes | None) -> set[int] | None:
    """The kernel's cpulist format, `0-3,8`; None where it is not one."""
    found: set[int] = set()
    for part in (content or b"")[:4096].decode("ascii", "replace").strip().split(","):
        low, _, high = part.partition("-")
        if not low.isdigit() or not (high or low).isdigit() or len(part) > 15:
            return None
        first, last = int(low), int(high or low)
        if not first <= last < _MOST:
            return None
        found.update(range(first, last + 1))
    return found


def _number(content: bytes | None, *, big_endian: bool = False) -> int | None:
    if content is None:
        return None
    if big_endian:
        return int.from_bytes(content, "big") if len(content) in (4, 8) else None
    text = content[:20].strip()
    return int(text) if text.isdigit() else None


def _of_physical(state: DomainState, number: int, vsmt: int) -> int | None:
    """pseries: the guest's ids of two cores are `vsmt` apart, their vCPU ids as many as a core has
    threads.
    """
    threads = len(state.entities[0].ids) if state.entities else 1
    core, thread = divmod(number, vsmt)
    return core * threads + thread if thread < threads else None


def _by_rank(facts: Mapping[int, int | None], expected: int) -> dict[int, int]:
    """arm64, riscv64: all CPUs are there from the start, so the n-th is vCPU n; if one is missing,
    none is known.
    """
    if len(facts) != expected or None in facts.values() or len(set(facts.values())) < len(facts):
        return {}
    return {n: rank for rank, n in enumerate(sorted(facts, key=lambda n: facts[n] or 0))}


def _assume(state: DomainState, cpus: Sequence[GuestCpu], there: Sequence[GuestCpu]) -> GuestView:
    """Without any identity the guest's ids are vCPU ids only if every reading comes to the same.

    Linux numbers plugged CPUs in the order in which they come, and reuses earlier numbers: so the
    guest must have exactly the enabled vCPUs, without a gap, at most one of them plugged. riscv64's
    boot hart is random.
    """
    numbers = [cpu.logical_id for cpu in there]
    plugged = [e for e in state.entities if e.qom_path is not None and "/peripheral" in e.qom_path]
    unknown = GuestView(
        tuple(cpus), {}, assumed=True, strays=len(there), all_online=_all_online(state, cpus)
    )
    has_gap = not numbers == list(state.enabled_ids) == list(range(len(numbers)))
    if has_gap or len(plugged) > 1 or not architecture(state.arch).boots_on_first:
        return unknown
    return replace(unknown, by_vcpu={cpu.logical_id: cpu for cpu in there}, strays=0)


def with_online(state: DomainState, view: GuestView) -> DomainState:
    """The state with the guest's view of each vCPU."""
    return replace(
        state,
        vcpus=tuple(
            replace(vcpu, online=cpu.online, logical_id=cpu.logical_id, can_offline=cpu.can_offline)
            if (cpu := view.by_vcpu.get(vcpu.id)) is not None
            else vcpu
            if vcpu.online is view.online(vcpu.id)
            else replace(vcpu, online=view.online(vcpu.id))
            for vcpu in state.vcpus
        ),
    )
