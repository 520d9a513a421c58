"""Definitions on disk: `definitions/NAME.xml` in the state folder, and `NAME.json` with its
sockets.

A definition is replaced as a whole or not at all. The version before is kept in `NAME.xml~`. A
domain is defined as long as its XML exists.
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

#: The size limit of an XML document in bytes; `xml.source` has the text for it.
_LIMIT: Final = 8 * 1024 * 1024
_LOCK_SECONDS: Final = 5.0
#: NAME_MAX of Linux is 255 bytes, and the longest suffix is `.console`.
_LONGEST_NAME: Final = 247
#: How the first character of a domain's name is written in file names. A name with a leading dot
#: would be a hidden file, and hidden files are our temporary ones. The percent sign is written in
#: another way so that no name looks like one that was already changed.
_WRITTEN: Final = {".": "%2E", "%": "%25"}


@dataclass(frozen=True, slots=True)
class Addresses:
    """The sockets of a domain while it runs: its QMP addresses, of which the first free one is
    used, and the address of its guest agent.
    """

    qmp: tuple[str, ...] = ()
    agent: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The addresses as they are written to the file."""
        return {"qmp": list(self.qmp), "agent": self.agent}


class DefinitionFile:
    """The XML of one domain: a defined domain, or any file of the user (`ports.DefinitionStore`).

    `keep` is true for a defined domain: then the version before is kept, and the file is read only
    if it is ours.
    """

    def __init__(self, path: Path, *, keep: bool) -> None:
        self.path = path
        self._keep = keep

    @property
    def place(self) -> str:
        """The name of this definition in messages."""
        return str(self.path)

    def read(self) -> bytes:
        """Read the document.

        Raises:
            VcpuRefused: it does not exist, or cannot be read.
        """
        try:
            return read_own(self.path, _LIMIT) if self._keep else read_file(self.path, _LIMIT)
        except FileNotFoundError as error:
            raise catalogue.DEFINITION_REMOVED.error(path=self.path) from error
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def stage(self, data: bytes) -> StagedDefinition:
        """Write the next version to a file next to it. Raises OSError."""
        return StagedDefinition(self, stage_file(self.path, data), keep=self._keep)


