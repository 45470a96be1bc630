"""The guest as a whole: its controllers, its disks, and what lives beside the agent."""

from __future__ import annotations

import functools
import os
import random
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

from fuzz.grammar import KEYS, Profile
from fuzz.guest.blocks import Blocks
from fuzz.guest.calls import KNOWN, Calls
from fuzz.guest.clock import Clock, Threads
from fuzz.guest.errors import Absent
from fuzz.guest.files import Files, Stream
from fuzz.guest.mapper import Mapper
from fuzz.guest.programs import Programs, Selectors
from fuzz.guest.tree import Mount, Node, Spot, Tree, failure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SIZE = 1 << 18
"""Bytes that a disk really has; `sectors` says what it seems to have."""


class Disk(NamedTuple):
    """What is in a slot."""

    controller: int
    lun: int
    name: str
    minor: int
    holds: str = ""
    sectors: int = 1 << 20
    partitions: tuple[str, ...] = ()
    traits: tuple[str, ...] = ()

    @property
    def host(self) -> int:
        return self.controller + 2

    @property
    def wanted(self) -> str:
        """The serial that the host knows it by; a stale one's is another disk's."""
        return f"disk-{self.lun}" + "-new" * ("stale" in self.traits)

    @property
    def address(self) -> str:
        return f"{self.host}:0:0:{self.lun}"


DISKS = (
    Disk(0, 0, "sda", 0, "ext4"),
    Disk(0, 1, "sdb", 16),
    Disk(0, 2, "sdc", 32, "xfs"),
    Disk(0, 3, "sdd", 48, "gpt", partitions=("ext4", "")),
    Disk(0, 4, "sde", 64, "crypto_LUKS"),
    Disk(0, 5, "sdf", 80, "verity", traits=("read-only",)),
    Disk(0, 6, "sdg", 96, traits=("late",)),
    Disk(0, 7, "sdh", 112, traits=("broken",)),
    Disk(0, 8, "sdi", 128, "btrfs"),
    Disk(0, 9, "sdj", 144, "two"),
    Disk(0, 10, "sdk", 160, "lvm", sectors=8),
    Disk(0, 11, "sdl", 176, "squashfs", traits=("read-only",)),
    Disk(1, 0, "sdm", 192, "ext4", traits=("theirs",)),
    Disk(1, 1, "sdn", 208, "ext4", traits=("busy",)),
    Disk(1, 2, "sdo", 224, "half xfs", traits=("stale",)),
    Disk(0, 13, "sdq", 256, "half LUKS"),
    Disk(1, 63, "sdp", 240, "", sectors=1 << 18, traits=("no vpd",)),
)

PROFILE = Profile(
    slots=(
        *((disk.controller, disk.lun) for disk in DISKS),
        *((0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5)),
        *((0, 12), (5, 1)),
    ),
    paths=(
        *("/run/mounts/m0", "/run/mounts/m1", "/m2") * 6,
        *("/run/mounts/m1/inner", "/run/mounts/m0/inner"),
        *("/run/mounts/m0/", "//run/./mounts/m1", "/mnt/theirs", "/mnt/empty", "/mnt/file", ""),
        *("/mnt/link/m3", "/mnt/dead/m4", "/mnt/loop", "/mnt/file/below", "/proc/m5", "/dev/sda"),
        *("/mnt/\u00e9 \\ \t\n", "/run/a/b/c/d/e/f/g/h", "/mnt/sda"),
    ),
    timeouts=(0, 0, 0, 1, 2500, 3_600_000),
    identities={
        (disk.controller, disk.lun): {"Serial": disk.wanted, "Size": disk.sectors * 512}
        for disk in DISKS
    },
)

_DRIVER = "/sys/bus/scsi/drivers/sd"

_LOCK = b"1: OFDLCK ADVISORY  READ  -1 00:06:321 0 EOF\n"
"""In /proc/locks, while somebody's program is at work on a disk."""

_THEIRS = """cwd /mnt/theirs
exe /usr/bin/bash
root /
fd/3 /dev/sdn
fd/4 /mnt/theirs/log
ns/mnt mnt:[4026531841]"""


