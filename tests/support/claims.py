"""What the definition of a running QEMU claims: arguments and replies in, the definition as plain
data out; two machines in, their differences out; a document in, what is started of it out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from qmpvcpu import QemuVersion
from qmpvcpu.core.definition import Definition, NumaCell, default_vcpus
from qmpvcpu.core.machine.boot_arguments import qemu_arch
from qmpvcpu.core.machine.command_line import read_command_line, split_cpu
from qmpvcpu.core.machine.comparison import Picture, parse_picture, with_command_line
from qmpvcpu.core.machine.comparison import differences as compare
from qmpvcpu.core.machine.described import agrees, described, machine_facts
from qmpvcpu.core.machine.devices import (
    beyond_definitions,
    bound_to_host,
    hollow,
    images_of,
    not_defined,
    shared_with_source,
    unlike_any_other,
    without_folder,
)
from qmpvcpu.core.machine.hardware import hardware_args
from qmpvcpu.core.machine.words import join_pairs
from qmpvcpu.host.process import command_line_of, process_of
from qmpvcpu.host.program import startable_program
from qmpvcpu.xml.boot_devices import read_hardware
from qmpvcpu.xml.document import read_domain
from qmpvcpu.xml.minimal import minimal_domain
from tests.support.machines import boot_with
from tests.support.qemus import Qemu, running

Pairs = tuple[tuple[str, str], ...]

# -- a command line --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """What a process's arguments say. Sizes are in bytes; None is not written, or cannot be read.

    `options` are names and keys in their order, `memory` is the size, the slots and the maximum of
    `-m`, `nodes` are id, backend and `mem=` of each NUMA node, `cpu` is the model with its
    properties.
    """

    program: str | None
    is_loaded: bool
    options: tuple[tuple[str, Pairs], ...]
    machine: Pairs
    memory: tuple[int | None, int | None, int | None]
    backends: tuple[Mapping[str, str], ...]
    nodes: tuple[tuple[int, str | None, int | None], ...]
    distances: tuple[tuple[int, int, int], ...]
    cpu: tuple[str, Pairs] | None
    unread: tuple[str, ...]


def words_of(argv: Sequence[str]) -> Words:
    """Read the arguments of a process, its program first. Never raises."""
    line = read_command_line(argv)
    cpu = line.text("cpu")
    memory = line.memory
    return Words(
        line.program,
        line.is_loaded,
        tuple((option.name, option.pairs) for option in line.options),
        line.machine_options,
        (memory.size, memory.slots, memory.maximum),
        tuple(dict(option.pairs) for option in line.backends),
        tuple((node.id, node.memdev, node.memory) for node in line.nodes),
        line.distances,
        None if cpu is None else split_cpu(cpu),
        line.unread,
    )


def argument(pairs: Iterable[tuple[str, str]], first: str | None = None) -> str:
    """Keys and values as one argument for QEMU; the key `first` is not written where it comes
    first.
    """
    return join_pairs(pairs, first)


# -- the definition of a running guest -------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """`definition` is everything that a definition says, but of its vCPUs; `left_out` is what it
    cannot hold.

    `devices` are QEMU's arguments beyond machine, memory and CPUs; `has_defaults` and `has_serial`
    say whether the machine has its default devices and its first serial port. `xml` is the
    document.
    """

    definition: Mapping[str, Any]
    xml: bytes
    left_out: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    has_defaults: bool = False
    has_serial: bool = False


def claim(
    argv: Sequence[str] | None,
    replies: Mapping[str, Any],
    *,
    driver: str | None = None,
    folder: str | None = None,
) -> Claim:
    """What is claimed of a QEMU that runs a q35 guest 'd' of four vCPUs, two on node 0 and two on
    node 1.

    `argv` is None where the process is on another host. `replies` are QMP's, by command. `driver`
    is that of its CPUs, `folder` where it runs.
    """
    found = Definition(
        "d",
        default_vcpus(4, 1),
        accel="tcg",
        arch="x86_64",
        machine="pc-q35-10.0",
        cells=(NumaCell(0, (0, 1)), NumaCell(1, (2, 3))),
    )
    line = None if argv is None else read_command_line(argv)
    made = described(found, driver, machine_facts(replies), line, folder)
    xml = minimal_domain(made.definition, made.devices)
    if made.devices is None:
        return Claim(_said(made.definition), xml, made.left_out)
    devices = made.devices
    return Claim(
        _said(made.definition),
        xml,
        made.left_out,
        devices.arguments,
        devices.has_defaults,
        devices.has_serial,
    )


def claimed_by(xml: bytes) -> Mapping[str, Any]:
    """What a document says, as `Claim.definition`. Raises VcpuRefused."""
    return _said(read_domain(xml)[1])


def can_be_of(argv: Sequence[str], replies: Mapping[str, Any]) -> bool:
    """Whether the QEMU that gives these replies can have been started with these arguments."""
    return agrees(read_command_line(argv), machine_facts(replies))


def _said(definition: Definition) -> Mapping[str, Any]:
    said = {**asdict(definition), "base_memory": definition.base_memory}
    # Documents add the topology and the dialect that QEMU's replies do not have.
    return {
        key: value for key, value in said.items() if key not in ("vcpus", "topology", "dialect")
    }


def program_of(pid: int) -> str | None:
    """What is written as `<emulator>` for a process."""
    return startable_program(process_of(pid), arguments_of(pid))


def arguments_of(pid: int) -> list[str]:
    """What is believed of a process's arguments; nothing of another user's."""
    return command_line_of(process_of(pid))


# -- two machines ----------------------------------------------------------------------------------


def machine_of(replies: Mapping[str, Any], argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What the replies of a QEMU tell of its machine, and its arguments, where they are known; a
    reply of another form tells nothing.
    """
    picture = parse_picture(None, replies)
    return asdict(picture if argv is None else with_command_line(picture, read_command_line(argv)))


