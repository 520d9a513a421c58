"""Which guest CPU is which vCPU, and what of a guest's list is not believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.core.guest import (
    GuestCpu,
    GuestView,
    identify,
    identity_files,
    is_port_open,
    newcomers,
    parse_guest_vcpus,
)
from qmpvcpu.core.inventory import BootFacts, CpuInfoFast, HotpluggableCpu, build_state
from qmpvcpu.core.model import Props, QemuVersion
from qmpvcpu.core.select import guest_total
from qmpvcpu.errors import VcpuConnectionError
from tests.unit.test_plan import machine
from tests.unit.test_selection_and_kills import ppc64, x86

SYS = "/sys/devices/system/cpu/cpu{}/{}"


def cpus(*online, offline=()):
    found = [GuestCpu(n, True) for n in online] + [GuestCpu(n, False) for n in offline]
    return tuple(sorted(found, key=lambda cpu: cpu.logical_id))


def known(view):
    return {vcpu: cpu.logical_id for vcpu, cpu in view.by_vcpu.items()}


def test_x86_by_apic_id_of_what_is_online_and_by_the_acpi_path_of_what_is_not():
    state = x86((0, 1, 3, 7))  # 2 sockets, 2 cores, 2 threads: the APIC id is the vCPU id
    guest = cpus(0, 1, 3, offline=(2,))
    files = {
        "/proc/cpuinfo": b"processor\t: 0\napicid\t: 0\n\nprocessor: 1\napicid: 1\n\nprocessor: 3\napicid: 7\n",
        SYS.format(2, "firmware_node/path"): b"\\_SB_.CPUS.C003\n",
    }
    assert list(identity_files(state, guest)) == list(files)
    view = identify(state, guest, files)
    assert known(view) == {0: 0, 1: 1, 3: 2, 7: 3}
    assert (view.online(3), view.online(7), view.online(5), view.vcpu_of(3)) == (False, True, None, 7)


def test_x86_apic_ids_are_not_vcpu_ids_where_a_level_is_no_power_of_two():
    state = x86((0, 1, 3), sockets=2, cores=3, threads=1)  # vCPU 3 is socket 1, core 0: APIC id 4
    files = {"/proc/cpuinfo": b"processor: 0\napicid: 0\nprocessor: 1\napicid: 1\nprocessor: 2\napicid: 4\n"}
    assert known(identify(state, cpus(0, 1, 2), files)) == {0: 0, 1: 1, 3: 2}


def test_ppc64_by_physical_id_also_where_cores_lie_further_apart():
    state = ppc64((0, 2))  # cores of 4
    guest = cpus(0, 1, 2, 3, 4, 5, 6, 7, offline=range(8, 16))
    physical = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]
    files = {SYS.format(n, "physical_id"): b"%d\n" % hard for n, hard in enumerate(physical)}
    assert known(identify(state, guest, files, vsmt=4)) == {n: n for n in range(4)} | {
        8 + n: 4 + n for n in range(4)
    }
    physical = [0, 1, 2, 3, 16, 17, 18, 19, *list(range(24, 32))]
    files = {SYS.format(n, "physical_id"): b"%d\n" % hard for n, hard in enumerate(physical)}
    assert known(identify(state, guest, files, vsmt=8)) == {n: n for n in range(4)} | {
        8 + n: 4 + n for n in range(4)
    }


def test_s390x_by_address():
    state = machine("s390x", plugged=(0, 1, 3))
    files = {SYS.format(n, "address"): b"%d\n" % address for n, address in enumerate((0, 1, 3))}
    assert known(identify(state, cpus(0, 1, 2), files)) == {0: 0, 1: 1, 3: 2}


def test_arm64_by_the_rank_of_its_mpidr():
    state = machine("aarch64", plugged=range(8), cores=1)
    files = {SYS.format(n, "of_node/reg"): bytes([0, 0, n // 4, n % 4]) for n in range(8)}
    assert known(identify(state, cpus(*range(8)), files)) == {n: n for n in range(8)}
    swapped = files | {SYS.format(0, "of_node/reg"): bytes([0, 0, 0, 1]), SYS.format(1, "of_node/reg"): bytes(4)}
    assert known(identify(state, cpus(*range(8)), swapped))[0] == 1


def test_two_cpus_that_claim_one_vcpu_are_not_believed():
    state = machine("s390x", plugged=(0, 1, 3))
    files = {SYS.format(n, "address"): b"%d\n" % address for n, address in enumerate((0, 1, 1))}
    assert known(identify(state, cpus(0, 1, 2), files)) == {0: 0}


@pytest.mark.parametrize("claim", [b"7\n", b"-1", b"x", b"", None, b"9" * 30])
def test_a_cpu_that_claims_what_is_not_there_is_not_believed(claim):
    state = machine("s390x", plugged=(0, 1, 3))
    files = {SYS.format(0, "address"): b"0", SYS.format(1, "address"): claim}
    assert known(identify(state, cpus(0, 1), files)) == {0: 0}


def test_where_nothing_tells_numbers_are_taken_for_ids_only_if_no_other_reading_is_possible():
    whole = machine(plugged=(0, 1))
    view = identify(whole, cpus(0, 1), {})
    assert (known(view), view.assumed, view.strays) == ({0: 0, 1: 1}, True, 0)
    view = identify(machine(plugged=(0, 2)), cpus(0, 1), {})
    assert (known(view), view.assumed, view.strays) == ({}, True, 2)
    assert known(identify(whole, cpus(0, 1, 2), {})) == {}
    # Two that were plugged: the guest numbered them as they came, and that is not told.
    assert known(identify(x86((0, 1)), cpus(0, 1), {})) == {}
    # riscv64's boot hart is drawn by lot.
    assert known(identify(machine("riscv64", (0, 1)), cpus(0, 1), {})) == {}


def test_riscv64_by_hart_id():
    guest = cpus(0, 1, 2)
    files = {SYS.format(n, "of_node/reg"): hart.to_bytes(4, "big") for n, hart in enumerate((2, 0, 1))}
    assert known(identify(machine("riscv64", (0, 1, 2)), guest, files)) == {0: 1, 1: 2, 2: 0}


def test_arm64_with_one_missing_knows_none():
    files = {SYS.format(n, "of_node/reg"): mpidr.to_bytes(8, "big") for n, mpidr in enumerate((0, 1, 3))}
    assert known(identify(machine("aarch64", (0, 1, 2, 3)), cpus(0, 1, 2), files)) == {}


def test_s390x_addresses_are_core_ids_which_are_not_always_vcpu_ids():
    slots = [(3, 0), (0, 1), (0, 2)]  # core 0 was plugged into another socket: sorted, it is the last
    state = build_state(
        BootFacts("d", "s390x", "s390-ccw-virtio", False, QemuVersion(10, 0), None),
        [HotpluggableCpu("t", 1, Props({"socket-id": s, "core-id": c}), f"/c{c}") for s, c in slots],
        [CpuInfoFast(c, f"/c{c}", 100 + c, None) for _, c in slots],
    )
    files = {SYS.format(n, "address"): b"%d\n" % n for n in range(3)}
    assert known(identify(state, cpus(0, 1, 2), files)) == {0: 1, 1: 2, 2: 0}


def test_ppc64_that_is_not_pseries_knows_none():
    files = {SYS.format(n, "physical_id"): b"%d\n" % (4 * n) for n in range(4)}
    assert known(identify(ppc64((0,)), cpus(0, 1, 2, 3), files, vsmt=None)) == {n: n for n in range(4)}
    files |= {"/sys/devices/system/cpu/present": b"0-7"}
    view = identify(ppc64((0, 2)), cpus(*range(8)), files, vsmt=None)
    assert (known(view), view.assumed) == ({}, True)


def test_more_cpus_than_there_can_be():
    rows = [{"logical-id": n, "online": True} for n in range(5)]
    assert len(parse_guest_vcpus(rows, 5)) == 5
    with pytest.raises(VcpuConnectionError, match="5 CPUs, and the guest can have 4"):
        parse_guest_vcpus(rows, 4)


@pytest.mark.parametrize(
    "reply",
    [
        None,
        {},
        [],
        [5],
        [{}],
        [{"logical-id": "0", "online": True}],
        [{"logical-id": -1, "online": True}],
        [{"logical-id": True, "online": True}],
        [{"logical-id": 0, "online": 1}],
        [{"logical-id": 0, "online": False}],
        [{"logical-id": 70000, "online": True}],
        [{"logical-id": 0, "online": True}, {"logical-id": 0, "online": True}],
        [{"logical-id": 0, "online": True}] * 70000,
    ],
)
def test_lists_of_cpus_that_cannot_be(reply):
    with pytest.raises(VcpuConnectionError) as caught:
        parse_guest_vcpus(reply)
    assert (caught.value.reason, bool(caught.value.hint)) == ("malformed", True)


def test_a_list_of_cpus_in_any_order():
    rows = [{"logical-id": 1, "online": False, "can-offline": True}, {"logical-id": 0, "online": True, "extra": 1}]
    assert parse_guest_vcpus(rows) == (GuestCpu(0, True, None), GuestCpu(1, False, True))


@given(
    st.dictionaries(
        st.sampled_from([SYS.format(n, "firmware_node/path") for n in range(4)]), st.binary(max_size=60)
    )
)
def test_whatever_the_files_say_only_enabled_vcpus_are_known(files):
    state = x86((0, 1, 5))
    view = identify(state, cpus(0, offline=(1, 2, 3)), files | {"/proc/cpuinfo": b"processor: 0\napicid: 0\n"})
    assert set(view.by_vcpu) <= {0, 1, 5}


def test_whether_anybody_in_the_guest_has_opened_the_port():
    def row(name, is_open=True):
        return {"label": "x", "filename": name, "frontend-open": is_open}

    shut = [row("pty:/dev/pts/1"), row("disconnected:unix:/run/agent,server=on", False)]
    assert is_port_open(shut, "/run/agent") is False
    assert is_port_open([row("unix:/run/agent,server=on")], "/run/agent") is True
    assert is_port_open(shut, "/run/agent2") is None
    assert is_port_open([row("unix:/run/a, b/agent,server=on", False)], "/run/a, b/agent") is False
    for nonsense in (None, 5, [], [5], [{}], [row(5)], [row("unix:/run/agent", "x")]):
        assert is_port_open(nonsense, "/run/agent") is None


def seen(*online, off=()):
    numbers = {**dict.fromkeys(online, True), **dict.fromkeys(off, False)}
    return GuestView(tuple(GuestCpu(n, on, n != 0) for n, on in sorted(numbers.items())), {}, assumed=True)


@pytest.mark.parametrize(
    ("before", "now", "lists_all", "came"),
    [
        (seen(0, 1), seen(0, 1, off=(2, 3)), False, [2, 3]),
        (seen(0, off=(1,)), seen(0, 2, off=(1,)), False, [2]),
        # Somebody took another one online meanwhile: those that are new count.
        (seen(0, off=(1,)), seen(0, 1, off=(2,)), False, [2]),
        # ppc64 lists them all the time.
        (seen(0, 1, off=(2, 3, 4, 5)), seen(0, 1, 4, 5, off=(2, 3)), True, [4, 5]),
        (seen(0, off=(1,)), seen(0, 1), False, []),
        (seen(0, 1), seen(0, 1), False, []),
    ],
)
def test_what_came_is_told_from_what_was_there(before, now, lists_all, came):
    assert [cpu.logical_id for cpu in newcomers(before, now, lists_all=lists_all)] == came


@pytest.mark.parametrize(
    ("total", "ids", "online", "refused"),
    [
        (2, (), True, False),
        (4, (2, 3), True, False),
        (1, (1,), False, False),
        (0, (), False, True),
        (5, (), True, True),
    ],
)
def test_a_count_by_the_guests_own_numbers(total, ids, online, refused):
    found = guest_total(seen(0, 1, off=(2, 3)), total)
    assert (found[0], found[1], bool(found[2])) == (ids, online, refused)
