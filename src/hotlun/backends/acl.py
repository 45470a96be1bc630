"""POSIX access control lists as values, and as the kernel keeps them.

The kernel shows a file's list as the extended attribute `system.posix_acl_access`
(linux/posix_acl_xattr.h): a version, then (tag, permissions, id) entries in order
of tag and id. A list without named entries is the file's mode and nothing else, so
writing such a list makes the attribute disappear.
"""

from __future__ import annotations

import errno
import os
import struct
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

READ, WRITE, SEARCH = 4, 2, 1

Key = tuple[int, int]
"""Whom an entry is about: its tag and, for a named user or group, the id."""
Acl = dict[Key, int]
"""Whom -> the sum of `READ`, `WRITE`, `SEARCH`."""

_ATTRIBUTE = "system.posix_acl_access"
_VERSION = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32
_GROUP_CLASS = frozenset({_USER, _GROUP_OBJ, _GROUP})
_NOBODY_IN_PARTICULAR = 0xFFFFFFFF
OWNER: Key = (_USER_OBJ, _NOBODY_IN_PARTICULAR)
_OWNING_GROUP: Key = (_GROUP_OBJ, _NOBODY_IN_PARTICULAR)
MASK: Key = (_MASK, _NOBODY_IN_PARTICULAR)
_EVERYBODY_ELSE: Key = (_OTHER, _NOBODY_IN_PARTICULAR)
_ALL = READ | WRITE | SEARCH


def user(uid: int) -> Key:
    """A user by name, that is, by number."""
    return (_USER, uid)


def read_acl(path: str) -> Acl:
    """The list of a file or folder, from its mode if it has no more than that.

    Raises:
        OSError: `EOPNOTSUPP` if its file system has no such lists.
    """
    try:
        data = os.getxattr(path, _ATTRIBUTE)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        mode = os.stat(path).st_mode
        return {
            OWNER: mode >> 6 & _ALL,
            _OWNING_GROUP: mode >> 3 & _ALL,
            _EVERYBODY_ELSE: mode & _ALL,
        }
    entries = _ENTRY.iter_unpack(data[_VERSION.size :])
    return {(tag, number): permissions for tag, permissions, number in entries}


def write_acl(path: str, acl: Acl) -> None:
    """Give a file or folder this list.

    Raises:
        OSError: it may not be changed.
    """
    entries = (_ENTRY.pack(tag, acl[tag, number], number) for tag, number in sorted(acl))
    os.setxattr(path, _ATTRIBUTE, _VERSION.pack(2) + b"".join(entries))


def is_complete(acl: Acl) -> bool:
    """Whether the kernel can have this list: entries of the kinds that there are, none lacking."""
    nameless = {OWNER, _OWNING_GROUP, _EVERYBODY_ELSE}
    return (
        nameless <= acl.keys()
        and all(key in nameless or key == MASK or key[0] in (_USER, _GROUP) for key in acl)
        and (MASK in acl or not _names_anybody(acl))
    )


def allows(acl: Acl, who: Key, wanted: int) -> bool:
    """Whether a user surely has these permissions, whichever groups it may be in."""
    mask = acl.get(MASK, _ALL)
    if who in acl:
        return not wanted & ~(acl[who] & (_ALL if who == OWNER else mask))
    groups = (acl[key] & mask for key in acl if key[0] in (_GROUP_OBJ, _GROUP))
    return not any(wanted & ~permissions for permissions in (*groups, acl[_EVERYBODY_ELSE]))


def extended(acl: Acl, ours: Mapping[Key, int]) -> Acl:
    """The list with these permissions added, and nobody else given anything by it.

    A mask caps what the group class has. Where it must grow for the newcomers, the
    others' entries shrink to what the old mask let through.
    """
    old_mask = acl.get(MASK, _ALL)
    result = {
        key: permissions & old_mask if key[0] in _GROUP_CLASS else permissions
        for key, permissions in acl.items()
    }
    for key, permissions in ours.items():
        result[key] = result.get(key, 0) | permissions
        if MASK in result and key != OWNER:
            result[MASK] |= permissions
    return _masked(result)


def extension(original: Acl, present: Acl, ours: Mapping[Key, int]) -> dict[Key, int]:
    """How much of `ours` the present list has been extended by, from what its entries are.

    All of it, nothing, or a part: lists are written whole, but not all at the same time.
    """
    for each in (dict(ours), {}):
        if present == (extended(original, each) if each else original):
            return each
    held = {key: present[key] & permissions for key, permissions in ours.items() if key in present}
    return {key: permissions for key, permissions in held.items() if permissions}


def merged(original: Acl, written: Acl, current: Acl) -> Acl:
    """What the original would be now, had we not written: others' changes kept, ours taken back."""
    result: Acl = {}
    for key in original.keys() | written.keys() | current.keys():
        source = original if current.get(key) == written.get(key) else current
        if key in source:
            result[key] = source[key]
    if MASK in result and MASK not in original and not _names_anybody(result):
        # It was there for our sake; somebody's chmod has gone to it and was meant for the group.
        result[_OWNING_GROUP] &= result.pop(MASK)
    return _masked(result)


def _masked(acl: Acl) -> Acl:
    """Named entries need a mask; one that has to be added hides nothing."""
    if MASK in acl or not _names_anybody(acl):
        return acl
    return {**acl, MASK: reduce(or_, (acl[key] for key in acl if key[0] in _GROUP_CLASS))}


def _names_anybody(acl: Acl) -> bool:
    return any(tag in (_USER, _GROUP) for tag, _ in acl)
