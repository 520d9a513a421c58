"""CPUs switched in the guest: short counts, errors, lies; undone as one transaction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.agent_switch import Declined, Switched, begins, switch

BUSY = "Device or resource busy"
NOT_TRIED = "not tried, because another one failed"
NOT_SAID = "the guest did not change it, and gave no reason"


class Agent:
    """vCPU n is the guest's CPU n + 10. It stops at the first error and keeps what it did; `broken`
    CPUs fail, `liars` say yes and do nothing, one that is `stuck` takes nothing back, nor do
    `sticky` CPUs come up again.
    """

    def __init__(self, online, broken=(), liars=(), stuck=False, sticky=()):
        self.online = {n + 10: on for n, on in online.items()}
        self.broken, self.liars, self.sticky = (
            {n + 10 for n in some} for some in (broken, liars, sticky)
        )
        self.stuck = stuck
        self.sets = []

    def get(self):
        return dict(self.online)

    def set(self, wanted):
        self.sets.append(wanted)
        undoing = len(self.sets) > 1 and self.stuck
        done = 0
        for number, online in wanted.items():
            if online and number in self.sticky:
                raise Declined("stays down")
            if number in self.broken or undoing:
                if done:
                    return done
                raise Declined(BUSY)
            if number not in self.liars:
                self.online[number] = online
            done += 1
        return done

    def switch(self, vcpus, online):
        return switch({number - 10: number for number in self.online}, vcpus, online, self)


FOUR = {0: True, 1: True, 2: True, 3: True}


def done(*vcpus):
    return Switched(vcpus, (), (), {}, {})


def test_one_that_is_online_whichever_cpu_it_is_needs_no_switch():
    assert not begins({}, [1], all_online=[1])
    assert begins({2: 12}, [1, 2], all_online=[1])


def test_all_change():
    assert Agent(FOUR).switch((1, 3), False) == done(1, 3)


def test_all_go_in_one_command():
    agent = Agent(FOUR)
    agent.switch((1, 3), False)
    assert agent.sets == [{11: False, 13: False}]


def test_what_is_so_already_has_not_changed():
    assert Agent(FOUR).switch((1, 2), True) == done()


def test_what_is_so_already_is_not_asked():
    agent = Agent(FOUR)
    agent.switch((1, 2), True)
    assert agent.sets == []


def test_only_what_is_not_so_already_is_asked():
    agent = Agent(FOUR | {2: False})
    agent.switch((1, 2), False)
    assert agent.sets == [{11: False}]


def test_a_short_count_is_asked_for_its_reason_and_undone():
    end = Agent(FOUR, broken=(2,)).switch((1, 2, 3), False)
    assert end == Switched((), (1,), (), {2: BUSY, 3: NOT_TRIED}, {})


def test_after_a_short_count_the_guest_is_as_it_was():
    agent = Agent(FOUR, broken=(2,))
    agent.switch((1, 2, 3), False)
    assert agent.online == {10: True, 11: True, 12: True, 13: True}


def test_the_first_one_that_fails_changes_nothing():
    assert Agent(FOUR, broken=(1,)).switch((1,), False) == Switched((), (), (), {1: BUSY}, {})


def test_an_agent_that_says_yes_and_does_nothing_is_not_believed():
    assert Agent(FOUR, liars=(2,)).switch((1, 2), False) == Switched(
        (), (1,), (), {2: NOT_SAID}, {}
    )


def test_what_was_so_already_and_is_no_longer_is_a_failure():
    """A guest that means harm, or that does it by itself meanwhile."""

    class Fickle(Agent):
        def set(self, wanted):
            self.online[12] = False
            return super().set(wanted)

    end = Fickle(FOUR | {1: False}).switch((1, 2), True)
    assert end == Switched((), (1,), (), {2: NOT_SAID}, {})


def test_what_cannot_be_undone_is_named():
    end = Agent(FOUR, liars=(2,), stuck=True).switch((1, 2), False)
    assert end == Switched((1,), (), (1,), {2: NOT_SAID}, {1: BUSY})


def test_one_that_cannot_be_put_back_is_named_with_its_reason():
    end = Agent(FOUR, broken=(3,), sticky=(1,)).switch((1, 2, 3), False)
    assert end == Switched((1,), (2,), (1,), {3: BUSY}, {1: "stays down"})


def test_one_that_cannot_be_put_back_does_not_keep_the_others_from_it():
    agent = Agent(FOUR, broken=(3,), sticky=(1,))
    agent.switch((1, 2, 3), False)
    assert agent.online == {10: True, 11: False, 12: True, 13: True}


@pytest.mark.parametrize("count", [-1, 99, "2", None, True, 1.5, [], {}])
def test_a_count_that_cannot_be_counts_as_none(count):
    class Nonsense(Agent):
        """Does nothing, and says so in its own way."""

        def set(self, wanted):
            self.sets.append(wanted)
            return count if len(self.sets) == 1 else 0

    end = Nonsense(FOUR).switch((1, 2), False)
    assert (end.changed, set(end.failures)) == ((), {1, 2})


SOME = st.sets(st.integers(0, 7))
any_guest_does_anything = given(
    online=st.dictionaries(st.integers(0, 7), st.booleans(), min_size=1),
    target=st.booleans(),
    broken=SOME,
    liars=SOME,
    stuck=st.booleans(),
)


def play(online, target, broken, liars, stuck):
    """What is told, what is so: the end, the vCPUs that changed by the guest's own list, that list."""
    agent = Agent(online, broken, liars, stuck)
    end = agent.switch(sorted(online), target)
    now = {number - 10: on for number, on in agent.online.items()}
    return end, {n for n in online if now[n] is not online[n]}, now


@any_guest_does_anything
def test_what_is_told_as_changed_is_what_changed(**guest):
    end, changed, _ = play(**guest)
    assert set(end.changed) == changed


@any_guest_does_anything
def test_what_changed_although_others_failed_is_told_as_remaining(**guest):
    end, changed, _ = play(**guest)
    assert not end.failures or set(end.remaining) == changed


@any_guest_does_anything
def test_without_a_failure_all_are_as_asked(**guest):
    end, _, now = play(**guest)
    assert end.failures or set(now.values()) == {guest["target"]}


@any_guest_does_anything
def test_what_is_undone_has_not_changed(**guest):
    end, changed, _ = play(**guest)
    assert changed.isdisjoint(end.undone)
