"""`start` and `destroy`: a defined domain in a QEMU in the background, for tests and prototypes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from qmpvcpu.aio import finish
from qmpvcpu.app.boot import CommandLine, check_program, command_line
from qmpvcpu.app.probes import ProbeMode
from qmpvcpu.core.arguments import checked
from qmpvcpu.core.definition import Definition, Dimm, MemoryBackend
from qmpvcpu.core.machine.boot_arguments import qemu_arch
from qmpvcpu.core.machine.devices import shared_with_source
from qmpvcpu.core.machine.hardware import hardware_args
from qmpvcpu.core.machine.words import escaped, join_pairs
from qmpvcpu.core.model import DomainState, format_ids
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain.connect import connect
from qmpvcpu.domain.placement import check_start
from qmpvcpu.errors import VcpuConnectionError, VcpuFailed, VcpuRefused
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.host import runtime as host
from qmpvcpu.host.affinity import QemuThreads
from qmpvcpu.host.cgroup.groups import VcpuGroups, remove_trees
from qmpvcpu.host.definition_files import DefinitionFolder, require_name
from qmpvcpu.host.process import process_of
from qmpvcpu.host.runtime import AGENT, MONITORS, Runtime, end_process
from qmpvcpu.ports import CommandError
from qmpvcpu.qemu.launch import launch_qemu
from qmpvcpu.qemu.monitor import connect_monitor
from qmpvcpu.xml.boot_devices import read_hardware
from qmpvcpu.xml.document import read_domain
from qmpvcpu.xml.source import Document

_PAUSE: Final = 0.02
#: Seconds to wait for another process that starts or ends the same guest.
_LOCK_SECONDS: Final = 10.0
#: Seconds that QEMU gets to end after SIGTERM, and then after SIGKILL.
_END_SECONDS: Final = 5.0
#: Seconds until the cgroups of a process that has ended can be removed.
_GROUP_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Started:
    """What `start` did."""

    name: str
    pid: int
    emulator: str
    qmp: tuple[str, ...]
    agent: str
    log: str
    console: str
    state: DomainState
    messages: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The document of `start --json`."""
        return {
            "outcome": "applied",
            "changed": True,
            "domain": self.name,
            "pid": self.pid,
            "emulator": self.emulator,
            "qmp": list(self.qmp),
            "agent": self.agent,
            "log": self.log,
            "console": self.console,
            "vcpus": list(self.state.enabled_ids),
            "messages": list(self.messages),
            "seconds": round(self.seconds, 6),
        }


@dataclass(frozen=True, slots=True)
class Destroyed:
    """What `destroy` did; `killed` is whether QEMU had to be killed."""

    name: str
    pid: int
    killed: bool

    def to_json(self) -> dict[str, Any]:
        """The document of `destroy --json`."""
        return {
            "outcome": "applied",
            "changed": True,
            "domain": self.name,
            "pid": self.pid,
            "killed": self.killed,
        }


@checked
async def start(
    name: str, *, mode: ProbeMode = ProbeMode.AUTO, timeout: float = 30.0, place: bool = True
) -> Started:
    """Start a defined domain with exactly the vCPUs that its XML says, and let it run.

    Args:
        name: the name that it is defined under.
        mode: when a throwaway QEMU may be asked first.
        timeout: seconds until QEMU must have set up its machine.
        place: False leaves its threads where the kernel puts them.

    Raises:
        VcpuRefused: it is not defined, runs already, or there cannot be such a guest.
        VcpuFailed: QEMU exited, with its exit code and stderr; or its vCPUs are not those of the
            XML.
        VcpuConnectionError: QEMU does not answer. After every error QEMU has ended.
    """
    began = time.monotonic()
    folder = DefinitionFolder()
    if not folder.is_defined(name):
        raise catalogue.NOT_DEFINED_TO_START.error(name=name)
    runtime = Runtime(name)
    async with _alone(runtime):
        await _check_inactive(name, runtime)
        file = folder.file(name)
        document, definition = read_domain(file.read())
        launched = await _launch(runtime, document, definition, mode, timeout, place=place)
        try:
            try:
                state, notes = await _check_vcpus(
                    runtime, launched.line, file.place if place else None
                )
                await _continue(runtime)
            except VcpuConnectionError as error:
                if runtime.pid() is None:
                    raise _exited(runtime) from error
                raise
            pid = runtime.pid()
            if pid is None:
                raise _exited(runtime)
        except BaseException:
            await finish(asyncio.to_thread(_end, runtime))
            raise
    return Started(
        name,
        pid,
        launched.emulator,
        runtime.qmp,
        runtime.agent,
        str(runtime.log),
        str(runtime.console),
        state,
        (*launched.messages, *notes),
        time.monotonic() - began,
    )


@dataclass(frozen=True, slots=True)
class Launched:
    """A QEMU that we have started and that has set up its machine; the guest does not run yet."""

    line: CommandLine
    emulator: str
    messages: tuple[str, ...]


