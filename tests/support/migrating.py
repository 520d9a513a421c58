"""What goes with a guest that migrates, what stands against it, and which side runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from qmpvcpu import Cookie, DomainState, MigrationStatus, Refusal
from qmpvcpu.core.machine.comparison import Picture
from qmpvcpu.core.migration import status as reported
from qmpvcpu.core.migration.cookie import (
    CPU_HOTPLUG,
    check_arrived,
    check_destination,
    check_features,
    features_of,
    machine_of,
    missing,
)
from qmpvcpu.core.migration.leaving import (
    check_hangs,
    check_one_cpu,
    check_source,
    cpus_but_first,
    needs_one_cpu,
)
from qmpvcpu.core.migration.status import Stillness, address_of, parse_status
from qmpvcpu.core.migration.who_runs import Destination, Source, cancel_step, next_step
from qmpvcpu.core.rules.request import check_not_migrating
from qmpvcpu.core.state.guest_view import GuestCpu, GuestView
from qmpvcpu.xml.cookie import read_cookie, write_cookie
from qmpvcpu.xml.document import read_domain

#: How the handing over can end at the source, and what can be at the destination.
SOURCES: Final = tuple(str(source) for source in Source)
DESTINATIONS: Final = tuple(str(destination) for destination in Destination)


def features(state: DomainState, definition: bytes | None = None) -> frozenset[str]:
    """What a reader of this guest's cookie must know; `definition` is the XML that goes too."""
    return features_of(state, None if definition is None else read_domain(definition)[1])


def unknown_features(names: Iterable[str]) -> list[Refusal]:
    """What stands against taking in a guest whose cookie needs these."""
    return check_features(Cookie("d", None, b"<domain/>", features=frozenset(names)))


def differences(source: DomainState, destination: DomainState) -> list[str]:
    """In what the destination is not the guest that leaves."""
    return [
        refusal.message for refusal in check_arrived(machine_of(source), machine_of(destination))
    ]


def to_plug(source: DomainState, destination: DomainState) -> list[tuple[int, ...]]:
    """vCPU ids of the entities that the destination lacks, in the order in which they are plugged."""
    return [slot.ids for slot in missing(machine_of(source), machine_of(destination))]


def against_leaving(
    state: DomainState,
    run_state: str,
    query_migrate: Any = None,
    pending: Iterable[int] = (),
    *,
    is_paused: bool = False,
) -> list[Refusal]:
    """Why a guest cannot be migrated now; `run_state` is QAPI's, `query_migrate` the reply of that
    command; `is_paused`: it is paused on the way.
    """
    return check_source(state, run_state, parse_status(query_migrate), pending, is_paused=is_paused)


def against_hotplug(run_state: str, query_migrate: Any) -> list[Refusal]:
    """Why no vCPU can be switched now."""
    return check_not_migrating(run_state, parse_status(query_migrate).under_way)


def against_trip(state: DomainState, removals_seen: int = 0) -> list[Refusal]:
    """What is known to hang, or to lose the guest; forceable."""
    return check_hangs(state, removals_seen)


def travels_with_one_cpu(state: DomainState) -> bool:
    """Whether it gets over the migration only with just its first CPU online."""
    return needs_one_cpu(state)


def against_one_cpu(online: Mapping[int, bool], numbers: Mapping[int, int]) -> str | None:
    """Why this guest cannot be left with just its first CPU. `online` is by the guest's own
    numbers, `numbers` are vCPU ids -> those.
    """
    return check_one_cpu(_view(online, numbers))


def offline_on_the_way(online: Mapping[int, bool], numbers: Mapping[int, int]) -> tuple[int, ...]:
    """The guest's numbers of the CPUs that are offline while it migrates so."""
    return cpus_but_first(_view(online, numbers))


def status(query_migrate: Any) -> MigrationStatus:
    """A reply of `query-migrate`."""
    return parse_status(query_migrate)


def address(query_migrate: Any, host: str | None) -> str | None:
    """Where a destination listens, for a source that reaches its host by that name."""
    return address_of(parse_status(query_migrate), host)


def step(source: str, destination: str) -> str | None:
    """What to do next; None for what cannot be. See `SOURCES` and `DESTINATIONS`."""
    try:
        return str(next_step(Source(source), Destination(destination)))
    except KeyError:
        return None


def to_cancel(run_state: str, query_migrate: Any = None, *, is_prepared: bool = False) -> str:
    """What there is to cancel at a side in this state; `is_prepared`: it is known as a destination."""
    return str(cancel_step(run_state, parse_status(query_migrate), is_prepared=is_prepared))


def stands_still(looks: Iterable[tuple[float, Any]]) -> list[str | None]:
    """Whether nothing has moved for too long, by the seconds and the reply of each look; the clock
    begins at 0.
    """
    stillness = Stillness(0.0)
    return [stillness.too_long(parse_status(reply), now) for now, reply in looks]


def against_destination(
    what: Cookie, there: DomainState, run_state: str = "inmigrate", uuid: Any = None
) -> list[str]:
    """Codes of what stands against a destination; `uuid` is the reply of query-uuid."""
    definition = read_domain(what.xml)[1] if what.machine is None else None
    return [one.code for one in check_destination(what, definition, there, run_state, uuid)]


def cookie(state: DomainState, xml: bytes, *, name: str, runs: bool = True) -> Cookie:
    """That of a guest whose reader must know `cpu-hotplug`; its definition goes too, and says the
    same.
    """
    return Cookie(name, "u-1", xml, xml, frozenset({CPU_HOTPLUG}), machine_of(state), runs)


def with_picture(what: Cookie, **told: Any) -> Cookie:
    """The same with what the source's QEMU told of its machine."""
    return replace(what, picture=Picture(**told))


def last_words(log: str) -> str:
    """What an error says of the log of a QEMU that failed."""
    return reported.last_words(log)


def written(what: Cookie) -> bytes:
    return write_cookie(what)


def read(text: bytes) -> Cookie:
    """Raises VcpuRefused: it is not a cookie."""
    return read_cookie(text)


def _view(online: Mapping[int, bool], numbers: Mapping[int, int]) -> GuestView:
    cpus = {number: GuestCpu(number, is_on) for number, is_on in online.items()}
    return GuestView(tuple(cpus.values()), {vcpu: cpus[number] for vcpu, number in numbers.items()})
