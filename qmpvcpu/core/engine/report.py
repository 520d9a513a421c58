"""What a finished transaction means: the `Outcome` to return, or the `VcpuError` to raise. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.engine.agent_switch import Switch
from qmpvcpu.core.engine.messages import Failure, Result
from qmpvcpu.core.model import DomainState, Outcome, Vcpu, format_ids
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.errors import OutcomeKind, VcpuError, VcpuFailed, VcpuPartial, VcpuRefused, VcpuRejected

__all__ = [
    "conclude",
    "interrupted",
    "queried",
    "still_plugged",
    "switched",
    "switched_ids",
    "unchanged",
    "went_on",
    "without_rejections",
]


def queried(state: DomainState, ids: Sequence[int], seconds: float) -> Outcome:
    """The answer to a query."""
    return Outcome(OutcomeKind.QUERIED, tuple(ids), _rows(state, ids), seconds=seconds)


def unchanged(state: DomainState, plan: Plan, seconds: float) -> Outcome:
    """Everything was already as asked."""
    return Outcome(
        OutcomeKind.APPLIED,
        plan.targets,
        _rows(state, plan.targets),
        messages=plan.messages,
        seconds=seconds,
        already=tuple(plan.already()),
    )


def still_plugged(ids: Sequence[int]) -> str:
    """What to say where the agent did what hotplug could not."""
    return (
        f"vCPU {format_ids(ids)} is offline in the guest and still plugged: the guest can bring it back by itself"
    )


def switched(
    state: DomainState,
    plan: Plan,
    run: Switch,
    seconds: float,
    *,
    before: Outcome,
    messages: Sequence[str],
) -> Outcome | VcpuError:
    """Turn the end of a switch in the guest into what the caller gets.

    `before` is what hotplug had done in the same call.
    """
    return _switched(_rows(state, plan.targets), run, seconds, before, messages, "vCPU")


def switched_ids(ids: Sequence[int], run: Switch, seconds: float) -> Outcome | VcpuError:
    """The same for CPUs named by the guest's own ids."""
    return _switched((), run, seconds, Outcome(OutcomeKind.APPLIED, tuple(ids)), (), "the guest's CPU")


def _switched(
    rows: tuple[Vcpu, ...],
    run: Switch,
    seconds: float,
    before: Outcome,
    messages: Sequence[str],
    name: str,
) -> Outcome | VcpuError:
    changed = tuple(sorted({*before.changed_ids, *run.changed}))
    undone = tuple(sorted({*before.undone, *run.undone}))
    if not run.failures:
        return replace(
            before,
            rows=rows,
            changed_ids=changed,
            undone=undone,
            mechanism="agent" if run.changed or not before.changed_ids else before.mechanism,
            messages=tuple(messages),
            seconds=seconds,
        )
    facts: dict[str, Any] = {
        "ids": before.ids,
        "changed_ids": changed,
        "pending": before.pending,
        "undone": undone,
        "messages": messages,
        "mechanism": "agent",
        "seconds": round(seconds, 6),
    }
    text = "; ".join(f"{name} {number}: {reason}" for number, reason in run.failures.items())
    if run.undone:
        text += f"; undone: {name} {format_ids(run.undone)}"
    if changed:
        text += f"; {name} {format_ids(changed)} stays changed"
        text += "".join(f" ({name} {number}: {reason})" for number, reason in run.undo_failures.items())
        return VcpuPartial(text, remaining=changed, hint="`qmpvcpu vcpuinfo` shows what is", **facts)
    return VcpuRejected(text, reasons=dict(run.failures), hint="look at the guest's kernel log", **facts)


def without_rejections(state: DomainState, plan: Plan, end: VcpuRejected) -> Outcome:
    """What hotplug did beside what the guest refused, which is to be done in another way."""
    return Outcome(
        OutcomeKind.PENDING if end.pending else OutcomeKind.APPLIED,
        plan.targets,
        _rows(state, plan.targets),
        changed_ids=end.changed_ids,
        pending=end.pending,
        undone=end.undone,
        mechanism="hotplug",
        messages=end.messages,
    )


