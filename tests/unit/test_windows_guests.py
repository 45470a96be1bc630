"""A Manager over a guest that runs Windows: controller 0, no options, and clear refusals."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from support.windows_guest import REFUSED

from hotlun import (
    GuestPathConflictError,
    Manager,
    MountConfig,
    NoAvailableLocationError,
    Resolution,
    Slot,
    SlotState,
    UnsupportedError,
)
from hotlun.backends import base
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.journal import MemoryJournal
from hotlun.model import GuestSurvey

if TYPE_CHECKING:
    from collections.abc import Iterable

NTFS = MountConfig()
SCRATCH = MountConfig(container_scratch=True)


class Windows:
    """A VM in memory that runs it.

    Args:
        surveys: whether its guest can be asked what it has, other than a real one.
        taken: slots that turn out to be somebody else's.
    """

    def __init__(self, *, surveys: bool | None = None, taken: Iterable[Slot] = ()) -> None:
        self.host = MemoryHostBackend(taken=taken)
        self.guest = MemoryGuestBackend(self.host, os_type="windows", surveys=surveys)
        self.guest.calls = self.host.calls  # one order over both

    def manager(self, **arguments: Any) -> Manager:
        return Manager(self.host, self.guest, **arguments)

    def said(self) -> list[str]:
        return [call.operation for call in self.host.calls if call.operation != "survey"]


async def test_64_disks_fill_it() -> None:
    """All on controller 0; the next one finds no place, and nothing is done for it."""
    vm = Windows()
    async with vm.manager() as manager:
        mounts = [await manager.add_virtual_disk(f"/{n}.vhdx", mount=NTFS) for n in range(64)]
        assert [mount.slot for mount in mounts] == [Slot(0, lun) for lun in range(64)]
        said = vm.said()
        with pytest.raises(NoAvailableLocationError, match="uses no controller above 0"):
            await manager.add_virtual_disk("/64.vhdx")
        assert vm.said() == said
        states = {status.state for status in manager.slots() if status.slot.controller}
        assert states == {SlotState.RESERVED}


async def test_a_taken_slot_is_passed_over_on_its_controller() -> None:
    """Not for one that the guest cannot use."""
    vm = Windows(taken=[Slot(0, 0)])
    async with vm.manager(luns_per_controller=2) as manager:
        assert (await manager.add_virtual_disk("/a.vhdx", mount=NTFS)).slot == Slot(0, 1)
        with pytest.raises(NoAvailableLocationError):
            await manager.add_virtual_disk("/b.vhdx")


async def test_slots_that_it_cannot_use_can_be_reserved() -> None:
    """And its boot disk's, which it can."""
    async with Windows().manager(reserved_slots=[Slot(0, 0), Slot(3, 5)]) as manager:
        assert (await manager.add_virtual_disk("/a.vhdx")).slot == Slot(0, 1)


async def test_paths_are_windows() -> None:
    """Generated with the lowest number, and in conflict whatever their case."""
    async with Windows().manager() as manager:
        mount = await manager.add_virtual_disk("/a.vhdx", mount=NTFS, guest_path=r"C:/Mounts/A")
        assert mount.guest_path == r"C:\Mounts\A"
        with pytest.raises(GuestPathConflictError):
            await manager.add_virtual_disk("/b.vhdx", mount=NTFS, guest_path=r"c:\mounts\a\b")
        for number in (0, 1):
            mount = await manager.add_virtual_disk(f"/{number}.vhdx", mount=NTFS)
            assert mount.guest_path == rf"c:\mounts\scsi\m{number}"


async def test_is_undone_in_order() -> None:
    """An unplug is asked for, and needs nothing from this guest."""
    vm = Windows()
    async with vm.manager() as manager:
        await (await manager.add_virtual_disk("/a.vhdx", mount=SCRATCH)).release()
    assert vm.said() == ["attach", "mount", "unmount", "unplug", "detach"]


