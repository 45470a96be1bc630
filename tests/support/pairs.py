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
from hotlun.vm import Machine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hotlun import GuestBackend, HostBackend

TAKEN = Slot(0, 7)
"""A slot that holds a device of the VM's own."""
VM_ID = "65534"


@dataclass(frozen=True)
class State:
    """What there is, as seen from outside the backends."""

    attached: frozenset[tuple[str, Slot]]
    """Serial and slot of each of our attachments."""
    plugged: frozenset[Slot]
    """The slots whose devices the guest has; of those only that it was told of, in memory."""
    mounted: frozenset[str]
    """The guest paths at which something is mounted."""
    granted: frozenset[str]
    """The disks that `VM_ID` may open."""


class Pair(ABC):
    """A host and a guest backend of one VM, and disks for them."""

    host: HostBackend
    guest: GuestBackend

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


class RealPair(Pair):
    """QEMU and the agent in a guest."""

    def __init__(self, vm: Machine, folder: Path) -> None:
        super().__init__()
        self._vm = vm
        self._folder = folder
        self.host, self.guest = vm.host, vm.guest

    def disk(self, name: str) -> Disk:
        path = disks.ext4(self._folder / f"{name}.raw", name)
        path.chmod(0o600)
        return Disk(str(path), DiskKind.VIRTUAL_DISK, format=ImageFormat.RAW)

    def bad_disk(self) -> Disk:
        return Disk(str(self._folder), DiskKind.VIRTUAL_DISK, format=ImageFormat.RAW)

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
                serials[name.removeprefix("hotlun-")] = Slot(controller, lun)
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
    async with Machine.start() as vm:
        node = {"driver": "null-co", "node-name": "own", "size": 1 << 20, "read-zeroes": True}
        await vm.query("blockdev-add", node)
        device = {"driver": "scsi-hd", "id": "own", "drive": "own", "bus": "scsi0.0"}
        await vm.query("device_add", {**device, "lun": TAKEN.lun})
        await shell(
            vm, f"until [ -e /sys/class/scsi_device/*:{TAKEN.lun}/device/block ]; do :; done"
        )
        before = await look(vm)
        yield RealPair(vm, folder)
        assert await eventually(vm, before) == before
