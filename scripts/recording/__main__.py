"""record-qmp ARCH VERSION... | all | smp [--check]: tests/data/qmp/ARCH-VERSION/NAME.json, from
real QEMUs.

Each machine of `MACHINES` is started paused, under TCG, and asked what qmpvcpu asks a QEMU that it
connects to. Then one vCPU is plugged, plugged once more, and asked to leave. What differs between
two runs is made the same. `smp` records tests/data/smp.jsonl.gz: generated -machine, -smp and
-numa, and what each QEMU makes of them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmpvcpu.app.cache import cache_folder
from tests.support import smp_words

DATA = Path(__file__).resolve().parents[2] / "tests" / "data" / "qmp"
VERSIONS = ("7.2", "10.0", "11.1")
PAUSED = (
    "-S",
    "-nodefaults",
    "-display",
    "none",
    "-no-user-config",
    "-accel",
    "tcg",
    "-qmp",
    "stdio",
)
#: Seconds until QEMU must have answered everything.
DEADLINE = 30


@dataclass(frozen=True)
class Machine:
    """What is started: `name` is the recording's, `versions` the QEMUs that can."""

    arch: str
    name: str
    arguments: str
    versions: tuple[str, ...] = VERSIONS

    @property
    def words(self) -> list[str]:
        return self.arguments.split()


_TWO_NODES = (
    "-m 512 -object memory-backend-ram,id=m0,size=256M -object memory-backend-ram,id=m1,size=256M "
    "-numa node,nodeid=0,memdev=m0 -numa node,nodeid=1,memdev=m1"
)
_PSERIES = "-machine pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken"

MACHINES = (
    Machine("x86_64", "q35", "-machine q35 -smp 2,sockets=2,cores=2,threads=2,maxcpus=8"),
    Machine(
        "x86_64",
        "q35-nodes",
        f"-machine q35 -smp 2,sockets=2,cores=2,threads=2,maxcpus=8 {_TWO_NODES} "
        "-numa cpu,node-id=0,socket-id=0 -numa cpu,node-id=1,socket-id=1",
    ),
    Machine("x86_64", "q35-flat", "-machine q35 -smp 1,sockets=8,cores=1,threads=1,maxcpus=8"),
    Machine(
        "x86_64", "q35-dies", "-machine q35 -smp 1,sockets=1,dies=2,cores=2,threads=2,maxcpus=8"
    ),
    Machine(
        "x86_64",
        "q35-levels",
        "-machine q35 -smp 1,sockets=2,dies=3,modules=2,cores=3,threads=2,maxcpus=72",
        ("10.0",),
    ),
    Machine(
        "x86_64", "q35-300", "-machine q35 -smp 1,sockets=1,cores=300,maxcpus=300", ("10.0", "11.1")
    ),
    Machine("x86_64", "pc", "-machine pc -smp 1,sockets=4,cores=1,threads=1,maxcpus=4"),
    Machine(
        "ppc64", "pseries", f"{_PSERIES} -smp 8,cores=4,threads=8,maxcpus=32", ("10.0", "11.1")
    ),
    Machine(
        "ppc64",
        "pseries-nodes",
        f"{_PSERIES} -smp 4,cores=4,threads=4,maxcpus=16 {_TWO_NODES}"
        " -numa cpu,node-id=0,core-id=0 -numa cpu,node-id=0,core-id=4"
        " -numa cpu,node-id=1,core-id=8 -numa cpu,node-id=1,core-id=12",
        ("10.0", "11.1"),
    ),
    Machine("ppc64", "pseries-flat", f"{_PSERIES} -smp 1,cores=8,threads=1,maxcpus=8"),
    Machine("s390x", "ccw", "-machine s390-ccw-virtio -smp 2,maxcpus=8"),
    Machine(
        "loongarch64",
        "virt",
        "-machine virt -smp 2,sockets=2,cores=2,threads=2,maxcpus=8",
        ("10.0", "11.1"),
    ),
    Machine("aarch64", "virt", "-machine virt -cpu cortex-a57 -smp 2,maxcpus=4"),
    Machine("riscv64", "virt", "-machine virt -smp 2,maxcpus=4"),
)


