"""Results as text for people. JSON comes from the `to_json()` of each result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qmpvcpu.core.model import EventKind, Props, format_ids, grouped
from qmpvcpu.core.rules.selection import core_of
from qmpvcpu.core.state.inventory import PLACE_PROPS

if TYPE_CHECKING:
    from qmpvcpu.app.definitions import ListedDomain
    from qmpvcpu.core.machine.layout import MachineLayout
    from qmpvcpu.core.migration.status import MigrationStatus
    from qmpvcpu.core.model import DomainState, Event, Outcome, Vcpu
    from qmpvcpu.core.planning.live import Plan
    from qmpvcpu.core.state.guest_view import GuestView


def columns(rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> list[str]:
    """Return rows as aligned lines. The first row is the head; `right` has the right-aligned
    columns.
    """
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines


def info(state: DomainState) -> list[str]:
    """Return what `vcpuinfo` shows: a head, the topology, and a row per vCPU."""
    source: str | None = f"QEMU {state.version}"
    if state.version is None or not state.version.major:
        source = "the definition" if state.version is None else None
    words = [word for word in (state.arch, state.machine, source, state.accel) if word]
    head = (
        f"{state.name}: {', '.join(words)}: {len(state.enabled_ids)} of {state.maxcpus} vCPUs"
        " enabled"
    )
    if not state.can_plug:
        head += " (this machine has no CPU hotplug)"
    elif not state.can_unplug:
        head += " (this machine cannot unplug CPUs)"
    if state.threads_shared:
        head += ", all on one thread"
    return [head, *topology(state), "", *vcpu_table(state.vcpus)]


def topology(state: DomainState) -> list[str]:
    """Return one line per node and socket, with one bracket per core and one sign per vCPU: `#`
    enabled, `.` disabled, `~` unplug pending.
    """
    lines = []

    def place(vcpu: Vcpu) -> tuple[tuple[str, int], ...]:
        props = vcpu.props or Props()
        outer = [("node", vcpu.node)] if vcpu.node is not None else []
        outer += [(level[:-3], props[level]) for level in PLACE_PROPS[:3] if level in props]
        return tuple(outer)

    for where, members in groupby(state.vcpus, key=place):
        group = list(members)
        signs = "".join(
            "[" + "".join(_sign(vcpu) for vcpu in core) + "]"
            for _, core in groupby(group, key=lambda vcpu: core_of(state, vcpu.id))
        )
        name = " ".join(f"{level} {number}" for level, number in where)
        lines.append(
            f"{name or 'vCPUs'}: {format_ids(vcpu.id for vcpu in group)}  {signs}".rstrip()
        )
    return lines


def _sign(vcpu: Vcpu) -> str:
    return "~" if vcpu.pending else "#" if vcpu.enabled else "."


def slots(layout: MachineLayout, vcpus: Sequence[Vcpu]) -> list[str]:
    """Return one row per entity of a machine that does not run."""
    found = layout.entities()
    keys = [
        key
        for key in ("node-id", *PLACE_PROPS)
        if any(key in (slot.props or Props()) for _, slot in found)
    ]
    rows = [["VCPUS", *(key[:-3].upper() for key in keys), "STATE", "ORDER"]]
    for ids, slot in found:
        props = slot.props or Props()
        places = [_text(props.get(key)) for key in keys]
        rows.append([format_ids(ids), *places, vcpus[ids[0]].state, _text(vcpus[ids[0]].order)])
    return columns(rows, right=frozenset((*range(1 + len(keys)), 2 + len(keys))))


def vcpu_table(vcpus: Iterable[Vcpu]) -> list[str]:
    """Return one row per vCPU, beginning with its place. Parts of the place that repeat the row
    above are blank.
    """
    rows = list(vcpus)
    levels = [
        level for level in PLACE_PROPS if any(level in (vcpu.props or Props()) for vcpu in rows)
    ]
    has_nodes = any(vcpu.node is not None for vcpu in rows)
    is_placed = any(vcpu.pin is not None for vcpu in rows)
    is_scheduled = any(vcpu.scheduler not in (None, "other") for vcpu in rows)
    is_grouped = any(len(vcpu.entity) > 1 for vcpu in rows)
    has_guest = any(vcpu.online is not None for vcpu in rows)
    heads = [*(["NODE"] if has_nodes else []), *(level[:-3].upper() for level in levels)]
    # Head, whether it has numbers, whether it is shown, and what a vCPU has there.
    cells: list[tuple[str, bool, bool, Callable[[Vcpu], object]]] = [
        ("VCPU", True, True, lambda v: v.id),
        ("STATE", False, True, lambda v: v.state + (", unplug pending" if v.pending else "")),
        ("ORDER", True, True, lambda v: v.order),
        ("HOTPLUGGABLE", False, True, lambda v: _YES_NO[v.hotpluggable]),
        ("THREAD-ID", True, True, lambda v: v.thread_id),
        ("LAST-CPU", True, is_placed, lambda v: v.cpu),
        ("AFFINITY", False, is_placed, lambda v: v.pin),
        ("SCHEDULER", False, is_scheduled, lambda v: v.scheduler),
        ("ENTITY", False, is_grouped, lambda v: format_ids(v.entity)),
        ("ONLINE", False, has_guest, lambda v: _YES_NO[v.online]),
        ("GUEST-ID", False, has_guest, lambda v: v.logical_id),
    ]
    shown = [(head, is_number, get) for head, is_number, is_shown, get in cells if is_shown]
    lines = [[*heads, *(head for head, _, _ in shown)]]
    above: list[str] = []
    for vcpu in rows:
        props = vcpu.props or Props()
        place = ([_text(vcpu.node)] if has_nodes else []) + [
            _text(props.get(level)) for level in levels
        ]
        same = next(
            (n for n, (a, b) in enumerate(zip(place, above, strict=False)) if a != b), len(above)
        )
        lines.append([*([""] * same), *place[same:], *(_text(get(vcpu)) for _, _, get in shown)])
        above = place
    numbers = [number for number, (_, is_number, _) in enumerate(shown, len(heads)) if is_number]
    return columns(lines, right=frozenset((*range(len(heads)), *numbers)))


_YES_NO = {True: "yes", False: "no", None: None}


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def outcome(result: Outcome) -> list[str]:
    """Return what a `setvcpu` did, in one or two lines."""
    rows = {row.id: row for row in result.rows}
    is_both = bool(result.live_changed_ids or result.config_changed_ids or result.defined)
    changed = result.live_changed_ids if is_both else result.changed_ids
    words = grouped((_changed_to(rows.get(number), result.mechanism), number) for number in changed)
    lines = [f"vCPU {format_ids(ids)}: {word}" for word, ids in words.items()]
    pending = format_ids(result.pending)
    if result.outcome == "requested":
        lines.append(f"vCPU {pending}: unplug requested, QEMU took it")
    elif result.pending:
        lines.append(f"vCPU {pending}: unplug requested, and not ended at the deadline")
    if result.pending_online:
        lines.append(
            f"vCPU {format_ids(result.pending_online)}: the guest is not known to run on it yet"
        )
    if result.defined:
        lines += _defined(result)
    return lines or _already(result)


def _already(result: Outcome) -> list[str]:
    """Return that nothing was to be done, in the words of the request."""
    if result.already:
        return list(result.already)
    words = grouped((row.state, row.id) for row in result.rows)
    return [f"vCPU {format_ids(ids)}: already {word}" for word, ids in words.items()] or [
        "nothing to do"
    ]


def _defined(result: Outcome) -> list[str]:
    if not result.config_changed_ids:
        return ["the definition is changed"]
    rows = {row.id: row for row in result.rows} if not result.live_changed_ids else {}
    words = grouped(
        (rows[n].state if n in rows else "changed", n) for n in result.config_changed_ids
    )
    return [f"vCPU {format_ids(ids)}: {word} in the definition" for word, ids in words.items()]


def domains(found: Sequence[ListedDomain]) -> list[str]:
    """Return the lines of `list`, in virsh's words."""
    rows = [("NAME", "STATE", "VCPUS", "QMP")]
    for row in found:
        count = "-" if row.maximum is None else f"{row.current} of {row.maximum}"
        rows.append((row.name, row.state, count, " ".join(row.addresses.qmp) or "-"))
    return [*columns(rows), *(f"{row.name}: {row.trouble}" for row in found if row.trouble)]


