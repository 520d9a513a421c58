"""The guest's own view of its CPUs, by what its agent answers. Rows are those of `guest-get-vcpus`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmpvcpu import DomainState, Refusal
from qmpvcpu.core.rules.selection import guest_total
from qmpvcpu.core.state.guest_view import (
    GuestCpu,
    GuestView,
    identify,
    identity_files,
    is_port_open,
    most_guest_cpus,
    newcomers,
    parse_guest_vcpus,
)

Row = dict[str, Any]


def cpus(*online: int, offline: tuple[int, ...] = ()) -> list[Row]:
    """Rows of these CPUs, by the guest's own numbers."""
    rows = {**dict.fromkeys(online, True), **dict.fromkeys(offline, False)}
    return [{"logical-id": n, "online": rows[n], "can-offline": n != 0} for n in sorted(rows)]


def read(reply: Any, most: int | None = None) -> list[Row]:
    """The rows that are believed, of at most so many. Raises VcpuConnectionError: there cannot be
    such a guest.
    """
    found = parse_guest_vcpus(reply) if most is None else parse_guest_vcpus(reply, most)
    return [
        {"logical-id": cpu.logical_id, "online": cpu.online, "can-offline": cpu.can_offline}
        for cpu in found
    ]


@dataclass(frozen=True)
class Seen:
    """`numbers`: vCPU ids that are known in the guest -> its own numbers. `online`: vCPU ids ->
    whether the guest runs on it, None where that is not known. `assumed` is true where nothing in
    the guest told which is which; `strays` is how many CPUs nobody can name.
    """

    numbers: Mapping[int, int]
    online: Mapping[int, bool | None]
    assumed: bool
    strays: int


def files_to_read(state: DomainState, reply: Any) -> list[str]:
    """Files of the guest that tell which CPU is which."""
    return list(identity_files(state, parse_guest_vcpus(reply, most_guest_cpus(state))))


def look(
    state: DomainState,
    reply: Any,
    files: Mapping[str, bytes | None] | None = None,
    *,
    vsmt: int | None = None,
) -> Seen:
    """Which vCPU is which CPU of the guest, by the contents of those files; `vsmt` is how far two
    cores of pseries are apart in the guest.
    """
    view = identify(state, parse_guest_vcpus(reply, most_guest_cpus(state)), files or {}, vsmt=vsmt)
    numbers = {vcpu: cpu.logical_id for vcpu, cpu in view.by_vcpu.items()}
    online = {vcpu.id: view.online(vcpu.id) for vcpu in state.vcpus}
    return Seen(numbers, online, view.assumed, view.strays)


def came(before: Any, now: Any, *, lists_all: bool) -> list[int]:
    """The guest's numbers of the CPUs that came between two looks; `lists_all`: it lists every
    possible CPU.
    """
    return [cpu.logical_id for cpu in newcomers(_view(before), _view(now), lists_all=lists_all)]


def to_reach(reply: Any, total: int) -> tuple[tuple[int, ...], bool, list[Refusal]]:
    """Which CPUs are switched so that so many are online, to what, and what stands against it."""
    return guest_total(_view(reply), total)


def port_is_open(chardevs: Any, path: str) -> bool | None:
    """Whether the guest has opened the agent's port, by `query-chardev`; None where it does not
    tell.
    """
    return is_port_open(chardevs, path)


def _view(reply: Any) -> GuestView:
    rows: tuple[GuestCpu, ...] = parse_guest_vcpus(reply)
    return GuestView(rows, {}, assumed=True)
