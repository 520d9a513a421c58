"""A run of the command line in a process of its own, to which something happens at an effect, or at
some time.

An effect is a message to QEMU, to a guest agent or to libvirt, a system call that changes a file, a
folder or a lock, a process that is started or ended, a thread that is pinned. A message and a start
count twice: before it, and right after it. `python -m tests.support.effects '{"at": 12}' WORDS`
does one of them by hand.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: The variable of the environment that has a `Plan`.
PLAN = "QMPVCPU_TEST_EFFECTS"

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EVENTS = frozenset(
    {
        *(
            "os.rename",
            "os.link",
            "os.symlink",
            "os.remove",
            "os.mkdir",
            "os.rmdir",
            "os.chmod",
            "os.chown",
        ),
        *("os.truncate", "fcntl.flock", "socket.bind"),
    }
)
#: What changes something, and is not told to an audit hook.
_CALLS = ((os, "fsync"), (os, "pwrite"), (os, "sched_setaffinity"), (signal, "pidfd_send_signal"))
_COMMAND = re.compile(rb'"execute": ?"([a-z_-]+)"')
_PATIENCE = 10.0


@dataclass(frozen=True)
class Plan:
    """What is to happen: `number` is sent to this process, or to another one.

    Attributes:
        at: at which effect, from 1; None: at none.
        after: or after so many seconds.
        number: the signal.
        pid: of the other process.
        pidfile: or the file that has its pid by then; where it is not there, nothing happens.
        child: or the process that was started last; where there is none, nothing happens.
        patience: seconds in which QEMU or libvirt must answer a question, in place of 10.
        log: where each effect is written to, and the time at which it happened.
    """

    at: int | None = None
    after: float | None = None
    number: int = signal.SIGKILL
    pid: int | None = None
    pidfile: str | None = None
    child: bool = False
    patience: float | None = None
    log: str | None = None

    def variable(self) -> dict[str, str]:
        """For the environment."""
        return {PLAN: json.dumps(asdict(self))}


def read_plan(environment: Mapping[str, str]) -> Plan | None:
    text = environment.get(PLAN)
    return None if text is None else Plan(**json.loads(text))


class _Log:
    def __init__(self, path: str | None) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = -1 if path is None else os.open(path, flags, 0o600)

    def write(self, line: str) -> None:
        if self._fd >= 0:
            os.write(self._fd, f"{line}\n".encode())


#: Processes that this one has started, the last one last.
_children: list[int] = []


def act(plan: Plan, log: _Log | None = None, own: int | None = None) -> None:
    """Send it, and wait until it has come; `own` is the process that is meant where the plan names
    no other.
    """
    pid = plan.pid
    if plan.child:
        if not _children:
            return
        pid = _children[-1]
    if plan.pidfile is not None:
        try:
            pid = int(Path(plan.pidfile).read_text())
        except (OSError, ValueError):
            return
    log = log or _Log(plan.log)
    if pid is None:
        log.write(f"acted {time.monotonic()}")
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(own or os.getpid(), plan.number)
        return
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            os.kill(pid, plan.number)
            end = time.monotonic() + _PATIENCE
            while time.monotonic() < end:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                if poll.poll(1) or (plan.number == signal.SIGSTOP and _is_stopped(pid)):
                    break
        finally:
            os.close(fd)
        log.write(f"acted {time.monotonic()}")


def _is_stopped(pid: int) -> bool:
    """All threads of it are."""
    with suppress(OSError):
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)
    return False


def install(plan: Plan) -> None:
    """From now on the effects of this process are counted, and its plan is carried out."""
    log, numbers = _Log(plan.log), itertools.count(1)

    if plan.patience is not None:
        _hurry(plan.patience)

    def reach(what: str) -> None:
        number = next(numbers)
        log.write(f"{number} {what}")
        if number == plan.at:
            act(plan, log)

    def hear(event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = given
            is_new = isinstance(path, str | bytes)  # else a descriptor that is wrapped
            if is_new and flags & _WRITES and "__pycache__" not in str(path) and path != os.devnull:
                reach(f"open {path}")
        elif event in _EVENTS and "__pycache__" not in str(given[0]):
            reach(f"{event} {' '.join(str(one) for one in given[:2])}")

    def counted(module: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(module, name)

        def one(*given: Any, **more: Any) -> Any:
            reach(name)
            return call(*given, **more)

        setattr(module, name, one)

    def around(kind: Any, name: str, what: Callable[..., str]) -> None:
        call: Callable[..., Any] = getattr(kind, name)

        def both(*given: Any, **more: Any) -> Any:
            told = what(*given, **more)
            reach(told)
            found = call(*given, **more)
            if isinstance(given[0], subprocess.Popen):
                _children.append(given[0].pid)
            reach(f"{told}: done")
            return found

        setattr(kind, name, both)

    def message(writer: object, data: bytes) -> str:
        return "send " + " ".join(name.decode() for name in _COMMAND.findall(data))

    around(asyncio.StreamWriter, "write", message)
    around(
        subprocess.Popen,
        "_execute_child",
        lambda process, words, *_: f"spawn {Path(words[0]).name}",
    )
    if "qmpvcpu.libvirt.threads" in sys.modules:
        around(sys.modules["qmpvcpu.libvirt.threads"].Worker, "call", lambda *_, **__: "libvirt")
    for module, name in _CALLS:
        counted(module, name)
    sys.addaudithook(hear)


def _hurry(seconds: float) -> None:
    from qmpvcpu.libvirt.calls import Connection
    from qmpvcpu.qemu.monitor import QmpMonitor

    monitor, connection = QmpMonitor.__init__, Connection.__init__

    def short_monitor(
        self: QmpMonitor, client: Any, address: str, command_timeout: float, *more: Any
    ) -> None:
        monitor(self, client, address, min(command_timeout, seconds), *more)

    def short_connection(
        self: Connection, uri: str, connect_timeout: float | None = None, _: float = 0
    ) -> None:
        connection(self, uri, connect_timeout, seconds)

    setattr(QmpMonitor, "__init__", short_monitor)  # noqa: B010
    setattr(Connection, "__init__", short_connection)  # noqa: B010


def install_planned() -> None:
    """Of the environment of this process; what it starts has none."""
    plan = read_plan(os.environ)
    if plan is not None:
        del os.environ[PLAN]
        install(plan)


@dataclass(frozen=True)
class Log:
    """What the log of a run has."""

    effects: tuple[str, ...]
    #: When the signal was sent (time.monotonic of this host), if it was.
    acted: float | None

    @property
    def last_message(self) -> int:
        """The number of the last effect that is a message about to be sent to QEMU."""
        sent = re.compile(r"send (?!.*(guest-|done))")
        return max((n for n, what in enumerate(self.effects, 1) if sent.match(what)), default=0)


def read_log(path: Path) -> Log:
    lines = path.read_text().splitlines() if path.exists() else []
    acted = [float(line.split()[1]) for line in lines if line.startswith("acted ")]
    effects = [line.partition(" ")[2] for line in lines if not line.startswith("acted ")]
    return Log(tuple(effects), acted[0] if acted else None)


def main() -> int:
    from qmpvcpu.cli import main as command

    install(Plan(**json.loads(sys.argv[1])))
    sys.argv = ["qmpvcpu", *sys.argv[2:]]
    return command()


if __name__ == "__main__":
    sys.exit(main())
