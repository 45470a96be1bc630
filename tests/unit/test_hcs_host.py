"""The host backend of the Host Compute Service: what it asks for, and what it makes of answers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from support.compute import NOT_FOUND, TAKEN, MemorySystem
from support.dialling import in_turns

from hotlun import Attachment, Disk, DiskKind, ImageFormat, Slot
from hotlun.backends import base
from hotlun.backends.hcs import HCSHostBackend
from hotlun.backends.occupants import Occupants
from hotlun.errors import (
    BackendError,
    HotlunError,
    OutcomeUnknownError,
    SlotTakenError,
    UnsupportedError,
    VMGoneError,
)
from hotlun.hcs import documents
from hotlun.hcs.results import failure
from hotlun.model import Presence

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

DISK = Disk(r"C:\disks\a.vhdx", DiskKind.VIRTUAL_DISK)
OTHER = Disk(r"C:\disks\b.vhdx", DiskKind.VIRTUAL_DISK)
ATTACHMENT = Attachment(Slot(1, 3), DISK, "h1")
NEWER = Attachment(Slot(1, 3), OTHER, "h2")
VM = "vm-1"

ADD, REMOVE = documents.add_document(ATTACHMENT), documents.remove_document(ATTACHMENT)


@pytest.fixture
def system() -> MemorySystem:
    """A VM without disks."""
    return MemorySystem()


@pytest.fixture
def host(system: MemorySystem) -> HCSHostBackend:
    """A backend for it that waits as good as not at all for what was begun before."""
    return HCSHostBackend(system, timeout=0.01)


def listing(**disks: str) -> dict[str, Any]:
    """What the service tells of the disks: `s1_3="C:\\..."`."""
    controllers: dict[str, Any] = {}
    for name, path in disks.items():
        controller, lun = name.removeprefix("s").split("_")
        entry = {"HostPath": path, "Lun": int(lun), "AttachOnly": True}
        controllers.setdefault(controller, {"MappedVirtualDisks": {}})["MappedVirtualDisks"][
            lun
        ] = entry
    return {"MappedVirtualDiskControllers": controllers}


def test_it_is_a_host_backend(host: HCSHostBackend) -> None:
    """That has no serials for its disks."""
    assert isinstance(host, base.HostBackend)
    assert not host.serials
    assert base.identity(host, ATTACHMENT) is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"controllers": ()}, "sequence of names"),
        ({"controllers": "scsi"}, "sequence of names"),
        ({"controllers": ("a", "A")}, "named twice"),
        ({"controllers": ("a/b",)}, "this name: 'a/b'"),
        ({"controllers": ("",)}, "this name: ''"),
    ],
)
def test_controllers_that_cannot_be(arguments: dict[str, Any], problem: str) -> None:
    """Are refused when it is made."""
    with pytest.raises(ValueError, match=problem):
        HCSHostBackend(MemorySystem(), **arguments)


def test_what_is_no_system() -> None:
    """An id, for instance."""
    with pytest.raises(TypeError, match="open_system"):
        HCSHostBackend("my-vm")  # type: ignore[arg-type]


class TestAttachingAndDetaching:
    async def test_sends_one_document_each(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """Those of `documents`."""
        await host.attach(ATTACHMENT)
        assert system.attached == {ADD["ResourcePath"]: ADD["Settings"]}
        await host.detach(ATTACHMENT)
        assert system.documents == [ADD, REMOVE]

    async def test_a_slot_that_is_not_there_is_not_asked_for(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """Nor is an image that the service does not read."""
        raw = Disk("/a.img", DiskKind.VIRTUAL_DISK, format=ImageFormat.RAW)
        for attachment in (
            Attachment(Slot(4, 0), DISK, "h1"),
            Attachment(Slot(0, 64), DISK, "h1"),
            Attachment(Slot(0, 0), raw, "h1"),
        ):
            with pytest.raises(UnsupportedError):
                await host.attach(attachment)
        assert system.documents == []

    async def test_a_taken_slot_is_told_apart(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """And what is there is not removed by the undoing of what never came."""
        system.attached[ADD["ResourcePath"]] = {"Type": "VirtualDisk", "Path": "boot"}
        with pytest.raises(SlotTakenError) as caught:
            await host.attach(ATTACHMENT)
        assert (caught.value.slot, caught.value.disk) == (Slot(1, 3), DISK)
        assert caught.value.code == TAKEN
        await host.detach(ATTACHMENT)
        assert system.attached[ADD["ResourcePath"]]["Path"] == "boot"

    async def test_an_old_detach_spares_a_newer_disk(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """The service knows the slot alone; the backend knows whose it is."""
        await host.attach(ATTACHMENT)
        await host.detach(ATTACHMENT)
        await host.attach(NEWER)
        await host.detach(ATTACHMENT)
        assert system.attached[ADD["ResourcePath"]]["Path"] == OTHER.path

    async def test_what_a_newer_disk_has_proven_gone_stays_gone(self, system: MemorySystem) -> None:
        """Its slot was free for another one, so there is nothing left to undo, whatever comes."""
        host = HCSHostBackend(system, own=())
        system.refuse(0x8037011E)
        with pytest.raises(OutcomeUnknownError):
            await host.attach(ATTACHMENT)
        await host.attach(NEWER)
        await host.detach(NEWER)
        system.attached[ADD["ResourcePath"]] = {"Type": "VirtualDisk", "Path": "somebody's"}
        await host.detach(ATTACHMENT)
        assert system.attached[ADD["ResourcePath"]]["Path"] == "somebody's"

    async def test_what_is_not_there_needs_no_undoing(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """Whether the service says so, or it is known."""
        await host.detach(ATTACHMENT)
        assert system.documents == [REMOVE]
        await host.detach(ATTACHMENT)
        assert system.documents == [REMOVE]

    @pytest.mark.parametrize(
        ("code", "kind"),
        [
            (0x80070005, BackendError),
            (0x80370105, BackendError),
            (0x80370110, VMGoneError),
            (0xC037010E, VMGoneError),
            (0x8037011E, OutcomeUnknownError),
        ],
    )
    async def test_a_refusal_tells_of_disk_and_slot(
        self, host: HCSHostBackend, system: MemorySystem, code: int, kind: type[HotlunError]
    ) -> None:
        """With the service's code and words."""
        await host.attach(ATTACHMENT)
        for operation, call in (("detach", host.detach), ("attach", host.attach)):
            system.refuse(code, '{"ErrorMessage":"so it is"}')
            with pytest.raises(HotlunError, match="so it is") as caught:
                await call(ATTACHMENT)
            error = caught.value
            assert type(error) is kind
            assert (error.operation, error.slot, error.disk) == (operation, Slot(1, 3), DISK)
            assert (error.code, error.detail) == (code, "so it is")
            assert "at slot 1:3" in str(error)

    async def test_a_refused_detach_can_be_tried_again(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """The disk is attached still."""
        await host.attach(ATTACHMENT)
        system.refuse(0x80370105)
        with pytest.raises(BackendError):
            await host.detach(ATTACHMENT)
        await host.detach(ATTACHMENT)
        assert system.attached == {}

    async def test_an_attach_that_windows_gave_up_is_undone(self, system: MemorySystem) -> None:
        """The VM's worker may have been done with it when the time was over."""
        host = HCSHostBackend(system, own=())
        system.refuse(0x800705B4)
        with pytest.raises(OutcomeUnknownError):
            await host.attach(ATTACHMENT)
        system.attached[ADD["ResourcePath"]] = ADD["Settings"]
        await host.detach(ATTACHMENT)
        assert system.attached == {}


class TestWhatGoesOn:
    """An operation that has not ended when nobody waits any more."""

    async def test_an_attach_that_succeeds_late_is_undone(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """The undoing waits for it, and then removes the disk."""
        host = HCSHostBackend(system, timeout=30)
        outcome = system.hang()
        with pytest.raises(OutcomeUnknownError):
            await host.attach(ATTACHMENT)
        undoing = asyncio.ensure_future(host.detach(ATTACHMENT))
        await asyncio.sleep(0)
        assert system.documents == [ADD]
        outcome.set_result(None)
        await undoing
        assert system.documents == [ADD, REMOVE]
        assert system.attached == {}

    async def test_an_attach_that_fails_late_needs_no_undoing(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """So that what the slot holds, if that was the reason, stays there."""
        outcome = system.hang()
        with pytest.raises(OutcomeUnknownError):
            await host.attach(ATTACHMENT)
        outcome.set_result(failure(TAKEN))
        await host.detach(ATTACHMENT)
        assert system.documents == [ADD]

    async def test_keeps_the_undoing_unknown(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """For as long as it goes on nothing is sent for its slot; for others all the same."""
        outcome = system.hang()
        with pytest.raises(OutcomeUnknownError):
            await host.attach(ATTACHMENT)
        with pytest.raises(
            OutcomeUnknownError, match=r"slot 1:3 as h1: what was begun there before"
        ):
            await host.detach(ATTACHMENT)
        elsewhere = Attachment(Slot(0, 0), OTHER, "h3")
        await host.attach(elsewhere)
        await host.detach(elsewhere)
        assert system.documents[0] == ADD
        assert REMOVE not in system.documents
        outcome.set_result(None)
        await host.detach(ATTACHMENT)
        assert system.attached == {}

    async def test_fails_late_and_is_not_taken_for_what_is_there_next(
        self, system: MemorySystem
    ) -> None:
        """An attach that waited for another one to fail, and fails as well, brings nothing back."""
        host = HCSHostBackend(system, timeout=30)
        outcome = system.hang()
        with pytest.raises(OutcomeUnknownError):
            await host.attach(ATTACHMENT)
        waiting = asyncio.ensure_future(host.attach(NEWER))
        await asyncio.sleep(0)
        system.attached[ADD["ResourcePath"]] = {"Type": "VirtualDisk", "Path": "somebody's"}
        outcome.set_result(failure(TAKEN))
        with pytest.raises(SlotTakenError):
            await waiting
        await host.detach(ATTACHMENT)
        await host.detach(NEWER)
        assert system.attached[ADD["ResourcePath"]]["Path"] == "somebody's"

    async def test_a_detach_that_succeeds_late_is_done(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """Trying again finds that out, and sends nothing."""
        await host.attach(ATTACHMENT)
        outcome = system.hang()
        with pytest.raises(OutcomeUnknownError):
            await host.detach(ATTACHMENT)
        outcome.set_result(None)
        await host.detach(ATTACHMENT)
        assert system.documents == [ADD, REMOVE]

    async def test_a_detach_that_fails_late_is_sent_again(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """The disk was there still."""
        await host.attach(ATTACHMENT)
        outcome = system.hang()
        with pytest.raises(OutcomeUnknownError):
            await host.detach(ATTACHMENT)
        outcome.set_result(failure(0x80370105))
        await host.detach(ATTACHMENT)
        assert system.documents == [ADD, REMOVE, REMOVE]
        assert system.attached == {}

    async def test_after_a_cancelled_caller_is_waited_for_too(self, system: MemorySystem) -> None:
        """The service cannot be told to stop."""
        host = HCSHostBackend(system, timeout=30)
        gate = system.stall()
        attaching = asyncio.ensure_future(host.attach(ATTACHMENT))
        while not system.documents:
            await asyncio.sleep(0)
        attaching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attaching
        undoing = asyncio.ensure_future(host.detach(ATTACHMENT))
        await asyncio.sleep(0)
        assert system.documents == [ADD]
        gate.set()
        await undoing
        assert system.attached == {}

    async def test_is_not_over_because_its_task_is(self, system: MemorySystem) -> None:
        """As when asyncio.run() ends, and cancels every task; the service goes on all the same."""
        host = HCSHostBackend(system, own=(), timeout=0.01)
        system.stall()
        attaching = asyncio.ensure_future(host.attach(ATTACHMENT))
        await in_turns(5)
        assert system.documents == [ADD]
        for task in asyncio.all_tasks():
            if task.get_name().startswith("hotlun at"):
                task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attaching
        with pytest.raises(OutcomeUnknownError, match="goes on"):
            await host.detach(ATTACHMENT)
        assert system.documents == [ADD]

    async def test_that_was_cancelled_before_it_began_is_over(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """Nobody was asked to do it."""
        attaching = asyncio.ensure_future(host.attach(ATTACHMENT))
        await asyncio.sleep(0)
        for task in asyncio.all_tasks():
            if task.get_name().startswith("hotlun at"):
                task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attaching
        await host.attach(NEWER)
        assert [document["Settings"]["Path"] for document in system.documents] == [OTHER.path]

    async def test_is_surveyed_as_unknown(self, host: HCSHostBackend, system: MemorySystem) -> None:
        """What is listed now may be otherwise in a moment."""
        system.told = listing(s1_3=DISK.path)
        outcome = system.hang()
        with pytest.raises(OutcomeUnknownError):
            await host.attach(ATTACHMENT)
        assert await host.survey([ATTACHMENT]) == {"h1": Presence.UNKNOWN}
        outcome.set_result(None)
        await asyncio.sleep(0)
        assert await host.survey([ATTACHMENT]) == {"h1": Presence.PRESENT}


class TestSurveying:
    async def test_compares_paths_as_windows_does(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """The same path there is the disk, another is not it, none tells nothing."""
        system.told = listing(s1_3=r"\\?\c:\DISKS\A.vhdx", s0_1="C:\\x.vhdx")
        elsewhere = Attachment(Slot(0, 1), OTHER, "h2")
        unlisted = Attachment(Slot(0, 2), OTHER, "h3")
        assert await host.survey([ATTACHMENT, elsewhere, unlisted]) == {
            "h1": Presence.PRESENT,
            "h2": Presence.ABSENT,
            "h3": Presence.UNKNOWN,
        }
        assert system.queries == [{"PropertyTypes": ["MappedVirtualDisk"]}]

    async def test_knows_a_disk_by_whatever_path_leads_to_it(
        self, host: HCSHostBackend, system: MemorySystem, tmp_path: Path
    ) -> None:
        """The service may tell another one than it was given."""
        image, link = tmp_path / "a.vhdx", tmp_path / "b.vhdx"
        image.touch()
        link.hardlink_to(image)
        attachment = Attachment(Slot(1, 3), Disk(str(image), DiskKind.VIRTUAL_DISK), "h4")
        system.told = listing(s1_3=str(link))
        assert await host.survey([attachment]) == {"h4": Presence.PRESENT}

    async def test_tells_attachments_of_one_disk_apart(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """By what was done here: the paths are the same, and the service knows no serials."""
        again = Attachment(Slot(1, 3), DISK, "h9")
        system.told = listing(s1_3=DISK.path)
        await host.attach(ATTACHMENT)
        assert await host.survey([ATTACHMENT, again]) == {
            "h1": Presence.PRESENT,
            "h9": Presence.ABSENT,
        }
        await host.detach(ATTACHMENT)
        await host.attach(again)
        assert await host.survey([ATTACHMENT, again]) == {
            "h1": Presence.ABSENT,
            "h9": Presence.PRESENT,
        }

    async def test_where_the_service_tells_nothing(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """It cannot be asked, and no slot is known to be taken."""
        assert await host.survey([ATTACHMENT]) is None
        assert await base.occupied(host) == frozenset()

    async def test_tells_which_slots_are_taken(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """By anybody."""
        system.told = listing(s0_0="C:\\boot.vhdx", s1_3="C:\\x.vhdx")
        assert await host.occupied() == {Slot(0, 0), Slot(1, 3)}

    @pytest.mark.parametrize("call", [HCSHostBackend.occupied, lambda host: host.survey([])])
    async def test_without_an_answer_changes_nothing(
        self,
        host: HCSHostBackend,
        system: MemorySystem,
        call: Callable[[HCSHostBackend], Coroutine[Any, Any, object]],
    ) -> None:
        """So that is never unknown."""
        system.hang()
        with pytest.raises(BackendError, match="goes on"):
            await call(host)

    async def test_of_a_vm_that_has_stopped(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """The service still knows it while it is open here, and says so."""
        system.told = {"Stopped": True, **listing(s1_3=DISK.path)}
        with pytest.raises(VMGoneError, match="survey the disks: the VM has stopped"):
            await host.survey([ATTACHMENT])

    async def test_before_a_detach_of_a_vm_that_has_stopped(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """What an earlier process has attached is gone with it, and nothing can be tried again."""
        system.told = {"Stopped": True}
        with pytest.raises(VMGoneError, match="the VM has stopped") as caught:
            await host.detach(ATTACHMENT)
        assert (caught.value.operation, caught.value.disk) == ("detach", DISK)
        assert system.documents == []

    async def test_that_finds_nothing_is_no_word_about_a_disk(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """The code is the same as for an empty slot; the disk may be there."""
        system.attached[ADD["ResourcePath"]] = {}
        system.refuse(NOT_FOUND)
        with pytest.raises(BackendError, match="cannot detach"):
            await host.detach(ATTACHMENT)
        await host.detach(ATTACHMENT)
        assert system.attached == {}

    async def test_what_an_earlier_process_attached_is_removed_by_its_slot(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """Unless the service says that another disk is there."""
        system.attached[ADD["ResourcePath"]] = {}
        system.told = listing(s1_3="C:\\somebody_elses.vhdx")
        await host.detach(ATTACHMENT)
        assert system.documents == []
        again = Attachment(Slot(1, 3), DISK, "h9")
        system.told = listing(s1_3=DISK.path)
        await host.detach(again)
        assert system.documents == [REMOVE]


class TestGranting:
    async def test_names_the_vm_and_the_path(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """Once each way."""
        await host.grant_access(DISK, VM)
        assert system.access == {(VM, DISK.path)}
        await host.revoke_access(DISK, VM)
        await host.revoke_access(DISK, VM)
        assert system.access_calls == [("grant", VM, DISK.path), ("revoke", VM, DISK.path)]

    async def test_revokes_only_its_own(self, host: HCSHostBackend, system: MemorySystem) -> None:
        """What somebody else has granted stays."""
        await host.revoke_access(DISK, VM)
        assert system.access_calls == []

    async def test_has_nothing_to_do_for_an_extensible_disk(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """Its provider opens it."""
        disk = Disk("{pool}", DiskKind.EXTENSIBLE_VIRTUAL_DISK, provider="space")
        await host.grant_access(disk, VM)
        await host.revoke_access(disk, VM)
        assert (system.access_calls, base.plan_grant(host, disk, VM)) == ([], "")

    async def test_refused_is_no_grant(self, host: HCSHostBackend, system: MemorySystem) -> None:
        """It says what it takes."""
        system.refuse(0x80070005)
        with pytest.raises(BackendError, match="WRITE_DAC") as caught:
            await host.grant_access(DISK, VM)
        assert caught.value.disk == DISK
        await host.revoke_access(DISK, VM)
        assert len(system.access_calls) == 1

    async def test_refused_the_second_time_leaves_the_first(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """As when what an earlier process has granted is granted again: it is to be revoked."""
        host.adopt_grant(DISK, VM, base.plan_grant(host, DISK, VM))
        system.access.add((VM, DISK.path))
        system.refuse(0x80070005)
        with pytest.raises(BackendError):
            await host.grant_access(DISK, VM)
        await host.revoke_access(DISK, VM)
        assert system.access == set()

    async def test_of_unknown_outcome_is_revoked(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """It may be there."""
        system.refuse(0x8037011E)
        with pytest.raises(OutcomeUnknownError):
            await host.grant_access(DISK, VM)
        await host.revoke_access(DISK, VM)
        assert len(system.access_calls) == 2

    async def test_that_goes_on_is_revoked_once_it_has_ended(self, system: MemorySystem) -> None:
        """Not before, when there would be nothing to revoke."""
        host = HCSHostBackend(system, timeout=30)
        outcome = system.hang()
        with pytest.raises(OutcomeUnknownError):
            await host.grant_access(DISK, VM)
        revoking = asyncio.ensure_future(host.revoke_access(DISK, VM))
        await asyncio.sleep(0)
        assert system.access_calls == [("grant", VM, DISK.path)]
        outcome.set_result(None)
        await revoking
        assert system.access_calls[1:] == [("revoke", VM, DISK.path)]

    async def test_that_fails_late_needs_no_revoking(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """It was never there."""
        outcome = system.hang()
        with pytest.raises(OutcomeUnknownError):
            await host.grant_access(DISK, VM)
        outcome.set_result(failure(0x80070005))
        await asyncio.sleep(0)
        await host.revoke_access(DISK, VM)
        assert system.access_calls == [("grant", VM, DISK.path)]

    async def test_of_an_earlier_process_is_revoked_too(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """Once it has been told of it."""
        base.adopt_grant(host, DISK, VM, base.plan_grant(host, DISK, VM))
        await host.revoke_access(DISK, VM)
        assert system.access_calls == [("revoke", VM, DISK.path)]

    async def test_another_backends_plan_is_refused(self, host: HCSHostBackend) -> None:
        """Rather than guessed at."""
        with pytest.raises(BackendError, match="another backend's"):
            host.adopt_grant(DISK, VM, '{"acl": 1}')

    async def test_of_a_file_that_has_gone_is_gone(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """Nothing to undo is no error."""
        await host.grant_access(DISK, VM)
        system.refuse(0x80070002)
        await host.revoke_access(DISK, VM)
        await host.revoke_access(DISK, VM)
        assert len(system.access_calls) == 2


class TestDisksOfTheVMsOwn:
    """The service removes whatever is in a slot, the disk that the VM runs from too."""

    async def test_that_are_known_keep_their_slots(self, system: MemorySystem) -> None:
        """Nothing is asked of the service for those."""
        host = HCSHostBackend(system, own=[Slot(1, 3), Slot(0, 0)])
        assert await base.occupied(host) == {Slot(0, 0), Slot(1, 3)}
        with pytest.raises(SlotTakenError) as caught:
            await host.attach(ATTACHMENT)
        assert (caught.value.slot, caught.value.disk) == (Slot(1, 3), DISK)
        await host.detach(ATTACHMENT)
        assert system.documents == []

    async def test_that_are_not_known_are_never_removed(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """If the slot may have been taken, and nobody tells, the undoing is refused."""
        system.refuse(0x8037011E)
        with pytest.raises(OutcomeUnknownError):
            await host.attach(ATTACHMENT)
        for _ in range(2):
            with pytest.raises(OutcomeUnknownError, match=r"VM's own; .*own="):
                await host.detach(ATTACHMENT)
        assert system.documents == [ADD]

    async def test_are_told_apart_where_the_service_lists_them(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """By the path that is in the slot."""
        for path, removed in (("C:\\boot.vhdx", []), (DISK.path, [REMOVE])):
            system.told = listing(s1_3=path)
            system.refuse(0x8037011E)
            attachment = Attachment(Slot(1, 3), DISK, f"h{len(removed)}x")
            with pytest.raises(OutcomeUnknownError):
                await host.attach(attachment)
            await host.detach(attachment)
            assert system.documents == [ADD, *removed]
            system.documents.clear()

    async def test_are_not_where_one_of_ours_has_been(
        self, host: HCSHostBackend, system: MemorySystem
    ) -> None:
        """An unknown attach there is undone without asking."""
        await host.attach(ATTACHMENT)
        await host.detach(ATTACHMENT)
        system.refuse(0x8037011E)
        with pytest.raises(OutcomeUnknownError):
            await host.attach(NEWER)
        await host.detach(NEWER)
        assert system.documents[-1] == REMOVE

    async def test_are_elsewhere_if_all_are_known(self, system: MemorySystem) -> None:
        """Nor is it asked then."""
        host = HCSHostBackend(system, own=())
        system.refuse(0x8037011E)
        with pytest.raises(OutcomeUnknownError):
            await host.attach(ATTACHMENT)
        await host.detach(ATTACHMENT)
        assert system.documents == [ADD, REMOVE]


def test_only_the_latest_departures_are_remembered() -> None:
    """A backend may live for years."""
    occupants = Occupants(None)
    many = [Attachment(Slot(0, 0), DISK, f"h{number}") for number in range(1100)]
    for attachment in many:
        occupants.is_gone(attachment)
    assert sum(occupants.knows(attachment) is False for attachment in many) == 1024
    assert occupants.knows(many[-1]) is False
