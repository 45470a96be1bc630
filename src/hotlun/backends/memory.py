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

They say what they have if they are asked (`survey`), unless made with `surveys=False`. And
things happen that nobody has asked for:

    host.vanish(serial)             # the disk is pulled; the guest keeps what it has
    guest.vanish("/mnt")            # somebody has unmounted it inside the guest
    guest.reset()                   # a reboot: nothing is mounted, every disk is found anew
    host.end()                      # the hypervisor is killed
    host.tell(VMPaused("..."))      # whatever else `hotlun.events` has

There is nothing on these disks: formats, encryption and verity are taken as done. A
wrong key is a `fail("mount", WrongKeyError(...))`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from hotlun.errors import (
    BackendError,
    OutcomeUnknownError,
    SlotTakenError,
    UnsupportedError,
    VMGoneError,
)
from hotlun.events import GuestReset, VMGone
from hotlun.model import DiskIdentity, GuestSurvey, Presence

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from hotlun.backends.base import Listener, OSType
    from hotlun.events import Event
    from hotlun.model import Attachment, Disk, GuestMount, MountConfig, Slot


class Call(NamedTuple):
    """One call that reached a backend, and what it was about."""

    operation: str
    subject: Attachment | GuestMount | tuple[Disk, str] | None = None


@dataclass
class _Fault:
    calls_left: int
    error: BaseException | None = None
    happens: bool = False
    gate: Gate | None = None


@dataclass
class Gate:
    """Where a stalled call waits; `reached` is set when it has come, `open()` lets it go on."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    _opened: asyncio.Event = field(default_factory=asyncio.Event)

    def open(self) -> None:
        self._opened.set()

    async def _pass(self) -> None:
        self.reached.set()
        await self._opened.wait()


class _Script:
    """The faults of one backend, and what it was asked."""

    _operations: frozenset[str] = frozenset()

    def __init__(self, delay: float, surveys: bool) -> None:
        self.calls: list[Call] = []
        """Every call so far, oldest first."""
        self.violations: list[str] = []
        """What was asked for and can never be right."""
        self.effects: Counter[str] = Counter()
        """How many calls of each operation changed something."""
        self._delay = delay
        self._surveys = surveys
        self._faults: dict[str, list[_Fault]] = {}
        self._gates: list[Gate] = []
        self._listeners: list[Listener] = []
        self._has_ended = False

    def fail(self, operation: str, error: BaseException, *, at: int = 1) -> None:
        """The `at`-th call from now raises this, and nothing happens."""
        self._add(operation, _Fault(at, error))

    def lose(self, operation: str, *, happened: bool = False, at: int = 1) -> None:
        """The `at`-th call from now raises `OutcomeUnknownError`, whether it happened or not."""
        error = OutcomeUnknownError(f"the reply to {operation} was lost", operation=operation)
        self._add(operation, _Fault(at, error, happens=happened))

    def stall(self, operation: str, *, at: int = 1) -> Gate:
        """The `at`-th call from now waits at the gate that is returned, before anything happens."""
        gate = Gate()
        self._gates.append(gate)
        self._add(operation, _Fault(at, gate=gate))
        return gate

    def clear_faults(self) -> None:
        """Forget the faults whose call has not come yet, and open every gate."""
        self._faults.clear()
        for gate in self._gates:
            gate.open()

    def count(self, operation: str) -> int:
        """How many calls of this operation have come."""
        return sum(call.operation == operation for call in self.calls)

    def watch(self, listener: Listener) -> Callable[[], None]:
        """Have the listener told of events, until the function that is returned is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def tell(self, event: Event) -> None:
        """Something happens: tell whoever listens."""
        for listener in list(self._listeners):
            listener(event)

    def _add(self, operation: str, fault: _Fault) -> None:
        if operation not in self._operations:
            known = ", ".join(sorted(self._operations))
            raise ValueError(f"no operation {operation!r} here: {known}")
        if fault.calls_left < 1:
            raise ValueError("calls are counted from 1")
        self._faults.setdefault(operation, []).append(fault)

    async def _enter(self, call: Call) -> BaseException | None:
        """Pass the faults for this call.

        Returns an error to raise after the effect, if the effect happens and
        its reply is lost.
        """
        self.calls.append(call)
        if self._has_ended and call.operation not in ("grant_access", "revoke_access"):
            raise VMGoneError(
                "the VM is gone, and nothing is attached to it any more: forget its disks",
                operation=call.operation,
            )
        due = []
        for fault in self._faults.get(call.operation, ()):
            fault.calls_left -= 1
            if not fault.calls_left:
                due.append(fault)
        if due:
            left = self._faults[call.operation]
            self._faults[call.operation] = [fault for fault in left if fault.calls_left > 0]
        if self._delay:
            await asyncio.sleep(self._delay)
        for fault in due:
            if fault.gate is not None:
                await fault.gate._pass()
            if fault.error is not None and not fault.happens:
                raise fault.error
        return next((fault.error for fault in due if fault.error is not None), None)

    def _violated(self, what: str) -> AssertionError:
        self.violations.append(what)
        return AssertionError(what)


