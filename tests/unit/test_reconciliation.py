"""Each disagreement between journal, hypervisor and guest, and how it is settled."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from support.memory import EXT4, FORMATS, UP, VM, XFS, A, B, start, turns

from hotlun import (
    AlreadyReleasedError,
    Attachment,
    BackendError,
    Disk,
    DiskKind,
    Finding,
    HotlunError,
    Manager,
    MountConfig,
    NotInitializedError,
    OutcomeUnknownError,
    Resolution,
    Secret,
    Slot,
    SlotState,
    VMGoneError,
)
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.events import (
    ConnectionRestored,
    DisagreementSettled,
    Event,
    GuestReset,
    VMPaused,
)
from hotlun.facts import Fact
from hotlun.journal import MemoryJournal
from hotlun.journal_documents import understood
from hotlun.model import Presence
from hotlun.owners import NOBODY
from hotlun.reconciler import Reconciler
from hotlun.recorder import disk_of
from hotlun.states import DiskState, Handle
from hotlun.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from hotlun import Disagreement

SCRATCH = MountConfig(filesystem="ext4", ensure_filesystem=True, encrypted=True)
LOCKED = MountConfig(encrypted=True, key=Secret("sesame"))


async def settled(vm: VM) -> list[tuple[Finding, Resolution]]:
    """Reconcile; what was found, and how it was settled."""
    return told(await vm.manager.reconcile())


def told(disagreements: tuple[Disagreement, ...]) -> list[tuple[Finding, Resolution]]:
    return [(one.finding, one.resolution) for one in disagreements]


async def test_nothing_disagrees(vm: VM) -> None:
    """What is as believed is left as it is, whatever is going on besides."""
    mount = await vm.add(A, EXT4)
    bare = await vm.add(B, None)
    gate = vm.host.stall("attach")
    adding = vm.start("/disks/d")
    await gate.reached.wait()
    vm.said()
    assert await settled(vm) == []
    assert vm.said() == ["survey", "survey"]
    gate.open()
    for one in (mount, bare, await adding):
        await one.release()


async def test_a_guest_that_knows_no_serials_is_not_asked(vm: VM) -> None:
    """It would not find our disks, and what it does not find would be taken for gone."""
    vm.host.serials = False
    mount = await vm.add(A, EXT4)
    vm.guest.vanish(mount.guest_path or "")
    vm.said()
    assert await settled(vm) == []
    assert vm.said() == ["survey"]
    vm.host.serials = True
    assert await settled(vm) == [(Finding.MOUNT_GONE, Resolution.REMOUNTED)]
    await mount.release()


async def test_what_the_hypervisor_does_not_speak_of_is_taken_to_be_there(vm: VM) -> None:
    """That disk alone: another is lost, and what the guest says of either counts."""
    quiet, pulled = await vm.add(A, EXT4), await vm.add(B, EXT4)
    survey = vm.host.survey

    async def knows_one(attachments: Collection[Attachment]) -> dict[str, Presence]:
        return {**(await survey(attachments) or {}), quiet.serial: Presence.UNKNOWN}

    vm.host.survey = knows_one  # type: ignore[method-assign]
    vm.host.vanish(pulled.serial)
    vm.guest.vanish(quiet.guest_path or "")
    found = {one.attachment.serial: one for one in await vm.manager.reconcile()}
    assert found[pulled.serial].resolution is Resolution.LOST
    assert found[quiet.serial].resolution is Resolution.REMOUNTED
    assert not quiet.lost
    await quiet.release()
    await pulled.release()


class TestLost:
    async def test_a_disk_that_was_pulled(self, vm: VM, caplog: pytest.LogCaptureFixture) -> None:
        """Its Mounts say so; each release succeeds, says so too, and the last one cleans up."""
        one, other = await vm.add(A, EXT4), await vm.add(A, EXT4)
        vm.host.vanish(one.serial)
        assert await settled(vm) == [(Finding.DISK_GONE, Resolution.LOST)]
        assert "hypervisor has it no more" in one.lost
        assert "hypervisor has it no more" in other.lost
        assert "lost" in repr(one)
        assert vm.status().state is SlotState.TAKEN
        assert "lost" in vm.status().reason
        assert await settled(vm) == []
        await one.release()
        assert vm.guest.mounted
        caplog.clear()
        await other.release()
        assert vm.status().state is SlotState.FREE
        assert one.lost
        assert "lost: the hypervisor has it no more" in caplog.text

    @pytest.mark.parametrize("order", [1, -1])
    async def test_one_that_is_mounted_twice(self, vm: VM, order: int) -> None:
        """A release gives back its own share, and leaves others theirs."""
        mounts = [await vm.add(A, EXT4), await vm.add(A, XFS)][::order]
        vm.host.vanish(mounts[0].serial)
        await settled(vm)
        vm.said()
        await mounts[0].release()
        assert vm.said() == ["unmount"]
        assert vm.manager.mounts == (mounts[1],)
        await mounts[1].release()
        assert vm.said() == ["unmount", "unplug", "detach"]

    async def test_an_add_of_it_attaches_it_afresh(self, vm: VM) -> None:
        """After it has cleaned up; the old Mounts have nothing left to give back."""
        old = await vm.add(A, EXT4)
        vm.host.vanish(old.serial)
        await settled(vm)
        vm.said()
        new = await vm.add(A, EXT4)
        assert vm.said() == ["unmount", "unplug", "detach", *UP]
        assert new.serial != old.serial
        assert not new.lost
        with pytest.raises(AlreadyReleasedError):
            await old.release()
        await new.release()

    async def test_an_unmounted_scratch_disk(self, vm: VM) -> None:
        """Its key is gone with the mount, so it cannot come back; the disk itself stays."""
        scratch, bare = await vm.add(A, SCRATCH), await vm.add(A, None)
        assert scratch.guest_path is not None
        vm.guest.vanish(scratch.guest_path)
        assert await settled(vm) == [(Finding.MOUNT_GONE, Resolution.LOST)]
        assert "key" in scratch.lost
        assert not bare.lost
        await scratch.release()
        assert vm.host.attached
        again = await vm.add(A, SCRATCH)
        await again.release()
        await bare.release()

    async def test_what_is_lost_stays_so(self) -> None:
        """In the next process, too."""
        journal = MemoryJournal()
        vm = VM(journal=journal)
        async with vm.manager:
            mount = await vm.add(A, EXT4)
            vm.host.vanish(mount.serial)
            await settled(vm)
        async with Manager(vm.host, vm.guest, journal=journal) as manager:
            (again,) = manager.mounts
            assert again.lost == mount.lost
            await again.release()
        vm.assert_backends_empty()


class TestMountedAgain:
    async def test_a_mount_that_somebody_removed(self, vm: VM) -> None:
        """At the same path, for all who share it."""
        one, other = await vm.add(A, FORMATS), await vm.add(A, FORMATS)
        assert one.guest_path is not None
        vm.guest.vanish(one.guest_path)
        assert await settled(vm) == [(Finding.MOUNT_GONE, Resolution.REMOUNTED)]
        assert one.guest_path in vm.guest.mounted
        assert not one.lost
        await one.release()
        await other.release()

    async def test_one_that_cannot_be_mounted_is_lost(self, vm: VM) -> None:
        """Its release undoes what may be left of it; other Mounts of the disk are not concerned."""
        mount, bare = await vm.add(A, EXT4), await vm.add(A, None)
        assert mount.guest_path is not None
        vm.guest.vanish(mount.guest_path)
        vm.guest.fail("mount", BackendError("somebody else's there"))
        (one,) = await vm.manager.reconcile()
        assert (one.finding, one.resolution) == (Finding.MOUNT_GONE, Resolution.LOST)
        assert "somebody else's there" in str(one)
        assert "could not be made again" in mount.lost
        assert not bare.lost
        await mount.release()
        again = await vm.add(A, EXT4)
        await again.release()
        await bare.release()

    @pytest.mark.parametrize("error", [BackendError("no"), OutcomeUnknownError("lost")])
    async def test_an_add_that_joins_meanwhile(self, vm: VM, error: HotlunError) -> None:
        """It has the error if that fails, and waits for nobody's release."""
        mount = await vm.add(A, EXT4)
        assert mount.guest_path is not None
        vm.guest.vanish(mount.guest_path)
        gate = vm.guest.stall("mount")
        vm.guest.fail("mount", error)
        reconciling = start(vm.manager.reconcile())
        await gate.reached.wait()
        adding = vm.start(A, EXT4)
        await turns()
        gate.open()
        await reconciling
        async with asyncio.timeout(5):
            with pytest.raises(type(error)):
                await adding
        await mount.release()

    async def test_while_it_is_released(self, vm: VM) -> None:
        """A release that comes meanwhile is a release."""
        mount, bare = await vm.add(A, EXT4), await vm.add(A, None)
        assert mount.guest_path is not None
        vm.guest.vanish(mount.guest_path)
        gate = vm.guest.stall("mount")
        reconciling = start(vm.manager.reconcile())
        await gate.reached.wait()
        releasing = start(mount.release())
        await turns()
        gate.open()
        await reconciling
        await releasing
        assert vm.guest.mounted == {}
        await bare.release()

    async def test_with_a_key_as_long_as_that_is_known(self) -> None:
        """In the process that was given the key, or has been since; not in one that was not."""
        journal = MemoryJournal()
        vm = VM(journal=journal)
        async with vm.manager:
            mount = await vm.add(A, LOCKED)
            assert mount.guest_path is not None
            vm.guest.vanish(mount.guest_path)
            assert await settled(vm) == [(Finding.MOUNT_GONE, Resolution.REMOUNTED)]
        async with Manager(vm.host, vm.guest, journal=journal) as manager:
            await manager.add_virtual_disk(A, mount=LOCKED)
            vm.guest.vanish(mount.guest_path)
            assert told(await manager.reconcile()) == [(Finding.MOUNT_GONE, Resolution.REMOUNTED)]
        vm.guest.vanish(mount.guest_path)
        async with Manager(vm.host, vm.guest, journal=journal) as manager:
            assert all("key is not known" in mount.lost for mount in manager.mounts)
            await manager.release_all()
        vm.assert_backends_empty()

    async def test_after_a_reset_everything_is(self, vm: VM) -> None:
        """By itself, as soon as the guest answers; disks that are not mounted stay as they are."""
        mounts = [await vm.add(A, EXT4), await vm.add(B, FORMATS), await vm.add("/disks/d", None)]
        stream = vm.manager.events()
        vm.guest.reset()
        assert await anext(stream) == GuestReset(by_guest=True)
        for _ in range(2):
            event = await anext(stream)
            assert isinstance(event, DisagreementSettled)
            assert event.disagreement.resolution is Resolution.REMOUNTED
        assert len(vm.guest.mounted) == 2
        for mount in mounts:
            await mount.release()


