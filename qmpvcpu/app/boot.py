"""Before the first boot: the vCPUs that a domain's XML leads to, and QEMU's command line for it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from qmpvcpu.app.cache import cache_folder
from qmpvcpu.app.probes import Probe, ProbeMode, find_layout
from qmpvcpu.app.qemus import NO_MACHINE, find_binaries, path_of
from qmpvcpu.core.arch import architecture, architecture_of_program
from qmpvcpu.core.definition import Definition
from qmpvcpu.core.machine.boot_arguments import (
    BootArgs,
    BootStyle,
    boot_args,
    machine_spec,
    qemu_arch,
)
from qmpvcpu.core.machine.command_line import split_cpu
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.state.inventory import objects_of
from qmpvcpu.host.answers import FileCache, key_of, program_of
from qmpvcpu.host.definition_files import DefinitionFolder, read_document
from qmpvcpu.ports import CommandError
from qmpvcpu.qemu.launch import run_qemu
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
    return replace(definition, emulator=None), (
        f"<emulator> '{definition.emulator}' is ignored, as a file must not choose the program:"
        " --emulator names it",
    )


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
        notes = () if emulator else (f"<emulator> '{definition.emulator}' is not on this host",)
    if emulator is None:
        emulator = next((path for path, _ in find_binaries(arch)), None)
    if emulator is not None and mode is not ProbeMode.NEVER:
        definition, unknown = await _with_known_features(definition, emulator, arch)
        notes += unknown
    # The driver's name matters only where -smp cannot express every vCPU.
    enabled = definition.enabled_ids
    typed = enabled != tuple(range(len(enabled))) or any(
        definition.vcpus[n].hotpluggable for n in enabled
    )
    probe = await find_layout(
        machine_spec(definition),
        arch=arch,
        emulator=emulator,
        mode=mode,
        refresh=refresh,
        typed=typed,
    )
    args = boot_args(definition, probe.layout, style, incoming)
    return CommandLine(
        args, replace(probe, started=args.started, messages=(*notes, *probe.messages))
    )


async def _with_known_features(
    definition: Definition, program: str, arch: str
) -> tuple[Definition, tuple[str, ...]]:
    """The definition without those features that are off and that this QEMU does not have, and a
    note of them.

    Args:
        definition: of the domain.
        program: the QEMU that will run it; it is started for a moment, once for each program file.
        arch: QEMU's target of the guest.

    Raises:
        VcpuRefused: this QEMU does not have a feature that is on.
        VcpuFailed, VcpuConnectionError: the QEMU does not start, or does not answer.
    """
    model, features = split_cpu(definition.cpu) if definition.cpu is not None else ("", ())
    switches = [pair for pair in features if pair[1] in ("on", "off")]
    known = await _features_of(program, arch) if switches else None
    if known is None:
        return definition, ()
    unknown = {key: value for key, value in switches if key.replace("_", "-") not in known}
    lacking = [key for key, value in unknown.items() if value == "on"]
    if lacking:
        raise catalogue.NO_CPU_FEATURE.error(program=program, features=", ".join(lacking))
    if not unknown:
        return definition, ()
    words = [f"{key}={value}" for key, value in features if key not in unknown]
    names = ", ".join(unknown)
    return replace(definition, cpu=",".join([model, *words])), (
        f"this QEMU does not have CPU feature {names}, which the definition switches off",
    )


async def _features_of(program: str, arch: str) -> frozenset[str] | None:
    """The names of the properties of the CPU model with every feature; None where QEMU has no such
    model.
    """
    row = architecture_of_program(program) or architecture(arch)
    if row.cpu_suffix is None:
        return None
    cache = FileCache(cache_folder() / "probes")
    try:
        key = key_of("features", program_of(program).to_json())
    except OSError:
        return None
    names = cache.get(key)
    if not isinstance(names, list):
        names = await _ask(program, "max" + row.cpu_suffix)
        cache.put(key, names)
    return frozenset(str(name) for name in names) or None


async def _ask(program: str, model: str) -> list[str]:
    async with run_qemu(program, NO_MACHINE) as qemu:
        try:
            rows = await qemu.monitor.execute("qom-list-properties", {"typename": model})
        except CommandError:
            return []
    return [row["name"] for row in objects_of(rows) if isinstance(row.get("name"), str)]
