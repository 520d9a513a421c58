"""Guests in files: whole or not there, and a guest that could not be saved goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path

import pytest

import qmpvcpu
from tests.qemu.test_migrate_real import (
    CELLS,
    dead,
    ended,
    machine,
    names,
    plugged,
    runs,
    slowly,
    started,
    until_active,
    waiting,
)
from tests.support import moments, saving
from tests.support.commands import cli, start_cli
from tests.support.processes import send
from tests.support.qemus import Qemu
from tests.support.store import ROOT, in_child
from tests.support.waiting import until

pytestmark = pytest.mark.qemu
__all__ = ["started"]


@pytest.mark.parametrize("version", CELLS)
async def test_a_sparse_guest_in_a_file_and_back(version, tmp_path):
    file = tmp_path / "saved"
    file.write_text("something else")
    async with (
        machine(version) as source,
        waiting(version=version) as target,
        waiting(version=version) as again,
    ):
        async with qmpvcpu.connect(qmp=source.qmp) as domain:
            for number in (6, 3):
                await domain.enable(number)
        run = await cli("save", source.qmp, str(file), "--json")
        assert run.code == 0, run.stdout + run.stderr
        assert run.json["vcpus"] == [0, 1, 3, 6] and run.json["size"] == file.stat().st_size
        assert await ended(source) and os.listdir(tmp_path) == ["saved"]
        assert file.stat().st_mode & 0o777 == 0o600
        # The file stays, and is good for as many.
        for one in (target, again):
            run = await cli("restore", str(file), one.qmp, "--json")
            assert run.code == 0, run.stdout + run.stderr
            assert run.json["vcpus"] == [0, 1, 3, 6] and run.json["running"] is True
            assert await runs(one) and await plugged(one) == (0, 1, 3, 6)


async def test_by_name_over_a_reboot(started, tmp_path):
    file = tmp_path / "saved"
    assert (await cli("setvcpu", "one", "6", "--enable", "--live")).code == 0
    run = await cli("save", "one", str(file), "--json")
    assert run.code == 0 and run.json["vcpus"] == [0, 1, 5, 6], run.stdout + run.stderr
    assert await names() == {"one": False}
    run = await cli("restore", str(file), "--json")
    assert run.code == 0 and run.json["vcpus"] == [0, 1, 5, 6], run.stdout + run.stderr
    assert await names() == {"one": True}
    assert (await cli("vcpucount", "one", "--active", "--live")).stdout.strip() == "4"
    assert "id='6'" not in (await cli("dumpxml", "one", "--inactive")).stdout
    run = await cli("restore", str(file), "--json")
    assert run.code == 3 and "it is already running" in run.json["error"]["message"]
    assert (await cli("destroy", "one")).code == 0
    assert (await cli("undefine", "one")).code == 0
    # Nothing but the file is left of it, and that is enough.
    assert (await cli("restore", str(file))).code == 0
    assert await names() == {"one": True}


DAMAGES = {
    "a RAM block": (
        b"pc.ram",
        b"pc.rum",
        False,
        "another machine: RAM block 'pc.ram': none at the source",
    ),
    "device state": (
        b"cpu_common",
        b"cpu_commoN",
        True,
        "a second QEMU cannot read the saved guest: .*cpu_commoN",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
async def test_what_is_not_the_guest_is_found_before_it_ends(what, started, tmp_path):
    """As if QEMU, or the disk, had written something else."""
    old, new, verify, words = DAMAGES[what]
    folder = tmp_path / "files"
    folder.mkdir()

    def damage():
        (file,) = folder.iterdir()
        data = file.read_bytes()
        at = data.index(old, data.index(b"QEVM"))
        with file.open("r+b") as written:
            written.seek(at)
            written.write(new)

    async with qmpvcpu.connect("one") as domain:
        with (
            moments.around("the file is synced", after=damage),
            pytest.raises(qmpvcpu.VcpuFailed, match=words),
        ):
            await saving.save(domain, folder / "saved", verify=verify)
        assert os.listdir(folder) == [] and await names() == {"one": True}
        # Nothing of the guest's was taken by the second one.
        await saving.save(domain, folder / "saved", verify=True)
    assert os.listdir(folder) == ["saved"] and await names() == {"one": False}


async def test_a_pending_unplug_travels_and_is_pending_for_the_new_process(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    file = str(tmp_path / "saved")
    async with machine("11.1") as source, waiting(version="11.1") as target:
        async with qmpvcpu.connect(qmp=source.qmp) as domain:
            await domain.enable([3, 6])
            assert (await domain.disable(6, timeout=0)).pending == (6,)
        # The guest goes on with it: a migration that does not pause it is refused.
        run = await cli("migrate-begin", source.qmp, "--json")
        assert run.code == 3 and "its unplug is pending" in run.json["error"]["message"]
        run = await cli("save", source.qmp, file, "--json")
        assert run.code == 0 and run.json["vcpus"] == [0, 1, 3, 6], run.stdout
        assert (await cli("restore", file, target.qmp)).code == 0
        rows = (await cli("vcpuinfo", target.qmp, "--json")).json["vcpus"]
        assert [row["id"] for row in rows if row["pending"]] == [6]


async def test_a_guest_that_has_shut_down_is_not_saved(tmp_path):
    file = tmp_path / "saved"
    async with machine(extra=["-action", "reboot=shutdown,shutdown=pause"]) as source:
        await source.execute("system_reset")
        await until(lambda: is_in(source, "shutdown"), "the guest has shut down")
        run = await cli("save", source.qmp, str(file), "--json")
        assert run.code == 3 and "runs again only after a reset" in run.json["error"]["message"], (
            run.stdout
        )
        assert await is_in(source, "shutdown") and not file.exists()


async def is_in(qemu: Qemu, state: str) -> bool:
    return (await qemu.execute("query-status"))["status"] == state


async def test_a_paused_guest_stays_paused(tmp_path):
    file = str(tmp_path / "saved")
    async with machine() as source, waiting() as target:
        await source.execute("stop")
        assert (await cli("save", source.qmp, file)).code == 0
        run = await cli("restore", file, target.qmp, "--json")
        assert run.code == 0 and run.json["running"] is False and not await runs(target)


FULL = """
set -eu
mount -t tmpfs -o size=16m none "$DISK"
echo before >"$DISK/saved"
"$PYTHON" -m qmpvcpu save "$QMP" "$DISK/saved" --json || echo $?
mount -o remount,size=400m "$DISK"
code=0
"$PYTHON" -c "$FILLED" save "$QMP" "$DISK/saved" --json || code=$?
echo "$code"
rm "$DISK/filler"
cat "$DISK/saved"
ls -A "$DISK"
mount -o remount,ro "$DISK"
"$PYTHON" -m qmpvcpu save "$QMP" "$DISK/saved" --json || echo $?
"""

#: The command line, which finds room, and has none once it writes.
FILLED = """
import os, sys
from qmpvcpu.cli import main
from tests.support import moments