class TestUnknownReleases:
    """A Mount whose release ended unknown is held still; by asking it is found out."""

    @pytest.mark.parametrize("happened", [False, True])
    async def test_an_unmount(self, vm: VM, happened: bool) -> None:
        """Mounted: as if nothing had been tried. Not mounted: the release goes on from there."""
        mount, bare = await vm.add(A, EXT4), await vm.add(A, None)
        vm.guest.lose("unmount", happened=happened)
        with pytest.raises(OutcomeUnknownError):
            await mount.release()
        if happened:
            assert await settled(vm) == [(Finding.UNMOUNTED, Resolution.NOTED)]
        else:
            assert await settled(vm) == [(Finding.MOUNT_KEPT, Resolution.ADOPTED)]
            sharing = await vm.add(A, EXT4)
            assert sharing.guest_path == mount.guest_path
            await sharing.release()
        assert await settled(vm) == []
        vm.said()
        await mount.release()
        assert vm.said() == ([] if happened else ["unmount"])
        await bare.release()

    @pytest.mark.parametrize("happened", [False, True])
    async def test_an_unmount_for_the_last_mount(self, vm: VM, happened: bool) -> None:
        """Where the whole disk was to go, as where others keep it."""
        mount = await vm.add(A, EXT4)
        vm.guest.lose("unmount", happened=happened)
        with pytest.raises(OutcomeUnknownError):
            await mount.release()
        if happened:
            assert await settled(vm) == [(Finding.UNMOUNTED, Resolution.NOTED)]
        else:
            assert await settled(vm) == [(Finding.MOUNT_KEPT, Resolution.ADOPTED)]
        assert await settled(vm) == []
        vm.said()
        await mount.release()
        assert vm.said() == [*([] if happened else ["unmount"]), "unplug", "detach"]

    async def test_an_unmount_of_a_disk_that_is_pulled_meanwhile(self, vm: VM) -> None:
        """Between the two askings; what is left of the mount is still to be undone."""
        mount = await vm.add(A, EXT4)
        vm.guest.lose("unmount")
        with pytest.raises(OutcomeUnknownError):
            await mount.release()
        gate = vm.guest.stall("survey")
        reconciling = start(vm.manager.reconcile())
        await gate.reached.wait()
        vm.host.vanish(mount.serial)
        gate.open()
        assert await reconciling == ()
        assert await settled(vm) == [(Finding.DISK_GONE, Resolution.LOST)]
        await mount.release()
        assert vm.guest.mounted == {}

    @pytest.mark.parametrize("happened", [False, True])
    async def test_an_unplug(self, vm: VM, happened: bool) -> None:
        """The guest has the device: it can be shared again. It has let go: it is detached."""
        mount = await vm.add(A, None)
        vm.guest.lose("unplug", happened=happened)
        with pytest.raises(OutcomeUnknownError):
            await mount.release()
        if happened:
            assert await settled(vm) == [(Finding.DEVICE_GONE, Resolution.NOTED)]
        else:
            assert await settled(vm) == [(Finding.DEVICE_KEPT, Resolution.ADOPTED)]
            sharing = await vm.add(A, EXT4)
            assert sharing.serial == mount.serial
            await sharing.release()
        vm.said()
        await mount.release()
        assert vm.said() == (["detach"] if happened else ["unplug", "detach"])

    @pytest.mark.parametrize("operation", ["unmount", "unplug"])
    async def test_nothing_is_decided_while_the_guest_is_at_it(
        self, vm: VM, operation: str
    ) -> None:
        """What was asked for may yet happen; when it has, or not, that is found out by itself."""
        vm.manager._reconciler.first_pause = 0.02
        mount = await vm.add(A, EXT4 if operation == "unmount" else None)
        vm.guest.lose(operation)
        vm.guest.busy = {mount.serial}
        with pytest.raises(OutcomeUnknownError):
            await mount.release()
        assert await settled(vm) == []
        stream = vm.manager.events()
        vm.guest.busy.clear()
        assert await resolution(stream) is Resolution.ADOPTED
        await mount.release()

    async def test_a_device_that_came_back(self, vm: VM) -> None:
        """Let go, and found again by a guest that was reset: it is unplugged once more.

        It is never shared again: the hypervisor may be about to take it away.
        """
        mount = await vm.add(A, None)
        vm.host.lose("detach")
        with pytest.raises(OutcomeUnknownError):
            await mount.release()
        vm.guest._unplugged.clear()
        assert await settled(vm) == [(Finding.DISK_BACK, Resolution.NOTED)]
        assert await settled(vm) == []
        assert mount.lost
        vm.said()
        await mount.release()
        assert vm.said() == ["unplug", "detach"]


