"""QMP replies -> `DomainState`: which vCPU ids there are, what each one is, and which ones are
plugged.

`query-hotpluggable-cpus` lists the slots, `query-cpus-fast` the plugged CPUs. They are joined only
by QOM path: their order differs (the first lists the highest slot first, the second is in the order
of plugging), and props are absent from some replies. Every reply is checked: one of the wrong shape
is a `VcpuConnectionError` with reason "malformed".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Final

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.model import LEVELS, DomainState, Entity, Props, QemuVersion, Topology, Vcpu
from qmpvcpu.errors import VcpuConnectionError

#: The props of a slot's address from the outside in: the order in which vCPU ids are numbered.
PLACE_PROPS: Final = (
    *("drawer-id", "book-id", "socket-id", "die-id"),
    *("cluster-id", "module-id", "core-id", "thread-id"),
)

#: More vCPUs than any QEMU machine takes (pseries: 2048 in 10.0); beyond it a reply is nonsense.
MAX_VCPUS: Final = 65536
#: Longer than any path, type or address that QEMU gives, characters.
LONGEST_TEXT: Final = 4096

_THREAD = re.compile(r"/thread\[(\d{1,6})\]\Z")


class InconsistentReplies(VcpuConnectionError):
    """Two replies do not describe the same moment: a CPU was plugged or removed between them. Query
    again.
    """


@dataclass(frozen=True, slots=True)
class HotpluggableCpu:
    """One entry of `query-hotpluggable-cpus` (QAPI `HotpluggableCPU`)."""

    type: str
    vcpus_count: int
    props: Props
    qom_path: str | None


@dataclass(frozen=True, slots=True)
class CpuInfoFast:
    """One entry of `query-cpus-fast` (QAPI `CpuInfoFast`)."""

    cpu_index: int
    qom_path: str
    thread_id: int
    props: Props | None


@dataclass(frozen=True, slots=True)
class BootFacts:
    """What does not change while one QEMU runs; read once per connection."""

    name: str
    arch: str
    machine: str
    kvm: bool
    version: QemuVersion
    topology: Topology | None


def short(value: object) -> str:
    """A value as a short text for a message."""
    if isinstance(value, str):
        value = value[:60]
    text = (
        repr(value)
        if isinstance(value, str | int | float | bool | None)
        else f"a {type(value).__name__}"
    )
    return text if len(text) <= 60 else text[:57] + "..."


def object_of(reply: object) -> dict[str, Any]:
    """A JSON object; an empty one in place of anything else."""
    return reply if isinstance(reply, dict) else {}


def count_of(value: object) -> int | None:
    """A number of 0 or more, of 63 bits; None for anything else."""
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def objects_of(reply: object) -> list[dict[str, Any]]:
    """The JSON objects of a list; none of anything else."""
    return [row for row in reply if isinstance(row, dict)] if isinstance(reply, list) else []


def _malformed(command: str, what: str) -> VcpuConnectionError:
    return VcpuConnectionError(
        f"{command}: {what}",
        reason="malformed",
        libvirt="VIR_ERR_INTERNAL_ERROR",
        hint="check that this socket is QEMU's: run again with --qmp-log FILE and look at the"
        " reply",
    )


def _rows(command: str, reply: object) -> list[Mapping[str, Any]]:
    if not isinstance(reply, list):
        raise _malformed(command, f"a list was expected, not {type(reply).__name__}")
    if len(reply) > MAX_VCPUS:
        raise _malformed(command, f"{len(reply)} entries are more than any machine has")
    for row in reply:
        if not isinstance(row, dict):
            raise _malformed(command, f"an entry is {type(row).__name__}, not an object")
    return reply


def _integer(command: str, row: Mapping[str, Any], key: str, low: int = 0) -> int:
    value = row.get(key)
    if type(value) is not int or value < low:
        raise _malformed(command, f"'{key}' is {short(value)}, not a number of at least {low}")
    return value


def _string(command: str, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_TEXT:
        raise _malformed(
            command, f"'{key}' is {short(value)}, not a text of at most {LONGEST_TEXT} characters"
        )
    return value


def _props(command: str, value: object) -> Props:
    if not isinstance(value, dict):
        raise _malformed(command, f"'props' is {short(value)}, not an object")
    # A newer QEMU may have more keys: any scalar is kept and passed back as it is.
    for key, item in value.items():
        is_place = key in PLACE_PROPS or key == "node-id"
        is_long = len(key) > LONGEST_TEXT or (isinstance(item, str) and len(item) > LONGEST_TEXT)
        if (
            not isinstance(item, int | str)
            or is_long
            or (is_place and (type(item) is not int or item < 0))
        ):
            raise _malformed(command, f"'props' has {short(key)}: {short(item)}")
    return Props(value)


def parse_hotpluggable_cpus(reply: object) -> tuple[HotpluggableCpu, ...]:
    """The reply of `query-hotpluggable-cpus`, checked, in QEMU's order."""
    command = "query-hotpluggable-cpus"
    slots = [
        HotpluggableCpu(
            type=_string(command, row, "type"),
            vcpus_count=_integer(command, row, "vcpus-count", 1),
            props=_props(command, row.get("props")),
            qom_path=_string(command, row, "qom-path") if row.get("qom-path") is not None else None,
        )
        for row in _rows(command, reply)
    ]
    if not slots:
        raise _malformed(command, "it has no slot")
    if sum(slot.vcpus_count for slot in slots) > MAX_VCPUS:
        raise _malformed(command, f"more than {MAX_VCPUS} vCPUs")
    paths = [slot.qom_path for slot in slots if slot.qom_path is not None]
    if len(set(paths)) != len(paths):
        raise _malformed(command, "two slots have the same qom-path")
    return tuple(slots)


