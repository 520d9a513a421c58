"""The stages of one entity's `device_add` or `device_del`, and what leads to the next one: four
tables. Pure.

Rules of the tables
- Only a fresh query (PRESENT, ABSENT) makes an entity PLUGGED or REMOVED. A reply or an event is at
  most a reason to query. So nothing is ever reported that the slot does not confirm.
- A pair (stage, happening) that is in no table changes nothing: a late or doubled message is
  harmless.
- A stage in `WAITING` ends by the deadline at the latest. A stage in `IN_FLIGHT` ends by QEMU's
  reply.
- Entering ADDING sends `device_add`, entering DELETING sends `device_del`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qmpvcpu.core.engine.fast import FastEnum


class Stage(FastEnum):
    """The stage of one entity; its value is the text for messages."""

    READY_TO_ADD = "to add"
    ADDING = "device_add sent"
    ADDED = "device_add accepted"
    PLUGGED = "plugged"
    NOT_ADDED = "device_add failed"
    VANISHED = "accepted, but not there"
    ADD_PAUSED = "its id is still taken, device_add to be repeated"
    FOUND = "plugged by another client"
    OTHERS = "plugged by another client, and there"

    READY_TO_REMOVE = "to remove"
    DELETING = "device_del sent"
    REQUESTED = "unplug requested"
    REMOVED = "removed"
    REJECTED = "rejected by the guest"
    REJECTED_PAUSED = "rejected by the guest, to be requested again"
    NOT_REMOVED = "device_del failed"
    NOT_REMOVED_PAUSED = "device_del failed, to be repeated"
    DOUBTED = "device_del failed, an earlier unplug is pending"
    NOT_REQUESTED = "never requested"
    PENDING = "unplug pending"
    RETURNED = "removed, and plugged by another client"

    READY_TO_REPLACE = "to add after its unplug"
    AWAITING = "its earlier unplug awaited"
    STILL_AWAITED = "its earlier unplug pending"
    KEPT = "its earlier unplug did not happen"
    STAYED = "its earlier unplug did not happen, and nothing else was done"

    DROPPED = "never begun"


class On(FastEnum):
    """What can happen to an entity."""

    START = "the transaction starts"
    OK = "QEMU accepted the command"
    ERROR = "QEMU declined the command"
    FILLED = "QEMU reports that the slot is already filled"
    UNSENT = "the command was withdrawn before it was sent"
    PRESENT = "a query shows it"
    ABSENT = "a query does not show it"
    REPLACED = "a query shows another object or thread in its slot"
    REFUSED = "the guest refused"
    RETRY = "the command is worth another try"
    RETRY_NOW = "the pause before another try is over"
    REPEAT = "the answer was to an earlier unplug: request it once more"
    DOUBT = "an earlier unplug may still be carried out"
    EXPIRE = "the deadline has passed"
    QUERIED = "a query was made, and the call does not wait"
    LEAVE = "the last query of a cancelled call was made"
    CANCEL = "the call was cancelled"
    GIVE_UP = "another plug of the call has failed"


_Table = Mapping[tuple[Stage, On], Stage]
_S = Stage

#: An empty slot is filled.
PLUG: Final[_Table] = {
    (_S.READY_TO_ADD, On.START): _S.ADDING,
    (_S.READY_TO_ADD, On.CANCEL): _S.DROPPED,
    (_S.ADDING, On.OK): _S.ADDED,
    (_S.ADDING, On.UNSENT): _S.DROPPED,
    (_S.ADDING, On.ERROR): _S.NOT_ADDED,
    (_S.ADDING, On.FILLED): _S.FOUND,
    (_S.ADDED, On.PRESENT): _S.PLUGGED,
    (_S.ADDED, On.ABSENT): _S.VANISHED,
    (_S.PLUGGED, On.ABSENT): _S.VANISHED,
    (_S.FOUND, On.PRESENT): _S.OTHERS,
    (_S.FOUND, On.ABSENT): _S.VANISHED,
    (_S.OTHERS, On.ABSENT): _S.VANISHED,
    (_S.NOT_ADDED, On.RETRY): _S.ADD_PAUSED,
    (_S.ADD_PAUSED, On.RETRY_NOW): _S.ADDING,
    (_S.ADD_PAUSED, On.PRESENT): _S.OTHERS,
    (_S.ADD_PAUSED, On.EXPIRE): _S.NOT_ADDED,
    (_S.ADD_PAUSED, On.CANCEL): _S.NOT_ADDED,
    (_S.ADD_PAUSED, On.GIVE_UP): _S.NOT_ADDED,
}

#: A plugged entity is removed.
UNPLUG: Final[_Table] = {
    (_S.READY_TO_REMOVE, On.START): _S.DELETING,
    (_S.READY_TO_REMOVE, On.CANCEL): _S.DROPPED,
    (_S.DELETING, On.OK): _S.REQUESTED,
    (_S.DELETING, On.UNSENT): _S.NOT_REQUESTED,
    (_S.DELETING, On.ERROR): _S.NOT_REMOVED,
    (_S.DELETING, On.REFUSED): _S.REJECTED,
    (_S.REQUESTED, On.ABSENT): _S.REMOVED,
    (_S.REQUESTED, On.REFUSED): _S.REJECTED,
    (_S.REQUESTED, On.REPEAT): _S.DELETING,
    (_S.REQUESTED, On.REPLACED): _S.RETURNED,
    (_S.REQUESTED, On.EXPIRE): _S.PENDING,
    (_S.REQUESTED, On.LEAVE): _S.PENDING,
    (_S.PENDING, On.ABSENT): _S.REMOVED,
    (_S.REJECTED, On.ABSENT): _S.REMOVED,
    (_S.REJECTED, On.RETRY): _S.REJECTED_PAUSED,
    (_S.REJECTED_PAUSED, On.RETRY_NOW): _S.DELETING,
    (_S.REJECTED_PAUSED, On.ABSENT): _S.REMOVED,
    (_S.REJECTED_PAUSED, On.EXPIRE): _S.REJECTED,
    (_S.REJECTED_PAUSED, On.CANCEL): _S.REJECTED,
    (_S.REJECTED_PAUSED, On.GIVE_UP): _S.REJECTED,
    (_S.NOT_REMOVED, On.ABSENT): _S.REMOVED,
    (_S.NOT_REMOVED, On.RETRY): _S.NOT_REMOVED_PAUSED,
    (_S.NOT_REMOVED, On.DOUBT): _S.DOUBTED,
    (_S.NOT_REMOVED_PAUSED, On.RETRY_NOW): _S.DELETING,
    (_S.NOT_REMOVED_PAUSED, On.ABSENT): _S.REMOVED,
    (_S.NOT_REMOVED_PAUSED, On.EXPIRE): _S.NOT_REMOVED,
    (_S.NOT_REMOVED_PAUSED, On.CANCEL): _S.NOT_REMOVED,
    (_S.NOT_REMOVED_PAUSED, On.GIVE_UP): _S.NOT_REMOVED,
    (_S.DOUBTED, On.ABSENT): _S.REMOVED,
    (_S.DOUBTED, On.REFUSED): _S.NOT_REMOVED,
    (_S.NOT_REQUESTED, On.ABSENT): _S.REMOVED,
    (_S.NOT_REQUESTED, On.REFUSED): _S.REJECTED,
    (_S.NOT_REQUESTED, On.ERROR): _S.NOT_REMOVED,
    (_S.NOT_REQUESTED, On.DOUBT): _S.DOUBTED,
}

#: An entity whose earlier unplug is pending is plugged again: that unplug is awaited first.
REPLACE: Final[_Table] = {
    (_S.READY_TO_REPLACE, On.START): _S.AWAITING,
    (_S.READY_TO_REPLACE, On.CANCEL): _S.DROPPED,
    (_S.AWAITING, On.ABSENT): _S.ADDING,
    (_S.AWAITING, On.REFUSED): _S.KEPT,
    (_S.AWAITING, On.REPLACED): _S.KEPT,
    (_S.AWAITING, On.EXPIRE): _S.STILL_AWAITED,
    (_S.AWAITING, On.QUERIED): _S.STILL_AWAITED,
    (_S.AWAITING, On.CANCEL): _S.STILL_AWAITED,
    (_S.AWAITING, On.GIVE_UP): _S.STILL_AWAITED,
    (_S.KEPT, On.ABSENT): _S.ADDING,
    (_S.KEPT, On.CANCEL): _S.STAYED,
    (_S.KEPT, On.GIVE_UP): _S.STAYED,
}

#: An undo runs the other table: UNPLUG undoes a plug, PLUG undoes a removal. Only these rows
#: differ.
UNDO: Final[_Table] = {
    (_S.ADDING, On.UNSENT): _S.NOT_ADDED,
    (_S.NOT_ADDED, On.PRESENT): _S.PLUGGED,
    (_S.VANISHED, On.PRESENT): _S.PLUGGED,
}

FORWARD: Final[_Table] = {**PLUG, **UNPLUG, **REPLACE}
#: An undo removes an object that is newer than the plan, so REPLACED does not apply to it.
UNDOING: Final[_Table] = {
    pair: stage for pair, stage in {**PLUG, **UNPLUG, **UNDO}.items() if pair[1] is not On.REPLACED
}

#: The guest or a timer ends these.
WAITING: Final = frozenset(
    {_S.REQUESTED, _S.AWAITING, _S.ADD_PAUSED, _S.REJECTED_PAUSED, _S.NOT_REMOVED_PAUSED}
)
#: A timer ends these: another try follows.
PAUSED: Final = frozenset({_S.ADD_PAUSED, _S.REJECTED_PAUSED, _S.NOT_REMOVED_PAUSED})
#: QEMU's reply ends these.
IN_FLIGHT: Final = frozenset({_S.ADDING, _S.DELETING})
#: A query ends these.
UNVERIFIED: Final = frozenset({_S.ADDED, _S.FOUND})
#: QEMU may still carry out an unplug that was requested.
STILL_REQUESTED: Final = frozenset(
    {_S.DELETING, _S.REQUESTED, _S.PENDING, _S.DOUBTED, _S.AWAITING, _S.STILL_AWAITED}
)
NOT_BEGUN: Final = frozenset({_S.READY_TO_ADD, _S.READY_TO_REMOVE, _S.READY_TO_REPLACE, _S.DROPPED})

#: A plug in one of these can be undone.
UNDOABLE: Final = frozenset({_S.ADDED, _S.PLUGGED})
PLUG_FAILED: Final = frozenset({_S.NOT_ADDED, _S.VANISHED})
FAILED: Final = PLUG_FAILED | {
    _S.ADD_PAUSED,
    _S.NOT_REMOVED,
    _S.DOUBTED,
    _S.NOT_REMOVED_PAUSED,
    _S.RETURNED,
}
REJECTED: Final = frozenset({_S.REJECTED, _S.REJECTED_PAUSED})
#: A removal whose undo is in one of these has not been brought back.
NOT_RESTORED: Final = PLUG_FAILED | {_S.ADD_PAUSED}
#: A plug whose undo is in one of these is still there.
NOT_UNDONE: Final = frozenset(
    {_S.DELETING, _S.REQUESTED, _S.PENDING, _S.REJECTED, _S.NOT_REMOVED, _S.NOT_REQUESTED}
)