def fill():
    path = os.environ["DISK"] + "/filler"
    left = os.statvfs(os.environ["DISK"])
    os.posix_fallocate(os.open(path, os.O_WRONLY | os.O_CREAT), 0, left.f_bavail * left.f_frsize - 400_000)

with moments.before("the guest goes into the file", fill):
    sys.exit(main())
"""


@pytest.mark.parametrize("version", CELLS)
async def test_a_full_disk_and_the_guest_goes_on(version, tmp_path):
    async with machine(version) as source:
        environment = os.environ | {
            "DISK": str(tmp_path),
            "PYTHON": sys.executable,
            "QMP": source.qmp,
        }
        environment |= {"FILLED": FILLED, "PYTHONPATH": str(ROOT)}
        process = await start_process("unshare", "--mount", "sh", "-c", FULL, env=environment)
        stdout, stderr = (part.decode() for part in await process.communicate())
        small, unpaused, first, code, content, listed, second, refused = stdout.splitlines()
        assert unpaused == "3" and "its file system has" in small, stdout + stderr
        assert code == "8" and "the guest goes on" in first, stdout + stderr
        assert (content, listed) == ("before", "saved")
        assert refused == "3" and "Read-only file system" in second
        assert await runs(source)
        # And it can still be saved.
        assert (await cli("save", source.qmp, str(tmp_path / "saved"))).code == 0


async def start_process(*words, env):
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*words, env=env, stdout=pipe, stderr=pipe)


async def test_interrupted_it_goes_on(tmp_path):
    file = tmp_path / "saved"
    for _ in range(10):
        async with machine() as source:
            process = await start_cli("save", source.qmp, str(file))
            await until(lambda: os.listdir(tmp_path), "the file is made", every=0)
            send(process, signal.SIGINT)
            if await process.wait() == 130:
                assert await runs(source) and os.listdir(tmp_path) == []
                return
        # It was saved by then.
        file.unlink()
    pytest.fail("ten times it was saved before it could be interrupted")


async def test_interrupted_while_the_file_is_made_it_is_taken_away(tmp_path):
    """Made in a thread, which nothing can interrupt."""
    async with machine() as source, qmpvcpu.connect(qmp=source.qmp) as domain:
        with saving.hung_while_it_is_made() as (begun, go):
            task = asyncio.create_task(saving.save(domain, tmp_path / "saved"))
            await until(begun.is_set, "the file is being made")
            for _ in range(2):
                task.cancel()
                await asyncio.sleep(0.01)
            assert len(os.listdir(tmp_path)) == 1 and not task.done()
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert os.listdir(tmp_path) == [] and await runs(source)


async def test_what_cannot_be_written_to_the_end_leaves_no_file_and_the_guest_running(tmp_path):
    file = tmp_path / "saved"
    async with machine() as source:
        async with qmpvcpu.connect(qmp=source.qmp) as domain:
            cookie = await domain.migrate_begin()
            made = saving.File(file, b"cookie")
            try:
                with pytest.raises(
                    qmpvcpu.VcpuFailed, match="No space left on device; the guest goes on"
                ):
                    await domain.save(cookie, made.fd, made.offset, full)
                assert await runs(source)
            finally:
                made.discard()
        dead(source)
        run = await cli("save", source.qmp, str(file), "--json")
        assert run.code == 7 and os.listdir(tmp_path) == []


def full():
    raise OSError(28, "No space left on device")


async def test_what_is_no_saved_guest(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    async with machine() as source:
        assert (await cli("save", source.qmp, str(good))).code == 0
    data = good.read_bytes()
    for text, words in (
        (data[:-9] + bytes((data[-9] ^ 4,)) + data[-8:], "its SHA-256 digest differs"),
        (saving.of_the_first_format(data).replace(b"<qemu-mig", b"<<<<<<<<<", 1), "line 1"),
    ):
        bad.write_bytes(text)
        run = await cli("restore", str(bad), "/nowhere/qmp", "--json")
        assert run.code == 3 and words in run.json["error"]["message"], (words, run.stdout)
    assert (await cli("restore", str(tmp_path / "nowhere"), "--json")).code == 3
    # What has no digest, and is cut short, QEMU itself finds out, and the guest does not run.
    bad.write_bytes(saving.of_the_first_format(data)[: len(data) - 200_000])
    async with waiting() as target:
        run = await cli("restore", str(bad), target.qmp, "--json")
        assert run.code == 8 and "the file is as it was" in run.json["error"]["hint"], run.stdout
        assert await ended(target)


BEGUN = """
import os, signal, sys
from pathlib import Path
from tests.support.saving import File
File(Path(sys.argv[1]), b"c")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_save_left_is_swept(tmp_path):
    assert in_child(BEGUN, tmp_path / "saved") == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    saving.File(tmp_path / "saved", b"c").discard()
    assert not left.exists()


