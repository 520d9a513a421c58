"""One connection to a guest: its monitor, a state that events keep fresh, pending unplugs, and
listeners.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from qmpvcpu import aio
from qmpvcpu.core.arch import architecture
from qmpvcpu.core.migration.status import MigrationStatus, parse_status
from qmpvcpu.core.model import DomainState, Entity, Event, EventKind
from qmpvcpu.core.rules.request import check_not_migrating
from qmpvcpu.core.state.events import CPU_EVENTS, Departures, Names, SignalKind, changes, interpret
from qmpvcpu.core.state.knowledge import Knowledge, UsedContexts, mark
from qmpvcpu.domain.addresses import Opener, first_free
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.event_bus import EventBus, Watcher
from qmpvcpu.domain.pending_unplugs import PendingUnplugs
from qmpvcpu.domain.reader import (
    StateReader,
    has_smm_firmware,
    is_hotplug_legacy,
    open_reader,
    run_state,
)
from qmpvcpu.errors import Refusal, VcpuConnectionError
from qmpvcpu.host.affinity import QemuThreads
from qmpvcpu.host.pending_files import PendingFolder
from qmpvcpu.host.process import Process, find_process
from qmpvcpu.host.saves import is_here
from qmpvcpu.ports import CommandError, Monitor, MonitorEvent

#: QAPI RunStates of a guest that cannot leave without an event.
_AT_HOME: Final = frozenset({"running", "prelaunch"})
_RUN_EVENTS: Final = frozenset({"STOP", "RESUME", "MIGRATION"})

#: Makes the reader of the state over a monitor, and reads the first state. The second argument is
#: the domain's name.
Reads = Callable[[Monitor, str], Awaitable[tuple[StateReader, DomainState]]]


class Session:
    """An open connection, until `close()`. Created by `open_session`.

    Every reading or changing operation holds `queue`. `in_flight` are the ids of the entities that
    an operation is changing; only that operation decides what becomes of them.
    """

    def __init__(
        self, monitor: Monitor, bus: EventBus, queue: asyncio.Lock, reads: Reads = open_reader
    ) -> None:
        self.monitor = monitor
        self._reads = reads
        self.stale = True
        #: Whether the guest may have migrated, or be migrating; only `read_and_check_migration`
        #: finds out.
        self.may_be_migrating = True
        self.removals_seen = 0
        #: QAPI RunState at the last query; None after an event of a change.
        self.seen_run_state: str | None = None
        self._has_smm: bool | None = None
        #: Whether the guest has left the legacy mode of its CPU hotplug block. A reset restores
        #: that mode.
        self._left_legacy = False
        self.process: Process | None = None
        #: The threads of QEMU, if it runs on this host.
        self.threads: QemuThreads | None = None
        self.pending_unplugs = PendingUnplugs(None)
        self.in_flight: frozenset[int] = frozenset()
        #: What had finished while no connection was open, as found on connecting.
        self.settled: tuple[Event, ...] = ()
        #: The guest's agent. It is queried too while there is a listener.
        self.guest: Guest | None = None
        self._bus = bus
        self._queue = queue
        self._reader: StateReader | None = None
        self._state: DomainState | None = None
        self._lost: VcpuConnectionError | None = None
        self._names: tuple[DomainState, Names] | None = None
        self._departures = Departures()
        self._listening: Any = None
        #: vCPUs that have left, and whose cgroups may still exist.
        self._ungrouped: set[int] = set()
        #: vCPUs that are leaving, and have no cgroup.
        self._groupless: set[int] = set()
        self._watcher = Watcher(
            self._watch,
            lambda: bus.listening or bool(self.pending_unplugs.entity_ids) or bool(self._ungrouped),
            bus.end,
        )
        bus.on_listener = self._watcher.start

    @property
    def removals(self) -> int:
        """The number of vCPUs that were unplugged, as far as known; at least one, if any was."""
        return self.removals_seen or int(bool(self.pending_unplugs.contexts.removed))

    @property
    def state(self) -> DomainState:
        """The state of the last query."""
        assert self._state is not None
        return self._state

    async def open(self, name: str, before: Session | None) -> None:
        """Read everything once. `before` is the broken connection that this one replaces."""
        self.stale = self.may_be_migrating = False
        self._listening = self.monitor.listen(self._sink)
        self._listening.__enter__()
        sent_at = time.time()
        self._reader, state = await self._reads(self.monitor, name)
        self._state = state
        if self.monitor.is_local:
            self.process = find_process(self._reader.thread_ids, self.monitor.peer)
            self.threads = QemuThreads(self.process) if self.process is not None else None
        if self.threads is not None:
            self.threads.recover()
        self.pending_unplugs = PendingUnplugs(store_of(self.process or self._reader.process))
        self.pending_unplugs.seen_at = sent_at
        if before is not None and _same_guest(before, self):
            self.pending_unplugs.adopt(before.pending_unplugs)
            self.removals_seen = before.removals_seen
            self._state = before.state
            self._keep(state)
        self.pending_unplugs.note_back(state.enabled_ids)
        self.settled = tuple(
            event for event in self._learn(is_first=True) if not event.event.is_step
        )
        self._state = mark(state, self.pending_unplugs.entity_ids)
        self._note_run(await run_state(self.monitor))
        self._watcher.start()

    async def close(self) -> None:
        """Close. Never raises; may be called twice."""
        await self._watcher.stop()
        if self._listening is not None:
            self._listening.__exit__(None, None, None)
            self._listening = None
        self.pending_unplugs.close()
        await self.monitor.close()

    # -- queries ----------------------------------------------------------------------------------

    async def read(self) -> DomainState:
        """Send both queries."""
        assert self._reader is not None
        self.learn()
        self.stale = False
        heard, sent_at = self._departures.heard, time.time()
        try:
            state = await self._reader.full(self.pending_unplugs.entity_ids)
        except BaseException:
            self.stale = True
            raise
        return self._keep(state, heard, sent_at)

    async def read_and_check_migration(self) -> tuple[DomainState, list[Refusal]]:
        """Return `read`, and the refusals if vCPUs cannot be switched now because the guest is
        migrating.
        """
        self.may_be_migrating = False
        try:
            # A state without contradicting events only needs to be confirmed.
            state, run, reply = await asyncio.gather(
                self.read() if self.stale else self.look(),
                run_state(self.monitor),
                _answer(self.monitor.query_migrate),
                return_exceptions=True,
            )
            if isinstance(state, BaseException):
                raise state
            if isinstance(run, BaseException):
                raise run
            if isinstance(reply, BaseException) and not isinstance(reply, CommandError):
                raise reply
        except BaseException:
            self.may_be_migrating = True
            raise
        status = MigrationStatus() if isinstance(reply, CommandError) else parse_status(reply)
        if run == "postmigrate" and is_here(self.process):
            run = "paused"
        moving = check_not_migrating(run, status.under_way)
        self._note_run(run)
        self.may_be_migrating |= bool(moving)
        return state, moving

    async def look(
        self,
        *,
        is_last: bool = False,
        before_retry: Callable[[], object] = lambda: None,
        declined: Collection[int] = (),
    ) -> DomainState:
        """Send `query-cpus-fast` alone, if that is enough: the query of an operation in flight.

        Args:
            is_last: QEMU has reported every vCPU that should leave as removed.
            before_retry: called before a query is sent a second time.
            declined: ids of entities whose plug QEMU declined, read when the reply has arrived: a
                CPU with their device id may be in any slot.
        """
        assert self._reader is not None
        pending, heard, sent_at = (
            self.pending_unplugs.entity_ids,
            self._departures.heard,
            time.time(),
        )
        return self._keep(
            await self._reader.fast(
                self.state, pending, self.in_flight, is_last, before_retry, declined
            ),
            heard,
            sent_at,
        )

    def knowledge(self, x2apic: bool | None = None, firmware_runs: bool | None = None) -> Knowledge:
        """Return what a plan needs besides the state."""
        known = Knowledge(
            self.removals_seen, x2apic, firmware_runs, self.pending_unplugs.entity_ids
        )
        if self.state.accel != "tcg":
            return known
        contexts = self.pending_unplugs.contexts
        return replace(
            known,
            removals_seen=self.removals_seen or len(contexts.removed),
            contexts_lost=max(self.removals_seen, contexts.count(_threads(self.state))),
            contexts_reported=contexts.is_reported,
        )

    async def smm_has_run(self) -> bool:
        """Return whether OVMF with SMM has run in this guest. At an incoming migration it has not
        run in this QEMU.
        """
        if self._has_smm is None:
            self._has_smm = await has_smm_firmware(self.monitor)
        return self._has_smm and await run_state(self.monitor) not in ("prelaunch", "inmigrate")

    async def is_hotplug_legacy(self) -> bool:
        """Return whether the guest is still in the legacy mode of its CPU hotplug block."""
        if not self._left_legacy:
            self._left_legacy = not await is_hotplug_legacy(self.monitor)
        return not self._left_legacy

    # -- pending unplugs --------------------------------------------------------------------------

    def learn(self) -> None:
        """Read what other processes have requested meanwhile, or have seen finish."""
        self._bus.emit(self._learn())
        self._state = mark(self.state, self.pending_unplugs.entity_ids)

    def ask(self, entities: Sequence[Entity]) -> None:
        """Remember these unplugs. Called before `device_del` is sent."""
        now = time.time()
        self.pending_unplugs.ask(entities, self.state, now)
        # While QEMU works there is time to check for cgroups that would be left behind. This runs
        # two turns of the loop from now, because `device_del` is sent in the next one.
        loop = asyncio.get_running_loop()
        loop.call_soon(
            loop.call_soon, self._look_for_groups, [n for one in entities for n in one.ids]
        )
        if self._bus.listening:
            self._bus.emit(_events(now, EventKind.UNPLUG_REQUESTED, entities))

    def check(self) -> None:
        """Raise VcpuConnectionError if the connection is lost."""
        if self._lost is not None:
            raise self._lost

    def watch(self) -> None:
        """Start regular queries, which run while there is a listener or something is pending."""
        self._watcher.start()

    def drop_groups(self, ids: Iterable[int]) -> bool:
        """Remove the cgroups of those of these vCPUs that have left. Return whether all are
        removed.
        """
        self._ungrouped.update(ids)
        enabled = self.state.enabled_ids
        self._ungrouped.difference_update(enabled, self._groupless)
        self._groupless.clear()
        if self._ungrouped and self.threads is not None:
            self._ungrouped = set(self.threads.remove_groups(self._ungrouped, enabled))
        return not self._ungrouped or self.threads is None

    # -- inside -----------------------------------------------------------------------------------

    def _note_run(self, run: str | None) -> None:
        """A guest that runs, or was never started, cannot migrate without an event. A paused guest
        can, because there is no STOP. A QEMU whose guest has left still accepts a device_add, but
        nothing ever uses the new vCPU.
        """
        self.seen_run_state = run
        self.may_be_migrating |= run not in _AT_HOME

    def _look_for_groups(self, ids: Iterable[int]) -> None:
        self._groupless = (
            set(ids) if self.threads is not None and not self.threads.has_groups() else set()
        )

    def _learn(self, *, is_first: bool = False) -> list[Event]:
        opened, finished = self.pending_unplugs.refresh(self.state)
        self.stale |= self.pending_unplugs.undecided
        found: list[Event] = []
        for unplug in opened:
            found += _events(
                unplug.requested or time.time(),
                EventKind.UNPLUG_REQUESTED,
                [self.state.by_id[unplug.entity_id]],
            )
        for unplug in finished:
            removed = self.state.by_id.get(unplug.entity_id)
            if removed is None:
                continue
            self._ungrouped.update(removed.ids)
            if is_first:
                self._departures.forget(unplug.qom_path)
            if is_first or not self.monitor.hears_all:
                # Later, QEMU's own event reports it.
                found += _events(
                    time.time(),
                    EventKind.REMOVED,
                    [removed],
                    "it was removed while nobody listened",
                )
        return found

    async def _watch(self) -> None:
        async with self._queue:
            self.learn()
            await self.look()
        if self._bus.listening and self.guest is not None:
            # The agent is queried outside of the queue, because a missing agent takes time.
            await self.guest.try_view(self.state)
            if not self._queue.locked():
                # The agent's socket takes one client at a time, and another process may need it
                # before the next query.
                await self.guest.close()

    def _keep(self, state: DomainState, heard: int = 0, sent_at: float = 0.0) -> DomainState:
        """Keep a fresh state and emit its events. `heard` is the count of `_departures` when the
        query was sent, at `sent_at`.
        """
        before = self.state
        self.pending_unplugs.seen_at = max(self.pending_unplugs.seen_at, sent_at)
        if state.threads_shared is None:
            # A single vCPU does not show whether threads are shared; what was seen with two is
            # still true.
            state = replace(state, threads_shared=before.threads_shared)
        if before is not state:
            found = changes(before, state, time.time())
            removed = [event for event in found if event.event is EventKind.REMOVED]
            self.removals_seen += len(removed)
            if removed and state.accel == "tcg":
                # Each removed vCPU has used up a TCG context. QEMU has few of these, and some
                # versions can then no longer be migrated.
                left = [before.vcpus[number] for event in removed for number in event.vcpus]
                self.pending_unplugs.note_contexts(
                    UsedContexts(frozenset((v.id, v.thread_id or 0) for v in left))
                )
            self._ungrouped.update(number for event in removed for number in event.vcpus)
            added = [event for event in found if event.event is EventKind.ADDED]
            self.pending_unplugs.note_back([number for event in added for number in event.vcpus])
            if unseen := self._departures.decide(before, state, heard, has_removed=bool(removed)):
                found = [*removed, *unseen, *added]
        else:
            found = unseen = self._departures.decide(before, state, heard, has_removed=False)
        self.removals_seen += sum(event.event is EventKind.REMOVED for event in unseen)
        self._bus.emit(found)
        self.pending_unplugs.end_finished(state, self.in_flight)
        self._state = state
        if self.pending_unplugs.undecided:
            self._bus.emit(self._learn())
        self._state = mark(state, self.pending_unplugs.entity_ids)
        if self._ungrouped and not self.in_flight:
            # While an operation is in flight, it makes groups for the vCPUs that it plugs.
            self.drop_groups(())
        return self._state

    def _sink(self, event: MonitorEvent | VcpuConnectionError) -> None:
        if isinstance(event, VcpuConnectionError):
            self._lost = event
            self._bus.end(event)
            return
        if event.name in _RUN_EVENTS:
            # The guest may be migrating, so the next call checks.
            self.stale = self.may_be_migrating = True
            self.seen_run_state = None
        if event.name == "RESET":
            self._left_legacy = False
        if event.name not in CPU_EVENTS:
            return
        own = (
            self._state is None
            or self._state.accel != "tcg"
            or not architecture(self._state.arch).has_apic
        )
        self._departures.hear(event.name, event.data, event.time or time.time(), own=own)
        self.stale = True
        if self._state is not None:
            self._hear(event, self._state)

    def _hear(self, event: MonitorEvent, state: DomainState) -> None:
        """Handle an event of CPUs, for pending unplugs and for listeners."""
        known = self.pending_unplugs.entity_ids
        if self._bus.listening:
            # The process that requested the unplug has stored it, and may remove it as soon as it
            # sees this event itself.
            self.learn()
        pending = self.pending_unplugs.entity_ids
        if not self._bus.listening and self.in_flight >= pending:
            return
        if self._names is None or self._names[0] is not state:
            self._names = state, Names(state.entities)
        signal = interpret(event.name, event.data, self._names[1])
        if signal is None:
            return
        by_id = state.by_id
        when = event.time or time.time()
        if signal.kind is SignalKind.GUEST_REFUSED and signal.entity_id is not None:
            self.pending_unplugs.end({signal.entity_id} - self.in_flight)
            self._bus.emit(
                _events(when, EventKind.REMOVAL_FAILED, [by_id[signal.entity_id]], signal.reason)
            )
        elif signal.kind is SignalKind.RESET and architecture(state.arch).reset_drops_unplug:
            self.pending_unplugs.end(pending - self.in_flight)
            # Unplugs that left the store since the last query were removed because of this reset.
            dropped = [by_id[first] for first in sorted(known | pending)]
            self._bus.emit(_events(when, EventKind.REMOVAL_FAILED, dropped, signal.reason))
        elif signal.kind is SignalKind.EJECTING and signal.entity_id is not None:
            self._bus.emit(_events(when, EventKind.EJECTING, [by_id[signal.entity_id]]))
        self._watcher.poke()


async def open_session(
    name: str,
    addresses: Sequence[str],
    opener: Opener,
    bus: EventBus,
    queue: asyncio.Lock,
    before: Session | None = None,
    reads: Reads = open_reader,
) -> Session:
    """Connect to the first free address, and read everything once.

    Raises:
        VcpuConnectionError: no address answers, or the answer is not QEMU's.
    """
    session = Session(await first_free(addresses, opener), bus, queue, reads)
    try:
        await session.open(name, before)
    except BaseException:
        await aio.finish(session.close())
        raise
    return session


async def _answer(query: Callable[[], Awaitable[object]]) -> object:
    """Send the query when the task runs, so that simultaneous queries are sent together."""
    return await query()


def _threads(state: DomainState) -> frozenset[int]:
    return frozenset(vcpu.thread_id for vcpu in state.vcpus if vcpu.thread_id is not None)


def _events(
    when: float, kind: EventKind, entities: Iterable[Entity], detail: str | None = None
) -> list[Event]:
    return [Event(when, kind, (number,), detail) for entity in entities for number in entity.ids]


def store_of(process: Process | None) -> PendingFolder | None:
    """Return the store of pending unplugs for the next process."""
    if process is not None:
        with suppress(RuntimeError):  # there is no home folder
            return PendingFolder(process)
    return None


def _same_guest(one: Session, other: Session) -> bool:
    """Whether both sessions belong to the same QEMU. The pending unplugs of one QEMU do not concern
    another.
    """
    states = one.state, other.state
    if one.process is not None and other.process is not None:
        ids = [[entity.ids for entity in state.entities] for state in states]
        return one.process == other.process and ids[0] == ids[1]
    if one.monitor.run_id != other.monitor.run_id:
        return False
    machines = [
        (state.machine, state.version, [(entity.ids, entity.props) for entity in state.entities])
        for state in states
    ]
    return machines[0] == machines[1]
