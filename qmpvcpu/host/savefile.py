"""A saved guest on disk: a header, the cookie, then QEMU's migration stream.

The header says whether the stream is complete, and contains a digest of the whole file. The file
has a temporary name until it is complete. So the file under the user's name is either a complete
guest or the file that was there before.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qmpvcpu.core.migration.stream import (
    HEAD_BYTES,
    TAIL_BYTES,
    StreamError,
    StreamTable,
    parse_stream,
)
from qmpvcpu.core.rules import catalogue
from qmpvcpu.host.files import closing, sync_folder
from qmpvcpu.kinds import kind_of, open_file

#: Magic, version, whether the stream is complete, length of the cookie, offset of the stream.
_HEADER: Final = struct.Struct(">16sIIQQ")
#: The digest of the whole file follows the header. For the digest, its own bytes count as zeros.
_DIGEST_BYTES: Final = 32
_HEAD_BYTES: Final = _HEADER.size + _DIGEST_BYTES
_MAGIC: Final = b"qmpvcpu-save\0\0\0\0"
#: The first version of the format had no digest.
_NO_DIGEST, _FORMAT = 1, 2
_PART, _WHOLE = 0, 1
#: The alignment that QEMU's `file:` needs for an offset, and a disk for a direct write.
_ALIGNED: Final = 4096
_MOST_COOKIE: Final = 17 * 1024 * 1024
_MARK: Final = ".saving-"
#: The longest name, in bytes, that leaves room for the prefix and suffix of the temporary name.
_LONGEST: Final = 255 - len(f".{_MARK}") - 31
#: `struct flock` of Linux on 64 bits: type, whence, start, length, pid.
_FLOCK: Final = "hhqqi0q"
#: Bytes that are read and hashed in one step.
_CHUNK: Final = 4 << 20


class Saving:
    """A guest that is being saved. QEMU writes to `fd`, from `offset` on."""

    def __init__(self, path: Path, cookie: bytes) -> None:
        """Create the temporary file. Raises OSError: it cannot be written there; nothing has
        changed.
        """
        self._path = Path(os.path.realpath(path))
        with suppress(FileNotFoundError):
            mode = self._path.stat().st_mode
            if not stat.S_ISREG(mode):
                text = f"it exists, and is {kind_of(mode)}, not a regular file"
                raise OSError(errno.EINVAL, text, str(path))
            if _is_locked(self._path):
                text = "another process has locked it, as QEMU does with the disks of a guest"
                raise OSError(errno.EBUSY, text, str(path))
        self._prefix = _prefix(self._path.name)
        self._temporary = self._path.with_name(f"{self._prefix}{os.getpid()}-{time.monotonic_ns()}")
        self.offset = -(-(_HEAD_BYTES + len(cookie)) // _ALIGNED) * _ALIGNED
        self._cookie = cookie
        self._given_up = threading.Event()
        #: Hexadecimal; None until the file is sealed.
        self.digest: str | None = None
        self._sweep()
        # QEMU accepts only a descriptor that was opened for writing (10.0).
        self.fd = os.open(
            self._temporary,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW,
            0o600,
        )
        try:
            # The umask may have removed some of the mode bits.
            os.fchmod(self.fd, 0o600)
            self._write_head(_PART, bytes(_DIGEST_BYTES))
            os.lseek(self.fd, self.offset, os.SEEK_SET)
        except BaseException:
            self.discard()
            raise

    @property
    def path(self) -> str:
        """The final name of the file."""
        return str(self._path)

    @property
    def temporary(self) -> str:
        """The name of the file until it is finished."""
        return str(self._temporary)

    @property
    def size(self) -> int:
        """The current size of the file in bytes. Raises OSError."""
        return os.fstat(self.fd).st_size

    def sync(self) -> None:
        """Sync what QEMU wrote to the disk. Blocks. Raises OSError."""
        if self.size <= self.offset:
            raise OSError(0, "QEMU has written nothing", str(self._temporary))
        os.fsync(self.fd)

    def table(self) -> StreamTable:
        """The RAM blocks and device states that the stream lists. Blocks. Raises OSError,
        StreamError.
        """
        with self.opened() as fd:
            return _read_table(fd, self.offset)

    def seal(self) -> None:
        """Read the file back and write its digest: from then on it is complete. Blocks. Raises
        OSError.
        """
        with self.opened() as fd:
            digest = _digest(fd, _head(_WHOLE, len(self._cookie), self.offset), self._given_up)
        self._write_head(_WHOLE, digest)
        os.fsync(self.fd)
        self.digest = digest.hex()

    def finish(self) -> int:
        """Rename the file to its final name, and seal it first if that was not done.

        Returns its size in bytes. Blocks. Raises OSError.
        """
        if self.digest is None:
            self.sync()
            self.seal()
        size = self.size
        self._temporary.rename(self._path)
        os.close(self.fd)
        self.fd = -1
        # The guest is saved now, so no later failure counts.
        with suppress(OSError):
            sync_folder(self._path.parent)
        return size

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor to read the file from its beginning. Raises OSError."""
        with closing(os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)) as fd:
            yield fd

    def give_up(self) -> None:
        """Make `seal` in another thread raise OSError as soon as it can."""
        self._given_up.set()

    def discard(self) -> None:
        """Remove the file, unless it was finished. Never raises."""
        if self.fd >= 0:
            with suppress(OSError):
                os.close(self.fd)
            self.fd = -1
            with suppress(OSError):
                self._temporary.unlink()

    def _write_head(self, state: int, digest: bytes) -> None:
        data = (_head(state, len(self._cookie), self.offset) + digest + self._cookie).ljust(
            self.offset, b"\0"
        )
        if os.pwrite(self.fd, data, 0) != len(data):
            raise OSError(28, "No space left on device", str(self._temporary))

    def _sweep(self) -> None:
        """Remove the temporary files of processes that were killed."""
        made = re.compile(re.escape(self._prefix) + "([0-9]{1,10})-[0-9]{1,20}")
        with suppress(OSError):
            for one in self._path.parent.iterdir():
                owner = made.fullmatch(one.name)
                if owner is not None and not os.access(f"/proc/{owner[1]}", os.F_OK):
                    one.unlink()


