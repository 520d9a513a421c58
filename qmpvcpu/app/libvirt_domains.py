"""`list` with -c URI: libvirt's domains."""

from __future__ import annotations

from qmpvcpu.app.definitions import ListedDomain
from qmpvcpu.domain.backends.libvirt import list_domains
from qmpvcpu.errors import VcpuRefused
from qmpvcpu.host.definition_files import Addresses
from qmpvcpu.xml.document import read_domain


async def list_libvirt(uri: str) -> list[ListedDomain]:
    """Every domain of libvirt's at a URI.

    Raises:
        VcpuConnectionError: it cannot be reached.
    """
    rows = []
    for row in await list_domains(uri):
        current = maximum = trouble = None
        try:
            definition = read_domain(row.xml)[1]
            current, maximum = len(definition.enabled_ids), definition.maxcpus
        except VcpuRefused as error:
            trouble = error.message
        rows.append(ListedDomain(row.name, row.active, Addresses(), current, maximum, trouble))
    return rows
