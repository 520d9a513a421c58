"""2,000 generated -machine, -smp and -numa: what arithmetic makes of them is what real QEMUs
answered.
"""

from __future__ import annotations

from tests.support.smp_words import read_recorded, seen, work_out

RECORDED = read_recorded()


def test_arithmetic_says_what_qemu_said():
    mine = [(case, work_out(case), answer) for case, answer in RECORDED]
    # What it leaves to QEMU (None) is nothing that it says.
    assert not [row for row in mine if row[1] is not None and row[1].digest != row[2].digest]


def test_next_to_nothing_is_left_to_qemu():
    left = [
        case for case, answer in RECORDED if answer.digest is not None and work_out(case) is None
    ]
    assert len(left) <= len(RECORDED) // 100


def test_there_are_many_of_each_kind():
    cases = [case for case, _ in RECORDED]
    assert (len(cases) >= 2000, [name for name, number in seen(cases).items() if number < 40]) == (
        True,
        [],
    )


def test_at_least_two_fifths_are_machines():
    assert sum(answer.digest is not None for _, answer in RECORDED) >= 0.4 * len(RECORDED)
