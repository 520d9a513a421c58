"""Which side of a migration owns the guest. Small files in the state folder keep this after a
crash.

Each QEMU that takes part has the migration cookie in a file named after its process. The number in
the cookie identifies one migration. The source claims the guest before it sends the first byte, and
releases it when all of the guest has been sent. A process must claim the guest before it lets one
side run, and then the other side cannot claim it. All processes must use one state folder: for a
migration between two hosts, the phases rely on their user.
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

#: Enough for a cookie with two domain XMLs.
_LIMIT: Final = 64 << 20
#: The first word of the file name of a claim.
_CLAIM: Final = "taken"
#: Seconds after which the files of another boot or of another host are removed.
_OLD: Final = 30 * 86400


class Role(StrEnum):
    """The role of a QEMU in a migration."""

    SOURCE = "source"
    DESTINATION = "destination"


class Ownership:
    """The migrations that this state folder knows. No method raises: a full disk must not lose a
    guest.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._folder = (root or state_folder()) / "migrations"

    def remember(self, process: Process, role: Role, number: str, cookie: bytes) -> None:
        """Keep the cookie of a QEMU that takes part in a migration.

        It replaces an earlier cookie of that QEMU in the same role. `number` is the number in the
        cookie.
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
        """Read the cookie of a QEMU that takes part in a migration in that role."""
        with suppress(OSError):
            for path in self._folder.glob(f"{process.key}.{role}.*"):
                return read_own(path, _LIMIT)
        return None

    def cookies(self, role: Role, number: str) -> list[bytes]:
        """Read the cookies of all QEMUs that have that role in this migration."""
        found: list[bytes] = []
        with suppress(OSError):
            found += [read_own(path, _LIMIT) for path in self._folder.glob(f"*.{role}.{number}")]
        return found

    def forget(self, process: Process) -> None:
        """Remove the files of a QEMU that no longer takes part in a migration."""
        with suppress(OSError):
            for path in self._folder.glob(f"{process.key}.*"):
                path.unlink(missing_ok=True)

    def is_present(self, role: Role, number: str) -> bool:
        """Whether a QEMU that has that role in this migration is alive."""
        with suppress(OSError):
            return not all(_is_dead(path) for path in self._folder.glob(f"*.{role}.{number}"))
        return False

    def holder(self, number: str) -> str | None:
        """The name under which the guest is claimed, or None if nobody has claimed it."""
        with suppress(OSError):
            return str((self._folder / f"{_CLAIM}.{number}").readlink())
        return None

    def claim(self, number: str, who: str, *, force: bool = False) -> bool:
        """Claim the guest for `who`. Returns whether `who` has it now.

        The first claim wins. With `force`, the new claim replaces any other.
        """
        path = self._folder / f"{_CLAIM}.{number}"
        with suppress(OSError):
            make_folder(self._folder)
            # The target of the symbolic link is the whole content of a claim, so a claim is never
            # half written.
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
        """Remove the claim of `who`, so that anybody can claim the guest."""
        with suppress(OSError):
            if self.holder(number) == who:
                (self._folder / f"{_CLAIM}.{number}").unlink(missing_ok=True)

    def _prune(self) -> None:
        """Remove the files of QEMUs that have ended, and of migrations with no known side.

        Another host may share this folder: its files are removed only when they are old.
        """
        sweep(self._folder)
        with suppress(OSError):
            files = [path for path in self._folder.iterdir() if not path.name.startswith(".")]
            sides = [path for path in files if not path.name.startswith(f"{_CLAIM}.")]
            dead = {path for path in sides if _is_dead(path) and _is_ours_or_old(path)}
            known = {path.name.rpartition(".")[2] for path in sides if path not in dead}
            for path in files:
                is_unknown = path not in sides and path.name.rpartition(".")[2] not in known
                if path in dead or is_unknown:
                    with suppress(OSError):
                        path.unlink(missing_ok=True)


def _is_dead(path: Path) -> bool:
    return not is_alive(path.name.split(".")[0])


def _is_ours_or_old(path: Path) -> bool:
    with suppress(OSError):
        return path.name.startswith(boot_id()) or time.time() - path.lstat().st_mtime > _OLD
    return False
