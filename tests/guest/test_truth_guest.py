"""What a Linux guest does not run on counts as such: CPUs that its kernel has never taken online,
or was told to take offline. And one that OVMF with SMM has started gets no CPU that would hang it.
"""

from __future__ import annotations

import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.commands import cli
from tests.support.guests import BOOT, attached, boot, image_of, incoming, not_started
from tests.support.qemus import qemu_binary

pytestmark = pytest.mark.guest

#: Where no helper of the guest's own takes a new CPU online.
PLAIN = "qmpvcpu.selfonline=0"


@asynccontextmanager
async def started(arch, smp, append=PLAIN):
    arguments = ["-accel", "tcg,thread=multi", "-m", "512", "-smp", smp]
    async with boot(image_of(arch), qemu_binary("10.0", arch), arguments, append=append) as guest:
        yield guest


async def run(guest, *words):
    found = await cli("--json", "--agent", guest.agent, words[0], guest.qemu.qmp, *words[1:])
    assert found.code == 0, found.stdout + found.stderr
    return found.json


@pytest.mark.xdist_group("x86_64-10.0")
async def test_counts_take_cpus_online_that_linux_has_left_offline(tmp_path):
    async with started(
        "x86_64", "3,sockets=2,cores=8,threads=1,maxcpus=16", f"maxcpus=1 {PLAIN}"
    ) as guest:
        assert await guest.online() == "0"
        found = await run(guest, "setvcpus", "3")
        assert (found["mechanism"], found["changed_ids"]) == ("agent", [1, 2])
        assert await guest.online() == "0-2"

        await guest.shell("echo 0 > /sys/devices/system/cpu/cpu1/online")
        found = await run(guest, "setvcpus", "4")
        assert found["changed_ids"] == [1, 3]
        assert await guest.online() == "0-3"

        await guest.shell("for n in 1 2; do echo 0 > /sys/devices/system/cpu/cpu$n/online; done")
        file = tmp_path / "five.xml"
        rows = "".join(
            f"<vcpu id='{n}' state='{'enabled' if n < 5 else 'disabled'}'/>" for n in range(16)
        )
        file.write_text(
            f"<domain><name>d</name><vcpu current='5'>16</vcpu><vcpus>{rows}</vcpus></domain>"
        )
        assert sorted((await run(guest, "apply", str(file)))["changed_ids"]) == [1, 2, 4]
        assert await guest.online() == "0-4"


@pytest.mark.xdist_group("s390x-10.0")
async def test_on_s390x_a_count_that_rises_again_takes_the_same_cpus_online():
    async with started("s390x", "1,maxcpus=8") as guest:
        found = await run(guest, "setvcpu", "3,5", "--enable")
        assert (found["changed_ids"], found["pending_online"], found["messages"]) == (
            [3, 5],
            [],
            [],
        )
        assert await guest.online() == "0-2"
        found = await run(guest, "setvcpus", "1")
        assert (found["mechanism"], found["changed_ids"]) == ("agent", [3, 5])
        assert await guest.online() == "0"
        for words in (["--disable"], ["--guest", "--disable"], ["--disable", "--dry-run"]):
            text = await cli("--agent", guest.agent, "setvcpu", guest.qemu.qmp, "5", *words)
            assert (text.code, text.stdout.strip()) == (0, "vCPU 5: already offline in the guest")
        found = await run(guest, "setvcpus", "3")
        assert (found["mechanism"], found["changed_ids"]) == ("agent", [3, 5])
        assert await guest.online() == "0-2"
        rows = (await run(guest, "vcpuinfo"))["vcpus"]
        assert [(row["id"], row["online"]) for row in rows if row["state"] == "enabled"] == [
            (0, True),
            (3, True),
            (5, True),
        ]


def with_ovmf(folder):
    """Words for Debian's OVMF with SMM, whose variables are a copy in `folder`."""
    code = Path("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd")
    if not code.exists():
        pytest.fail(f"{code} is not here: scripts/setup")
    variables = folder / "vars"
    shutil.copy(code.with_name("OVMF_VARS_4M.fd"), variables)
    flash = ["-global", "driver=cfi.pflash01,property=secure,value=on"]
    flash += ["-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}"]
    flash += ["-drive", f"if=pflash,format=raw,unit=1,file={variables}"]
    machine = ["-machine", "smm=on", "-accel", "tcg,thread=multi", "-m", "256"]
    return [*machine, "-smp", "1,maxcpus=4", *flash]


@pytest.mark.xdist_group("x86_64-10.0")
async def test_a_guest_of_ovmf_with_smm_gets_cpus_only_before_it_runs(tmp_path):
    image, binary = image_of("x86_64"), qemu_binary("10.0", "x86_64")
    async with not_started(image, binary, with_ovmf(tmp_path)) as qemu:
        assert (await cli("setvcpu", qemu.qmp, "1", "--enable")).code == 0
        await qemu.execute("cont")
        async with attached(qemu) as guest:
            assert await guest.wait_online(2, timeout=BOOT) == "0-1"
            words = ("--json", "--agent", guest.agent, "setvcpu", qemu.qmp, "2", "--enable")
            run = await cli(*words)
            assert (run.code, run.json["outcome"]) == (3, "refused")
            assert "OVMF with SMM" in run.json["error"]["message"]
            assert (await cli(*words, "--force", "--dry-run")).json["refusals"] == []
            assert len(await qemu.execute("query-cpus-fast")) == 2
            assert await guest.online() == "0-1"


async def test_an_incoming_guest_of_ovmf_with_smm_gets_its_cpus_before_it_arrives(tmp_path):
    async with incoming(
        image_of("x86_64"), qemu_binary("10.0", "x86_64"), with_ovmf(tmp_path)
    ) as qemu:
        assert (await cli("setvcpu", qemu.qmp, "1", "--enable")).code == 0
