"""A domain's XML that nobody has defined: what of it is of a host, and what it is without."""

from __future__ import annotations

from qmpvcpu.xml import foreign
from qmpvcpu.xml.document import read_domain


def host_parts(xml: str, defined: str | None = None) -> list[str]:
    """Its elements that a file does not supply; `defined` is what the user has defined. Raises
    VcpuRefused.
    """
    return foreign.host_parts(
        xml.encode(), None if defined is None else read_domain(defined.encode())[1]
    )


def without_program(xml: str, emulator: str | None) -> str:
    """The same with that QEMU, and without sockets and files behind its consoles."""
    return foreign.without_program(xml.encode(), emulator).decode()


def without_placing(xml: str) -> tuple[str, list[str]]:
    """The same without a place on the host, and the elements that were left out."""
    text, found = foreign.without_placing(xml.encode())
    return text.decode(), found


def program_and_agent(xml: str) -> tuple[str | None, str | None]:
    """The program and the agent's socket that a document names."""
    definition = read_domain(xml.encode())[1]
    return definition.emulator, definition.agent
