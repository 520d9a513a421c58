"""Answers kept on disk: one small file each, checked when it is read, replaced whole, the longest unused go first.

Nothing here is an error: what cannot be read is not there, and what cannot be written is not kept.
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
#: Raised when what is kept changes its form.
_FORM: Final = 1


@dataclass(frozen=True, slots=True)
class Program:
    """One program file for good: it is another one when any of these is."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int

    def to_json(self) -> list[Any]:
        """As plain JSON data."""
        return list(astuple(self))


def program_of(path: str) -> Program:
    """Which file a path leads to. Raises OSError."""
    real = os.path.realpath(path)
    found = os.stat(real)  # noqa: PTH116 - one stat(2)
    return Program(real, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def key_of(*parts: Any) -> str:
    """A name for what JSON data says."""
    text = json.dumps([_FORM, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


class FileCache:
    """One folder of answers, for many processes at once."""

    def __init__(self, folder: Path, keep: int = _KEEP) -> None:
        self.folder = folder
        self._keep = keep

    def get(self, key: str) -> Any:
        """The answer; None where there is none, or where it is not what was written."""
        path = self.folder / key
        try:
            check, _, body = read_own(path, _LIMIT).partition(b"\n")
            if check.decode() != hashlib.sha256(body).hexdigest():
                return None
            # Who was used last goes last.
            with suppress(OSError):
                os.utime(path)
            return json.loads(body)
        except (OSError, ValueError):
            return None

    def put(self, key: str, answer: Any) -> None:
        """Keep it."""
        body = json.dumps(answer, separators=(",", ":")).encode()
        with suppress(OSError):
            make_folder(self.folder)
            data = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
            stage_file(self.folder / key, data, sync=False).commit()
            self._prune()

    def clear(self) -> int:
        """Forget everything; how many there were."""
        gone = 0
        for entry in self._entries():
            with suppress(OSError):
                os.unlink(entry.path)  # noqa: PTH108
                gone += 1
        return gone

    def try_lock(self, name: str) -> FileLock | None:
        """A lock of that name; None while anybody else has it. Its file stays: to remove it would be a race.

        Raises:
            OSError: there can be no locks here.
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
                return [entry for entry in found if not entry.name.startswith(".") and entry.is_file()]
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
        # Room for a while, so that not every answer has to look.
        for _, path in sorted(ages)[: len(entries) - self._keep * 3 // 4]:
            with suppress(OSError):
                os.unlink(path)  # noqa: PTH108
