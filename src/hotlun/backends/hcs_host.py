"""Disks for a VM of the Windows Host Compute Service.

The service knows an attachment by its slot alone, and the guest reads no serial of ours from
it. So it is kept here which attachment is, or may be, in which slot: an old `detach` must not
meet a newer disk. What was begun at a slot and has not ended is waited for before anything else
is begun there, and how it ended decides what is left to do.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hotlun import host_paths, windows_paths
from hotlun.backends.errand import Errand
from hotlun.backends.hcs_errors import meaning_of, told_of
from hotlun.backends.occupants import Occupants
from hotlun.backends.unfinished import PATIENCE, Unfinished
from hotlun.errors import (
    BackendError,
    HotlunError,
    OutcomeUnknownError,
    SlotTakenError,
    VMGoneError,
)
from hotlun.hcs import documents, revoke_vm_access
from hotlun.hcs.documents import CONTROLLERS
from hotlun.hcs.results import Meaning
from hotlun.hcs.system import check_system
from hotlun.model import DiskKind, Presence

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from hotlun.hcs.computecore import ComputeCore
    from hotlun.hcs.system import System
    from hotlun.model import Attachment, Disk, Slot

_log = logging.getLogger("hotlun.hcs")

GRANT_PLAN = "hcs"
"""What is written down of a grant: there is nothing more to say of one."""


class HCSHostBackend:
    """The `HostBackend` for one VM of the Host Compute Service.

    Methods may be called side by side. One that is cancelled goes on, as the service cannot
    be told to stop; what is called for its slot after that waits for it.

    Args:
        system: the VM, open for as long as this is used.
        controllers: names or GUIDs of its SCSI controllers, as its document has them; the first
            is our number 0. A Linux guest finds those by GUID, and no others.
        own: the slots that its document fills (`document_slots`), which are given to nobody;
            None if that is not known. Then an attach of which nobody can tell whether it was
            done cannot be undone, either, at a slot where it may have met a disk of the VM's own.
        timeout: seconds to wait for what was begun at a slot before.

    Raises:
        TypeError: `system` is none.
        ValueError: no controllers, one twice, or a name that cannot be one.
    """

    serials = False
    """A guest cannot tell its disks by our serials: the service sets none."""

    def __init__(
        self,
        system: System,
        *,
        controllers: Sequence[str] = CONTROLLERS,
        own: Collection[Slot] | None = None,
        timeout: float = PATIENCE,
    ) -> None:
        check_system(system)
        if isinstance(controllers, str) or not controllers:
            raise ValueError(f"controllers is a sequence of names or GUIDs: {controllers!r}")
        if len({name.lower() for name in controllers}) < len(controllers):
            raise ValueError(f"a controller is named twice: {controllers!r}")
        for name in controllers:
            if not name or "/" in name or "\0" in name:
                raise ValueError(f"no SCSI controller has this name: {name!r}")
        self._system = system
        self._controllers = tuple(controllers)
        self._unfinished = Unfinished(timeout)
        self._occupants = Occupants(own)
        self._grants: set[tuple[str, str]] = set()

    async def attach(self, attachment: Attachment) -> None:
        """Have the service attach the disk.

        Raises:
            SlotTakenError: another disk is at this slot.
            UnsupportedError: no such slot is to be had, or no such image.
            BackendError: the service refused, and nothing is left of it.
            VMGoneError: the VM has ended.
            OutcomeUnknownError: it may have been done; `detach` undoes it.
        """
        errand, slot, occupants = Errand.on(attachment, "attach"), attachment.slot, self._occupants
        document = documents.add_document(attachment, self._controllers)
        if slot in (occupants.own or ()):
            raise errand.error(SlotTakenError, "a disk of the VM's own is there; use another slot")
        before: Attachment | None = None

        async def begin() -> None:
            nonlocal before
            before = occupants.at(slot)
            occupants.comes(attachment)
            await self._system.modify(document)

        def ended(error: BaseException | None) -> None:
            if error is None:
                occupants.is_there(attachment, before)
            elif isinstance(error, BackendError):
                occupants.is_gone(attachment, before)

        _log.debug("%s", errand)
        with told_of(errand):
            await self._unfinished.run(slot, begin, ended)

    async def detach(self, attachment: Attachment) -> None:
        """Have the service take this attachment out, if it is, or may be, there.

        Of what an earlier process has attached only the slot is known, and the path where the
        service tells it: another one there is left alone.

        Raises:
            BackendError: the service refused; the disk is still attached.
            VMGoneError: the VM has ended.
            OutcomeUnknownError: it may have been done; try again.
        """
        errand, slot = Errand.on(attachment, "detach"), attachment.slot
        document = documents.remove_document(attachment, self._controllers)

        async def begin() -> None:
            if await self._is_to_go(attachment):
                await self._system.modify(document)

        def ended(error: BaseException | None) -> None:
            if error is None or meaning_of(error) is Meaning.ABSENT:
                self._occupants.is_gone(attachment)

        _log.debug("%s", errand)
        with told_of(errand, fine=Meaning.ABSENT):
            await self._unfinished.run(slot, begin, ended)

    async def survey(self, attachments: Collection[Attachment]) -> Mapping[str, Presence] | None:
        """What the service says of these, by serial; None if it says nothing of any disk.

        Present is what has its path at its slot; absent what has another one's path there, or is
        known here not to be there, whatever the path. That something is not listed tells
        nothing: the service need not list all.

        Raises:
            BackendError: the service does not answer.
        """
        busy = {one.slot for one in attachments if one.slot in self._unfinished}
        paths = await self._paths("survey the disks")
        if paths is None:
            return None
        busy |= {one.slot for one in attachments if one.slot in self._unfinished}
        return {
            one.serial: Presence.UNKNOWN if one.slot in busy else self._presence(one, paths)
            for one in attachments
        }

    async def occupied(self) -> Collection[Slot]:
        """The VM's own slots, if they are known, and whatever the service says is filled.

        Raises:
            BackendError: the service does not answer.
        """
        paths = await self._paths("list the disks")
        return frozenset(paths or ()) | (self._occupants.own or frozenset())

    def plan_grant(self, disk: Disk, vm_id: str) -> str:  # noqa: ARG002 - the protocol's
        """Says that a grant can be revoked in another process; `""` if there is none to be made."""
        return "" if disk.kind is DiskKind.EXTENSIBLE_VIRTUAL_DISK else GRANT_PLAN

    def adopt_grant(self, disk: Disk, vm_id: str, plan: str) -> None:
        """Take over a grant that an earlier process has made, or begun.

        Raises:
            BackendError: the plan is not understood.
        """
        if plan not in ("", GRANT_PLAN):
            raise Errand("adopt the access to", disk).error(
                BackendError, f"its plan is another backend's: {plan[:80]!r}; revoke it by hand"
            )
        if plan:
            self._grants.add((vm_id, disk.path))

    async def grant_access(self, disk: Disk, vm_id: str) -> None:
        """Let the VM open the disk: an entry for it in the file's access list.

        Nothing is done for an extensible virtual disk, which its provider opens.

        Args:
            disk: an image, or a physical disk.
            vm_id: the VM's id of the service, as `open_system` takes it; not its runtime GUID.

        Raises:
            BackendError: no such file, or its access list may not be changed (WRITE_DAC).
            OutcomeUnknownError: it may have been done.
        """
        if not self.plan_grant(disk, vm_id):
            return
        errand, grant = Errand(f"let {vm_id} open", disk), (vm_id, disk.path)
        was_there = False  # or may have been

        def ended(error: BaseException | None) -> None:
            if isinstance(error, BackendError) and not was_there:
                self._grants.discard(grant)

        async def begin() -> None:
            nonlocal was_there
            was_there = grant in self._grants
            self._grants.add(grant)  # it may be there from now on
            await self._system.grant_vm_access(vm_id, disk.path)

        with told_of(errand):
            await self._unfinished.run(grant, begin, ended)

    async def revoke_access(self, disk: Disk, vm_id: str) -> None:
        """Undo a grant of this backend, or one that it has adopted; nothing else.

        Raises:
            BackendError: the access list may not be changed.
            OutcomeUnknownError: it may have been done; try again.
        """
        grant = vm_id, disk.path
        if grant not in self._grants:
            return
        errand = Errand(f"revoke from {vm_id} the access to", disk)

        def ended(error: BaseException | None) -> None:
            if error is None or meaning_of(error) is Meaning.MISSING:
                self._grants.discard(grant)

        with told_of(errand, fine=Meaning.MISSING):
            await self._unfinished.run(
                grant, lambda: self._system.revoke_vm_access(vm_id, disk.path), ended
            )

    async def _is_to_go(self, attachment: Attachment) -> bool:
        """Whether its slot holds it, or may do so; asked once nothing is under way there.

        Raises:
            OutcomeUnknownError: it may as well hold a disk of the VM's own.
        """
        if attachment.slot in (self._occupants.own or ()):
            return False
        known = self._occupants.knows(attachment)
        if known is False or (known and not self._occupants.may_be_another(attachment)):
            return known
        paths = await self._paths("detach")
        presence = Presence.UNKNOWN if paths is None else self._presence(attachment, paths)
        if known and presence is Presence.UNKNOWN:
            raise OutcomeUnknownError(
                "whether it was attached is unknown, and what is in its slot may be a disk of the "
                "VM's own; make the backend with `own=` (see `document_slots`), or end the VM"
            )
        return presence is not Presence.ABSENT

    def _presence(self, attachment: Attachment, paths: Mapping[Slot, str]) -> Presence:
        if self._occupants.knows(attachment) is False:
            return Presence.ABSENT
        there = paths.get(attachment.slot)
        if there is None:
            return Presence.UNKNOWN
        return Presence.PRESENT if _same(there, attachment.disk.path) else Presence.ABSENT

    async def _paths(self, operation: str) -> Mapping[Slot, str] | None:
        errand = Errand(operation)
        with told_of(errand):
            try:
                found = await self._system.properties(documents.PROPERTY_QUERY)
            except OutcomeUnknownError as error:  # what was only asked changes nothing
                raise BackendError(str(error), code=error.code, detail=error.detail) from error
            except BackendError as error:
                if meaning_of(error) is not Meaning.ABSENT:
                    raise
                # Of a question it says nothing about a disk; so it keeps no code to be taken so.
                raise BackendError(str(error), detail=error.detail) from error
        if found.get("Stopped") is True:  # the service knows of it for as long as it is open
            raise errand.error(
                VMGoneError, "the VM has stopped, and every attachment went with it: forget them"
            )
        return documents.attached_paths(found)


async def revoke_after_the_end(
    grants: Iterable[tuple[Disk, str]], *, core: ComputeCore | None = None
) -> None:
    """Undo what `grant_access` has done for VMs that have ended; all is tried, whatever fails.

    Args:
        grants: the disks, each with the id of its VM.
        core: the library to use; None for this Windows' own.

    Raises:
        UnsupportedError: this is no Windows with the service.
        BackendError: an access list may not be changed.
        OutcomeUnknownError: it may have been done; try again.
    """
    failures: list[HotlunError] = []
    for disk, vm_id in grants:
        errand = Errand(f"revoke from {vm_id} the access to", disk)
        try:
            with told_of(errand, fine=Meaning.MISSING):
                await revoke_vm_access(vm_id, disk.path, core=core)
        except (BackendError, OutcomeUnknownError) as error:
            failures.append(error)
    if failures:
        for other in failures[1:]:
            failures[0].add_note(f"then, {other}")
        raise failures[0]


def _same(one: str, other: str) -> bool:
    """Whether two paths lead to one disk; the service may tell another one than it was given."""
    if windows_paths.fold(one) == windows_paths.fold(other):
        return True
    try:
        return host_paths.same(one, other)
    except ValueError:  # a NUL, in what the service told
        return False
