"""A running guest as its live XML tells it."""

from __future__ import annotations

import pytest

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.checks import check_kills_on_unplug, check_unplug
from qmpvcpu.core.machine.versions import oldest_with
from qmpvcpu.core.migration import check_hangs
from qmpvcpu.core.model import LIBVIRT_DRIVER, QemuVersion
from qmpvcpu.core.request import Knowledge
from qmpvcpu.core.running import running_state
from qmpvcpu.xml.domain import read_domain

XML = """<domain type='{kind}'><name>d</name><vcpu current='{current}'>{maximum}</vcpu>{vcpus}
<os><type arch='{arch}' machine='{machine}'>hvm</type></os><cpu><topology {topology}/>{numa}</cpu></domain>"""


def state(arch="x86_64", machine="pc-q35-10.0", topology="sockets='2' cores='2' threads='2'", **given):
    words = {"kind": "qemu", "current": 3, "maximum": 8, "vcpus": "", "numa": ""} | given
    gone, pending = words.pop("gone", ()), words.pop("pending", ())
    xml = XML.format(arch=arch, machine=machine, topology=topology, **words)
    definition = read_domain(xml.encode(), running=True)[1]
    version = oldest_with(definition.machine)
    return running_state(definition, "d", version, "running", gone, pending)


@pytest.mark.parametrize(
    ("machine", "version"),
    [
        ("pc-q35-10.0", QemuVersion(10, 0)),
        ("pseries-7.2", QemuVersion(7, 2)),
        ("s390-ccw-virtio-11.1", QemuVersion(11, 1)),
        ("q35", QemuVersion(0, 0)),
        ("pc-i440fx-bookworm", QemuVersion(0, 0)),
        ("", QemuVersion(0, 0)),
    ],
)
def test_the_oldest_qemu_that_has_a_machine(machine, version):
    assert oldest_with(machine) == version


def test_ids_are_places_as_qemu_numbers_them():
    cells = (f"<cell id='{n}' cpus='{4 * n}-{4 * n + 3}' memory='1' unit='MiB'/>" for n in (0, 1))
    found = state(numa=f"<numa>{''.join(cells)}</numa>")
    assert dict(found.vcpus[5].props) == {"socket-id": 1, "core-id": 0, "thread-id": 1, "node-id": 1}
    assert dict(found.vcpus[2].props) == {"socket-id": 0, "core-id": 1, "thread-id": 0, "node-id": 0}
    dies = state(topology="sockets='1' dies='2' cores='2' threads='2'")
    assert dict(dies.vcpus[6].props) == {"socket-id": 0, "die-id": 1, "core-id": 1, "thread-id": 0}
    assert dict(state("s390x", "s390-ccw-virtio-10.0", "sockets='1' cores='8' threads='1'").vcpus[3].props) == {
        "core-id": 3
    }


def test_a_core_of_ppc64_is_one_entity():
    found = state("ppc64", "pseries-10.0", "sockets='1' cores='2' threads='4'", current=4)
    assert [entity.ids for entity in found.entities] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert dict(found.entities[1].props) == {"core-id": 4}
    assert found.enabled_ids == (0, 1, 2, 3)


VCPUS = """<vcpus><vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>
<vcpu id='1' enabled='yes' hotpluggable='no' order='2'/><vcpu id='2' enabled='no' hotpluggable='yes'/>
<vcpu id='3' enabled='yes' hotpluggable='yes' order='3'/><vcpu id='4' enabled='yes' hotpluggable='yes' order='3'/>
<vcpu id='5' enabled='no' hotpluggable='yes'/><vcpu id='6' enabled='no' hotpluggable='yes'/>
<vcpu id='7' enabled='no' hotpluggable='yes'/></vcpus>"""


def test_only_what_libvirt_has_as_a_device_can_be_unplugged_by_it():
    found = state(vcpus=VCPUS, current=4)
    refusals = check_unplug(found, [found.by_id[1], found.by_id[3]])
    assert [refusal.ids for refusal in refusals] == [(1,)] and "hotpluggable='no'" in refusals[0].message
    assert refusals[0].libvirt == "VIR_ERR_OPERATION_UNSUPPORTED"
    assert "boot CPU" in check_unplug(found, [found.by_id[0]])[0].message
    assert found.by_id[3].driver == LIBVIRT_DRIVER
    # A path is told only where libvirt knows one.
    assert found.vcpus[1].qom_path is None and found.vcpus[3].qom_path == "/machine/peripheral/vcpu3"


def test_what_is_gone_is_not_enabled_and_an_order_that_stands_twice_is_read():
    found = state(vcpus=VCPUS, current=4, gone=[3], pending=[4])
    assert found.enabled_ids == (0, 1, 4) and not found.by_id[3].plugged and found.vcpus[3].order is None
    assert found.vcpus[4].pending and not found.vcpus[3].pending
    # libvirt takes it for plugged.
    assert not found.by_id[3].hotpluggable


def test_a_machine_that_never_unplugs():
    found = state("s390x", "s390-ccw-virtio-10.0", "sockets='1' cores='8' threads='1'", vcpus=VCPUS, current=4)
    assert not found.by_id[3].hotpluggable and found.by_id[2].hotpluggable
    assert "never unplug" in check_unplug(found, [found.by_id[3]])[0].message


ALIASES = [
    ("i686", "pc-i440fx-7.2", "sockets='2' cores='2' threads='2'", 3, {}),
    ("ppc64le", "pseries-10.0", "sockets='1' cores='8' threads='1'", 3, {}),
    ("ppc64le", "pseries-7.2", "sockets='1' cores='8' threads='1'", 3, {"firmware_runs": True}),
]


@pytest.mark.parametrize(("arch", "machine", "topology", "vcpu", "known"), ALIASES)
def test_a_domain_under_libvirts_name_of_its_architecture_gets_every_check(arch, machine, topology, vcpu, known):
    under = {
        name: state(name, machine, topology, vcpus=VCPUS, current=4) for name in (arch, architecture(arch).name)
    }
    kills = {
        name: check_kills_on_unplug(found, [found.by_id[vcpu]], Knowledge(**known))
        for name, found in under.items()
    }
    assert kills[arch]
    assert kills[arch] == kills[architecture(arch).name]


def test_a_migration_of_a_ppc64le_domain_is_refused_where_one_of_ppc64_is():
    found = state("ppc64le", "pseries-10.0", "sockets='1' cores='8' threads='1'", vcpus=VCPUS, current=4)
    assert [refusal.code for refusal in check_hangs(found, removals_seen=1)] == ["one-cpu", "unplugged"]


def test_a_core_of_ppc64le_is_one_entity():
    found = state("ppc64le", "pseries-10.0", "sockets='1' cores='2' threads='4'", current=4)
    assert [entity.ids for entity in found.entities] == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_an_i686_domain_has_slots_as_x86_64_has_them():
    places = [state(arch, "pc", "sockets='2' cores='2' threads='2'").vcpus[5].props for arch in ("i686", "x86_64")]
    assert places[0] == places[1]
