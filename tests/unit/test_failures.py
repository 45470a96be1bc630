"""Rules 7, 8 and 16: failed is undone, unknown is not failed, and no clean-up is lost."""

from __future__ import annotations

import asyncio

import pytest
from support.memory import DOWN, FORMATS, VM, XFS, A, B, start, turns

from hotlun import (
    BackendError,
    MountConfig,
    OutcomeUnknownError,
    Slot,
    SlotState,
)

FIRST, SECOND = MountConfig(partition=1), MountConfig(partition=2)


def refusal(text: str = "no such file") -> BackendError:
    return BackendError(text, operation="attach", code=2, detail="ENOENT")


async def test_a_failed_attach_frees_its_slot(vm: VM) -> None:
    """The backend's own error, and nothing left."""
    vm.host.fail("attach", refusal())
    with pytest.raises(BackendError, match="no such file") as caught:
        await vm.add()
    assert caught.value.detail == "ENOENT"
    assert vm.said() == ["attach"]
    assert vm.status().state is SlotState.FREE
    assert (await vm.add(B)).slot == Slot(0, 0)


async def test_everyone_waiting_gets_an_error_of_their_own(vm: VM) -> None:
    """Separate objects with the same facts, chained to the first."""
    gate = vm.host.stall("attach")
    error = refusal()
    vm.host.fail("attach", error)
    adds = [vm.start() for _ in range(3)] + [vm.start(mount=XFS)]
    await gate.reached.wait()
    gate.open()
    errors = await asyncio.gather(*adds, return_exceptions=True)
    assert len({id(e) for e in errors}) == 4
    for one in errors:
        assert isinstance(one, BackendError)
        assert (str(one), one.code, one.detail) == (str(error), 2, "ENOENT")
    assert all(e is error or getattr(e, "__cause__", None) is error for e in errors)


async def test_an_error_that_cannot_be_copied_still_reaches_everyone(vm: VM) -> None:
    """A foreign class with a constructor of its own."""

    class Odd(Exception):  # noqa: N818 - odd on purpose
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one}-{two}")

    vm.host.fail("attach", Odd(1, 2))
    errors = await asyncio.gather(vm.add(), vm.add(), return_exceptions=True)
    assert [str(e).endswith("1-2") for e in errors] == [True, True]
    assert errors[0] is not errors[1]


async def test_a_class_that_words_its_own_message_says_it_once(vm: VM) -> None:
    """The copies for those who wait read like the original."""

    class PeerError(BackendError):
        def __init__(self, reply: str) -> None:
            super().__init__(f"the peer said: {reply}", detail=reply)

    vm.host.fail("attach", PeerError("no"))
    errors = await asyncio.gather(vm.add(), vm.add(), return_exceptions=True)
    assert [(type(e), str(e)) for e in errors] == [(PeerError, "the peer said: no")] * 2


async def test_a_failed_mount_detaches_a_disk_that_nobody_else_uses(vm: VM) -> None:
    """The attachment reference is given back as well."""
    vm.guest.fail("mount", refusal("wrong fs type"))
    with pytest.raises(BackendError, match="wrong fs type"):
        await vm.add()
    assert vm.said() == ["attach", "mount", "unplug", "detach"]
    assert vm.status().state is SlotState.FREE


async def test_a_failed_mount_leaves_others_alone(vm: VM) -> None:
    """Who holds the attachment keeps it."""
    await vm.add(mount=None)
    vm.guest.fail("mount", refusal())
    with pytest.raises(BackendError):
        await vm.add()
    assert vm.said() == ["attach", "mount"]
    assert vm.status().holders == 1


async def test_everyone_waiting_for_a_failed_mount_gets_it(vm: VM) -> None:
    """And a waiter for another mount does not."""
    gate = vm.guest.stall("mount")
    vm.guest.fail("mount", refusal())
    one, two, other = vm.start(), vm.start(), vm.start(mount=XFS)
    await gate.reached.wait()
    gate.open()
    outcomes = await asyncio.gather(one, two, other, return_exceptions=True)
    assert [isinstance(o, BackendError) for o in outcomes] == [True, True, False]


async def test_what_goes_wrong_in_the_clean_up_is_a_note(vm: VM) -> None:
    """It never hides the error that began it."""
    vm.guest.fail("mount", refusal("bad superblock"))
    vm.host.fail("detach", refusal("device is busy"))
    with pytest.raises(BackendError, match="bad superblock") as caught:
        await vm.add()
    assert any("device is busy" in note for note in caught.value.__notes__)
    status = vm.status()
    assert status.state is SlotState.QUARANTINED
    assert "device is busy" in status.reason
    assert status.holders == 0


