"""A twin: the QEMU that a definition starts, unbooted and paused, so that its machine can be
queried.

Its devices have nothing of the host behind them, so that it cannot affect the running guest.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from qmpvcpu.aio import finish
from qmpvcpu.app.boot import check_program, command_line
from qmpvcpu.core.definition import Definition
from qmpvcpu.core.machine.boot_arguments import qemu_arch
from qmpvcpu.core.machine.comparison import (
    Picture,
    check_movable,
    differences,
    image_name,
    parse_disks,
    refusals_of,
)
from qmpvcpu.core.machine.devices import (
    AGENT_CHARDEV,
    bound_to_host,
    hollow,
    images_of,
    not_defined,
    unlike_any_other,
    without_folder,
)
from qmpvcpu.core.machine.hardware import hardware_args
from qmpvcpu.core.migration.cookie import Cookie, check_machine, machine_of
from qmpvcpu.core.migration.status import last_words, parse_status
from qmpvcpu.core.migration.stream import (
    HEAD_BYTES,
    TAIL_BYTES,
    StreamError,
    StreamTable,
    parse_stream,
)
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain import Domain
from qmpvcpu.domain.connect import connect
from qmpvcpu.domain.migration.picture import real_file
from qmpvcpu.errors import Refusal, VcpuConnectionError, VcpuFailed, VcpuRefused
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.ports import CommandError
from qmpvcpu.qemu.launch import EXIT_SECONDS, QemuProcess, run_qemu
from qmpvcpu.xml.boot_devices import read_hardware
from qmpvcpu.xml.document import read_domain
from qmpvcpu.xml.source import Document

#: The hint for a definition that describes another machine.
HINT: Final = catalogue.DEFINE_IT
_ELSEWHERE: Final = "in the definition"
_PIPE: Final = "qmpvcpu-twin"
#: Bytes that are read from the pipe at once.
_CHUNK: Final = 1 << 20
#: Bytes a second; no guest is slowed down by a twin's stream.
_AS_FAST_AS_IT_GETS: Final = 1 << 50


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of comparing a running guest with a twin: `refusals` are the differences, `table`
    is what the twin's stream lists (None: the twin could not be started, or its stream was not
    requested).
    """

    refusals: list[Refusal]
    table: StreamTable | None = None


async def check_definition(source: Domain, xml: bytes) -> list[Refusal]:
    """As `compare_with_twin`, without the parts that no definition can hold: `describe_machine`
    names those.

    Raises:
        VcpuConnectionError: the connection to the guest's QEMU is lost.
    """
    checked = await compare_with_twin(source, xml, None)
    return [one for one in checked.refusals if one.code != catalogue.NOT_IN_DEFINITION.code]


async def compare_with_twin(
    source: Domain,
    xml: bytes,
    machine: str | None,
    *,
    with_table: bool = False,
) -> Checked:
    """Compare a running guest's machine with the one that a definition starts; nothing is changed.

    Args:
        source: the guest's domain, connected.
        xml: the definition, with the vCPUs that the guest has now.
        machine: the guest's own machine type, versioned.
        with_table: also read what the stream of the twin lists.

    Raises:
        VcpuConnectionError: the connection to the guest's QEMU is lost.
    """
    state, there = await source.state(VcpuFlag.LIVE), await source.picture()
    try:
        async with _twin(xml, machine) as (qemu, domain, arguments):
            twin, now = await domain.state(VcpuFlag.LIVE), await domain.picture()
            now = replace(now, disks=await _disks_of(qemu, arguments))
            found = [
                _in_definition(one) for one in check_machine(machine_of(state), machine_of(twin))
            ]
            found += refusals_of(differences(there, now), _ELSEWHERE, HINT)
            found += [*check_movable(there), *_unheld(there, arguments)]
            return Checked(found, await _table_of(qemu) if with_table and not found else None)
    except VcpuRefused as error:
        return Checked(list(error.refusals))
    except (VcpuFailed, VcpuConnectionError) as error:
        return Checked([catalogue.TWIN_FAILED(why=error.message)])


