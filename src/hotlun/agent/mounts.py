"""Devices at paths: mounted, or as a symbolic link, and taken away again.

Whatever fails, a path is left as it was found: a mount is undone before its
directory is touched, directories go by rmdir(2) and only those that were made here,
so that what is not empty cannot be removed, and is not.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from typing import TYPE_CHECKING

from hotlun.agent import holders, mountinfo, options, syscalls
from hotlun.agent.errors import RequestError, words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotlun.agent.kernel import Kernel
    from hotlun.agent.mountinfo import Mount
    from hotlun.agent.scsi import BlockDevice

_HINTS = {
    errno.ENODEV: "this guest's kernel has no such filesystem",
    errno.EINVAL: "not such a filesystem, a damaged one, or an option that it does not know",
    errno.EACCES: "the device is read-only, and the mount was to be writable",
    errno.EROFS: "the device is read-only, and the filesystem wants to write to it",
    errno.EBUSY: "in use otherwise, or mounted elsewhere read-only and here not, or the reverse",
}

_log = logging.getLogger("hotlun.agent")


class Mounts:
    """The paths that devices are at. Safe for many threads.

    It remembers which directories it made, for no other reason than to remove no
    others; an agent started anew leaves those of its predecessor, which are empty.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._lock = threading.Lock()
        self._claimed: set[str] = set()
        self._made: set[str] = set()

    @contextlib.contextmanager
    def claim(self, path: str) -> Iterator[str]:
        """Have the path for one request alone; gives it with its directories' links resolved.

        Raises:
            RequestError: another request is busy with it.
        """
        parent, name = os.path.split(path)
        path = os.path.join(os.path.realpath(parent), name)
        with self._lock:
            if path in self._claimed:
                raise RequestError(f"{path} is being worked on by another request")
            self._claimed.add(path)
        try:
            yield path
        finally:
            with self._lock:
                self._claimed.remove(path)

    def check_free(self, path: str, *, link: bool = False) -> None:
        """Refuse a path that nothing can be mounted at.

        Args:
            link: whether a symbolic link is to be made there, which needs it to be empty.

        Raises:
            RequestError: something is mounted there, or it is no directory.
        """
        taken = mountinfo.mounts_at(mountinfo.read(self._kernel, self._self), path)
        if taken:
            raise RequestError(f"{path} is in use: {taken[-1].source} is mounted there")
        if os.path.lexists(path) and (link or os.path.islink(path) or not os.path.isdir(path)):
            raise RequestError(
                f"{path} exists already" if link else f"{path} exists already and is no directory"
            )

    def mount(
        self,
        device: BlockDevice,
        path: str,
        filesystem: str,
        requested: tuple[str, ...],
        *,
        read_only: bool,
    ) -> None:
        """Mount the device at a claimed path.

        Args:
            filesystem: its type.
            requested: the mount options.
            read_only: as for `options.parse`.

        Raises:
            RequestError: it was not mounted; nothing is left of it.
        """
        parsed = options.parse(requested, filesystem, read_only=read_only)
        made = self._make_directories(path)
        try:
            self._mount(device, path, filesystem, parsed, hard_read_only=read_only)
            try:
                for propagation in parsed.propagations:
                    syscalls.mount("", path, "", propagation)
            except OSError:
                _undo(path)
                raise
        except OSError as error:
            self._remove_directories(made)
            hint = _HINTS.get(error.errno or 0)
            raise RequestError(
                f"{device} cannot be mounted at {path} as {filesystem}: {words(error)}"
                + (f" ({hint})" if hint else "")
            ) from error

    def unmount(self, device: BlockDevice | None, path: str) -> None:
        """Unmount whatever of the device is mounted at a claimed path, however often.

        What else is mounted there stays. If that is all, there is nothing to undo.

        Args:
            device: None if the disk is gone; then dead mounts are unmounted.

        Raises:
            RequestError: the mount is busy, or out of sight below another device's.
        """
        while True:
            text = mountinfo.read(self._kernel, self._self)
            stack = mountinfo.mounts_at(text, path)
            if not any(self._is_of(mount, device) for mount in stack):
                break
            top = stack[-1]
            if not self._is_of(top, device):
                raise RequestError(
                    f"{top.source} is mounted at {path}, on top of "
                    f"{device or 'the disk asked for'}; it was left alone"
                )
            try:
                syscalls.unmount(path)
            except OSError as error:
                by = holders.keeping_busy(self._kernel, top, text)
                raise RequestError(
                    f"{device or top.source} cannot be unmounted from {path}: {words(error)}"
                    + (f": {'; '.join(by)}" if by and error.errno == errno.EBUSY else "")
                ) from error
        if path in self._made and not stack:
            self._remove_directories([path])

    def link(self, device: BlockDevice, path: str) -> None:
        """Make a claimed path a symbolic link to the device's node.

        Raises:
            RequestError: there is something, or the link cannot be made.
        """
        made = self._make_directories(os.path.dirname(path))
        try:
            os.symlink(device.node, path)
        except OSError as error:
            self._remove_directories(made)
            raise RequestError(
                f"{device}: {path} cannot become a link to {device.node}: {words(error)}"
            ) from error

    def unlink(self, device: BlockDevice | None, path: str) -> None:
        """Remove the link at a claimed path, if it is one to the device, or to none.

        What else is there is none of ours, and stays.
        """
        try:
            target = os.readlink(path)
        except OSError:  # nothing there, or no link
            return
        dead = os.path.dirname(target) == self._kernel.dev and not os.path.exists(target)
        if dead or (device is not None and target == device.node):
            os.unlink(path)
        else:
            _log.info("%s stays: it is a link to %s", path, target)

    @property
    def _self(self) -> str:
        return os.path.join(self._kernel.proc, "self")

    def _is_of(self, mount: Mount, device: BlockDevice | None) -> bool:
        if device is not None:
            return mount.is_of(device.number, device.node)
        if mount.number.startswith("0:"):  # btrfs, or no disk's at all
            return os.path.dirname(mount.source) == self._kernel.dev and not os.path.exists(
                mount.source
            )
        return not os.path.exists(os.path.join(self._kernel.sys, "dev/block", mount.number))

    def _mount(
        self,
        device: BlockDevice,
        path: str,
        filesystem: str,
        parsed: options.MountOptions,
        *,
        hard_read_only: bool,
    ) -> None:
        """mount(2), also read-only beside a writable mount of the same filesystem.

        All mounts of a filesystem share whether it is writable; one that is not to
        be, beside one that is, has that as a property of the mount alone, which can
        only be set afterwards. What else belongs to the filesystem (`sync`, data) is
        as its first mount has it; the kernel passes over what the second says.
        """
        try:
            syscalls.mount(device.node, path, filesystem, parsed.flags, parsed.data)
        except OSError as error:
            mount_only = parsed.flags & options.MS_RDONLY and not hard_read_only
            if error.errno != errno.EBUSY or not mount_only:
                raise
            syscalls.mount(
                device.node, path, filesystem, parsed.flags & ~options.MS_RDONLY, parsed.data
            )
            try:
                own = parsed.flags & options.PER_MOUNT
                syscalls.mount("", path, "", options.MS_REMOUNT | options.MS_BIND | own)
            except OSError:
                _undo(path)
                raise

    def _make_directories(self, path: str) -> list[str]:
        """mkdir -p; gives what it made, outermost first."""
        missing = []
        made: list[str] = []
        with self._lock:
            while path != "/" and not os.path.lexists(path):
                missing.append(path)
                path = os.path.dirname(path)
            for directory in reversed(missing):
                try:
                    os.mkdir(directory, 0o700)
                except OSError as error:
                    self._remove_directories_locked(made)
                    raise RequestError(
                        f"the directory {directory} cannot be made: {words(error)}"
                    ) from error
                made.append(directory)
                self._made.add(directory)
        return made

    def _remove_directories(self, directories: list[str]) -> None:
        with self._lock:
            self._remove_directories_locked(directories)

    def _remove_directories_locked(self, directories: list[str]) -> None:
        """Remove, innermost first, those that are empty."""
        for directory in reversed(directories):
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                pass
            except OSError as error:
                _log.info("the directory %s stays: %s", directory, words(error))
                return
            self._made.discard(directory)


def _undo(path: str) -> None:
    """Unmount what was mounted a moment ago; detached, if something is busy there already."""
    try:
        syscalls.unmount(path)
    except OSError:
        syscalls.unmount(path, syscalls.MNT_DETACH)
