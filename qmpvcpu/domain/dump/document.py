"""Write a document with the present vCPUs of the running guest, in either dialect."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qmpvcpu.core.definition import definition_of, state_of
from qmpvcpu.core.model import DomainState, Vcpu
from qmpvcpu.errors import VcpuUsageError
from qmpvcpu.xml import read_domain, write_vcpus

DIALECTS: Final = ("rfc", "libvirt")
DETAILS: Final = ("minimal", "cell", "full")


def check_dump(dialect: str | None, detail: str | None) -> None:
    """Raise VcpuUsageError if `dump` does not know one of these words."""
    for word, words in ((dialect, DIALECTS), (detail, DETAILS)):
        if word is not None and word not in words:
            raise VcpuUsageError(
                f"'{word}' is not one of {', '.join(words)}", hint="choose one of them"
            )


def dump(
    data: bytes,
    state: DomainState | None,
    dialect: str | None,
    detail: str | None,
    *,
    running: bool = False,
) -> bytes:
    """Return a document in this dialect, with the vCPUs of `state`, or with its own.

    Args:
        data: a domain's XML.
        state: the running guest, or None to keep the document's own vCPUs.
        dialect: "rfc" or "libvirt"; None keeps the document's own dialect.
        detail: what the RFC dialect shows: "minimal", "cell" or "full" (None means "full").
        running: whether the document is libvirt's XML of a running guest.
    """
    document, old = read_domain(data, running=running)
    if dialect is None and detail is not None:
        dialect = "rfc"
    if state is None and dialect is None:
        return data
    new = old if state is None else replace(old, vcpus=definition_of(state).vcpus)
    defined = {vcpu.id: vcpu for vcpu in state_of(old).vcpus}
    level = detail or "full"
    details = {
        vcpu.id: _details(vcpu, defined.get(vcpu.id), level)
        for vcpu in (state or state_of(old)).vcpus
    }
    return write_vcpus(document, old, new, dialect or old.dialect or "libvirt", details)


def _details(vcpu: Vcpu, defined: Vcpu | None, detail: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    if detail in ("cell", "full"):
        node = vcpu.node if vcpu.node is not None or defined is None else defined.node
        found["cell"] = str(node) if node is not None else None
    if detail == "full":
        found["pin"] = vcpu.pin or (defined.pin if defined is not None else None)
        found["scheduler"] = vcpu.scheduler or (defined.scheduler if defined is not None else None)
    return found
