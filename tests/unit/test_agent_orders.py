"""A disk loses its driver before its device goes, and no other one does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fuzz.grammar import Message
from fuzz.guest.machine import DISKS
from fuzz.inputs import Input
from fuzz.mutation import encoded
from fuzz.target import Target
from support.guest import FakeGuest

from hotlun.agent.orders import Orders
from hotlun.agent.threads import Threads
from hotlun.agent.uevents import Deadline
from hotlun.bridge import messages
from hotlun.bridge.messages import MessageType

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DISK = DISKS[0]
DRIVER = "/sys/bus/scsi/drivers/sd"
UNPLUG = {"RequestType": "Remove", "ResourceType": "SCSIDevice", "Settings": {}}


@pytest.fixture
def target() -> Iterator[Target]:
    target = Target()
    with target.listening():
        yield target


def unplug(target: Target) -> list[str]:
    """Have the disk at 0:0 unplugged; what was wrong with that."""
    talk = (
        Message(MessageType.NEGOTIATE_PROTOCOL, 1, messages.negotiate_request()),
        Message(MessageType.MODIFY_SETTINGS, 2, messages.modify_request(UNPLUG)),
    )
    writes = tuple(encoded(message) for message in talk)
    return target.feed(Input(0, writes, drops=False, by_socket=False, faults={}, luck=7))


def test_the_driver_goes_before_the_device(target: Target) -> None:
    """That is what the waits of several disks may overlap in."""
    guest = target.guest
    unbind = guest.tree.walk(f"{DRIVER}/unbind").node
    kernel, seen = unbind.ordered, []

    def ordered(address: bytes) -> None:
        assert kernel is not None
        kernel(address)
        device = guest.device(DISK)
        assert device is not None
        seen.append((address.decode(), "block" in device.entries))

    unbind.ordered = ordered
    assert unplug(target) == []
    assert seen == [(DISK.address, False)]
    assert guest.device(DISK) is None


def test_a_disk_that_comes_at_that_moment_gets_its_driver_back(target: Target) -> None:
    """The driver is told an address, at which another may be by then."""
    guest = target.guest
    unbind = guest.tree.walk(f"{DRIVER}/unbind").node
    kernel = unbind.ordered

    def ordered(address: bytes) -> None:
        guest.unplug(DISK)
        guest.plug(DISK, serial="another")
        assert kernel is not None
        kernel(address)

    unbind.ordered = ordered
    assert unplug(target) == []
    device = guest.device(DISK)
    assert device is not None
    assert "block" in device.entries


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeGuest]:
    guest = FakeGuest(tmp_path)
    yield guest
    guest.close()


def test_a_disk_that_came_while_the_old_one_was_written_back_is_left_alone(
    fake: FakeGuest,
) -> None:
    """That can take long; who has come meanwhile may be mounted."""
    fake.add_disk(1, "sda", "8:0")
    unbind = fake.sys / "bus/scsi/drivers/sd/unbind"
    unbind.parent.mkdir(parents=True)
    unbind.write_text("")

    def another_comes() -> None:
        fake.sysfs(1).rename(fake.sysfs(1).with_name("old"))
        fake.add_disk(1, "sdb", "8:16")

    orders = Orders(fake.kernel, fake.uevents, Threads("orders"))
    path = str(fake.sysfs(1))
    assert orders.delete(path, lambda: True, Deadline(5), another_comes)
    assert unbind.read_text() == ""
    assert (fake.sysfs(1) / "block/sdb").is_dir()
