"""The devices of a running QEMU as arguments for the next one; and for a twin, without any resource
of the host. Pure.

The chardevs of a console, of a monitor and of the guest agent are replaced: `start` has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qmpvcpu.core.definition import Definition
from qmpvcpu.core.machine.command_line import IMPLIED, Option, QemuCommandLine, read_command_line
from qmpvcpu.core.machine.words import escaped, join_pairs

#: The chardev that `start` makes for the guest agent's port, and the name of that port.
AGENT_CHARDEV: Final = "agent"
AGENT_PORT: Final = "org.qemu.guest_agent.0"

#: Passed on unchanged: what the guest sees, and the backends of that.
_PASSED_ON: Final = frozenset(
    (
        *(
            "device",
            "drive",
            "blockdev",
            "netdev",
            "nic",
            "net",
            "chardev",
            "object",
            "global",
            "set",
        ),
        *(
            "vga",
            "hda",
            "hdb",
            "hdc",
            "hdd",
            "cdrom",
            "fda",
            "fdb",
            "sd",
            "pflash",
            "mtdblock",
            "boot",
            "rtc",
        ),
        *(
            "bios",
            "kernel",
            "initrd",
            "append",
            "dtb",
            "option-rom",
            "fw_cfg",
            "smbios",
            "acpitable",
            "audiodev",
        ),
        *(
            "audio",
            "fsdev",
            "virtfs",
            "tpmdev",
            "usbdevice",
            "watchdog",
            "watchdog-action",
            "action",
            "icount",
        ),
        *(
            "prom-env",
            "g",
            "iscsi",
            "no-reboot",
            "no-shutdown",
            "no-fd-bootchk",
            "win2k-hack",
            "semihosting",
        ),
        *("semihosting-config", "parallel", "overcommit"),
    )
)
#: Elsewhere in the definition, or only about the host.
_ELSEWHERE: Final = frozenset(
    (
        *("machine", "accel", "cpu", "smp", "m", "numa", "uuid", "name", "usb", "no-acpi"),
        *("no-hpet", "enable-kvm"),
        *(
            "nographic",
            "nodefaults",
            "no-user-config",
            "nouserconfig",
            "serial",
            "mem-path",
            "mem-prealloc",
        ),
        *(
            "S",
            "qmp",
            "qmp-pretty",
            "monitor",
            "mon",
            "daemonize",
            "pidfile",
            "D",
            "d",
            "dfilter",
            "trace",
            "msg",
        ),
        *(
            "L",
            "incoming",
            "display",
            "vnc",
            "spice",
            "k",
            "full-screen",
            "sandbox",
            "runas",
            "user",
            "chroot",
        ),
        *(
            "run-with",
            "gdb",
            "s",
            "only-migratable",
            "preconfig",
            "seed",
            "compat",
            "async-teardown",
            "perfmap",
        ),
        *(
            "jitdump",
            "one-insn-per-tb",
            "singlestep",
            "no-quit",
            "alt-grab",
            "ctrl-grab",
            "sdl",
            "gtk",
            "curses",
        ),
        *("enable-sync-profile", "add-fd"),
    )
)
#: Neither passed on nor missed: their effect is over, or only about the host.
_NOT_MISSED: Final = frozenset(
    (
        *(
            "loadvm",
            "portrait",
            "rotate",
            "show-cursor",
            "echr",
            "tb-size",
            "plugin",
            "qtest",
            "qtest-log",
        ),
        *("dump-vmstate", "writeconfig", "h", "help", "version", "tune"),
    )
)
#: Options of -machine that a definition does not have, and that the guest would miss.
_MISSED_OF_MACHINE: Final = frozenset(
    (
        *("kernel", "initrd", "append", "dtb", "firmware"),
        *("confidential-guest-support", "memory-encryption"),
    )
)
#: Backends of a chardev that need a terminal or a window.
_TERMINALS: Final = frozenset(
    {"stdio", "pty", "vc", "gtk", "msmouse", "wctablet", "braille", "tty", "serial"}
)


@dataclass(frozen=True, slots=True)
class Devices:
    """Arguments of QEMU.

    Attributes:
        arguments: the words of the command line.
        has_defaults: whether the machine has its default devices too (no -nodefaults).
        has_serial: whether there is a first serial port.
        left_out: what the next QEMU cannot have, each as one text.
    """

    arguments: tuple[str, ...] = ()
    has_defaults: bool = False
    has_serial: bool = False
    left_out: tuple[str, ...] = ()


def devices_of(
    line: QemuCommandLine, definition: Definition, drivers: Iterable[str], folder: str | None = None
) -> Devices:
    """What a QEMU was started with, except its machine, memory and CPUs.

    Args:
        line: its command line.
        definition: of its machine.
        drivers: of its CPUs: the definition's `<vcpus>` stands for their -device.
        folder: its working directory, for relative file names; None if that is not known.
    """
    cpus = frozenset(drivers)
    monitors = _monitors(line)
    monitors |= {option.get("chardev") for option in line.all("device") if _is_agent(option)}
    memory = {backend.id for backend in definition.options.backends}
    memory |= {dimm.memdev for dimm in definition.dimms if dimm.memdev}
    sticks = {dimm.id for dimm in definition.dimms} | {dimm.memdev for dimm in definition.dimms}
    words: list[str] = []
    left_out: list[str] = []
    serials = [option.text or "none" for option in line.all("serial")]
    for option in line.options:
        if option.name not in _PASSED_ON:
            if option.name not in _ELSEWHERE:
                left_out.append(" ".join(option.words))
            continue
        is_cpu = option.name == "device" and option.get("driver") in cpus
        is_stick = (
            option.name == "device"
            and option.get("memdev") in sticks
            and option.get("memdev") is not None
        )
        is_memory = option.name == "object" and option.get("id") in memory
        is_host = option.name == "chardev" and option.get("id") in monitors
        if is_cpu or is_stick or is_memory or is_host:
            continue
        if _has_descriptor(option):
            left_out.append(" ".join(option.words))
        renewed = _renewed(option)
        placed = _in_folder(renewed, folder)
        if placed is None:
            left_out.append(f"the folder of the file in '{' '.join(option.words)}'")
        words += (placed or renewed).words
    has_defaults = not line.has("nodefaults")
    has_serial = serials[0] != "none" if serials else has_defaults
    if serials and not has_serial:
        words += ["-serial", "none"]
    others = ("none" if text == "none" else "null" for text in serials[1:])
    words += [word for text in others for word in ("-serial", text)]
    return Devices(tuple(words), has_defaults, has_serial, tuple(left_out))


def beyond_definitions(line: QemuCommandLine) -> list[str]:
    """Options that a definition made from this command line does not have, and that the guest would
    miss: unknown ones, open file descriptors of disks and networks, temporary overlays. Each as it
    is written.
    """
    known = _PASSED_ON | _ELSEWHERE | _NOT_MISSED
    return [
        " ".join(option.words)
        for option in line.options
        # Without its chardev a console is only silent.
        if option.name not in known or (option.name != "chardev" and _has_descriptor(option))
    ] + [
        f"-machine {key}={value}"
        for key, value in line.machine_options
        if key in _MISSED_OF_MACHINE
    ]


def not_defined(beyond: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Those of `beyond_definitions` for which a definition has no counterpart.

    Args:
        beyond: of the running guest's command line.
        arguments: of a QEMU that is started from the definition.
    """
    line = read_command_line(["qemu", *arguments])
    defined = {" ".join(option.words) for option in line.options}
    defined |= {f"-machine {key}={value}" for key, value in line.machine_options}
    networks = {option.get("id") for option in line.all("netdev") if option.get("type") != "user"}
    found = []
    for text in beyond:
        option = next(iter(read_command_line(["qemu", *text.split(" ", 1)]).options), Option(""))
        is_network = option.name == "netdev" and option.get("id") in networks
        if option.name == "snapshot" or (text not in defined and not is_network):
            found.append(text)
    return found