class TestNobodyHoldsIt:
    async def test_a_stuck_disk_is_undone(self, vm: VM) -> None:
        """Quarantine ends with the first asking that finds both sides answering."""
        await quarantine(vm)
        assert await settled(vm) == [(Finding.ATTACHED_UNSEEN, Resolution.UNDONE)]
        assert vm.status().state is SlotState.FREE

    async def test_one_that_was_never_attached(self, vm: VM) -> None:
        """Nothing is there; the slot is free."""
        await quarantine(vm, happened=False)
        assert await settled(vm) == [(Finding.NEVER_ATTACHED, Resolution.UNDONE)]
        assert vm.status().state is SlotState.FREE

    async def test_one_that_the_hypervisor_does_not_speak_of(self, vm: VM) -> None:
        """Whether it was attached stays unknown; undoing it can be done all the same."""

        async def knows_nothing(attachments: Collection[Attachment]) -> dict[str, Presence]:
            return {one.serial: Presence.UNKNOWN for one in attachments}

        await quarantine(vm)
        vm.host.survey = knows_nothing  # type: ignore[method-assign]
        assert await settled(vm) == [(Finding.UNHELD, Resolution.UNDONE)]
        assert vm.status().state is SlotState.FREE

    async def test_one_that_stays_stuck(self, vm: VM) -> None:
        """It is named with its reason, which `slots()` has as well."""
        await quarantine(vm)
        vm.guest.fail("unplug", BackendError("still no"))
        (one,) = await vm.manager.reconcile()
        assert one.resolution is Resolution.STUCK
        assert "still no" in str(one)
        assert vm.status().state is SlotState.QUARANTINED
        assert "still no" in vm.status().reason
        assert await settled(vm) == [(Finding.ATTACHED_UNSEEN, Resolution.UNDONE)]

    async def test_a_mount_on_a_disk_that_others_hold(self, vm: VM) -> None:
        """Only the mount is undone."""
        bare = await vm.add(A, None)
        vm.guest.lose("mount", happened=True)
        vm.guest.fail("unmount", BackendError("busy"))
        with pytest.raises(OutcomeUnknownError):
            await vm.add(A, EXT4)
        assert await settled(vm) == [(Finding.MOUNTED_UNSEEN, Resolution.UNDONE)]
        assert vm.guest.mounted == {}
        await bare.release()

    @pytest.mark.parametrize("surveys", [True, False])
    async def test_a_mount_that_is_there_for_certain(self, surveys: bool) -> None:
        """Its unmount was refused: it is tried again by itself, and in the next process.

        Nobody shares it before.
        """
        journal = MemoryJournal()
        vm = VM(journal=journal)
        vm.guest._surveys = surveys
        async with vm.manager:
            await vm.add(A, None)
            gate = vm.guest.stall("mount")
            adding = vm.start(A, EXT4)
            await gate.reached.wait()
            adding.cancel()
            for at in (1, 2, 3):
                vm.guest.fail("unmount", BackendError("busy"), at=at)
            await turns()
            gate.open()
            await turns()
            assert await settled(vm) == [(Finding.UNHELD, Resolution.STUCK)]
            assert len(vm.guest.mounted) == 1
            documents = dict(journal._documents)
            assert await settled(vm) == [(Finding.UNHELD, Resolution.STUCK)]
            assert await settled(vm) == [(Finding.UNHELD, Resolution.UNDONE)]
            assert vm.guest.mounted == {}
        (record,) = understood(documents.values(), "it")
        assert [mount.fact for mount in record.mounts] == [Fact.YES]
        (mount,) = disk_of(record).mounts.values()
        assert mount.closing
        async with Manager(vm.host, vm.guest, journal=journal) as manager:
            await manager.release_all()
        vm.assert_backends_empty()

    async def test_a_device_that_came_back(self, vm: VM) -> None:
        """After a reset the guest has to let it go again, before it is detached."""
        vm.host.lose("attach", happened=True)
        for at in (1, 2):
            vm.host.fail("detach", BackendError("no"), at=at)
        with pytest.raises(OutcomeUnknownError):
            await vm.add(A, None)
        vm.guest.reset()
        vm.said()
        await settled(vm)
        assert [said for said in vm.said() if said != "survey"] == ["unplug", "detach"]
        await settled(vm)
        assert vm.status().state is SlotState.FREE


