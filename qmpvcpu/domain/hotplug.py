"""Carry out the `device_add` and `device_del` part of a plan, and remember unplugs that have not
finished.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final

from qmpvcpu.aio import wind_up
from qmpvcpu.core.arch import architecture
from qmpvcpu.core.engine.messages import Moves, Result, Snapshot, Terms
from qmpvcpu.core.engine.report import Report
from qmpvcpu.core.engine.transaction import Transaction
from qmpvcpu.core.model import format_ids
from qmpvcpu.core.rules import hotplug
from qmpvcpu.domain.drive import Drive
from qmpvcpu.domain.interrupted import Interrupted, leaves, leaving
from qmpvcpu.domain.planned import Planned
from qmpvcpu.domain.reader import lacks_acpi, run_state
from qmpvcpu.domain.session import Session
from qmpvcpu.errors import VcpuConnectionError

logger = logging.getLogger("qmpvcpu.domain.hotplug")

_NO_ACPI: Final = (
    "this machine has no ACPI (acpi=off): only firmware that drives CPU hotplug can answer"
)


class Hotplug:
    """The part of one request that QEMU carries out."""

    def __init__(self, session: Session, planned: Planned, timeout: float) -> None:
        self._session = session
        self._planned = planned
        plan, state = planned.plan, planned.state
        self._moves = Moves(
            plan.plugs, plan.unplugs, plan.awaited, session.pending_unplugs.entity_ids
        )
        #: When each awaited unplug was requested, if that is known.
        self._since = {
            entity.id: session.pending_unplugs.requested_at(entity.id) for entity in plan.awaited
        }
        terms = Terms(
            timeout,
            wait=plan.request.wait,
            atomic=plan.request.atomic,
            retries=plan.request.retry,
            reset_drops_unplug=architecture(state.arch).reset_drops_unplug,
        )
        self._drive = Drive(
            Transaction(self._moves, terms), session.monitor, self._make_snapshot, session.ask
        )

    @property
    def plugs(self) -> frozenset[int]:
        """Ids of the vCPUs that this plugs."""
        return frozenset(
            number for entity in (*self._moves.awaited, *self._moves.plugs) for number in entity.ids
        )

    async def run(self, report: Report) -> None:
        """Carry out the plan, and add the results to the report."""
        try:
            result = await self._result_of(self._drive.run)
            # The transaction is no longer in flight: a guest's answer that arrives now ends the
            # unplug.
            with leaves(lambda: _left(result)):
                stopped, notes = await self._why_pending(result)
        except VcpuConnectionError as error:
            report.lost(error, self._drive.result)
        except asyncio.CancelledError as error:
            raise leaving(error, _left(self._drive.result)) from error
        else:
            report.hotplugged(
                result,
                stopped=stopped,
                reset_drops=architecture(self._planned.state.arch).reset_drops_unplug,
                notes=notes,
            )

    async def take_back(self) -> Interrupted:
        """Unplug the vCPUs that a cancelled call has plugged. A second cancel stops this.

        Returns:
            The changes that remain.
        """
        ids = sorted(self.plugs.intersection(self._drive.result.changed))
        if not ids:
            return Interrupted()
        failure = await wind_up(self._result_of(self._drive.take_back))
        if isinstance(failure, Exception):
            logger.warning("cancelled, and vCPU %s stays plugged: %s", format_ids(ids), failure)
        self._session.drop_groups(ids)
        vcpus = self._session.state.vcpus
        return Interrupted(
            changed_ids=tuple(n for n in ids if vcpus[n].enabled and not vcpus[n].pending)
        )

    async def _result_of(self, drive: Callable[[], Coroutine[Any, Any, None]]) -> Result:
        """While the transaction is in flight, only it decides what becomes of its entities."""
        session = self._session
        session.in_flight = frozenset(entity.id for entity in self._moves.entities)
        try:
            await drive()
        finally:
            session.in_flight = frozenset()
            result = self._drive.result
            self._remember(result)
        return result

    def _remember(self, result: Result) -> None:
        """Remember pending unplugs for the next call and the next process."""
        session = self._session
        pending = session.pending_unplugs.entity_ids
        if open_still := [entity for entity in result.pending_entities if entity.id not in pending]:
            session.pending_unplugs.ask(open_still, session.state, time.time())
        session.pending_unplugs.end(result.removed_entities, removed=True)
        session.pending_unplugs.end(result.finished_entities)
        # An unplug that a cancelled call left pending may have finished before its last query.
        session.pending_unplugs.end_finished(session.state)
        session.watch()

    async def _make_snapshot(
        self, *, is_last: bool, resent: Callable[[], object], declined: Collection[int]
    ) -> Snapshot:
        session, planned, known = self._session, self._planned, self._planned.known
        request = planned.plan.request
        now = await session.look(is_last=is_last, before_retry=resent, declined=declined)
        restore_forbidden = None
        if request.atomic and not request.force:
            removed = [now.by_id[e.id] for e in self._moves.unplugs if not now.by_id[e.id].plugged]
            restore_forbidden = hotplug.restore_forbidden(
                now, removed, session.knowledge(known.x2apic, known.firmware_runs)
            )
        return Snapshot.of(
            now, planned.state, self._moves, hotplug.undo_forbidden(now, known), restore_forbidden
        )

    async def _why_pending(self, result: Result) -> tuple[str | None, list[str]]:
        """Return the run state if the guest is stopped, and further messages about pending
        unplugs.
        """
        session = self._session
        if not result.pending:
            return None, []
        status = await run_state(session.monitor)
        notes = []
        if earlier := [self._since[first] for first in self._since if first in result.pending]:
            known = [asked for asked in earlier if asked is not None]
            when = f" {time.time() - min(known):.0f} s ago" if known else " earlier"
            notes.append(
                f"the unplug was requested{when}, and its end was not seen: if the guest refused"
                " it, or was reset, while nobody listened, request it again (--disable)"
            )
        if session.pending_unplugs.trouble is not None:
            notes.append(
                f"only this process knows that it is pending: {session.pending_unplugs.trouble}"
            )
        if architecture(self._planned.state.arch).has_apic and await lacks_acpi(session.monitor):
            notes.append(_NO_ACPI)
        return (None if status in (None, "running") else status), notes


def _left(result: Result) -> Interrupted:
    """What a cancelled transaction has left. The session adds the pending unplugs."""
    return Interrupted(changed_ids=result.changed, unsure_ids=result.unsure)
