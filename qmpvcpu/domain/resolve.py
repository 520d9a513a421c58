"""Find the domain that a word of the user names: a socket, an XML file, or a name given to
`define`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from qmpvcpu.core.address import parse_address
from qmpvcpu.errors import VcpuConnectionError, VcpuUsageError
from qmpvcpu.host.definition_files import DefinitionFile, DefinitionFolder, check_name
from qmpvcpu.host.runtime import Runtime

#: If there are more names than this, an error does not list them.
_MOST_NAMES: Final = 12


@dataclass(frozen=True, slots=True)
class DomainAddress:
    """The addresses of a domain: the QMP addresses of the running guest, its agent's address, and
    its definition.

    `is_unknown` is set if nothing exists under the given name or path. `qemu_log` is where QEMU
    writes its messages, for a guest that `start` has started.
    """

    name: str
    qmp: tuple[str, ...] = ()
    agent: str | None = None
    definition: DefinitionFile | None = None
    is_unknown: bool = False
    qemu_log: str | None = None


def resolve(
    domain: str | None,
    qmp: str | Sequence[str] | None = None,
    agent: str | None = None,
    xml: str | None = None,
) -> DomainAddress:
    """Find a domain. If `domain` contains a `/`, it is the path of a QMP socket or else of an XML
    file. Otherwise it is a name given to `define`, or else a file or an address. The other
    arguments take precedence over what `domain` names.

    Raises:
        VcpuUsageError: no domain is named.
        VcpuRefused: the stored definition or addresses of a domain cannot be read.
    """
    given = (qmp,) if isinstance(qmp, str) else tuple(qmp or ())
    if domain is None and not given and xml is None:
        raise VcpuUsageError(
            "no domain given",
            hint="connect('NAME'), connect('/path/to/qmp.sock') or connect(qmp=…)",
        )
    place = _named(domain) if domain is not None else DomainAddress(given[0] if given else str(xml))
    if given:
        # An agent that was found by the name belongs to another QEMU.
        place = replace(place, qmp=given, agent=None, is_unknown=False)
    if agent is not None:
        place = replace(place, agent=agent)
    if xml is not None:
        place = replace(place, definition=DefinitionFile(Path(xml), keep=False))
    return place


def _named(domain: str) -> DomainAddress:
    if "/" not in domain and check_name(domain) is None:
        folder = DefinitionFolder()
        runtime = Runtime(domain)
        if runtime.pid() is not None:
            # `start` has started this QEMU, or it waits for a migration.
            return DomainAddress(
                domain,
                runtime.qmp,
                runtime.agent,
                folder.file(domain) if folder.is_defined(domain) else None,
                qemu_log=str(runtime.log),
            )
        if folder.is_defined(domain):
            addresses = folder.addresses(domain)
            return DomainAddress(domain, addresses.qmp, addresses.agent, folder.file(domain))
    if _is_file(domain):
        return DomainAddress(domain, definition=DefinitionFile(Path(domain), keep=False))
    return DomainAddress(
        domain,
        (domain,),
        is_unknown=parse_address(domain) == domain and not os.path.lexists(domain),
    )


def unknown_domain(word: str) -> VcpuConnectionError:
    """Return the error for a name or path under which nothing exists, with the known and the
    similar names.
    """
    if "/" in word:
        return VcpuConnectionError(
            f"there is no socket or file '{word}'",
            address=word,
            reason="missing",
            hint="correct the path; or start QEMU with -qmp unix:PATH,server=on,wait=off",
        )
    known = DefinitionFolder().names()
    near = get_close_matches(word, known, 3, 0.6)
    what = ""
    if len(known) > _MOST_NAMES:
        what = f"; {len(known)} are defined"
    elif known:
        what = f"; defined are {', '.join(known)}"
    if near:
        hint = (
            f"did you mean {' or '.join(repr(name) for name in near)}? `qmpvcpu list` shows"
            " what is defined"
        )
    elif known:
        hint = (
            "`qmpvcpu list` shows what is defined; the path of a socket or a file is written"
            " with a /"
        )
    else:
        hint = (
            "no domain is defined yet: name a socket or a file by its path, or `qmpvcpu define` one"
        )
    return VcpuConnectionError(
        f"there is no domain, file or socket named '{word}'{what}",
        address=word,
        reason="unknown-domain",
        libvirt="VIR_ERR_NO_DOMAIN",
        hint=hint,
    )


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116 - one stat(2)
    except (OSError, ValueError):
        return False
