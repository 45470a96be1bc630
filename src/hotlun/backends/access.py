"""Letting the user that a VM runs as open a disk: POSIX ACL entries, undone exactly.

A grant gives read and write (or only read) on the files of a disk, and search on
the folders above that lack it; never more than is missing. Paths are shared: two
disks in one folder need its entry only once, until the last of them is revoked.
So a path is not edited back and forth. For each one the list as it was is kept,
with who needs what; the list to write is made of these. Where somebody else has
changed the list meanwhile, their change is kept.

Group memberships are not counted on: a hypervisor is often started without them.
The lists are read and written as the kernel has them, which takes microseconds and
no program; nothing here waits, so nothing can come in between.
"""

from __future__ import annotations

import errno
import logging
import os
import pwd
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple

from hotlun.backends import acl
from hotlun.backends.acl import READ, SEARCH, WRITE
from hotlun.backends.errand import Errand
from hotlun.backends.nodes import needed_files
from hotlun.errors import BackendError, HotlunError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Collection

    from hotlun.backends.acl import Acl, Key
    from hotlun.model import Disk

_log = logging.getLogger("hotlun.qemu")
_LARGEST_UID = (1 << 32) - 2


_Identity = tuple[int, int]
"""A file's device and inode: a path may name another one by the time of the revoke."""


class _Need(NamedTuple):
    """Somebody needs something of a file or folder."""

    path: str
    identity: _Identity
    who: Key
    permissions: int


@dataclass
class _Extended:
    """A file or folder whose list we have extended."""

    original: Acl
    written: Acl
    needs: Counter[_Need] = field(default_factory=Counter)


class AccessGrants:
    """What has been granted to whom, and what that changed."""

    def __init__(self) -> None:
        self._extended: dict[_Identity, _Extended] = {}
        self._needs: dict[tuple[Disk, str], list[_Need]] = {}

    def grant(self, disk: Disk, vm_id: str, *, allow_backing: Collection[str] = ()) -> None:
        """Let the user open the disk's files; once is enough.

        Raises:
            BackendError: no such user or file, or a list may not be changed.
            UnsupportedError: a file system has no lists, or the disk is no file.
        """
        errand = Errand("grant access to", disk)
        if (disk, vm_id) in self._needs:
            return
        uid = _uid(errand, vm_id)
        try:
            files = needed_files(disk, allow_backing=allow_backing)
        except HotlunError as error:
            raise errand.error(type(error), str(error), detail=error.detail) from error
        if uid == 0:
            return
        done: list[_Need] = []
        try:
            for path, is_written in files.items():
                for folder in reversed(PurePath(path).parents):
                    done += self._add(str(folder), uid, SEARCH)
                done += self._add(path, uid, READ | WRITE if is_written else READ)
        except OSError as error:
            for need in reversed(done):
                with suppress(OSError):
                    self._remove(need)
            raise _translated(errand, error) from error
        self._needs[disk, vm_id] = done
        for need in done:
            _log.debug("%s: %s may now open %s", errand, vm_id, need.path)

    def revoke(self, disk: Disk, vm_id: str) -> None:
        """Take back what `grant` added. What fails is tried again by the next call.

        Raises:
            BackendError: a list may not be changed.
        """
        errand = Errand("revoke access to", disk)
        needs = self._needs.get((disk, vm_id), [])
        failures: list[OSError] = []
        for need in reversed(needs.copy()):
            try:
                self._remove(need)
            except OSError as error:
                failures.append(error)
            else:
                needs.remove(need)
                _log.debug("%s: %s is as before for %s", errand, need.path, vm_id)
        if failures:
            raise _translated(errand, failures[0]) from failures[0]
        self._needs.pop((disk, vm_id), None)

    def _add(self, path: str, uid: int, permissions: int) -> list[_Need]:
        """Give the user what it lacks on the path; what has been added, if anything."""
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        entry = self._extended.get(identity)
        if entry is None:
            present = acl.read_acl(path)
            entry = _Extended(present, present)
        _catch_up(path, entry)
        who = acl.OWNER if status.st_uid == uid else acl.user(uid)
        if acl.allows(entry.original, who, permissions):
            return []
        need = _Need(path, identity, who, permissions)
        entry.needs[need] += 1
        try:
            _settle(path, entry)
        except OSError:
            entry.needs[need] -= 1
            raise
        self._extended[identity] = entry
        return [need]

    def _remove(self, need: _Need) -> None:
        entry = self._extended[need.identity]
        entry.needs[need] -= 1
        try:
            if _identity(need.path) == need.identity:
                _catch_up(need.path, entry)
                _settle(need.path, entry)
        except OSError:
            entry.needs[need] += 1
            raise
        if not entry.needs.total():
            del self._extended[need.identity]


def _identity(path: str) -> _Identity | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (status.st_dev, status.st_ino)


def _catch_up(path: str, entry: _Extended) -> None:
    """Take over what others have changed since we last wrote."""
    present = acl.read_acl(path)
    if present != entry.written:
        entry.original = acl.merged(entry.original, entry.written, present)
        entry.written = present


def _settle(path: str, entry: _Extended) -> None:
    """Write the list that the original and all needs make."""
    ours: Acl = {}
    for need in +entry.needs:
        ours[need.who] = ours.get(need.who, 0) | need.permissions
    wanted = acl.extended(entry.original, ours) if ours else entry.original
    if wanted != entry.written:
        acl.write_acl(path, wanted)
        entry.written = wanted


def _uid(errand: Errand, vm_id: str) -> int:
    if vm_id.isascii() and vm_id.isdecimal() and int(vm_id) <= _LARGEST_UID:
        return int(vm_id)
    try:
        return pwd.getpwnam(vm_id).pw_uid
    except (KeyError, ValueError) as error:
        raise errand.error(
            BackendError,
            f"there is no user {vm_id!r}; vm_id is the user that QEMU runs as, by name or uid",
        ) from error


def _translated(errand: Errand, error: OSError) -> HotlunError:
    match error.errno:
        case errno.EOPNOTSUPP:
            kind: type[HotlunError] = UnsupportedError
            words = "its file system has no POSIX ACLs; give access another way, without vm_id"
        case errno.ENOENT | errno.ENOTDIR:
            kind = BackendError
            words = "there is no such file; give a path that exists"
        case errno.EPERM | errno.EACCES | errno.EROFS:
            kind = BackendError
            words = "only the owner of a file, or root, may give access to it; run as one of them"
        case _:
            kind = BackendError
            words = "its access control list cannot be changed; look at the file and its folders"
    return errand.error(kind, f"{words} ({error.filename}: {error.strerror})", detail=str(error))
