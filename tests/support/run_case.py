"""Carries out one case through the command line, on the fakes, and says what differs from what it
expects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support import contract
from tests.support.cases import Case, CaseError, Step
from tests.support.cli import Done, run_main
from tests.support.fake_agent import serve_agent
from tests.support.fake_guest import FakeGuest
from tests.support.fake_qemu import FakeQemu
from tests.support.fake_qmp import Connection, serve
from tests.support.recordings import recording
from tests.support.stand_in import StandIn
from tests.support.thread import ServerThread


def ids(text: str) -> list[int]:
    """`0-3,7` -> [0, 1, 2, 3, 7]; "" -> []."""
    found: list[int] = []
    for part in text.split(",") if text else ():
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def make_qemu(machine: dict[str, Any]) -> FakeQemu:
    """The scripted QEMU of a `[machine]` table."""
    found = recording(machine["recording"])
    qemu = FakeQemu(
        machine=found,
        kvm=machine.get("accel", "kvm") == "kvm",
        plugged=ids(machine.get("plugged", "")),
    )
    qemu.one_thread = machine.get("threads") == "single"
    qemu.status = machine.get("status", "running")
    qemu.firmware = machine.get("firmware", False)
    qemu.arch = machine.get("arch", qemu.arch)
    if "version" in machine:
        qemu.version = dict(
            zip(
                ("major", "minor", "micro"),
                map(int, f"{machine['version']}.0".split(".")),
                strict=False,
            )
        )
    for path, value in machine.get("qom", {}).items():
        found.replies[f"qom-get {path}"] = {"return": value}
    if "x2apic" in machine:
        found.replies["qom-get CPU x2apic"] = {"return": machine["x2apic"]}
    return qemu


def _say(qemu: FakeQemu, connection: Connection, text: str) -> bool | None:
    """Carry out one `do` of a `when`; True leaves the command unanswered."""
    word, _, rest = text.partition(" ")
    match word:
        case "leave":
            qemu.let_go(int(rest))
        case "leave-silently":
            qemu.let_go(int(rest), tell=False)
        case "refuse":
            qemu.refuse(int(rest))
        case "plug":
            qemu.fill(int(rest))
        case "plug-other":
            qemu.fill(int(rest), f"other{rest}")
        case "status":
            qemu.status = rest
        case "event":
            for each in qemu.connections:
                each.event(rest)
        case "obey":
            qemu.on_delete.clear()
        case "fail":
            qemu.add_errors.setdefault(int(rest), "no")
        case "silence":
            return True
        case "close":
            connection.close()
            return True
        case _:
            raise CaseError(f"'{text}': unknown word in do")
    return None


def script_qemu(qemu: FakeQemu, table: dict[str, Any]) -> None:
    """What QEMU answers from here on, by a `qemu` table."""
    for slot, how in table.get("device_add", {}).items():
        word, _, text = how.partition(": ")
        if word == "error":
            qemu.add_errors[int(slot)] = text
        else:
            qemu.on_add[int(slot)] = how
    qemu.on_delete.update({int(slot): how for slot, how in table.get("device_del", {}).items()})
    qemu.other_devices |= set(table.get("other_devices", ()))
    qemu.status = table.get("status", qemu.status)
    rules = [(rule["command"], rule.get("nth", 1), rule["do"]) for rule in table.get("when", ())]

    def hook(connection: Connection, command: dict[str, Any]) -> bool | None:
        unanswered = False
        for name, nth, what in rules:
            if command["execute"] == name and len(qemu.sent(name)) == nth:
                unanswered |= bool(_say(qemu, connection, what))
        return unanswered

    qemu.hook = hook
    for what in table.get("first", ()):
        _say(qemu, qemu.connections[0] if qemu.connections else None, what)  # type: ignore[arg-type]


def script_guest(guest: FakeGuest, table: dict[str, Any]) -> None:
    """What the guest is and answers from here on, by a `guest` table."""
    guest.online.update(dict.fromkeys(ids(table.get("offline", "")), False))
    for name in ("appears", "as_online", "lies"):
        setattr(guest, name, table.get(name, getattr(guest, name)))
    for name in ("disabled", "silent", "garbage"):
        if name in table:
            setattr(guest, name, set(table[name]))
    guest.errors = table.get("errors", guest.errors)
    if "fixed" in table:
        guest.fixed = set(ids(table["fixed"]))


class World:
    """A case's QEMU, guest and definition, with the command line that reaches them."""

    def __init__(self, case: Case, folder: Path, servers: ServerThread, stand_in: StandIn) -> None:
        self.case = case
        self.stand_in = stand_in
        self.folder = folder
        self.qemu = make_qemu(case.machine)
        self.guest = None if case.guest is None else FakeGuest(self.qemu)
        if self.guest is not None:
            script_guest(self.guest, case.guest or {})
        self.servers = servers
        self.definition: Path | None = None
        self.words: list[str] = []
        if case.file is not None:
            (folder / "file.xml").write_text(case.file)

    def enter(self) -> None:
        qmp = agent = None
        if not self.case.machine.get("stopped"):
            if self.case.machine.get("process"):
                self.qemu.real_threads = self.stand_in.threads
                server = serve(self.folder, self.qemu.script, self.stand_in.hold)
            else:
                server = serve(self.folder, self.qemu.script)
            qmp = self.servers.enter(server)
            if self.guest is not None:
                agent = self.servers.enter(serve_agent(self.folder, self.guest))
        if self.case.definition is None or self.case.domain == "socket":
            self.domain = str(qmp)
            self.words = [] if agent is None else ["--agent", agent]
            return
        xml = self.folder / "web1.xml"
        xml.write_bytes(self.case.definition.encode())
        if self.case.domain == "file":
            self.domain, self.definition = str(xml), xml
            return
        self.domain = "web1"
        define = ["define", "web1", "--xml", str(xml), "--json"]
        define += [] if qmp is None else ["--qmp", qmp]
        define += [] if agent is None else ["--agent", agent]
        done = run_main(define)
        if done.code:
            raise CaseError(f"{self.case.id}: its definition cannot be defined: {done.stderr}")
        self.definition = Path(done.json["path"])

    def leave(self) -> None:
        self.servers.leave_all()

    def run(self, request: str, *, as_json: bool = True) -> Done:
        """`qmpvcpu REQUEST --json`, with D for the domain and F for the case's file."""
        names = {"D": self.domain, "F": str(self.folder / "file.xml")}
        words = [names.get(word, word) for word in request.split()]
        return run_main([*words, *self.words, *(["--json"] if as_json else [])])


