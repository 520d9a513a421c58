"""A call that is cancelled at any of its awaits: what the domain says afterwards is what QEMU has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from random import Random
from typing import Any

import pytest

import qmpvcpu
from tests.support import soaking
from tests.support.awaits import cancelled_after, cancelled_at
from tests.support.ejecting import ejecting
from tests.support.hosts import why_no_kvm
from tests.support.waiting import until

pytestmark = [
    pytest.mark.qemu,
    # Under TCG a QEMU can take only so many plugs.
    pytest.mark.skipif(why_no_kvm() is not None, reason=f"KVM: {why_no_kvm()}"),
]

SLOTS = 8
SAMPLE = 24
#: Seconds that a call takes, about.
LONGEST = 0.01
#: Calls in a batch, after which all is looked at again, for so many seconds in a long run.
BATCH = 50
AGAIN = 10.0


def document(enabled) -> str:
    rows = (
        f"<vcpu id='{n}' enabled='{'yes' if n in enabled else 'no'}'"
        f" hotpluggable='{'yes' if n else 'no'}'/>"
        for n in range(SLOTS)
    )
    return f"""<domain type='kvm'><name>d</name><vcpu current='{len(enabled)}'>{SLOTS}</vcpu>
<vcpus>{"".join(rows)}</vcpus><os><type arch='x86_64' machine='q35'>hvm</type></os></domain>
"""


class Guest:
    """One machine, our domain, and what QEMU itself says of it."""

    def __init__(self, qemu, domain, definition, random: Random) -> None:
        self.qemu, self.domain, self.definition, self.random = qemu, domain, definition, random

    async def plugged(self) -> set[int]:
        return {row["cpu-index"] for row in await self.qemu.execute("query-cpus-fast")}

    def call(self, kind: str, before: set[int]) -> Coroutine[Any, Any, Any]:
        random, domain = self.random, self.domain
        off, on = sorted(set(range(SLOTS)) - before), sorted(before - {0})
        both = {"live": True, "config": True} if random.random() < 0.3 else {}
        match kind:
            case "enable":
                return domain.enable(
                    random.sample(off, min(len(off), random.randint(1, 3))), **both
                )
            case "disable" | "atomic":
                ids = random.sample(on, min(len(on), random.randint(1, 3)))
                return domain.disable(ids, atomic=kind == "atomic", **both)
            case "up":
                return domain.set_vcpus(random.randint(len(before) + 1, SLOTS), **both)
            case "down":
                return domain.set_vcpus(random.randint(1, len(before) - 1), **both)
            case _:
                enabled = {0, *random.sample(range(1, SLOTS), random.randint(1, SLOTS - 2))}
                return domain.apply(document(enabled).encode(), **both)

    async def prepare(self) -> set[int]:
        """Some are plugged, some are not, and nothing is pending."""
        before = await self.plugged()
        if not 2 < len(before) < SLOTS - 1:
            await self.domain.set_vcpus(4)
        before = await self.plugged()
        self.definition.write_text(document(before))
        return before

    async def cancel(self, kind: str, at: int | float) -> bool:
        """At that await, or after so many seconds: whether that was before its end. All that is
        wrong then fails the test.
        """
        before, text = await self.prepare(), self.definition.read_text()
        # One that is stopped ends no unplug; nor an undo, which each time is waited for.
        is_stopped = self.random.random() < (0.4 if kind in ("disable", "down", "atomic") else 0.02)
        if is_stopped:
            await self.qemu.execute("stop")
        cancelled = False
        try:
            call = self.call(kind, before)
            await (cancelled_at(call, at) if isinstance(at, int) else cancelled_after(call, at))
        except asyncio.CancelledError:
            cancelled = True
            self.check(before, await self.plugged(), text)
        if is_stopped:
            await self.qemu.execute("cont")
        await self.settle()
        return cancelled

    def check(self, before: set[int], now: set[int], text: str) -> None:
        left = self.domain.interrupted
        changed, pending = set(left.changed_ids), set(left.pending)
        # What is pending may have gone since.
        assert changed == (before ^ now) - pending, (left, before, now)
        assert pending <= before | now, (left, before, now)
        assert left.unsure_ids == ()
        assert not left.definition_unsure
        assert left.definition_written == (self.definition.read_text() != text)

    async def settle(self) -> None:
        """Every unplug ends, and the domain knows."""

        async def is_settled() -> bool:
            state = await self.domain.state()
            return not self.domain.pending_ids and set(state.enabled_ids) == await self.plugged()

        await until(is_settled, "nothing is pending, and the domain has what QEMU has")

    async def look_again(self, seconds: float) -> None:
        """Nothing comes or goes by itself later."""
        before = await self.plugged()
        end = time.monotonic() + seconds
        while True:
            assert (await self.plugged(), self.domain.pending_ids) == (before, ())
            assert set((await self.domain.state()).enabled_ids) == before
            if time.monotonic() >= end:
                return
            await asyncio.sleep(0.25)


KINDS = ("enable", "disable", "up", "down", "apply", "atomic")


async def test_cancelled_at_any_await_the_domain_says_what_qemu_has(tmp_path):
    """`scripts/soak cancels` is the long one."""
    wanted = soaking.count(SAMPLE)
    random = Random(soaking.seed(24))
    definition = tmp_path / "d.xml"
    definition.write_text(document(range(4)))
    #: At which await it comes next; from the first again, once the call ends before.
    next_at = dict.fromkeys(KINDS, 1)
    cancels = batches = 0
    async with (
        ejecting(f"4,maxcpus={SLOTS}") as qemu,
        qmpvcpu.connect(qmp=qemu.qmp, xml=str(definition)) as domain,
    ):
        guest = Guest(qemu, domain, definition, random)
        while cancels < wanted:
            kind = random.choice(KINDS)
            if random.random() < 0.5:
                cancels += await guest.cancel(kind, random.uniform(0, LONGEST))
            elif await guest.cancel(kind, next_at[kind]):
                cancels += 1
                next_at[kind] += 1
            else:
                next_at[kind] = 1
            if wanted > SAMPLE and cancels >= (batches + 1) * BATCH:
                batches += 1
                await guest.look_again(AGAIN)
        await guest.look_again(AGAIN if wanted > SAMPLE else 0)
