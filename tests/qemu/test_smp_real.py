"""Predictions held against real QEMUs: the same slots, or both refuse."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from qmpvcpu import VcpuFailed, VcpuRefused
from tests.support.machines import compute, is_measured
from tests.support.qemus import VERSIONS, qemu_binary, running
from tests.support.soaking import count, seed

pytestmark = pytest.mark.qemu

PSERIES = ",cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken"
#: Machine types of each architecture; the old ones keep the old rules. Memory of one node, MiB.
MACHINES = {
    "x86_64": (("q35", "pc", "pc-q35-6.1", "pc-i440fx-6.2"), 64),
    "ppc64": (("pseries", "pseries-6.1"), 256),
    "s390x": (("s390-ccw-virtio", "s390-ccw-virtio-6.1"), 128),
    "loongarch64": (("virt",), 512),
}
#: More, and others: `scripts/soak layouts`.
EXAMPLES = 33
COUNTS = st.none() | st.sampled_from([0, 1, 1, 2, 2, 3, 4])


def smp_words(cpus, **counts):
    """Of -smp; None is left out."""
    words = [] if cpus is None else [str(cpus)]
    return ",".join([*words, *(f"{name}={count}" for name, count in counts.items() if count is not None)])


SMPS = st.builds(
    smp_words,
    cpus=st.none() | st.integers(0, 9),
    maxcpus=st.none() | st.integers(1, 16),
    drawers=st.none() | st.none() | COUNTS,
    books=st.none() | st.none() | COUNTS,
    sockets=COUNTS,
    dies=st.none() | COUNTS,
    clusters=st.none() | st.none() | COUNTS,
    modules=st.none() | st.none() | COUNTS,
    cores=COUNTS,
    threads=COUNTS,
)


@st.composite
def whole(draw):
    """Levels that fit, so that most of the cases are machines."""
    levels = {level: draw(st.sampled_from([1, 1, 2, 3])) for level in ("sockets", "cores")}
    levels["threads"] = draw(st.sampled_from([1, 1, 2]))
    maxcpus = levels["sockets"] * levels["cores"] * levels["threads"]
    left_out = draw(st.sampled_from([None, "sockets", "cores", "threads"]))
    if left_out is not None:
        del levels[left_out]
    return smp_words(draw(st.integers(1, maxcpus)), maxcpus=maxcpus, **levels)


NODES = st.lists(st.lists(st.integers(0, 7), max_size=4, unique=True).map(sorted).map(tuple), max_size=3).map(
    lambda nodes: [
        f"node,nodeid={number}" + "".join(f",cpus={cpu}" for cpu in cpus) for number, cpus in enumerate(nodes)
    ]
)


CPUS = st.lists(
    st.builds(
        lambda node, props: ",".join([f"cpu,node-id={node}", *(f"{key}={n}" for key, n in props.items())]),
        st.integers(0, 2),
        st.dictionaries(
            st.sampled_from(["socket-id", "socket-id", "core-id", "thread-id", "die-id"]),
            st.integers(0, 2),
            min_size=1,
            max_size=2,
        ),
    ),
    max_size=3,
)


async def real(arch, version, machine, smp, nodes, cpus):
    """QEMU's own answer, None where it refuses."""
    memory = MACHINES[arch][1]
    arguments = ["-S", "-nodefaults", "-display", "none", "-no-user-config", "-accel", "tcg", "-smp", smp]
    arguments += ["-machine", machine + (PSERIES if arch == "ppc64" else "")]
    arguments += ["-m", str(memory * (len(nodes) or 2))]
    for number, node in enumerate(nodes):
        arguments += [
            "-object",
            f"memory-backend-ram,id=m{number},size={memory}M",
            "-numa",
            f"{node},memdev=m{number}",
        ]
    for cpu in cpus:
        arguments += ["-numa", cpu]
    try:
        async with running(qemu_binary(version, arch), arguments) as qemu:
            slots = await qemu.execute("query-hotpluggable-cpus")
            topology = await qemu.execute("qom-get", {"path": "/machine", "property": "smp"})
    except VcpuFailed:
        return None
    # QEMU lists the highest slot first.
    return topology, [(slot["props"], slot["vcpus-count"], "qom-path" in slot) for slot in reversed(slots)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("arch", MACHINES)
def test_a_prediction_is_what_qemu_says(arch, version):
    told = tuple(map(int, version.split(".")))
    if arch == "loongarch64" and version == "7.2":
        assert not is_measured(arch, "virt", told)
        return
    agreed = [0, 0]

    @seeded(seed())
    @settings(
        max_examples=count(EXAMPLES),
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(MACHINES[arch][0]), whole() | whole() | SMPS, st.just([]) | NODES, st.just([]) | CPUS)
    def check(machine, smp, nodes, cpus):
        if smp == "":
            return
        assert is_measured(arch, machine, told)
        found = asyncio.run(real(arch, version, machine, smp, nodes, cpus))
        try:
            mine = compute(arch, machine, told, smp, [*nodes, *cpus])
        except VcpuRefused as refused:
            assert found is None, refused.message
            agreed[0] += 1
            return
        assert found is not None
        topology, slots = found
        assert list(zip(mine.props, mine.sizes, mine.plugged, strict=True)) == slots
        assert topology["maxcpus"] == mine.topology.maxcpus
        assert all(getattr(mine.topology, level) == topology[level] for level in topology if level != "cpus")
        assert topology["cpus"] == mine.cpus
        agreed[1] += 1

    check()
    assert min(agreed) > 2 or count(EXAMPLES) < EXAMPLES, agreed
