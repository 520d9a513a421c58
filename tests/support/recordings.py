"""What real QEMUs answered: tests/data/qmp, written by scripts/record-qmp."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[1] / "data" / "qmp"
#: From the outside in: the order in which vCPU ids are numbered (docs: a level that is absent
#: counts as 0).
LEVELS = (
    "drawer-id",
    "book-id",
    "socket-id",
    "die-id",
    "cluster-id",
    "module-id",
    "core-id",
    "thread-id",
)


@dataclass
class Recording:
    """One machine: `slots` by the first vCPU id of each, `paths` of those that were plugged when it
    started.
    """

    arch: str
    greeting: dict[str, int]
    replies: dict[str, Any]
    tried: dict[str, dict[str, Any]] = field(default_factory=dict)
    slots: dict[int, dict[str, Any]] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)

    @property
    def topology(self) -> dict[str, int]:
        """`qom-get /machine smp`."""
        return self.replies["qom-get /machine smp"]["return"]

    @property
    def vsmt(self) -> int:
        """ppc64: how far two cores lie apart in the guest."""
        return self.replies["qom-get /machine vsmt"]["return"]


def address(slot: dict[str, Any]) -> tuple[int, ...]:
    return tuple(slot["props"].get(level, 0) for level in LEVELS)


@cache
def _read(name: str) -> str:
    path = DATA / f"{name}.json"
    assert path.exists(), (
        f"no recording {name}: scripts/record-qmp makes it; there are {', '.join(names())}"
    )
    return path.read_text()


def names() -> list[str]:
    return sorted(
        str(path.relative_to(DATA)).removesuffix(".json") for path in DATA.rglob("*.json")
    )


def recording(name: str) -> Recording:
    """The recording `ARCH-VERSION/NAME`, to be changed at will."""
    found = json.loads(_read(name))
    made = Recording(found["arch"], found["greeting"], found["replies"])
    made.tried = {row["try"]: row["reply"] for row in found["tried"]}
    first = 0
    for slot in sorted(made.replies["query-hotpluggable-cpus"].get("return", ()), key=address):
        if (path := slot.pop("qom-path", None)) is not None:
            made.paths[first] = path
        made.slots[first] = slot
        first += slot["vcpus-count"]
    return made


def sockets(count: int) -> Recording:
    """An x86_64 machine of `count` sockets with one thread each, the first of them plugged."""
    made = recording("x86_64-10.0/q35-flat")
    (slot,) = [slot for first, slot in made.slots.items() if first == 0]
    made.slots = {n: deepcopy(slot) for n in range(count)}
    for number, each in made.slots.items():
        each["props"]["socket-id"] = number
    made.topology.update(sockets=count, maxcpus=count)
    return made