async def check_defined(source: Domain) -> list[Refusal]:
    """Where a running guest's machine differs from its own definition; empty where it has no
    definition.

    Raises:
        VcpuConnectionError: the connection to the guest's QEMU is lost.
    """
    if not source.has_definition:
        return []
    state = await source.state(VcpuFlag.LIVE)
    return (await compare_with_twin(source, await source.dump_xml(), state.machine)).refusals


def check_held(cookie: Cookie) -> list[Refusal]:
    """What the guest of a cookie was started with that its XML does not hold; empty for a cookie
    without picture.
    """
    if cookie.picture is None:
        return []
    return [
        *check_movable(cookie.picture),
        *_unheld(cookie.picture, _hardware(*read_domain(cookie.xml))),
    ]


def _unheld(picture: Picture, arguments: Sequence[str]) -> list[Refusal]:
    return [
        *(
            catalogue.NOT_IN_DEFINITION(words=words)
            for words in not_defined(picture.beyond, arguments)
        ),
        *(catalogue.FOLDER_UNKNOWN(words=words) for words in without_folder(arguments)),
    ]


def check_readable(xml: bytes) -> list[Refusal]:
    """Why a second QEMU could never read the saved guest of a definition."""
    return [
        catalogue.VERIFY_NETWORK(device=text)
        for text in unlike_any_other(_hardware(*read_domain(xml)))
    ]


async def _disks_of(
    qemu: QemuProcess, arguments: Sequence[str]
) -> dict[str, tuple[str, ...]] | None:
    """The disks that a QEMU with these arguments opens; `qemu` is its twin, whose disks are
    stand-ins.
    """
    try:
        disks = parse_disks(await qemu.monitor.execute("query-block"))
    except CommandError:
        return None
    if disks is None:
        return None
    images = images_of(arguments)
    found = {key: images.get(one.node, (one.file, one.format)) for key, one in disks.items()}
    names = [file for file, _ in found.values()]
    real = await asyncio.to_thread(lambda: [real_file(image_name(file), None) for file in names])
    return {key: (file, kind) for (key, (_, kind)), file in zip(found.items(), real, strict=True)}


def _in_definition(refusal: Refusal) -> Refusal:
    """A refusal of `check_machine`, which speaks of a destination, in terms of the definition."""
    text = refusal.message.replace("at the destination", _ELSEWHERE).replace(
        "the destination", "the definition"
    )
    return replace(refusal, message=text, hint=HINT)


@asynccontextmanager
async def _twin(
    xml: bytes, machine: str | None, more: Sequence[str] = ()
) -> AsyncIterator[tuple[QemuProcess, Domain, list[str]]]:
    """Run a twin until the end of the body; yields its QEMU, its domain, and the arguments of the
    definition. `more` are further arguments of the twin.

    Raises:
        VcpuRefused: such a definition cannot have a twin.
        VcpuFailed, VcpuConnectionError: its QEMU exited, or does not answer.
    """
    emulator, given = await _started_with(xml, machine)
    if bound := bound_to_host(given):
        raise catalogue.NO_TWIN.error(words=", ".join(bound))
    async with run_qemu(emulator, ["-S", *hollow(given), *more], channels=(AGENT_CHARDEV,)) as qemu:
        _end_first(qemu.pid)
        async with connect(qmp=qemu.qmp) as domain:
            yield qemu, domain, given


async def _started_with(xml: bytes, machine: str | None) -> tuple[str, list[str]]:
    """The QEMU program of a definition, and its arguments. Raises VcpuRefused, VcpuFailed."""
    document, definition = read_domain(xml)
    if machine is not None:
        definition = replace(definition, machine=machine)
    check_program(definition)
    line = await command_line(definition)
    if line.probe.emulator is None:
        raise VcpuFailed(
            "; ".join(line.probe.messages),
            hint="name an <emulator> that `qmpvcpu doctor` lists",
        )
    return line.probe.emulator, [*line.args.arguments, *_hardware(document, definition)]


