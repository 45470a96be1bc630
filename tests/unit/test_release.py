"""Rules 10, 11 and 12: the last one out undoes, releases can be tried again, adds wait."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.memory import DOWN, EXT4, FORMATS, UP, VM, XFS, A, B, start, turns

from hotlun import (
    AlreadyReleasedError,
    BackendError,
    MountConfig,
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


# --- An add meets a teardown ---


async def test_until_the_first_undoing_call_an_add_shares(vm: VM) -> None:
    """The release then only drops its reference."""
    old = await vm.add()
    vm.said()
    release, adding = start(old.release()), vm.start()
    new = await adding
    await release
    assert vm.said() == []
    assert new.serial == old.serial


@pytest.mark.parametrize("operation", [*DOWN, "revoke_access"])
@pytest.mark.parametrize("more", [{}, {"mount": None}, {"read_only": True}, {"mount": FORMATS}])
async def test_an_add_waits_for_the_whole_teardown(
    vm: VM, operation: str, more: dict[str, Any]
) -> None:
    """Whatever it asks for, and at whichever step it comes."""
    old = await vm.add(vm_id="vm")
    backend = vm.guest if operation in ("unmount", "unplug") else vm.host
    gate = backend.stall(operation)
    release = start(old.release())
    await gate.reached.wait()
    adding = vm.start(**more)
    await turns()
    assert not adding.done()
    gate.open()
    await release
    new = await adding
    assert new.serial != old.serial
    assert vm.said()[:6] == ["grant_access", *UP, *DOWN]


async def test_another_kind_waits_for_the_teardown_too(vm: VM) -> None:
    """Against a teardown nothing conflicts."""
    old = await vm.add(A)
    gate = vm.guest.stall("unplug")
    release = start(old.release())
    await gate.reached.wait()
    adding = start(vm.manager.add_physical_disk(A))
    await turns()
    gate.open()
    await release
    assert (await adding).disk.kind == "PassThru"


async def test_under_others_only_the_guest_mount_is_in_teardown(vm: VM) -> None:
    """Equal or overlapping adds wait, others share the attachment."""
    await vm.add(mount=None)
    old = await vm.add(mount=EXT4)
    gate = vm.guest.stall("unmount")
    release = start(old.release())
    await gate.reached.wait()
    equal, bare, other = vm.start(mount=EXT4), vm.start(mount=None), vm.start(mount=XFS)
    await turns()
    assert (equal.done(), bare.done(), other.done()) == (False, True, False)
    gate.open()
    await release
    assert {m.slot for m in await asyncio.gather(equal, bare, other)} == {old.slot}
    assert vm.said().count("attach") == 1


async def test_a_definitely_failed_unmount_is_shared_again(vm: VM) -> None:
    """It is still mounted, and nobody but the old handle drives it."""
    old = await vm.add()
    vm.guest.fail("unmount", refusal())
    with pytest.raises(BackendError):
        await old.release()
    vm.said()
    new = await vm.add()
    assert vm.said() == []
    assert new.guest_path == old.guest_path
    await old.release()
    assert vm.said() == []


async def test_an_add_waiting_for_an_unmount_that_definitely_fails_shares(vm: VM) -> None:
    """The release gets its error, the add gets the mount."""
    old = await vm.add()
    gate = vm.guest.stall("unmount")
    vm.guest.fail("unmount", refusal())
    release = start(old.release())
    await gate.reached.wait()
    adding = vm.start()
    await turns()
    gate.open()
    with pytest.raises(BackendError):
        await release
    assert (await adding).serial == old.serial
    assert vm.said() == [*UP, "unmount"]


async def test_a_definitely_failed_unplug_shares_the_attachment_again(vm: VM) -> None:
    """The guest still has the device; only the mount is made anew."""
    old = await vm.add()
    vm.guest.fail("unplug", refusal())
    with pytest.raises(BackendError):
        await old.release()
    vm.said()
    new = await vm.add()
    assert vm.said() == ["mount"]
    assert new.serial == old.serial
    await old.release()
    assert vm.said() == []


@pytest.mark.parametrize("operation", ["unmount", "unplug", "detach"])
@pytest.mark.parametrize("mount", [EXT4, XFS, None])
async def test_an_add_finishes_a_teardown_of_unknown_outcome(
    vm: VM, operation: str, mount: MountConfig | None
) -> None:
    """It never reuses what the guest may have let go; the old handle is done then."""
    old = await vm.add()
    backend = vm.host if operation == "detach" else vm.guest
    backend.lose(operation, happened=False)
    with pytest.raises(OutcomeUnknownError):
        await old.release()
    vm.said()
    new = await vm.add(mount=mount)
    assert vm.said()[: 4 - DOWN.index(operation)] == [*DOWN[DOWN.index(operation) :], "attach"]
    assert new.serial != old.serial
    with pytest.raises(AlreadyReleasedError):
        await old.release()
    assert vm.manager.mounts == (new,)


async def test_a_failed_detach_is_finished_by_the_add(vm: VM) -> None:
    """The guest has let the device go, so it is not shared, though the failure was definite."""
    old = await vm.add()
    vm.host.fail("detach", refusal())
    with pytest.raises(BackendError):
        await old.release()
    vm.said()
    await vm.add()
    assert vm.said() == ["detach", *UP]
    with pytest.raises(AlreadyReleasedError):
        await old.release()


async def test_an_add_gets_the_error_of_a_teardown_it_cannot_finish(vm: VM) -> None:
    """And the old handle keeps its reference."""
    old = await vm.add()
    vm.guest.lose("unplug")
    vm.guest.fail("unplug", refusal("still busy"), at=2)
    with pytest.raises(OutcomeUnknownError):
        await old.release()
    with pytest.raises(BackendError, match="still busy"):
        await vm.add()
    assert vm.manager.mounts == (old,)
    assert vm.status().state is SlotState.TAKEN
    assert "still busy" in vm.status().reason
    await old.release()


async def test_an_add_waiting_for_a_detach_that_fails_tries_it_again(vm: VM) -> None:
    """The release gets the first error; the add drives the second try."""
    old = await vm.add()
    gate = vm.host.stall("detach")
    vm.host.fail("detach", refusal())
    release = start(old.release())
    await gate.reached.wait()
    adding = vm.start()
    await turns()
    gate.open()
    with pytest.raises(BackendError):
        await release
    await adding
    assert vm.said() == [*UP, *DOWN, "detach", *UP]


async def test_an_unknown_unmount_under_others(vm: VM) -> None:
    """An equal add finishes it, others go on, and the old handle is done."""
    await vm.add(mount=None)
    old = await vm.add(mount=EXT4)
    vm.guest.lose("unmount", happened=True)
    with pytest.raises(OutcomeUnknownError):
        await old.release()
    assert vm.status().state is SlotState.TAKEN
    assert vm.status().reason
    vm.said()
    await vm.add(mount=XFS)
    assert vm.said() == ["mount"]
    new = await vm.add(mount=EXT4)
    assert vm.said() == ["unmount", "mount"]
    with pytest.raises(AlreadyReleasedError):
        await old.release()
    assert old not in vm.manager.mounts
    assert new in vm.manager.mounts


async def test_an_add_that_was_there_before_the_failing_step_tries_it_again_too(vm: VM) -> None:
    """The step was taken for the release: its error is the release's alone."""
    old = await vm.add()
    gate = vm.guest.stall("unplug")
    vm.host.fail("detach", refusal())
    release = start(old.release())
    await gate.reached.wait()
    adding = vm.start()
    await turns()
    gate.open()
    with pytest.raises(BackendError):
        await release
    await adding
    assert vm.said() == [*UP, *DOWN, "detach", *UP]


