"""States, plans and definitions made by hand, for tests of every combination.

Only this file knows how they are made inside qmpvcpu.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from qmpvcpu import DomainState, Plan, Props, QemuVersion, Request, Topology, VcpuFlag
from qmpvcpu.core.definition import Definition, VcpuConfig
from qmpvcpu.core.model import format_ids
from qmpvcpu.core.planning.config import plan_config
from qmpvcpu.core.planning.live import make_plan
from qmpvcpu.core.request import Listed
from qmpvcpu.core.state.guest_view import GuestCpu, GuestView
from qmpvcpu.core.state.inventory import BootFacts, CpuInfoFast, HotpluggableCpu, build_state
from qmpvcpu.core.state.knowledge import Knowledge, mark

__all__ = [
    "change_definition",
    "codes",
    "definition",
    "format_ids",
    "listed",
    "machine",
    "plan",
    "ppc64",
    "x86",
]


def _state(
    arch: str,
    slots: Iterable[tuple[dict[str, int], int]],
    plugged: Collection[int],
    topology: Topology | None = None,
    *,
    kvm: bool = False,
    version: tuple[int, ...] = (10, 0),
    shared: bool = False,
    path: str = "/machine/peripheral/vcpu{}",
) -> DomainState:
    """`slots` are props and vcpus-count, `plugged` their ranks; `shared`: all vCPUs are one thread."""
    entities, fast, first = [], [], 0
    for rank, (props, count) in enumerate(slots):
        at = path.format(first) if rank in plugged else None
        entities.append(HotpluggableCpu("t-cpu", count, Props(props), at))
        for n in range(count) if at is not None else ():
            name = f"{at}/thread[{n}]" if arch == "ppc64" else str(at)
            fast.append(CpuInfoFast(first + n, name, 1 if shared else 100 + first + n, None))
        first += count
    boot = BootFacts("d", arch, "m", kvm, QemuVersion(*version), topology)
    return build_state(boot, entities, fast)


def x86(
    plugged: Collection[int] = (0, 1),
    *,
    sockets: int = 2,
    cores: int = 2,
    threads: int = 2,
    nodes: bool = True,
    **more: Any,
) -> DomainState:
    """One node a socket."""
    places = [(s, c, t) for s in range(sockets) for c in range(cores) for t in range(threads)]
    slots = []
    for socket, core, thread in places:
        props = {"socket-id": socket, "core-id": core, "thread-id": thread}
        slots.append((props | ({"node-id": socket} if nodes else {}), 1))
    topology = Topology(len(places), sockets=sockets, cores=cores, threads=threads)
    return _state("x86_64", slots, plugged, topology, **more)


def ppc64(
    plugged: Collection[int] = (0,), *, cores: int = 4, threads: int = 4, **more: Any
) -> DomainState:
    """Two cores a node; `plugged` counts cores."""
    slots = [({"core-id": n * threads, "node-id": n // 2}, threads) for n in range(cores)]
    return _state("ppc64", slots, plugged, **more)


def machine(
    arch: str = "x86_64", plugged: Collection[int] = (0, 1), *, slots: int = 8
) -> DomainState:
    """CPUs of one thread each, on any architecture; what is plugged was so from the start."""
    props = [
        {"core-id": n} if arch == "s390x" else {"socket-id": n, "core-id": 0} for n in range(slots)
    ]
    return _state(
        arch,
        [(each, 1) for each in props],
        plugged,
        kvm=True,
        path="/machine/unattached/device[{}]",
    )


def plan(
    state: DomainState,
    ids: Iterable[int],
    flags: VcpuFlag = VcpuFlag.CURRENT,
    *,
    pending: Collection[int] = (),
    removals: int = 0,
    offline: Collection[int] | None = None,
    **more: Any,
) -> Plan:
    """What would be done.

    `pending` are unplugs under way, `removals` how many vCPUs went before, `offline` those of the
    plugged ones that an agent calls offline (None: there is no agent).
    """
    guest = None
    if offline is not None:
        cpus = {n: GuestCpu(n, n not in offline, n != 0) for n in state.enabled_ids}
        guest = GuestView(tuple(cpus.values()), cpus)
    known = Knowledge(
        removals_seen=removals, contexts_lost=removals, pending=frozenset(pending), guest=guest
    )
    return make_plan(mark(state, known.pending), Request(tuple(ids), flags, **more), known)


def listed(enabled: Collection[int], maximum: int) -> Any:
    """What a file's `<vcpus>` says, for `plan(…, listed=…)`."""
    return Listed(
        tuple(VcpuConfig(n, n in enabled, n not in enabled) for n in range(maximum)), exact=False
    )


def codes(made: Any) -> list[str]:
    return [refusal.code for refusal in made.refusals]


def definition(
    maximum: int = 8,
    enabled: Collection[int] = (0, 1),
    pluggable: Collection[int] = (),
    **fields: Any,
) -> Definition:
    """A definition; what it does not enable is pluggable."""
    vcpus = tuple(
        VcpuConfig(n, n in enabled, n in pluggable or n not in enabled) for n in range(maximum)
    )
    return Definition("d", vcpus, dialect="libvirt", **fields)


def change_definition(
    before: Definition, ids: Iterable[int], flags: VcpuFlag = VcpuFlag.CURRENT, **more: Any
) -> Any:
    """What a request makes of it: `refusals`, and `new`."""
    return plan_config(before, Request(tuple(ids), flags, **more))
