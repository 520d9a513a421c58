"""Domain XML: the bytes of a document in, what it says out; a change in, the bytes of the changed
document out.

All of it raises `qmpvcpu.VcpuRefused` for a document that it does not take: each reason with its
line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from lxml import etree

from qmpvcpu.app.libvirt_schema import against_libvirts_schema, errors_against
from qmpvcpu.core import definition as core
from qmpvcpu.xml.document import read_domain, read_listed
from qmpvcpu.xml.source import Element, parse_document
from qmpvcpu.xml.vcpus import write_vcpus


@dataclass(frozen=True)
class Row:
    """One vCPU at the next boot."""

    id: int
    enabled: bool
    hotpluggable: bool
    order: int | None = None


@dataclass(frozen=True)
class Cell:
    """One `<numa><cell>`; `memory` is in bytes."""

    id: int
    cpus: tuple[int, ...]
    memory: int | None


@dataclass(frozen=True)
class Said:
    """What a domain's XML says. `dialect` is that of its `<vcpus>`; `topology` are the counts of
    `<topology>`.
    """

    name: str
    arch: str | None
    machine: str | None
    dialect: str | None
    rows: tuple[Row, ...]
    topology: Mapping[str, int] = field(default_factory=dict)
    cells: tuple[Cell, ...] = ()
    cpuset: tuple[int, ...] | None = None
    pins: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    emulator_pin: tuple[int, ...] | None = None
    schedulers: Mapping[int, str] = field(default_factory=dict)
    agent: str | None = None
    emulator: str | None = None

    @property
    def enabled_ids(self) -> tuple[int, ...]:
        return tuple(row.id for row in self.rows if row.enabled)


def read(data: bytes, *, running: bool = False) -> Said:
    """What a document says; `running` is that it describes a running guest, not the next boot."""
    _, found = read_domain(data, running=running)
    topology = found.topology
    return Said(
        found.name,
        found.arch,
        found.machine,
        found.dialect,
        tuple(Row(vcpu.id, vcpu.enabled, vcpu.hotpluggable, vcpu.order) for vcpu in found.vcpus),
        {}
        if topology is None
        else {level: getattr(topology, level) for level in ("sockets", "cores", "threads")},
        tuple(Cell(cell.id, cell.cpus, cell.memory) for cell in found.cells),
        found.cpuset,
        dict(found.pins),
        found.emulator_pin,
        dict(found.schedulers),
        found.agent,
        found.emulator,
    )


def enabled_in_list(data: bytes, maximum: int) -> tuple[int, ...]:
    """The ids that a document enables which may be `<vcpus>` alone."""
    return tuple(vcpu.id for vcpu in read_listed(data, maximum)[0] if vcpu.enabled)


def switched(
    data: bytes,
    *,
    enable: Iterable[int] = (),
    disable: Iterable[int] = (),
    dialect: str | None = None,
) -> bytes:
    """The document with these vCPUs enabled and disabled; with `dialect`, its `<vcpus>` is written
    in that.
    """
    document, old = read_domain(data)
    new = old
    for ids, enabled in ((tuple(enable), True), (tuple(disable), False)):
        new = new.switched(ids, enabled) if ids else new
    return write_vcpus(document, old, new, dialect)


def resized(data: bytes, maximum: int) -> bytes:
    """The document with that many vCPUs, whatever `<topology>` says; new ones are disabled."""
    document, old = read_domain(data)
    more = (
        core.VcpuConfig(n, enabled=False, hotpluggable=True) for n in range(old.maxcpus, maximum)
    )
    return write_vcpus(
        document, old, replace(old, topology=None, vcpus=(*old.vcpus[:maximum], *more))
    )


def schema_errors(data: bytes) -> list[str]:
    """What the shipped schema of `<vcpus>` has against the document."""
    listed = etree.fromstring(data).find("vcpus")
    schema = etree.RelaxNG(etree.parse(resources.files("qmpvcpu.xml") / "vcpus.rng"))
    found = [] if listed is None else errors_against(schema, listed)
    return [f"line {line}: <vcpus>: {text}" for line, text in found]


def errors_in_libvirts_schema(data: bytes) -> list[str] | None:
    """What libvirt's own schema has against a domain; None where that is not installed."""
    return against_libvirts_schema(data)


@dataclass(frozen=True)
class Node:
    """An element of any document, as it stands there: prefixes are kept."""

    name: str
    attributes: Mapping[str, str]
    text: str
    line: int


class Editor:
    """Any XML document, and edits of it. An element is named by its path below the root (`"a/b"`;
    `""` is the root), or by its number in the order of the start tags.
    """

    def __init__(self, data: bytes) -> None:
        self._document = parse_document(data)

    def nodes(self) -> list[Node]:
        """Every element, in the order of the start tags."""
        return [_node(element) for element in self._elements()]

    def children(self, path: str = "") -> list[str]:
        return [child.name for child in self._find(path).children]

    def node(self, path: str) -> Node | None:
        found = self._document.root.find(path)
        return None if found is None else _node(found)

    def set_attribute(self, where: str | int, name: str, value: str | None) -> None:
        self._document.set_attribute(self._find(where), name, value)

    def set_text(self, where: str | int, text: str) -> None:
        self._document.set_text(self._find(where), text)

    def insert_after(self, where: str | int, *lines: str) -> None:
        self._document.insert_after(self._find(where), lines)

    def replace(self, where: str | int, *lines: str) -> None:
        self._document.replace(self._find(where), lines)

    def to_bytes(self) -> bytes:
        return self._document.to_bytes()

    def _find(self, where: str | int) -> Element:
        root = self._document.root
        found = (
            self._elements()[where]
            if isinstance(where, int)
            else root.find(where)
            if where
            else root
        )
        assert found is not None, f"there is no <{where}>"
        return found

    def _elements(self) -> list[Element]:
        def walk(element: Element) -> Iterator[Element]:
            yield element
            for child in element.children:
                yield from walk(child)

        return list(walk(self._document.root))


def edited(data: bytes, *edits: tuple[Any, ...]) -> bytes:
    """The document after edits, each the name of a method of `Editor` and its arguments."""
    editor = Editor(data)
    for method, *arguments in edits:
        getattr(editor, method)(*arguments)
    return editor.to_bytes()


def first_enabled(maximum: int, enabled: Collection[int]) -> tuple[Row, ...]:
    """Rows as they are without `<vcpus>`: these ids are enabled and stay, the others can be
    plugged.
    """
    return tuple(Row(n, n in enabled, n not in enabled) for n in range(maximum))


def _node(element: Element) -> Node:
    return Node(element.name, dict(element.attributes), element.text, element.line)
