"""The migration cookie: libvirt's `<qemu-migration>`, with the running guest's XML and its machine.

libvirt sends the running guest's XML next to its cookie; our cookie contains it in `<live>`. The
guest's definition is where libvirt has it, as a child of the root. `<slots>`, `<handover>`,
`<pending>` and `<picture>` are our own: older readers ignore elements that they do not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Final, get_args, get_origin, get_type_hints
from xml.sax.saxutils import escape

from qmpvcpu.core.definition import MOST_VCPUS
from qmpvcpu.core.machine.comparison import Picture
from qmpvcpu.core.migration.cookie import Cookie, Machine, Slot
from qmpvcpu.core.model import Props, QemuVersion, format_ids
from qmpvcpu.core.request import parse_ids
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import Refusal, VcpuRefused, VcpuUsageError
from qmpvcpu.xml.document import read_domain
from qmpvcpu.xml.source import Document, Element, parse_document

_NUMBER: Final = re.compile(r"[0-9a-f]{32}\Z")
_WORD: Final = re.compile(r"[A-Za-z0-9_.,=+/-]{1,200}\Z")
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,100}\Z")
_PROP: Final = re.compile(r"[a-z][a-z0-9-]{0,30}\Z")


def write_cookie(cookie: Cookie) -> bytes:
    """Write a cookie as XML."""
    lines = ["<qemu-migration>", f"  <name>{escape(cookie.name)}</name>"]
    if cookie.uuid is not None:
        lines.append(f"  <uuid>{escape(cookie.uuid)}</uuid>")
    if cookie.number is not None:
        lines.append(f"  <handover id={_quoted(cookie.number)}/>")
    if cookie.pending:
        lines.append(f"  <pending vcpus='{format_ids(cookie.pending)}'/>")
    lines += [f"  <feature name={_quoted(name)}/>" for name in sorted(cookie.features)]
    lines += _machine_lines(cookie.machine) if cookie.machine is not None else []
    state = "running" if cookie.runs else "paused"
    described = " described='yes'" if cookie.is_described else ""
    text = "\n".join([*lines, f"  <live state='{state}'{described}>", ""]).encode()
    text += _element_of(cookie.xml) + b"\n  </live>\n"
    if cookie.persistent is not None:
        text += _element_of(cookie.persistent) + b"\n"
    if cookie.picture is not None:
        text += b"  <picture>" + escape(_picture_text(cookie.picture)).encode() + b"</picture>\n"
    return text + b"</qemu-migration>\n"


def _picture_text(picture: Picture) -> str:
    """The picture as JSON. A mapping becomes a list of pairs, since some of its keys are not
    strings.
    """

    def plain(value: object) -> object:
        if isinstance(value, QemuVersion):
            return [value.major, value.minor, value.micro]
        return sorted(value.items()) if isinstance(value, Mapping) else value

    return json.dumps({one.name: plain(getattr(picture, one.name)) for one in fields(picture)})


def _element_of(data: bytes) -> bytes:
    """The root element of a document, without what surrounds it."""
    document = parse_document(data)
    return _source(document, document.root)


def _source(document: Document, element: Element) -> bytes:
    return document.source[element.start : element.end]


def _machine_lines(machine: Machine) -> list[str]:
    head = (
        f"arch={_quoted(machine.arch)} machine={_quoted(machine.type)} maximum='{machine.maxcpus}'"
    )
    lines = [f"  <slots {head} topology={_quoted(machine.topology)}>"]
    for slot in machine.slots:
        order = f" order='{slot.order}'" if slot.order is not None else ""
        plugged = "yes" if slot.plugged else "no"
        lines.append(
            f"    <slot vcpus='{format_ids(slot.ids)}' driver={_quoted(slot.driver)}"
            f" plugged='{plugged}'{order}>"
        )
        lines += [
            f"      <prop name='{key}' value={_quoted(str(value))}/>"
            for key, value in slot.props.items()
        ]
        lines.append("    </slot>")
    return [*lines, "  </slots>"]


def _quoted(text: str) -> str:
    return "'" + escape(text, {"'": "&apos;", "\n": "&#10;"}) + "'"


def read_cookie(data: bytes) -> Cookie:
    """Read a cookie.

    Raises:
        VcpuRefused: it is not a cookie, or it contradicts itself; every reason, with its line.
    """
    document = parse_document(data)
    root = document.root
    if root.name != "qemu-migration":
        raise VcpuRefused([_wrong(root, f"<{root.name}> is not a <qemu-migration>")])
    found: list[Refusal] = []
    name, running = root.find("name"), root.find("live/domain")
    inactive = list(root.all("domain"))
    if not root.text_at("name"):
        found.append(_wrong(root, "<name> is missing"))
    if running is None:
        found.append(_wrong(root, "the running guest's XML, <live><domain>, is missing"))
    if len(inactive) > 1:
        found.append(_wrong(inactive[1], "there are two <domain>"))
    features = frozenset(one.attributes.get("name", "") for one in root.all("feature"))
    slots = root.find("slots")
    machine = _machine(slots, found) if slots is not None else None
    if found or running is None or name is None:
        raise VcpuRefused(found)
    uuid, number = root.find("uuid"), root.value("handover", "id") or ""
    cookie = Cookie(
        name.text,
        uuid.text.strip() if uuid is not None else None,
        _source(document, running),
        _source(document, inactive[0]) if inactive else None,
        features,
        machine,
        root.value("live", "state") != "paused",
        root.value("live", "described") == "yes",
        number if _NUMBER.match(number) else None,
        _pending(root.find("pending"), found),
        _picture(root.find("picture"), found),
    )
    if found:
        raise VcpuRefused(found)
    for xml in (cookie.xml, cookie.persistent):
        if xml is not None:
            read_domain(xml)
    return cookie


def _pending(element: Element | None, found: list[Refusal]) -> tuple[int, ...]:
    if element is None:
        return ()
    try:
        ids = parse_ids(element.attributes.get("vcpus", ""))
    except VcpuUsageError as error:
        found.append(_wrong(element, f"<pending vcpus>: {error.message}"))
        return ()
    return ids


def _picture(element: Element | None, found: list[Refusal]) -> Picture | None:
    """Read the picture. Returns None if another version of ours has written it, with other
    fields.
    """
    if element is None:
        return None
    try:
        data = json.loads(element.text)
        hints = get_type_hints(Picture)
        if not isinstance(data, dict) or data.keys() != hints.keys():
            return None
        return Picture(**{name: _decoded(data[name], hint) for name, hint in hints.items()})
    except (ValueError, TypeError, RecursionError):
        found.append(_wrong(element, "<picture> is not what `save` or migrate-begin writes"))
        return None


def _decoded(data: Any, hint: Any) -> Any:
    """Convert a JSON value to the type that it has in a picture. Raises ValueError, TypeError."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is UnionType:
        return None if data is None else _decoded(data, inner[0])
    if kind is Mapping:
        return {_decoded(key, inner[0]): _decoded(value, inner[1]) for key, value in data}
    if kind is tuple:
        return tuple(_decoded(one, inner[0]) for one in data)
    if hint is QemuVersion:
        major, minor, micro = (_decoded(one, int) for one in data)
        return QemuVersion(major, minor, micro)
    if type(data) not in ((bool, int, str) if hint is object else (hint,)):
        raise TypeError(f"{type(data).__name__} is not {hint}")
    return data


