"""What the compute service ends after nobody waits for it any more, or lives to hear of it."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest
from support.guest_shell import note_in
from support.hcs_managers import Life, made, managed, used, verbs
from support.hcs_on_qemu import ID
from support.hcs_pairs import NEWEST, OLDEST, image
from support.news import News

from hotlun import MountConfig, OutcomeUnknownError, Slot, SlotState
from hotlun.events import DisagreementSettled
from hotlun.journal import SQLiteJournal

if TYPE_CHECKING:
    from pathlib import Path

    from support.hcs_on_qemu import HCSOnQEMU

pytestmark = pytest.mark.asyncio(loop_scope="module")

MOUNTED = MountConfig()
TOLD_OR_NOT = pytest.mark.parametrize("lists_disks", [True, False], ids=["listed", "silent"])


class TestTooLate:
    """The service has not answered in time, and goes on."""

    @TOLD_OR_NOT
    @pytest.mark.parametrize("is_done_first", [True, False], ids=["attached", "not yet"])
    async def test_an_attach_is_undone_as_soon_as_it_has_ended(
        self, service: HCSOnQEMU, tmp_path: Path, lists_disks: bool, is_done_first: bool
    ) -> None:
        """Its slot is nobody's until then; other disks have other slots."""
        service.lists_disks = lists_disks
        path, other = image(tmp_path, "late", NEWEST), image(tmp_path, "other", OLDEST)
        late = service.stall("attach", is_done_first=is_done_first)
        async with managed(service) as manager:
            with pytest.raises(OutcomeUnknownError):
                await manager.add_virtual_disk(path, mount=MOUNTED)
            (status,) = used(manager)
            assert (status.slot, status.state) == (Slot(0, 0), SlotState.QUARANTINED)
            assert "goes on" in status.reason
            mount = await manager.add_virtual_disk(other, mount=MOUNTED)
            assert mount.slot == Slot(0, 1)
            with pytest.raises(OutcomeUnknownError):
                await manager.add_virtual_disk(path, mount=MOUNTED)
            late.settle()
            await late.ended.wait()
            await manager.reconcile()
            assert [status.slot for status in used(manager)] == [mount.slot]
            assert list(service.attached) == [mount.slot]
            again = await manager.add_virtual_disk(path, mount=MOUNTED)
            assert await note_in(service.vm, again) == "late"

    async def test_an_attach_is_found_out_about_without_being_asked_for(
        self, service: HCSOnQEMU, tmp_path: Path
    ) -> None:
        """After a second, and each time later, until it has ended."""
        path = image(tmp_path, "late", NEWEST)
        late = service.stall("attach")
        async with await made(service) as manager:
            news = News(manager)
            with pytest.raises(OutcomeUnknownError):
                await manager.add_virtual_disk(path, mount=MOUNTED)
            late.settle()
            await news.until(DisagreementSettled)
            assert used(manager) == []
            assert service.attached == {}

    async def test_an_attach_that_fails_needs_no_undoing(
        self, service: HCSOnQEMU, tmp_path: Path
    ) -> None:
        """No Remove is sent, which could meet somebody else's disk."""
        began = len(service.documents)
        late = service.stall("attach")
        async with managed(service) as manager:
            with pytest.raises(OutcomeUnknownError):
                await manager.add_virtual_disk(tmp_path / "missing.vhdx", mount=MOUNTED)
            late.settle()
            await late.ended.wait()
            await manager.reconcile()
            assert used(manager) == []
        assert "Remove" not in verbs(service, began)

    @TOLD_OR_NOT
    @pytest.mark.parametrize("is_done_first", [True, False], ids=["detached", "not yet"])
    async def test_a_detach_is_waited_for_and_not_repeated(
        self, service: HCSOnQEMU, tmp_path: Path, lists_disks: bool, is_done_first: bool
    ) -> None:
        """The Mount stays releasable; when it has ended, so has the release."""
        service.lists_disks = lists_disks
        path = image(tmp_path, "late", NEWEST)
        began = len(service.documents)
        async with managed(service) as manager:
            mount = await manager.add_virtual_disk(path, mount=MOUNTED)
            late = service.stall("detach", is_done_first=is_done_first)
            for _ in range(2):
                with pytest.raises(OutcomeUnknownError):
                    await mount.release()
            assert used(manager)[0].state is SlotState.TAKEN
            late.settle()
            await late.ended.wait()
            await mount.release()
            assert used(manager) == []
            assert verbs(service, began).count("Remove") == 1
            async with await manager.add_virtual_disk(path, mount=MOUNTED) as again:
                assert await note_in(service.vm, again) == "late"

    @pytest.mark.parametrize("is_done_first", [True, False], ids=["mounted", "not yet"])
    async def test_a_mount_is_undone_and_spares_the_disks_other_holders(
        self, service: HCSOnQEMU, tmp_path: Path, is_done_first: bool
    ) -> None:
        """Who has the disk keeps it, and can have another mount of it afterwards."""
        path = image(tmp_path, "late", NEWEST)
        async with managed(service) as manager:
            holder = await manager.add_virtual_disk(path, mount=MountConfig(block_device=True))
            late = service.stall("mount", is_done_first=is_done_first)
            with pytest.raises(OutcomeUnknownError):
                await manager.add_virtual_disk(path, mount=MOUNTED)
            assert "unmount" in used(manager)[0].reason
            late.settle()
            await late.ended.wait()
            await manager.reconcile()
            assert len(used(manager)[0].guest_mounts) == 1
            async with await manager.add_virtual_disk(path, mount=MOUNTED) as mount:
                assert await note_in(service.vm, mount) == "late"
            assert manager.mounts == (holder,)

    @TOLD_OR_NOT
    @pytest.mark.parametrize("is_done_first", [True, False], ids=["mounted", "not yet"])
    async def test_a_mount_that_was_the_only_use_takes_the_disk_with_it(
        self, service: HCSOnQEMU, tmp_path: Path, lists_disks: bool, is_done_first: bool
    ) -> None:
        """In quarantine first, then unmounted, unplugged, detached."""
        service.lists_disks = lists_disks
        path = image(tmp_path, "late", OLDEST)
        late = service.stall("mount", is_done_first=is_done_first)
        async with managed(service) as manager:
            with pytest.raises(OutcomeUnknownError):
                await manager.add_virtual_disk(path, mount=MOUNTED)
            assert used(manager)[0].state is SlotState.QUARANTINED
            late.settle()
            await late.ended.wait()
            await manager.reconcile()
            assert used(manager) == []

    @pytest.mark.parametrize("verb", ["attach", "mount"])
    async def test_is_not_what_a_cancelled_add_waits_for(
        self, service: HCSOnQEMU, tmp_path: Path, verb: str
    ) -> None:
        """It ends at once; what it had begun is seen through, and undone."""
        path = image(tmp_path, "cancelled", NEWEST)
        slow = service.stall(verb, times_out=False)
        async with managed(service) as manager:
            adding = asyncio.create_task(manager.add_virtual_disk(path, mount=MOUNTED))
            await slow.begun.wait()
            adding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await adding
            slow.settle()
        assert used(manager) == []


