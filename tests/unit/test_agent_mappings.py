"""Layers over a partition: found by name, closed from the outside in, and never those of others."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
from support.guest import FakeGuest
from support.mapper import LIST, FakeMapper

from hotlun.agent.block_devices import BlockDevice
from hotlun.agent.devmapper import DeviceMapper, Table
from hotlun.agent.disks import Disks
from hotlun.agent.errors import RequestError
from hotlun.agent.mappings import Layers, Mappings
from hotlun.agent.settings import DiskSettings, Slot
from hotlun.agent.uevents import Deadline
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import Fields

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLOT = Slot(0, 1)
LAYERS = Layers.over(SLOT, 0)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    guest = FakeGuest(tmp_path / "guest")
    yield guest
    guest.close()


@pytest.fixture
def kernel() -> FakeMapper:
    return FakeMapper()


@pytest.fixture
def mappings(guest: FakeGuest, kernel: FakeMapper) -> Mappings:
    return Mappings(guest.kernel, DeviceMapper(guest.kernel, kernel), guest.uevents)


def put(guest: FakeGuest, mappings: Mappings, name: str, below: Path) -> BlockDevice:
    """A mapped device, as sysfs has it too."""
    number = mappings.mapper.create(name, Table(8, "linear", "8:0 0"))
    minor = number.partition(":")[2]
    block = guest.sys / f"devices/virtual/block/dm-{minor}"
    (block / "slaves").mkdir(parents=True)
    (block / "slaves" / below.name).symlink_to(os.path.relpath(below, block / "slaves"))
    (guest.sys / "dev/block").mkdir(parents=True, exist_ok=True)
    (guest.sys / "dev/block" / number).symlink_to(f"../../devices/virtual/block/dm-{minor}")
    return mappings.device(SLOT, number)


def test_names_tell_slot_partition_and_layer() -> None:
    """And no two that differ are alike."""
    assert LAYERS.crypt == "hotlun-0-1-p0-crypt"
    names = [
        name
        for controller, lun, partition in [(0, 1, 0), (0, 11, 0), (1, 1, 0), (0, 1, 1), (0, 1, 10)]
        for name in Layers.over(Slot(controller, lun), partition)
    ]
    assert len(set(names)) == len(names)


def test_the_outermost_layer_is_what_is_used(guest: FakeGuest, mappings: Mappings) -> None:
    """Whichever was made last; one without a table is none."""
    disk = guest.add_disk(1, "sda", "8:0")
    assert mappings.top(SLOT, 0) is None
    integrity = put(guest, mappings, LAYERS.integrity, disk)
    assert mappings.top(SLOT, 0) == integrity
    mappings.mapper.define(LAYERS.crypt)
    assert mappings.top(SLOT, 0) == integrity
    assert mappings.top(SLOT, 1) is None
    assert mappings.top(Slot(0, 11), 0) is None


def test_what_lies_over_a_disk_lies_over_no_other(guest: FakeGuest, mappings: Mappings) -> None:
    """Through all layers; also not when that disk is gone, and another has its slot."""
    disk = guest.add_disk(1, "sda", "8:0")
    other = guest.add_disk(2, "sdb", "8:16")
    put(guest, mappings, LAYERS.integrity, disk)
    crypt = put(guest, mappings, LAYERS.crypt, guest.sys / "devices/virtual/block/dm-0")
    on_disk, on_other = (
        BlockDevice(SLOT, path.name, f"/dev/{path.name}", "", str(path)) for path in (disk, other)
    )
    assert mappings.lies_over(crypt, on_disk)
    assert not mappings.lies_over(crypt, on_other)
    (guest.sys / "devices/virtual/block/dm-0/slaves/sda").unlink()
    assert not mappings.lies_over(crypt, on_disk)


def test_layers_are_closed_from_the_outside_in(
    guest: FakeGuest, mappings: Mappings, kernel: FakeMapper
) -> None:
    """Those of this partition; those of others stay, and none is success."""
    disk = guest.add_disk(1, "sda", "8:0")
    neighbour, stranger = Layers.over(SLOT, 1).crypt, "hotlun-0-1-p0-theirs"
    for name in (LAYERS.integrity, stranger, LAYERS.crypt, neighbour):
        put(guest, mappings, name, disk)
    mappings.close(SLOT, 0, Deadline(0))
    assert list(kernel.devices) == [stranger, neighbour]
    mappings.close(SLOT, 0, Deadline(0))


def test_without_older_ones_the_kernel_is_not_asked(
    guest: FakeGuest, mappings: Mappings, kernel: FakeMapper
) -> None:
    """It was once. From when some of a slot's are to be made, it is asked about that slot."""
    (guest.root / "proc/locks").write_text("")
    assert mappings.top(SLOT, 0) is None
    kernel.refused.add(LIST)
    assert mappings.top(SLOT, 0) is None
    mappings.close(SLOT, 0, Deadline(0))
    mappings.close_unused(SLOT, Deadline(0))
    mappings.expect(SLOT)
    with pytest.raises(RequestError, match="could not be looked for"):
        mappings.close(SLOT, 0, Deadline(0))
    mappings.close(Slot(0, 2), 0, Deadline(0))


