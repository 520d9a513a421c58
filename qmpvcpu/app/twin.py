"""A twin: the QEMU that a definition starts, unbooted and paused, and asked what its machine is.

It has nothing of the host behind its devices, so that it does nothing to the guest that runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qmpvcpu.app.boot import command_line
from qmpvcpu.app.probes import ProbeMode
from qmpvcpu.core.bootargs import qemu_arch
from qmpvcpu.core.hardware import hardware_args
from qmpvcpu.core.machine.comparison import Picture, differences, refusals_of
from qmpvcpu.core.machine.devices import AGENT_CHARDEV, bound_to_host, hollow
from qmpvcpu.core.migration import check_machine, machine_of
from qmpvcpu.core.model import DomainState
from qmpvcpu.domain import Domain, connect
from qmpvcpu.errors import Refusal, VcpuConnectionError, VcpuFailed, VcpuRefused
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.qemu.process import run_qemu
from qmpvcpu.xml.domain import read_domain
from qmpvcpu.xml.hardware import read_hardware

__all__ = ["HINT", "check_defined", "check_definition", "check_sides"]

#: What to do about a definition that is another machine.
HINT: Final = "`qmpvcpu define NAME --qmp ADDR` makes a definition of the guest as it runs"
_ELSEWHERE: Final = "in the definition"


async def check_definition(
    source: Domain, xml: bytes, machine: str | None, *, mode: ProbeMode = ProbeMode.AUTO
) -> list[Refusal]:
    """In what a guest that runs would not find its machine, were it started of a definition; nothing is touched.

    Args:
        source: connected.
        xml: the definition, with the vCPUs that the guest has now.
        machine: the guest's own machine type, versioned.
        mode: when a throwaway QEMU may be asked for the machine's topology.

    Raises:
        VcpuConnectionError: the guest's QEMU is lost.
    """
    state, there = await source.state(VcpuFlag.LIVE), await source.picture()
    try:
        twin, now = await _twin(xml, machine, mode)
    except VcpuRefused as error:
        return list(error.refusals)
    except (VcpuFailed, VcpuConnectionError) as error:
        text = f"no QEMU starts of its definition: {error.message}"
        return [Refusal("twin", text, (), HINT, "VIR_ERR_OPERATION_INVALID")]
    found = [_in_definition(one) for one in check_machine(machine_of(state), machine_of(twin))]
    return found + refusals_of(differences(there, now), _ELSEWHERE, HINT)


async def check_defined(source: Domain) -> list[Refusal]:
    """In what a guest that runs is another machine than its own definition; nothing where it has none.

    Raises:
        VcpuConnectionError: the guest's QEMU is lost.
    """
    if not source.has_definition:
        return []
    state = await source.state(VcpuFlag.LIVE)
    return await check_definition(source, await source.dump_xml(), state.machine)


def _in_definition(refusal: Refusal) -> Refusal:
    """`check_machine` speaks of a destination."""
    text = refusal.message.replace("at the destination", _ELSEWHERE).replace("the destination", "the definition")
    return replace(refusal, message=text, hint=HINT)


async def _twin(xml: bytes, machine: str | None, mode: ProbeMode) -> tuple[DomainState, Picture]:
    document, definition = read_domain(xml)
    if machine is not None:
        definition = replace(definition, machine=machine)
    line = await command_line(definition, mode=mode)
    if line.probe.emulator is None:
        raise VcpuFailed("; ".join(line.probe.messages), hint="name an <emulator> that is here")
    hardware = hardware_args(
        read_hardware(document), qemu_arch(definition), console="/dev/null", agent=AGENT_CHARDEV
    )
    if bound := bound_to_host(hardware):
        text = f"of what is the host's alone no second one can be made to compare: {', '.join(bound)}"
        raise VcpuRefused(
            [Refusal("twin", text, (), "take it out of the guest first", "VIR_ERR_OPERATION_INVALID")]
        )
    arguments = ["-S", *hollow([*line.args.arguments, *hardware])]
    async with (
        run_qemu(line.probe.emulator, arguments, channels=(AGENT_CHARDEV,)) as qemu,
        connect(qmp=qemu.qmp) as domain,
    ):
        return await domain.state(VcpuFlag.LIVE), await domain.picture()


async def check_sides(source: Domain, destination: Domain) -> list[Refusal]:
    """In what a guest would not find its machine in a QEMU that waits for it; nothing is touched."""
    found = differences(await source.picture(), await destination.picture())
    return refusals_of(found, "at the destination", "start the destination as the source was started")
