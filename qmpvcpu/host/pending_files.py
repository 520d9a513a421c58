"""Unplugs that were asked and have not ended, for the next process: small files in the state folder.

Each call that unplugs makes one file before its `device_del` go out, and removes it when their ends are known. So
whatever kills us in between, nothing that QEMU may still do is forgotten.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Any, Final

from qmpvcpu.core.state.pending import PendingUnplug, UsedContexts
from qmpvcpu.host.files import closing, read_own, state_folder
from qmpvcpu.host.owners import make_folder
from qmpvcpu.host.process import Process, is_alive

#: A file of ours for 65536 vCPUs is smaller.
_LIMIT: Final = 16 << 20
#: Far more than a file system's clock takes to move on, nanoseconds.
_TICK: Final = 100_000_000
_LOCK_TRIES: Final = 50
_MAKE_TRIES: Final = 3
#: No files of unplugs.
_CONTEXTS: Final = ".contexts"
_GONE: Final = ".gone"
_LOCK_PAUSE: Final = 0.001
#: What comes of a file that is not ours, or was not written by us.
_UNREADABLE: Final = (OSError, ValueError, TypeError, KeyError, RecursionError)


class PendingFolder:
    """The pending unplugs of one QEMU process: what outlives this process."""

    def __init__(self, process: Process, root: Path | None = None) -> None:
        self._all = (root or state_folder()) / "pending"
        self._folder = self._all / process.key
        self._stamp: tuple[int, int] | None = None
        self._known: dict[int, PendingUnplug] = {}

    def load(self) -> Mapping[int, PendingUnplug]:
        """What is pending, by first vCPU id; asks the disk only if the folder has changed."""
        try:
            found = self._folder.stat()
        except OSError:
            self._stamp, self._known = None, {}
            return self._known
        stamp = found.st_mtime_ns, found.st_ino
        if stamp != self._stamp:
            # A change right after this one may get the same time: it is believed only once it is old enough.
            settled = time.time_ns() - found.st_mtime_ns > _TICK
            files = self._files()
            self._known = {unplug.first: unplug for name in sorted(files) for unplug in files[name]}
            self._stamp = stamp if settled else None
        return self._known

    def add(self, unplugs: Iterable[PendingUnplug]) -> None:
        """Remember these, before they are asked.

        Raises:
            OSError: the state folder cannot be written.
        """
        name, rows = f"{time.time_ns()}-{os.getpid()}", tuple(unplugs)
        for _ in range(_MAKE_TRIES):
            # Another process may tidy the folder away as soon as it is made.
            with suppress(FileNotFoundError):
                self._write(name, rows)
                return
            make_folder(self._all)
            self._prune()
            make_folder(self._folder)
        self._write(name, rows)

    def discard(self, firsts: Collection[int], until: float = inf) -> None:
        """Forget these, where they were asked before `until`: their end is known. Never raises."""
        with suppress(OSError), self._locked():
            for name, unplugs in self._files().items():
                left = [one for one in unplugs if one.first not in firsts or (one.asked or 0.0) > until]
                if not left:
                    (self._folder / name).unlink()
                elif len(left) < len(unplugs):
                    self._write(name, left)

    def gone(self) -> frozenset[int]:
        """What `note_gone` was told last. A file that is not ours says nothing. Never raises."""
        with suppress(*_UNREADABLE):
            return frozenset(_number(number) for number in json.loads(read_own(f"{self._folder}/{_GONE}", _LIMIT)))
        return frozenset()

    def note_gone(self, ids: Collection[int]) -> None:
        """These vCPUs are gone, and who manages the guest does not know. Never raises."""
        with suppress(OSError):
            if not ids:
                (self._folder / _GONE).unlink(missing_ok=True)
                return
            make_folder(self._folder)
            self._replace(_GONE, json.dumps(sorted(ids)))

    def tidy(self) -> None:
        """Take the folder away if it is empty: not with each unplug, some file systems take milliseconds for it.
        Never raises.
        """
        try:
            self._folder.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            self._sweep()
            with suppress(OSError):
                self._folder.rmdir()

    def contexts(self) -> UsedContexts:
        """What `note_contexts` was told of this QEMU. A file that is not ours says nothing. Never raises."""
        with suppress(*_UNREADABLE):
            found = json.loads(read_own(f"{self._folder}/{_CONTEXTS}", _LIMIT))
            gone = frozenset((_number(number), _number(thread)) for number, thread in found["gone"])
            return UsedContexts(gone, found["reported"] is True)
        return UsedContexts()

    def note_contexts(self, more: UsedContexts) -> None:
        """Remember this too. Never raises."""
        with suppress(OSError):
            if not self._folder.exists():
                self._prune()
            make_folder(self._folder)
            with self._locked():
                before = self.contexts()
                now = before | more
                if now != before:
                    rows = {"gone": sorted(now.gone), "reported": now.is_reported}
                    self._replace(_CONTEXTS, json.dumps(rows))

    def _files(self) -> dict[str, list[PendingUnplug]]:
        """What each file says; what is no file of ours is left alone."""
        found = {}
        with suppress(OSError):
            for name in os.listdir(self._folder):  # noqa: PTH208 - names are all we need
                if not name.startswith("."):
                    with suppress(*_UNREADABLE):
                        rows = json.loads(read_own(f"{self._folder}/{name}", _LIMIT))
                        found[name] = [_parse(row) for row in rows]
        return found

    def _write(self, name: str, unplugs: Iterable[PendingUnplug]) -> None:
        """In one step: a reader sees the old content or the new. Not synced: it means nothing once the host is
        down.
        """
        rows = [[unplug.first, unplug.qom_path, unplug.thread_id, unplug.asked] for unplug in unplugs]
        self._replace(name, json.dumps(rows))

    def _replace(self, name: str, text: str) -> None:
        # Every unplug waits for this: plain calls, `pathlib` takes as long as the disk.
        temporary = f"{self._folder}/.{name}-{os.getpid()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:  # noqa: PTH123
                # The umask may have left less of it.
                os.fchmod(fd, 0o600)
                file.write(text.encode())
            os.rename(temporary, f"{self._folder}/{name}")  # noqa: PTH104
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)  # noqa: PTH108
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Against another process that rewrites a file of several unplugs; given up after 50 ms, it may be
        stopped.
        """
        with closing(os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
            for _ in range(_LOCK_TRIES):
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(_LOCK_PAUSE)
            yield

    def _sweep(self) -> None:
        """What a process was writing when it was killed. Never raises."""
        with suppress(OSError):
            for path in self._folder.glob(".*-*"):
                pid = path.name.rpartition("-")[2]
                if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                    path.unlink(missing_ok=True)

    def _prune(self) -> None:
        """QEMUs that are gone have nothing pending."""
        with suppress(OSError):
            for folder in self._all.iterdir():
                if not is_alive(folder.name):
                    shutil.rmtree(folder, ignore_errors=True)


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"not a number of ours: {value!r}")
    return value


def _parse(row: Any) -> PendingUnplug:
    first, path, thread, asked = row
    if type(first) is not int or first < 0:
        raise ValueError(f"no vCPU id: {first!r}")
    return PendingUnplug(
        first,
        path if isinstance(path, str) else None,
        thread if type(thread) is int else None,
        float(asked) if isinstance(asked, int | float) else None,
    )
