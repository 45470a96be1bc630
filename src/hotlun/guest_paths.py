r"""Paths inside the guest: their rules, and which are taken.

A guest path is absolute, holds no `..` and no NUL, and is normalised: `//`,
`.` and a trailing separator make no difference. Linux guests compare them byte
for byte, Windows guests (`c:\mounts\scsi\m0`, `/` works too) without case and without
dots and spaces at the end.
"""

from __future__ import annotations

import heapq
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from hotlun import windows_paths
from hotlun.errors import GuestPathConflictError

if TYPE_CHECKING:
    from hotlun.backends.base import OSType

DEFAULT_FORMAT: Final[dict[OSType, str]] = {
    "linux": "/run/mounts/scsi/m%d",
    "windows": r"c:\mounts\scsi\m%d",
}

_SEPARATORS: Final[dict[OSType, str]] = {"linux": "/", "windows": "\\"}
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_RESERVED = re.compile(r'[\x01-\x1f<>:"|?*]')
_DEVICES = re.compile(
    r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9\xb9\xb2\xb3]) *(\.|$)", re.IGNORECASE
)
"""Names that Windows reserves, in every folder (Microsoft Learn: "Naming Files, Paths")."""


@lru_cache(maxsize=1024)
def normalise(path: str, os_type: OSType) -> str:
    """The one spelling of a guest path.

    Raises:
        ValueError: it is relative, is the root itself, or holds `..` or NUL; or, in a Windows
            guest, what no name can hold there.
        TypeError: it is not a string.
    """
    if not isinstance(path, str):
        raise TypeError(f"a guest path is a string: {path!r}")
    if "\0" in path:
        raise ValueError(f"a guest path holds no NUL: {path!r}")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"a guest path is text that UTF-8 can carry: {path!r}") from None
    parts = _windows_names(path) if os_type == "windows" else _linux_names(path)
    if len(parts) < 2:
        raise ValueError(f"nothing can be mounted over the guest's root: {path!r}")
    return _SEPARATORS[os_type].join(parts)


def _linux_names(path: str) -> list[str]:
    if not path.startswith("/"):
        raise ValueError(f"a guest path is absolute: {path!r}")
    names = [name for name in path.split("/") if name not in ("", ".")]
    if ".." in names:
        raise ValueError(f"a guest path holds no '..': {path!r}")
    return ["", *names]


def _windows_names(path: str) -> list[str]:
    if not _DRIVE.match(path):
        raise ValueError(f"a guest path is absolute, and begins with a drive: {path!r}")
    for name in re.split(r"[\\/]", path[3:]):
        if name not in ("", ".") and not name.strip(". "):
            raise ValueError(f"a guest path holds no '..', nor its like: {path!r}")
        if _RESERVED.search(name) or _DEVICES.match(name):
            raise ValueError(f"nothing can be called {name!r} in a Windows guest: {path!r}")
    names = windows_paths.parse(path).names
    # Windows drops such ends from the last name alone, so nobody can make such a folder.
    if any(name.endswith((".", " ")) for name in names):
        raise ValueError(f"no folder's name ends in dots or spaces in a Windows guest: {path!r}")
    return [path[:2], *names]


