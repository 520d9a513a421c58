"""Which guest CPU is which vCPU, and what of a guest's list is not believed."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu import VcpuConnectionError
from tests.support.guest import came, cpus, files_to_read, look, port_is_open, read, to_reach
from tests.support.inventory import Qemu
from tests.support.states import machine, ppc64, x86

SYS = "/sys/devices/system/cpu/cpu{}/{}"
PRESENT = "/sys/devices/system/cpu/present"


def each(name, contents):
    """This file of each CPU, from CPU 0 on."""
    return {SYS.format(n, name): content for n, content in enumerate(contents)}


def cpuinfo(*apics):
    """/proc/cpuinfo of CPUs 0, 1, … with these APIC ids."""
    text = "\n".join(f"processor\t: {n}\napicid\t: {apic}\n" for n, apic in enumerate(apics))
    return {"/proc/cpuinfo": text.encode()}


# -- x86 -------------------------------------------------------------------------------------------

#: 2 sockets, 2 cores, 2 threads: the APIC id is the vCPU id. The guest's CPU 2 is offline.
BIG = x86((0, 1, 3, 7))
BIG_GUEST = cpus(0, 1, 3, offline=(2,))
BIG_FILES = {
    "/proc/cpuinfo": b"processor\t: 0\napicid\t: 0\n\nprocessor: 1\napicid: 1\n\nprocessor:"
    b" 3\napicid: 7\n",
    SYS.format(2, "firmware_node/path"): b"\\_SB_.CPUS.C003\n",
}


def test_x86_tells_in_one_file_of_what_is_online_and_in_one_each_of_what_is_not():
    assert files_to_read(BIG, BIG_GUEST) == list(BIG_FILES)


def test_x86_by_apic_id_of_what_is_online_and_by_the_acpi_path_of_what_is_not():
    assert look(BIG, BIG_GUEST, BIG_FILES).numbers == {0: 0, 1: 1, 3: 2, 7: 3}


@pytest.mark.parametrize(("vcpu", "online"), [(3, False), (7, True), (5, None)])
def test_a_vcpu_is_online_as_its_cpu_is(vcpu, online):
    assert look(BIG, BIG_GUEST, BIG_FILES).online[vcpu] is online


def test_x86_apic_ids_are_not_vcpu_ids_where_a_level_is_no_power_of_two():
    state = x86((0, 1, 3), sockets=2, cores=3, threads=1)  # vCPU 3 is socket 1, core 0: APIC id 4
    assert look(state, cpus(0, 1, 2), cpuinfo(0, 1, 4)).numbers == {0: 0, 1: 1, 3: 2}


@given(
    st.dictionaries(
        st.sampled_from([SYS.format(n, "firmware_node/path") for n in range(4)]),
        st.binary(max_size=60),
    )
)
def test_whatever_the_files_say_only_enabled_vcpus_are_known(files):
    seen = look(x86((0, 1, 5)), cpus(0, offline=(1, 2, 3)), files | cpuinfo(0))
    assert set(seen.numbers) <= {0, 1, 5}


# -- others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vsmt", "physical"),
    [
        (4, [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]),
        (8, [0, 1, 2, 3, 16, 17, 18, 19, *range(24, 32)]),
    ],
    ids=["cores side by side", "cores further apart"],
)
def test_ppc64_by_physical_id(vsmt, physical):
    guest = cpus(*range(8), offline=tuple(range(8, 8 + len(physical) - 8)))
    seen = look(
        ppc64((0, 2)), guest, each("physical_id", [b"%d\n" % n for n in physical]), vsmt=vsmt
    )
    assert seen.numbers == {n: n for n in range(4)} | {8 + n: 4 + n for n in range(4)}


def test_ppc64_that_is_not_pseries_takes_numbers_for_ids_where_no_other_reading_is_possible():
    files = each("physical_id", [b"%d\n" % (4 * n) for n in range(4)])
    assert look(ppc64((0,)), cpus(0, 1, 2, 3), files).numbers == {n: n for n in range(4)}


def test_ppc64_that_is_not_pseries_knows_none_where_another_is():
    files = each("physical_id", [b"%d\n" % (4 * n) for n in range(4)]) | {PRESENT: b"0-7"}
    seen = look(ppc64((0, 2)), cpus(*range(8)), files)
    assert (seen.numbers, seen.assumed) == ({}, True)


S390 = machine("s390x", (0, 1, 3))


def test_s390x_by_address():
    seen = look(S390, cpus(0, 1, 2), each("address", [b"0\n", b"1\n", b"3\n"]))
    assert seen.numbers == {0: 0, 1: 1, 3: 2}


def test_s390x_addresses_are_core_ids_which_are_not_always_vcpu_ids():
    # Core 0 was plugged into another socket: sorted, it is the last.
    places = [(3, 0), (0, 1), (0, 2)]
    slots = [
        {
            "type": "t",
            "vcpus-count": 1,
            "props": {"socket-id": s, "core-id": c},
            "qom-path": f"/c{c}",
        }
        for s, c in places
    ]
    fast = [{"cpu-index": c, "qom-path": f"/c{c}", "thread-id": 100 + c} for _, c in places]
    state = Qemu("s390x", "s390-ccw-virtio").state(slots, fast)
    assert look(state, cpus(0, 1, 2), each("address", [b"0\n", b"1\n", b"2\n"])).numbers == {
        0: 1,
        1: 2,
        2: 0,
    }


def test_two_cpus_that_claim_one_vcpu_are_not_believed():
    assert look(S390, cpus(0, 1, 2), each("address", [b"0\n", b"1\n", b"1\n"])).numbers == {0: 0}


@pytest.mark.parametrize("claim", [b"7\n", b"-1", b"x", b"", None, b"9" * 30])
def test_a_cpu_that_claims_what_is_not_there_is_not_believed(claim):
    assert look(S390, cpus(0, 1), each("address", [b"0", claim])).numbers == {0: 0}


ARM = machine("aarch64", range(8))
MPIDRS = each("of_node/reg", [bytes([0, 0, n // 4, n % 4]) for n in range(8)])


def test_arm64_by_the_rank_of_its_mpidr():
    assert look(ARM, cpus(*range(8)), MPIDRS).numbers == {n: n for n in range(8)}


def test_arm64_where_the_guest_numbers_them_otherwise():
    swapped = MPIDRS | {
        SYS.format(0, "of_node/reg"): bytes([0, 0, 0, 1]),
        SYS.format(1, "of_node/reg"): bytes(4),
    }
    assert look(ARM, cpus(*range(8)), swapped).numbers[0] == 1


def test_arm64_with_one_missing_knows_none():
    files = each("of_node/reg", [mpidr.to_bytes(8, "big") for mpidr in (0, 1, 3)])
    assert look(machine("aarch64", (0, 1, 2, 3)), cpus(0, 1, 2), files).numbers == {}


def test_riscv64_by_hart_id():
    files = each("of_node/reg", [hart.to_bytes(4, "big") for hart in (2, 0, 1)])
    assert look(machine("riscv64", (0, 1, 2)), cpus(0, 1, 2), files).numbers == {0: 1, 1: 2, 2: 0}


# -- where nothing tells ---------------------------------------------------------------------------


def test_numbers_are_taken_for_ids_where_no_other_reading_is_possible():
    seen = look(machine(plugged=(0, 1)), cpus(0, 1))
    assert (seen.numbers, seen.assumed, seen.strays) == ({0: 0, 1: 1}, True, 0)


def test_numbers_are_not_taken_for_ids_where_an_id_is_left_out():
    seen = look(machine(plugged=(0, 2)), cpus(0, 1))
    assert (seen.numbers, seen.assumed, seen.strays) == ({}, True, 2)


@pytest.mark.parametrize(
    ("state", "guest"),
    [
        (machine(plugged=(0, 1)), cpus(0, 1, 2)),
        # The guest numbered them as they came, and that is not told.
        (x86((0, 1)), cpus(0, 1)),
        # riscv64's boot hart is drawn by lot.
        (machine("riscv64", (0, 1)), cpus(0, 1)),
    ],
    ids=["more CPUs than vCPUs", "two that were plugged", "any may boot"],
)
def test_where_another_reading_is_possible_none_is_known(state, guest):
    assert look(state, guest).numbers == {}


# -- the agent's list ------------------------------------------------------------------------------


def test_as_many_cpus_as_there_can_be():
    assert len(read(cpus(*range(5)), 5)) == 5


def test_more_cpus_than_there_can_be():
    with pytest.raises(VcpuConnectionError, match="5 CPUs, but the guest can have 4"):
        read(cpus(*range(5)), 4)


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
        read(reply)
    assert (caught.value.reason, bool(caught.value.hint)) == ("malformed", True)


def test_a_list_of_cpus_in_any_order():
    rows = [
        {"logical-id": 1, "online": False, "can-offline": True},
        {"logical-id": 0, "online": True, "extra": 1},
    ]
    assert read(rows) == [
        {"logical-id": 0, "online": True, "can-offline": None},
        {"logical-id": 1, "online": False, "can-offline": True},
    ]


def port(name, is_open=True):
    return {"label": "x", "filename": name, "frontend-open": is_open}


SHUT = [port("pty:/dev/pts/1"), port("disconnected:unix:/run/agent,server=on", False)]


@pytest.mark.parametrize(
    ("chardevs", "path", "is_open"),
    [
        (SHUT, "/run/agent", False),
        ([port("unix:/run/agent,server=on")], "/run/agent", True),
        (SHUT, "/run/agent2", None),
        ([port("unix:/run/a, b/agent,server=on", False)], "/run/a, b/agent", False),
    ],
)
def test_whether_anybody_in_the_guest_has_opened_the_port(chardevs, path, is_open):
    assert port_is_open(chardevs, path) is is_open


@pytest.mark.parametrize(
    "nonsense", [None, 5, [], [5], [{}], [port(5)], [port("unix:/run/agent", "x")]]
)
def test_what_is_not_a_list_of_ports_tells_nothing(nonsense):
    assert port_is_open(nonsense, "/run/agent") is None


@pytest.mark.parametrize(
    ("before", "now", "lists_all", "numbers"),
    [
        (cpus(0, 1), cpus(0, 1, offline=(2, 3)), False, [2, 3]),
        (cpus(0, offline=(1,)), cpus(0, 2, offline=(1,)), False, [2]),
        # Another client took another one online meanwhile: those that are new count.
        (cpus(0, offline=(1,)), cpus(0, 1, offline=(2,)), False, [2]),
        # ppc64 lists them all the time.
        (cpus(0, 1, offline=(2, 3, 4, 5)), cpus(0, 1, 4, 5, offline=(2, 3)), True, [4, 5]),
        (cpus(0, offline=(1,)), cpus(0, 1), False, []),
        (cpus(0, 1), cpus(0, 1), False, []),
    ],
)
def test_what_came_is_told_from_what_was_there(before, now, lists_all, numbers):
    assert came(before, now, lists_all=lists_all) == numbers


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
    found = to_reach(cpus(0, 1, offline=(2, 3)), total)
    assert (found[0], found[1], bool(found[2])) == (ids, online, refused)


LONG = {
    "short lines": b"ab\n" * 2_700_000,
    "a name and spaces": b"processor" + b" " * 8_000_000,
    "names and spaces": (b"processor" + b" \t" * 20) * 160_000,
    "long numbers": b"processor\t: " + b"9" * 8_000_000,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_eight_mebibytes_of_cpuinfo_take_no_time_and_no_memory(text):
    tracemalloc.start()
    try:
        began = time.process_time()
        view = look(BIG, BIG_GUEST, {"/proc/cpuinfo": text})
        seconds = time.process_time() - began
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (view.assumed, peak < 1_000_000, seconds < 2) == (True, True, True), (peak, seconds)
