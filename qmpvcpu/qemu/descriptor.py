"""The address `fd:N`: a socket that this process was started with."""

from __future__ import annotations

import errno
import os
import socket

from qmpvcpu.errors import VcpuConnectionError


def socket_of(address: str, number: int) -> socket.socket:
    """A duplicate of an inherited descriptor; closing it leaves the caller's open.

    Raises:
        VcpuConnectionError: the descriptor is not open, or is not a socket.
    """
    try:
        sock = socket.socket(fileno=os.dup(number))
    except OSError as error:
        raise VcpuConnectionError(
            f"'{address}' is not an open socket: {error.strerror}",
            address=address,
            reason="missing" if error.errno == errno.EBADF else "not-qmp",
            hint=f"pass the connected socket as descriptor {number}",
        ) from error
    sock.setblocking(False)
    return sock