async def test_a_failed_revoke_after_a_failed_attach_is_a_note(vm: VM) -> None:
    """The slot is free all the same, and the revoke is not lost."""
    vm.host.fail("attach", refusal())
    vm.host.fail("revoke_access", refusal("acl"))
    with pytest.raises(BackendError, match="no such file") as caught:
        await vm.add(vm_id="vm")
    assert any("acl" in note for note in caught.value.__notes__)
    assert vm.status().state is SlotState.FREE
    assert vm.host.granted == {(A, "vm")}
    vm.said()
    await vm.manager.release_all()
    assert vm.said() == ["revoke_access"]
    assert vm.host.granted == set()


@pytest.mark.parametrize("happened", [True, False])
async def test_an_unknown_attach_is_undone_at_once(vm: VM, happened: bool) -> None:
    """It may have happened: unplug, detach, revoke; then the slot is free."""
    vm.host.lose("attach", happened=happened)
    with pytest.raises(OutcomeUnknownError):
        await vm.add(vm_id="vm")
    assert vm.said() == ["grant_access", "attach", "unplug", "detach", "revoke_access"]
    assert vm.status().state is SlotState.FREE


@pytest.mark.parametrize("happened", [True, False])
async def test_an_unknown_mount_is_undone_at_once(vm: VM, happened: bool) -> None:
    """It may be mounted: unmount, unplug, detach."""
    vm.guest.lose("mount", happened=happened)
    with pytest.raises(OutcomeUnknownError):
        await vm.add()
    assert vm.said() == ["attach", "mount", *DOWN]


@pytest.mark.parametrize("operation", DOWN)
async def test_an_unknown_that_cannot_be_undone_is_quarantined(vm: VM, operation: str) -> None:
    """Given to no other disk; the next add of that disk goes on with the clean-up."""
    vm.guest.lose("mount", happened=True)
    backend = vm.host if operation == "detach" else vm.guest
    backend.fail(operation, refusal("still busy"))
    with pytest.raises(OutcomeUnknownError) as caught:
        await vm.add()
    assert any("still busy" in note for note in caught.value.__notes__)
    assert vm.status().state is SlotState.QUARANTINED
    assert "still busy" in vm.status().reason
    assert (await vm.add(B)).slot == Slot(0, 1)
    vm.said()
    mount = await vm.add()
    assert vm.said() == [*DOWN[DOWN.index(operation) :], "attach", "mount"]
    assert mount.slot == Slot(0, 0)


async def test_the_clean_up_of_a_quarantined_slot_fails_the_next_add(vm: VM) -> None:
    """It gets that error, and the slot stays quarantined."""
    vm.guest.lose("mount", happened=True)
    vm.guest.fail("unmount", refusal("busy"))
    vm.guest.fail("unmount", refusal("busy again"), at=2)
    with pytest.raises(OutcomeUnknownError):
        await vm.add()
    with pytest.raises(BackendError, match="busy again"):
        await vm.add()
    assert vm.status().state is SlotState.QUARANTINED
    await vm.manager.release_all()
    assert vm.status().state is SlotState.FREE


async def test_release_all_and_leaving_try_again(vm: VM) -> None:
    """No clean-up is lost."""
    vm.guest.lose("mount")
    vm.guest.fail("unplug", refusal("one"))
    vm.guest.fail("unplug", refusal("two"), at=2)
    with pytest.raises(OutcomeUnknownError):
        await vm.add()
    with pytest.raises(ExceptionGroup) as caught:
        await vm.manager.release_all()
    assert [str(e) for e in caught.value.exceptions] == ["two"]
    assert vm.status().state is SlotState.QUARANTINED
    # leaving, by the fixture, finds nothing scripted any more


async def test_only_the_guest_mount_is_undone_under_others(vm: VM) -> None:
    """Others hold the attachment: it stays, and so does the slot."""
    await vm.add(mount=None)
    vm.guest.lose("mount", happened=True)
    with pytest.raises(OutcomeUnknownError):
        await vm.add()
    assert vm.said() == ["attach", "mount", "unmount"]
    assert vm.status().state is SlotState.TAKEN
    assert vm.status().reason == ""


