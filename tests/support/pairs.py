"""Backend pairs that keep one contract: in memory, and QEMU with the agent in a real guest."""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from support import disks
from support.guest_shell import shell
from support.machine import eventually, look

from hotlun import Attachment, BackendError, Disk, DiskKind, ImageFormat, Slot
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.model import Presence
from hotlun.vm import Machine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from hotlun import GuestBackend, HostBackend
    from hotlun.model import GuestSurvey

TAKEN = Slot(0, 7)
"""A slot that holds a device of the VM's own."""
VM_ID = "65534"


@dataclass(frozen=True)
class State:
    """What there is, as seen from outside the backends."""

    attached: frozenset[tuple[str, Slot]]
    """Each of our attachments by the name that it has there (`Pair.name`), and its slot."""
    plugged: frozenset[Slot]
    """The slots whose devices the guest has; of those only that it was told of, in memory."""
    mounted: frozenset[str]
    """The guest paths at which something is mounted."""
    granted: frozenset[str]
    """The disks that the VM may open."""


class Pair(ABC):
    """A host and a guest backend of one VM, and disks for them.

    What follows is what most pairs have; one that has less says so, and why.
    """

    host: HostBackend
    guest: GuestBackend
    vm_id = VM_ID
    """Who is granted access."""
    has_serials = True
    """Whether the guest can tell a disk by what the host gives it."""
    never_attached = Presence.ABSENT
    """What the host says of an attachment that never was, at a slot that is empty."""

    def __init__(self) -> None:
        self._names = (f"c{number}" for number in itertools.count())

    @abstractmethod
    def disk(self, name: str) -> Disk:
        """A disk with an ext4 on it."""

    @abstractmethod
    def bad_disk(self) -> Disk:
        """A disk that the next attach will refuse."""

    @abstractmethod
    async def state(self) -> State:
        """What there is now."""

    @abstractmethod
    def refuse_mount(self, path: str) -> None:
        """Have the next mount fail for certain; the real guest refuses to mount at `path`."""

    def name(self, attachment: Attachment) -> str:
        """What the hypervisor knows it by."""
        return attachment.serial

    def host_says(self, truth: Mapping[str, Presence]) -> Mapping[str, Presence] | None:
        """What the host says when it is asked; None if it cannot be."""
        return truth

    def guest_says(self, truth: GuestSurvey) -> GuestSurvey | None:
        """What the guest says when it is asked; None if it cannot be."""
        return truth

    def attachment(self, disk: Disk, slot: Slot) -> Attachment:
        """An attachment with a serial of its own."""
        return Attachment(slot, disk, next(self._names))


class MemoryPair(Pair):
    """The fakes."""

    def __init__(self) -> None:
        super().__init__()
        self._host = MemoryHostBackend(taken=[TAKEN])
        self._guest = MemoryGuestBackend(self._host)
        self.host, self.guest = self._host, self._guest

    def disk(self, name: str) -> Disk:
        return Disk(f"/disks/{name}.raw", DiskKind.VIRTUAL_DISK, format=ImageFormat.RAW)

    def bad_disk(self) -> Disk:
        self._host.fail("attach", BackendError("scripted: no such disk"))
        return self.disk("bad")

    def refuse_mount(self, path: str) -> None:
        self._guest.fail("mount", BackendError("scripted: cannot be mounted"))

    async def state(self) -> State:
        return State(
            frozenset((a.serial, slot) for slot, a in self._host.attached.items()),
            frozenset(s for s, a in self._host.attached.items() if a.serial in self._guest.plugged),
            frozenset(self._guest.mounted),
            frozenset(path for path, _ in self._host.granted),
        )


class VMPair(Pair):
    """Whatever leads to QEMU and to the agent in a guest.

    Args:
        vm: the VM.
        folder: for disks.
    """

    def __init__(self, vm: Machine, folder: Path) -> None:
        super().__init__()
        self._vm = vm
        self._folder = folder

    def _named(self, serial: str) -> str:
        """The name of what QEMU has with this serial."""
        return serial

    def refuse_mount(self, path: str) -> None:
        """`/proc` is a path where nothing can be made."""
        assert path.startswith("/proc/")

    async def state(self) -> State:
        seen = await look(self._vm)
        serials = {}
        for name in seen.devices:
            if name.startswith("hotlun-"):
                place = f"/machine/peripheral/{name}"
                bus = str(await self._property(place, "parent_bus"))
                controller = int(bus.partition("/peripheral/scsi")[2].partition("/")[0])
                lun = await self._property(place, "lun")
                assert isinstance(lun, int)
                serials[self._named(name.removeprefix("hotlun-"))] = Slot(controller, lun)
        return State(
            frozenset(serials.items()),
            frozenset(Slot(d.controller, d.lun) for d in seen.scsi) - {TAKEN},
            frozenset(m.path for m in seen.mounts if m.device.startswith("/dev/sd")),
            frozenset(
                str(path)
                for path in self._folder.iterdir()
                if "system.posix_acl_access" in os.listxattr(path)
            ),
        )

    async def _property(self, path: str, name: str) -> object:
        return await self._vm.query("qom-get", {"path": path, "property": name})


class RealPair(VMPair):
    """QEMU and the bridge."""

    def __init__(self, vm: Machine, folder: Path) -> None:
        super().__init__(vm, folder)
        self.host, self.guest = vm.host, vm.guest

    def disk(self, name: str) -> Disk:
        path = disks.ext4(self._folder / f"{name}.raw", name)
        path.chmod(0o600)
        return Disk(str(path), DiskKind.VIRTUAL_DISK, format=ImageFormat.RAW)

    def bad_disk(self) -> Disk:
        return Disk(str(self._folder), DiskKind.VIRTUAL_DISK, format=ImageFormat.RAW)


@asynccontextmanager
async def memory_pair(folder: Path) -> AsyncIterator[Pair]:
    """The fakes; nothing that a backend must never be asked for was asked for."""
    pair = MemoryPair()
    yield pair
    assert pair._host.violations == []
    assert pair._guest.violations == []


@asynccontextmanager
async def real_pair(folder: Path) -> AsyncIterator[Pair]:
    """A VM of one's own, with a device at `TAKEN`."""
    async with vm_with_a_device() as vm:
        yield RealPair(vm, folder)


@asynccontextmanager
async def vm_with_a_device(*, connect: bool = True) -> AsyncIterator[Machine]:
    """A VM that has a device of its own at `TAKEN`, and is found afterwards as it was before.

    Args:
        connect: as for `Machine.start`.
    """
    async with Machine.start(connect=connect) as vm:
        node = {"driver": "null-co", "node-name": "own", "size": 1 << 20, "read-zeroes": True}
        await vm.query("blockdev-add", node)
        device = {"driver": "scsi-hd", "id": "own", "drive": "own", "bus": "scsi0.0"}
        await vm.query("device_add", {**device, "lun": TAKEN.lun})
        await shell(
            vm, f"until [ -e /sys/class/scsi_device/*:{TAKEN.lun}/device/block ]; do :; done"
        )
        before = await look(vm)
        yield vm
        assert await eventually(vm, before) == before
