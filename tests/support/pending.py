"""Unplugs that were asked and have not ended: on disk for the next process, and whether QEMU may
still do one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from qmpvcpu.core.state.knowledge import PendingUnplug, UsedContexts, is_open, mark
from qmpvcpu.domain import session as link
from qmpvcpu.host import pending_files as host
from qmpvcpu.host.process import Process
from tests.support.slots import Slot, state_of

#: The QEMU of the tests: there need not be such a process.
_QEMU = Process(4711, 1, "boot")


class Unplug(NamedTuple):
    """One of the entity with this first vCPU id; path and thread as they were then, `asked` in
    seconds since the epoch. None where not known.
    """

    first: int
    qom_path: str | None = None
    thread_id: int | None = None
    asked: float | None = None


class Store:
    """What one process of ours keeps on disk of one QEMU. `start` tells one QEMU from the next with
    its pid.
    """

    def __init__(self, state: Path, start: int = 1) -> None:
        self._process = replace(_QEMU, start=start)
        self._folder = host.PendingFolder(self._process, state)
        #: Of all QEMUs.
        self.root = state / "pending"

    @property
    def folder(self) -> Path:
        """Of this QEMU."""
        return self.root / self._process.key

    def ask(self, *unplugs: Unplug) -> None:
        """Keep these. Raises OSError."""
        self._folder.add(PendingUnplug(*unplug) for unplug in unplugs)

    def end(self, *firsts: int, until: float = inf) -> None:
        """Forget these, where they were asked before `until`."""
        self._folder.discard(firsts, until)

    def known(self) -> dict[int, Unplug]:
        """What is kept, by first id."""
        return {
            first: Unplug(found.entity_id, found.qom_path, found.thread_id, found.requested)
            for first, found in self._folder.load().items()
        }

    def note_gone(self, *ids: int) -> None:
        """These vCPUs are gone, and who manages the guest does not know; none: it knows."""
        self._folder.note_removed(ids)

    def gone(self) -> set[int]:
        return set(self._folder.removed())

    def note_contexts(self, *gone: tuple[int, int], reported: bool = False) -> None:
        """These vCPUs (id, thread id) were unplugged under TCG; the user was told that contexts run
        out.
        """
        self._folder.note_contexts(UsedContexts(frozenset(gone), reported))

    def contexts(self) -> tuple[set[tuple[int, int]], bool]:
        """What was noted."""
        found = self._folder.contexts()
        return set(found.removed), found.is_reported

    @property
    def contexts_file(self) -> Path:
        return self.folder / ".contexts"

    def tidy(self) -> None:
        """Leave nothing empty behind."""
        self._folder.tidy()

    def locked(self) -> AbstractContextManager[None]:
        """As a process that is stopped while it rewrites a file."""
        return self._folder._locked()

    def files(self) -> list[str]:
        """The names of its files that another process reads."""
        return sorted(path.name for path in self.folder.glob("*"))


@contextmanager
def qemu_runs_here(start: int = 1) -> Iterator[None]:
    """Connections to a scripted QEMU are taken for those to a process of this host, and so have a
    `Store`.
    """
    with (
        patch.object(link, "find_process", lambda threads, peer: replace(_QEMU, start=start)),
        patch.object(host, "is_alive", lambda key: True),
    ):
        yield


def contexts_used(gone: Iterable[tuple[int, int]], threads: Collection[int]) -> int:
    """By unplugs of these vCPUs (id, thread id; 0: not known), where those of these threads are
    there now.
    """
    return UsedContexts(frozenset(gone)).count(frozenset(threads))


def may_still_happen(unplug: Unplug, slots: Iterable[Slot]) -> bool:
    """Whether QEMU, with these slots now, may still carry it out."""
    return is_open(PendingUnplug(*unplug), state_of(slots))


def marked(slots: Iterable[Slot], *firsts: Collection[int]) -> list[int]:
    """The vCPUs that are shown as pending, where these entities are; of several sets one after the
    other.
    """
    state = state_of(slots)
    for each in firsts:
        state = mark(state, frozenset(each))
    return [vcpu.id for vcpu in state.vcpus if vcpu.pending]
