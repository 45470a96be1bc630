"""What outlives a Manager: live Mounts in a journal, exact to the last reference."""

from __future__ import annotations

import asyncio
import json
import os
import re
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from support.memory import EXT4, FORMATS, XFS, A, B, C, start, turns

from hotlun import (
    AlreadyReleasedError,
    BackendError,
    DiskConflictError,
    GuestPathConflictError,
    HotlunError,
    JournalError,
    Manager,
    MountConfig,
    NotInitializedError,
    OutcomeUnknownError,
    Secret,
    Slot,
    SlotState,
)
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.journal import MemoryJournal, SQLiteJournal
from hotlun.journal_documents import holder_name, understood

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from pathlib import Path

    from hotlun import Disk, Mount
    from hotlun.journal import Journal

T = TypeVar("T")
LOCKED = MountConfig(encrypted=True, key=Secret("sesame"))


class Host:
    """A VM in memory and its journal; each Manager on them is as good as another process."""

    def __init__(self, journal: Journal) -> None:
        self.host = MemoryHostBackend()
        self.guest = MemoryGuestBackend(self.host)
        self.journal = journal

    def manager(self, **arguments: Any) -> Manager:
        return Manager(self.host, self.guest, journal=self.journal, **arguments)

    async def assert_drained(self) -> None:
        """Release everything; then nothing is anywhere, the journal included."""
        async with self.manager() as manager:
            await manager.release_all()
            assert {status.state for status in manager.slots()} == {SlotState.FREE}
        assert self.journal.open() == []
        self.journal.close()
        assert self.host.attached == {}
        assert self.host.granted == set()
        assert self.guest.mounted == {}
        assert self.host.violations == self.guest.violations == []


SELF = "job 2" if os.name == "nt" else "pid:"
PROCESSES = pytest.mark.skipif(os.name == "nt", reason="Windows shows no processes in /proc")


