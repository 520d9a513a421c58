"""Which side of a migration has the guest, for whoever comes after a crash: small files in the state folder.

Each QEMU that takes part keeps the cookie under its process. A number (the cookie's) stands for one migration: the
source has claimed the guest from before its first byte until all of it has been handed over, and releases it then.
Whoever lets a side run claims the guest first, and the others cannot. All need one state folder: between two hosts
the phases trust their user.
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
#: The first word of a claim's name.
_CLAIM: Final = "taken"
#: Seconds after which what another boot, or another host, has left here is of no use any more.
_OLD: Final = 30 * 86400


class Role(StrEnum):
    """What a QEMU is in a migration."""

    SOURCE = "source"
    DESTINATION = "destination"


class Ownership:
    """The migrations that this state folder knows. Nothing here raises: a full disk must not lose a guest."""

    def __init__(self, root: Path | None = None) -> None:
        self._folder = (root or state_folder()) / "migrations"

    def remember(self, process: Process, role: Role, number: str, cookie: bytes) -> None:
        """Remember the cookie of a QEMU that takes part in a migration, in place of an earlier one in that role;
        `number` is the cookie's own.
        """
        path = self._folder / f"{process.key}.{role}.{number}"
        with suppress(OSError):
            make_folder(self._folder)
            stage_file(path, cookie, sync=False).commit()
            for older in self._folder.glob(f"{process.key}.{role}.*"):
                if older != path:
                    older.unlink(missing_ok=True)
        self._prune()

    def recall(self, process: Process, role: Role) -> bytes | None:
        """The cookie of a QEMU that takes part in a migration in that role."""
        with suppress(OSError):
            for path in self._folder.glob(f"{process.key}.{role}.*"):
                return read_own(path, _LIMIT)
        return None

    def cookies(self, role: Role, number: str) -> list[bytes]:
        """The cookies of the QEMUs that have that role in this migration."""
        found: list[bytes] = []
        with suppress(OSError):
            found += [read_own(path, _LIMIT) for path in self._folder.glob(f"*.{role}.{number}")]
        return found

    def forget(self, process: Process) -> None:
        """It takes part in no migration any more."""
        with suppress(OSError):
            for path in self._folder.glob(f"{process.key}.*"):
                path.unlink(missing_ok=True)

    def is_present(self, role: Role, number: str) -> bool:
        """Whether a QEMU that has that role in this migration lives."""
        with suppress(OSError):
            return not all(_is_dead(path) for path in self._folder.glob(f"*.{role}.{number}"))
        return False

    def holder(self, number: str) -> str | None:
        """Who has claimed the guest; None: nobody."""
        with suppress(OSError):
            return str((self._folder / f"{_CLAIM}.{number}").readlink())
        return None

    def claim(self, number: str, who: str, *, force: bool = False) -> bool:
        """The guest is for `who`, unless another one has claimed it; whether that is so now. The first wins, but
        where it is claimed by `force`.
        """
        path = self._folder / f"{_CLAIM}.{number}"
        with suppress(OSError):
            make_folder(self._folder)
            # The whole content of a claim is where it leads to, so it is never half written.
            if force:
                other = staged_name(path)
                other.symlink_to(who)
                other.rename(path)
                return True
            try:
                path.symlink_to(who)
            except FileExistsError:
                return self.holder(number) in (who, None)
        return True

    def release(self, number: str, who: str) -> None:
        """`who` does not have it any more: anybody may claim it."""
        with suppress(OSError):
            if self.holder(number) == who:
                (self._folder / f"{_CLAIM}.{number}").unlink(missing_ok=True)

    def _prune(self) -> None:
        """Of QEMUs that are gone, and of migrations none of whose sides is known any more. What has been left by
        another host that shares this folder, only when it is old.
        """
        sweep(self._folder)
        with suppress(OSError):
            files = [path for path in self._folder.iterdir() if not path.name.startswith(".")]
            sides = [path for path in files if not path.name.startswith(f"{_CLAIM}.")]
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
