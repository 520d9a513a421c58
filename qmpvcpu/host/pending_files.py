"""Pending unplugs on disk, for the next process: small files in the state folder.

Each call that unplugs writes one file before it sends `device_del`, and removes the file when the
result of each unplug is known. So the next process knows what QEMU may still do, even if this
process is killed in between.
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

from qmpvcpu.core.state.knowledge import PendingUnplug, UsedContexts
from qmpvcpu.host.files import closing, read_own, state_folder
from qmpvcpu.host.owners import make_folder
from qmpvcpu.host.process import Process, is_alive

#: A file of ours for 65536 vCPUs is smaller than this.
_LIMIT: Final = 16 << 20
#: Nanoseconds; much longer than one tick of a file system's clock.
_TICK: Final = 100_000_000
_LOCK_TRIES: Final = 50
_MAKE_TRIES: Final = 3
#: Files in the folder that do not contain unplugs.
_CONTEXTS: Final = ".contexts"
_REMOVED: Final = ".gone"
_LOCK_PAUSE: Final = 0.001
#: Errors from a file that is not ours, or that we did not write.
_UNREADABLE: Final = (OSError, ValueError, TypeError, KeyError, RecursionError)


class PendingFolder:
    """The pending unplugs of one QEMU process, which outlive our own process."""

    def __init__(self, process: Process, root: Path | None = None) -> None:
        self._all = (root or state_folder()) / "pending"
        self._folder = self._all / process.key
        self._stamp: tuple[int, int] | None = None
        self._known: dict[int, PendingUnplug] = {}

    def load(self) -> Mapping[int, PendingUnplug]:
        """The pending unplugs by entity id. The files are read only if the folder has changed."""
        try:
            found = self._folder.stat()
        except OSError:
            self._stamp, self._known = None, {}
            return self._known
        stamp = found.st_mtime_ns, found.st_ino
        if stamp != self._stamp:
            # A second change right after the first may have the same time stamp, so the stamp is
            # trusted only when it is old enough.
            is_old_enough = time.time_ns() - found.st_mtime_ns > _TICK
            files = self._files()
            self._known = {
                unplug.entity_id: unplug for name in sorted(files) for unplug in files[name]
            }
            self._stamp = stamp if is_old_enough else None
        return self._known

    def add(self, unplugs: Iterable[PendingUnplug]) -> None:
        """Remember these unplugs, before they are requested.

        Raises:
            OSError: the state folder cannot be written.
        """
        name, rows = f"{time.time_ns()}-{os.getpid()}", tuple(unplugs)
        for _ in range(_MAKE_TRIES):
            # Another process may remove the folder as soon as it is made.
            with suppress(FileNotFoundError):
                self._write(name, rows)
                return
            make_folder(self._all)
            self._prune()
            make_folder(self._folder)
        self._write(name, rows)

    def discard(self, entity_ids: Collection[int], until: float = inf) -> None:
        """Forget these unplugs, because their result is known. Never raises.

        Args:
            firsts: their entity ids.
            until: an unplug that was requested after this time stays.
        """
        with suppress(OSError), self._locked():
            for name, unplugs in self._files().items():
                remaining = [
                    one
                    for one in unplugs
                    if one.entity_id not in entity_ids or (one.requested or 0.0) > until
                ]
                if not remaining:
                    (self._folder / name).unlink()
                elif len(remaining) < len(unplugs):
                    self._write(name, remaining)

    def removed(self) -> frozenset[int]:
        """The ids that `note_removed` was last called with. A file that is not ours is ignored.
        Never raises.
        """
        with suppress(*_UNREADABLE):
            return frozenset(
                _number(number)
                for number in json.loads(read_own(f"{self._folder}/{_REMOVED}", _LIMIT))
            )
        return frozenset()

    def note_removed(self, ids: Collection[int]) -> None:
        """Remember vCPUs that were removed while the manager of the guest does not know it. Never
        raises.
        """
        with suppress(OSError):
            if not ids:
                (self._folder / _REMOVED).unlink(missing_ok=True)
                return
            make_folder(self._folder)
            self._replace(_REMOVED, json.dumps(sorted(ids)))

    def tidy(self) -> None:
        """Remove the folder if it is empty. Never raises.

        It is not called for each unplug, because some file systems need milliseconds for it.
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
        """All that `note_contexts` has stored for this QEMU. A file that is not ours is ignored.
        Never raises.
        """
        with suppress(*_UNREADABLE):
            found = json.loads(read_own(f"{self._folder}/{_CONTEXTS}", _LIMIT))
            return UsedContexts(
                frozenset((_number(number), _number(thread)) for number, thread in found["gone"]),
                found["reported"] is True,
            )
        return UsedContexts()

    def note_contexts(self, more: UsedContexts) -> None:
        """Add these contexts to the stored ones. Never raises."""
        with suppress(OSError):
            if not self._folder.exists():
                self._prune()
            make_folder(self._folder)
            with self._locked():
                before = self.contexts()
                now = before | more
                if now != before:
                    self._replace(
                        _CONTEXTS,
                        json.dumps({"gone": sorted(now.removed), "reported": now.is_reported}),
                    )

    def _files(self) -> dict[str, list[PendingUnplug]]:
        """The unplugs in each file. A file that is not ours is ignored, and not removed."""
        found = {}
        with suppress(OSError):
            for name in os.listdir(self._folder):  # noqa: PTH208 - names are all we need
                if not name.startswith("."):
                    with suppress(*_UNREADABLE):
                        found[name] = [
                            _parse(row)
                            for row in json.loads(read_own(f"{self._folder}/{name}", _LIMIT))
                        ]
        return found

    def _write(self, name: str, unplugs: Iterable[PendingUnplug]) -> None:
        """Replace the file in one step, so that a reader sees either the old or the new content.

        It is not synced: after a crash of the host, it has no meaning.
        """
        self._replace(
            name,
            json.dumps(
                [
                    [unplug.entity_id, unplug.qom_path, unplug.thread_id, unplug.requested]
                    for unplug in unplugs
                ]
            ),
        )

    def _replace(self, name: str, text: str) -> None:
        # Every unplug waits for this. It uses plain calls, because `pathlib` takes as long as the
        # disk.
        temporary = f"{self._folder}/.{name}-{os.getpid()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:  # noqa: PTH123
                # The umask may have removed some of the mode bits.
                os.fchmod(fd, 0o600)
                file.write(text.encode())
            os.rename(temporary, f"{self._folder}/{name}")  # noqa: PTH104
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)  # noqa: PTH108
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the folder against another process that rewrites a file of several unplugs.

        After 50 ms it continues without the lock, because the other process may be stopped.
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
        """Remove the temporary files of processes that were killed. Never raises."""
        with suppress(OSError):
            for path in self._folder.glob(".*-*"):
                pid = path.name.rpartition("-")[2]
                if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                    path.unlink(missing_ok=True)

    def _prune(self) -> None:
        """Remove the folders of QEMUs that have ended: they have no pending unplugs."""
        with suppress(OSError):
            for folder in self._all.iterdir():
                if not is_alive(folder.name):
                    shutil.rmtree(folder, ignore_errors=True)


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"not a number from 0 on: {value!r}")
    return value


def _parse(row: Any) -> PendingUnplug:
    first, path, thread, asked = row
    if type(first) is not int or first < 0:
        raise ValueError(f"not a vCPU id: {first!r}")
    return PendingUnplug(
        first,
        path if isinstance(path, str) else None,
        thread if type(thread) is int else None,
        float(asked) if isinstance(asked, int | float) else None,
    )
