"""A definition made from a running QEMU: its command line, checked against QMP and completed by it.
Pure.

A guest that is started from it is the same as before: RAM blocks with their ids and nodes, sizes to
the byte, the CPU model with its features. What a definition cannot have is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.definition import Definition, Dimm, MemoryBackend, NumaCell, Pairs, QemuOptions
from qmpvcpu.core.machine.command_line import QemuCommandLine, split_cpu
from qmpvcpu.core.machine.devices import Devices, devices_of
from qmpvcpu.core.state.inventory import count_of, object_of, objects_of

_NODE: Final = re.compile(r"^node ([0-9]{1,4}) size: ([0-9]{1,9}) MB", re.MULTILINE)
_PLUGGED: Final = re.compile(r"^node ([0-9]{1,4}) plugged: ([0-9]{1,9}) MB", re.MULTILINE)
_BLOCK: Final = re.compile(
    r"^ +[0-9a-f]{16}-[0-9a-f]{16} \(prio -?[0-9]+, ram\): (\S+)", re.MULTILINE
)
_MIB: Final = 1024 * 1024
_OBJECTS: Final = "/objects/"
#: Options of -machine that the definition has elsewhere; those that name files of the host or
#: protect the guest.
_ELSEWHERE: Final = frozenset({"memory-backend", "type", "accel"})
_NOT_DEFINED: Final = frozenset(
    (
        *("kernel", "initrd", "append", "dtb", "dumpdtb", "firmware", "shm-path"),
        *("confidential-guest-support", "memory-encryption"),
    )
)
#: Options without an argument that are options of the machine.
_FLAGS: Final = {
    "no-acpi": ("acpi", "off"),
    "no-hpet": ("hpet", "off"),
    "usb": ("usb", "on"),
    "nographic": ("graphics", "off"),
}
#: The suffixes of a driver of `device_add` that `query-cpu-definitions` does not know.
_CORE_SUFFIXES: Final = ("-spapr-cpu-core", "-powerpc64-cpu")
M = TypeVar("M", MemoryBackend, Dimm)


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What QMP reports about a machine's memory and CPU model. Sizes in bytes.

    `memdevs` are sizes by id, `whole` is the id of the block that all nodes share, None if each has
    its own. `other_devices` are memory devices that are not DIMMs, by id (that of the backend if
    they have none), each as one text. `cpu_models` are names by QOM type. `numa_text` and
    `tree_text` are HMP's `info numa` and `info mtree -f`, empty if QMP and the command line have it
    all.
    """

    memdevs: Mapping[str, int] = field(default_factory=dict)
    base_memory: int | None = None
    max_memory: int | None = None
    slots: int = 0
    whole: str | None = None
    dimms: tuple[Dimm, ...] = ()
    other_devices: Mapping[str, str] = field(default_factory=dict)
    cpu_models: Mapping[str, str] = field(default_factory=dict)
    numa_text: str = ""
    tree_text: str = ""


@dataclass(frozen=True, slots=True)
class Described:
    """A definition with its devices; `left_out` is what it cannot have of the guest, each as one
    text.
    """

    definition: Definition
    left_out: tuple[str, ...] = ()
    devices: Devices | None = None


def machine_facts(replies: Mapping[str, object]) -> MachineFacts:
    """The facts from the replies by command; malformed values are left out."""
    memdevs = {
        row["id"]: row["size"]
        for row in objects_of(replies.get("query-memdev"))
        if isinstance(row.get("id"), str) and type(row.get("size")) is int
    }
    summary, memory = (
        object_of(replies.get(key)) for key in ("query-memory-size-summary", "memory")
    )
    whole = replies.get("memory-backend")
    dimms: list[Dimm] = []
    others: dict[str, str] = {}
    for row in objects_of(replies.get("query-memory-devices")):
        data = object_of(row.get("data"))
        if row.get("type") == "dimm" and type(data.get("size")) is int:
            name = data.get("id")
            dimms.append(
                Dimm(
                    data["size"],
                    count_of(data.get("node")),
                    count_of(data.get("slot")),
                    count_of(data.get("addr")),
                    name if isinstance(name, str) else None,
                    _memdev(data),
                )
            )
        else:
            name = data.get("id") or _memdev(data) or ""
            others[str(name)] = f"{row.get('type')} '{name}'"
    models = {
        row["typename"]: row["name"]
        for row in objects_of(replies.get("query-cpu-definitions"))
        if isinstance(row.get("typename"), str) and isinstance(row.get("name"), str)
    }
    texts = [replies.get(key) for key in ("info numa", "info mtree -f")]
    return MachineFacts(
        memdevs,
        count_of(summary.get("base-memory")),
        count_of(memory.get("max-size")),
        count_of(memory.get("slots")) or 0,
        whole.removeprefix(_OBJECTS) or None if isinstance(whole, str) else None,
        tuple(sorted(dimms, key=lambda dimm: dimm.address or 0)),
        others,
        models,
        *(text if isinstance(text, str) else "" for text in texts),
    )


