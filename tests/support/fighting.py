"""Several clients of one QEMU that fight over the same vCPUs; and what each call of ours claimed,
compared with what QEMU had meanwhile.

This file is the program of one of our processes, too:
`python -m tests.support.fighting ADDRESS SEED COUNT LOG`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import qmpvcpu
from tests.support.monitor import Connection, QmpError, connected
from tests.support.qemus import Qemu
from tests.support.waiting import until

#: The vCPUs that all of them want.
IDS = (1, 2, 3, 4)
#: Seconds that a call gives the guest; that of the tests ejects within milliseconds.
PATIENCE = 20.0


# -- one of our processes --------------------------------------------------------------------------


async def fight(address: str, random: Random, count: int, log: Path) -> None:
    """Random calls; one JSON line for each. The connection is kept for some calls, and made anew
    then.
    """
    with suppress(qmpvcpu.VcpuConnectionError):
        while count > 0:
            calls = min(count, random.choice((1, 3, 10)))
            count -= calls
            async with qmpvcpu.connect(qmp=address, qmp_log=qmpvcpu.QmpLog(log)) as domain:
                for _ in range(calls):
                    await _call(domain, random)


async def _call(domain: qmpvcpu.Domain, random: Random) -> None:
    ids = sorted(random.sample(IDS, random.randint(1, 2)))
    enable = random.random() < 0.5
    begin = time.time()
    end = await _end_of((domain.enable if enable else domain.disable)(ids, timeout=PATIENCE))
    told = {"ids": ids, "enable": enable, "begin": begin, "end": time.time(), **end}
    print(json.dumps(told), flush=True)


async def _end_of(call: Any) -> dict[str, Any]:
    done: qmpvcpu.Outcome | qmpvcpu.VcpuError
    try:
        done = await call
    except qmpvcpu.VcpuConnectionError:
        raise  # QEMU has ended
    except qmpvcpu.VcpuError as error:
        done = error
    text = done.message if isinstance(done, qmpvcpu.VcpuError) else ""
    return {"outcome": str(done.outcome), "changed": list(done.changed_ids), "text": text}


# -- what was claimed, and what was ----------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One call of ours, and how it said that it ended; times in seconds since the epoch."""

    ids: tuple[int, ...]
    enable: bool
    begin: float
    end: float
    outcome: str
    changed: tuple[int, ...]
    text: str
    who: int


@dataclass(frozen=True)
class Sample:
    """One `query-cpus-fast`: vCPU id -> thread id, sent at `sent` and answered at `replied`."""

    sent: float
    replied: float
    threads: Mapping[int, int]


@dataclass(frozen=True)
class Plug:
    """A `device_add` that QEMU took; `who`: -1 is the bare client."""

    vcpu: int
    sent: float
    replied: float
    who: int


@dataclass
class Truth:
    """What QEMU had, as far as it is known for certain: no two lives of a vCPU have one thread id."""

    samples: list[Sample] = field(default_factory=list)
    plugs: list[Plug] = field(default_factory=list)

    def was_absent(self, vcpu: int, begin: float, end: float) -> bool:
        """Whether it surely was unplugged all the time."""
        around = [s for s in self.samples if s.replied >= begin and s.sent <= end]
        before = [s for s in self.samples if s.replied < begin][-1:]
        if any(vcpu in sample.threads for sample in (*before, *around)):
            return False
        begin = before[0].sent if before else begin
        return not any(p.vcpu == vcpu and p.replied >= begin and p.sent <= end for p in self.plugs)

    def was_present(self, vcpu: int, begin: float, end: float) -> bool:
        """Whether it surely was plugged all the time."""
        before = [s for s in self.samples if s.replied <= begin][-1:]
        after = next((s for s in self.samples if s.sent >= end), None)
        if not before or after is None or vcpu not in before[0].threads:
            return False
        return before[0].threads[vcpu] == after.threads.get(vcpu)

    def against(self, claim: Claim) -> list[str]:
        """What of a claim cannot be."""
        never, always = (
            (self.was_absent, self.was_present)
            if claim.enable
            else (self.was_present, self.was_absent)
        )
        middle = (claim.begin + claim.end) / 2
        if claim.outcome == "applied":
            found = [f"{n} never was so" for n in claim.ids if never(n, claim.begin, claim.end)]
        elif claim.outcome == "refused":
            found = ["nothing is against it"]
        else:
            done = all(always(n, middle, claim.end) for n in claim.ids)
            found = ["all of it was so"] if done else []
        for number in claim.changed:
            mine = [p for p in self.plugs if p.who == claim.who and p.vcpu == number]
            if claim.enable and not any(claim.begin <= p.sent <= claim.end for p in mine):
                found.append(f"{number} was not plugged by this call")
            if not claim.enable and self.was_present(number, claim.begin, claim.end):
                found.append(f"{number} was never unplugged")
        return found


