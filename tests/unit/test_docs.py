"""The documentation names only what exists: files, functions, tests and pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
HOUSE = TOP / "qmpvcpu"
ROOTS = ("qmpvcpu", "tests", "scripts", "docs")
ROOMS = tuple(path.name for path in HOUSE.iterdir() if path.is_dir())
FILES = [TOP / "README.md", *sorted(TOP.glob("docs/**/*.md"))]
PAGES = {str(page.relative_to(TOP)): page for page in FILES}

#: `core/arch.py`, `tests/unit/test_docs.py::PAGES`, `arch.py`, `tests/unit/test_*.py`.
QUOTED = re.compile(r"`([\w.*/-]+?(?:::\w+)?)`")
UNQUOTED = re.compile(rf"(?<![\w./`-])((?:{'|'.join(ROOTS)})/[\w.*/-]*\w)")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
#: TOPIC and NAME stand for any word.
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b")


def named_paths(text: str) -> set[str]:
    """The paths in a page that look like those of this repository."""
    quoted = set(QUOTED.findall(text))
    ours = {word for word in quoted if word.partition("/")[0] in (*ROOTS, *ROOMS) and "/" in word}
    modules = {word for word in quoted if word.partition("::")[0].endswith(".py")}
    found = ours | modules | set(UNQUOTED.findall(text))
    return {word for word in found if not PLACEHOLDER.search(word)}


def defines(path: Path, name: str) -> bool:
    """Whether a file defines a function, class, constant or attribute of this name."""
    pattern = rf"^\s*(async def|def|class) {name}\b|^\s*{name}( =|:)"
    return re.search(pattern, path.read_text(), re.M) is not None


def exists(word: str) -> bool:
    """Whether a path in the repository or in qmpvcpu/ exists, and defines what follows `::`."""
    path, _, name = word.partition("::")
    found = [one for top in (TOP, HOUSE) for one in top.glob(path.rstrip("/"))]
    if "/" not in path:
        found += [one for root in ROOTS for one in (TOP / root).glob(f"**/{path}")]
    return any(defines(one, name) for one in found) if name else bool(found)


@pytest.mark.parametrize("page", PAGES)
def test_a_path_that_a_page_names_exists(page):
    assert [word for word in sorted(named_paths(PAGES[page].read_text())) if not exists(word)] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_link_leads_to_a_file(page):
    links = LINK.findall(PAGES[page].read_text())
    assert [link for link in links if not (PAGES[page].parent / link).exists()] == []


@pytest.mark.parametrize("name", ["docs", "docs/decisions"])
def test_the_index_of_a_folder_links_each_of_its_pages(name):
    folder = TOP / name
    linked = set(LINK.findall((folder / "README.md").read_text()))
    assert {page.name for page in folder.glob("*.md")} - linked == {"README.md"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("`core/nothing.py` decides", {"core/nothing.py"}),
        ("look at `nothing.py`", {"nothing.py"}),
        ("Tests: tests/unit/nothing.py, and", {"tests/unit/nothing.py"}),
        ("`core/arch.py::nothing`", {"core/arch.py::nothing"}),
    ],
)
def test_these_tests_find_a_name_of_nothing(text, named):
    assert named_paths(text) == named
    assert not any(map(exists, named))


@pytest.mark.parametrize("text", ["`log/NAME.log`", "`tests/cases/TOPIC.toml`", "`of_node/reg`"])
def test_what_is_not_of_this_repository_is_left_alone(text):
    assert named_paths(text) == set()
