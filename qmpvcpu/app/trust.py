"""From what a destination is started if the guest's XML comes from a file: a saved guest, or a
cookie.

What the user has defined is trusted. A file supplies the machine, CPUs, memory and addresses, and never a program,
a command line, a socket, a path or a place on the host. Those come from the definition that the
guest had when this user saved it, or that the user has of it now; without such a definition a file
that names them is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from qmpvcpu.app.qemus import find_emulator
from qmpvcpu.core.machine.boot_arguments import qemu_arch
from qmpvcpu.core.migration.cookie import Cookie
from qmpvcpu.core.rules import catalogue
from qmpvcpu.host.definition_files import DefinitionFolder
from qmpvcpu.xml.document import read_domain
from qmpvcpu.xml.foreign import host_parts, without_placing, without_program


@dataclass(frozen=True, slots=True)
class Startable:
    """A cookie whose XML may be started and defined. `devices` is the XML that has the program and
    the devices; None: the cookie's own XML. `messages` name what of a file was left out.
    """

    cookie: Cookie
    devices: bytes | None = None
    messages: tuple[str, ...] = ()

    @property
    def definable(self) -> Cookie:
        """The cookie with the XML that may be defined, and that says where on this host the guest's
        threads run.
        """
        return self.cookie if self.devices is None else replace(self.cookie, xml=self.devices)


async def of_file(cookie: Cookie, names: Iterable[str], known: bytes | None) -> Startable:
    """From a cookie that was read from a file.

    Args:
        cookie: as it was read.
        names: under which the guest may be defined on this host; the first that is defined counts.
        known: its definition, if it is known that this user had it when the file was written, and
            that the cookie has not been changed since.

    Raises:
        VcpuRefused: the file names parts of a host, and no trusted definition has them; the error
            names every part.
    """
    if known is not None:
        return Startable(replace(cookie, xml=known))
    trusted = _defined(cookie, names)
    definition = read_domain(trusted)[1] if trusted is not None else None
    if found := host_parts(cookie.xml, definition):
        raise catalogue.TRUST.error(parts=", ".join(found), name=cookie.name)
    xml, left_out = without_placing(cookie.xml)
    if trusted is not None:
        return Startable(replace(cookie, xml=xml, persistent=None), trusted)
    emulator = await find_emulator(
        qemu_arch(read_domain(cookie.xml)[1]),
        cookie.picture.version if cookie.picture is not None else None,
    )
    messages = (f"{', '.join(left_out)}: left out, as only a definition says where on this host a guest runs",)
    xml = without_program(xml, emulator)
    return Startable(replace(cookie, xml=xml, persistent=None), None, messages if left_out else ())


def _defined(cookie: Cookie, names: Iterable[str]) -> bytes | None:
    """The definition that the user has of this guest."""
    folder = DefinitionFolder()
    for name in names:
        if folder.is_defined(name):
            data = folder.file(name).read()
            if read_domain(data)[1].uuid == cookie.uuid:
                return data
    return None
