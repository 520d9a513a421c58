"""Addresses of sockets, as users of the command line and the API write them. Pure."""

from __future__ import annotations

import re
from typing import Final

from qmpvcpu.errors import VcpuUsageError

#: A unix path, a (host, port), or the number of an open file descriptor.
Address = str | tuple[str, int] | int

_FD: Final = re.compile(r"fd:([0-9]{1,9})\Z")
_TCP: Final = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^:/\[\]]+):([0-9]{1,5})\Z")
#: Options that may follow the address in `-qmp unix:PATH,server=on,wait=off`.
_SERVER: Final = re.compile(r"(?:,(?:server|nowait|(?:server|wait)=(?:on|off)))+\Z")
_HINT: Final = "give a socket's path, unix:PATH, host:port, tcp:HOST:PORT or fd:N"


def parse_address(text: object) -> Address:
    """ADDR: a unix socket path, `host:port` (`[v6]:port`), or `fd:N`; in QEMU's words `unix:PATH`
    or `tcp:HOST:PORT`, also with `,server=on,wait=off`.

    Raises:
        VcpuUsageError: it is not an address, or the port is out of range.
    """
    if not isinstance(text, str) or not text or "\0" in text:
        raise VcpuUsageError(f"{text!r} is not an address", hint=_HINT)
    if found := _FD.match(text):
        return int(found[1])
    scheme, colon, rest = text.partition(":")
    if colon and scheme in ("unix", "tcp"):
        rest = _SERVER.sub("", rest)
        # In `tcp:4444`, "tcp" may be the name of a host.
        if scheme == "unix" and rest:
            return rest
        if scheme == "tcp" and ":" in rest:
            return _tcp(rest, text)
    if text in ("unix:", "tcp:"):
        raise VcpuUsageError(f"'{text}' is not an address", hint=_HINT)
    return _tcp(text, text) if "/" not in text and _TCP.match(text) else text


def _tcp(rest: str, text: str) -> tuple[str, int]:
    found = _TCP.match(rest)
    if found is None:
        raise VcpuUsageError(
            f"'{text}' is not an address", hint="write tcp:HOST:PORT; IPv6 as tcp:[::1]:PORT"
        )
    port = int(found[2])
    if not 0 < port < 65536:
        raise VcpuUsageError(f"'{text}': there is no port {port}", hint="ports are 1 to 65535")
    return found[1].strip("[]"), port
