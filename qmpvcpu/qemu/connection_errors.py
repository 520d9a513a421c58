"""The errors of sockets and of `qemu.qmp` as `VcpuConnectionError`."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Final

from qemu.qmp import ConnectError, ExecInterruptedError

from qmpvcpu.errors import VcpuConnectionError

#: Most bytes of one message. 65536 vCPUs fit; a longer line is an error.
MESSAGE_LIMIT: Final = 32 * 1024 * 1024


def no_answer(
    address: str, command: str, seconds: float, cause: BaseException
) -> VcpuConnectionError:
    """QEMU did not answer a command in `seconds`."""
    error = VcpuConnectionError(
        f"QEMU did not answer '{command}' within {seconds:g} s ({address})",
        address=address,
        reason="timeout",
        libvirt="VIR_ERR_OPERATION_TIMEOUT",
        hint="query again: QEMU is busy or hangs, and may still do what the command asks",
    )
    error.__cause__ = cause
    return error


def lost(address: str, cause: BaseException | None, qemu_log: str | None) -> VcpuConnectionError:
    """An open connection has ended; `cause` is the reader's error, `qemu_log` the path of QEMU's
    own log.
    """
    if isinstance(cause, ValueError) and str(cause).startswith(
        "Separator"
    ):  # StreamReader.readline
        return VcpuConnectionError(
            f"'{address}' sent a message of more than {MESSAGE_LIMIT >> 20} MiB; the connection"
            " was closed",
            address=address,
            reason="malformed",
            hint="check that this is QEMU's QMP socket",
        )
    if cause is not None and not isinstance(cause, OSError | EOFError | ExecInterruptedError):
        return malformed(address, cause)  # JSON that is nested too deep, for example
    why = f": {cause}" if isinstance(cause, OSError) and str(cause) else ""
    error = VcpuConnectionError(
        f"the connection to '{address}' was closed by the other side{why}",
        address=address,
        reason="closed",
        hint=f"look at {qemu_log or 'its log'}: QEMU has exited, or closed this monitor",
    )
    error.__cause__ = cause
    return error


def malformed(address: str, cause: BaseException) -> VcpuConnectionError:
    """The other side sent something that is not QMP."""
    error = VcpuConnectionError(
        f"'{address}' sent what is not QMP: {_first_line(cause)}",
        address=address,
        reason="malformed",
        hint="check that this is QEMU's QMP socket; --qmp-log FILE keeps what it sends",
    )
    error.__cause__ = cause
    return error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


#: The socket's queue of waiting clients is full.
_CROWDED: Final = (
    "no-greeting",
    "'{}' takes no more connections",
    "close another client of this socket, which takes one at a time, or give QEMU a second -qmp",
)
#: QEMU was killed while a client connected to it.
_CLOSED_EARLY: Final = (
    "closed",
    "'{}' closed the connection before the handshake was done",
    "look at QEMU's log: it has exited, or closed this monitor",
)
_OS_REASONS: Final[Mapping[int, tuple[str, str, str]]] = {
    errno.ENOENT: (
        "missing",
        "there is no socket '{}'",
        "start QEMU with -qmp unix:PATH,server=on,wait=off, or name the right path",
    ),
    errno.ECONNREFUSED: (
        "refused",
        "nobody listens on '{}'",
        "start QEMU, or name the socket that it listens on; remove this one if no QEMU uses it",
    ),
    errno.ENOTSOCK: (
        "not-qmp",
        "'{}' is not a socket",
        "name QEMU's QMP socket, or a file of domain XML",
    ),
    errno.EACCES: (
        "denied",
        "no permission to open '{}'",
        "run as the user QEMU runs as, or as root",
    ),
    errno.EPERM: (
        "denied",
        "no permission to open '{}'",
        "run as the user QEMU runs as, or as root",
    ),
    errno.ECONNRESET: _CLOSED_EARLY,
    errno.EPIPE: _CLOSED_EARLY,
    errno.EAGAIN: _CROWDED,
    # asyncio (3.11 to 3.14) takes EAGAIN of a unix socket for EINPROGRESS, and then gets EINVAL.
    errno.EINVAL: _CROWDED,
}


def os_error(address: str, error: OSError) -> VcpuConnectionError:
    """The operating system could not connect."""
    reason, text, hint = _OS_REASONS.get(
        error.errno or 0,
        ("other", "cannot connect to '{}': " + (error.strerror or str(error)), "check the address"),
    )
    return VcpuConnectionError(text.format(address), address=address, reason=reason, hint=hint)


def connect_error(address: str, error: ConnectError) -> VcpuConnectionError:
    """`qemu.qmp` could not connect, or the handshake failed."""
    cause = error.exc
    if isinstance(cause, UnicodeError) and not isinstance(cause, UnicodeDecodeError):
        return os_error(address, OSError(0, "this is not a host name"))
    if isinstance(cause, OSError) and not isinstance(cause, EOFError):
        return os_error(address, cause)
    if isinstance(cause, EOFError):
        return VcpuConnectionError(
            f"'{address}' closed the connection without a greeting",
            address=address,
            reason="not-qmp",
            hint="name QEMU's QMP socket (-qmp …,server=on)",
        )
    if r"b'{\r\n'" in str(cause):
        # This is the first line of a pretty-printed greeting (7.2 to 11.1).
        return VcpuConnectionError(
            f"'{address}' is a pretty-printed QMP socket: each of its messages has several lines",
            address=address,
            reason="not-qmp",
            hint="start QEMU with -qmp, not -qmp-pretty (-mon …,pretty=off)",
        )
    return VcpuConnectionError(
        f"'{address}' is not a QMP server: {_first_line(cause)}",
        address=address,
        reason="not-qmp",
        hint="name QEMU's QMP socket (-qmp …,server=on), not its HMP monitor, console or guest"
        " agent",
    )
