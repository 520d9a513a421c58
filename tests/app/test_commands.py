"""The commands that are not one domain, and what every command does alike."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.support.commands import cli, start_cli
from tests.support.processes import RUN_MARK, send, survivors
from tests.support.waiting import DEADLINE, until, within

pytestmark = pytest.mark.qemu

TOP = Path(__file__).parents[2]


async def test_doctor_tells_qemus_machines_and_rights():
    run = await cli("--json", "doctor")
    text = await cli("doctor")
    assert run.code == text.code == 0
    report = run.json
    assert not [qemu for qemu in report["qemus"] if qemu["error"] is not None]
    versions = {(qemu["arch"], qemu["version"].rpartition(".")[0]) for qemu in report["qemus"]}
    assert {("x86_64", "7.2"), ("x86_64", "10.0"), ("ppc64", "11.1"), ("s390x", "10.0")} <= versions
    by_key = {(qemu["arch"], qemu["version"].rpartition(".")[0]): qemu for qemu in report["qemus"]}
    assert "pc-q35-10.0" in by_key["x86_64", "10.0"]["hotpluggable_machines"]
    assert by_key["riscv64", "10.0"]["hotpluggable_machines"] == []
    assert report["rights"]["root"] == (os.geteuid() == 0)
    assert "CPU hotplug on: " in text.stdout


async def test_doctor_on_a_bare_machine_names_the_cures(tmp_path):
    environment = os.environ | {"PATH": str(tmp_path), "QMPVCPU_CACHE": str(tmp_path)}
    run = await cli("--json", "doctor", env=environment)
    cures = " ".join(missing["cure"] for missing in run.json["missing"])
    assert run.code == 0
    assert run.json["qemus"] == []
    for word in (
        "qemu-system-x86",
        "qemu-system-ppc",
        "scripts/fetch-qemu 10.0",
        "scripts/build-guest x86_64",
    ):
        assert word in cures


async def test_doctor_survives_a_qemu_that_does_not_run(tmp_path):
    broken = tmp_path / "qemu-system-x86_64"
    broken.write_text("#!/bin/sh\necho cannot load libfoo >&2\nexit 127\n")
    broken.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:/usr/sbin:/sbin:/bin",
        "QMPVCPU_CACHE": str(tmp_path),
    }
    run = await cli("--json", "doctor", env=environment)
    mine = next(qemu for qemu in run.json["qemus"] if qemu["path"] == str(broken))
    assert mine["version"] is None
    assert "exited with code 127: cannot load libfoo" in mine["error"]


async def test_demo_without_a_guest_still_plugs_and_says_what_is_missing(tmp_path):
    run = await cli("--json", "demo", env=os.environ | {"QMPVCPU_CACHE": str(tmp_path)})
    assert run.code == 0
    assert (run.json["guest"], run.json["enabled"]["outcome"]) == (False, "applied")
    assert "scripts/build-guest x86_64" in " ".join(run.json["missing"])


async def test_demo_without_any_qemu_is_refused_with_the_cure(tmp_path):
    run = await cli(
        "--json", "demo", env=os.environ | {"QMPVCPU_CACHE": str(tmp_path), "PATH": str(tmp_path)}
    )
    assert (run.code, "scripts/" in run.json["error"]["hint"]) == (3, True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_completion_is_a_script_of_that_shell(shell, tmp_path):
    run = await cli("completion", shell)
    assert run.code == 0
    assert "setvcpu" in run.stdout
    assert "numa-node" in run.stdout
    if shutil.which(shell):
        script = tmp_path / "completion"
        script.write_text(run.stdout)
        check = await asyncio.create_subprocess_exec(shell, "-n", str(script))
        assert await check.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "code", "outcome"),
    [
        ((), 2, "usage"),
        (("nonsense",), 2, "usage"),
        (("vcpuinfo",), 2, "usage"),
        (("vcpuinfo", "/nowhere/qmp"), 7, "connection"),
        (("vcpuinfo", "no-such-domain"), 7, "connection"),
        (("vcpuinfo", "/etc/passwd"), 3, "refused"),
        (("vcpuinfo", "fd:99"), 7, "connection"),
        (("vcpuinfo", "host:99999"), 2, "usage"),
        (("setvcpu", "/nowhere/qmp", "5", "--qmp-log", "/nowhere/log"), 2, "usage"),
    ],
)
async def test_errors_have_a_code_a_hint_and_one_json_document(arguments, code, outcome):
    first = await cli("--json", *arguments)
    last = await cli(*arguments, "--json")
    assert first.code == last.code == code
    assert first.json["outcome"] == last.json["outcome"] == outcome
    assert {"type", "libvirt", "message", "hint"} <= set(first.json["error"])
    assert first.json["error"]["hint"]
    text = await cli(*arguments)
    assert (text.code, text.stdout) == (code, "")
    assert "hint: " in text.stderr


async def test_debug_shows_the_traceback_and_only_debug_does():
    process = await start_cli("--debug", "vcpuinfo", "/nowhere/qmp")
    _, stderr = await process.communicate()
    assert b"Traceback" in stderr


async def test_version_and_help():
    assert (await cli("--version")).stdout.startswith("qmpvcpu 0.")
    assert "version" in (await cli("--json", "--version")).json
    usage = await cli("--help")
    assert (usage.code, "setvcpu" in usage.stdout, "exit codes" in usage.stdout) == (0, True, True)


async def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m qmpvcpu completion bash | head -n 1"
    process = await asyncio.create_subprocess_shell(
        command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await process.communicate()
    assert stderr == b""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
async def test_whatever_ends_us_no_qemu_outlives_us(number):
    others = set(survivors())  # guests that other tests of this worker share

    def its_qemu():
        return [line for line in survivors() if "qemu-system" in line and line not in others]

    process = await start_cli("demo")
    try:
        await until(its_qemu, "its QEMU runs", every=0)
    finally:
        send(process, number)
        await process.communicate()
    await until(lambda: not its_qemu(), "no QEMU of it is left")
    assert process.returncode in (-9, 130, 143)


async def test_a_kill_before_the_death_signal_is_set_starts_no_qemu(tmp_path):
    others = set(survivors())
    slow = tmp_path / "setpriv"
    slow.write_text(
        f"#!/bin/sh\ntouch {tmp_path}/asked\nwhile ! test -e {tmp_path}/go; do sleep 0.01; done\n"
        f'exec {shutil.which("setpriv")} "$@"\n'
    )
    slow.chmod(0o755)
    process = await start_cli("demo", env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    try:
        await until((tmp_path / "asked").exists, "it starts a QEMU")
    finally:
        process.kill()
        await process.communicate()
        (tmp_path / "go").touch()  # for all of them: a demo asks several QEMUs at once
    await until(lambda: not set(survivors()) - others, "no process of it is left")


async def test_the_readme_is_true(tmp_path):
    """Every sh block, top to bottom in one shell, then the Python block, on the guest that it
    started.
    """
    readme = (TOP / "README.md").read_text()
    blocks = [block.split("```")[0] for block in readme.split("```sh\n")[1:]]
    python = [block.split("```")[0] for block in readme.split("```python\n")[1:]]
    assert (len(blocks), len(python)) == (10, 1)
    (tmp_path / "example.py").write_text(python[0])
    script = ["set -eu", "trap 'kill $(jobs -p)' EXIT", *blocks, f"{sys.executable} example.py"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-c",
        "\n".join(script),
        cwd=tmp_path,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await within(
        process.communicate(), "the README's blocks have run", 5 * DEADLINE
    )
    assert process.returncode == 0, stderr.decode()
    output = stdout.decode()
    assert "2 of 8 vCPUs enabled" in output
    assert "vCPU 5: enabled (hotplug)" in output
    assert '"changed_ids": [2, 3, 6]' in output
    assert "vCPU 0-6: enabled (7 of 8 vCPUs enabled)" in output
    assert "vCPU 1: pinned" in output and "AFFINITY" in output
    assert "vCPU 7: enabled in the definition" in output
    assert "<vcpu id='7' state='disabled'/>" in output
    assert "predicted, no QEMU was started" in output
    assert "-device qemu64-x86_64-cpu,id=vcpu5," in output
    assert "sparse: started, QEMU " in output and "with vCPU 0-1,5\n" in output
    assert re.search(r"sparse +running +4 of 8", output)
    assert "applied enabled" in output
    assert "boot CPU" in output


@pytest.mark.scripts
@pytest.mark.guest
async def test_the_demo_shows_the_guests_own_view():
    process = await asyncio.create_subprocess_exec(
        str(TOP / "scripts" / "demo"),
        "--json",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    report = json.loads(stdout)
    assert report["online"] == ["0-3", "0-4", "0-3"]
    assert report["disabled"]["outcome"] == "applied"


@pytest.mark.scripts
@pytest.mark.parametrize("words", [(), ("10",), ("10.0", "11.1"), ("--help",)])
async def test_fetch_qemu_says_how_it_is_called(words):
    process = await asyncio.create_subprocess_exec(
        str(TOP / "scripts" / "fetch-qemu"), *words, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await process.communicate()
    assert (process.returncode, b"usage" in stderr) == (1, True)


def test_no_process_of_a_test_goes_unseen():
    assert RUN_MARK.split("=")[0] in os.environ


async def test_progress_is_for_terminals_only():
    import pty

    from tests.support.qemus import paused

    async with paused("ppc64", "11.1", "2,maxcpus=4") as qemu:
        await qemu.execute("cont")  # firmware that never answers
        arguments = ("setvcpu", qemu.qmp, "1", "--disable", "--timeout", "1.5")
        silent = await cli(*arguments)
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "qmpvcpu",
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=theirs,
        )
        stdout, _ = await process.communicate()
        shown = os.read(ours, 4096)
        os.close(ours)
        os.close(theirs)
    assert silent.code == process.returncode == 5
    assert "waiting" not in silent.stderr
    assert b"waiting for the guest: 1 of 1.5 s" in shown
    assert stdout.decode() == silent.stdout
