"""Guests that go into a file, or under another name, as the commands `save` and `migrate` do it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qmpvcpu import Domain
from qmpvcpu.app import migrate as commands
from qmpvcpu.host.savefile import Saving, open_saved
from tests.support.waiting import DEADLINE


async def save(domain: Domain, path: Path) -> None:
    """`save`: into a file."""
    await commands.save(domain, str(path))


async def move(domain: Domain, name: str, **options: Any) -> None:
    """`migrate`: to a domain of that name, which is started for it."""
    await commands.migrate(domain, name, **options)


class File:
    """A file that is being made: QEMU writes to `fd`, from `offset` on. What is not finished leaves nothing."""

    def __init__(self, path: Path, cookie: bytes) -> None:
        self._saving = Saving(path, cookie)
        self.fd = self._saving.fd
        self.offset = self._saving.offset

    def finish(self) -> int:
        """It is whole; its size. Raises OSError: QEMU has written nothing."""
        return self._saving.finish()

    def discard(self) -> None:
        self._saving.discard()


def content(path: Path) -> tuple[bytes, bytes]:
    """The cookie in a whole file, and the first kilobyte of what QEMU wrote."""
    saved = open_saved(str(path))
    try:
        return saved.cookie, os.read(saved.fd, 1024)
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
