"""The pending unplugs of one guest: in memory, and in a store for the next process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping

from qmpvcpu.core.model import DomainState, Entity
from qmpvcpu.core.state.knowledge import PendingUnplug, UsedContexts, is_open, unplug_of
from qmpvcpu.host.pending_files import PendingFolder


class PendingUnplugs:
    """Unplugs that were requested and have not finished, by entity id.

    `store` is None if the guest's process is not known on this host. `trouble` says why the next
    process would not learn of these unplugs.
    """

    def __init__(self, store: PendingFolder | None) -> None:
        self._store = store
        self._unplugs: dict[int, PendingUnplug] = {}
        self._stored: set[int] = set()
        #: Unplugs that have finished and must be removed from the store, with the time until which
        #: they had.
        self._finished: dict[int, float] = {}
        self._known: Mapping[int, PendingUnplug] = {}
        #: When the query of the last state was sent, in seconds since the epoch. The state does not
        #: show later unplugs.
        self.seen_at = 0.0
        #: Used if nothing outlives this process.
        self._contexts = UsedContexts()
        #: Whether another process has requested unplugs, and only a fresh query shows whether they
        #: have finished.
        self.undecided = False
        self.trouble: str | None = None
        if store is None:
            self.trouble = "QEMU's process, or a state folder, is not known here"

    @property
    def entity_ids(self) -> frozenset[int]:
        """Ids of the entities whose unplug is pending."""
        return frozenset(self._unplugs)

    def requested_at(self, entity_id: int) -> float | None:
        """When the unplug was requested, in seconds since the epoch."""
        unplug = self._unplugs.get(entity_id)
        return None if unplug is None else unplug.requested

    @property
    def contexts(self) -> UsedContexts:
        """What unplugs of this QEMU have used up, as far as our processes have seen."""
        return self._contexts if self._store is None else self._store.contexts()

    def note_contexts(self, more: UsedContexts) -> None:
        """Add to `contexts`. Never raises."""
        if self._store is not None:
            self._store.note_contexts(more)
        else:
            self._contexts |= more

    def note_back(self, ids: Collection[int]) -> None:
        """Note that these vCPUs are plugged. Never raises."""
        if (
            ids
            and self._store is not None
            and (removed := self._store.removed())
            and not removed.isdisjoint(ids)
        ):
            self._store.note_removed(removed.difference(ids))

    def adopt(self, other: PendingUnplugs) -> None:
        """Add what an earlier connection to the same process knew."""
        self._unplugs.update(other._unplugs)
        self._stored |= other._stored

    def refresh(self, state: DomainState) -> tuple[list[PendingUnplug], list[PendingUnplug]]:
        """Read what other processes have requested or seen finish. Return the new unplugs that are
        open, and the new ones that have finished. `undecided` is set if an unplug was requested
        after the query of this state, and the state does not show it as open.
        """
        if self._store is None:
            return [], []
        self._cross_out()
        known = self._store.load()
        if known is self._known and known.keys() == self._stored:
            return [], []
        self._known = known
        for first in self._stored - known.keys():
            # Another process saw it finish.
            self._stored.discard(first)
            self._unplugs.pop(first, None)
        new = [unplug for unplug in known.values() if self._is_news(unplug)]
        opened = [unplug for unplug in new if is_open(unplug, state)]
        closed = [unplug for unplug in new if unplug not in opened]
        finished = [
            unplug
            for unplug in closed
            if unplug.requested is None or unplug.requested < self.seen_at
        ]
        self.undecided = len(finished) < len(closed)
        if finished:
            self._store.discard([unplug.entity_id for unplug in finished], self.seen_at)
        self._unplugs.update((unplug.entity_id, unplug) for unplug in opened)
        self._stored |= {unplug.entity_id for unplug in opened}
        return opened, finished

    def ask(self, entities: Iterable[Entity], state: DomainState, now: float) -> None:
        """Remember these unplugs before they are requested."""
        unplugs = [unplug_of(entity, state, now) for entity in entities]
        self._unplugs.update((unplug.entity_id, unplug) for unplug in unplugs)
        if self._store is None:
            return
        self._cross_out()
        try:
            self._store.add(unplugs)
            self._stored |= {unplug.entity_id for unplug in unplugs}
        except OSError as error:
            self.trouble = f"the state folder cannot be written: {error}"

    def end(self, entity_ids: Iterable[int], *, removed: bool = False) -> None:
        """Note that these unplugs have finished. If the entities are `removed`, the next process
        sees that by itself; the store then forgets them in the next turn of the loop, when the
        waiting caller has its answer.
        """
        ended = [first for first in entity_ids if first in self._unplugs]
        for first in ended:
            del self._unplugs[first]
        stored = self._stored.intersection(ended)
        if not stored:
            return
        if removed and not self._finished:
            asyncio.get_running_loop().call_soon(self._cross_out)
        until = self.seen_at if removed else time.time()
        self._finished.update(dict.fromkeys(stored, until))
        if not removed:
            self._cross_out()

    def close(self) -> None:
        """Note that the connection ends; pending unplugs stay in the store. Never raises."""
        self._cross_out()
        if self._store is not None:
            self._store.tidy()

    def _cross_out(self) -> None:
        finished, self._finished = self._finished, {}
        if self._store is None:
            return
        for until in set(finished.values()):
            ended = [first for first, when in finished.items() if when == until]
            self._stored.difference_update(ended)
            self._store.discard(ended, until)

    def _is_news(self, unplug: PendingUnplug) -> bool:
        """Whether this unplug is newer than the known one."""
        ours = self._unplugs.get(unplug.entity_id)
        return ours is None or (unplug.requested or 0.0) > (ours.requested or 0.0)

    def end_finished(self, state: DomainState, in_flight: Collection[int] = ()) -> None:
        """End the unplugs that this fresh state shows as finished. The operation in flight ends
        those in `in_flight`, all at once, so that the disk has one write.
        """
        if self._unplugs.keys() - in_flight:
            ended = [first for first, unplug in self._unplugs.items() if not is_open(unplug, state)]
            self.end([first for first in ended if first not in in_flight], removed=True)
