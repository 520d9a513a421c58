"""States of made machines. What a test does not ask for is as in the smallest machine that shows its point."""

from __future__ import annotations

from collections.abc import Collection
from itertools import product

from qmpvcpu import DomainState
from tests.support.inventory import Qemu


def x86(
    plugged: Collection[int] = (0, 1),
    *,
    kvm: bool = False,
    version: tuple[int, ...] = (10, 0),
    shared: bool = False,
    sockets: int = 2,
    cores: int = 2,
    threads: int = 2,
    booted: Collection[int] = (),
) -> DomainState:
    """Threads of cores of sockets, one node a socket. Those that `booted` were not plugged."""
    places = list(product(range(sockets), range(cores), range(threads)))
    paths = {
        n: f"/machine/unattached/device[{n}]" if n in booted else f"/machine/peripheral/vcpu{n}" for n in plugged
    }
    slots = [
        {
            "type": "t",
            "vcpus-count": 1,
            "props": {"socket-id": s, "core-id": c, "thread-id": t, "node-id": s},
            **({"qom-path": paths[n]} if n in paths else {}),
        }
        for n, (s, c, t) in enumerate(places)
    ]
    fast = [{"cpu-index": n, "qom-path": paths[n], "thread-id": 1 if shared else 100 + n} for n in plugged]
    smp = {"maxcpus": len(places), "sockets": sockets, "cores": cores, "threads": threads}
    return Qemu("x86_64", "q35", version, kvm, smp).state(slots, fast)


def ppc64(
    plugged: Collection[int] = (0,),
    *,
    kvm: bool = False,
    version: tuple[int, ...] = (10, 0),
    cores: int = 4,
    threads: int = 4,
) -> DomainState:
    """Cores, two of them a node; `plugged` are numbers of cores."""
    slots = [
        {
            "type": "t",
            "vcpus-count": threads,
            "props": {"core-id": n * threads, "node-id": n // 2},
            **({"qom-path": f"/c{n}"} if n in plugged else {}),
        }
        for n in range(cores)
    ]
    fast = [
        {"cpu-index": number, "qom-path": f"/c{n}/thread[{k}]", "thread-id": 100 + number}
        for n in plugged
        for k in range(threads)
        for number in [n * threads + k]
    ]
    return Qemu("ppc64", "pseries", version, kvm).state(slots, fast)


def flat(arch: str, plugged: Collection[int], count: int = 8) -> DomainState:
    """A machine of `count` cores of one thread, the plugged ones there from the start."""
    paths = {n: f"/machine/unattached/device[{n}]" for n in plugged}
    slots = [
        {
            "type": "t",
            "vcpus-count": 1,
            "props": {"core-id": n},
            **({"qom-path": paths[n]} if n in paths else {}),
        }
        for n in range(count)
    ]
    fast = [{"cpu-index": n, "qom-path": path, "thread-id": 100 + n} for n, path in paths.items()]
    return Qemu(arch, "m", (10, 0), smp={"maxcpus": count, "cores": count}).state(slots, fast)