class GuestPaths:
    """Which guest paths are taken, and the next generated one.

    Args:
        pattern: holds exactly one `%d`; None for the guest's default.
        os_type: whose path rules hold.

    Raises:
        ValueError: the pattern has not exactly one `%d`, or what it makes are no guest paths.
    """

    def __init__(self, pattern: str | None, os_type: OSType) -> None:
        if pattern is None:
            pattern = DEFAULT_FORMAT[os_type]
        if not isinstance(pattern, str):
            raise TypeError(f"guest_mount_format is a string with one %d: {pattern!r}")
        if pattern.count("%") != 1 or "%d" not in pattern:
            raise ValueError(f"guest_mount_format needs exactly one %d: {pattern!r}")
        self._os_type = os_type
        self._separator = _SEPARATORS[os_type]
        self.pattern = normalise(pattern, os_type)
        normalise(self.pattern % 1, os_type)  # Windows reserves names such as COM1
        self._taken: dict[str, int | None] = {}
        """By key; the value is the number it was generated from, if it was."""
        self._within: dict[tuple[str, ...], int] = {}
        """How many taken paths are in a folder, by this one and all above it."""
        self._above: dict[str, int] = {}
        """How many of those folders are, or lie below, each folder."""
        folders = _folders(self.pattern, self._separator)
        self._common = {self._key(folder) for folder in folders if "%" not in folder}
        """The folders that every generated path lies below, by key."""
        self._fresh = 0
        """The lowest number that was never used."""
        self._returned: list[int] = []
        self._set_aside: dict[str, int] = {}
        """Numbers that are worth no try before what is in their way is free, by its key."""

    def normalise(self, path: str) -> str:
        """The one spelling of a guest path; see the function of this name."""
        return normalise(path, self._os_type)

    def check_free(self, path: str) -> None:
        """Whether a normalised path can be taken.

        Raises:
            GuestPathConflictError: it equals, or lies above or below, a taken one.
        """
        collision = self._collision(path)
        if collision is not None:
            raise GuestPathConflictError(
                f"the guest path {path} {collision[1]}: choose another, or release that mount first"
            )

    def generate(self) -> tuple[str, int]:
        """The generated path with the lowest number that collides with no taken one.

        Raises:
            GuestPathConflictError: none can ever fit.
        """
        while True:
            number = self._returned[0] if self._returned else self._fresh
            path = self.pattern % number
            collision = self._collision(path)
            if collision is None:
                return path, number
            key, words = collision
            if key in self._common:
                raise GuestPathConflictError(
                    f"no path of the form {self.pattern} fits: {path} {words}; "
                    "state a guest_path, or release that mount first"
                )
            # No other number has that in its way, so this ends.
            self._use_lowest()
            self._set_aside[key] = number

    def take(self, path: str, number: int | None = None) -> None:
        """A normalised, free path is in use from now on; `number` as `generate` gave it."""
        if number is not None:
            self._use_lowest()
        key = self._key(path)
        self._taken[key] = number
        folders = _folders(key, self._separator)
        count = self._within[folders] = self._within.get(folders, 0) + 1
        if count == 1:
            for folder in folders:
                self._above[folder] = self._above.get(folder, 0) + 1

    def give_back(self, path: str) -> None:
        """The path is free again."""
        key = self._key(path)
        number = self._taken.pop(key)
        if number is not None:
            heapq.heappush(self._returned, number)
        self._is_free(key)
        folders = _folders(key, self._separator)
        count = self._within[folders] = self._within[folders] - 1
        if count:
            return
        del self._within[folders]
        for folder in folders:
            self._above[folder] -= 1
            if not self._above[folder]:
                del self._above[folder]
                self._is_free(folder)

    def _is_free(self, key: str) -> None:
        """What was in its way is worth a try again."""
        if key in self._set_aside:
            heapq.heappush(self._returned, self._set_aside.pop(key))

    def _use_lowest(self) -> None:
        """Of the numbers that are worth a try."""
        if self._returned:
            heapq.heappop(self._returned)
        else:
            self._fresh += 1

    def _collision(self, path: str) -> tuple[str, str] | None:
        """The key that is in the way, and what that makes of the path, in words."""
        key = self._key(path)
        if key in self._taken:
            return key, "is another guest mount's"
        if key in self._above:
            return key, "lies above another guest mount's"
        folders = _folders(key, self._separator)
        if self._taken.keys().isdisjoint(folders):
            return None
        depth, folder = next(one for one in enumerate(folders) if one[1] in self._taken)
        spelt = _folders(path, self._separator)[depth]
        return folder, f"lies below another guest mount's, {spelt}"

    def _key(self, path: str) -> str:
        return windows_paths.upper(path) if self._os_type == "windows" else path


@lru_cache(maxsize=1024)
def _folders(path: str, separator: str) -> tuple[str, ...]:
    """The folders above a path, the root left out."""
    parts = path.split(separator)
    return tuple(separator.join(parts[:n]) for n in range(2, len(parts)))