class TestByItself:
    """Whatever is unresolved is asked about again, and tried again, without anybody's doing."""

    @pytest.fixture
    def short_pauses(self, vm: VM) -> None:
        vm.manager._reconciler.first_pause = 0.02
        vm.manager._reconciler.longest_pause = 0.05

    async def test_as_soon_as_a_connection_is_back(self, vm: VM) -> None:
        """Which the backend tells."""
        await quarantine(vm)
        stream = vm.manager.events()
        vm.host.tell(ConnectionRestored("host"))
        assert await anext(stream) == ConnectionRestored("host")
        assert isinstance(await anext(stream), DisagreementSettled)
        assert vm.status().state is SlotState.FREE

    @pytest.mark.usefixtures("short_pauses")
    async def test_after_pauses(self, vm: VM) -> None:
        """As often as it takes."""
        stream = vm.manager.events()
        await quarantine(vm)
        for at in range(1, 4):
            vm.guest.fail("unplug", BackendError("not yet"), at=at)
        resolutions = [await resolution(stream) for _ in range(4)]
        assert resolutions == [Resolution.STUCK] * 3 + [Resolution.UNDONE]
        assert vm.status().state is SlotState.FREE

    @pytest.mark.usefixtures("short_pauses")
    async def test_a_guest_that_does_not_answer_is_asked_again(self, vm: VM) -> None:
        """After a reset it takes its time."""
        mount = await vm.add(A, EXT4)
        for at in range(1, 4):
            vm.guest.fail("survey", BackendError("booting"), at=at)
        stream = vm.manager.events()
        vm.guest.reset()
        assert isinstance(await anext(stream), GuestReset)
        assert await resolution(stream) is Resolution.REMOUNTED
        assert mount.guest_path in vm.guest.mounted
        await mount.release()

    @pytest.mark.usefixtures("short_pauses")
    async def test_a_hypervisor_that_does_not_answer_is_asked_again(self, vm: VM) -> None:
        """Nothing is decided without it."""
        await quarantine(vm)
        vm.host.fail("survey", BackendError("busy"))
        stream = vm.manager.events()
        assert await resolution(stream) is Resolution.UNDONE

    async def test_nothing_is_when_nothing_is_unresolved(self, vm: VM) -> None:
        """No task waits for what may never come."""
        before = asyncio.all_tasks()
        mount = await vm.add()
        vm.host.tell(ConnectionRestored("host"))
        await turns()
        assert asyncio.all_tasks() == before
        await mount.release()


