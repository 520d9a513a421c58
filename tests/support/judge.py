"""Public calls on a hostile QEMU or guest agent, judged:
`python -m tests.support.judge WHO COUNT SEED`.

WHO is `qmp` or `agent`; the server is a process of its own (`tests.support.hostile`), so that the
memory measured is ours. The figures go to stdout as one JSON document. It ends with a traceback at
the first call that

- ends otherwise than with a result or a `VcpuError`,
- ends later than its own deadline (`Deadlines`), in this process's own time,
- claims what QEMU, or the guest, did not say (`Said`),
- leaves a task with an error nobody looks at, or a word of asyncio's.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import qmpvcpu
import qmpvcpu.core.engine.timers
import qmpvcpu.domain.agent
import qmpvcpu.domain.domain
import qmpvcpu.domain.event_bus
import qmpvcpu.domain.in_guest
import qmpvcpu.qemu.agent
import qmpvcpu.qemu.monitor
from qmpvcpu import OutcomeKind, VcpuError, VcpuFlag
from qmpvcpu.cli import render
from qmpvcpu.core.state.guest_view import parse_guest_vcpus
from qmpvcpu.core.state.inventory import parse_cpus_fast, parse_hotpluggable_cpus
from tests.support.measured import peak
from tests.support.recordings import address

CONNECT, COMMAND, GUEST = 3.0, 0.7, 0.3
#: Sessions at once.
JUDGES = 24
#: MiB of this process, for all sessions together; a few of them keep a large answer.
MEMORY = 150
#: Most characters of an error or a message.
LONGEST = 20_000
LISTED = b"""<domain><name>d</name><vcpu>4</vcpu><vcpus><vcpu id='0' enabled='yes'/><vcpu id='1' enabled='yes'/>
<vcpu id='2' enabled='no'/></vcpus></domain>"""


def hasten() -> None:
    """Deadlines that are no option of `connect` are made short too."""
    qmpvcpu.core.engine.timers.UNDO_SECONDS = GUEST  # type: ignore[misc]
    qmpvcpu.domain.in_guest.UNDO_SECONDS = GUEST  # type: ignore[misc]
    qmpvcpu.domain.event_bus._LOOK_EVERY = 0.05  # type: ignore[misc]
    qmpvcpu.domain.agent._LOOK_SECONDS = GUEST  # type: ignore[misc]
    qmpvcpu.domain.agent._SWITCH_SECONDS = GUEST  # type: ignore[misc]
    qmpvcpu.domain.agent._RETRY_SECONDS = 0.0  # type: ignore[misc]
    qmpvcpu.domain.agent._GRACE = 0.1  # type: ignore[misc]
    qmpvcpu.qemu.agent._CLOSE_SECONDS = 0.1  # type: ignore[misc]
    client = qmpvcpu.qemu.agent.AgentClient
    client.__init__.__defaults__ = (COMMAND,)  # type: ignore[misc]
    get_vcpus = client.get_vcpus

    async def noted(self: Any) -> object:
        reply = await get_vcpus(self)
        with suppress(VcpuError):
            parse_guest_vcpus(reply)
            SAID.get().guest = reply
        return reply

    client.get_vcpus = noted  # type: ignore[method-assign]


class Said:
    """What this client was told last: `qmp_log` of a connection, and the lists of the guest's CPUs.

    An enabled vCPU is one whose slot's path, as `query-hotpluggable-cpus` has it or as our
    `device_add` made it, has a CPU in the last `query-cpus-fast`; a disabled one has none. The
    slots are those that were said last and agreed with the CPUs. Of the guest, the last list of its
    CPUs counts.
    """

    def __init__(self) -> None:
        self.reset()
        self.guest: Any = None

    def reset(self) -> None:
        self.asked: dict[str, tuple[str, Mapping[str, Any]]] = {}
        self.slots: Any = None
        self._listed: Any = None
        self.cpus: Any = None
        self.added: dict[str, set[str]] = {}
        self.queries = 0
        self.messages: list[str] = []

    def write(self, direction: str, message: Mapping[str, Any]) -> None:
        self.messages = [*self.messages[-30:], f"{direction} {str(dict(message))[:600]}"]
        number = message.get("id")
        if direction == "send":
            arguments: Any = message.get("arguments", {})
            self.asked[str(number)] = str(message["execute"]), arguments
            if message["execute"] == "device_add":
                props = {
                    key: value for key, value in arguments.items() if key not in ("id", "driver")
                }
                self.added.setdefault(_key(props), set()).add(
                    f"/machine/peripheral/{arguments['id']}"
                )
        elif isinstance(number, str) and "event" not in message and number in self.asked:
            command, _ = self.asked.pop(number)
            with suppress(VcpuError):
                if "return" in message and command == "query-cpus-fast":
                    parse_cpus_fast(message["return"], props=False)
                    self.cpus = message["return"]
                    self.queries += 1
                    if self._listed is not None and _paths(self._listed) == self.bases():
                        self.slots = self._listed
                elif "return" in message and command == "query-hotpluggable-cpus":
                    parse_hotpluggable_cpus(message["return"])
                    self._listed = message["return"]

    def bases(self) -> set[str]:
        """The paths of all CPUs; of ppc64's, of their cores."""
        paths = [cpu["qom-path"] for cpu in self.cpus]
        return {re.sub(r"/thread\[\d{1,6}\]\Z", "", path) for path in paths}

    def online(self) -> dict[int, bool]:
        """The guest's CPU -> whether it is online, by what was said last."""
        return {row["logical-id"]: row["online"] for row in self.guest}

    def enabled(self, ids: Iterable[int]) -> dict[int, bool]:
        """vCPU id -> whether it is there, by what was said last. Where no slots were said, QEMU has
        the CPUs that it lists, and of `ids`, which -smp may have room for, no others.
        """
        bases = self.bases()
        if self.slots is None:
            return dict.fromkeys(ids, False) | dict.fromkeys(range(len(self.cpus)), True)
        claimed = _paths(self.slots)
        found: dict[int, bool] = {}
        for slot in sorted(self.slots, key=address):
            first = len(found)
            # An empty slot is full once its device is there, no matter which client added it.
            known = self.added.get(_key(slot["props"]), set()) | {
                f"/machine/peripheral/vcpu{first}"
            }
            known = known - claimed | _paths([slot])
            for number in range(slot["vcpus-count"]):
                found[first + number] = bool(known & bases)
        return found


