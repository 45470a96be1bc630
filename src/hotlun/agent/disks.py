"""What the host can ask for about a disk: mount it, unmount it, let it go; and what there is.

Each either happens or leaves things as they were, and each can be asked for again: what
is as asked is success, and what an agent before this one has left half done, killed
between two of its steps, is found in the kernel and finished or undone. Nothing is
remembered here.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hotlun.agent import encryption, filesystems, luks, unwritten, verity
from hotlun.agent.errors import RequestError
from hotlun.agent.mappings import Layers
from hotlun.agent.survey import Survey
from hotlun.agent.uevents import Deadline
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.agent.block_devices import BlockDevice
    from hotlun.agent.kernel import Kernel
    from hotlun.agent.mappings import Mappings
    from hotlun.agent.mounts import Mounts
    from hotlun.agent.places import Place
    from hotlun.agent.queries import DiskQuery, Found
    from hotlun.agent.scsi import ScsiDisks
    from hotlun.agent.settings import DiskSettings, Slot

DEVICE_TIMEOUT = 10.0
"""Seconds that a device may take to appear, or to go."""

BUSY_TIMEOUT = 2.0
"""Seconds that what is in use may take to become free."""

_log = logging.getLogger("hotlun.agent")


class Disks:
    """The three verbs. Safe for many threads, as long as one disk has one at a time.

    A survey is none of them: it changes nothing, and can be made at any time.

    Args:
        timeout: seconds to wait for a device if the request does not say.
    """

    def __init__(
        self,
        kernel: Kernel,
        scsi: ScsiDisks,
        mappings: Mappings,
        mounts: Mounts,
        timeout: float = DEVICE_TIMEOUT,
    ) -> None:
        self._kernel = kernel
        self._scsi = scsi
        self._mappings = mappings
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
            self._scsi.wait_for(settings.slot, settings.partition, deadline, settings.identity)
            return
        with self._mounts.claim(settings.path) as place:
            link = settings.block_device
            if place.look() is not None:
                if not link and self._is_mounted(settings, place):
                    _log.debug("disk %s is at %s already", settings.slot, place)
                    return
                self._mounts.check_free(place, link=link)
            with self._scsi.hold(
                settings.slot,
                settings.partition,
                deadline,
                settings.identity,
                fresh_table=settings.ensure_filesystem or settings.encrypted,
            ) as device:
                if link and self._is_linked(settings, device, place):
                    return
                self._mappings.orphans.wait_for(device, deadline)
                self._close(settings)  # a predecessor's
                if settings.has_layers:
                    self._put_opened(settings, device, place)
                else:
                    self._put(settings, device, place)
            _log.debug("%s is at %s", device, place)

    def unmount(self, settings: DiskSettings) -> None:
        """Undo `mount`; nothing there is success, and so is a disk that is gone.

        Raises:
            RequestError: it is still there; or, with TIMEOUT, what is mapped to it is, at no path.
        """
        if not settings.path:
            return
        slot, partition = settings.slot, settings.partition
        with self._mounts.claim(settings.path) as place:
            # Whether it was to be encrypted is not asked: hcsshim's host does not say it here.
            seen = place.look()  # mostly it is the disk
            device = self._scsi.find(slot, partition, seen.device if seen else "")
            if device is not None:
                self._mappings.orphans.wait_for(device, Deadline(self._timeout))
            top = self._mappings.top(slot, partition)
            if top is not None:
                self._mappings.orphans.wait_for(top, Deadline(self._timeout))
            devices = [found for found in (top, device) if found is not None]
            if settings.block_device:
                was_there = self._mounts.unlink(devices, place)
            else:
                was_there = self._mounts.unmount(
                    devices, place, lazy=settings.lazy, deadline=Deadline(BUSY_TIMEOUT)
                )
            if was_there or settings.lazy:
                try:
                    self._mappings.close(
                        slot, partition, Deadline(BUSY_TIMEOUT), lazy=settings.lazy
                    )
                except RequestError as error:
                    if not was_there:
                        raise
                    raise RequestError(
                        f"{error}; it is not at {place} any more", HResult.TIMEOUT
                    ) from error
            else:  # of another path, perhaps
                self._mappings.close_unused(slot, Deadline(0), partition)
            _log.debug("disk %s is not at %s any more", slot, place)

    def unplug(self, slot: Slot, timeout: float | None = None) -> None:
        """Have the kernel let the disk go; one that is not there is success.

        Args:
            timeout: seconds to wait for that, in place of the default.

        Raises:
            RequestError: it is in use, or did not go.
        """
        # What a failed or forgotten mount has left; or it is about to go by itself.
        self._mappings.close_unused(slot, Deadline(BUSY_TIMEOUT))
        self._scsi.unplug(slot, Deadline(self._timeout if timeout is None else timeout))
        _log.debug("disk %s is unplugged", slot)

    def survey(self, asked: list[DiskQuery]) -> list[Found]:
        """What there is of these at this moment, whatever a disk is busy with.

        Raises:
            RequestError: the kernel cannot be asked.
        """
        return Survey(self._scsi, self._mappings, self._mounts).answers(asked)

    def _is_mounted(self, settings: DiskSettings, place: Place) -> bool:
        """Whether the same was asked for before, and is done.

        Raises:
            RequestError: something else is there; or what is there is encrypted, and this
                is not its key.
        """
        device = self._scsi.find(settings.slot, settings.partition)
        if device is None:
            return False
        used = self._mappings.top(settings.slot, settings.partition)
        if used is None or not self._mappings.lies_over(used, device):
            used = device
        if not self._mounts.mounted_as(
            used,
            place,
            settings.options,
            read_only=settings.read_only,
            digest=settings.digest,
        ):
            return False
        if settings.key is not None:
            luks.check_key(device, settings.key)
        return True

    def _is_linked(self, settings: DiskSettings, device: BlockDevice, place: Place) -> bool:
        """As `_is_mounted`, for a link. To the bare device is not to what verifies it."""
        target = place.link_target()
        if target is None:
            return False
        used: BlockDevice | None = device
        if settings.verity is not None:
            layers = Layers.over(settings.slot, settings.partition)
            is_open = verity.is_open(self._mappings, layers, device, settings.verity)
            used = self._mappings.top(settings.slot, settings.partition) if is_open else None
        if used is None or target != used.node:
            raise RequestError(f"{place} exists already: it is a link to {target}")
        return True

    def _put_opened(self, settings: DiskSettings, device: BlockDevice, place: Place) -> None:
        """Open what lies over the device, and put that at the place; closed after an error."""
        self._mappings.expect(settings.slot)
        try:
            self._put(settings, self._open(settings, device), place)
        except BaseException:
            try:
                self._close(settings)
            except RequestError as error:
                _log.warning("after a failed mount: %s", error)
                self._mappings.close(settings.slot, settings.partition, Deadline(0), lazy=True)
            raise

    def _close(self, settings: DiskSettings) -> None:
        self._mappings.close(settings.slot, settings.partition, Deadline(BUSY_TIMEOUT))

    def _open(self, settings: DiskSettings, device: BlockDevice) -> BlockDevice:
        layers = Layers.over(settings.slot, settings.partition)
        if settings.verity is not None:
            return verity.open_verified(self._mappings, layers, device, settings.verity)
        if settings.key is not None:
            return luks.open_volume(
                self._mappings,
                layers,
                device,
                settings.key,
                may_format=settings.ensure_filesystem,
                read_only=settings.read_only,
            )
        self._check_encryptable(settings, device)
        return encryption.open_new(self._mappings, layers, device)

    def _check_encryptable(self, settings: DiskSettings, device: BlockDevice) -> None:
        """Refuse, before anything is written, what would be lost or could not be made."""
        filesystem = settings.filesystem
        filesystems.check_type(self._kernel, device, filesystem)
        filesystems.check_maker(device, filesystem)
        if settings.preserve_data:
            filesystems.check_blank(device, filesystem)
        needed = unwritten.SMALLEST.get(filesystem, 0)
        capacity = encryption.capacity(int(self._kernel.read(f"{device.sysfs}/size")))
        if capacity < needed:
            raise RequestError(
                f"{device} has {capacity >> 20} MiB when it is encrypted, and {filesystem} needs "
                f"{needed >> 20} MiB; nothing was written",
                HResult.INVALID_ARGUMENT,
            )

    def _put(self, settings: DiskSettings, device: BlockDevice, place: Place) -> None:
        """Link to the device, or what lies over it; or mount it as the filesystem it is to have."""
        if settings.block_device:
            self._mounts.link(device, place)
            return
        filesystem = settings.filesystem
        if filesystem and (settings.ensure_filesystem or not filesystems.is_known(filesystem)):
            filesystems.check_type(self._kernel, device, filesystem)
        if settings.encrypted and settings.key is None:
            unwritten.make(device, filesystem)
        elif settings.ensure_filesystem:
            filesystems.ensure(
                self._kernel,
                device,
                filesystem,
                read_only=settings.read_only,
                preserve_data=settings.preserve_data,
            )
        self._mounts.mount(
            device,
            place,
            filesystem or filesystems.detect_mountable(device),
            settings.options,
            read_only=settings.read_only,
            digest=settings.digest,
        )
