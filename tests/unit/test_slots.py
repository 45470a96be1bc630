"""Rule 5: slots are given out lowest first, and never somebody else's."""

from __future__ import annotations

import pytest
from support.memory import EXT4, VM, A, B

from hotlun import (
    Manager,
    NoAvailableLocationError,
    Slot,
    SlotState,
    SlotTakenError,
)
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.slots import SlotTable


async def test_lowest_first() -> None:
    """Controller 0 LUN 0, 1, then controller 1; what comes back is given out again first."""
    async with VM(controllers=2, luns_per_controller=2) as vm:
        mounts = [await vm.add(f"/d/{n}.img") for n in range(4)]
        assert [m.slot for m in mounts] == [Slot(0, 0), Slot(0, 1), Slot(1, 0), Slot(1, 1)]
        assert [(m.controller, m.lun) for m in mounts][2] == (1, 0)
        await mounts[3].release()
        await mounts[1].release()
        assert (await vm.add(A)).slot == Slot(0, 1)


async def test_none_is_free() -> None:
    """An error before any I/O, and the path of the failed add is free again."""
    async with VM(controllers=1, luns_per_controller=1) as vm:
        first = await vm.add(A)
        vm.said()
        with pytest.raises(NoAvailableLocationError):
            await vm.add(B, guest_path="/m")
        assert vm.said() == []
        await first.release()
        assert (await vm.add(B, guest_path="/m")).slot == Slot(0, 0)


async def test_reserved_slots_are_never_given_out_nor_detached() -> None:
    """The caller's, and those that the host says are occupied."""
    host = MemoryHostBackend(occupied=[Slot(0, 1), Slot(9, 9)])
    guest = MemoryGuestBackend(host)
    async with Manager(
        host, guest, controllers=1, luns_per_controller=4, reserved_slots=[Slot(0, 0)]
    ) as manager:
        mount = await manager.add_virtual_disk(A)
        assert mount.slot == Slot(0, 2)
        states = [status.state for status in manager.slots()]
        assert states == ["reserved", "reserved", "taken", "free"]
        assert all(status.reason for status in manager.slots()[:2])
    assert [call.operation for call in host.calls] == ["attach", "detach"]


async def test_a_slot_that_turns_out_taken_is_reserved_and_the_next_is_tried() -> None:
    """With a serial of its own for each try."""
    host = MemoryHostBackend(taken=[Slot(0, 0), Slot(0, 1)])
    guest = MemoryGuestBackend(host)
    async with Manager(host, guest) as manager:
        mount = await manager.add_virtual_disk(A, mount=EXT4)
        assert mount.slot == Slot(0, 2)
        assert [s.state for s in manager.slots()[:3]] == ["reserved", "reserved", "taken"]
        serials = {getattr(call.subject, "serial", "") for call in host.calls}
        assert len(serials) == 3
    assert manager.slots()[0].state is SlotState.RESERVED


async def test_the_last_candidate_was_refused() -> None:
    """No slot is left: what was granted is revoked, and the cause is told."""
    host = MemoryHostBackend(taken=[Slot(0, 0)])
    guest = MemoryGuestBackend(host)
    async with Manager(host, guest, controllers=1, luns_per_controller=1) as manager:
        with pytest.raises(NoAvailableLocationError) as caught:
            await manager.add_virtual_disk(A, vm_id="vm")
        assert isinstance(caught.value.__cause__, SlotTakenError)
        assert host.granted == set()


async def test_controllers_that_the_guest_cannot_use_are_never_chosen() -> None:
    """A Windows guest sees controller 0 only."""
    guest = MemoryGuestBackend(os_type="windows", controllers=1)
    async with Manager(MemoryHostBackend(), guest, controllers=2, luns_per_controller=1) as manager:
        await manager.add_virtual_disk(A)
        with pytest.raises(NoAvailableLocationError):
            await manager.add_virtual_disk(B)
        assert manager.slots()[1].state is SlotState.RESERVED


@pytest.mark.parametrize(
    ("controllers", "usable", "advice"),
    [
        (2, None, "start the VM with more controllers"),
        (2, 4, "start the VM with more controllers"),
        (4, 4, "take another VM: this guest uses no controller above 3"),
        (4, 1, "take another VM: this guest uses no controller above 0"),
        (1, 1, "take another VM: this guest uses no controller above 0"),
    ],
)
def test_a_full_vm_is_told_what_would_help(
    controllers: int, usable: int | None, advice: str
) -> None:
    """More controllers are of no use to a guest that has all it can use."""
    slots = SlotTable(controllers, 1, usable)
    for _ in range(min(controllers, usable or controllers)):
        slots.take()
    with pytest.raises(NoAvailableLocationError, match=f"release a disk, or {advice}"):
        slots.take()


async def test_the_snapshot_has_one_entry_a_slot(vm: VM) -> None:
    """In order, with the attachment, what is mounted from it, and how many hold it."""
    mount = await vm.add()
    statuses = vm.manager.slots()
    assert [s.slot for s in statuses] == sorted(s.slot for s in statuses)
    assert len(statuses) == 4 * 64
    first = statuses[0]
    assert first.attachment is not None
    assert first.attachment.serial == mount.serial
    assert [m.path for m in first.guest_mounts] == [mount.guest_path]
    assert (first.state, first.holders, first.reason) == ("taken", 1, "")
    assert statuses[1].state == "free"
    assert statuses[1].attachment is None
