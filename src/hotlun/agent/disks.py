"""What the host can ask for about a disk: mount it, unmount it, let it go.

Each either happens or leaves things as they were. Undoing what is not there is
success: the host undoes whatever it does not know to have happened. So is mounting
what is mounted just so; a path where something else is mounted is refused.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

from hotlun.agent import filesystems
from hotlun.agent.uevents import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.agent.kernel import Kernel
    from hotlun.agent.mounts import Mounts
    from hotlun.agent.scsi import ScsiDisks
    from hotlun.agent.settings import DiskSettings, Slot

DEVICE_TIMEOUT = 10.0
"""Seconds that a device may take to appear, or to go."""

BUSY_TIMEOUT = 2.0
"""Seconds that a busy mount may take to become free."""

_log = logging.getLogger("hotlun.agent")


class Disks:
    """The three verbs. Safe for many threads, as long as one disk has one at a time.

    Args:
        timeout: seconds to wait for a device if the request does not say.
    """

    def __init__(
        self, kernel: Kernel, scsi: ScsiDisks, mounts: Mounts, timeout: float = DEVICE_TIMEOUT
    ) -> None:
        self._kernel = kernel
        self._scsi = scsi
        self._mounts = mounts
        self._timeout = timeout

    def mount(self, settings: DiskSettings, wanted: Callable[[], bool]) -> None:
        """Wait for the device and put it at its path, if it has one.

        Args:
            wanted: whether somebody still waits for the answer.

        Raises:
            RequestError: it is not there, and nothing is left of it.
        """
        timeout = self._timeout if settings.timeout is None else settings.timeout
        deadline = Deadline(timeout, wanted)
        if not settings.path:
            self._scsi.wait_for(settings.slot, settings.partition, deadline)
            return
        with self._mounts.claim(settings.path) as place:
            device = self._scsi.wait_for(settings.slot, settings.partition, deadline)
            digest = hashlib.sha256(repr(settings._replace(timeout=None)).encode()).digest()
            if not settings.block_device and self._mounts.mounted_as(
                device, place, settings.options, read_only=settings.read_only, digest=digest
            ):
                return
            self._mounts.check_free(place, link=settings.block_device)
            if settings.block_device:
                self._mounts.link(device, place)
                _log.debug("%s: %s is a link to it", device, place)
                return
            if settings.filesystem:
                filesystems.check_type(self._kernel, device, settings.filesystem)
            if settings.ensure_filesystem:
                filesystems.ensure(
                    self._kernel, device, settings.filesystem, read_only=settings.read_only
                )
            filesystem = settings.filesystem or filesystems.detect_mountable(device)
            self._mounts.mount(
                device,
                place,
                filesystem,
                settings.options,
                read_only=settings.read_only,
                digest=digest,
            )
            _log.debug("%s is mounted at %s as %s", device, place, filesystem)

    def unmount(self, settings: DiskSettings) -> None:
        """Undo `mount`; nothing there is success, and so is a disk that is gone.

        Raises:
            RequestError: it is still there.
        """
        if not settings.path:
            return
        with self._mounts.claim(settings.path) as place:
            device = self._scsi.find(settings.slot, settings.partition)
            devices = [device] if device else []
            if settings.block_device:
                self._mounts.unlink(devices, place)
            else:
                self._mounts.unmount(devices, place, deadline=Deadline(BUSY_TIMEOUT))
            _log.debug("disk %s is not at %s any more", settings.slot, place)

    def unplug(self, slot: Slot) -> None:
        """Have the kernel let the disk go; one that is not there is success.

        Raises:
            RequestError: it is in use, or did not go.
        """
        self._scsi.unplug(slot, Deadline(self._timeout))
        _log.debug("disk %s is unplugged", slot)
