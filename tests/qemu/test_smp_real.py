"""Words of -machine, -smp and -numa held against real QEMUs: the same slots, or both refuse."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from qmpvcpu import ProbeMode, VcpuError, VcpuUsageError, find_layout
from tests.support.machines import has_machine_type, machine_types
from tests.support.qemus import matrix, qemu_binary
from tests.support.smp_words import (
    MACHINES,
    QEMUS,
    Answer,
    Case,
    answer_of,
    ask_all,
    generate,
    seen,
    work_out,
)
from tests.support.soaking import count, is_long_run, seed

pytestmark = pytest.mark.qemu

#: More, and others: `scripts/soak smp`. 2,000 more are recorded
#: (tests/unit/test_recorded_words.py).
EXAMPLES = 60
#: Every so many of them are also asked of a throwaway QEMU, in each mode.
PROBED = 10
#: How often each level and form must be there, of so many cases.
LEAST, MANY = 100, 5000


async def probed(case: Case, mode: ProbeMode) -> Answer:
    try:
        found = await find_layout(
            case.spec(),
            arch=case.arch,
            emulator=qemu_binary(case.version, case.arch),
            mode=mode,
            timeout=120,
        )
    except VcpuError as error:
        return Answer(None, error.message)
    return answer_of(found.layout)


async def differing_modes(
    cases: Sequence[Case], answers: Sequence[Answer]
) -> list[tuple[Case, str]]:
    """Asked, then known from before, then as arithmetic has it."""
    modes = (ProbeMode.ALWAYS, ProbeMode.ALWAYS, ProbeMode.AUTO, ProbeMode.NEVER)
    return [
        (case, f"{mode}: {mine}, and QEMU: {answer}")
        for case, answer in zip(cases, answers, strict=True)
        for mode in modes
        if (mine := await probed(case, mode)).digest != answer.digest
    ]


async def test_words_mean_what_they_mean_to_qemu(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_CACHE", str(tmp_path))
    cases = generate(count(EXAMPLES), seed())
    answers = await asyncio.to_thread(ask_all, cases)
    differing = []
    left = 0
    for case, answer in zip(cases, answers, strict=True):
        mine = work_out(case)
        # What arithmetic leaves to QEMU is refused where no QEMU may be asked.
        left += mine is None and answer.digest is not None
        if mine is not None and mine.digest != answer.digest:
            differing.append((case, f"{mine}, and QEMU: {answer}"))
    differing += await differing_modes(cases[::PROBED], answers[::PROBED])
    accepted = sum(answer.digest is not None for answer in answers)
    forms = seen(cases)
    print(
        f"{len(cases)} cases, {accepted} accepted, {left} left to QEMU, {len(differing)} differ;"
        f" {forms}"
    )
    assert not differing, "\n".join(f"{case}\n    {why}" for case, why in differing[:20])
    assert left <= len(cases) // 100
    assert accepted >= 0.4 * len(cases)
    if is_long_run() and len(cases) >= MANY // 10:
        rare = {
            name: number for name, number in forms.items() if number < LEAST * len(cases) // MANY
        }
        assert not rare


@matrix(*QEMUS)
async def test_machine_types_are_those_that_qemu_has(arch, version):
    has = await machine_types(arch, version)
    told = tuple(map(int, version.split(".")))
    for family in {
        name.rpartition("-")[0] for names in MACHINES[arch] for name in names if "." in name
    }:
        for major in range(1, 13):
            for minor in range(14):
                name = f"{family}-{major}.{minor}"
                assert has_machine_type(told, name) in (name in has, None), name


@pytest.mark.parametrize("version", ["7.2", "10.0"])
@pytest.mark.parametrize("mem", ["0x10M", ".015625G", "16", "0"])
async def test_sizes_of_each_version_in_each_mode(mem, version, tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_CACHE", str(tmp_path))
    case = Case("x86_64", version, (("machine", "pc-q35-5.0"), ("numa", f"node,mem={mem}")), 16)
    assert not await differing_modes([case], ask_all([case]))


@pytest.mark.parametrize("text", ["0b10", "0B11"])
def test_binary_numbers_are_refused_since_not_every_build_reads_them(text):
    """QEMU reads them where its C library does: the 11.1 of Debian sid, and not 7.2 and 10.0 of
    Debian 12.
    """
    cases = [
        Case("x86_64", version, (("machine", "q35"), ("smp", text)), 16)
        for version in ("7.2", "10.0", "11.1")
    ]
    assert [answer.digest is not None for answer in ask_all(cases)] == [False, False, True]
    with pytest.raises(VcpuUsageError):
        cases[0].spec()
