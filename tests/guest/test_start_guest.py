"""A defined, sparse domain: started, seen from inside, changed, stopped and started again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.commands import cli
from tests.support.guests import Console, booted, image_of
from tests.support.qemus import matrix, qemu_binary

pytestmark = pytest.mark.guest

#: One CPU a line: its number, its node, and what the hardware calls it.
SEEN = (
    "cd /sys/devices/system; for cpu in cpu/cpu[0-9]*; do n=${cpu##*cpu}; node=; "
    "for d in $cpu/node[0-9]*; do node=${d##*node}; done; "
    "echo $n ${node:--} $(cat $cpu/online 2>/dev/null || echo 1) $(cat $cpu/physical_id"
    " 2>/dev/null); done"
)

TWO_CORES = {0: 0, 1: 0, 6: 2, 7: 2}
KINDS = {
    # arch: image, machine, vCPUs enabled (on, order), topology, memory of a node
    "x86_64": ("x86_64", "q35", 16, {0: 0, 1: 0, 5: 4, 12: 3}, (2, 8, 1), 256),
    "ppc64": (
        "ppc64le",
        "pseries",
        8,
        TWO_CORES,
        (2, 2, 2),
        512,
    ),
}


def xml(arch, version, shell):
    image, machine, maximum, enabled, (sockets, cores, threads), memory = KINDS[arch]
    found = image_of(image)
    rows = []
    for number in range(maximum):
        on = number in enabled
        order = f" order='{enabled[number]}'" if enabled.get(number) else ""
        pluggable = "yes" if not on or order else "no"
        rows.append(
            f"<vcpu id='{number}' enabled='{'yes' if on else 'no'}'"
            f" hotpluggable='{pluggable}'{order}/>"
        )
    options = found.facts["machine"].partition(",")[2]
    words = ["-machine", options] if options else []
    words += ["-chardev", f"socket,id=shell,path={shell},server=on,wait=off"]
    words += [
        "-device",
        f"virtserialport,bus=qmpvcpu-serial.0,chardev=shell,name={found.facts['shell']}",
    ]
    args = "".join(f"<qemu:arg value='{word}'/>" for word in words)
    half = maximum // 2
    return f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>sparse</name>
  <memory unit='MiB'>{2 * memory}</memory>
  <vcpu current='{len(enabled)}'>{maximum}</vcpu>
  <vcpus>{"".join(rows)}</vcpus>
  <os>
    <type arch='{image}' machine='{machine}'>hvm</type>
    <kernel>{found.folder}/vmlinuz</kernel>
    <initrd>{found.folder}/initrd.cpio.gz</initrd>
    <cmdline>{found.facts["append"]}</cmdline>
  </os>
  <cpu{" mode='maximum'" if arch == "x86_64" else ""}>
    <topology sockets='{sockets}' cores='{cores}' threads='{threads}'/>
    <numa>
      <cell id='0' cpus='0-{half - 1}' memory='{memory}' unit='MiB'/>
      <cell id='1' cpus='{half}-{maximum - 1}' memory='{memory}' unit='MiB'/>
    </numa>
  </cpu>
  <devices>
    <emulator>{qemu_binary(version, arch)}</emulator>
    <video><model type='vga'/></video>
  </devices>
  <qemu:commandline>{args}</qemu:commandline>
</domain>
"""


def is_gone(pid):
    """No such process, or one that PID 1 has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@asynccontextmanager
async def running(arch, shell):
    """Started, and its shell; destroyed in the end."""
    run = await cli("start", "sparse", "--json")
    assert run.code == 0, run.stdout + run.stderr
    try:
        # Nobody waits for an agent in a guest that still boots.
        early = await cli("vcpuinfo", "sparse", "--json")
        assert {row["online"] for row in early.json["vcpus"]} == {None}
        assert "nothing in the guest has opened its port" in early.stderr
        await booted(Path(run.json["console"]))
        reader, writer = await asyncio.open_unix_connection(shell)
        try:
            yield run.json, Console(reader, writer)
        finally:
            writer.close()
    finally:
        done = await cli("destroy", "sparse", "--json")
        assert done.code == 0 and done.json["pid"] == run.json["pid"], done
        assert is_gone(run.json["pid"])


async def seen(guest):
    """logical id -> (node, online, physical id)"""
    rows = [line.split() for line in (await guest.shell(SEEN)).splitlines()]
    return {int(row[0]): tuple(row[1:]) for row in rows}


@matrix(("x86_64", "10.0"), ("ppc64", "10.0"))
async def test_a_sparse_guest_over_two_nodes(arch, version, tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "s"))
    maximum, enabled = KINDS[arch][2:4]
    ids, shell = sorted(enabled), str(tmp_path / "shell")
    file = tmp_path / "sparse.xml"
    file.write_text(xml(arch, version, shell))
    assert (await cli("define", str(file))).code == 0
    async with running(arch, shell) as (started, guest):
        assert started["vcpus"] == ids and "<video>" in started["messages"][0]
        info = (await cli("vcpuinfo", "sparse", "--json")).json
        rows = {row["id"]: row for row in info["vcpus"] if row["state"] == "enabled"}
        assert sorted(rows) == ids
        # The guest itself: so many, each on its node.
        found = {n: facts for n, facts in (await seen(guest)).items() if facts[1] == "1"}
        assert len(found) == len(ids), found
        nodes = [rows[n]["node"] for n in ids]
        assert sorted(int(facts[0]) for facts in found.values()) == sorted(nodes)
        assert nodes == [int(n >= maximum // 2) for n in ids]
        # Which is which, by what the hardware says of itself.
        view = (await cli("guestvcpus", "sparse", "--json")).json
        pairs = {cpu["vcpu"]: cpu["logical_id"] for cpu in view["cpus"] if cpu["online"]}
        assert sorted(pairs) == ids, view
        assert all(int(found[pairs[n]][0]) == rows[n]["node"] for n in ids)
        plugged = [n for n in ids if n == rows[n]["entity"][0] and enabled[n]]
        assert all(rows[n]["qom_path"].startswith(f"/machine/peripheral/vcpu{n}") for n in plugged)
    assert (await cli("start", "sparse")).code == 0
    try:
        again = (await cli("vcpuinfo", "sparse", "--json")).json["vcpus"]
        for key in ("order", "qom_path", "node", "props"):
            assert {row["id"]: row[key] for row in again if row["state"] == "enabled"} == {
                number: row[key] for number, row in rows.items()
            }
    finally:
        assert (await cli("destroy", "sparse")).code == 0
    if arch == "x86_64":
        assert {number: row["order"] for number, row in rows.items()} == {0: 1, 1: 2, 12: 3, 5: 4}