def _paths(slots: Any) -> set[str]:
    return {slot["qom-path"] for slot in slots if slot.get("qom-path") is not None}


def _key(props: Mapping[str, Any]) -> str:
    return json.dumps(props, sort_keys=True)


#: Of the session that this task runs.
SAID: ContextVar[Said] = ContextVar("said")


class Judge:
    """Calls of one run, and its figures."""

    def __init__(self, seed: str, folder: Path, court: Court) -> None:
        self.seed = seed
        self.folder = folder
        self.court = court
        self.calls: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.worst: dict[str, float] = {}
        self.overshoot = 0.0
        self.said = Said()
        self.session = 0
        #: Whether the last call that failed did so for want of a connection.
        self.is_lost = False
        #: What the last `set_guest_vcpus` asks for.
        self.online = False

    async def call(self, name: str, work: Awaitable[Any], allowed: float) -> Any:
        """Its result, None if it ends with an error of ours."""
        began, waited = time.monotonic(), delay()
        self.calls[name] += 1
        queries = self.said.queries
        try:
            result = await work
        except VcpuError as error:
            result = None
            self.is_lost = (
                isinstance(error, qmpvcpu.VcpuConnectionError) and error.reason != "no-agent"
            )
            self.ends[f"{error.outcome}"] += 1
            check_text([error.message, error.hint or "", *error.messages])
            json.dumps(error.to_json(), allow_nan=False)
        except StopAsyncIteration:
            result = None
        else:
            if isinstance(result, qmpvcpu.Outcome):
                self.ends[str(result.outcome)] += 1
                self.check(name, result, queries)
        seconds = time.monotonic() - began - (delay() - waited)
        self.worst[name] = max(self.worst.get(name, 0.0), seconds)
        self.overshoot = max(self.overshoot, seconds - allowed)
        assert seconds < allowed + 1.0, f"{name} took {seconds:.2f} s, and has {allowed:.2f} s"
        assert not self.court.trouble, self.court.trouble
        return result

    def check(self, name: str, result: qmpvcpu.Outcome, queries: int) -> None:
        """What it claims is what was said."""
        check_text([*result.messages, *result.already])
        document = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert document["outcome"] == str(result.outcome)
        if result.outcome not in (OutcomeKind.APPLIED, OutcomeKind.QUERIED):
            return
        render.outcome(result)
        if result.mechanism == "agent":
            # Online or offline is what the guest said last.
            online = self.said.online()
            if name == "set_guest_vcpus":
                claimed = dict.fromkeys(result.ids, self.online)
            else:
                claimed = {
                    row.logical_id: row.online for row in result.rows if row.logical_id is not None
                }
            assert claimed.items() <= online.items(), f"{name}: said {online}, claimed {claimed}"
            return
        assert self.said.queries > queries, f"{name} is {result.outcome}, and nothing was asked"
        there = self.said.enabled(row.id for row in result.rows)
        for row in result.rows:
            assert row.enabled is there[row.id], (
                f"{name}: vCPU {row.id} is not {row.state}: {there}"
            )

    def check_rows(self, rows: Iterable[qmpvcpu.Vcpu] | None) -> None:
        if rows is not None:
            claimed = {row.id: row.enabled for row in rows}
            there = self.said.enabled(claimed)
            assert claimed == there, f"said: {there}, claimed: {claimed}"

    async def run(self) -> None:
        """Sessions until there is no server any more."""
        while (self.folder / "fake.qmp").exists():
            try:
                await self.run_session()
            except Exception:
                said = "\n  ".join(self.said.messages)
                print(f"session {self.session} of {self.seed}:\n  {said}", file=sys.stderr)
                raise

    async def run_session(self) -> None:
        """One connection, and some calls."""
        self.session += 1
        draw = random.Random(f"{self.seed} session {self.session}")
        self.said = said = Said()
        SAID.set(said)
        self.online, self.is_lost = draw.random() < 0.5, False
        agent = (
            self.folder / "fake.agent" if self.court.who == "agent" or draw.random() < 0.3 else None
        )
        domain = qmpvcpu.connect(
            self.folder / "fake.qmp",
            agent=agent,
            qmp_log=said,
            connect_timeout=CONNECT,
            command_timeout=COMMAND,
        )
        entered = await self.call("connect", domain.__aenter__(), CONNECT + 5 * COMMAND)
        if entered is None:
            return
        try:
            for _ in range(draw.choice((3, 10, 30))):
                await self.any_call(domain, draw)
                if self.is_lost and draw.random() < 0.7:
                    break
        finally:
            await self.call("leave", domain.__aexit__(None, None, None), 0.5)

    async def any_call(self, domain: qmpvcpu.Domain, draw: random.Random) -> None:
        ids = draw.choice(([1], [2], [1, 2], [0], [3, 2], list(range(8)), [7], [1 << 70]))
        options: dict[str, Any] = {"timeout": GUEST} | draw.choice(
            (
                {},
                {},
                {"atomic": True},
                {"wait": False},
                {"retry": 2},
                {"core": True},
                {"guest": True},
                {"force": True},
            )
        )
        read, change = 4 * COMMAND + GUEST, 8 * COMMAND + 6 * GUEST
        calls: dict[str, tuple[Callable[[], Awaitable[Any]], float]] = {
            "enable": (lambda: domain.enable(ids, **options), change),
            "disable": (lambda: domain.disable(ids, **options), change),
            "set_vcpus": (
                lambda: domain.set_vcpus(draw.choice((1, 2, 3, 4, 8)), **options),
                change,
            ),
            "numa_node": (lambda: domain.numa_node(0, VcpuFlag.ENABLE, count=1, **options), change),
            "vcpu": (
                lambda: domain.vcpu(ids[0], draw.choice((VcpuFlag.CURRENT, VcpuFlag.ENABLE))),
                change + 30,
            ),
            "apply": (lambda: domain.apply(LISTED, timeout=GUEST), change),
            "state": (domain.state, read),
            "vcpus": (domain.vcpus, read),
            "plan": (lambda: domain.plan_enable(ids, **options), read + 4 * COMMAND),
            "guest_vcpus": (domain.guest_vcpus, read + 2 * GUEST),
            "set_guest_vcpus": (lambda: domain.set_guest_vcpus(ids, self.online), read + 4 * GUEST),
            "agent_refusal": (domain.agent_refusal, read + GUEST),
            "describe_xml": (domain.describe_xml, read + 8 * COMMAND),
            "dump_xml": (domain.dump_xml, read + 8 * COMMAND),
            "picture": (domain.picture, read + 40 * COMMAND),
            "place": (lambda: domain.place(LISTED), read),
            "pin": (lambda: domain.pin(1, "0"), read),
            "events": (lambda: self.listen(domain, draw), read + 0.1),
            "reconnect": (domain.reconnect, CONNECT + 5 * COMMAND + 0.5),
        }
        often = (
            "enable",
            "disable",
            "enable",
            "disable",
            "state",
            "set_vcpus",
            "set_vcpus",
            "vcpus",
        )
        of_guest = (
            ("guest_vcpus", "set_guest_vcpus") * 4 if domain._reached.guest is not None else ()
        )
        name = draw.choice((*calls, *often * 2, *of_guest))
        work, allowed = calls[name]
        if name == "reconnect":
            self.said.reset()
        found = await self.call(name, work(), allowed)
        if name in ("state", "vcpus"):
            self.check_rows(found.vcpus if name == "state" and found is not None else found)
        if name == "plan" and found is not None:
            json.dumps(found.to_json(), allow_nan=False)
            check_text(found.describe())
        if name == "guest_vcpus" and found is not None:
            json.dumps(found.to_json(), allow_nan=False)
            render.guest(found)
        (
            domain.plugs_left(),
            domain.run_state,
            domain.pending_ids,
            domain.interrupted,
            domain.settled,
            repr(domain),
        )

    async def listen(self, domain: qmpvcpu.Domain, draw: random.Random) -> None:
        async with domain.events(steps=True, limit=draw.choice((1, 10, 1000))) as events:
            await self.call(
                "enable", domain.enable(draw.choice((1, 2)), timeout=GUEST), 8 * COMMAND + 6 * GUEST
            )
            await self.call(
                "disable",
                domain.disable(draw.choice((1, 2)), timeout=GUEST),
                8 * COMMAND + 6 * GUEST,
            )
            try:
                async with asyncio.timeout(0.02):
                    async for event in events:
                        json.dumps(event.to_json(), allow_nan=False)
                        render.event(event)
                        check_text([event.detail or ""])
            except TimeoutError:
                pass