async def test_two_unknown_mounts_of_a_disk_that_nobody_has(vm: VM) -> None:
    """The clean-up stops at the first of them; the add of the second is told as well."""
    gate = vm.guest.stall("mount")
    vm.guest.lose("mount")
    vm.guest.lose("mount", at=2)
    vm.guest.fail("unmount", refusal("busy"))
    adds = [vm.start(mount=MountConfig(partition=n)) for n in (1, 2)]
    await gate.reached.wait()
    await turns()
    gate.open()
    errors = await asyncio.wait_for(asyncio.gather(*adds, return_exceptions=True), 5)
    assert [type(error) for error in errors] == [OutcomeUnknownError] * 2
    assert vm.said() == ["attach", "mount", "mount", "unmount"]
    assert vm.status().state is SlotState.QUARANTINED


@pytest.mark.parametrize("ending", ["fails", "is lost", "is cancelled"])
async def test_an_unknown_mount_is_undone_though_a_release_stopped(vm: VM, ending: str) -> None:
    """Nobody owns it, so it waits for nobody; the Mount whose release stopped stays."""
    one, two = MountConfig(partition=1), MountConfig(partition=2)
    old = await vm.add(mount=one)
    mounting, unmounting = vm.guest.stall("mount"), vm.guest.stall("unmount")
    vm.guest.lose("mount", happened=True)
    adding = vm.start(mount=two)
    await mounting.reached.wait()
    release = start(old.release())
    await turns()
    if ending == "fails":
        vm.guest.fail("unmount", refusal("busy"))
    elif ending == "is lost":
        vm.guest.lose("unmount")
    mounting.open()
    await unmounting.reached.wait()
    if ending == "is cancelled":
        release.cancel()
    await turns()
    unmounting.open()
    await asyncio.gather(release, return_exceptions=True)
    with pytest.raises(OutcomeUnknownError):
        await asyncio.wait_for(adding, 5)
    assert vm.said() == ["attach", "mount", "mount", "unmount", "unmount"]
    assert vm.manager.mounts == (old,)


async def test_a_definitely_failed_unmount_is_shared_beside_a_stuck_one(vm: VM) -> None:
    """What nobody owns cannot be undone; the disk is not in teardown for that."""
    one, two = MountConfig(partition=1), MountConfig(partition=2)
    old = await vm.add(mount=one)
    vm.guest.lose("mount")
    for at in (1, 2, 3):
        vm.guest.fail("unmount", refusal("busy"), at=at)
    with pytest.raises(OutcomeUnknownError):
        await vm.add(mount=two)
    with pytest.raises(BackendError):
        await old.release()
    assert (await vm.add(mount=one)).serial == old.serial
    assert "unplug" not in vm.said()


async def test_a_guest_mount_that_cannot_be_undone_under_others(vm: VM) -> None:
    """The slot stays taken, with a reason; an equal add finishes it, others go on."""
    keeper = await vm.add(mount=None)
    vm.guest.lose("mount", happened=True)
    vm.guest.fail("unmount", refusal("busy"))
    with pytest.raises(OutcomeUnknownError) as caught:
        await vm.add(guest_path="/m")
    assert any("busy" in note for note in caught.value.__notes__)
    status = vm.status()
    assert status.state is SlotState.TAKEN
    assert "busy" in status.reason
    assert [m.path for m in status.guest_mounts] == ["/m"]
    vm.said()
    mount = await vm.add(guest_path="/m")
    assert vm.said() == ["unmount", "mount"]
    assert mount.slot == keeper.slot
    assert vm.status().reason == ""


async def test_the_next_add_of_the_disk_tries_a_stuck_guest_mount_again(vm: VM) -> None:
    """Whatever its own config is; a failure is not its own unless it overlaps."""
    await vm.add(mount=None)
    vm.guest.lose("mount", happened=True)
    vm.guest.fail("unmount", refusal("busy"))
    vm.guest.fail("unmount", refusal("busy again"), at=2)
    with pytest.raises(OutcomeUnknownError):
        await vm.add(mount=FIRST)
    await vm.add(mount=SECOND)
    await turns()
    assert "busy again" in vm.status().reason
    await vm.add(mount=None)
    await turns()
    assert vm.status().reason == ""
    assert [m.config for m in vm.status().guest_mounts] == [SECOND]


async def test_the_last_release_takes_a_stuck_guest_mount_along(vm: VM) -> None:
    """The disk is not unplugged under it."""
    keeper = await vm.add(mount=None)
    vm.guest.lose("mount", happened=True)
    vm.guest.fail("unmount", refusal("busy"))
    vm.guest.fail("unmount", refusal("busy again"), at=2)
    with pytest.raises(OutcomeUnknownError):
        await vm.add()
    with pytest.raises(BackendError, match="busy again"):
        await keeper.release()
    vm.said()
    await keeper.release()
    assert vm.said() == DOWN


