"""Which side of a migration has taken the guest, for whoever comes after a crash: small files in the state folder.

A side that is begun or prepared keeps the cookie under its QEMU's process. Before a side is let run, it takes the
guest for itself; the other one then cannot. Both need one state folder: between two hosts the phases trust their
user.
"""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Final

from qmpvcpu.host.files import read_file, stage_file, state_folder
from qmpvcpu.host.process import Process, is_alive

__all__ = ["Handovers", "Side"]

#: A cookie of two domain XMLs.
_LIMIT: Final = 64 << 20
_TAKEN: Final = "taken"


class Side(StrEnum):
    """Of a migration."""

    SOURCE = "source"
    DESTINATION = "destination"


class Handovers:
    """The migrations that this state folder knows. Nothing here raises: a full disk must not lose a guest."""

    def __init__(self, root: Path | None = None) -> None:
        self._folder = (root or state_folder()) / "migrations"

    def keep(self, process: Process, side: Side, number: str, cookie: bytes) -> None:
        """Remember what a QEMU takes part in; `number` is the cookie's own."""
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._prune()
            self.forget(process)
            stage_file(self._folder / f"{process.key}.{side}.{number}", cookie, sync=False).commit()

    def kept(self, process: Process, side: Side) -> bytes | None:
        """The cookie of a QEMU that takes part in one as that side."""
        with suppress(OSError):
            for path in self._folder.glob(f"{process.key}.{side}.*"):
                return read_file(path, _LIMIT)
        return None

    def forget(self, process: Process) -> None:
        """It takes part in none any more."""
        with suppress(OSError):
            for path in self._folder.glob(f"{process.key}.*"):
                path.unlink(missing_ok=True)

    def is_there(self, side: Side, number: str) -> bool:
        """Whether that side of a migration is a QEMU that lives."""
        with suppress(OSError):
            return any(is_alive(path.name.split(".")[0]) for path in self._folder.glob(f"*.{side}.{number}"))
        return False

    def take(self, number: str, side: Side) -> Side:
        """Which side the guest is for: that one, unless the other one came first."""
        path = self._folder / f"{_TAKEN}.{number}"
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                # Its whole content is where it leads to, so it is never half written.
                path.symlink_to(side)
            except FileExistsError:
                found = str(path.readlink())
                return Side(found) if found in list(Side) else side
        return side

    def release(self, number: str, side: Side) -> None:
        """That side has not run it, and will not."""
        path = self._folder / f"{_TAKEN}.{number}"
        with suppress(OSError):
            if str(path.readlink()) == side:
                path.unlink(missing_ok=True)

    def _prune(self) -> None:
        """Of QEMUs that are gone, and of migrations none of whose sides is known any more."""
        files = [path for path in self._folder.iterdir() if not path.name.startswith(".")]
        sides = [path for path in files if not path.name.startswith(f"{_TAKEN}.")]
        dead = [path for path in sides if not is_alive(path.name.split(".")[0])]
        known = {path.name.rpartition(".")[2] for path in sides if path not in dead}
        for path in files:
            if path in dead or (path not in sides and path.name.rpartition(".")[2] not in known):
                path.unlink(missing_ok=True)
