"""Domain XML that others write, before its guest runs: which QEMU, which CPU features, and what a
file may say.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import cli
from tests.support.qemus import qemu_binary

pytestmark = pytest.mark.qemu

PROGRAM = "#!/bin/sh\ntouch '{mark}'\n"


def domain(inner: str, kind: str = "qemu", arch: str = " arch='x86_64' machine='q35'") -> str:
    return (
        f"<domain type='{kind}'><name>d</name><memory unit='MiB'>256</memory><vcpu>2</vcpu>"
        f"<os><type{arch}>hvm</type></os>{inner}</domain>"
    )


def written(folder: Path, text: str) -> str:
    file = folder / "d.xml"
    file.write_text(text)
    return str(file)


def featured(policy: str, name: str) -> str:
    feature = f"<feature policy='{policy}' name='{name}'/>"
    return domain(f"<cpu mode='custom'><model>Nehalem</model>{feature}</cpu>")


@pytest.mark.parametrize(
    ("policy", "name", "cpu"),
    [
        ("require", "osxsave", "Nehalem"),
        ("require", "x2apic", "Nehalem,x2apic=on"),
        ("require", "lahf_lm", "Nehalem,lahf_lm=on"),
        ("disable", "no-such", "Nehalem"),
        ("forbid", "no-such", "Nehalem"),
    ],
)
async def test_features_that_need_not_be_there(policy, name, cpu, tmp_path):
    run = await cli("boot-args", written(tmp_path, featured(policy, name)), "--json")
    words = run.json
    assert words[words.index("-cpu") + 1] == cpu
    assert ("does not have CPU feature no-such" in run.stderr) == (name == "no-such")


async def test_a_feature_that_must_be_there(tmp_path):
    run = await cli("boot-args", written(tmp_path, featured("require", "no-such")), "--json")
    assert (run.code, "has no CPU feature no-such" in run.json["error"]["message"]) == (3, True)


@pytest.mark.parametrize("command", ["probe", "boot-args"])
async def test_a_file_does_not_say_which_program_runs(command, tmp_path):
    mark, program = tmp_path / "mark", tmp_path / "program"
    program.write_text(PROGRAM.format(mark=mark))
    program.chmod(0o755)
    text = domain(f"<devices><emulator>{program}</emulator></devices>", arch="")
    run = await cli(command, written(tmp_path, text), "--probe", "always", "--json")
    assert (run.code, mark.exists()) == (0, False), run.stdout
    assert f"<emulator> '{program}' is ignored" in run.stderr


async def test_what_a_definition_may_start_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    space = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"
    more = "<qemu:commandline><qemu:arg value='-s'/></qemu:commandline>"
    text = domain(f"<devices><emulator>/bin/true</emulator></devices>{more}").replace(
        "<domain", f"<domain {space}"
    )
    run = await cli("define", written(tmp_path, text))
    assert "'/bin/true'" in run.stderr
    assert "<qemu:commandline> adds to QEMU's arguments: -s" in run.stderr


@pytest.mark.parametrize(
    ("arch", "program"),
    [("i686", "x86_64"), ("armv7l", "aarch64"), ("ppc64le", "ppc64")],
)
async def test_a_guest_runs_on_another_targets_qemu(arch, program, tmp_path):
    text = domain("", arch=f" arch='{arch}'")
    emulator = qemu_binary("10.0", program)
    run = await cli(
        "probe", written(tmp_path, text), "--emulator", emulator, "--probe", "always", "--json"
    )
    assert (run.code, run.json.get("emulator")) == (0, emulator), run.stdout


async def test_the_host_is_the_architecture_that_is_not_written(tmp_path):
    run = await cli("probe", written(tmp_path, domain("", arch="")), "--json")
    assert (run.json["arch"], run.json["machine"].partition("-")[0]) == ("x86_64", "pc")


META = "<metadata><q:machine xmlns:q='urn:qmpvcpu:machine:1'>{}</q:machine></metadata>"
OPTION = META.format("<q:option of='{}' name='{}' value='{}'/>")


@pytest.mark.parametrize(
    "text",
    [
        domain("", arch=" arch='aarch64' machine='virt,dumpdtb={mark}'"),
        domain("", arch=" arch='x86_64' machine='q35,firmware={mark}'"),
        domain("", arch=" arch='x86_64' machine='none -s'"),
        domain("", arch=" arch='../../{mark}'"),
        domain("<uuid>-qmp tcp:0:1</uuid>"),
        domain("<cpu><model>max,dumpdtb={mark}</model></cpu>"),
        domain("<cpu><model>max</model><feature name='x2apic=on,y' policy='require'/></cpu>"),
        domain("<cpu><topology sockets='2,dumpdtb={mark}' cores='1' threads='1'/></cpu>"),
        domain("<cpu><numa><cell cpus='0-1,memdev={mark}' memory='262144'/></numa></cpu>"),
        domain("<cpu><numa><cell cpus='0-1' memory='1,mem-path={mark}'/></numa></cpu>"),
        domain("<maxMemory slots='1,x={mark}'>9999999</maxMemory>"),
        domain(OPTION.format("machine", "dumpdtb", "{mark}")),
        domain(OPTION.format("machine", "hpet", "off,dumpdtb={mark}")),
        domain(OPTION.format("accel", "x,y", "1")),
        domain(OPTION.format("cpu", "a", "1,b={mark}")),
        domain(META.format("<q:memory id='a,mem-path={mark}' cell='0'/>")),
        domain(META.format("<q:memory id='a' cell='0' type='memory-backend-file,x=y'/>")),
        domain(
            META.format("<q:dimm of='0' id='a' memdev='b,c={mark}' type='memory-backend-ram'/>")
        ),
    ],
)
async def test_no_text_of_a_file_begins_another_option(text, tmp_path):
    mark = tmp_path / "mark"
    file = written(tmp_path, text.replace("{mark}", str(mark)))
    runs = [await cli(command, file) for command in ("probe", "boot-args", "define", "vcpuinfo")]
    assert [run.code for run in runs] == [3, 3, 3, 3], [run.stderr for run in runs]
    assert (mark.exists(), "hint: correct the domain's XML" in runs[0].stderr) == (False, True)
