"""Disks are found by address, waited for by events, and let go only when nothing uses them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.guest import DEADLINE, FakeGuest, image_of

from hotlun.agent import partitions, syscalls
from hotlun.agent.errors import AbandonedError, RequestError
from hotlun.agent.kernel import Kernel
from hotlun.agent.scsi import ScsiDisks
from hotlun.agent.settings import Slot
from hotlun.agent.threads import Threads
from hotlun.agent.uevents import Deadline, Uevents
from hotlun.agent.vpd import Identity
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hotlun.agent.block_devices import BlockDevice

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


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    """The number of a block device that only the test uses, so that it can be claimed."""
    command = ["losetup", "--find", "--show", str(image_of(tmp_path / "loop.raw", 1))]
    node = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    number = os.stat(node).st_rdev
    yield f"{os.major(number)}:{os.minor(number)}"
    subprocess.run(["losetup", "--detach", node], check=True)


@contextlib.contextmanager
def claiming(guest: FakeGuest, name: str) -> Iterator[None]:
    """Hold a disk as the kernel does for a mount."""
    claim = os.open(os.path.join(guest.kernel.dev, name), os.O_RDONLY | os.O_EXCL)
    try:
        yield
    finally:
        os.close(claim)


class Waiter(threading.Thread):
    """`wait_for` in a thread of its own, so that the test can make happen what it waits for."""

    def __init__(
        self,
        guest: FakeGuest,
        partition: int = 0,
        seconds: float = DEADLINE,
        wanted: Callable[[], bool] = lambda: True,
        identity: Identity | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self.found: BlockDevice | None = None
        self.error: RequestError | None = None
        self._guest = guest
        self._partition = partition
        self._deadline = Deadline(seconds, wanted)
        self._identity = identity
        self.start()

    def run(self) -> None:
        try:
            self.found = self._guest.scsi.wait_for(
                SLOT, self._partition, self._deadline, self._identity
            )
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


def without_a_driver(guest: FakeGuest) -> Path:
    """A SCSI device that the driver of disks has not taken, or has left; that driver's `bind`."""
    guest.sysfs(1).mkdir()
    (guest.sys / "bus/scsi/devices" / guest.address(1)).symlink_to(guest.sysfs(1))
    bind = guest.sys / "bus/scsi/drivers/sd/bind"
    bind.parent.mkdir(parents=True)
    bind.write_text("")
    return bind


@pytest.mark.root
def test_a_disk_that_has_lost_its_driver_gets_it_back(guest: FakeGuest) -> None:
    """An agent was killed that had begun to let it go: no event would ever tell of it."""
    bind = without_a_driver(guest)
    make_node(guest, "sda", DISK)
    waiter = Waiter(guest)
    assert wait_for_order(bind) == guest.address(1)
    guest.announce(guest.add_disk(1, "sda", DISK))
    assert waiter.result().name == "sda"


def test_a_new_agent_has_disks_without_a_driver_taken(guest: FakeGuest) -> None:
    """Whoever only attached one looks for it in the guest, and asks no agent for it."""
    bind = without_a_driver(guest)
    (guest.add_disk(2, "sda", DISK).parent.parent / "driver").symlink_to(bind.parent)
    guest.scsi.take_up()
    assert wait_for_order(bind) == guest.address(1)


@pytest.mark.root
def test_a_disk_that_its_driver_is_looking_at_is_waited_for(guest: FakeGuest) -> None:
    """It is not to be bound: it is, and its disk is about to be there."""
    bind = without_a_driver(guest)
    (guest.sysfs(1) / "driver").symlink_to(bind.parent)
    with pytest.raises(RequestError, match="no disk at SCSI address"):
        guest.scsi.wait_for(SLOT, 0, Deadline(0.1))
    assert bind.read_text() == ""


@pytest.mark.root
def test_a_device_that_no_driver_takes_is_a_time_out(guest: FakeGuest) -> None:
    """It is tried once, not for ever."""
    bind = without_a_driver(guest)
    with pytest.raises(RequestError, match="no disk at SCSI address"):
        guest.scsi.wait_for(SLOT, 0, Deadline(0.2))
    assert bind.read_text() == guest.address(1)


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


def test_a_disk_that_is_to_come_is_not_looked_for(guest: FakeGuest) -> None:
    """The kernel hears of it, mostly, and looks itself."""
    with pytest.raises(RequestError, match="no disk"):
        guest.scsi.wait_for(SLOT, 0, Deadline(0.05))
    assert guest.scan.read_text() == ""


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
def test_a_partition_is_known_by_its_number_not_its_name(guest: FakeGuest) -> None:
    """`sda1` may be anything; what the kernel says it is counts."""
    block = guest.add_disk(1, "sda", DISK, {"sda1": PART, "sda11": "7:11"})
    (block / "sda11/partition").write_text("1\n")
    (block / "sda1/partition").write_text("11\n")
    make_node(guest, "sda", DISK)
    make_node(guest, "sda1", PART)
    assert Waiter(guest, 11).result().name == "sda1"


