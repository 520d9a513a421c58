"""`connect`: open a domain by its name or its addresses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from qmpvcpu.core.arguments import checked
from qmpvcpu.domain import backends
from qmpvcpu.domain.domain import Domain
from qmpvcpu.domain.resolve import resolve
from qmpvcpu.errors import VcpuUsageError

#: Seconds that a socket has to greet: the first if only the definition is needed, the second
#: otherwise.
_BUSY_SECONDS = 0.3
_CONNECT_SECONDS = 5.0
#: The longest deadline that is accepted, in seconds.
_LONGEST_SECONDS = 86400.0 * 365


@checked
def connect(  # noqa: PLR0913 - each argument is a keyword of the public API
    domain: str | os.PathLike[str] | None = None,
    *,
    qmp: str | os.PathLike[str] | Sequence[str] | None = None,
    agent: str | os.PathLike[str] | None = None,
    xml: str | os.PathLike[str] | None = None,
    qmp_log: Any = None,
    connect_timeout: float | None = None,
    command_timeout: float = 10.0,
    config_only: bool = False,
    watch: bool = False,
    uri: str | None = None,
    via: Literal["api", "monitor"] = "api",
) -> Domain:
    """Return one domain as a single-use async context manager.

    Args:
        domain: if it contains `/`, the path of a QMP socket or of a domain XML file; otherwise a
            name given to `define`, or else a file or an address.
        qmp: QMP addresses instead: a unix path, `host:port`, `fd:N`, or QEMU's own `unix:PATH` and
            `tcp:HOST:PORT`. Of several addresses the first free one is used.
        agent: address of the guest agent's socket; it is opened when it is first needed.
        xml: path of the domain's definition, for CONFIG.
        qmp_log: a `qmpvcpu.QmpLog` that records every message.
        connect_timeout: seconds for connection and greeting, per address. The default is 5, or 30
            for libvirt on another host.
        command_timeout: seconds for one QMP command, or one libvirt query.
        uri: a libvirt URI. `domain` is then the name or UUID of a libvirt domain, and libvirt knows
            its sockets.
        via: how to reach a libvirt domain: through libvirt's API, or with our own engine through
            its QEMU monitor.
        config_only: only the definition is needed. If another client uses the running guest's
            socket, this is not an error, and there is no wait for it.
        watch: the connection stays open for a long time to receive events. Of several addresses the
            last free one is used, so that other clients find the first one free.

    Raises (on entry):
        VcpuConnectionError: no address could be reached, or the answer is not QMP. A domain that
            has a definition is inactive if no QEMU listens.
        VcpuUsageError: no domain is named.
        VcpuRefused: the domain's stored definition or addresses cannot be read.
    """
    domain, agent, xml = (
        None if path is None else os.fspath(path) for path in (domain, agent, xml)
    )
    qmp = os.fspath(qmp) if isinstance(qmp, os.PathLike) else qmp
    for name, seconds in (
        ("connect_timeout", connect_timeout),
        ("command_timeout", command_timeout),
    ):
        if seconds is not None and not 0 <= seconds <= _LONGEST_SECONDS:
            raise VcpuUsageError(f"{name}={seconds} is not a time", hint="give seconds, 0 or more")
    if qmp_log is not None and not hasattr(qmp_log, "write"):
        raise VcpuUsageError(
            f"qmp_log={qmp_log!r:.60} is not a QmpLog", hint="give qmpvcpu.QmpLog(FILE)"
        )
    if uri is not None:
        if domain is None or (qmp, agent, xml) != (None, None, None):
            text = "a libvirt domain is given by its name alone"
            raise VcpuUsageError(text, hint="leave out its sockets and XML: libvirt knows them")
        if qmp_log is not None and via == "api":
            text = "libvirt's API does not show QMP messages"
            raise VcpuUsageError(text, hint="leave out --qmp-log (qmp_log=), or go --via monitor")
        return Domain(
            backends.LibvirtBackend(domain, uri, via, qmp_log, connect_timeout, command_timeout)
        )
    if via != "api":
        raise VcpuUsageError(
            "--via is about a libvirt domain", hint="give libvirt's URI: -c URI (uri=)"
        )
    place = resolve(domain, qmp, agent, xml)
    if watch:
        place = replace(place, qmp=place.qmp[::-1])
    patience = _CONNECT_SECONDS if connect_timeout is None else connect_timeout
    patience = min(patience, _BUSY_SECONDS) if config_only else patience
    return Domain(backends.QmpBackend(place, qmp_log, patience, command_timeout, config_only))
