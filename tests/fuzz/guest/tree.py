"""The guest's files: directories, attributes, links and devices, and what is mounted on them.

Paths are walked as the kernel does, through symbolic links, mounts and the links of
/proc/self/fd. Every change is noted, so that a guest can be had as it was at first
without making another.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzz.guest.blocks import Blocks

_LINKS_MAX = 40
_NAME_MAX = 255
_PATH_MAX = 4096
_GONE = "/gone (deleted)"
"""Where a directory is that nothing leads to."""


def failure(number: int, path: object = "") -> OSError:
    """As the kernel would say it."""
    return OSError(number, os.strerror(number), str(path))


class Node:
    """A file of any kind. Which, its mode says; what it holds, one of the other members."""

    __slots__ = ("blocks", "content", "entries", "inode", "is_device", "is_directory", "is_link",
                 "labels", "mode", "ordered", "parent", "target", "uid")  # fmt: skip
    _inodes = itertools.count(2)

    def __init__(self, mode: int, parent: Node | None = None) -> None:
        self.mode = mode
        self.is_directory = stat.S_ISDIR(mode)
        self.is_link = stat.S_ISLNK(mode)
        self.is_device = stat.S_ISBLK(mode)
        self.uid = 0
        self.inode = next(Node._inodes)
        self.parent = parent
        self.entries: dict[str, Node] = {}
        self.content: bytes | Callable[[], bytes] = b""
        self.ordered: Callable[[bytes], None] | None = None
        """What a write to this attribute makes the kernel do."""
        self.target = ""
        self.blocks: Blocks | None = None
        self.labels: dict[str, bytes] = {}


class Mount:
    """A tree of files, and the directory of another that it covers."""

    numbers = itertools.count(21)

    def __init__(
        self, root: Node, number: str, filesystem: str, source: str, below: Spot | None = None
    ) -> None:
        self.id = next(Mount.numbers)
        self.root = root
        self.number = number
        self.filesystem = filesystem
        self.source = source
        self.below = below
        """Where it is; None for the root, and for one that is nowhere yet, or any more."""


class Spot(NamedTuple):
    """A file as it is reached: through this mount."""

    mount: Mount
    node: Node


class Tree:
    """All the guest's files."""

    def __init__(self) -> None:
        root = Node(stat.S_IFDIR | 0o755)
        self.root = Spot(Mount(root, "0:2", "rootfs", "rootfs"), root)
        self.mounts: dict[tuple[Mount, Node], Mount] = {}
        """By what they cover."""
        self.opened: dict[int, Any] = {}
        """What is behind the links in /proc/self/fd, each with a `spot`."""
        self.own_files = self.directory("/proc/self/fd")
        self.own_infos = self.directory("/proc/self/fdinfo")
        self.no_file = Spot(self.root.mount, Node(stat.S_IFREG))
        """For what is open on nothing that has a path."""
        self._saved: dict[Node, tuple[Any, ...]] = {}
        self._mounted: dict[tuple[Mount, Node], Mount] = {}
        self._noting = False

    # Making it, before there is an agent.

    def directory(self, path: str, mode: int = 0o755) -> Node:
        """Those above, too."""
        node = self.root.node
        for name in path.split("/")[1:]:
            node = node.entries.setdefault(name, Node(stat.S_IFDIR | mode, node))
        return node

    def put(self, path: str, node: Node) -> Node:
        parent, name = os.path.split(path)
        self.directory(parent).entries[name] = node
        return node

    def file(self, path: str, content: bytes | Callable[[], bytes] = b"") -> Node:
        node = self.put(path, Node(stat.S_IFREG | 0o755))
        node.content = content
        return node

    def link(self, path: str, target: str) -> None:
        self.put(path, Node(stat.S_IFLNK | 0o777)).target = target

    def begin(self) -> None:
        """From now on note what is changed."""
        self._mounted = dict(self.mounts)
        self._noting = True

    def restore(self) -> None:
        """Have all as it was when that began."""
        for node, (mode, entries, content, labels, blocks) in self._saved.items():
            node.mode, node.entries, node.content, node.labels = mode, entries, content, labels
            node.blocks = blocks
        self._saved.clear()
        self.mounts = dict(self._mounted)

    def changes(self) -> list[str]:
        """The directories and mounts that are other than at first, less the kernel's own.

        One that is gone has changed the one above it.
        """
        changed = [self.path_of(Spot(*at)) for at in self.mounts.keys() ^ self._mounted.keys()]
        for node, (_, entries, *_) in self._saved.items():
            if node.entries.keys() != entries.keys():
                path = self.path_of(Spot(self.root.mount, node))
                if not path.startswith(("/sys", "/dev", _GONE)):
                    changed.append(path)
        return changed

    def touch(self, node: Node) -> Node:
        """Note how it is before it is changed."""
        if self._noting and node not in self._saved:
            blocks = node.blocks
            self._saved[node] = (
                *(node.mode, dict(node.entries), node.content, dict(node.labels), blocks),
            )
            if blocks is not None:
                node.blocks = blocks.copy()
        return node

    # Finding one's way in it.

    def walk(self, path: str, start: Spot | None = None, *, follow: bool = True) -> Spot:
        """The file at a path.

        Raises:
            OSError, ValueError: as the functions of `os`.
        """
        if "\0" in path:
            raise ValueError("embedded null byte")
        if (len(path) if path.isascii() else len(os.fsencode(path))) >= _PATH_MAX:
            raise failure(errno.ENAMETOOLONG, path)
        mount, node = self.root if start is None or path.startswith("/") else start
        todo = [part for part in reversed(path.split("/")) if part and part != "."]
        links = 0
        while todo:
            part = todo.pop()
            if part == "..":
                mount, node = self._above(Spot(mount, node))
                continue
            if not node.is_directory:
                raise failure(errno.ENOTDIR, path)
            if node is self.own_files or node is self.own_infos:
                file = self.opened.get(int(part) if part.isdigit() else -1)
                if file is None:
                    raise failure(errno.ENOENT, path)
                told = node is self.own_infos
                mount, node = file.spot
                if told:
                    node = Node(stat.S_IFREG)
                    node.content = f"pos:\t0\nmnt_id:\t{mount.id}\n".encode()
                continue
            found = node.entries.get(part)
            if found is None:
                too_long = len(part) * 4 > _NAME_MAX and len(os.fsencode(part)) > _NAME_MAX
                raise failure(errno.ENAMETOOLONG if too_long else errno.ENOENT, path)
            if found.is_link and (todo or follow):
                links += 1
                if links > _LINKS_MAX:
                    raise failure(errno.ELOOP, path)
                if found.target.startswith("/"):
                    mount, node = self.root
                todo += [
                    part for part in reversed(found.target.split("/")) if part not in ("", ".")
                ]
                continue
            node = found
            while node.is_directory and (mount, node) in self.mounts:
                mount = self.mounts[mount, node]
                node = mount.root
        return Spot(mount, node)

    def uppermost(self, spot: Spot) -> Spot:
        """What is in sight there."""
        while True:
            mount = self.mounts.get((spot.mount, spot.node))
            if mount is None:
                return spot
            spot = Spot(mount, mount.root)

    def path_of(self, spot: Spot) -> str:
        """As the kernel writes it."""
        names: list[str] = []
        mount, node = spot
        while True:
            if node is mount.root:
                if mount.below is None:
                    break
                mount, node = mount.below
                continue
            parent = node.parent
            name = (
                next((n for n, own in parent.entries.items() if own is node), "") if parent else ""
            )
            if parent is None or not name:
                return "/".join((_GONE, *reversed(names)))
            names.append(name)
            node = parent
        return "/" + "/".join(reversed(names))

    def _above(self, spot: Spot) -> Spot:
        mount, node = spot
        while node is mount.root:
            if mount.below is None:
                return Spot(mount, node)
            mount, node = mount.below
        return self.uppermost(Spot(mount, node.parent or node))
