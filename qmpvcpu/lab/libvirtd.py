"""A throwaway libvirtd of our own, for the tests, the benchmark and `qmpvcpu compare`.

Two processes: a supervisor (this file, run with `-m`) and the libvirtd it starts. The supervisor adopts and reaps
what the daemon leaves behind (libvirt takes a QEMU that PID 1 has not reaped yet for a living one), and when its
socket closes, whatever became of us, it kills every descendant, removes the folder and ends.

Of root's libvirtd the folders are fixed, so the supervisor has mounts of its own over them; an ordinary user's
goes where XDG_* say. Nothing of the system's libvirt is seen or touched.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote

from qmpvcpu.aio import finish
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import VcpuFailed, VcpuUsageError

#: Longest wait for a daemon that starts, for one told to end, and for the supervisor to leave nothing behind.
START_SECONDS: Final = 20.0
STOP_SECONDS: Final = 20.0
CLOSE_SECONDS: Final = 20.0
#: The longest folder for temporary files below which a guest's sockets have room for their names (108 bytes).
ROOM: Final = 20
#: How much of the daemon's log an error carries, in characters.
LOG_END: Final = 2000

#: Debian has libvirtd where an ordinary user's PATH does not go.
SBIN: Final = "/usr/local/sbin:/usr/sbin:/sbin"

#: A call of the daemon's that every client may make, REMOTE_PROC_AUTH_LIST (libvirt's remote_protocol.x): length,
#: program, version, procedure, type, serial, status. It is answered only when all drivers have started.
PING: Final = struct.pack(">7I", 28, 0x20008086, 1, 66, 0, 0, 0)

LIBVIRTD_CONF: Final = """\
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_rw_perms = "0700"
log_level = 3
"""
#: The guests run as we do, and nothing is asked of the host: no labels, no cgroups, no /dev of their own, no
#: virtlogd, no folder in /dev/hugepages.
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
#: The folders of root's libvirtd, and what of ours lies over them; a tmpfs over the first, as hosts have it.
FOLDERS: Final = {
    "/run/libvirt": None,
    "/etc/libvirt": "etc/libvirt",
    "/var/lib/libvirt": "lib",
    "/var/cache/libvirt": "cache",
    "/var/log/libvirt": "logs",
}
#: Where QEMU's driver is, below /usr.
DRIVERS: Final = tuple(
    f"{lib}/libvirt/connection-driver/libvirt_driver_qemu.so" for lib in ("lib/*", "lib64", "lib", "local/lib*")
)
SENT: Final = "QEMU_MONITOR_SEND_MSG: "


class Libvirtd:
    """A running daemon of our own.

    `folder` holds all that is its; `uri` is for libvirt-python and virsh of the same user; `log` is its log file.
    """

    def __init__(self, folder: Path, *, log_qmp: bool, supervisor: _Link) -> None:
        self.folder: Final = folder
        self.log: Final = folder / "log"
        system = os.geteuid() == 0
        self._socket = folder / "libvirt-sock" if system else folder / "run" / "libvirt" / "libvirt-sock"
        self.uri: Final = (
            f"qemu+unix:///{'system' if system else 'session'}?socket={quote(os.fspath(self._socket))}"
        )
        self._log_qmp = log_qmp
        self._supervisor = supervisor

    @property
    def pid(self) -> int:
        """The daemon's process id, of the last one if none runs."""
        return self._supervisor.pid

    @property
    def running(self) -> bool:
        """Whether the daemon runs."""
        return self._supervisor.ended is not None and not self._supervisor.ended.done()

    async def start(self) -> None:
        """Start the daemon, on the state that is there, and wait until it answers.

        Raises VcpuFailed, with the end of its log, if it ends or does not answer in START_SECONDS; VcpuRefused if
        it cannot have mounts of its own.
        """
        if self.running:
            raise VcpuUsageError("libvirtd runs already")
        try:
            async with asyncio.timeout(START_SECONDS):
                if reason := await asyncio.shield(self._supervisor.ready):
                    raise catalogue.NO_MOUNTS.error(why=reason)
                ended = self._supervisor.start()
                while not await _answers(self._socket):
                    if ended.done():
                        code = ended.result()
                        raise self._failed(f"libvirtd ended as it started ({_how(code)})", code)
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise self._failed(f"libvirtd did not answer in {START_SECONDS:.0f} s") from None

    async def stop(self) -> None:
        """SIGTERM the daemon and wait until it has ended; guests live on, and so does its state.

        Raises VcpuFailed if it has not ended in STOP_SECONDS.
        """
        await self._end("term")

    async def kill(self) -> None:
        """SIGKILL the daemon and wait until it has ended; guests live on, and so does its state."""
        await self._end("kill")

    async def restart(self, *, kill: bool = False) -> None:
        """End the daemon (SIGTERM, or SIGKILL with `kill`) and start another on its state, until it answers."""
        await (self.kill() if kill else self.stop())
        await self.start()

    def log_position(self) -> int:
        """Where the log ends now, in bytes: a `since` for `qmp_commands`."""
        return self.log.stat().st_size if self.log.exists() else 0

    def qmp_commands(self, since: int = 0) -> list[dict[str, Any]]:
        """Every QMP command that libvirt sent to a monitor after log position `since`, in order.

        Those of its throwaway QEMUs that it asks for capabilities are among them. Needs `log_qmp=True`.
        """
        if not self._log_qmp:
            raise VcpuUsageError("QMP commands are not in the log", hint="run_libvirtd(log_qmp=True)")
        return _sent_commands(_read_from(self.log, since))

    def log_end(self) -> str:
        """The end of what the daemon wrote, to its log and to stderr."""
        parts = self._supervisor.stderr_end(), _read_from(self.log, -LOG_END).strip()
        return "\n".join(part for part in parts if part)

    async def _end(self, word: str) -> None:
        if not self.running:
            return
        ended = self._supervisor.signal(word)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await asyncio.shield(ended)
        except TimeoutError:
            raise self._failed(f"libvirtd did not end in {STOP_SECONDS:.0f} s after SIG{word.upper()}") from None

    def _failed(self, what: str, code: int | None = None) -> VcpuFailed:
        end = self.log_end()
        return VcpuFailed(f"{what}: {end}" if end else what, exit_code=code, hint=catalogue.NO_LIBVIRTD.hint)