def parse_cpus_fast(reply: object, *, props: bool = True) -> tuple[CpuInfoFast, ...]:
    """The reply of `query-cpus-fast`, checked, in QEMU's order, which is the order of plugging.

    `props=False` leaves the props out, which the slots have too.
    """
    cpus = tuple(_cpu(row, props) for row in _rows("query-cpus-fast", reply))
    # `-machine none` has no CPU at all.
    if len({cpu.qom_path for cpu in cpus}) != len(cpus):
        raise _malformed("query-cpus-fast", "two CPUs have the same qom-path")
    return cpus


def _cpu(row: Mapping[str, Any], props: bool) -> CpuInfoFast:
    command = "query-cpus-fast"
    index, path, thread_id = row.get("cpu-index"), row.get("qom-path"), row.get("thread-id")
    is_path = type(path) is str and 0 < len(path) <= LONGEST_TEXT
    if not (is_path and type(index) is type(thread_id) is int and index >= 0 <= thread_id):
        # Raises for the wrong one. This runs after every plug, so the good case is checked in one
        # step.
        _integer(command, row, "cpu-index")
        _string(command, row, "qom-path")
        _integer(command, row, "thread-id")
    return CpuInfoFast(
        index,  # type: ignore[arg-type]
        path,  # type: ignore[arg-type]
        thread_id,  # type: ignore[arg-type]
        _props(command, row["props"]) if props and row.get("props") is not None else None,
    )


