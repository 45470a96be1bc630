"""Rules 10 and 11: the last one out undoes everything, and releases can be tried again."""

from __future__ import annotations

import asyncio
import gc

import pytest
from support.memory import DOWN, UP, VM, XFS, B, start, turns

from hotlun import (
    AlreadyReleasedError,
    BackendError,
    OutcomeUnknownError,
    SlotState,
)


def refusal(text: str = "busy") -> BackendError:
    return BackendError(text)


async def test_the_last_release_undoes_in_order(vm: VM) -> None:
    """Unmount, unplug, detach, revoke; earlier ones only drop a reference."""
    one, two = await vm.add(vm_id="vm"), await vm.add()
    vm.said()
    await one.release()
    assert vm.said() == []
    assert vm.manager.mounts == (two,)
    await two.release()
    assert vm.said() == [*DOWN, "revoke_access"]
    vm.assert_empty()


async def test_after_success_it_is_already_released(vm: VM) -> None:
    """A handle is given back once."""
    mount = await vm.add()
    await mount.release()
    with pytest.raises(AlreadyReleasedError):
        await mount.release()
    assert vm.said() == [*UP, *DOWN]


async def test_leaving_the_mount_releases_it_quietly(vm: VM) -> None:
    """Also when it was released inside."""
    async with await vm.add() as mount:
        assert mount.guest_path
    async with await vm.add() as mount:
        await mount.release()
    vm.assert_empty()


async def test_a_mount_is_none_as_soon_as_it_is_given_back(vm: VM) -> None:
    """Whatever still goes on with another one of the disk."""
    one, two = await vm.add(), await vm.add(mount=XFS)
    gate = vm.guest.stall("unmount", at=2)
    first, second = start(one.release()), start(two.release())
    await gate.reached.wait()
    await first
    left = vm.manager.mounts
    gate.open()
    await second
    assert left == (two,)


async def test_a_failed_release_does_not_hide_the_bodys_error(vm: VM) -> None:
    """It becomes a note."""
    vm.guest.fail("unmount", refusal())
    with pytest.raises(RuntimeError, match="body") as caught:
        async with await vm.add():
            raise RuntimeError("body")
    assert any("busy" in note for note in caught.value.__notes__)


async def test_the_slot_is_free_after_the_detach_even_if_the_revoke_fails(vm: VM) -> None:
    """The handle keeps what is left to do."""
    mount = await vm.add(vm_id="vm")
    vm.host.fail("revoke_access", refusal())
    with pytest.raises(BackendError):
        await mount.release()
    assert vm.status().state is SlotState.FREE
    other = await vm.add(B)
    assert other.slot == mount.slot
    assert mount in vm.manager.mounts
    vm.said()
    await mount.release()
    assert vm.said() == ["revoke_access"]


@pytest.mark.parametrize("operation", [*DOWN, "revoke_access"])
@pytest.mark.parametrize("unknown", [False, True])
async def test_a_release_goes_on_where_it_stopped(vm: VM, operation: str, unknown: bool) -> None:
    """What succeeded is not repeated."""
    steps = [*DOWN, "revoke_access"]
    mount = await vm.add(vm_id="vm")
    backend = vm.guest if operation in ("unmount", "unplug") else vm.host
    if unknown:
        backend.lose(operation, happened=True)
    else:
        backend.fail(operation, refusal())
    vm.said()
    with pytest.raises(OutcomeUnknownError if unknown else BackendError):
        await mount.release()
    at = steps.index(operation)
    assert vm.said() == steps[: at + 1]
    assert vm.manager.mounts == (mount,)
    await mount.release()
    assert vm.said() == steps[at:]
    with pytest.raises(AlreadyReleasedError):
        await mount.release()


async def test_two_releases_at_once(vm: VM) -> None:
    """One does the work, the other waits and is told that it was done."""
    mount = await vm.add()
    one, two = await asyncio.gather(mount.release(), mount.release(), return_exceptions=True)
    assert one is None
    assert isinstance(two, AlreadyReleasedError)
    assert vm.said() == [*UP, *DOWN]


