"""The persistent side of a domain: what its XML says of vCPUs, in one frozen value. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from qmpvcpu.core.model import Topology

__all__ = ["MOST_VCPUS", "Definition", "NumaCell", "VcpuConfig", "default_vcpus"]

#: More than any machine of QEMU 7.2 to 11.1 takes (x86_64: 4096; libvirt itself: 16384).
MOST_VCPUS: Final = 16384


@dataclass(frozen=True, slots=True)
class VcpuConfig:
    """One vCPU as it will be at the next boot: an element of `<vcpus>`.

    `order` is the rank in which it is plugged, None where nothing is said.
    """

    id: int
    enabled: bool
    hotpluggable: bool
    order: int | None = None


@dataclass(frozen=True, slots=True)
class NumaCell:
    """One `<numa><cell>`: `cpus` are vCPU ids."""

    id: int
    cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Definition:
    """What a domain's XML says of its vCPUs.

    `dialect` is "rfc" or "libvirt", whichever its `<vcpus>` is written in, None without one. `cpuset` is `<vcpu
    cpuset>`, the host CPUs of every vCPU that `pins` (`<vcpupin>`) does not name; `schedulers` has `fifo:10`,
    `batch` and the like. `agent` is the socket path of the guest agent's channel.
    """

    name: str
    vcpus: tuple[VcpuConfig, ...]
    uuid: str | None = None
    arch: str | None = None
    machine: str | None = None
    emulator: str | None = None
    dialect: str | None = None
    cpuset: tuple[int, ...] | None = None
    topology: Topology | None = None
    cells: tuple[NumaCell, ...] = ()
    pins: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    schedulers: Mapping[int, str] = field(default_factory=dict)
    emulator_pin: tuple[int, ...] | None = None
    agent: str | None = None

    @property
    def maxcpus(self) -> int:
        """How many vCPU ids there are."""
        return len(self.vcpus)

    @property
    def enabled_ids(self) -> tuple[int, ...]:
        """Ids of the vCPUs that the guest boots with, ascending."""
        return tuple(vcpu.id for vcpu in self.vcpus if vcpu.enabled)

    def cell_of(self, vcpu_id: int) -> int | None:
        """The NUMA node of a vCPU; None without NUMA, or where no cell names it."""
        return next((cell.id for cell in self.cells if vcpu_id in cell.cpus), None)

    def switched(self, ids: tuple[int, ...], enabled: bool) -> Definition:
        """The same with these vCPUs on or off, as libvirt does it: hotpluggable then, and no order stays."""
        asked = set(ids)
        return replace(
            self,
            vcpus=tuple(
                VcpuConfig(vcpu.id, enabled, hotpluggable=True) if vcpu.id in asked else replace(vcpu, order=None)
                for vcpu in self.vcpus
            ),
        )


def default_vcpus(maximum: int, current: int) -> tuple[VcpuConfig, ...]:
    """Without `<vcpus>`: ids 0 to current-1 are enabled and stay, the others can be plugged."""
    return tuple(VcpuConfig(number, number < current, number >= current) for number in range(maximum))