class TestOnEntering:
    @pytest.mark.parametrize("side", ["host", "guest"])
    async def test_a_side_that_does_not_answer(self, side: str) -> None:
        """Without the hypervisor it cannot be entered; a guest is asked again later."""
        journal = MemoryJournal()
        vm = VM(journal=journal)
        async with vm.manager:
            mount = await vm.add(A, EXT4)
        backend: Any = getattr(vm, side)
        backend.fail("survey", BackendError("nobody there"))
        manager = Manager(vm.host, vm.guest, journal=journal)
        if side == "host":
            with pytest.raises(BackendError):
                await manager.__aenter__()
        async with manager:
            assert [m.id for m in manager.mounts] == [mount.id]
            await manager.release_all()
        vm.assert_backends_empty()

    async def test_what_is_settled_is_told(self) -> None:
        """To who listens already: a stream can be had before."""
        journal = MemoryJournal()
        vm = VM(journal=journal)
        async with vm.manager:
            mount = await vm.add(A, EXT4)
        vm.host.vanish(mount.serial)
        manager = Manager(vm.host, vm.guest, journal=journal)
        stream = manager.events()
        async with manager:
            assert await resolution(stream) is Resolution.LOST
            await manager.release_all()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    async def test_it_is_asked_for_in_time(self) -> None:
        """Before and after, nobody can be asked."""
        vm = VM()
        with pytest.raises(NotInitializedError):
            await vm.manager.reconcile()
        async with vm.manager:
            vm.host.tell(VMPaused())
        with pytest.raises(NotInitializedError):
            await vm.manager.reconcile()
        vm.host.tell(VMPaused())  # nobody listens any more


