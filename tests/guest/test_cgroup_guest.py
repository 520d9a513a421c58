"""cgroups on a kernel that has what the host's may lack: v2 with cpuset and cpu, and two NUMA
nodes.

A Linux guest gets this Python and `qmpvcpu` in a second initrd, and runs `cgroup_driver.py` once
for each version.
"""

from __future__ import annotations

import gzip
import json
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import qmpvcpu
from tests.support import cgroup_driver
from tests.support.guests import boot, image_of
from tests.support.qemus import group, qemu_binary

pytestmark = [pytest.mark.guest, group("x86_64", "10.0")]

#: The guest must be of the host's architecture: it runs the host's Python.
IMAGE, ARCH = {"x86_64": ("x86_64", "x86_64"), "aarch64": ("arm64", "aarch64")}.get(
    platform.machine(), ("", "")
)
NODES = [
    *("-smp", "2", "-m", "768", "-accel", "tcg,thread=multi"),
    *(
        "-object",
        "memory-backend-ram,id=m0,size=512M",
        "-object",
        "memory-backend-ram,id=m1,size=256M",
    ),
    *("-numa", "node,nodeid=0,cpus=0,memdev=m0", "-numa", "node,nodeid=1,cpus=1,memdev=m1"),
]
#: Of the standard library, what nothing here imports and is large.
LEFT_OUT = re.compile(
    r"(^|/)(test|tests|idlelib|ensurepip|tkinter|lib2to3|turtledemo|pydoc_data|site-packages|config-.*|__pycache__)(/|$)"
)


def python_tree(folder: Path) -> Path:
    """A Python that needs nothing of the guest: `/py/run FILE`."""
    root = folder / "py"
    binary = Path(sys.executable).resolve()
    (root / "bin").mkdir(parents=True)
    (root / "lib").mkdir()
    stdlib = Path(sysconfig.get_path("stdlib"))
    target = root / "lib" / stdlib.name
    for path in sorted(stdlib.rglob("*")):
        name = path.relative_to(stdlib)
        if path.is_file() and not LEFT_OUT.search(str(name)) and not path.name.startswith("_test"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(path.read_bytes())
    (root / "bin" / "python3").write_bytes(binary.read_bytes())
    needed = subprocess.run(["ldd", str(binary)], check=True, capture_output=True, text=True).stdout
    for path in map(Path, re.findall(r"(/\S+) \(", needed)):
        (root / "lib" / path.name).write_bytes(path.read_bytes())
    loader = next(path.name for path in (root / "lib").glob("ld-*"))
    (root / "run").write_text(
        "#!/bin/sh\nexport PYTHONHOME=/py PYTHONPATH=/py/site PYTHONDONTWRITEBYTECODE=1"
        " QMPVCPU_STATE=/run/state\n"
        f'exec /py/lib/{loader} --library-path /py/lib /py/bin/python3 "$@"\n'
    )
    for path in (*root.glob("bin/*"), *root.glob("lib/ld-*"), root / "run"):
        path.chmod(0o755)
    package = Path(qmpvcpu.__file__).parent
    for path in package.rglob("*.py"):
        name = Path("site") / "qmpvcpu" / path.relative_to(package)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(path.read_bytes())
    (root / "driver.py").write_bytes(Path(cgroup_driver.__file__).read_bytes())
    return root


@pytest.fixture(scope="module")
def initrd(tmp_path_factory) -> Path:
    """The guest's own, and behind it Python: the kernel unpacks one over the other."""
    if not IMAGE:
        pytest.skip(f"no test guest runs the Python of {platform.machine()}")
    folder = tmp_path_factory.mktemp("initrd")
    root = python_tree(folder)
    names = "\0".join(str(path.relative_to(folder)) for path in [root, *sorted(root.rglob("*"))])
    command = ["cpio", "--null", "--quiet", "-o", "-H", "newc", "-R", "0:0"]
    archive = subprocess.run(
        command, cwd=folder, input=names.encode(), check=True, capture_output=True
    ).stdout
    whole = folder / "initrd"
    whole.write_bytes(
        (image_of(IMAGE).folder / "initrd.cpio.gz").read_bytes() + gzip.compress(archive, 1)
    )
    return whole


@pytest.fixture(scope="module")
async def linux(initrd):
    arguments = [*NODES, "-initrd", str(initrd)]
    async with boot(image_of(IMAGE), qemu_binary("10.0", ARCH), arguments) as guest:
        yield guest


MOUNT = {
    2: "mkdir -p /cg2 && mount -t cgroup2 none /cg2",
    1: "umount /cg2; mkdir -p /cg/cpuset /cg/cpu && mount -t cgroup -o cpuset none /cg/cpuset"
    " && mount -t cgroup -o cpu none /cg/cpu",
}


async def drive(guest, version):
    await guest.shell(MOUNT[version])
    return json.loads(
        (await guest.shell(f"/py/run /py/driver.py {version} qemu", timeout=120)).splitlines()[-1]
    )


def common(told):
    """What both versions do."""
    assert told["refusals"] == [] == told["layout refusals"]
    assert [text.partition(":")[0] for text in told["beyond"]] == [
        "vCPU 1 is pinned to host CPU 9",
        "vCPU 1 is bound to host NUMA node 7",
    ]
    assert told["alone"]["groups"] == {"1": "vcpu1", "2": "vcpu2"} and told["alone"]["main"] == "/"
    assert "cpus=(1,), scheduler='fifo:10'" in told["alone"]["threads"]["1"]
    assert "cpus=(0,), scheduler='other'" in told["alone"]["threads"]["2"]
    assert told["alone"]["pinned anew"] == "0-1"
    assert told["has layout"] is True
    assert (told["widened"], told["put back"], told["needs none"]) == ("0-1", "0", True)
    assert (told["after a kill"], told["recovered"]) == ("0-1", "0")
    assert told["layout"]["groups"] == {n: f"/machine/vcpu{n}" for n in ("1", "2", "3")}
    assert told["layout"]["emulator"] == "/machine/emulator"
    assert told["left"] == []


async def test_v2(linux):
    told = await drive(linux, 2)
    assert {"cpuset", "cpu"} <= set(told["controllers"])
    common(told)
    for where in ("alone", "layout"):
        one, two = told[where]["settings"]["1"], told[where]["settings"]["2"]
        assert (one["cpuset.cpus"], one["cpuset.mems"]) == ("1", "1")
        assert (one["cpuset.cpus.effective"], one["cpuset.mems.effective"]) == ("1", "1")
        assert (one["cpu.max"], one["cpu.weight"], one["cgroup.type"]) == (
            "25000 50000",
            "512",
            "threaded",
        )
        assert (two["cpuset.cpus"], two["cpuset.mems"], two["cpu.max"]) == ("0", "0", "max 100000")
    assert told["layout"]["settings"]["3"]["cpuset.cpus"] == ""


async def test_v1(linux):
    told = await drive(linux, 1)
    common(told)
    for where in ("alone", "layout"):
        one, two = told[where]["settings"]["1"], told[where]["settings"]["2"]
        assert (one["cpuset.cpus"], one["cpuset.mems"]) == ("1", "1")
        assert (two["cpuset.cpus"], two["cpuset.mems"]) == ("0", "0")
    assert told["layout"]["settings"]["3"]["cpuset.cpus"] == "0-1"
