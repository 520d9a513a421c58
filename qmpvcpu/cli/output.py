"""The output of a command. stdout and stderr may be closed, full, without a reader, or not UTF-8.

None of this changes the exit code, which depends only on what the command did.
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


class OutputLost(Exception):
    """The output of a command that does nothing but print cannot be written."""


class Output:
    """stdout and stderr of one command. With `is_json`, stdout gets one document and nothing
    else.
    """

    def __init__(self, signals: Signals, *, is_json: bool) -> None:
        self.is_json = is_json
        self._signals = signals
        #: Why stdout cannot be written any more.
        self._lost: OSError | None = None
        self._has_document = False

    def document(self, document: Mapping[str, Any] | list[Any]) -> None:
        """Print the one JSON document; further documents are dropped."""
        if self._has_document:
            return
        self._has_document = True
        self.write(_json(document) + "\n")

    def lines(self, lines: Iterable[str]) -> None:
        """Print lines for a person. They are cleaned, because they contain names from QEMU,
        libvirt, the guest or a file.
        """
        self.write("".join(f"{clean(line)}\n" for line in lines))

    def stream(self, document: Mapping[str, Any], line: str) -> None:
        """Print one of many documents or lines at once.

        Raises:
            OutputLost: it cannot be written.
        """
        self.write(_json(document) + "\n" if self.is_json else clean(line) + "\n", within=None)
        if self._lost is not None:
            raise OutputLost

    def pipe(self) -> int | None:
        """Return the descriptor of stdout if it is a pipe, so that an event loop can see when its
        reader leaves.
        """
        try:
            number = sys.stdout.fileno()
            return number if stat.S_ISFIFO(os.fstat(number).st_mode) else None
        except (AttributeError, OSError, ValueError):
            return None

    def lose_reader(self) -> None:
        """Note that the reader of stdout has left."""
        self._lost = BrokenPipeError()

    def data(self, data: bytes) -> None:
        """Print data for a program, byte for byte. A terminal gets it without control
        characters.
        """
        if _is_terminal(sys.stdout):
            self.write(
                "\n".join(
                    clean(line, tabs=True) for line in data.decode(errors="replace").split("\n")
                )
            )
        else:
            self.write(data)

    def write(self, text: str | bytes, *, within: int | None = 0) -> None:
        """Write to stdout at once, unchanged.

        Args:
            text: bytes are written as they are.
            within: the exit code if the process is interrupted while the write blocks; None: that
                of an interrupted command.
        """
        if self._lost is not None:
            return
        with self._signals.leaving(within):
            try:
                _write(sys.stdout, text)
            except OSError as error:
                self._lost = error

    def say(self, *lines: str) -> None:
        """Print lines to stderr. If stderr cannot be written, they are lost."""
        self._to_stderr("".join(f"{clean(line, MESSAGE_LENGTH)}\n" for line in lines))

    def progress(self, text: str) -> None:
        """Print a part of a line that will be overwritten, to a terminal."""
        self._to_stderr(text)

    def _to_stderr(self, text: str) -> None:
        try:
            with self._signals.leaving():
                _write(sys.stderr, text)
        except OSError:
            return

    @property
    def shows_progress(self) -> bool:
        """Whether stderr is a terminal."""
        return _is_terminal(sys.stderr)

    @property
    def reader_left(self) -> bool:
        """Whether stdout was a pipe whose reader has left."""
        return isinstance(self._lost, BrokenPipeError)

    def end(self, code: int) -> int:
        """Report on stderr if stdout could not be written; return the exit code, unchanged."""
        if self._lost is not None and not self.reader_left:
            self.say(
                f"qmpvcpu: cannot write to stdout: {self._lost.strerror}; the exit code is {code}"
                " all the same"
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
    """Write all of it. Raises OSError."""
    if not text:
        return
    if stream is None or stream.closed:
        raise OSError(errno.EBADF, "it is closed")
    if isinstance(text, str):
        text = text.encode(stream.encoding or "utf-8", "backslashreplace")
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        # An embedding program has replaced the stream with one that has no buffer.
        stream.write(text.decode(errors="replace"))
        stream.flush()
        return
    stream.flush()
    # Write unbuffered, because the interpreter would retry what is left in a buffer when it exits.
    raw, left = getattr(buffer, "raw", buffer), memoryview(text)
    while left:
        written = raw.write(left)
        if written is None:
            # Another program on the same terminal or pipe has made it non-blocking.
            select.select([], [raw], [])
        else:
            left = left[written:]
