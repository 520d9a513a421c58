"""Which side of a migration has the guest, for whoever comes after a crash: small files in the state folder.

Each QEMU that takes part keeps the cookie under its process. A number (the cookie's) is for one handing over: the
source has it from before its first byte until all has been handed over; then whoever lets a side run takes it
first, and the others cannot. All need one state folder: between two hosts the phases trust their user.
"""

from __future__ import annotations

import time
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Final

from qmpvcpu.host.files import read_own, stage_file, staged_name, state_folder, sweep
from qmpvcpu.host.owners import make_folder
from qmpvcpu.host.process import Process, boot_id, is_alive

#: A cookie of two domain XMLs.
_LIMIT: Final = 64 << 20
_TAKEN: Final = "taken"
#: Seconds after which what another boot, or another host, has left here is of no use any more.
_OLD: Final = 30 * 86400


class Side(StrEnum):
    """What a QEMU is in a migration."""

    SOURCE = "source"
    DESTINATION = "destination"


class Handovers:
    """The migrations that this state folder knows. Nothing here raises: a full disk must not lose a guest."""

    def __init__(self, root: Path | None = None) -> None:
        self._folder = (root or state_folder()) / "migrations"

    def keep(self, process: Process, side: Side, number: str, cookie: bytes) -> None:
        """Remember what a QEMU takes part in, in the place of what it was that side of before; `number` is the
        cookie's own.
        """
        path = self._folder / f"{process.key}.{side}.{number}"
        with suppress(OSError):
            make_folder(self._folder)
            stage_file(path, cookie, sync=False).commit()
            for older in self._folder.glob(f"{process.key}.{side}.*"):
                if older != path:
                    older.unlink(missing_ok=True)
        self._prune()

    def kept(self, process: Process, side: Side) -> bytes | None:
        """The cookie of a QEMU that takes part in one as that side."""
        with suppress(OSError):
            for path in self._folder.glob(f"{process.key}.{side}.*"):
                return read_own(path, _LIMIT)
        return None

    def written(self, side: Side, number: str) -> list[bytes]:
        """The cookies that QEMUs keep which are that side of this migration."""
        found: list[bytes] = []
        with suppress(OSError):
            found += [read_own(path, _LIMIT) for path in self._folder.glob(f"*.{side}.{number}")]
        return found

    def forget(self, process: Process, side: Side | None = None) -> None:
        """It takes part in none any more, or not as that side."""
        with suppress(OSError):
            for path in self._folder.glob(f"{process.key}.{side or '*'}.*"):
                path.unlink(missing_ok=True)

    def is_there(self, side: Side, number: str) -> bool:
        """Whether that side of a migration is a QEMU that lives."""
        with suppress(OSError):
            return not all(_is_dead(path) for path in self._folder.glob(f"*.{side}.{number}"))
        return False

    def holder(self, number: str) -> str | None:
        """Who has taken the guest; None: nobody."""
        with suppress(OSError):
            return str((self._folder / f"{_TAKEN}.{number}").readlink())
        return None

    def take(self, number: str, who: str) -> bool:
        """The guest is for `who`, unless another one has it; whether that is so now. The first wins."""
        with suppress(OSError):
            make_folder(self._folder)
            try:
                # Its whole content is where it leads to, so it is never half written.
                (self._folder / f"{_TAKEN}.{number}").symlink_to(who)
            except FileExistsError:
                return self.holder(number) in (who, None)
        return True

    def give(self, number: str, who: str) -> None:
        """The guest is for `who`, whoever had it."""
        path = self._folder / f"{_TAKEN}.{number}"
        other = staged_name(path)
        with suppress(OSError):
            make_folder(self._folder)
            other.symlink_to(who)
            other.rename(path)

    def release(self, number: str, who: str) -> None:
        """`who` has it no longer: anybody may take it."""
        with suppress(OSError):
            if self.holder(number) == who:
                (self._folder / f"{_TAKEN}.{number}").unlink(missing_ok=True)

    def _prune(self) -> None:
        """Of QEMUs that are gone, and of migrations none of whose sides is known any more. What has been left by
        another host that shares this folder, only when it is old.
        """
        sweep(self._folder)
        with suppress(OSError):
            files = [path for path in self._folder.iterdir() if not path.name.startswith(".")]
            sides = [path for path in files if not path.name.startswith(f"{_TAKEN}.")]
            dead = {path for path in sides if path.name.startswith(boot_id()) and _is_dead(path)}
            known = {path.name.rpartition(".")[2] for path in sides if path not in dead}
            for path in files:
                is_claim = path not in sides
                unknown = is_claim and path.name.rpartition(".")[2] not in known
                if path in dead or unknown or (not is_claim and _is_old(path)):
                    with suppress(OSError):
                        path.unlink(missing_ok=True)


def _is_dead(path: Path) -> bool:
    return not is_alive(path.name.split(".")[0])


def _is_old(path: Path) -> bool:
    with suppress(OSError):
        return time.time() - path.lstat().st_mtime > _OLD and _is_dead(path)
    return False
