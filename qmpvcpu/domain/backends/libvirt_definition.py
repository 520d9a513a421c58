"""The definition that libvirt stores, changed by libvirt calls."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace

from qmpvcpu.core.definition import Definition
from qmpvcpu.core.request import Request
from qmpvcpu.domain.backends.libvirt_answers import answered
from qmpvcpu.domain.definition import DefinitionHandle
from qmpvcpu.errors import VcpuPartial
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.libvirt.calls import LibvirtGuest
from qmpvcpu.ports import CommandError, DefinitionStore
from qmpvcpu.xml.document import read_domain


class LibvirtDefinition(DefinitionHandle):
    """The definition that libvirt stores."""

    def __init__(self, store: DefinitionXml) -> None:
        connection = store.guest.connection
        super().__init__(store, lambda work: connection.change("the definition", work))
        self._libvirts = store

    def _store_for(self, request: Request) -> DefinitionStore:
        # The request decides which libvirt calls are made.
        return replace(self._libvirts, request=request)


@dataclass(slots=True)
class DefinitionXml:
    """`ports.DefinitionStore`: the XML that libvirt stores, as it was when the call began.
    `request` is the change to make.
    """

    guest: LibvirtGuest
    data: bytes
    request: Request | None = None

    @property
    def place(self) -> str:
        """The name of this definition in messages."""
        return f"{self.guest.name} at {self.guest.connection.uri}"

    def read(self) -> bytes:
        """The document."""
        return self.data

    def fetch(self) -> bytes:
        """Return the document as it is now. Blocks."""
        return self.guest.read_definition()

    def stage(self, data: bytes) -> _Staged:
        """Prepare the next version. Nothing is written before `commit`, because libvirt has only
        one definition.
        """
        return _Staged(self, data)


class _Staged:
    """A next version (`ports.Staged`)."""

    def __init__(self, store: DefinitionXml, data: bytes) -> None:
        self._store = store
        self._guest = store.guest
        self._data = data

    def commit(
        self, before: bytes, remake: Callable[[bytes], bytes], given_up: Callable[[], bool]
    ) -> None:
        """Send the changes to libvirt, by specific calls if they exist, else by redefining the
        domain.
        """
        with answered():
            now = self._store.fetch()
            if now != before:
                self._data = remake(now)
            if self._data == now:
                return
            calls = self._calls(read_domain(now)[1], read_domain(self._data)[1])
            if given_up():
                raise OSError(errno.ECANCELED, "it was cancelled")
            try:
                if calls is None:
                    # Redefining replaces the whole definition, so it must contain the passwords
                    # that libvirt hides.
                    self._guest.define(remake(self._guest.read_definition(secure=True)))
                for call in calls or ():
                    self._guest.call("the definition", call)
            except CommandError as error:
                # libvirt changes its copy in memory first (9.0), and keeps that copy if it cannot
                # be written.
                if self._store.fetch() == now:
                    raise
                text = f"libvirt has changed the definition, and cannot keep it: {error.text}"
                raise VcpuPartial(
                    text,
                    libvirt=error.error_class,
                    hint="look at libvirtd's log; it is lost when the daemon is restarted",
                ) from error

    def _calls(self, old: Definition, new: Definition) -> list[Callable[[], object]] | None:
        """Return the libvirt calls for this change, or None if no calls express exactly this
        change.
        """
        request, guest = self._store.request, self._guest
        config = guest.flags(config=True)
        if request is not None and request.total is not None and not request.has(VcpuFlag.GUEST):
            return [
                guest.set_vcpus(
                    request.total, config | guest.count_flags(request.maximum, request.hotpluggable)
                )
            ]
        if replace(new, vcpus=old.vcpus, dialect=old.dialect) != old:
            return None
        if request is not None and request.listed is not None:
            return None
        found = []
        for enable in (True, False):
            ids = [
                vcpu.id
                for was, vcpu in zip(old.vcpus, new.vcpus, strict=False)
                if vcpu.enabled is enable and was.enabled is not enable
            ]
            if ids:
                found.append(guest.set_vcpu(ids, enable, config))
        return found or None

    def discard(self) -> None:
        """There is nothing to discard."""