def _device(name: str, arguments: dict[str, Any]) -> str:
    props = {key: value for key, value in arguments.items() if key not in ("driver", "id")}
    words = [
        name,
        arguments["id"],
        ",".join(f"{key}={value}" for key, value in sorted(props.items())),
    ]
    return " ".join(word for word in words if word)


def _switch(arguments: dict[str, Any]) -> str:
    return " ".join(
        f"{row['logical-id']}={'online' if row['online'] else 'offline'}"
        for row in arguments["vcpus"]
    )


def _holds(expected: Any, seen: Any) -> bool:
    """Whether what is seen has all that is expected: of tables some keys, of lists every item;
    "null" is null.
    """
    if expected == "null":
        return seen is None
    if isinstance(expected, dict):
        return isinstance(seen, dict) and all(
            key in seen and _holds(item, seen[key]) for key, item in expected.items()
        )
    if isinstance(expected, list):
        return (
            isinstance(seen, list)
            and len(expected) == len(seen)
            and all(_holds(one, other) for one, other in zip(expected, seen, strict=True))
        )
    return bool(expected == seen)


def _listed(expected: list[str], seen: list[str]) -> bool:
    """`device_add vcpu5` stands for that command with any arguments."""
    return len(expected) == len(seen) and all(
        other == one or other.startswith(f"{one} ")
        for one, other in zip(expected, seen, strict=True)
    )


def _all_in(expected: list[str], seen: list[str]) -> bool:
    return all(any(part in text for text in seen) for part in expected)


def run(case: Case, folder: Path, servers: ServerThread, stand_in: StandIn) -> list[str]:
    """Run a case; what differs, a line each."""
    world = World(case, folder, servers, stand_in)
    try:
        world.enter()
        found: list[str] = []
        for number, step in enumerate(case.steps):
            place = f"step {number + 1}: " if len(case.steps) > 1 else ""
            found += [f"{place}{line}" for line in _run_step(world, step)]
        return found
    finally:
        world.leave()


def _run_step(world: World, step: Step) -> list[str]:
    done: list[Done] = []
    found = list(_differences(world, step, done))
    if found:
        found += [f"{step.request}: {each.stdout}{each.stderr}" for each in done[:1]]
    return found