def interrupted(plan: Plan, ids: Sequence[int], before: Outcome, error: VcpuError) -> VcpuError:
    """The agent failed at `ids`, after what hotplug had done in the same call."""
    error.ids = plan.targets
    if not before.changed_ids and not before.pending and isinstance(error, VcpuRefused):
        return error
    error.changed_ids, error.pending, error.undone = before.changed_ids, before.pending, before.undone
    error.messages = (*before.messages, *error.messages)
    error.mechanism = "agent"
    if not isinstance(error, VcpuRefused):
        error.messages += (f"what became of vCPU {format_ids(ids)} in the guest is not known",)
        return error
    facts: dict[str, Any] = {
        name: getattr(error, name)
        for name in ("hint", "libvirt", "ids", "changed_ids", "pending", "undone", "messages", "mechanism")
    }
    text = f"vCPU {format_ids(ids)}: {error.message}"
    if not before.changed_ids:
        return VcpuRejected(text, reasons=dict.fromkeys(ids, error.message), **facts)
    text += f"; vCPU {format_ids(before.changed_ids)} stays changed"
    return VcpuPartial(text, remaining=before.changed_ids, **facts)


def went_on(state: DomainState, before: Outcome, after: Outcome | VcpuError) -> Outcome | VcpuError:
    """A call that was done, and after which there was more to do than was known: both as one.

    `state` is fresh: of what was pending then, it tells what has gone since.
    """
    gone = {number for number in before.pending if not state.vcpus[number].enabled}
    changed = tuple(sorted({*before.changed_ids, *gone, *after.changed_ids}))
    pending = tuple(sorted({*(set(before.pending) - gone), *after.pending}))
    undone = tuple(sorted({*before.undone, *after.undone}))
    ids = tuple(sorted({*before.ids, *after.ids}))
    messages = tuple(dict.fromkeys((*before.messages, *after.messages)))
    if isinstance(after, Outcome):
        rows = {row.id: row for row in (*_rows(state, ids), *after.rows)}
        return replace(
            after,
            outcome=before.outcome if pending and not after.pending else after.outcome,
            ids=ids,
            rows=tuple(rows[number] for number in ids),
            changed_ids=changed,
            pending=pending,
            undone=undone,
            mechanism=after.mechanism or before.mechanism,
            messages=messages,
        )
    after.ids, after.changed_ids, after.pending, after.messages = ids, changed, pending, messages
    after.undone = undone
    if isinstance(after, VcpuPartial):
        after.remaining = tuple(sorted({*before.changed_ids, *after.remaining}))
    elif isinstance(after, VcpuRefused | VcpuFailed) and (changed or pending):
        text = after.message
        text += f"; vCPU {format_ids(changed)} stays changed" if changed else ""
        text += f"; the unplug of vCPU {format_ids(pending)} is pending" if pending else ""
        return VcpuPartial(
            text,
            remaining=changed,
            hint=after.hint,
            libvirt=after.libvirt,
            ids=ids,
            changed_ids=changed,
            pending=pending,
            undone=undone,
            messages=messages,
            mechanism="hotplug",
        )
    return after


def conclude(
    state: DomainState,
    plan: Plan,
    result: Result,
    seconds: float,
    *,
    stopped: str | None = None,
    notes: Sequence[str] = (),
) -> Outcome | VcpuError:
    """Turn the end of a transaction into what the caller gets.

    `state` is fresh; `stopped` is the run state while the guest does not run, `notes` what else is to be
    said.
    """
    changed = result.changed
    messages = list(plan.messages)
    if result.kept:
        messages.append(
            f"vCPU {format_ids(result.kept)}: its pending unplug did not happen, or someone plugged it again:"
            " it stays enabled"
        )
    messages += notes
    if result.unasked:
        messages.append(_unasked(result))
    if result.pending and stopped:
        messages.append(_stopped(stopped, drops=architecture(state.arch).reset_drops_unplug))
    facts: dict[str, Any] = {
        "ids": plan.targets,
        "changed_ids": changed,
        "pending": result.pending,
        "undone": result.undone,
        "messages": tuple(messages),
        "mechanism": "hotplug",
        "seconds": round(seconds, 6),
    }
    if result.outcome in (OutcomeKind.PARTIAL, OutcomeKind.FAILED):
        return _failure(plan, result, facts)
    if result.outcome is OutcomeKind.REJECTED:
        return VcpuRejected(
            _texts(result.rejections) + _also(result),
            reasons={failure.entity.first: failure.text for failure in result.rejections},
            hint="look at the guest's kernel log; some refusals pass, then a second try works",
            **facts,
        )
    return Outcome(
        result.outcome,
        plan.targets,
        _rows(state, plan.targets),
        changed_ids=changed,
        pending=result.pending,
        undone=result.undone,
        mechanism="hotplug",
        messages=tuple(messages),
        seconds=seconds,
    )


