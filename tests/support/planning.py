"""A state and a request -> the plan, which is public, with every reason against it."""

from __future__ import annotations

from typing import Any

from qmpvcpu import DomainState, Plan, Request
from qmpvcpu.core.plan import make_plan
from qmpvcpu.core.request import Knowledge


def plan(state: DomainState, request: Request, **known: Any) -> Plan:
    """`known` is what the replies of the inventory do not say: `removals_seen` (how many vCPUs this connection saw
    go), `x2apic` (whether the CPU model has it), `firmware_runs` (whether a ppc64 guest is still in its firmware),
    `pending` (first ids of entities whose unplug has not ended).
    """
    return make_plan(state, request, Knowledge(**known))