def test_a_file_that_qemu_has_not_written_is_not_whole(tmp_path):
    with pytest.raises(OSError, match="written nothing"):
        saving.File(tmp_path / "saved", b"c").finish()


@pytest.fixture
def made(tmp_path):
    """A file with six bytes of QEMU's, and what `finish` says of it."""
    made = saving.File(tmp_path / "saved", b"c")
    os.write(made.fd, b"stream")
    return made, made.finish()


def test_a_file_has_its_head_and_what_qemu_wrote(made):
    file, size = made
    assert size == file.offset + 6


def test_what_was_saved_is_read_again(made, tmp_path):
    assert saving.content(tmp_path / "saved") == (b"c", b"stream")


async def test_only_a_regular_file_is_replaced(tmp_path):
    folder, fifo = tmp_path / "folder", tmp_path / "fifo"
    folder.mkdir()
    os.mkfifo(fifo)
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    async with machine() as source:
        for path in (folder, fifo, link):
            run = await cli("save", source.qmp, str(path), "--json")
            assert run.code == 3 and "not a regular file" in run.json["error"]["message"], (
                run.stdout
            )
        assert await runs(source) and sorted(os.listdir(tmp_path)) == ["fifo", "folder", "link"]


async def test_cancelled_when_it_is_in_the_file_it_is_saved(tmp_path):
    file = tmp_path / "saved"
    async with machine() as source:
        async with qmpvcpu.connect(qmp=source.qmp) as domain:
            cookie = await domain.migrate_begin()
            made = saving.File(file, b"cookie")
            task, loop = asyncio.current_task(), asyncio.get_running_loop()

            def finish():
                made.finish()
                loop.call_soon_threadsafe(task.cancel)

            with pytest.raises(asyncio.CancelledError):
                await domain.save(cookie, made.fd, made.offset, finish)
            task.uncancel()
            made.discard()
        assert file.exists() and await ended(source)