async def launch_waiting(
    name: str,
    xml: bytes,
    machine: str | None,
    *,
    mode: ProbeMode,
    timeout: float,
    place: bool,
    source_runs: bool = True,
    devices: bytes | None = None,
) -> Launched:
    """Start a QEMU in the background that waits for a guest to migrate into it (`-incoming defer`).

    Args:
        name: its name on this host from now on.
        xml: of the guest as it runs at the source.
        machine: the source's machine type, versioned.
        mode: when a throwaway QEMU may be asked first.
        timeout: seconds until QEMU must have set up its machine.
        place: whether to refuse a guest whose threads could not be placed.
        source_runs: whether the source runs on this host, so that the new QEMU must not damage it.
        devices: XML whose program and devices replace those of `xml`.

    Raises:
        VcpuRefused: a domain of that name runs already, or there cannot be such a guest, or it
            would write to the memory of the running guest.
        VcpuFailed, VcpuConnectionError: QEMU exited, or does not answer. After every error QEMU has
            ended.
    """
    require_name(name)
    runtime = Runtime(name)
    async with _alone(runtime):
        await _check_inactive(name, runtime)
        document, definition = read_domain(xml)
        if devices is not None:
            document, other = read_domain(devices)
            definition = replace(definition, emulator=other.emulator)
        if machine is not None:
            definition = replace(definition, machine=machine)
        memory, chardevs = _shared(document, definition) if source_runs else ([], [])
        if memory:
            raise VcpuRefused([catalogue.SHARED_MEMORY(name=name, what=what) for what in memory])
        launched = await _launch(
            runtime, document, definition, mode, timeout, place=place, incoming="defer"
        )
        return replace(
            launched,
            messages=(
                *launched.messages,
                *(f"the destination takes over '{text}' from the source" for text in chardevs),
            ),
        )


def _shared(document: Document, definition: Definition) -> tuple[list[str], list[str]]:
    """What the QEMU of a definition would share with the source's QEMU, as `shared_with_source`
    returns it.
    """
    words = list(read_hardware(document).arguments)
    known: list[MemoryBackend | Dimm] = [*definition.options.backends, *definition.dimms]
    for backend in known:
        words += [
            "-object",
            join_pairs([("qom-type", backend.driver), *backend.options], "qom-type"),
        ]
    return shared_with_source(words)


async def _launch(
    runtime: Runtime,
    document: Document,
    definition: Definition,
    mode: ProbeMode,
    timeout: float,
    *,
    place: bool,
    incoming: str | None = None,
) -> Launched:
    hardware = read_hardware(document)
    threads = QemuThreads(process_of(os.getpid()))
    await asyncio.to_thread(threads.sweep)
    if place and (refusals := check_start(threads, definition)):
        raise VcpuRefused(refusals)
    check_program(definition)
    line = await command_line(definition, mode=mode, incoming=incoming)
    if line.probe.emulator is None:
        raise catalogue.NO_PROGRAM_TO_START.error(messages="; ".join(line.probe.messages))
    arguments = [
        "-S",
        "-name",
        f"guest={escaped(runtime.name)},debug-threads=on",
        *line.args.arguments,
    ]
    if definition.uuid is not None:
        arguments += ["-uuid", definition.uuid]
    arguments += hardware_args(
        hardware, qemu_arch(definition), console=str(runtime.console), agent=AGENT
    )
    prepared = asyncio.create_task(asyncio.to_thread(runtime.prepare))
    try:
        await finish(prepared)
    except OSError as error:
        raise catalogue.RUNTIME_NOT_MADE.error(folder=runtime.folder, error=error) from error
    except asyncio.CancelledError:
        if prepared.exception() is None:
            await finish(asyncio.to_thread(_end, runtime))
        raise
    try:
        await launch_qemu(
            line.probe.emulator,
            arguments,
            runtime.folder,
            runtime.log,
            monitors=MONITORS,
            channels=(AGENT,),
            timeout=timeout,
        )
    except BaseException:
        await finish(asyncio.to_thread(_end, runtime))
        raise
    messages = [*line.probe.messages, *line.args.messages]
    if hardware.left_out:
        left_out = ", ".join(f"<{word}>" for word in hardware.left_out)
        messages.append(f"not supported, and left out: {left_out}")
    return Launched(line, line.probe.emulator, tuple(messages))


async def clean_up(name: str) -> None:
    """End a QEMU that we have started, and remove its folder and cgroups. Never raises OSError."""
    runtime = Runtime(name)
    with suppress(OSError):
        await finish(asyncio.to_thread(_end, runtime))


def remove_ended(name: str, *, is_ending: bool) -> None:
    """Remove folder and cgroups of a QEMU that we have started, if it has ended. Blocks.

    Args:
        name: of the domain.
        is_ending: QEMU has got a quit command; it is given a second to end.
    """
    runtime = Runtime(name)
    with suppress(OSError):
        lock = runtime.try_lock()
        if lock is None:
            return  # another process starts it again
        try:
            end = time.monotonic() + (1.0 if is_ending else 0.0)
            while runtime.pid() is not None and time.monotonic() < end:
                time.sleep(_PAUSE)
            if runtime.pid() is None:
                _end(runtime)
        finally:
            lock.release()


