"""Which vCPUs a guest that is not running will have: computed, cached, or asked of a QEMU."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from qmpvcpu.app.cache import cache_folder
from qmpvcpu.app.qemus import examine, find_binaries, path_of
from qmpvcpu.core.arch import (
    architecture,
    architecture_of_machine,
    architecture_of_program,
    programs_of,
)
from qmpvcpu.core.arguments import checked
from qmpvcpu.core.machine.layout import (
    LayoutSource,
    MachineLayout,
    MachineSpec,
    QemuFacts,
    facts_of,
    parse_layout,
    predict_layout,
)
from qmpvcpu.core.model import Vcpu
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import VcpuConnectionError, VcpuRefused, VcpuUsageError
from qmpvcpu.host.answers import FileCache, Program, key_of, program_of
from qmpvcpu.host.files import FileLock
from qmpvcpu.qemu.probe import probe_machine

_PAUSE: Final = 0.005
#: QEMU's words for a machine type that it does not have, 7.2 to 11.1.
_NO_MACHINE: Final = "unsupported machine type"
#: QEMUs that run at once, of all our processes together.
_AT_ONCE: Final = max(2, min(8, os.cpu_count() or 2))


class ProbeMode(StrEnum):
    """When a throwaway QEMU is started: only where the vCPUs cannot be computed; always; never."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Probe:
    """The vCPUs of a machine, and the program they are those of (None: this host has no such QEMU).

    `started` has the ids of the entities that a domain boots with, in their order; None for a bare
    machine.
    """

    layout: MachineLayout
    emulator: str | None
    messages: tuple[str, ...] = ()
    seconds: float = 0.0
    started: tuple[int, ...] | None = None

    @property
    def vcpus(self) -> list[Vcpu]:
        """A row for each vCPU, as it is right after the start."""
        return self.layout.vcpus(self.started)

    def to_json(self) -> dict[str, Any]:
        """The document of `probe --json`."""
        return self.layout.to_json() | {
            "vcpus": [vcpu.to_json() for vcpu in self.vcpus],
            "emulator": self.emulator,
            "messages": list(self.messages),
            "seconds": round(self.seconds, 6),
        }


def forget_probes() -> int:
    """Remove the cached answers of throwaway QEMUs; returns how many there were."""
    return _cache().clear()


@checked
async def find_layout(
    spec: MachineSpec,
    *,
    arch: str | None = None,
    emulator: str | None = None,
    mode: ProbeMode = ProbeMode.AUTO,
    refresh: bool = False,
    typed: bool = False,
    timeout: float = 30.0,
) -> Probe:
    """The vCPUs of a machine.

    Args:
        spec: the machine.
        arch: QEMU's target; else the program's, the machine's or this host's.
        emulator: the QEMU program; else the first one of that target on this host.
        mode: when a throwaway QEMU is started.
        refresh: ask QEMU even if the answer is cached.
        typed: whether the driver of `device_add` is needed too.
        timeout: seconds for a throwaway QEMU, from the first wait on.

    Raises:
        VcpuRefused: QEMU refuses such a machine, or only a QEMU can answer and none may be started.
        VcpuFailed, VcpuConnectionError: the throwaway QEMU dies, or does not answer.
    """
    began = time.monotonic()
    mode = ProbeMode(mode)
    # A program runs the machines of its own architecture only, whatever the machine's name says.
    row = architecture_of_program(emulator or "") or architecture_of_machine(spec.machine)
    target = arch or (row.name if row is not None else os.uname().machine)
    if not spec.machine_type:
        spec = _with_default_machine(spec, target)
    found, messages = _program(emulator, target)
    runs = architecture_of_program(found.path) if found is not None else None
    if runs is not None and runs.name not in programs_of(target):
        raise catalogue.PROGRAM_OF_ANOTHER_ARCH.error(
            emulator=emulator, runs=runs.name, arch=target
        )
    target = runs.name if runs is not None else target
    question = _Question(spec, found, typed)
    layout = None if refresh else question.known(target, mode)
    if layout is None:
        if mode is ProbeMode.NEVER or found is None:
            reason = (
                catalogue.PROBE_NEVER if mode is ProbeMode.NEVER else catalogue.NOTHING_TO_PROBE
            )
            raise reason.error(machine=spec.machine, arch=target, smp=spec.smp)
        layout = await question.find_out(began + timeout, refresh=refresh)
    if arch is not None and layout.arch not in programs_of(arch):
        raise catalogue.PROBED_ANOTHER_ARCH.error(emulator=emulator, runs=layout.arch, arch=arch)
    return Probe(
        layout, found.path if found is not None else None, tuple(messages), time.monotonic() - began
    )


