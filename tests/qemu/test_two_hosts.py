"""Two hosts, as network namespaces: the source's QEMU reaches the destination's only over TCP."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from contextlib import asynccontextmanager

import pytest

from tests.qemu.test_migrate_real import plugged, runs
from tests.support.commands import Run, cli
from tests.support.qemus import qemu_binary, running

pytestmark = pytest.mark.qemu


@pytest.fixture
def hosts():
    """Names of two, the first with address 10.81.0.1 and the second with 10.81.0.2."""
    names = [f"qmpvcpu-{uuid.uuid4().hex[:8]}" for _ in range(2)]

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "v0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "v1",
            "netns",
            names[1],
        )
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.81.0.{number + 1}/24", "dev", f"v{number}")
            for link in ("lo", f"v{number}"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@asynccontextmanager
async def qemu_on(host, folder, *extra):
    """A QEMU in a namespace; its unix sockets are reached from everywhere, its network is not."""
    script = folder / f"qemu-{host}"
    script.write_text(
        f'#!/bin/sh\nexec ip netns exec {host} {qemu_binary("10.0", "x86_64")} "$@"\n'
    )
    script.chmod(0o755)
    words = [
        "-nodefaults",
        "-display",
        "none",
        "-no-user-config",
        "-accel",
        "tcg,thread=multi",
        "-machine",
        "q35",
    ]
    words += ["-smp", "2,maxcpus=8", "-m", "128", *extra]
    async with running(str(script), words, monitors=("qmp", "qmp2")) as qemu:
        yield qemu


async def cli_on(host, *words) -> Run:
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "qmpvcpu", *words]
    run = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    return Run(run.returncode, run.stdout, run.stderr)


async def test_over_the_network(hosts, tmp_path):
    here, there = hosts
    monitor = ("-qmp", "tcp:10.81.0.2:4444,server=on,wait=off")
    async with (
        qemu_on(here, tmp_path) as source,
        qemu_on(there, tmp_path, "-incoming", "defer", *monitor) as target,
    ):
        assert (await cli("setvcpu", source.qmp, "5", "--enable")).code == 0
        run = await cli_on(here, "migrate", source.qmp, "10.81.0.2:4444", "--json")
        assert run.code == 0, run.stdout + run.stderr
        assert (
            run.json["vcpus"] == [0, 1, 5]
            and await runs(target)
            and await plugged(target) == (0, 1, 5)
        )


async def test_a_network_that_is_not_there_is_told_and_the_guest_goes_on(hosts, tmp_path):
    here, there = hosts
    async with (
        qemu_on(here, tmp_path) as source,
        qemu_on(there, tmp_path, "-incoming", "defer") as target,
    ):
        run = await cli("migrate", source.qmp, target.qmp, "--uri", "tcp:127.0.0.1:0", "--json")
        assert run.code == 8 and "goes on at the source" in run.json["error"]["message"], run.stdout
        assert await runs(source) and not (await source.execute("query-migrate")).get("ram")
