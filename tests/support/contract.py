"""Which keys each JSON document has: docs promise that none is renamed or removed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

INFO = {"domain", "arch", "machine", "accel", "active", "vcpus"}
ROW = {
    "id",
    "state",
    "hotpluggable",
    "order",
    "node",
    "props",
    "entity",
    "qom_path",
    "thread_id",
    "online",
    "pending",
    "pin",
    "scheduler",
    "logical_id",
    "can_offline",
    "cpu",
}
OUTCOME = {
    "outcome",
    "changed",
    "mechanism",
    "vcpus",
    "changed_ids",
    "pending",
    "pending_online",
    "undone",
    "messages",
    "seconds",
    "live_changed_ids",
    "config_changed_ids",
    "defined",
}
PLAN = {"plan", "refusals", "vcpus", "unchanged", "messages", "diff"}
ERROR = (OUTCOME - {"pending_online", "live_changed_ids", "config_changed_ids", "defined"}) | {
    "error"
}
ERROR_FIELDS = {"type", "libvirt", "message", "hint"}
#: Of each error, what else it says.
FACTS = {
    "VcpuUsageError": set(),
    "VcpuRefused": {"refusals"},
    "VcpuRejected": {"reasons"},
    "VcpuFailed": {"qmp_class", "qmp_text", "exit_code"},
    "VcpuPartial": {"qmp_class", "qmp_text", "exit_code", "remaining"},
    "VcpuConnectionError": {"address", "reason"},
}
#: What some outcomes end the program with; docs/README's table.
EXITS = {
    "queried": 0,
    "applied": 0,
    "requested": 0,
    "usage": 2,
    "refused": 3,
    "rejected": 4,
    "pending": 5,
    "partial": 6,
    "connection": 7,
    "failed": 8,
}
CHANGES = {"setvcpu", "setvcpus", "apply", "vcpupin"}
GUEST = {"cpus", "assumed"}
COUNT = {"domain", "maximum", "current"}


def _keys(what: str, seen: set[str], expected: set[str]) -> Iterator[str]:
    if seen != expected:
        yield (
            f"{what}: keys missing {sorted(expected - seen)}, keys that are new"
            f" {sorted(seen - expected)}"
        )


def check(command: str, words: Sequence[str], document: dict[str, Any]) -> Iterator[str]:
    """What of the document's keys is not as promised."""
    if "error" in document:
        yield from _keys("error document", document.keys(), ERROR)
        error = document["error"]
        yield from _keys("error", error.keys(), ERROR_FIELDS | FACTS.get(error["type"], set()))
    elif command == "vcpuinfo" or (
        command == "setvcpu" and not {"--enable", "--disable"} & set(words)
    ):
        yield from _keys(command, document.keys(), INFO)
        for row in document["vcpus"]:
            yield from _keys(f"vCPU {row['id']}", row.keys(), ROW)
    elif command in CHANGES:
        yield from _keys(command, document.keys(), PLAN if "--dry-run" in words else OUTCOME)
    elif command == "guestvcpus":
        yield from _keys(
            command, document.keys(), GUEST | (OUTCOME if "--cpulist" in words else {"domain"})
        )


def check_exit(code: int, document: dict[str, Any]) -> Iterator[str]:
    """The exit code is the outcome's."""
    expected = EXITS.get(document.get("outcome", ""))
    if "plan" in document:
        expected = EXITS["refused"] if document["refusals"] else 0
    if expected is not None and code != expected:
        yield f"exit code {code}, where {document.get('outcome', 'the plan')} has {expected}"