def _hardware(document: Document, definition: Definition) -> list[str]:
    """The arguments for everything besides the machine. Raises VcpuRefused."""
    return hardware_args(
        read_hardware(document),
        qemu_arch(definition),
        console="/dev/null",
        agent=AGENT_CHARDEV,
    )


def _end_first(pid: int) -> None:
    """Make the kernel end this process before any guest when memory is short: proc(5)."""
    with suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


async def _table_of(qemu: QemuProcess) -> StreamTable:
    """What the stream of a twin lists: the twin writes its state into a pipe.

    Raises:
        VcpuFailed: it cannot write its state, or the state cannot be read.
        VcpuConnectionError: the connection to the twin is lost.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    reading = asyncio.create_task(asyncio.to_thread(_read_ends, read))
    try:
        try:
            await qemu.monitor.getfd(_PIPE, write)
        finally:
            os.close(write)
        await qemu.monitor.migrate_set_parameters({"max-bandwidth": _AS_FAST_AS_IT_GETS})
        await qemu.monitor.migrate(f"fd:{_PIPE}")
        # The reader ends with the stream, or with the twin.
        head, tail = await finish(reading, on_cancel=qemu.kill)
        return parse_stream(head, tail)
    except CommandError as error:
        raise VcpuFailed(
            f"its state cannot be written: {error.text}", qmp_text=error.text
        ) from error
    except StreamError as error:
        status = parse_status(await qemu.monitor.query_migrate())
        raise VcpuFailed(f"its state cannot be read: {status.error or error}") from error
    finally:
        # Once QEMU has ended, the reader reaches the end of the pipe, even if this task was
        # cancelled.
        qemu.kill()
        await finish(reading)


def _read_ends(fd: int) -> tuple[bytes, bytes]:
    """Read a pipe to its end; returns its first bytes and its last ones. Blocks."""
    head, tail = bytearray(), bytearray()
    with os.fdopen(fd, "rb", buffering=0) as pipe:
        while data := pipe.read(_CHUNK):
            if len(head) < HEAD_BYTES:
                head += data
            tail += data
            if len(tail) > 2 * TAIL_BYTES:
                del tail[:-TAIL_BYTES]
    return bytes(head), bytes(tail[-TAIL_BYTES:])


async def read_back(xml: bytes, machine: str | None, file: int, offset: int) -> None:
    """Have a second QEMU read a whole saved guest, and end that QEMU.

    Args:
        xml: the guest's definition, with its vCPUs.
        machine: its machine type, versioned.
        file: a descriptor that is open for reading, positioned at `offset`.
        offset: bytes; where the stream begins.

    Raises:
        VcpuFailed: QEMU cannot read the guest; the message has QEMU's words.
    """
    try:
        async with _twin(xml, machine, ("-incoming", "defer")) as (qemu, domain, _):
            try:
                await domain.migration.read_saved(file, offset)
            except VcpuConnectionError as error:
                await qemu.process.wait_at_most(EXIT_SECONDS)
                raise VcpuFailed(
                    f"it exited: {last_words(qemu.stderr()) or error.message}"
                ) from error
    except VcpuRefused as error:
        raise VcpuFailed(
            "; ".join(one.message for one in error.refusals), hint=error.hint
        ) from error
    except (VcpuFailed, VcpuConnectionError) as error:
        raise VcpuFailed(
            f"a second QEMU cannot read the saved guest: {error.message}",
            hint="correct what QEMU reports, or leave out --verify (verify=True)",
        ) from error


async def check_sides(
    cookie: Cookie, destination: Domain, *, with_disks: bool = False
) -> list[Refusal]:
    """Compare the machine of a cookie with the one of a QEMU that waits for the guest; nothing is
    changed. Empty for a cookie without picture.

    Args:
        cookie: of the guest.
        destination: the waiting QEMU's domain, connected.
        with_disks: both run on this host, so that the names of their disks can be compared.
    """
    if cookie.picture is None:
        return []
    source = cookie.picture if with_disks else replace(cookie.picture, disks=None)
    return refusals_of(
        differences(source, await destination.picture()),
        "at the destination",
        "start the destination as the source was started",
    )