class StagedDefinition:
    """A next version that is not in effect yet (`ports.Staged`)."""

    def __init__(self, file: DefinitionFile, staged: StagedFile, *, keep: bool) -> None:
        self._file = file
        self._staged = staged
        self._keep = keep

    def commit(
        self,
        before: bytes,
        remake: Callable[[bytes], bytes],
        given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Replace `before` with this version.

        Args:
            before: the content that this version was made from.
            remake: makes the next version from the present content; called if another process has
                changed it meanwhile.
            given_up: called while another process holds the lock; the wait ends when it returns
                true.

        Raises:
            OSError: the old content is unchanged; LockTimeout if another process held the lock for
                5 s.
        """
        path = self._staged.path
        try:
            with locked_folder(path.parent, _LOCK_SECONDS, given_up=given_up):
                now = self._file.read()
                if now != before:
                    data = remake(now)
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
        """Remove it, if it was not committed. Never raises."""
        self._staged.discard()


class DefinitionFolder:
    """All definitions of this user."""

    def __init__(self, root: Path | None = None) -> None:
        self.folder = (root or state_folder()) / "definitions"

    def names(self) -> list[str]:
        """The names of the defined domains, sorted.

        Raises:
            VcpuRefused: the folder exists and cannot be read.
        """
        try:
            trusted_folder(self.folder, "folder of definitions")
            found = [path.name for path in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise catalogue.DEFINITION_NOT_READ.error(
                path=self.folder, why=error.strerror, cure="check its permissions"
            ) from error
        files = [name for name in found if name.endswith(".xml") and not name.startswith(".")]
        return sorted(name_of_file(name.removesuffix(".xml")) for name in files)

    def is_defined(self, name: str) -> bool:
        """Whether a domain of this name is defined, whatever kind of file its XML is."""
        try:
            return check_name(name) is None and os.path.lexists(self._xml(name))
        except OSError:
            return False

    def file(self, name: str) -> DefinitionFile:
        """The XML of a domain."""
        return DefinitionFile(self._xml(name), keep=True)

    def addresses(self, name: str) -> Addresses:
        """The sockets of a domain.

        If the domain was undefined by a process that was then killed, its sockets are ignored.

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
                # A `define` was killed before it wrote the XML that the new sockets belong to.
                rows = before
            return _parse(rows)
        except FileNotFoundError:
            return Addresses()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise catalogue.SOCKETS_NOT_READ.error(name=name, path=path, error=error) from error

    def define(self, name: str, xml: bytes, addresses: Addresses) -> bool:
        """Define a domain, or redefine it. Both files are written, or neither.

        Returns whether the domain was defined before.

        Raises:
            VcpuRefused: it cannot be written.
        """
        require_name(name)
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
        # If we are killed between the two files, the old XML still goes with the old sockets.
        before = {"xml": _digest(old), **(known or Addresses()).to_json()}
        stage_file(self._json(name), _bytes({**rows, "before": before})).commit()
        staged.commit()
        stage_file(self._json(name), _bytes(rows)).commit()
        return True

    def undefine(self, name: str) -> Path:
        """Remove a definition. Its last XML is kept; returns the path of that.

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
                    # A process that was killed after the rename may have left this file.
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


def require_name(name: str) -> None:
    """Raises VcpuRefused where no domain can be called so."""
    if (refusal := check_name(name)) is not None:
        raise VcpuRefused([refusal])


def check_name(name: str) -> Refusal | None:
    """Why a domain cannot have this name; None if it can."""
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
    return catalogue.NAME(name=name[:60], what=what) if what is not None else None


def file_name(name: str) -> str:
    """The name for the files of a domain. It is never a path, and never hidden."""
    is_other = name.startswith((".", *_WRITTEN.values()))
    return _WRITTEN[name[0]] + name[1:] if is_other else name


def name_of_file(name: str) -> str:
    """The name of the domain whose files have this name: the inverse of `file_name`."""
    for sign, written in _WRITTEN.items():
        if name.startswith(written):
            return sign + name.removeprefix(written)
    return name


def read_document(path: str) -> bytes:
    """Read a file that the user names, or a pipe, such as a shell's `<(…)`.

    Raises:
        VcpuRefused: it cannot be read.
    """
    try:
        return read_file(path, _LIMIT, with_pipes=True)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def not_written(place: str, error: OSError) -> Refusal:
    """The refusal for a definition that could not be written; the old content is unchanged."""
    if isinstance(error, LockTimeout):
        return catalogue.DEFINITION_LOCKED(place=place)
    return catalogue.DEFINITION_NOT_WRITTEN(place=place, why=error.strerror or str(error))


def _parse(rows: Any) -> Addresses:
    qmp, agent = rows["qmp"], rows.get("agent")
    if not isinstance(qmp, list) or not all(isinstance(address, str) for address in qmp):
        raise ValueError("'qmp' is not a list of addresses")
    if agent is not None and not isinstance(agent, str):
        raise ValueError("'agent' is not an address")
    return Addresses(tuple(qmp), agent)


def _bytes(rows: object) -> bytes:
    return json.dumps(rows, indent=2).encode() + b"\n"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _unreadable(path: object, error: OSError | ValueError) -> VcpuRefused:
    why = error.strerror if isinstance(error, OSError) else str(error)
    is_no_file = getattr(error, "errno", 0) == errno.EINVAL
    hint = "name a file with domain XML" if is_no_file else "check its permissions"
    cure = error.cure if isinstance(error, NotOurs) else hint
    return catalogue.DEFINITION_NOT_READ.error(path=path, why=why, cure=cure)