async def test_the_second_of_two_tries_again_if_the_first_fails(vm: VM) -> None:
    """Going on at the failed step."""
    mount = await vm.add()
    vm.guest.fail("unplug", refusal())
    one, two = await asyncio.gather(mount.release(), mount.release(), return_exceptions=True)
    assert isinstance(one, BackendError)
    assert two is None
    assert vm.said() == [*UP, "unmount", "unplug", "unplug", "detach"]


async def test_the_second_of_two_goes_on_if_the_first_is_cancelled(vm: VM) -> None:
    """Whichever caller is still there."""
    mount = await vm.add()
    gate = vm.guest.stall("unmount")
    one, two = start(mount.release()), start(mount.release())
    await gate.reached.wait()
    one.cancel()
    await turns()
    gate.open()
    await two
    assert vm.said() == [*UP, *DOWN]


@pytest.mark.parametrize(("operation", "rest"), [("unmount", DOWN[1:]), ("unplug", DOWN[2:])])
async def test_a_cancelled_release_stops_after_its_step(
    vm: VM, operation: str, rest: list[str]
) -> None:
    """CancelledError promptly; the step is seen through; the Mount stays releasable."""
    mount = await vm.add()
    gate = vm.guest.stall(operation)
    release = start(mount.release())
    await gate.reached.wait()
    release.cancel()
    await turns()
    assert release.cancelled()
    vm.said()
    gate.open()
    await turns(40)
    assert vm.said() == []
    assert vm.manager.mounts == (mount,)
    await mount.release()
    assert vm.said() == rest


async def test_a_cancelled_release_that_was_finished_by_its_step(vm: VM) -> None:
    """The detach in flight was the last step."""
    mount = await vm.add()
    gate = vm.host.stall("detach")
    release = start(mount.release())
    await gate.reached.wait()
    release.cancel()
    await turns()
    gate.open()
    await turns(40)
    assert vm.manager.mounts == ()
    with pytest.raises(AlreadyReleasedError):
        await mount.release()


async def test_a_cancelled_release_with_only_a_reference_left(vm: VM) -> None:
    """Its unmount was done, others hold the attachment: complete."""
    keeper = await vm.add(mount=None)
    mount = await vm.add()
    gate = vm.guest.stall("unmount")
    release = start(mount.release())
    await gate.reached.wait()
    release.cancel()
    await turns()
    gate.open()
    await turns(40)
    assert vm.manager.mounts == (keeper,)
    with pytest.raises(AlreadyReleasedError):
        await mount.release()


async def test_after_only_an_unmount_the_attachment_is_shared_again(vm: VM) -> None:
    """A cancelled release; an add uses the attachment; the old handle gives back a reference."""
    old = await vm.add()
    gate = vm.guest.stall("unmount")
    release = start(old.release())
    await gate.reached.wait()
    release.cancel()
    gate.open()
    await turns(40)
    vm.said()
    new = await vm.add()
    assert vm.said() == ["mount"]
    assert new.slot == old.slot
    assert new.serial == old.serial
    await old.release()
    assert vm.said() == []
    assert vm.manager.mounts == (new,)


async def test_a_cancelled_release_goes_on_for_a_waiting_add(vm: VM) -> None:
    """The add drives the teardown on, and attaches afresh; the old handle is done."""
    old = await vm.add()
    gate = vm.guest.stall("unmount")
    release = start(old.release())
    await gate.reached.wait()
    adding = vm.start(mount=XFS)
    await turns()
    release.cancel()
    await turns()
    gate.open()
    new = await adding
    assert vm.said() == [*UP, *DOWN, *UP]
    assert new.serial != old.serial
    with pytest.raises(AlreadyReleasedError):
        await old.release()
    assert vm.manager.mounts == (new,)


async def test_a_life_leaves_nothing_for_the_garbage_collector(vm: VM) -> None:
    """What was made for a disk refers to no part of itself in a ring once the disk is gone."""
    await (await vm.add()).release()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            await (await vm.add()).release()
        left = gc.collect()
    finally:
        gc.enable()
    assert left == 0
