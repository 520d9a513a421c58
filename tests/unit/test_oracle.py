"""The transaction and the one of `house-0` do the same, whatever QEMU, the guest and the caller do,
and when.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.oracle import Answer, Hour, Reply, now, then
from tests.support.soaking import count

_ERRORS = [
    "no",
    "Duplicate device ID 'vcpu1' for device",
    "CPU[1] exists",
    "acpi: device unplug request for not supported device type: t",
]
_REPLIES = st.builds(
    Reply,
    st.sampled_from([0.001, 0.0101, 0.203]),
    st.one_of(st.none(), st.none(), st.sampled_from(_ERRORS)),
)
_ANSWERS = st.builds(
    Answer,
    st.sampled_from(["go", "go", "go unheard", "refuse", "nothing"]),
    st.sampled_from([0.0002, 0.107, 0.611, 4.31, 6.13]),
)
_HOURS = st.builds(
    Hour,
    plugs=st.lists(st.integers(1, 3), unique=True).map(tuple),
    unplugs=st.lists(st.integers(4, 6), unique=True).map(tuple),
    awaited=st.lists(st.integers(7, 8), unique=True).map(tuple),
    doubted=st.frozensets(st.integers(4, 6)),
    timeout=st.sampled_from([0.0, 1.777, 8.111]),
    wait=st.booleans(),
    atomic=st.booleans(),
    retries=st.integers(0, 2),
    drops=st.booleans(),
    undo_forbidden=st.sampled_from([None, None, "it kills"]),
    restore_forbidden=st.sampled_from([None, None, "it kills"]),
    replies=st.dictionaries(
        st.integers(1, 8), st.lists(_REPLIES, max_size=4).map(tuple), max_size=4
    ),
    answers=st.dictionaries(
        st.integers(1, 8), st.lists(_ANSWERS, max_size=4).map(tuple), max_size=6
    ),
    resets=st.sampled_from([(), (), (0.307,), (2.9,)]),
    cancels=st.sampled_from([(), (), (), (0.00071,), (0.0503,), (1.3,), (0.4, 0.9)]),
)


@given(_HOURS)
@settings(max_examples=count(150), deadline=None)
def test_both_send_the_same_and_end_alike(hour):
    was, is_now = then(hour), now(hour)
    assert (is_now.sent, is_now.end) == (was.sent, was.end)
