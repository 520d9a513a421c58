"""Translate libvirt's errors into ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import VcpuConnectionError, VcpuError, VcpuFailed, VcpuPartial, VcpuRefused
from qmpvcpu.ports import CommandError

#: Errors with which libvirt declines a request; nothing was touched then.
_REFUSALS: Final = frozenset(
    {
        "VIR_ERR_INVALID_ARG",
        "VIR_ERR_NO_SUPPORT",
        "VIR_ERR_CONFIG_UNSUPPORTED",
        "VIR_ERR_ARGUMENT_UNSUPPORTED",
        "VIR_ERR_OPERATION_UNSUPPORTED",
        "VIR_ERR_OPERATION_INVALID",
        "VIR_ERR_OPERATION_DENIED",
        "VIR_ERR_ACCESS_DENIED",
        "VIR_ERR_XML_ERROR",
        "VIR_ERR_XML_DETAIL",
    }
)


@contextmanager
def answered() -> Iterator[None]:
    """Translate libvirt's errors. If libvirt declined the request, nothing was touched."""
    try:
        yield
    except CommandError as error:
        raise _from_libvirt(error) from error


def _from_libvirt(error: CommandError) -> VcpuError:
    if error.error_class in _REFUSALS:
        return VcpuRefused(
            [replace(catalogue.LIBVIRT(error=error.text), libvirt=error.error_class)]
        )
    if error.error_class == "VIR_ERR_OPERATION_TIMEOUT":
        return VcpuConnectionError(
            error.text,
            reason="timeout",
            libvirt=error.error_class,
            hint="try again when the other call on this domain has ended",
        )
    return VcpuFailed(error.text, libvirt=error.error_class, hint="look at libvirtd's log")


def as_refused(error: VcpuFailed) -> VcpuError:
    """Return a refusal if libvirt declined before anything was done, else the error itself."""
    touched = error.changed_ids or error.pending or error.undone
    if isinstance(error, VcpuPartial) or touched or error.libvirt not in _REFUSALS:
        return error
    refusal = replace(
        catalogue.LIBVIRT(error.ids, error=error.message), hint=error.hint, libvirt=error.libvirt
    )
    return VcpuRefused([refusal], ids=error.ids, messages=error.messages, seconds=error.seconds)