class MemoryHostBackend(_Script):
    """A hypervisor in memory.

    Args:
        occupied: slots that the VM's own disks hold, told on entering a Manager.
        taken: slots that turn out taken only when something is attached there.
        delay: seconds that each call takes.
        surveys: whether it can be asked what it has.
    """

    _operations = frozenset({"attach", "detach", "grant_access", "revoke_access", "survey"})

    def __init__(
        self,
        *,
        occupied: Iterable[Slot] = (),
        taken: Iterable[Slot] = (),
        delay: float = 0,
        surveys: bool = True,
    ) -> None:
        super().__init__(delay, surveys)
        self.attached: dict[Slot, Attachment] = {}
        """What is attached now."""
        self.granted: set[tuple[str, str]] = set()
        """The (disk, vm_id) pairs that may be opened now."""
        self._occupied = frozenset(occupied)
        self._taken = frozenset(taken) | self._occupied
        self.serials: set[str] = set()
        """Of all that was ever to be attached."""
        self._vanished: set[str] = set()
        self._disks: set[str] = set()
        self._guests: list[MemoryGuestBackend] = []

    async def occupied(self) -> Collection[Slot]:
        return self._occupied

    async def attach(self, attachment: Attachment) -> None:
        if attachment.serial in self.serials:
            raise self._violated(f"a serial used twice: {attachment}")
        self.serials.add(attachment.serial)
        lost = await self._enter(Call("attach", attachment))
        if attachment.slot in self._taken:
            raise SlotTakenError(
                f"slot {attachment.slot} is one of the VM's own: use another",
                operation="attach",
                slot=attachment.slot,
                disk=attachment.disk,
            )
        if attachment.slot in self.attached:
            raise self._violated(f"two disks in slot {attachment.slot}: {attachment.disk}")
        if str(attachment.disk) in self._disks:
            raise self._violated(f"one disk attached twice: {attachment.disk}")
        self.attached[attachment.slot] = attachment
        self._disks.add(str(attachment.disk))
        self.effects["attach"] += 1
        if lost is not None:
            raise lost

    def identity(self, attachment: Attachment) -> DiskIdentity:
        """Its serial; a disk in memory has no size."""
        if not self.has(attachment) and attachment.serial not in self._vanished:
            raise self._violated(f"the identity of what is not attached: {attachment}")
        return DiskIdentity(attachment.serial)

    async def detach(self, attachment: Attachment) -> None:
        lost = await self._enter(Call("detach", attachment))
        if self.has(attachment):
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
        lost = await self._enter(Call("survey"))
        if lost is not None:
            raise lost
        if not self._surveys:
            return None
        return {a.serial: Presence.PRESENT if self.has(a) else Presence.ABSENT for a in attachments}

    def has(self, attachment: Attachment) -> bool:
        """Whether it is attached where it says; its serial tells, whatever its path is now."""
        there = self.attached.get(attachment.slot)
        return there is not None and there.serial == attachment.serial

    def vanish(self, serial: str) -> None:
        """The disk with this serial is pulled: no detach, and the guest keeps what it has."""
        attachment = next(a for a in self.attached.values() if a.serial == serial)
        del self.attached[attachment.slot]
        self._disks.remove(str(attachment.disk))
        self._vanished.add(serial)
        self.effects["lost"] += 1

    def end(self) -> None:
        """The hypervisor ends, and with it all that is attached, and the guest."""
        self.effects["lost"] += len(self.attached)
        self._vanished.update(attachment.serial for attachment in self.attached.values())
        self.attached.clear()
        self._disks.clear()
        for guest in self._guests:
            guest._clear()
        for backend in (self, *self._guests):
            backend._has_ended = True
            backend.tell(VMGone("it was ended"))