async def test_qemu_is_silent_for_longer_than_it_may_and_the_guest_goes_on(tmp_path, monkeypatch):
    """As one does that waits for a disk."""
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    file = tmp_path / "saved"
    async with machine() as source:

        def stop():
            os.kill(source.pid, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(2.5, os.kill, source.pid, signal.SIGCONT)

        async with qmpvcpu.connect(qmp=str(source.folder / "qmp2"), command_timeout=1.0) as domain:
            with (
                moments.before("the guest goes into the file", stop),
                pytest.raises(qmpvcpu.VcpuConnectionError, match="the guest goes on"),
            ):
                await saving.save(domain, file)
            # Connected again.
            assert (await domain.state()).enabled_ids == (0, 1)
        assert await runs(source) and not file.exists()


DIES_SAVING = """
import asyncio, sys
from pathlib import Path
import qmpvcpu
from tests.support import moments, saving

async def main():
    moments.die(sys.argv[3], after=sys.argv[4] == "after")
    async with qmpvcpu.connect(qmp=sys.argv[1]) as domain:
        await saving.save(domain, Path(sys.argv[2]))

asyncio.run(main())
"""


@pytest.mark.parametrize("verify", [False, True])
async def test_cancelled_at_any_step_the_guest_goes_on(verify, started, tmp_path):
    steps = ("the guest goes into the file", "the file is synced", "the file is sealed")
    if verify:
        steps = ("a second QEMU reads the file",)
    folder = tmp_path / "files"
    folder.mkdir()
    loop = asyncio.get_running_loop()
    async with qmpvcpu.connect("one") as domain:
        for step, when in product(steps, ("before", "after")):
            task = asyncio.create_task(saving.save(domain, folder / "saved", verify=verify))
            act = partial(loop.call_soon_threadsafe, task.cancel)
            with moments.around(step, **{when: act}), pytest.raises(asyncio.CancelledError):
                await task
            assert os.listdir(folder) == [], (step, when)
            assert (await domain.state()).enabled_ids == (0, 1, 5) and await names() == {
                "one": True
            }, (step, when)


async def die_saving(source: Qemu, file: Path, moment: str, when: str) -> None:
    words = [sys.executable, "-c", DIES_SAVING, source.qmp, str(file), moment, when]
    assert await (await asyncio.create_subprocess_exec(*words, cwd=ROOT)).wait() == 9


KILLED_AT = [
    *(("the guest goes into the file", when) for when in ("before", "after")),
    *(("the file is sealed", when) for when in ("before", "after")),
]


@pytest.mark.parametrize("version", CELLS)
async def test_killed_while_it_saves_the_next_command_lets_the_guest_go_on(
    version, tmp_path, monkeypatch
):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    folder = tmp_path / "files"
    folder.mkdir()
    async with machine(version) as source:
        for moment, when in KILLED_AT if version == "10.0" else KILLED_AT[1:2]:
            await die_saving(source, folder / "saved", moment, when)
            assert not await runs(source), moment
            assert (await cli("vcpucount", source.qmp, "--active", "--live")).code == 0
            assert await runs(source) and os.listdir(folder) == [], moment
        assert (await cli("save", source.qmp, str(folder / "saved"))).code == 0


async def test_killed_when_the_guest_is_in_the_file_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    file = tmp_path / "saved"
    async with machine() as source, waiting() as target:
        await die_saving(source, file, "the file gets its name", "after")
        # It would run twice.
        run = await cli("restore", str(file), target.qmp, "--json")
        assert (run.code, "still exists" in run.json["error"]["message"]) == (3, True), run.stdout
        run = await cli("vcpucount", source.qmp, "--json")
        assert (run.code, f"is saved in '{file}'" in run.json["error"]["message"]) == (7, True), (
            run.stdout
        )
        assert await ended(source)
        assert (await cli("restore", str(file), target.qmp)).code == 0 and await runs(target)


async def test_killed_when_the_guest_is_in_the_file_and_let_run_by_its_user_both_stay(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    file = tmp_path / "saved"
    async with machine() as source:
        await die_saving(source, file, "the source ends", "before")
        await source.execute("cont")
        assert (await cli("vcpucount", source.qmp)).code == 0
        assert await runs(source) and saving.content(file)


async def test_a_qemu_that_dies_when_all_is_written_leaves_the_file(started, tmp_path):
    """Killed for want of memory, say: there is no guest but the one in the file."""
    pid = (await cli("list", "--json")).json["domains"][0]["pid"]
    async with qmpvcpu.connect("one") as domain:
        with moments.around("the file is sealed", after=lambda: os.kill(pid, signal.SIGKILL)):
            await saving.save(domain, tmp_path / "saved")
    assert saving.content(tmp_path / "saved")


async def test_paused_since_the_save_began_it_is_refused(tmp_path):
    async with machine() as source, qmpvcpu.connect(qmp=source.qmp) as domain:
        cookie = await domain.migrate_begin()
        await source.execute("stop")
        made = saving.File(tmp_path / "saved", b"cookie")
        with pytest.raises(qmpvcpu.VcpuRefused, match="was paused after this save began"):
            await domain.save(cookie, made.fd, made.offset, made.finish)
        made.discard()
        assert not await runs(source)


@pytest.mark.parametrize("capability", ["compress", "pause-before-switchover", "xbzrle"])
async def test_what_somebody_has_switched_on_for_migrations_is_off(capability, tmp_path):
    file = str(tmp_path / "saved")
    async with machine("7.2") as source, waiting(version="7.2") as target:
        switched = [{"capability": capability, "state": True}]
        await source.execute("migrate-set-capabilities", {"capabilities": switched})
        run = await cli("save", source.qmp, file, "--json")
        assert run.code == 0, run.stdout
        run = await cli("restore", file, target.qmp, "--json")
        assert run.code == 0 and await runs(target), run.stdout


async def test_a_definition_that_would_not_be_read_again_is_not_saved(started, tmp_path):
    document = (await cli("dumpxml", "one", "--inactive")).stdout
    file = tmp_path / "big.xml"
    file.write_text(
        document.replace("<memory", f"<description>{'x' * (9 << 19)}</description><memory", 1)
    )
    assert (await cli("define", str(file))).code == 0
    run = await cli("save", "one", str(tmp_path / "saved"), "--json")
    assert (run.code, "more than 8388608 bytes" in run.json["error"]["message"]) == (3, True), (
        run.stdout
    )
    assert await names() == {"one": True} and not (tmp_path / "saved").exists()


async def test_killed_while_memory_moves_that_is_ended_too(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    async with machine() as source, slowly(source):
        await die_saving(source, tmp_path / "saved", "the guest goes into the file", "before")
        await source.execute("migrate", {"uri": "exec:cat >/dev/null"})
        await until_active(source)
        assert (await cli("vcpucount", source.qmp, "--active", "--live")).code == 0
        assert await runs(source) and os.listdir(tmp_path) == ["state"]
        assert (await source.execute("query-migrate"))["status"] == "cancelled"


async def test_killed_while_it_saves_a_paused_guest_it_stays_paused(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    async with machine() as source:
        await source.execute("stop")
        await die_saving(source, tmp_path / "saved", "the file is sealed", "after")
        run = await cli("migrate-cancel", source.qmp, "--json")
        assert run.code == 0 and "is paused, as it was" in run.json["message"]
        assert not await runs(source) and os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("seconds", [0.05, 0.15])
async def test_killed_by_the_clock_the_guest_goes_on(tmp_path, monkeypatch, seconds):
    """As `kill -9` finds it."""
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    folder = tmp_path / "files"
    folder.mkdir()
    async with machine() as source:
        process = await start_cli("save", source.qmp, str(folder / "saved"))
        await until(lambda: os.listdir(folder), "the file is made", every=0)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), seconds)
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        run = await cli("vcpucount", source.qmp, "--active", "--live")
        if "saved" in os.listdir(folder):
            # It was told to end by then: all of the guest is in the file.
            assert await ended(source) and saving.content(folder / "saved")
            return
        assert run.stdout.strip() == "2" and await runs(source)
        # What was not begun under QEMU's hands is swept by the next save.
        assert (await cli("save", source.qmp, str(folder / "saved"))).code == 0
        assert os.listdir(folder) == ["saved"]


async def test_a_paused_guest_that_could_not_be_saved_is_paused_and_takes_vcpus(
    tmp_path, monkeypatch
):
    """QEMU says "postmigrate" of it, as of one that has been handed over."""
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    async with machine() as source:
        await source.execute("stop")
        async with qmpvcpu.connect(qmp=source.qmp) as domain:
            with (
                moments.before("the file is sealed", full),
                pytest.raises(
                    qmpvcpu.VcpuFailed,
                    match="No space left on device; the guest is paused, as it was",
                ),
            ):
                await saving.save(domain, tmp_path / "saved")
            assert (await domain.enable(3)).changed
        assert not await runs(source) and os.listdir(tmp_path) == ["state"]
        # So it is for the next process; QEMU itself does not migrate it until it has run.
        assert (await cli("setvcpu", source.qmp, "4", "--enable")).code == 0
        run = await cli("save", source.qmp, str(tmp_path / "saved"), "--json")
        assert run.code == 3 and "only after it has run" in run.json["error"]["message"]
        await source.execute("cont")
        await source.execute("stop")
        assert (await cli("save", source.qmp, str(tmp_path / "saved"))).code == 0


async def test_another_process_cancels_a_save_and_the_guest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    file = tmp_path / "saved"
    async with machine() as source:

        async def cancel():
            run = await cli("migrate-cancel", str(source.folder / "qmp2"), "--json")
            assert (
                run.code == 0
                and "the save was cancelled, and the guest goes on" in run.json["message"]
            )

        async with qmpvcpu.connect(qmp=source.qmp) as domain:
            with (
                moments.around("the guest goes into the file", after=cancel),
                pytest.raises(qmpvcpu.VcpuFailed, match="another client let the guest run"),
            ):
                await saving.save(domain, file)
        assert await runs(source) and not file.exists()
