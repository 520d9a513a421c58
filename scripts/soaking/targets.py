"""What is fuzzed: each target takes one generated message and must end in a result or a
`VcpuError`, at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from qmpvcpu.core.model import QemuVersion
from qmpvcpu.core.state.events import CPU_EVENTS, Names, interpret
from qmpvcpu.core.state.guest_view import identify, identity_files, parse_guest_vcpus
from qmpvcpu.core.state.inventory import (
    BootFacts,
    build_state,
    parse_cpus_fast,
    parse_hotpluggable_cpus,
    parse_topology,
    parse_version,
)
from qmpvcpu.errors import VcpuError
from qmpvcpu.ports import CommandError
from qmpvcpu.qemu.agent import LINE_LIMIT, AgentClient
from scripts.soaking.documents import DOCUMENTS, document

#: The longest that any one message may take, seconds of this process alone: others may keep the
#: CPUs busy.
PATIENCE = 2.0

WORDS = st.sampled_from(
    [
        *(
            "return",
            "error",
            "class",
            "desc",
            "id",
            "logical-id",
            "online",
            "can-offline",
            "handle",
            "buf-b64",
        ),
        *(
            "props",
            "socket-id",
            "core-id",
            "thread-id",
            "node-id",
            "qom-path",
            "vcpus-count",
            "type",
            "eof",
        ),
        *(
            "cpu-index",
            "target",
            "info",
            "slot-type",
            "slot",
            "source",
            "status",
            "device",
            "path",
            "event",
        ),
        *(
            "CPU",
            "/machine/peripheral/vcpu1",
            "/machine/unattached/device[0]",
            "qmpvcpu#2",
            "vcpu1",
            "t-cpu",
        ),
    ]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.integers(),
    st.floats(),
    WORDS,
    st.text(max_size=20),
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=12,
)


def rows(*keys: str) -> st.SearchStrategy[Any]:
    """Lists of objects that nearly are what is expected."""
    values = st.one_of(st.integers(0, 3), st.booleans(), LEAVES, ANYTHING)
    return (
        st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(keys, values)), max_size=5)
        | ANYTHING
    )


GUEST_CPUS = rows("logical-id", "online", "can-offline")
CPUS_FAST = rows("cpu-index", "qom-path", "thread-id", "props", "target")
SLOTS = rows("props", "vcpus-count", "type", "qom-path")

AGENT_LINES = st.one_of(
    GUEST_CPUS.map(lambda value: json.dumps({"return": value, "id": "qmpvcpu#2"}).encode()),
    ANYTHING.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=60),
    # Large ones are made where they are used: hypothesis keeps thousands of what it has made.
    st.tuples(st.just(b"["), st.integers(1, 50_000)),
    st.tuples(st.just(b"9"), st.integers(1, 9000)),
    st.tuples(st.just(b" "), st.integers(LINE_LIMIT - 2, LINE_LIMIT + 9)),
)
AGENT_BYTES = st.tuples(
    st.binary(max_size=30),
    st.lists(AGENT_LINES, max_size=3),
    st.sampled_from([b"\n", b"", b"\xff", b"\r\n"]),
)


class _Writer:
    """Takes everything, as a socket would; its own transport."""

    def __init__(self) -> None:
        self.transport = self

    def write(self, data: bytes) -> None: ...

    async def drain(self) -> None: ...

    def abort(self) -> None: ...

    async def wait_closed(self) -> None: ...


LOOP = asyncio.new_event_loop()


def agent_bytes(message: tuple[bytes, list[bytes | tuple[bytes, int]], bytes]) -> bytes:
    """What the agent says, whole."""
    before, lines, end = message
    whole = (line[0] * line[1] if isinstance(line, tuple) else line for line in lines)
    return before + b'\xff{"return": 1}\n' + b"\n".join(whole) + end


def agent_answer(message: tuple[bytes, list[bytes | tuple[bytes, int]], bytes]) -> None:
    """`AgentClient` reads this instead of an agent; its end is the end of the connection, so
    nothing waits.
    """

    async def talk() -> None:
        client = AgentClient("fuzz", timeout=PATIENCE)
        client._reader = asyncio.StreamReader(limit=LINE_LIMIT)
        client._writer = _Writer()  # type: ignore[assignment]
        client._reader.feed_data(agent_bytes(message))
        client._reader.feed_eof()
        try:
            parse_guest_vcpus(await client.get_vcpus())
        except (VcpuError, CommandError) as error:
            assert str(error)

    LOOP.run_until_complete(talk())


BOOT = BootFacts("d", "x86_64", "m", True, QemuVersion(10, 0), None)
STATE = build_state(
    BOOT,
    parse_hotpluggable_cpus(
        [
            {
                "props": {"socket-id": n},
                "vcpus-count": 1,
                "type": "t-cpu",
                **({"qom-path": f"/machine/peripheral/vcpu{n}"} if n < 2 else {}),
            }
            for n in range(4)
        ]
    ),
    parse_cpus_fast(
        [
            {"cpu-index": n, "qom-path": f"/machine/peripheral/vcpu{n}", "thread-id": 7 + n}
            for n in range(2)
        ]
    ),
)
NAMES = Names(STATE.entities)


def guest_view(message: tuple[Any, dict[str, bytes]]) -> None:
    """The guest's list of CPUs and what its files say: only enabled vCPUs are ever named."""
    reply, files = message
    cpus = parse_guest_vcpus(reply)
    wanted = list(identity_files(STATE, cpus))
    view = identify(STATE, cpus, dict(zip(wanted, files.values(), strict=False)))
    assert set(view.by_vcpu) <= {0, 1}


def replies(message: tuple[Any, Any, Any]) -> None:
    """QEMU's replies of one inventory."""
    slots, cpus, other = message
    for parse in (parse_topology, lambda value: parse_version({"version": value})):
        with contextlib.suppress(VcpuError):
            parse(other)
    build_state(BOOT, parse_hotpluggable_cpus(slots), parse_cpus_fast(cpus))


def event(message: tuple[str, Any]) -> None:
    """An event about anything."""
    name, data = message
    signal = interpret(name, data if isinstance(data, dict) else {}, NAMES)
    assert signal is None or signal.entity_id in (None, 0, 1, 2, 3)


EVENT_DATA = st.dictionaries(WORDS, LEAVES | st.dictionaries(WORDS, LEAVES, max_size=6), max_size=4)

TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "agent": (AGENT_BYTES, agent_answer),
    "guest": (
        st.tuples(GUEST_CPUS, st.dictionaries(st.text(max_size=3), st.binary(max_size=80))),
        guest_view,
    ),
    "replies": (st.tuples(SLOTS, CPUS_FAST, ANYTHING), replies),
    "event": (st.tuples(st.sampled_from(sorted(CPU_EVENTS)), EVENT_DATA), event),
    "document": (DOCUMENTS, document),
}


def feed(name: str, message: Any) -> None:
    """One message to one target."""
    began = time.process_time()
    try:
        TARGETS[name][1](message)
    except VcpuError as error:
        assert error.message
    assert time.process_time() - began < PATIENCE, "too slow"