def check_text(lines: Iterable[str]) -> None:
    for line in lines:
        assert len(line) < LONGEST, f"{len(line)} characters: {line[:200]}"


def delay() -> float:
    """Seconds that this process was ready to run, and did not."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


class _Errors(logging.Handler):
    def __init__(self, trouble: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._trouble = trouble

    def emit(self, record: logging.LogRecord) -> None:
        self._trouble.append(f"log: {record.getMessage()}")


class Court:
    """Judges of one run, each with its own sockets, all at once: what waits for a deadline costs no
    time then.
    """

    def __init__(self, who: str, seed: str) -> None:
        self.who, self.seed = who, seed
        self.judges: list[Judge] = []
        self.trouble: list[str] = []

    def watch(self) -> None:
        """Whatever asyncio or Python says of a mistake is trouble."""
        loop = asyncio.get_running_loop()
        logging.getLogger("asyncio").addHandler(_Errors(self.trouble))
        loop.set_exception_handler(lambda loop, context: self.trouble.append(f"asyncio: {context}"))
        sys.unraisablehook = lambda found: self.trouble.append(f"unraisable: {found}")
        warnings.simplefilter("always")
        warnings.showwarning = lambda text, *rest: self.trouble.append(f"warning: {text}")  # type: ignore[assignment]

    async def run(self, count: int) -> dict[str, Any]:
        self.watch()
        with tempfile.TemporaryDirectory(prefix="qmpvcpu-hostile-") as name:
            folder = Path(name)
            os.environ["QMPVCPU_STATE"] = str(folder / "state")
            places = [folder / "sockets" / str(number) for number in range(JUDGES)]
            for place in places:
                place.mkdir(parents=True)
            words = [sys.executable, "-m", "tests.support.hostile", str(folder / "sockets")]
            server = await asyncio.create_subprocess_exec(
                *words,
                self.who,
                str(count),
                self.seed,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert server.stdout is not None and server.stdin is not None
            try:
                assert await server.stdout.readline() == b"ready\n"
                start, began = peak(), time.monotonic()
                self.judges = [Judge(f"{self.seed} {place.name}", place, self) for place in places]
                async with asyncio.TaskGroup() as group:
                    for one in self.judges:
                        group.create_task(one.run())
                server.stdin.close()
                figures = json.loads(await server.stdout.readline())
            finally:
                if server.returncode is None:
                    server.terminate()
                await server.wait()
        gc.collect()
        assert not self.trouble, self.trouble
        worst: dict[str, float] = {}
        for one in self.judges:
            worst |= {name: max(seconds, worst.get(name, 0)) for name, seconds in one.worst.items()}
        return {
            "answers": figures["sent"],
            "distorted": sum(figures["ways"].values()),
            "connections": figures["clients"],
            "ways": figures["ways"],
            "calls": sum((one.calls for one in self.judges), Counter()).total(),
            "ends": sum((one.ends for one in self.judges), Counter()),
            "seconds": round(time.monotonic() - began, 1),
            "longest of each call, s": {
                name: round(seconds, 3) for name, seconds in sorted(worst.items())
            },
            "most beyond a deadline, s": round(max(one.overshoot for one in self.judges), 3),
            "memory at start, MiB": round(start),
            "memory at most, MiB": round(peak()),
            "tasks left": len(asyncio.all_tasks()) - 1,
        }


if __name__ == "__main__":
    who, count, seed = sys.argv[1:]
    hasten()
    print(json.dumps(asyncio.run(Court(who, seed).run(int(count)))))
