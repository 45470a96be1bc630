"""Backend pairs over a compute system: what all of them have less, and the one with real disks."""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from support import disks
from support.hcs_on_qemu import ID, HCSOnQEMU
from support.pairs import TAKEN, Pair, VMPair, vm_with_a_device

from hotlun import Disk, DiskKind
from hotlun.backends.hcs import HCSGuestBackend, HCSHostBackend
from hotlun.model import Presence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from hotlun import Attachment
    from hotlun.model import GuestSurvey
    from hotlun.vm import Machine

NEWEST, OLDEST = "vhdx", "vpc"
"""What qemu-img calls the two formats that Hyper-V reads."""


class HCSPair(Pair):
    """Backends that have nothing but a `System`.

    Attributes:
        lists_disks: whether the service says what is attached; as far as is known, none need to.
    """

    vm_id = ID
    has_serials = False
    """No document has a place for one."""
    never_attached = Presence.UNKNOWN
    """A service that lists disks need not list all."""
    lists_disks = True

    def name(self, attachment: Attachment) -> str:
        """Its path: there is nothing else of it in a document."""
        return attachment.disk.path

    def host_says(self, truth: Mapping[str, Presence]) -> Mapping[str, Presence] | None:
        return truth if self.lists_disks else None

    def guest_says(self, truth: GuestSurvey) -> GuestSurvey | None:
        """The service relays requests that modify, and no others."""
        return None


class HCSOnQEMUPair(HCSPair, VMPair):
    """A service with QEMU and the real guest behind it; disks are VHDX and VHD in turn."""

    def __init__(
        self,
        vm: Machine,
        folder: Path,
        system: HCSOnQEMU,
        host: HCSHostBackend,
        guest: HCSGuestBackend,
    ) -> None:
        super().__init__(vm, folder)
        self._system = system
        self._formats = itertools.cycle((NEWEST, OLDEST))
        self.host, self.guest = host, guest
        self.lists_disks = system.lists_disks

    def disk(self, name: str) -> Disk:
        return Disk(str(image(self._folder, name, next(self._formats))), DiskKind.VIRTUAL_DISK)

    def bad_disk(self) -> Disk:
        path = self._folder / "bad.vhdx"
        path.write_bytes(b"vhdxfile" + bytes(1 << 20))
        return Disk(str(path), DiskKind.VIRTUAL_DISK)

    def _named(self, serial: str) -> str:
        attached = self._system.attached.values()
        return next(one.disk.path for one in attached if one.serial == serial)


def image(folder: Path, name: str, form: str) -> Path:
    """An image with an ext4 and a note on it, that its owner alone may open."""
    raw = disks.ext4(folder / f"{name}.raw", name)
    path = raw.with_suffix(".vhdx" if form == NEWEST else ".vhd")
    disks.converted(raw, path, form)
    raw.unlink()
    path.chmod(0o600)
    return path


@asynccontextmanager
async def _hcs_on_qemu(folder: Path, *, lists_disks: bool) -> AsyncIterator[Pair]:
    async with (
        vm_with_a_device(connect=False) as vm,
        HCSOnQEMU.serving(vm, own={TAKEN: "own"}) as system,
    ):
        system.lists_disks = lists_disks
        guest = await HCSGuestBackend.connect(system, "linux")
        yield HCSOnQEMUPair(vm, folder, system, HCSHostBackend(system), guest)
        assert system.violations == []
        assert system.attached == {}


def hcs_on_qemu_pair(folder: Path) -> AbstractAsyncContextManager[Pair]:
    """A service that lists its disks."""
    return _hcs_on_qemu(folder, lists_disks=True)


def silent_hcs_on_qemu_pair(folder: Path) -> AbstractAsyncContextManager[Pair]:
    """One that does not."""
    return _hcs_on_qemu(folder, lists_disks=False)
