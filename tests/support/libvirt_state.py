"""A running guest of libvirt's, by its live XML alone: nobody asks its QEMU."""

from __future__ import annotations

from collections.abc import Iterable

from qmpvcpu import DomainState, Refusal, Request, VcpuFlag
from qmpvcpu.core.machine.versions import oldest_with
from qmpvcpu.core.planning.live import make_plan
from qmpvcpu.core.state.from_live_xml import running_state
from qmpvcpu.core.state.knowledge import Knowledge
from qmpvcpu.xml.document import read_domain


def running(xml: str, *, gone: Iterable[int] = (), pending: Iterable[int] = ()) -> DomainState:
    """Its state. `gone` are vCPUs that the XML lists as enabled and whose threads are gone,
    `pending` first ids of entities whose unplug has not ended.
    """
    definition = read_domain(xml.encode(), running=True)[1]
    version = oldest_with(definition.machine or "")
    return running_state(definition, "d", version, "running", gone, pending)


def against_unplug(
    state: DomainState, *ids: int, firmware_runs: bool | None = None
) -> list[Refusal]:
    """Why these vCPUs are not unplugged; `firmware_runs`: the guest (ppc64) is still in its
    firmware.
    """
    return list(
        make_plan(
            state, Request(ids, VcpuFlag.DISABLE), Knowledge(firmware_runs=firmware_runs)
        ).refusals
    )
