"""Disks are found by address, waited for by events, and let go only when nothing uses them."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.guest import DEADLINE, FakeGuest

from hotlun.agent.errors import AbandonedError, RequestError
from hotlun.agent.settings import Slot
from hotlun.agent.uevents import Deadline, Uevents
from hotlun.bridge.messages import HResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hotlun.agent.scsi import BlockDevice

SLOT = Slot(0, 1)

# A node that a test can open, and its number: any block device will do as "the disk".
DISK, PART = "7:0", "7:1"


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    guest = FakeGuest(tmp_path)
    yield guest
    guest.close()


def make_node(guest: FakeGuest, name: str, number: str) -> None:
    major, minor = map(int, number.split(":"))
    os.mknod(os.path.join(guest.kernel.dev, name), 0o60600, os.makedev(major, minor))


class Waiter(threading.Thread):
    """`wait_for` in a thread of its own, so that the test can make happen what it waits for."""

    def __init__(
        self,
        guest: FakeGuest,
        partition: int = 0,
        seconds: float = DEADLINE,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(daemon=True)
        self.found: BlockDevice | None = None
        self.error: RequestError | None = None
        self._guest = guest
        self._partition = partition
        self._deadline = Deadline(seconds, wanted)
        self.start()

    def run(self) -> None:
        try:
            self.found = self._guest.scsi.wait_for(SLOT, self._partition, self._deadline)
        except RequestError as error:
            self.error = error

    def result(self) -> BlockDevice:
        self.join(DEADLINE)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        assert self.found is not None
        return self.found


@pytest.mark.root
def test_a_disk_that_is_there_is_found_at_once(guest: FakeGuest) -> None:
    """By its address, whatever its name."""
    guest.add_disk(1, "sdq", DISK)
    make_node(guest, "sdq", DISK)
    device = Waiter(guest).result()
    assert (device.name, device.number, str(device)) == ("sdq", DISK, "disk 0:1 (sdq)")


@pytest.mark.root
def test_a_disk_that_comes_is_heard_of(guest: FakeGuest) -> None:
    """The waiter sleeps until the kernel says that something happened at its address."""
    waiter = Waiter(guest)
    guest.announce(guest.add_disk(2, "sda", DISK))  # another's
    make_node(guest, "sdb", DISK)
    guest.announce(guest.add_disk(1, "sdb", DISK))
    assert waiter.result().name == "sdb"


@pytest.mark.root
def test_the_node_may_come_after_the_disk(guest: FakeGuest) -> None:
    """And one left by an earlier disk, with another number, is not taken for it."""
    make_node(guest, "sda", PART)
    waiter = Waiter(guest)
    guest.announce(guest.add_disk(1, "sda", DISK))
    time.sleep(0.1)
    assert waiter.is_alive()
    os.unlink(os.path.join(guest.kernel.dev, "sda"))
    make_node(guest, "sda", DISK)
    assert waiter.result().number == DISK


def test_a_disk_that_never_comes_is_a_time_out(guest: FakeGuest) -> None:
    """With the slot and the address in its words."""
    with pytest.raises(RequestError, match=r"disk 0:1: .*2:0:0:1 within 0\.2 s") as caught:
        Waiter(guest, seconds=0.2).result()
    assert caught.value.code == HResult.TIMEOUT


def test_a_node_that_never_comes_is_a_time_out(guest: FakeGuest) -> None:
    """The words say what was missing."""
    guest.add_disk(1, "sda", DISK)
    with pytest.raises(RequestError, match=r"disk 0:1 \(sda\): no .*dev/sda") as caught:
        Waiter(guest, seconds=0.2).result()
    assert caught.value.code == HResult.TIMEOUT


def test_nobody_waits_for_a_host_that_is_gone(guest: FakeGuest) -> None:
    """The next host's requests about the disk are behind this one."""
    wanted = [True]
    waiter = Waiter(guest, wanted=lambda: wanted[0])
    wanted[0] = False
    guest.uevents.wake_all()
    with pytest.raises(AbandonedError):
        waiter.result()


@pytest.mark.root
@pytest.mark.parametrize(
    ("disk", "partition"), [("sda", "sda1"), ("nvme0n1", "nvme0n1p1"), ("loop3", "loop3p1")]
)
def test_partitions_are_named_by_the_kernels_rule(
    guest: FakeGuest, disk: str, partition: str
) -> None:
    """After a digit comes a `p`."""
    guest.add_disk(1, disk, DISK, {partition: PART})
    for name, number in ((disk, DISK), (partition, PART)):
        make_node(guest, name, number)
    assert Waiter(guest, 1).result().name == partition


@pytest.mark.root
def test_a_partition_may_come_after_its_disk(guest: FakeGuest) -> None:
    """The disk is there while the kernel still reads its table."""
    block = guest.add_disk(1, "sda", DISK)
    make_node(guest, "sda", DISK)
    waiter = Waiter(guest, 1)
    make_node(guest, "sda1", PART)
    guest.add_partition(block, "sda1", PART)
    guest.announce(block)
    assert waiter.result().name == "sda1"


@pytest.mark.root
def test_a_partition_that_is_not_there_is_told_when_the_table_is_read(guest: FakeGuest) -> None:
    """The kernel announces a disk when its partitions are there: no need to wait longer."""
    block = guest.add_disk(1, "sda", DISK, {"sda1": PART})
    make_node(guest, "sda", DISK)
    waiter = Waiter(guest, 7, seconds=600)
    guest.announce(block)
    with pytest.raises(RequestError, match=r"no partition 7; it has sda1") as caught:
        waiter.result()
    assert caught.value.code == HResult.NOT_FOUND