@pytest.mark.root
def test_a_partition_that_is_not_there_is_told_at_once(guest: FakeGuest, loop: str) -> None:
    """The kernel has read the table again by then: there is nothing to wait for."""
    guest.add_disk(1, "sda", loop, {"sda1": PART})
    make_node(guest, "sda", loop)
    with pytest.raises(RequestError, match=r"no partition 7; it has sda1$") as caught:
        Waiter(guest, 7, seconds=600).result()
    assert caught.value.code == HResult.NOT_FOUND


@pytest.mark.root
def test_the_table_of_a_disk_in_use_is_not_read_again(guest: FakeGuest, loop: str) -> None:
    """So what is on the disk may be another one, and the words say why that is not known."""
    block = guest.add_disk(1, "sda", loop)
    make_node(guest, "sda", loop)
    (block / "holders/md0").mkdir(parents=True)
    with claiming(guest, "sda"), pytest.raises(RequestError) as caught:
        Waiter(guest, 7, seconds=600).result()
    assert str(caught.value) == (
        "disk 0:1 (sda) has no partition 7; it has none; the table on the disk may say more, "
        "but cannot be read again now: in use, sda is part of md0"
    )


@pytest.mark.root
def test_a_table_is_read_again_before_a_partition_is_written(
    guest: FakeGuest, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By now the number may be another partition's; but who only reads need not wait for that."""
    block = guest.add_disk(1, "sda", loop, {"sda1": DISK})
    make_node(guest, "sda", loop)
    make_node(guest, "sda1", DISK)

    def read_table(disk: int) -> bool:
        (block / "sda1/dev").write_text(f"{PART}\n")
        os.unlink(os.path.join(guest.kernel.dev, "sda1"))
        make_node(guest, "sda1", PART)
        return True

    monkeypatch.setattr(partitions, "read_table", read_table)
    with guest.scsi.hold(SLOT, 1, Deadline(DEADLINE)) as device:
        assert device.number == DISK
    with (
        claiming(guest, "sda"),
        guest.scsi.hold(SLOT, 1, Deadline(DEADLINE), fresh_table=True) as device,
    ):
        assert device.number == DISK  # the kernel's view counts while it is used
    with guest.scsi.hold(SLOT, 1, Deadline(DEADLINE), fresh_table=True) as device:
        assert device.number == PART


class LossyEvents(socket.socket):
    """The kernel's socket, which tells in place of the datagram `lost` that some were."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        data = super().recv(size, flags)
        if data == b"lost":
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return data


def test_who_waits_looks_when_events_were_lost() -> None:
    """What it waits for may be among them."""
    kernel, heard = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with kernel, LossyEvents(fileno=heard.detach()) as lossy:
        uevents = Uevents(lossy)
        looks: list[bool] = []

        def look() -> bool | None:
            looks.append(True)
            if len(looks) == 1:
                kernel.send(b"lost")
            return None if len(looks) == 1 else True

        assert uevents.wait_until(look, "x", Deadline(DEADLINE), look_again=DEADLINE)
        kernel.shutdown(socket.SHUT_RDWR)


def test_a_part_of_a_deadline_is_over_no_later_than_all_of_it() -> None:
    """And it ends, too, when nobody waits any more."""
    wanted = [True]
    deadline = Deadline(600, lambda: wanted[0])
    part = deadline.within(1)
    assert 0 < part.remaining() <= 1
    assert Deadline(1).within(600).remaining() <= 1
    wanted[0] = False
    with pytest.raises(AbandonedError):
        part.remaining()


def test_unplugging_what_is_not_there_is_success(guest: FakeGuest) -> None:
    """The host undoes what it does not know to have happened."""
    guest.scsi.unplug(SLOT, Deadline(DEADLINE))
    guest.scsi.unplug(Slot(7, 1), Deadline(DEADLINE))  # nor is its controller
    assert guest.scsi.find(Slot(7, 1)) is None


def test_a_disk_is_made_sure_of_by_its_number(guest: FakeGuest) -> None:
    """Where that leads tells the address; another disk's number, or none's, is no hindrance."""
    numbers = guest.sys / "dev/block"
    numbers.mkdir(parents=True)
    for lun, name, number in ((1, "sda", DISK), (2, "sdb", "7:16")):
        block = guest.add_disk(lun, name, number, {f"{name}1": f"7:{16 * lun + 1}"})
        (numbers / number).symlink_to(block)
        (numbers / f"7:{16 * lun + 1}").symlink_to(block / f"{name}1")
    found = guest.scsi.find(SLOT)
    assert found is not None
    assert found.name == "sda"
    for number in (DISK, "7:16", "7:17", "0:40"):
        assert guest.scsi.find(SLOT, 0, number) == found


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


class Losing(Kernel):
    """Each disk loses its driver when it has been looked at."""

    def attribute(self, path: str) -> str:
        content = super().attribute(path)
        if path.endswith("/dev"):
            shutil.rmtree(os.path.dirname(os.path.dirname(path)))
        return content


def test_a_device_whose_disk_goes_first_is_let_go_nevertheless(guest: FakeGuest) -> None:
    """As when an earlier request's time was over, and the kernel is still at it."""
    guest.add_disk(1, "sda", DISK)
    kernel = Losing(guest.kernel.sys, guest.kernel.proc, guest.kernel.dev)
    disks = ScsiDisks(kernel, guest.uevents, Threads("order", kept=0))
    with pytest.raises(RequestError, match="still has it"):
        disks.unplug(SLOT, Deadline(0.2))
    assert (guest.sysfs(1) / "delete").read_text() == "1\n"


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


@pytest.mark.root
def test_a_disk_that_becomes_free_soon_is_unplugged(guest: FakeGuest, loop: str) -> None:
    """What was unmounted a moment ago may not have let go yet."""
    guest.add_disk(1, "sda", loop)
    make_node(guest, "sda", loop)
    with claiming(guest, "sda"):
        unplug = threading.Thread(target=guest.scsi.unplug, args=(SLOT, Deadline(DEADLINE)))
        unplug.start()
        time.sleep(0.2)
        assert (guest.sysfs(1) / "delete").read_text() == ""
    wait_for_order(guest.sysfs(1) / "delete")
    guest.remove_disk(1)
    unplug.join()


def opened_by(guest: FakeGuest, pid: str, node: str) -> Path:
    """Have a process have a node open; its directory of files."""
    add_process(guest, pid, "mnt:[1]", "")
    files = guest.root / "proc" / pid / "fd"
    files.mkdir()
    (files / "3").symlink_to(f"{guest.kernel.dev}/{node}")
    return files


@pytest.mark.root
def test_a_disk_that_a_process_has_open_stays(guest: FakeGuest, loop: str) -> None:
    """What it writes would be lost, and the kernel lets anybody claim such a disk."""
    guest.add_disk(1, "sda", loop, {"sda1": PART})
    make_node(guest, "sda", loop)
    make_node(guest, "sda1", PART)
    opened_by(guest, "77", "sda1")
    with pytest.raises(RequestError, match=r"in use: process 77 \(sleeper\) has .*/sda1 open$"):
        guest.scsi.unplug(SLOT, Deadline(0.3))
    assert nothing_was_ordered(guest)


@pytest.mark.root
def test_a_disk_that_a_process_closes_soon_is_unplugged(guest: FakeGuest, loop: str) -> None:
    """A program that was ended a moment ago may not have ended yet."""
    guest.add_disk(1, "sda", loop)
    make_node(guest, "sda", loop)
    files = opened_by(guest, "77", "sda")
    unplug = threading.Thread(target=guest.scsi.unplug, args=(SLOT, Deadline(DEADLINE)))
    unplug.start()
    time.sleep(0.2)
    assert nothing_was_ordered(guest)
    (files / "3").unlink()
    wait_for_order(guest.sysfs(1) / "delete")
    guest.remove_disk(1)
    unplug.join()


@pytest.mark.root
def test_what_is_in_memory_is_written_before_the_disk_goes(
    guest: FakeGuest, loop: str, tmp_path: Path
) -> None:
    """Who closes a disk that others have open leaves it there."""
    guest.add_disk(1, "sda", loop)
    make_node(guest, "sda", loop)
    node = os.path.join(guest.kernel.dev, "sda")
    other = os.open(node, os.O_RDONLY)
    with open(node, "r+b") as disk:
        disk.write(b"precious")
    unplug = threading.Thread(target=guest.scsi.unplug, args=(SLOT, Deadline(DEADLINE)))
    unplug.start()
    wait_for_order(guest.sysfs(1) / "delete")
    with (tmp_path / "loop.raw").open("rb") as image:
        assert image.read(8) == b"precious"
    os.close(other)
    guest.remove_disk(1)
    unplug.join()


@pytest.mark.root
def test_a_disk_that_loses_what_is_in_memory_stays(
    guest: FakeGuest, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is not to be passed over as if it was released."""

    def write_back(disk: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    guest.add_disk(1, "sda", loop)
    make_node(guest, "sda", loop)
    monkeypatch.setattr(syscalls, "write_back", write_back)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RequestError, match=r"disk 0:1 \(sda\): .* is lost, .*: Input/output error"):
        guest.scsi.unplug(SLOT, Deadline(DEADLINE))
    assert nothing_was_ordered(guest)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.root
def test_a_disk_that_is_not_written_in_time_stays(
    guest: FakeGuest, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that does not answer any more."""
    written = threading.Event()
    guest.add_disk(1, "sda", loop)
    make_node(guest, "sda", loop)
    monkeypatch.setattr(syscalls, "write_back", lambda disk: written.wait(DEADLINE))
    with pytest.raises(RequestError, match=r"write back .* after 0\.3 s") as caught:
        guest.scsi.unplug(SLOT, Deadline(0.3))
    assert caught.value.code == HResult.TIMEOUT
    written.set()
    while any(thread.name == "order" for thread in threading.enumerate()):
        time.sleep(0.01)
    assert nothing_was_ordered(guest)


@pytest.mark.root
def test_a_disk_under_a_loop_device_stays(guest: FakeGuest, loop: str) -> None:
    """Which does not hold it exclusively, and may be mounted."""
    guest.add_disk(1, "sda", loop)
    make_node(guest, "sda", loop)
    over = guest.sys / "devices/virtual/block/loop5/loop"
    over.mkdir(parents=True)
    (over / "backing_file").write_text(f"{guest.kernel.dev}/sda\n")
    with pytest.raises(RequestError, match="in use: sda is part of loop5"):
        guest.scsi.unplug(SLOT, Deadline(0.2))


@pytest.mark.root
def test_a_holder_that_nobody_knows_is_one_nevertheless(guest: FakeGuest, loop: str) -> None:
    """The kernel's refusal counts, not our search."""
    guest.add_disk(1, "sda", loop)
    make_node(guest, "sda", loop)
    with claiming(guest, "sda"), pytest.raises(RequestError, match="in use: something in the"):
        guest.scsi.unplug(SLOT, Deadline(0.2))


def wait_for_order(path: Path) -> str:
    """What is written to an attribute."""
    end = time.monotonic() + DEADLINE
    while not (order := path.read_text()) and time.monotonic() < end:
        time.sleep(0.01)
    return order


def nothing_was_ordered(guest: FakeGuest) -> bool:
    orders = (guest.sysfs(1) / "delete", guest.sysfs(1) / "rescan", guest.scan)
    return all(path.read_text() == "" for path in orders)


MEANT = Identity("new", 4 * 512)


@pytest.mark.root
@pytest.mark.parametrize("meant", [MEANT, Identity("new"), Identity(size=4 * 512), Identity()])
def test_a_disk_is_proved_by_what_the_host_says_of_it(
    guest: FakeGuest, loop: str, meant: Identity
) -> None:
    """Its serial and size, as far as the host is sure of them."""
    guest.add_disk(1, "sda", loop, serial="new", sectors=4)
    make_node(guest, "sda", loop)
    assert Waiter(guest, identity=meant).result().name == "sda"
    assert nothing_was_ordered(guest)


@pytest.mark.root
@pytest.mark.parametrize("meant", [MEANT, Identity(size=4 * 512)])
def test_a_stale_device_is_let_go_and_the_disk_found(
    guest: FakeGuest, loop: str, meant: Identity
) -> None:
    """The kernel missed that another disk came to the address."""
    guest.add_disk(1, "sda", loop, serial="old", sectors=2)
    make_node(guest, "sda", loop)
    waiter = Waiter(guest, identity=meant)
    assert wait_for_order(guest.sysfs(1) / "delete") == "1\n"
    guest.remove_disk(1)
    assert wait_for_order(guest.scan) == "0 0 1\n"
    make_node(guest, "sdb", DISK)
    guest.add_disk(1, "sdb", DISK, serial="new", sectors=4)
    assert waiter.result().name == "sdb"


@pytest.mark.root
def test_a_disk_that_is_another_is_refused_and_both_are_named(guest: FakeGuest, loop: str) -> None:
    """Its device was asked anew: that is not stale, it is wrong."""
    guest.add_disk(1, "sda", loop, serial="old", sectors=2)
    make_node(guest, "sda", loop)
    waiter = Waiter(guest, identity=MEANT)
    wait_for_order(guest.sysfs(1) / "delete")
    guest.remove_disk(1)
    wait_for_order(guest.scan)
    make_node(guest, "sdb", DISK)
    guest.add_disk(1, "sdb", DISK, serial="old", sectors=2)
    with pytest.raises(RequestError) as caught:
        waiter.result()
    assert str(caught.value) == (
        "disk 0:1 (sdb) is not the disk that is meant: its serial is 'old', not 'new' and "
        "its size is 1,024 bytes, not 2,048; nothing was done to it"
    )
    assert caught.value.code == HResult.WRONG_DISK


@pytest.mark.root
def test_a_stale_device_whose_disk_never_shows_is_told_of(guest: FakeGuest, loop: str) -> None:
    """Two things were wrong, and both are said."""
    guest.add_disk(1, "sda", loop, serial="old", sectors=4)
    make_node(guest, "sda", loop)
    waiter = Waiter(guest, identity=MEANT, seconds=0.5)
    wait_for_order(guest.sysfs(1) / "delete")
    guest.remove_disk(1)
    with pytest.raises(RequestError, match=r"no disk at .*'old', not 'new'") as caught:
        waiter.result()
    assert caught.value.code == HResult.WRONG_DISK


@pytest.mark.root
def test_a_stale_device_in_use_is_left_alone(guest: FakeGuest, loop: str) -> None:
    """At once, with the words on what differs and who uses it."""
    block = guest.add_disk(1, "sda", loop, serial="old", sectors=4)
    make_node(guest, "sda", loop)
    (block / "holders/dm-0").mkdir(parents=True)
    with claiming(guest, "sda"), pytest.raises(RequestError) as caught:
        Waiter(guest, identity=MEANT, seconds=600).result()
    assert str(caught.value) == (
        "disk 0:1 (sda) is not the disk that is meant: its serial is 'old', not 'new'; to look "
        "for that, it has to be let go, and it is in use: sda is part of dm-0"
    )
    assert caught.value.code == HResult.WRONG_DISK
    assert nothing_was_ordered(guest)


@pytest.mark.root
def test_a_stale_device_that_a_process_has_open_is_left_alone(guest: FakeGuest, loop: str) -> None:
    """What it wrote and is not on the disk yet would be written to the new one."""
    guest.add_disk(1, "sda", loop, serial="old", sectors=4)
    make_node(guest, "sda", loop)
    opened_by(guest, "77", "sda")
    with pytest.raises(RequestError, match=r"process 77 \(sleeper\) has .*/sda open"):
        Waiter(guest, identity=MEANT, seconds=600).result()
    assert nothing_was_ordered(guest)


@pytest.mark.root
def test_a_disk_without_a_serial_is_no_proof(guest: FakeGuest, loop: str) -> None:
    """Asked again it may tell; if it does not, it is refused."""
    guest.add_disk(1, "sda", loop, serial="", sectors=4)
    make_node(guest, "sda", loop)
    waiter = Waiter(guest, identity=MEANT)
    wait_for_order(guest.sysfs(1) / "delete")
    guest.remove_disk(1)
    wait_for_order(guest.scan)
    make_node(guest, "sdb", DISK)
    guest.add_disk(1, "sdb", DISK)
    with pytest.raises(RequestError, match="serial is not known to this guest's kernel, not 'new'"):
        waiter.result()


@pytest.mark.root
def test_a_disk_that_has_grown_is_asked_for_its_size_again(guest: FakeGuest, loop: str) -> None:
    """The kernel keeps the size, too, as it was when it found the disk.

    Both attributes are pipes here, whose reader and writer wait for each other: what is read
    before the order and what after it is settled, however the threads run.
    """
    block = guest.add_disk(1, "sda", loop, serial="new", sectors=2)
    make_node(guest, "sda", loop)
    size, rescan = block / "size", guest.sysfs(1) / "rescan"
    for attribute in (size, rescan):
        attribute.unlink()
        os.mkfifo(attribute)
    waiter = Waiter(guest, identity=MEANT)
    size.write_text("2\n")
    assert rescan.read_text() == "1\n"
    size.write_text("4\n")
    assert waiter.result().name == "sda"


@pytest.mark.root
def test_the_name_of_a_disk_that_is_held_is_given_to_no_other(guest: FakeGuest, loop: str) -> None:
    """Which is so while the disk is open."""
    guest.add_disk(1, "sda", loop)
    make_node(guest, "sda", loop)
    before = len(os.listdir("/proc/self/fd"))
    with guest.scsi.hold(SLOT, 0, Deadline(DEADLINE)) as device:
        assert device.name == "sda"
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
