"""The way to a folder that the host speaks of, through the links that are on it.

/var/run is a link in every guest, so links are followed; but only those that root alone
can have made. Whoever owns a folder on the way could otherwise have root mount on any
directory there is, as with the links that fs.protected_symlinks is about (proc_sys_fs(5)).
"""

from __future__ import annotations

import errno
import os
import stat

from hotlun.agent import syscalls
from hotlun.agent.errors import RequestError, words
from hotlun.agent.kernel import check_absent

FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""To open a folder that must not be a link."""

ABSENT = (errno.ENOENT, errno.ENAMETOOLONG)

_FOLLOWING = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_LINK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_LINKS_MAX = 40
"""As many as the kernel follows (MAXSYMLINKS)."""

_DELETED = " (deleted)"
"""The kernel's remark behind the path of what was removed."""


def reach(folder: str, *missing: str) -> tuple[int, str, tuple[str, ...]]:
    """The last folder of a path that exists, and where it is; then what is behind it.

    Raises:
        RequestError: one is there and cannot be entered, or is behind a link that is not
            followed.
    """
    while True:
        try:
            found, where = _open(folder)
        except OSError as error:
            if error.errno not in (*ABSENT, errno.ENOTDIR):
                check_absent(error)
                raise RequestError(f"{folder} cannot be entered: {words(error)}") from error
        else:
            if not where.endswith(_DELETED) or os.path.exists(where):
                return found, where, missing
            os.close(found)
        folder, _, part = folder.rpartition("/")
        folder = folder or "/"
        missing = (part, *missing)


def _open(folder: str) -> tuple[int, str]:
    """A folder, and where it is. Mostly that is its path: then it is behind no link."""
    straight = syscalls.open_straight(folder)
    if straight is not None:
        return straight, folder
    found = os.open(folder, _FOLLOWING)
    where = _where(found, folder)
    if where == folder:
        return found, where
    os.close(found)
    found = _follow(folder)
    return found, _where(found, folder)


def _where(found: int, folder: str) -> str:
    try:
        return os.readlink(syscalls.path_of(found))
    except OSError as error:  # a path longer than a page, for one
        os.close(found)
        raise RequestError(f"where {folder} leads is not known: {words(error)}") from error


def _follow(path: str) -> int:
    """A folder, by a way on which each link is looked at before it is followed.

    Raises:
        OSError: as of open(2).
        RequestError: others than root can have made one.
    """
    todo = path.split("/")[::-1]
    folder, links, is_roots = os.open("/", FOLDER), 0, True
    try:
        above = os.fstat(folder)
        while todo:
            part = todo.pop()
            if part in ("", "."):
                continue
            entry, status, target = _enter(folder, part)
            is_roots = is_roots and _is_roots(above, status)
            if not target:
                os.close(folder)
                folder, above = entry, status
                continue
            os.close(entry)
            if not is_roots:
                link = os.path.join(os.readlink(syscalls.path_of(folder)), part)
                raise RequestError(
                    f"{path} leads through {link}, a symbolic link to {target} that others than "
                    "root can change: it is not followed"
                )
            links += 1
            if links > _LINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            todo += target.split("/")[::-1]
            if target.startswith("/"):
                entry, above, _ = _enter(folder, "/")
                os.close(folder)
                folder = entry
    except BaseException:
        os.close(folder)
        raise
    return folder


def _enter(folder: int, part: str) -> tuple[int, os.stat_result, str]:
    """What is next on the way, by a descriptor; of a link, where it leads."""
    try:
        entry = os.open(part, FOLDER, dir_fd=folder)
    except NotADirectoryError:
        entry = os.open(part, _LINK, dir_fd=folder)
    try:
        status = os.fstat(entry)
        if stat.S_ISDIR(status.st_mode):
            return entry, status, ""
        return entry, status, os.readlink("", dir_fd=entry)  # fails on what is no link
    except BaseException:
        os.close(entry)
        raise


def _is_roots(folder: os.stat_result, entry: os.stat_result) -> bool:
    """Whether nobody but root can have put an entry into its folder, or can replace it there."""
    if folder.st_uid:
        return False
    is_shared = folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return not is_shared or bool(folder.st_mode & stat.S_ISVTX and not entry.st_uid)
