"""A domain that is reached over QMP."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

from qmpvcpu import qemu
from qmpvcpu.domain.addresses import NOBODY_LISTENS
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.backends.backend import Backend
from qmpvcpu.domain.definition import DefinitionHandle
from qmpvcpu.domain.event_bus import EventBus
from qmpvcpu.domain.reached import Reached
from qmpvcpu.domain.resolve import DomainAddress, unknown_domain
from qmpvcpu.domain.session import Session, open_session
from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.ports import Monitor


@dataclass(slots=True)
class QmpBackend(Backend):
    """The way over QMP.

    Attributes:
        place: the addresses of the domain.
        log: a `qmpvcpu.QmpLog` that records every message, or None.
        connect_timeout: seconds for connection and greeting, per address.
        command_timeout: seconds for one QMP command.
        config_only: only the definition is needed; a socket that another client uses is not an
            error.
    """

    place: DomainAddress
    log: Any = None
    connect_timeout: float = 5.0
    command_timeout: float = 10.0
    config_only: bool = False

    def unreached(self) -> Reached:
        """Return what is known of the domain before it is reached."""
        place = self.place
        return Reached(
            place.name,
            definition=DefinitionHandle(place.definition) if place.definition is not None else None,
            addresses=place.qmp,
            agent_address=place.agent,
        )

    async def reach(self, bus: EventBus, queue: asyncio.Lock, last: Session | None) -> Reached:
        """See `Backend`."""
        place, reached = self.place, self.unreached()
        if not place.qmp:
            return replace(reached, is_inactive=True)
        agent = reached.defined_agent()
        try:
            session = await open_session(place.name, place.qmp, self._open, bus, queue, last)
        except VcpuConnectionError as error:
            # If no QEMU listens, the domain does not run. After any other error it may run.
            if reached.definition is not None and error.reason in NOBODY_LISTENS:
                return replace(reached, is_inactive=True)
            # If nothing exists under this name, there is no definition either.
            if self.config_only and not place.is_unknown:
                return replace(reached, busy=error)
            raise
        if agent is not None:
            session.guest = Guest(qemu.AgentClient(agent), session.monitor, bus.emit)
        return replace(reached, session=session, guest=session.guest)

    async def _open(self, address: str) -> Monitor:
        if self.place.is_unknown:
            raise unknown_domain(address)
        return await qemu.connect_monitor(
            address,
            log=self.log,
            connect_timeout=self.connect_timeout,
            command_timeout=self.command_timeout,
            qemu_log=self.place.qemu_log,
        )
