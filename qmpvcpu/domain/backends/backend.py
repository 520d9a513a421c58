"""The interface of a domain's connection: one interface, with QMP and libvirt as its two
implementations.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import replace

from qmpvcpu.core.model import Outcome
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.core.request import Request
from qmpvcpu.domain.event_bus import EventBus
from qmpvcpu.domain.reached import Reached
from qmpvcpu.domain.session import Session
from qmpvcpu.flags import VcpuFlag


class Backend(ABC):
    """A way to one domain. What it says here is what a backend does that has nothing of its own to
    add.

    The domain holds its queue while it calls anything but `unreached`, `closed` and `notes`.
    """

    @abstractmethod
    def unreached(self) -> Reached:
        """What is known of the domain before it is reached."""

    @abstractmethod
    async def reach(self, bus: EventBus, queue: asyncio.Lock, last: Session | None) -> Reached:
        """Connect, and read everything once.

        Args:
            bus: the bus that events are emitted on.
            queue: the lock that every reading or changing operation holds.
            last: the previous connection; its pending unplugs are taken over.

        Raises:
            VcpuConnectionError: the domain cannot be reached.
        """

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of this way to the guest."""
        return ()

    async def refresh(self, reached: Reached) -> Reached | None:
        """Before each call: the domain as it is now; None if it was started meanwhile (it is
        reached again).
        """
        return reached

    def closed(self, reached: Reached) -> Reached:
        """The domain once its connection is closed."""
        return replace(reached, session=None, guest=None)

    async def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Close what is the backend's own. May be called twice."""

    async def change(self, reached: Reached, request: Request) -> Outcome:
        """Carry out a request that changes something."""
        return await reached.change(request)

    async def plan(self, reached: Reached, request: Request) -> Plan:
        """What `change` would do, and every reason why not; touches nothing."""
        return await reached.plan(request)

    async def pin(
        self, reached: Reached, request: Request, cpus: tuple[int, ...] | None
    ) -> Outcome:
        """Pin the one vCPU of the request; None: to all host CPUs."""
        return await reached.pin(request, cpus)

    async def dump_xml(
        self, reached: Reached, flags: VcpuFlag, dialect: str | None, detail: str | None
    ) -> bytes:
        """The XML of the side that `flags` name."""
        return await reached.dump_xml(flags, dialect, detail)
