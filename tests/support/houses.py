"""State folders of a test's own, and guests in them: what commands do there while something happens
to them, and what is true there, as QEMU, the files and /proc have it.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import signal
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qmpvcpu.xml.document import read_domain
from tests.support.commands import Run, cli_in
from tests.support.effects import Log, Plan, read_log
from tests.support.hosts import why_no_kvm
from tests.support.monitor import connected
from tests.support.waiting import until

#: Exit codes that have a meaning.
CODES = frozenset({0, 2, 3, 4, 5, 6, 7, 8})
_MARK = "QMPVCPU_TEST_HOUSE"
#: What is staged, or written under another name first.
_STAGED = re.compile(r"\..*(\.new-|-\d+$|\.part-|\.qmpvcpu-)")


#: Commands that start, end and move a QEMU: what comes before, and where the guest is in the end.
MOVES = {
    "probe --machine q35 --smp 2,maxcpus=8 --probe always --refresh": ("", None),
    "start one": ("", "one"),
    "destroy one": ("start", None),
    "save one {files}/saved": ("start", "file"),
    "save one {files}/saved --verify": ("start", "file"),
    "restore {files}/saved": ("start save", "one"),
    "restore {files}/saved two": ("start save", "two"),
    "migrate one two": ("start", "two"),
    "migrate one two --persistent --undefine-source": ("start", "two"),
    "migrate-begin one": ("start", "one"),
    "migrate-prepare {files}/cookie two": ("start begin", "one"),
    "migrate-perform one unix:{folder}/m": ("start prepare", None),
    "migrate-finish two": ("start prepare perform", "two"),
    "migrate-cancel one": ("start prepare perform", "one"),
    "migrate-cancel two": ("start prepare", "one"),
}


@dataclass(frozen=True)
class Met:
    """A run to which something happened, or nothing; `seconds` from then until its end."""

    words: tuple[str, ...]
    run: Run
    log: Log
    seconds: float | None

    @property
    def was_killed(self) -> bool:
        return self.run.code == -signal.SIGKILL

    def __str__(self) -> str:
        last = self.log.effects[-1] if self.log.effects else "its begin"
        return f"{' '.join(self.words)} at {len(self.log.effects)} ({last}): {self.run}"


class House:
    """A state folder, a folder for files, and a folder for temporary files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state, self.files, self.tmp = folder / "state", folder / "files", folder / "tmp"
        self.files.mkdir()
        self.tmp.mkdir()
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        self.environment = {"QMPVCPU_STATE": str(self.state), "TMPDIR": str(self.tmp), name: value}
        self._numbers = itertools.count()
        #: What stands in braces in the words of a command.
        self.places = {"files": self.files, "folder": folder}

    # -- commands

    async def cli(self, *words: str) -> Run:
        return await cli_in(self.environment, *words)

    async def json(self, *words: str) -> Any:
        """The document of a command that is done."""
        run = await self.cli("--json", *words)
        assert run.code == 0, (words, run)
        return run.json

    async def meet(self, words: str, plan: Plan | None = None, **options: Any) -> Met:
        """Run it; `options` are those of a `Plan`."""
        log = self.folder / f"log-{next(self._numbers)}"
        plan = Plan(**{**options, "log": str(log)})
        given = tuple(words.format(**self.places).split())
        began = time.monotonic()
        run = await cli_in({**self.environment, **plan.variable()}, "--json", *given)
        ended = time.monotonic()
        found = read_log(log)
        log.unlink(missing_ok=True)
        since = began if plan.at is None and plan.after is None else found.acted
        return Met(given, run, found, None if since is None else ended - since)

    # -- what is there

    def qemus(self) -> set[int]:
        """Every QEMU that a command has started here, directly or not, and that has not ended."""
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self._mark.encode() not in (process / "environ").read_bytes().split(b"\0"):
                    continue
                if b"qemu-system" in (process / "cmdline").read_bytes():
                    found.add(int(process.name))
        return found

    def runtime(self, name: str) -> Path:
        """Where the sockets of a guest are that was started here."""
        return self.state / "run" / name

    async def run_states(self) -> dict[str, str]:
        """Of each guest that was started here and whose QEMU is there: QAPI's RunState, by its
        second socket.
        """
        found = {}
        with suppress(FileNotFoundError):
            for folder in (self.state / "run").iterdir():
                if folder.is_dir():
                    with suppress(Exception):
                        async with connected(str(folder / "qmp2")) as monitor:
                            answer: Any = await monitor.command("query-status")
                            found[folder.name] = answer["status"]
        return found

    def files_of(self, name: str) -> tuple[bytes | None, bytes | None]:
        """Its definition, and its sockets; None where there is none."""
        folder = self.state / "definitions"
        found = []
        for suffix in ("xml", "json"):
            path = folder / f"{name}.{suffix}"
            found.append(path.read_bytes() if path.exists() else None)
        return found[0], found[1]

    def enabled_in_the_definition(self, name: str) -> set[int]:
        xml, _ = self.files_of(name)
        assert xml is not None
        return set(read_domain(xml)[1].enabled_ids)

    def staged(self) -> list[str]:
        """Files that were to get another name, wherever they are."""
        paths = [*self.state.rglob(".*"), *self.files.rglob(".*")]
        return sorted(
            str(path.relative_to(self.folder)) for path in paths if _STAGED.match(path.name)
        )

    def held_locks(self) -> list[str]:
        """What somebody has locked."""
        found = []
        paths = [self.state / "definitions", *self.state.glob("run/.*.lock")]
        for path in paths:
            if path.exists():
                fd = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    found.append(path.name)
                finally:
                    os.close(fd)
        return found

    async def rows(self) -> dict[str, dict[str, Any]]:
        """`list`, which says the same twice."""
        first, second = [(await self.json("list"))["domains"] for _ in range(2)]
        assert first == second
        return {row["name"]: row for row in first}

    async def nobodys(self) -> None:
        """Every QEMU is one that `list` shows, and every other one ends by itself."""

        async def is_filled() -> bool:
            if not self.qemus():
                return True
            rows = await self.json("list")
            known = {row["pid"] for row in rows["domains"]} - {None}
            return self.qemus() == known

        await until(is_filled, "each QEMU is one that `list` shows", every=0.05)

    async def end(self) -> None:
        """Whatever is still there."""
        for pid in self.qemus():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await until(lambda: not self.qemus(), "no QEMU is left")


