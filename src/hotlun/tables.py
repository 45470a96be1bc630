"""What one Manager knows - slots, attachments, guest mounts, Mounts - and each decision over it.

Everything here is synchronous: between the question and the decision nothing changes.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hotlun import wants
from hotlun.attachments import AttachmentTable, status, unique_names
from hotlun.errors import DiskConflictError, NoAvailableLocationError
from hotlun.model import Attachment
from hotlun.states import DiskState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from hotlun.attachments import DiskRequest
    from hotlun.errors import SlotTakenError
    from hotlun.model import Disk, MountConfig
    from hotlun.mount_handle import Mount
    from hotlun.mounts import MountTable
    from hotlun.owners import Owner
    from hotlun.slots import SlotStatus, SlotTable
    from hotlun.states import Answer, Handle, MountState


class Tables:
    """The tables of one VM.

    Args:
        slots: with what is reserved.
        guest_mounts: empty.
        check: refuses a mount that the guest cannot do, with `UnsupportedError`.
    """

    def __init__(
        self,
        slots: SlotTable,
        guest_mounts: MountTable,
        check: Callable[[Disk, MountConfig, str], None],
    ) -> None:
        self.slots = slots
        self.disks = AttachmentTable()
        self.guest_mounts = guest_mounts
        self.mounts: dict[Handle, Mount] = {}
        """The live ones, oldest first."""
        self._check = check
        self._names = unique_names()
        self._numbers = itertools.count()

    # --- An add ---

    def decide(
        self,
        request: DiskRequest,
        vm_id: str,
        path: str,
        config: MountConfig | None,
        answer: Answer,
        owner: Owner,
    ) -> tuple[DiskState, Handle | None]:
        """Join what is there or begin anew; without a handle, wait for a teardown and ask again."""
        disk = self._find(request)
        if disk is None:
            mount = self._plan(request.disk, path, config)
            disk = self._begin(request, mount)
            return disk, wants.join(disk, mount, vm_id, answer, owner)
        if self._has_to_go(disk, request):
            wants.wait_for(disk, disk, answer, is_adding=True)
            return disk, None
        wants.retry_orphans(disk)
        if config is None:
            return disk, wants.join(disk, None, vm_id, answer, owner)
        mount = disk.mounts.get(config)
        if mount is None:
            in_the_way = self.guest_mounts.in_the_way(disk, config)
        else:
            in_the_way = mount if mount.closing else None
        if in_the_way is not None:
            wants.wait_for(in_the_way, disk, answer, is_adding=True)
            return disk, None
        if mount is None:
            mount = self._plan(disk.attachment.disk, path, config)
        else:
            mount.config = config  # equal; but of two equal keys one may be no more than a seal
        return disk, wants.join(disk, mount, vm_id, answer, owner)

    def _find(self, request: DiskRequest) -> DiskState | None:
        while (disk := self.disks.find(request)) is not None:
            self.settle(disk)  # a caller that was cancelled may not have had its turn yet
            if not disk.is_gone:
                break
        return disk

    def _has_to_go(self, disk: DiskState, request: DiskRequest) -> bool:
        """Whether the disk is, or will be, in teardown, and cannot be shared before it is over."""
        if disk.closing:
            return True
        try:
            self.disks.check_sharing(disk, request)
        except DiskConflictError:
            if disk.handles:
                raise
            return True
        return False

    def _plan(self, disk: Disk, path: str, config: MountConfig | None) -> MountState | None:
        if config is None:
            return None
        return self.guest_mounts.plan(disk, config, path, self._check)

    def _begin(self, request: DiskRequest, mount: MountState | None) -> DiskState:
        try:
            slot = self.slots.take()
        except NoAvailableLocationError:
            if mount is not None:
                self.guest_mounts.remove(mount)
            raise
        attachment = Attachment(slot, request.disk, next(self._names))
        disk = DiskState(attachment, request.identity)
        self.disks.add(disk)
        return disk

    def name(self, handle: Handle) -> None:
        """The handle is a Mount from now on, and has an id and its place among the others."""
        handle.id, handle.number = next(self._names), next(self._numbers)
        wants.note(handle)

    # --- What an earlier Manager had ---

    def take_up(self, disks: Iterable[DiskState]) -> list[Handle]:
        """Have it in the tables; its holders, oldest first."""
        for disk in disks:
            self.disks.add(disk)
            if disk.slot is not None:
                self.slots.claim(disk.slot)
            for mount in disk.mounts.values():
                self.guest_mounts.add(mount)
        handles = sorted(
            (handle for disk in disks for handle in disk.handles), key=lambda handle: handle.number
        )
        if handles:
            self._numbers = itertools.count(handles[-1].number + 1)
        return handles

    # --- For the worker ---

    def settle(self, disk: DiskState) -> None:
        """Answer the wants on a disk, and give back what it holds no more."""
        if not wants.is_on_its_way(disk):
            wants.settle(disk)
        while disk.unmounted:
            self.guest_mounts.remove(disk.unmounted.pop())
        while disk.left:
            self.mounts.pop(disk.left.pop(), None)
        if disk.vacated and disk.slot is not None:
            self.slots.give_back(disk.slot)
            disk.slot = None
        if disk.is_gone and disk in self.disks:
            self.disks.remove(disk)

    def relocate(self, disk: DiskState, error: SlotTakenError) -> None:
        """Another slot for a disk whose slot somebody else has.

        Raises:
            NoAvailableLocationError: there is none.
        """
        attachment = disk.attachment
        self.slots.reserve([attachment.slot], f"found taken: {error}")
        disk.slot = None
        try:
            disk.slot = self.slots.take()
        except NoAvailableLocationError as nowhere:
            raise nowhere from error
        disk.attachment = Attachment(disk.slot, attachment.disk, next(self._names))

    # --- Snapshots ---

    def held_for(self, owner: str) -> list[Handle]:
        """The Mounts of one owner."""
        held = [handle for handle in self.mounts if handle.owner.name == owner]
        # A process that has ended does not take the Mounts of one that has its number now.
        return [handle for handle in held if handle.owner.has_ended()] or held

    def orphans(self) -> Iterator[tuple[DiskState | MountState, DiskState]]:
        """What nobody owns, and the disk that it belongs to."""
        for disk in self.disks:
            if not disk.handles:
                yield disk, disk
            elif disk.handles.keys().isdisjoint(self.mounts.keys()):  # looks through the fewer
                continue  # an add's own business
            else:
                yield from ((m, disk) for m in disk.mounts.values() if not m.handles)

    def statuses(self) -> tuple[SlotStatus, ...]:
        """Every slot, in order."""
        disks = {disk.slot: disk for disk in self.disks if disk.slot is not None}
        return tuple(
            status(slot, disks[slot], self.mounts) if slot in disks else self.slots.status(slot)
            for slot in self.slots
        )