@pytest.fixture(params=["memory", "sqlite"])
def vm(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    is_memory = request.param == "memory"
    return Host(MemoryJournal() if is_memory else SQLiteJournal(tmp_path / "journal"))


@pytest.fixture
def memory_vm() -> Host:
    return Host(MemoryJournal())


class TestHandlesSurvive:
    async def test_mounts_are_there_again(self, vm: Host) -> None:
        """By id, oldest first, with all that a Mount says of itself; and are released."""
        async with vm.manager() as manager:
            before = [
                await manager.add_virtual_disk(B, mount=EXT4, guest_path="/srv/b", owner="job 1"),
                await manager.add_virtual_disk(A, read_only=True),
                await manager.add_physical_disk("/dev/null", mount=FORMATS, owner=SELF),
                await manager.add_extensible_virtual_disk("evd://nbd/a:1/x", mount=XFS),
                await manager.add_virtual_disk(B, mount=EXT4),
            ]
        assert len(vm.host.attached) == 4
        async with vm.manager() as manager:
            assert [seen(mount) for mount in manager.mounts] == [seen(mount) for mount in before]
            assert [mount.lost for mount in manager.mounts] == [""] * 5
            for mount in manager.mounts:
                await mount.release()
            assert vm.host.attached == {}
        await vm.assert_drained()

    async def test_references_are_exact(self, vm: Host) -> None:
        """The last one out undoes everything, whichever process it was let in by."""
        async with vm.manager() as manager:
            for _ in range(2):
                await manager.add_virtual_disk(A, mount=EXT4)
            await manager.add_virtual_disk(A)
        async with vm.manager() as manager:
            first, second, bare = manager.mounts
            third = await manager.add_virtual_disk(A, mount=EXT4)
            assert third.guest_path == first.guest_path
            await first.release()
            await second.release()
            assert len(vm.guest.mounted) == 1
        async with vm.manager() as manager:
            assert [mount.id for mount in manager.mounts] == [bare.id, third.id]
            await manager.mounts[1].release()
            assert vm.guest.mounted == {}
            assert len(vm.host.attached) == 1
            await manager.mounts[0].release()
        await vm.assert_drained()

    async def test_slots_and_paths_stay_taken(self, vm: Host) -> None:
        """New disks get what is free, lowest first, and collide as ever."""
        async with vm.manager() as manager:
            mounts = [await manager.add_virtual_disk(p, mount=EXT4) for p in (A, B, C)]
            await mounts[1].release()
        async with vm.manager() as manager:
            with pytest.raises(GuestPathConflictError):
                await manager.add_virtual_disk(
                    B, mount=EXT4, guest_path=f"{mounts[0].guest_path}/x"
                )
            with pytest.raises(DiskConflictError):
                await manager.add_virtual_disk(A, read_only=True)
            new = [await manager.add_virtual_disk(f"/disks/{n}", mount=EXT4) for n in range(2)]
            assert [mount.slot for mount in new] == [Slot(0, 1), Slot(0, 3)]
            assert [mount.guest_path for mount in new] == [
                "/run/mounts/scsi/m1",
                "/run/mounts/scsi/m3",
            ]
        await vm.assert_drained()

    async def test_grants_are_revoked_by_another(self, vm: Host) -> None:
        """Each once, after the detach."""
        async with vm.manager() as manager:
            for name in ("one", "two", "one"):
                await manager.add_virtual_disk(A, vm_id=name)
        async with vm.manager() as manager:
            await manager.add_virtual_disk(A, vm_id="two")
            assert vm.host.count("grant_access") == 2
        await vm.assert_drained()
        assert vm.host.effects["revoke_access"] == 2

    async def test_grants_are_adopted_in_the_order_in_which_they_were_made(
        self, memory_vm: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also across disks: what one was to change is told of what the others had changed."""
        adopted = []

        def adopt(disk: Disk, vm_id: str, plan: str) -> None:
            adopted.append((disk.path, vm_id))

        async with memory_vm.manager() as manager:
            for path, vm_id in ((A, "one"), (B, "one"), (A, "two")):
                await manager.add_virtual_disk(path, vm_id=vm_id)
        monkeypatch.setattr(memory_vm.host, "adopt_grant", adopt, raising=False)
        async with memory_vm.manager():
            assert adopted == [(A, "one"), (B, "one"), (A, "two")]
        await memory_vm.assert_drained()

    async def test_a_key_is_known_again_and_written_nowhere(self, tmp_path: Path) -> None:
        """An add with the same key shares the mount, with another it conflicts."""
        vm = Host(SQLiteJournal(tmp_path / "journal"))
        async with vm.manager() as manager:
            old = await manager.add_virtual_disk(A, mount=LOCKED)
        for path in tmp_path.iterdir():
            assert b"sesame" not in path.read_bytes()
        async with vm.manager() as manager:
            wrong = MountConfig(encrypted=True, key=Secret("barley"))
            with pytest.raises(DiskConflictError):
                await manager.add_virtual_disk(A, mount=wrong)
            new = await manager.add_virtual_disk(A, mount=LOCKED)
            assert new.guest_path == old.guest_path
            assert vm.guest.count("mount") == 1
        await vm.assert_drained()

    async def test_who_has_left_holds_nothing(self, vm: Host) -> None:
        """A Mount of a Manager that was left is the journal's; releasing it there says so."""
        async with vm.manager() as manager:
            mount = await manager.add_virtual_disk(A, mount=EXT4)
        with pytest.raises(NotInitializedError, match="make and enter another one"):
            await mount.release()
        with pytest.raises(NotInitializedError):
            await manager.release_all()
        with pytest.raises(NotInitializedError):
            await manager.add_virtual_disk(B)
        assert len(vm.guest.mounted) == 1
        await vm.assert_drained()

    async def test_who_has_left_settles_nothing(self, memory_vm: Host) -> None:
        """A reconciling that is still asking then changes nothing any more."""
        manager = await memory_vm.manager().__aenter__()
        mount = await manager.add_virtual_disk(A, mount=EXT4)
        assert mount.guest_path is not None
        memory_vm.guest.vanish(mount.guest_path)
        gate = memory_vm.guest.stall("survey")
        reconciling = start(manager.reconcile())
        await gate.reached.wait()
        await manager.__aexit__(None, None, None)
        gate.open()
        with pytest.raises(NotInitializedError):
            await ended(reconciling)
        assert memory_vm.guest.mounted == {}
        await memory_vm.assert_drained()

    async def test_a_second_release_does_not_outlive_the_manager(self, memory_vm: Host) -> None:
        """It waits for the first; if that is cancelled it is not its turn any more."""
        manager = await memory_vm.manager().__aenter__()
        mount = await manager.add_virtual_disk(A, mount=EXT4)
        gate = memory_vm.guest.stall("unmount")
        first, second = start(mount.release()), start(mount.release())
        await gate.reached.wait()
        leaving = start(manager.__aexit__(None, None, None))
        await turns()
        memory_vm.guest.fail("unplug", BackendError("busy"))
        gate.open()
        await ended(leaving)
        with pytest.raises(BackendError, match="busy"):
            await ended(first)
        with pytest.raises(NotInitializedError):
            await ended(second)
        assert memory_vm.host.attached
        await memory_vm.assert_drained()

    async def test_without_a_journal_leaving_releases(self) -> None:
        """As ever."""
        host = MemoryHostBackend()
        async with Manager(host, MemoryGuestBackend(host)) as manager:
            await manager.add_virtual_disk(A, mount=EXT4)
        assert host.attached == {}

    async def test_two_managers_on_one_journal(self, vm: Host) -> None:
        """The second is refused before it asks anybody, and can be entered later."""
        async with vm.manager():
            second = vm.manager()
            with pytest.raises(JournalError):
                await second.__aenter__()
        async with second as manager:
            assert manager.mounts == ()

    async def test_a_manager_with_fewer_slots(self, vm: Host) -> None:
        """It is told which disk it has no place for, and nothing is lost."""
        async with vm.manager(reserved_slots=[Slot(0, n) for n in range(64)]) as manager:
            await manager.add_virtual_disk(A)
        with pytest.raises(
            HotlunError, match=rf"{re.escape(A)} is at slot 1:0.*as many controllers"
        ):
            await vm.manager(controllers=1).__aenter__()
        await vm.assert_drained()

    async def test_one_that_could_not_be_entered(
        self, vm: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It can be entered later, and then has everything once."""
        async with vm.manager() as manager:
            for path in (A, B):
                await manager.add_virtual_disk(path, mount=EXT4, vm_id="one")
        refusals = [None, BackendError("no such plan")]

        def adopt(*_: object) -> None:
            if refusals and (refusal := refusals.pop(0)):
                raise refusal

        monkeypatch.setattr(vm.host, "adopt_grant", adopt, raising=False)
        manager = vm.manager()
        with pytest.raises(BackendError):
            await manager.__aenter__()
        async with manager:
            assert len(manager.mounts) == 2
            await manager.release_all()
        await vm.assert_drained()

    @pytest.mark.parametrize("side", ["host", "guest"])
    async def test_answers_that_make_no_sense(
        self, memory_vm: Host, monkeypatch: pytest.MonkeyPatch, side: str
    ) -> None:
        """A hypervisor's are its failure to answer, a guest's are waited for to get better."""
        async with memory_vm.manager() as manager:
            await manager.add_virtual_disk(A, mount=EXT4)

        async def garbage(*_: object) -> object:
            return 42

        monkeypatch.setattr(getattr(memory_vm, side), "survey", garbage)
        manager = memory_vm.manager()
        if side == "host":
            with pytest.raises(BackendError, match="hypervisor"):
                await manager.__aenter__()
            monkeypatch.undo()
        async with manager:
            assert len(manager.mounts) == 1
        monkeypatch.undo()
        await memory_vm.assert_drained()

    async def test_a_journal_that_cannot_be_understood(self, tmp_path: Path) -> None:
        """It is left as it is, and so is the VM."""
        path = tmp_path / "journal"
        vm = Host(SQLiteJournal(path))
        vm.journal.open()
        vm.journal.write({"h1": json.dumps({"version": 3})})
        vm.journal.close()
        with pytest.raises(JournalError, match="its version is 3, not 2"):
            await vm.manager().__aenter__()
        assert vm.journal.open() == ['{"version": 3}']
        vm.journal.close()


class TestWhatCannotBeWritten:
    async def test_an_intent(self, memory_vm: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        """The step is not taken: the add fails, and nobody was asked for anything."""
        async with memory_vm.manager() as manager:
            fail_at(monkeypatch, memory_vm.journal, 1)
            with pytest.raises(JournalError, match="scripted"):
                await manager.add_virtual_disk(A, mount=EXT4)
            assert memory_vm.host.calls == []
            assert manager.slots()[0].state is SlotState.FREE
            await manager.add_virtual_disk(A, mount=EXT4)
        await memory_vm.assert_drained()

    async def test_a_holder(self, memory_vm: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        """A Mount that would not outlive the process is none: what was done is undone."""
        async with memory_vm.manager() as manager:
            fail_at(monkeypatch, memory_vm.journal, 2)  # attach, attached and held
            with pytest.raises(JournalError, match="scripted"):
                await manager.add_virtual_disk(A)
            await ended(manager.release_all())
            assert memory_vm.host.attached == {}
        await memory_vm.assert_drained()

    async def test_an_outcome(
        self, memory_vm: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What has happened has happened: it is logged, and written with what comes next."""
        async with memory_vm.manager() as manager:
            kept = await manager.add_virtual_disk(A)
            mount = await manager.add_virtual_disk(A, mount=EXT4)
            fail_at(monkeypatch, memory_vm.journal, 2)  # unmount, unmounted and rested
            await mount.release()
            assert "scripted" in caplog.text
        async with memory_vm.manager() as manager:
            assert [m.id for m in manager.mounts] == [kept.id]
        await memory_vm.assert_drained()

    async def test_the_end_of_a_disk(
        self, memory_vm: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No other disk is written down in its slot before that is; nor is the same one."""
        async with memory_vm.manager() as manager:
            mount = await manager.add_virtual_disk(A)
            fail_at(monkeypatch, memory_vm.journal, 3)  # unplug, detach, gone
            fail_at(monkeypatch, memory_vm.journal, 3)
            await mount.release()
            with pytest.raises(JournalError, match="scripted"):
                await manager.add_virtual_disk(B)
            assert memory_vm.host.count("attach") == 1
            for path in (A, B):
                await manager.add_virtual_disk(path)
            assert sorted(disks(memory_vm.journal)) == [A, B]
            await manager.release_all()
            assert disks(memory_vm.journal) == []
        await memory_vm.assert_drained()

    async def test_a_vm_that_is_forgotten(
        self, memory_vm: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who forgets hears that the journal could not be emptied, and can do it again."""
        async with memory_vm.manager() as manager:
            await manager.add_virtual_disk(A)
            memory_vm.host.end()
            for at in (1, 2):
                fail_at(monkeypatch, memory_vm.journal, at)
            with pytest.raises(JournalError, match="scripted"):
                await manager.forget()
            await manager.forget()
            assert disks(memory_vm.journal) == []

    async def test_at_last(self, memory_vm: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leaving tries once more."""
        async with memory_vm.manager() as manager:
            mount = await manager.add_virtual_disk(A)
            fail_at(monkeypatch, memory_vm.journal, 3)
            await mount.release()
            assert disks(memory_vm.journal) == [A]
        assert disks(memory_vm.journal) == []

    async def test_a_release(self, memory_vm: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is not begun, keeps its reference, and can be tried again."""
        async with memory_vm.manager() as manager:
            mount = await manager.add_virtual_disk(A, mount=EXT4)
            fail_at(monkeypatch, memory_vm.journal, 1)
            with pytest.raises(JournalError, match="scripted"):
                await mount.release()
            assert len(memory_vm.guest.mounted) == 1
            await mount.release()
            with pytest.raises(AlreadyReleasedError):
                await mount.release()
        await memory_vm.assert_drained()


class TestWhatWasUnderWay:
    async def test_a_quarantined_disk_is_undone_by_the_next(self, vm: Host) -> None:
        """On entering, without anybody asking for it."""
        vm.guest.lose("mount", happened=True)
        for at in (1, 2):
            vm.guest.fail("unmount", BackendError("busy"), at=at)
        with pytest.raises(ExceptionGroup):
            async with vm.manager() as manager:
                with pytest.raises(OutcomeUnknownError):
                    await manager.add_virtual_disk(A, mount=EXT4)
        assert len(vm.guest.mounted) == 1
        async with vm.manager() as manager:
            assert vm.guest.mounted == {}
            assert vm.host.attached == {}
            assert manager.slots()[0].state is SlotState.FREE
        await vm.assert_drained()

    async def test_a_release_goes_on_where_it_stopped(self, vm: Host) -> None:
        """In the next process, repeating nothing that was done."""
        async with vm.manager() as manager:
            mount = await manager.add_virtual_disk(A, mount=EXT4, vm_id="one")
            vm.host.fail("detach", BackendError("no"))
            with pytest.raises(BackendError):
                await mount.release()
        vm.host.calls.clear()
        vm.guest.calls.clear()
        async with vm.manager() as manager:
            (again,) = manager.mounts
            assert again.id == mount.id
            assert again.guest_path is None
            await again.release()
            operations = [c.operation for c in (*vm.guest.calls, *vm.host.calls)]
            assert [o for o in operations if o != "survey"] == ["detach", "revoke_access"]
        await vm.assert_drained()

    async def test_a_revoke_that_failed_is_made_later(self, vm: Host) -> None:
        """Its slot is free meanwhile."""
        vm.host.fail("revoke_access", BackendError("no"))
        async with vm.manager() as manager:
            mount = await manager.add_virtual_disk(A, vm_id="one")
            with pytest.raises(BackendError):
                await mount.release()
            assert manager.slots()[0].state is SlotState.FREE
            await manager.add_virtual_disk(B)
        assert len(vm.host.granted) == 1
        async with vm.manager() as manager:
            await manager.mounts[0].release()
            await manager.add_virtual_disk(C)
        await vm.assert_drained()

    async def test_leaving_waits_for_a_release_in_flight(self, memory_vm: Host) -> None:
        """And only then lets others have the journal."""
        manager = await memory_vm.manager().__aenter__()
        mount = await manager.add_virtual_disk(A, mount=EXT4)
        gate = memory_vm.guest.stall("unmount")
        releasing = start(mount.release())
        await gate.reached.wait()
        leaving = start(manager.__aexit__(None, None, None))
        await turns()
        assert not leaving.done()
        with pytest.raises(JournalError):
            memory_vm.journal.open()
        gate.open()
        await ended(releasing)
        await ended(leaving)
        await memory_vm.assert_drained()

    async def test_a_leaving_that_is_cancelled_keeps_the_journal_until_its_step_ends(
        self, memory_vm: Host
    ) -> None:
        """What is in flight is seen through, and written down."""
        manager = await memory_vm.manager().__aenter__()
        gate = memory_vm.host.stall("attach")
        adding = start(manager.add_virtual_disk(A))
        await gate.reached.wait()
        leaving = start(manager.__aexit__(None, None, None))
        await turns()
        leaving.cancel()
        with (
            pytest.warns(ResourceWarning, match=re.escape(A)),
            pytest.raises(asyncio.CancelledError),
        ):
            await ended(leaving)
        with pytest.raises(NotInitializedError):
            await adding
        with pytest.raises(JournalError):
            memory_vm.journal.open()
        gate.open()
        await turns()
        assert len(memory_vm.host.attached) == 1
        await memory_vm.assert_drained()


class TestOwners:
    async def test_all_of_an_owners_are_released(self, vm: Host) -> None:
        """In whichever process they were added; others' stay, also on the same disk."""
        async with vm.manager() as manager:
            for path, owner in ((A, "one"), (A, "two"), (B, "one"), (C, "")):
                await manager.add_virtual_disk(path, mount=EXT4, owner=owner)
        async with vm.manager() as manager:
            await manager.release_owner("one")
            assert [mount.owner for mount in manager.mounts] == ["two", ""]
            assert {str(a.disk) for a in vm.host.attached.values()} == {A, C}
            await manager.release_owner("nobody")
        await vm.assert_drained()

    async def test_what_fails_is_told_at_the_end(self, vm: Host) -> None:
        """Everything is tried, and can be tried again."""
        async with vm.manager() as manager:
            for path in (A, B):
                await manager.add_virtual_disk(path, owner="one")
            vm.host.fail("detach", BackendError("no"))
            with pytest.raises(ExceptionGroup, match="'one'"):
                await manager.release_owner("one")
            assert [mount.owner for mount in manager.mounts] == ["one"]
            await manager.release_owner("one")
            assert manager.mounts == ()
        await vm.assert_drained()

    @PROCESSES
    async def test_processes_that_have_ended_are_offered(self, vm: Host) -> None:
        """Each once; what lives, or is text, is not."""
        process = await asyncio.create_subprocess_exec("sleep", "60")
        dead = f"pid:{process.pid}"
        async with vm.manager() as manager:
            for path, owner in ((A, dead), (B, dead), (C, "pid:"), ("/disks/d", "text")):
                await manager.add_virtual_disk(path, owner=owner)
            assert not manager.dead_owners()
        process.kill()
        await process.wait()
        async with vm.manager() as manager:
            assert manager.dead_owners() == (dead,)
            await manager.release_owner(dead)
            assert not manager.dead_owners()
            assert len(manager.mounts) == 2
        await vm.assert_drained()

    @PROCESSES
    async def test_this_process(self, vm: Host) -> None:
        """By the name that it was given, too."""
        async with vm.manager() as manager:
            await manager.add_virtual_disk(A, owner="pid:")
            await manager.release_owner("pid:")
            assert manager.mounts == ()
        await vm.assert_drained()

    @PROCESSES
    async def test_a_number_that_is_used_again(self, memory_vm: Host) -> None:
        """What the process before it left is released, and not what is its own."""
        async with memory_vm.manager() as manager:
            mount, _ = [await manager.add_virtual_disk(path, owner="pid:") for path in (A, B)]
        journal = memory_vm.journal
        assert isinstance(journal, MemoryJournal)
        name = holder_name(mount.id)
        document = json.loads(journal._documents[name])
        document["holder"][3] -= 1  # born before
        journal._documents[name] = json.dumps(document)
        async with memory_vm.manager() as manager:
            for owner in manager.dead_owners():
                await manager.release_owner(owner)
            assert [mount.disk.path for mount in manager.mounts] == [B]
        await memory_vm.assert_drained()

    @PROCESSES
    async def test_a_wrong_owner_is_refused_first(self, vm: Host) -> None:
        """Before anything is touched."""
        async with vm.manager() as manager:
            with pytest.raises(ValueError, match="no process 999999999"):
                await manager.add_virtual_disk(A, owner="pid:999999999")
            assert vm.host.calls == []


async def ended(work: Coroutine[object, object, T] | asyncio.Task[T]) -> T:
    """It ends by itself, and soon."""
    async with asyncio.timeout(10):
        return await work


def seen(mount: Mount) -> tuple[object, ...]:
    """What a Mount says of itself."""
    return (
        mount.id,
        mount.slot,
        mount.serial,
        mount.disk,
        mount.config,
        mount.guest_path,
        mount.owner,
    )


def disks(journal: Journal) -> list[str]:
    """The paths of those that stand in a journal in memory."""
    assert isinstance(journal, MemoryJournal)
    return [record.disk.path for record in understood(journal._documents.values(), "it")]


def fail_at(monkeypatch: pytest.MonkeyPatch, journal: Journal, at: int) -> None:
    """The `at`-th write from now fails."""
    write, count = journal.write, 0

    def fail(changes: Mapping[str, str | None]) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise JournalError("scripted: no room")
        write(changes)

    monkeypatch.setattr(journal, "write", fail)