@pytest.mark.root
def test_a_missing_partition_of_an_old_disk_is_told_soon(guest: FakeGuest) -> None:
    """It was announced before anybody listened, so only a short grace is waited."""
    guest.add_disk(1, "sda", DISK)
    make_node(guest, "sda", DISK)
    with pytest.raises(RequestError, match="no partition 1; it has none"):
        Waiter(guest, 1, seconds=600).result()


class LossyEvents(socket.socket):
    """The kernel's socket, which tells in place of the datagram `lost` that some were."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        data = super().recv(size, flags)
        if data == b"lost":
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return data


def test_what_was_announced_is_forgotten_when_events_are_lost() -> None:
    """A removal may be among them, and the next disk at that place be another."""
    kernel, heard = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with kernel, LossyEvents(fileno=heard.detach()) as lossy:
        uevents = Uevents(lossy)
        path = "/devices/2:0:0:1/block/sda"
        kernel.send(f"add@{path}\0".encode())
        soon = Deadline(DEADLINE)
        assert uevents.wait_until(lambda: uevents.was_announced(path) or None, "2:0:0:1", soon)
        kernel.send(b"lost")
        gone = uevents.wait_until(lambda: not uevents.was_announced(path) or None, "x", soon)
        assert gone
        kernel.shutdown(socket.SHUT_RDWR)


def test_unplugging_what_is_not_there_is_success(guest: FakeGuest) -> None:
    """The host undoes what it does not know to have happened."""
    guest.scsi.unplug(SLOT, Deadline(DEADLINE))
    guest.scsi.unplug(Slot(7, 1), Deadline(DEADLINE))  # nor is its controller
    assert guest.scsi.find(Slot(7, 1)) is None


def test_unplug_returns_when_the_device_is_gone(guest: FakeGuest) -> None:
    """Told by an event, after `1` was written to `delete`."""
    guest.add_disk(1, "sda", DISK)
    path = guest.sysfs(1)

    def kernel() -> None:
        end = time.monotonic() + DEADLINE
        while (path / "delete").read_text() != "1\n" and time.monotonic() < end:
            time.sleep(0.01)
        guest.remove_disk(1)
        guest.announce(path, "remove")

    acting = threading.Thread(target=kernel)
    acting.start()
    guest.scsi.unplug(SLOT, Deadline(DEADLINE))
    assert not path.exists()
    acting.join()


def test_a_device_that_stays_is_a_time_out(guest: FakeGuest) -> None:
    """The host must not take it away meanwhile."""
    guest.add_disk(1, "sda", DISK)
    with pytest.raises(RequestError, match=r"disk 0:1 \(sda\): .* still has it") as caught:
        guest.scsi.unplug(SLOT, Deadline(0.2))
    assert caught.value.code == HResult.TIMEOUT


def add_process(guest: FakeGuest, pid: str, namespace: str, mountinfo: str) -> None:
    process = guest.root / "proc" / pid
    (process / "ns").mkdir(parents=True)
    (process / "ns/mnt").symlink_to(namespace)
    (process / "mountinfo").write_text(mountinfo)
    (process / "comm").write_text("sleeper\n")


OF_SDA1 = f"40 1 {PART} / /mnt/a\\040b rw - ext4 /dev/sda1 rw\n"
OTHERS = "41 1 8:99 / /mnt/c rw - ext4 /dev/sdz rw\n"


def test_a_mounted_disk_stays_and_its_mounts_are_named(guest: FakeGuest) -> None:
    """Also a mount of a partition, in another process's namespace only."""
    guest.add_disk(1, "sda", DISK, {"sda1": PART})
    add_process(guest, "self", "mnt:[1]", OTHERS)
    add_process(guest, "1", "mnt:[1]", OTHERS)
    add_process(guest, "77", "mnt:[2]", OTHERS + OF_SDA1)
    with pytest.raises(RequestError) as caught:
        guest.scsi.unplug(SLOT, Deadline(DEADLINE))
    assert str(caught.value) == (
        "disk 0:1 (sda) is in use: sda1 is mounted at /mnt/a b for process 77 (sleeper)"
    )
    assert (guest.sysfs(1) / "delete").read_text() == ""


def test_a_mounted_btrfs_is_known_by_its_source(guest: FakeGuest) -> None:
    """Its mounts have device numbers of their own."""
    guest.add_disk(1, "sda", DISK)
    node = os.path.join(guest.kernel.dev, "sda")
    add_process(guest, "self", "mnt:[1]", f"40 1 0:40 / /mnt/b rw - btrfs {node} rw\n")
    with pytest.raises(RequestError, match="sda is mounted at /mnt/b"):
        guest.scsi.unplug(SLOT, Deadline(DEADLINE))


def test_a_disk_under_a_mapping_stays(guest: FakeGuest) -> None:
    """The holder is named as the kernel and as its maker call it."""
    block = guest.add_disk(1, "sda", DISK, {"sda1": PART})
    (block / "sda1/holders/dm-3").mkdir(parents=True)
    (guest.sys / "class/block/dm-3/dm").mkdir(parents=True)
    (guest.sys / "class/block/dm-3/dm/name").write_text("vault\n")
    with pytest.raises(RequestError, match=r"sda1 is part of dm-3 \(vault\)"):
        guest.scsi.unplug(SLOT, Deadline(DEADLINE))


def test_a_disk_swapped_to_stays(guest: FakeGuest) -> None:
    """Taking it away would take processes' memory."""
    guest.add_disk(1, "sda", DISK)
    swaps = f"Filename Type Size Used Priority\n{guest.kernel.dev}/sda partition 9 0 -2\n"
    (guest.root / "proc/swaps").write_text(swaps)
    with pytest.raises(RequestError, match="sda is used as swap"):
        guest.scsi.unplug(SLOT, Deadline(DEADLINE))
