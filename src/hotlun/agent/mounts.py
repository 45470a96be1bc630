"""Devices at paths: mounted, or as a symbolic link, and taken away again.

Whatever fails, a path is left as it was found: a mount is undone before its
directory is touched. Nothing is remembered here; what was asked for is noted as a
label on the directory that is mounted on, so that whichever agent is asked for the
same again knows that it is done.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from typing import TYPE_CHECKING

from hotlun.agent import holders, mountinfo, mounting, options, syscalls
from hotlun.agent.errors import RequestError, words
from hotlun.agent.kernel import check_absent
from hotlun.agent.mounting import MountingError
from hotlun.agent.places import Place, Places
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotlun.agent.block_devices import BlockDevice
    from hotlun.agent.kernel import Kernel
    from hotlun.agent.mountinfo import Mount
    from hotlun.agent.uevents import Deadline

_PAUSES = (0.001, 0.05)
"""Seconds between two tries to unmount what is busy, the first and the longest:
nothing announces that the last file is closed."""

_log = logging.getLogger("hotlun.agent")


class Mounts:
    """The paths that devices are at. Safe for many threads."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._places = Places(kernel)

    def claim(self, path: str) -> Place:
        """The path for one request alone, until the end of its `with`.

        Raises:
            RequestError: another request is busy with it.
        """
        return self._places.claim(path)

    def look_at(self, path: str) -> Place:
        """The path for whoever only looks, also while a request is busy with it; to be closed.

        Raises:
            RequestError: as `claim`.
        """
        return Place(self._places, path)

    def shows(self, device: BlockDevice, place: Place, mountinfo_text: Callable[[], str]) -> bool:
        """Whether what is in sight there is the device, mounted.

        Args:
            mountinfo_text: what is mounted; called if the kernel does not tell at the path.
        """
        seen = place.look()
        if seen is None or not seen.mount:
            return False
        if seen.device and not seen.device.startswith("0:"):
            return seen.device == device.number
        stack = mountinfo.stack(mountinfo_text(), seen.mount)
        return bool(stack) and stack[0].is_of(device.number, device.node)

    def text(self) -> str:
        """All that is mounted, as the kernel tells it."""
        return mountinfo.read(self._kernel, os.path.join(self._kernel.proc, "self"))

    def mounted_as(
        self,
        device: BlockDevice,
        place: Place,
        requested: tuple[str, ...],
        *,
        read_only: bool,
        digest: bytes,
    ) -> bool:
        """Whether the device is mounted there already, and just so.

        What an earlier agent may not have come to is done then: the flags of the
        mount itself, and how it is propagated.

        Args:
            requested: the mount options.
            read_only: as for `options.parse`.
            digest: as for `mount`.

        Raises:
            RequestError: something else is mounted there, or the device otherwise.
        """
        stack = place.stack()
        if not stack:
            return False
        if not stack[0].is_of(device.number, device.node):
            raise RequestError(_in_use(place, stack))
        if place.label() != digest:
            raise RequestError(f"{_in_use(place, stack)}, not as asked for or not by an agent")
        asked = options.parse(requested, read_only=read_only)
        mounted = place.open()
        if mounted is None:
            return False
        try:
            mounting.adjust(mounted, asked)
            mounting.propagate(mounted, asked)
        except MountingError as error:
            raise RequestError(
                f"{device} is mounted at {place}, but not as asked for, and that cannot be "
                f"set: {error}"
            ) from error
        finally:
            os.close(mounted)
        return True

    def check_free(self, place: Place, *, link: bool = False) -> None:
        """Refuse a path that nothing can be mounted at.

        Args:
            link: whether it is to be a symbolic link; one that is there passes, as
                `link` will say.

        Raises:
            RequestError: something is mounted there, or it is no directory.
        """
        seen = place.look()
        if seen is None or (link and place.link_target() is not None):
            return
        if not seen.is_directory:
            raise RequestError(f"{place} exists already" + ("" if link else " and is no directory"))
        if seen.mount:
            raise RequestError(_in_use(place, place.stack()))
        if link:
            raise RequestError(f"{place} exists already")

    def mount(
        self,
        device: BlockDevice,
        place: Place,
        filesystem: str,
        requested: tuple[str, ...],
        *,
        read_only: bool,
        digest: bytes,
    ) -> None:
        """Mount the device at a free path.

        Args:
            filesystem: its type.
            requested: the mount options.
            read_only: as for `options.parse`.
            digest: what stands for all that was asked, for `mounted_as`.

        Raises:
            RequestError: it was not mounted; nothing is left of it.
        """
        asked = options.parse(requested, filesystem, read_only=read_only)
        directory = place.make_directory()
        try:
            place.set_label(directory, digest)
            mounted = mounting.mount(device.node, filesystem, asked, directory, read_only=read_only)
            try:
                mounting.propagate(mounted, asked)
                _check_reached(place)
            except (MountingError, RequestError):
                mounting.undo(mounted)
                raise
            os.close(mounted)
        except MountingError as error:
            place.clear()
            raise RequestError(
                f"{device} cannot be mounted at {place} as {filesystem}: {error}"
            ) from error
        except RequestError:
            place.clear()
            raise
        finally:
            os.close(directory)

    def unmount(
        self,
        devices: Sequence[BlockDevice],
        place: Place,
        *,
        lazy: bool = False,
        deadline: Deadline,
    ) -> bool:
        """Unmount whatever of the devices is mounted at a path, however often; whether any was.

        So is what is dead: its disk may have been in this slot, which has another one now.
        What else is mounted there stays. If that is all, there is nothing to undo
        but empty directories that an agent made.

        Args:
            devices: the disk, and what is mapped to it; none if it is gone.
            lazy: have a busy one out of sight at once, to end when it can, unless
                something else is mounted on it.
            deadline: how long a busy one may take to become free.

        Raises:
            RequestError: the mount is busy, or out of sight below another device's.
        """
        was_mounted = False
        while True:
            seen = place.look()
            if seen is None or not seen.mount:
                break
            is_theirs = seen.device in [device.number for device in devices]
            if not is_theirs:
                stack = place.stack()
                if not any(_is_of(mount, devices) or self._is_dead(mount) for mount in stack):
                    return was_mounted
                is_theirs = _is_of(stack[0], devices)
                if not is_theirs and not self._is_dead(stack[0]):
                    whose = devices[0] if devices else "the disk asked for"
                    raise RequestError(
                        f"{stack[0].source} is mounted at {place}, on top of {whose}; "
                        "it was left alone"
                    )
            self._unmount(place, devices, lazy, deadline)
            was_mounted = was_mounted or is_theirs
        place.clear(seen)
        return was_mounted

    def link(self, device: BlockDevice, place: Place) -> None:
        """Make the path a symbolic link to the device's node, if it is not.

        Raises:
            RequestError: there is something, or the link cannot be made.
        """
        target = place.link_target()
        if target == device.node:
            return
        if target is not None:
            raise RequestError(f"{place} exists already: it is a link to {target}")
        place.make_link(device.node)
        try:
            _check_reached(place)
        except RequestError:
            place.unlink()
            place.clear()
            raise

    def unlink(self, devices: Sequence[BlockDevice], place: Place) -> bool:
        """Remove the link at a path, if it is one to one of the devices, or to none.

        What else is there is none of ours, and stays. Gives whether there was one.
        """
        target = place.link_target()
        if target is not None:
            dead = os.path.dirname(target) == self._kernel.dev and not os.path.exists(target)
            if not dead and target not in [device.node for device in devices]:
                _log.info("%s stays: it is a link to %s", place, target)
                return False
            place.unlink()
        place.clear()
        return target is not None

    def _is_dead(self, mount: Mount) -> bool:
        """Whether its disk is gone. The kernel gives nobody the number while it is mounted."""
        if mount.number.startswith("0:"):  # btrfs, or no disk's at all
            return os.path.dirname(mount.source) == self._kernel.dev and _is_absent(mount.source)
        return _is_absent(os.path.join(self._kernel.sys, "dev/block", mount.number))

    def _unmount(
        self, place: Place, devices: Sequence[BlockDevice], lazy: bool, deadline: Deadline
    ) -> None:
        """Unmount what is in sight at the place."""
        pause, longest = _PAUSES
        while True:
            try:
                syscalls.unmount(place.target)
                return
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise _not_unmounted(place, devices, words(error)) from error
            left = deadline.remaining()
            if not left or lazy:
                text = self.text()
                stack = place.stack()
                if lazy and stack and not mountinfo.mounted_on(text, stack[0]):
                    syscalls.unmount(place.target, syscalls.MNT_DETACH)
                    return
                if not left:
                    by = holders.keeping_busy(self._kernel, stack[0], text) if stack else []
                    reason = os.strerror(errno.EBUSY) + (f": {'; '.join(by)}" if by else "")
                    raise _not_unmounted(place, devices, reason, HResult.INVALID_STATE)
            time.sleep(min(pause, left))
            pause = min(2 * pause, longest)


def _is_of(mount: Mount, devices: Sequence[BlockDevice]) -> bool:
    return any(mount.is_of(device.number, device.node) for device in devices)


def _is_absent(path: str) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        check_absent(error)
        return True
    return False


def _in_use(place: Place, stack: list[Mount]) -> str:
    source = stack[0].source if stack else "something"
    return f"{place} is in use: {source} is mounted there"


def _not_unmounted(
    place: Place, devices: Sequence[BlockDevice], reason: str, code: HResult = HResult.FAIL
) -> RequestError:
    what = devices[0] if devices else "what is left of its disk"
    return RequestError(f"{what} cannot be unmounted from {place}: {reason}", code)


def _check_reached(place: Place) -> None:
    """Refuse to have worked in a folder that is not at its path any more, whoever did that."""
    try:
        is_reached = place.is_reached()
    except OSError as error:
        raise RequestError(f"where {place} is now is not known: {words(error)}") from error
    if not is_reached:
        raise RequestError(f"a folder above {place} was moved away or mounted on meanwhile")
