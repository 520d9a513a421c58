"""A cgroup for each vCPU, in libvirt's layout: `vcpuN` next to `emulator`, the group of QEMU's
other threads.

If QEMU is in a group named `emulator`, every vCPU gets a group next to that one. If QEMU is alone
in a group, every vCPU that has settings in the XML gets a group inside it. If QEMU shares a group
with other processes, the groups are made in a group of ours inside it, but only for settings that
need a controller. Affinity alone needs no controller, and the first move into any group takes the
kernel some 7 ms (Linux 6.18: it waits for all CPUs; the moves right after it take 0.1 ms).

cgroups(7), Documentation/admin-guide/cgroup-v1/cpusets.rst, cgroup-v2.rst. On v2 the groups are
threaded.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Final

from qmpvcpu.core.model import format_ids
from qmpvcpu.core.rules.placement import REAL_TIME, Control, Placement
from qmpvcpu.host.cgroup.hierarchy import (
    V1,
    V2,
    Group,
    cpu_list,
    find_groups,
    groups_of,
    hierarchies,
    put,
    read_text,
    words,
    write,
)
from qmpvcpu.host.cgroup.widen import Widened, forget_dead, notes
from qmpvcpu.host.files import try_lock
from qmpvcpu.host.owners import make_folder
from qmpvcpu.host.process import Process, is_alive

_PROC: Final = Path("/proc")
_EMULATOR: Final = "emulator"
_VCPU: Final = "vcpu"
#: The suffix of a group that we made: `qemu-PID-START.qmpvcpu`.
_OURS: Final = ".qmpvcpu"
#: The controllers that have settings; cpuacct only counts.
_CONTROLLERS: Final = ("cpuset", "cpu")
#: cgroup-v2.rst, cpu.max; the kernel's default, microseconds.
_PERIOD: Final = 100_000
#: QEMU may start threads while its threads are moved. Each round finds fewer of them.
_ROUNDS: Final = 10
#: Seconds for which the text of /proc/PID/cgroup is reused by the next call.
_MOMENT: Final = 0.01
#: Seconds after which the mounts are read once more.
_MOUNTS_SECONDS: Final = 10.0
#: Seconds between two attempts to remove a group.
_REMOVE_PAUSE: Final = 0.002


class _Site:
    """The groups of one QEMU's vCPUs in one hierarchy. Each property is read when it is first used.

    `group` is the group of QEMU's main thread; `base` is the group that contains `vcpuN`.
    """

    def __init__(self, group: Group, process: Process) -> None:
        self.group = group
        self._process = process

    @cached_property
    def is_layout(self) -> bool:
        """Whether QEMU's other threads are in an `emulator` group as libvirt makes it. Groups of
        vCPUs then belong next to that group.
        """
        if self.group.folder.name != _EMULATOR:
            return False
        # A threaded group cannot be made next to a group of whole processes.
        return self.group.version == V1 or words(self.group.folder / "cgroup.type") == ["threaded"]

    @cached_property
    def is_alone(self) -> bool:
        """Whether QEMU is alone in its group. The root group never counts."""
        if self.group.name == "/" or self.is_layout:
            return False
        return words(self.group.folder / "cgroup.procs") == [str(self._process.pid)]

    @cached_property
    def base(self) -> Group:
        """The group that contains the groups of the vCPUs, or will contain them."""
        if self.is_layout:
            return self.group.parent
        name = f"qemu-{self._process.pid}-{self._process.start}{_OURS}"
        return self.group if self.is_alone else self.group.child(name)

    @property
    def top(self) -> Group:
        """The existing group that ours are made in."""
        return self.base if self.is_layout else self.group

    @cached_property
    def controllers(self) -> tuple[str, ...]:
        """The controllers that groups in `base` can have."""
        if self.group.version == V1:
            return self.group.hierarchy.controllers
        has = words(self.top.folder / "cgroup.controllers")
        return tuple(name for name in _CONTROLLERS if name in has)

    @cached_property
    def splits_real_time(self) -> bool:
        """Whether a new group has no real-time budget: v1 with CONFIG_RT_GROUP_SCHED."""
        return self.group.version == V1 and (self.group.folder / "cpu.rt_runtime_us").exists()

    @cached_property
    def trouble(self) -> tuple[str | None, bool]:
        """Why no group can be made in `top` (None if one can), and whether an additional right
        would help.
        """
        return _trouble(self.top, self._process)

    def takes(self, placement: Placement) -> bool:
        """Whether a vCPU with this placement gets a group in this hierarchy."""
        if any(name in self.controllers for name in placement.controllers):
            return True
        if not self.is_layout and not (self.is_alone and placement):
            return False
        # A new group there has no real-time budget.
        is_barred = placement.policy in REAL_TIME and self.splits_real_time
        return self.trouble[0] is None and not is_barred

    @property
    def is_ours(self) -> bool:
        """Whether we have made `base`."""
        return self.base.folder.name.endswith(_OURS)

    def vcpu(self, vcpu_id: int) -> Group:
        """The group of a vCPU."""
        return self.base.child(f"{_VCPU}{vcpu_id}")


class VcpuGroups:
    """The groups of one QEMU's vCPUs. They are looked up for every change, because QEMU may be
    moved.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._made: dict[int, list[Group]] = {}
        #: The sites that `controls` found; `make_groups` uses the same ones.
        self._seen: list[_Site] | None = None
        #: The text that `has_layout` has read, and the time.
        self._last_missing = "", 0.0
        #: The text that the kernel reported, the time, and QEMU's groups according to it.
        self._found: tuple[str, float, list[Group]] = ("", 0.0, [])

    def has_layout(self) -> bool:
        """Whether QEMU is in an `emulator` group, as libvirt makes it. Reads one file. Never
        raises.
        """
        with suppress(OSError):
            text = read_text(f"/proc/{self._process.pid}/cgroup")
            self._last_missing = text, time.monotonic()
            return f"/{_EMULATOR}\n" in text
        return False

    def controls(self, wanted: Iterable[Placement]) -> dict[str, Control]:
        """The state of the controllers `cpuset` and `cpu`, if these vCPUs need them.

        Raises:
            OSError: QEMU has ended.
        """
        placements = list(wanted)
        needed = {name for placement in placements for name in placement.controllers}
        matter = {
            "cpuset",
            *needed,
            *("cpu" for placement in placements if placement.policy in REAL_TIME),
        }
        found: dict[str, Control] = {}
        text, at = self._last_missing
        self._seen = self._sites(text if time.monotonic() < at + _MOMENT else None)
        for site in self._seen:
            for name in matter.difference(found):
                if name in site.controllers:
                    found[name] = _control(site, name, is_needed=name in needed)
                elif site.group.version == V2:
                    text = (
                        f"the cgroup '{site.top.name}' has no {name} controller"
                        " (cgroup.controllers)"
                    )
                    found[name] = Control(V2, site.top.name, text)
        return found

    def make_groups(self, wanted: Mapping[int, Placement]) -> None:
        """Make the groups of these vCPUs and write their settings, before the threads exist.

        Raises:
            OSError: a group could not be made; the groups made by this call are removed.
        """
        made: list[Path] = []
        self._made |= {number: [] for number in wanted}
        try:
            for site in self._seen if self._seen is not None else self._sites():
                ids = [number for number, placement in wanted.items() if site.takes(placement)]
                if ids:
                    _sweep(site)
                    self._base(site, made)
                for number in ids:
                    _tune(site, site.vcpu(number), wanted[number], made)
                    self._made[number].append(site.vcpu(number))
        except BaseException:
            self._made |= {number: [] for number in wanted}
            for folder in reversed(made):
                with suppress(OSError):
                    folder.rmdir()
            raise

    def has_made(self, vcpu_id: int) -> bool:
        """Whether `make_groups` has made groups for it."""
        return bool(self._made.get(vcpu_id))

    def enter(self, vcpu_id: int, thread_id: int, placement: Placement) -> None:
        """Move a thread of QEMU into the groups that `make_groups` has made for it.

        Raises:
            OSError: the kernel refused, or the thread is in another group afterwards.
        """
        try:
            self._move(vcpu_id, thread_id)
        except FileNotFoundError:
            # Another process has removed the group, because it looked unused.
            self.make_groups({vcpu_id: placement})
            self._move(vcpu_id, thread_id)

    def is_in_place(self, vcpu_id: int, thread_id: int, placement: Placement) -> bool:
        """Whether a thread is in every group that this placement needs for the vCPU. Raises
        OSError.
        """
        names = self._names(thread_id)
        return all(
            names.get(_key(site.group)) == site.vcpu(vcpu_id).name
            for site in self._sites()
            if site.takes(placement)
        )

    def follow(self, thread_id: int, cpus: Collection[int]) -> None:
        """Set the host CPUs of a vCPU's own group to these, before its thread is pinned to other
        CPUs.

        Without such a group, it does nothing.

        Raises:
            OSError: the kernel refused.
        """
        text = read_text(self._thread(thread_id) / "cgroup")
        if f"/{_VCPU}" not in text:
            return
        for group in find_groups(text, hierarchies()):
            file = group.folder / "cpuset.cpus"
            if group.folder.name.removeprefix(_VCPU).isdigit() and file.exists():
                allowed = _effective(group.parent, "cpus")
                wanted = set(cpus) if allowed is None else set(cpus) & allowed
                if cpu_list(file.read_text()) != wanted:
                    put(file, format_ids(wanted))

    def has_groups(self) -> bool:
        """Whether `remove_groups` would have anything to remove. Never raises."""
        try:
            found = [(site, _vcpus_in(site.base.folder)) for site in self._sites()]
        except OSError:
            return True
        return any(vcpus or (vcpus is not None and site.is_ours) for site, vcpus in found)

    def remove_groups(self, removed: Collection[int], enabled: Collection[int]) -> list[int]:
        """Remove the groups of removed vCPUs, and unused groups of ours.

        Returns the vCPU ids whose groups still contain a thread. Never raises.

        Args:
            removed: ids of vCPUs that were removed.
            enabled: ids of vCPUs that the guest has; the others' groups inside a group of ours are
                unused.
        """
        busy = set()
        try:
            sites = self._sites()
        except OSError:
            # QEMU has ended, and with it all its threads.
            remove_trees([site.base.folder for site in self._seen or () if site.is_ours], 0.0)
            sites = [site for site in self._seen or () if not site.is_ours]
        with suppress(OSError):
            for site in sites:
                found = _vcpus_in(site.base.folder)
                if found is None:
                    continue
                ids = found.intersection(removed)
                if site.is_ours:
                    ids |= found.difference(enabled)
                busy |= {number for number in ids if not _removed(site.vcpu(number).folder)}
                if site.is_ours and not site.is_layout:
                    _removed(site.base.folder)
        return sorted(busy)

    def lay_out(
        self, wanted: Iterable[Placement], emulator: Placement, vcpu_threads: Collection[int]
    ) -> None:
        """Set up libvirt's layout if these placements need a controller: the other threads go into
        `emulator`.

        Raises:
            OSError: it could not be done, or only a part of it.
        """
        needed = {name for placement in (*wanted, emulator) for name in placement.controllers}
        self._seen = None
        for site in self._sites():
            if site.is_layout or not needed.intersection(site.controllers):
                continue
            _sweep(site)
            self._base(site, [])
            group = site.base.child(_EMULATOR)
            _tune(site, group, Placement(emulator.cpus, mems=emulator.mems), [])
            for _ in range(_ROUNDS):
                threads = [int(name) for name in os.listdir(self._folder / "task")]  # noqa: PTH208
                left = [
                    number
                    for number in sorted(set(threads) - set(vcpu_threads))
                    if self._names(number).get(_key(group)) != group.name
                ]
                for number in left:
                    with suppress(ProcessLookupError):
                        write(group.folder / _threads_file(group), str(number))
                if not left:
                    break

    def sweep(self) -> None:
        """Remove groups of ours, next to this QEMU's, whose QEMU has ended. Never raises."""
        with suppress(OSError):
            for site in self._sites():
                _sweep(site)

    def folders(self) -> list[Path]:
        """The groups that we made around this QEMU. A process that ends the QEMU passes them to
        `remove_trees`. Never raises.
        """
        with suppress(OSError):
            return [
                site.base.folder
                for site in self._sites()
                if site.is_ours and site.base.folder.exists()
            ]
        return []

    def widen(self, mems: Iterable[int]) -> Widened | None:
        """Allow the emulator to use memory of these host nodes too, while QEMU allocates there.

        Returns None if it may already use them.

        Raises:
            BlockingIOError: another process is widening the same cpuset.
            OSError: it could not be done; nothing has changed.
        """
        wanted = frozenset(mems)
        if not wanted or not self.has_layout():
            return None
        site = self._cpuset_site()
        if site is None or not site.is_layout:
            return None
        note = notes() / self._process.key
        if not note.exists():
            if wanted <= (_effective(site.group, "mems") or frozenset()):
                return None
            make_folder(note.parent)
            forget_dead(note.parent)
        lock = try_lock(note)
        if lock is None:
            raise BlockingIOError(errno.EAGAIN, "another process is plugging a vCPU of this QEMU")
        widened = Widened(site.group.folder / "cpuset.mems", note, lock.release)
        try:
            widened.put_back()
            has = _effective(site.group, "mems") or frozenset()
            if wanted <= has:
                lock.release()
                return None
            widened.do(has | wanted)
        except BaseException:
            lock.release()
            raise
        return widened

    def recover(self) -> None:
        """Restore what a process that was killed had widened. Reads one file if there is nothing to
        restore. Never raises.
        """
        with suppress(OSError):
            note = notes() / self._process.key
            if not note.exists() or note.stat().st_size == 0:
                return
            lock = try_lock(note)
            if lock is None:
                return
            try:
                site = self._cpuset_site()
                if site is not None and site.is_layout:
                    Widened(site.group.folder / "cpuset.mems", note, lock.release).put_back()
            finally:
                lock.release()

    @property
    def _folder(self) -> Path:
        return _PROC / str(self._process.pid)

    def _thread(self, thread_id: int) -> Path:
        return self._folder / "task" / str(thread_id)

    def _names(self, thread_id: int) -> dict[str, str]:
        return groups_of(read_text(self._thread(thread_id) / "cgroup"))

    def _cpuset_site(self) -> _Site | None:
        return next((site for site in self._sites() if "cpuset" in site.controllers), None)

    def _sites(self, text: str | None = None) -> list[_Site]:
        text, now = text or read_text(f"/proc/{self._process.pid}/cgroup"), time.monotonic()
        if text != self._found[0] or now > self._found[1] + _MOUNTS_SECONDS:
            self._found = text, now, find_groups(text, hierarchies())
        if not is_alive(self._process.key):
            raise ProcessLookupError(errno.ESRCH, f"QEMU's process {self._process.pid} has ended")
        return [_Site(group, self._process) for group in self._found[2]]

    def _base(self, site: _Site, made: list[Path]) -> None:
        """Make the base group if necessary, and enable the controllers that the vCPUs need in
        it.
        """
        trouble, is_denied = site.trouble
        if trouble is not None:
            raise PermissionError(errno.EACCES if is_denied else errno.EPERM, trouble)
        base = site.base.folder
        if site.is_ours and not site.is_layout:
            _mkdir(base, made)
            if site.group.version == V1:
                _inherit(site.group.folder, base, site.controllers)
            else:
                _thread_only(base)
                _enable(site.group.folder, site.controllers)
        if site.group.version == V2:
            _enable(base, site.controllers)

    def _move(self, vcpu_id: int, thread_id: int) -> None:
        for group in self._made[vcpu_id]:
            write(group.folder / _threads_file(group), str(thread_id))
        names = self._names(thread_id)
        for group in self._made[vcpu_id]:
            name = names.get(_key(group))
            if name != group.name:
                raise OSError(errno.EINVAL, f"it is in the cgroup '{name}', not in '{group.name}'")


