r"""Paths of the host's: what a disk is known by, and where it is to be found after a move.

A file is known by (st_dev, st_ino) and a block device by st_rdev, whatever path leads to it;
one that does not exist here by its canonical path. On Windows a path says more, and a stat
less: paths are compared by `windows_paths.fold`, and what has no number of its own is known
by its path: files of some network file systems, and every disk (`\\.\PhysicalDrive2`), for
which CPython's stat tells that it is a block device and zeros.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol

from hotlun import windows_paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hotlun.records import Identity


class PathRules(Protocol):
    """What the paths of one system mean."""

    def find(self, path: str) -> tuple[str, str, Identity]:
        """The path made absolute, the canonical one, and what a disk there is known by.

        Args:
            path: not empty, and without NUL.
        """

    def fold(self, path: str) -> str:
        """What all spellings of an absolute path have in common."""

    def identity(self, path: str, status: os.stat_result | None) -> Identity:
        """What a disk at a canonical path is known by; its status is None if it has none."""

    def suffix(self, path: str) -> str:
        """The last dot of the last name and what follows, in lower case."""

    def spellings(self, path: str) -> tuple[str, ...]:
        """Keys, as `fold` makes them, by which a path may be known that was written by hand."""

    def upwards(self, path: str) -> Iterator[tuple[str, str]]:
        """The path, and each folder above it, as keys; with what lies below, or `""`."""

    def join(self, folder: str, rest: str) -> str:
        """What lies below a folder."""


class Posix:
    """Paths mean what they say, byte for byte."""

    def find(self, path: str) -> tuple[str, str, Identity]:
        name = os.path.abspath(path)
        status = _straight(name) if ".." not in path else None
        if status is not None:
            return name, name, self.identity(name, status)
        path = os.path.realpath(path)
        return name, path, self.identity(path, _status(path))

    def fold(self, path: str) -> str:
        return path

    def identity(self, path: str, status: os.stat_result | None) -> Identity:
        if status is None:
            return ("path", path, "")
        if stat.S_ISBLK(status.st_mode):
            # By name: where types are checked for Windows a stat has none.
            return ("device", int(getattr(status, "st_rdev")), 0)  # noqa: B009
        return ("file", status.st_dev, status.st_ino)

    def suffix(self, path: str) -> str:
        return _suffix(path)

    def spellings(self, path: str) -> tuple[str, ...]:
        return os.path.normpath(path), os.path.realpath(path)

    def upwards(self, path: str) -> Iterator[tuple[str, str]]:
        above, below = path, ""
        while True:
            yield above, below
            if above == os.path.dirname(above):
                return
            above = os.path.dirname(above)
            below = os.path.relpath(path, above)

    def join(self, folder: str, rest: str) -> str:
        return os.path.join(folder, rest)


@dataclass(frozen=True, slots=True)
class Windows:
    """Case and prefixes mean nothing.

    Args:
        current: as `windows_paths.absolute` wants it.
        resolve: resolves links and short names of what exists, as `os.path.realpath` there.
        ask: tells the status of what is there.
    """

    current: Callable[[str], str] = os.path.abspath
    resolve: Callable[[str], str] = os.path.realpath
    ask: Callable[[str], os.stat_result] = os.stat

    def find(self, path: str) -> tuple[str, str, Identity]:
        name, path = self.locate(path)
        return name, path, self.identity(path, _status(path, self.ask))

    def locate(self, path: str) -> tuple[str, str]:
        """The path made absolute, and the canonical one, with links resolved."""
        name = windows_paths.absolute(path, self.current)
        if not windows_paths.parse(name).names:
            return name, name  # a device: nothing in it can be a link
        try:
            return name, self.resolve(name)
        except OSError:
            return name, name

    def fold(self, path: str) -> str:
        return windows_paths.fold(path)

    def identity(self, path: str, status: os.stat_result | None) -> Identity:
        if status is None or stat.S_ISBLK(status.st_mode) or not status.st_ino:
            return ("path", self.fold(path), "")
        return ("file", status.st_dev, status.st_ino)

    def suffix(self, path: str) -> str:
        last = windows_paths.parse(path).names[-1:]
        return os.path.splitext("".join(last))[1].lower()

    def spellings(self, path: str) -> tuple[str, ...]:
        return tuple(map(self.fold, self.locate(path)))

    def upwards(self, path: str) -> Iterator[tuple[str, str]]:
        parts = windows_paths.parse(path)
        for count in range(len(parts.names), -1, -1):
            above = parts._replace(names=parts.names[:count])
            yield above.key, "\\".join(parts.names[count:])

    def join(self, folder: str, rest: str) -> str:
        return folder.rstrip("\\/") + "\\" + rest


@lru_cache(maxsize=1024)
def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


HERE: Final[PathRules] = Windows() if os.name == "nt" else Posix()
"""Those of the system that this runs on."""


def same(one: str, other: str, rules: PathRules = HERE) -> bool:
    """Whether two paths lead to one disk; `os.path.samefile` says so of any two disks of Windows.

    Args:
        one, other: as `PathRules.find` wants them.
        rules: whose paths they are.
    """
    return rules.find(one)[2] == rules.find(other)[2]


def _status(path: str, ask: Callable[[str], os.stat_result] = os.stat) -> os.stat_result | None:
    """The status of what is there; None if it has none."""
    try:
        return ask(path)
    except OSError:
        return None


def _straight(path: str) -> os.stat_result | None:
    """The status of what an absolute path names if it leads there without a link.

    One lstat(2) a name, as `os.path.realpath` makes them; the last is that of the file.
    """
    end = path.find("/", 1)
    try:
        while end > 0:
            if stat.S_ISLNK(os.lstat(path[:end]).st_mode):
                return None
            end = path.find("/", end + 1)
        status = os.lstat(path)
    except OSError:
        return None
    return None if stat.S_ISLNK(status.st_mode) else status


def moved(path: str, paths: Mapping[str, str], rules: PathRules = HERE) -> str:
    """Where a path is to be found now.

    Args:
        path: as it was, canonical.
        paths: from what was, to what is: the path itself, or a folder that it lies below.
            Of several that fit, the longest counts.
        rules: whose paths they are.
    """
    # Both spellings: disks are known by paths with their links resolved.
    known = {key: new for old, new in paths.items() for key in rules.spellings(old)}
    for above, rest in rules.upwards(path):
        if above in known:
            return rules.join(known[above], rest) if rest else known[above]
    return path
