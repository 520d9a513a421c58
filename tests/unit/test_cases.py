"""Every case of tests/cases, through the real command line, on a scripted QEMU that starts from a
recording.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import cases, run_case
from tests.support.stand_in import StandIn
from tests.support.thread import ServerThread


@pytest.fixture(scope="module")
def servers() -> Iterator[ServerThread]:
    thread = ServerThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    process = StandIn()
    yield process
    process.close()


def documented(tmp: Path) -> list[cases.Case]:
    """The example of docs/contributing.md."""
    text = (Path(__file__).parents[2] / "docs" / "contributing.md").read_text()
    path = tmp / "contributing.toml"
    path.write_text(text.partition("```toml\n")[2].partition("```")[0])
    return cases.load(path)


def test_the_documented_example_passes(servers, stand_in, monkeypatch, tmp_path):
    (case,) = documented(tmp_path)
    test_case(case, servers, stand_in, monkeypatch)


@pytest.mark.parametrize("case", cases.load_all(), ids=lambda case: case.id)
def test_case(case, servers, stand_in, monkeypatch):
    # A socket's path has room for 107 bytes, which pytest's own folders use up.
    with tempfile.TemporaryDirectory(prefix="case-") as folder:
        monkeypatch.setenv("QMPVCPU_STATE", f"{folder}/state")
        differences = run_case.run(case, Path(folder), servers, stand_in)
    if differences:
        pytest.fail("\n".join([run_case.show(case), *differences]), pytrace=False)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("speed = 1\n[[case]]\nname = 'a'\nrequest = 'vcpuinfo D'\nexpect.exit = 0", "speed"),
        (
            "[machine]\nspeed = 1\n[[case]]\nname = 'a'\nrequest = 'vcpuinfo D'\nexpect.exit = 0",
            "speed",
        ),
        ("[[case]]\nname = 'a'\nrequest = 'vcpuinfo D'\nexpect.speed = 0", "speed"),
        ("[[case]]\nname = 'a'\nrequest = 'vcpuinfo D'\nqemu.speed = 0\nexpect.exit = 0", "speed"),
        ("[[case]]\nname = 'a'\nrequest = 'vcpuinfo D'\nguest.speed = 0\nexpect.exit = 0", "speed"),
        ("[[case]]\nname = 'a'\nexpect.exit = 0", "a request or steps"),
        ("[[case]]\nrequest = 'vcpuinfo D'\nexpect.exit = 0", "has a name"),
        ("[[case]]\nname = 'a'\nrequest = 'vcpuinfo D'", "nothing is expected"),
        ("[[case]]\nname = 'a'\nrequest = 'vcpuinfo D'\nexpect.exit = 0\n" * 2, "two cases"),
    ],
)
def test_a_case_file_with_a_mistake_names_file_and_key(tmp_path, text, named):
    path = tmp_path / "topic.toml"
    path.write_text(text)
    with pytest.raises(cases.CaseError, match=rf"topic\.toml.*{named}"):
        cases.load(path)
