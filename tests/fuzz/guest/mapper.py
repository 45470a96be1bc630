"""The guest's device mapper and block ioctls: `fcntl` of the guest."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fuzz.guest.blocks import Blocks
from fuzz.guest.errors import StrayError
from fuzz.guest.tree import Node, failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzz.guest.files import Files
    from fuzz.guest.tree import Tree

_HEADER = struct.Struct("=3IIIIiIIIQ128s129s7x")
_TARGET = struct.Struct("=QQiI16s")
_NAME = struct.Struct("=QI")
_BLKRRPART = 0x125F
_GET_LOCK, _SET_LOCK = 36, 37
_LIST, _CREATE, _REMOVE, _SUSPEND, _STATUS, _LOAD, _CLEAR, _TABLE = 2, 3, 4, 6, 7, 9, 10, 12
_BUFFER_FULL = 1 << 8
_DEFERRED = 1 << 17


@dataclass
class Mapped:
    """A mapped device: its table in service, and the one that is to be."""

    minor: int
    live: tuple[str, str, int] | None = None
    next: tuple[str, str, int] | None = None
    blocks: Blocks | None = None
    below: list[str] = field(default_factory=list)

    @property
    def number(self) -> str:
        return f"253:{self.minor}"


class Mapper:
    """Stands in for `fcntl`.

    Args:
        step: as for `Files`.
        node: finds a disk or partition by its number.
    """

    def __init__(
        self,
        tree: Tree,
        files: Files,
        step: Callable[[str], None],
        node: Callable[[str], Node | None],
        in_use: Callable[[str], bool],
        sysfs: Callable[[str], str],
    ) -> None:
        self._tree = tree
        self._files = files
        self._step = step
        self._node = node
        self._in_use = in_use
        self._sysfs = sysfs
        self.mapped: dict[str, Mapped] = {}
        self.is_loaded = True
        self.at_work = 0
        """How many looks find somebody else's program at work on the disk."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("F_"):
            return getattr(fcntl, name)
        raise StrayError(f"fcntl.{name}")

    def fcntl(self, descriptor: int, command: int, lock: bytes) -> bytes:
        """Locks: somebody's program is at work on a disk for the first looks."""
        self._step("fcntl")
        self._files.file(descriptor)
        if command not in (_GET_LOCK, _SET_LOCK):
            raise StrayError(f"fcntl.fcntl {command}")
        if command == _GET_LOCK and self.at_work:
            self.at_work -= 1
            return lock
        return struct.pack("@h", fcntl.F_UNLCK) + lock[2:]

    def ioctl(
        self, descriptor: int, request: int, buffer: bytearray | None = None, mutate: bool = True
    ) -> int:
        file = self._files.file(descriptor)
        if request == _BLKRRPART and file.blocks is not None:
            self._step("BLKRRPART")
            major, _, minor = file.blocks.number.partition(":")
            if any(self._in_use(f"{major}:{int(minor) + part}") for part in range(1, 3)):
                raise failure(errno.EBUSY)
            return 0
        if request >> 8 & 0xFF != 0xFD or buffer is None:
            raise StrayError(f"fcntl.ioctl {request:#x}")
        self._step("dm ioctl")
        self.is_loaded = True
        fields = list(_HEADER.unpack_from(buffer))
        name = fields[11].rstrip(b"\0").decode("utf-8", "surrogateescape")
        if request & 0xFF == _LIST:
            fields[7] = self._list(buffer)
        else:
            fields[10] = self._do(request & 0xFF, name, fields[7], buffer)
        _HEADER.pack_into(buffer, 0, *fields)
        return 0

    def open_luks(self, name: str, below: Blocks) -> None:
        """What cryptsetup does."""
        self.is_loaded = True
        self._do(_CREATE, name, 0, bytearray())
        self.mapped[name].next = ("crypt", f"x :64:logon:y 0 {below.number} 0", below.size // 512)
        self._resume(name, self.mapped[name])
        node = Node(stat.S_IFBLK | 0o660)  # without udev it makes one, and nobody removes it
        node.blocks = self.mapped[name].blocks
        self._tree.touch(self._tree.directory("/dev/mapper")).entries[name] = node

    def _list(self, buffer: bytearray) -> int:
        listed = _names([*self.mapped.items()])
        if _HEADER.size + len(listed) > len(buffer):
            return _BUFFER_FULL
        buffer[_HEADER.size : _HEADER.size + len(listed)] = listed
        return 0

    def _do(self, command: int, name: str, flags: int, buffer: bytearray) -> int:
        if command == _CREATE:
            if name in self.mapped:
                raise failure(errno.EBUSY)
            used = {mapped.minor for mapped in [*self.mapped.values()]}
            self.mapped[name] = Mapped(next(n for n in range(300) if n not in used))
            return 0
        mapped = self.mapped.get(name)
        if mapped is None:
            raise failure(errno.ENXIO)
        if command == _REMOVE:
            if self._in_use(mapped.number):
                if not flags & _DEFERRED:
                    raise failure(errno.EBUSY)
            else:
                self._remove(name, mapped)
            return 0
        if command == _LOAD:
            sectors, _, target, words = _table(buffer)
            mapped.next = target, words, sectors
            if target == "integrity":
                self._write_header(words.split()[0])
        elif command == _CLEAR:
            mapped.next = None
        elif command == _SUSPEND:
            self._resume(name, mapped)
        elif command == _TABLE:
            words = mapped.live[1] if mapped.live else ""
            start = _HEADER.size + _TARGET.size
            text = words.encode()[: len(buffer) - start - 1]
            buffer[start : start + len(text) + 1] = text + b"\0"
        elif command != _STATUS:
            raise StrayError(f"device mapper command {command}")
        return (253 << 8) | mapped.minor

    def _resume(self, name: str, mapped: Mapped) -> None:
        if mapped.next is None:
            return
        target, words, sectors = mapped.next
        numbers = [word for word in words.split() if word.count(":") == 1 and word[0].isdigit()]
        below = [self._blocks(number) or self._mapped_blocks(number) for number in numbers]
        if not below or below[0] is None or sectors <= 0:
            raise failure(errno.EINVAL)
        base = below[0]
        mapped.live, mapped.next, mapped.below = mapped.next, None, numbers
        size = min(sectors * 512, base.size)
        blocks = Blocks(mapped.number, size)
        if target == "verity":
            blocks = base.copy()
            blocks.number, blocks.whole, blocks.size = mapped.number, mapped.number, size
            blocks.read_only = True
            blocks.broken = not base.root_hash or base.root_hash not in words.split()
        elif base.key:
            blocks.fill("ext4" if base.key.endswith(b"right") else "")
        mapped.blocks = blocks
        self._show(name, mapped, blocks)

    def _write_header(self, number: str) -> None:
        """What dm-integrity does with a device that has none, as soon as it is told of it."""
        node = self._node(number)
        if node is None or node.blocks is None:
            raise failure(errno.EINVAL)
        blocks = self._tree.touch(node).blocks
        if blocks is not None and blocks.read(0, 8) == bytes(8):
            header = b"integrt\0" + bytes(8) + struct.pack("<Q", max(0, blocks.size // 512 - 300))
            blocks.write(0, header.ljust(4096, b"\0"))

    def _blocks(self, number: str) -> Blocks | None:
        node = self._node(number)
        return node.blocks if node else None

    def _show(self, name: str, mapped: Mapped, blocks: Blocks) -> None:
        device, tree = f"dm-{mapped.minor}", self._tree
        top = tree.directory("/sys/devices/virtual/block")
        if device in top.entries:
            tree.touch(tree.root.node.entries["dev"]).entries[device].blocks = blocks
            return
        own = Node(stat.S_IFDIR | 0o755, top)
        for attribute, text in (
            ("dev", mapped.number),
            ("size", str(blocks.size // 512)),
            ("ro", str(int(blocks.read_only))),
        ):
            node = own.entries[attribute] = Node(stat.S_IFREG | 0o644, own)
            node.content = f"{text}\n".encode()
        slaves = own.entries["slaves"] = Node(stat.S_IFDIR | 0o755, own)
        for number in dict.fromkeys(mapped.below):
            path = self._sysfs(number)
            below = slaves.entries[os.path.basename(path)] = Node(stat.S_IFLNK | 0o777)
            below.target = path
        tree.touch(top).entries[device] = own
        link = Node(stat.S_IFLNK | 0o777)
        link.target = f"../../devices/virtual/block/{device}"
        tree.touch(tree.directory("/sys/dev/block")).entries[mapped.number] = link
        node = Node(stat.S_IFBLK | 0o660)
        node.blocks = blocks
        tree.touch(tree.root.node.entries["dev"]).entries[device] = node

    def _remove(self, name: str, mapped: Mapped) -> None:
        del self.mapped[name]
        if mapped.blocks is None:
            return
        tree, device = self._tree, f"dm-{mapped.minor}"
        for folder, entry in (
            ("/sys/devices/virtual/block", device),
            ("/sys/dev/block", mapped.number),
            ("/dev", device),
        ):
            tree.touch(tree.directory(folder)).entries.pop(entry, None)

    def _mapped_blocks(self, number: str) -> Blocks | None:
        for mapped in [*self.mapped.values()]:
            if mapped.number == number:
                return mapped.blocks
        return None


def _names(mapped: list[tuple[str, Mapped]]) -> bytes:
    """As struct dm_name_list: each begins with its device and how far the next one is."""
    parts = []
    for at, (name, device) in enumerate(mapped, 1):
        text = os.fsencode(name) + b"\0"
        size = -(-(_NAME.size + len(text)) // 8) * 8
        head = _NAME.pack((253 << 8) | device.minor, size if at < len(mapped) else 0)
        parts.append((head + text).ljust(size, b"\0"))
    return b"".join(parts)


def _table(buffer: bytearray) -> tuple[int, int, str, str]:
    start, sectors, _, _, target = _TARGET.unpack_from(buffer, _HEADER.size)
    text = bytes(buffer[_HEADER.size + _TARGET.size :]).partition(b"\0")[0]
    return sectors, start, os.fsdecode(target.rstrip(b"\0")), os.fsdecode(text)
