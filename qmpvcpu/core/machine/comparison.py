"""Compare the machines of two QEMUs, as a guest that moves between them would see them. Pure.

Both got the same queries (`domain.migration.picture`). QOM paths differ between versions and do not
count as a difference; neither do a machine type's own devices, which both sides have.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from qmpvcpu.core.machine.command_line import QemuCommandLine
from qmpvcpu.core.machine.devices import beyond_definitions
from qmpvcpu.core.machine.versions import are_same
from qmpvcpu.core.model import QemuVersion
from qmpvcpu.core.quirks import quirk
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.state.inventory import object_of, objects_of
from qmpvcpu.errors import Refusal

T = TypeVar("T")
_BLOCK: Final = re.compile(
    r"^ *(\S.*?) +\d+ \w?i?B +0x[0-9a-f]+ +0x[0-9a-f]+ +0x([0-9a-f]+)", re.MULTILINE
)
_MAPPED: Final = re.compile(
    r"^ +([0-9a-f]{16})-[0-9a-f]{16} \(prio -?[0-9]+, ram\): (\S+)", re.MULTILINE
)
_NODE: Final = re.compile(r"^node ([0-9]{1,4}) size: ([0-9]{1,9}) MB", re.MULTILINE)
_CHILD: Final = re.compile(r"child<(.+)>\Z")
#: Blocks of firmware tables: QEMU resizes them if it has to.
_RESIZED: Final = "/rom@"
#: A temporary overlay of -snapshot and of snapshot=on: block.c, `create_tmp_file`.
_TEMPORARY: Final = re.compile(r"/vl\.[A-Za-z0-9]{6}\Z")
#: Prefixes of QEMU's for files and devices of the host.
_LOCAL: Final = ("file:", "host_device:", "host_cdrom:")
_DEVICE: Final = re.compile(r"/machine/peripheral/([^/]+)\Z")
#: QOM types that are not devices.
_PARTS: Final = (
    "memory-region",
    "irq",
    "container",
    "-cpu",
    "-cpu-core",
    "object",
    "memory-backend",
)
#: Properties of -machine that depend on the host or on the moment.
_PASSING: Final = frozenset(
    (
        *(
            "dumpdtb",
            "dtb",
            "kernel",
            "initrd",
            "append",
            "firmware",
            "phandle-start",
            "memory-backend",
            "type",
        ),
        *("dump-guest-core", "mem-merge", "usb", "graphics", "suppress-vmdesc"),
    )
)
#: Properties of a CPU that depend on its slot or on the moment.
_OF_PLACE: Final = frozenset(
    (
        *(
            "hotplugged",
            "realized",
            "hotpluggable",
            "start-powered-off",
            "type",
            "parent_bus",
            "apic-id",
            "node-id",
        ),
        *(
            "socket-id",
            "die-id",
            "module-id",
            "core-id",
            "thread-id",
            "cluster-id",
            "unavailable-features",
        ),
        *("crash-information", "memory", "cpu-index"),
    )
)


@dataclass(frozen=True, slots=True)
class Picture:
    """What QEMU reports about a machine.

    Attributes:
        version: QEMU's.
        memory: bytes of -m.
        blocks: RAM blocks, bytes by name.
        places: the lowest guest address of each block that is a memory backend.
        nodes: MiB of each NUMA node, as HMP rounds them.
        machine: properties of the machine.
        cpu: properties of the first CPU.
        pci: the device in each slot of the root PCI buses.
        added: types of devices that a user has added, with their place.
        types: types of all devices.
        distances: between two NUMA nodes, those that are not QEMU's defaults; None if the command
            line, the only source, is not known.
        attributes: of memory (ACPI's HMAT), as -numa has them; None as for `distances`.
        disks: the name and the format of each drive's file. The name is empty if the drive has no
            medium, the format if it is not known. None: QEMU was not queried.
        beyond: options of the command line that a definition made from it cannot have.
        read_only: memory backends to which QEMU may not write.
    """

    version: QemuVersion | None = None
    memory: int | None = None
    blocks: Mapping[str, int] = field(default_factory=dict)
    places: Mapping[str, int] = field(default_factory=dict)
    nodes: Mapping[int, int] = field(default_factory=dict)
    machine: Mapping[str, object] = field(default_factory=dict)
    cpu: Mapping[str, object] = field(default_factory=dict)
    pci: Mapping[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    distances: Mapping[str, int] | None = None
    attributes: tuple[str, ...] | None = None
    disks: Mapping[str, tuple[str, ...]] | None = None
    beyond: tuple[str, ...] = ()
    read_only: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DiskImage:
    """The name and the format of a drive's file, both empty if it has no medium, and the name of
    its block node.
    """

    file: str = ""
    format: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference: `source` is the value on which the guest runs, `target` the one that it
    would find.
    """

    what: str
    source: str
    target: str

    def text(self, where: str) -> str:
        """The difference as a text; `where` are the words for the other side."""
        return f"{self.what}: {self.source} at the source, {self.target} {where}"


def refusals_of(found: Iterable[Difference], where: str, hint: str) -> list[Refusal]:
    """Each difference as a refusal.

    Args:
        found: differences.
        where: the words for the side that is not the source ("in the definition").
        hint: what to do.
    """
    return [catalogue.DIFFERENCE(difference=one.text(where), hint=hint) for one in found]


def differences(source: Picture, target: Picture) -> list[Difference]:
    """Every difference between the two that a guest could notice."""
    found: list[Difference] = []
    if source.memory != target.memory:
        found.append(
            Difference("memory", *(_kib(side.memory, "unknown") for side in (source, target)))
        )
    same = are_same(source.version, target.version)
    found += _of_blocks(source, target, same)
    found += _of_mapping("memory of NUMA node {}", source.nodes, target.nodes, "MiB")
    found += _of_command_lines(source, target)
    found += _of_mapping("PCI device at {}", source.pci, target.pci)
    found += _of_devices(source, target, same)
    if source.disks is not None and target.disks is not None:
        found += _of_disks(source.disks, target.disks)
    if same:
        # Other versions have other names for the same.
        found += _of_mapping("-machine {}", *_common(source.machine, target.machine))
        found += _of_cpu(*_common(source.cpu, target.cpu))
    return found


def _of_command_lines(source: Picture, target: Picture) -> list[Difference]:
    """Differences that only command lines show: none if one of them is not known."""
    found = []
    if source.distances is not None and target.distances is not None:
        found += _of_mapping("distance of NUMA nodes {}", source.distances, target.distances)
    if source.attributes is not None and target.attributes is not None:
        found += _of_mapping("{}", Counter(source.attributes), Counter(target.attributes))
    return found


def _of_cpu(there: Mapping[str, object], now: Mapping[str, object]) -> list[Difference]:
    """All features in one difference: another model has hundreds of them."""
    changed = [key for key in sorted(there) if there[key] != now[key]]
    features = [key for key in changed if isinstance(there[key], bool)]
    found = []
    if features:
        sides = (
            ", ".join(key for key in features if side[key]) or "none of them"
            for side in (there, now)
        )
        found.append(Difference("CPU features", *sides))
    return found + [
        Difference(f"CPU property {key}", str(there[key]), str(now[key]))
        for key in changed
        if key not in features
    ]


def _kib(size: int | None, missing: str) -> str:
    return missing if size is None else f"{size // 1024} KiB"


def _of_blocks(source: Picture, target: Picture, same: bool) -> list[Difference]:
    def own(picture: Picture) -> dict[str, int]:
        return {
            name: size
            for name, size in picture.blocks.items()
            if same or not name.startswith(_RESIZED)
        }

    there, now = own(source), own(target)
    found = [
        Difference(f"RAM block '{name}'", *(_kib(side.get(name), "none") for side in (there, now)))
        for name in sorted(there.keys() | now.keys())
        if there.get(name) != now.get(name)
    ]
    addresses = (
        {name: f"{place:#x}" for name, place in side.places.items()} for side in (source, target)
    )
    return found + _of_mapping("address of the RAM block '{}'", *_common(*addresses))


def _of_mapping(
    what: str, there: Mapping[Any, object], now: Mapping[Any, object], unit: str = ""
) -> list[Difference]:
    return [
        Difference(what.format(key), _word(there.get(key), unit), _word(now.get(key), unit))
        for key in sorted(there.keys() | now.keys())
        if there.get(key) != now.get(key)
    ]


def _word(value: object, unit: str) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value} {unit}".strip()


