"""SCSI disks as the guest's kernel shows them: found, waited for, proved, and let go.

A disk is known by its address (host:channel:target:LUN), never by its name: `sdX`
follows the order of discovery. What sysfs shows comes before the node in /dev, so
each is waited for.

Nor does the address prove anything. The host can take a disk away without the guest's
consent and give the address to another. The kernel hears of that by events, for
which virtio-scsi keeps eight buffers: of 32 disks that are replaced at once it misses
23, and has the old ones' devices until somebody lets them go (Linux 6.1, QEMU 7.2).
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from hotlun.agent import holders, partitions, vpd
from hotlun.agent.claims import InUseError, claimed, wait_for_openers
from hotlun.agent.controllers import Controllers, NoControllerError
from hotlun.agent.errors import RequestError, words
from hotlun.agent.kernel import check_absent
from hotlun.agent.openers import Openers
from hotlun.agent.orders import Orders
from hotlun.agent.reminder import Reminder
from hotlun.agent.vpd import Identity
from hotlun.agent.writeback import write_back
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from hotlun.agent.kernel import Kernel
    from hotlun.agent.settings import Slot
    from hotlun.agent.threads import Threads
    from hotlun.agent.uevents import Deadline, Uevents

_DISK_LOOK_AGAIN = 5.0
"""Seconds between looks for a disk that nothing was heard of. If the kernel has not missed it,
its coming is announced, and after it is there: to look oftener costs, with hundreds of them,
more than to find them."""

_NODE_LOOK_AGAIN = 0.02
"""Seconds between looks for a node in /dev, whose making is not announced without udev."""

_BUSY_PATIENCE = 2.0
"""Seconds for whatever uses a disk that is to be unplugged to let go of it."""

_READER_PATIENCE = 1.0
"""Seconds for whoever looks into a partition (udev does) to close it again."""


class BlockDevice(NamedTuple):
    """A disk or a partition: its node, its number as `8:1`, its directory in sysfs."""

    slot: Slot
    name: str
    node: str
    number: str
    sysfs: str

    def __str__(self) -> str:
        return f"disk {self.slot} ({self.name})"

    def has_node(self, status: os.stat_result) -> bool:
        """Whether that is the status of a node of this device."""
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        return stat.S_ISBLK(status.st_mode) and number == self.number


class Held:
    """A device whose disk is open until the end of a `with`, which is given the device.

    Args:
        file: the disk's descriptor.
    """

    def __init__(self, device: BlockDevice, file: int) -> None:
        self._device = device
        self._file = file

    def __enter__(self) -> BlockDevice:
        return self._device

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        os.close(self._file)


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
        return self._partition(disk, partition) if disk and partition else disk

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
        return self._partition(disk, number) if number else disk

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
                disk = self._wait_for_partition(disk, partition, deadline, fresh=fresh_table)
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
                look, address, deadline, look_again=_DISK_LOOK_AGAIN, is_awaited=True
            )
            if disk is None:
                raise RequestError(
                    f"disk {slot}: no disk at SCSI address {address} "
                    f"within {deadline.seconds:g} s{was}",
                    HResult.WRONG_DISK if was else HResult.TIMEOUT,
                )
            file = self._open(disk, deadline)
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
        return self._block_device(slot, f"{device}/block/{names[0]}") if names else None

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

    def _partition(self, disk: BlockDevice, partition: int) -> BlockDevice | None:
        path = partitions.find(self._kernel, disk.sysfs, partition)
        return self._block_device(disk.slot, path) if path else None

    def _block_device(self, slot: Slot, path: str) -> BlockDevice | None:
        try:
            number = self._kernel.attribute(f"{path}/dev")
        except OSError as error:
            check_absent(error)
            return None
        name = path.rpartition("/")[2]
        return BlockDevice(slot, name, f"{self._kernel.dev}/{name}", number, path)

    def _open(self, device: BlockDevice, deadline: Deadline) -> int | None:
        """Wait for the node, and open it; None if the device goes meanwhile."""

        def look() -> int | None:
            file = _opened_node(device)
            return -1 if file is None and not self._kernel.exists(device.sysfs) else file

        file = self._uevents.wait_until(look, device.name, deadline, look_again=_NODE_LOOK_AGAIN)
        if file is None:
            raise RequestError(
                f"{device}: no {device.node} that can be opened and is device {device.number} "
                f"within {deadline.seconds:g} s",
                HResult.TIMEOUT,
            )
        return file if file >= 0 else None

    def _wait_for_partition(
        self, disk: BlockDevice, partition: int, deadline: Deadline, *, fresh: bool
    ) -> BlockDevice:
        """The partition; if the kernel knows of none, after it has read the table again.

        Args:
            fresh: have it read that in any case.
        """
        unread = ""
        part = None if fresh else self._partition(disk, partition)
        if part is None:
            unread = self._read_table(disk, deadline)
            part = self._partition(disk, partition)
        file = self._open(part, deadline) if part else None
        if part is None or file is None:
            others = partitions.names(self._kernel, disk.sysfs)
            raise RequestError(
                f"{disk} has no partition {partition}; "
                + (f"it has {', '.join(others)}" if others else "it has none")
                + unread,
                HResult.NOT_FOUND,
            )
        os.close(file)
        return part

    def _read_table(self, disk: BlockDevice, deadline: Deadline) -> str:
        """Have the kernel read the partition table now; why it cannot, in words, or `""`.

        Raises:
            RequestError: the disk does not let itself be read.
        """
        unread = "; the table on the disk may say more, but cannot be read again now: in use, "
        try:
            with claimed(self._kernel, self._uevents, disk, deadline.within(0)) as claim:
                loops = holders.loops(self._kernel, disk.sysfs)
                if loops:
                    raise InUseError(disk, loops)
                if claim is None or self._uevents.wait_until(
                    lambda: partitions.read_table(claim) or None,
                    disk.name,
                    deadline.within(_READER_PATIENCE),
                    look_again=_NODE_LOOK_AGAIN,
                ):
                    return ""
                raise InUseError(disk, holders.openers(self._kernel, disk.sysfs))
        except InUseError as error:
            return unread + error.users
        except OSError as error:
            raise RequestError(
                f"{disk}: its partition table cannot be read: {words(error)}"
            ) from error


def _address_at(host: int, slot: Slot) -> str:
    return f"{host}:0:0:{slot.lun}"


def _device_of(disk: BlockDevice) -> str:
    """The SCSI device's directory in sysfs, two above that of its block device."""
    return disk.sysfs.rsplit("/", 2)[0]


def _opened_node(device: BlockDevice) -> int | None:
    """The node's descriptor; None if there is none yet that is this device's."""
    try:
        file = os.open(device.node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV) or _is_anothers(device):
            return None
        raise RequestError(f"{device}: {device.node} cannot be opened: {words(error)}") from error
    if device.has_node(os.fstat(file)):
        return file
    os.close(file)
    return None


def _is_anothers(device: BlockDevice) -> bool:
    """Whether the node is another device's, or there is none."""
    try:
        return not device.has_node(os.stat(device.node))
    except OSError as error:
        return error.errno == errno.ENOENT
