"""Folders of throwaway guests: removed at the end, or after a kill when the next folder is made."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_PREFIX: Final = "qmpvcpu-run-"
#: A file that is locked while the folder is in use; the kernel unlocks it when the process ends.
_LOCK: Final = ".lock"
#: Seconds: a younger folder may not be locked yet.
_YOUNG: Final = 60.0
#: Most bytes of the path, so that a socket's name fits behind it: sun_path has 108 bytes, unix(7).
_LONGEST: Final = 70


@contextmanager
def throwaway_folder() -> Iterator[Path]:
    """A new folder with mode 0700 and a short path, until the end of the body."""
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) >= _LONGEST:
        base = Path("/tmp")  # noqa: S108 - a folder in it, made by mkdtemp
    _sweep(base)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=base) as name:
        # The umask may have removed some of these bits.
        Path(name).chmod(0o700)
        fd = os.open(Path(name) / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(fd)


def _sweep(base: Path) -> None:
    """Remove the folders of processes that were killed. Never raises."""
    with suppress(OSError), os.scandir(base) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX):
                with suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    is_ours = found.st_uid == os.geteuid() and entry.is_dir(follow_symlinks=False)
                    if is_ours and time.time() - found.st_mtime > _YOUNG:
                        _remove_unheld(Path(entry.path))


def _remove_unheld(folder: Path) -> None:
    fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(fd)
