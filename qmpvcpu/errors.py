"""The words of how a request ended, and one tree of errors.

    VcpuError
    ├── VcpuUsageError        usage       the call itself makes no sense; nothing was looked at
    ├── VcpuRefused           refused     checked and declined; nothing was touched
    ├── VcpuRejected          rejected    the guest said no
    ├── VcpuFailed            failed      QEMU gave an error on the way; what was done is undone
    ├── VcpuPartial           partial     some of it is done and could not be undone
    ├── VcpuConnectionError   connection  QMP, agent or libvirt not reached, or gone
    └── VcpuOverflow          failed      a listener was too slow, and lost events

Every error carries its facts as fields and one `hint`, the next thing to do. `libvirt` is the name
of the error libvirt would give (`virErrorNumber` in libvirt's virterror.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Self, TypeVar


class OutcomeKind(StrEnum):
    """How a request ended; `exit_code` is what the command line exits with."""

    QUERIED = "queried"
    APPLIED = "applied"
    REQUESTED = "requested"
    PENDING = "pending"
    REFUSED = "refused"
    REJECTED = "rejected"
    PARTIAL = "partial"
    FAILED = "failed"
    CONNECTION = "connection"
    USAGE = "usage"

    @property
    def exit_code(self) -> int:
        """The process exit code for this outcome (design.md, table of outcomes)."""
        return _EXIT_CODES[self]


_EXIT_CODES = {
    OutcomeKind.QUERIED: 0,
    OutcomeKind.APPLIED: 0,
    OutcomeKind.REQUESTED: 0,
    OutcomeKind.PENDING: 5,
    OutcomeKind.REFUSED: 3,
    OutcomeKind.REJECTED: 4,
    OutcomeKind.PARTIAL: 6,
    OutcomeKind.CONNECTION: 7,
    OutcomeKind.FAILED: 8,
    OutcomeKind.USAGE: 2,
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason why a request is not carried out.

    `code` is stable and short (`range`, `entity`, `boot-cpu` …), `ids` the vCPU ids it is about,
    `libvirt` the libvirt error name, `forceable` whether `force=True` overrides it.
    """

    code: str
    message: str
    ids: tuple[int, ...] = ()
    hint: str | None = None
    libvirt: str = "VIR_ERR_INVALID_ARG"
    forceable: bool = False

    def to_json(self) -> dict[str, Any]:
        """The refusal as plain JSON data."""
        return asdict(self) | {"ids": list(self.ids)}


E = TypeVar("E", bound="VcpuError")


class VcpuError(Exception):
    """Root of every error qmpvcpu raises.

    Fields: `message`; `hint`, what to do next, or None; `libvirt`, a libvirt error name; `ids`, the
        vCPU ids
    asked for; `changed_ids`, those whose state is changed now; `pending`, unplugs asked and not
    ended; `undone`, ids that were changed and put back; `messages`, warnings; `mechanism`,
    `hotplug`, `agent` or None; `seconds`, how long the call took.
    """

    #: How the request ended, one word of design.md's table.
    outcome: OutcomeKind = OutcomeKind.FAILED
    default_libvirt = "VIR_ERR_INTERNAL_ERROR"

    def __init__(  # noqa: PLR0913 - each fact is a keyword of its own
        self,
        message: str,
        *,
        hint: str | None = None,
        libvirt: str | None = None,
        ids: Sequence[int] = (),
        changed_ids: Sequence[int] = (),
        pending: Sequence[int] = (),
        undone: Sequence[int] = (),
        messages: Sequence[str] = (),
        mechanism: str | None = None,
        seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.libvirt = libvirt or self.default_libvirt
        self.ids = tuple(ids)
        self.changed_ids = tuple(changed_ids)
        self.pending = tuple(pending)
        self.undone = tuple(undone)
        self.messages = tuple(messages)
        self.mechanism = mechanism
        self.seconds = seconds

    def having(self, **facts: Any) -> Self:
        """The same error with these fields; this one stays as it is."""
        return _rebuild(type(self), self.message, {**self.__dict__, **facts})

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, dict(self.__dict__))

    def to_json(self) -> dict[str, Any]:
        """`{"outcome", "error": {"type", "libvirt", "message", "hint"}}` and, of a change, its
        facts.
        """
        error = {
            "type": type(self).__name__,
            "libvirt": self.libvirt,
            "message": self.message,
            "hint": self.hint,
        }
        return {
            "outcome": str(self.outcome),
            "changed": bool(self.changed_ids),
            "mechanism": self.mechanism,
            "vcpus": list(self.ids),
            "changed_ids": list(self.changed_ids),
            "pending": list(self.pending),
            "undone": list(self.undone),
            "messages": list(self.messages),
            "seconds": self.seconds,
            "error": error | self._facts(),
        }

    def _facts(self) -> dict[str, Any]:
        return {}


