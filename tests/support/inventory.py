"""What QEMU replies -> which vCPUs there are. Replies are the JSON that QMP carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qmpvcpu import DomainState, QemuVersion, Topology
from qmpvcpu.core.state.inventory import (
    BootFacts,
    build_state,
    parse_cpus_fast,
    parse_hotpluggable_cpus,
    parse_topology,
    parse_version,
    refresh_state,
)

#: The readers of single replies, by command; `smp` is that of `qom-get /machine smp`.
_READERS: Final[Mapping[str, Callable[[Any], object]]] = {
    "query-hotpluggable-cpus": parse_hotpluggable_cpus,
    "query-cpus-fast": parse_cpus_fast,
    "smp": parse_topology,
    "greeting": parse_version,
}
COMMANDS: Final = tuple(_READERS)


def check_reply(command: str, reply: Any) -> None:
    """Read one reply (see `COMMANDS`). Raises VcpuConnectionError: it cannot be QEMU's."""
    _READERS[command](reply)


def version_of(greeting: Any) -> QemuVersion:
    return parse_version(greeting)


def topology_of(smp: Any) -> Topology | None:
    return parse_topology(smp)


@dataclass(frozen=True)
class Qemu:
    """One running QEMU, as a connection to it knows it; `smp` is the reply of
    `qom-get /machine smp`.
    """

    arch: str = "x86_64"
    machine: str = "pc-q35-10.0"
    version: tuple[int, ...] = (10, 0, 2)
    kvm: bool = False
    smp: Mapping[str, int] | None = None

    def state(self, slots: Any, cpus: Any, pending: Iterable[int] = ()) -> DomainState:
        """The state by the replies of `query-hotpluggable-cpus` (None: the machine has no CPU
        hotplug) and `query-cpus-fast`; `pending` are first ids of entities whose unplug has not
        ended.
        """
        known = None if slots is None else parse_hotpluggable_cpus(slots)
        return build_state(self._facts, known, parse_cpus_fast(cpus), pending=tuple(pending))

    def refreshed(self, state: DomainState, cpus: Any) -> DomainState:
        """The state after a later reply of `query-cpus-fast` alone."""
        return refresh_state(state, self._facts, parse_cpus_fast(cpus))

    @property
    def _facts(self) -> BootFacts:
        topology = None if self.smp is None else parse_topology(self.smp)
        return BootFacts(
            "d", self.arch, self.machine, self.kvm, QemuVersion(*self.version), topology
        )
