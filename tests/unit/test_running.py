"""A running guest as its live XML tells it."""

from __future__ import annotations

import pytest

from tests.support.libvirt_state import against_unplug, running
from tests.support.migrating import against_trip

XML = """<domain type='{kind}'><name>d</name><vcpu current='{current}'>{maximum}</vcpu>{vcpus}
<os><type arch='{arch}' machine='{machine}'>hvm</type></os><cpu><topology {topology}/>{numa}</cpu></domain>"""
VCPUS = """<vcpus><vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>
<vcpu id='1' enabled='yes' hotpluggable='no' order='2'/><vcpu id='2' enabled='no' hotpluggable='yes'/>
<vcpu id='3' enabled='yes' hotpluggable='yes' order='3'/><vcpu id='4' enabled='yes' hotpluggable='yes' order='3'/>
<vcpu id='5' enabled='no' hotpluggable='yes'/><vcpu id='6' enabled='no' hotpluggable='yes'/>
<vcpu id='7' enabled='no' hotpluggable='yes'/></vcpus>"""
EIGHT_CORES = "sockets='1' cores='8' threads='1'"


def state(
    arch="x86_64", machine="pc-q35-10.0", topology="sockets='2' cores='2' threads='2'", **given
):
    words = {"kind": "qemu", "current": 3, "maximum": 8, "vcpus": "", "numa": ""} | given
    seen = {key: words.pop(key) for key in ("gone", "pending") if key in words}
    return running(XML.format(arch=arch, machine=machine, topology=topology, **words), **seen)


def listed(
    arch="x86_64", machine="pc-q35-10.0", topology="sockets='2' cores='2' threads='2'", **given
):
    """0, 1, 3 and 4 are enabled, the last two as devices."""
    return state(arch, machine, topology, vcpus=VCPUS, current=4, **given)


# -- slots -----------------------------------------------------------------------------------------

CELLS = "".join(
    f"<cell id='{n}' cpus='{4 * n}-{4 * n + 3}' memory='1' unit='MiB'/>" for n in (0, 1)
)


@pytest.mark.parametrize(
    ("found", "vcpu", "props"),
    [
        (
            state(numa=f"<numa>{CELLS}</numa>"),
            5,
            {"socket-id": 1, "core-id": 0, "thread-id": 1, "node-id": 1},
        ),
        (
            state(numa=f"<numa>{CELLS}</numa>"),
            2,
            {"socket-id": 0, "core-id": 1, "thread-id": 0, "node-id": 0},
        ),
        (
            state(topology="sockets='1' dies='2' cores='2' threads='2'"),
            6,
            {"socket-id": 0, "die-id": 1, "core-id": 1, "thread-id": 0},
        ),
        (state("s390x", "s390-ccw-virtio-10.0", EIGHT_CORES), 3, {"core-id": 3}),
    ],
    ids=["second node", "first node", "dies", "s390x"],
)
def test_ids_are_places_as_qemu_numbers_them(found, vcpu, props):
    assert dict(found.vcpus[vcpu].props) == props


@pytest.fixture(name="cores", params=["ppc64", "ppc64le"])
def two_cores(request):
    return state(request.param, "pseries-10.0", "sockets='1' cores='2' threads='4'", current=4)


def test_a_core_of_ppc64_is_one_entity(cores):
    assert [entity.ids for entity in cores.entities] == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_a_core_of_ppc64_has_the_id_of_its_first_vcpu(cores):
    assert dict(cores.entities[1].props) == {"core-id": 4}


def test_a_core_of_ppc64_is_enabled_as_a_whole(cores):
    assert cores.enabled_ids == (0, 1, 2, 3)


def test_an_i686_domain_has_slots_as_x86_64_has_them():
    places = [state(arch, "pc").vcpus[5].props for arch in ("i686", "x86_64")]
    assert places[0] == places[1]


# -- what can be unplugged -------------------------------------------------------------------------


