"""The paths that the host speaks of, and the directories on the way there.

A folder above such a path may belong to somebody who wants root to work elsewhere,
and who swaps it for a symbolic link between two of our steps. So links are resolved
once, when a path is claimed; after that the way is walked without following any,
and everything is done by the descriptor of the folder that was reached.

What the agent makes has the mode 01700, from the same system call that makes it. So
every later agent knows what it may remove, by rmdir(2), which cannot remove more.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from typing import TYPE_CHECKING, TypeVar

from hotlun.agent import mountinfo, syscalls, ways
from hotlun.agent.errors import RequestError, words
from hotlun.agent.kernel import check_absent
from hotlun.agent.syscalls import Seen
from hotlun.agent.ways import ABSENT, FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.agent.kernel import Kernel
    from hotlun.agent.mountinfo import Mount

_T = TypeVar("_T")

_OURS = 0o1700
_LINKS_OF_EMPTY = 2
"""Of a directory: its name and its `.`; each that is in it has a `..`, which is one more."""
_LABEL = "trusted.hotlun"
"""Of a directory that is mounted on: as what. Only root can read and write those."""

_TRIES = 10
"""To make a directory in one that somebody else removes each time."""

_log = logging.getLogger("hotlun.agent")


class Places:
    """Gives the paths out, each for one request at a time. Safe for many threads."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.claimed: set[str] = set()
        self._made: set[str] = set()
        """Of those, the ones that directories are made for, and are not to be removed under."""
        self._removed: list[str] = []
        """The directories that are just being removed."""
        self._lock = threading.Lock()
        """Held to look at these, never for a call that a hung filesystem can keep."""
        self._are_removed = threading.Condition(self._lock)

    def claim(self, path: str) -> Place:
        """The path for one request alone, from now until the end of its `with`.

        Raises:
            RequestError: another request is busy with it, or a folder cannot be entered, or
                is behind a link that is not followed.
        """
        place = Place(self, path)
        with self._lock:
            is_free = place.path not in self.claimed
            self.claimed.add(place.path)
        if not is_free:
            place.close()
            raise RequestError(f"{place} is being worked on by another request")
        return place

    def release(self, place: Place) -> None:
        """Let others have the path."""
        place.close()
        with self._lock:
            self.claimed.remove(place.path)
            self._made.discard(place.path)

    def keep(self, path: str) -> None:
        """Have nobody remove the path or what is above it, from now on.

        Returns once nobody does any more. What waits for a filesystem that hangs is what
        was to be made on it.
        """
        with self._lock:
            self._made.add(path)
            while self._removed and any(_leads_to(removed, path) for removed in self._removed):
                self._are_removed.wait()

    def give_up(self, path: str) -> None:
        """Have `keep` end."""
        with self._lock:
            self._made.discard(path)

    def begin_removing(self, directory: str) -> bool:
        """Whether a directory may be removed: nothing is made below it until `end_removing`."""
        with self._lock:
            is_free = not any(_leads_to(directory, path) for path in self._made)
            if is_free:
                self._removed.append(directory)
        return is_free

    def end_removing(self, directory: str) -> None:
        """Have `keep` wait for that no longer."""
        with self._lock:
            self._removed.remove(directory)
            self._are_removed.notify_all()


