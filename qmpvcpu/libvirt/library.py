"""The modules of libvirt-python, and their errors translated to ours.

libvirt-python is loaded only when a libvirt domain is named: it may not be installed, and it takes
long to load. Of an error, the name of the code and the text are kept: a lost connection becomes a
`VcpuConnectionError`, any other error of a call a `CommandError` whose class is that name.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.ports import CommandError

if TYPE_CHECKING:
    import libvirt

#: virErrorLevel has the same prefix as virErrorNumber, and some of the same numbers.
_LEVELS: Final = frozenset({"VIR_ERR_NONE", "VIR_ERR_WARNING", "VIR_ERR_ERROR"})
_CONNECTION: Final = frozenset(
    {
        "VIR_ERR_NO_CONNECT",
        "VIR_ERR_INVALID_CONN",
        "VIR_ERR_RPC",
        "VIR_ERR_AUTH_FAILED",
        "VIR_ERR_AUTH_CANCELLED",
        "VIR_ERR_AUTH_UNAVAILABLE",
        "VIR_ERR_GNUTLS_ERROR",
        "VIR_ERR_SSH",
        "VIR_ERR_LIBSSH",
        "VIR_ERR_NO_CLIENT",
        "VIR_ERR_NO_SERVER",
        "VIR_ERR_SYSTEM_ERROR",
    }
)
#: Errors of the guest's agent: the connection to libvirt still works.
_AGENT: Final = frozenset(
    {"VIR_ERR_AGENT_UNRESPONSIVE", "VIR_ERR_AGENT_UNSYNCED", "VIR_ERR_AGENT_COMMAND_TIMEOUT"}
)


def libvirt_module() -> Any:
    """The module `libvirt`.

    Raises:
        VcpuRefused: it is not installed.
    """
    try:
        return import_module("libvirt")
    except ImportError as error:
        raise catalogue.NO_LIBVIRT.error(error=error) from error


def libvirt_qemu_module() -> Any:
    """The module `libvirt_qemu`: QEMU's monitor and the guest's agent by libvirt."""
    return import_module("libvirt_qemu")


@cache
def _names() -> dict[int, str]:
    return {
        number: name
        for name, number in vars(libvirt_module()).items()
        if name.startswith("VIR_ERR_") and name not in _LEVELS and isinstance(number, int)
    }


def name_of(code: int | None) -> str:
    """The name of an error code in `virErrorNumber`."""
    return _names().get(code or 0, "VIR_ERR_INTERNAL_ERROR")


def text_of(error: libvirt.libvirtError) -> str:
    """libvirt's message alone."""
    return str(error.get_error_message() or error)


def connection_error(error: libvirt.libvirtError, uri: str) -> VcpuConnectionError:
    """The error for an attempt to connect that failed."""
    name, text = name_of(error.get_error_code()), text_of(error)
    reason, hint = "other", f"see whether `virsh -c {uri} version` works"
    if "No such file or directory" in text or "Connection refused" in text:
        reason = "missing"
        hint = f"start libvirt's daemon there (systemctl start libvirtd); {hint}"
    elif "AUTH" in name or "denied" in text.lower():
        reason = "denied"
        hint = f"run it as root, or as a member of the group libvirt; {hint}"
    return VcpuConnectionError(
        f"libvirt at '{uri}' cannot be reached: {text}",
        address=uri,
        reason=reason,
        libvirt=name,
        hint=hint,
    )


def lost(uri: str, why: str, libvirt: str | None = None) -> VcpuConnectionError:
    """The error for a connection that worked before."""
    return VcpuConnectionError(
        f"the connection to libvirt at '{uri}' is lost: {why}",
        address=uri,
        reason="closed",
        hint="try again (reconnect()) when its daemon runs again; the guests go on without it",
        libvirt=libvirt,
    )


def translated(
    error: libvirt.libvirtError, call: str, uri: str, *, alive: bool
) -> CommandError | VcpuConnectionError:
    """The error for one call.

    Args:
        error: the exception of libvirt-python. The caller raises the returned error from it.
        call: libvirt's name of the function.
        uri: the URI of the connection.
        alive: whether the connection still works.
    """
    name, text = name_of(error.get_error_code()), text_of(error)
    if name in _AGENT:
        return VcpuConnectionError(
            f"the guest agent does not answer: {text}",
            address=uri,
            reason="timeout" if "timeout" in text.lower() or "TIMEOUT" in name else "no-agent",
            libvirt=name,
            hint="check that qemu-ga runs in the guest",
        )
    if name == "VIR_ERR_NO_DOMAIN":
        return VcpuConnectionError(
            f"libvirt at '{uri}' has no such domain: {text}",
            address=uri,
            reason="unknown-domain",
            libvirt=name,
            hint="`qmpvcpu -c URI list` shows its domains",
        )
    if not alive or (
        name in _CONNECTION and error.get_error_domain() == libvirt_module().VIR_FROM_RPC
    ):
        return lost(uri, text, name)
    return CommandError(call, name, text)