def _differences(world: World, step: Step, runs: list[Done]) -> Iterator[str]:
    servers, qemu, guest = world.servers, world.qemu, world.guest
    servers.call(script_qemu, qemu, step.qemu)
    if guest is not None:
        servers.call(script_guest, guest, step.guest)
        guest.commands.clear()
    qemu.commands.clear()
    before = world.definition.read_bytes() if world.definition is not None else None
    online = dict(guest.online) if guest else None
    for_people = "stdout" in step.expect
    done = world.run(step.request, as_json=not for_people)
    runs.append(done)
    document = {} if for_people else done.json
    commands = [_device(name, arguments) for name, arguments in qemu.changes]
    switched = [
        _switch(a)
        for name, a in (guest.commands if guest else ())
        if name == "guest-set-vcpus" and a
    ]
    after = world.definition.read_bytes() if world.definition is not None else None
    error = document.get("error", {})
    refusals = error.get("refusals", document.get("refusals", []))

    def differs(
        name: str, seen: Any, same: Callable[[Any, Any], bool] = lambda a, b: a == b
    ) -> Iterator[str]:
        if name in step.expect and not same(step.expect[name], seen):
            yield f"{name}: expected {step.expect[name]!r}, seen {seen!r}"

    if not for_people:
        yield from contract.check(step.request.split()[0], step.request.split(), document)
        yield from contract.check_exit(done.code, document)
    yield from differs("outcome", document.get("outcome"))
    yield from differs("exit", done.code)
    yield from differs("json", document, _holds)
    yield from differs("commands", commands, _listed)
    yield from differs("agent", switched)
    yield from differs("error", error.get("type"))
    yield from differs("libvirt", error.get("libvirt"))
    yield from differs("message", error.get("message") or "", lambda a, b: a in b)
    yield from differs("hint", error.get("hint") or "", lambda a, b: a in b)
    yield from differs("messages", document.get("messages", []), _messages)
    yield from differs("stderr", done.stderr, lambda a, b: a in b)
    yield from differs("stdout", done.stdout, lambda a, b: a in b)
    yield from differs("refusals", refusals, _refused)
    yield from differs("rewritten", before != after)
    yield from differs("seconds_below", document.get("seconds", 0.0), lambda a, b: b < a)
    yield from differs("diff", document.get("diff", []), _all_in)
    yield from differs("xml_contains", [(after or b"").decode()], _all_in)
    untouched = document.get("outcome") in ("refused", "usage") or "plan" in document
    if untouched and (
        commands or before != after or (guest is not None and guest.online != online)
    ):
        yield (
            f"it was to touch nothing: {commands} {switched}, definition written: {before != after}"
        )
    if step.expect.keys() & {"plugged", "online", "offline", "pending"}:
        rows = world.run(
            "vcpuinfo D --live" if world.definition is not None else "vcpuinfo D"
        ).json["vcpus"]
        for name, is_filled in (
            ("plugged", lambda row: row["state"] == "enabled"),
            ("online", lambda row: row["online"] is True),
            ("offline", lambda row: row["online"] is False),
            ("pending", lambda row: row["pending"]),
        ):
            yield from differs(
                name, [row["id"] for row in rows if is_filled(row)], lambda a, b: ids(a) == b
            )
        yield from differs("plugged", qemu.plugged_ids, lambda a, b: ids(a) == b)
    if "xml" in step.expect:
        rows = world.run("vcpuinfo D --config").json["vcpus"]
        enabled = [row["id"] for row in rows if row["state"] == "enabled"]
        yield from differs("xml", enabled, lambda a, b: ids(a) == b)


def _messages(expected: list[str], seen: list[str]) -> bool:
    """Each part is in a message; an empty list: there is no message."""
    return _all_in(expected, seen) if expected else not seen


def _refused(expected: list[str], seen: list[Any]) -> bool:
    """Codes in their order, or parts of the texts."""
    return len(expected) == len(seen) and all(
        one == other["code"] or one in other["message"] if isinstance(other, dict) else one in other
        for one, other in zip(expected, seen, strict=True)
    )


def show(case: Case) -> str:
    """What a failure prints of the case."""
    return json.dumps(
        {"id": case.id, "machine": case.machine, "steps": [step.request for step in case.steps]}
    )
