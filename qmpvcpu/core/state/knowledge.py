"""What the rules need to know about a guest beyond the replies of the inventory."""

from __future__ import annotations

from dataclasses import dataclass

from qmpvcpu.core.state.guest_view import GuestView


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a check needs to know beyond the replies of the inventory.

    `removals_seen`: how many vCPUs our processes have seen removed. `x2apic`: whether the CPU model
    has it (None: not queried). `firmware_runs`: on ppc64, whether the boot CPU still executes
    firmware (None: not queried). `pending`: ids of the entities whose unplug was requested and has
    not ended. `guest`: its own view, where an agent answered.
    """

    removals_seen: int = 0
    x2apic: bool | None = None
    firmware_runs: bool | None = None
    pending: frozenset[int] = frozenset()
    guest: GuestView | None = None
    #: TCG contexts that were surely used by vCPUs that have been removed.
    contexts_lost: int = 0
    #: Whether a user of this guest has been warned that TCG contexts run out.
    contexts_reported: bool = False
    #: Whether OVMF with SMM has run (None: not queried).
    smm: bool | None = None
    #: Whether the guest's CPU hotplug block is still in its legacy mode (None: not queried).
    legacy_hotplug: bool | None = None
