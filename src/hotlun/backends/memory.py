"""Honest fakes: a VM in memory, with scripted faults, for tests of whatever uses a Manager.

    host, guest = MemoryHostBackend(), MemoryGuestBackend()
    host.fail("attach", BackendError("no such file"), at=2)   # the second attach from now
    gate = guest.stall("mount")                               # the next mount waits
    guest.lose("unmount", happened=True)                      # done, and the reply lost

They keep the contract of `hotlun.backends.base`, and check on their own that
nothing impossible is asked for: two attaches of one disk, two disks in one
slot, a serial used twice, the identity of what is not attached, an unplug while
something is mounted, a mount of what was let go or under another disk's identity, a
grant made twice. A `MemoryGuestBackend(host)` that knows its host also sees a mount
of a disk that is not attached, and a detach of one that the guest has not let go.
Each is kept in `violations`, and raised there and then as an AssertionError.

What happens without the Manager is a test's to say: a disk is pulled (`host.vanish`), a
mount undone inside the guest (`guest.vanish`), the guest starts anew (`guest.reset`), the
hypervisor ends (`host.end`), and whatever else a backend tells of (`tell`). To be asked for
what has gone that way is normal, and each is counted as `effects["lost"]`.

There is nothing on these disks: formats, encryption and verity are taken as done. A
wrong key is a `fail("mount", WrongKeyError(...))`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotlun.backends import requests
from hotlun.backends.scripting import Call, Gate, Script
from hotlun.errors import BackendError, SlotTakenError
from hotlun.events import GuestReset, VMGone
from hotlun.model import DiskIdentity, GuestSurvey, Presence

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from hotlun.backends.base import OSType
    from hotlun.model import Attachment, Disk, GuestMount, MountConfig, Slot

__all__ = ["Call", "Gate", "MemoryGuestBackend", "MemoryHostBackend"]


class MemoryHostBackend(Script):
    """A hypervisor in memory.

    Args:
        occupied: slots that the VM's own disks hold, told on entering a Manager.
        taken: slots that turn out taken only when something is attached there.
        delay: seconds that each call takes.
        surveys: whether it can be asked what it has.
        serials: whether the guest can know the disks by our serials.
    """

    _operations = frozenset({"attach", "detach", "grant_access", "revoke_access", "survey"})

    def __init__(
        self,
        *,
        occupied: Iterable[Slot] = (),
        taken: Iterable[Slot] = (),
        delay: float = 0,
        surveys: bool = True,
        serials: bool = True,
    ) -> None:
        super().__init__(delay)
        self.serials = serials
        self.attached: dict[Slot, Attachment] = {}
        """What is attached now."""
        self.granted: set[tuple[str, str]] = set()
        """The (disk, vm_id) pairs that may be opened now."""
        self._occupied = frozenset(occupied)
        self._taken = frozenset(taken) | self._occupied
        self.used_serials: set[str] = set()
        """Of all that was ever to be attached."""
        self._disks: set[str] = set()
        self._vanished: set[str] = set()
        self._surveys = surveys
        self._guests: list[MemoryGuestBackend] = []

    async def occupied(self) -> Collection[Slot]:
        return self._occupied

    async def attach(self, attachment: Attachment) -> None:
        if attachment.serial in self.used_serials:
            raise self._violated(f"a serial used twice: {attachment}")
        self.used_serials.add(attachment.serial)
        lost = await self._enter(Call("attach", attachment))
        if attachment.slot in self._taken:
            raise SlotTakenError(
                f"slot {attachment.slot} is one of the VM's own: use another",
                operation="attach",
                slot=attachment.slot,
                disk=attachment.disk,
            )
        name = str(attachment.disk)
        if name in self._disks:
            raise self._violated(f"one disk attached twice: {attachment.disk}")
        if self.attached.setdefault(attachment.slot, attachment) is not attachment:
            raise self._violated(f"two disks in slot {attachment.slot}: {attachment.disk}")
        self._disks.add(name)
        self.effects["attach"] += 1
        if lost is not None:
            raise lost

    def identity(self, attachment: Attachment) -> DiskIdentity:
        """Its serial; a disk in memory has no size."""
        if not self._has(attachment) and attachment.serial not in self._vanished:
            raise self._violated(f"the identity of what is not attached: {attachment}")
        return DiskIdentity(attachment.serial)

    async def detach(self, attachment: Attachment) -> None:
        lost = await self._enter(Call("detach", attachment))
        if self._has(attachment):
            for guest in self._guests:
                if attachment.serial in guest.plugged:
                    raise self._violated(f"a detach of what the guest still holds: {attachment}")
            self._disks.remove(str(self.attached.pop(attachment.slot).disk))
            self.effects["detach"] += 1
        if lost is not None:
            raise lost

    async def grant_access(self, disk: Disk, vm_id: str) -> None:
        lost = await self._enter(Call("grant_access", (disk, vm_id)))
        if (str(disk), vm_id) not in self.granted:
            self.granted.add((str(disk), vm_id))
            self.effects["grant_access"] += 1
        if lost is not None:
            raise lost

    async def revoke_access(self, disk: Disk, vm_id: str) -> None:
        lost = await self._enter(Call("revoke_access", (disk, vm_id)))
        if str(disk) in self._disks:
            raise self._violated(f"a revoke while the disk is attached: {disk} for {vm_id}")
        if (str(disk), vm_id) in self.granted:
            self.granted.remove((str(disk), vm_id))
            self.effects["revoke_access"] += 1
        if lost is not None:
            raise lost

    async def survey(self, attachments: Collection[Attachment]) -> Mapping[str, Presence] | None:
        """Which of these are attached; None if it was made without `surveys`."""
        if not self._surveys:
            return None
        lost = await self._enter(Call("survey", tuple(attachments)))
        if lost is not None:
            raise lost
        return {
            attachment.serial: Presence.PRESENT if self._has(attachment) else Presence.ABSENT
            for attachment in attachments
        }

    def vanish(self, serial: str) -> None:
        """Somebody takes a disk out of the VM; the guest keeps what it has of it.

        Raises:
            ValueError: nothing of this serial is attached.
        """
        attachment = next((a for a in self.attached.values() if a.serial == serial), None)
        if attachment is None:
            raise ValueError(f"nothing with the serial {serial!r} is attached")
        del self.attached[attachment.slot]
        self._disks.remove(str(attachment.disk))
        self._vanished.add(serial)
        self.effects["lost"] += 1

    def end(self) -> None:
        """The hypervisor ends, and with it all that is attached, and the guest."""
        for attachment in tuple(self.attached.values()):
            self.vanish(attachment.serial)
        for guest in self._guests:
            guest._clear()
        for backend in (self, *self._guests):
            backend._has_ended = True
            backend.tell(VMGone("it was ended"))

    def _has(self, attachment: Attachment) -> bool:
        """The serial tells: a disk may have moved to another path with its VM."""
        there = self.attached.get(attachment.slot)
        return there is not None and there.serial == attachment.serial


class MemoryGuestBackend(Script):
    """A guest in memory.

    Args:
        host: whose VM this is; with it more of what is impossible is seen.
        os_type: whose path rules hold, and what of a config is refused; a Linux guest in memory
            has the whole of hotlun's agent.
        controllers: how many of them the guest can use; None for all, in Windows for 1.
        delay: seconds that each call takes.
        surveys: whether it can be asked what it has; None for as the real one: Windows cannot.
    """

    _operations = frozenset({"mount", "unmount", "unplug", "survey"})

    def __init__(
        self,
        host: MemoryHostBackend | None = None,
        *,
        os_type: OSType = "linux",
        controllers: int | None = None,
        delay: float = 0,
        surveys: bool | None = None,
    ) -> None:
        super().__init__(delay)
        self.os_type = os_type
        self.controllers = 1 if controllers is None and os_type == "windows" else controllers
        self.mounted: dict[str, GuestMount] = {}
        """What is mounted now, by guest path."""
        self.plugged: set[str] = set()
        """The serials of the devices that something was mounted from and that were not let go."""
        self.busy: set[str] = set()
        """The serials of the disks that it says to be still at work on when it is asked."""
        self._configs: dict[str, list[MountConfig]] = {}
        """Of what is mounted now, by serial."""
        self._found: set[str] = set()
        """The serials of all devices that something was mounted from, ever."""
        self._unplugged: set[str] = set()
        self._host = host
        self._surveys = os_type != "windows" if surveys is None else surveys
        if host is not None:
            host._guests.append(self)

    def check(self, disk: Disk, config: MountConfig, path: str) -> None:
        requests.check(disk, config, path, self.os_type, requests.FEATURES)

    async def mount(self, mount: GuestMount) -> None:
        lost = await self._enter(Call("mount", mount))
        attachment = mount.attachment
        if self._is_pulled(attachment):
            raise self._refused(mount, "its disk is not there any more")
        if attachment.serial in self._unplugged:
            raise self._violated(f"a mount of what the guest let go: {mount}")
        if self._host is not None and not self._host._has(attachment):
            raise self._violated(f"a mount of what is not attached: {mount}")
        if mount.identity is not None and mount.identity.serial != attachment.serial:
            raise self._violated(f"a mount under another disk's identity: {mount}")
        if mount.path in self.mounted:
            if self._is_pulled(self.mounted[mount.path].attachment):
                raise self._refused(mount, "what is left of a disk that is gone is mounted there")
            raise self._violated(f"two mounts at one path: {mount}")
        configs = self._configs.setdefault(attachment.serial, [])
        if mount.config in configs:
            raise self._violated(f"the same mount twice: {mount}")
        configs.append(mount.config)
        self.mounted[mount.path] = mount
        self.effects["mount"] += 1
        self.plugged.add(attachment.serial)
        self._found.add(attachment.serial)
        if lost is not None:
            raise lost

    async def unmount(self, mount: GuestMount) -> None:
        lost = await self._enter(Call("unmount", mount))
        if self._has(mount):
            self._forget(mount.path)
            self.effects["unmount"] += 1
        if lost is not None:
            raise lost

    async def unplug(self, attachment: Attachment) -> None:
        lost = await self._enter(Call("unplug", attachment))
        if not self._is_pulled(attachment):
            if self._configs.get(attachment.serial):
                raise self._violated(f"an unplug while something is mounted: {attachment}")
            if attachment.serial not in self._unplugged:
                self.effects["unplug"] += 1
        self._unplugged.add(attachment.serial)
        self.plugged.discard(attachment.serial)
        if lost is not None:
            raise lost

    async def survey(
        self, attachments: Collection[Attachment], mounts: Collection[GuestMount]
    ) -> GuestSurvey | None:
        """What of these there is; None if it was made without `surveys`.

        Without a host, of devices it knows those only that something was mounted from.
        """
        if not self._surveys:
            return None
        lost = await self._enter(Call("survey", (*attachments, *mounts)))
        if lost is not None:
            raise lost
        return GuestSurvey(
            devices=frozenset(a.serial for a in attachments if self._is_there(a)),
            mounts=frozenset(
                mount for mount in mounts if self._has(mount) and self._is_there(mount.attachment)
            ),
            busy=frozenset(self.busy),
        )

    def vanish(self, path: str) -> None:
        """Somebody unmounts it inside the guest.

        Raises:
            ValueError: nothing is mounted at that path.
        """
        if path not in self.mounted:
            raise ValueError(f"nothing is mounted at {path!r}")
        self._forget(path)
        self.effects["lost"] += 1

    def reset(self) -> None:
        """The guest starts anew: nothing is mounted, and it finds every disk that is attached."""
        self._clear()
        if self._host is not None:
            self._unplugged -= {attachment.serial for attachment in self._host.attached.values()}
        self.tell(GuestReset(by_guest=True))

    def _clear(self) -> None:
        self.effects["lost"] += len(self.mounted)
        for path in tuple(self.mounted):
            self._forget(path)
        self.plugged.clear()

    def _has(self, mount: GuestMount) -> bool:
        there = self.mounted.get(mount.path)
        return there is not None and _content(there) == _content(mount)

    def _forget(self, path: str) -> None:
        mount = self.mounted.pop(path)
        self._configs[mount.attachment.serial].remove(mount.config)

    def _is_there(self, attachment: Attachment) -> bool:
        """Whether the guest has the disk's device."""
        if attachment.serial in self._unplugged:
            return False
        if self._host is None:
            return attachment.serial in self._found
        return self._host._has(attachment)

    def _is_pulled(self, attachment: Attachment) -> bool:
        """Whether the disk was taken out of the VM without the guest's letting go."""
        return self._host is not None and attachment.serial in self._host._vanished

    def _refused(self, mount: GuestMount, why: str) -> BackendError:
        return BackendError(
            f"the guest did not mount {mount.attachment.disk} at {mount.path!r}: {why}",
            operation="mount",
            slot=mount.attachment.slot,
            disk=mount.attachment.disk,
        )


def _content(mount: GuestMount) -> tuple[str, MountConfig]:
    """What is mounted, wherever that is."""
    return mount.attachment.serial, mount.config
