"""The domain XML files of libvirt's own tests, each with the command lines that libvirt makes of
it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lxml import etree

#: `<domain` as the root of a document, behind a declaration and comments.
_DOMAIN = re.compile(rb"\A\s*(<\?.*?\?>\s*|<!--.*?-->\s*)*<domain[\s>]", re.DOTALL)


@dataclass(frozen=True)
class DomainFile:
    """One file; `name` is relative to libvirt's tests."""

    path: Path
    name: str
    #: Command lines that libvirt 11.3 makes of it.
    args: tuple[Path, ...] = ()

    @cached_property
    def data(self) -> bytes:
        return self.path.read_bytes()

    @cached_property
    def root(self) -> etree._Element:
        return parse(self.data)


def parse(data: bytes) -> etree._Element:
    """Another reader of XML than the product's."""
    parser = etree.XMLParser(resolve_entities=False, strip_cdata=False, huge_tree=True)
    return etree.fromstring(data, parser)


def domain_files(folder: Path) -> list[DomainFile]:
    """Every file below a folder whose root element is <domain>, in the order of their names."""
    found = []
    command_lines = _command_lines(folder)
    for path in sorted(folder.rglob("*.xml")):
        if not path.is_symlink() and _DOMAIN.match(path.read_bytes()):
            args = command_lines.get((path.parent, path.stem), ())
            found.append(DomainFile(path, str(path.relative_to(folder)), tuple(args)))
    return found


#: NAME.args is of NAME.xml, and so is NAME.x86_64-latest.args: architecture and capabilities that
#: it is made with.
_VARIANT = re.compile(r"\.[a-z0-9_]+-(latest|\d+\.\d+\.\d+)(\.abi-update|\+\w+)?\Z")


def _command_lines(folder: Path) -> dict[tuple[Path, str], list[Path]]:
    found: dict[tuple[Path, str], list[Path]] = {}
    for path in sorted(folder.rglob("*.args")):
        if b"qemu-system-" not in path.read_bytes():
            continue  # bhyve's
        for name in {path.stem, _VARIANT.sub("", path.stem)}:
            found.setdefault((path.parent, name), []).append(path)
    return found