class _Question:
    """One machine to find out about, from the cache or from a QEMU."""

    def __init__(self, spec: MachineSpec, program: _Found | None, typed: bool) -> None:
        self.spec = spec
        self.program = program
        self.typed = typed
        self.cache = _cache()
        self.facts: QemuFacts | None = None
        identity = program.identity.to_json() if program is not None else None
        self._about = key_of("program", identity)
        self._question = [identity, spec.to_json()]
        self._lock = key_of(self._question)[:2]
        self.read_facts()

    def read_facts(self) -> None:
        """Read what the cache has on the program, if it was not read yet."""
        if self.program is not None and self.facts is None:
            self.facts = self._load()

    def _load(self) -> QemuFacts | None:
        try:
            return QemuFacts.from_json(self.cache.get(self._about))
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def _key(self, facts: QemuFacts) -> str:
        return key_of("machine", str(facts.version), *self._question)

    def cached(self) -> MachineLayout | None:
        """The cached answer."""
        if self.facts is None:
            return None
        replies = self.cache.get(self._key(self.facts))
        try:
            return (
                parse_layout(replies, self.spec.accel, LayoutSource.CACHED)
                if replies is not None
                else None
            )
        except (VcpuConnectionError, KeyError, TypeError):
            return None

    def known(self, target: str, mode: ProbeMode) -> MachineLayout | None:
        """The computed answer, else the cached one."""
        layout = None
        if mode is not ProbeMode.ALWAYS:
            assume = self.program is None or mode is ProbeMode.NEVER
            layout = predict_layout(
                self.spec,
                target,
                self.facts,
                typed=self.typed,
                assume=assume,
                unseen=self.program is not None and self.facts is None,
            )
        return layout or self.cached()

    async def find_out(self, deadline: float, *, refresh: bool) -> MachineLayout:
        """Start a QEMU and cache its answer, unless another process does so meanwhile."""
        async with _locked(self.cache, self._lock, deadline):
            if not refresh:
                self.read_facts()
                if (layout := self.cached()) is not None:
                    return layout
            try:
                return await self._ask(deadline)
            except VcpuRefused as error:
                raise await self._explain(error) from error

    async def _ask(self, deadline: float) -> MachineLayout:
        assert self.program is not None
        async with _locked(self.cache, "", deadline):
            return await probe_machine(
                self.program.path,
                self.spec,
                self._store,
                timeout=max(deadline - time.monotonic(), 0.001),
            )

    async def _explain(self, error: VcpuRefused) -> VcpuRefused:
        """The error for a machine type that this QEMU does not have, with the newest of that family
        that it has.
        """
        assert self.program is not None
        if _NO_MACHINE not in error.message:
            return error
        found = await examine(self.program.path, "")
        if found.version is None:
            return error
        machine = self.spec.machine_type
        family = machine.rpartition("-")[0] + "-"
        # By number: 10.0 comes after 9.2.
        newest = max(
            (name for name in found.hotplug if name.startswith(family)),
            key=_by_version,
            default=None,
        )
        version, program = found.version, self.program.path
        if newest is None:
            return catalogue.NO_MACHINE_TYPE_HERE.error(
                version=version, program=program, machine=machine
            )
        return catalogue.OLD_MACHINE_TYPE_HERE.error(
            version=version, program=program, machine=machine, newest=newest
        )

    def _store(self, replies: dict[str, Any]) -> MachineLayout:
        layout = parse_layout(replies, self.spec.accel, LayoutSource.PROBED)
        # Other processes may have written facts meanwhile. If they are of another version, the
        # program is a script that starts different QEMUs over time.
        known = self._load()
        if known is not None and not known.are_of(layout):
            known = None
        facts = facts_of(self.spec, layout, known)
        self.cache.put(self._key(facts), replies)
        if facts != known:
            self.cache.put(self._about, facts.to_json())
        return layout


@dataclass(frozen=True, slots=True)
class _Found:
    path: str
    identity: Program


def _cache() -> FileCache:
    return FileCache(cache_folder() / "probes")


def _program(emulator: str | None, arch: str) -> tuple[_Found | None, list[str]]:
    if emulator is not None:
        path = path_of(emulator)
        if path is None:
            raise catalogue.NO_PROGRAM.error(emulator=emulator)
        return _Found(path, program_of(path)), []
    for path, _ in find_binaries(arch):
        try:
            return _Found(path, program_of(path)), []
        except OSError:
            continue
    return None, [f"this host has no qemu-system-{arch}: the answer is the same for every version"]


def _with_default_machine(spec: MachineSpec, arch: str) -> MachineSpec:
    """The spec with QEMU's default machine type, if that one can hotplug vCPUs. Raises
    VcpuUsageError.
    """
    row = architecture(arch)
    if not row.computes(row.default_machine):
        raise VcpuUsageError(
            f"no machine type is given, and {arch} has no default one",
            hint="--machine virt",
        )
    return replace(spec, machine=row.default_machine + spec.machine)


def _by_version(machine: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", machine.rpartition("-")[2])]


@asynccontextmanager
async def _locked(cache: FileCache, name: str, deadline: float) -> AsyncIterator[None]:
    """Hold a lock against our other processes; the name "" is one of the few places for running a
    QEMU.
    """
    names = [f"question-{name}"] if name else [f"place-{number}" for number in range(_AT_ONCE)]
    lock: FileLock | None = None
    try:
        while (lock := next(filter(None, map(cache.try_lock, names)), None)) is None:
            if time.monotonic() >= deadline:
                raise VcpuConnectionError(
                    "no QEMU could be asked in time: other qmpvcpu processes are asking theirs",
                    reason="timeout",
                    hint="try again later, or with --probe never",
                )
            await asyncio.sleep(_PAUSE)
    except OSError:
        # A cache that cannot be written has no lock files, and needs none.
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
