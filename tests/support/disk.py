"""A disk that hangs, or a process that dies, at a step of a write: by Python's audit events."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: What is called for each audit event. A hook cannot be removed, so there is one, which asks these.
_listeners: list[Callable[[str, tuple[Any, ...]], None]] = []
_lock = threading.Lock()
_is_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for listener in tuple(_listeners):
        listener(event, arguments)


def _listen(listener: Callable[[str, tuple[Any, ...]], None]) -> None:
    global _is_installed
    with _lock:
        if not _is_installed:
            sys.addaudithook(_hook)
            _is_installed = True
        _listeners.append(listener)


class HungDisk:
    """A disk that does not come back from the first write of a new file, or from the first rename."""

    def __init__(self) -> None:
        #: Set once somebody hangs.
        self.begun = threading.Event()
        #: To be set by the test: the disk answers.
        self.answers = threading.Event()
        #: Files that were removed, or are just being removed.
        self.removed: list[Path] = []


@contextmanager
def hung_disk(folder: Path, at: str) -> Iterator[HungDisk]:
    """The disk of `folder` hangs at `"write"` or at `"rename"`, until `answers` is set."""
    disk = HungDisk()

    def listener(event: str, arguments: tuple[Any, ...]) -> None:
        what = _what(event, arguments)
        if what is None or not (path := Path(os.fsdecode(arguments[0]))).is_relative_to(folder):
            return
        if what == "remove":
            disk.removed.append(path)
        elif what == at:
            disk.begun.set()
            disk.answers.wait()

    _listen(listener)
    try:
        yield disk
    finally:
        _listeners.remove(listener)
        disk.answers.set()


def die_at_rename(number: int) -> None:
    """End this process, at once, in place of its rename of that number (from 1)."""
    left = number

    def listener(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if _what(event, arguments) == "rename":
            left -= 1
            if left == 0:
                os._exit(9)

    _listen(listener)


def _what(event: str, arguments: tuple[Any, ...]) -> str | None:
    if event in ("os.rename", "os.remove"):
        return event.removeprefix("os.")
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        # Where Python has only a mode, there are no flags.
        return "write" if isinstance(arguments[2], int) and arguments[2] & os.O_CREAT else None
    return None