def _stopped(run_state: str, *, drops: bool) -> str:
    """Why a guest that does not run cannot answer, and what would let it."""
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


def _failure(plan: Plan, result: Result, facts: dict[str, Any]) -> VcpuError:
    first = next(iter(result.failures or result.rejections), None)
    text = _texts((*result.failures, *result.rejections))
    if not text:
        text = _unasked(result) if result.unasked else _LATE if result.undone and result.lost else "cancelled"
    qmp: dict[str, Any] = {
        "qmp_class": first.error_class if first else None,
        "qmp_text": first.text if result.failures and first else None,
    }
    if first is not None and (first.error_class or "").startswith("VIR_ERR_"):
        # libvirt was asked, not QEMU.
        qmp["libvirt"] = first.error_class
    hint = _hint(result.failures)
    if first is None and result.unasked:
        hint, qmp["libvirt"] = "ask again for these, with more time (--timeout)", "VIR_ERR_OPERATION_TIMEOUT"
    if result.undone:
        text += f"; undone: vCPU {format_ids(result.undone)}"
    if result.outcome is OutcomeKind.FAILED:
        return VcpuFailed(text + _pending(result), hint=hint, **qmp, **facts)
    left = []
    if result.remaining:
        left.append(f"vCPU {format_ids(result.remaining)} stays plugged")
    if result.removed:
        left.append(f"vCPU {format_ids(result.removed)} is removed and stays so")
    if result.undo_forbidden:
        left.append(f"it was not undone because {result.undo_forbidden}")
    text += _pending(result)
    return VcpuPartial(
        "; ".join([text, *left]),
        remaining=sorted({*result.remaining, *result.removed}),
        hint=hint or "`qmpvcpu vcpuinfo` shows what is",
        **qmp,
        **facts,
    )


#: An atomic call that has brought back a part, and then all the rest was gone.
_LATE = "not all of them were gone in time"


def _unasked(result: Result) -> str:
    return (
        f"vCPU {format_ids(result.unasked)}: libvirt was not asked, it takes one at a time, and the others took"
        " all the time there was"
    )


def _hint(failures: Sequence[Failure]) -> str | None:
    text = " ".join(failure.text for failure in failures)
    for words, hint in _HINTS:
        if words in text:
            return hint
    return None


#: QEMU's words (7.2 to 11.1) -> what to do next.
_HINTS = (
    ("Duplicate device ID", "another device has this id: remove it, or give it another id"),
    ("exists", "another client plugged it meanwhile: look with vcpuinfo and ask again"),
    ("already populated", "another client plugged it meanwhile: look with vcpuinfo and ask again"),
    (
        "device unplug request for not supported device type",
        "nobody in the guest has taken over its CPU hotplug block: a kernel that uses ACPI does as it boots",
    ),
    ("SMI wasn't enabled by firmware", "this OVMF did not negotiate CPU hotplug; use a newer one"),
)


def _texts(failures: Sequence[Failure]) -> str:
    """One line; entities with one reason together."""
    by_text: dict[str, list[int]] = {}
    for failure in failures:
        by_text.setdefault(failure.text, []).extend(failure.entity.ids)
    return "; ".join(f"vCPU {format_ids(ids)}: {text}" for text, ids in by_text.items())


def _also(result: Result) -> str:
    parts = []
    if result.removed:
        parts.append(f"; vCPU {format_ids(result.removed)} is removed and stays so")
    if result.undone:
        parts.append(f"; undone: vCPU {format_ids(result.undone)}")
    return "".join(parts) + _pending(result)


def _pending(result: Result) -> str:
    return f"; vCPU {format_ids(result.pending)}: unplug still pending" if result.pending else ""


def _rows(state: DomainState, ids: Sequence[int]) -> tuple[Any, ...]:
    return tuple(state.vcpus[number] for number in ids if 0 <= number < len(state.vcpus))
