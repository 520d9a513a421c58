"""What a rule needs to know of a guest, and the replies of the inventory do not say."""

from __future__ import annotations

from dataclasses import dataclass

from qmpvcpu.core.state.guest_view import GuestView


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What the replies of the inventory do not say, and a check needs.

    `removals_seen`: vCPUs that processes of ours saw go. `x2apic`: whether the CPU model has it (None: not asked).
    `firmware_runs`: on ppc64, whether the boot CPU still executes firmware (None: not asked). `pending`: first ids
    of entities whose unplug was asked and has not ended. `guest`: its own view, where an agent answered.
    """

    removals_seen: int = 0
    x2apic: bool | None = None
    firmware_runs: bool | None = None
    pending: frozenset[int] = frozenset()
    guest: GuestView | None = None
    #: TCG contexts that were surely used by vCPUs that are gone.
    contexts_lost: int = 0
    #: Whether a user of this guest was told that TCG contexts run out.
    contexts_reported: bool = False
    #: Whether OVMF with SMM has run (None: not asked).
    smm: bool | None = None
    #: Whether nobody in the guest has left the legacy mode of its CPU hotplug block (None: not asked).
    legacy_hotplug: bool | None = None