def _changed_to(row: Vcpu | None, mechanism: str | None) -> str:
    if row is None:
        return f"changed ({mechanism})"
    if mechanism == "agent" and row.enabled:
        return ("online" if row.online else "offline") + " in the guest (agent)"
    return f"{row.state} (hotplug)"


def guest_outcome(result: Outcome, *, is_online: bool) -> list[str]:
    """Return what `guestvcpus --cpulist` did."""
    ids = result.changed_ids or result.ids
    word = "online" if is_online else "offline"
    return [f"the guest's CPU {format_ids(ids)}: {'' if result.changed_ids else 'already '}{word}"]


def guest(view: GuestView) -> list[str]:
    """Return the guest's own CPUs in the three lines of `virsh guestvcpus`, and the vCPU of each
    one.
    """
    lines = columns(
        [
            (name, ":", format_ids(cpu.logical_id for cpu in view.cpus if wanted(cpu)))
            for name, wanted in (
                ("vcpus", lambda cpu: True),
                ("online", lambda cpu: cpu.online),
                ("offlinable", lambda cpu: cpu.can_offline),
            )
        ]
    )
    pairs = [
        ("GUEST-ID", "VCPU"),
        *((str(c.logical_id), _text(view.vcpu_of(c.logical_id))) for c in view.cpus),
    ]
    note = [", assumed"] if view.assumed else []
    return [*lines, "", *columns(pairs, right=frozenset({0, 1})), *note]


