"""What could not be found out is asked about again, by itself, whatever came in between."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.memory import EXT4, VM, XFS, A, turns

from hotlun import BackendError, Manager
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