def without_folder(arguments: Sequence[str]) -> list[str]:
    """Disks with a relative file name: the next QEMU runs in another folder."""
    return [
        " ".join(option.words)
        for option in read_command_line(["qemu", *arguments]).options
        if (option.name in _FILE_OPTIONS or option.name in ("drive", "blockdev"))
        and _in_folder(option, None) is None
    ]


#: By the beginning of a type: networks that support the guest's offloads, which a twin cannot have.
_OFFLOADING: Final = ("tap", "bridge", "vhost-", "netmap", "passt")


def unlike_any_other(arguments: Sequence[str]) -> list[str]:
    """Networks of a virtio-net whose state a twin cannot read: `hollow` has no backend that takes
    the guest's packets with virtio's own header (vnet_hdr).
    """
    line = read_command_line(["qemu", *arguments])
    ends = {
        option.get("netdev")
        for option in line.all("device")
        if (option.get("driver") or "").startswith("virtio-net")
    }
    return [
        " ".join(option.words)
        for option in line.all("netdev", "nic")
        if (option.get("type") or "").startswith(_OFFLOADING)
        and (
            option.get("id") in ends
            if option.name == "netdev"
            else (option.get("model") or "virtio").startswith("virtio")
        )
    ]


def _is_agent(option: Option) -> bool:
    return option.get("driver") == "virtserialport" and option.get("name") == AGENT_PORT