def _trouble(top: Group, process: Process) -> tuple[str | None, bool]:
    """Why no group can be made in this one (None if one can), and whether an additional right would
    help.
    """
    if not top.hierarchy.is_writable:
        return f"the cgroup file system at '{top.hierarchy.mount}' is mounted read-only", False
    files = [top.folder]
    if top.version == V2:
        # To move a thread, we need write access to cgroup.procs of the common ancestor.
        files.append(top.folder / "cgroup.procs")
        if words(top.folder / "cgroup.type") == ["domain", "invalid"]:
            return f"the cgroup '{top.name}' is invalid (cgroup.type)", False
    elif os.geteuid() not in (0, (_PROC / str(process.pid)).stat().st_uid):
        return "QEMU belongs to another user", True
    if not all(os.access(file, os.W_OK, effective_ids=True) for file in files):
        return f"the right to write to the cgroup '{top.name}' is missing", True
    return None, False


def _control(site: _Site, name: str, *, is_needed: bool) -> Control:
    """The state of one controller for vCPUs."""
    # A vCPU that needs no group of its own stays in the group of QEMU.
    trouble, is_denied = site.trouble if is_needed or site.is_layout else (None, False)
    limit = site.top if trouble is None else site.group
    splits = name == "cpu" and site.splits_real_time
    gives = not splits or (site.group.folder / "cpu.rt_runtime_us").read_text().strip() != "0"
    return Control(
        site.group.version,
        site.top.name,
        trouble,
        is_denied,
        _effective(limit, "cpus") if name == "cpuset" else None,
        _effective(limit, "mems") if name == "cpuset" and is_needed else None,
        site.is_layout,
        gives,
        splits,
    )