@pytest.mark.parametrize("locks", ["", "1: OFDLCK ADVISORY  READ  -1 00:06:321 0 EOF\n"])
def test_older_ones_are_found(
    guest: FakeGuest, mappings: Mappings, kernel: FakeMapper, locks: str
) -> None:
    """Those that are there, and those that a program which is still at work will make."""
    (guest.root / "proc/locks").write_text(locks)
    disk = guest.add_disk(1, "sda", "8:0")
    if locks:
        assert mappings.top(SLOT, 0) is None
    put(guest, mappings, Layers.over(Slot(0, 2), 0).crypt, disk)
    put(guest, mappings, LAYERS.crypt, disk)
    (guest.root / "proc/locks").write_text("")
    for slot in (Slot(0, 2), SLOT):
        assert mappings.top(slot, 0) is not None
        mappings.close(slot, 0, Deadline(0))
    assert not kernel.devices


def test_a_layer_in_use_is_waited_for(
    guest: FakeGuest, mappings: Mappings, kernel: FakeMapper
) -> None:
    """Until it is free, or the deadline has passed: then the error names it."""
    disk = guest.add_disk(1, "sda", "8:0")
    put(guest, mappings, LAYERS.crypt, disk)
    kernel.busy.add(LAYERS.crypt)
    with pytest.raises(RequestError, match=f"{LAYERS.crypt} cannot be closed") as caught:
        mappings.close(SLOT, 0, Deadline(0.1))
    assert caught.value.code == HResult.INVALID_STATE
    threading.Timer(0.1, kernel.busy.clear).start()
    mappings.close(SLOT, 0, Deadline(20))
    assert not kernel.devices


def test_what_is_off_its_path_was_not_refused(
    guest: FakeGuest, mappings: Mappings, kernel: FakeMapper, tmp_path: Path
) -> None:
    """Of an unmount that ends at a layer in use nobody is to believe that all is as it was."""
    disk, path = guest.add_disk(1, "sda", "8:0"), tmp_path / "m0"
    device = put(guest, mappings, LAYERS.crypt, disk)
    disks = Disks(guest.kernel, guest.scsi, mappings, guest.mounts)
    request = Fields({"MountPath": str(path), "Lun": 1, "BlockDev": True})
    settings = DiskSettings.read(request, adding=False)
    path.symlink_to(device.node)
    kernel.busy.add(LAYERS.crypt)
    with pytest.raises(RequestError, match=f"cannot be closed.*not at {path} any more") as caught:
        disks.unmount(settings)
    assert caught.value.code == HResult.TIMEOUT
    assert not path.is_symlink()
    kernel.busy.clear()
    disks.unmount(settings)
    assert not kernel.devices


def test_lazily_nothing_is_waited_for(
    guest: FakeGuest, mappings: Mappings, kernel: FakeMapper
) -> None:
    """The kernel removes it when its last user is gone."""
    put(guest, mappings, LAYERS.crypt, guest.add_disk(1, "sda", "8:0"))
    kernel.busy.add(LAYERS.crypt)
    mappings.close(SLOT, 0, Deadline(20), lazy=True)
    assert list(kernel.devices) == [LAYERS.crypt]


def test_what_is_unused_is_closed_and_the_rest_stays(
    guest: FakeGuest, mappings: Mappings, kernel: FakeMapper
) -> None:
    """Of one partition what verifies it may have a link to it; at the end it goes, too."""
    disk = guest.add_disk(1, "sda", "8:0")
    others = Layers.over(SLOT, 2)
    for name in (LAYERS.verity, LAYERS.crypt, LAYERS.luks, others.crypt):
        put(guest, mappings, name, disk)
    kernel.busy.add(LAYERS.crypt)
    mappings.close_unused(SLOT, Deadline(0), 0)
    assert list(kernel.devices) == [LAYERS.verity, LAYERS.crypt, others.crypt]
    mappings.close_unused(SLOT, Deadline(0))
    assert list(kernel.devices) == [LAYERS.crypt]
