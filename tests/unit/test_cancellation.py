"""Rule 9: cancelling costs nothing, and nobody sees somebody else's."""

from __future__ import annotations

import asyncio
import warnings

import pytest
from support.memory import DOWN, EXT4, FORMATS, VM, XFS, A, B, start, turns

from hotlun import (
    BackendError,
    Manager,
    NotInitializedError,
    OutcomeUnknownError,
    SlotState,
)
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend


@pytest.mark.parametrize("operation", ["grant_access", "attach", "mount"])
async def test_cancelled_in_its_own_step(vm: VM, operation: str) -> None:
    """CancelledError promptly; the step is seen through and undone in the background."""
    backend = vm.guest if operation == "mount" else vm.host
    gate = backend.stall(operation)
    task = vm.start(vm_id="vm")
    await gate.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not vm.host.effects["detach"]
    gate.open()
    await turns(40)
    vm.assert_empty()
    undone = {"grant_access": "revoke_access", "attach": "detach", "mount": "unmount"}[operation]
    assert undone in vm.said()


async def test_cancelled_while_waiting_for_somebody_elses_attach(vm: VM) -> None:
    """It gives its reference back; the other gets the disk."""
    gate = vm.host.stall("attach")
    one, two = vm.start(), vm.start()
    await gate.reached.wait()
    two.cancel()
    await turns()
    assert two.cancelled()
    gate.open()
    await (await one).release()
    assert vm.said() == ["attach", "mount", *DOWN]


async def test_another_caller_never_sees_a_cancellation_that_is_not_its_own(vm: VM) -> None:
    """Who made the attach is cancelled; who waits gets the disk from the same attach."""
    gate = vm.host.stall("attach")
    one = vm.start()
    await gate.reached.wait()
    two = vm.start()
    await turns()
    one.cancel()
    await turns()
    gate.open()
    await two
    assert vm.said() == ["attach", "mount"]


async def test_one_who_comes_after_the_cancellation_gets_the_disk_too(vm: VM) -> None:
    """The attach in flight is not thrown away."""
    gate = vm.host.stall("attach")
    one = vm.start()
    await gate.reached.wait()
    one.cancel()
    await turns()
    two = vm.start()
    await turns()
    gate.open()
    await two
    assert vm.said() == ["attach", "mount"]


async def test_cancelled_before_the_first_step(vm: VM) -> None:
    """Nothing was begun, and nothing is."""
    task = vm.start()
    await asyncio.sleep(0)
    task.cancel()
    await turns()
    assert task.cancelled()
    vm.assert_empty()


async def test_cancelled_when_all_was_done_but_not_told(vm: VM) -> None:
    """The mount is made, the caller has not had its turn, and is cancelled: undone."""
    task = vm.start()
    while not vm.guest.mounted:
        await asyncio.sleep(0)
    task.cancel()
    await turns(40)
    assert task.cancelled()
    vm.assert_empty()


async def test_a_cancelled_add_that_asked_for_another_use_is_waited_for(vm: VM) -> None:
    """Nobody wants the writable disk any more: a read-only add waits instead of conflicting."""
    gate = vm.host.stall("attach")
    one = vm.start()
    await gate.reached.wait()
    one.cancel()
    two = vm.start(read_only=True)
    await turns()
    gate.open()
    assert (await two).disk.read_only
    assert vm.said() == ["attach", "unplug", "detach", "attach", "mount"]


async def test_one_who_was_cancelled_and_had_no_turn_yet_wants_nothing(vm: VM) -> None:
    """The cancellation counts from when it was made, not from when the caller wakes."""
    gate = vm.host.stall("attach")
    one = vm.start()
    await gate.reached.wait()
    two = vm.start(read_only=True)  # has its turn before the cancelled one
    one.cancel()
    await turns()
    gate.open()
    assert (await two).disk.read_only


async def test_an_overlap_with_a_cancelled_mount_in_flight_is_waited_for(vm: VM) -> None:
    """Nobody wants the formatting mount any more: it is no conflict."""
    await vm.add(mount=None)
    gate = vm.guest.stall("mount")
    formatting = vm.start(mount=FORMATS)
    await gate.reached.wait()
    formatting.cancel()
    await turns()
    adding = vm.start(mount=EXT4)
    await turns()
    gate.open()
    await adding
    assert vm.said() == ["attach", "mount", "unmount", "mount"]


async def test_a_mount_of_unknown_outcome_is_never_joined(vm: VM) -> None:
    """Not even while another step of the disk comes before its undoing."""
    await vm.add(mount=None)
    vm.guest.lose("mount", happened=True)
    gate = vm.guest.stall("mount", at=2)
    one, other = vm.start(mount=EXT4), vm.start(mount=XFS)
    await gate.reached.wait()
    again = vm.start(mount=EXT4)
    await turns()
    gate.open()
    with pytest.raises(OutcomeUnknownError):
        await one
    await other
    await again
    assert vm.said() == ["attach", "mount", "mount", "unmount", "mount"]


async def test_every_point_of_cancellation(vm: VM) -> None:
    """A caller cancelled after any number of turns leaves nothing."""
    for count in range(30):
        task = vm.start(vm_id="vm")
        await turns(count)
        task.cancel()
        outcome = (await asyncio.gather(task, return_exceptions=True))[0]
        if not isinstance(outcome, BaseException):
            await outcome.release()
        await turns(40)
        vm.assert_empty()