def _rebuild(cls: type[E], message: str, fields: dict[str, Any]) -> E:
    error = cls.__new__(cls, message)
    error.__dict__.update(fields)
    return error


class VcpuUsageError(VcpuError):
    """The call makes no sense in itself: a bad id list, an unknown address form, flags that
    contradict.
    """

    outcome = OutcomeKind.USAGE
    default_libvirt = "VIR_ERR_INVALID_ARG"


class VcpuRefused(VcpuError):
    """Checked and declined before anything was touched; `refusals` has every reason."""

    outcome = OutcomeKind.REFUSED
    default_libvirt = "VIR_ERR_OPERATION_INVALID"

    def __init__(self, refusals: Sequence[Refusal], **fields: Any) -> None:
        self.refusals = tuple(refusals)
        hints = [refusal.hint for refusal in self.refusals if refusal.hint]
        fields.setdefault("hint", "; ".join(dict.fromkeys(hints)) or None)
        if self.refusals:
            fields.setdefault("libvirt", self.refusals[0].libvirt)
        super().__init__("; ".join(refusal.message for refusal in self.refusals), **fields)

    def at(self, place: str) -> VcpuRefused:
        """The same, where each reason names the file or the domain that it is about."""
        return VcpuRefused(
            [replace(one, message=f"'{place}': {one.message}") for one in self.refusals]
        )

    def _facts(self) -> dict[str, Any]:
        return {"refusals": [refusal.to_json() for refusal in self.refusals]}


class VcpuRejected(VcpuError):
    """The guest said no; `reasons` maps the first vCPU id of an entity to the guest's reason in
    words.
    """

    outcome = OutcomeKind.REJECTED
    default_libvirt = "VIR_ERR_OPERATION_FAILED"

    def __init__(
        self, message: str, *, reasons: dict[int, str] | None = None, **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.reasons = dict(reasons or {})

    def _facts(self) -> dict[str, Any]:
        return {"reasons": {str(vcpu): text for vcpu, text in self.reasons.items()}}


class VcpuFailed(VcpuError):
    """QEMU gave an error on the way; what this call had done is undone.

    `qmp_class` and `qmp_text` are QEMU's own words (QAPI `QapiErrorClass`, `desc`). Of a QEMU that
    we started and that has ended, `exit_code` is how (below 0: by that signal), and `qmp_text` the
    end of its stderr.
    """

    outcome = OutcomeKind.FAILED
    default_libvirt = "VIR_ERR_OPERATION_FAILED"

    def __init__(
        self,
        message: str,
        *,
        qmp_class: str | None = None,
        qmp_text: str | None = None,
        exit_code: int | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.qmp_class = qmp_class
        self.qmp_text = qmp_text
        self.exit_code = exit_code

    def _facts(self) -> dict[str, Any]:
        return {"qmp_class": self.qmp_class, "qmp_text": self.qmp_text, "exit_code": self.exit_code}


class VcpuPartial(VcpuFailed):
    """Some of it is done and could not be undone; `remaining` names the ids left changed."""

    outcome = OutcomeKind.PARTIAL

    def __init__(self, message: str, *, remaining: Sequence[int] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.remaining = tuple(remaining)

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"remaining": list(self.remaining)}


class VcpuConnectionError(VcpuError):
    """QMP, the agent or libvirt could not be reached, or went away.

    `address` is what was connected to, as the user wrote it. `reason` is one of `missing`,
    `refused`, `denied`, `no-greeting`, `not-qmp`, `malformed`, `timeout`, `closed`,
    `unknown-domain`, `other`.
    """

    outcome = OutcomeKind.CONNECTION
    default_libvirt = "VIR_ERR_OPERATION_FAILED"

    def __init__(
        self, message: str, *, address: str | None = None, reason: str = "other", **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.address = address
        self.reason = reason

    def _facts(self) -> dict[str, Any]:
        return {"address": self.address, "reason": self.reason}


class VcpuOverflow(VcpuError):
    """More events came than `Domain.events()` may keep, and some are lost: subscribe again and read
    the state.
    """

    default_libvirt = "VIR_ERR_OPERATION_FAILED"
