"""Entering, leaving, arguments, and rule 15: nothing of the caller's is changed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from support.memory import EXT4, VM, A, B, start, turns

from hotlun import (
    BackendError,
    GuestBackend,
    HostBackend,
    Manager,
    MountConfig,
    NotInitializedError,
    Slot,
    UnsupportedError,
)
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend


def test_the_memory_backends_are_backends() -> None:
    """As the protocols say."""
    assert isinstance(MemoryHostBackend(), HostBackend)
    assert isinstance(MemoryGuestBackend(), GuestBackend)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"controllers": 0}, ValueError),
        ({"controllers": "4"}, TypeError),
        ({"luns_per_controller": 0}, ValueError),
        ({"reserved_slots": [Slot(4, 0)]}, ValueError),
        ({"reserved_slots": [Slot(0, 64)]}, ValueError),
        ({"reserved_slots": [(0, 0)]}, TypeError),
        ({"guest_mount_format": "/m"}, ValueError),
        ({"guest_mount_format": 3}, TypeError),
    ],
)
def test_wrong_constructor_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    """Refused at once."""
    with pytest.raises(error):
        Manager(MemoryHostBackend(), MemoryGuestBackend(), **arguments)


@pytest.mark.parametrize(
    ("host", "guest"),
    [(None, MemoryGuestBackend()), (MemoryHostBackend(), None), (object(), object())],
)
def test_no_backend(host: Any, guest: Any) -> None:
    """A Manager needs one on either side."""
    with pytest.raises(TypeError, match="Backend"):
        Manager(host, guest)


async def test_not_entered_yet() -> None:
    """Nothing works before, and an add touches nothing."""
    vm = VM()
    with pytest.raises(NotInitializedError, match="entered"):
        await vm.add()
    with pytest.raises(NotInitializedError):
        await vm.manager.release_all()
    assert vm.said() == []
    assert vm.manager.mounts == ()


async def test_entered_once() -> None:
    """Neither inside nor after."""
    manager = Manager(MemoryHostBackend(), MemoryGuestBackend())
    async with manager:
        with pytest.raises(NotInitializedError):
            await manager.__aenter__()
    with pytest.raises(NotInitializedError):
        await manager.__aenter__()
    with pytest.raises(NotInitializedError, match="left"):
        await manager.add_virtual_disk(A)


async def test_no_add_before_it_is_known_which_slots_others_have() -> None:
    """Until the host has told, the Manager is not entered."""
    told = asyncio.Event()

    class Host(MemoryHostBackend):
        async def occupied(self) -> frozenset[Slot]:
            await told.wait()
            return frozenset({Slot(0, 0)})

    manager = Manager(Host(), MemoryGuestBackend())
    entering = start(manager.__aenter__())
    await turns()
    for early in (manager.add_virtual_disk(A), manager.release_all(), manager.__aenter__()):
        with pytest.raises(NotInitializedError):
            await early
    told.set()
    await entering
    assert (await manager.add_virtual_disk(A)).slot == Slot(0, 1)
    await manager.__aexit__(None, None, None)


async def test_an_entering_that_failed_can_be_tried_again() -> None:
    """The hypervisor did not answer when it was asked for its own disks."""
    host = MemoryHostBackend()

    async def occupied() -> list[Slot]:
        raise BackendError("no answer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "occupied", occupied)
        manager = Manager(host, MemoryGuestBackend())
        with pytest.raises(BackendError):
            await manager.__aenter__()
    async with manager:
        await manager.add_virtual_disk(A)


async def test_leaving_releases_everything() -> None:
    """Without being asked."""
    async with VM() as vm:
        await vm.add(A, vm_id="vm")
        await vm.add(B, mount=None)
    vm.assert_empty()


async def test_an_add_in_flight_or_waiting_ends_with_the_manager() -> None:
    """NotInitializedError, and it is undone."""
    vm = VM()
    async with vm:
        old = await vm.add(B)
        attaching = vm.host.stall("attach")
        unmounting = vm.guest.stall("unmount")
        flying, sharing = vm.start(A), vm.start(A)
        release = start(old.release())
        await attaching.reached.wait()
        await unmounting.reached.wait()
        waiting = vm.start(B)
        await turns()
        leaving = start(vm.manager.__aexit__(None, None, None))
        outcomes = await asyncio.gather(flying, sharing, waiting, return_exceptions=True)
        assert [type(o) for o in outcomes] == [NotInitializedError] * 3
        assert not leaving.done()
        attaching.open()
        unmounting.open()
        await leaving
        await release
    vm.assert_empty()


async def test_an_add_that_was_done_but_not_told_ends_with_the_manager() -> None:
    """The caller had no turn between the mount and the leaving."""
    vm = VM()
    await vm.manager.__aenter__()
    adding = vm.start()
    while not vm.guest.mounted:
        await asyncio.sleep(0)
    await vm.manager.__aexit__(None, None, None)
    with pytest.raises(NotInitializedError):
        await adding
    vm.assert_empty()


async def test_clean_up_errors_become_notes_on_the_bodys() -> None:
    """The body's error is what is raised."""
    vm = VM()
    with pytest.raises(RuntimeError, match="body") as caught:
        async with vm.manager:
            await vm.add()
            vm.guest.fail("unmount", BackendError("busy"))
            raise RuntimeError("body")
    assert any("busy" in note for note in caught.value.__notes__)
    (mount,) = vm.manager.mounts
    await mount.release()
    vm.assert_empty()


