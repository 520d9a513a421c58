"""Which side runs a guest that migrates. Pure.

Only this module decides that: the destination never starts by itself (`stop` while it waits), so it
runs only after our `cont`, which is sent only when the source has sent everything, or has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from qmpvcpu.core.migration.status import MigrationStatus


class Source(StrEnum):
    """The state of the source."""

    COMPLETED = "completed"
    #: It keeps the guest: the migration failed or was cancelled.
    KEPT = "kept"
    #: Its QEMU has ended.
    DEAD = "dead"
    #: It does not answer, and may run.
    UNKNOWN = "unknown"


class Destination(StrEnum):
    """The state of the destination; it does not run before our `cont`."""

    #: All of the guest, paused, with the source's vCPUs.
    WHOLE = "whole"
    #: Not all of it.
    BROKEN = "broken"
    #: All of a guest, but not the one of the source; or its `cont` fails.
    OTHER = "other"
    #: Its QEMU has ended, or cannot be reached; it does not run by itself.
    GONE = "gone"
    #: `cont` was sent, and it runs.
    RUNNING = "running"
    #: `cont` was sent without an answer, and its QEMU has ended.
    DIED = "died"
    #: `cont` was sent without an answer, and it may run.
    UNKNOWN = "unknown"


class Step(StrEnum):
    """What to do next."""

    START_DESTINATION = "start-destination"
    #: End the destination, then resume the source.
    GO_BACK = "go-back"
    #: End the source: the guest runs at the destination.
    END_SOURCE = "end-source"
    #: Touch neither: it is not known whether the other side runs.
    LEAVE = "leave"
    #: End the destination; there is no source to resume.
    GIVE_UP = "give-up"


#: Every possible pair.
_STEPS: Final[Mapping[tuple[Source, Destination], Step]] = {
    (Source.COMPLETED, Destination.WHOLE): Step.START_DESTINATION,
    (Source.COMPLETED, Destination.BROKEN): Step.GO_BACK,
    (Source.COMPLETED, Destination.OTHER): Step.GO_BACK,
    (Source.COMPLETED, Destination.GONE): Step.GO_BACK,
    (Source.COMPLETED, Destination.RUNNING): Step.END_SOURCE,
    # libvirt resumes the source as well when the destination's start was not confirmed and it is
    # gone.
    (Source.COMPLETED, Destination.DIED): Step.GO_BACK,
    (Source.COMPLETED, Destination.UNKNOWN): Step.LEAVE,
    (Source.KEPT, Destination.WHOLE): Step.GO_BACK,
    (Source.KEPT, Destination.BROKEN): Step.GO_BACK,
    (Source.KEPT, Destination.OTHER): Step.GO_BACK,
    (Source.KEPT, Destination.GONE): Step.GO_BACK,
    (Source.DEAD, Destination.WHOLE): Step.START_DESTINATION,
    (Source.DEAD, Destination.BROKEN): Step.GIVE_UP,
    # The destination has the only copy.
    (Source.DEAD, Destination.OTHER): Step.LEAVE,
    (Source.DEAD, Destination.GONE): Step.GIVE_UP,
    (Source.DEAD, Destination.RUNNING): Step.END_SOURCE,
    (Source.DEAD, Destination.DIED): Step.GIVE_UP,
    (Source.DEAD, Destination.UNKNOWN): Step.LEAVE,
    (Source.UNKNOWN, Destination.WHOLE): Step.LEAVE,
    (Source.UNKNOWN, Destination.BROKEN): Step.GIVE_UP,
    (Source.UNKNOWN, Destination.OTHER): Step.LEAVE,
    (Source.UNKNOWN, Destination.DIED): Step.GIVE_UP,
    (Source.UNKNOWN, Destination.UNKNOWN): Step.LEAVE,
    (Source.UNKNOWN, Destination.GONE): Step.GIVE_UP,
}


def next_step(source: Source, destination: Destination) -> Step:
    """Which side is to run the guest, or what must happen first."""
    return _STEPS[source, destination]


class Cancel(StrEnum):
    """What `cancel` does at one side."""

    #: The destination waits for a guest: end it.
    END_WAITING = "end-waiting"
    #: The destination has all of a guest that has not run: end it, if the source still has the
    #: guest.
    END_ARRIVED = "end-arrived"
    #: The migration is under way: cancel it.
    STOP = "stop"
    #: The source has released the guest: it recalls the guest.
    TAKE_BACK = "take-back"
    NOTHING = "nothing"


def cancel_step(run_state: str | None, status: MigrationStatus, *, is_prepared: bool) -> Cancel:
    """What `cancel` must do at one side.

    Args:
        run_state: QAPI's RunState.
        status: of `query-migrate`.
        is_prepared: whether this host has prepared it as a destination.
    """
    if run_state == "inmigrate":
        return Cancel.END_WAITING
    if run_state == "paused" and status.is_incoming and is_prepared:
        return Cancel.END_ARRIVED
    if status.is_active:
        return Cancel.STOP
    return Cancel.TAKE_BACK if run_state == "postmigrate" else Cancel.NOTHING