def _memdev(data: Mapping[str, Any]) -> str | None:
    path = data.get("memdev")
    return path.removeprefix(_OBJECTS) if isinstance(path, str) else None


def agrees(line: QemuCommandLine | None, facts: MachineFacts) -> bool:
    """Whether this can be the QEMU's command line: a process can write anything into its own."""
    if line is None:
        return False
    ids = {option.get("id") for option in line.backends} | {
        node.memdev for node in line.nodes if node.memdev
    }
    return ids <= set(facts.memdevs)


def described(
    found: Definition,
    driver: str | None,
    facts: MachineFacts,
    line: QemuCommandLine | None,
    folder: str | None = None,
) -> Described:
    """Make the definition.

    Args:
        found: the definition of the running guest's vCPUs (`definition_of`).
        driver: of `device_add`, for its CPUs.
        facts: from QMP.
        line: a command line that agrees with them; None if there is none.
        folder: QEMU's working directory, for relative file names.
    """
    # A memory device of the command line is among the devices.
    devices = line.all("device") if line is not None else ()
    given = {option.get("id") or option.get("memdev") for option in devices}
    left_out = [
        f"the memory device {text}"
        for name, text in facts.other_devices.items()
        if name not in given
    ]
    cells, options, more = (
        _of_line(found, facts, line) if line is not None else _of_monitor(found, facts)
    )
    left_out += more
    cpu, properties = _cpu(driver, found.arch, facts, line)
    base = facts.base_memory
    # QMP reports a maximum only if there are slots (7.2 to 11.1).
    most = facts.max_memory if facts.slots else line.memory.maximum if line is not None else None
    definition = replace(
        found,
        cells=cells,
        cpu=cpu,
        memory=None if base is None else base + sum(dimm.size for dimm in facts.dimms),
        max_memory=most if most != base else None,
        memory_slots=facts.slots or None,
        dimms=tuple(_as_started(dimm, dimm.memdev, line) for dimm in facts.dimms),
        options=replace(options, cpu=properties),
    )
    if definition.rounded != definition:
        definition = replace(definition, options=replace(definition.options, is_exact=True))
    if line is None:
        return Described(
            definition,
            (*left_out, "its devices: QEMU's command line cannot be read, or cannot be trusted"),
        )
    found_devices = devices_of(line, definition, (driver,) if driver is not None else (), folder)
    return Described(definition, (*left_out, *found_devices.left_out), found_devices)


def _of_line(
    found: Definition, facts: MachineFacts, line: QemuCommandLine
) -> tuple[tuple[NumaCell, ...], QemuOptions, list[str]]:
    left_out = [f"'{text}'" for text in line.unread]
    left_out += [f"-{option.name}" for option in line.all("mem-path", "mem-prealloc")]
    nodes = line.nodes
    rank = {option.get("id"): position for position, option in enumerate(line.backends)}
    made = [MemoryBackend(node.memdev, node.id) for node in nodes if node.memdev]
    made += [MemoryBackend(value) for key, value in line.machine_options if key == "memory-backend"]
    backends = [_as_started(backend, backend.id, line) for backend in made]
    backends.sort(key=lambda backend: rank.get(backend.id, len(rank)))
    sizes = {
        node.id: facts.memdevs.get(node.memdev, 0) if node.memdev else node.memory or 0
        for node in nodes
    }
    if nodes and not any(sizes.values()):
        # Old machine types distribute all memory to nodes without a size.
        sizes |= _sizes_of_text(facts)
    one_block = bool(nodes) and any(sizes.values()) and not any(node.memdev for node in nodes)
    cpus = {cell.id: cell.cpus for cell in found.cells}
    cells = tuple(
        NumaCell(
            node.id,
            cpus.get(node.id, ()),
            sizes[node.id],
            tuple((to, value) for of, to, value in line.distances if of == node.id),
        )
        for node in nodes
    )
    machine = dict(pair for name, pair in _FLAGS.items() if line.has(name)) | dict(
        line.machine_options
    )
    dropped = {
        key
        for key, value in machine.items()
        if key in _NOT_DEFINED or "," in value or not value.isprintable()
    }
    left_out += [f"-machine {key}={value}" for key, value in machine.items() if key in dropped]
    left_out += line.memory_attributes
    accel = next(line.all("accel"), None)
    is_used = accel is not None and accel.get("accel") == found.accel
    options = QemuOptions(
        tuple((key, value) for key, value in machine.items() if key not in dropped | _ELSEWHERE),
        line.accel_options if is_used else (),
        (),
        tuple(backends),
        one_block,
    )
    return cells, options, left_out


