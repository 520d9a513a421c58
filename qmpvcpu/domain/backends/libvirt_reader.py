"""Reads a running guest's state from libvirt's XML."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable

from qmpvcpu.core.definition import Definition, state_of
from qmpvcpu.core.machine.versions import oldest_with
from qmpvcpu.core.model import DomainState
from qmpvcpu.core.quirks import quirk
from qmpvcpu.core.state.from_live_xml import running_state
from qmpvcpu.domain.backends.libvirt_answers import answered
from qmpvcpu.domain.session import store_of
from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.host.process import find_by_uuid
from qmpvcpu.libvirt.monitor import ApiMonitor
from qmpvcpu.ports import CommandError
from qmpvcpu.xml.document import read_domain

logger = logging.getLogger("qmpvcpu.domain.backends.libvirt_reader")


class XmlReader:
    """Reads a running guest's state from libvirt's XML, in place of `domain.reader.Reader`."""

    def __init__(self, monitor: ApiMonitor, name: str) -> None:
        self._monitor = monitor
        self._name = name
        self.thread_ids: frozenset[int] = frozenset()
        guest = monitor.guest
        #: Needed for pending unplugs only; libvirt places the threads.
        self.process = find_by_uuid(guest.uuid) if guest.connection.is_local else None
        self._store = store_of(self.process)
        self._seen_removed: frozenset[int] = frozenset()

    async def full(self, pending: Iterable[int] = ()) -> DomainState:
        """Read the XML."""
        pending_ids = tuple(pending)
        guest = self._monitor.guest
        await self._monitor.plugs_done()
        self._monitor.check()
        with answered():
            xml, run = await asyncio.gather(guest.live_xml(), guest.run_state())
        if xml is None:
            raise self._monitor.stopped()
        definition = read_domain(xml, running=True)[1]
        # libvirt does not report the version of a running QEMU. It is at least that of its machine
        # type.
        version = oldest_with(definition.machine or "")
        removed = await self._removed(definition)
        state = running_state(definition, self._name, version, run, removed, pending_ids)
        self._monitor.entities = {entity.id: entity.ids for entity in state.entities}
        self._monitor.unseen = removed
        self._monitor.doubtful = _doubtful(definition, removed)
        return state

    async def _removed(self, definition: Definition) -> frozenset[int]:
        """Return the vCPUs that left QEMU without libvirt's knowledge: under TCG on x86 there is no
        event.
        """
        plugged = [vcpu.id for vcpu in definition.vcpus if vcpu.enabled and vcpu.hotpluggable]
        if not plugged or not _may_be_unseen(definition):
            return frozenset()
        # When libvirt refreshes its thread list, as it does at every plug, it no longer shows that
        # a vCPU has left.
        known = self._store.removed() if self._store is not None else self._seen_removed
        found: frozenset[int] = frozenset()
        try:
            found = await self._monitor.guest.without_threads(plugged)
        except (CommandError, VcpuConnectionError) as error:
            logger.debug("whether a vCPU was unplugged is not known: %s", error)
            self._monitor.check()
        removed = (found | known).intersection(plugged)
        if self._store is None:
            self._seen_removed = removed
        elif removed != known:
            # Another process may have seen a vCPU return and removed it from the store a moment
            # ago.
            self._store.note_removed((self._store.removed() | found).intersection(plugged))
        return removed

    async def fast(
        self,
        state: DomainState,
        pending: Collection[int] = (),
        expected: Collection[int] = (),
        reports_removals: bool = False,
        before_retry: Callable[[], object] = lambda: None,
        declined: Collection[int] = (),
    ) -> DomainState:
        """The same as `full`: libvirt has no shorter query."""
        return await self.full(pending)


def _may_be_unseen(definition: Definition) -> bool:
    """Whether vCPUs may leave without an event."""
    return quirk("x86-tcg-no-deleted-event").affects(definition.arch, definition.accel, None)


def _doubtful(definition: Definition, removed: Collection[int]) -> tuple[int, ...]:
    """Return vCPUs that share one order. Each should have its own, so one of them has left without
    libvirt's knowledge (TCG).
    """
    by_order: dict[int, list[int]] = {}
    if not _may_be_unseen(definition):
        return ()
    for entity in state_of(definition, "", active=True).entities:
        order = definition.vcpus[entity.id].order
        if entity.id not in removed and definition.vcpus[entity.id].enabled and order is not None:
            by_order.setdefault(order, []).append(entity.id)
    return tuple(first for firsts in by_order.values() if len(firsts) > 1 for first in firsts)
