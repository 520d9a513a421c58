"""The same requests, given to libvirt and to us: the same vCPUs, `<vcpus>` and error codes, but
what docs list.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.qemu.libvirt_guests import EJECTING, NUMA, PPC64, SPARSE, firmware, numa
from tests.support.hosts import why_no_kvm
from tests.support.libvirtds import daemon_of_our_own, pair

pytestmark = [pytest.mark.qemu, pytest.mark.xdist_group("libvirt")]

#: Deliberate differences, by the names that docs/libvirt.md gives them.
ALREADY = "already so"
SEVERAL = "several entities"
NO_CALL = "nodes and cores"
COLD = "cold-plugged CPUs"
HALF = "half a core in a definition"

#: What is asked, and which difference it may show; None: none.
NUMA_RUNNING = [
    ("setvcpu 5 --enable", None),
    ("setvcpu 5 --enable", ALREADY),
    ("setvcpu 6 --enable --live", None),
    ("setvcpu 7 --enable --config", None),
    ("setvcpu 7 --enable --config", None),
    ("setvcpu 8 --enable --live --config", None),
    ("setvcpu 9,10 --enable --config", None),
    ("setvcpu 10 --disable --config", None),
    ("setvcpu 16 --enable", None),
    ("setvcpu 99 --enable --config", None),
    ("setvcpu 99 --disable --live --config", None),
    ("setvcpu 0 --disable", None),
    ("setvcpu 0 --disable --config", None),
    ("setvcpu 1 --disable --config", None),
    ("setvcpu 13 --disable", ALREADY),
    ("setvcpu 13 --enable --guest", None),
    ("setvcpus 5 --guest", None),
    ("setvcpus 9", None),
    ("setvcpus 9", None),
    ("setvcpus 10 --live --config", None),
    ("setvcpus 17", None),
    ("setvcpus 17 --config", None),
    ("setvcpus 4 --config", None),
    ("setvcpus 6 --config --hotpluggable", None),
    ("setvcpus 16 --config --maximum", None),
    ("setvcpus 12 --config --maximum", None),
    ("setvcpus 2 --config", None),
    ("setvcpu 13,14 --enable", SEVERAL),
    ("setvcpu 12 --enable --core", NO_CALL),
    ("setvcpu 1 --enable --numa-node", NO_CALL),
    # Under TCG there is only a firmware, which leaves CPU hotplug in legacy mode.
    ("setvcpu 1 --disable --timeout 0", None),
]
NUMA_OFF = [
    ("setvcpu 5 --enable", None),
    ("setvcpu 5 --enable --config", None),
    ("setvcpu 5 --enable --live", None),
    ("setvcpu 5 --enable --live --config", None),
    ("setvcpu 16 --enable", None),
    ("setvcpu 0 --disable", None),
    ("setvcpu 1 --disable", None),
    ("setvcpu 2 --disable", None),
    ("setvcpu 5 --disable", None),
    ("setvcpu 5 --disable", None),
    ("setvcpu 3-6 --enable", None),
    ("setvcpu 1 --enable --guest", None),
    ("setvcpus 7", None),
    ("setvcpus 7 --hotpluggable", None),
    ("setvcpus 16", None),
    ("setvcpus 17", None),
    ("setvcpus 20 --maximum --config", None),
    ("setvcpus 2", None),
]
SPARSE_RUNNING = [
    ("setvcpu 2 --enable --live --config", None),
    ("setvcpu 9 --enable", ALREADY),
    ("setvcpus 6", None),
    ("setvcpu 4 --disable --config", None),
    ("setvcpus 3 --config", None),
]
PPC64_RUNNING = [
    ("setvcpu 8-15 --enable", None),
    ("setvcpu 16-23 --enable --live --config", None),
    ("setvcpu 8-15 --enable", ALREADY),
    ("setvcpu 24 --enable", None),
    ("setvcpu 24-27 --enable", None),
    ("setvcpu 24-40 --enable", None),
    ("setvcpu 40 --enable", None),
    ("setvcpu 0-7 --disable", None),
    ("setvcpus 32", None),
    ("setvcpus 36", None),
    ("setvcpus 40 --live --config", None),
    ("setvcpus 8 --config", None),
    ("setvcpu 32-39 --disable --config", None),
    ("setvcpu 24-27 --enable --config", HALF),
    ("setvcpus 36 --config", HALF),
    ("setvcpus 36 --live --config", None),
]
PPC64_OFF = [
    ("setvcpu 8-15 --enable", None),
    ("setvcpu 16-23 --enable --config", None),
    ("setvcpu 0-7 --disable", None),
    ("setvcpu 8-15 --disable", None),
    ("setvcpu 32 --enable --live", None),
    ("setvcpus 24", None),
    ("setvcpus 41", None),
    ("setvcpus 20", HALF),
]
#: On KVM, with a guest that ejects.
UNPLUGS = [
    ("setvcpu 7 --disable", None),
    ("setvcpu 7 --disable", ALREADY),
    ("setvcpu 7 --enable", None),
    ("setvcpu 6 --disable --live --config", None),
    ("setvcpus 4", None),
    ("setvcpus 2 --live --config", None),
    ("setvcpus 5", None),
    ("setvcpus 1", COLD),
    ("setvcpu 3,4 --disable", SEVERAL),
]


@pytest.fixture(scope="module")
async def daemon():
    async with daemon_of_our_own() as running:
        yield running


async def differences(daemon, xml, cases, *, start, api=False):
    """Ask both, one after the other. After a deliberate difference both begin anew, from the same
    state.
    """
    async with AsyncExitStack() as stack:
        both = None
        for words, reason in cases:
            if both is None:
                await stack.aclose()
                both = await stack.enter_async_context(pair(daemon, xml, start=start, api=api))
            found = await both.ask(words)
            if reason is not None and ("live" in found.differs or "config" in found.differs):
                both = None
            yield words, reason, found


#: Which way round each of them is: how it ends with us, and libvirt's error. Of what was
#: cold-plugged QEMU is asked, whatever it says of it; a count below that is
#: VIR_ERR_CONFIG_UNSUPPORTED there.
ENDS = {
    ALREADY: ({"applied"}, {"VIR_ERR_INVALID_ARG"}),
    SEVERAL: ({"applied"}, {"VIR_ERR_OPERATION_UNSUPPORTED"}),
    HALF: ({"refused"}, {None}),
    NO_CALL: ({"applied"}, {None}),
    COLD: (
        {"applied", "pending", "failed", "refused"},
        {"VIR_ERR_OPERATION_UNSUPPORTED", "VIR_ERR_CONFIG_UNSUPPORTED"},
    ),
}


async def check(daemon, xml, cases, *, start=True, api=False):
    unexpected = []
    async for words, reason, found in differences(daemon, xml, cases, start=start, api=api):
        ours, theirs = found.ours, found.libvirt
        said = (
            f"{words}: {found.differs}: {ours.error} {ours.message} | {theirs.error}"
            f" {theirs.message}"
        )
        if bool(found.differs) != (reason is not None):
            unexpected.append(said)
        if reason is None:
            # Either both have done it, or both have not, with one code.
            good = (
                (ours.outcome == "applied") == (ours.error is None) == (theirs.outcome == "applied")
            )
        else:
            good = ours.outcome in ENDS[reason][0] and theirs.error in ENDS[reason][1]
        if not good:
            unexpected.append(f"{ours.outcome} | {theirs.outcome}: {said}")
    assert not unexpected, "\n".join(unexpected)


CELLS = {
    "numa": (NUMA, NUMA_RUNNING, True),
    "numa, shut off": (NUMA, NUMA_OFF, False),
    "sparse": (SPARSE, SPARSE_RUNNING, True),
    "ppc64": (PPC64, PPC64_RUNNING, True),
    "ppc64, shut off": (PPC64, PPC64_OFF, False),
}


@pytest.mark.parametrize("name", CELLS)
async def test_libvirt_and_we_answer_alike(daemon, name):
    xml, cases, start = CELLS[name]
    await check(daemon, xml, cases, start=start)


@pytest.mark.parametrize("name", CELLS)
async def test_by_its_api_too(daemon, name):
    xml, cases, start = CELLS[name]
    # Of what was cold-plugged libvirt knows no device.
    cases = [(words, reason) for words, reason in cases if reason != COLD]
    await check(daemon, xml, cases, start=start, api=True)


@pytest.mark.skipif(why_no_kvm() is not None, reason=f"KVM: {why_no_kvm()}")
async def test_unplugs_alike(daemon, tmp_path):
    await check(daemon, numa("kvm", firmware(tmp_path), EJECTING), UNPLUGS)


def test_every_deliberate_difference_is_in_the_docs():
    text = Path("docs/libvirt.md").read_text()
    used = {reason for _, cases, _ in CELLS.values() for _, reason in cases} | {
        reason for _, reason in UNPLUGS
    }
    for reason in used - {None}:
        assert f"**{reason}**" in text, reason
    assert sum(len(cases) for _, cases, _ in CELLS.values()) + len(UNPLUGS) >= 40
