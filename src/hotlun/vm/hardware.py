"""What VM is asked for, and the QEMU command line that makes it.

A snapshot can only be restored into a VM of the same devices, so everything
that shapes the devices is in `Hardware`, and nothing else decides the command
line's device part. File descriptors and paths come in from `Wiring`.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping, Sequence  # noqa: TC003 - dataclass fields are read at run time
from dataclasses import dataclass
from enum import StrEnum

MAX_CONTROLLERS = 8
FIRST_CONTROLLER_ADDRESS = 0x10
"""PCI device numbers of the controllers: above all else, ascending, so that PCI order is ours."""

SOCKETS = ("qmp", "control", "agent", "guest", "resume")
"""Each VM's: the user's monitor, ours, the bridge, qemu-guest-agent, who wakes a restored guest."""

KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 rcupdate.rcu_expedited=1 cryptomgr.notests nokaslr "
    "mitigations=off norandmaps"
)
"""For being fast, in a guest that holds nobody's secrets.

`panic=-1` with `-no-reboot` makes a guest that panics end its QEMU. `norandmaps`
makes programs five times faster under TCG, which can use its translation of a
library again only where the library is at the same address again (QEMU 7.2).
"""


class Accelerator(StrEnum):
    """What executes the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True)
class Hardware:
    """A VM's devices: virtio-scsi controllers `scsi0`..., memory, processors.

    Args:
        controllers: how many, 1 to 8.
        memory_mib: at least 256; the guest's writable root is in it, too.
        cpus: 1 to 64.
        extra_arguments: appended to QEMU's command line as they are. Such a VM
            is booted every time: what they add may change between two starts.
        user: the user (name or uid) that QEMU changes to once it has opened
            its files; empty to stay who we are. Needs root.
    """

    controllers: int = 4
    memory_mib: int = 512
    cpus: int = 1
    extra_arguments: tuple[str, ...] = ()
    user: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.controllers <= MAX_CONTROLLERS:
            raise ValueError(f"controllers must be 1 to {MAX_CONTROLLERS}, not {self.controllers}")
        if self.memory_mib < 256:
            raise ValueError(f"the guest needs 256 MiB of memory, not {self.memory_mib}")
        if not 1 <= self.cpus <= 64:
            raise ValueError(f"cpus must be 1 to 64, not {self.cpus}")
        if self.user and not self.user.isdecimal():
            try:
                pwd.getpwnam(self.user)
            except KeyError:
                raise ValueError(f"there is no user {self.user!r} here") from None

    @property
    def controller_ids(self) -> tuple[str, ...]:
        """The controllers' QEMU device ids, in the guest's PCI order."""
        return tuple(f"scsi{index}" for index in range(self.controllers))

    def plain(self) -> Hardware:
        """The same devices, less what is one VM's own."""
        return Hardware(self.controllers, self.memory_mib, self.cpus)


@dataclass(frozen=True)
class Wiring:
    """What connects one QEMU process to us.

    Args:
        sockets: chardev id -> descriptor of a listening unix socket, for each of
            the SOCKETS.
        console: the file that the guest's console is written to.
        root: the guest's root file system.
    """

    sockets: Mapping[str, int]
    console: str
    root: str


def machine_arguments(accelerator: Accelerator, memory_mib: int, cpus: int) -> list[str]:
    """The bare machine. `-cpu host` aborts on some hosts' MSRs, `max` is as fast."""
    return [
        "-no-user-config",
        "-nodefaults",
        "-display", "none",
        "-no-reboot",
        "-machine", f"q35,accel={accelerator},usb=off,vmport=off,smbus=off",
        "-cpu", "max",
        "-m", str(memory_mib),
        "-smp", str(cpus),
    ]  # fmt: skip


def boot_arguments(kernel: str, initramfs: str, *more: str) -> list[str]:
    """What the machine boots, and `more` words for the kernel."""
    command_line = " ".join((KERNEL_ARGUMENTS, *more))
    return ["-kernel", kernel, "-initrd", initramfs, "-append", command_line]


def console_arguments(path: str) -> list[str]:
    """A serial console that is written to a file."""
    return [
        "-chardev", f"file,id=console,path={_escaped(path)}",
        "-device", "isa-serial,chardev=console",
    ]  # fmt: skip


def device_arguments(hardware: Hardware, wiring: Wiring) -> list[str]:
    """The devices of the guest, in the order that a snapshot expects again."""
    root = _escaped(os.path.abspath(wiring.root))
    arguments = console_arguments(wiring.console)
    for name, descriptor in wiring.sockets.items():
        arguments += ["-chardev", f"socket,id={name},fd={descriptor},server=on,wait=off"]
    arguments += [
        "-device", "isa-serial,chardev=resume",
        "-mon", "chardev=qmp,mode=control",
        "-mon", "chardev=control,mode=control",
        "-blockdev", f"driver=file,node-name=root-file,filename={root},read-only=on,locking=off",
        "-blockdev", "driver=raw,node-name=root,file=root-file,read-only=on",
        "-device", "virtio-blk-pci,id=root,drive=root,addr=0x2",
        "-device", "virtio-serial-pci,id=ports,addr=0x3,max_ports=4",
        "-device", "virtserialport,bus=ports.0,nr=1,chardev=agent,name=org.hotlun.agent.0",
        "-device", "virtserialport,bus=ports.0,nr=2,chardev=guest,name=org.qemu.guest_agent.0",
    ]  # fmt: skip
    for index, name in enumerate(hardware.controller_ids):
        address = FIRST_CONTROLLER_ADDRESS + index
        # The processor that sends a command carries it out. To wake QEMU's main loop for it takes
        # longer than most of what a disk is asked when it is new (benchmarks/probe.py).
        arguments += ["-device", f"virtio-scsi-pci,id={name},addr={address:#x},ioeventfd=off"]
    if hardware.user:
        arguments += ["-runas", _user_and_group(hardware.user)]
    return [*arguments, *hardware.extra_arguments]


def snapshot_arguments(hardware: Hardware, accelerator: Accelerator) -> Sequence[str]:
    """The words that must be the same for a snapshot to fit: the command line less its paths."""
    wiring = Wiring(dict.fromkeys(SOCKETS, 0), "/", "/")
    return [
        *machine_arguments(accelerator, hardware.memory_mib, hardware.cpus),
        *boot_arguments("/", "/"),
        *device_arguments(hardware.plain(), wiring),
    ]


def _user_and_group(user: str) -> str:
    """What `-runas` takes: a name, or uid and gid."""
    if not user.isdecimal():
        return user
    try:
        group = pwd.getpwuid(int(user)).pw_gid
    except KeyError:
        group = int(user)
    return f"{user}:{group}"


def _escaped(path: str) -> str:
    return path.replace(",", ",,")  # QEMU's option parser: a comma in a value is doubled
