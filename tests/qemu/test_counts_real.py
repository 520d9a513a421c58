"""Any sequence of requests on a real QEMU: never more vCPUs than there were or are asked for, as
many as asked where the guest obeys, `applied` only then, and the report is what QEMU says.

The same on a guest of sets, with an agent: tests/unit/test_count_sequences.py.
`scripts/soak counts` runs ten times as many of both.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from tests.support import soaking
from tests.support.ejecting import ejecting
from tests.support.fighting import watched
from tests.support.hosts import why_no_kvm
from tests.support.monitor import connected
from tests.support.waiting import until

pytestmark = [
    pytest.mark.qemu,
    # Under TCG a QEMU can take only so many plugs.
    pytest.mark.skipif(why_no_kvm() is not None, reason=f"KVM: {why_no_kvm()}"),
]

SLOTS = 8
SAMPLE = 8
#: Sequences of the guest of sets for one of these.
EACH = 50
NUMA = [
    word
    for node in range(2)
    for word in (
        *("-object", f"memory-backend-ram,size=32M,id=m{node}"),
        *("-numa", f"node,nodeid={node},memdev=m{node},cpus={node * 4}-{node * 4 + 3}"),
    )
]


def document(enabled) -> str:
    rows = (
        f"<vcpu id='{n}' enabled='{'yes' if n in enabled else 'no'}'"
        f" hotpluggable='{'yes' if n else 'no'}'/>"
        for n in range(SLOTS)
    )
    cells = (
        f"<cell id='{n}' cpus='{n * 4}-{n * 4 + 3}' memory='32' unit='MiB'/>" for n in range(2)
    )
    return f"""<domain type='kvm'><name>d</name><memory unit='MiB'>64</memory>
<vcpu current='{len(enabled)}'>{SLOTS}</vcpu><vcpus>{"".join(rows)}</vcpus>
<os><type arch='x86_64' machine='q35'>hvm</type></os><cpu><numa>{"".join(cells)}</numa></cpu></domain>
"""


class Guest:
    """One machine, our domain, and what QEMU itself says of it."""

    def __init__(self, qemu, domain, judge, definition, random: Random) -> None:
        self.qemu, self.domain, self.judge, self.definition = qemu, domain, judge, definition
        self.random = random
        self.runs = True

    async def plugged(self) -> set[int]:
        return {row["cpu-index"] for row in await self.qemu.execute("query-cpus-fast")}

    async def become_random(self) -> None:
        """Some are plugged, some of them from the start, and some are pending."""
        random = self.random
        await self.let_run()
        enabled = {0, *random.sample(range(1, SLOTS), random.randint(0, SLOTS - 1))}
        await self.domain.apply(document(enabled).encode())
        self.definition.write_text(document(enabled))
        pending = [n for n in enabled - {0} if random.random() < 0.2]
        if pending:
            await self.qemu.execute("stop")
            await self.domain.disable(pending, timeout=0)
            self.runs = False
            if random.random() < 0.5:
                await self.let_run()

    async def let_run(self) -> None:
        """Every unplug ends."""
        await self.qemu.execute("cont")
        self.runs = True

        async def is_settled() -> bool:
            state = await self.domain.state()
            return not self.domain.pending_ids and set(state.enabled_ids) == await self.plugged()

        await until(is_settled, "nothing is pending")

    def request(self, before: set[int]):
        """Its kind, the call, how many it wants enabled, and what it wants of which."""
        random, domain = self.random, self.domain
        both = {"live": True, "config": True} if random.random() < 0.4 else {}
        both["timeout"] = 30 if self.runs else 0
        match random.randrange(4):
            case 0:
                total = random.randint(1, SLOTS)
                return "total", lambda: domain.set_vcpus(total, **both), total, {}
            case 1:
                ids, on = (
                    random.sample(range(1, SLOTS), random.randint(1, 3)),
                    random.random() < 0.5,
                )
                call = domain.enable if on else domain.disable
                after = before | set(ids) if on else before - set(ids)
                return "ids", lambda: call(ids, **both), len(after), dict.fromkeys(ids, on)
            case 2:
                on, count, node = random.random() < 0.5, random.randint(1, 3), random.randrange(2)
                flag = VcpuFlag.ENABLE if on else VcpuFlag.DISABLE
                wanted = len(before) + (count if on else -count)
                return "node", lambda: domain.numa_node(node, flag, count=count, **both), wanted, {}
            case _:
                enabled = {0, *random.sample(range(1, SLOTS), random.randint(0, SLOTS - 1))}
                wants = {n: n in enabled for n in range(SLOTS)}
                return (
                    "list",
                    lambda: domain.apply(document(enabled).encode(), **both),
                    len(enabled),
                    wants,
                )

    async def ask(self) -> str:
        """One request; how it ended. All that is wrong fails the test."""
        before, text = await self.plugged(), self.definition.read_text()
        was_pending = set(self.domain.pending_ids)
        kind, call, wanted, wants = self.request(before)
        samples = []
        try:
            async with watched(self.judge, samples):
                end = await call()
        except qmpvcpu.VcpuRefused as refused:
            assert await self.plugged() | was_pending == before | was_pending, refused
            assert self.definition.read_text() == text
            return "refused"
        now = await self.plugged()
        facts = (end, sorted(before), sorted(now), wanted, wants)
        if kind != "list":
            most = max((len(sample.threads) for sample in samples), default=0)
            assert most <= max(len(before), wanted), facts
        if end.outcome == "applied":
            # Of a node's, some that are to be enabled may be plugged, and pending.
            assert len(now) == wanted or kind == "node", facts
            assert all((n in now) is on for n, on in wants.items()), facts
        else:
            assert (end.outcome, self.runs) == ("pending", False), facts
            assert end.pending, facts
        moved = set(
            end.changed_ids
            if not end.defined and not end.config_changed_ids
            else end.live_changed_ids
        )
        # Awaited, and plugged again: it has another thread now.
        assert moved - was_pending == (before ^ now) - was_pending, facts
        assert all(
            row.enabled is (row.id in now) for row in end.rows if not end.config_changed_ids
        ), facts
        assert end.defined == (self.definition.read_text() != text), facts
        state = await self.domain.state()
        assert set(state.enabled_ids) == now, facts
        assert set(self.domain.pending_ids) <= now, facts
        return str(end.outcome)


@asynccontextmanager
async def guests(folder, random: Random):
    """Two machines: one begins with one vCPU, the other with six that are plugged from the start."""
    async with AsyncExitStack() as stack:
        found = []
        for number, smp in enumerate((f"1,maxcpus={SLOTS}", f"6,maxcpus={SLOTS}")):
            definition = folder / f"{number}.xml"
            definition.write_text(document({0}))
            qemu = await stack.enter_async_context(ejecting(smp, *NUMA, monitors=("qmp", "judge")))
            judge = await stack.enter_async_context(connected(str(qemu.folder / "judge")))
            domain = await stack.enter_async_context(
                qmpvcpu.connect(qmp=qemu.qmp, xml=str(definition))
            )
            await qemu.execute("stop")
            found.append(Guest(qemu, domain, judge, definition, random))
        yield found


async def test_any_sequence_of_requests_keeps_and_reaches_its_count(tmp_path):
    random = Random(soaking.seed(19))
    ends = []
    async with guests(tmp_path, random) as both:
        for number in range(max(soaking.count(SAMPLE * EACH) // EACH, 1)):
            guest = both[number % 2]
            await guest.become_random()
            ends += [await guest.ask() for _ in range(random.randint(1, 6))]
            # Its guest never rests.
            await guest.qemu.execute("stop")
    assert {"applied", "pending"} <= set(ends)