@asynccontextmanager
async def run_libvirtd(*, log_qmp: bool = False) -> AsyncIterator[Libvirtd]:
    """Run a libvirtd that nobody else uses; afterwards it, its guests, mounts and files are gone.

    As root it is a system daemon, else the user's session daemon. With `log_qmp` every QMP message is logged,
    which costs libvirt some time.

    Raises VcpuRefused if libvirtd is not installed or cannot have mounts of its own, VcpuFailed if it does not
    start.
    """
    program = shutil.which("libvirtd", path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}")
    if program is None:
        raise catalogue.NO_LIBVIRTD.error()
    # The supervisor makes it, so that a kill at any moment finds somebody who removes it.
    base = tempfile.gettempdir()
    folder = Path(base if len(os.fsencode(base)) < ROOM else "/tmp", f"qmpvcpu-{secrets.token_hex(4)}")  # noqa: S108
    supervisor = await _Link.open(folder, program, log_qmp)
    daemon = Libvirtd(folder, log_qmp=log_qmp, supervisor=supervisor)
    try:
        await daemon.start()
        yield daemon
    finally:
        await finish(supervisor.close())


class _Link:
    """Our side of the supervisor: words go to it (`start`, `term`, `kill`), the daemon's pid and end come back."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        stderr: IO[bytes],
        folder: Path,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.pid = 0
        #: Of the daemon started last: its exit code, None if the supervisor went away before it.
        self.ended: asyncio.Future[int | None] | None = None
        #: Once: None if it is ready to start a daemon, else why it cannot.
        self.ready: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        #: Its mount namespace, as /proc names it; empty if it is ours.
        self.namespace = ""
        self._process = process
        self._stderr = stderr
        self._folder = folder
        self._reader = reader
        self._writer = writer
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def open(cls, folder: Path, program: str, log_qmp: bool) -> _Link:
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            stderr = tempfile.TemporaryFile()  # noqa: SIM115
            try:
                process = _spawn_supervisor(folder, program, log_qmp, theirs, stderr)
            except BaseException:
                writer.close()
                stderr.close()
                raise
        return cls(process, stderr, folder, reader, writer)

    def stderr_end(self) -> str:
        """The end of what the supervisor and the daemon said on stderr."""
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), LOG_END, max(0, size - LOG_END)).decode(errors="replace").strip()

    def start(self) -> asyncio.Future[int | None]:
        self.ended = asyncio.get_running_loop().create_future()
        if self._listener.done():
            self.ended.set_result(None)
        self._writer.write(b"start\n")
        return self.ended

    def signal(self, word: str) -> asyncio.Future[int | None]:
        assert self.ended is not None
        self._writer.write(word.encode() + b"\n")
        return self.ended

    async def close(self) -> None:
        """Let the supervisor leave nothing behind. Raises VcpuFailed if it has not in CLOSE_SECONDS."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                if self._writer.can_write_eof() and not self._writer.is_closing():
                    self._writer.write_eof()
                await self._listener
                await asyncio.to_thread(self._process.wait, CLOSE_SECONDS)
        except (TimeoutError, subprocess.TimeoutExpired):
            text = f"processes of the libvirtd in '{self._folder}' do not end"
            raise VcpuFailed(text, hint=f"see `ps --ppid {self._process.pid}`") from None
        finally:
            self._writer.close()
            self._stderr.close()
        if self._folder.exists():  # the supervisor was killed; the daemon went with it
            _kill_strays(self._folder, self.namespace)
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _listen(self) -> None:
        with suppress(ConnectionError):
            while line := await self._reader.readline():
                word, _, rest = line.decode(errors="replace").strip().partition(" ")
                if word == "ready":
                    self.namespace = rest
                    self.ready.set_result(None)
                elif word == "refused":
                    self.ready.set_result(rest)
                elif word == "started":
                    self.pid = int(rest)
                elif word == "ended" and self.ended is not None and not self.ended.done():
                    self.ended.set_result(int(rest))
        if not self.ready.done():
            self.ready.set_result(None)
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(None)


