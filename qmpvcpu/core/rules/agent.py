"""Why CPUs cannot be taken online or offline, by the guest's own view of them."""

from __future__ import annotations

from collections.abc import Sequence

from qmpvcpu.core.model import DomainState
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.state.guest_view import GuestView
from qmpvcpu.errors import Refusal


def check_guest(
    state: DomainState, ids: Sequence[int], view: GuestView, *, online: bool
) -> list[Refusal]:
    """Why these vCPUs cannot be switched in the guest."""
    enabled = [number for number in ids if state.vcpus[number].enabled]
    absent = [number for number in ids if number not in enabled]
    unknown = [
        number
        for number in enabled
        if number not in view.by_vcpu and view.online(number) is not online
    ]
    fixed = [
        number
        for number in ids
        if not online
        and (cpu := view.by_vcpu.get(number)) is not None
        and cpu.online
        and cpu.can_offline is False
    ]
    rows = (
        (catalogue.NOT_PLUGGED, absent),
        (catalogue.GUEST_CPU, unknown),
        (catalogue.GUEST_FIXED, fixed),
    )
    return [reason(about) for reason, about in rows if about]


def check_guest_ids(ids: Sequence[int], view: GuestView, *, online: bool) -> list[Refusal]:
    """The same for CPUs named by the guest's own ids; `view.by_vcpu` has these ids as its keys."""
    unknown = [number for number in ids if number not in view.by_vcpu]
    fixed = [
        n for n in ids if not online and n in view.by_vcpu and view.by_vcpu[n].can_offline is False
    ]
    rows = ((catalogue.GUEST_RANGE, unknown), (catalogue.GUEST_CPU_FIXED, fixed))
    return [reason(about) for reason, about in rows if about]
