"""`connect`: a domain by its name or its addresses."""

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

#: Seconds that a socket may take to greet where it hardly matters, and where the guest runs.
_HELD_SECONDS = 0.3
_CONNECT_SECONDS = 5.0
#: No deadline is later, seconds.
_LONGEST_SECONDS = 86400.0 * 365


@checked
def connect(  # noqa: PLR0913 - each is a keyword of its own to those who call it
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
    """One domain, as a single-use async context manager.

    Args:
        domain: with a `/` in it, the path of a QMP socket or of a domain XML file; else a name given to `define`,
            else a file or an address.
        qmp: QMP addresses instead: unix path, `host:port`, `fd:N`, or QEMU's own `unix:PATH` and `tcp:HOST:PORT`;
            of several the first that is free.
        agent: address of the guest agent's socket; it is opened when it is first needed.
        xml: path of its definition, for CONFIG.
        qmp_log: a `qmpvcpu.QmpLog` that keeps every message.
        connect_timeout: seconds for connection and greeting, per address; 5 if not given, to libvirt on another
            host 30.
        command_timeout: seconds for one QMP command, or one query of libvirt's.
        uri: libvirt's: `domain` is one of its domains then, by name or UUID, and knows its own sockets.
        via: how a libvirt domain is reached: by libvirt's API, or with our own engine through its QEMU monitor.
        config_only: it is only the definition that is wanted: where another client holds the running guest's
            socket, that is no error and is not waited for.
        watch: it is held for long, to listen to events: of several addresses the last that is free is taken, so
            that others find the first one free.

    Raises (on entry):
        VcpuConnectionError: no address could be reached, or what answers is not QMP. Where nobody listens, a
            domain that has a definition is inactive.
        VcpuUsageError: nothing is named.
        VcpuRefused: what is known of the domain cannot be read.
    """
    domain, agent, xml = (None if path is None else os.fspath(path) for path in (domain, agent, xml))
    qmp = os.fspath(qmp) if isinstance(qmp, os.PathLike) else qmp
    for name, seconds in (("connect_timeout", connect_timeout), ("command_timeout", command_timeout)):
        if seconds is not None and not 0 <= seconds <= _LONGEST_SECONDS:
            raise VcpuUsageError(f"{name}={seconds} makes no sense", hint="give seconds, 0 or more")
    if qmp_log is not None and not hasattr(qmp_log, "write"):
        raise VcpuUsageError(f"qmp_log={qmp_log!r:.60} is not a QmpLog", hint="give qmpvcpu.QmpLog(FILE)")
    if uri is not None:
        if domain is None or (qmp, agent, xml) != (None, None, None):
            text = "of a libvirt domain, its name and nothing else is given"
            raise VcpuUsageError(text, hint="leave out its sockets and XML: libvirt knows them")
        if qmp_log is not None and via == "api":
            text = "by libvirt's API no QMP message is ours to keep"
            raise VcpuUsageError(text, hint="leave out --qmp-log (qmp_log=), or go --via monitor")
        return Domain(backends.LibvirtBackend(domain, uri, via, qmp_log, connect_timeout, command_timeout))
    if via != "api":
        raise VcpuUsageError("--via is about a libvirt domain", hint="give libvirt's URI: -c URI (uri=)")
    place = resolve(domain, qmp, agent, xml)
    if watch:
        place = replace(place, qmp=place.qmp[::-1])
    patience = _CONNECT_SECONDS if connect_timeout is None else connect_timeout
    patience = min(patience, _HELD_SECONDS) if config_only else patience
    return Domain(backends.QmpBackend(place, qmp_log, patience, command_timeout, config_only))
