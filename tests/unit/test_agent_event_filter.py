"""The kernel wakes the agent for block devices' events only."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from hotlun.agent.event_filter import only_block_devices

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE = "/devices/pci0000:00/0000:00:10.0/virtio2/host0/target0:0:0/0:0:0:5"
HYPER_V = (
    "/devices/LNXSYSTM:00/LNXSYBUS:00/ACPI0004:00/VMBUS:00/"
    "f8b3781a-1e82-4818-a1c3-63d806ec15bb/host0/target0:0:0/0:0:0:5"
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Who sends events, and who hears those that are let through."""
    sender, hearer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender, hearer:
        only_block_devices(hearer)
        hearer.setblocking(False)
        yield sender, hearer


def event(action: str, path: str, subsystem: str) -> bytes:
    words = (f"{action}@{path}", f"ACTION={action}", f"DEVPATH={path}", f"SUBSYSTEM={subsystem}")
    return b"".join(word.encode() + b"\0" for word in (*words, "SEQNUM=1234"))


@pytest.mark.parametrize(
    "path",
    [
        f"{DEVICE}/block/sda",
        f"{DEVICE}/block/sda/sda1",
        f"{HYPER_V}/block/sdaa",
        "/devices/virtual/block/dm-0",
        "/devices/" + 8 * "pci0000:00/0000:00:10.0/" + "virtio2/host0/0:0:0:5/block/sda",
        "/devices/" + 60 * "pci0000:00/0000:00:10.0/" + "virtio2/host0/0:0:0:5/block/sda",
    ],
)
@pytest.mark.parametrize("action", ["add", "remove", "change"])
def test_a_block_device_is_heard_of(
    pair: tuple[socket.socket, socket.socket], action: str, path: str
) -> None:
    """The whole event, however deep in the tree the device is."""
    sender, hearer = pair
    sent = event(action, path, "block")
    sender.send(sent)
    assert hearer.recv(1 << 16) == sent


@pytest.mark.parametrize(
    ("path", "subsystem"),
    [
        (DEVICE, "scsi"),
        (f"{DEVICE}/scsi_device/0:0:0:5", "scsi_device"),
        (f"{DEVICE}/scsi_disk/0:0:0:5", "scsi_disk"),
        (f"{DEVICE}/bsg/0:0:0:5", "bsg"),
        ("/devices/virtual/bdi/8:0", "bdi"),
        ("/devices", ""),
        ("/kernel/slab/blkdev", "slab"),
    ],
)
def test_other_devices_wake_nobody(
    pair: tuple[socket.socket, socket.socket], path: str, subsystem: str
) -> None:
    """What tells of a disk before and after its block device, and of whatever else."""
    sender, hearer = pair
    sender.send(event("add", path, subsystem))
    with pytest.raises(BlockingIOError):
        hearer.recv(1 << 16)