class TestTheVMIsGone:
    async def test_everything_ends_with_one_error(self) -> None:
        """Promptly, whatever is asked for; what is under way, too."""
        vm = VM()
        with pytest.raises(ExceptionGroup) as left:
            async with vm.manager:
                mounts = [await vm.add(A, EXT4), await vm.add(B, None)]
                gate = vm.host.stall("attach")
                adding = vm.start("/disks/d")
                await gate.reached.wait()
                vm.host.end()
                gate.open()
                for work in (adding, vm.add("/disks/e"), mounts[0].release(), mounts[1].release()):
                    with pytest.raises(VMGoneError):
                        await work
                with pytest.raises(VMGoneError):
                    await vm.manager.reconcile()
        (error,) = left.value.exceptions
        assert isinstance(error, VMGoneError)

    async def test_it_is_forgotten(self) -> None:
        """Nobody is asked to undo anything; what was granted is revoked, the journal is empty."""
        journal = MemoryJournal()
        vm = VM(journal=journal)
        async with vm.manager as manager:
            mounts = [await vm.add(A, EXT4, vm_id="one"), await vm.add(A, None)]
            vm.host.end()
            vm.said()
            await manager.forget()
            assert vm.said() == ["survey", "revoke_access"]
            assert manager.mounts == ()
            assert [mount.lost for mount in mounts] == ["the VM is gone"] * 2
            with pytest.raises(AlreadyReleasedError):
                await mounts[0].release()
        assert journal.open() == []
        vm.assert_empty()

    async def test_one_that_still_runs_is_not_forgotten(self, vm: VM) -> None:
        """Unless it is insisted upon."""
        mount = await vm.add(A, EXT4)
        with pytest.raises(HotlunError, match="still runs"):
            await vm.manager.forget()
        assert vm.manager.mounts == (mount,)
        await mount.release()

    async def test_a_revoke_that_fails_can_be_tried_again(self) -> None:
        """What is to be revoked is not forgotten."""
        vm = VM()
        async with vm.manager as manager:
            await vm.add(A, None, vm_id="one")
            vm.host.end()
            for at in (1, 2):
                vm.host.fail("revoke_access", BackendError("no"), at=at)
            with pytest.raises(ExceptionGroup):
                await manager.forget()
            assert vm.host.granted
            await manager.forget()
        vm.assert_empty()


