"""Refusals that follow from the request alone, or from what its connection has: flags, options,
ids, counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from qmpvcpu.core.model import DomainState
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import Refusal
from qmpvcpu.flags import VcpuFlag

_NOT_WITH_GUEST: Final = (
    (VcpuFlag.NUMA_NODE, "the agent does not report a CPU's NUMA node"),
    (VcpuFlag.CONFIG, "the agent changes only the running guest"),
    (VcpuFlag.CORE, "the agent switches single CPUs"),
)


def check_request(request: Request) -> list[Refusal]:
    """Flags and options that exclude each other."""
    exclusive = [catalogue.ATOMIC_AND_ASYNC()] if request.atomic and not request.wait else []
    return check_flags(request.flags, is_query=request.is_query) + exclusive


def check_flags(flags: VcpuFlag, *, is_query: bool | None = None) -> list[Refusal]:
    """Flags that exclude each other (design.md, "Refused before anything is touched").

    `is_query` is given for a request that changes something with neither ENABLE nor DISABLE.
    """
    found: list[Refusal] = []
    if flags in (VcpuFlag.ENABLE, VcpuFlag.DISABLE, VcpuFlag.CURRENT):
        return found
    unknown = int(flags) & ~sum(VcpuFlag)
    if unknown:
        found.append(catalogue.UNKNOWN_FLAGS(flags=unknown))
    if flags & VcpuFlag.ENABLE and flags & VcpuFlag.DISABLE:
        found.append(catalogue.ENABLE_AND_DISABLE())
    if flags & VcpuFlag.GUEST:
        found += [
            catalogue.GUEST_AND_ANOTHER(flag=flag.name, why=why)
            for flag, why in _NOT_WITH_GUEST
            if flags & flag
        ]
    if is_query is None:
        is_query = not flags & (VcpuFlag.ENABLE | VcpuFlag.DISABLE)
    if is_query and flags & VcpuFlag.LIVE and flags & VcpuFlag.CONFIG:
        found.append(catalogue.QUERY_OF_BOTH())
    return found


def check_sides(
    request: Request,
    name: str,
    *,
    live: bool,
    config: bool,
    is_active: bool,
    has_definition: bool,
    has_agent: bool,
) -> list[Refusal]:
    """Why this connection cannot serve the request, whatever the state.

    Args:
        request: what is requested.
        name: of the domain.
        live: whether the running guest is meant.
        config: whether the definition is meant.
        is_active: whether there is a running guest.
        has_definition: whether a definition is known.
        has_agent: whether its agent is known, or there is no guest that could have one.
    """
    reason = catalogue.INACTIVE_LIVE if request.has(VcpuFlag.LIVE) else catalogue.INACTIVE
    found = [reason(name=name)] if live and not is_active else []
    checks = (
        (config and not has_definition, catalogue.NO_DEFINITION),
        (request.has(VcpuFlag.GUEST) and not has_agent, catalogue.NO_AGENT),
        (request.maximum and live, catalogue.MAXIMUM_IS_CONFIG),
    )
    return found + [reason() for is_refused, reason in checks if is_refused]


def check_not_migrating(run_state: str | None, migration: str | None) -> list[Refusal]:
    """Why no vCPU can change now: the guest is migrating, or has migrated.

    Args:
        run_state: QEMU's RunState.
        migration: the status of a migration that is under way.
    """
    if migration is not None and run_state != "inmigrate":
        return [catalogue.MIGRATING(status=migration)]
    return [catalogue.MIGRATED()] if run_state == "postmigrate" else []


def check_range(state: DomainState, ids: Iterable[int]) -> list[Refusal]:
    """The vCPU ids that this machine does not have."""
    bad = [number for number in ids if number not in state.by_id]
    if not bad:
        return []
    if min(bad) < 0:
        return [catalogue.NEGATIVE_ID(bad, numbers=", ".join(map(str, bad)))]
    return [catalogue.RANGE(bad, most=state.maxcpus - 1)]


def check_count(total: int, most: int) -> list[Refusal]:
    """Why a libvirt driver that knows only the number of vCPUs cannot reach this number."""
    return (
        []
        if 1 <= total <= max(most, 1)
        else [catalogue.OVER_LIBVIRT_MAXIMUM(total=total, most=most)]
    )