def _common(there: Mapping[str, T], now: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    keys = there.keys() & now.keys()
    return {key: there[key] for key in keys}, {key: now[key] for key in keys}


def _of_devices(source: Picture, target: Picture, same: bool) -> list[Difference]:
    """By number. Between versions only the devices that a user has added: a machine's own may have
    other names.
    """
    if same:
        return _of_mapping("device {}", Counter(source.types), Counter(target.types))
    there, now = Counter(source.added), Counter(target.added)
    # A default device of one side may have been added on the other.
    return [
        one
        for one in _of_mapping("device {}", there, now)
        if one.what.removeprefix("device ") not in {*source.types, *target.types} - {*there, *now}
    ]


_Disks = Mapping[str, tuple[str, ...]]


def _of_disks(source: _Disks, target: _Disks) -> list[Difference]:
    """By the names of the drives, or by their files if a user's definition has other names."""
    there, now = (
        {key: (*one, "", "")[:2] for key, one in side.items()} for side in (source, target)
    )
    found = []
    for key in sorted(there.keys() & now.keys()):
        one, other = there.pop(key), now.pop(key)
        if not _is_same_image(one, other):
            found.append(Difference(f"disk '{key}'", *_image_words(one, other)))
    for key, one in sorted(there.items()):
        match = next((name for name, other in now.items() if _is_same_image(one, other)), None)
        if match is not None:
            del now[match]
        elif one[0]:
            found.append(Difference(f"disk '{key}'", one[0], "none"))
    return found + [
        Difference(f"disk '{key}'", "none", one[0]) for key, one in sorted(now.items()) if one[0]
    ]


def _is_same_image(one: Sequence[str], other: Sequence[str]) -> bool:
    if one[0] and other[0] and not is_local(one[0]) and not is_local(other[0]):
        # QEMU has several ways to write an image on the network.
        return True
    return one[0] == other[0] and (one[1] == other[1] or not one[1] or not other[1])


def _image_words(one: Sequence[str], other: Sequence[str]) -> tuple[str, str]:
    if one[0] == other[0]:
        return f"{one[0]} as {one[1]}", f"{other[0]} as {other[1]}"
    return one[0] or "no medium", other[0] or "no medium"


def is_local(file: str) -> bool:
    """Whether an image name is that of a file or device of the host."""
    return ":" not in file.partition("/")[0]


def image_name(text: str) -> str:
    """The name of a file, without the words that QEMU or a command line puts around it."""
    if text.startswith("json:"):
        try:
            value = json.loads(text.removeprefix("json:"))
        except (ValueError, RecursionError):
            return text
        while isinstance(value, dict):
            if isinstance(value.get("filename"), str):
                return image_name(value["filename"])
            value = value.get("file")
        return image_name(value) if isinstance(value, str) else text
    prefix = next((prefix for prefix in _LOCAL if text.startswith(prefix)), "")
    return text.removeprefix(prefix)


def check_movable(picture: Picture) -> list[Refusal]:
    """Why even an equal QEMU cannot take the guest: temporary overlays of its disks are lost with
    the first QEMU, and read-only memory crashes the second one.
    """
    found = [
        catalogue.TEMPORARY(disk=key)
        for key, one in sorted((picture.disks or {}).items())
        if one and _TEMPORARY.search(one[0])
    ]
    row = quirk("read-only-memory")
    if picture.read_only and row.is_in(picture.version):
        found.append(
            catalogue.READ_ONLY_MEMORY(
                effect=row.message, backends=", ".join(picture.read_only), hint=row.hint
            )
        )
    return found


# -- replies ---------------------------------------------------------------------------------------


def parse_picture(version: QemuVersion | None, replies: Mapping[str, object]) -> Picture:
    """The picture from replies by name; malformed replies are left out.

    Args:
        version: QEMU's.
        replies: `memory` in bytes, `ramblock` and `mtree` and `numa` as texts, `memdevs`, `pci` as
            QMP's, `machine` and `cpu` by property, `added` and `own` as lists of (type, place),
            `block` as QMP's, `backends` as properties of each memory backend by its id.
    """
    ids = {row.get("id") for row in objects_of(replies.get("memdevs"))}
    places: dict[str, int] = {}
    for address, name in _MAPPED.findall(_text(replies.get("mtree"))):
        if name in ids:
            places[name] = min(int(address, 16), places.get(name, 1 << 64))
    memory, machine, cpu = replies.get("memory"), replies.get("machine"), replies.get("cpu")
    added, own = (_devices(replies.get(key)) for key in ("added", "own"))
    disks = parse_disks(replies.get("block"))
    return Picture(
        version,
        memory if type(memory) is int else None,
        {name: int(size, 16) for name, size in _BLOCK.findall(_text(replies.get("ramblock")))},
        places,
        {int(node): int(size) for node, size in _NODE.findall(_text(replies.get("numa")))},
        _plain(machine, _PASSING),
        _plain(cpu, _OF_PLACE),
        dict(_pci(replies.get("pci"))),
        tuple(sorted(added)),
        tuple(sorted([*added, *own])),
        disks={key: (one.file, one.format) for key, one in disks.items()}
        if disks is not None
        else None,
        # `rom` came with 8.2.
        read_only=tuple(
            name
            for name, row in object_of(replies.get("backends")).items()
            if row.get("readonly") is True and row.get("rom") != "off"
        ),
    )


def parse_disks(reply: object) -> dict[str, DiskImage] | None:
    """The disks of `query-block`, by the name of the drive or of its device; None if it is
    malformed.
    """
    if not isinstance(reply, list):
        return None
    found = {}
    for row in objects_of(reply):
        device, qdev, inserted = (row.get(key) for key in ("device", "qdev", "inserted"))
        path = qdev.removesuffix("/virtio-backend") if isinstance(qdev, str) else ""
        match = _DEVICE.match(path)
        key = (
            device
            if isinstance(device, str) and device
            else match[1]
            if match is not None
            else path
        )
        if key:
            file, kind, node = (
                _word_of(object_of(inserted).get(name)) for name in ("file", "drv", "node-name")
            )
            found[key] = DiskImage(image_name(file), kind, node)
    return found


def _word_of(value: object) -> str:
    return value if isinstance(value, str) else ""


#: QEMU's default distances: of a node to itself, and to another one.
_NEAR, _FAR = 10, 20


def with_command_line(picture: Picture, line: QemuCommandLine) -> Picture:
    """The picture, completed by what only the command line has."""
    known = {(one, other): value for one, other, value in line.distances}
    both = {(other, one): value for (one, other), value in known.items()} | known
    distances = {
        f"{one} and {other}": value
        for (one, other), value in both.items()
        if value != (_NEAR if one == other else _FAR)
    }
    return replace(
        picture,
        distances=distances,
        attributes=line.memory_attributes,
        beyond=tuple(beyond_definitions(line)),
    )


def _text(reply: object) -> str:
    if isinstance(reply, dict):
        reply = reply.get("human-readable-text")
    return reply if isinstance(reply, str) else ""


def _plain(reply: object, but: frozenset[str]) -> dict[str, object]:
    if not isinstance(reply, dict):
        return {}
    return {k: v for k, v in reply.items() if k not in but and isinstance(v, (bool, int, str))}


def _devices(reply: object) -> list[str]:
    rows = reply if isinstance(reply, list) else []
    return [
        " ".join(filter(None, row))
        for row in rows
        if not any(row[0].endswith(part) for part in _PARTS)
    ]


def child_type(row: object) -> str | None:
    """The type of a child that `qom-list` lists."""
    match = _CHILD.match(_word_of(object_of(row).get("type")))
    return match[1] if match is not None else None


def _pci(reply: object) -> Iterable[tuple[str, str]]:
    """The devices of the root buses, by their slots."""
    for bus in objects_of(reply):
        where = f"{bus.get('bus')}:" if isinstance(bus.get("bus"), int) else ""
        # QEMU lists the devices behind a bridge only after firmware has numbered its bus, and a
        # twin never runs firmware: such devices are compared by their types.
        for device in objects_of(bus.get("devices")):
            slot, function, ids = (
                device.get("slot"),
                device.get("function"),
                object_of(device.get("id")),
            )
            if isinstance(slot, int) and isinstance(function, int):
                yield (
                    f"{where}{slot:02x}.{function}",
                    f"{ids.get('vendor', 0):04x}:{ids.get('device', 0):04x}",
                )
