"""A saved file and a cookie supply a machine, and never a program, a command line, a socket or a
path.
"""

from __future__ import annotations

import os

import pytest

from tests.qemu.test_migrate_real import SPARSE, names, started
from tests.support import saving
from tests.support.commands import cli
from tests.support.monitor import connected
from tests.support.started import folder_of

pytestmark = pytest.mark.qemu
__all__ = ["started"]

SPACE = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"


@pytest.fixture
def evil(tmp_path):
    """A program that leaves a trace."""
    path = tmp_path / "evil"
    path.write_text(f"#!/bin/sh\ntouch {tmp_path}/trace\nexit 1\n")
    path.chmod(0o755)
    yield path
    assert not (tmp_path / "trace").exists()


@pytest.fixture
async def saved(started, tmp_path, monkeypatch):
    """The guest 'one' in a file, on a host that does not know it."""
    file = tmp_path / "saved"
    assert (await cli("save", "one", str(file))).code == 0
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "other"))
    return file


def with_devices(file, new, text):
    """The same with more in its domain."""
    saving.write_again(file, new, lambda cookie: cookie.replace(b"</os>", b"</os>" + text.encode()))


async def test_a_program_in_a_file_is_not_started(saved, evil, tmp_path):
    bad = tmp_path / "bad"
    with_devices(saved, bad, f"<devices><emulator>{evil}</emulator></devices>")
    run = await cli("restore", str(bad), "--json")
    assert run.code == 0 and run.json["vcpus"] == [0, 1, 5], run.stdout + run.stderr
    shown = (await cli("dumpxml", "one", "--inactive")).stdout
    assert str(evil) not in shown and "qemu-system-x86_64</emulator>" in shown
    await cli("destroy", "one")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            f"<qemu:commandline {SPACE}><qemu:arg value='-chardev'/>"
            "<qemu:arg value='file,id=x,path=TRACE'/></qemu:commandline>",
            "<qemu:commandline>",
        ),
        ("<devices><disk type='file'><source file='/etc/hostname'/></disk></devices>", "<disk>"),
        (
            "<metadata><m:machine xmlns:m='urn:qmpvcpu:machine:1'>"
            "<m:memory id='pc.ram' type='memory-backend-file'>"
            "<m:option name='mem-path' value='TRACE'/></m:memory></m:machine></metadata>",
            "memory in memory-backend-file",
        ),
    ],
)  # fmt: skip
async def test_paths_and_command_lines_in_a_file_are_refused(saved, evil, text, part, tmp_path):
    bad = tmp_path / "bad"
    with_devices(saved, bad, text.replace("TRACE", str(tmp_path / "trace")))
    run = await cli("restore", str(bad), "--json")
    assert run.code == 3 and f"{part}: a file must not supply" in run.json["error"]["message"], (
        run.stdout
    )
    assert await names() == {}
    # And as a cookie.
    cookie = tmp_path / "cookie"
    cookie.write_bytes(saving.content(bad)[0])
    run = await cli("migrate-prepare", str(cookie), "one", "--json")
    assert run.code == 3 and f"{part}: a file must not supply" in run.json["error"]["message"], (
        run.stdout
    )


async def memory(name) -> int:
    async with connected(str(folder_of(name) / "qmp2")) as qmp:
        return (await qmp.command("query-memory-size-summary"))["base-memory"]


async def test_restore_takes_the_machine_of_the_file_and_not_of_the_definition_of_today(
    started, tmp_path
):
    file = tmp_path / "saved"
    before = await memory("one")
    assert (await cli("save", "one", str(file))).code == 0
    changed = tmp_path / "changed.xml"
    changed.write_text(
        SPARSE.replace("<vcpu", "<memory unit='MiB'>192</memory><vcpu", 1).replace("q35", "pc")
    )
    assert (await cli("define", str(changed))).code == 0
    run = await cli("restore", str(file), "--json")
    assert run.code == 0, run.stdout + run.stderr
    assert await memory("one") == before


async def test_devices_are_of_the_users_own_definition(saved, evil, tmp_path):
    bad, defined = tmp_path / "bad", tmp_path / "one.xml"
    rng = "<qemu:arg value='-device'/><qemu:arg value='virtio-rng-pci,addr=0x9'/>"
    line = f"<qemu:commandline {SPACE}>{{}}</qemu:commandline>"
    with_devices(saved, bad, line.format("<qemu:arg value='-no-such-option'/>"))
    assert (await cli("define", str(defined))).code == 0
    run = await cli("restore", str(bad), "--json")
    assert run.code == 0, run.stdout + run.stderr
    assert (await cli("destroy", "one")).code == 0
    # What it is compared with is what ran.
    defined.write_text(SPARSE.replace("</domain>", line.format(rng) + "</domain>"))
    assert (await cli("define", str(defined))).code == 0
    run = await cli("restore", str(bad), "--json")
    assert (
        run.code == 3
        and "device virtio-rng-pci: none at the source, 1" in run.json["error"]["message"]
    )
    assert await names() == {"one": False}


async def scheduler(name) -> int:
    """Of the thread of vCPU 0."""
    async with connected(str(folder_of(name) / "qmp2")) as qmp:
        return os.sched_getscheduler((await qmp.command("query-cpus-fast"))[0]["thread-id"])


async def test_a_place_on_the_host_is_of_the_users_own_definition(saved, tmp_path):
    tune = "<cputune><vcpusched vcpus='0' scheduler='{}'/></cputune>"
    placed, defined = tmp_path / "placed", tmp_path / "one.xml"
    with_devices(saved, placed, tune.format("idle"))
    run = await cli("restore", str(placed), "--json")
    assert run.code == 0 and any("<cputune>: left out" in text for text in run.json["messages"]), (
        run.stdout
    )
    assert await scheduler("one") == os.SCHED_OTHER
    assert "cputune" not in (await cli("dumpxml", "one", "--inactive")).stdout
    assert (await cli("destroy", "one")).code == 0
    defined.write_text(SPARSE.replace("</domain>", tune.format("batch") + "</domain>"))
    assert (await cli("define", str(defined))).code == 0
    run = await cli("restore", str(placed), "--json")
    assert run.code == 0 and not any("left out" in text for text in run.json["messages"]), (
        run.stdout
    )
    assert await scheduler("one") == os.SCHED_BATCH
    assert (await cli("destroy", "one")).code == 0
    # And as a cookie.
    cookie = tmp_path / "cookie"
    cookie.write_bytes(saving.content(placed)[0])
    run = await cli("migrate-prepare", str(cookie), "one", "--json")
    assert run.code == 0 and await scheduler("one") == os.SCHED_BATCH, run.stdout
    assert (await cli("destroy", "one")).code == 0 and (await cli("undefine", "one")).code == 0
    run = await cli("migrate-prepare", str(cookie), "one", "--json")
    assert run.code == 0 and any("<cputune>: left out" in text for text in run.json["messages"]), (
        run.stdout
    )
    assert await scheduler("one") == os.SCHED_OTHER