def _monitors(line: QemuCommandLine) -> set[str | None]:
    """Ids of chardevs that only monitors and serial ports use."""
    found = {option.get("chardev") for option in line.all("mon")}
    texts = [option.text or "" for option in line.all("qmp", "qmp-pretty", "monitor", "serial")]
    found |= {text.removeprefix("chardev:") for text in texts if text.startswith("chardev:")}
    others = line.all("device", "object", "netdev", "tpmdev", "semihosting-config")
    return found - {option.get("chardev") for option in others if not _is_agent(option)}


def _has_descriptor(option: Option) -> bool:
    """Whether it names an open file descriptor from the process that started QEMU."""
    if option.name not in ("chardev", "netdev", "nic", "net", "drive", "blockdev", "device"):
        return False
    return any(
        key in ("fd", "fds", "vhostfd", "vhostfds", "sock_fd")
        or (key.endswith(".type") and value == "fd")
        or "/dev/fdset/" in value
        for key, value in option.pairs
    )


def _renewed(option: Option) -> Option:
    """The option for a QEMU in the background, with the agent's port on the chardev that `start`
    makes.
    """
    if _is_agent(option):
        return _written(
            option,
            [(key, AGENT_CHARDEV if key == "chardev" else value) for key, value in option.pairs],
        )
    if option.name == "chardev" and (
        option.get("backend") in _TERMINALS or _has_descriptor(option)
    ):
        return _written(option, (("backend", "null"), ("id", option.get("id") or "")))
    if option.name == "parallel" and option.text != "none":
        return Option("parallel", "null")
    if option.name in ("netdev", "nic") and _has_descriptor(option):
        return _written(option, (("type", "user"), *_some(option, "id", "model", "mac", "addr")))
    return option


#: Keys, and options without keys, that name a file of the host.
_FILE_KEYS: Final = frozenset(
    (
        *("file", "filename", "file.filename", "file.file.filename", "path", "mem-path"),
        *("addr.path", "local.path", "remote.path"),
    )
)
_FILE_OPTIONS: Final = frozenset(
    {
        "hda",
        "hdb",
        "hdc",
        "hdd",
        "cdrom",
        "fda",
        "fdb",
        "sd",
        "pflash",
        "mtdblock",
        "kernel",
        "initrd",
        "dtb",
    }
)


