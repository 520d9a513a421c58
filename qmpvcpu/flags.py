"""`VcpuFlag`: the flags of the one call, as the RFC on libvirt's list names them.

Source: the RFC for `virDomainVcpu(domain, id, flags)`; the impact bits have the values of
libvirt's `virDomainModificationImpact`.
"""

from enum import IntFlag


class VcpuFlag(IntFlag):
    """What `Domain.vcpu(id, flags)` is asked to do; no ENABLE and no DISABLE is a query."""

    #: LIVE if the guest runs, else CONFIG.
    CURRENT = 0
    #: The running guest.
    LIVE = 1
    #: The persistent definition, from the next boot.
    CONFIG = 2
    ENABLE = 4
    DISABLE = 8
    #: Through the guest agent: online and offline only.
    GUEST = 16
    #: `id` is a NUMA node, not a vCPU.
    NUMA_NODE = 32
    #: Every vCPU of the core that holds `id`.
    CORE = 64