def _effective(group: Group, what: str) -> frozenset[int] | None:
    """The host CPUs or nodes that a cpuset really has; on v2, those of the nearest group that has a
    cpuset.
    """
    folder = group.folder
    names = (
        [f"cpuset.{what}.effective"]
        if group.version == V2
        else [f"cpuset.effective_{what}", f"cpuset.{what}"]
    )
    while True:
        for name in names:
            with suppress(OSError, ValueError):
                return cpu_list(read_text(f"{folder}/{name}"))
        if group.version == V1 or folder == group.hierarchy.mount:
            return None
        folder = folder.parent


def _tune(site: _Site, group: Group, placement: Placement, made: list[Path]) -> None:
    """Make one group, and write the settings of the placement to it."""
    with suppress(OSError):
        # An existing group may have settings of an earlier vCPU.
        group.folder.rmdir()
    _mkdir(group.folder, made)
    (_tune_v2 if group.version == V2 else _tune_v1)(site, group, placement)


def _tune_v2(site: _Site, group: Group, placement: Placement) -> None:
    _thread_only(group.folder)
    # On v2, an empty cpuset stands for all that the group above has.
    given = (
        (("cpus", placement.cpus), ("mems", placement.mems)) if "cpuset" in site.controllers else ()
    )
    for what, numbers in given:
        if numbers:
            put(group.folder / f"cpuset.{what}", format_ids(numbers))
            has = _effective(group, what)
            if has != frozenset(numbers):
                raise OSError(
                    errno.EINVAL, f"it has {format_ids(has or ())}", f"{group.name} cpuset.{what}"
                )
    if "cpu" not in site.controllers:
        return
    if placement.quota is not None or placement.period is not None:
        quota = (
            str(placement.quota) if placement.quota is not None and placement.quota > 0 else "max"
        )
        put(group.folder / "cpu.max", f"{quota} {placement.period or _PERIOD}")
    if placement.shares is not None:
        put(group.folder / "cpu.weight", str(placement.shares))


