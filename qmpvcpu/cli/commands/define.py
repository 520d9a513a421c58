"""`define` and `undefine`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpvcpu.cli.options import argument, command, value

if TYPE_CHECKING:
    from qmpvcpu.cli.session import CommandSession


@command(
    argument("word", "FILE|NAME", "a file of domain XML, or a name", option="file"),
    value(
        "--qmp",
        "ADDR",
        "its QMP socket; of several the first that is free",
        action="append",
        default=[],
    ),
    value("--xml", "FILE", "its domain XML; else it is made of what QEMU tells"),
)
async def define(session: CommandSession) -> int:
    """Define a domain."""
    from qmpvcpu.app import define as app

    options = session.options
    done = await app.define(options.word, options.qmp, options.agent, options.xml)
    session.warn(done.messages)
    how = "redefined" if done.replaced else "defined"
    session.show(done.to_json(), [f"{done.name}: {how} ({done.path})"])
    return 0


@command(argument("domain", "NAME", "the name that it is defined under"))
async def undefine(session: CommandSession) -> int:
    """Remove a domain's definition."""
    from qmpvcpu.app import definitions

    name = session.options.domain
    kept = definitions.undefine(name)
    session.show(
        {"domain": name, "kept": str(kept)}, [f"{name}: undefined; its last XML is {kept}"]
    )
    return 0
