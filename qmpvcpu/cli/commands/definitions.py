"""`list` and `dumpxml`: what is defined."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpvcpu.cli import render
from qmpvcpu.cli.options import DOMAIN, choice, command, flag

if TYPE_CHECKING:
    from qmpvcpu.cli.session import CommandSession


@command()
async def list(session: CommandSession) -> int:
    """List the domains."""
    from qmpvcpu.app.definitions import list_domains, list_libvirt

    uri = session.options.connect
    found = await (list_domains() if uri is None else list_libvirt(uri))
    session.show({"domains": [row.to_json() for row in found]}, render.domains(found))
    return 0


@command(
    DOMAIN,
    flag("--inactive", "its definition, even while it runs"),
    choice("--dialect", ("rfc", "libvirt"), "how <vcpus> is written"),
    choice("--detail", ("minimal", "cell", "full"), "what the RFC's <vcpu> shows (default full)"),
)
async def dumpxml(session: CommandSession) -> int:
    """Print the domain's XML."""
    from qmpvcpu.app.libvirt_schema import against_libvirts_schema

    options = session.options
    options.config = options.inactive
    async with session.connect() as domain:
        data = await domain.dump_xml(
            inactive=options.inactive, dialect=options.dialect, detail=options.detail
        )
    errors = None
    if options.dialect == "libvirt":
        errors = against_libvirts_schema(data)
        session.warn(f"libvirt's schema does not allow it: {error}" for error in errors or ())
    if options.json:
        document = {
            "domain": domain.name,
            "xml": data.decode(errors="replace"),
            "schema_errors": errors,
        }
        session.output.document(document)
    else:
        session.output.data(data if data.endswith(b"\n") else data + b"\n")
    return 0
