"""Folders of throwaway guests: gone when they are left, and if we were killed, when the next one is made."""

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
#: Held as long as the folder is in use; the kernel lets go of it whatever becomes of us.
_LOCK: Final = ".lock"
#: A folder that is younger may not be locked yet, seconds.
_YOUNG: Final = 60.0
#: Room for a socket's name behind the folder's: unix(7), sun_path has 108 bytes.
_LONGEST: Final = 70


@contextmanager
def throwaway_folder() -> Iterator[Path]:
    """A new folder of our own (0700) with a short path."""
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) >= _LONGEST:
        base = Path("/tmp")  # noqa: S108 - a folder in it, made by mkdtemp
    _sweep(base)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=base) as name:
        # The umask may have left less of it.
        Path(name).chmod(0o700)
        fd = os.open(Path(name) / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(fd)


def _sweep(base: Path) -> None:
    """Remove what was left by processes of ours that were killed. Never raises."""
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
