"""What a word of the user names: a domain, or a socket in QEMU's words; what is said where it is
nothing.
"""

from __future__ import annotations

import pytest

import qmpvcpu
from qmpvcpu import VcpuConnectionError
from tests.support.cli import run_main
from tests.support.fake_agent import serve_agent
from tests.support.fake_guest import FakeGuest
from tests.support.fake_qemu import FakeQemu
from tests.support.fake_qmp import serve

SERVER = ",server=on,wait=off"


async def failure(word):
    with pytest.raises(VcpuConnectionError) as caught:
        async with qmpvcpu.connect(word):
            pass
    return caught.value


async def test_a_mistyped_name_says_what_is_defined(home):
    error = await failure("web2")
    assert error.message == "there is no domain, file or socket named 'web2'; defined are web1"
    assert (error.reason, error.libvirt) == ("unknown-domain", "VIR_ERR_NO_DOMAIN")


async def test_a_mistyped_name_hints_at_the_near_one(home):
    assert (await failure("wbe1")).hint.startswith("did you mean 'web1'?")


async def test_where_nothing_is_defined_the_hint_says_how_to(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path))
    assert "qmpvcpu define" in (await failure("web2")).hint


@pytest.mark.parametrize(
    "command", ["setvcpu {} 1 --enable --config", "vcpuinfo {}", "vcpucount {} --config"]
)
def test_every_command_says_so(home, command):
    run = run_main([*command.format("web2").split(), "--json"])
    assert (run.code, "'web2'; defined are web1" in run.json["error"]["message"]) == (7, True)


async def test_a_path_where_nothing_is_may_have_meant_either(tmp_path):
    error = await failure(str(tmp_path / "x"))
    assert (error.message, error.reason) == (
        f"there is no socket or file '{tmp_path}/x'",
        "missing",
    )


@pytest.mark.parametrize("form", ["unix:{}", "unix:{}" + SERVER, "unix:{},server,nowait", "{}"])
async def test_a_socket_is_taken_in_qemus_words(tmp_path, form):
    async with serve(tmp_path, FakeQemu().script) as path:
        async with qmpvcpu.connect(form.format(path)) as domain:
            assert domain.is_active
        async with qmpvcpu.connect(qmp=[form.format(path)]) as domain:
            assert domain.is_active


async def test_an_agent_is_taken_in_qemus_words(tmp_path):
    guest = FakeGuest(FakeQemu())
    async with serve(tmp_path, guest.qemu.script) as path, serve_agent(tmp_path, guest) as agent:
        async with qmpvcpu.connect(path, agent=f"unix:{agent}") as domain:
            assert (await domain.guest_vcpus()).cpus


def test_a_relative_socket_is_defined_by_its_full_path(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.xml").write_bytes(home.xml)
    words = [
        "define",
        "a",
        "--qmp",
        "unix:./q",
        "--qmp",
        "tcp:[::1]:44",
        "--agent",
        f"unix:g{SERVER}",
    ]
    run = run_main([*words, "--xml", "d.xml", "--json"])
    assert run.json["qmp"] == [f"{tmp_path}/q", "tcp:[::1]:44"]
    assert run.json["agent"] == f"{tmp_path}/g"


@pytest.mark.parametrize("word", ["tcp:127.0.0.1:4", "127.0.0.1:4", f"tcp:127.0.0.1:4{SERVER}"])
async def test_a_port_is_taken_in_qemus_words(word):
    error = await failure(word)
    assert (error.message, error.reason) == (f"nobody listens on '{word}'", "refused")


@pytest.mark.parametrize("word", ["tcp:a:b:99999", "unix:", "tcp:", "tcp:host:0"])
def test_what_is_not_an_address_says_what_to_write(word):
    run = run_main(["vcpuinfo", word, "--json"])
    assert (run.code, bool(run.json["error"]["hint"])) == (2, True)


# -- a guest that is off ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["watch web1", "save web1 /nowhere/f", "setvcpu web1 1 --guest"]
)
def test_what_needs_a_running_guest_says_start_it_first(home, command):
    run = run_main([*command.split(), "--json"])
    assert (run.code, run.json["error"]["hint"]) == (3, "start it first")


def test_who_typed_live_may_leave_it_out(home):
    run = run_main(["setvcpu", "web1", "1", "--enable", "--live"])
    assert "hint: leave out --live to change its definition, or start it\n" in run.stderr


def test_a_maximum_without_config_says_what_to_add(home):
    assert "hint: add --config\n" in run_main(["setvcpus", "web1", "2", "--maximum"]).stderr


async def test_an_agent_that_is_not_there_is_a_socket_that_is_not_there(tmp_path):
    async with (
        serve(tmp_path, FakeQemu().script) as path,
        qmpvcpu.connect(path, agent="./nope") as domain,
    ):
        with pytest.raises(VcpuConnectionError, match=r"^there is no agent socket './nope'$"):
            await domain.guest_vcpus()


# -- what was typed wrong --------------------------------------------------------------------------


def test_a_wrong_option_hints_at_the_help_of_its_command():
    assert "`qmpvcpu setvcpu --help`" in run_main(["setvcpu", "d", "1", "--frob"]).stderr


def test_a_missing_word_hints_at_the_help_of_its_command():
    assert "`qmpvcpu setvcpu --help`" in run_main(["setvcpu", "d"]).stderr


def test_a_mistyped_command_hints_at_the_near_one():
    assert "hint: did you mean setvcpu or setvcpus? " in run_main(["setvpcu", "d", "1"]).stderr


def test_several_reasons_are_a_line_each_with_its_hint(home):
    run = run_main(["setvcpu", "web1", "9", "--enable", "--config", "--guest"])
    lines = [line for line in run.stderr.splitlines() if line.startswith("qmpvcpu: refused: ")]
    assert len(lines) > 1
    assert not any(";" in line for line in lines)


@pytest.mark.parametrize("command", ["setvcpu", "apply", "migrate", "start", "define", "probe"])
def test_every_option_has_help(command):
    rows = run_main([command, "--help"]).stdout.splitlines()
    options = [n for n, row in enumerate(rows) if row.startswith("  --")]
    assert options
    for number in options:
        assert "  " in rows[number].strip() or rows[number + 1].startswith(" " * 20), rows[number]