class MemoryGuestBackend(_Script):
    """A guest in memory.

    Args:
        host: whose VM this is; with it more of what is impossible is seen.
        os_type: whose path rules hold.
        controllers: how many of them the guest can use; None for all.
        delay: seconds that each call takes.
        surveys: whether it can be asked what it has.
    """

    _operations = frozenset({"mount", "unmount", "unplug", "survey"})

    def __init__(
        self,
        host: MemoryHostBackend | None = None,
        *,
        os_type: OSType = "linux",
        controllers: int | None = None,
        delay: float = 0,
        surveys: bool = True,
    ) -> None:
        super().__init__(delay, surveys)
        self.os_type = os_type
        self.controllers = controllers
        self.mounted: dict[str, GuestMount] = {}
        """What is mounted now, by guest path."""
        self.plugged: set[str] = set()
        """The serials of the devices that something was mounted from and that were not let go."""
        self._configs: dict[str, set[MountConfig]] = {}
        self._unplugged: set[str] = set()
        self._host = host
        if host is not None:
            host._guests.append(self)

    def check(self, disk: Disk, config: MountConfig, path: str) -> None:
        if config.verity is not None and not disk.read_only:
            raise UnsupportedError(
                f"cannot mount {disk} at {path!r}: verity is for a disk that nobody writes; "
                "attach it with read_only=True",
                operation="mount",
                disk=disk,
            )

    async def mount(self, mount: GuestMount) -> None:
        lost = await self._enter(Call("mount", mount))
        attachment = mount.attachment
        if attachment.serial in self._unplugged:
            raise self._violated(f"a mount of what the guest let go: {mount}")
        if self._host is not None and attachment.serial in self._host._vanished:
            raise BackendError(
                f"the guest finds no disk at slot {attachment.slot}: look what has become of it",
                operation="mount",
                slot=attachment.slot,
                disk=attachment.disk,
            )
        if self._host is not None and not self._host.has(attachment):
            raise self._violated(f"a mount of what is not attached: {mount}")
        if mount.identity is not None and mount.identity.serial != attachment.serial:
            raise self._violated(f"a mount under another disk's identity: {mount}")
        if mount.path in self.mounted:
            raise self._violated(f"two mounts at one path: {mount}")
        configs = self._configs.setdefault(attachment.serial, set())
        if mount.config in configs:
            raise self._violated(f"the same mount twice: {mount}")
        configs.add(mount.config)
        self.mounted[mount.path] = mount
        self.effects["mount"] += 1
        self.plugged.add(attachment.serial)
        if lost is not None:
            raise lost

    async def unmount(self, mount: GuestMount) -> None:
        lost = await self._enter(Call("unmount", mount))
        if self.has(mount):
            del self.mounted[mount.path]
            self._configs[mount.attachment.serial].remove(mount.config)
            self.effects["unmount"] += 1
        if lost is not None:
            raise lost

    async def unplug(self, attachment: Attachment) -> None:
        lost = await self._enter(Call("unplug", attachment))
        if self._configs.get(attachment.serial):
            raise self._violated(f"an unplug while something is mounted: {attachment}")
        if attachment.serial not in self._unplugged:
            self._unplugged.add(attachment.serial)
            self.effects["unplug"] += 1
        self._configs.pop(attachment.serial, None)
        self.plugged.discard(attachment.serial)
        if lost is not None:
            raise lost

    async def survey(
        self, attachments: Collection[Attachment], mounts: Collection[GuestMount]
    ) -> GuestSurvey | None:
        lost = await self._enter(Call("survey"))
        if lost is not None:
            raise lost
        if not self._surveys:
            return None
        here = {a.serial for a in attachments if self._has_device(a)}
        there = (mount for mount in mounts if mount.attachment.serial in here and self.has(mount))
        return GuestSurvey(frozenset(here), frozenset(there))

    def _has_device(self, attachment: Attachment) -> bool:
        if self._host is None:
            return attachment.serial in self.plugged
        return self._host.has(attachment) and attachment.serial not in self._unplugged

    def has(self, mount: GuestMount) -> bool:
        """Whether it is mounted as it says, from the disk with that serial."""
        there = self.mounted.get(mount.path)
        if there is None or there.attachment.serial != mount.attachment.serial:
            return False
        return there.config == mount.config

    def vanish(self, path: str) -> None:
        """Somebody unmounts it inside the guest."""
        mount = self.mounted.pop(path)
        self._configs[mount.attachment.serial].remove(mount.config)
        self.effects["lost"] += 1

    def reset(self) -> None:
        """The guest starts anew: nothing is mounted, and every disk that is attached is found."""
        self._clear()
        self.tell(GuestReset(by_guest=True))

    def _clear(self) -> None:
        self.effects["lost"] += len(self.mounted)
        self.mounted.clear()
        self._configs.clear()
        self._unplugged.clear()
        self.plugged.clear()
