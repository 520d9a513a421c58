"""Answers on disk, for many processes at once: put, got, forgotten. Nothing that goes wrong there
is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qmpvcpu.host.answers import FileCache, key_of, program_of


class Cache:
    """At most `keep` answers in a folder."""

    def __init__(self, folder: Path, keep: int = 8) -> None:
        self._cache = FileCache(folder, keep=keep)
        self.folder = folder

    def put(self, name: str, answer: Any) -> None:
        self._cache.put(name, answer)

    def get(self, name: str) -> Any:
        return self._cache.get(name)

    def clear(self) -> int:
        """Forget everything; how many there were."""
        return self._cache.clear()

    @contextmanager
    def locked(self, name: str) -> Iterator[bool]:
        """Hold a lock of that name; false if another holds it."""
        lock = self._cache.try_lock(name)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()
                # Twice is as good as once.
                lock.release()


def are_one_program(before: Any, after: Any) -> bool:
    """Whether two sights of a program (`sight`) were of the same file, with the same content."""
    return bool(before == after)


def sight(path: Path) -> Any:
    """What can be seen of a program now."""
    return program_of(str(path))


def name_of(*parts: Any) -> str:
    """The name under which the answer to these JSON data is kept."""
    return key_of(*parts)