def _machine(element: Element, found: list[Refusal]) -> Machine | None:
    known = len(found)
    maximum = _number(element, "maximum", MOST_VCPUS, found)
    words = {key: element.attributes.get(key, "") for key in ("arch", "machine", "topology")}
    wrong = [key for key in ("arch", "machine") if not _NAME.match(words[key])]
    found += [_wrong(element, f"<slots {key}> is missing or invalid") for key in wrong]
    slots = [slot for one in element.all("slot") if (slot := _slot(one, found)) is not None]
    ids = [number for slot in slots for number in slot.ids]
    if maximum is not None and sorted(ids) != list(range(maximum)):
        found.append(
            _wrong(
                element, f"<slots> names vCPU {format_ids(ids)}, and the ids are 0 to {maximum - 1}"
            )
        )
    if len(found) > known or maximum is None:
        return None
    return Machine(words["arch"], words["machine"], maximum, words["topology"], tuple(slots))


def _slot(element: Element, found: list[Refusal]) -> Slot | None:
    driver = element.attributes.get("driver", "")
    order = _number(element, "order", MOST_VCPUS, found) if "order" in element.attributes else None
    props: dict[str, int | str] = {}
    for one in element.all("prop"):
        key, value = one.attributes.get("name", ""), one.attributes.get("value", "")
        if not _PROP.match(key) or not _WORD.match(value):
            found.append(_wrong(one, f"<prop name='{key[:40]}'> is not a CPU property"))
        else:
            # Since QEMU 9.2, integer properties must be given as integers.
            props[key] = (
                int(value) if value.isascii() and value.isdigit() and len(value) < 10 else value
            )
    try:
        ids = parse_ids(element.attributes.get("vcpus", ""))
    except VcpuUsageError as error:
        found.append(_wrong(element, f"<slot vcpus>: {error.message}"))
        return None
    if (driver and not _WORD.match(driver)) or ids[-1] >= MOST_VCPUS:
        found.append(_wrong(element, "<slot> needs vcpus and driver"))
        return None
    return Slot(ids, driver, Props(props), element.attributes.get("plugged") == "yes", order)


def _number(element: Element, key: str, most: int, found: list[Refusal]) -> int | None:
    text = element.attributes.get(key, "")
    if text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most:
        return int(text)
    found.append(
        _wrong(element, f"<{element.name} {key}='{text[:40]}'> is not a number from 1 to {most}")
    )
    return None


def _wrong(element: Element, what: str) -> Refusal:
    return catalogue.COOKIE(line=element.line, what=what)
