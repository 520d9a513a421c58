"""CPUs switched in the guest: short counts, errors, lies; undone as one transaction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.core.guest import GuestCpu, GuestView
from qmpvcpu.core.online import Answered, Look, Seen, SetCpus, Switch, SwitchStep


def view_of(online):
    """vCPU n is the guest's CPU n + 10."""
    cpus = tuple(GuestCpu(n + 10, on, True) for n, on in sorted(online.items()))
    return GuestView(cpus, {n: GuestCpu(n + 10, on, True) for n, on in online.items()})


class Agent:
    """Stops at the first error, keeps what it did; `broken` CPUs fail, `liars` say yes and do nothing."""

    def __init__(self, online, broken=(), liars=(), stuck=False):
        self.online = {n + 10: on for n, on in online.items()}
        self.broken, self.liars, self.stuck = {n + 10 for n in broken}, {n + 10 for n in liars}, stuck
        self.sets = []

    def answer(self, effect):
        if isinstance(effect, Look):
            return Seen([GuestCpu(n, on) for n, on in self.online.items()])
        self.sets.append(dict(effect.wanted))
        undoing = len(self.sets) > 1 and self.stuck
        done = 0
        for number, online in effect.wanted.items():
            if number in self.broken or undoing:
                return Answered(done) if done else Answered(error="Device or resource busy")
            if number not in self.liars:
                self.online[number] = online
            done += 1
        return Answered(done)

    def run(self, switch):
        effect, steps = switch.start(), 0
        while effect is not None:
            effect = switch.feed(self.answer(effect))
            steps += 1
            assert steps < 100
        assert switch.step is SwitchStep.DONE
        return switch


FOUR = {0: True, 1: True, 2: True, 3: True}


def test_all_in_one_command_and_one_look():
    agent = Agent(FOUR)
    run = agent.run(Switch(view_of(FOUR), (1, 3), False))
    assert (run.changed, run.failures, agent.sets) == ((1, 3), {}, [{11: False, 13: False}])


def test_what_is_so_already_is_not_asked():
    agent = Agent(FOUR)
    run = agent.run(Switch(view_of(FOUR), (1, 2), True))
    assert (run.changed, agent.sets) == ((), [])


def test_a_short_count_is_asked_for_its_reason_and_undone():
    agent = Agent(FOUR, broken=(2,))
    run = agent.run(Switch(view_of(FOUR), (1, 2, 3), False))
    assert (run.changed, run.undone, run.remaining) == ((), (1,), ())
    assert run.failures == {2: "Device or resource busy", 3: "not tried, since another one failed"}
    assert agent.online == {10: True, 11: True, 12: True, 13: True}


def test_the_first_one_that_fails_changes_nothing():
    agent = Agent(FOUR, broken=(1,))
    run = agent.run(Switch(view_of(FOUR), (1,), False))
    assert (run.changed, run.undone, run.failures) == ((), (), {1: "Device or resource busy"})


def test_an_agent_that_says_yes_and_does_nothing_is_not_believed():
    agent = Agent(FOUR, liars=(2,))
    run = agent.run(Switch(view_of(FOUR), (1, 2), False))
    assert (run.changed, run.undone, list(run.failures)) == ((), (1,), [2])


def test_what_cannot_be_undone_is_named():
    agent = Agent(FOUR, liars=(2,), stuck=True)
    run = agent.run(Switch(view_of(FOUR), (1, 2), False))
    assert (run.changed, run.undone, run.remaining) == ((1,), (), (1,))


def test_one_that_cannot_be_put_back_does_not_keep_the_others_from_it():
    class Sticky(Agent):
        def answer(self, effect):
            if isinstance(effect, SetCpus) and effect.wanted.get(11) is True:
                self.sets.append(dict(effect.wanted))
                return Answered(error="stays down")
            return super().answer(effect)

    agent = Sticky(FOUR, broken=(3,))
    run = agent.run(Switch(view_of(FOUR), (1, 2, 3), False))
    assert (run.changed, run.undone, run.remaining) == ((1,), (2,), (1,))
    assert run.undo_failures == {1: "stays down"}
    assert agent.online == {10: True, 11: False, 12: True, 13: True}


@pytest.mark.parametrize("count", [-1, 99, "2", None, True, 1.5, [], {}])
def test_a_count_that_cannot_be_counts_as_none(count):
    switch = Switch(view_of(FOUR), (1, 2), False)
    switch.start()
    effect = switch.feed(Answered(count))
    while effect is not None:
        effect = switch.feed(
            Seen([GuestCpu(n + 10, True) for n in FOUR]) if isinstance(effect, Look) else Answered(0)
        )
    assert (switch.changed, set(switch.failures)) == ((), {1, 2})


@given(
    online=st.dictionaries(st.integers(0, 7), st.booleans(), min_size=1),
    target=st.booleans(),
    broken=st.sets(st.integers(0, 7)),
    liars=st.sets(st.integers(0, 7)),
    stuck=st.booleans(),
)
def test_whatever_the_guest_does_what_is_told_is_what_is(online, target, broken, liars, stuck):
    agent = Agent(online, broken, liars, stuck)
    run = agent.run(Switch(view_of(online), sorted(online), target))
    now = {n - 10: on for n, on in agent.online.items()}
    changed = {n for n in online if now[n] is not online[n]}
    assert set(run.changed) == changed
    assert not run.failures or set(run.remaining) == changed
    if not run.failures:
        assert all(on is target for on in now.values())
    assert not set(run.undone) & changed


def test_effects_are_data():
    assert Switch(view_of(FOUR), (1,), False).start() == SetCpus({11: False})