async def test_a_stuck_guest_mount_is_taken_along_last(vm: VM) -> None:
    """What can be unmounted is, though the release fails at what cannot."""
    keeper = await vm.add(mount=None)
    vm.guest.lose("mount", happened=True)
    for at in (1, 2, 4):
        vm.guest.fail("unmount", refusal("busy"), at=at)
    with pytest.raises(OutcomeUnknownError):
        await vm.add(mount=FIRST)
    mount = await vm.add(mount=SECOND)
    await keeper.release()
    with pytest.raises(BackendError, match="busy"):
        await mount.release()
    assert [m.config for m in vm.status().guest_mounts] == [FIRST]
    await mount.release()


async def test_a_half_undone_thing_without_an_owner_is_never_shared(vm: VM) -> None:
    """A definite failure to unplug after a failed mount: the next add does not reuse the device."""
    vm.guest.fail("mount", refusal("bad"))
    vm.guest.fail("unplug", refusal("busy"))
    with pytest.raises(BackendError, match="bad"):
        await vm.add()
    vm.said()
    await vm.add()
    assert vm.said() == ["unplug", "detach", "attach", "mount"]


async def test_an_add_during_such_a_clean_up_waits_for_it(vm: VM) -> None:
    """Then it attaches afresh."""
    vm.guest.fail("mount", refusal("bad"))
    gate = vm.guest.stall("unplug")
    first = vm.start()
    await gate.reached.wait()
    second = vm.start(mount=FORMATS)
    await turns()
    gate.open()
    with pytest.raises(BackendError, match="bad"):
        await first
    await second
    assert vm.said() == ["attach", "mount", "unplug", "detach", "attach", "mount"]


async def test_a_lost_revoke_has_no_slot_and_is_not_lost(vm: VM) -> None:
    """Not in slots(); the next add of that disk goes on with it."""
    task = vm.start(vm_id="vm")
    gate = vm.host.stall("attach")
    await gate.reached.wait()
    task.cancel()
    vm.host.fail("revoke_access", refusal())
    gate.open()
    await turns(40)
    assert all(s.state is SlotState.FREE for s in vm.manager.slots())
    assert vm.host.granted == {(A, "vm")}
    other = await vm.add(B)
    assert other.slot == Slot(0, 0)
    vm.said()
    await vm.add(A)
    assert vm.said() == ["revoke_access", "attach", "mount"]


async def test_release_all_tries_everything(vm: VM) -> None:
    """One ExceptionGroup at the end; what could be released is."""
    _, _, three = [await vm.add(f"/d/{n}.img") for n in range(3)]
    vm.guest.fail("unmount", refusal("first"))
    vm.guest.fail("unmount", refusal("second"), at=2)
    with pytest.raises(ExceptionGroup) as caught:
        await vm.manager.release_all()
    assert sorted(str(e) for e in caught.value.exceptions) == ["first", "second"]
    left = vm.manager.mounts
    assert len(left) == 2
    assert three not in left
    await vm.manager.release_all()
    vm.assert_empty()
    await vm.manager.release_all()


async def test_release_all_waits_for_background_work(vm: VM) -> None:
    """A cancelled add is still being undone: release_all ends after it."""
    gate = vm.host.stall("attach")
    task = vm.start()
    await gate.reached.wait()
    task.cancel()
    releasing = start(vm.manager.release_all())
    await turns()
    assert not releasing.done()
    gate.open()
    await releasing
    vm.assert_empty()


async def test_release_all_goes_on_when_the_manager_is_left_meanwhile() -> None:
    """It is no add, and the leaving waits for the same clean-up."""
    vm = VM()
    async with vm:
        vm.host.lose("attach", happened=True)
        vm.host.fail("detach", refusal("busy"))
        with pytest.raises(OutcomeUnknownError):
            await vm.add()
        gate = vm.host.stall("detach")
        releasing = start(vm.manager.release_all())
        await gate.reached.wait()
        asyncio.get_running_loop().call_later(0.01, gate.open)
    await releasing


async def test_an_orphan_is_retried_even_if_a_release_fails(vm: VM) -> None:
    """Nothing keeps release_all from trying the rest."""
    await vm.add(A, mount=None)
    vm.guest.lose("mount", happened=True)
    vm.guest.fail("unmount", refusal("busy"))
    with pytest.raises(OutcomeUnknownError):
        await vm.add(A)
    vm.guest.fail("mount", refusal("bad"))
    vm.host.fail("detach", refusal("stuck"))
    with pytest.raises(BackendError):
        await vm.add(B)
    await vm.manager.release_all()
    vm.assert_empty()
