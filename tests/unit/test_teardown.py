"""Rule 12: an add that meets a teardown waits for it, then attaches afresh."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.memory import DOWN, EXT4, FORMATS, UP, VM, XFS, A, start, turns

from hotlun import (
    AlreadyReleasedError,
    BackendError,
    MountConfig,
    OutcomeUnknownError,
    SlotState,
)


def refusal(text: str = "busy") -> BackendError:
    return BackendError(text)


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


@pytest.mark.parametrize("step", ["unplug", "detach"])
async def test_an_add_waiting_for_a_detach_that_fails_tries_it_again(vm: VM, step: str) -> None:
    """Also one that was there before the detach: that was for the release, and so is its error."""
    old = await vm.add()
    gate = (vm.guest if step == "unplug" else vm.host).stall(step)
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


@pytest.mark.parametrize(
    "overlapping",
    [
        MountConfig(partition=1),
        MountConfig(partition=1, options=["noatime"]),
        MountConfig(partition=1, filesystem="ext4", ensure_filesystem=True),
        MountConfig(),
    ],
)
async def test_an_unknown_unmount_under_others(vm: VM, overlapping: MountConfig) -> None:
    """An equal or overlapping add finishes it, others go on, and the old handle is done."""
    await vm.add(mount=None)
    first, second = MountConfig(partition=1), MountConfig(partition=2)
    old = await vm.add(mount=first)
    vm.guest.lose("unmount", happened=True)
    with pytest.raises(OutcomeUnknownError):
        await old.release()
    assert vm.status().state is SlotState.TAKEN
    assert vm.status().reason
    vm.said()
    await vm.add(mount=second)
    assert vm.said() == ["mount"]
    new = await vm.add(mount=overlapping)
    assert vm.said() == ["unmount", "mount"]
    with pytest.raises(AlreadyReleasedError):
        await old.release()
    assert old not in vm.manager.mounts
    assert new in vm.manager.mounts


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
