"""What a guest needs besides its vCPUs to boot, as QEMU's arguments. Pure.

Enough for tests and prototypes: kernel, disks, a user network, console and agent, and everything in
`<qemu:commandline>`. Elements that are left out are named.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.machine.devices import AGENT_PORT
from qmpvcpu.core.machine.words import escaped


@dataclass(frozen=True, slots=True)
class Disk:
    """One `<disk>` with a file or a block device. `bus` is libvirt's word ("virtio", "ide" …)."""

    path: str
    format: str = "raw"
    bus: str = "virtio"
    is_cdrom: bool = False
    is_readonly: bool = False


@dataclass(frozen=True, slots=True)
class Flash:
    """Firmware in a flash chip of the machine: its code, and its variables in a second one
    (`<nvram>`).

    `is_secure` is whether only System Management Mode may write to them.
    """

    code: str
    format: str = "raw"
    is_readonly: bool = True
    is_secure: bool = False
    variables: str | None = None
    variables_format: str = "raw"

    @property
    def arguments(self) -> list[str]:
        """QEMU's arguments, as libvirt up to 5.10 wrote them."""
        readonly = ",readonly=on" if self.is_readonly else ""
        words = (
            ["-global", "driver=cfi.pflash01,property=secure,value=on"] if self.is_secure else []
        )
        words += [
            "-drive",
            f"if=pflash,unit=0,file={escaped(self.code)},format={escaped(self.format)}{readonly}",
        ]
        if self.variables is not None:
            file = f"file={escaped(self.variables)},format={escaped(self.variables_format)}"
            words += ["-drive", f"if=pflash,unit=1,{file}"]
        return words


@dataclass(frozen=True, slots=True)
class GivenDevices:
    """For a definition that was made from a running QEMU: its `<qemu:commandline>` has every
    device.

    Attributes:
        has_defaults: whether the machine has its default devices too.
        has_serial: whether it has a first serial port, which is the console.
    """

    has_defaults: bool
    has_serial: bool


@dataclass(frozen=True, slots=True)
class Hardware:
    """`left_out` are elements that QEMU is started without, each once; `arguments` are passed on.
    With `given`, these are all of the devices. `firmware` is in a ROM, `flash` in a flash chip;
    `smm` is System Management Mode, None if it is not written.
    """

    kernel: str | None = None
    initrd: str | None = None
    cmdline: str | None = None
    firmware: str | None = None
    flash: Flash | None = None
    smm: bool | None = None
    disks: tuple[Disk, ...] = ()
    user_networks: int = 0
    arguments: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    given: GivenDevices | None = None


def hardware_args(hardware: Hardware, arch: str, *, console: str, agent: str) -> list[str]:
    """QEMU's arguments.

    Args:
        hardware: of the domain.
        arch: QEMU's target.
        console: path of a file for the output of the guest's first serial port.
        agent: name of the chardev of its agent's port.
    """
    given = hardware.given
    words = ["-no-user-config", "-display", "none"]
    words += ["-nodefaults"] if given is None or not given.has_defaults else []
    if given is None or given.has_serial:
        words += [
            "-chardev",
            f"file,id=console,path={escaped(console)}",
            "-serial",
            "chardev:console",
        ]
    if given is not None:
        return [*words, *hardware.arguments]
    for option, value in (
        ("-bios", hardware.firmware),
        ("-kernel", hardware.kernel),
        ("-initrd", hardware.initrd),
        ("-append", hardware.cmdline),
    ):
        words += [option, value] if value is not None else []
    if hardware.smm is not None:
        words += ["-machine", f"smm={'on' if hardware.smm else 'off'}"]
    words += hardware.flash.arguments if hardware.flash is not None else []
    bus = architecture(arch).device_bus
    for number, disk in enumerate(hardware.disks):
        drive = f"file={escaped(disk.path)},format={escaped(disk.format)}"
        drive += ",readonly=on" if disk.is_readonly or disk.is_cdrom else ""
        if disk.bus == "virtio":
            words += [
                "-drive",
                f"{drive},if=none,id=disk{number}",
                "-device",
                f"virtio-blk-{bus},drive=disk{number}",
            ]
        else:
            # Buses that -drive knows; it calls q35's SATA ports `ide`.
            where = disk.bus if disk.bus in ("scsi", "sd") else "ide"
            words += ["-drive", f"{drive},if={where}{',media=cdrom' if disk.is_cdrom else ''}"]
    words += [
        word
        for _ in range(hardware.user_networks)
        for word in ("-nic", f"user,model=virtio-net-{bus}")
    ]
    words += ["-device", f"virtio-serial-{bus},id=qmpvcpu-serial"]
    words += ["-device", f"virtserialport,bus=qmpvcpu-serial.0,chardev={agent},name={AGENT_PORT}"]
    return [*words, *hardware.arguments]
