"""The state folder and its files: definitions with their sockets, XML files of users, the lock of a
folder.

All of it raises `qmpvcpu.VcpuRefused` for what cannot be read or written.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from qmpvcpu.host.definition_files import (
    Addresses,
    DefinitionFile,
    DefinitionFolder,
    StagedDefinition,
    check_name,
)
from qmpvcpu.host.files import LockTimeout, locked_folder, state_folder
from qmpvcpu.host.runtime import Runtime

#: Where `tests` is imported from.
ROOT = Path(__file__).resolve().parents[2]


class Definitions:
    """The definitions in one state folder."""

    def __init__(self, state: Path) -> None:
        self._folder = DefinitionFolder(state)
        #: Where they are.
        self.folder = state / "definitions"

    def define(
        self, name: str, xml: bytes, qmp: tuple[str, ...] = (), agent: str | None = None
    ) -> bool:
        """Returns whether it was there before."""
        return self._folder.define(name, xml, Addresses(qmp, agent))

    def undefine(self, name: str) -> Path:
        """Where its last XML is kept."""
        return self._folder.undefine(name)

    def names(self) -> list[str]:
        return self._folder.names()

    def is_defined(self, name: str) -> bool:
        return self._folder.is_defined(name)

    def xml(self, name: str) -> bytes:
        return self._folder.file(name).read()

    def sockets(self, name: str) -> tuple[tuple[str, ...], str | None]:
        """The QMP addresses, and the agent's."""
        found = self._folder.addresses(name)
        return found.qmp, found.agent


def fallback_folder(name: str, state: Path, temporary: Path) -> Path:
    """Where the sockets of a domain are, if their paths in the state folder would be too long."""
    with (
        patch.dict(os.environ, {"QMPVCPU_STATE": str(state)}),
        patch.object(tempfile, "tempdir", str(temporary)),
    ):
        return Runtime(name).folder


def why_not_a_name(name: str) -> str | None:
    """Why no domain can have this name; None if one can."""
    refusal = check_name(name)
    return None if refusal is None else refusal.message


class XmlFile:
    """A definition in a file that the user names."""

    def __init__(self, path: Path) -> None:
        self._file = DefinitionFile(path, keep=False)

    def read(self) -> bytes:
        return self._file.read()

    def stage(self, data: bytes) -> Staged:
        """Write the next version; what is there still counts."""
        return Staged(self._file.stage(data))

    def change(self, make: Callable[[bytes], bytes]) -> None:
        """Make the next version of what is there, and once more if another process is faster."""
        before = self.read()
        self._file.stage(make(before)).commit(before, make)


class Staged:
    """A next version that does not count yet."""

    def __init__(self, staged: StagedDefinition) -> None:
        self._staged = staged

    def commit(self, before: bytes) -> None:
        """Put it in place of `before`. Nobody else has changed that."""

        def never(now: bytes) -> bytes:
            raise AssertionError(f"another process has written {now!r}")

        self._staged.commit(before, never)

    def discard(self) -> None:
        self._staged.discard()


def where_state_is(variables: Mapping[str, str], user_id: int) -> str:
    """The state folder of a user with these environment variables."""
    with (
        patch.dict(os.environ, variables, clear=True),
        patch.object(os, "geteuid", lambda: user_id),
    ):
        return str(state_folder())


class Busy(Exception):
    """Another holds the folder."""


@contextmanager
def locked(
    folder: Path, seconds: float, *, given_up: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Hold a folder against everybody else who does so; wait for that no longer than `seconds`, and
    only until `given_up()`. Raises Busy.
    """
    try:
        with locked_folder(folder, seconds, given_up=given_up):
            yield
    except LockTimeout as error:
        raise Busy from error


def in_child(code: str, *arguments: object) -> int:
    """Run code in a process of its own, where `arguments` are in `sys.argv`; its exit code."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode
