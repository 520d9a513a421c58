"""A libvirtd of our own: its guests outlive it, its QMP is read from its log, and nothing of it is
left behind.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import VcpuFailed, VcpuRefused, VcpuUsageError
from tests.support.libvirtds import daemon_of_our_own
from tests.support.qemus import group, qemu_binary
from tests.support.waiting import until, within

pytestmark = [pytest.mark.qemu, group("libvirtd", "9.0")]

NOBODY = 65534
#: The folders of root's libvirtd on the host; those of a libvirt of the system's stay as they are.
HOST = (
    "/run/libvirt",
    "/etc/libvirt",
    "/var/lib/libvirt",
    "/var/cache/libvirt",
    "/var/log/libvirt",
)
VCPUS = "".join(
    f"<vcpu id='{i}' enabled='{'yes' if i < 2 else 'no'}' hotpluggable='{'yes' if i else 'no'}'/>"
    for i in range(4)
)


def guest_xml(accel="qemu"):
    return f"""<domain type='{accel}'><name>web1</name><memory unit='MiB'>64</memory>
    <vcpu current='2'>4</vcpu><vcpus>{VCPUS}</vcpus>
    <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
    <cpu mode='custom' match='exact' check='none'><model>qemu64</model></cpu>
    <devices><emulator>{qemu_binary("7.2", "x86_64")}</emulator><memballoon model='none'/></devices></domain>"""


async def ask(uri, question):
    """What `question` says of a connection of libvirt-python's; its calls block."""
    libvirt = pytest.importorskip("libvirt")

    def run():
        connection = libvirt.open(uri)
        try:
            return question(connection)
        finally:
            connection.close()

    return await asyncio.to_thread(run)


def start_guest(connection, accel="qemu"):
    connection.defineXML(guest_xml(accel)).create()


def plug(connection):
    connection.lookupByName("web1").setVcpu("2", 1, 1)


def running(connection):
    return [
        (domain.name(), domain.vcpusFlags(1))
        for domain in connection.listAllDomains()
        if domain.isActive()
    ]


def on_the_host():
    """Which of libvirt's folders are there, and what of our guest is in them."""
    return {
        name: sorted(map(str, Path(name).rglob("*web1*"))) for name in HOST if Path(name).exists()
    }


def mounts_of(folder):
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line for line in lines if str(folder) in line or line.split()[1] in HOST]


