"""Properties of a QEMU for which libvirt's domain XML has no element. They are in `<metadata>`:
`core.definition.QemuOptions`, and the ids of memory devices.

    <qmpvcpu:machine xmlns:qmpvcpu='urn:qmpvcpu:machine:1'>
      <qmpvcpu:option of='machine' name='cap-cfpc' value='broken'/>
      <qmpvcpu:memory id='m0' cell='0' type='memory-backend-ram'>
        <qmpvcpu:option name='share' value='on'/>
      </qmpvcpu:memory>
    </qmpvcpu:machine>
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final
from xml.sax.saxutils import quoteattr

from qmpvcpu.core.definition import Definition, Dimm, MemoryBackend, Pairs, QemuOptions
from qmpvcpu.core.machine.devices import Devices
from qmpvcpu.xml.source import Element, namesake

NAMESPACE: Final = "urn:qmpvcpu:machine:1"
_OWNERS: Final = ("machine", "accel", "cpu")
_KEY: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")
_ID: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9._-]{0,127}")
_DRIVER: Final = re.compile(r"memory-backend-[a-z0-9-]{1,40}")
#: Options that make a machine read or write files.
_WITH_FILES: Final = frozenset(
    {"dumpdtb", "dtb", "kernel", "initrd", "append", "firmware", "shm-path"}
)
_DIMM: Final = "dimm"
#: PATH_MAX of Linux, in bytes.
_LONGEST: Final = 4096

#: A function that is called with an element and with the text that says what is wrong with it.
Wrong = Callable[[Element, str], None]


def machine_element(root: Element) -> tuple[Element, str] | None:
    """Our element in a domain's metadata, and its prefix with the colon; None if there is none."""
    metadata = root.find("metadata")
    for element in metadata.children if metadata is not None else ():
        prefix = namesake(root, element, "machine", NAMESPACE)
        if prefix is not None:
            return element, prefix
    return None


def read_options(root: Element, wrong: Wrong) -> QemuOptions:
    """Read the options from our metadata in a domain."""
    found = machine_element(root)
    if found is None:
        return QemuOptions()
    element, prefix = found
    by_owner: dict[str, list[tuple[str, str]]] = {owner: [] for owner in _OWNERS}
    for option in element.all(f"{prefix}option"):
        owner = option.attributes.get("of", "")
        if owner not in by_owner:
            wrong(option, f"<option of='{owner[:40]}'> is not one of {', '.join(_OWNERS)}")
        elif (pair := _pair(option, wrong)) is not None:
            by_owner[owner].append(pair)
    backends = [_backend(memory, prefix, wrong) for memory in element.all(f"{prefix}memory")]
    return QemuOptions(
        tuple(by_owner["machine"]),
        tuple(by_owner["accel"]),
        tuple(by_owner["cpu"]),
        backends=tuple(backend for backend in backends if backend is not None),
        is_one_block=element.attributes.get("blocks") == "one",
        is_exact=element.attributes.get("sizes") == "exact",
    )


def _pair(option: Element, wrong: Wrong) -> tuple[str, str] | None:
    key, value = option.attributes.get("name", ""), option.attributes.get("value", "")
    if not _KEY.fullmatch(key) or key in _WITH_FILES:
        wrong(option, f"<option name='{key[:40]}'> is not an option that QEMU may get")
        return None
    # A value of an -object option may contain commas, since it may be a path.
    if (
        len(value) > _LONGEST
        or not value.isprintable()
        or ("," in value and "of" in option.attributes)
    ):
        wrong(option, f"<option name='{key}'> has an invalid value")
        return None
    return key, value


def _backend(memory: Element, prefix: str, wrong: Wrong) -> MemoryBackend | None:
    name, driver = (
        memory.attributes.get("id", ""),
        memory.attributes.get("type", "memory-backend-ram"),
    )
    cell = memory.attributes.get("cell")
    is_number = cell is None or (cell.isascii() and cell.isdigit() and len(cell) < 5)
    if not _ID.fullmatch(name) or not _DRIVER.fullmatch(driver) or not is_number:
        wrong(memory, f"<memory id='{name[:40]}'> is not a memory backend of QEMU")
        return None
    return MemoryBackend(
        name, None if cell is None else int(cell), driver, _options(memory, prefix, wrong)
    )


def _options(parent: Element, prefix: str, wrong: Wrong) -> Pairs:
    pairs = (_pair(option, wrong) for option in parent.all(f"{prefix}option"))
    return tuple(pair for pair in pairs if pair is not None)