@checked
async def destroy(name: str) -> Destroyed:
    """End the QEMU of a domain that `start` has started, without a shutdown of the guest.

    Raises:
        VcpuRefused: it does not run, or another program has started it.
        VcpuFailed: QEMU cannot be ended.
    """
    require_name(name)
    runtime = Runtime(name)
    async with _alone(runtime):
        pid = runtime.pid()
        if pid is None:
            # A QEMU that has exited by itself leaves its cgroups and its folder.
            await asyncio.to_thread(QemuThreads(process_of(os.getpid())).sweep)
            await asyncio.to_thread(runtime.remove)
            if DefinitionFolder().is_defined(name) and await _answers(name):
                raise catalogue.NOT_STARTED_BY_US.error(name=name)
            raise catalogue.NOTHING_TO_END.error(name=name)
        try:
            killed = await finish(asyncio.to_thread(_end, runtime))
        except OSError as error:
            raise VcpuFailed(
                f"QEMU {pid} cannot be ended: {error.strerror}",
                hint="run this as the user who started it, or as root",
            ) from error
        if runtime.owns(pid):
            raise VcpuFailed(
                f"QEMU {pid} has not ended after SIGKILL",
                hint="look at the kernel's log (dmesg)",
            )
    return Destroyed(name, pid, killed)


def _end(runtime: Runtime) -> bool:
    """End the domain's QEMU, if there is one; returns whether it had to be killed. Blocks."""
    pid = runtime.pid()
    groups, killed = [], False
    if pid is not None:
        with suppress(OSError):
            groups = VcpuGroups(process_of(pid)).folders()
        killed = not end_process(pid, signal.SIGTERM, _END_SECONDS, runtime)
        if killed:
            end_process(pid, signal.SIGKILL, _END_SECONDS, runtime)
    runtime.remove()
    remove_trees(groups, _GROUP_SECONDS)
    return killed


async def _check_inactive(name: str, runtime: Runtime) -> None:
    pid = runtime.pid()
    if pid is not None:
        raise catalogue.ACTIVE.error(name=name, pid=pid)
    if DefinitionFolder().is_defined(name) and await _answers(name):
        raise catalogue.ACTIVE_ELSEWHERE.error(name=name)


async def _answers(name: str) -> bool:
    """Whether a QEMU that we have not started listens at the domain's sockets."""
    try:
        async with connect(name, connect_timeout=1.0, config_only=True) as domain:
            return domain.is_active
    except VcpuConnectionError as error:
        return error.reason == "no-greeting"


async def _check_vcpus(
    runtime: Runtime, line: CommandLine, xml: str | None
) -> tuple[DomainState, list[str]]:
    """Check by a fresh query that the vCPUs are those of the XML and were plugged in its order.
    Then place their threads as the file `xml` says; returns the state, and notes about the
    placement.
    """
    async with connect(qmp=runtime.qmp[0], xml=xml) as domain:
        state = await domain.state(VcpuFlag.LIVE)
        notes = await domain.place() if xml is not None else []
    there = sorted(
        (entity.id for entity in state.entities if entity.plugged),
        key=lambda number: state.vcpus[number].order or 0,
    )
    if tuple(there) != line.args.started:
        wanted = format_ids(vcpu.id for vcpu in line.probe.vcpus if vcpu.enabled)
        raise VcpuFailed(
            f"QEMU has vCPU {format_ids(state.enabled_ids)}, and the XML says {wanted}",
            hint=f"look at {runtime.log}",
        )
    return state, notes


async def _continue(runtime: Runtime) -> None:
    monitor = await connect_monitor(runtime.qmp[0])
    try:
        await monitor.cont()
    except CommandError as error:
        raise VcpuFailed(
            f"QEMU cannot run the guest: {error}",
            qmp_text=error.text,
            hint=f"look at {runtime.log}",
        ) from error
    finally:
        await finish(monitor.close())


def _exited(runtime: Runtime) -> VcpuFailed:
    log_end = runtime.log_end()
    return VcpuFailed(
        "QEMU exited right after the start" + (f": {log_end}" if log_end else ""),
        hint=f"look at {runtime.console} and {runtime.log}: the guest may have nothing to boot",
    )


@asynccontextmanager
async def _alone(runtime: Runtime) -> AsyncIterator[None]:
    """Hold the lock with which one process at a time starts or ends a guest."""
    deadline = time.monotonic() + _LOCK_SECONDS
    try:
        while (lock := runtime.try_lock()) is None:
            if time.monotonic() >= deadline:
                raise catalogue.LOCKED.error()
            await asyncio.sleep(_PAUSE)
    except OSError as error:
        raise catalogue.RUNTIME_NOT_USED.error(folder=runtime.folder.parent, error=error) from error
    try:
        await asyncio.to_thread(host.remove_ended, runtime.name)
        yield
    finally:
        lock.release()