def _is_locked(path: Path) -> bool:
    """Whether a part of the file has a lock of fcntl(2), as QEMU locks every image
    (block/file-posix.c).

    A file that we cannot read counts as not locked. Raises OSError.
    """
    try:
        fd = open_file(path)
    except PermissionError:
        return False
    with closing(fd):
        whole = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        return (
            int(struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, whole))[0])
            != fcntl.F_UNLCK
        )


def _prefix(name: str) -> str:
    """The first part of the temporary names for a file of this name."""
    data = os.fsencode(name)
    if len(data) > _LONGEST:
        # NAME_MAX of Linux is 255 bytes.
        digest = hashlib.sha256(data).hexdigest()[:32]
        name = f"{data[: _LONGEST - 33].decode(errors='ignore')}-{digest}"
    return f".{name}{_MARK}"


def _head(state: int, length: int, offset: int) -> bytes:
    return _HEADER.pack(_MAGIC, _FORMAT, state, length, offset)


def _digest(fd: int, head: bytes, given_up: threading.Event, cookie: bytes = b"") -> bytes:
    """The digest of a file whose first bytes will be `head`.

    `cookie` is the part behind them that was already read, so it is not read again. Raises OSError:
    the file cannot be read, or `given_up` was set.
    """
    found = hashlib.sha256(head + bytes(_DIGEST_BYTES) + cookie)
    at = _HEAD_BYTES + len(cookie)
    while data := os.pread(fd, _CHUNK, at):
        if given_up.is_set():
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        found.update(data)
        at += len(data)
    return found.digest()


def _read_table(fd: int, offset: int) -> StreamTable:
    size = os.fstat(fd).st_size
    start = max(offset, size - TAIL_BYTES)
    return parse_stream(_pread(fd, HEAD_BYTES, offset), _pread(fd, size - start, start))


def _pread(fd: int, length: int, at: int) -> bytes:
    """Read up to `length` bytes. One read(2) of Linux returns at most 2 GiB, and fewer after a
    signal.
    """
    found = bytearray()
    while len(found) < length and (data := os.pread(fd, length - len(found), at + len(found))):
        found += data
    return bytes(found)


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A saved guest whose file is open.

    Attributes:
        cookie: the migration cookie.
        fd: its position is where the stream begins.
        offset: where the stream begins, in bytes.
        digest: hexadecimal; None if the file has the first version of the format.
    """

    cookie: bytes
    fd: int
    offset: int
    digest: str | None = None

    def table(self) -> StreamTable | None:
        """The RAM blocks and device states that the stream lists; None if they cannot be read.
        Blocks.
        """
        with suppress(OSError, StreamError):
            return _read_table(self.fd, self.offset)
        return None

    def close(self) -> None:
        """Close the file. Never raises."""
        with suppress(OSError):
            os.close(self.fd)


def open_saved(path: str, given_up: threading.Event | None = None) -> SavedFile:
    """Open a saved guest, and check its digest. The whole file is read for that. Blocks.

    Args:
        path: a file that `Saving` has written.
        given_up: another thread sets this to end the check; then VcpuRefused is raised as soon as
            possible.

    Raises:
        VcpuRefused: the file does not exist, or is not a complete saved guest.
    """
    try:
        fd = open_file(path)
    except OSError as error:
        raise catalogue.NOT_SAVED.error(
            path=path, what=f"cannot be read: {error.strerror}"
        ) from error
    try:
        return _checked(path, fd, given_up or threading.Event())
    except OSError as error:
        os.close(fd)
        raise catalogue.NOT_SAVED.error(
            path=path, what=f"cannot be read: {error.strerror}"
        ) from error
    except BaseException:
        os.close(fd)
        raise


def _checked(path: str, fd: int, given_up: threading.Event) -> SavedFile:
    # The first read is not blocking, because some kernel files would wait here.
    head = _pread(fd, _HEAD_BYTES, 0)
    os.set_blocking(fd, True)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise catalogue.NOT_SAVED.error(path=path, what="is not a saved guest")
    _, file_format, state, length, offset = _HEADER.unpack_from(head)
    if file_format not in (_NO_DIGEST, _FORMAT):
        raise catalogue.NOT_SAVED.error(
            path=path,
            what=f"was saved in format {file_format}, and this qmpvcpu reads format {_FORMAT}",
        )
    if state != _WHOLE:
        raise catalogue.NOT_SAVED.error(path=path, what="is incomplete: the save was interrupted")
    start = _HEADER.size if file_format == _NO_DIGEST else _HEAD_BYTES
    if length > _MOST_COOKIE or offset < start + length or offset >= os.fstat(fd).st_size:
        raise catalogue.NOT_SAVED.error(path=path, what="is damaged: its header does not match it")
    # Hash the bytes that were read: another process might write to the file meanwhile.
    cookie = _pread(fd, length, start)
    digest = None
    if file_format == _FORMAT:
        digest = head[_HEADER.size :].hex()
        if _digest(fd, head[: _HEADER.size], given_up, cookie).hex() != digest:
            raise catalogue.DAMAGED.error(path=path)
    os.lseek(fd, offset, os.SEEK_SET)
    return SavedFile(cookie, fd, offset, digest)