async def test_leaving_waits_for_background_work() -> None:
    """What a cancelled caller left is undone before the Manager is left."""
    async with VM() as vm:
        gate = vm.host.stall("attach")
        task = vm.start()
        await gate.reached.wait()
        task.cancel()
        await turns()
        asyncio.get_running_loop().call_later(0.01, gate.open)
    vm.assert_empty()


async def test_a_cancelled_leaving_starts_no_new_step() -> None:
    """It raises promptly, warns of what remains, and release() goes on afterwards."""
    vm = VM()
    await vm.manager.__aenter__()
    mount = await vm.add(A)
    other = await vm.add(B)
    gate = vm.guest.stall("unmount")
    leaving = start(vm.manager.__aexit__(None, None, None))
    await gate.reached.wait()
    await turns()
    vm.said()
    leaving.cancel()
    with (
        warnings.catch_warnings(record=True) as caught,
        pytest.raises(asyncio.CancelledError),
    ):
        warnings.simplefilter("always")
        await leaving
    assert [w.category for w in caught] == [ResourceWarning]
    assert A in str(caught[0].message)
    gate.open()
    await turns(40)
    left = {m.guest_path for m in vm.manager.mounts}
    assert mount.guest_path in left
    assert "detach" not in vm.said()[1:] or other not in vm.manager.mounts
    with pytest.raises(NotInitializedError):
        await vm.add(A)
    for one in vm.manager.mounts:
        await one.release()
    vm.assert_empty()


async def test_what_a_cancelled_leaving_leaves_is_warned_of_where_the_manager_is_left() -> None:
    """By the line of whoever leaves it; and the warning is about that Manager."""
    vm = VM()
    gate = vm.guest.stall("unmount")

    async def work() -> None:
        async with vm.manager:
            await vm.add(A)

    working = start(work())
    await gate.reached.wait()
    working.cancel()
    with warnings.catch_warnings(record=True) as caught, pytest.raises(asyncio.CancelledError):
        warnings.simplefilter("always")
        await working
    assert [(w.filename, w.source) for w in caught] == [(__file__, vm.manager)]
    gate.open()
    await turns(40)
    await vm.manager.release_all()
    vm.assert_empty()


async def test_a_cancelled_leaving_begins_nothing_for_those_without_an_owner() -> None:
    """A step in flight is seen through; what it leaves waits for release_all()."""
    vm = VM()
    await vm.manager.__aenter__()
    gate = vm.host.stall("attach")
    task = vm.start()
    await gate.reached.wait()
    leaving = start(vm.manager.__aexit__(None, None, None))
    await turns()
    assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], NotInitializedError)
    leaving.cancel()
    with pytest.warns(ResourceWarning, match="a.vhdx"), pytest.raises(asyncio.CancelledError):
        await leaving
    gate.open()
    await turns(40)
    assert vm.said() == ["attach"]
    assert vm.status().state is SlotState.QUARANTINED
    await vm.manager.release_all()
    vm.assert_empty()


async def test_a_backend_that_cancels_itself_is_unknown(vm: VM) -> None:
    """A CancelledError that nobody asked for tells nothing about the outcome."""
    vm.host.fail("attach", asyncio.CancelledError())
    with pytest.raises(BaseException, match="cut short") as caught:
        await vm.add()
    assert not isinstance(caught.value, asyncio.CancelledError)
    assert vm.said() == ["attach", "unplug", "detach"]


def test_a_loop_that_ends_cuts_the_work_short() -> None:
    """asyncio.run() cancels the worker: the step's outcome is unknown, and nothing is swallowed."""
    host = MemoryHostBackend()
    guest = MemoryGuestBackend(host)
    manager = Manager(host, guest)

    async def main() -> None:
        await manager.__aenter__()
        gate = host.stall("attach")
        task = start(manager.add_virtual_disk(A, mount=EXT4))
        await gate.reached.wait()
        assert not task.done()

    asyncio.run(main())
    assert manager.slots()[0].state is SlotState.QUARANTINED
    assert "cut short" in manager.slots()[0].reason

    async def afterwards() -> None:
        await manager.release_all()

    asyncio.run(afterwards())
    assert manager.slots()[0].state is SlotState.FREE


async def test_a_cancelled_waiter_leaves_a_teardown_to_its_owner(vm: VM) -> None:
    """Cancelled while a teardown is under way: the teardown goes on by itself."""
    mount = await vm.add()
    gate = vm.guest.stall("unmount")
    release = start(mount.release())
    await gate.reached.wait()
    waiter = vm.start(mount=XFS)
    await turns()
    waiter.cancel()
    await turns()
    gate.open()
    await release
    assert waiter.cancelled()
    vm.assert_empty()


async def test_a_failed_add_that_is_cancelled_during_its_clean_up(vm: VM) -> None:
    """CancelledError promptly, and the clean-up goes on."""
    vm.guest.fail("mount", BackendError("bad"))
    gate = vm.guest.stall("unplug")
    task = vm.start()
    await gate.reached.wait()
    task.cancel()
    await turns()
    assert task.cancelled()
    gate.open()
    await turns(40)
    vm.assert_empty()
