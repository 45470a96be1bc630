"""Rule 14: access is granted before the attach, once a VM, and revoked at the end."""

from __future__ import annotations

import asyncio

import pytest
from support.memory import DOWN, UP, VM, A, start, turns

from hotlun import BackendError, OutcomeUnknownError, SlotState


async def test_no_vm_id_no_grant(vm: VM) -> None:
    """Nobody asked."""
    await (await vm.add()).release()
    assert vm.said() == [*UP, *DOWN]


async def test_granted_before_the_attach_and_revoked_after_the_detach(vm: VM) -> None:
    """Once, however many ask with the same vm_id."""
    one, two = await vm.add(vm_id="vm"), await vm.add(vm_id="vm")
    await one.release()
    await two.release()
    assert vm.said() == ["grant_access", *UP, *DOWN, "revoke_access"]


async def test_each_new_vm_id_is_granted_on_an_attached_disk_too(vm: VM) -> None:
    """A set of them an attachment, all revoked at the end."""
    one, two, three = await vm.add(), await vm.add(vm_id="a"), await vm.add(vm_id="b")
    assert vm.said() == [*UP, "grant_access", "grant_access"]
    assert vm.host.granted == {(A, "a"), (A, "b")}
    for mount in (two, three, one):
        await mount.release()
    assert vm.said() == [*DOWN, "revoke_access", "revoke_access"]


async def test_a_failed_grant_fails_only_its_add(vm: VM) -> None:
    """One that waits with the same vm_id tries for itself; others do not notice."""
    gate = vm.host.stall("grant_access")
    vm.host.fail("grant_access", BackendError("no such user"))
    one, two, three = vm.start(vm_id="vm"), vm.start(vm_id="vm"), vm.start()
    await gate.reached.wait()
    gate.open()
    outcomes = await asyncio.gather(one, two, three, return_exceptions=True)
    assert [isinstance(o, BackendError) for o in outcomes] == [True, False, False]
    assert vm.said() == ["grant_access", "grant_access", *UP]


async def test_a_failed_grant_alone_leaves_nothing(vm: VM) -> None:
    """No attach, no revoke, no slot."""
    vm.host.fail("grant_access", BackendError("no such user"))
    with pytest.raises(BackendError):
        await vm.add(vm_id="vm")
    assert vm.said() == ["grant_access"]
    vm.assert_empty()


async def test_a_failed_grant_on_an_attached_disk(vm: VM) -> None:
    """Only that add fails; its mount was never made."""
    keeper = await vm.add(mount=None)
    vm.said()
    vm.host.fail("grant_access", BackendError("no such user"))
    with pytest.raises(BackendError):
        await vm.add(vm_id="vm")
    assert vm.said() == ["grant_access"]
    assert vm.manager.mounts == (keeper,)


async def test_the_attach_waits_for_grants_in_flight(vm: VM) -> None:
    """Everyone who waits for the attach may open the disk when it comes."""
    gate = vm.host.stall("grant_access", at=2)
    one, two = vm.start(vm_id="a"), vm.start(vm_id="b")
    await gate.reached.wait()
    assert vm.said() == ["grant_access", "grant_access"]
    gate.open()
    await asyncio.gather(one, two)
    assert vm.said() == UP


async def test_a_grant_of_unknown_outcome_counts_as_made_for_revoking(vm: VM) -> None:
    """Its add fails, and it is revoked."""
    vm.host.lose("grant_access", happened=True)
    with pytest.raises(OutcomeUnknownError):
        await vm.add(vm_id="vm")
    assert vm.said() == ["grant_access", "revoke_access"]


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_grant_without_an_attach_that_cannot_be_revoked_has_no_slot(
    vm: VM, is_cancelled: bool
) -> None:
    """Nothing was attached, so only a revoke is lacking; it is not lost."""
    gate = vm.host.stall("grant_access")
    if not is_cancelled:
        vm.host.lose("grant_access", happened=True)
    vm.host.fail("revoke_access", BackendError("busy"))
    adding = vm.start(vm_id="vm")
    await gate.reached.wait()
    if is_cancelled:
        adding.cancel()
    await turns()
    gate.open()
    with pytest.raises(asyncio.CancelledError if is_cancelled else OutcomeUnknownError):
        await adding
    await turns()
    assert vm.said() == ["grant_access", "revoke_access"]
    assert vm.status().state is SlotState.FREE
    await vm.add()
    assert vm.said() == ["revoke_access", *UP]


async def test_a_grant_of_unknown_outcome_counts_as_not_made_for_granting(vm: VM) -> None:
    """The next add with this vm_id grants again; one revoke at the end."""
    keeper = await vm.add()
    vm.host.lose("grant_access", happened=True)
    with pytest.raises(OutcomeUnknownError):
        await vm.add(vm_id="vm")
    vm.said()
    mount = await vm.add(vm_id="vm")
    assert vm.said() == ["grant_access"]
    await mount.release()
    await keeper.release()
    assert vm.said() == [*DOWN, "revoke_access"]


async def test_all_are_revoked_after_a_failed_attach(vm: VM) -> None:
    """Everyone's."""
    vm.host.fail("attach", BackendError("no such file"))
    outcomes = await asyncio.gather(vm.add(vm_id="a"), vm.add(vm_id="b"), return_exceptions=True)
    assert all(isinstance(o, BackendError) for o in outcomes)
    assert vm.said() == ["grant_access", "grant_access", "attach", "revoke_access", "revoke_access"]


async def test_a_grant_that_came_through_serves_the_next_if_its_caller_was_cancelled(
    vm: VM,
) -> None:
    """The fact counts, whoever it was for."""
    gate = vm.host.stall("grant_access")
    one, two = vm.start(vm_id="vm"), vm.start(vm_id="vm")
    await gate.reached.wait()
    one.cancel()
    await turns()
    gate.open()
    await two
    assert vm.said() == ["grant_access", *UP]


async def test_extensible_disks_know_no_grants(vm: VM) -> None:
    """There is no file to give access to."""
    with pytest.raises(TypeError):
        await vm.manager.add_extensible_virtual_disk("evd://p/x", vm_id="vm")  # type: ignore[call-arg] # the point


async def test_a_release_waits_for_its_grant_in_flight(vm: VM) -> None:
    """Nothing is undone under an add that is under way."""
    keeper = await vm.add()
    gate = vm.host.stall("grant_access")
    adding = vm.start(vm_id="vm")
    await gate.reached.wait()
    await keeper.release()
    gate.open()
    await (await adding).release()
    assert vm.said() == [*UP, "grant_access", *DOWN, "revoke_access"]


async def test_cancelled_with_the_grant_in_flight_of_a_shared_disk(vm: VM) -> None:
    """The grant stays until the detach."""
    keeper = await vm.add()
    gate = vm.host.stall("grant_access")
    adding = vm.start(vm_id="vm")
    await gate.reached.wait()
    adding.cancel()
    await turns()
    gate.open()
    await turns()
    vm.said()
    release = start(keeper.release())
    await release
    assert vm.said() == [*DOWN, "revoke_access"]
