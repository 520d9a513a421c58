"""Before the first boot: what the vCPUs of a domain's XML will be, and the command line of such a guest."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qmpvcpu.app.probes import Probe, ProbeMode, find_layout
from qmpvcpu.core.bootargs import BootArgs, BootStyle, boot_args, machine_spec, qemu_arch
from qmpvcpu.core.definition import Definition
from qmpvcpu.errors import Refusal, VcpuRefused
from qmpvcpu.host.definitions import DefinitionFile, DefinitionFolder
from qmpvcpu.xml.domain import read_domain

__all__ = ["CommandLine", "command_line", "probe_domain", "read_definition"]


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What QEMU is started with, and what its vCPUs are known from."""

    args: BootArgs
    probe: Probe

    def to_json(self) -> list[Any]:
        """The document of `boot-args --json`."""
        return self.args.to_json()


def read_definition(word: str) -> tuple[Definition, DefinitionFile]:
    """A domain by the name it is defined under, or by a file of its XML.

    Raises:
        VcpuRefused: there is neither, or the XML is wrong.
    """
    folder = DefinitionFolder()
    if "/" not in word and folder.is_defined(word):
        file = folder.file(word)
    elif os.path.lexists(word):
        file = DefinitionFile(Path(word), keep=False)
    else:
        text = f"there is no file '{word}'" + ("" if "/" in word else ", and no domain of that name")
        hint = "name a file with domain XML, or a domain that `qmpvcpu list` shows"
        raise VcpuRefused([Refusal("definition", text, (), hint, "VIR_ERR_NO_DOMAIN")])
    return read_domain(file.read())[1], file


async def probe_domain(
    definition: Definition,
    mode: ProbeMode = ProbeMode.AUTO,
    *,
    refresh: bool = False,
    emulator: str | None = None,
) -> Probe:
    """What its vCPUs will be.

    Raises:
        VcpuRefused: no such guest can be; the text says why.
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
    """QEMU's command line for it.

    Raises:
        VcpuRefused: no such guest can be; the text says why.
        VcpuFailed, VcpuConnectionError: as `find_layout`.
    """
    # The driver's name matters only where -smp cannot say it all.
    enabled = definition.enabled_ids
    typed = enabled != tuple(range(len(enabled))) or any(definition.vcpus[n].hotpluggable for n in enabled)
    probe = await find_layout(
        machine_spec(definition),
        arch=qemu_arch(definition),
        emulator=emulator or definition.emulator,
        mode=mode,
        refresh=refresh,
        typed=typed,
    )
    args = boot_args(definition, probe.layout, style, incoming)
    return CommandLine(args, replace(probe, started=args.started))