class Qemu:
    """One QEMU with its QMP on stdin and stdout."""

    def __init__(self, machine: Machine, version: str) -> None:
        binary = cache_folder() / "qemu" / version / "bin" / f"qemu-system-{machine.arch}"
        self.process = subprocess.Popen(
            [binary, *PAUSED, *machine.words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.deadline = threading.Timer(DEADLINE, self.process.kill)
        self.deadline.start()
        first = self._read()
        if first is None:
            raise SystemExit(
                f"record-qmp: {machine.arch} {version} {machine.name}: {self.process.stderr.read()}"
            )  # type: ignore[union-attr]
        self.greeting = first
        self.ask("qmp_capabilities")

    def _read(self) -> dict[str, Any] | None:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        return json.loads(line) if line else None

    def ask(self, command: str, **arguments: Any) -> dict[str, Any] | None:
        """The reply with its events left out; None where QEMU has ended instead."""
        message = {"execute": command} | ({"arguments": arguments} if arguments else {})
        self.process.stdin.write(json.dumps(message) + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        while (reply := self._read()) is not None and "event" in reply:
            pass
        return reply

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *_: object) -> None:
        self.deadline.cancel()
        self.process.kill()
        self.process.communicate()


def value(reply: dict[str, Any] | None) -> Any:
    return reply.get("return") if reply is not None else None


def record(machine: Machine, version: str) -> dict[str, Any]:
    """What this machine answers, in QEMU's own shapes."""
    with Qemu(machine, version) as qemu:
        greeting = qemu.greeting["QMP"]["version"]["qemu"]
        replies: dict[str, Any] = {}
        for command in ("query-target", "query-kvm", "query-status"):
            replies[command] = qemu.ask(command)
        for path, name in (("/machine", "type"), ("/machine", "smp"), ("/machine", "vsmt")):
            replies[f"qom-get {path} {name}"] = qemu.ask("qom-get", path=path, property=name)
        kind = value(replies["qom-get /machine type"]).removesuffix("-machine")
        machines = [row for row in value(qemu.ask("query-machines")) if row["name"] == kind]
        replies["query-machines"] = {"return": machines}
        slots = qemu.ask("query-hotpluggable-cpus")
        cpus = value(qemu.ask("query-cpus-fast"))
        replies["query-hotpluggable-cpus"] = slots
        replies["query-cpus-fast"] = {"return": cpus}
        replies["qom-get CPU x2apic"] = qemu.ask(
            "qom-get", path=cpus[0]["qom-path"], property="x2apic"
        )
        replies["query-chardev"] = {"return": []}
        tried = try_hotplug(qemu, value(slots)) if value(slots) else []
    found = {
        "arch": machine.arch,
        "version": version,
        "arguments": machine.words,
        "greeting": greeting,
    }
    return same_every_time(found | {"replies": replies, "tried": tried})


def try_hotplug(qemu: Qemu, slots: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plug the lowest empty slot, plug it once more, give its id to another, ask it and the boot
    CPU to leave.
    """
    lowest, other = [slot for slot in reversed(slots) if "qom-path" not in slot][:2]
    boot = next(slot for slot in reversed(slots) if "qom-path" in slot)
    tried = []

    def attempt(name: str, command: str, **arguments: Any) -> None:
        tried.append(
            {
                "try": name,
                "command": command,
                "arguments": arguments,
                "reply": qemu.ask(command, **arguments),
            }
        )

    def plug(name: str, slot: dict[str, Any], device: str) -> None:
        attempt(name, "device_add", driver=slot["type"], id=device, **slot["props"])

    plug("plug", lowest, "one")
    plug("slot taken", lowest, "two")
    plug("id taken", other, "one")
    attempt("unplug", "device_del", id="one")
    attempt("unplug unknown", "device_del", id="nobody")
    attempt("unplug boot CPU", "device_del", id=boot["qom-path"])
    return tried


def same_every_time(found: dict[str, Any]) -> dict[str, Any]:
    """Thread ids from 101 on, in the order of the CPUs; machine types without the paths of this
    QEMU.
    """
    threads: dict[int, int] = {}
    for cpu in found["replies"]["query-cpus-fast"]["return"]:
        cpu["thread-id"] = threads.setdefault(cpu["thread-id"], 101 + len(threads))
    text = json.dumps(found)
    return json.loads(re.sub(r"/[^\"' ]*/qemu-system-", "qemu-system-", text))


def written(found: dict[str, Any]) -> str:
    """JSON with one reply, one slot and one CPU a line."""
    lines = []
    for key, item in found.items():
        if key == "replies":
            rows = [f"{json.dumps(name)}: {_reply(reply)}" for name, reply in sorted(item.items())]
            lines.append('"replies": {\n  ' + ",\n  ".join(rows) + "\n }")
        elif key == "tried":
            rows = [json.dumps(row, sort_keys=True) for row in item]
            lines.append('"tried": [\n  ' + ",\n  ".join(rows) + "\n ]" if rows else '"tried": []')
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(item)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _reply(reply: Any) -> str:
    rows = reply.get("return")
    if not isinstance(rows, list) or not rows:
        return json.dumps(reply, sort_keys=True)
    return (
        '{"return": [\n   '
        + ",\n   ".join(json.dumps(row, sort_keys=True) for row in rows)
        + "\n  ]}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="record-qmp", description="record what real QEMUs answer")
    parser.add_argument("arch", help="x86_64, ppc64 …, all, or smp")
    parser.add_argument("version", nargs="*", help="7.2, 10.0, 11.1 (default: all)")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where a recording differs"
    )
    options = parser.parse_args()
    differ = []
    if options.arch == "smp":
        text = smp_words.record(smp_words.RECORDED_COUNT, smp_words.RECORDED_SEED)
        if not options.check:
            smp_words.write_recorded(text)
        elif smp_words.recorded() != text:
            differ.append(smp_words.RECORDED.name)
    for machine in MACHINES:
        for version in machine.versions:
            if options.arch not in ("all", machine.arch) or (
                options.version and version not in options.version
            ):
                continue
            path = DATA / f"{machine.arch}-{version}" / f"{machine.name}.json"
            text = written(record(machine, version))
            if options.check:
                if not path.exists() or path.read_text() != text:
                    differ.append(str(path.relative_to(DATA)))
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for name in differ:
        print(f"record-qmp: differs from what QEMU answers: {name}", file=sys.stderr)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
