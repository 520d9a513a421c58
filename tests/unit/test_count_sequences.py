"""Any sequence of requests: never more vCPUs than there were or are asked for, and in the end as
many as asked.

The guest and QEMU are a few sets: what a plan says is done, by a guest that lets go of some vCPUs,
and of others later or never. `scripts/soak counts` runs ten times as many sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from qmpvcpu import Plan, VcpuFlag
from tests.support import soaking
from tests.support.states import listed, plan, x86

SLOTS = 8
ENABLE, DISABLE, NODE = VcpuFlag.ENABLE, VcpuFlag.DISABLE, VcpuFlag.NUMA_NODE


@dataclass
class World:
    """`stubborn` vCPUs stay when they are asked to go, `has_agent` tells what is `offline`."""

    plugged: set[int]
    pending: set[int] = field(default_factory=set)
    offline: set[int] = field(default_factory=set)
    stubborn: set[int] = field(default_factory=set)
    has_agent: bool = False

    def plan(self, request) -> Plan:
        state = x86(self.plugged, kvm=True)
        return plan(
            state, pending=self.pending, offline=self.offline if self.has_agent else None, **request
        )

    def carry_out(self, made: Plan) -> int:
        """Do it; the most vCPUs that were enabled at once."""
        asked = {entity.id for entity in (*made.unplugs, *made.awaited)}
        self.pending |= asked
        self.plugged |= {entity.id for entity in made.plugs}
        peak = len(self.plugged)
        gone = asked - self.stubborn
        self.plugged -= gone
        self.offline -= gone
        self.pending -= gone
        # What has gone and was to stay is plugged again, and online.
        self.plugged |= {entity.id for entity in made.awaited} & gone
        self.offline |= set(made.offlines)
        self.offline -= set(made.onlines)
        return max(peak, len(self.plugged))

    @property
    def runs_on(self) -> set[int]:
        return self.plugged - self.offline if self.has_agent else set(self.plugged)


def random_world(random: Random) -> World:
    plugged = {0, *random.sample(range(1, SLOTS), random.randint(0, SLOTS - 1))}
    others = sorted(plugged - {0})
    world = World(plugged, has_agent=random.random() < 0.5)
    world.pending = {n for n in others if random.random() < 0.2}
    world.stubborn = {n for n in range(1, SLOTS) if random.random() < 0.3}
    world.offline = {n for n in others if world.has_agent and random.random() < 0.3}
    return world


def random_request(random: Random, world: World):
    """A request, and how many vCPUs it wants enabled, where every one obeys (None: what it names
    decides).
    """
    was = len(world.plugged)
    match random.randrange(4):
        case 0:
            total = random.randint(1, SLOTS)
            return {"ids": (), "total": total}, total
        case 1:
            ids = tuple(random.sample(range(1, SLOTS), random.randint(1, 3)))
            flags = random.choice((ENABLE, DISABLE))
            after = world.plugged | set(ids) if flags is ENABLE else world.plugged - set(ids)
            return {"ids": ids, "flags": flags}, len(after)
        case 2:
            flags = random.choice((ENABLE, DISABLE))
            request = {
                "ids": (random.randrange(2),),
                "flags": flags | NODE,
                "count": random.randint(1, 3),
            }
            # Of what is to be enabled, some may be plugged already: pending, or offline.
            return request, was + request["count"] if flags is ENABLE else was - request["count"]
        case _:
            enabled = {0, *random.sample(range(1, SLOTS), random.randint(0, SLOTS - 1))}
            return {"ids": (), "listed": listed(enabled, SLOTS), "fallback": False}, len(enabled)


@dataclass(frozen=True)
class Call:
    """One request: how many vCPUs were enabled before it, at most meanwhile, and after it."""

    request: dict[str, Any]
    #: As many as it wants.
    wanted: int
    plan: Plan
    before: int
    most: int
    after: int
    runs_on: frozenset[int]
    #: A vCPU that is to go stays.
    is_stuck: bool

    @property
    def is_obeyed(self) -> bool:
        return not (self.plan.refusals or self.is_stuck)


def random_calls(random: Random) -> Iterator[Call]:
    world = random_world(random)
    for _ in range(random.randint(1, 6)):
        request, wanted = random_request(random, world)
        before = len(world.plugged)
        made = world.plan(request)
        asked = {entity.id for entity in (*made.unplugs, *made.awaited)}
        most = before if made.refusals else world.carry_out(made)
        runs_on, is_stuck = frozenset(world.runs_on), bool(asked & world.stubborn)
        yield Call(request, wanted, made, before, most, len(world.plugged), runs_on, is_stuck)
        world.pending -= {n for n in world.pending if random.random() < 0.2}


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    random = Random(soaking.seed(19))
    return [call for _ in range(soaking.count(1000)) for call in random_calls(random)]


def of_kind(calls, *kinds):
    """Calls with one of these arguments that everybody obeyed."""
    return [
        call for call in calls if call.is_obeyed and any(kind in call.request for kind in kinds)
    ]


def test_never_more_are_enabled_than_there_were_or_are_wanted(calls):
    # A list is of single vCPUs: one that stays does not keep another one out.
    counted = [call for call in calls if "listed" not in call.request]
    assert [call for call in counted if call.most > max(call.before, call.wanted)] == []


def test_a_count_or_a_list_is_reached(calls):
    assert [call for call in of_kind(calls, "total", "listed") if call.after != call.wanted] == []


def test_what_a_count_or_a_list_wants_enabled_runs(calls):
    wanted = [
        ({n for n, on in call.plan.wants.items() if on}, call)
        for call in of_kind(calls, "total", "listed")
    ]
    assert [call for ids, call in wanted if not ids <= call.runs_on] == []


def test_calls_of_every_kind_were_tried(calls):
    plans = [call.plan for call in calls]
    kinds = [any(made.refusals for made in plans), any(made.awaited for made in plans)]
    assert [*kinds, any(made.onlines for made in plans), any(made.plugs for made in plans)] == [
        True
    ] * 4
