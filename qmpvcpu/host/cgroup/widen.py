"""Widen the memory nodes of the emulator for the time of a plug, and restore them even if we are
killed.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from qmpvcpu.core.model import format_ids
from qmpvcpu.host.cgroup.hierarchy import cpu_list, put, write
from qmpvcpu.host.files import state_folder
from qmpvcpu.host.process import is_alive


class Widened:
    """A file cpuset.mems of the emulator that has more nodes than before, until `put_back`.

    If we are killed, the file `note` remains, and the next process reads it.
    """

    def __init__(self, file: Path, note: Path, release: Callable[[], None]) -> None:
        self._file = file
        self._note = note
        self._release = release

    def do(self, nodes: Collection[int]) -> None:
        """Write the present value to the note, then change it. Raises OSError."""
        self._note.write_text(
            json.dumps({"was": self._file.read_text().strip(), "now": format_ids(nodes)})
        )
        try:
            put(self._file, format_ids(nodes))
        except OSError:
            with suppress(OSError):
                self.put_back()
            raise

    def put_back(self) -> None:
        """Restore the value, if nobody else has changed it since.

        Raises OSError: the note stays, and the next process tries once more.
        """
        text = self._note.read_text()
        if text:
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                note = json.loads(text)
                was, now = str(note["was"]), cpu_list(str(note["now"]))
                if cpu_list(self._file.read_text()) == now:
                    write(self._file, was or "\n")
            self._note.write_text("")

    def end(self) -> None:
        """Call `put_back`, and release the lock. Raises OSError."""
        try:
            self.put_back()
        finally:
            self._release()


def notes() -> Path:
    """The folder of the notes about widened cpusets, one file for each QEMU. Raises OSError."""
    try:
        return state_folder() / "cgroup"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, f"no state folder: {error}") from error


def forget_dead(folder: Path) -> None:
    """Remove the notes of QEMUs that have ended: nothing can be restored. Never raises."""
    with suppress(OSError):
        for note in folder.iterdir():
            if not is_alive(note.name):
                note.unlink(missing_ok=True)
