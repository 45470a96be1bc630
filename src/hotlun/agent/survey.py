"""What of some disks and mounts is there now. Nothing is changed, claimed or waited for.

A device is known by the serial that the kernel read when it found it, as for a mount. At a
path counts what is in sight, by its number: while something is mounted from a disk that
is gone, the kernel gives that number to no other disk.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING

from hotlun.agent import verity
from hotlun.agent.errors import RequestError, words
from hotlun.agent.kernel import check_absent
from hotlun.agent.mappings import Layers
from hotlun.agent.queries import Found
from hotlun.bridge.messages import OTHER, OWN, UNKNOWN

if TYPE_CHECKING:
    from hotlun.agent.block_devices import BlockDevice
    from hotlun.agent.mappings import Mappings
    from hotlun.agent.mounts import Mounts
    from hotlun.agent.places import Place
    from hotlun.agent.queries import DiskQuery, MountQuery
    from hotlun.agent.scsi import ScsiDisks

_log = logging.getLogger("hotlun.agent")


class Survey:
    """One look at everything: what serves for all disks is looked up once."""

    def __init__(self, scsi: ScsiDisks, mappings: Mappings, mounts: Mounts) -> None:
        self._scsi = scsi
        self._mappings = mappings
        self._mounts = mounts
        self._hosts: dict[int, int | None] = {}
        self._mountinfo = functools.lru_cache(maxsize=1)(mounts.text)

    def answers(self, asked: list[DiskQuery]) -> list[Found]:
        """Of each, in the same order.

        Raises:
            RequestError: the kernel cannot be asked.
        """
        return [self._answer(one) for one in asked]

    def _answer(self, asked: DiskQuery) -> Found:
        nowhere = [False] * len(asked.mounts)
        try:
            known = self._scsi.known(asked.slot, self._hosts)
        except RequestError as error:
            _log.info("in a survey: %s", error)
            return Found(UNKNOWN, nowhere)
        if known is None:
            return Found("", nowhere)
        disk, serial = known
        if asked.serial and serial != asked.serial:
            return Found(OTHER if serial else UNKNOWN, nowhere)
        if disk is None:
            return Found(OWN, nowhere)
        return Found(OWN, [self._is_there(disk, mount) for mount in asked.mounts])

    def _is_there(self, disk: BlockDevice, asked: MountQuery) -> bool:
        device = self._scsi.partition(disk, asked.partition)
        used = self._used(device, asked) if device is not None else None
        if used is None:
            return False
        try:
            place = self._mounts.look_at(asked.path)
        except RequestError as error:  # it leads to where no agent mounts
            _log.info("in a survey: %s", error)
            return False
        with contextlib.closing(place):
            return self._is_at(used, asked, place)

    def _is_at(self, used: BlockDevice, asked: MountQuery, place: Place) -> bool:
        try:
            if asked.block_device:
                return place.link_target() == used.node
            return self._mounts.shows(used, place, self._mountinfo)
        except RequestError as error:  # the way there changes just now
            _log.info("in a survey: %s", error)
        except OSError as error:
            check_absent(error)
            _log.info("in a survey: %s: %s", place, words(error))
        return False

    def _used(self, device: BlockDevice, asked: MountQuery) -> BlockDevice | None:
        """What is to be at the path: the device, or what was mapped to it for that."""
        layers = Layers.over(device.slot, asked.partition)
        if asked.verity is not None:
            if not verity.is_open(self._mappings, layers, device, asked.verity):
                return None
            return self._mapped(layers.verity, device)
        if asked.encrypted and not asked.block_device:
            return self._mapped(layers.crypt, device) or self._mapped(layers.luks, device)
        return device

    def _mapped(self, name: str, device: BlockDevice) -> BlockDevice | None:
        number = self._mappings.mapper.find(name)
        if number is None:
            return None
        try:
            mapped = self._mappings.device(device.slot, number)
        except RequestError:  # it goes, or has just begun to come
            return None
        return mapped if self._mappings.lies_over(mapped, device) else None
