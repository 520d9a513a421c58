"""The parent process of a throwaway libvirtd of ours; `libvirtd` starts it with `-m`.

It adopts and reaps the processes that the daemon leaves behind: libvirt takes a QEMU that PID 1 has
not reaped yet for a running one. When its socket closes, even because we were killed, it kills
every descendant, removes the folder and ends.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
CLONE_NEWNS: Final = 0x20000
MS_BIND: Final = 0x1000
MS_MOVE: Final = 0x2000
MS_REC: Final = 0x4000
MS_SLAVE: Final = 0x80000

LIBVIRTD_CONF: Final = """\
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_rw_perms = "0700"
log_level = 3
"""
#: The guests run as the same user, and use nothing of the host: no labels, no cgroups, no /dev of
#: their own, no virtlogd, no folder in /dev/hugepages.
QEMU_CONF: Final = """\
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
security_default_confined = 0
seccomp_sandbox = 0
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
hugetlbfs_mount = []
"""
ROOT_QEMU_CONF: Final = """\
user = "root"
group = "root"
"""
#: The folders of root's libvirtd, and the folders of ours that are mounted over them. A tmpfs is
#: mounted over the first, because hosts have one there.
FOLDERS: Final = {
    "/run/libvirt": None,
    "/etc/libvirt": "etc/libvirt",
    "/var/lib/libvirt": "lib",
    "/var/cache/libvirt": "cache",
    "/var/log/libvirt": "logs",
}
#: Paths of QEMU's driver below /usr.
DRIVERS: Final = tuple(
    f"{lib}/libvirt/connection-driver/libvirt_driver_qemu.so"
    for lib in ("lib/*", "lib64", "lib", "local/lib*")
)


class _Supervisor:
    """Receives words through the socket on stdin (`start`, `term`, `kill`), and sends the daemon's
    pid and exit code.
    """

    def __init__(self, folder: Path, program: str) -> None:
        self._folder = folder
        self._program = program
        self._libc = ctypes.CDLL(None, use_errno=True)
        _checked(self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")
        self._socket = socket.socket(fileno=os.dup(0))
        self._wake, waker = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self._must_end = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._end)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        self._daemon = 0

    def _end(self, _number: int, _frame: object) -> None:
        self._must_end = True

    def run(self, parent: int, *, log_qmp: bool) -> None:
        """Serve until the socket closes, the parent ends or SIGTERM comes; then clean everything
        up.
        """
        self._folder.mkdir(mode=0o700)
        try:
            alive = os.pidfd_open(parent)
            if os.getppid() == parent and self._prepare(log_qmp):
                self._serve(alive)
        finally:
            if self._daemon:
                os.kill(self._daemon, signal.SIGKILL)
            _kill_children()
            os.chdir("/")
            shutil.rmtree(self._folder, ignore_errors=True)

    def _prepare(self, log_qmp: bool) -> bool:
        """Make the folders. Returns whether a daemon can be started with them."""
        _fill_folder(self._folder, log_qmp)
        namespace = ""
        if os.geteuid() == 0:
            try:
                _mount_folders(self._libc, self._folder)
            except OSError as error:
                self._report(f"refused {error.strerror} ({error.filename})")
                return False
            namespace = str(Path("/proc/self/ns/mnt").readlink())
        self._report(f"ready {namespace}")
        return True

    def _serve(self, alive: int) -> None:
        poll = select.poll()
        for descriptor in (self._socket.fileno(), self._wake, alive):
            poll.register(descriptor, select.POLLIN)
        while not self._must_end:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._wake in ready:
                self._reap()
            if alive in ready or (self._socket.fileno() in ready and not self._obey()):
                return

    def _reap(self) -> None:
        """Reap every child that has ended, and report the daemon's end."""
        with suppress(BlockingIOError):
            os.read(self._wake, 4096)
        with suppress(ChildProcessError):
            while (child := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = child
                if pid == self._daemon:
                    self._daemon = 0
                    self._report(f"ended {os.waitstatus_to_exitcode(status)}")

    def _obey(self) -> bool:
        """Obey the words that the socket has. Returns whether it is still open."""
        words = self._socket.recv(4096).split()
        for word in words:
            if word == b"start":
                self._daemon = _start_daemon(self._libc, self._folder, self._program)
                self._report(f"started {self._daemon}")
            elif self._daemon:
                os.kill(self._daemon, signal.SIGTERM if word == b"term" else signal.SIGKILL)
        return bool(words)

    def _report(self, line: str) -> None:
        with suppress(OSError):  # the other end has closed, which poll() reports too
            self._socket.sendall(line.encode() + b"\n")


def _fill_folder(folder: Path, log_qmp: bool) -> None:
    """Make the files that a daemon needs."""
    for name in ("etc/libvirt", "lib", "cache", "logs", "run", "drivers"):
        (folder / name).mkdir(parents=True, mode=0o700)
    conf = LIBVIRTD_CONF + f'log_outputs = "1:file:{folder}/log"\nhost_uuid = "{uuid.uuid4()}"\n'
    system = os.geteuid() == 0
    if system:
        conf += f'unix_sock_dir = "{folder}"\n'
    if log_qmp:
        conf += 'log_filters = "2:qemu.qemu_monitor"\n'
    (folder / "etc" / "libvirt" / "libvirtd.conf").write_text(conf)
    (folder / "etc" / "libvirt" / "qemu.conf").write_text(
        QEMU_CONF + (ROOT_QEMU_CONF if system else "")
    )
    # Provide only QEMU's driver: the others would use the host's devices, networks and firewall.
    if driver := next((path for pattern in DRIVERS for path in Path("/usr").glob(pattern)), None):
        (folder / "drivers" / driver.name).symlink_to(driver)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def _start_daemon(libc: ctypes.CDLL, folder: Path, program: str) -> int:
    environment = {
        name: value
        for name, value in os.environ.items()
        # Leave out the sockets of other services, and variables that would override the files in
        # `folder`.
        if not name.startswith(("LIBVIRT_", "LISTEN_", "XDG_", "NOTIFY_", "PYTHONPATH"))
    }
    if any((folder / "drivers").iterdir()):
        environment["LIBVIRT_DRIVER_DIR"] = str(folder / "drivers")
    if os.geteuid() != 0:
        environment |= {
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": str(folder / "run"),
            "XDG_CONFIG_HOME": str(folder / "etc"),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
    process = subprocess.Popen(
        [
            program,
            "--config",
            str(folder / "etc/libvirt/libvirtd.conf"),
            "--pid-file",
            str(folder / "pid"),
        ],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
    )
    process.returncode = 0  # we reap it ourselves, with everything else
    return process.pid


def _kill_children() -> None:
    """Kill all children until there are none: the children of one that ends become ours."""
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if int(stat.read_bytes().rpartition(b")")[2].split()[1]) == os.getpid():
                    os.kill(int(stat.parent.name), signal.SIGKILL)
        time.sleep(0.003)


def _mount_folders(libc: ctypes.CDLL, folder: Path) -> None:
    """Give this process a mount namespace in which libvirt's folders and its default user are ours.
    Raises OSError.
    """

    def mount(
        source: Path | str, target: Path | str, kind: str, flags: int, data: str | None = None
    ) -> None:
        words = [os.fsencode(source), os.fsencode(target), kind.encode()]
        _checked(
            libc.mount(*words, ctypes.c_ulong(flags), data and data.encode()), f"mount {target}"
        )

    _checked(libc.unshare(CLONE_NEWNS), "unshare")
    mount("none", "/", "", MS_REC | MS_SLAVE)  # the host's unmounts reach us; ours do not reach it
    for name, source in FOLDERS.items():
        target = Path(name)
        if not target.is_dir():
            _make_mount_point(target, folder / "stage", mount)
        if source:
            mount(folder / source, target, "", MS_BIND)
        else:
            mount("qmpvcpu", target, "tmpfs", 0, "mode=755")
    for modules in (*Path("/usr/lib").glob("*/qemu"), Path("/usr/lib64/qemu")):
        if any(modules.glob("*.so")):  # a folder may contain only ipxe's ROMs
            # libvirt starts a QEMU to query its types. One of another version (10.0, 11.1, not
            # installed in /usr) would load the modules of this folder and exit. The system's own
            # QEMU starts without modules, except for its TCG.
            _cover(modules, folder / "stage", mount, lambda entry: entry.name.startswith("accel-"))
    # libvirt looks up its default user before it reads that we want root.
    for name, line in {
        "passwd": "libvirt-qemu:x:0:0::/:/bin/false\n",
        "group": "libvirt-qemu:x:0:\n",
    }.items():
        text = Path("/etc", name).read_text(errors="surrogateescape")
        if "libvirt-qemu:" not in text:
            own = folder / name
            own.write_text(text.removesuffix("\n") + "\n" + line, errors="surrogateescape")
            own.chmod(0o644)
            mount(own, f"/etc/{name}", "", MS_BIND)


def _make_mount_point(target: Path, stage: Path, mount: Callable[..., None]) -> None:
    """Make a folder that only this mount namespace has, by mounting a tmpfs over a folder above
    it.
    """
    above = next(path for path in target.parents if path.is_dir()).resolve()
    _cover(above, stage, mount, lambda _entry: True)
    target.mkdir(parents=True)


def _cover(
    folder: Path, stage: Path, mount: Callable[..., None], keep: Callable[[Path], bool]
) -> None:
    """Mount a tmpfs over a folder, and bind into it the entries to keep; `stage` is a temporary
    path.
    """
    stage.mkdir()
    mount("qmpvcpu", stage, "tmpfs", 0, f"mode={folder.stat().st_mode & 0o7777:o}")
    for entry in filter(keep, folder.iterdir()):
        copy = stage / entry.name
        if entry.is_symlink():
            copy.symlink_to(entry.readlink())
            continue
        if entry.is_dir():
            copy.mkdir()
        else:
            copy.touch()
        mount(entry, copy, "", MS_BIND | MS_REC)
    mount(stage, folder, "", MS_MOVE)
    stage.rmdir()


if __name__ == "__main__":
    _Supervisor(Path(sys.argv[2]), sys.argv[3]).run(int(sys.argv[1]), log_qmp=bool(sys.argv[4]))
