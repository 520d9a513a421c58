"""Write vCPUs into a domain's XML: `<vcpu>`, `<vcpus>` and `<vcpupin>`. No other byte changes.

The names are libvirt's (formatdomain). `<vcpus>` is written in libvirt's dialect or in the RFC's.
"""

from __future__ import annotations

from collections.abc import Mapping

from qmpvcpu.core.definition import (
    Definition,
    VcpuConfig,
    default_vcpus,
)
from qmpvcpu.core.model import format_ids
from qmpvcpu.xml.document import parse_bitmap
from qmpvcpu.xml.source import Document, Element

#: Further attributes by vCPU id; the value of an unknown one is None.
Details = Mapping[int, Mapping[str, str | None]]


def write_vcpus(
    document: Document,
    old: Definition,
    new: Definition,
    dialect: str | None = None,
    details: Details | None = None,
) -> bytes:
    """The document with the vCPUs of `new`. No byte changes for vCPUs that are the same in `old`.

    Args:
        document: the document that `old` was read from.
        old: its definition.
        new: the definition to write.
        dialect: "rfc" or "libvirt": rewrite `<vcpus>` in this dialect. None: use the document's
            dialect, else libvirt's.
        details: further attributes by vCPU id, in the RFC's dialect.
    """
    wanted = dialect or old.dialect or "libvirt"
    is_plain = dialect is None and new.vcpus == default_vcpus(new.maxcpus, len(new.enabled_ids))
    lines = [] if is_plain else vcpus_lines(new, wanted, details)
    listed = document.root.find("vcpus")
    _write_count(document, new, lines)
    if listed is not None and (dialect is not None or (lines and listed.find("vcpu") is None)):
        document.replace(listed, lines)
    elif listed is not None and listed.find("vcpu") is not None and new.vcpus != old.vcpus:
        _update(document, listed, old, new, wanted)
    if new.maxcpus != old.maxcpus:
        # A row for an id that does not exist has no effect now, but would have one if the maximum
        # grew.
        _trim_tuning(document, min(old.maxcpus, new.maxcpus))
    elif new.pins != old.pins:
        _update_pins(document, old, new)
    return document.to_bytes()


def _write_count(document: Document, new: Definition, lines: list[str]) -> None:
    """Write `<vcpu>`. If there is no `<vcpus>`, add these lines of it after `<vcpu>`."""
    vcpu, enabled = document.root.find("vcpu"), len(new.enabled_ids)
    behind = lines if document.root.find("vcpus") is None else []
    if vcpu is not None:
        document.set_text(vcpu, str(new.maxcpus))
        if "current" in vcpu.attributes or enabled != new.maxcpus:
            document.set_attribute(vcpu, "current", str(enabled))
        if behind:
            document.insert_after(vcpu, behind)
    elif new.maxcpus > 1 or lines:
        # Without `<vcpu>`, libvirt assumes one vCPU.
        name = document.root.find("name")
        assert name is not None
        current = f" current='{enabled}'" if enabled != new.maxcpus else ""
        document.insert_after(name, [f"<vcpu{current}>{new.maxcpus}</vcpu>", *behind])


def _trim_tuning(document: Document, maximum: int) -> None:
    """Remove vCPUs that do not exist any more from `<cputune>`: libvirt refuses schedulers for
    them.
    """
    tune = document.root.find("cputune")
    for row in tune.children if tune is not None else ():
        key = {"vcpupin": "vcpu", "vcpusched": "vcpus"}.get(row.name)
        if key is None:
            continue
        ids = parse_bitmap(row.attributes[key]) or ()
        left = [number for number in ids if number < maximum]
        if not left:
            document.remove(row)
        elif len(left) < len(ids):
            document.set_attribute(row, key, format_ids(left))


def _update_pins(document: Document, old: Definition, new: Definition) -> None:
    """Update each `<vcpupin>`. A `<cputune>` that becomes empty stays."""
    root = document.root
    tune = root.find("cputune")
    rows = {int(row.attributes["vcpu"]): row for row in root.all("cputune/vcpupin")}
    added = []
    for number in sorted({*old.pins, *new.pins}):
        cpus = new.pins.get(number)
        if cpus == old.pins.get(number):
            continue
        if cpus is None:
            document.remove(rows[number])
        elif number in rows:
            document.set_attribute(rows[number], "cpuset", format_ids(cpus))
        else:
            added.append(f"<vcpupin vcpu='{number}' cpuset='{format_ids(cpus)}'/>")
    if not added:
        return
    if tune is not None and rows:
        document.insert_after(rows[max(rows)], added)
    elif tune is not None:
        document.insert_first(tune, added)
    else:
        behind = next(
            found for word in ("vcpus", "vcpu", "name") if (found := root.find(word)) is not None
        )
        document.insert_after(behind, ["<cputune>", *(f"  {line}" for line in added), "</cputune>"])


def _update(
    document: Document, listed: Element, old: Definition, new: Definition, dialect: str
) -> None:
    """Update `<vcpus>` row by row. A disabled vCPU without a row gets one only if every vCPU had a
    row.
    """
    rows = {int(row.attributes["id"]): row for row in listed.all("vcpu")}
    is_complete = len(rows) == old.maxcpus
    for number, row in rows.items():
        if number >= new.maxcpus:
            document.remove(row)
        elif new.vcpus[number] != old.vcpus[number]:
            for key, value in _attributes(new.vcpus[number], dialect).items():
                document.set_attribute(row, key, value)
    added: dict[int, list[str]] = {}
    for config in new.vcpus:
        if config.id not in rows and (config.enabled or is_complete):
            # vCPU 0 always has a row, so there is one with a lower id.
            behind = max(number for number in rows if number < config.id)
            added.setdefault(behind, []).append(_row(config, dialect))
    for number, lines in added.items():
        document.insert_after(rows[number], lines)


def vcpus_lines(definition: Definition, dialect: str, details: Details | None = None) -> list[str]:
    """`<vcpus>` as lines. A row in the RFC's dialect has id and state, and what `details` has."""
    lines = ["<vcpus>"]
    for config in definition.vcpus:
        more = details.get(config.id, {}) if dialect == "rfc" and details is not None else {}
        lines.append("  " + _row(config, dialect, more))
    return [*lines, "</vcpus>"]


def _row(config: VcpuConfig, dialect: str, more: Mapping[str, str | None] | None = None) -> str:
    attributes = {"id": str(config.id), **_attributes(config, dialect), **(more or {})}
    words = "".join(f" {key}='{value}'" for key, value in attributes.items() if value is not None)
    return f"<vcpu{words}/>"


def _attributes(config: VcpuConfig, dialect: str) -> dict[str, str | None]:
    if dialect == "rfc":
        return {"state": "enabled" if config.enabled else "disabled"}
    return {
        "enabled": "yes" if config.enabled else "no",
        "hotpluggable": "yes" if config.hotpluggable else "no",
        "order": None if config.order is None else str(config.order),
    }
