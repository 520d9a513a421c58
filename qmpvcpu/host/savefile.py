"""A saved guest on disk: a header, the cookie, then QEMU's migration stream.

The header says whether the stream is whole; until it is, the file has another name. So a file under the name that
the user gave is a whole guest, or it is the one that was there before.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qmpvcpu.errors import Refusal, VcpuRefused
from qmpvcpu.host.files import sync_folder

__all__ = ["SavedFile", "Saving", "open_saved"]

#: Magic, version, whether the stream is whole, bytes of the cookie, where the stream begins.
_HEADER: Final = struct.Struct(">16sIIQQ")
_MAGIC: Final = b"qmpvcpu-save\0\0\0\0"
_FORMAT: Final = 1
_PART, _WHOLE = 0, 1
#: What QEMU's `file:` wants of an offset, and a direct write of a disk.
_ALIGNED: Final = 4096
_MOST_COOKIE: Final = 17 * 1024 * 1024
_MARK: Final = ".saving-"


class Saving:
    """A guest that is being saved; `fd` is for QEMU to write to, from `offset` on."""

    def __init__(self, path: Path, cookie: bytes) -> None:
        """Begin. Raises OSError: it cannot be written there; nothing has changed."""
        self._path = Path(os.path.realpath(path))
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(self._path.stat().st_mode):
                raise OSError(errno.EINVAL, "it is there, and is no regular file", str(path))
        self._temporary = self._path.with_name(f".{self._path.name}{_MARK}{os.getpid()}-{time.monotonic_ns()}")
        self.offset = -(-(_HEADER.size + len(cookie)) // _ALIGNED) * _ALIGNED
        self._cookie = cookie
        self._sweep()
        # QEMU takes a descriptor that was opened to write, and nothing else (10.0).
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self.fd = os.open(self._temporary, flags, 0o600)
        try:
            self._write_head(_PART)
            os.lseek(self.fd, self.offset, os.SEEK_SET)
        except BaseException:
            self.discard()
            raise

    def finish(self) -> int:
        """It is whole: sync it, and give it its name; its size in bytes. Blocks. Raises OSError."""
        size = os.fstat(self.fd).st_size
        if size <= self.offset:
            raise OSError(0, "QEMU has written nothing", str(self._temporary))
        os.fsync(self.fd)
        self._write_head(_WHOLE)
        os.fsync(self.fd)
        self._temporary.rename(self._path)
        os.close(self.fd)
        self.fd = -1
        # From here on it is saved, whatever else fails.
        with suppress(OSError):
            sync_folder(self._path.parent)
        return size

    def discard(self) -> None:
        """Take it away, unless it was finished. Never raises."""
        if self.fd >= 0:
            with suppress(OSError):
                os.close(self.fd)
            self.fd = -1
            with suppress(OSError):
                self._temporary.unlink()

    def _write_head(self, state: int) -> None:
        head = _HEADER.pack(_MAGIC, _FORMAT, state, len(self._cookie), self.offset) + self._cookie
        data = head.ljust(self.offset, b"\0")
        if os.pwrite(self.fd, data, 0) != len(data):
            raise OSError(28, "No space left on device", str(self._temporary))

    def _sweep(self) -> None:
        """What others have left who were killed."""
        with suppress(OSError):
            for one in self._path.parent.glob(f".{self._path.name}{_MARK}*-*"):
                pid = one.name.rpartition(_MARK)[2].partition("-")[0]
                if pid.isdigit() and not os.access(f"/proc/{pid}", os.F_OK):
                    one.unlink()


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A saved guest, open: `cookie`, and `fd`, which stands where the stream begins (`offset`)."""

    cookie: bytes
    fd: int
    offset: int

    def close(self) -> None:
        """Let it go. Never raises."""
        with suppress(OSError):
            os.close(self.fd)


def open_saved(path: str) -> SavedFile:
    """Open a saved guest.

    Raises:
        VcpuRefused: it is not there, or is no whole one.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(f"'{path}' cannot be read: {error.strerror}") from error
    try:
        head = os.read(fd, _HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise _refused(f"'{path}' is no saved guest")
        _, file_format, state, length, offset = _HEADER.unpack(head)
        if file_format != _FORMAT:
            raise _refused(f"'{path}' was saved in version {file_format} of the format, and this is {_FORMAT}")
        if state != _WHOLE:
            raise _refused(f"'{path}' is not whole: saving it was interrupted")
        if length > _MOST_COOKIE or offset < _HEADER.size + length or offset >= os.fstat(fd).st_size:
            raise _refused(f"'{path}' is damaged")
        cookie = os.read(fd, length)
        os.lseek(fd, offset, os.SEEK_SET)
        return SavedFile(cookie, fd, offset)
    except OSError as error:
        os.close(fd)
        raise _refused(f"'{path}' cannot be read: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise


def _refused(text: str) -> VcpuRefused:
    return VcpuRefused([Refusal("saved", text, (), "name a file that `save` has written", "VIR_ERR_INVALID_ARG")])
