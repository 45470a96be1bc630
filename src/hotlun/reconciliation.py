"""What is believed of a disk, beside what hypervisor and guest have: which of them is right.

Pure and synchronous: `judge` is given one disk and what was seen of it, and sets its facts
by the rules that `docs/reconciliation.md` states in words. What has to be done then is the
worker's, as always. Each disagreement is named.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from hotlun.facts import MAYBE, NO, UNPLUGGED, YES
from hotlun.model import GuestMount, GuestSurvey, Presence
from hotlun.wants import forget_mount, leave_mount, lose

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hotlun.facts import Fact
    from hotlun.model import Attachment
    from hotlun.states import DiskState, MountState


class Finding(StrEnum):
    """In what way the three did not agree."""

    DISK_GONE = "the hypervisor does not have the disk any more"
    DISK_INCOMPLETE = "the hypervisor has only a part of the disk"
    DISK_BACK = "the guest has the disk again that it had let go"
    DEVICE_KEPT = "the guest has not let the disk go, which was unknown"
    DEVICE_GONE = "the guest has let the disk go, which was unknown"
    ATTACHED_UNSEEN = "the disk is attached, which was unknown, and nobody holds it"
    NEVER_ATTACHED = "the disk is not attached, which was unknown, and nobody holds it"
    MOUNT_GONE = "the guest does not have the mount any more"
    MOUNT_KEPT = "the guest still has the mount, which was unknown"
    UNMOUNTED = "the guest does not have the mount, which was unknown"
    MOUNTED_UNSEEN = "the guest has the mount, which was unknown, and nobody holds it"
    UNHELD = "nobody holds it"


class Resolution(StrEnum):
    """How a disagreement was settled."""

    ADOPTED = "it is used as it is"
    UNDONE = "what was left of it is undone"
    REMOUNTED = "it is mounted again"
    LOST = "its Mounts are lost; releasing them cleans up"
    NOTED = "that is taken for true"
    STUCK = "that could not be done yet, and is tried again"


@dataclass(frozen=True, slots=True)
class Disagreement:
    """What did not agree about a disk, or one of its guest mounts, and how that was settled.

    Args:
        attachment: the disk, where it was put, and under what serial.
        guest_path: the guest mount's; None if it is about the disk.
        finding: what was found.
        resolution: what was made of it.
        detail: more about that, for a person.
    """

    attachment: Attachment
    guest_path: str | None
    finding: Finding
    resolution: Resolution
    detail: str = ""

    def __str__(self) -> str:
        where = f", mounted at {self.guest_path}" if self.guest_path else ""
        a = self.attachment
        text = f"{a.disk} at slot {a.slot}{where}: {self.finding}; {self.resolution}"
        return f"{text} ({self.detail})" if self.detail else text


@dataclass(frozen=True, slots=True)
class Seen:
    """What the two others have; None for one that cannot be asked."""

    host: Mapping[str, Presence] | None
    guest: GuestSurvey | None


def judge(disk: DiskState, seen: Seen) -> list[Disagreement]:
    """Set the facts of a disk that no step is being taken for, by what was seen of it."""
    if disk.slot is None or disk.is_gone or disk.current is not None:
        return []  # only revokes are left, which nobody else knows of
    if seen.guest is not None and disk.attachment.serial in seen.guest.busy:
        seen = replace(seen, guest=None)  # it is about to be something else
    return [*_judge_attachment(disk, seen), *_judge_mounts(disk, seen)]


def _judge_attachment(disk: DiskState, seen: Seen) -> Iterator[Disagreement]:
    serial = disk.attachment.serial
    presence = None if seen.host is None else seen.host.get(serial, Presence.ABSENT)
    has_device = None if seen.guest is None else serial in seen.guest.devices
    is_held = bool(disk.handles)
    was, expected = disk.fact, disk.fact in (YES, MAYBE) and not _is_lost(disk)
    if is_held and expected and presence in (Presence.ABSENT, Presence.PARTIAL):
        gone = presence is Presence.ABSENT
        lose_disk(disk, "the hypervisor has it no more" if gone else "only a part of it is left")
        finding = Finding.DISK_GONE if gone else Finding.DISK_INCOMPLETE
        yield _found(disk, finding, Resolution.LOST)
    elif not is_held:
        if presence is Presence.PARTIAL or (was is UNPLUGGED and has_device):
            disk.fact = MAYBE
        yield _found(disk, _unheld(was, presence), Resolution.UNDONE)
    elif was is MAYBE and expected and has_device is not None:
        # Only an unplug can be unknown of a disk that is held.
        disk.fact = YES if has_device else UNPLUGGED
        disk.closing = not has_device
        if has_device:
            yield _found(disk, Finding.DEVICE_KEPT, Resolution.ADOPTED)
        else:
            yield _found(disk, Finding.DEVICE_GONE, Resolution.NOTED)
    elif was is UNPLUGGED and has_device:
        # A detach may be under way still: it is unplugged once more, and never shared.
        disk.fact = MAYBE
        for handle in disk.handles:
            lose(handle, "its release had begun to take the disk away")
        yield _found(disk, Finding.DISK_BACK, Resolution.NOTED)


def _unheld(was: Fact, presence: Presence | None) -> Finding:
    if presence is Presence.PARTIAL:
        return Finding.DISK_INCOMPLETE
    if was is MAYBE and presence not in (None, Presence.UNKNOWN):
        there = presence is Presence.PRESENT
        return Finding.ATTACHED_UNSEEN if there else Finding.NEVER_ATTACHED
    return Finding.UNHELD


def _judge_mounts(disk: DiskState, seen: Seen) -> Iterator[Disagreement]:
    if disk.fact is not YES or not disk.handles:
        return
    has_device = seen.guest is not None and disk.attachment.serial in seen.guest.devices
    for mount in list(disk.mounts.values()):
        it = GuestMount(disk.attachment, mount.path, mount.config)
        is_there = None if seen.guest is None else it in seen.guest.mounts
        if not mount.handles:
            yield _found(disk, _unheld_mount(mount.fact, is_there), Resolution.UNDONE, mount)
        elif is_there is None or any(handle.lost for handle in mount.handles):
            continue
        elif mount.fact is not YES and is_there:
            mount.fact, mount.closing, mount.reason = YES, False, ""
            mount.is_due = False
            yield _found(disk, Finding.MOUNT_KEPT, Resolution.ADOPTED, mount)
        elif mount.fact is MAYBE and not mount.is_due:
            if not has_device:  # what is left of a mount when its disk is pulled is no such mount
                continue
            for handle in list(mount.handles):
                leave_mount(handle)
            mount.fact = NO
            forget_mount(disk, mount)
            yield _found(disk, Finding.UNMOUNTED, Resolution.NOTED, mount)
        elif not is_there:
            yield _remount(disk, mount)


def _unheld_mount(was: Fact, is_there: bool | None) -> Finding:
    if is_there is None or (is_there and was is YES):
        return Finding.UNHELD
    return Finding.MOUNTED_UNSEEN if is_there else Finding.UNMOUNTED


def _remount(disk: DiskState, mount: MountState) -> Disagreement:
    config = mount.config
    if config.encrypted and config.key is None:
        why = "its key was nowhere but in that mount"
    elif config.key is not None and config.key.is_sealed:
        why = "its key is not known here any more"
    elif config.container_scratch:  # ensure_filesystem looks first, this formats each time
        why = "mounting it again would format it again"
    else:
        mount.fact, mount.closing, mount.is_due = NO, False, True
        return _found(disk, Finding.MOUNT_GONE, Resolution.REMOUNTED, mount)
    lose_mount(mount, f"{mount.path} is gone from the guest, and {why}")
    return _found(disk, Finding.MOUNT_GONE, Resolution.LOST, mount, why)


def lose_disk(disk: DiskState, reason: str) -> None:
    """What is held of the disk is there no more; releasing undoes what is left of it."""
    disk.fact, disk.closing = MAYBE, True
    disk.reason = f"lost: {reason}"
    for handle in disk.handles:
        lose(handle, reason)
    for mount in disk.mounts.values():
        if mount.fact is not NO or mount.handles:
            mount.fact, mount.closing, mount.is_due = MAYBE, True, False


def lose_mount(mount: MountState, reason: str) -> None:
    """The guest mount is there no more; releasing undoes what is left of it."""
    mount.fact, mount.closing, mount.is_due = MAYBE, True, False
    mount.reason = f"lost: {reason}"
    for handle in mount.handles:
        lose(handle, reason)


def _is_lost(disk: DiskState) -> bool:
    return disk.fact is MAYBE and any(handle.lost for handle in disk.handles)


def is_unresolved(disk: DiskState) -> bool:
    """Whether there is something that asking again, or trying again, may settle."""
    if disk.is_gone:
        return False
    if not disk.handles or (disk.fact is MAYBE and not _is_lost(disk)):
        return True
    if disk.fact is not YES:
        return False
    for mount in disk.mounts.values():
        if not mount.handles:
            return True
        if mount.fact is MAYBE and not any(handle.lost for handle in mount.handles):
            return True
    return False


def settled(disagreement: Disagreement, disk: DiskState) -> Disagreement:
    """The same, once the worker has done what it could about it."""
    mount = next((m for m in disk.mounts.values() if m.path == disagreement.guest_path), None)
    reason = ""
    if disagreement.resolution is Resolution.UNDONE:
        if disagreement.guest_path is None and not disk.is_gone and not disk.handles:
            reason = disk.reason or next((m.reason for m in disk.mounts.values()), "")
        elif mount is not None and not mount.handles:
            reason = mount.reason
        if reason:
            return replace(disagreement, resolution=Resolution.STUCK, detail=reason)
    if disagreement.resolution is Resolution.REMOUNTED and mount is not None and mount.closing:
        is_lost = any(handle.lost for handle in mount.handles)
        resolution = Resolution.LOST if is_lost else Resolution.STUCK
        return replace(disagreement, resolution=resolution, detail=mount.reason)
    return disagreement


def _found(
    disk: DiskState,
    finding: Finding,
    resolution: Resolution,
    mount: MountState | None = None,
    detail: str = "",
) -> Disagreement:
    path = None if mount is None else mount.path
    return Disagreement(disk.attachment, path, finding, resolution, detail)
