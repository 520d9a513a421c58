"""Where the sockets of a guest that we started are, and whether its QEMU runs.

Only the owner can enter the folder (0700). QEMU writes its pid there itself (`-pidfile`), before it
does anything else. So we find the QEMU even if the process that started it was killed. Its command
line distinguishes it from a process that got the same pid later.
"""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from qmpvcpu.errors import VcpuRefused
from qmpvcpu.host.definition_files import file_name, name_of_file
from qmpvcpu.host.files import FileLock, closing, read_own, state_folder, try_lock
from qmpvcpu.host.owners import NotOurs, check_folder, make_folder, trusted_folder
from qmpvcpu.kinds import open_file

#: Two monitors, since one socket takes one client, and the guest agent.
MONITORS: Final = ("qmp", "qmp2")
AGENT: Final = "agent"
#: unix(7): sun_path has 108 bytes, one of them for the terminating zero.
_LONGEST: Final = 107
#: The file contains nothing but a number.
_PID_BYTES: Final = 32


def runtime_folder() -> Path:
    """The folder with the runtime folders of all guests. It need not exist.

    It is in `QMPVCPU_STATE` if that is set, else the system's (root) or the user's (XDG) folder.

    Raises:
        VcpuRefused: another user can write to it.
    """
    return trusted_folder(_runtime_path(), "runtime folder")


def _runtime_path() -> Path:
    if own := os.environ.get("QMPVCPU_STATE"):
        return Path(own) / "run"
    if os.geteuid() == 0:
        return Path("/run/qmpvcpu")
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base) / "qmpvcpu"
    return state_folder() / "run"


class Runtime:
    """The runtime folder of one guest; `name` must be one that `check_name` accepts.

    Raises:
        VcpuRefused: another user can write to the folder above it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        base = Path(os.path.abspath(runtime_folder()))  # noqa: PTH100 - a link stays what it is
        # `file_name` ensures that no name leads to another folder, such as the one above.
        file = file_name(name)
        self.folder = base / file
        if len(os.fsencode(self.folder)) + 1 + max(map(len, (*MONITORS, AGENT))) > _LONGEST:
            # The path of a socket must be short, so use a folder in the system's temporary folder.
            digest = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:16]
            self.folder = Path(tempfile.gettempdir()) / f"qmpvcpu-{os.geteuid()}-{digest}"
        logs = state_folder() / "log"
        #: What QEMU writes to stderr, and what the guest writes to its console.
        self.log = logs / f"{file}.log"
        self.console = logs / f"{file}.console"
        self._lock = base / f".{file}.lock"

    @property
    def qmp(self) -> tuple[str, ...]:
        """Addresses of its monitors."""
        return tuple(str(self.folder / name) for name in MONITORS)

    @property
    def agent(self) -> str:
        """Address of its guest agent."""
        return str(self.folder / AGENT)

    @property
    def pidfile(self) -> Path:
        """The file that QEMU writes its pid to. QEMU also removes it."""
        return self.folder / "pid"

    def pid(self) -> int | None:
        """The pid of its QEMU; None if that does not run.

        Raises:
            VcpuRefused: another user can write to the folder, and may have made it.
        """
        trusted_folder(self.folder, "runtime folder")
        try:
            pid = int(read_own(self.pidfile, _PID_BYTES))
        except (OSError, ValueError):
            return None
        return pid if self.owns(pid) else None

    def owns(self, pid: int) -> bool:
        """Whether that process is the QEMU of this guest."""
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return os.fsencode(self.pidfile) in words

    def try_lock(self) -> FileLock | None:
        """Lock the guest, to start or end it. Returns None if another process has locked it. Raises
        OSError.
        """
        make_folder(self._lock.parent)
        return try_lock(self._lock)

    def prepare(self) -> None:
        """Make the folder, and remove what an earlier guest has left in it.

        Raises:
            OSError: it cannot be made, or belongs to another user.
        """
        self.remove()
        make_folder(self.folder)
        make_folder(self.log.parent)

    def remove(self) -> None:
        """Remove the folder if it is ours. Never raises."""
        with suppress(NotOurs):
            check_folder(self.folder)
            if not self.folder.is_symlink():
                shutil.rmtree(self.folder, ignore_errors=True)

    def log_end(self, limit: int = 400) -> str:
        """The end of its log. Never raises."""
        with suppress(OSError), os.fdopen(open_file(self.log), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
            return file.read(limit).decode(errors="replace").strip()
        return ""


def running_names() -> list[str]:
    """The names of guests that we have started and that still run.

    Raises:
        VcpuRefused: another user can write to the runtime folder of all guests, or of one of them.
    """
    with suppress(OSError):
        names = [name_of_file(path.name) for path in runtime_folder().iterdir() if path.is_dir()]
        return [name for name in names if Runtime(name).pid() is not None]
    return []


def remove_ended(but: str) -> None:
    """Remove the folders of guests whose QEMU has ended, unless another process is starting or
    ending that guest. Blocks. Never raises.

    Args:
        but: the guest that this process has locked.
    """
    with suppress(OSError, VcpuRefused):
        for path in runtime_folder().iterdir():
            name = name_of_file(path.name)
            if name == but or not path.is_dir():
                continue
            remove_folder(name)


def remove_folder(name: str) -> None:
    """Remove the folder of a guest whose QEMU has ended, unless another process is starting or
    ending that guest. Blocks. Never raises.
    """
    with suppress(OSError, VcpuRefused):
        runtime = Runtime(name)
        if runtime.pid() is None and (lock := runtime.try_lock()) is not None:
            try:
                # The guest may have been started before we had the lock.
                if runtime.pid() is None:
                    runtime.remove()
            finally:
                lock.release()


def end_process(pid: int, number: signal.Signals, seconds: float, runtime: Runtime) -> bool:
    """Send a signal to the QEMU of a runtime folder, and wait for its end. Returns whether it has
    ended. Blocks.

    Raises:
        OSError: we may not end it.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    # `fd` refers to this process only, never to a later one with the same pid.
    with closing(fd), suppress(ProcessLookupError):
        if runtime.owns(pid):
            signal.pidfd_send_signal(fd, number)
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            return bool(poll.poll(seconds * 1000))
    return True
