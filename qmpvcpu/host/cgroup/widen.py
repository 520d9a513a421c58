"""An emulator's memory nodes, widened for the time of a plug, and put back whatever becomes of us."""

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
    """An emulator's cpuset.mems with more nodes than it had, until `put_back`. `note` outlives us if we are
    killed.
    """

    def __init__(self, file: Path, note: Path, release: Callable[[], None]) -> None:
        self._file = file
        self._note = note
        self._release = release

    def do(self, nodes: Collection[int]) -> None:
        """Write down what is, then change it. Raises OSError."""
        was = self._file.read_text().strip()
        self._note.write_text(json.dumps({"was": was, "now": format_ids(nodes)}))
        try:
            put(self._file, format_ids(nodes))
        except OSError:
            with suppress(OSError):
                self.put_back()
            raise

    def put_back(self) -> None:
        """As it was, if it still is as we made it. Raises OSError: the note stays, and the next process tries."""
        text = self._note.read_text()
        if text:
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                note = json.loads(text)
                was, now = str(note["was"]), cpu_list(str(note["now"]))
                if cpu_list(self._file.read_text()) == now:
                    write(self._file, was or "\n")
            self._note.write_text("")

    def end(self) -> None:
        """`put_back`, and let others. Raises OSError."""
        try:
            self.put_back()
        finally:
            self._release()


def notes() -> Path:
    """Where it is written down what is widened, one file a QEMU. Raises OSError."""
    try:
        return state_folder() / "cgroup"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, f"no state folder: {error}") from error


def forget_dead(folder: Path) -> None:
    """Notes of QEMUs that are gone have nothing to put back. Never raises."""
    with suppress(OSError):
        for note in folder.iterdir():
            if not is_alive(note.name):
                note.unlink(missing_ok=True)
