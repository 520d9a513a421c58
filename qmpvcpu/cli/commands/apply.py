"""`apply`: make the vCPUs of a guest what a document says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpvcpu.cli.commands.vcpus import show_plan
from qmpvcpu.cli.options import CHANGE, CRASHES, DOMAIN, IMPACT, argument, command
from qmpvcpu.core.request import TIMEOUT

if TYPE_CHECKING:
    from qmpvcpu.cli.session import CommandSession
    from qmpvcpu.domain import Options


@command(
    DOMAIN,
    argument("file", "FILE", "domain XML, or <vcpus> alone"),
    *IMPACT,
    *CHANGE,
    CRASHES,
)
async def apply(session: CommandSession) -> int:
    """Make the vCPUs what a file says."""
    from qmpvcpu.app.definitions import read_document

    options = session.options
    xml = read_document(options.file)
    async with session.connect() as domain:
        given: Options = {
            "live": options.live,
            "config": options.config,
            "timeout": options.timeout,
            "wait": not options.no_wait,
            "atomic": not options.no_wait,
            "force": options.force,
            "place": not options.no_place,
        }
        if options.dry_run:
            return show_plan(session, await domain.plan_apply(xml, source=options.file, **given))
        async with session.waiting("waiting for the guest", options.timeout or TIMEOUT):
            result = await session.finish(domain.apply(xml, source=options.file, **given))
    return session.show_outcome(result)
