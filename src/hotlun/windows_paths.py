r"""Paths as Windows reads them, without asking it: one spelling, and one key for all spellings.

Win32 makes of every path a name in NT's folder of devices (`\??\`): `C:\x`, `\\.\C:\x` and
`\\?\C:\x` are its `C:\x`, `\\server\share` its `UNC\server\share`, `\\.\PhysicalDrive2` its
`PhysicalDrive2`. On the way `/` becomes `\`, `.` and `..` are resolved, and dots and spaces at
the end are lost, which only `\\?\` prevents (Microsoft Learn: "File path formats on Windows
systems"). Names are then compared without case: each UTF-16 unit is replaced by its upper case,
so a name keeps its length, and `ß` is not `ss`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

VERBATIM: Final = "\\\\?\\"
"""What a path begins with whose names mean exactly what they say."""

_DEVICE: Final = "\\\\.\\"
_DRIVE = re.compile(r"[A-Za-z]:")


class Parts(NamedTuple):
    r"""A path taken apart.

    Args:
        start: how it begins, as written: `C:`, `\\server\share`, `\\.\PhysicalDrive2`, or nothing.
        device: the same in NT's folder of devices.
        is_rooted: a separator follows; without one `C:x` depends on the current folder of `C:`.
        names: the rest.
    """

    start: str
    device: str
    is_rooted: bool
    names: tuple[str, ...]

    def __str__(self) -> str:
        return self.start + self._rest()

    @property
    def key(self) -> str:
        """What all spellings have in common."""
        return upper(self.device + self._rest())

    def _rest(self) -> str:
        return ("\\" if self.is_rooted else "") + "\\".join(self.names)


def parse(path: str) -> Parts:
    """Take a path apart; what stands for nothing in it is left out."""
    text = path.replace("/", "\\")
    is_verbatim = path.startswith(VERBATIM)
    if text.startswith((VERBATIM, _DEVICE)):
        first, separator, rest = text[4:].partition("\\")
        if first.upper() != "UNC":
            if not (is_verbatim or separator):
                first = first.rstrip(". ")
            return Parts(text[:4] + first, first, bool(separator), _names(rest, is_verbatim))
        return _shared(text[:8], rest, is_verbatim)
    if text.startswith("\\\\"):
        return _shared("\\\\", text[2:], is_verbatim=False)
    start = text[:2] if _DRIVE.match(text) else ""
    rest = text[len(start) :]
    is_rooted = rest.startswith("\\")
    return Parts(start, start, is_rooted, _names(rest, is_rooted=is_rooted))


def absolute(path: str, current: Callable[[str], str]) -> str:
    """The path from its drive or share on, as it is spelt otherwise.

    Args:
        path: of any sort.
        current: tells the current folder: of the process for `.`, and of a drive for `C:`.
    """
    parts = parse(path)
    if parts.start and (parts.is_rooted or not _DRIVE.fullmatch(parts.start)):
        return str(parts)
    base = parse(current(parts.start or "."))
    names = parts.names if parts.is_rooted else (*base.names, *parts.names)
    return str(base._replace(is_rooted=True, names=_resolved(names, is_rooted=True)))


def fold(path: str) -> str:
    """The key of an absolute path: equal for all its spellings, and for no other path's."""
    return parse(path).key


def upper(text: str) -> str:
    """The text as NTFS compares it (its `$UpCase`): character by character, within the BMP."""
    return text.upper() if text.isascii() else "".join(map(_upper, text))


@lru_cache(maxsize=1024)
def _upper(character: str) -> str:
    # The mapping must lead back: a dotless i is no `I` there, nor a long s an `S`. Some Greek
    # letters have two characters as their upper case, and one as their title case: that it is.
    for one in (character.upper(), character.title()):
        if len(one) == 1 and one < "\U00010000" and one.lower() == character:
            return one
    return character


def _shared(start: str, text: str, is_verbatim: bool) -> Parts:
    server, _, rest = text.lstrip("\\").partition("\\")
    share, _, rest = rest.lstrip("\\").partition("\\")
    if not (is_verbatim or rest):
        share = share.rstrip(". ")
    where = f"{server}\\{share}"
    return Parts(start + where, f"UNC\\{where}", True, _names(rest, is_verbatim))


def _names(text: str, is_verbatim: bool = False, is_rooted: bool = True) -> tuple[str, ...]:
    *folders, last = text.split("\\")
    if not is_verbatim:
        folders = [_folder(name) for name in folders]
        if last not in (".", ".."):
            last = last.rstrip(". ")
    return _resolved((*folders, last), is_rooted)


def _folder(name: str) -> str:
    """A name that a separator follows: it loses one dot, and no spaces."""
    is_dotted = name.endswith(".") and not name.endswith("..") and name != "."
    return name[:-1] if is_dotted else name


def _resolved(names: Iterable[str], is_rooted: bool) -> tuple[str, ...]:
    found: list[str] = []
    for name in names:
        if name in ("", "."):
            continue
        if name != "..":
            found.append(name)
        elif found and found[-1] != "..":
            found.pop()
        elif not is_rooted:
            found.append(name)
    return tuple(found)