_EVENT_WORDS = {
    EventKind.ADDED: "plugged",
    EventKind.REMOVED: "removed",
    EventKind.REMOVAL_FAILED: "unplug refused",
    EventKind.ONLINE: "online in the guest",
    EventKind.OFFLINE: "offline in the guest",
    EventKind.UNPLUG_REQUESTED: "unplug requested",
    EventKind.EJECTING: "the guest is ejecting it",
}


def event(found: Event) -> str:
    """Return one line of `watch`."""
    name = f"vCPU {format_ids(found.vcpus)}" if found.vcpus else "a vCPU"
    text = f"{_clock(found.time)}  {name}: {_EVENT_WORDS[found.event]}"
    return f"{text} ({found.detail})" if found.detail else text


def snapshot(document: Mapping[str, Any]) -> str:
    """Return the first line of `watch`."""
    return (
        f"{_clock(document['time'])}  vCPU {format_ids(document['vcpus'])}: enabled"
        f" ({document['detail']})"
    )


def _clock(seconds: float) -> str:
    """Return the local time of day with milliseconds."""
    return time.strftime("%H:%M:%S", time.localtime(seconds)) + f".{int(seconds * 1000) % 1000:03d}"


def plan(result: Plan) -> list[str]:
    """Return what would be done, or every refusal with its hint."""
    lines = result.describe() or ["nothing to do"]
    if result.refusals:
        lines = [f"refused: {refusal.message}" for refusal in result.refusals]
        lines += [f"  hint: {refusal.hint}" for refusal in result.refusals if refusal.hint]
    return lines


def status(found: MigrationStatus) -> str:
    """Return the progress of a migration in one line."""
    words = [f"{found.percent} %"] if found.percent is not None else [found.status]
    if found.transferred is not None:
        sent = found.transferred
        words.append(f"{sent >> 20} MiB sent" if sent >= 10 << 20 else f"{sent >> 10} KiB sent")
    if found.downtime is not None:
        words.append(f"downtime {found.downtime} ms")
    return ", ".join(words)
