"""What a finished transaction means: the `Outcome` to return, or the `VcpuError` to raise. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qmpvcpu.core.model import DomainState, Outcome, Vcpu, format_ids
from qmpvcpu.core.online import Switch
from qmpvcpu.core.plan import Plan
from qmpvcpu.core.transaction import Failure, Result
from qmpvcpu.errors import OutcomeKind, VcpuError, VcpuFailed, VcpuPartial, VcpuRejected

__all__ = ["conclude", "queried", "still_plugged", "switched", "switched_ids", "unchanged"]


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
    changed: Sequence[int] = (),
    messages: Sequence[str],
) -> Outcome | VcpuError:
    """Turn the end of a switch in the guest into what the caller gets.

    `changed` is what hotplug had changed before in the same call.
    """
    return _switched(plan.targets, _rows(state, plan.targets), run, seconds, changed, messages)


def switched_ids(ids: Sequence[int], run: Switch, seconds: float) -> Outcome | VcpuError:
    """The same for CPUs named by the guest's own ids."""
    return _switched(ids, (), run, seconds, (), ())


def _switched(
    ids: Sequence[int],
    rows: tuple[Vcpu, ...],
    run: Switch,
    seconds: float,
    before: Sequence[int],
    messages: Sequence[str],
) -> Outcome | VcpuError:
    changed = tuple(sorted({*before, *run.changed}))
    if not run.failures:
        return Outcome(
            OutcomeKind.APPLIED,
            tuple(ids),
            rows,
            changed_ids=changed,
            mechanism="agent",
            messages=tuple(messages),
            seconds=seconds,
        )
    facts: dict[str, Any] = {
        "ids": ids,
        "changed_ids": changed,
        "undone": run.undone,
        "messages": messages,
        "mechanism": "agent",
        "seconds": round(seconds, 6),
    }
    text = "; ".join(f"vCPU {number}: {reason}" for number, reason in run.failures.items())
    if run.undone:
        text += f"; undone: vCPU {format_ids(run.undone)}"
    if changed:
        text += f"; vCPU {format_ids(changed)} stays changed"
        return VcpuPartial(text, remaining=changed, hint="`qmpvcpu vcpuinfo` shows what is", **facts)
    return VcpuRejected(text, reasons=dict(run.failures), hint="look at the guest's kernel log", **facts)


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
    changed = tuple(sorted({*result.plugged, *result.removed}))
    messages = list(plan.messages)
    if result.kept:
        messages.append(
            f"vCPU {format_ids(result.kept)}: its pending unplug did not happen, or someone plugged it again:"
            " it stays enabled"
        )
    messages += notes
    if result.pending and stopped:
        messages.append(f"the guest is stopped ({stopped}): it can answer only after 'cont'")
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


def _failure(plan: Plan, result: Result, facts: dict[str, Any]) -> VcpuError:
    first = next(iter(result.failures or result.rejections), None)
    text = _texts((*result.failures, *result.rejections)) or "cancelled"
    qmp = {
        "qmp_class": first.error_class if first else None,
        "qmp_text": first.text if result.failures and first else None,
    }
    if result.undone:
        text += f"; undone: vCPU {format_ids(result.undone)}"
    if result.outcome is OutcomeKind.FAILED:
        return VcpuFailed(text + _pending(result), hint=_hint(result.failures), **qmp, **facts)
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
        hint=_hint(result.failures) or "`qmpvcpu vcpuinfo` shows what is",
        **qmp,
        **facts,
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
        "the guest's ACPI does not run yet: wait until its kernel has booted",
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
