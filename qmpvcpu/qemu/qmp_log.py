"""The file of `--qmp-log`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qmpvcpu.core.arguments import checked
from qmpvcpu.errors import VcpuUsageError
from qmpvcpu.kinds import open_file


class QmpLog:
    """Every message of a connection as one JSON line, in a file that only its owner can read."""

    @checked
    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file, or create it.

        Raises:
            VcpuUsageError: it cannot be written, or is not a regular file (a FIFO could block every
                command).
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        try:
            try:
                fd = open_file(path, flags)
            except FileNotFoundError:
                # The target of a link, so that O_EXCL creates a new file there.
                fd = os.open(os.path.realpath(path), flags | os.O_CREAT | os.O_EXCL, 0o600)
            # The file may be an old one, and the umask may have any value.
            os.fchmod(fd, 0o600)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise VcpuUsageError(
                f"cannot write the QMP log {os.fspath(path)!r}: {why}",
                hint="name a regular file in a folder that you may write to; `tail -f` shows it"
                " live",
            ) from error
        self._file = os.fdopen(fd, "w", encoding="utf-8", buffering=1)

    def write(self, direction: str, message: Mapping[str, Any]) -> None:
        """Append one message; `direction` is "send" or "receive". A full disk does not fail a
        command.
        """
        line = json.dumps({"time": time.time(), "direction": direction, "message": dict(message)})
        with suppress(OSError):
            self._file.write(line + "\n")

    def close(self) -> None:
        """Close the file; may be called twice."""
        with suppress(OSError):
            self._file.close()
