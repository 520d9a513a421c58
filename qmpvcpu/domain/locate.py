"""Which domain a word of the user means: a socket, an XML file, or a name given to `define`."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qmpvcpu.errors import VcpuUsageError
from qmpvcpu.host.definitions import DefinitionFile, DefinitionFolder, check_name
from qmpvcpu.host.runtime import Runtime

__all__ = ["Place", "locate"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a domain is: the QMP addresses of the running guest, its agent's, and its definition."""

    name: str
    qmp: tuple[str, ...] = ()
    agent: str | None = None
    definition: DefinitionFile | None = None


def locate(
    domain: str | None, qmp: str | Sequence[str] | None = None, agent: str | None = None, xml: str | None = None
) -> Place:
    """Find a domain. With a `/` in it, `domain` is a path: a QMP socket, else an XML file. Without, it is a name
    given to `define`, else a file or an address. What is given beside it counts more.

    Raises:
        VcpuUsageError: nothing is named.
        VcpuRefused: what is known of a defined domain cannot be read.
    """
    given = (qmp,) if isinstance(qmp, str) else tuple(qmp or ())
    if domain is None and not given and xml is None:
        raise VcpuUsageError(
            "no domain given", hint="connect('NAME'), connect('/path/to/qmp.sock') or connect(qmp=…)"
        )
    place = _named(domain) if domain is not None else Place(given[0] if given else str(xml))
    if given:
        place = replace(place, qmp=given)
    if agent is not None:
        place = replace(place, agent=agent)
    if xml is not None:
        place = replace(place, definition=DefinitionFile(Path(xml), keep=False))
    return place


def _named(domain: str) -> Place:
    if "/" not in domain and check_name(domain) is None:
        folder = DefinitionFolder()
        runtime = Runtime(domain)
        if runtime.pid() is not None:
            # `start` has started it, or it waits for a migration.
            file = folder.file(domain) if folder.is_defined(domain) else None
            return Place(domain, runtime.qmp, runtime.agent, file)
        if folder.is_defined(domain):
            addresses = folder.addresses(domain)
            return Place(domain, addresses.qmp, addresses.agent, folder.file(domain))
    if _is_file(domain):
        return Place(domain, definition=DefinitionFile(Path(domain), keep=False))
    return Place(domain, (domain,))


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116 - one stat(2)
    except (OSError, ValueError):
        return False
