"""Clients that fight over the same vCPUs: no call of ours claims what was not."""

from __future__ import annotations

import pytest

from tests.support import soaking
from tests.support.ejecting import ejecting
from tests.support.fighting import MONITORS, Fight, fought
from tests.support.hosts import why_no_kvm

pytestmark = [
    pytest.mark.qemu,
    # Under TCG a QEMU can take only so many plugs.
    pytest.mark.skipif(why_no_kvm() is not None, reason=f"KVM: {why_no_kvm()}"),
]

#: A plug into a slot whose last CPU has left it, and not yet all of QEMU: no client can see that
#: beforehand.
KNOWN_END = "Detected duplicate SaveStateEntry: id=cpu_common"


@pytest.fixture
async def fights(tmp_path):
    """One after the other, until as many calls were made as are wanted."""
    wanted, seed, found = soaking.count(40), soaking.seed(7), []
    while (made := sum(len(fight.claims) for fight in found)) < wanted * 4 // 5:
        folder = tmp_path / str(len(found))
        folder.mkdir()
        async with ejecting("1,maxcpus=8", monitors=MONITORS) as qemu:
            found.append(await fought(qemu, folder, wanted - made * 5 // 4, seed + 10 * len(found)))
            if qemu.has_exited:
                assert KNOWN_END in qemu.stderr()
    return found


async def test_no_claim_is_false_while_others_plug_and_unplug_the_same_vcpus(fights: list[Fight]):
    """Two processes of ours and a bare client. `scripts/soak fight` is the long one."""
    assert [false for fight in fights for false in fight.false] == []
    print([fight.outcomes for fight in fights])
    assert sum(fight.outcomes.get("applied", 0) for fight in fights) > soaking.count(40) // 2
