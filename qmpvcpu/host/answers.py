"""Cached answers on disk: each is one small file, which is checked when it is read.

A file is replaced as a whole. The files that were not used for the longest time are removed first.
No failure is an error: an answer that cannot be read counts as missing, and one that cannot be
written is not cached.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

from qmpvcpu.host.files import FileLock, read_own, stage_file, sweep, try_lock
from qmpvcpu.host.owners import make_folder

_LIMIT: Final = 16 * 1024 * 1024
_KEEP: Final = 512
#: Increase this when the format of the answers changes.
_FORM: Final = 1


@dataclass(frozen=True, slots=True)
class Program:
    """The identity of one program file: if one of these fields differs, it is another program."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int

    def to_json(self) -> list[Any]:
        """The fields as a JSON list."""
        return list(astuple(self))


def program_of(path: str) -> Program:
    """The program file that a path leads to. Raises OSError."""
    real = os.path.realpath(path)
    found = os.stat(real)  # noqa: PTH116 - one stat(2)
    return Program(real, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def key_of(*parts: Any) -> str:
    """A file name for JSON data: a hash of its content."""
    text = json.dumps([_FORM, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


class FileCache:
    """One folder of cached answers, which many processes can use at once."""

    def __init__(self, folder: Path, keep: int = _KEEP) -> None:
        self.folder = folder
        self._keep = keep

    def get(self, key: str) -> Any:
        """The cached answer; None if there is none, or if its checksum is wrong."""
        path = self.folder / key
        try:
            check, _, body = read_own(path, _LIMIT).partition(b"\n")
            if check.decode() != hashlib.sha256(body).hexdigest():
                return None
            # Update the time stamp: the file that was used last is removed last.
            with suppress(OSError):
                os.utime(path)
            return json.loads(body)
        except (OSError, ValueError):
            return None

    def put(self, key: str, answer: Any) -> None:
        """Cache the answer. Never raises."""
        body = json.dumps(answer, separators=(",", ":")).encode()
        with suppress(OSError):
            make_folder(self.folder)
            data = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
            stage_file(self.folder / key, data, sync=False).commit()
            self._prune()

    def clear(self) -> int:
        """Remove all answers. Returns how many there were."""
        removed = 0
        for entry in self._entries():
            with suppress(OSError):
                os.unlink(entry.path)  # noqa: PTH108
                removed += 1
        return removed

    def try_lock(self, name: str) -> FileLock | None:
        """Take the lock of that name. Returns None while another process holds it.

        The file of the lock is never removed, since that would be a race.

        Raises:
            OSError: no lock can be made in this folder.
        """
        path = self.folder / "locks" / name
        try:
            return try_lock(path)
        except FileNotFoundError:
            make_folder(path.parent)
            return try_lock(path)

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.folder) as found:
                return [
                    entry for entry in found if not entry.name.startswith(".") and entry.is_file()
                ]
        except OSError:
            return []

    def _prune(self) -> None:
        sweep(self.folder)
        entries = self._entries()
        if len(entries) <= self._keep:
            return
        ages = []
        for entry in entries:
            with suppress(OSError):
                ages.append((entry.stat().st_mtime_ns, entry.path))
        # Remove more than necessary, so that the next answers do not have to remove any.
        for _, path in sorted(ages)[: len(entries) - self._keep * 3 // 4]:
            with suppress(OSError):
                os.unlink(path)  # noqa: PTH108
