"""The persistent side of one domain: its definition is read, planned on, and replaced as a
whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from threading import Event as Flag

from qmpvcpu import xml as documents
from qmpvcpu.aio import finish
from qmpvcpu.core.definition import Definition
from qmpvcpu.core.engine.report import Report
from qmpvcpu.core.engine.timers import UNDO_SECONDS
from qmpvcpu.core.model import format_ids
from qmpvcpu.core.planning.config import ConfigPlan, plan_config, plan_pin
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain.interrupted import Interrupted, leaving
from qmpvcpu.errors import (
    OutcomeKind,
    Refusal,
    VcpuConnectionError,
    VcpuError,
    VcpuPartial,
    VcpuRefused,
)
from qmpvcpu.host.definition_files import not_written
from qmpvcpu.ports import DefinitionStore, Staged

#: Runs a blocking function outside the event loop.
Runs = Callable[[Callable[[], None]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Version:
    """A document, and the definition parsed from it."""

    data: bytes
    definition: Definition


class DefinitionHandle:
    """The definition of one domain."""

    def __init__(self, store: DefinitionStore, runs: Runs = asyncio.to_thread) -> None:
        self._store = store
        self._runs = runs
        self._last: _Version | None = None

    @property
    def place(self) -> str:
        """Where the definition is stored."""
        return self._store.place

    def read(self) -> bytes:
        """Return the document. Raises VcpuRefused."""
        return self._store.read()

    def definition(self) -> Definition:
        """Return the parsed definition.

        Raises:
            VcpuRefused: it does not exist, or contradicts itself; every reason is listed with its
                line.
        """
        return self._version(self._store.read()).definition

    def plan(self, request: Request, ids: Sequence[int] | None = None) -> ConfigChange:
        """Plan what `request` changes in the definition; nothing is written."""
        return self._change(
            lambda definition: plan_config(definition, request, ids), self._store_for(request)
        )

    def _store_for(self, request: Request) -> DefinitionStore:
        """Return the store that the result of `request` is written to."""
        return self._store

    def plan_pin(self, vcpu_id: int, cpus: tuple[int, ...] | None) -> ConfigChange:
        """Plan how pinning one vCPU changes the definition; nothing is written."""
        return self._change(lambda definition: plan_pin(definition, vcpu_id, cpus))

    def _change(
        self, make: Callable[[Definition], ConfigPlan], store: DefinitionStore | None = None
    ) -> ConfigChange:
        version = self._version(self._store.read())
        plan, after = _made(version.data, make(version.definition))
        return ConfigChange(
            store or self._store, version.data, after, plan, self._remaker(make), self._off_the_loop
        )

    async def _off_the_loop(self, work: Callable[[], None], given_up: Flag) -> None:
        """Keep slow disks away from the event loop. If the call is cancelled, work that has begun
        is finished first, so that it is never left half done; but the wait for it is limited.
        """
        await finish(self._runs(work), within=UNDO_SECONDS, on_cancel=given_up.set)

    def _remaker(
        self, make: Callable[[Definition], ConfigPlan]
    ) -> Callable[[bytes], tuple[bytes, ConfigPlan]]:
        def remake(data: bytes) -> tuple[bytes, ConfigPlan]:
            plan, after = _made(data, make(self._version(data).definition))
            if plan.refusals:
                raise VcpuRefused(plan.refusals, ids=plan.targets)
            return after, plan

        return remake

    def _version(self, data: bytes) -> _Version:
        if self._last is not None and self._last.data == data:
            return self._last
        try:
            self._last = _Version(data, documents.read_domain(data)[1])
            return self._last
        except VcpuRefused as error:
            # The error names the file that its line belongs to.
            raise error.at(self.place) from error


def _made(data: bytes, plan: ConfigPlan) -> tuple[ConfigPlan, bytes]:
    """Return a plan, and the document of `plan.old` with the vCPUs of `plan.new`.

    A result that could not be read back is refused before it is written.
    """
    if plan.refusals or not plan.writes:
        return plan, data
    document, _ = documents.read_domain(data)
    after = documents.write_vcpus(document, plan.old, plan.new)
    try:
        reread = documents.read_domain(after)[1]
    except VcpuRefused as error:
        return replace(plan, refusals=tuple(_unreadable(one) for one in error.refusals)), data
    new = plan.new
    assert (reread.enabled_ids, reread.maxcpus, reread.pins) == (
        new.enabled_ids,
        new.maxcpus,
        new.pins,
    )
    return plan, after


def _unreadable(refusal: Refusal) -> Refusal:
    return replace(catalogue.UNREADABLE(refusal.ids, why=refusal.message), libvirt=refusal.libvirt)


class ConfigChange:
    """One change of a definition: planned, then staged, then committed or discarded."""

    def __init__(
        self,
        store: DefinitionStore,
        before: bytes,
        after: bytes,
        plan: ConfigPlan,
        remake: Callable[[bytes], tuple[bytes, ConfigPlan]],
        runs: Callable[[Callable[[], None], Flag], Awaitable[None]],
    ) -> None:
        self.plan = plan
        self.before = before
        #: The document after the change.
        self.after = after
        self._store = store
        self._remaker = remake
        self._runs = runs
        self._staged: Staged | None = None

    @property
    def place(self) -> str:
        """Where the definition is stored."""
        return self._store.place

    @property
    def diff(self) -> tuple[str, ...]:
        """The document before and after, as a unified diff."""
        return documents.unified_diff(self.before, self.after, "definition")

    async def stage(self) -> None:
        """Write the new definition next to the old one, so that any obstacle shows before the
        change.

        Raises:
            OSError: it cannot be written; nothing has changed.
        """
        if not self.plan.writes:
            return
        given_up = Flag()

        def stage() -> None:
            staged = self._store.stage(self.after)
            if given_up.is_set():
                staged.discard()
            else:
                self._staged = staged

        await self._runs(stage, given_up)

    async def commit(self) -> None:
        """Put the new definition in place. If another process has changed the definition meanwhile,
        the result contains both changes.

        Raises:
            OSError: the definition could not be written and is unchanged.
            VcpuRefused: the other process's change does not allow this one; the definition keeps
                that change.
            VcpuError: the store of the definition failed; the error says what became of the
                definition.
        """
        staged, self._staged = self._staged, None
        if staged is None:
            return
        given_up, has_begun, is_written, has_ended = Flag(), Flag(), Flag(), Flag()

        def remake(data: bytes) -> bytes:
            made, self.plan = self._remaker(data)
            return made

        def commit() -> None:
            has_begun.set()
            try:
                staged.commit(self.before, remake, given_up.is_set)
                is_written.set()
            finally:
                has_ended.set()
                staged.discard()

        try:
            await self._runs(commit, given_up)
        except asyncio.CancelledError as error:
            raise leaving(
                error,
                Interrupted(
                    definition_unsure=has_begun.is_set() and not has_ended.is_set(),
                    definition_written=is_written.is_set(),
                ),
            ) from error

    def discard(self) -> None:
        """Leave the definition as it is. Never raises."""
        staged, self._staged = self._staged, None
        if staged is not None:
            staged.discard()


async def follow(change: ConfigChange, report: Report, *, failure: str) -> None:
    """Commit the definition, if the guest's side has succeeded.

    Args:
        change: a staged change.
        report: the report of the guest's side; the result for the definition is added to it.
        failure: what was done to the guest if the definition cannot follow; `{}` is the vCPU ids.
    """
    if report.has_failed():
        if change.plan.writes and report.outcome not in (OutcomeKind.REFUSED, OutcomeKind.PARTIAL):
            report.messages.append("the definition is as it was")
        return
    # Plugged vCPUs stay plugged, whether or not the guest already runs on them.
    if report.outcome is not OutcomeKind.APPLIED and not (
        report.pending_online and not report.pending
    ):
        if change.plan.writes:
            report.messages.append(
                f"the definition was not written, because the live change is {report.outcome}: once"
                " that has ended, repeat the call with --config (CONFIG) alone"
            )
        return
    live = tuple(sorted(report.changed))
    try:
        await change.commit()
    except asyncio.CancelledError as error:
        raise leaving(error, Interrupted(changed_ids=live)) from error
    except (OSError, VcpuError) as error:
        report.failed(
            _half_done(error, change.place, failure.format(format_ids(live)), live), cause=error
        )
    else:
        report.defined(change.plan.targets, change.plan.changed, written=change.plan.writes)


def _half_done(
    error: OSError | VcpuError, place: str, what: str, changed: tuple[int, ...]
) -> VcpuError:
    """Return the error to report when the guest's side succeeded and the definition could not
    follow. If `changed` is empty, the guest was not touched.
    """
    if isinstance(error, VcpuError) and not isinstance(error, VcpuRefused):
        if not changed:
            return error
        text, hint = (
            f"live, {what} and stays so; {error.message}",
            "look at both: vcpuinfo, vcpuinfo --config",
        )
        if isinstance(error, VcpuConnectionError):
            text += "; whether the definition was written is not known"
            return VcpuConnectionError(
                text, address=error.address, reason=error.reason, hint=hint, libvirt=error.libvirt
            )
        return VcpuPartial(text, remaining=changed, hint=hint, libvirt=error.libvirt)
    refusals = error.refusals if isinstance(error, VcpuRefused) else (not_written(place, error),)
    if not changed:
        return VcpuRefused(refusals)
    why = "; ".join(refusal.message for refusal in refusals)
    text = f"live, {what} and stays so; {why}, and is as it was"
    return VcpuPartial(text, remaining=changed, hint="repeat the call with --config (CONFIG) alone")