@TOLD_OR_NOT
class TestAnotherProcess:
    """The Manager dies, and with it what the backends knew; the journal is left."""

    async def test_goes_on_with_what_is_held(
        self, service: HCSOnQEMU, tmp_path: Path, lists_disks: bool
    ) -> None:
        """The same Mounts, whose data is there; their release takes everything away."""
        service.lists_disks = lists_disks
        path, other = image(tmp_path, "held", NEWEST), image(tmp_path, "manual", OLDEST)
        life = Life(service, tmp_path / "journal")
        manager = await life.begin()
        held = await manager.add_virtual_disk(path, vm_id=ID, mount=MOUNTED, owner="web")
        await manager.add_virtual_disk(other, read_only=True)
        await life.end()
        began = len(service.documents)
        async with managed(service, journal=SQLiteJournal(tmp_path / "journal")) as manager:
            again, attached = manager.mounts
            assert (again.id, again.guest_path) == (held.id, held.guest_path)
            assert verbs(service, began) == []
            assert await note_in(service.vm, again) == "held"
            shared = await manager.add_virtual_disk(path, mount=MOUNTED)
            assert shared.guest_path == held.guest_path
            assert verbs(service, began) == []
            for mount in (shared, again, attached):
                await mount.release()
        assert "system.posix_acl_access" not in os.listxattr(path)

    @pytest.mark.parametrize("is_done_first", [True, False], ids=["done", "not yet"])
    @pytest.mark.parametrize(
        ("verb", "undoing"), [("attach", "Remove"), ("mount", "Remove MappedVirtualDisk")]
    )
    async def test_undoes_what_had_only_begun(
        self,
        service: HCSOnQEMU,
        tmp_path: Path,
        lists_disks: bool,
        verb: str,
        undoing: str,
        is_done_first: bool,
    ) -> None:
        """It is done by then, or will be, and nobody lived to hear of it."""
        service.lists_disks = lists_disks
        path = image(tmp_path, "begun", NEWEST)
        life = Life(service, tmp_path / "journal")
        manager = await life.begin()
        late = service.stall(verb, is_done_first=is_done_first, times_out=False)
        adding = asyncio.create_task(manager.add_virtual_disk(path, mount=MOUNTED))
        await (late.done if is_done_first else late.begun).wait()
        await life.end()
        assert adding.cancelled()
        began = len(service.documents)
        entering = asyncio.create_task(Life(service, tmp_path / "journal").begin())
        while undoing not in verbs(service, began):
            await asyncio.sleep(0)
        late.settle()
        manager = await entering
        assert (manager.mounts, used(manager)) == ((), [])
        assert service.attached == {}
        await manager.__aexit__(None, None, None)
        await late.ended.wait()