async def test_a_leaving_that_fails_raises_and_can_be_finished() -> None:
    """release() still works afterwards."""
    vm = VM()
    with pytest.raises(ExceptionGroup, match="release_all"):
        async with vm.manager:
            mount = await vm.add()
            vm.host.fail("detach", BackendError("busy"))
    await mount.release()
    vm.assert_empty()


async def test_backends_are_not_closed(vm: VM) -> None:
    """Who opened them does that: another Manager can use them."""
    async with Manager(vm.host, vm.guest, reserved_slots=[Slot(0, 0)]) as manager:
        await manager.add_virtual_disk(B)
    await vm.add(A)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"guest_path": "/m"}, ValueError),
        ({"guest_path": "m", "mount": EXT4}, ValueError),
        ({"guest_path": "/a/../b", "mount": EXT4}, ValueError),
        ({"guest_path": "/a\0", "mount": EXT4}, ValueError),
        ({"mount": "ext4"}, TypeError),
        ({"vm_id": 3}, TypeError),
        ({"format": "iso"}, ValueError),
    ],
)
async def test_wrong_arguments(vm: VM, arguments: dict[str, Any], error: type[Exception]) -> None:
    """Refused before anything is touched."""
    with pytest.raises(error):
        await vm.manager.add_virtual_disk(A, **arguments)
    assert vm.said() == []


@pytest.mark.parametrize(
    ("path", "error"), [("", ValueError), ("a\0b", ValueError), (b"/a", TypeError), (3, TypeError)]
)
async def test_wrong_host_paths(vm: VM, path: Any, error: type[Exception]) -> None:
    """A path is text, not empty, without NUL."""
    with pytest.raises(error):
        await vm.manager.add_virtual_disk(path)
    with pytest.raises(error):
        await vm.manager.add_physical_disk(path)


async def test_a_path_like_is_a_path(vm: VM) -> None:
    """And a relative one is made absolute, for the hypervisor works elsewhere."""
    mount = await vm.manager.add_virtual_disk(Path("some/disk.img"))
    assert mount.disk.path == os.path.realpath("some/disk.img")


async def test_what_the_guest_refuses_is_refused_before_any_io(vm: VM) -> None:
    """UnsupportedError, and nothing was touched."""
    with pytest.raises(UnsupportedError, match="read_only=True"):
        await vm.add(mount=MountConfig(verity="00" * 32))
    assert vm.said() == []


async def test_the_callers_things_are_not_changed(vm: VM) -> None:
    """Nor can what is returned change the Manager."""
    options = ["nodev", "noatime", "nodev"]
    mount = await vm.add(mount=MountConfig(options=options))
    assert options == ["nodev", "noatime", "nodev"]
    options.append("ro")
    assert mount.config is not None
    assert mount.config.options == ("nodev", "noatime", "nodev")
    snapshot = vm.manager.slots()
    assert isinstance(snapshot, tuple)
    assert isinstance(vm.manager.mounts, tuple)
    with pytest.raises(AttributeError):
        snapshot[0].reason = "mine"  # type: ignore[misc] # the point


async def test_names_are_unique_and_well_formed(vm: VM) -> None:
    """Serials are what QEMU and SCSI can carry; ids differ even for sharers."""
    mounts = [await vm.add() for _ in range(3)]
    again = []
    for _ in range(3):
        other = await vm.add(B)
        again.append(other.serial)
        await other.release()
    assert len({m.id for m in mounts}) == 3
    assert len(set(again)) == 3
    assert all(len(serial) <= 20 and serial.isalnum() for serial in again)


async def test_a_mount_tells_what_it_is(vm: VM) -> None:
    """For logs and the curious."""
    mount = await vm.add(guest_path="/m")
    assert mount.id in repr(mount)
    assert A in repr(mount)
    assert "/m" in repr(mount)


async def test_each_step_is_told_to_the_log(vm: VM, caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG, with disk, slot and serial."""
    with caplog.at_level("DEBUG", logger="hotlun"):
        mount = await vm.add(vm_id="vm")
        await mount.release()
    text = caplog.text
    for operation in ("grant_access", "attach", "mount", "unmount", "unplug", "detach"):
        assert f"{operation} " in text
    assert all(
        mount.serial in line and A in line and "0:0" in line
        for line in text.splitlines()
        if "hotlun" in line
    )
