"""What `save` stores in the state folder.

One record says which guest it has paused, so that the next process can resolve that if this one is
killed. Another record keeps the definition of each saved guest, by the digest of its file. No
function raises unless its docstring says so: a full disk must not lose a guest.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from qmpvcpu.host.files import read_own, stage_file, state_folder, sweep
from qmpvcpu.host.owners import make_folder
from qmpvcpu.host.process import Process, is_alive, process_of

_LIMIT: Final = 64 << 20
_DIGEST: Final = re.compile(r"[0-9a-f]{64}\Z")
#: How many definitions are kept; the oldest are removed.
_KEPT: Final = 1000


@dataclass(frozen=True, slots=True)
class PausedGuest:
    """A guest that a process of ours has paused to save it.

    Attributes:
        saver: `Process.key` of that process; empty for a guest that stays in its QEMU (`is_here`).
        runs: whether the guest ran before.
        files: the names that the file can have: first the temporary name, then the final one.
        inode: device and inode number of the file.
    """

    saver: str
    runs: bool
    files: tuple[str, ...]
    inode: tuple[int, int]

    @property
    def is_here(self) -> bool:
        """Whether the guest is still in its QEMU, paused, after a save that failed once all was
        written.

        The guest was paused before the save. QEMU reports "postmigrate" for it, as it does for a
        guest that has migrated.
        """
        return self.saver == ""

    @property
    def is_left(self) -> bool:
        """Whether the process that saved it has ended."""
        return not is_alive(self.saver)

    @property
    def is_saved(self) -> bool:
        """Whether the file has its final name: it is then complete and has all of the guest. Never
        raises.
        """
        return any(self._is_at(name) for name in self.files[1:])

    def _is_at(self, name: str) -> bool:
        with suppress(OSError):
            found = os.lstat(name)
            return (found.st_dev, found.st_ino) == self.inode
        return False

    def remove_file(self) -> None:
        """Remove the file, whichever of its names it has. Never raises."""
        for name in self.files:
            with suppress(OSError):
                if self._is_at(name):
                    os.unlink(name)  # noqa: PTH108 - as it was looked at


def paused_by_us(fd: int, files: tuple[str, ...], *, runs: bool) -> PausedGuest:
    """The record of a guest that this process is about to pause; `fd` refers to its file. Raises
    OSError.
    """
    found = os.fstat(fd)
    return PausedGuest(process_of(os.getpid()).key, runs, files, (found.st_dev, found.st_ino))


#: The record of a guest that stays in its QEMU.
_HERE: Final = PausedGuest("", False, (), (0, 0))


def paused_guest(process: Process | None) -> PausedGuest | None:
    """The record of the save that has paused the guest of this QEMU, or None. Never raises."""
    with suppress(RuntimeError):  # no home folder
        return Saves().kept(process) if process is not None else None
    return None


def is_here(process: Process | None) -> bool:
    """Whether a QEMU in "postmigrate" still has its guest, according to our record. Never
    raises.
    """
    found = paused_guest(process)
    return found is not None and found.is_here


class Saves:
    """The records of guests that are being saved, by the process of their QEMU."""

    def __init__(self, root: Path | None = None) -> None:
        self._folder = (root or state_folder()) / "saving"

    def keep(self, process: Process, guest: PausedGuest) -> None:
        """Store the record of a guest before it is paused."""
        with suppress(OSError):
            make_folder(self._folder)
            stage_file(
                self._folder / process.key, json.dumps(asdict(guest)).encode(), sync=False
            ).commit()
        self._prune()

    def keep_here(self, process: Process) -> None:
        """Record that a guest is no longer being saved, and stays paused in its QEMU."""
        self.keep(process, _HERE)

    def kept(self, process: Process) -> PausedGuest | None:
        """The record of the guest of this QEMU, or None."""
        return self._read(self._folder / process.key)

    @staticmethod
    def _read(path: Path) -> PausedGuest | None:
        with suppress(OSError, ValueError, TypeError, KeyError):
            data = json.loads(read_own(path, _LIMIT))
            device, number = data["inode"]
            return PausedGuest(
                str(data["saver"]),
                data["runs"] is True,
                tuple(str(name) for name in data["files"]),
                (int(device), int(number)),
            )
        return None

    def into(self, fd: int) -> str | None:
        """The `Process.key` of a QEMU that still runs and whose guest was saved into this file, or
        None.
        """
        with suppress(OSError):
            file = os.fstat(fd)
            for path in self._folder.iterdir():
                found = self._read(path)
                if (
                    found is not None
                    and found.inode == (file.st_dev, file.st_ino)
                    and is_alive(path.name)
                ):
                    return path.name
        return None

    def forget(self, process: Process) -> None:
        """Remove the record of a guest that is not being saved any more."""
        with suppress(OSError):
            (self._folder / process.key).unlink(missing_ok=True)

    def _prune(self) -> None:
        sweep(self._folder)
        with suppress(OSError):
            for path in self._folder.iterdir():
                if not path.name.startswith(".") and not is_alive(path.name):
                    path.unlink(missing_ok=True)


class SavedDefinitions:
    """The definitions of saved guests at the time of the save.

    A definition inside a saved file is not trusted; these definitions were defined by the user.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._folder = (root or state_folder()) / "saved"

    def keep(self, digest: str, xml: bytes) -> None:
        """Store the definition for the saved file with this digest."""
        with suppress(OSError):
            make_folder(self._folder)
            sweep(self._folder)
            stage_file(self._folder / f"{digest}.xml", xml).commit()
            paths = sorted(self._folder.glob("*.xml"), key=lambda path: path.stat().st_mtime)
            for path in paths[:-_KEPT]:
                path.unlink(missing_ok=True)

    def kept(self, digest: str | None) -> bytes | None:
        """The definition for the saved file with this digest, or None."""
        if digest is not None and _DIGEST.match(digest):
            with suppress(OSError):
                return read_own(self._folder / f"{digest}.xml", _LIMIT)
        return None