@dataclass(frozen=True)
class Fight:
    claims: list[Claim]
    truth: Truth

    @property
    def false(self) -> list[tuple[list[str], Claim]]:
        """The claims that cannot be, and why."""
        return [(why, claim) for claim in self.claims if (why := self.truth.against(claim))]

    @property
    def outcomes(self) -> dict[str, int]:
        found = [claim.outcome for claim in self.claims]
        return {outcome: found.count(outcome) for outcome in sorted(set(found))}


# -- the fight -------------------------------------------------------------------------------------

#: Names of the QMP sockets that such a QEMU needs.
MONITORS = ("qmp", "other", "bare", "judge")


async def fought(qemu: Qemu, folder: Path, count: int, seed: int) -> Fight:
    """`count` calls: two processes of ours make two fifths each, a bare client the rest. They end
    early if QEMU does.
    """
    async with qmpvcpu.connect(qemu.qmp) as domain:
        slots = (await domain.state()).entities
    vcpu_of = {_key(dict(slot.props or {})): slot.id for slot in slots}
    truth = Truth()
    claims: list[Claim] = []
    each = max(count * 2 // 5, 1)
    logs = [folder / f"{who}.log" for who in range(2)]
    async with (
        connected(str(qemu.folder / "judge")) as judge,
        connected(str(qemu.folder / "bare")) as bare,
        watched(judge, truth.samples),
    ):
        commands = [
            (str(qemu.folder / MONITORS[who]), str(seed + who), str(each), str(logs[who]))
            for who in range(2)
        ]
        ours = [await _process(*words) for words in commands]
        turns = asyncio.Queue[None]()
        rough = asyncio.create_task(_bare(bare, Random(seed + 2), slots, truth.plugs, turns))
        try:
            async with asyncio.TaskGroup() as group:
                for who, process in enumerate(ours):
                    group.create_task(_read(process, who, claims, turns))
        finally:
            rough.cancel()
            await asyncio.wait([rough])
            for process in ours:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        seen = len(truth.samples)
        await until(lambda: qemu.has_exited or len(truth.samples) > seen + 2, "two more looks")
    for who, log in enumerate(logs):
        truth.plugs += _plugs(log, who, vcpu_of)
    return Fight(claims, truth)


async def _process(*words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.fighting", *words), stdout=asyncio.subprocess.PIPE
    )


async def _read(
    process: asyncio.subprocess.Process, who: int, claims: list[Claim], turns: asyncio.Queue[None]
) -> None:
    assert process.stdout is not None
    async for line in process.stdout:
        told = json.loads(line)
        ids, changed = tuple(told.pop("ids")), tuple(told.pop("changed"))
        claims.append(Claim(ids=ids, changed=changed, who=who, **told))
        turns.put_nowait(None)
    assert await process.wait() == 0


async def _bare(
    bare: Connection,
    random: Random,
    slots: Iterable[Any],
    plugs: list[Plug],
    turns: asyncio.Queue[None],
) -> None:
    """One command for each fourth call of ours."""
    by_first = {slot.first: slot for slot in slots}
    number = 0
    while True:
        for _ in range(4):
            await turns.get()
        number += 1
        slot = by_first[random.choice(IDS)]
        sent = time.time()
        with suppress(QmpError, qmpvcpu.VcpuConnectionError):
            if random.random() < 0.5:
                await bare.command(
                    "device_add", driver=slot.driver, id=f"bare{number}", **dict(slot.props or {})
                )
                plugs.append(Plug(slot.first, sent, time.time(), -1))
                continue
            rows = await bare.command("query-hotpluggable-cpus")
            path = next(
                (r.get("qom-path") for r in rows if _key(r["props"]) == _key(dict(slot.props))),
                None,
            )
            if path is not None:
                await bare.command("device_del", id=path)


@asynccontextmanager
async def watched(judge: Connection, samples: list[Sample]) -> Any:
    """What QEMU has, asked again and again."""

    async def watch() -> None:
        # Until QEMU ends, or the fight.
        while True:
            sent = time.time()
            rows = await judge.command("query-cpus-fast")
            threads = {row["cpu-index"]: row["thread-id"] for row in rows}
            samples.append(Sample(sent, time.time(), threads))

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def _plugs(log: Path, who: int, vcpu_of: Mapping[Any, int]) -> list[Plug]:
    """What one process has plugged, by its log."""
    asked: dict[str, tuple[int, float]] = {}
    found = []
    for line in log.read_text().splitlines():
        row = json.loads(line)
        message, when = row["message"], row["time"]
        if message.get("execute") == "device_add":
            props = {
                key: value
                for key, value in message["arguments"].items()
                if key not in ("id", "driver")
            }
            asked[message["id"]] = vcpu_of[_key(props)], when
        elif message.get("execute") == "qmp_capabilities":
            asked.clear()  # another connection, whose ids begin anew
        elif "return" in message and message.get("id") in asked:
            vcpu, sent = asked.pop(message["id"])
            found.append(Plug(vcpu, sent, when, who))
        elif "error" in message:
            asked.pop(message.get("id"), None)
    return found


def _key(props: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset(props.items())


if __name__ == "__main__":
    where, seed, calls, log = sys.argv[1:]
    asyncio.run(fight(where, Random(int(seed)), int(calls), Path(log)))