def differences(source: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In what two machines differ, each a mapping as `machine_of` gives it, its version as numbers."""
    return [one.text("here") for one in compare(_picture(source), _picture(here))]


def _picture(machine: Mapping[str, Any]) -> Picture:
    return Picture(**{**machine, "version": QemuVersion(*machine["version"])})


# -- a second QEMU ---------------------------------------------------------------------------------


def without_the_host(arguments: Sequence[str]) -> list[str]:
    """The same devices for a twin, which must not touch anything of the host."""
    return hollow(arguments)


def only_one_can_have(arguments: Sequence[str]) -> list[str]:
    """What a second QEMU cannot have while the first one runs."""
    return bound_to_host(arguments)


def disks_behind(arguments: Sequence[str]) -> dict[str, tuple[str, str]]:
    """File and format of each disk that a twin has an empty one for, by the name of that."""
    return images_of(arguments)


def missed(argv: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """What a guest was started with that QEMU would not have if it were started with these
    arguments.
    """
    return not_defined(beyond_definitions(read_command_line(argv)), arguments)


def in_an_unknown_folder(arguments: Sequence[str]) -> list[str]:
    """Disks whose files another QEMU would not find."""
    return without_folder(arguments)


def not_verifiable(arguments: Sequence[str]) -> list[str]:
    """Networks whose state a twin does not read."""
    return unlike_any_other(arguments)


def shared_with_the_first(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Memory that a second QEMU with these arguments would write to, and chardevs that it would
    take over.
    """
    return shared_with_source(arguments)


# -- what is started of a document -----------------------------------------------------------------


@dataclass(frozen=True)
class Hardware:
    """QEMU's `arguments` for everything but machine, memory and CPUs; `left_out` is not started."""

    arguments: list[str]
    left_out: tuple[str, ...]


def hardware(xml: bytes) -> Hardware:
    """What `start` makes of a domain's devices. Raises VcpuRefused: it cannot be started."""
    document, definition = read_domain(xml)
    found = read_hardware(document)
    arguments = hardware_args(found, qemu_arch(definition), console="/dev/null", agent="agent")
    return Hardware(arguments, found.left_out)


@asynccontextmanager
async def started_again(xml: bytes) -> AsyncIterator[Qemu]:
    """The QEMU that `start` would start of a document, paused, until the end of the body."""
    emulator = read_domain(xml)[1].emulator
    assert emulator is not None, "the document names no QEMU"
    _, boot = await boot_with(xml.decode())
    arguments = ["-S", *boot.arguments, *hardware(xml).arguments]
    async with running(emulator, arguments, channels=["agent"]) as qemu:
        yield qemu
