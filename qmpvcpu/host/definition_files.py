"""Definitions on disk: `definitions/NAME.xml` in the state folder, and in `NAME.json` where its sockets are.

A definition is replaced whole or not at all; the version before is kept in `NAME.xml~`. A domain is defined as
long as its XML is there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import Refusal, VcpuRefused
from qmpvcpu.host.files import (
    LockTimeout,
    StagedFile,
    locked_folder,
    read_file,
    read_own,
    stage_file,
    state_folder,
    sync_folder,
)
from qmpvcpu.host.owners import NotOurs, make_folder, trusted_folder

#: What an XML may have; `xml.source` says it in words.
_LIMIT: Final = 8 * 1024 * 1024
_LOCK_SECONDS: Final = 5.0
#: NAME_MAX of Linux is 255 bytes, and the longest that stands behind a name is `.console`.
_LONGEST_NAME: Final = 247
#: First characters of a domain's name that are written in another way in the names of its files: what begins with
#: a dot is hidden, and ours; and then what looks like one that was written so.
_WRITTEN: Final = {".": "%2E", "%": "%25"}


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a domain is reached while it runs: QMP addresses, the first that is free counts, and its agent's."""

    qmp: tuple[str, ...] = ()
    agent: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"qmp": list(self.qmp), "agent": self.agent}


class DefinitionFile:
    """The XML of one domain, a defined one's or any file of a user (`ports.DefinitionStore`).

    `keep` is whether it is a defined one's: then the version before is kept, and only a file of ours is read.
    """

    def __init__(self, path: Path, *, keep: bool) -> None:
        self.path = path
        self._keep = keep

    @property
    def place(self) -> str:
        """What it is called in messages."""
        return str(self.path)

    def read(self) -> bytes:
        """The document.

        Raises:
            VcpuRefused: it is not there, or cannot be read.
        """
        try:
            return read_own(self.path, _LIMIT) if self._keep else read_file(self.path, _LIMIT)
        except FileNotFoundError as error:
            raise catalogue.DEFINITION_GONE.error(path=self.path) from error
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def stage(self, data: bytes) -> StagedDefinition:
        """Write the next version beside it. Raises OSError."""
        return StagedDefinition(self, stage_file(self.path, data), keep=self._keep)


