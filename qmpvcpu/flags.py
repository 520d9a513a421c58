"""`VcpuFlag`: the flags of the single call, named as in the RFC on libvirt's list.

Source: the RFC for `virDomainVcpu(domain, id, flags)`; the impact bits have the values of libvirt's
`virDomainModificationImpact`.
"""

from enum import IntFlag


class VcpuFlag(IntFlag):
    """What `Domain.vcpu(id, flags)` should do; without ENABLE and DISABLE it is a query."""

    #: Use LIVE if the guest runs, else CONFIG.
    CURRENT = 0
    #: Use the running guest.
    LIVE = 1
    #: Use the persistent definition; a change takes effect at the next boot.
    CONFIG = 2
    ENABLE = 4
    DISABLE = 8
    #: Use the guest agent, which can only take CPUs online and offline.
    GUEST = 16
    #: `id` is a NUMA node, not a vCPU.
    NUMA_NODE = 32
    #: Extend the call to every vCPU of the core that contains `id`.
    CORE = 64
