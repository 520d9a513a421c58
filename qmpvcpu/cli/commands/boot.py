"""`probe`, `boot-args`, `start` and `destroy`: a guest that does not run, and its start."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from qmpvcpu.cli import render
from qmpvcpu.cli.options import (
    NO_PLACE,
    PROBE_MODE,
    Argument,
    argument,
    choice,
    command,
    flag,
    seconds,
    value,
)
from qmpvcpu.core.machine.boot_arguments import BootStyle
from qmpvcpu.core.machine.layout import MachineSpec
from qmpvcpu.core.machine.numa import parse_numa
from qmpvcpu.core.machine.smp import parse_machine
from qmpvcpu.core.machine.words import join_pairs, split_pairs
from qmpvcpu.core.model import format_ids
from qmpvcpu.errors import VcpuUsageError

if TYPE_CHECKING:
    from qmpvcpu.app.probes import Probe
    from qmpvcpu.cli.session import CommandSession

_GUEST = "its domain XML, or the name it is defined under"
_EMULATOR = (value("--emulator", "PATH", "the QEMU program"), PROBE_MODE)


def _machine_word(name: str, metavar: str, text: str) -> Argument:
    """Keep the order of --machine and --smp, because QEMU merges -machine and -smp in their
    order.
    """

    def named(text: str) -> tuple[str, str]:
        return name, text

    return value(f"--{name}", metavar, text, dest="words", action="append", default=[], type=named)


@command(
    argument("word", "FILE|NAME", _GUEST, option="file", default=None),
    _machine_word("machine", "TYPE", "as QEMU's -machine: q35, pseries …"),
    _machine_word("smp", "SMP", "as QEMU's -smp: 4,maxcpus=16,sockets=2 (default 1)"),
    value("--cpu", "MODEL", "as QEMU's -cpu"),
    choice("--accel", ("tcg", "kvm"), "as QEMU's -accel (default tcg)"),
    value("--numa", "NUMA", "as QEMU's -numa", action="append", default=[]),
    value("--arch", "ARCH", "QEMU's target, where the machine does not say it"),
    *_EMULATOR,
    flag("--refresh", "ask QEMU also if it has answered; alone: remove cached answers"),
)
async def probe(session: CommandSession) -> int:
    """Show what the vCPUs of a guest will be."""
    from qmpvcpu.app.boot import probe_domain, read_definition
    from qmpvcpu.app.probes import ProbeMode, find_layout, forget_probes

    options = session.options
    by_machine = [*options.words, options.cpu, options.accel, options.arch, *options.numa]
    mode = ProbeMode(options.probe)
    if options.refresh and mode is ProbeMode.NEVER:
        raise VcpuUsageError(
            "--refresh asks QEMU, and --probe never does not", hint="leave one of them out"
        )
    if options.word is not None:
        if any(value is not None for value in by_machine):
            raise VcpuUsageError(
                "a file is given, and a machine too",
                hint="probe FILE, or probe --machine … --smp …",
            )
        definition, notes = read_definition(options.word)
        session.warn(notes)
        async with session.waiting("asking QEMU"):
            found = await probe_domain(
                definition, mode, refresh=options.refresh, emulator=options.emulator
            )
    elif any(option == "machine" for option, _ in options.words):
        machine, smp = parse_machine(options.words)
        machine, accel = _without_accel(machine, options.accel)
        spec = MachineSpec(machine, smp, options.cpu, accel, parse_numa(options.numa))
        async with session.waiting("asking QEMU"):
            found = await find_layout(
                spec,
                arch=options.arch,
                emulator=options.emulator,
                mode=mode,
                refresh=options.refresh,
            )
    elif options.refresh and not any(value is not None for value in by_machine):
        removed = forget_probes()
        session.show({"forgotten": removed}, [f"{removed} cached answers removed"])
        return 0
    else:
        raise VcpuUsageError(
            "no machine is given", hint="probe FILE, or probe --machine q35 --smp 2,maxcpus=8"
        )
    session.warn(found.messages)
    session.show(found.to_json(), _lines(found))
    return 0


def _without_accel(machine: str, accel: str | None) -> tuple[str, str]:
    """Return the machine without `accel=`, and the accelerator from there or from --accel."""
    pairs = dict(split_pairs(machine, "type"))
    inner = pairs.pop("accel", None)
    if inner is not None and accel is not None:
        raise VcpuUsageError(
            "--accel and accel= in --machine exclude each other", hint="leave one of them out"
        )
    if inner not in (None, "tcg", "kvm"):
        raise VcpuUsageError(f"accel='{inner}' in --machine", hint="write tcg or kvm")
    return join_pairs(pairs.items(), "type"), inner or accel or "tcg"


@command(
    argument("word", "FILE|NAME", _GUEST, option="file"),
    choice(
        "--style",
        ("device", "qmp"),
        "vCPUs that -smp cannot express: as -device (default), or as QMP commands",
        default="device",
    ),
    value(
        "--incoming",
        "URI",
        "for a guest that migrates here (default defer)",
        nargs="?",
        const="defer",
    ),
    *_EMULATOR,
)
async def boot_args(session: CommandSession) -> int:
    """Print QEMU's command line for a guest."""
    from qmpvcpu.app.boot import command_line, read_definition
    from qmpvcpu.app.probes import ProbeMode

    options = session.options
    definition, notes = read_definition(options.word)
    session.warn(notes)
    async with session.waiting("asking QEMU"):
        found = await command_line(
            definition,
            BootStyle(options.style),
            incoming=options.incoming,
            mode=ProbeMode(options.probe),
            emulator=options.emulator,
        )
    session.warn((*found.probe.messages, *found.args.messages))
    if session.output.is_json:
        session.output.document(found.to_json())
        return 0
    lines = [shlex.join(found.args.arguments), *map(json.dumps, found.args.commands)]
    session.output.data("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    return 0


def _lines(found: Probe) -> list[str]:
    layout = found.layout
    how = {
        "predicted": "predicted, no QEMU was started",
        "cached": "cached, no QEMU was started",
        "probed": "asked of a throwaway QEMU",
    }[layout.source]
    count = sum(vcpu.enabled for vcpu in found.vcpus)
    version = f"QEMU {layout.version}" if layout.version is not None else "any QEMU"
    head = (
        f"{layout.machine}: {layout.arch}, {version}, {layout.accel}: {count} of"
        f" {layout.maxcpus} vCPUs at boot"
    )
    if not layout.can_plug:
        head += " (this machine has no CPU hotplug)"
    elif not layout.can_unplug:
        head += " (this machine cannot unplug CPUs)"
    lines = [head, how]
    if layout.cpu_type is not None:
        lines.append(f"device_add driver: {layout.cpu_type}")
    return [*lines, "", *render.slots(layout, found.vcpus)]


_NAME = argument("domain", "NAME", "the name that it is defined under")


@command(
    _NAME,
    PROBE_MODE,
    NO_PLACE,
    value(
        "--timeout",
        "S",
        "how long to wait for its machine (default 30)",
        type=seconds,
        default=30.0,
    ),
)
async def start(session: CommandSession) -> int:
    """Start a defined domain."""
    from qmpvcpu.app import start as app
    from qmpvcpu.app.probes import ProbeMode

    async with session.waiting("starting QEMU"):
        options = session.options
        done = await app.start(
            options.domain,
            mode=ProbeMode(options.probe),
            timeout=options.timeout,
            place=not options.no_place,
        )
    session.warn(done.messages)
    ids = format_ids(done.state.enabled_ids)
    lines = [
        f"{done.name}: started, QEMU {done.pid} with vCPU {ids}",
        *(f"QMP: {path}" for path in done.qmp),
    ]
    session.show(
        done.to_json(),
        [*lines, f"agent: {done.agent}", f"log: {done.log}", f"console: {done.console}"],
    )
    return 0


@command(_NAME)
async def destroy(session: CommandSession) -> int:
    """End the QEMU of a domain."""
    from qmpvcpu.app import start as app

    async with session.waiting("ending QEMU"):
        done = await app.destroy(session.options.domain)
    how = "killed: it did not end by itself" if done.killed else "ended"
    session.show(done.to_json(), [f"{done.name}: QEMU {done.pid} {how}"])
    return 0