def processes_of(folder, namespace=None):
    """Processes with this folder in the command line or an open file in it, or in this mount
    namespace.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            files = [os.readlink(file) for file in (entry / "fd").iterdir()]
            inside = namespace is not None and os.readlink(entry / "ns" / "mnt") == namespace
            if (
                inside
                or f"{folder}/" in (entry / "cmdline").read_text()
                or any(str(folder) in file for file in files)
            ):
                found.append((int(entry.name), (entry / "cmdline").read_bytes()[:100]))
    return found


async def test_guests_outlive_the_daemon_and_nothing_outlives_the_context():
    before = on_the_host()
    async with daemon_of_our_own(log_qmp=True) as daemon:
        folder, first = daemon.folder, daemon.pid
        await ask(daemon.uri, start_guest)
        since = daemon.log_position()
        await ask(daemon.uri, plug)
        plugged = daemon.qmp_commands(since)
        assert [message["execute"] for message in plugged][:1] == ["device_add"]
        assert plugged[0]["arguments"]["id"] == "vcpu2"
        for kill in (True, False):
            await daemon.restart(kill=kill)
            assert await ask(daemon.uri, running) == [("web1", 3)]
        assert daemon.pid != first
        await daemon.stop()
        assert not daemon.running
        await daemon.stop()
        await daemon.start()
        assert await ask(daemon.uri, running) == [("web1", 3)]
        namespace = os.readlink(f"/proc/{daemon.pid}/ns/mnt") if os.geteuid() == 0 else None
        names = b" ".join(command for _, command in processes_of(folder, namespace))
        assert b"libvirtd" in names and b"qemu-system" in names
        assert not mounts_of(folder)
    assert not processes_of(folder, namespace)
    assert not folder.exists()
    assert on_the_host() == before


async def test_two_at_once_and_kvm():
    async with daemon_of_our_own() as one, daemon_of_our_own() as other:
        accel = "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "qemu"
        await ask(one.uri, lambda connection: start_guest(connection, accel))
        assert await ask(one.uri, running) == [("web1", 2)]
        assert await ask(other.uri, running) == []
        with pytest.raises(VcpuUsageError):
            one.qmp_commands()
        with pytest.raises(VcpuUsageError, match="is running already"):
            await one.start()


async def run_elsewhere(code, *prefix, python=sys.executable):
    """Another Python that enters the context, prints its folder, and does what `code` says."""
    text = (
        "import asyncio, sys\n"
        "from tests.support.libvirtds import daemon_of_our_own\n"
        "from tests.qemu.test_libvirtd_real import *\n"
        "async def main():\n"
        "    async with daemon_of_our_own() as daemon:\n"
        "        await ask(daemon.uri, start_guest)\n"
        "        print(daemon.folder, daemon.keeper, daemon.pid, flush=True)\n"
        f"        {code}\n"
        "asyncio.run(main())\n"
    )
    return await asyncio.create_subprocess_exec(
        *prefix, python, "-c", text, cwd=Path(__file__).parents[2], stdout=asyncio.subprocess.PIPE
    )


@pytest.mark.parametrize("victim", ["us", "supervisor"])
async def test_a_kill_leaves_nothing(victim):
    process = await run_elsewhere(
        "await asyncio.Event().wait()"
        if victim == "us"
        else "await daemon.wait_for_the_keepers_end()"
    )
    line = await within(process.stdout.readline(), "its daemon runs")
    folder, supervisor, daemon = line.decode().split()
    namespace = os.readlink(f"/proc/{daemon}/ns/mnt") if os.geteuid() == 0 else None
    assert len(processes_of(folder, namespace)) >= 3
    os.kill(process.pid if victim == "us" else int(supervisor), signal.SIGKILL)
    assert (await process.wait() == -signal.SIGKILL) == (victim == "us")
    await until(
        lambda: not Path(folder).exists() and not processes_of(folder, namespace), "nothing is left"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_an_ordinary_users_session():
    """As nobody, with the system's Python and a copy of the package: ours may be where nobody
    cannot look.
    """
    base = Path(tempfile.mkdtemp(prefix="qmpvcpu-nobody-", dir="/tmp"))
    shutil.copytree(Path(qmpvcpu.__file__).parent, base / "qmpvcpu")
    subprocess.run(["chmod", "-R", "a+rX", str(base)], check=True)
    words = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")
    text = (
        "import asyncio\n"
        "from qmpvcpu.lab.libvirtd import run_libvirtd\n"
        "async def main():\n"
        "    async with run_libvirtd() as daemon:\n"
        "        process = await asyncio.create_subprocess_exec('virsh', '-q', '-c', daemon.uri,"
        " 'uri')\n"
        "        assert await process.wait() == 0\n"
        "        await daemon.restart(kill=True)\n"
        "    print(daemon.folder, flush=True)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(*words, "/usr/bin/python3", "-c", text),
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(base), "HOME": "/nonexistent"},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        stdout, _ = await within(process.communicate(), "its session has ended")
    finally:
        shutil.rmtree(base)
    assert process.returncode == 0
    uri, folder = stdout.decode().split()
    assert uri.startswith("qemu+unix:///session")
    assert not Path(folder).exists() and not processes_of(folder)


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("echo not today >&2; exit 3", r"ended as it started \(exit code 3\): not today"),
        ("echo not today >&2; exec sleep infinity", "did not answer in 2 s: not today"),
    ],
)
async def test_a_daemon_that_does_not_start_says_why(monkeypatch, tmp_path, script, text):
    program = tmp_path / "libvirtd"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(VcpuFailed, match=text):
        async with daemon_of_our_own(patience=2.0):
            pass


async def test_without_libvirtd_it_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(VcpuRefused) as refused:
        async with daemon_of_our_own(beyond_path=False):
            pass
    assert refused.value.refusals[0].code == "libvirtd"
    assert "libvirt-daemon" in refused.value.hint
