"""The throwaway QEMU: it is started paused, reports which vCPUs it would have, and is ended.

It cannot affect the host: no devices, no configuration, no display, a seccomp sandbox, memory that
is never used. It has a folder of its own, ends when we end (`qemu.launch`), and an error has its
stderr.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from qmpvcpu.core.machine.layout import MachineSpec
from qmpvcpu.core.machine.numa import NumaNode
from qmpvcpu.core.machine.words import parse_size
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import VcpuConnectionError, VcpuFailed
from qmpvcpu.ports import CommandError
from qmpvcpu.qemu.launch import run_qemu

Answer = TypeVar("Answer")

_BARE: Final = ("-S", "-nodefaults", "-no-user-config", "-display", "none")
_SANDBOX: Final = (
    "-sandbox",
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
)
_NO_SANDBOX: Final = re.compile(r"sandbox|seccomp", re.IGNORECASE)
_MIB: Final = 1024 * 1024
#: Least MiB of one NUMA node by machine (7.2 to 11.1); other machines keep QEMU's default.
_MEMORY: Final = (
    (re.compile(r"pc\b|q35\b|s390-ccw-virtio\b"), 16),
    (re.compile(r"pseries\b"), 256),
)
_NODE_MEMORY: Final = 16
#: QEMU's errors that are about the host, for example about KVM, and not about the machine.
_HOST: Final = re.compile(
    r"KVM kernel module|/dev/kvm|failed to initialize kvm|cannot set up guest memory", re.I
)


#: Replies by command, for `core.machine.layout`.
Replies = dict[str, Any]


async def probe_machine(
    binary: str,
    spec: MachineSpec,
    read: Callable[[Replies], Answer],
    *,
    timeout: float = 30.0,
) -> Answer:
    """Start a QEMU as `spec` says and query its vCPUs; returns what `read` makes of the replies.

    Args:
        binary: the QEMU program.
        spec: the machine.
        read: called with the replies, while QEMU ends.
        timeout: seconds for all of it.

    Raises:
        VcpuRefused: QEMU refuses that machine; the message is QEMU's.
        VcpuFailed: QEMU cannot be started, or exits.
        VcpuConnectionError: it does not answer, or its answer is not QEMU's.
    """
    arguments = [*_BARE, "-machine", spec.machine, "-accel", spec.accel, *_memory(spec)]
    if str(spec.smp):
        arguments += ["-smp", str(spec.smp)]
    if spec.cpu is not None:
        arguments += ["-cpu", spec.cpu]
    try:
        async with asyncio.timeout(timeout):
            try:
                return await _ask(binary, [*_SANDBOX, *arguments], read)
            except VcpuFailed as error:
                if error.exit_code is None or not _NO_SANDBOX.search(error.qmp_text or ""):
                    raise
                # QEMU was built without seccomp, or the host does not have it.
                return await _ask(binary, arguments, read)
    except TimeoutError as error:
        raise VcpuConnectionError(
            f"'{binary}' did not answer within {timeout:.1f} s",
            reason="timeout",
            hint="check that it is a QEMU: run it by hand with -machine none -S",
        ) from error
    except VcpuFailed as error:
        said = error.qmp_text or ""
        if error.exit_code != 1 or not said or _HOST.search(said):
            raise
        raise catalogue.SMP_REFUSED.error(error=said, binary=binary) from error


def _memory(spec: MachineSpec) -> list[str]:
    """The arguments for as little memory as possible, and for -numa; no page of it is ever used."""
    least = next((size for machine, size in _MEMORY if machine.match(spec.machine)), None)
    if not spec.numa:
        return [] if least is None else ["-m", f"{least}M"]
    size = least or _NODE_MEMORY
    nodes = [option for option in spec.numa if isinstance(option, NumaNode)]
    # If no node names its memory, each has some.
    is_free = all(node.memdev is None and node.mem is None for node in nodes)
    ids: dict[str, str] = {}
    words: list[str] = []
    total = 0
    for option in spec.numa:
        memory = None
        if not isinstance(option, NumaNode):
            words += ["-numa", str(option)]
            continue
        if option.mem is not None:
            sizes = [parse_size(option.mem, is_strict=is_strict) for is_strict in (True, False)]
            if all(sizes):
                total += size
                memory = f"mem={size}M"
            else:
                # Not every version of QEMU reads this size: this one must accept or refuse it.
                total += (
                    max(
                        parse_size(option.mem, _MIB, is_strict=strict) or 0
                        for strict in (True, False)
                    )
                    // _MIB
                )
                memory = f"mem={option.mem}"
        elif is_free or option.memdev is not None:
            name = f"node{option.id}" if option.memdev is None else f"dev-{option.memdev}"
            total += 0 if name in ids else size
            memory = f"memdev={ids.setdefault(name, f'ram{len(ids)}')}"
        words += ["-numa", option.words(memory)]
    backends = [f"memory-backend-ram,id={name},size={size * _MIB}" for name in ids.values()]
    return [
        "-m",
        f"{total or size}M",
        *(word for text in backends for word in ("-object", text)),
        *words,
    ]


async def _ask(binary: str, arguments: Sequence[str], read: Callable[[Replies], Answer]) -> Answer:
    async with run_qemu(binary, arguments, monitors=()) as qemu:
        monitor = qemu.monitor
        # Sent together, to wait once, and no more than needed: query-machines takes 1 ms, and
        # query-cpu-definitions 25 ms on x86; qom-list-types loads every module, and QEMU aborts at
        # a module of another build (10.0, 11.1).
        queries = {
            "query-hotpluggable-cpus": monitor.query_hotpluggable_cpus(),
            "query-target": monitor.query_target(),
            "type": monitor.qom_get("/machine", "type"),
            "smp": monitor.qom_get("/machine", "smp"),
        }
        replies = await asyncio.gather(*queries.values(), return_exceptions=True)
        if isinstance(replies[_HOTPLUG], CommandError):
            # No CPU hotplug: the CPUs of now are all that there will ever be.
            queries["query-cpus-fast"] = monitor.query_cpus_fast()
            replies += await asyncio.gather(queries["query-cpus-fast"], return_exceptions=True)
        qemu.kill()
        found: Replies = {"greeting": dict(monitor.greeting)}
        for command, reply in zip(queries, replies, strict=True):
            if isinstance(reply, CommandError) and command in _MAY_FAIL:
                found[command] = None
            elif isinstance(reply, CommandError):
                raise VcpuConnectionError(
                    f"'{binary}' cannot answer {reply}",
                    reason="malformed",
                    hint="use QEMU 6.2 or later",
                ) from reply
            elif isinstance(reply, BaseException):
                raise reply
            else:
                found[command] = reply
        return read(found)


#: The index of its reply.
_HOTPLUG: Final = 0
#: They fail where the machine has no CPU hotplug, and before QEMU 6.2.
_MAY_FAIL: Final = frozenset({"query-hotpluggable-cpus", "smp"})
