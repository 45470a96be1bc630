"""A Manager over a Windows guest behind the bridge: what goes over the wire, and what never."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from support.peer import DEADLINE, Peer, connect
from support.windows_guest import REFUSED

from hotlun import (
    BackendError,
    Manager,
    MountConfig,
    NoAvailableLocationError,
    OutcomeUnknownError,
    Slot,
    SlotState,
    UnsupportedError,
)
from hotlun.backends.bridge import BridgeGuestBackend
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.bridge import messages
from hotlun.bridge.codes import HResult
from hotlun.bridge.messages import MessageType
from hotlun.journal import MemoryJournal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.peer import Call

    from hotlun.bridge.frames import Frame

NTFS = MountConfig()
SCRATCH = MountConfig(container_scratch=True)

ADD_M0 = (
    b'{"ContainerId":"00000000-0000-0000-0000-000000000000",'
    b'"ActivityId":"00000000-0000-0000-0000-000000000000",'
    b'"Request":{"RequestType":"Add","ResourceType":"MappedVirtualDisk",'
    b'"Settings":{"ContainerPath":"c:\\\\mounts\\\\scsi\\\\m0","Lun":2}}}\n'
)
ADD_SCRATCH_M1 = (
    b'{"ContainerId":"00000000-0000-0000-0000-000000000000",'
    b'"ActivityId":"00000000-0000-0000-0000-000000000000",'
    b'"Request":{"RequestType":"Add","ResourceType":"MappedVirtualDiskForContainerScratch",'
    b'"Settings":{"ContainerPath":"c:\\\\mounts\\\\scsi\\\\m1","Lun":4}}}\n'
)
REMOVE_M0 = ADD_M0.replace(b'"Add"', b'"Remove"')
REMOVE_M1 = ADD_SCRATCH_M1.replace(b'"Add"', b'"Remove"').replace(b"ForContainerScratch", b"")


class Windows:
    """A VM with a host in memory, and a scripted agent that says it runs `system`."""

    def __init__(self, path: Path, system: str = "Windows") -> None:
        greeting = messages.negotiate_response([])
        greeting["Capabilities"]["RuntimeOsType"] = system
        self.host = MemoryHostBackend()
        self.peer = Peer(path, greeting=greeting, react=self._react)
        self.code: int | None = HResult.OK
        """With which an Add is answered; None leaves it without an answer."""
        self.guest: BridgeGuestBackend

    def _react(self, call: Call) -> list[Frame]:
        is_add = call.document["Request"]["RequestType"] == "Add"
        code = self.code if is_add else HResult.OK
        return [] if code is None else [call.answer(code, "so it is" if code else "")]

    def manager(self, **arguments: Any) -> Manager:
        return Manager(self.host, self.guest, **arguments)

    def sent(self) -> list[bytes]:
        """What the agent was asked for since last time."""
        calls = list(self.peer.calls)
        self.peer.calls.clear()
        assert {call.frame.type for call in calls} <= {MessageType.MODIFY_SETTINGS}
        return [call.frame.payload for call in calls]

    def done(self) -> list[str]:
        """What the host was asked for since last time."""
        operations = [call.operation for call in self.host.calls if call.operation != "survey"]
        self.host.calls.clear()
        return operations


@asynccontextmanager
async def windows(
    tmp_path: Path, *, system: str = "Windows", timeout: float = DEADLINE
) -> AsyncIterator[Windows]:
    vm = Windows(tmp_path / "agent.sock", system)
    async with vm.peer, connect(vm.peer) as connection:
        vm.guest = BridgeGuestBackend(connection, "windows", timeout=timeout)
        yield vm


@pytest.fixture
async def vm(tmp_path: Path) -> AsyncIterator[Windows]:
    async with windows(tmp_path) as vm:
        yield vm


async def test_a_disk_and_a_scratch_byte_for_byte(vm: Windows) -> None:
    """A path and a LUN each; the scratch goes as any other disk; no word of an unplug."""
    own = [Slot(0, 0), Slot(0, 1), Slot(0, 3)]
    async with vm.manager(reserved_slots=own) as manager:
        disk = await manager.add_virtual_disk("/a.vhdx", mount=NTFS)
        scratch = await manager.add_virtual_disk("/b.vhdx", mount=SCRATCH)
        assert vm.sent() == [ADD_M0, ADD_SCRATCH_M1]
        await scratch.release()
        await disk.release()
        assert vm.sent() == [REMOVE_M1, REMOVE_M0]
    assert vm.done() == ["attach", "attach", "detach", "detach"]
    assert vm.sent() == []


async def test_a_disk_that_is_only_attached(vm: Windows) -> None:
    """The guest is told nothing, from its add to its end."""
    async with vm.manager() as manager:
        mount = await manager.add_virtual_disk("/a.vhdx")
        assert mount.guest_path is None
        await mount.release()
    assert vm.done() == ["attach", "detach"]
    assert vm.sent() == []


async def test_64_disks_fill_it(vm: Windows) -> None:
    """Nothing is asked of anybody for the next one."""
    async with vm.manager() as manager:
        slots = [(await manager.add_virtual_disk(f"/{n}.vhdx", mount=NTFS)).slot for n in range(64)]
        assert slots == [Slot(0, lun) for lun in range(64)]
        vm.sent()
        vm.done()
        with pytest.raises(NoAvailableLocationError, match="uses no controller above 0"):
            await manager.add_virtual_disk("/64.vhdx", mount=NTFS, vm_id="vm")
        assert (vm.sent(), vm.done()) == ([], [])


@pytest.mark.parametrize("name", REFUSED)
async def test_what_it_cannot_do_is_refused_before_anything_is_touched(
    vm: Windows, name: str
) -> None:
    """No access is granted, nothing attached, nothing sent."""
    async with vm.manager() as manager:
        with pytest.raises(UnsupportedError, match=rf"does not know .*{name}.*leave that out"):
            await manager.add_virtual_disk(
                "/a.vhdx", mount=MountConfig(**REFUSED[name]), vm_id="vm", read_only=True
            )
    assert (vm.sent(), vm.done()) == ([], [])


async def test_a_scratch_on_a_read_only_disk_is_refused(vm: Windows) -> None:
    """It would be formatted."""
    async with vm.manager() as manager:
        with pytest.raises(UnsupportedError, match="attach it writable"):
            await manager.add_virtual_disk("/a.vhdx", mount=SCRATCH, vm_id="vm", read_only=True)
    assert (vm.sent(), vm.done()) == ([], [])


async def test_a_refused_mount(vm: Windows) -> None:
    """The guest's words and code, and the disk is out again."""
    vm.code = HResult.FAIL
    async with vm.manager() as manager:
        with pytest.raises(BackendError, match="so it is") as caught:
            await manager.add_virtual_disk("/a.vhdx", mount=SCRATCH)
        assert (caught.value.operation, caught.value.code) == ("mount", HResult.FAIL)
        assert manager.slots()[0].state is SlotState.FREE
    assert len(vm.sent()) == 1
    assert vm.done() == ["attach", "detach"]


