"""What command lines say of vCPUs, so that they are equal where QEMU makes the same of them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

#: Options of -machine that say something of vCPUs.
_MACHINE_OPTIONS = ("acpi", "hmat", "kernel-irqchip")
#: What QEMU takes where they are not there.
_DEFAULTS = {"acpi": "on", "hmat": "off"}
_LEVELS = ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")


@dataclass
class Arguments:
    """What a command line says of vCPUs."""

    smp: dict[str, int] = field(default_factory=dict)
    #: Node -> its CPUs and bytes of memory (None: no memory of its own).
    nodes: dict[int, tuple[tuple[int, ...], int | None]] = field(default_factory=dict)
    initiators: dict[int, str] = field(default_factory=dict)
    distances: dict[tuple[int, int], int] = field(default_factory=dict)
    #: hmat-lb, hmat-cache and others, as they are.
    numa: list[str] = field(default_factory=list)
    cpus: list[str] = field(default_factory=list)
    accel: str = ""
    machine: str = ""
    machine_options: dict[str, str] = field(default_factory=dict)
    #: Of a guest that migrates here.
    is_incoming: bool = False


def read_args(text: str) -> Arguments:
    """A file of libvirt's tests: one option a line, and the environment before."""
    words = shlex.split(text.replace("\\\n", " "))
    while words and "=" in words[0]:
        del words[0]
    return read_words(words[1:])


def read_words(words: Sequence[str]) -> Arguments:
    found = Arguments()
    sizes: dict[str, int] = {}
    for option, value in _pairs(words):
        if option in ("-object", "-device") and value.startswith("{"):
            entries = {key: str(item) for key, item in json.loads(value).items()}
        else:
            entries = _entries(value)
        if option == "-smp":
            found.smp = _smp(entries)
        elif option == "-incoming":
            found.is_incoming = True
        elif option == "-object" and entries.get("id"):
            sizes[entries["id"]] = _size(entries.get("size", "0"))
        elif option == "-numa":
            _numa(found, value, entries, sizes)
        elif option == "-accel":
            found.accel = found.accel or value.partition(",")[0]
        elif option == "-machine":
            found.machine = value.partition(",")[0]
            found.machine_options = {
                name: item
                for key, item in entries.items()
                if (name := key.replace("_", "-")) in _MACHINE_OPTIONS
            }
            found.accel = entries.get("accel", found.accel)
        elif option == "-device" and re.search(r"-cpu$|-spapr-cpu-core$", _driver(value, entries)):
            found.cpus.append(value)
    return found


def differences(ours: Arguments, libvirts: Arguments) -> Iterator[tuple[str, str]]:
    """In what they differ: a word that is the same for all files, and the two values."""
    # What is missing of -smp is 1 to QEMU, and to libvirt's reader.
    for key in sorted({*ours.smp, *libvirts.smp}):
        one, other = ours.smp.get(key, 1), libvirts.smp.get(key, 1)
        if one != other:
            yield f"-smp {key}", f"{one}, libvirt {other}"
    if ours.nodes.keys() != libvirts.nodes.keys():
        yield "-numa node", f"nodes {sorted(ours.nodes)}, libvirt {sorted(libvirts.nodes)}"
    else:
        for node, (cpus, size) in sorted(ours.nodes.items()):
            their_cpus, their_size = libvirts.nodes[node]
            if cpus != their_cpus:
                yield "-numa node cpus", f"node {node} has {cpus}, libvirt {their_cpus}"
            if size != their_size:
                text = "-numa node memory" + (" (-incoming)" if libvirts.is_incoming else "")
                yield text, f"node {node} has {size}, libvirt {their_size}"
    if ours.initiators != libvirts.initiators:
        yield "-numa node initiator", f"{ours.initiators}, libvirt {libvirts.initiators}"
    one_way, other_way = _both_ways(ours.distances), _both_ways(libvirts.distances)
    if one_way != other_way:
        yield "-numa dist", f"{one_way}, libvirt {other_way}"
    for line in sorted({*ours.numa} ^ {*libvirts.numa}):
        yield (
            f"-numa {line.partition(',')[0]}",
            f"{'ours' if line in ours.numa else 'libvirt'}: {line}",
        )
    if ours.accel != libvirts.accel:
        yield f"-accel: {ours.accel}, libvirt {libvirts.accel}", ""
    if ours.machine != libvirts.machine:
        yield "-machine type", f"{ours.machine}, libvirt {libvirts.machine}"
    for key in sorted({*ours.machine_options, *libvirts.machine_options}):
        one, other = (
            side.machine_options.get(key, _DEFAULTS.get(key)) for side in (ours, libvirts)
        )
        if one != other:
            yield f"-machine {key}: {one}, libvirt {other}", ""
    if ours.cpus != libvirts.cpus:
        yield "-device cpu", f"{ours.cpus}, libvirt {libvirts.cpus}"


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if re.fullmatch(r"-[a-z-]+", word):
            yield word, following


def _entries(value: str) -> dict[str, str]:
    """key=value of an option; a key that stands twice keeps both, joined by a comma."""
    found: dict[str, str] = {}
    for part in re.split(r"(?<!,),(?!,)", value):
        key, _, item = part.partition("=")
        found[key] = f"{found[key]},{item}" if key in found else item
    return found


def _driver(value: str, entries: dict[str, str]) -> str:
    return entries.get("driver") or value.partition(",")[0]


def _smp(entries: dict[str, str]) -> dict[str, int]:
    cpus = next((int(key) for key, item in entries.items() if key.isdigit() and not item), 0)
    cpus = cpus or int(entries["cpus"])
    levels = {key: int(entries[key]) for key in _LEVELS if key in entries}
    return {"cpus": cpus, "maxcpus": int(entries.get("maxcpus", cpus)), **levels}


def _numa(found: Arguments, value: str, entries: dict[str, str], sizes: dict[str, int]) -> None:
    kind = value.partition(",")[0]
    if kind == "node":
        cpus: list[int] = []
        for part in entries.get("cpus", "").split(","):
            low, _, high = part.partition("-")
            cpus += range(int(low), int(high or low) + 1) if low else ()
        size = (
            _size(entries["mem"], 2**20)
            if "mem" in entries
            else sizes.get(entries.get("memdev", ""))
        )
        node = int(entries["nodeid"])
        found.nodes[node] = tuple(cpus), size
        if "initiator" in entries:
            found.initiators[node] = entries["initiator"]
    elif kind == "dist":
        found.distances[int(entries["src"]), int(entries["dst"])] = int(entries["val"])
    else:
        found.numa.append(value)


def _both_ways(distances: dict[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    """To QEMU a distance is that of the way back too, unless another is written."""
    back = {(other, one): value for (one, other), value in distances.items()}
    return {key: value for key, value in (back | distances).items() if key[0] != key[1]}


def _size(text: str, usual: int = 1) -> int:
    """Bytes; `usual` is what QEMU counts in where no unit is written."""
    digits, unit = text.rstrip("bkKMG"), text.lstrip("0123456789")
    return int(digits) * {"": usual, "b": 1, "k": 2**10, "K": 2**10, "M": 2**20, "G": 2**30}[unit]
