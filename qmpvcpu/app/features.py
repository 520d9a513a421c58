"""The CPU features that a definition switches on or off, compared with those that the QEMU to be
started has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qmpvcpu.app.cache import cache_folder
from qmpvcpu.core.arch import architecture, architecture_of_program
from qmpvcpu.core.definition import Definition
from qmpvcpu.core.machine.command_line import split_cpu
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.state.inventory import objects_of
from qmpvcpu.host.answers import FileCache, key_of, program_of
from qmpvcpu.ports import CommandError
from qmpvcpu.qemu.launch import run_qemu

_MODEL: Final = "max"


async def with_known_features(
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
    note = f"this QEMU does not have CPU feature {names}, which the definition switches off"
    return replace(definition, cpu=",".join([model, *words])), (note,)


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
        names = await _ask(program, _MODEL + row.cpu_suffix)
        cache.put(key, names)
    return frozenset(str(name) for name in names) or None


async def _ask(program: str, model: str) -> list[str]:
    arguments = ["-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S"]
    async with run_qemu(program, arguments) as qemu:
        try:
            rows = await qemu.monitor.execute("qom-list-properties", {"typename": model})
        except CommandError:
            return []
    return [row["name"] for row in objects_of(rows) if isinstance(row.get("name"), str)]