async def test_a_scratch_of_which_no_answer_came_is_undone(tmp_path: Path) -> None:
    """As any other disk: that is all the guest knows to remove."""
    async with windows(tmp_path, timeout=0.1) as vm:
        vm.code = None
        own = [Slot(0, lun) for lun in range(4)]
        async with vm.manager(reserved_slots=own, guest_mount_format=r"c:\mounts\scsi\m1%d") as m:
            with pytest.raises(OutcomeUnknownError):
                await m.add_virtual_disk("/a.vhdx", mount=SCRATCH)
        at_m10 = [document.replace(b"m1", b"m10") for document in (ADD_SCRATCH_M1, REMOVE_M1)]
        assert vm.sent() == at_m10
        assert vm.done() == ["attach", "detach"]


async def recorded(vm: Windows, journal: MemoryJournal, config: MountConfig | None) -> None:
    """Have a disk on each of two controllers, put there by a Manager that knew no better."""
    guest = MemoryGuestBackend(os_type="windows", controllers=2)
    async with Manager(vm.host, guest, journal=journal, luns_per_controller=1) as manager:
        for path in ("/a.vhdx", "/b.vhdx"):
            await manager.add_virtual_disk(path, mount=config)
    assert vm.done() == ["attach", "attach"]


class TestADiskThatIsRecordedOnControllerOne:
    async def test_is_there_and_can_be_released(self, vm: Windows) -> None:
        """Its slot is not given out again."""
        journal = MemoryJournal()
        await recorded(vm, journal, None)
        async with vm.manager(journal=journal, luns_per_controller=1) as manager:
            first, second = manager.mounts
            assert (first.slot, second.slot) == (Slot(0, 0), Slot(1, 0))
            assert manager.slots()[1].state is SlotState.TAKEN
            assert (await manager.add_virtual_disk("/b.vhdx")).slot == Slot(1, 0)
            await manager.mounts[-1].release()
            await second.release()
            assert manager.slots()[1].state is SlotState.RESERVED
            with pytest.raises(NoAvailableLocationError, match="no controller above 0"):
                await manager.add_virtual_disk("/b.vhdx")
            await first.release()
            last = await manager.add_virtual_disk("/b.vhdx", mount=NTFS)
            assert last.slot == Slot(0, 0)
            await last.release()
        assert vm.done() == ["detach", "detach", "attach", "detach"]

    async def test_is_not_detached_while_it_may_be_mounted(self, vm: Windows) -> None:
        """The guest cannot be told to unmount it: that is said, and it stays as it is."""
        journal = MemoryJournal()
        await recorded(vm, journal, NTFS)
        async with vm.manager(journal=journal, luns_per_controller=1) as manager:
            first, second = manager.mounts
            for _ in range(2):
                with pytest.raises(UnsupportedError, match="at slot 1:0: a windows guest has"):
                    await second.release()
            assert (vm.sent(), vm.done()) == ([], [])
            assert manager.mounts == (first, second)
            await first.release()
            assert vm.done() == ["detach"]

    async def test_comes_along_with_a_vm(self, vm: Windows) -> None:
        """From another host, in what was saved there."""
        guest = MemoryGuestBackend(os_type="windows", controllers=2)
        async with Manager(vm.host, guest, luns_per_controller=1) as manager:
            for path in ("/a.vhdx", "/b.vhdx"):
                await manager.add_virtual_disk(path)
            document = await manager.save()
        vm.done()
        async with Manager.restore(document, vm.host, vm.guest) as manager:
            assert [mount.slot for mount in manager.mounts] == [Slot(0, 0), Slot(1, 0)]
        assert vm.done() == ["detach", "detach"]
        assert vm.sent() == []


async def test_a_guest_that_runs_linux_is_not_detached_from_under(tmp_path: Path) -> None:
    """To its agent an unmount in Windows' words is one of nothing, and a success."""
    journal = MemoryJournal()
    async with windows(tmp_path, system="Linux") as vm:
        guest = MemoryGuestBackend(os_type="windows")
        async with Manager(vm.host, guest, journal=journal) as manager:
            await manager.add_virtual_disk("/a.vhdx", mount=NTFS)
        async with vm.manager(journal=journal) as manager:
            (mount,) = manager.mounts
            with pytest.raises(UnsupportedError, match=r"cannot unmount .* runs linux") as caught:
                await mount.release()
            assert caught.value.disk == mount.disk
            with pytest.raises(UnsupportedError, match=r"cannot unplug .* runs linux"):
                await vm.guest.unplug(next(iter(vm.host.attached.values())))
        assert vm.sent() == []
        assert vm.done() == ["attach"]
