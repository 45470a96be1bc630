"""Letting the user that a VM runs as open a disk: POSIX ACL entries, undone exactly.

A grant gives read and write (or only read) on the files of a disk, and search on
the folders above that lack it; never more than is missing. Paths are shared: two
disks in one folder need its entry only once, until the last of them is revoked.
So a path is not edited back and forth. For each one the list as it was is kept,
with who needs what; the list to write is made of these. Where somebody else has
changed the list meanwhile, their change is kept.

Group memberships are not counted on: a hypervisor is often started without them.
What a grant is going to change can be written down before (`plan`), and is known again from
that in another process (`adopt`), however much of it has been done: what a list has been
extended by is found out from the list itself when it is next touched.

The lists are read and written as the kernel has them, which takes microseconds and
no program; nothing here waits, so nothing can come in between.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING

from hotlun.backends import acl
from hotlun.backends.acl import READ, SEARCH, WRITE
from hotlun.backends.errand import Errand
from hotlun.backends.grant_plans import Change, Need, read, written
from hotlun.backends.nodes import needed_files
from hotlun.errors import BackendError, HotlunError, UnsupportedError
from hotlun.model import DiskKind

if TYPE_CHECKING:
    from collections.abc import Collection

    from hotlun.backends.acl import Acl, Key
    from hotlun.backends.grant_plans import Identity
    from hotlun.model import Disk

_log = logging.getLogger("hotlun.qemu")
_LARGEST_UID = (1 << 32) - 2


@dataclass
class _Extended:
    """A file or folder whose list we have extended."""

    original: Acl
    written: Acl | None
    """None: an earlier process has written it, or was going to."""
    needs: Counter[Need] = field(default_factory=Counter)


class AccessGrants:
    """What has been granted to whom, and what that changed."""

    def __init__(self) -> None:
        self._extended: dict[Identity, _Extended] = {}
        self._needs: dict[tuple[Disk, str], list[Need]] = {}

    def plan(self, disk: Disk, vm_id: str, *, allow_backing: Collection[str] = ()) -> str:
        """What `grant` is going to change, or has changed if it was called before; for `adopt`.

        Nothing is changed by it. `""` if there is nothing to change.

        Raises:
            BackendError: no such user or file.
            UnsupportedError: a file system has no lists.
        """
        if disk.kind is DiskKind.EXTENSIBLE_VIRTUAL_DISK:
            return ""
        errand = Errand("grant access to", disk)  # which would fail in the same way
        changes = [
            Change(need, self._extended[need.identity].original)
            for need in self._needs.get((disk, vm_id), ())
        ]
        try:
            for path, uid, permissions in _wanted(errand, disk, vm_id, allow_backing):
                need, entry = self._lack(path, uid, permissions)
                if need is not None and all(need != each.need for each in changes):
                    changes.append(Change(need, entry.original))
        except OSError as error:
            raise _translated(errand, error) from error
        return written(changes)

    def adopt(self, disk: Disk, vm_id: str, plan: str) -> None:
        """Take over a grant that an earlier process has planned and made, in part, or not at all.

        Adopt all of them, in the order of granting, before the first grant and revoke. No
        file is touched. `revoke` takes back what is there of it, `grant` completes it.

        Raises:
            BackendError: the plan is not understood.
        """
        errand = Errand("take over access to", disk)
        try:
            changes = read(plan)
        except BackendError as error:
            raise errand.error(BackendError, str(error), detail=error.detail) from error
        needs = self._needs.get((disk, vm_id), [])
        for need, original in ((change.need, change.original) for change in changes):
            entry = self._extended.setdefault(need.identity, _Extended(original, None))
            # The later plan knows what others have changed since the earlier one.
            entry.original, entry.written = original, None
            if need not in needs:
                entry.needs[need] += 1
                needs.append(need)
        if needs:
            self._needs[disk, vm_id] = needs

    def grant(self, disk: Disk, vm_id: str, *, allow_backing: Collection[str] = ()) -> None:
        """Let the user open the disk's files; again, it completes what is lacking.

        Raises:
            BackendError: no such user or file, or a list may not be changed.
            UnsupportedError: a file system has no lists, or the disk is no file.
        """
        errand = Errand("grant access to", disk)
        needs = self._needs.get((disk, vm_id), [])
        done: list[Need] = []
        try:
            for path, uid, permissions in _wanted(errand, disk, vm_id, allow_backing):
                done += self._add(path, uid, permissions, needs)
        except OSError as error:
            for need in reversed(done):
                with suppress(OSError):
                    self._remove(need)
            raise _translated(errand, error) from error
        for need in done:
            _log.debug("%s: %s may now open %s", errand, vm_id, need.path)
        if needs or done:
            self._needs[disk, vm_id] = [*needs, *done]

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

    def _lack(self, path: str, uid: int, permissions: int) -> tuple[Need | None, _Extended]:
        """What the user lacks on the path without any grant, and its list; nothing is changed."""
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        present = acl.read_acl(path)
        entry = _caught_up(self._extended.get(identity) or _Extended(present, present), present)
        who = acl.OWNER if status.st_uid == uid else acl.user(uid)
        if acl.allows(entry.original, who, permissions):
            return None, entry
        return Need(path, identity, who, permissions), entry

    def _add(self, path: str, uid: int, permissions: int, held: Collection[Need]) -> list[Need]:
        """Give the user what it lacks on the path; what it did not hold before, if anything."""
        need, entry = self._lack(path, uid, permissions)
        if need is None:
            return []
        is_new = need not in held
        entry.needs[need] += is_new
        _settle(path, entry)
        self._extended[need.identity] = entry
        return [need] if is_new else []

    def _remove(self, need: Need) -> None:
        entry = self._extended[need.identity]
        if _identity(need.path) == need.identity:
            entry = _caught_up(entry, acl.read_acl(need.path))
            entry.needs[need] -= 1
            _settle(need.path, entry)
            self._extended[need.identity] = entry
        else:
            entry.needs[need] -= 1
        if not entry.needs.total():
            del self._extended[need.identity]


def _wanted(
    errand: Errand, disk: Disk, vm_id: str, allow_backing: Collection[str]
) -> list[tuple[str, int, int]]:
    """Path, uid and permissions of all that the user needs for a disk; nothing for root.

    Raises:
        BackendError: no such user, or the disk cannot be looked into.
        UnsupportedError: the disk is no file.
    """
    uid = _uid(errand, vm_id)
    try:
        files = needed_files(disk, allow_backing=allow_backing)
    except HotlunError as error:
        raise errand.error(type(error), str(error), detail=error.detail) from error
    wanted: list[tuple[str, int, int]] = []
    for path, is_written in files.items() if uid else ():
        wanted += [(str(above), uid, SEARCH) for above in reversed(PurePath(path).parents)]
        wanted.append((path, uid, READ | WRITE if is_written else READ))
    return wanted


def _identity(path: str) -> Identity | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (status.st_dev, status.st_ino)


def _caught_up(entry: _Extended, present: Acl) -> _Extended:
    """The entry with what others have changed since we last wrote."""
    last = entry.written
    if last is None:
        there = acl.extension(entry.original, present, _sum(entry.needs))
        last = acl.extended(entry.original, there) if there else entry.original
    original = acl.merged(entry.original, last, present) if present != last else entry.original
    return _Extended(original, present, entry.needs.copy())


def _settle(path: str, entry: _Extended) -> None:
    """Write the list that the original and all needs make."""
    ours = _sum(entry.needs)
    wanted = acl.extended(entry.original, ours) if ours else entry.original
    if wanted != entry.written:
        acl.write_acl(path, wanted)
        entry.written = wanted


def _sum(needs: Counter[Need]) -> dict[Key, int]:
    """Who needs what, all needs together."""
    ours: dict[Key, int] = {}
    for need in +needs:
        ours[need.who] = ours.get(need.who, 0) | need.permissions
    return ours


def _uid(errand: Errand, vm_id: str) -> int:
    if vm_id.isascii() and vm_id.isdecimal() and int(vm_id) <= _LARGEST_UID:
        return int(vm_id)
    import pwd  # not on Windows, where this module can be imported, and its callers refuse

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
