"""Before the first boot: the vCPUs that a domain's XML leads to, and QEMU's command line for it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from qmpvcpu.app.features import with_known_features
from qmpvcpu.app.probes import Probe, ProbeMode, find_layout
from qmpvcpu.app.qemus import find_binaries, path_of
from qmpvcpu.core.definition import Definition
from qmpvcpu.core.machine.boot_arguments import BootArgs, BootStyle, boot_args, machine_spec, qemu_arch
from qmpvcpu.core.rules import catalogue
from qmpvcpu.host.definition_files import DefinitionFolder, read_document
from qmpvcpu.xml.document import read_domain


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The arguments that QEMU is started with, and the probe that its vCPUs are known from."""

    args: BootArgs
    probe: Probe

    def to_json(self) -> list[Any]:
        """The document of `boot-args --json`."""
        return self.args.to_json()


def read_definition(word: str) -> tuple[Definition, tuple[str, ...]]:
    """Read a defined domain by its name, or an XML file by its path; the notes name what of a file
    is not trusted.

    A file does not choose the program: its <emulator> counts only if it is a QEMU that `doctor`
    lists.

    Raises:
        VcpuRefused: there is no such file or domain, or its XML is wrong.
    """
    folder = DefinitionFolder()
    if "/" not in word and folder.is_defined(word):
        return read_domain(folder.file(word).read())[1], ()
    if not os.path.lexists(word):
        also = "" if "/" in word else ", and no domain of that name"
        raise catalogue.NO_FILE_OR_DOMAIN.error(word=word, also=also)
    definition = read_domain(read_document(word))[1]
    listed = listed_program(definition)
    if definition.emulator is None or listed is not None:
        return replace(definition, emulator=listed), ()
    note = (
        f"<emulator> '{definition.emulator}' is ignored, as a file must not choose the program:"
        " --emulator names it"
    )
    return replace(definition, emulator=None), (note,)


def check_program(definition: Definition) -> None:
    """Raises VcpuRefused where the program that a definition names cannot be run on this host."""
    if definition.emulator is not None and path_of(definition.emulator) is None:
        raise catalogue.NO_EMULATOR.error(emulator=definition.emulator)


def listed_program(definition: Definition) -> str | None:
    """The definition's program, if it is a QEMU that `doctor` lists or that runs guests of its
    architecture.
    """
    wanted = os.path.realpath(definition.emulator or "")
    listed = [*find_binaries(), *find_binaries(qemu_arch(definition))]
    return next((path for path, _ in listed if os.path.realpath(path) == wanted), None)


async def probe_domain(
    definition: Definition,
    mode: ProbeMode = ProbeMode.AUTO,
    *,
    refresh: bool = False,
    emulator: str | None = None,
) -> Probe:
    """Find out which vCPUs a domain will have.

    Raises:
        VcpuRefused: there cannot be such a guest; the message says why.
        VcpuFailed, VcpuConnectionError: as `find_layout`.
    """
    return (await command_line(definition, mode=mode, refresh=refresh, emulator=emulator)).probe


async def command_line(
    definition: Definition,
    style: BootStyle = BootStyle.DEVICE,
    *,
    incoming: str | None = None,
    mode: ProbeMode = ProbeMode.AUTO,
    refresh: bool = False,
    emulator: str | None = None,
) -> CommandLine:
    """Make QEMU's command line for a domain.

    Args:
        definition: the domain.
        style: how vCPUs that -smp cannot express are added.
        incoming: as of `boot_args`.
        mode: when a throwaway QEMU may be asked.
        refresh: ask QEMU even if the answer is cached.
        emulator: the QEMU program, in place of the definition's.

    Raises:
        VcpuRefused: there cannot be such a guest; the message says why.
        VcpuFailed, VcpuConnectionError: as `find_layout`.
    """
    arch = qemu_arch(definition)
    notes: tuple[str, ...] = ()
    if emulator is None and definition.emulator is not None:
        emulator = path_of(definition.emulator)
        missing = f"<emulator> '{definition.emulator}' is not on this host"
        notes = (missing,) if emulator is None else ()
    if emulator is None:
        emulator = next((path for path, _ in find_binaries(arch)), None)
    if emulator is not None and mode is not ProbeMode.NEVER:
        definition, unknown = await with_known_features(definition, emulator, arch)
        notes += unknown
    # The driver's name matters only where -smp cannot express every vCPU.
    enabled = definition.enabled_ids
    typed = enabled != tuple(range(len(enabled))) or any(definition.vcpus[n].hotpluggable for n in enabled)
    probe = await find_layout(
        machine_spec(definition),
        arch=arch,
        emulator=emulator,
        mode=mode,
        refresh=refresh,
        typed=typed,
    )
    args = boot_args(definition, probe.layout, style, incoming)
    return CommandLine(args, replace(probe, started=args.started, messages=(*notes, *probe.messages)))
