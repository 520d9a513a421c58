"""Folders of throwaway guests, in a base folder of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from qmpvcpu.qemu.launch import throwaway_folder
from tests.support.store import ROOT

_HOLD = """
import sys
from pathlib import Path
from tests.support.throwaway import made_in
with made_in(Path(sys.argv[1])) as folder:
    (folder / "a file").touch()
    print(folder, flush=True)
    input()
"""


@contextmanager
def made_in(base: Path) -> Iterator[Path]:
    """A folder of a throwaway guest, until it is left; `base` is where temporary files go."""
    with patch.object(tempfile, "tempdir", str(base)), throwaway_folder() as folder:
        yield folder


class Holder:
    """Another process that holds such a folder until it is killed."""

    def __init__(self, base: Path) -> None:
        command = [sys.executable, "-c", _HOLD, str(base)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.folder = Path(self._process.stdout.readline().strip())

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def held_in(base: Path) -> Iterator[Holder]:
    holder = Holder(base)
    try:
        yield holder
    finally:
        holder.kill()


def age(folder: Path) -> None:
    """As if it had been made long ago: one that is young may not be held yet."""
    os.utime(folder, (1, 1))