def option_lines(definition: Definition, devices: Devices | None) -> list[str]:
    """`<metadata>` as lines; an empty list if it would be empty.

    If `devices` is given, the metadata says that `<qemu:commandline>` contains all devices.
    """
    options = definition.options
    lines = [
        f"      <qmpvcpu:option of='{owner}' {_written(pair)}/>"
        for owner in _OWNERS
        for pair in getattr(options, owner)
    ]
    for backend in options.backends:
        cell = f" cell='{backend.cell}'" if backend.cell is not None else ""
        lines += _memory_lines(
            "memory", f"id={quoteattr(backend.id)}{cell}", backend.driver, backend.options
        )
    for number, dimm in enumerate(definition.dimms):
        if dimm.memdev is not None:
            name = f" id={quoteattr(dimm.id)}" if dimm.id is not None else ""
            ids = f"of='{number}'{name} memdev={quoteattr(dimm.memdev)}"
            lines += _memory_lines(_DIMM, ids, dimm.driver, dimm.options)
    words = " blocks='one'" if options.is_one_block else ""
    words += " sizes='exact'" if options.is_exact else ""
    if devices is not None:
        defaults, serial = (
            "yes" if has else "no" for has in (devices.has_defaults, devices.has_serial)
        )
        words += f" devices='commandline' defaults='{defaults}' serial='{serial}'"
    if not lines and not words:
        return []
    return [
        "  <metadata>",
        f"    <qmpvcpu:machine xmlns:qmpvcpu='{NAMESPACE}'{words}>",
        *lines,
        "    </qmpvcpu:machine>",
        "  </metadata>",
    ]


def _written(pair: tuple[str, str]) -> str:
    return f"name={quoteattr(pair[0])} value={quoteattr(pair[1])}"


def _memory_lines(
    name: str, ids: str, driver: str, options: Iterable[tuple[str, str]]
) -> list[str]:
    inner = [f"        <qmpvcpu:option {_written(pair)}/>" for pair in options]
    head = f"      <qmpvcpu:{name} {ids} type={quoteattr(driver)}"
    return [f"{head}>", *inner, f"      </qmpvcpu:{name}>"] if inner else [f"{head}/>"]


# -- memory devices --------------------------------------------------------------------------------


def read_dimms(
    root: Element,
    number: Callable[[Element, str], int | None],
    size: Callable[[Element], int | None],
    wrong: Wrong,
) -> tuple[Dimm, ...]:
    """Read `<memory model='dimm'>`, and the ids that our metadata has for these devices.

    Args:
        root: the domain's root element.
        number: reads the text of an element as a number; the second argument is its name in errors.
        size: reads an element with a unit; returns bytes.
        wrong: called for each error.
    """
    ids = _dimm_ids(root, wrong)
    found: list[Dimm] = []
    for element in root.all("devices/memory"):
        if element.attributes.get("model") != _DIMM:
            continue
        length, node = element.find("target/size"), element.find("target/node")
        if length is None:
            wrong(element, "<memory model='dimm'> needs <target><size>")
            continue
        found.append(
            replace(
                ids.get(len(found), Dimm(0)),
                size=size(length) or 0,
                node=number(node, "<node>") if node is not None else None,
                slot=_integer(element.value("address", "slot")),
                address=_integer(element.value("address", "base")),
            )
        )
    return tuple(found)


def _dimm_ids(root: Element, wrong: Wrong) -> dict[int, Dimm]:
    ours = machine_element(root)
    found: dict[int, Dimm] = {}
    for element in ours[0].all(f"{ours[1]}{_DIMM}") if ours is not None else ():
        rank, name = element.attributes.get("of", ""), element.attributes.get("id")
        memdev, driver = (element.attributes.get(key, "") for key in ("memdev", "type"))
        ok = rank.isascii() and rank.isdigit() and len(rank) < 5 and _DRIVER.fullmatch(driver)
        if (
            not ok
            or not _ID.fullmatch(memdev if name is None else name)
            or not _ID.fullmatch(memdev)
        ):
            wrong(element, f"<dimm of='{rank[:40]}'> is not a memory device of QEMU")
            continue
        assert ours is not None
        options = _options(element, ours[1], wrong)
        found[int(rank)] = Dimm(0, id=name, memdev=memdev, driver=driver, options=options)
    return found


def _integer(text: str | None) -> int | None:
    if text is None or not re.fullmatch(r"[0-9]{1,19}|0[xX][0-9a-fA-F]{1,16}", text):
        return None
    return int(text, 16 if text[:2].lower() == "0x" else 10)


def sized(size: int) -> tuple[int, str]:
    """A size as a number and its unit. It is never rounded, because QEMU is started with what is
    written.
    """
    return (size // 1024, "KiB") if size % 1024 == 0 else (size, "b")


def dimm_lines(dimms: Iterable[Dimm]) -> list[str]:
    """The memory devices as lines of `<devices>`."""
    lines = []
    for dimm in dimms:
        size, unit = sized(dimm.size)
        node = f"<node>{dimm.node}</node>" if dimm.node is not None else ""
        lines += [
            "    <memory model='dimm'>",
            f"      <target><size unit='{unit}'>{size}</size>{node}</target>",
        ]
        if dimm.slot is not None:
            base = f" base='{dimm.address:#x}'" if dimm.address is not None else ""
            lines.append(f"      <address type='dimm' slot='{dimm.slot}'{base}/>")
        lines.append("    </memory>")
    return lines