async def quarantine(vm: VM, happened: bool = True) -> None:
    """A disk whose attach ended unknown, and whose clean-up failed at once."""
    vm.host.lose("attach", happened=happened)
    vm.guest.fail("unplug", BackendError("not now"))
    with pytest.raises(OutcomeUnknownError):
        await vm.add(A, None)
    assert vm.status().state is SlotState.QUARANTINED


async def resolution(stream: AsyncIterator[Event]) -> Resolution:
    """Of the next disagreement that is settled."""
    async with asyncio.timeout(10):
        async for event in stream:
            if isinstance(event, DisagreementSettled):
                return event.disagreement.resolution
    raise AssertionError("no disagreement was settled")


class Compared(DiskState):
    """A disk that counts how often one is compared with another."""

    __slots__ = ()
    times = 0

    def __eq__(self, other: object) -> bool:
        Compared.times += 1
        return self is other

    __hash__ = DiskState.__hash__


async def test_each_disk_is_looked_for_once_however_many_there_are() -> None:
    """None of 256 is compared with the others to see whether it was asked about."""

    def nothing(*_: object) -> None:
        """What happens to the disks is not for this test."""

    host, guest = MemoryHostBackend(surveys=False), MemoryGuestBackend(surveys=False)
    told = dict.fromkeys(("settle", "relocate", "record", "rested", "answered"), nothing)
    worker = Worker(host, guest, **told)
    disks = []
    for number in range(256):
        place = Attachment(Slot(0, number), Disk(A, DiskKind.VIRTUAL_DISK), f"s{number}")
        disk = Compared(place, ("path", str(number), ""))
        disk.fact = Fact.YES
        Handle.restored(disk, None, "m", number=number, owner=NOBODY, lost="")
        disks.append(disk)
    reconciler = Reconciler(host, guest, disks, worker, nothing)
    reconciler.start()
    assert await reconciler.reconcile() == ()
    await reconciler.stop()
    assert Compared.times == 0