def _tune_v1(site: _Site, group: Group, placement: Placement) -> None:
    values: dict[str, object] = {}
    if "cpuset" in site.controllers:
        for what, numbers in (("cpus", placement.cpus), ("mems", placement.mems)):
            above = (site.base.folder / f"cpuset.{what}").read_text().strip()
            values[f"cpuset.{what}"] = format_ids(numbers) if numbers else above
    if "cpu" in site.controllers:
        values["cpu.cfs_period_us"] = placement.period
        values["cpu.cfs_quota_us"] = placement.quota
        values["cpu.shares"] = placement.shares
    for name, value in values.items():
        if value is not None:
            put(group.folder / name, str(value))


def _mkdir(folder: Path, made: list[Path]) -> None:
    with suppress(FileExistsError):
        folder.mkdir(mode=0o755)
        made.append(folder)


def _inherit(parent: Path, folder: Path, controllers: Collection[str]) -> None:
    """Copy CPUs and nodes to a new cpuset. On v1 it is empty at first, and cannot contain a
    thread.
    """
    for what in ("cpus", "mems") if "cpuset" in controllers else ():
        put(folder / f"cpuset.{what}", (parent / f"cpuset.{what}").read_text().strip())


def _thread_only(folder: Path) -> None:
    """Make a group threaded. On v2 only a threaded group can contain single threads, and the group
    above it becomes the domain of their process.
    """
    if words(folder / "cgroup.type") != ["threaded"]:
        write(folder / "cgroup.type", "threaded")