def _in_folder(option: Option, folder: str | None) -> Option | None:
    """The option with absolute file names: the next QEMU runs elsewhere. None if the folder is not
    known.
    """
    if option.get("abstract") == "on":
        return option

    def is_short(text: str) -> bool:
        # A colon before any slash means a protocol of QEMU's (nbd:…, json:…).
        return bool(text) and not text.startswith("/") and ":" not in text.partition("/")[0]

    if option.name in _FILE_OPTIONS and option.text is not None and is_short(option.text):
        return (
            None if folder is None else Option(option.name, f"{folder.rstrip('/')}/{option.text}")
        )
    # In -blockdev, `file` names a node.
    keys = _FILE_KEYS - {"file"} if option.name == "blockdev" else _FILE_KEYS
    if not any(key in keys and is_short(value) for key, value in option.pairs):
        return option
    if folder is None:
        return None
    base = folder.rstrip("/")
    return _written(
        option,
        [
            (key, f"{base}/{value}" if key in keys and is_short(value) else value)
            for key, value in option.pairs
        ],
    )


def _written(option: Option, pairs: Sequence[tuple[str, str]]) -> Option:
    return Option(option.name, join_pairs(pairs, IMPLIED.get(option.name)), tuple(pairs))


def _some(option: Option, *keys: str) -> list[tuple[str, str]]:
    return [(key, value) for key, value in option.pairs if key in keys]


# -- without the host ------------------------------------------------------------------------------

_DISKS: Final = {
    **{
        name: (("index", str(index)), ("media", "disk"))
        for index, name in enumerate(("hda", "hdb", "hdc", "hdd"))
    },
    "cdrom": (("index", "2"), ("media", "cdrom")),
    "fda": (("if", "floppy"), ("index", "0")),
    "fdb": (("if", "floppy"), ("index", "1")),
    "sd": (("if", "sd"), ("index", "0")),
    "mtdblock": (("if", "mtd"),),
}
#: An empty disk; its size is not part of a guest's state.
_NOTHING: Final = (("driver", "null-co"), ("read-zeroes", "on"), ("size", str(64 << 20)))
_PLACES: Final = ("id", "if", "index", "bus", "unit", "media", "readonly", "read-only")


#: Options that describe the machine, and read only files of firmware, kernel and tables. A twin has
#: the others only as `_hollow` changes them: they are about the host (sockets, logs, windows, the
#: process), or would repeat on the host what the guest's QEMU has already done.
_OF_MACHINE: Final = frozenset(
    (
        *(
            "machine",
            "accel",
            "cpu",
            "smp",
            "m",
            "numa",
            "uuid",
            "name",
            "nodefaults",
            "no-user-config",
            "L",
        ),
        *("usb", "no-acpi", "no-hpet", "enable-kvm", "device", "global", "set", "vga", "boot"),
        *("rtc", "option-rom"),
        *("bios", "kernel", "initrd", "append", "dtb", "fw_cfg", "smbios", "acpitable", "watchdog"),
        *("prom-env", "g"),
        *(
            "usbdevice",
            "no-fd-bootchk",
            "win2k-hack",
            "semihosting",
            "compat",
            "serial",
            "parallel",
            "nic",
            "net",
        ),
    )
)
#: Keys of devices and machines that name a file to which QEMU writes.
_WRITTEN: Final = frozenset({"pcap", "dumpdtb"})
#: Objects that use nothing of the host; a source of random numbers is replaced, memory becomes
#: anonymous.
_HARMLESS_OBJECTS: Final = frozenset(
    {
        "iothread",
        "throttle-group",
        "secret",
        "rng-builtin",
        "can-bus",
        "acpi-generic-initiator",
        "acpi-generic-port",
    }
)
#: By the beginning of a driver: devices that need a resource of the host, which only one QEMU can
#: have.
_BOUND_TO_HOST: Final = (
    "vfio-",
    "vhost-",
    "usb-host",
    "tpm-",
    "spapr-tpm",
    "ivshmem-",
    "virtio-pmem",
    "scsi-generic",
    "scsi-block",
    "u2f-passthru",
    "x-pci-proxy",
    "xen-",
)


def bound_to_host(arguments: Sequence[str]) -> list[str]:
    """What a second QEMU cannot have while the first one runs: such devices, and options in a
    file.
    """
    return [
        " ".join(option.words)
        for option in read_command_line(["qemu", *arguments]).all("device", "readconfig")
        if option.name == "readconfig" or (option.get("driver") or "").startswith(_BOUND_TO_HOST)
    ]