def _spawn_supervisor(
    folder: Path, program: str, log_qmp: bool, sock: socket.socket, stderr: IO[bytes]
) -> subprocess.Popen[bytes]:
    package = Path(__file__).resolve().parents[2]
    words = [str(os.getpid()), str(folder), program, "qmp" if log_qmp else ""]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, *words],
        env=os.environ | {"PYTHONPATH": str(package)},
        cwd="/",
        stdin=sock.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,  # Ctrl-C is for us
    )


async def _answers(path: Path) -> bool:
    """Whether a libvirtd answers at this socket: it listens long before it does."""
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    try:
        writer.write(PING)
        return len(await reader.readexactly(len(PING))) == len(PING)
    except (OSError, EOFError):
        return False
    finally:
        writer.close()


def _how(code: int | None) -> str:
    if code is None:
        return "its supervisor is gone"
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _read_from(path: Path, position: int) -> str:
    """The text of a file from a byte on, of the last bytes if below 0; nothing if it is not there."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size + position) if position < 0 else position)
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _sent_commands(log: str) -> list[dict[str, Any]]:
    decoder = json.JSONDecoder()
    commands = []
    for line in log.splitlines():
        _, found, rest = line.partition(SENT)
        if found:
            with suppress(ValueError):
                message, _ = decoder.raw_decode(rest, rest.index("{"))
                commands.append(message)
    return commands


def _kill_strays(folder: Path, namespace: str) -> None:
    """SIGKILL what still lives in that mount namespace; without one, the QEMUs with files in the folder."""
    files = os.fsencode(folder / "etc" / "libvirt" / "qemu" / "lib") + b"/"
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if namespace:
                ours = str((entry / "ns" / "mnt").readlink()) == namespace
            else:
                ours = files in (entry / "cmdline").read_bytes()
            if ours:
                os.kill(int(entry.name), signal.SIGKILL)


# What follows runs in the supervisor.

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
CLONE_NEWNS: Final = 0x20000
MS_BIND: Final = 0x1000
MS_MOVE: Final = 0x2000
MS_REC: Final = 0x4000
MS_SLAVE: Final = 0x80000


def _supervise(parent: int, folder: Path, program: str, *, log_qmp: bool) -> None:
    """Serve the socket on stdin until it closes, the parent ends or SIGTERM comes; then leave nothing behind."""
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")
    link = socket.socket(fileno=os.dup(0))
    wake, waker = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    asked_to_end = False

    def end(_number: int, _frame: object) -> None:
        nonlocal asked_to_end
        asked_to_end = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    daemon = 0
    folder.mkdir(mode=0o700)
    try:
        alive = os.pidfd_open(parent)
        if os.getppid() != parent:
            return
        _fill_folder(folder, log_qmp)
        system = os.geteuid() == 0
        if system:
            try:
                _mount_folders(libc, folder)
            except OSError as error:
                _tell(link, f"refused {error.strerror} ({error.filename})")
                return
        _tell(link, f"ready {Path('/proc/self/ns/mnt').readlink() if system else ''}")
        poll = select.poll()
        for descriptor in (link.fileno(), wake, alive):
            poll.register(descriptor, select.POLLIN)
        while not asked_to_end:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if alive in ready:
                return
            if wake in ready:
                with suppress(BlockingIOError):
                    os.read(wake, 4096)
                for pid, status in _reap():
                    if pid == daemon:
                        daemon = 0
                        _tell(link, f"ended {os.waitstatus_to_exitcode(status)}")
            if link.fileno() in ready:
                words = link.recv(4096).split()
                if not words:
                    return
                for word in words:
                    if word == b"start":
                        daemon = _start_daemon(libc, folder, program)
                        _tell(link, f"started {daemon}")
                    elif daemon:
                        os.kill(daemon, signal.SIGTERM if word == b"term" else signal.SIGKILL)
    finally:
        if daemon:
            os.kill(daemon, signal.SIGKILL)
        _kill_children()
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)


def _fill_folder(folder: Path, log_qmp: bool) -> None:
    """What a daemon needs on disk."""
    for name in ("etc/libvirt", "lib", "cache", "logs", "run", "drivers"):
        (folder / name).mkdir(parents=True, mode=0o700)
    conf = LIBVIRTD_CONF + f'log_outputs = "1:file:{folder}/log"\nhost_uuid = "{uuid.uuid4()}"\n'
    system = os.geteuid() == 0
    if system:
        conf += f'unix_sock_dir = "{folder}"\n'
    if log_qmp:
        conf += 'log_filters = "2:qemu.qemu_monitor"\n'
    (folder / "etc" / "libvirt" / "libvirtd.conf").write_text(conf)
    (folder / "etc" / "libvirt" / "qemu.conf").write_text(QEMU_CONF + (ROOT_QEMU_CONF if system else ""))
    # Only QEMU's driver: the others would look at the host's devices, networks and firewall.
    if driver := next((path for pattern in DRIVERS for path in Path("/usr").glob(pattern)), None):
        (folder / "drivers" / driver.name).symlink_to(driver)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def _tell(link: socket.socket, line: str) -> None:
    with suppress(OSError):  # whoever listened is gone, and poll() will say so
        link.sendall(line.encode() + b"\n")


def _start_daemon(libc: ctypes.CDLL, folder: Path, program: str) -> int:
    environment = {
        name: value
        for name, value in os.environ.items()
        # Not ours to hand on: another's sockets, and what would override the files in `folder`.
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
        [program, "--config", str(folder / "etc/libvirt/libvirtd.conf"), "--pid-file", str(folder / "pid")],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
    )
    process.returncode = 0  # we reap it ourselves, with everything else
    return process.pid


def _reap() -> list[tuple[int, int]]:
    """Every child that has ended: its pid and wait status."""
    ended = []
    with suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append(child)
    return ended


def _kill_children() -> None:
    """SIGKILL all children until there are none: those of a child that ends become ours."""
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
    """Give this process mounts of its own in which libvirt's folders, and its user, are ours. Raises OSError."""

    def mount(source: Path | str, target: Path | str, kind: str, flags: int, data: str | None = None) -> None:
        words = [os.fsencode(source), os.fsencode(target), kind.encode()]
        _checked(libc.mount(*words, ctypes.c_ulong(flags), data and data.encode()), f"mount {target}")

    _checked(libc.unshare(CLONE_NEWNS), "unshare")
    mount("none", "/", "", MS_REC | MS_SLAVE)  # what the host unmounts goes here too, nothing comes back
    for name, source in FOLDERS.items():
        target = Path(name)
        if not target.is_dir():
            _make_mount_point(target, folder / "stage", mount)
        if source:
            mount(folder / source, target, "", MS_BIND)
        else:
            mount("qmpvcpu", target, "tmpfs", 0, "mode=755")
    for modules in (*Path("/usr/lib").glob("*/qemu"), Path("/usr/lib64/qemu")):
        if any(modules.glob("*.so")):  # and not ipxe's ROMs
            # When libvirt asks a QEMU of another version (10.0, 11.1, run in place) for its types, it loads the
            # modules that it finds here and ends. The system's own QEMU starts without, but for its TCG.
            _cover(modules, folder / "stage", mount, lambda entry: entry.name.startswith("accel-"))
    # libvirt looks its default user up before it reads that we want root.
    for name, line in {"passwd": "libvirt-qemu:x:0:0::/:/bin/false\n", "group": "libvirt-qemu:x:0:\n"}.items():
        text = Path("/etc", name).read_text(errors="surrogateescape")
        if "libvirt-qemu:" not in text:
            own = folder / name
            own.write_text(text.removesuffix("\n") + "\n" + line, errors="surrogateescape")
            own.chmod(0o644)
            mount(own, f"/etc/{name}", "", MS_BIND)


def _make_mount_point(target: Path, stage: Path, mount: Callable[..., None]) -> None:
    """Make a folder that only this mount namespace has, by covering the one above it."""
    above = next(path for path in target.parents if path.is_dir()).resolve()
    _cover(above, stage, mount, lambda _entry: True)
    target.mkdir(parents=True)


def _cover(folder: Path, stage: Path, mount: Callable[..., None], keep: Callable[[Path], bool]) -> None:
    """Put a tmpfs over a folder, with what is to be kept of it bound in; `stage` is a path for use meanwhile."""
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
    _supervise(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], log_qmp=bool(sys.argv[4]))
