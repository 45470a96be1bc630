"""SCSI disks as the guest's kernel shows them: found, waited for, proved, and let go.

A disk is known by its address (host:channel:target:LUN), never by its name: `sdX`
follows the order of discovery.

Nor does the address prove anything. The host can take a disk away without the guest's
consent and give the address to another. The kernel hears of that by events, for
which virtio-scsi keeps eight buffers: of 32 disks that are replaced at once it misses
23, and has the old ones' devices until somebody lets them go (Linux 6.1, QEMU 7.2).
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

from hotlun.agent import vpd
from hotlun.agent.block_devices import BlockDevice, Held, block_device, open_node, partition_of
from hotlun.agent.claims import InUseError, claimed, wait_for_openers
from hotlun.agent.controllers import Controllers, NoControllerError
from hotlun.agent.errors import RequestError
from hotlun.agent.kernel import check_absent
from hotlun.agent.openers import Openers
from hotlun.agent.orders import Orders
from hotlun.agent.partition_tables import wait_for_partition
from hotlun.agent.reminder import Reminder
from hotlun.agent.vpd import Identity
from hotlun.agent.writeback import write_back
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.agent.kernel import Kernel
    from hotlun.agent.settings import Slot
    from hotlun.agent.threads import Threads
    from hotlun.agent.uevents import Deadline, Uevents

_LOOK_AGAIN = 5.0
"""Seconds between looks for a disk that nothing was heard of. If the kernel has not missed it,
its coming is announced, and after it is there: to look oftener costs, with hundreds of them,
more than to find them."""

_BUSY_PATIENCE = 2.0
"""Seconds for whatever uses a disk that is to be unplugged to let go of it."""


class ScsiDisks:
    """The disks on the controllers that the host counts.

    Args:
        kernel: where it shows itself.
        uevents: hears of new and removed devices; listening already.
        threads: for what the kernel may take long to do.
    """

    def __init__(self, kernel: Kernel, uevents: Uevents, threads: Threads) -> None:
        self._kernel = kernel
        self._uevents = uevents
        self._controllers = Controllers(kernel)
        self._openers = Openers(kernel)
        self._orders = Orders(kernel, uevents, threads)

    def take_up(self) -> None:
        """Have the kernel take up those that an agent before this one had begun to let go."""
        self._orders.take_up()

    def find(self, slot: Slot, partition: int = 0, number: str = "") -> BlockDevice | None:
        """The device if it is there now.

        Args:
            number: what the disk's may be: to see that it is takes half as long as to find it.
        """
        try:
            address = self._address(slot)
        except NoControllerError:
            return None
        disk = self._numbered(slot, address, number) if number and not partition else None
        disk = disk or self._disk(slot, address)
        return partition_of(self._kernel, disk, partition) if disk and partition else disk

    def known(
        self, slot: Slot, hosts: dict[int, int | None]
    ) -> tuple[BlockDevice | None, str] | None:
        """What is in a slot now: the disk, and its serial as the kernel has it.

        The disk is None while the device has no driver: it is not to be used, but is not let
        go yet either.

        Args:
            hosts: of controllers that were looked for already; what is found is added.

        Raises:
            RequestError: it has more than one block device.
        """
        if slot.controller not in hosts:
            try:
                hosts[slot.controller] = self._controllers.scsi_host(slot.controller)
            except NoControllerError:
                hosts[slot.controller] = None
        host = hosts[slot.controller]
        if host is None:
            return None
        address = _address_at(host, slot)
        while True:
            try:
                device = self._device(address)
                disk = self._disk_of(slot, address, device)
                serial = vpd.serial(device)
                is_same = self._disk_of(slot, address, self._device(address)) == disk
            except FileNotFoundError:
                return None
            if is_same:  # and not what has come in its place
                return disk, serial

    def partition(self, disk: BlockDevice, number: int) -> BlockDevice | None:
        """A disk's partition if it is there now; the disk for 0."""
        return partition_of(self._kernel, disk, number) if number else disk

    def wait_for(
        self, slot: Slot, partition: int, deadline: Deadline, identity: Identity | None = None
    ) -> BlockDevice:
        """The device, once it is there and its node in /dev can be opened. Raises as `hold`."""
        with self.hold(slot, partition, deadline, identity) as device:
            return device

    def hold(
        self,
        slot: Slot,
        partition: int,
        deadline: Deadline,
        identity: Identity | None = None,
        *,
        fresh_table: bool = False,
    ) -> Held:
        """Wait for the device, and see to it that its name means no other during the `with`.

        The name and number of a disk that is open are given to no other, even if it goes.
        So what is done to the node, after the disk was proved to be the one that is meant,
        is done to that disk or fails.

        Args:
            partition: its number, or 0 for the disk.
            identity: what the disk has to be. A stale device of another one is let go, if
                nothing uses it, and the disk that is there now is found.
            fresh_table: have the kernel read the table of partitions again first, unless the
                disk is in use. For who is going to write to one: where the kernel has it may
                be where another is by now.

        Raises:
            RequestError: no such controller; no disk or node within the deadline; another
                disk than is meant; or a disk without this partition.
        """
        address = self._address(slot)
        disk, file, found = self._opened(slot, address, deadline, identity)
        if identity is not None and not found.is_proof_of(identity):
            os.close(file)
            self._discover_again(disk, address, found, identity, deadline)
            was = f", after another disk's device was let go: {found.against(identity)}"
            disk, file, found = self._opened(slot, address, deadline, identity, was)
        try:
            if identity is not None and not found.is_proof_of(identity):
                raise RequestError(
                    f"{disk} is not the disk that is meant: {found.against(identity)}; "
                    "nothing was done to it",
                    HResult.WRONG_DISK,
                )
            if partition:
                disk = wait_for_partition(
                    self._kernel, self._uevents, disk, partition, deadline, fresh=fresh_table
                )
        except BaseException:
            os.close(file)
            raise
        return Held(disk, file)

    def unplug(self, slot: Slot, deadline: Deadline) -> None:
        """Have the kernel let the disk go; return when its device is gone, or was not there.

        Raises:
            RequestError: it is in use, and by what; or what was written to it cannot be
                written back; or it is still there at the deadline.
        """
        try:
            address = self._address(slot)
            device = self._device(address)
        except (NoControllerError, FileNotFoundError):
            return
        disk = self._disk_of(slot, address, device)
        if disk is None:
            self._let_go(slot, address, device, None, deadline)
            return
        patience = deadline.within(_BUSY_PATIENCE)
        with claimed(self._kernel, self._uevents, disk, patience) as claim:
            if claim is not None:
                wait_for_openers(self._openers, self._uevents, disk, patience)
            first = functools.partial(write_back, self._kernel, disk)
            self._let_go(slot, address, device, disk, deadline, first, claim=claim)

    def _opened(
        self,
        slot: Slot,
        address: str,
        deadline: Deadline,
        wanted: Identity | None,
        was: str = "",
    ) -> tuple[BlockDevice, int, Identity]:
        """Wait for the disk, open it, and find out what it is if that matters.

        Args:
            was: what has been done already, for the error.
        """
        reminder = Reminder(self._kernel, self._orders, address, deadline)

        def look() -> BlockDevice | None:
            try:
                device = self._device(address)
            except FileNotFoundError:
                device = None
            disk = self._disk_of(slot, address, device) if device else None
            return self._disk(slot, address) if not disk and reminder.remind(device) else disk

        while True:
            disk = self._uevents.wait_until(
                look, address, deadline, look_again=_LOOK_AGAIN, is_awaited=True
            )
            if disk is None:
                raise RequestError(
                    f"disk {slot}: no disk at SCSI address {address} "
                    f"within {deadline.seconds:g} s{was}",
                    HResult.WRONG_DISK if was else HResult.TIMEOUT,
                )
            file = open_node(self._kernel, self._uevents, disk, deadline)
            if file is None:
                continue
            is_there = False
            try:
                found = Identity()
                if wanted is not None:
                    found = Identity.read(self._kernel, _device_of(disk), disk.sysfs)
                # Its name is no other's now, so if that is there, what was read was this one's.
                # Its size, which is read last, is there only as long as that is.
                is_there = found.size is not None or self._kernel.exists(disk.sysfs)
            finally:
                if not is_there:
                    os.close(file)
            if is_there:
                return disk, file, found

    def _discover_again(
        self, disk: BlockDevice, address: str, found: Identity, wanted: Identity, deadline: Deadline
    ) -> None:
        """Have the kernel ask what is there now.

        If its serial is right, only its size is asked again, as it may have grown. For a
        stale device that would not do: it would take on its successor's serial and size,
        and keep the partitions of its own disk.

        Raises:
            RequestError: a stale device is in use, or stays.
        """
        device = _device_of(disk)
        if wanted.serial and found.has_serial_of(wanted):
            self._orders.ask_again(device, deadline)
            return
        try:
            now = deadline.within(0)
            with claimed(self._kernel, self._uevents, disk, now) as claim:
                # What they have written may be in memory yet, and would go to the new disk.
                wait_for_openers(self._openers, self._uevents, disk, now)
                self._let_go(disk.slot, address, device, disk, deadline, claim=claim)
        except InUseError as error:
            raise RequestError(
                f"{disk} is not the disk that is meant: {found.against(wanted)}; to look for "
                f"that, it has to be let go, and it is in use: {error.users}",
                HResult.WRONG_DISK,
            ) from None
        self._orders.look_for(address, deadline)

    def _let_go(
        self,
        slot: Slot,
        address: str,
        device: str,
        disk: BlockDevice | None,
        deadline: Deadline,
        first: Callable[[], None] | None = None,
        *,
        claim: int | None = None,
    ) -> None:
        def is_same() -> bool:
            if disk is not None and claim is not None and self._kernel.exists(disk.sysfs):
                return True  # as its name is no other's
            return self._disk(slot, address) in (disk, None)  # None: only its driver has gone yet

        if not self._orders.delete(device, is_same, deadline, first):
            raise RequestError(
                f"{disk or f'disk {slot}'}: the kernel was told to write back what it has in "
                f"memory and let it go, and still has it after {deadline.seconds:g} s",
                HResult.TIMEOUT,
            )

    def _address(self, slot: Slot) -> str:
        return _address_at(self._controllers.scsi_host(slot.controller), slot)

    def _device(self, address: str) -> str:
        """The directory of the SCSI device in sysfs.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._kernel.target(f"{self._kernel.sys}/bus/scsi/devices/{address}")

    def _disk(self, slot: Slot, address: str) -> BlockDevice | None:
        try:
            device = self._device(address)
        except FileNotFoundError:
            return None
        return self._disk_of(slot, address, device)

    def _disk_of(self, slot: Slot, address: str, device: str) -> BlockDevice | None:
        names = self._kernel.names(f"{device}/block")
        if len(names) > 1:
            raise RequestError(
                f"disk {slot}: SCSI address {address} has more than one block device: "
                + ", ".join(names)
            )
        return block_device(self._kernel, slot, f"{device}/block/{names[0]}") if names else None

    def _numbered(self, slot: Slot, address: str, number: str) -> BlockDevice | None:
        """The disk at an address, if this is its number."""
        try:
            path = self._kernel.target(f"{self._kernel.sys}/dev/block/{number}")
        except OSError as error:
            check_absent(error)
            return None
        device, _, name = path.rpartition("/block/")
        if not device.endswith(f"/{address}") or "/" in name:
            return None
        return BlockDevice(slot, name, f"{self._kernel.dev}/{name}", number, path)


def _address_at(host: int, slot: Slot) -> str:
    return f"{host}:0:0:{slot.lun}"


def _device_of(disk: BlockDevice) -> str:
    """The SCSI device's directory in sysfs, two above that of its block device."""
    return disk.sysfs.rsplit("/", 2)[0]