def _enable(folder: Path, controllers: Collection[str]) -> None:
    """Enable these controllers for the groups inside. On v2 they are never disabled, because other
    groups may need them by then.
    """
    has = words(folder / "cgroup.subtree_control")
    missing = [f"+{name}" for name in controllers if name not in has]
    if missing:
        write(folder / "cgroup.subtree_control", " ".join(missing))


def _key(group: Group) -> str:
    """The key of a group's hierarchy in the result of `groups_of`."""
    return "" if group.version == V2 else group.hierarchy.controllers[0]


def _sweep(site: _Site) -> None:
    """Remove groups of ours whose QEMU has ended. Never raises."""
    top = site.base.folder.parent if site.is_ours else site.base.folder
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().split("-")[0]
        for name in os.listdir(top):  # noqa: PTH208 - names are all we need
            if name.startswith("qemu-") and name.endswith(_OURS):
                key = name.removeprefix("qemu-").removesuffix(_OURS)
                if not is_alive(f"{boot}-{key}"):
                    _removed_tree(top / name)


def remove_trees(folders: Iterable[Path], seconds: float) -> None:
    """Remove groups of ours and the groups in them, as soon as their last thread has ended. Never
    raises. Blocks.

    Args:
        folders: the folders of the groups.
        seconds: how long to wait for the threads.
    """
    deadline = time.monotonic() + seconds
    left = list(folders)
    while left := [folder for folder in left if not _removed_tree(folder)]:
        if time.monotonic() >= deadline:
            return
        time.sleep(_REMOVE_PAUSE)


def _removed_tree(folder: Path) -> bool:
    with suppress(OSError):
        for name in os.listdir(folder):  # noqa: PTH208 - names are all we need
            if name == _EMULATOR or name.removeprefix(_VCPU).isdigit():
                _removed(folder / name)
    return _removed(folder)


def _vcpus_in(folder: Path) -> set[int] | None:
    """The ids of vCPUs that have groups in this one; None if it does not exist."""
    with suppress(OSError):
        names = [name.removeprefix(_VCPU) for name in os.listdir(folder) if name.startswith(_VCPU)]  # noqa: PTH208
        return {int(name) for name in names if name.isdigit()}
    return None


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _threads_file(group: Group) -> str:
    return "cgroup.threads" if group.version == V2 else "tasks"