async def test_a_scratch_is_shared_by_nobody_who_asks_otherwise() -> None:
    """It may format."""
    async with Windows().manager() as manager:
        one = await manager.add_virtual_disk("/a.vhdx", mount=SCRATCH)
        two = await manager.add_virtual_disk("/a.vhdx", mount=SCRATCH)
        assert one.guest_path == two.guest_path
        with pytest.raises(Exception, match="may format"):
            await manager.add_virtual_disk("/a.vhdx", mount=NTFS)


async def test_survives_in_a_journal() -> None:
    """With the scratch's config."""
    vm, journal = Windows(), MemoryJournal()
    async with vm.manager(journal=journal) as manager:
        first = await manager.add_virtual_disk("/a.vhdx", mount=SCRATCH)
    async with vm.manager(journal=journal) as manager:
        (again,) = manager.mounts
        assert (again.id, again.config, again.slot) == (first.id, SCRATCH, Slot(0, 0))
        await again.release()


async def test_a_scratch_that_was_unmounted_is_lost_and_not_formatted_again() -> None:
    """What it held may still be on the disk. No guest of today can tell; one may yet."""
    vm = Windows(surveys=True)
    async with vm.manager() as manager:
        scratch = await manager.add_virtual_disk("/a.vhdx", mount=SCRATCH)
        plain = await manager.add_virtual_disk("/b.vhdx", mount=NTFS)
        for path in (scratch.guest_path, plain.guest_path):
            assert path is not None
            vm.guest.vanish(path)
        found = {one.guest_path: one.resolution for one in await manager.reconcile()}
        assert found == {
            scratch.guest_path: Resolution.LOST,
            plain.guest_path: Resolution.REMOUNTED,
        }
        assert "would format it again" in scratch.lost
        assert not plain.lost
        await scratch.release()
        assert (await manager.add_virtual_disk("/a.vhdx", mount=SCRATCH)).lost == ""
    assert vm.said().count("mount") == 4
    assert vm.host.violations == vm.guest.violations == []


def test_every_field_is_refused_but_one() -> None:
    """A new one has to be thought of here."""
    names = {field.name for field in dataclasses.fields(MountConfig) if field.init}
    assert REFUSED.keys() == names - {"container_scratch"}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_it_cannot_do_is_refused_before_anything_is_touched(name: str) -> None:
    """No access is granted, nothing attached, no slot taken."""
    vm = Windows()
    async with vm.manager() as manager:
        with pytest.raises(UnsupportedError, match=rf"does not know .*{name}.*leave that out"):
            await manager.add_virtual_disk(
                "/a.vhdx", mount=MountConfig(**REFUSED[name]), vm_id="vm", read_only=True
            )
        assert vm.said() == []
        assert manager.slots()[0].state is SlotState.FREE


async def test_a_linux_guest_knows_no_scratch() -> None:
    """Nor is anything touched there."""
    host = MemoryHostBackend()
    async with Manager(host, MemoryGuestBackend(host)) as manager:
        with pytest.raises(UnsupportedError, match="Linux guest does not know container_scratch"):
            await manager.add_virtual_disk("/a.vhdx", mount=SCRATCH, vm_id="vm")
    assert host.calls == []


async def test_a_guest_in_memory_has_what_the_real_one_has() -> None:
    """One controller, and no answer to what it has; and what a test wants instead."""
    assert base.usable_controllers(MemoryGuestBackend(os_type="windows")) == 1
    assert base.usable_controllers(MemoryGuestBackend(os_type="windows", controllers=2)) == 2
    assert base.usable_controllers(MemoryGuestBackend()) is None
    assert await base.guest_survey(MemoryGuestBackend(os_type="windows"), (), ()) is None
    for guest in (MemoryGuestBackend(), MemoryGuestBackend(os_type="windows", surveys=True)):
        assert await base.guest_survey(guest, (), ()) == GuestSurvey()
    assert await base.guest_survey(MemoryGuestBackend(surveys=False), (), ()) is None
