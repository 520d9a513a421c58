"""What a domain's XML says of its vCPUs, read by another reader than the product's, with libvirt's
defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lxml import etree

from scripts.corpus_run.files import parse


@dataclass(frozen=True)
class Said:
    """`rows`: vCPU id -> whether it is enabled, whether it is hotpluggable, its order."""

    maximum: int
    rows: Mapping[int, tuple[bool, bool, int | None]]
    pins: Mapping[int, str] = field(default_factory=dict)
    schedulers: Mapping[str, str] = field(default_factory=dict)

    @property
    def enabled(self) -> list[int]:
        return [number for number, (enabled, *_) in sorted(self.rows.items()) if enabled]

    def differences(self, other: Said) -> list[str]:
        """In what another says something else."""
        if self.maximum != other.maximum:
            return ["maximum"]
        if self.enabled != other.enabled:
            return ["enabled"]
        words = []
        if {n: row[1] for n, row in self.rows.items()} != {
            n: row[1] for n, row in other.rows.items()
        }:
            words.append("hotpluggable")
        # libvirt numbers what has no order, and we leave it out.
        both = [number for number in self.enabled if self.rows[number][2] and other.rows[number][2]]
        if len(both) > 1 and _ranks(self, both) != _ranks(other, both):
            words.append("order")
        words += ["pins"] if self.pins != other.pins else []
        words += ["schedulers"] if self.schedulers != other.schedulers else []
        return words


def said(data: bytes) -> Said:
    return said_by(parse(data))


def said_by(root: etree._Element) -> Said:
    vcpu = root.find("vcpu")
    text = (vcpu.text or "").strip() if vcpu is not None else ""
    maximum = int(text or "1")
    current = int(vcpu.get("current", maximum)) if vcpu is not None else maximum
    listed = root.find("vcpus")
    rows: dict[int, tuple[bool, bool, int | None]] = {}
    for number in range(maximum):
        enabled = number < current and listed is None
        rows[number] = enabled, not enabled, None
    for row in listed.iterfind("vcpu") if listed is not None else ():
        enabled = row.get("enabled") == "yes" or row.get("state") == "enabled"
        pluggable = row.get("hotpluggable")
        order = row.get("order")
        rows[int(row.get("id", ""))] = (
            enabled,
            not enabled if pluggable is None else pluggable == "yes",
            int(order) if order is not None else None,
        )
    pins = {
        int(pin.get("vcpu", "")): _set(pin.get("cpuset", ""))
        for pin in root.iterfind("cputune/vcpupin")
    }
    schedulers = {
        number: f"{row.get('scheduler')}:{row.get('priority') or ''}"
        for row in root.iterfind("cputune/vcpusched")
        for number in _set(row.get("vcpus", "")).split(",")
        if number
    }
    return Said(maximum, rows, {n: cpus for n, cpus in pins.items() if n < maximum}, schedulers)


def _ranks(one: Said, ids: list[int]) -> list[int]:
    return sorted(ids, key=lambda number: one.rows[number][2] or 0)


def _set(text: str) -> str:
    """A cpuset, each of its numbers."""
    found: set[int] = set()
    for part in text.replace(" ", "").split(","):
        if part.startswith("^"):
            found.discard(int(part[1:]))
        elif part:
            low, _, high = part.partition("-")
            found.update(range(int(low), int(high or low) + 1))
    return ",".join(map(str, sorted(found)))
