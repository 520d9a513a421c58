"""`doctor`: what this host, or a guest, can and cannot do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qmpvcpu.cli.options import argument, command

if TYPE_CHECKING:
    from qmpvcpu.cli.session import CommandSession


@command(argument("domain", "DOMAIN", "what this guest can and cannot do", default=None))
async def doctor(session: CommandSession) -> int:
    """Check this host, or a guest."""
    from qmpvcpu.app import doctor as app
    from qmpvcpu.app.twin import check_defined

    if session.options.domain is None:
        report = await app.examine_host()
        session.show(report.to_json(), report.lines())
        return 0
    async with session.connect() as domain:
        findings = await app.examine_domain(domain)
        differs = await check_defined(domain) if session.options.connect is None else []
    findings = replace(findings, differences=tuple(one.message for one in differs))
    session.show(findings.to_json(), findings.lines())
    return 0
