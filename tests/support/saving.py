"""Guests that go into a file, or under another name, as the commands `save` and `migrate` do it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qmpvcpu import Domain
from qmpvcpu.app import migrate as migrating
from qmpvcpu.app import saving as commands
from qmpvcpu.app.destination import Where
from qmpvcpu.domain.migration import Transfer
from qmpvcpu.host.process import process_of
from qmpvcpu.host.savefile import Saving, open_saved
from qmpvcpu.host.saves import SavedDefinitions, Saves, paused_by_us
from tests.support.waiting import DEADLINE


async def save(domain: Domain, path: Path, **options: Any) -> None:
    """`save`: into a file."""
    await commands.save(domain, str(path), **options)


async def restore(path: Path, name: str | None = None) -> None:
    """`restore`: under its own name, or another."""
    await commands.restore(str(path), Where(name))


async def move(domain: Domain, name: str, **options: Any) -> None:
    """`migrate`: to a domain of that name, which is started for it."""
    await migrating.migrate(domain, Where(name), Transfer(), **options)


class File:
    """A file that is being made: QEMU writes to `fd`, from `offset` on. What is not finished leaves
    nothing.
    """

    def __init__(self, path: Path, cookie: bytes) -> None:
        self._saving = Saving(path, cookie)
        self.fd = self._saving.fd
        self.offset = self._saving.offset
        self.temporary = Path(self._saving.temporary)

    def finish(self) -> int:
        """It is whole; its size. Raises OSError: QEMU has written nothing."""
        return self._saving.finish()

    def discard(self) -> None:
        self._saving.discard()


class _Meanwhile(threading.Event):
    """Is looked at while the file is read."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self._act = act

    def is_set(self) -> bool:
        self._act()
        return False


def content(path: Path, meanwhile: Callable[[], object] = lambda: None) -> tuple[bytes, bytes]:
    """The cookie in a whole file, and the first kilobyte of what QEMU wrote; `meanwhile` is called
    once some of it has been read.
    """
    saved = open_saved(str(path), _Meanwhile(meanwhile))
    try:
        return saved.cookie, os.read(saved.fd, 1024)
    finally:
        saved.close()


class Records:
    """The state folder: this process stands for the QEMU of a guest that is being saved."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saves = Saves(folder)
        self._definitions = SavedDefinitions(folder)
        self._qemu = process_of(os.getpid())

    def pause(self, path: Path, *, runs: bool, saver: str | None = None) -> None:
        """The guest is about to be paused, and its file is at `path`; `saver` is the name of who
        does it.
        """
        with path.open("rb") as file:
            guest = paused_by_us(
                file.fileno(), (str(path), str(path.with_name("guest"))), runs=runs
            )
        self._saves.keep(self._qemu, guest if saver is None else replace(guest, saver=saver))

    def paused(self) -> tuple[bool, bool] | None:
        """Whether it ran, and whether who paused it has ended; None: it is not known to be paused."""
        found = self._saves.kept(self._qemu)
        return None if found is None else (found.runs, found.is_left)

    def stay(self) -> None:
        """The save has failed, and the guest is paused here."""
        self._saves.keep_here(self._qemu)

    def stays(self) -> bool:
        found = self._saves.kept(self._qemu)
        return found is not None and found.is_here

    def remove_file(self) -> None:
        found = self._saves.kept(self._qemu)
        assert found is not None
        found.remove_file()

    def forget(self) -> None:
        self._saves.forget(self._qemu)

    def tear(self, text: str) -> None:
        """The record is this text."""
        (path,) = (self._folder / "saving").iterdir()
        path.write_text(text)

    def keep_definition(self, digest: str, xml: bytes) -> None:
        self._definitions.keep(digest, xml)

    def definition(self, digest: str | None) -> bytes | None:
        return self._definitions.kept(digest)


def write_again(path: Path, new: Path, change: Callable[[bytes], bytes]) -> None:
    """The same saved guest with another cookie, and a digest that fits."""
    saved = open_saved(str(path))
    try:
        made = Saving(new, change(saved.cookie))
        while data := os.read(saved.fd, 1 << 20):
            os.write(made.fd, data)
        made.finish()
    finally:
        saved.close()


def of_the_first_format(data: bytes) -> bytes:
    """The same saved guest as the first version of the format had it: without a digest."""
    head, digest = bytearray(data[:40]), 32
    head[16:20] = b"\0\0\0\1"
    length, offset = (int.from_bytes(head[at : at + 8], "big") for at in (24, 32))
    cookie = data[40 + digest : 40 + digest + length]
    return (bytes(head) + cookie).ljust(offset, b"\0") + data[offset:]


@contextmanager
def hung_while_it_is_made() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Making the file hangs, once it is there: whether that has begun, and what lets it go on."""
    begun, go = threading.Event(), threading.Event()

    class Hung(Saving):
        def __init__(self, path: Path, cookie: bytes) -> None:
            super().__init__(path, cookie)
            begun.set()
            assert go.wait(DEADLINE)

    with patch.object(commands, "Saving", Hung):
        try:
            yield begun, go
        finally:
            go.set()