class StagedDefinition:
    """A next version that does not count yet (`ports.Staged`)."""

    def __init__(self, file: DefinitionFile, staged: StagedFile, *, keep: bool) -> None:
        self._file = file
        self._staged = staged
        self._keep = keep

    def commit(
        self, before: bytes, again: Callable[[bytes], bytes], given_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Put it in place of `before`, if that is still what is there.

        Args:
            before: what it was made of.
            again: makes the next version of what another process has written meanwhile.
            given_up: asked while another process holds the lock; true ends the wait.

        Raises:
            OSError: what was there stands; LockTimeout, if another process held it for 5 s.
        """
        path = self._staged.path
        try:
            with locked_folder(path.parent, _LOCK_SECONDS, given_up=given_up):
                now = self._file.read()
                if now != before:
                    data = again(now)
                    if data == now:
                        return
                    self.discard()
                    self._staged = stage_file(path, data)
                if self._keep:
                    stage_file(path.with_name(path.name + "~"), now).commit()
                self._staged.commit()
        finally:
            self.discard()

    def discard(self) -> None:
        """Take it away, if it was not committed. Never raises."""
        self._staged.discard()


class DefinitionFolder:
    """All definitions of this user."""

    def __init__(self, root: Path | None = None) -> None:
        self.folder = (root or state_folder()) / "definitions"

    def names(self) -> list[str]:
        """The names that are defined, sorted.

        Raises:
            VcpuRefused: the folder is there and cannot be read.
        """
        try:
            trusted_folder(self.folder, "folder of definitions")
            found = [path.name for path in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise catalogue.DEFINITION_NOT_READ.error(
                path=self.folder, why=error.strerror, cure="check its rights"
            ) from error
        files = [name for name in found if name.endswith(".xml") and not name.startswith(".")]
        return sorted(name_of_file(name.removesuffix(".xml")) for name in files)

    def is_defined(self, name: str) -> bool:
        """Whether there is a domain of this name, whatever kind of file its XML is."""
        try:
            return check_name(name) is None and os.path.lexists(self._xml(name))
        except OSError:
            return False

    def file(self, name: str) -> DefinitionFile:
        """Its XML."""
        return DefinitionFile(self._xml(name), keep=True)

    def addresses(self, name: str) -> Addresses:
        """Its sockets; those of a domain that was undefined, by a process that was killed then, do not count.

        Raises:
            VcpuRefused: they cannot be read.
        """
        if not self.is_defined(name):
            return Addresses()
        path = self._json(name)
        try:
            rows = json.loads(read_own(path, _LIMIT))
            before = rows.get("before")
            if before is not None and before["xml"] == _digest(read_own(self._xml(name), _LIMIT)):
                # A `define` that was killed: the XML it came with is not there yet.
                rows = before
            return _parse(rows)
        except FileNotFoundError:
            return Addresses()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise catalogue.SOCKETS_NOT_READ.error(name=name, path=path, error=error) from error

    def define(self, name: str, xml: bytes, addresses: Addresses) -> bool:
        """Define a domain, or define it anew; both are written or neither is. Returns whether it was there.

        Raises:
            VcpuRefused: it cannot be written.
        """
        if (refusal := check_name(name)) is not None:
            raise VcpuRefused([refusal])
        try:
            make_folder(self.folder)
            staged = stage_file(self._xml(name), xml)
            try:
                with locked_folder(self.folder, _LOCK_SECONDS):
                    return self._replace(name, staged, addresses)
            finally:
                staged.discard()
        except OSError as error:
            raise VcpuRefused([not_written(str(self._xml(name)), error)]) from error

    def _replace(self, name: str, staged: StagedFile, addresses: Addresses) -> bool:
        path, old = self._xml(name), None
        with suppress(FileNotFoundError):
            old = read_own(path, _LIMIT)
        rows = addresses.to_json()
        if old is None:
            stage_file(self._json(name), _bytes(rows)).commit()
            staged.commit()
            return False
        stage_file(path.with_name(path.name + "~"), old).commit()
        known = None
        with suppress(VcpuRefused):
            known = self.addresses(name)
        if known == addresses:
            staged.commit()
            return True
        # Killed between the two files, the old XML still goes with the old sockets.
        before = {"xml": _digest(old), **(known or Addresses()).to_json()}
        stage_file(self._json(name), _bytes({**rows, "before": before})).commit()
        staged.commit()
        stage_file(self._json(name), _bytes(rows)).commit()
        return True

    def undefine(self, name: str) -> Path:
        """Forget a domain; its last XML stays, and the path of that is returned.

        Raises:
            VcpuRefused: it is not defined, or cannot be removed.
        """
        path = self._xml(name)
        kept = path.with_name(path.name + "~")
        try:
            if check_name(name) is not None:
                raise FileNotFoundError
            with locked_folder(self.folder, _LOCK_SECONDS):
                try:
                    path.rename(kept)
                finally:
                    # A process that was killed here has left it.
                    if not self.is_defined(name):
                        self._json(name).unlink(missing_ok=True)
                sync_folder(self.folder)
        except FileNotFoundError as error:
            raise catalogue.NOT_DEFINED.error(name=name) from error
        except OSError as error:
            raise VcpuRefused([not_written(str(path), error)]) from error
        return kept

    def _xml(self, name: str) -> Path:
        return self.folder / f"{file_name(name)}.xml"

    def _json(self, name: str) -> Path:
        return self.folder / f"{file_name(name)}.json"


def check_name(name: str) -> Refusal | None:
    """Why no domain can be called so, None if one can."""
    what = None
    if not name.strip():
        what = "it is empty"
    elif name in (".", ".."):
        what = "it is the name of a folder"
    elif "/" in name:
        what = "it has a '/' in it"
    elif any(unicodedata.category(sign) in ("Cc", "Cs") for sign in name):
        what = "it has a control character in it"
    elif len(os.fsencode(file_name(name))) > _LONGEST_NAME:
        what = f"it is longer than {_LONGEST_NAME} bytes"
    if what is None:
        return None
    return catalogue.NAME(name=name[:60], what=what)


def file_name(name: str) -> str:
    """What the files of a domain are called, which is never a path, nor hidden."""
    is_other = name.startswith((".", *_WRITTEN.values()))
    return _WRITTEN[name[0]] + name[1:] if is_other else name


def name_of_file(name: str) -> str:
    """The domain whose files are called so."""
    for sign, written in _WRITTEN.items():
        if name.startswith(written):
            return sign + name.removeprefix(written)
    return name


def read_document(path: str) -> bytes:
    """A file that the user names, or what somebody writes to a pipe, such as a shell's `<(…)`.

    Raises:
        VcpuRefused: it cannot be read.
    """
    try:
        return read_file(path, _LIMIT, with_pipes=True)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def not_written(place: str, error: OSError) -> Refusal:
    """A definition that could not be written; what was there stands."""
    if isinstance(error, LockTimeout):
        return catalogue.DEFINITION_LOCKED(place=place)
    return catalogue.DEFINITION_NOT_WRITTEN(place=place, why=error.strerror or str(error))


def _parse(rows: Any) -> Addresses:
    qmp, agent = rows["qmp"], rows.get("agent")
    if not isinstance(qmp, list) or not all(isinstance(address, str) for address in qmp):
        raise ValueError("'qmp' is no list of addresses")
    if agent is not None and not isinstance(agent, str):
        raise ValueError("'agent' is no address")
    return Addresses(tuple(qmp), agent)


def _bytes(rows: object) -> bytes:
    return json.dumps(rows, indent=2).encode() + b"\n"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _unreadable(path: object, error: OSError | ValueError) -> VcpuRefused:
    why = error.strerror if isinstance(error, OSError) else str(error)
    hint = {errno.EINVAL: "name a file with domain XML"}.get(getattr(error, "errno", 0), "check its rights")
    cure = error.cure if isinstance(error, NotOurs) else hint
    return catalogue.DEFINITION_NOT_READ.error(path=path, why=why, cure=cure)