@asynccontextmanager
async def house() -> AsyncIterator[House]:
    # Paths of sockets are short.
    with TemporaryDirectory(prefix="qh-") as folder:
        made = House(Path(folder))
        try:
            yield made
        finally:
            await made.end()


# -- guests that `start` has started

XML = """<domain type='{kind}'><name>{name}</name><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid>
<memory unit='MiB'>32</memory><vcpu current='2'>4</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><loader readonly='yes' type='rom'>{firmware}</loader></os></domain>
"""
#: A guest that rests: nothing but `hlt`, also where an x86 begins.
RESTS = b"\xf4" * (64 << 10)


class Started:
    """A house with the guest `one`, that may run, be in the file `saved`, or go to `two`."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.file = house.files / "saved"

    async def define(self) -> None:
        firmware = self.house.files / "rests.bin"
        firmware.write_bytes(RESTS)
        xml = XML.format(
            kind="kvm" if why_no_kvm() is None else "qemu", name="one", firmware=firmware
        )
        (self.house.files / "one.xml").write_text(xml)
        await self.house.json("define", str(self.house.files / "one.xml"))

    async def begin(self, what: str) -> None:
        """What has to be so before: words of commands, each in its order."""
        await self.define()
        cookie, target = self.house.files / "cookie", f"unix:{self.house.folder}/m"
        for word in what.split():
            match word:
                case "prepare":
                    begun = await self.house.json("migrate-begin", "one")
                    cookie.write_text(begun["cookie"])
                    await self.house.json("migrate-prepare", str(cookie), "two", "--uri", target)
                case "begin":
                    begun = await self.house.json("migrate-begin", "one")
                    cookie.write_text(begun["cookie"])
                case "perform":
                    await self.house.json("migrate-perform", "one", target)
                case "start":
                    await self.house.json("start", "one")
                case "save":
                    await self.house.json("save", "one", str(self.file))

    async def running(self) -> set[str]:
        """Which guests run, and not only wait."""
        return {
            name for name, state in (await self.house.run_states()).items() if state == "running"
        }

    async def says_what_is(self) -> dict[str, dict[str, Any]]:
        """`list` and `vcpuinfo` say what is so, and no QEMU is nobody's."""
        await self.house.nobodys()
        # A command may go on with what another has left: so what there is, is asked before and
        # after.
        rows = await self.house.rows()
        for name, row in rows.items():
            if row["pid"] is not None:
                told = await self.house.json("vcpuinfo", name)
                enabled = [vcpu["id"] for vcpu in told["vcpus"] if vcpu["state"] == "enabled"]
                assert told["active"] and enabled == [0, 1], told
            if self.house.files_of(name)[0] is not None:
                told = await self.house.json("vcpuinfo", name, "--config")
                enabled = [vcpu["id"] for vcpu in told["vcpus"] if vcpu["state"] == "enabled"]
                assert enabled == [0, 1], told
        states = await self.house.run_states()
        rows = {row["name"]: row for row in (await self.house.json("list"))["domains"]}
        for name, row in rows.items():
            assert (row["state"] == "running") == (states.get(name) == "running"), (rows, states)
            assert (row["pid"] is not None) == (name in states), (rows, states)
        assert sum(state == "running" for state in states.values()) <= 1, states
        return rows

    async def has_one(self) -> str | None:
        """Where the guest is, after what a user would do about it: the name, or "file", or None for
        nowhere.
        """
        running = await self.running()
        if not running:
            for words in (("migrate-cancel", "one"), ("migrate-finish", "two")):
                if words[1] in await self.house.run_states():
                    await self.house.cli(*words)
                    if running := await self.running():
                        break
        assert len(running) <= 1, running
        if running:
            return running.pop()
        return "file" if self.file.exists() else None

    async def nothing_left(self) -> None:
        """When every guest is ended as `list` says."""
        for row in (await self.house.json("list"))["domains"]:
            if row["pid"] is not None:
                await self.house.json("destroy", row["name"])
        assert not self.house.qemus()
        # What a QEMU has left that ended by itself goes with the next start or end of any guest.
        await self.house.cli("destroy", "one")
        left = [path.name for path in (self.house.state / "run").glob("*") if path.is_dir()]
        assert not left, left


@asynccontextmanager
async def started() -> AsyncIterator[Started]:
    async with house() as made:
        yield Started(made)


_moved: dict[str, Met] = {}


async def moved(words: str) -> Met:
    """One of `MOVES` to which nothing happens, in a house of its own; the first run of it."""
    if words not in _moved:
        before, end = MOVES[words]
        async with started() as guest:
            await guest.begin(before)
            met = await guest.house.meet(words)
            assert met.run.code == 0, met
            assert end is None or await guest.has_one() == end, met
        _moved[words] = met
    return _moved[words]
