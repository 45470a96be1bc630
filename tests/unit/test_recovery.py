"""What could not be found out is asked about again, by itself, whatever came in between."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.memory import DOWN, EXT4, VM, XFS, A, turns

from hotlun import (
    BackendError,
    HotlunError,
    JournalError,
    Manager,
    Mount,
    OutcomeUnknownError,
    Resolution,
)
from hotlun.journal import MemoryJournal


@pytest.fixture(autouse=True)
def _short_pauses(vm: VM) -> None:
    hurried(vm.manager)


def hurried(manager: Manager) -> Manager:
    manager._reconciler.first_pause = 0.02
    manager._reconciler.longest_pause = 0.05
    return manager


async def mounted(vm: VM, path: str | None) -> None:
    """It is, soon and by itself."""
    async with asyncio.timeout(5):
        while path not in vm.guest.mounted:
            await asyncio.sleep(0.01)


async def test_a_disk_that_was_in_work(vm: VM) -> None:
    """A reset undid a mount of it while another one was being made: it is seen to afterwards."""
    mount = await vm.add(A, EXT4)
    gate = vm.guest.stall("mount")
    adding = vm.start(A, XFS)
    await gate.reached.wait()
    vm.guest.reset()
    await turns(40)
    gate.open()
    await mounted(vm, mount.guest_path)
    for one in (mount, await adding):
        await one.release()


async def test_a_hypervisor_that_did_not_answer_when_the_guest_was_reset(vm: VM) -> None:
    """It is asked again, though nothing is known to be unresolved."""
    mount = await vm.add(A, EXT4)
    vm.host.fail("survey", BackendError("busy"))
    vm.guest.reset()
    await mounted(vm, mount.guest_path)
    await mount.release()


async def test_a_reset_of_a_saved_vm(vm: VM) -> None:
    """Nothing is done while it is frozen; thawed, its mounts are made again."""
    mount = await vm.add(A, EXT4)
    await vm.manager.save()
    vm.guest.reset()
    await turns()
    assert vm.guest.mounted == {}
    vm.manager.thaw()
    await mounted(vm, mount.guest_path)
    await mount.release()


@pytest.mark.parametrize("how", ["fails", "is lost"])
async def test_a_guest_that_did_not_answer_on_entering(how: str) -> None:
    """What it has is taken to be as it was, until it says so."""
    journal = MemoryJournal()
    vm = VM(journal=journal)
    async with vm.manager:
        mount = await vm.add(A, EXT4)
    assert mount.guest_path is not None
    vm.guest.vanish(mount.guest_path)
    if how == "fails":
        vm.guest.fail("survey", BackendError("booting"))
    else:
        vm.guest.lose("survey")
    async with hurried(Manager(vm.host, vm.guest, journal=journal)) as manager:
        assert manager.mounts[0].guest_path == mount.guest_path
        await mounted(vm, mount.guest_path)
        await manager.release_all()
    vm.assert_backends_empty()


async def test_a_reset_while_it_is_entered() -> None:
    """What was heard before all was settled is seen to after it."""
    journal = MemoryJournal()
    vm = VM(journal=journal)
    async with vm.manager:
        mount = await vm.add(A, EXT4)
    answer = vm.guest.survey

    async def reset_after(*asked: Any) -> Any:
        seen = await answer(*asked)
        vm.guest.reset()
        return seen

    vm.guest.survey = reset_after  # type: ignore[method-assign, assignment]
    async with hurried(Manager(vm.host, vm.guest, journal=journal)) as manager:
        vm.guest.survey = answer  # type: ignore[method-assign]
        await mounted(vm, mount.guest_path)
        await manager.release_all()
    vm.assert_backends_empty()


class TestMountedAgain:
    """What the guest lost is made again as long as nothing says that it cannot be."""

    @pytest.mark.parametrize("happened", [False, True])
    async def test_with_an_unknown_outcome(self, vm: VM, happened: bool) -> None:
        """It is found out, and made again if it was not."""
        mount = await vanished(vm)
        vm.guest.lose("mount", happened=happened)
        (one,) = await vm.manager.reconcile()
        assert one.resolution is Resolution.STUCK
        await mounted(vm, mount.guest_path)
        await vm.manager.reconcile()
        assert not mount.lost
        vm.said()
        await mount.release()
        assert vm.said() == DOWN

    async def test_that_cannot_be_written_down(
        self, vm: VM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A journal that has no room for a while loses no mount."""
        mount = await vanished(vm)
        monkeypatch.setattr(vm.manager._session.worker, "_record", no_room)
        await vm.manager.reconcile()
        monkeypatch.undo()
        hurried(vm.manager)
        await mounted(vm, mount.guest_path)
        assert not mount.lost
        await mount.release()

    async def test_an_add_of_it_meanwhile(self, vm: VM) -> None:
        """It undoes what may be there, makes it again, and those who held it hold it still."""
        mount, bare = await vanished(vm), await vm.add(A, None)
        vm.guest.lose("mount", happened=True)
        await vm.manager.reconcile()
        vm.said()
        sharing = await vm.add(A, EXT4)
        assert vm.said() == ["unmount", "mount"]
        assert sharing.guest_path == mount.guest_path
        await sharing.release()
        assert mount.guest_path in vm.guest.mounted
        await mount.release()
        await bare.release()

    @pytest.mark.parametrize(
        ("error", "is_lost"), [(BackendError("no"), True), (OutcomeUnknownError("lost"), False)]
    )
    async def test_an_add_of_it_that_fails(self, vm: VM, error: HotlunError, is_lost: bool) -> None:
        """It is told so, and does not try for ever."""
        mount, bare = await vanished(vm), await vm.add(A, None)
        vm.guest.lose("mount", happened=True)
        await vm.manager.reconcile()
        for at in range(1, 10):
            vm.guest.fail("mount", error, at=at)
        async with asyncio.timeout(5):
            with pytest.raises(type(error)):
                await vm.add(A, EXT4)
        assert bool(mount.lost) == is_lost
        vm.guest.clear_faults()
        await mount.release()
        await bare.release()

    @pytest.mark.parametrize("happened", [False, True])
    async def test_released_with_an_unknown_outcome(self, vm: VM, happened: bool) -> None:
        """What nobody wants is not made again."""
        mount, bare = await vanished(vm), await vm.add(A, None)
        vm.guest.lose("mount", happened=True)
        await vm.manager.reconcile()
        vm.guest.lose("unmount", happened=happened)
        with pytest.raises(OutcomeUnknownError):
            await mount.release()
        (one,) = await vm.manager.reconcile()
        assert one.resolution is (Resolution.NOTED if happened else Resolution.ADOPTED)
        await mount.release()
        assert vm.guest.mounted == {}
        await bare.release()

    @pytest.mark.parametrize("happened", [False, True])
    async def test_by_the_next_process(self, happened: bool) -> None:
        """If this one is killed while it does so: that mount, and those that had to wait."""
        journal = MemoryJournal()
        vm = VM(journal=journal)
        manager = await vm.manager.__aenter__()
        paths = [(await vm.add(A, config)).guest_path for config in (EXT4, XFS)]
        vm.guest.reset()
        gate = vm.guest.stall("mount", at=2 if happened else 1)
        await gate.reached.wait()
        assert len(vm.guest.mounted) == happened
        after = MemoryJournal()
        after._documents = dict(journal._documents)
        await manager._reconciler.stop()
        for task in manager._session.worker._tasks.values():
            task.cancel()
        async with Manager(vm.host, vm.guest, journal=after) as manager:
            assert [mount.guest_path for mount in manager.mounts] == paths
            assert set(vm.guest.mounted) == set(paths)
            assert not any(mount.lost for mount in manager.mounts)
            await manager.release_all()
        vm.assert_backends_empty()


async def vanished(vm: VM) -> Mount:
    """A Mount whose guest mount somebody undid in the guest."""
    mount = await vm.add(A, EXT4)
    assert mount.guest_path is not None
    vm.guest.vanish(mount.guest_path)
    return mount


def no_room(_: object) -> None:
    raise JournalError("no room")
