"""Read the vCPUs of libvirt's domain XML, and report every inconsistency with its line.

The names of elements and attributes are libvirt's (formatdomain). `<vcpus>` is read in libvirt's
dialect and in the RFC's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Final

from qmpvcpu.core.arch import architecture_of_machine, architecture_of_program
from qmpvcpu.core.definition import (
    MOST_VCPUS,
    Definition,
    NumaCell,
    VcpuConfig,
    contradictions,
    default_vcpus,
    started_with,
)
from qmpvcpu.core.machine.devices import AGENT_PORT
from qmpvcpu.core.model import Topology, format_ids
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import Refusal, VcpuRefused
from qmpvcpu.xml.metadata import machine_element, read_dimms, read_options
from qmpvcpu.xml.source import Document, Element, parse_document

LEVELS_OF_TOPOLOGY: Final = (
    "drawers",
    "books",
    "sockets",
    "dies",
    "clusters",
    "modules",
    "cores",
    "threads",
)
#: `<domain type>`, and our name for the accelerator.
_ACCELS: Final = {"kvm": "kvm", "qemu": "tcg"}
#: The units of libvirt's virScaleInteger.
_UNITS: Final[Mapping[str, int]] = {"b": 1, "bytes": 1} | {
    word: base**power
    for power, letter in enumerate("kmgtpe", 1)
    for word, base in ((letter, 1024), (f"{letter}ib", 1024), (f"{letter}b", 1000))
}
_UUID: Final = re.compile(r"-*(?:[0-9a-fA-F]-*){32}")
_ARCH: Final = re.compile(r"[A-Za-z0-9_]{1,30}")
#: A CPU model ("Haswell-noTSX", "power10_v2.0").
_MODEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
#: A CPU feature, as QEMU and libvirt write it.
_FEATURE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: Features that the guest's kernel sets, or that only the host has. libvirt passes them to no QEMU.
_OF_THE_GUEST: Final = frozenset({"osxsave", "ospke", "cmt", "mbm_total", "mbm_local"})
#: The distance of a NUMA node to itself, in QEMU and ACPI.
_TO_ITSELF: Final = 10
_MACHINE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_WITH_PRIORITY: Final = ("fifo", "rr")
_SCHEDULERS: Final = ("fifo", "rr", "batch", "idle", "other")

#: The nouns for attributes whose lists do not contain vCPU ids.
_NOUNS: Final[Mapping[str, str]] = {"cpuset": "host CPUs", "nodeset": "host NUMA nodes"}
#: Greater than every vCPU id and host CPU.
_MOST_IN_LIST: Final = 1 << 17
#: libvirt's upper limit of `<quota>`, in microseconds.
_MOST_QUOTA: Final = 17592186044415
#: The modes of `<numatune>`; the second list has those that bind memory to the nodes.
_MODES: Final = ("strict", "preferred", "interleave", "restrictive")
_BINDING: Final = ("strict", "restrictive")


def read_domain(data: bytes, *, running: bool = False) -> tuple[Document, Definition]:
    """Read a domain's XML.

    Args:
        data: the document.
        running: it is libvirt's XML of a running guest. After an unplug that libvirt gave up
            waiting for, the same order may occur twice in it, also for vCPUs that were removed
            (9.0).

    Raises:
        VcpuRefused: it is not a domain's XML, or it contradicts itself; every reason, each with its
            line.
    """
    document = parse_document(data)
    reader = _Reader(document.root, running=running)
    definition = reader.definition()
    found = reader.found
    if found:
        raise VcpuRefused(found)
    return document, definition


class _Reader:
    """Reads all of a document even if a part of it is wrong, and collects the reasons in
    `found`.
    """

    def __init__(self, root: Element, *, running: bool = False) -> None:
        self.root = root
        self._running = running
        self.found: list[Refusal] = []
        self.maximum = 1

    def definition(self) -> Definition:
        root = self.root
        if root.name != "domain":
            self.found.append(catalogue.XML_NOT_A_DOMAIN(line=root.line, element=root.name))
            return Definition("", default_vcpus(1, 1))
        for word in ("name", "vcpu", "vcpus"):
            for again in list(root.all(word))[1:]:
                self._wrong(again, f"there are two <{word}>")
        name = root.find("name")
        if not root.text_at("name"):
            self.found.append(catalogue.XML_NO_NAME(line=(name or root).line))
        vcpus, dialect = self._vcpus()
        definition = Definition(
            name.text if name is not None else "",
            vcpus,
            accel=_ACCELS.get(root.attributes.get("type", "")),
            uuid=self._spelled(
                root.find("uuid"),
                root.text_at("uuid"),
                _UUID,
                "<uuid> '{}' is not a UUID",
            ),
            arch=self._arch(),
            machine=self._spelled(
                root.find("os/type"),
                root.value("os/type", "machine"),
                _MACHINE,
                "<type machine='{}'> is not the name of a machine type",
            ),
            emulator=root.text_at("devices/emulator") or None,
            dialect=dialect,
            cpuset=self._list(root.find("vcpu"), "cpuset"),
            topology=self._topology(),
            cells=self._cells(),
            pins=self._pins(),
            schedulers=self._schedulers(),
            emulator_pin=self._emulator_pin(),
            period=self._period(),
            quota=self._quota(),
            shares=self._tuned("shares", 0, 10**9),
            mems=self._nodes(root.find("numatune/memory")),
            cell_mems=self._cell_mems(),
            agent=self._agent(),
            memory=self._memory(root.find("memory")),
            cpu=self._cpu(),
            max_memory=self._memory(root.find("maxMemory")),
            memory_slots=self._optional(root.find("maxMemory"), "slots", 1, 1024),
            dimms=read_dimms(root, self._number_in, self._memory, self._wrong),
            options=read_options(root, self._wrong),
        )
        if not self._running and not self.found:
            for text in contradictions(definition):
                self._wrong(root.find("vcpus") or root.find("vcpu") or root, text)
        return definition

    def listed(self, maximum: int) -> tuple[tuple[VcpuConfig, ...], str | None]:
        """Read a document that consists of `<vcpus>` only."""
        self.maximum = maximum
        if self.root.find("vcpu") is None:
            self._wrong(self.root, "<vcpus> lists no vCPU")
        return self._listed(self.root)

    # -- <vcpu> and <vcpus> -----------------------------------------------------------------------

    def _vcpus(self) -> tuple[tuple[VcpuConfig, ...], str | None]:
        vcpu, listed = self.root.find("vcpu"), self.root.find("vcpus")
        if vcpu is not None:
            self.maximum = self._int(vcpu, vcpu.text or "1", "<vcpu>", 1, MOST_VCPUS) or 1
        current = self._optional(vcpu, "current", 1, self.maximum) or self.maximum
        if listed is None or listed.find("vcpu") is None:
            return default_vcpus(self.maximum, current), None
        return self._listed(listed)

    def _listed(self, listed: Element) -> tuple[tuple[VcpuConfig, ...], str | None]:
        found: dict[int, VcpuConfig] = {}
        dialects: dict[str, Element] = {}
        listed_ids = set()
        for row in listed.all("vcpu"):
            config = self._vcpu(row, dialects)
            if config is None:
                continue
            if "hotpluggable" in row.attributes:
                listed_ids.add(config.id)
            if config.id in found:
                self._wrong(row, f"vCPU {config.id} is twice in <vcpus>")
            found.setdefault(config.id, config)
        if len(dialects) > 1:
            row = max(dialects.values(), key=lambda element: element.line)
            self._wrong(row, "<vcpus> mixes 'enabled' (libvirt's dialect) and 'state' (the RFC's)")
        vcpus = tuple(
            found.get(n, VcpuConfig(n, enabled=False, hotpluggable=True))
            for n in range(self.maximum)
        )
        dialect = next(iter(dialects), None)
        if dialect == "rfc":
            vcpus = started_with(vcpus, listed_ids)
        self._check_rows(listed, vcpus)
        # A document with `<vcpus>` only says which vCPUs are wanted, not which ones a guest starts
        # with.
        if not self._running and listed is not self.root:
            self._check_start(listed, vcpus, has_orders=dialect == "libvirt")
        return vcpus, dialect

    def _check_rows(self, listed: Element, vcpus: Sequence[VcpuConfig]) -> None:
        if not vcpus[0].enabled:
            self._wrong(listed, "vCPU 0 is not enabled: a guest cannot boot without it")
        if vcpus[0].hotpluggable:
            self._wrong(listed, "vCPU 0 cannot be hotpluggable")
        for config in vcpus:
            if not config.enabled and not config.hotpluggable:
                self._wrong(
                    listed,
                    f"vCPU {config.id} is disabled and not hotpluggable: it could never be enabled",
                )

    def _check_start(
        self, listed: Element, vcpus: Sequence[VcpuConfig], *, has_orders: bool
    ) -> None:
        """Check the vCPUs that QEMU starts with: those that are not hotpluggable, in the order of
        their ids.

        The rules are libvirt's, with one exception: some vCPUs may have an order and others not.
        Those without one come last.
        """
        behind = [
            one.id
            for before, one in pairwise(vcpus)
            if before.hotpluggable and one.enabled and not one.hotpluggable
        ]
        if behind:
            self._wrong(
                listed,
                f"vCPU {format_ids(behind)} is enabled and not hotpluggable, after a hotpluggable"
                " one: the vCPUs that are not hotpluggable must come first",
            )
        elif has_orders:
            on = [vcpu for vcpu in vcpus if vcpu.enabled]
            if on[0].order not in (None, 1):
                self._wrong(listed, "vCPU 0 must be the first in the order")
            run = [vcpu.order for vcpu in on if not vcpu.hotpluggable and vcpu.order is not None]
            if run != sorted(run):
                self._wrong(
                    listed, "those that are not hotpluggable must have the order of their ids"
                )

    def _vcpu(self, row: Element, dialects: dict[str, Element]) -> VcpuConfig | None:
        number = self._int(row, row.attributes.get("id"), "<vcpu id>", 0, self.maximum - 1)
        words = {
            dialect: self._word(row, key, words)
            for dialect, key, words in (
                ("libvirt", "enabled", ("yes", "no")),
                ("rfc", "state", ("enabled", "disabled")),
            )
            if key in row.attributes
        }
        for dialect in words:
            dialects.setdefault(dialect, row)
        if not words:
            self._wrong(
                row, "a <vcpu> of <vcpus> needs enabled='yes|no' or state='enabled|disabled'"
            )
        order = self._optional(row, "order", 0, MOST_VCPUS) or None
        pluggable = None
        if "hotpluggable" in row.attributes:
            pluggable = self._word(row, "hotpluggable", ("yes", "no")) == "yes"
        if number is None:
            return None
        enabled = next(iter(words.values()), None) in ("yes", "enabled")
        # libvirt's rule: an enabled vCPU is not hotpluggable unless the attribute says so.
        pluggable = not enabled if pluggable is None else pluggable
        # libvirt also ignores the order of a disabled vCPU.
        return VcpuConfig(number, enabled, pluggable, order if enabled else None)

    # -- the rest -------------------------------------------------------------------------------

    def _arch(self) -> str:
        """The architecture in the XML; else, as in libvirt, that of the machine type, the program
        or this host.
        """
        root, element = self.root, self.root.find("os/type")
        text = root.value("os/type", "arch")
        name = self._spelled(
            element, text, _ARCH, "<type arch='{}'> is not the name of an architecture"
        )
        if name is not None:
            return name
        machine = root.value("os/type", "machine") or ""
        row = architecture_of_machine(machine) or architecture_of_program(
            root.text_at("devices/emulator")
        )
        return row.name if row is not None else os.uname().machine

    def _topology(self) -> Topology | None:
        element = self.root.find("cpu/topology")
        if element is None:
            return None
        counts = {
            level: self._int(
                element, element.attributes[level], f"<topology {level}>", 1, MOST_VCPUS
            )
            or 1
            for level in LEVELS_OF_TOPOLOGY
            if level in element.attributes
        }
        for level in ("sockets", "cores", "threads"):
            if level not in counts:
                self._wrong(element, f"<topology> has no {level}")
        product = prod(counts.values())
        if product != self.maximum:
            self.found.append(
                catalogue.XML_TOPOLOGY(line=element.line, made=product, maximum=self.maximum)
            )
        return Topology(self.maximum, **counts)

    def _cells(self) -> tuple[NumaCell, ...]:
        cells: list[NumaCell] = []
        taken: dict[int, int] = {}
        elements = list(self.root.all("cpu/numa/cell"))
        for position, element in enumerate(elements):
            text = element.attributes.get("id", str(position))
            number = self._int(element, text, "<cell id>", 0, 1023)
            cpus = self._list(element, "cpus") or ()
            if number is None:
                continue
            if any(cell.id == number for cell in cells):
                self._wrong(element, f"there are two NUMA cells {number}")
            both = [cpu for cpu in cpus if cpu in taken]
            if both:
                others = format_ids(taken[cpu] for cpu in both)
                self._wrong(
                    element, f"vCPU {format_ids(both)} is in NUMA cell {others} and in {number}"
                )
            taken.update(dict.fromkeys(cpus, number))
            self._in_range(element, cpus, f"NUMA cell {number}")
            cells.append(
                NumaCell(
                    number,
                    cpus,
                    self._bytes(element, element.attributes.get("memory")),
                    self._siblings(element, number, len(elements)),
                )
            )
        ids = sorted(cell.id for cell in cells)
        if not self.found and ids != list(range(len(ids))):
            text = f"NUMA cells are {format_ids(ids)}, and must be numbered from 0 without a gap"
            self._wrong(self.root.find("cpu/numa") or self.root, text)
        return tuple(sorted(cells, key=lambda cell: cell.id))

    def _siblings(self, cell: Element, number: int, count: int) -> tuple[tuple[int, int], ...]:
        found: dict[int, int] = {}
        for sibling in cell.all("distances/sibling"):
            other = self._int(sibling, sibling.attributes.get("id"), "<sibling id>", 0, count - 1)
            value = self._int(sibling, sibling.attributes.get("value"), "<sibling value>", 10, 255)
            if other is None or value is None:
                continue
            if other in found:
                self._wrong(sibling, f"there are two distances of NUMA cell {number} to {other}")
            if other == number and value != _TO_ITSELF:
                self._wrong(
                    sibling,
                    f"the distance of NUMA cell {number} to itself is {value}, and must be 10",
                )
            elif other != number and value == _TO_ITSELF and machine_element(self.root) is None:
                # QEMU accepts this distance, so the XML of a guest that we imported may contain it.
                self._wrong(
                    sibling,
                    f"the distance of NUMA cell {number} to {other} is 10, which is that to itself",
                )
            found[other] = value
        return tuple(found.items())

    def _number_in(self, element: Element, what: str) -> int | None:
        return self._int(element, element.text, what, 0, 1023)

    def _memory(self, element: Element | None) -> int | None:
        return self._bytes(element, element.text.lstrip()) if element is not None else None

    def _bytes(self, element: Element, text: str | None) -> int | None:
        """A size in bytes, read with libvirt's units."""
        if not text:
            return None
        text = text.removeprefix("+")
        unit = element.attributes.get("unit", "KiB")
        factor = _UNITS.get(unit.lower())
        if factor is None:
            self._wrong(element, f"<{element.name} unit='{unit[:20]}'> is not a unit")
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            self._wrong(element, f"<{element.name}>: '{text[:40]}' is not a size")
            return None
        return int(text) * factor

    def _cpu(self) -> str | None:
        """`<cpu>` as QEMU's -cpu. For host-model, libvirt would compute a model; we use the host's
        CPU.
        """
        element = self.root.find("cpu")
        if element is None:
            return None
        mode = element.attributes.get("mode", "custom")
        if mode == "custom":
            model = element.find("model")
            name = self._spelled(
                model, element.text_at("model"), _MODEL, "<model> '{}' is not a CPU model"
            )
        else:
            kvm = self.root.attributes.get("type") == "kvm"
            name = "max" if mode == "maximum" or not kvm else "host"
        if name is None:
            return None
        words = [name]
        for feature in element.all("feature"):
            key, policy = (
                feature.attributes.get("name", ""),
                feature.attributes.get("policy", "require"),
            )
            if not _FEATURE.fullmatch(key):
                self._wrong(feature, f"<feature name='{key[:40]}'> is not a CPU feature")
            elif key in _OF_THE_GUEST:
                continue
            elif policy in ("require", "force"):
                words.append(f"{key}=on")
            elif policy in ("disable", "forbid"):
                words.append(f"{key}=off")
        return ",".join(words)

    def _pins(self) -> dict[int, tuple[int, ...]]:
        pins: dict[int, tuple[int, ...]] = {}
        for element in self.root.all("cputune/vcpupin"):
            number = self._int(
                element, element.attributes.get("vcpu"), "<vcpupin vcpu>", 0, MOST_VCPUS
            )
            cpus = self._list(element, "cpuset", required=True)
            if number is None or cpus is None:
                continue
            if number in pins:
                self._wrong(element, f"vCPU {number} is pinned twice")
            pins[number] = cpus
        # libvirt silently drops ids that are out of range.
        return {number: cpus for number, cpus in sorted(pins.items()) if number < self.maximum}

    def _schedulers(self) -> dict[int, str]:
        schedulers: dict[int, str] = {}
        for element in self.root.all("cputune/vcpusched"):
            ids = self._list(element, "vcpus", required=True) or ()
            name = self._word(element, "scheduler", _SCHEDULERS)
            priority = element.attributes.get("priority")
            if name is None:
                continue
            if name in _WITH_PRIORITY:
                # Like libvirt, accept a priority that the scheduler cannot have. It is refused when
                # it is set.
                level = self._int(element, priority, "<vcpusched priority>", 0, 99)
                name = f"{name}:{level}"
            twice = [number for number in ids if number in schedulers]
            if twice:
                self._wrong(element, f"vCPU {format_ids(twice)} has two schedulers")
            self._in_range(element, ids, "<vcpusched>")
            schedulers.update(dict.fromkeys(ids, name))
        return {
            number: name for number, name in sorted(schedulers.items()) if number < self.maximum
        }

    def _emulator_pin(self) -> tuple[int, ...] | None:
        for other in list(self.root.all("cputune/emulatorpin"))[1:]:
            self._wrong(other, "there are two <emulatorpin>")
        return self._list(self.root.find("cputune/emulatorpin"), "cpuset", required=True)

    def _period(self) -> int | None:
        """`<period>`. For libvirt, 0 means that it is not set."""
        return (
            None
            if self.root.text_at("cputune/period") == "0"
            else self._tuned("period", 1000, 1_000_000)
        )

    def _quota(self) -> int | None:
        """`<quota>`. For libvirt, a negative number means no limit, and 0 means that it is not
        set.
        """
        element, text = self.root.find("cputune/quota"), self.root.text_at("cputune/quota")
        if element is None or text == "0":
            return None
        if text.startswith("-") and text[1:].isascii() and text[1:].isdigit():
            return -1
        if text.isascii() and text.isdigit() and 1000 <= int(text[:20]) <= _MOST_QUOTA:
            return int(text)
        self._wrong(
            element,
            f"<quota> '{text[:40]}' is not a quota: it must be 1000 to {_MOST_QUOTA}, or negative",
        )
        return None

    def _cell_mems(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        for element in self.root.all("numatune/memnode"):
            cell = self._int(
                element, element.attributes.get("cellid"), "<memnode cellid>", 0, MOST_VCPUS
            )
            nodes = self._nodes(element, required=True)
            if cell is None:
                continue
            if cell in found:
                self._wrong(element, f"NUMA cell {cell} has two <memnode>")
            if nodes is not None:
                found[cell] = nodes
        return found

    def _nodes(self, element: Element | None, *, required: bool = False) -> tuple[int, ...] | None:
        """Host NUMA nodes, if the mode binds to them. With any other mode they are only a
        preference.
        """
        nodes = self._list(element, "nodeset", required=required)
        has_mode = element is not None and "mode" in element.attributes
        if element is not None and has_mode and self._word(element, "mode", _MODES) not in _BINDING:
            return None
        return nodes

    def _agent(self) -> str | None:
        for channel in self.root.all("devices/channel"):
            if channel.value("target", "name") == AGENT_PORT:
                return channel.value("source", "path")
        return None

    # -- values ---------------------------------------------------------------------------------

    def _spelled(
        self, element: Element | None, text: str | None, pattern: re.Pattern[str], wrong: str
    ) -> str | None:
        """The text, or None if there is none. `wrong` is the message if the pattern does not match
        it.
        """
        if element is not None and text and not pattern.fullmatch(text):
            self._wrong(element, wrong.format(text[:40]))
        return text or None

    def _tuned(self, name: str, low: int, high: int) -> int | None:
        """The number in an element of `<cputune>`; None if there is no such element."""
        element = self.root.find(f"cputune/{name}")
        return (
            self._int(element, element.text, f"<{name}>", low, high)
            if element is not None
            else None
        )

    def _optional(self, element: Element | None, key: str, low: int, high: int) -> int | None:
        """The number in an attribute; None if the attribute is missing."""
        if element is None or key not in element.attributes:
            return None
        return self._int(element, element.attributes[key], f"<{element.name} {key}>", low, high)

    def _int(
        self, element: Element, text: str | None, what: str, low: int, high: int
    ) -> int | None:
        if text is None:
            self._wrong(element, f"{what} is missing")
            return None
        # libvirt skips white space before a number (strtoul), and accepts none after it.
        text = text.lstrip()
        digits = text.removeprefix("+")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
            self._wrong(element, f"{what} '{text[:40]}' is not a number")
            return None
        if not low <= int(text) <= high:
            self._wrong(element, f"{what} {text} is out of range: it must be {low} to {high}")
            return None
        return int(text)

    def _word(self, element: Element, key: str, words: Sequence[str]) -> str | None:
        text = element.attributes.get(key)
        if text in words:
            return text
        wanted = " or ".join(f"'{word}'" for word in words)
        self._wrong(element, f"<{element.name} {key}> must be {wanted}")
        return None

    def _list(
        self, element: Element | None, key: str, *, required: bool = False
    ) -> tuple[int, ...] | None:
        text = element.attributes.get(key) if element is not None else None
        if element is None or text is None:
            if element is not None and required:
                self._wrong(element, f"<{element.name} {key}> is missing")
            return None
        ids = parse_bitmap(text)
        if ids is None:
            noun = _NOUNS.get(key, "vCPU ids")
            self._wrong(element, f"<{element.name} {key}>: '{text[:40]}' is not a list of {noun}")
        return ids

    def _in_range(self, element: Element, ids: Iterable[int], what: str) -> None:
        out = [number for number in ids if number >= self.maximum]
        if out:
            self._wrong(
                element, f"{what} has vCPU {format_ids(out)}, and ids end at {self.maximum - 1}"
            )

    def _wrong(self, element: Element, what: str) -> None:
        self.found.append(catalogue.XML(line=element.line, what=what))


_PART: Final = re.compile(r"\s*(?:(\^)([0-9]{1,7})|([0-9]{1,7})(?:\s*-\s*([0-9]{1,7}))?)\s*")


def parse_bitmap(text: str) -> tuple[int, ...] | None:
    """Read a list of numbers like libvirt's virBitmapParse. Returns None if it is not a list.

    The parts are read from left to right, `^` removes the number after it, and a comma at the end
    is allowed.
    """
    found: set[int] = set()
    parts = text.split(",")
    if len(parts) > 1 and not parts[-1].strip():
        parts.pop()
    for part in parts:
        match = _PART.fullmatch(part)
        if match is None or not text.isascii():
            return None
        if match[1]:
            found.discard(int(match[2]))
            continue
        first, last = int(match[3]), int(match[4] or match[3])
        if last < first or last >= _MOST_IN_LIST:
            return None
        found.update(range(first, last + 1))
    # libvirt also rejects a list that is empty in the end.
    return tuple(sorted(found)) or None


def read_listed(data: bytes, maximum: int) -> tuple[tuple[VcpuConfig, ...], bool]:
    """Read `<vcpus>` of a document: the state of every vCPU, and whether it also has order and
    hotpluggable.

    Args:
        data: a domain's XML, or `<vcpus>` alone.
        maximum: the number of vCPUs if the document is `<vcpus>` alone.

    Raises:
        VcpuRefused: it contradicts itself; every reason, each with its line.
    """
    document = parse_document(data)
    if document.root.name != "vcpus":
        _, definition = read_domain(data)
        return definition.vcpus, definition.dialect == "libvirt"
    reader = _Reader(document.root)
    vcpus, dialect = reader.listed(maximum)
    if reader.found:
        raise VcpuRefused(reader.found)
    return vcpus, dialect == "libvirt"


def renamed(data: bytes, name: str) -> bytes:
    """The same domain with another name."""
    document, definition = read_domain(data)
    element = document.root.find("name")
    assert element is not None
    if definition.name != name:
        document.set_text(element, name)
    return document.to_bytes()
