"""Ctrl-C and TERM at any moment of a command: one JSON document, and an exit code that says what is
true.
"""

from __future__ import annotations

import random
import signal

import pytest

from tests.support.fake_qemu import FakeQemu
from tests.support.fake_qmp import serve
from tests.support.shells import noise, shell
from tests.support.signals import interrupted_after
from tests.support.soaking import count, seed

#: A command on a scripted QEMU takes this long on a machine that has nothing else to do, seconds.
LIFE = 0.4
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


async def plugged_and_interrupted(folder, seconds, number):
    """What a plug said that was sent a signal, and whether the vCPU is there."""
    qemu = FakeQemu(plugged=(1,))
    async with serve(folder, qemu.script) as path:
        run = await interrupted_after(seconds, number, "--json", "setvcpu", path, "2", "--enable")
    return run, 2 in qemu.plugged_ids


def check(run, number, is_plugged):
    """The exit code, the document and what is plugged belong together."""
    assert not noise(run.stderr), run.stderr
    document = run.json
    assert run.code in (0, CODES[number])
    if run.code == 0:
        assert (document["outcome"], is_plugged) == ("applied", True)
    else:
        assert document["error"]["type"] == "KeyboardInterrupt"
        assert is_plugged <= (
            2 in {*document["changed_ids"], *document["pending"], *document["unsure"]}
        )


async def test_a_signal_at_any_moment_gives_one_document_and_a_true_exit_code(tmp_path):
    """`scripts/soak signals` is this with more of them."""
    number_of = random.Random(seed())
    for _ in range(count(12)):
        number, seconds = number_of.choice(list(CODES)), number_of.uniform(0, LIFE)
        run, is_plugged = await plugged_and_interrupted(tmp_path, seconds, number)
        try:
            check(run, number, is_plugged)
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"{number.name} after {seconds:.4f} s: {run}") from error


@pytest.mark.parametrize("words", ["list", "doctor --json", "--help", "completion bash", "setvcpu"])
async def test_a_signal_at_the_first_line_of_a_command_is_an_interrupt_or_comes_too_late(words):
    run = await interrupted_after(0, signal.SIGINT, *words.split())
    assert (run.code in (0, 2, 130), noise(run.stderr)) == (True, [])


# -- few descriptors -------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [8, 12, 20, 26])
async def test_with_few_descriptors_a_command_is_refused_before_it_touches_anything(
    tmp_path, limit
):
    qemu = FakeQemu()
    async with serve(tmp_path, qemu.script) as path:
        run = await shell(f'ulimit -n {limit}; qmpvcpu --json setvcpu "$1" 2 --enable', path)
    assert (run.code, run.json["error"]["refusals"][0]["code"]) == (3, "descriptors")
    assert "ulimit -n" in run.json["error"]["hint"]
    assert qemu.commands == []


async def test_with_enough_descriptors_a_command_is_done(tmp_path):
    qemu = FakeQemu()
    async with serve(tmp_path, qemu.script) as path:
        run = await shell('ulimit -n 28; qmpvcpu --json setvcpu "$1" 2 --enable', path)
    assert (run.code, qemu.plugged_ids) == (0, [0, 2])
