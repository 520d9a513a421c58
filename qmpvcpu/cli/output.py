"""What a command writes: to stdout and stderr, which may be closed, full, without a reader, or not UTF-8.

No such trouble changes the exit code: it is that of what the command did.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from qmpvcpu.core.text import MESSAGE_LENGTH, clean

if TYPE_CHECKING:
    from qmpvcpu.cli.signals import Signals

__all__ = ["Output", "OutputLost"]


class OutputLost(Exception):
    """Nobody can read what a command has to say that does nothing else."""


class Output:
    """stdout and stderr of one command. With `is_json` one document, and nothing else, goes to stdout."""

    def __init__(self, signals: Signals, *, is_json: bool) -> None:
        self.is_json = is_json
        self._signals = signals
        #: Why stdout cannot be written any more.
        self._lost: OSError | None = None
        self._has_document = False

    def document(self, document: Mapping[str, Any] | list[Any]) -> None:
        """The one JSON document; what comes after it is dropped."""
        if self._has_document:
            return
        self._has_document = True
        self.write(_json(document) + "\n")

    def lines(self, lines: Iterable[str]) -> None:
        """Lines for a person; what QEMU, libvirt, the guest or a file named is in them."""
        self.write("".join(f"{clean(line)}\n" for line in lines))

    def stream(self, document: Mapping[str, Any], line: str) -> None:
        """One of many, at once: a document or a line.

        Raises:
            OutputLost: it cannot be written.
        """
        self.write(_json(document) + "\n" if self.is_json else clean(line) + "\n", within=None)
        if self._lost is not None:
            raise OutputLost

    def pipe(self) -> int | None:
        """The descriptor of stdout, if that is a pipe: an event loop sees when its reader leaves."""
        try:
            number = sys.stdout.fileno()
            return number if stat.S_ISFIFO(os.fstat(number).st_mode) else None
        except (AttributeError, OSError, ValueError):
            return None

    def lose_reader(self) -> None:
        """The reader of stdout has left."""
        self._lost = BrokenPipeError()

    def data(self, data: bytes) -> None:
        """What a program may read, byte by byte as it is; a terminal gets no control characters of it."""
        if _is_terminal(sys.stdout):
            self.write("\n".join(clean(line, tabs=True) for line in data.decode(errors="replace").split("\n")))
        else:
            self.write(data)

    def write(self, text: str | bytes, *, within: int | None = 0) -> None:
        """To stdout, as it is, and at once.

        Args:
            text: bytes are written as they are.
            within: exit code of a process that is interrupted while nobody reads; None is an interrupted one's.
        """
        if self._lost is not None:
            return
        with self._signals.leaving(within):
            try:
                _write(sys.stdout, text)
            except OSError as error:
                self._lost = error

    def say(self, *lines: str) -> None:
        """To stderr, each a line. What cannot be written there is lost."""
        self._to_stderr("".join(f"{clean(line, MESSAGE_LENGTH)}\n" for line in lines))

    def progress(self, text: str) -> None:
        """A part of a line that is overwritten, to a terminal."""
        self._to_stderr(text)

    def _to_stderr(self, text: str) -> None:
        try:
            with self._signals.leaving():
                _write(sys.stderr, text)
        except OSError:
            return

    @property
    def shows_progress(self) -> bool:
        """Whether somebody watches stderr."""
        return _is_terminal(sys.stderr)

    @property
    def reader_left(self) -> bool:
        """Whether stdout was a pipe that nobody reads any more."""
        return isinstance(self._lost, BrokenPipeError)

    def end(self, code: int) -> int:
        """Say on stderr what stdout could not take; returns the exit code, unchanged."""
        if self._lost is not None and not self.reader_left:
            self.say(
                f"qmpvcpu: cannot write to stdout: {self._lost.strerror}; the exit code is {code} all the same"
            )
        return code


def _json(document: Mapping[str, Any] | list[Any]) -> str:
    import json

    return json.dumps(document)


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False


def _write(stream: TextIO | None, text: str | bytes) -> None:
    """All of it. Raises OSError."""
    if not text:
        return
    if stream is None or stream.closed:
        raise OSError(errno.EBADF, "it is closed")
    if isinstance(text, str):
        encoding = stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace")
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        # A program of somebody else's has put its own stream there.
        stream.write(text.decode(errors="replace"))
        stream.flush()
        return
    stream.flush()
    # Unbuffered: what could not be written would be tried again as the interpreter ends.
    raw, left = getattr(buffer, "raw", buffer), memoryview(text)
    while left:
        written = raw.write(left)
        if written is None:
            # Another program that has the same terminal or pipe made it non-blocking.
            select.select([], [raw], [])
        else:
            left = left[written:]