def parse_version(greeting: object) -> QemuVersion:
    """QEMU's version out of the `QMP` member of the greeting."""
    try:
        numbers = greeting["version"]["qemu"]  # type: ignore[index]
        return QemuVersion(
            *(_integer("greeting", numbers, key) for key in ("major", "minor", "micro"))
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _malformed("greeting", "it has no QEMU version") from error


def parse_topology(reply: object) -> Topology | None:
    """`qom-get /machine smp`; None where this machine has no such property or too old a form of
    it.
    """
    if not isinstance(reply, dict) or "maxcpus" not in reply:
        return None
    command = "qom-get /machine smp"
    counts = {key: _integer(command, reply, key, 1) for key in ("maxcpus", *LEVELS) if key in reply}
    for key, count in counts.items():
        if count > MAX_VCPUS:
            raise _malformed(command, f"{key} {short(count)} is more than any machine has")
    return Topology(**counts)


def _address(props: Props | None) -> tuple[int, ...]:
    return tuple(props.get(level, 0) if props is not None else 0 for level in PLACE_PROPS)


def _node(props: Props | None) -> int | None:
    return props.get("node-id") if props is not None else None


class _Plugged:
    """`query-cpus-fast` by the QOM path of each entity."""

    def __init__(self, cpus: Sequence[CpuInfoFast], *, cores: bool = True) -> None:
        #: The CPUs of each entity by thread number: while a core is removed, its threads end one
        #: after the other.
        self.by_path: dict[str, dict[int, CpuInfoFast]] = {}
        self.order: dict[str, int] = {}
        for cpu in cpus:
            # A ppc64 CPU is a child of its core: /machine/peripheral/vcpu8/thread[3].
            found = _THREAD.search(cpu.qom_path) if cores and "/thread[" in cpu.qom_path else None
            key = cpu.qom_path[: found.start()] if found else cpu.qom_path
            members = self.by_path.setdefault(key, {})
            number = int(found[1]) if found else 0
            if number in members:
                raise _malformed("query-cpus-fast", f"two CPUs at {short(cpu.qom_path)}")
            members[number] = cpu
            self.order.setdefault(key, len(self.order) + 1)
        self.shared = None if len(cpus) < 2 else len({cpu.thread_id for cpu in cpus}) < len(cpus)


def entities_of_slots(slots: Iterable[HotpluggableCpu], can_unplug: bool) -> tuple[Entity, ...]:
    """The entities in the order of their vCPU ids."""
    ordered = sorted(((_address(slot.props), slot) for slot in slots), key=lambda row: row[0])
    for (address, slot), (other, _) in pairwise(ordered):
        if address == other:
            raise _malformed(
                "query-hotpluggable-cpus",
                f"two slots have the address {short(str(dict(slot.props)))}",
            )
    entity_ids = accumulate((slot.vcpus_count for _, slot in ordered), initial=0)
    # The boot CPU is the first slot on every machine that can unplug: "Boot CPU is unpluggable"
    # (x86), "Boot CPU core may not be unplugged" (ppc64).
    entities = [
        Entity(
            ids=tuple(range(first, first + slot.vcpus_count)),
            driver=slot.type,
            props=slot.props,
            qom_path=slot.qom_path,
            node=_node(slot.props),
            hotpluggable=slot.qom_path is None or (can_unplug and first != 0),
        )
        for first, (_, slot) in zip(entity_ids, ordered, strict=False)
    ]
    taken = {entity.qom_path for entity in entities if entity.qom_path is not None}
    for position, entity in enumerate(entities):
        # An empty slot gets a device id that no CPU of another slot has.
        while not entity.plugged and f"/machine/peripheral/{entity.device_id}" in taken:
            entity = entities[position] = replace(entity, suffix=entity.suffix + 1)
    return tuple(entities)


def entities_without_slots(
    cpus: Sequence[CpuInfoFast], topology: Topology | None
) -> tuple[Entity, ...]:
    """A machine without CPU hotplug: what `query-cpus-fast` lists, then ids that can never be
    plugged.
    """
    ordered = sorted(cpus, key=lambda cpu: (_address(cpu.props), cpu.cpu_index))
    maxcpus = topology.maxcpus if topology is not None else 0
    return (
        *(
            Entity((number,), None, cpu.props, cpu.qom_path, _node(cpu.props), hotpluggable=False)
            for number, cpu in enumerate(ordered)
        ),
        *(
            Entity((number,), None, None, None, None, hotpluggable=False)
            for number in range(len(ordered), maxcpus)
        ),
    )


def build_state(
    boot: BootFacts,
    slots: Sequence[HotpluggableCpu] | None,
    cpus: Sequence[CpuInfoFast],
    *,
    run_state: str | None = None,
    pending: Iterable[int] = (),
) -> DomainState:
    """Join the two replies to one state.

    Args:
        boot: facts of the connection.
        slots: `query-hotpluggable-cpus`, or None where the machine has no CPU hotplug.
        cpus: `query-cpus-fast`, sent right after.
        run_state: of `query-status`, if that was sent.
        pending: ids of the entities whose unplug was requested and has not ended.

    Raises:
        InconsistentReplies: a CPU was plugged or removed between the two replies.
        VcpuConnectionError: the replies cannot be true.
    """
    can_unplug = slots is not None and architecture(boot.arch).can_unplug
    if slots is None:
        entities = entities_without_slots(cpus, boot.topology)
    else:
        entities = entities_of_slots(slots, can_unplug)
    return _assemble(
        boot,
        entities,
        _Plugged(cpus, cores=slots is not None),
        slots is not None,
        can_unplug,
        run_state,
        frozenset(pending),
    )


def refresh_state(
    state: DomainState, boot: BootFacts, cpus: Sequence[CpuInfoFast], *, pending: Iterable[int] = ()
) -> DomainState:
    """The state after a fresh `query-cpus-fast` alone, for slots already known.

    An empty slot counts as filled if there is a CPU at the QOM path of our own `device_add`
    (`/machine/peripheral/vcpuN`); a filled one counts as empty if there is none at its path.

    Raises:
        InconsistentReplies: a CPU is at a path that no known slot has; `query-hotpluggable-cpus` is
            needed.
    """
    plugged = _Plugged(cpus, cores=state.can_plug)
    entities = []
    taken = {entity.qom_path for entity in state.entities}
    for entity in state.entities:
        if entity.qom_path in plugged.by_path:
            entities.append(entity)
            continue
        path = f"/machine/peripheral/{entity.device_id}"
        now = path if path in plugged.by_path and path not in taken else None
        if now != entity.qom_path:
            entity = replace(
                entity,
                qom_path=now,
                hotpluggable=state.can_plug
                and (now is None or (state.can_unplug and entity.id != 0)),
            )
        entities.append(entity)
    return _assemble(
        boot,
        tuple(entities),
        plugged,
        state.can_plug,
        state.can_unplug,
        state.run_state,
        frozenset(pending),
        state.vcpus,
    )


def _assemble(
    boot: BootFacts,
    entities: tuple[Entity, ...],
    plugged: _Plugged,
    can_plug: bool,
    can_unplug: bool,
    run_state: str | None,
    pending: frozenset[int],
    known: Sequence[Vcpu] = (),
) -> DomainState:
    """Build the state; `known` are the earlier vCPUs, which are reused if they have not changed."""
    paths = {entity.qom_path for entity in entities if entity.qom_path is not None}
    if paths != plugged.by_path.keys():
        odd = sorted(paths ^ plugged.by_path.keys())[:4]
        raise InconsistentReplies(
            "query-hotpluggable-cpus and query-cpus-fast do not agree on"
            f" {', '.join(path[:200] for path in odd)}",
            reason="malformed",
            hint="try again: another client is plugging or unplugging vCPUs",
        )
    vcpus: list[Vcpu] = []
    for entity in entities:
        ids, at = entity.ids, entity.qom_path
        first = known[ids[0]] if ids[0] < len(known) else None
        if first is not None and at is None and not first.enabled:
            vcpus += known[ids[0] : ids[0] + len(ids)]
            continue
        members = plugged.by_path[at] if at is not None else {}
        if members and max(members) >= len(ids):
            raise _malformed("query-cpus-fast", f"{max(members) + 1} CPUs at {short(at)}")
        order = plugged.order[at] if at is not None else None
        is_pending = at is not None and ids[0] in pending
        for number, vcpu_id in enumerate(ids):
            cpu = members.get(number)
            thread_id = None if cpu is None or plugged.shared else cpu.thread_id
            path = cpu.qom_path if cpu is not None else at
            was = known[vcpu_id] if vcpu_id < len(known) else None
            if (
                was is not None
                and was.thread_id == thread_id
                and was.order == order
                and was.qom_path == path
                and was.pending == is_pending
            ):
                vcpus.append(was)
                continue
            vcpus.append(
                Vcpu(
                    id=vcpu_id,
                    enabled=entity.plugged,
                    hotpluggable=entity.hotpluggable,
                    entity=entity.ids,
                    props=entity.props,
                    order=order,
                    node=entity.node,
                    qom_path=path,
                    thread_id=thread_id,
                    pending=is_pending,
                )
            )
    return DomainState(
        name=boot.name,
        arch=boot.arch,
        machine=boot.machine,
        accel="kvm" if boot.kvm else "tcg",
        active=True,
        version=boot.version,
        topology=boot.topology,
        can_plug=can_plug,
        can_unplug=can_unplug,
        threads_shared=plugged.shared,
        entities=entities,
        vcpus=tuple(vcpus),
        run_state=run_state,
    )
