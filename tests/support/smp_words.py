"""Words of -machine, -smp and -numa: generated, asked of a real QEMU, and worked out without one."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from qmpvcpu import MachineLayout, MachineSpec, QemuVersion, VcpuError, parse_numa
from qmpvcpu.core.machine.layout import QemuFacts, predict_layout
from qmpvcpu.core.machine.smp import LEVELS, parse_machine
from tests.support.qemus import qemu_binary

#: QEMUs at once.
AT_ONCE = 2
#: Seconds for one.
PATIENCE = 120


@dataclass(frozen=True)
class Case:
    """A QEMU, and words for it: "machine", "smp" or "numa" and the argument. `memory`: MiB of all
    its nodes.
    """

    arch: str
    version: str
    words: tuple[tuple[str, str], ...]
    memory: int

    def spec(self) -> MachineSpec:
        """What our command line makes of it. Raises VcpuUsageError."""
        machine, smp = parse_machine([word for word in self.words if word[0] != "numa"])
        return MachineSpec(machine, smp, numa=parse_numa(self.of("numa")))

    def of(self, option: str) -> list[str]:
        return [text for name, text in self.words if name == option]

    def to_json(self) -> list[Any]:
        return [self.arch, self.version, [list(word) for word in self.words], self.memory]

    @classmethod
    def from_json(cls, row: Sequence[Any]) -> Case:
        arch, version, words, memory = row
        return cls(arch, version, tuple((option, text) for option, text in words), memory)


@dataclass(frozen=True)
class Answer:
    """What a machine is, as a digest; None: it is refused, and why."""

    digest: str | None
    text: str = ""


def _digest(topology: Mapping[str, int], slots: Sequence[Any]) -> str:
    counts = {key: topology.get(key, 1) for key in ("cpus", "maxcpus", *LEVELS)}
    text = json.dumps([counts, slots], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# -- answers ---------------------------------------------------------------------------------------

_COMMANDS = (
    {"execute": "qmp_capabilities"},
    {"execute": "query-hotpluggable-cpus"},
    {"execute": "qom-get", "arguments": {"path": "/machine", "property": "smp"}},
    {"execute": "quit"},
)
_INPUT = "".join(json.dumps(command) + "\n" for command in _COMMANDS)
_PAUSED = (
    "-S",
    "-nodefaults",
    "-display",
    "none",
    "-no-user-config",
    "-accel",
    "tcg",
    "-qmp",
    "stdio",
)
#: MiB of one node.
_NODE_MEMORY = {"ppc64": 256}


def ask(case: Case) -> Answer:
    """A real QEMU's answer."""
    words = [*_PAUSED, "-m", f"{case.memory}M"]
    memdevs = dict.fromkeys(
        found for text in case.of("numa") for found in re.findall(r"memdev=(\w+)", text)
    )
    for name in memdevs:
        words += [
            "-object",
            f"memory-backend-ram,id={name},size={_NODE_MEMORY.get(case.arch, 16)}M",
        ]
    for option, text in case.words:
        words += [f"-{option}", text]
    run = subprocess.run(
        [qemu_binary(case.version, case.arch), *words],
        input=_INPUT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    replies = [row["return"] for row in rows if "return" in row]
    if run.returncode or len(replies) < len(_COMMANDS) - 1:
        # The last line but one is the error where a hint follows.
        said = [line for line in run.stderr.splitlines() if line.startswith("qemu")] or [
            "no machine"
        ]
        return Answer(None, said[-1].partition(": ")[2][:100])
    # QEMU lists the highest slot first.
    slots = [
        [slot["props"], slot["vcpus-count"], "qom-path" in slot] for slot in reversed(replies[1])
    ]
    return Answer(_digest(replies[2], slots))


def ask_all(cases: Sequence[Case]) -> list[Answer]:
    """The answers of real QEMUs, some at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, cases))


def answer_of(layout: MachineLayout) -> Answer:
    """A layout in the same words."""
    assert layout.topology is not None
    topology = {key: getattr(layout.topology, key) for key in ("maxcpus", *LEVELS)}
    slots = [[dict(slot.props or {}), slot.vcpus_count, slot.plugged] for slot in layout.slots]
    return Answer(_digest(topology | {"cpus": layout.cpus}, slots))


def work_out(case: Case) -> Answer | None:
    """The answer of arithmetic alone, as for a QEMU whose version is known; None: it leaves it to
    QEMU.
    """
    facts = QemuFacts(case.arch, QemuVersion(*map(int, case.version.split("."))))
    try:
        layout = predict_layout(case.spec(), case.arch, facts)
    except VcpuError as error:
        return Answer(None, error.message)
    return answer_of(layout) if layout is not None else None


# -- words -----------------------------------------------------------------------------------------


VERSIONS = ("7.2", "10.0", "11.1")
#: Machine types of each architecture that every one of these QEMUs has, and those that some have.
MACHINES: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "x86_64": (
        ("q35", "q35", "pc", "pc-q35-6.1", "pc-i440fx-6.2", "pc-q35-7.2"),
        (
            "pc-q35-5.0",
            "pc-i440fx-4.2",
            "pc-q35-8.0",
            "pc-q35-9.9",
            "pc-i440fx-10.1",
            "pc-q35-11.0",
            "pc-q35-2.3",
        ),
    ),
    "ppc64": (
        ("pseries", "pseries", "pseries-6.1", "pseries-7.2"),
        ("pseries-5.0", "pseries-8.0", "pseries-2.9"),
    ),
    "s390x": (
        ("s390-ccw-virtio", "s390-ccw-virtio", "s390-ccw-virtio-6.1", "s390-ccw-virtio-7.1"),
        ("s390-ccw-virtio-2.8", "s390-ccw-virtio-8.2", "s390-ccw-virtio-11.1"),
    ),
    "loongarch64": (("virt",), ("virt-11.1", "virt-10.0")),
}
QEMUS = [
    (arch, version)
    for arch in MACHINES
    for version in VERSIONS
    if (arch, version) != ("loongarch64", "7.2")
]
_SUPPORTED = {
    "x86_64": ("sockets", "dies", "modules", "cores", "threads"),
    "ppc64": ("sockets", "cores", "threads"),
    "s390x": ("drawers", "books", "sockets", "cores"),
    "loongarch64": ("sockets", "cores", "threads"),
}
_NEWER = ("drawers", "books", "modules")


def chance(draw: Random, percent: int) -> bool:
    """Whether, so many times of a hundred."""
    return draw.randrange(100) < percent


def shuffled(draw: Random, values: Sequence[Any]) -> list[Any]:
    return draw.sample(values, len(values))


def pick(draw: Random, *values: Any) -> Any:
    return draw.choice(values)


_FORMS: Sequence[Callable[[int], str]] = (
    lambda n: f"0{n:o}",
    hex,
    lambda n: f"0X{n:X}",
    lambda n: f"+{n}",
    lambda n: f" {n}",
    lambda n: f"00{n:o}",
)
#: Numbers that are none, or other ones than they seem.
_ODD = (
    "",
    "08",
    "0x",
    "x",
    "4K",
    "2M",
    "1.0",
    "1e1",
    "-1",
    "4 ",
    "0b1x",
    "99999999999999999999",
    "0",
    "00",
)


def number(draw: Random, value: int) -> str:
    """In one of C's forms."""
    return str(value) if chance(draw, 60) else str(pick(draw, *_FORMS)(value))


def case(draw: Random) -> Case:
    arch, version = pick(draw, *QEMUS)
    usual, odd = MACHINES[arch]
    machine = pick(draw, *usual) if chance(draw, 88) else pick(draw, *odd)
    topology = _topology(draw, arch, version)
    counts = _counts(draw, topology, arch, version)
    has_numa = chance(draw, 10 if arch == "s390x" else 65)
    options: list[tuple[str, str]] = []
    has_hmat = has_numa and chance(draw, 30)
    if has_hmat:
        options.append(("hmat", pick(draw, "on", "on", "on", "yes", "true", "off")))
    if chance(draw, 12):
        options.append(_machine_option(draw, arch))
    words = _merged(draw, machine, options, [] if chance(draw, 4) else counts)
    memory = _NODE_MEMORY.get(arch, 16)
    if has_numa:
        numa, nodes = _numa(draw, arch, machine, topology, has_hmat=has_hmat)
        words += [("numa", text) for text in numa]
        memory *= nodes
    return Case(arch, version, tuple(words), memory)


def _topology(draw: Random, arch: str, version: str) -> dict[str, int]:
    """Levels that fit."""
    found = {level: pick(draw, 1, 1, 2) for level in _SUPPORTED[arch]}
    found |= {"sockets": pick(draw, 1, 1, 2, 3), "cores": pick(draw, 1, 2, 3, 4)}
    if arch == "ppc64":
        found["threads"] = pick(draw, 1, 1, 2, 4, 8) if version != "7.2" or chance(draw, 10) else 1
    if version == "7.2":
        found |= {level: 1 for level in _NEWER if level in found}
    return found


def _counts(
    draw: Random, topology: Mapping[str, int], arch: str, version: str
) -> list[tuple[str, str]]:
    """Keys and values of -smp; what QEMU works out itself is often missing."""
    maxcpus = prod(topology.values())
    step = topology.get("threads", 1) if arch == "ppc64" else 1
    cpus = pick(draw, *range(step, maxcpus + 1, step))
    values = {"cpus": cpus, "maxcpus": maxcpus} | dict(topology)
    for level in LEVELS:
        if level not in values and chance(draw, 12):
            values[level] = 1
    if version == "7.2" and chance(draw, 70):
        values = {key: value for key, value in values.items() if key not in _NEWER}
    # One level may be missing whatever it is, and each that is 1.
    left_out = pick(draw, *topology)
    can_go = left_out in ("sockets", "cores", "threads") and chance(draw, 50)
    values = {
        key: value
        for key, value in values.items()
        if not (can_go and key == left_out)
        and not (key in LEVELS and value == 1 and chance(draw, 35))
    }
    if cpus == maxcpus and chance(draw, 50):
        del values[pick(draw, "cpus", "maxcpus")]
    if chance(draw, 9):
        key = pick(draw, *values)
        values[key] = max(0, values[key] + pick(draw, -1, 1, 2, 2**32))
    pairs = [(key, number(draw, value)) for key, value in shuffled(draw, list(values.items()))]
    if pairs and chance(draw, 9):
        place = pick(draw, *range(len(pairs)))
        pairs[place] = (pairs[place][0], pick(draw, *_ODD))
    if pairs and chance(draw, 15):
        # The last one counts.
        key = pick(draw, *pairs)[0]
        pairs.insert(0, (key, pick(draw, *_ODD, "3", "7")))
    if chance(draw, 4):
        pairs.append(
            (pick(draw, *LEVELS, "x", "CPUS", "smp", "max_cpus"), pick(draw, "0", "1", "2"))
        )
    return pairs


def _machine_option(draw: Random, arch: str) -> tuple[str, str]:
    """Some that every machine has."""
    key = pick(
        draw,
        "usb",
        "graphics",
        "dump-guest-core",
        "mem-merge",
        "mem_merge",
        "kernel-irqchip",
        "smm",
    )
    if key == "kernel-irqchip" or (key == "smm" and arch == "x86_64"):
        return key, pick(draw, "on", "off")
    key = "usb" if key == "smm" else key
    return key, pick(draw, "off", "no", "false", "n") if chance(draw, 85) else pick(
        draw, "Off", "", "0", "maybe"
    )


def _merged(
    draw: Random,
    machine: str,
    options: Sequence[tuple[str, str]],
    counts: Sequence[tuple[str, str]],
) -> list[tuple[str, str]]:
    """-machine and -smp, in one piece or in several."""
    first = machine if chance(draw, 90) else f"type={machine}"
    words = [("machine", ",".join([first, *(f"{key}={value}" for key, value in options)]))]
    rest = list(counts)
    while rest:
        taken = len(rest) if chance(draw, 75) else pick(draw, *range(1, len(rest) + 1))
        part, rest = rest[:taken], rest[taken:]
        if chance(draw, 12):
            words.append(("machine", ",".join(f"smp.{key}={value}" for key, value in part)))
        else:
            is_bare = part[0][0] == "cpus" and part[0][1] and chance(draw, 70)
            text = ",".join(f"{key}={value}" for key, value in part)
            words.append(("smp", text.removeprefix("cpus=") if is_bare else text))
    if chance(draw, 4):
        words.append(
            (
                "smp",
                pick(draw, "", "4,", "4,8", ",", "help", "?", "4,cores", "=4", "cpus=2,,cores=2"),
            )
        )
    if chance(draw, 3):
        words.append(
            (
                "machine",
                pick(draw, machine, "", "nope", "usb=off", "smp=2", "usb", '{"type":"q35"}'),
            )
        )
    if chance(draw, 4):
        # The type may stand behind.
        words = [*words[1:], words[0]]
    return words


def _numa(
    draw: Random, arch: str, machine: str, topology: Mapping[str, int], *, has_hmat: bool
) -> tuple[list[str], int]:
    """-numa, and how many nodes have memory."""
    maxcpus = prod(topology.values())
    count = pick(draw, 1, 2, 2, 3)
    ids = list(range(count))
    order = ids if chance(draw, 80) else shuffled(draw, ids)
    takes_mem = arch == "loongarch64" or machine in (
        "pc-q35-5.0",
        "pc-i440fx-4.2",
        "pseries-5.0",
        "pseries-2.9",
    )
    has_mem = chance(draw, 60 if takes_mem else 4)
    with_memory = [node for node in ids if not chance(draw, 25)] or [pick(draw, *ids)]
    how = pick(draw, "cpus", "cpus", "cpu", "nobody") if not has_hmat else "cpus"
    size = topology.get("threads", 1) if arch == "ppc64" else 1
    # Whole cores where a slot is one.
    owner = [pick(draw, *ids) for _ in range(maxcpus // size)]
    words = []
    for node in order:
        keys = [] if order == ids and chance(draw, 40) else [f"nodeid={number(draw, node)}"]
        if how == "cpus":
            mine = [
                cpu for cpu in range(maxcpus) if owner[cpu // size] == node and not chance(draw, 5)
            ]
            keys += [f"cpus={text}" for text in _cpus(draw, mine)]
        if node in with_memory:
            keys.append(
                f"mem={_size(draw, _NODE_MEMORY.get(arch, 16))}" if has_mem else f"memdev=m{node}"
            )
        if has_hmat and chance(draw, 30):
            keys.append(f"initiator={number(draw, pick(draw, *ids))}")
        words.append(",".join([pick(draw, "node", "node", "type=node"), *shuffled(draw, keys)]))
    if how == "cpu":
        words += [_cpu(draw, arch, topology, ids) for _ in range(pick(draw, 1, 2, 3))]
    if count > 1 and chance(draw, 35):
        words += _distances(draw, ids)
    if has_hmat:
        words += _hmat(draw, sorted(set(owner)), ids)
    if chance(draw, 14):
        words = _spoiled(draw, words, maxcpus)
    return words, len(with_memory)


def _cpus(draw: Random, cpus: Sequence[int]) -> list[str]:
    """In ranges, or one by one."""
    found: list[list[int]] = []
    for cpu in cpus:
        if found and found[-1][-1] == cpu - 1 and not chance(draw, 20):
            found[-1].append(cpu)
        else:
            found.append([cpu])
    return [
        number(draw, run[0])
        + (f"-{number(draw, run[-1])}" if len(run) > 1 or chance(draw, 10) else "")
        for run in found
    ]


def _size(draw: Random, size: int) -> str:
    """MiB."""
    return str(
        pick(
            draw,
            f"{size}M",
            f"{size}",
            f"0{size}m",
            f"{size}.0M",
            f"{size << 10}k",
            f"{size << 20}b",
            f"{size / 1024}G",
            hex(size),
            f"{size / 1024}G".removeprefix("0"),
            f"{hex(size)}M",
        )
    )


def _cpu(draw: Random, arch: str, topology: Mapping[str, int], ids: Sequence[int]) -> str:
    core = pick(draw, *range(topology["cores"])) * (topology["threads"] if arch == "ppc64" else 1)
    props = {"core-id": core} if arch == "ppc64" or chance(draw, 50) else {}
    if arch != "ppc64" and (not props or chance(draw, 50)):
        props["socket-id"] = pick(draw, *range(topology["sockets"]))
    for key in ("thread-id", "die-id", "module-id", "cluster-id", "drawer-id", "book-id"):
        if chance(draw, 5):
            props[key] = pick(draw, 0, 0, 1)
    pairs = [("node-id", pick(draw, *ids)), *props.items()]
    return ",".join(
        ["cpu", *(f"{key}={number(draw, value)}" for key, value in shuffled(draw, pairs))]
    )


def _distances(draw: Random, ids: Sequence[int]) -> list[str]:
    is_whole = chance(draw, 40)
    words = []
    for one in ids:
        for other in ids:
            is_wanted = (one < other or is_whole) if one != other else chance(draw, 20)
            if is_wanted and not chance(draw, 6):
                value = 10 if one == other else pick(draw, 10, 11, 20, 20, 254, 255)
                keys = {"src": one, "dst": other, "val": value}
                words.append(
                    ",".join(["dist", *(f"{key}={number(draw, n)}" for key, n in keys.items())])
                )
    return words


def _hmat(draw: Random, initiators: Sequence[int], ids: Sequence[int]) -> list[str]:
    words = []
    for target in ids:
        for kind in ("access-latency", "access-bandwidth"):
            if chance(draw, 85):
                value = pick(draw, "latency=5", "latency=0x64", "latency=010", "latency=0")
                if kind.endswith("bandwidth"):
                    value = pick(
                        draw,
                        "bandwidth=200M",
                        "bandwidth=0x40000000",
                        "bandwidth=1.5G",
                        "bandwidth=0x10M",
                    )
                where = f"initiator={pick(draw, *initiators)},target={target}"
                words.append(f"hmat-lb,{where},hierarchy=memory,data-type={kind},{value}")
        for level in range(1, pick(draw, 1, 2, 3)):
            size = pick(draw, f"{level}0K", f"{level * 8}k", f"0x{level}000")
            policy = pick(draw, "none", "write-back", "write-through")
            policy = f"associativity={pick(draw, 'none', 'direct', 'complex')},policy={policy}"
            words.append(
                f"hmat-cache,node-id={target},size={size},level={level},{policy},line={number(draw, 8)}"
            )
    return words


def _spoiled(draw: Random, words: list[str], maxcpus: int) -> list[str]:
    """One thing that QEMU may not take."""
    place = pick(draw, *range(len(words)))
    text = words[place]
    how = pick(draw, "order", "twice", "key", "number", "range", "type", "beyond", "without")
    if how == "order":
        return list(shuffled(draw, words))
    if how == "twice":
        # Another node with memory makes another sum.
        return words if "mem=" in text else [*words, text]
    if how == "without":
        keys = text.split(",")
        del keys[pick(draw, *range(len(keys)))]
        # So does one without its own.
        return words if "mem" in text else [*words[:place], ",".join(keys), *words[place + 1 :]]
    if how == "beyond":
        text += f",cpus={number(draw, maxcpus)}"
    elif how == "range":
        text += f",cpus={pick(draw, '0-', '3-1', '-1', '0-0x', '0--1', '0,,1', '65536', ' 0-+0', '1-2-3')}"
    elif how == "key":
        text += f",{pick(draw, 'x=1', 'id=x', 'cpus', 'nodeid', 'type=cpu', '=1', '')}"
    elif how == "type":
        text = pick(
            draw,
            "",
            "help",
            "nod,nodeid=0",
            "Node",
            "nodeid=0",
            '{"type":"node"}',
            "dist",
            "cpu",
            "hmat-lb",
        )
    else:
        values = list(re.finditer(r"(?<!mem)=(\d+)", text))
        if values:
            found = pick(draw, *values)
            text = f"{text[: found.start()]}={pick(draw, *_ODD)}{text[found.end() :]}"
    return [*words[:place], text, *words[place + 1 :]]


#: The random numbers are hypothesis's; each draw of its own would cost a hundred times as much.
CASES = st.randoms(use_true_random=True).map(case)


def generate(count: int, seed: int) -> list[Case]:
    """So many cases; the same for the same seed."""
    found: dict[Case, None] = {}

    @seeded(seed)
    @settings(
        # Some come twice.
        max_examples=count + count // 20 + 10,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES)
    def collect(case: Case) -> None:
        found[case] = None

    collect()
    return list(found)[:count]


# -- recorded answers ------------------------------------------------------------------------------

RECORDED = Path(__file__).resolve().parents[1] / "data" / "smp.jsonl.gz"
#: Written by scripts/record-qmp.
RECORDED_COUNT, RECORDED_SEED = 2000, 20


def record(count: int, seed: int) -> str:
    """A line of JSON for each generated case, with what its QEMU answers."""
    cases = generate(count, seed)
    rows = []
    for case, answer in zip(cases, ask_all(cases), strict=True):
        rows.append(
            [*case.to_json(), answer.digest, *([answer.text] if answer.digest is None else [])]
        )
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def write_recorded(text: str) -> None:
    RECORDED.write_bytes(gzip.compress(text.encode(), mtime=0))


def recorded() -> str:
    return gzip.decompress(RECORDED.read_bytes()).decode()


def read_recorded() -> list[tuple[Case, Answer]]:
    rows = [json.loads(line) for line in recorded().splitlines()]
    return [(Case.from_json(row[:4]), Answer(*row[4:])) for row in rows]


# -- what there was --------------------------------------------------------------------------------

_SEEN: Mapping[str, Callable[[Case], bool]] = {
    **{
        level: partial(lambda key, case: f"{key}=" in _smp(case), level)
        for level in ("maxcpus", *LEVELS)
    },
    "missing level": lambda case: (
        not {"sockets=", "cores=", "threads="} <= set(re.findall(r"\w+=", _smp(case)))
    ),
    "zero": lambda case: re.search(r"(=|^)0+(,|$| )", _smp(case)) is not None,
    "octal": lambda case: re.search(r"[=, -]0[0-7]", _all(case)) is not None,
    "hexadecimal": lambda case: re.search(r"[=, -]0[xX]", _all(case)) is not None,
    "signed": lambda case: re.search(r"[=, -][+-]\d", _all(case)) is not None,
    "suffix": lambda case: re.search(r"\d[KkMmGb]\b", _all(case)) is not None,
    "-smp repeated": lambda case: len(case.of("smp")) > 1,
    "-machine repeated": lambda case: len(case.of("machine")) > 1,
    "smp. in -machine": lambda case: any("smp." in text for text in case.of("machine")),
    "key repeated": lambda case: any(
        len(set(found)) < len(found) for found in [re.findall(r"[a-z]+(?==)", _smp(case))]
    ),
    "no -smp": lambda case: "=" not in _smp(case) and not case.of("smp"),
    "old or missing type": lambda case: _machine(case) not in MACHINES[case.arch][0],
    "node": lambda case: _has(case, r"^(type=)?node"),
    "cpus=": lambda case: _has(case, "cpus="),
    "cpus= range": lambda case: _has(case, r"cpus=\S*\d-"),
    "cpu": lambda case: _has(case, "^cpu"),
    "dist": lambda case: _has(case, "^dist"),
    "hmat-lb": lambda case: _has(case, "^hmat-lb"),
    "hmat-cache": lambda case: _has(case, "^hmat-cache"),
    "initiator": lambda case: _has(case, "^.*node.*initiator="),
    "memory-less": lambda case: any(
        "node" in text and "mem" not in text for text in case.of("numa")
    ),
    "mem=": lambda case: _has(case, "mem="),
    **{
        f"{arch} {version}": partial(
            lambda qemu, case: (case.arch, case.version) == qemu, (arch, version)
        )
        for arch, version in QEMUS
    },
}


def _smp(case: Case) -> str:
    return " ".join([*case.of("smp"), *(text for text in case.of("machine") if "smp." in text)])


def _all(case: Case) -> str:
    return "".join(f" {text}" for _, text in case.words)


def _machine(case: Case) -> str:
    return case.of("machine")[0].partition(",")[0].removeprefix("type=")


def _has(case: Case, pattern: str) -> bool:
    return any(re.search(pattern, text) for text in case.of("numa"))


def seen(cases: Sequence[Case]) -> dict[str, int]:
    """How often each level and form is there."""
    return {name: sum(map(is_in, cases)) for name, is_in in _SEEN.items()}
