"""A real libvirtd takes what `define` and `dumpxml --dialect libvirt` write, and gives back the
same `<vcpus>`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.qemu.test_definition_real import NODES, SMP
from tests.support.commands import cli
from tests.support.qemus import group, paused
from tests.support.waiting import until

pytestmark = pytest.mark.qemu

NOBODY = 65534


@pytest.fixture(scope="module")
async def virsh() -> AsyncIterator:
    """`virsh` on a session daemon of an ordinary user's: it needs no rights, and nothing of the
    system's.
    """
    folder = Path(tempfile.mkdtemp(prefix="qmpvcpu-libvirt-"))
    environment = os.environ | {"HOME": str(folder)}
    for name in ("runtime", "config", "cache"):
        (folder / name).mkdir(mode=0o700)
        environment[f"XDG_{name.upper()}_{'DIR' if name == 'runtime' else 'HOME'}"] = str(
            folder / name
        )
    words = ["libvirtd"]
    if os.geteuid() == 0:
        for path in (folder, *folder.iterdir()):
            os.chown(path, NOBODY, NOBODY)
        words = [
            "setpriv",
            "--reuid",
            str(NOBODY),
            "--regid",
            str(NOBODY),
            "--clear-groups",
            *words,
        ]
    daemon = await asyncio.create_subprocess_exec(
        *words,
        env=environment,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=(folder / "log").open("wb"),
    )
    socket = folder / "runtime" / "libvirt" / "libvirt-sock"

    async def run(*words):
        process = await asyncio.create_subprocess_exec(
            *("virsh", "-q", "-c", f"qemu+unix:///session?socket={socket}", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        stdout, stderr = await process.communicate()
        assert process.returncode == 0, (stderr.decode(), (folder / "log").read_text()[-2000:])
        return stdout.decode()

    try:
        await until(
            lambda: socket.exists() or daemon.returncode is not None, "libvirtd's socket is there"
        )
        assert daemon.returncode is None, (folder / "log").read_text()
        yield run
    finally:
        if daemon.returncode is None:
            daemon.terminate()
        await daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def said(xml):
    """What a domain says of its vCPUs."""
    root = ElementTree.fromstring(xml)
    vcpu = root.find("vcpu")
    return vcpu.text.strip(), vcpu.attrib.get("current"), [row.attrib for row in root.find("vcpus")]


@pytest.mark.parametrize(
    ("arch", "smp", "extra", "ids"),
    [
        pytest.param("x86_64", SMP, NODES, "5", marks=group("x86_64", "7.2"), id="numa"),
        pytest.param("x86_64", "2,maxcpus=4", (), "3", marks=group("x86_64", "7.2"), id="x86_64"),
        pytest.param(
            "ppc64",
            "1,cores=4,threads=1,maxcpus=4",
            (),
            "2",
            marks=group("x86_64", "7.2"),
            id="ppc64",
        ),
        pytest.param("s390x", "1,maxcpus=4", (), "2", marks=group("x86_64", "7.2"), id="s390x"),
    ],
)
async def test_virsh_takes_it_and_gives_back_the_same_vcpus(
    virsh, tmp_path, monkeypatch, arch, smp, extra, ids
):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path))
    async with paused(arch, "7.2", smp, extra) as qemu:
        assert (await cli("define", "web1", "--qmp", qemu.qmp)).code == 0
        run = await cli("setvcpu", "web1", ids, "--enable", "--live", "--config", "--json")
        assert run.json["outcome"] == "applied"
        live = (await cli("dumpxml", "web1", "--dialect", "libvirt")).stdout
    config = (await cli("dumpxml", "web1", "--inactive")).stdout
    rfc = tmp_path / "rfc.xml"
    rfc.write_text((await cli("dumpxml", "web1", "--inactive", "--dialect", "rfc")).stdout)
    from_rfc = (await cli("dumpxml", str(rfc), "--dialect", "libvirt")).stdout
    for xml in (live, config, from_rfc):
        file = tmp_path / "d.xml"
        file.write_text(xml)
        await virsh("define", "--validate", str(file))
        back = await virsh("dumpxml", "--inactive", "web1")
        assert said(back) == said(xml)
        # And what libvirt writes is read, and has the same vCPUs.
        theirs = tmp_path / "theirs.xml"
        theirs.write_text(back)
        again = (await cli("dumpxml", str(theirs), "--dialect", "libvirt")).stdout
        assert said(again) == said(xml)
        await virsh("undefine", "web1")
