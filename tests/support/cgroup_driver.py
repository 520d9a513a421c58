"""Runs inside a test guest, whose kernel has what the host's may lack: v2 with cpuset and cpu, two
NUMA nodes.

Arguments: 1 or 2, the version of cgroup, then `qemu`. A process with threads stands for QEMU; what
    places them is
the real `qmpvcpu.host`. Prints one JSON document.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from qmpvcpu.core.rules.placement import Placement, check_placements
from qmpvcpu.host.affinity import QemuThreads
from qmpvcpu.host.cgroup import hierarchy
from qmpvcpu.host.process import find_process

VCPUS = (1, 2, 3)
PLACED = {
    1: Placement((1,), "fifo:10", mems=(1,), period=50000, quota=25000, shares=512),
    2: Placement((0,), mems=(0,)),
}


class Qemu:
    """A process with a thread for each vCPU; its command line is ours, which ends in `qemu`."""

    def __init__(self):
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            serve(write)
        os.close(write)
        with os.fdopen(read) as told:
            self.threads = dict(zip(VCPUS, map(int, told.readline().split()), strict=True))

    def end(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def serve(write):
    ids, done = [], threading.Semaphore(0)

    def vcpu():
        ids.append(threading.get_native_id())
        done.release()
        threading.Event().wait()

    for _ in VCPUS:
        threading.Thread(target=vcpu, daemon=True).start()
        done.acquire()
    os.write(write, (" ".join(map(str, ids)) + "\n").encode())
    os.close(write)
    while True:
        signal.pause()


def text(path):
    return Path(path).read_text().strip()


def group_of(pid, thread, key):
    return hierarchy.groups_of(Path(f"/proc/{pid}/task/{thread}/cgroup").read_text()).get(key)


def settings(folder):
    names = [
        "cpuset.cpus",
        "cpuset.mems",
        "cpuset.cpus.effective",
        "cpuset.mems.effective",
        "cpu.max",
        "cpu.weight",
    ]
    names += ["cgroup.type", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares"]
    return {name: text(folder / name) for name in names if (folder / name).exists()}


def main():
    version = int(sys.argv[1])
    mounts = [one for one in hierarchy.hierarchies() if one.version == version]
    told = {"controllers": sorted({name for one in mounts for name in one.controllers})}
    key = "" if version == 2 else "cpuset"
    root = next(one.mount for one in mounts if "cpuset" in one.controllers)

    # In the topmost group, with others: a group of ours.
    qemu = Qemu()
    threads = QemuThreads(find_process(qemu.threads.values()))
    told["refusals"] = [
        one.message for one in check_placements(PLACED, threads.facts(PLACED.values()))
    ]
    beyond = {1: Placement((9,), mems=(7,))}
    told["beyond"] = [
        one.message for one in check_placements(beyond, threads.facts(beyond.values()))
    ]
    threads.make_groups(PLACED)
    for number, placement in PLACED.items():
        threads.place(qemu.threads[number], placement, number)
    folder = next(root.glob("qemu-*.qmpvcpu"))
    told["alone"] = {
        "groups": {n: group_of(qemu.pid, qemu.threads[n], key).rpartition("/")[2] for n in PLACED},
        "settings": {n: settings(folder / f"vcpu{n}") for n in PLACED},
        "threads": {n: str(threads.look([qemu.threads[n]])[qemu.threads[n]]) for n in PLACED},
        "main": group_of(qemu.pid, qemu.pid, key),
    }
    threads.place(qemu.threads[1], Placement((0, 1)))
    told["alone"]["pinned anew"] = settings(folder / "vcpu1")["cpuset.cpus"]
    qemu.end()
    threads.remove_groups(VCPUS, ())

    # libvirt's layout, the emulator on node 0 only.
    qemu = Qemu()
    machine = root / "machine"
    emulator = machine / "emulator"
    emulator.mkdir(parents=True)
    if version == 2:
        (root / "cgroup.subtree_control").write_text("+cpuset +cpu")
        (machine / "cgroup.procs").write_text(str(qemu.pid))
        (emulator / "cgroup.type").write_text("threaded")
        (machine / "cgroup.subtree_control").write_text("+cpuset +cpu")
        for name in os.listdir(f"/proc/{qemu.pid}/task"):
            (emulator / "cgroup.threads").write_text(name)
    else:
        for where in (machine, emulator):
            for what in ("cpus", "mems"):
                (where / f"cpuset.{what}").write_text(text(where.parent / f"cpuset.{what}"))
        (emulator / "cgroup.procs").write_text(str(qemu.pid))
    (emulator / "cpuset.mems").write_text("0")
    threads = QemuThreads(find_process(qemu.threads.values()))
    told["has layout"] = threads.has_layout()
    wanted = {**PLACED, 3: Placement()}
    told["layout refusals"] = [
        one.message for one in check_placements(wanted, threads.facts(wanted.values()))
    ]
    threads.make_groups(wanted)
    widened = threads.widen([1])
    told["widened"] = text(emulator / "cpuset.mems")
    widened.end()
    told["put back"] = text(emulator / "cpuset.mems")
    told["needs none"] = threads.widen([0]) is None
    # One that is killed meanwhile: the next process puts it back.
    if os.fork() == 0:
        threads.widen([1])
        os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
    told["after a kill"] = text(emulator / "cpuset.mems")
    QemuThreads(find_process(qemu.threads.values())).recover()
    told["recovered"] = text(emulator / "cpuset.mems")
    for number, placement in wanted.items():
        threads.place(qemu.threads[number], placement, number)
    told["layout"] = {
        "groups": {n: group_of(qemu.pid, qemu.threads[n], key) for n in wanted},
        "settings": {n: settings(machine / f"vcpu{n}") for n in wanted},
        "emulator": group_of(qemu.pid, qemu.pid, key),
    }
    qemu.end()
    told["busy"] = sorted(threads.remove_groups(VCPUS, ()))
    for number in VCPUS:
        if (machine / f"vcpu{number}").exists():
            (machine / f"vcpu{number}").rmdir()
    emulator.rmdir()
    machine.rmdir()
    told["left"] = sorted(path.name for path in root.glob("qemu-*"))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
