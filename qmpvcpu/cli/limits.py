"""Limits of this process. A command that would run short of a resource is refused before its first effect."""

from __future__ import annotations

import errno
import os
from typing import Final

from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import VcpuError, VcpuFailed

#: The largest number of files that a command has open at once: sockets, pipes to programs, locks,
#: files in /proc.
_NEEDED: Final = 24
_SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_HINT: Final = catalogue.FEW_DESCRIPTORS.hint


def check_descriptors() -> None:
    """Check that as many files can be opened as a command needs.

    Raises:
        VcpuRefused: fewer can be opened.
    """
    opened: list[int] = []
    try:
        while len(opened) < _NEEDED:
            opened.append(os.open("/", os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        raise catalogue.FEW_DESCRIPTORS.error(more=len(opened), needed=_NEEDED, error=error) from error
    finally:
        for fd in opened:
            os.close(fd)


def short_of(error: BaseException) -> VcpuError | None:
    """Return the error to report if the host ran short of memory or descriptors; None for any other cause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return _failed(
                "this host is out of memory",
                "end what else uses memory, or raise the limit: ulimit -v",
            )
        if isinstance(cause, OSError) and cause.errno in _SHORT:
            return _failed(f"this host is out of a resource: {cause.strerror}", _HINT)
        if isinstance(cause, ImportError) and os.strerror(errno.EMFILE) in str(cause):
            return _failed(str(cause), _HINT)
        cause = cause.__cause__ or cause.__context__
    return None


def _failed(text: str, hint: str | None) -> VcpuFailed:
    return VcpuFailed(
        f"{text}; this command may have changed something: `qmpvcpu vcpuinfo` shows it",
        hint=hint,
        libvirt="VIR_ERR_SYSTEM_ERROR",
    )