def images_of(arguments: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Name and format of the file of each disk that `hollow` replaces, by the name of the new block
    node; empty if there is no medium, or the format is not written.
    """
    line = read_command_line(["qemu", *arguments])
    nodes = {option.get("node-name"): option for option in line.all("blockdev")}
    found = {}
    for number, option in enumerate(line.options):
        if option.name in _DISKS:
            found[_node(option, number)] = (option.text or "", "")
        elif option.name in ("drive", "blockdev") and option.get("if") != "pflash":
            found[_node(option, number)] = (
                _image(option, nodes),
                option.get("format") or option.get("driver") or "",
            )
    return found


#: The keys of an image's name; the first that is written counts.
_IMAGE_KEYS: Final = ("filename", "file.filename", "file.file.filename", "file")


def _image(option: Option, nodes: Mapping[str | None, Option]) -> str:
    seen = [option]
    while True:
        name = next((value for key in _IMAGE_KEYS if (value := option.get(key))), None)
        if name is None:
            # Only a driver: it uses no file of the host.
            driver = next(
                (v for k, v in option.pairs if k.endswith("driver") or k == "format"), None
            )
            return f"{driver}:" if driver is not None else ""
        below = (
            nodes.get(name) if option.name == "blockdev" and option.get("file") == name else None
        )
        if below is None or below in seen:
            return name
        option = below
        seen.append(option)


def _node(option: Option, number: int) -> str:
    return option.get("node-name") or f"node{number}"


def hollow(arguments: Sequence[str]) -> list[str]:
    """The same devices without any resource of the host: no sockets, taps, disks or shared memory.
    A second QEMU with them does not affect the running guest.
    """
    words: list[str] = []
    line = read_command_line(["qemu", *arguments])
    flash = {value for key, value in line.machine_options if key.startswith("pflash")}
    for option in reversed(line.options):
        # The option of a node comes after that of its file, so in reverse it comes before.
        if (
            option.name == "blockdev"
            and option.get("node-name") in flash
            and (file := option.get("file"))
        ):
            flash.add(file)
    for number, option in enumerate(line.options):
        is_flash = option.name == "blockdev" and option.get("node-name") in flash
        made = _unlocked(option) if is_flash else _hollow(option, number)
        words += made.words if made is not None else ()
    return words


def _hollow(option: Option, number: int) -> Option | None:
    """The option that a twin has in its place; None if it has none."""
    if (make := _HOLLOWED.get(option.name)) is not None:
        return make(option, number)
    return option if option.name in _OF_MACHINE else None


def _synthetic(option: Option, _: int) -> Option:
    return _written(option, (("fsdriver", "synth"), *_some(option, "id", "mount_tag", "readonly")))


def _null_chardev(option: Option, _: int) -> Option | None:
    name = option.get("id")
    return _written(option, (("backend", "null"), ("id", name))) if name is not None else None


def _null_port(option: Option, _: int) -> Option:
    return option if option.text == "none" else Option(option.name, "null")


def _empty_disk(option: Option, number: int) -> Option:
    return _written(
        Option("drive"), (*_NOTHING, ("node-name", _node(option, number)), *_DISKS[option.name])
    )


def _flash(option: Option, _: int) -> Option:
    return Option(
        "drive",
        f"if=pflash,format=raw,readonly=on,file.locking=off,file={escaped(option.text or '')}",
    )


def _empty_drive(option: Option, number: int) -> Option:
    if option.get("if") == "pflash":
        kept = [pair for pair in option.pairs if pair[0] not in ("readonly", "read-only")]
        return _written(option, (*kept, ("readonly", "on"), ("file.locking", "off")))
    return _written(
        option, (*_NOTHING, ("node-name", _node(option, number)), *_some(option, *_PLACES))
    )


def _empty_node(option: Option, number: int) -> Option:
    return _written(
        option, (*_NOTHING, ("node-name", _node(option, number)), *_some(option, "read-only"))
    )


def _restricted_network(option: Option, number: int) -> Option:
    name = ("id", option.get("id") or "")
    if option.get("type") == "user":
        # It is part of the guest's state; with `restrict` it reaches nothing.
        return _written(option, (("type", "user"), name, ("restrict", "on")))
    return _written(option, (("type", "hubport"), name, ("hubid", str(number))))


def _user_nic(option: Option, _: int) -> Option:
    if option.get("type") == "none":
        return option
    return _written(option, (("type", "user"), *_some(option, "id", "model", "mac", "addr")))


def _without_files(option: Option, _: int) -> Option:
    kept = [pair for pair in option.pairs if pair[0] not in _WRITTEN]
    return _written(option, kept) if len(kept) < len(option.pairs) else option


def _unlocked(option: Option) -> Option:
    """Firmware is a RAM block: the twin reads it while the guest's QEMU has it open."""
    kept = [
        pair for pair in option.pairs if pair[0] not in ("read-only", "locking", "file.locking")
    ]
    is_file, has_file = option.get("driver") == "file", option.get("file.driver") == "file"
    locking = [("locking", "off")] if is_file else [("file.locking", "off")] if has_file else []
    return _written(option, [*kept, ("read-only", "on"), *locking])


def _harmless(option: Option, _: int) -> Option | None:
    """The same object without resources of the host; None if it has no use then."""
    kind, name = option.get("qom-type") or "", option.get("id") or ""
    if kind.startswith("memory-backend-"):
        # Memory of a file and of a memfd is aligned to pages, that of memory-backend-ram to 2 MiB.
        here = "memory-backend-ram" if kind.endswith("-ram") else "memory-backend-memfd"
        return _written(option, (("qom-type", here), *_some(option, "id", "size")))
    if kind.startswith("cryptodev-"):
        return _written(option, (("qom-type", "cryptodev-backend-builtin"), ("id", name)))
    if kind in ("rng-random", "rng-egd"):
        return _written(option, (("qom-type", "rng-builtin"), ("id", name)))
    return option if kind in _HARMLESS_OBJECTS else None


#: What replaces an option in a twin, by its name. The number is the option's position in the
#: command line.
_HOLLOWED: Final[Mapping[str, Callable[[Option, int], Option | None]]] = {
    "display": lambda option, _: Option(option.name, "none"),
    "nographic": lambda *_: Option("machine", "graphics=off"),
    "audiodev": lambda option, _: Option(option.name, f"none,id={escaped(option.get('id') or '')}"),
    "audio": lambda option, _: _written(
        option, (("driver", "none"), *_some(option, "id", "model"))
    ),
    "fsdev": _synthetic,
    "virtfs": _synthetic,
    "chardev": _null_chardev,
    "serial": _null_port,
    "parallel": _null_port,
    **dict.fromkeys(_DISKS, _empty_disk),
    "pflash": _flash,
    "drive": _empty_drive,
    "blockdev": _empty_node,
    "netdev": _restricted_network,
    "nic": _user_nic,
    "net": lambda option, _: (
        option if option.get("type") in ("nic", "none") else Option("net", "user")
    ),
    "object": _harmless,
    "device": _without_files,
    "machine": _without_files,
}


def shared_with_source(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Memory in files that a second QEMU on the same host would share with the running guest; and
    sockets, pipes and files of chardevs that it takes over. Disks are not included: QEMU locks
    them.

    Args:
        arguments: of QEMU.
    """
    memory, chardevs = [], []
    for option in read_command_line(["qemu", *arguments]).options:
        words = " ".join(option.words)
        if (option.get("qom-type") or "").startswith("memory-backend-"):
            memory += (
                [words]
                if option.get("mem-path") is not None and option.get("share") == "on"
                else []
            )
        elif option.name == "chardev" and option.get("backend") in ("socket", "file", "pipe"):
            chardevs += [words] if option.get("path") is not None else []
    return memory, chardevs