class Place:
    """A path that is ours for a while, and as much of the way there as exists.

    Attributes:
        path: with the links resolved that were there when it was claimed.
    """

    def __init__(self, places: Places, path: str) -> None:
        self._places = places
        folder, _, name = path.rpartition("/")
        self._folder, folder, missing = ways.reach(folder or "/", name)
        """The last of the folders that exists, by a descriptor."""
        self.path = os.path.join(folder, *missing)
        *self._folders, self._name = self._parts = self.path.split("/")[1:]
        self._depth = len(self._parts) - len(missing)
        """How many parts of the path lead to it."""

    def __enter__(self) -> Place:  # noqa: PYI034 - `Self` came with Python 3.11
        return self

    def __exit__(self, *error: object) -> None:
        self._places.release(self)

    def __str__(self) -> str:
        return self.path

    @property
    def parent(self) -> int | None:
        """The folder that it is in, by a descriptor that stays ours; None if there is none."""
        if self._folder < 0:
            self._walk()
        return self._folder if self._depth == len(self._folders) else None

    def close(self) -> None:
        """Let go of the folder; what is done next starts from the root again."""
        if self._folder >= 0:
            os.close(self._folder)
        self._folder, self._depth = -1, 0

    @property
    def target(self) -> str:
        """The path for system calls that take no descriptors, once there is a `parent`."""
        return f"{syscalls.path_of(self._folder)}/{self._name}"

    def open(self) -> int | None:
        """The directory there, or what is mounted on it, by a descriptor; None if there is none.

        Raises:
            NotADirectoryError: something else is there.
        """
        parent = self.parent
        if parent is None:
            return None
        try:
            return os.open(self._name, FOLDER, dir_fd=parent)
        except OSError as error:
            if error.errno in ABSENT:
                return None
            raise

    def look(self) -> Seen | None:
        """What there is; None if there is nothing."""
        parent = self.parent
        if parent is None:
            return None
        try:
            seen = syscalls.look(parent, self._name)
            if seen is not None:
                return seen
            top = self.open()
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            return Seen(False, "", "")
        if top is None:
            return None
        kernel = self._places.kernel
        try:
            mount = mountinfo.mount_of(kernel, top)
        finally:
            os.close(top)
        return Seen(True, "" if mount == mountinfo.mount_of(kernel, parent) else mount, "")

    def stack(self) -> list[Mount]:
        """What is mounted there, in sight first."""
        seen = self.look()
        if seen is None or not seen.mount:
            return []
        kernel = self._places.kernel
        text = mountinfo.read(kernel, os.path.join(kernel.proc, "self"))
        return mountinfo.stack(text, seen.mount)

    def is_reached(self) -> bool:
        """Whether the path still leads to where things were done.

        A folder that was mounted on has its path as before, so it is gone to again.
        """
        folder = os.path.dirname(self.path)
        if self.parent is None or os.readlink(syscalls.path_of(self._folder)) != folder:
            return False
        found = syscalls.identity(self._folder, folder)
        if found is not None:
            return found == syscalls.identity(self._folder)
        try:
            opened = os.open(folder, FOLDER)
        except OSError as error:
            check_absent(error)
            return False
        try:
            return self._identity(opened) == self._identity(self._folder)
        finally:
            os.close(opened)

    def make_directory(self) -> int:
        """The directory there, by a descriptor; it and those above are made if need be.

        Raises:
            RequestError: one cannot be made, and those that were are removed.
        """

        def make() -> int:
            self._make_folder(self._name)
            return os.open(self._name, FOLDER, dir_fd=self._folder)

        return self._make(make)

    def make_link(self, target: str) -> None:
        """Make it a symbolic link, and the directories above if need be.

        Raises:
            RequestError: it cannot be made, and the directories that were are removed.
        """
        self._make(lambda: os.symlink(target, self._name, dir_fd=self._folder))

    def link_target(self) -> str | None:
        """Where the symbolic link there leads; None if there is none."""
        parent = self.parent
        if parent is None:
            return None
        try:
            return os.readlink(self._name, dir_fd=parent)
        except OSError as error:
            if error.errno in (*ABSENT, errno.EINVAL):
                return None
            raise

    def unlink(self) -> None:
        """Remove what is there and no directory."""
        os.unlink(self._name, dir_fd=self._folder)

    def set_label(self, directory: int, label: bytes) -> None:
        """Note on the directory what is to be mounted on it, where that can be noted."""
        try:
            os.setxattr(syscalls.path_of(directory), _LABEL, label)
        except OSError as error:
            _log.info("%s cannot be labelled: %s", self.path, words(error))

    def label(self) -> bytes:
        """What the directory was labelled that something is mounted on; empty if it is not."""
        parent = self.parent
        if parent is None:
            return b""
        try:
            below = syscalls.uncovered(parent)
            try:
                path = f"{syscalls.path_of(below)}/{self._name}"
                return os.getxattr(path, _LABEL, follow_symlinks=False)
            finally:
                os.close(below)
        except OSError as error:
            check_absent(error)
            return b""

    def clear(self, seen: Seen | None = None) -> None:
        """Have the place as it was: no label, and none of the agent's directories that is empty.

        Args:
            seen: what was seen there just now.
        """
        self._places.give_up(self.path)
        if self._folder < 0:
            self._walk()
        while self._remove(seen) and self._depth and self._may_go():
            self._leave()

    def _identity(self, folder: int) -> tuple[int | str, ...]:
        """As that of `syscalls`, which does not tell."""
        status = os.fstat(folder)
        return status.st_dev, status.st_ino, mountinfo.mount_of(self._places.kernel, folder)

    def _walk(self) -> None:
        """Go as far as there are folders."""
        self.close()
        self._folder = os.open("/", FOLDER)
        try:
            for part in self._folders:
                self._enter(part)
        except OSError as error:
            if error.errno in (*ABSENT, errno.ENOTDIR):
                return
            check_absent(error)
            raise RequestError(f"{self._here} cannot be entered: {words(error)}") from error

    def _enter(self, part: str) -> None:
        folder = os.open(part, FOLDER, dir_fd=self._folder)
        os.close(self._folder)
        self._folder = folder
        self._depth += 1

    def _leave(self) -> None:
        depth = self._depth
        self._enter("..")
        self._depth = depth - 1

    def _make(self, last: Callable[[], _T]) -> _T:
        """Make the folders that are missing, then what is to be in the last of them."""
        self._places.keep(self.path)
        for _ in range(_TRIES):
            try:
                if self._folder < 0:
                    self._walk()
                for part in self._folders[self._depth :]:
                    self._make_folder(part)
                    self._enter(part)
                return last()
            except FileNotFoundError as error:  # a folder was removed, after another unmount
                failed = f"{self._here} cannot be made: {words(error)}"
                self.close()
            except NotADirectoryError:
                failed = f"{self._here} exists already and is no directory"
                break
            except OSError as error:
                failed = f"{self._here} cannot be made: {words(error)}"
                break
        self.clear()
        raise RequestError(failed)

    def _make_folder(self, name: str) -> None:
        try:  # noqa: SIM105 - suppress() costs an emulated guest as much again
            os.mkdir(name, _OURS, dir_fd=self._folder)
        except FileExistsError:
            pass

    def _may_go(self) -> bool:
        """Whether the folder that was reached may have to be removed now.

        One that has others in it need not be tried; a filesystem that does not count them
        says that there are none.
        """
        try:
            status = os.fstat(self._folder)
        except OSError as error:
            _log.debug("what leads to %s stays as it is: %s", self.path, words(error))
            return False
        return _is_ours(status.st_mode, status.st_uid) and status.st_nlink <= _LINKS_OF_EMPTY

    def _remove(self, seen: Seen | None) -> bool:
        """Whether what the path has next is not there, or not any more.

        Args:
            seen: at the end of the path.
        """
        name, is_all = self._parts[self._depth], self._depth == len(self._folders)
        try:
            if is_all and seen is not None and seen.mode:
                mode, owner = seen.mode, seen.owner
            else:
                status = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
                mode, owner = status.st_mode, status.st_uid
            if _is_ours(mode, owner):
                return self._remove_folder(name)
            if is_all and stat.S_ISDIR(mode):
                os.removexattr(self.target, _LABEL, follow_symlinks=False)
        except OSError as error:
            if error.errno in ABSENT:
                return True
            _log.debug("%s stays as it is: %s", self._here, words(error))
        return False

    def _remove_folder(self, name: str) -> bool:
        path = self._here
        if not self._places.begin_removing(path):
            return False
        try:
            os.rmdir(name, dir_fd=self._folder)
        finally:
            self._places.end_removing(path)
        return True

    @property
    def _here(self) -> str:
        """The first part of the path behind the folder that was reached."""
        return "/" + "/".join(self._parts[: self._depth + 1])


def _leads_to(directory: str, path: str) -> bool:
    return path == directory or path.startswith(f"{directory}/")


def _is_ours(mode: int, owner: int) -> bool:
    """Whether the agent made this directory; below some folders it got their group, too."""
    return mode & ~stat.S_ISGID == stat.S_IFDIR | _OURS and owner == 0