def _as_started(memory: M, name: str | None, line: QemuCommandLine | None) -> M:
    """A backend, or the DIMM on the backend of this name, with the options of its `-object`."""
    backends = reversed(line.backends if line is not None else ())
    option = next((option for option in backends if option.get("id") == name), None)
    if option is None:
        return memory
    return replace(
        memory,
        driver=option.get("qom-type") or "",
        options=tuple(pair for pair in option.pairs if pair[0] not in ("qom-type", "id", "size")),
    )


def _sizes_of_text(facts: MachineFacts) -> dict[int, int]:
    """Bytes by node, from HMP, which rounds to MiB; without plugged memory."""
    plugged = {int(node): int(size) for node, size in _PLUGGED.findall(facts.numa_text)}
    return {
        int(node): max(int(size) - plugged.get(int(node), 0), 0) * _MIB
        for node, size in _NODE.findall(facts.numa_text)
    }


def _of_monitor(
    found: Definition, facts: MachineFacts
) -> tuple[tuple[NumaCell, ...], QemuOptions, list[str]]:
    """Cells and options without a command line, as for a QEMU on another host."""
    sizes = _sizes_of_text(facts)
    is_own = len(sizes) == 1 and (architecture(found.arch).has_node_always or facts.slots > 0)
    if not sizes or (facts.whole is not None and is_own):
        # The only node is the machine's default node.
        return (), QemuOptions(), []
    cpus = {cell.id: cell.cpus for cell in found.cells}
    cells = [NumaCell(node, cpus.get(node, ()), size) for node, size in sorted(sizes.items())]
    if facts.whole is not None:
        return tuple(cells), QemuOptions(is_one_block=True), []
    # Nodes with memory are in the order of their addresses (7.2 to 11.1).
    with_memory = [cell for cell in cells if cell.memory]
    own = [name for name in dict.fromkeys(_BLOCK.findall(facts.tree_text)) if name in facts.memdevs]
    own = [name for name in own if name not in {dimm.memdev for dimm in facts.dimms}]
    if len(own) != len(with_memory):
        return tuple(cells), QemuOptions(), ["which memory backend is on which NUMA node"]
    backends = {cell.id: name for cell, name in zip(with_memory, own, strict=True)}
    exact = tuple(
        replace(cell, memory=facts.memdevs[backends[cell.id]]) if cell.id in backends else cell
        for cell in cells
    )
    return (
        exact,
        QemuOptions(backends=tuple(MemoryBackend(name, cell) for cell, name in backends.items())),
        [],
    )


def _cpu(
    driver: str | None, arch: str | None, facts: MachineFacts, line: QemuCommandLine | None
) -> tuple[str | None, Pairs]:
    """-cpu's model with the features that are on or off, and its other properties."""
    if line is not None:
        text = line.text("cpu")
        if text is None:
            return None, ()
        model, properties = split_cpu(text)
        switches = [f"{key}={value}" for key, value in properties if value in ("on", "off")]
        return ",".join([model, *switches]), tuple(
            pair for pair in properties if pair[1] not in ("on", "off")
        )
    if driver is None:
        return None, ()
    if driver in facts.cpu_models:
        return facts.cpu_models[driver], ()
    suffixes = (*_CORE_SUFFIXES, architecture(arch).cpu_suffix)
    return next(
        (driver.removesuffix(one) for one in suffixes if one and driver.endswith(one)), None
    ), ()
