"""What the guest is to know a disk by: asked of the host before each mount, if it can say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.memory import EXT4, VM, XFS

from hotlun import Attachment, BackendError, Disk, DiskIdentity, DiskKind, GuestMount, Manager, Slot
from hotlun.backends import base
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend

if TYPE_CHECKING:
    from hotlun import HostBackend

DISK = Disk("/d.img", DiskKind.VIRTUAL_DISK)
ATTACHMENT = Attachment(Slot(0, 0), DISK, "h1")


class Plain:
    """A host backend with nothing but the four methods."""

    async def attach(self, attachment: Attachment) -> None: ...
    async def detach(self, attachment: Attachment) -> None: ...
    async def grant_access(self, disk: Disk, vm_id: str) -> None: ...
    async def revoke_access(self, disk: Disk, vm_id: str) -> None: ...


def told(vm: VM) -> list[DiskIdentity | None]:
    """What the guest was told with each mount."""
    subjects = [call.subject for call in vm.host.calls if call.operation == "mount"]
    return [subject.identity for subject in subjects if isinstance(subject, GuestMount)]


async def test_each_mount_says_what_the_guest_is_to_find(vm: VM) -> None:
    """Two mounts of one attachment have its one serial."""
    one, two = await vm.add(mount=EXT4), await vm.add(mount=XFS)
    assert one.serial == two.serial
    assert told(vm) == [DiskIdentity(one.serial)] * 2


async def test_the_host_is_asked_anew_each_time(vm: VM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may have grown since the mount before."""
    sizes = iter([1024, 2048])
    monkeypatch.setattr(
        vm.host, "identity", lambda attachment: DiskIdentity(attachment.serial, next(sizes))
    )
    serial = (await vm.add(mount=EXT4)).serial
    await vm.add(mount=XFS)
    assert told(vm) == [DiskIdentity(serial, 1024), DiskIdentity(serial, 2048)]


async def test_an_attachment_that_moved_has_another_identity() -> None:
    """A slot that turned out taken costs a serial; the guest is told the one that counts."""
    host = MemoryHostBackend(taken=[Slot(0, 0)])
    guest = MemoryGuestBackend(host)
    async with Manager(host, guest) as manager:
        mount = await manager.add_virtual_disk("/d.img", mount=EXT4)
        assert mount.slot == Slot(0, 1)
        assert [one.identity for one in guest.mounted.values()] == [DiskIdentity(mount.serial)]


async def test_a_host_that_fails_to_say_fails_the_mount(
    vm: VM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was mounted, and what was attached for it goes again."""

    def refuse(attachment: Attachment) -> DiskIdentity:
        raise BackendError(f"no telling what {attachment.disk} is")

    monkeypatch.setattr(vm.host, "identity", refuse)
    with pytest.raises(BackendError, match="no telling what"):
        await vm.add()
    assert vm.said() == ["attach", "unplug", "detach"]


def test_a_host_need_not_know() -> None:
    """Then nothing is compared."""
    host: HostBackend = Plain()
    assert base.identity(host, ATTACHMENT) is None


async def test_the_fakes_see_an_identity_that_cannot_be() -> None:
    """Of what is not attached, and of another disk than the one that is mounted."""
    host, guest = MemoryHostBackend(), MemoryGuestBackend()
    with pytest.raises(AssertionError, match="the identity of what is not attached"):
        host.identity(ATTACHMENT)
    await host.attach(ATTACHMENT)
    assert base.identity(host, ATTACHMENT) == DiskIdentity("h1")
    mount = GuestMount(ATTACHMENT, "/m", EXT4, DiskIdentity("h2"))
    with pytest.raises(AssertionError, match="another disk's identity"):
        await guest.mount(mount)
    assert guest.mounted == {}
