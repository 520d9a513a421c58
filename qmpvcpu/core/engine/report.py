"""What a request has done so far, and the one place that makes its `Outcome` or raises its
`VcpuError`. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from qmpvcpu.core.engine.agent_switch import Switch
from qmpvcpu.core.engine.messages import Failure, Result
from qmpvcpu.core.model import DomainState, Outcome, Vcpu, format_ids, grouped
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.core.rules.placement import ThreadState, with_thread
from qmpvcpu.core.state.guest_view import GuestView, with_online
from qmpvcpu.errors import (
    OutcomeKind,
    VcpuConnectionError,
    VcpuError,
    VcpuFailed,
    VcpuPartial,
    VcpuRefused,
    VcpuRejected,
)

_LOOK: Final = "`qmpvcpu vcpuinfo` shows the state of each vCPU"


def queried(state: DomainState, ids: Sequence[int], seconds: float) -> Outcome:
    """The answer to a query."""
    return Outcome(OutcomeKind.QUERIED, tuple(ids), _rows(state, ids), seconds=seconds)


class Report:
    """What one request has done so far: facts are added while it runs, and `end` returns the
    outcome or raises.

    Attributes:
        ids: the vCPU ids that the request is about (the guest's own ids, if it uses those).
        changed: ids that it has changed.
        pending: ids whose unplug was requested and has not ended.
        undone: ids that it has changed and set back.
        pending_online: ids that are plugged, but that the guest is not known to run on.
        messages: further lines for the user.
        trouble: the error that the request will raise, still without these facts.
        view: the guest's latest view of its own CPUs.
        already: lines for the user about what already was as requested.
    """

    def __init__(self, ids: Iterable[int], plan: Plan | None = None) -> None:
        self.ids = tuple(ids)
        self.changed: set[int] = set()
        self.pending: tuple[int, ...] = ()
        self.undone: set[int] = set()
        self.pending_online: tuple[int, ...] = ()
        self.messages: list[str] = [] if plan is None else [*plan.messages]
        self.trouble: VcpuError | None = None
        self._cause: BaseException | None = None
        self.view: GuestView | None = None
        self._outcome = OutcomeKind.APPLIED
        self._mechanism: str | None = None
        self.already: tuple[str, ...] = ()
        self._threads: dict[int, ThreadState] = {}
        self._later_rows: dict[int, Vcpu] = {}
        self._config: dict[str, Any] = {}

    # -- what is so -------------------------------------------------------------------------------

    @property
    def outcome(self) -> OutcomeKind:
        """The outcome if it ended now."""
        return self._outcome if self.trouble is None else self.trouble.outcome

    def has_failed(self) -> bool:
        """Whether it ends in an error."""
        return self.trouble is not None

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that every outcome and every error has."""
        return {
            "ids": self.ids,
            "changed_ids": tuple(sorted(self.changed)),
            "pending": self.pending,
            "undone": tuple(sorted(self.undone)),
            "messages": tuple(self.messages),
            "mechanism": self._mechanism,
        }

    def end(self, state: DomainState | None, seconds: float) -> Outcome:
        """Return what the caller gets.

        Args:
            state: the running guest's; None where the guest's CPUs are named by its own ids.
            seconds: how long the call took.

        Raises:
            VcpuError: it ended in one.
        """
        seconds = round(seconds, 6)
        if self.trouble is not None:
            raise self.trouble.having(**self.facts, seconds=seconds) from self._cause
        return Outcome(
            self._outcome,
            rows=self._rows(state) if state is not None else (),
            pending_online=self.pending_online,
            already=self.already,
            seconds=seconds,
            **self.facts,
            **self._config,
        )

    def _rows(self, state: DomainState) -> tuple[Vcpu, ...]:
        if self.view is not None:
            state = with_online(state, self.view)
        rows = {row.id: row for row in _rows(state, self.ids)}
        rows |= {
            n: with_thread(rows[n], thread) for n, thread in self._threads.items() if n in rows
        }
        return tuple((rows | self._later_rows).values())

    # -- facts ------------------------------------------------------------------------------------

    def found_unchanged(self, plan: Plan) -> None:
        """By this plan everything already is as requested."""
        self.ids, self.messages = plan.targets, [*plan.messages]
        self.changed, self.pending, self.undone = set(), (), set()
        self.trouble = self._mechanism = None
        self._outcome = OutcomeKind.APPLIED
        self.already = tuple(plan.already())

    def failed(self, error: VcpuError, cause: BaseException | None = None) -> None:
        """The request ends in this error, whose own facts are added."""
        self.trouble, self._cause = error, cause or error
        self.changed |= {*error.changed_ids}
        self.messages += error.messages

    def hotplugged(
        self, result: Result, *, stopped: str | None, reset_drops: bool, notes: Sequence[str] = ()
    ) -> None:
        """The transaction in QEMU has ended.

        Args:
            result: of the transaction.
            stopped: the run state if the guest does not run.
            reset_drops: whether a reset drops what is pending.
            notes: further messages.
        """
        self._add(result)
        self._outcome = result.outcome
        if result.kept:
            self.messages.append(
                f"vCPU {format_ids(result.kept)}: its pending unplug did not happen, or another"
                " client plugged it again: it stays enabled"
            )
        self.messages += notes
        if result.not_requested:
            self.messages.append(_not_requested(result))
        if result.pending and stopped:
            self.messages.append(_stopped(stopped, drops=reset_drops))
        if result.outcome in (OutcomeKind.PARTIAL, OutcomeKind.FAILED):
            self.trouble = _failure(result)
        elif result.outcome is OutcomeKind.REJECTED:
            self.trouble = VcpuRejected(
                _texts(result.rejections) + _also(result),
                reasons={failure.entity.id: failure.text for failure in result.rejections},
                hint="look at the guest's kernel log, and try again: some refusals are temporary",
            )

    def lost(self, error: VcpuConnectionError, result: Result) -> None:
        """The connection was lost while the transaction in QEMU was under way."""
        self._add(result)
        way = "; ".join(f"vCPU {format_ids(ids)}: {what}" for what, ids in result.stages.items())
        self.trouble = VcpuConnectionError(
            f"{error.message}. State when the connection was lost: {way}",
            address=error.address,
            reason=error.reason,
            hint=error.hint,
            libvirt=error.libvirt,
        )
        self._cause = error

    def _add(self, result: Result) -> None:
        self._mechanism = "hotplug"
        self.changed |= {*result.changed}
        self.pending = result.pending
        self.undone |= {*result.undone}

    def placed(self, threads: Mapping[int, ThreadState], late: Sequence[int]) -> None:
        """The threads of these vCPUs are placed; of `late`, which were enabled before, only now."""
        self._threads.update(threads)
        if late and self.trouble is None:
            self.changed |= {*late}
            self.messages.append(f"vCPU {format_ids(late)} was already enabled, and is placed now")

    def not_placed(self, failed: Mapping[str, Sequence[int]]) -> None:
        """These vCPUs are plugged, but their threads could not be placed: the reason -> ids."""
        text = "; ".join(
            f"vCPU {format_ids(ids)} could not be given {why}" for why, ids in failed.items()
        )
        if self.trouble is not None:
            self.messages.append(text)
            return
        self.trouble = VcpuPartial(
            f"{text}; it stays plugged",
            remaining=[number for ids in failed.values() for number in ids],
            hint="repeat the request to place it; --no-place (place=False) leaves it where the"
            " kernel puts it",
        )

    # -- the guest agent --------------------------------------------------------------------------

    def tries_the_agent(self) -> None:
        """The guest refused an unplug, and is to take the CPU offline instead."""
        assert self.trouble is not None
        self.messages.append(f"hotplug failed: {self.trouble.message}")
        self.trouble = None
        self._outcome = OutcomeKind.PENDING if self.pending else OutcomeKind.APPLIED

    def switched(self, run: Switch, name: str = "vCPU") -> None:
        """The guest agent has switched CPUs, or has not; `name` is what the ids of `run` stand
        for.
        """
        before = bool(self.changed)
        self.changed |= {*run.changed}
        self.undone |= {*run.undone}
        if not run.failures:
            if run.changed or not before:
                self._mechanism = "agent"
            return
        self._mechanism = "agent"
        text = "; ".join(f"{name} {number}: {reason}" for number, reason in run.failures.items())
        if run.undone:
            text += f"; undone: {name} {format_ids(run.undone)}"
        if self.changed:
            text += f"; {name} {format_ids(sorted(self.changed))} stays changed"
            text += "".join(
                f" ({name} {number}: {reason})" for number, reason in run.undo_failures.items()
            )
            self.trouble = VcpuPartial(text, remaining=sorted(self.changed), hint=_LOOK)
        else:
            self.trouble = VcpuRejected(
                text,
                reasons=dict(run.failures),
                hint="`dmesg` in the guest may say why; then try again",
            )

    def agent_did_not_either(self, rejected: VcpuRejected, messages: Sequence[str]) -> None:
        """The guest refused an unplug, and did not take the CPU offline; `messages` are those
        before that.
        """
        assert self.trouble is not None
        self.messages = [*messages, f"the guest agent failed too: {self.trouble.message}"]
        self.trouble = self._cause = rejected
        self._mechanism = "hotplug"

    def agent_failed(self, ids: Sequence[int], error: VcpuError) -> None:
        """The guest agent could not be reached to switch these, or its answer was lost."""
        self.messages += error.messages
        self.trouble = self._cause = error
        if isinstance(error, VcpuRefused) and not (self.changed or self.pending):
            return
        self._mechanism = "agent"
        if not isinstance(error, VcpuRefused):
            self.messages.append(f"the state of vCPU {format_ids(ids)} in the guest is not known")
            return
        text = f"vCPU {format_ids(ids)}: {error.message}"
        fields: dict[str, Any] = {"hint": error.hint, "libvirt": error.libvirt}
        if not self.changed:
            self.trouble = VcpuRejected(text, reasons=dict.fromkeys(ids, error.message), **fields)
        else:
            text += f"; vCPU {format_ids(sorted(self.changed))} stays changed"
            self.trouble = VcpuPartial(text, remaining=sorted(self.changed), **fields)

    def is_not_online(self, ids: Iterable[int]) -> None:
        """These are plugged, but the guest is not known to run on them."""
        self._outcome, self.pending_online = OutcomeKind.PENDING, tuple(sorted(ids))

    # -- the definition, and a second run ---------------------------------------------------------

    def defined(self, targets: Iterable[int], changed: tuple[int, ...], *, written: bool) -> None:
        """The definition has taken effect."""
        self._config = {
            "live_changed_ids": tuple(sorted(self.changed)),
            "config_changed_ids": changed,
            "defined": written,
        }
        self.ids = tuple(sorted({*self.ids, *targets}))
        self.changed |= {*changed}

    def goes_on(self, state: DomainState, after: Outcome | VcpuError) -> None:
        """A second run was needed: `after` is how it ended, and `state` is fresh."""
        removed = {number for number in self.pending if not state.vcpus[number].enabled}
        before = tuple(sorted(self.changed))
        self.ids = tuple(sorted({*self.ids, *after.ids}))
        self.changed |= {*removed, *after.changed_ids}
        self.pending = tuple(sorted({*(set(self.pending) - removed), *after.pending}))
        self.undone |= {*after.undone}
        self.messages = list(dict.fromkeys((*self.messages, *after.messages)))
        if isinstance(after, Outcome):
            self._outcome = self._outcome if self.pending and not after.pending else after.outcome
            self._mechanism = after.mechanism or self._mechanism
            self.pending_online = after.pending_online
            self.already = after.already
            # The list from before says nothing of vCPUs that the second run did not name.
            self.view = None
            self._later_rows = {row.id: row for row in after.rows}
            return
        self.trouble = self._cause = after
        if isinstance(after, VcpuPartial):
            self.trouble = after.having(remaining=tuple(sorted({*before, *after.remaining})))
        elif isinstance(after, VcpuRefused | VcpuFailed) and (self.changed or self.pending):
            changed = tuple(sorted(self.changed))
            text = after.message
            text += f"; vCPU {format_ids(changed)} stays changed" if changed else ""
            text += (
                f"; the unplug of vCPU {format_ids(self.pending)} is pending"
                if self.pending
                else ""
            )
            self._mechanism = "hotplug"
            self.trouble = VcpuPartial(
                text, remaining=changed, hint=after.hint, libvirt=after.libvirt
            )


def still_plugged(ids: Sequence[int]) -> str:
    """The warning where the agent did what hotplug could not."""
    return (
        f"vCPU {format_ids(ids)} is offline in the guest and still plugged: the guest can bring"
        " it back by itself"
    )


def _stopped(run_state: str, *, drops: bool) -> str:
    """Why a stopped guest cannot answer, and what would let it run."""
    if run_state in _NEEDS_RESET:
        text = f"the guest has ended ({run_state}): QEMU refuses 'cont' until a reset"
        return f"{text}, which drops the request" if drops else text
    what = _LETS_IT_RUN.get(run_state, "'cont'")
    return f"the guest is stopped ({run_state}): it can answer only after {what}"


#: QAPI RunState: what lets the guest run, where that is not `cont`.
_LETS_IT_RUN: Final = {
    "inmigrate": "the incoming migration",
    "suspended": "'system_wakeup'",
    "postmigrate": "'cont', or at the destination",
    "finish-migrate": "the migration",
    "restore-vm": "the snapshot is loaded",
    "save-vm": "the snapshot is saved",
}
#: QAPI RunState: "Resetting the Virtual Machine is required" (7.2 to 11.1).
_NEEDS_RESET: Final = frozenset({"shutdown", "internal-error"})


def _failure(result: Result) -> VcpuError:
    first = next(iter(result.failures or result.rejections), None)
    text = _texts((*result.failures, *result.rejections))
    if not text and result.not_requested:
        text = _not_requested(result)
    elif not text:
        # An atomic call plugged some back, and then the others were removed after all.
        is_late = result.undone and result.lost
        text = "not all of them were removed in time" if is_late else "cancelled"
    qmp: dict[str, Any] = {
        "qmp_class": first.error_class if first else None,
        "qmp_text": first.text if result.failures and first else None,
    }
    if first is not None and (first.error_class or "").startswith("VIR_ERR_"):
        # The error is libvirt's, not QEMU's.
        qmp["libvirt"] = first.error_class
    hint = _hint(result.failures)
    if first is None and result.not_requested:
        hint, qmp["libvirt"] = (
            "repeat the request for these, with a longer --timeout",
            "VIR_ERR_OPERATION_TIMEOUT",
        )
    if result.undone:
        text += f"; undone: vCPU {format_ids(result.undone)}"
    if result.outcome is OutcomeKind.FAILED:
        return VcpuFailed(text + _pending(result), hint=hint, **qmp)
    left = ((result.remaining, "stays plugged"), (result.removed, "stays removed"))
    texts = [f"vCPU {format_ids(ids)} {what}" for ids, what in left if ids]
    texts += [f"it was not undone because {result.undo_forbidden}"] if result.undo_forbidden else []
    return VcpuPartial(
        "; ".join([text + _pending(result), *texts]),
        remaining=sorted({*result.remaining, *result.removed}),
        hint=hint or _LOOK,
        **qmp,
    )


def _not_requested(result: Result) -> str:
    return (
        f"vCPU {format_ids(result.not_requested)}: its unplug was not requested: libvirt takes one"
        " at a"
        " time, and the others took all the time"
    )


def _hint(failures: Sequence[Failure]) -> str | None:
    text = " ".join(failure.text for failure in failures)
    return next((hint for words, hint in _HINTS if words in text), None)


#: QEMU's words (7.2 to 11.1) -> what to do next.
_HINTS = (
    ("Duplicate device ID", "another device has this id: remove it, or give it another id"),
    ("exists", "another client plugged it meanwhile: look with `qmpvcpu vcpuinfo`, and try again"),
    (
        "already populated",
        "another client plugged it meanwhile: look with `qmpvcpu vcpuinfo`, and try again",
    ),
    (
        "device unplug request for not supported device type",
        "boot a kernel with ACPI in the guest: it takes over the CPU hotplug block",
    ),
    ("SMI wasn't enabled by firmware", "use a newer OVMF: this one did not negotiate CPU hotplug"),
)


def _texts(failures: Sequence[Failure]) -> str:
    """One line; entities with the same reason together."""
    by_text = grouped(
        (failure.text, number) for failure in failures for number in failure.entity.ids
    )
    return "; ".join(f"vCPU {format_ids(ids)}: {text}" for text, ids in by_text.items())


def _also(result: Result) -> str:
    removed = f"; vCPU {format_ids(result.removed)} stays removed" if result.removed else ""
    undone = f"; undone: vCPU {format_ids(result.undone)}" if result.undone else ""
    return removed + undone + _pending(result)


def _pending(result: Result) -> str:
    return f"; vCPU {format_ids(result.pending)}: unplug still pending" if result.pending else ""


def _rows(state: DomainState, ids: Sequence[int]) -> tuple[Any, ...]:
    return tuple(state.vcpus[number] for number in ids if 0 <= number < len(state.vcpus))