def test_only_what_libvirt_has_as_a_device_can_be_unplugged_by_it():
    (refusal,) = against_unplug(listed(), 1, 3)
    assert (refusal.ids, "hotpluggable='no'" in refusal.message) == ((1,), True)


def test_the_refusal_is_libvirts():
    (refusal,) = against_unplug(listed(), 1)
    assert refusal.libvirt == "VIR_ERR_OPERATION_UNSUPPORTED"


def test_the_boot_cpu_cannot_be_unplugged():
    assert "boot CPU" in against_unplug(listed(), 0)[0].message


def test_what_plugs_and_unplugs_is_libvirt():
    assert listed().by_id[3].driver == "virDomainSetVcpu"


@pytest.mark.parametrize(("vcpu", "path"), [(1, None), (3, "/machine/peripheral/vcpu3")])
def test_a_path_is_told_only_where_libvirt_knows_one(vcpu, path):
    assert listed().vcpus[vcpu].qom_path == path


def test_an_order_that_stands_twice_is_read():
    assert [vcpu.order for vcpu in listed().vcpus if vcpu.enabled] == [1, 2, 3, 3]


@pytest.fixture(name="one_gone")
def whose_thread_is_gone():
    return listed(gone=[3], pending=[4])


def test_what_is_gone_is_not_enabled(one_gone):
    assert one_gone.enabled_ids == (0, 1, 4)


def test_the_slot_of_what_is_gone_is_empty(one_gone):
    assert not one_gone.by_id[3].plugged


def test_what_is_gone_has_no_order(one_gone):
    assert one_gone.vcpus[3].order is None


def test_what_is_gone_cannot_be_plugged_since_libvirt_takes_it_for_plugged(one_gone):
    assert not one_gone.by_id[3].hotpluggable


def test_only_what_was_asked_is_pending(one_gone):
    assert [vcpu.id for vcpu in one_gone.vcpus if vcpu.pending] == [4]


@pytest.fixture(name="s390x")
def machine_that_never_unplugs():
    return listed("s390x", "s390-ccw-virtio-10.0", EIGHT_CORES)


@pytest.mark.parametrize(("vcpu", "hotpluggable"), [(3, False), (2, True)])
def test_on_a_machine_that_never_unplugs_only_what_is_empty_is_hotpluggable(
    s390x, vcpu, hotpluggable
):
    assert s390x.by_id[vcpu].hotpluggable is hotpluggable


def test_a_machine_that_never_unplugs_says_so(s390x):
    assert "never unplug" in against_unplug(s390x, 3)[0].message


# -- libvirt's names of architectures --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target", "machine", "topology", "known"),
    [
        ("i686", "i386", "pc-i440fx-7.2", "sockets='2' cores='2' threads='2'", {}),
        ("ppc64le", "ppc64", "pseries-10.0", EIGHT_CORES, {}),
        ("ppc64le", "ppc64", "pseries-7.2", EIGHT_CORES, {"firmware_runs": True}),
    ],
)
def test_a_domain_under_libvirts_name_of_its_architecture_gets_every_check(
    name, target, machine, topology, known
):
    kills = {
        arch: [
            refusal
            for refusal in against_unplug(listed(arch, machine, topology), 3, **known)
            if refusal.code == "kills-qemu"
        ]
        for arch in (name, target)
    }
    assert kills[name]
    assert kills[name] == kills[target]


def test_a_migration_of_a_ppc64le_domain_is_refused_where_one_of_ppc64_is():
    found = listed("ppc64le", "pseries-10.0", EIGHT_CORES)
    assert [refusal.code for refusal in against_trip(found, removals_seen=1)] == [
        "one-cpu",
        "unplugged",
    ]


@pytest.mark.parametrize(("machine", "version"), [("pc-q35-10.0", "10.0.0"), ("q35", "0.0.0")])
def test_its_qemu_may_be_as_old_as_its_machine(machine, version):
    assert str(state(machine=machine).version) == version
