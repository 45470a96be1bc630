"""Backend pairs over a compute system: what all of them have less, and the one with real disks."""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from support import disks
from support.computecore import VM, fake_computecore
from support.hcs_on_qemu import ID, HCSOnQEMU
from support.pairs import TAKEN, Pair, State, VMPair, vm_with_a_device

from hotlun import Disk, DiskKind, Slot
from hotlun.backends.hcs import HCSGuestBackend, HCSHostBackend
from hotlun.bridge import messages
from hotlun.hcs import open_system
from hotlun.model import Presence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from support.computecore import FakeComputeCore

    from hotlun import Attachment
    from hotlun.model import GuestSurvey
    from hotlun.vm import Machine

NEWEST, OLDEST = "vhdx", "vpc"
"""What qemu-img calls the two formats that Hyper-V reads."""


FEATURES = [messages.FEATURE_OPTIONS, messages.FEATURE_FILESYSTEMS]
"""Of the agent that there is not behind the library."""


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


class HCSByLibraryPair(HCSPair):
    """The shipped calls into computecore.dll, and a library that checks each of them."""

    vm_id = VM

    def __init__(self, fake: FakeComputeCore, host: HCSHostBackend, guest: HCSGuestBackend) -> None:
        super().__init__()
        self._fake = fake
        self.host, self.guest = host, guest
        fake.attach(TAKEN.controller, TAKEN.lun, "C:\\boot.vhdx")

    def disk(self, name: str) -> Disk:
        return Disk(f"C:\\disks\\{name}.vhdx", DiskKind.VIRTUAL_DISK)

    def bad_disk(self) -> Disk:
        return self.disk("missing")

    def refuse_mount(self, path: str) -> None:
        """The library refuses such paths."""
        assert path.startswith("/proc/")

    async def state(self) -> State:
        state = self._fake.state
        own = [disk for disk in state.disks if (disk.controller, disk.lun) != OWN_PLACE]
        return State(
            frozenset((disk.path, Slot(disk.controller, disk.lun)) for disk in own),
            frozenset(Slot(d.controller, d.lun) for d in own if not d.is_unplugged),
            frozenset(state.mounts),
            frozenset(path for _, path in state.grants),
        )


OWN_PLACE = (TAKEN.controller, TAKEN.lun)


@asynccontextmanager
async def hcs_by_library_pair(folder: Path) -> AsyncIterator[Pair]:
    """Every call was right, and nothing is left open."""
    with fake_computecore() as fake:
        fake.tells(messages.negotiate_response(FEATURES)["Capabilities"])
        async with open_system(VM, core=fake.core) as system:
            guest = await HCSGuestBackend.connect(system, "linux")
            yield HCSByLibraryPair(fake, HCSHostBackend(system), guest)


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