class Guest:
    """One that can be had as new again at no cost.

    Attributes:
        modules: what stands in for Python's modules in the agent's code.
    """

    def __init__(self) -> None:
        self.tree = tree = Tree()
        self.steps = 0
        self.injected = 0
        """System calls that failed because an input said so."""
        self._faults: Mapping[int, int] = {}
        self.files = Files(tree, self._step, self.is_claimed)
        self.calls = Calls(tree, self.files, self._step)
        self.mapper = Mapper(tree, self.files, self._step, self._node, self._is_used, self._sysfs)
        self.programs = Programs(tree, self.files, self.mapper, self._step, self.is_claimed)
        self.clock = Clock(self._waited)
        self.threads = Threads(self.clock)
        self._nodes: dict[str, Node] = {}
        """Disks and partitions, by their number."""
        self._first_nodes: dict[str, Node] = {}
        self._make()
        tree.begin()
        self._first_nodes = dict(self._nodes)

    @property
    def modules(self) -> dict[str, Any]:
        return {
            "os": self.files,
            "ctypes": self.calls,
            "fcntl": self.mapper,
            "subprocess": self.programs,
            "selectors": Selectors(),
            "time": self.clock,
            "select": Absent("select"),
            "socket": Absent("socket"),
        }

    def open(self, path: str, mode: str = "r", buffering: int = -1) -> Stream:
        """Stands in for `open`."""
        return Stream(self.files, path, mode)

    def begin(self, faults: Mapping[int, int], luck: int) -> None:
        """Be as new, for one input."""
        self.tree.restore()
        self._nodes = dict(self._first_nodes)
        self.files.forget()
        self.mapper.mapped.clear()
        self.mapper.is_loaded = luck % 4 > 0
        self.mapper.at_work = {0: 2, 1: 50}.get(luck % 20, 0)
        self._faults = faults
        self.steps = self.injected = 0
        self.programs.luck = random.Random(luck)

    def changes(self) -> list[str]:
        """The directories, mounts and mapped devices that there were not at first."""
        return [*self.tree.changes(), *self.mapper.mapped]

    # What happens in it.

    def _step(self, name: str) -> None:
        number, self.steps = self.steps, self.steps + 1
        if number in self._faults:
            self.injected += 1
            raise failure(self._faults[number], name)

    def _waited(self) -> None:
        """The late disk comes while somebody waits."""
        for disk in DISKS:
            if "late" in disk.traits and disk.address not in self._bus.entries:
                self.plug(disk)

    def is_claimed(self, blocks: Blocks) -> bool:
        """Whether somebody has the device, or what it is part of, for himself."""
        return any(
            blocks.whole == other.whole
            and (blocks.number == other.number or other.whole in (blocks.number, other.number))
            for other in self._claims()
        )

    def _claims(self) -> list[Blocks]:
        numbers = [mount.number for mount in [*self.tree.mounts.values()]]
        numbers += [n for mapped in [*self.mapper.mapped.values()] for n in mapped.below]
        nodes = [self._node(number) for number in numbers]
        nodes += [
            file.spot.node for file in [*self.files.opened.values()] if file.flags & os.O_EXCL
        ]
        return [node.blocks for node in nodes if node is not None and node.blocks is not None]

    def _sysfs(self, number: str) -> str:
        """The directory of a device's in sysfs."""
        major, _, minor = number.partition(":")
        if major == "253":
            return f"/sys/devices/virtual/block/dm-{minor}"
        disk = next(disk for disk in DISKS if disk.minor == int(minor) // 16 * 16)
        part = f"/{disk.name}{int(minor) % 16}" if int(minor) % 16 else ""
        return f"{self._place(disk)}/block/{disk.name}{part}"

    def _node(self, number: str) -> Node | None:
        return self._nodes.get(number)

    def _is_used(self, number: str) -> bool:
        mounts, mapped = [*self.tree.mounts.values()], [*self.mapper.mapped.values()]
        return any(mount.number == number for mount in mounts) or any(
            number in device.below for device in mapped
        )

    # How it is made.

    def _make(self) -> None:
        tree = self.tree
        for path in ("/run", "/mnt/theirs", "/mnt/empty", "/mnt/real", "/dev/mapper", "/etc"):
            tree.directory(path)
        tree.file("/mnt/file", b"text")
        tree.link("/mnt/link", "real")
        tree.link("/mnt/dead", "/nowhere/at/all")
        tree.link("/mnt/loop", "loop")
        tree.link("/mnt/sda", "/dev/sda")
        for name in ("mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "cryptsetup", "modprobe"):
            tree.file(f"/usr/sbin/{name}")
        self.control = tree.file("/dev/mapper/control")
        tree.file("/dev/urandom")
        self._make_processes()
        self._bus = tree.directory("/sys/bus/scsi/devices")
        for controller in (0, 1):
            below = f"pci0000:00/0000:00:{3 + controller:02x}.0/virtio{controller}"
            host = controller + 2
            tree.directory(f"/sys/devices/{below}/host{host}")
            tree.link(
                f"/sys/bus/virtio/drivers/virtio_scsi/virtio{controller}",
                f"../../../../devices/{below}",
            )
            scan = tree.file(f"/sys/class/scsi_host/host{host}/scan")
            scan.ordered = lambda order, host=host: self._look_for(host, order)
        tree.directory("/sys/class/block")
        tree.file(f"{_DRIVER}/bind").ordered = functools.partial(self._told, self._bind)
        tree.file(f"{_DRIVER}/unbind").ordered = functools.partial(self._told, self._unbind)
        for disk in DISKS:
            if "late" not in disk.traits:
                self.plug(disk)
        spot = tree.walk("/mnt/theirs")
        theirs = Mount(Node(stat.S_IFDIR | 0o755), "8:192", "ext4", "/dev/sdm", spot)
        tree.mounts[spot] = theirs
        self.calls.busy.update(("8:192", "8:208"))

    def _make_processes(self) -> None:
        tree = self.tree
        lines = [f"{'nodev' * (name == 'proc')}\t{name}\n" for name in KNOWN]
        tree.file("/proc/filesystems", "".join(lines).encode())
        tree.file("/proc/misc", lambda: b"237 device-mapper\n" * self.mapper.is_loaded)
        tree.file("/proc/locks", lambda: _LOCK * bool(self.mapper.at_work))
        tree.file("/proc/swaps", b"Filename\tType\n")
        tree.file("/proc/self/mountinfo", self.calls.mountinfo)
        tree.link("/proc/self/ns/mnt", "mnt:[4026531840]")
        tree.file("/proc/55/mountinfo", self.calls.mountinfo)
        tree.file("/proc/55/comm", b"bash\n")
        tree.file("/proc/55/cmdline", b"bash\0-c\0x")
        tree.file("/proc/55/maps", b"7f00-7f01 r--p 00000000 08:c0 12 /mnt/theirs/lib.so\n")
        tree.file("/proc/55/fdinfo/4", b"pos:\t0\nmnt_id:\t20\n")
        for line in _THEIRS.splitlines():
            name, target = line.split()
            tree.link(f"/proc/55/{name}", target)

    def _look_for(self, host: int, order: bytes) -> None:
        """What is asked for at the adapter: `0 0 7`."""
        lun = order.split()[-1].decode()
        for disk in DISKS:
            if (disk.host, str(disk.lun)) == (host, lun) and disk.address not in self._bus.entries:
                self.plug(disk, serial=f"disk-{disk.lun}-new")

    def plug(self, disk: Disk, serial: str = "") -> None:
        """Have a disk come; with another serial it is another one."""
        serial = serial or f"disk-{disk.lun}"
        tree = self.tree
        place = self._place(disk)
        above = tree.touch(tree.directory(os.path.dirname(place)))
        device = above.entries[disk.address] = Node(stat.S_IFDIR | 0o755, above)
        page = b"\0\x80" + len(serial).to_bytes(2, "big") + serial.encode()
        self._attribute(device, "vpd_pg80", b"" if "no vpd" in disk.traits else page)
        self._attribute(device, "rescan").ordered = lambda _: None
        self._attribute(device, "delete").ordered = lambda _: self._delete(disk, device)
        link = tree.touch(self._bus).entries[disk.address] = Node(stat.S_IFLNK | 0o777)
        link.target = f"../../..{place.removeprefix('/sys')}"
        self._bind(disk)

    def unplug(self, disk: Disk) -> None:
        """Have a disk go."""
        tree = self.tree
        self._unbind(disk)
        tree.touch(self._bus).entries.pop(disk.address, None)
        above = tree.directory(os.path.dirname(self._place(disk)))
        tree.touch(above).entries.pop(disk.address, None)

    def device(self, disk: Disk) -> Node | None:
        """The directory of the SCSI device, if it is there; its driver has made `block` in it."""
        return self.tree.directory(os.path.dirname(self._place(disk))).entries.get(disk.address)

    def _delete(self, disk: Disk, device: Node) -> None:
        if self.device(disk) is device:
            self.unplug(disk)

    def _bind(self, disk: Disk) -> None:
        tree = self.tree
        device = tree.touch(tree.directory(self._place(disk)))
        if "driver" in device.entries:
            return
        driver = device.entries["driver"] = Node(stat.S_IFLNK | 0o777)
        driver.target = _DRIVER
        folder = device.entries["block"] = Node(stat.S_IFDIR | 0o755, device)
        number = f"8:{disk.minor}"
        block = self._block(folder, disk, disk.name, number, disk.holds, "")
        for at, holds in enumerate(disk.partitions, 1):
            name = f"{disk.name}{at}"
            part = self._block(block, disk, name, f"8:{disk.minor + at}", holds, number)
            self._attribute(part, "partition", f"{at}\n".encode())

    def _unbind(self, disk: Disk) -> None:
        tree = self.tree
        device = tree.touch(tree.directory(self._place(disk)))
        for name in ("block", "driver"):
            device.entries.pop(name, None)
        for name in (disk.name, *(f"{disk.name}{n}" for n, _ in enumerate(disk.partitions, 1))):
            tree.touch(tree.directory("/dev")).entries.pop(name, None)
        for at in range(len(disk.partitions) + 1):
            tree.touch(tree.directory("/sys/dev/block")).entries.pop(f"8:{disk.minor + at}", None)

    def _told(self, act: Callable[[Disk], None], order: bytes) -> None:
        """The driver is told a disk's address."""
        for disk in DISKS:
            if disk.address == order.decode() and disk.address in self._bus.entries:
                act(disk)

    def _place(self, disk: Disk) -> str:
        """The directory of the SCSI device in sysfs."""
        number = disk.controller
        below = f"pci0000:00/0000:00:{3 + number:02x}.0/virtio{number}"
        return f"/sys/devices/{below}/host{disk.host}/{disk.address}"

    def _block(
        self, above: Node, disk: Disk, name: str, number: str, holds: str, whole: str
    ) -> Node:
        tree = self.tree
        own = above.entries[name] = Node(stat.S_IFDIR | 0o755, above)
        read_only = "read-only" in disk.traits
        self._attribute(own, "dev", f"{number}\n".encode())
        self._attribute(own, "ro", b"1\n" if read_only else b"0\n")
        self._attribute(own, "size", f"{disk.sectors}\n".encode())
        own.entries["holders"] = Node(stat.S_IFDIR | 0o755, own)
        blocks = Blocks(number, min(_SIZE, disk.sectors * 512), whole)
        if holds:
            blocks.fill(holds)
        blocks.key = KEYS[0] if holds == "crypto_LUKS" else b""
        blocks.broken = "broken" in disk.traits
        blocks.read_only = read_only
        node = Node(stat.S_IFBLK | 0o660)
        node.blocks = blocks
        tree.touch(tree.directory("/dev")).entries[name] = node
        link = tree.touch(tree.directory("/sys/dev/block")).entries[number] = Node(
            stat.S_IFLNK | 0o777
        )
        below = f"{whole and disk.name}/{name}".lstrip("/")
        link.target = f"../..{self._place(disk).removeprefix('/sys')}/block/{below}"
        self._nodes[number] = node
        return own

    def _attribute(self, above: Node, name: str, content: bytes = b"") -> Node:
        node = above.entries[name] = Node(stat.S_IFREG | 0o644, above)
        node.content = content
        return node


__all__ = ["DISKS", "PROFILE", "Guest", "Spot"]
