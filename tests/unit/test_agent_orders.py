"""A disk loses its driver before its device goes, and no other one does."""

from __future__ import annotations

import errno
import itertools
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

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
from hotlun.bridge import documents, messages
from hotlun.bridge.codes import HResult
from hotlun.bridge.frames import FrameDecoder
from hotlun.bridge.messages import MessageType

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

DISK = DISKS[0]
_SIGNED = {"minimum": -1 << 31, "maximum": (1 << 31) - 1}
_TIMEOUT = HResult.TIMEOUT - (1 << 32)
DRIVER = "/sys/bus/scsi/drivers/sd"
MOUNT = {
    "RequestType": "Add",
    "ResourceType": "MappedVirtualDisk",
    "Settings": {"MountPath": "/run/mounts/m0"},
}
UNPLUG = {"RequestType": "Remove", "ResourceType": "SCSIDevice", "Settings": {}}


@pytest.fixture
def target() -> Iterator[Target]:
    target = Target()
    with target.listening():
        yield target


def unplug(target: Target, faults: Mapping[int, int] = MappingProxyType({})) -> list[str]:
    """Have the disk at 0:0 unplugged; what was wrong with that."""
    return ask(target, [UNPLUG], faults)


def ask(
    target: Target, requests: list[dict[str, Any]], faults: Mapping[int, int] = MappingProxyType({})
) -> list[str]:
    """Ask for things one after another; what was wrong with how that went."""
    talk = [Message(MessageType.NEGOTIATE_PROTOCOL, 1, messages.negotiate_request())]
    for number, request in enumerate(requests, 2):
        document = messages.modify_request(request)
        talk.append(Message(MessageType.MODIFY_SETTINGS, number, document))
    writes = tuple(encoded(message) for message in talk)
    return target.feed(Input(0, writes, drops=False, by_socket=False, faults=faults, luck=7))


def results(target: Target) -> list[int]:
    """What was answered to each request, as the code."""
    frames = FrameDecoder().feed(target.answers)[1:]
    return [documents.decode(frame.payload).integer("Result", **_SIGNED) for frame in frames]


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


def test_a_disk_without_its_driver_is_mounted(target: Target) -> None:
    """It was to go, and stayed: whoever was to let it go died, or the kernel did not."""
    device = target.guest.device(DISK)
    assert device is not None
    device.entries["delete"].ordered = lambda _: None
    assert ask(target, [UNPLUG, MOUNT]) == []
    assert results(target)[1] == 0
    assert "/run/mounts/m0" in target.guest.changes()


def test_a_disk_that_the_kernel_does_not_know_of_is_looked_for(target: Target) -> None:
    """It has missed it, or an agent was killed before it could say that."""
    assert ask(target, [UNPLUG, MOUNT]) == []
    assert results(target) == [0, 0]
    assert target.guest.device(DISK) is not None


def test_a_disk_loses_its_driver_only_if_it_goes(target: Target) -> None:
    """Whatever the agent is short of at each of its steps."""
    for step in itertools.count():
        assert unplug(target, {step: errno.EMFILE}) == []
        if not target.guest.injected:
            break
        device = target.guest.device(DISK)
        if device is not None and results(target) != [_TIMEOUT]:
            assert "block" in device.entries, f"step {step}"


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
