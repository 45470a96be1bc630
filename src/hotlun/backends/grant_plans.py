"""What a grant is going to change, as text that outlives the process which grants.

JSON, in ASCII alone: for each path whose list is going to be extended, who needs what of
it, and what its list is without any grant. That is all another process needs to take
exactly that back, however much of it has been done. It is our own text, and it is read as
if it were not: it says where permissions are taken away.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hotlun.backends.acl import OWNER, is_complete, user
from hotlun.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hotlun.backends.acl import Acl, Key

_VERSION = 1
_LONGEST = 4 << 20
"""Characters; a path is 4096 bytes, a list in ext4 at most a block, and a disk some dozen paths."""
_PERMISSIONS = range(8)
_WORD = range(1 << 32)
_LONG = range(1 << 64)


Identity = tuple[int, int]
"""A file's device and inode: a path may name another one by the time of the revoke."""


class Need(NamedTuple):
    """Somebody needs something of a file or folder."""

    path: str
    identity: Identity
    who: Key
    permissions: int


@dataclass(frozen=True, slots=True)
class Change:
    """A file or folder's list is going to be extended.

    Args:
        need: for what.
        original: the list without any grant.
    """

    need: Need
    original: Acl


def written(changes: Iterable[Change]) -> str:
    """The plan of these changes; `""` if there are none."""
    entries = [
        {
            "path": need.path,
            "device": need.identity[0],
            "inode": need.identity[1],
            "who": need.who,
            "permissions": need.permissions,
            "original": [[*key, original[key]] for key in sorted(original)],
        }
        for need, original in ((change.need, change.original) for change in changes)
    ]
    return json.dumps({"version": _VERSION, "changes": entries}) if entries else ""


def read(plan: str) -> list[Change]:
    """The changes of a plan.

    Raises:
        BackendError: it is no plan of ours.
    """
    if not plan:
        return []
    try:
        if len(plan) > _LONGEST:
            raise ValueError(f"{len(plan)} characters")
        match json.loads(plan):
            case {"version": int() as version, "changes": list() as entries} if version == _VERSION:
                return [_change(entry) for entry in entries]
        raise ValueError("another version, or no plan at all")
    except (ValueError, RecursionError) as error:
        raise BackendError(
            f"a grant was written down in a way that is not understood ({error}); nothing was "
            "changed. See who has access with getfacl, and take it away with setfacl -x",
            detail=plan[:200],
        ) from error


def _change(entry: object) -> Change:
    match entry:
        case {
            "path": str() as path,
            "device": device,
            "inode": inode,
            "who": who,
            "permissions": permissions,
            "original": list() as original,
        } if path.startswith("/") and "\0" not in path:
            key = _key(who)
            if key != OWNER and key != user(key[1]):
                raise ValueError("a grant is to a user")
            os.fsencode(path)
            need = Need(
                path,
                (_number(device, _LONG), _number(inode, _LONG)),
                key,
                _number(permissions, _PERMISSIONS[1:]),
            )
            return Change(need, _acl(original))
    raise ValueError("a change that is none")


def _acl(entries: list[object]) -> Acl:
    acl: Acl = {}
    for entry in entries:
        match entry:
            case [tag, number, permissions]:
                acl[_key([tag, number])] = _number(permissions, _PERMISSIONS)
            case _:
                raise ValueError("an entry of a list that is none")
    if len(acl) < len(entries) or not is_complete(acl):
        raise ValueError("a list that the kernel would not have")
    return acl


def _key(value: object) -> Key:
    match value:
        case [tag, number]:
            return (_number(tag, _WORD), _number(number, _WORD))
    raise ValueError("somebody who is nobody")


def _number(value: object, allowed: range) -> int:
    if type(value) is not int or value not in allowed:
        raise ValueError(f"{str(value)[:40]} where a number from {allowed[0]} was to be")
    return value
