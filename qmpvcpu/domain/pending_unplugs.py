"""The pending unplugs of one guest: in memory, and for the next process in a store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping

from qmpvcpu.core.model import DomainState, Entity
from qmpvcpu.core.state.pending import PendingUnplug, UsedContexts, is_open, unplug_of
from qmpvcpu.host.pending_files import PendingFolder

__all__ = ["PendingUnplugs"]


class PendingUnplugs:
    """What was asked and has not ended, by first vCPU id.

    `store` is None where the guest's process is not known on this host; `trouble` says why the next process would
    not learn of what is here.
    """

    def __init__(self, store: PendingFolder | None) -> None:
        self._store = store
        self._unplugs: dict[int, PendingUnplug] = {}
        self._stored: set[int] = set()
        #: Of those in the store, what has ended and is to be taken out there; and until when it had.
        self._over: dict[int, float] = {}
        self._known: Mapping[int, PendingUnplug] = {}
        #: When the query of the last state was sent, in seconds since the epoch: it shows no later unplug.
        self.seen_at = 0.0
        #: Where nothing outlives this process.
        self._contexts = UsedContexts()
        #: Whether another process has asked for unplugs. Only a fresh query tells whether they have ended.
        self.undecided = False
        self.trouble: str | None = None
        if store is None:
            self.trouble = "QEMU's process, or a state folder, is not known here"

    @property
    def firsts(self) -> frozenset[int]:
        """First ids of the entities whose unplug is pending."""
        return frozenset(self._unplugs)

    def asked(self, first: int) -> float | None:
        """When, in seconds since the epoch."""
        unplug = self._unplugs.get(first)
        return None if unplug is None else unplug.asked

    @property
    def contexts(self) -> UsedContexts:
        """What unplugs of this QEMU have used up, as far as processes of ours have seen."""
        return self._contexts if self._store is None else self._store.contexts()

    def note_contexts(self, more: UsedContexts) -> None:
        """Remember this too. Never raises."""
        if self._store is not None:
            self._store.note_contexts(more)
        else:
            self._contexts |= more

    def note_back(self, ids: Collection[int]) -> None:
        """These are plugged. Never raises."""
        if ids and self._store is not None and (gone := self._store.gone()) and not gone.isdisjoint(ids):
            self._store.note_gone(gone.difference(ids))

    def take_over(self, other: PendingUnplugs) -> None:
        """What an earlier connection to the same process knew."""
        self._unplugs.update(other._unplugs)
        self._stored |= other._stored

    def refresh(self, state: DomainState) -> tuple[list[PendingUnplug], list[PendingUnplug]]:
        """Learn what other processes have asked or seen ended; returns what is new and open, and what is new and
        over. What was asked after the query of this state is `undecided` if the state does not show it as open.
        """
        if self._store is None:
            return [], []
        self._cross_out()
        known = self._store.load()
        if known is self._known and known.keys() == self._stored:
            return [], []
        self._known = known
        for first in self._stored - known.keys():
            # Somebody else saw its end.
            self._stored.discard(first)
            self._unplugs.pop(first, None)
        new = [unplug for unplug in known.values() if self._is_news(unplug)]
        opened = [unplug for unplug in new if is_open(unplug, state)]
        closed = [unplug for unplug in new if unplug not in opened]
        over = [unplug for unplug in closed if unplug.asked is None or unplug.asked < self.seen_at]
        self.undecided = len(over) < len(closed)
        if over:
            self._store.discard([unplug.first for unplug in over], self.seen_at)
        self._unplugs.update((unplug.first, unplug) for unplug in opened)
        self._stored |= {unplug.first for unplug in opened}
        return opened, over

    def ask(self, entities: Iterable[Entity], state: DomainState, now: float) -> None:
        """Remember these before they are asked."""
        unplugs = [unplug_of(entity, state, now) for entity in entities]
        self._unplugs.update((unplug.first, unplug) for unplug in unplugs)
        if self._store is None:
            return
        self._cross_out()
        try:
            self._store.add(unplugs)
            self._stored |= {unplug.first for unplug in unplugs}
        except OSError as error:
            self.trouble = f"the state folder cannot be written: {error}"

    def end(self, firsts: Iterable[int], *, gone: bool = False) -> None:
        """Their end is known. Of what is `gone` the next process sees that by itself: the store forgets it in the
        next turn of the loop, when who waits for it has the answer.
        """
        ended = [first for first in firsts if first in self._unplugs]
        for first in ended:
            del self._unplugs[first]
        stored = self._stored.intersection(ended)
        if not stored:
            return
        if gone and not self._over:
            asyncio.get_running_loop().call_soon(self._cross_out)
        until = self.seen_at if gone else time.time()
        self._over.update(dict.fromkeys(stored, until))
        if not gone:
            self._cross_out()

    def close(self) -> None:
        """The connection ends; what is pending stays known. Never raises."""
        self._cross_out()
        if self._store is not None:
            self._store.tidy()

    def _cross_out(self) -> None:
        over, self._over = self._over, {}
        if self._store is None:
            return
        for until in set(over.values()):
            ended = [first for first, when in over.items() if when == until]
            self._stored.difference_update(ended)
            self._store.discard(ended, until)

    def _is_news(self, unplug: PendingUnplug) -> bool:
        """Whether it is not the one that is known here."""
        ours = self._unplugs.get(unplug.first)
        return ours is None or (unplug.asked or 0.0) > (ours.asked or 0.0)

    def settle(self, state: DomainState, held: Collection[int] = ()) -> None:
        """What this fresh state shows as ended, has ended. Those in `held` are ended by who has them in hands, all
        at once: that costs the disk one write.
        """
        if self._unplugs.keys() - held:
            ended = [first for first, unplug in self._unplugs.items() if not is_open(unplug, state)]
            self.end([first for first in ended if first not in held], gone=True)
