"""Unplugs that were asked and have not ended, for the next process: one small file each in the state folder.

A file is made before `device_del` goes out and removed when the end is known, so that whatever kills us in
between, nothing that QEMU may still do is forgotten. One file an unplug: two processes never write the same one,
and none needs a lock.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from qmpvcpu.core.pending import PendingUnplug
from qmpvcpu.host.files import state_folder
from qmpvcpu.host.process import Process, is_alive

__all__ = ["PendingFolder"]

#: A file of ours is some 100 bytes.
_LIMIT: Final = 4096
#: Far more than a file system's clock takes to move on, nanoseconds.
_TICK: Final = 100_000_000


class PendingFolder:
    """The pending unplugs of one QEMU process (`ports.PendingStore`)."""

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
            self._stamp, self._known = stamp if settled else None, self._read()
        return self._known

    def _read(self) -> dict[int, PendingUnplug]:
        found = {}
        with suppress(OSError):
            for name in os.listdir(self._folder):  # noqa: PTH208 - names are all we need
                if name.isdigit() and (unplug := _parse(self._folder / name)) is not None:
                    found[int(name)] = unplug
        return found

    def add(self, unplugs: Iterable[PendingUnplug]) -> None:
        """Remember these, before they are asked.

        Raises:
            OSError: the state folder cannot be written.
        """
        if not self._folder.is_dir():
            self._all.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._prune()
            self._folder.mkdir(mode=0o700, exist_ok=True)
        for unplug in unplugs:
            document = {"qom_path": unplug.qom_path, "thread_id": unplug.thread_id, "asked": unplug.asked}
            data = json.dumps(document).encode()
            fd = os.open(self._folder / str(unplug.first), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, os.pwrite(fd, data, 0))
            finally:
                os.close(fd)

    def discard(self, firsts: Iterable[int]) -> None:
        """Forget these: their end is known. Never raises."""
        for first in firsts:
            with suppress(OSError):
                (self._folder / str(first)).unlink()
        with suppress(OSError):
            self._folder.rmdir()

    def _prune(self) -> None:
        """QEMUs that are gone have nothing pending."""
        with suppress(OSError):
            for folder in self._all.iterdir():
                if not is_alive(folder.name):
                    shutil.rmtree(folder, ignore_errors=True)


def _parse(path: Path) -> PendingUnplug | None:
    """A file that was cut short, or is not ours, still says that something is pending."""
    first = int(path.name)
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_LIMIT))
        thread = document.get("thread_id")
        return PendingUnplug(
            first,
            str(document["qom_path"]),
            thread if type(thread) is int else None,
            float(document["asked"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return PendingUnplug(first, None, None, None)
