"""A guest that mirrors a scripted QEMU: its agent lists the CPUs that are plugged, and tells which
is which.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tests.support.fake_agent import FakeAgent, error
from tests.support.fake_qemu import FakeQemu

_SYSFS = "/sys/devices/system/cpu/cpu{}/{}"
#: Architectures whose guest takes offline whatever it is told to, and onlines by itself what is
#: plugged.
_ALL_OFF = ("ppc64", "aarch64", "riscv64")


class FakeGuest(FakeAgent):
    """The CPU of vCPU n is the guest's n. What is public may be changed while it runs."""

    def __init__(self, qemu: FakeQemu, offline: Iterable[int] = ()) -> None:
        super().__init__(dict.fromkeys(qemu.plugged_ids, True) | dict.fromkeys(offline, False))
        self.qemu = qemu
        self.fixed = set() if qemu.arch in _ALL_OFF else {0}
        #: Whether a plugged CPU appears in the guest, and how.
        self.appears = True
        self.as_online = qemu.arch == "ppc64"
        #: Commands that it may not carry out, never answers, or answers with garbage.
        self.disabled: set[str] = set()
        self.silent: set[str] = set()
        self.garbage: set[str] = set()
        #: Command -> the error that it answers.
        self.errors: dict[str, str] = {}
        #: It says yes to guest-set-vcpus and does nothing.
        self.lies = False

    async def line(self, line: bytes, writer: Any) -> None:
        name = json.loads(line.rpartition(b"\xff")[2])["execute"]
        if name in self.silent:
            self.commands.append((name, {}))
            return
        if name in self.garbage:
            writer.write(b"garbage\n")
            return
        await super().line(line, writer)

    def answer(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if name in self.disabled:
            text = f"Command {name} has been disabled: the command is not allowed"
            return error(text, "CommandNotFound")
        if name in self.errors:
            return error(self.errors[name])
        if name == "guest-get-vcpus":
            self.look()
        if name == "guest-set-vcpus" and self.lies:
            return {"return": len(arguments["vcpus"])}
        return super().answer(name, arguments)

    def look(self) -> None:
        """See which CPUs have come and gone."""
        plugged = self.qemu.plugged_ids
        for vcpu in plugged if self.appears else ():
            self.online.setdefault(vcpu, self.as_online)
        for gone in set(self.online) - set(plugged):
            del self.online[gone]
        self.files = self.identity()

    def identity(self) -> dict[str, bytes]:
        """The files that tell which CPU is which."""
        arch = self.qemu.arch
        if arch in ("x86_64", "i386"):
            cpuinfo = "".join(
                f"processor: {n}\napicid: {self.apic_id(n)}\n\n"
                for n, on in self.online.items()
                if on
            )
            return {"/proc/cpuinfo": cpuinfo.encode()} | self._each(
                "firmware_node/path", self._acpi
            )
        if arch == "loongarch64":
            return self._each("firmware_node/path", self._acpi)
        if arch == "ppc64":
            present = ",".join(map(str, sorted(self.online)))
            return {"/sys/devices/system/cpu/present": present.encode()} | self._each(
                "physical_id", self._physical
            )
        if arch == "s390x":
            return self._each(
                "address", lambda n: str(self.qemu.machine.slots[n]["props"]["core-id"]).encode()
            )
        return self._each("of_node/reg", lambda n: n.to_bytes(8, "big"))

    def _each(self, name: str, content: Any) -> dict[str, bytes]:
        return {_SYSFS.format(n, name): content(n) for n in self.online}

    def _acpi(self, vcpu: int) -> bytes:
        return b"\\_SB_.CPUS.C%03X\n" % vcpu

    def _physical(self, vcpu: int) -> bytes:
        core, thread = divmod(vcpu, self.qemu.threads(0))
        return b"%d\n" % (core * self.qemu.machine.vsmt + thread)

    def apic_id(self, vcpu: int) -> int:
        """x86: each level of the topology has the fewest bits that hold it."""
        props, smp = self.qemu.machine.slots[vcpu]["props"], self.qemu.machine.topology
        number = shift = 0
        for level, count in (
            ("thread", "threads"),
            ("core", "cores"),
            ("module", "modules"),
            ("die", "dies"),
        ):
            number |= props.get(f"{level}-id", 0) << shift
            shift += (smp.get(count, 1) - 1).bit_length()
        return number | props.get("socket-id", 0) << shift
