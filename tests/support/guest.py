"""A guest for the agent's tests: sysfs, /dev and the kernel's events made by hand.

Where a test needs a device that really can be mounted, a loop device stands in for
the SCSI disk: the tree says that it is one, and everything else about it is true.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from hotlun.agent.devmapper import DeviceMapper
from hotlun.agent.disks import Disks
from hotlun.agent.kernel import Kernel
from hotlun.agent.mappings import Mappings
from hotlun.agent.mounts import Mounts
from hotlun.agent.scsi import ScsiDisks
from hotlun.agent.threads import Threads
from hotlun.agent.uevents import Uevents

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DEADLINE = 20.0
"""Seconds after which something that should have happened has not."""

HOST = 2
"""The SCSI host that is controller 0."""

LIST_MAPPED_DEVICES = 2
"""DM_LIST_DEVICES."""


class FakeGuest:
    """One virtio controller, which the kernel knows as host 2, and the disks put on it."""

    def __init__(self, root: Path, *, real_devices: bool = False) -> None:
        self.root = root
        self.sys = root / "sys"
        self.kernel = Kernel(
            sys=str(self.sys),
            proc="/proc" if real_devices else str(root / "proc"),
            dev="/dev" if real_devices else str(root / "dev"),
        )
        for name in ("sys/bus/scsi/devices", f"sys/class/scsi_host/host{HOST}", "proc", "dev"):
            (root / name).mkdir(parents=True)
        self.scan = self.sys / f"class/scsi_host/host{HOST}/scan"
        self.scan.touch()
        self.add_virtio_controller("0000:00:03.0", 0, HOST)
        self._events, heard = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._heard = heard
        self.uevents = Uevents(heard)
        self.scsi = ScsiDisks(self.kernel, self.uevents, Threads("order", kept=0))
        self.mounts = Mounts(self.kernel)
        mappings = Mappings(self.kernel, DeviceMapper(self.kernel, no_mapped_devices), self.uevents)
        self.disks = Disks(self.kernel, self.scsi, mappings, self.mounts, timeout=DEADLINE)

    def close(self) -> None:
        self._events.shutdown(socket.SHUT_RDWR)
        self._events.close()

    def add_virtio_controller(self, pci: str, number: int, host: int) -> None:
        """A virtio-scsi device at a PCI address, which may be below a bridge (`a/b`)."""
        device = self.sys / "devices/pci0000:00" / pci / f"virtio{number}"
        (device / f"host{host}").mkdir(parents=True)
        driver = self.sys / "bus/virtio/drivers/virtio_scsi"
        driver.mkdir(parents=True, exist_ok=True)
        (driver / f"virtio{number}").symlink_to(device)
        (driver / "module").mkdir(exist_ok=True)

    def add_vmbus_controller(self, guid: str, host: int) -> None:
        (self.sys / "bus/vmbus/devices" / guid / f"host{host}").mkdir(parents=True)

    def address(self, lun: int) -> str:
        return f"{HOST}:0:0:{lun}"

    def sysfs(self, lun: int) -> Path:
        """The SCSI device's own directory; the one on the bus is a link to it."""
        return self.sys / f"devices/pci0000:00/0000:00:03.0/virtio0/host{HOST}" / self.address(lun)

    def add_disk(
        self,
        lun: int,
        name: str,
        number: str,
        partitions: dict[str, str] | None = None,
        *,
        serial: str | None = None,
        sectors: int = 0,
    ) -> Path:
        """A disk in sysfs, with partitions given as name: number; its block directory."""
        device = self.sysfs(lun)
        block = device / "block" / name
        block.mkdir(parents=True)
        (block / "ro").write_text("0\n")
        (block / "size").write_text(f"{sectors}\n")
        for order in ("delete", "rescan"):
            (device / order).write_text("")
        if serial is not None:
            page = b"\0\x80" + len(serial).to_bytes(2, "big") + serial.encode()
            (device / "vpd_pg80").write_bytes(page)
        for part, part_number in (partitions or {}).items():
            self.add_partition(block, part, part_number)
        link = self.sys / "bus/scsi/devices" / self.address(lun)
        if not link.is_symlink():
            link.symlink_to(self.sysfs(lun))
        (block / "dev").write_text(f"{number}\n")
        return block

    def add_partition(self, block: Path, name: str, number: str) -> None:
        (block / name).mkdir()
        number_of_it = name[len(name.rstrip("0123456789")) :]
        (block / name / "partition").write_text(f"{number_of_it}\n")
        (block / name / "ro").write_text("0\n")
        (block / name / "dev").write_text(f"{number}\n")

    def remove_disk(self, lun: int) -> None:
        (self.sys / "bus/scsi/devices" / self.address(lun)).unlink()
        shutil.rmtree(self.sysfs(lun))

    def announce(self, path: Path, action: str = "add") -> None:
        """The kernel's event about a device in sysfs."""
        device = "/" + str(path.relative_to(self.sys))
        fields = (f"{action}@{device}", f"ACTION={action}", f"DEVPATH={device}")
        message = "\0".join((*fields, "SUBSYSTEM=block", ""))
        self._events.send(message.encode())


def no_mapped_devices(request: int, buffer: bytearray) -> None:
    """A device mapper that has made none, and makes none."""
    if request & 0xFF != LIST_MAPPED_DEVICES:
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))


@contextlib.contextmanager
def loop_disk(
    guest: FakeGuest, lun: int, image: Path, partitions: Sequence[tuple[int, int]] = ()
) -> Iterator[str]:
    """Have an image be the disk at a LUN; gives its node.

    Args:
        partitions: first sector and number of sectors of each, as the image's table says.
    """
    node = subprocess.run(
        ["losetup", "--find", "--show", "--partscan", str(image)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    name = os.path.basename(node)
    real = Path("/sys/class/block") / name
    try:
        for number, (start, sectors) in enumerate(partitions, 1):
            if not (real / f"{name}p{number}").exists():  # a kernel that reads no tables
                command = ["addpart", node, str(number), str(start), str(sectors)]
                subprocess.run(command, check=True)
        block = guest.add_disk(
            lun,
            name,
            (real / "dev").read_text().strip(),
            {
                path.parent.name: (path.parent / "dev").read_text().strip()
                for path in real.glob(f"{name}p*/partition")
            },
        )
        numbers = guest.sys / "dev/block"
        numbers.mkdir(parents=True, exist_ok=True)
        for dev in (block / "dev", *block.glob("*/dev")):
            (numbers / dev.read_text().strip()).symlink_to(dev.parent)
        yield node
    finally:
        subprocess.run(["losetup", "--detach", node], check=True)


def image_of(path: Path, mebibytes: int, *command: str) -> Path:
    """An image file; a command (mkfs and its options) fills it if one is given."""
    with path.open("wb") as file:
        file.truncate(mebibytes << 20)
    if command:
        subprocess.run([*command, str(path)], check=True, capture_output=True)
    return path