async def test_an_add_that_drives_an_unplug_that_definitely_fails_shares(vm: VM) -> None:
    """Nobody else drives it any more, and the guest still has the device."""
    old = await vm.add()
    gate = vm.guest.stall("unmount")
    vm.guest.fail("unplug", refusal())
    release = start(old.release())
    await gate.reached.wait()
    adding = vm.start()
    await turns()
    release.cancel()
    await turns()
    gate.open()
    new = await adding
    assert vm.said() == [*UP, "unmount", "unplug", "mount"]
    assert new.serial == old.serial
    await old.release()
    assert vm.manager.mounts == (new,)


async def test_under_others_a_definitely_failed_unmount_is_shared_again(vm: VM) -> None:
    """Also by an add that was waiting for it."""
    await vm.add(mount=None)
    old = await vm.add(mount=EXT4)
    gate = vm.guest.stall("unmount")
    vm.guest.fail("unmount", refusal())
    release = start(old.release())
    await gate.reached.wait()
    adding = vm.start(mount=EXT4)
    await turns()
    gate.open()
    with pytest.raises(BackendError):
        await release
    assert (await adding).guest_path == old.guest_path
    assert vm.said() == ["attach", "mount", "unmount"]


async def test_the_attachment_is_shared_until_its_last_release_makes_a_call(vm: VM) -> None:
    """Two handles with mounts of their own release at once: the first only unmounts."""
    one, two = await vm.add(mount=EXT4), await vm.add(mount=XFS)
    gate = vm.guest.stall("unmount")
    releases = [start(one.release()), start(two.release())]
    await gate.reached.wait()
    bare = await vm.add(mount=None)
    assert bare.serial == one.serial
    gate.open()
    await asyncio.gather(*releases)
    assert vm.said() == ["attach", "mount", "mount", "unmount", "unmount"]


async def test_several_adds_wait_for_one_teardown(vm: VM) -> None:
    """They share what the first of them attaches."""
    old = await vm.add()
    gate = vm.guest.stall("unmount")
    release = start(old.release())
    await gate.reached.wait()
    adds = [vm.start() for _ in range(3)] + [vm.start(mount=XFS)]
    await turns()
    gate.open()
    await release
    mounts = await asyncio.gather(*adds)
    assert len({m.serial for m in mounts}) == 1
    assert vm.said() == [*UP, *DOWN, "attach", "mount", "mount"]


# --- Rule 6 ---


async def test_disks_never_wait_for_each_other(vm: VM) -> None:
    """While one is stuck at any step, another goes through its whole life."""
    for backend, operation in (
        (vm.host, "attach"),
        (vm.guest, "mount"),
        (vm.guest, "unmount"),
        (vm.guest, "unplug"),
        (vm.host, "detach"),
    ):
        gate = backend.stall(operation)
        stuck = start(vm.add(A))
        if operation in DOWN:
            stuck_release = start((await stuck).release())
        await gate.reached.wait()
        await (await vm.add(B)).release()
        gate.open()
        if operation in DOWN:
            await stuck_release
        else:
            await (await stuck).release()
    vm.assert_empty()


async def test_many_disks_are_attached_side_by_side(vm: VM) -> None:
    """All of them are at the backend at once."""
    gates = [vm.host.stall("attach", at=n + 1) for n in range(16)]
    adds = [vm.start(f"/d/{n}.img") for n in range(16)]
    for gate in gates:
        await gate.reached.wait()
    for gate in gates:
        gate.open()
    assert len({m.slot for m in await asyncio.gather(*adds)}) == 16
