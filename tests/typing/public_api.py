"""What a user's type checker sees. Never run: mypy --strict reads it, in scripts/check.

Each `type: ignore` names the mistake that has to be found; one that finds
nothing is an error as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

from hotlun import (
    Attachment,
    Disagreement,
    Disk,
    DiskIdentity,
    DiskKind,
    Finding,
    GuestBackend,
    GuestMount,
    HostBackend,
    ImageFormat,
    Manager,
    Mount,
    MountConfig,
    Resolution,
    Secret,
    Slot,
    SlotState,
    SlotStatus,
    Verity,
)
from hotlun.backends.bridge import BridgeGuestBackend
from hotlun.backends.hcs import HCSGuestBackend, HCSHostBackend
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.bridge.client import BridgeConnection
from hotlun.events import Event
from hotlun.hcs import (
    System,
    SystemInfo,
    document_slots,
    enumerate_systems,
    hcs_document,
    open_system,
)
from hotlun.journal import Journal, MemoryJournal, SQLiteJournal
from hotlun.vm import Machine


class Host:
    """Four methods are enough for a host backend."""

    async def attach(self, attachment: Attachment) -> None: ...
    async def detach(self, attachment: Attachment) -> None: ...
    async def grant_access(self, disk: Disk, vm_id: str) -> None: ...
    async def revoke_access(self, disk: Disk, vm_id: str) -> None: ...


class Guest:
    """Three methods are enough for a guest backend."""

    async def mount(self, mount: GuestMount) -> None: ...
    async def unmount(self, mount: GuestMount) -> None: ...
    async def unplug(self, attachment: Attachment) -> None: ...


class Half:
    """Not enough."""

    async def attach(self, attachment: Attachment) -> None: ...


async def backends() -> None:
    host: HostBackend = Host()
    guest: GuestBackend = Guest()
    Manager(host, guest)
    Manager(MemoryHostBackend(), MemoryGuestBackend())
    Manager(Half(), guest)  # type: ignore[arg-type]
    Manager(guest, host)  # type: ignore[arg-type]
    Manager(host, guest, 4)  # type: ignore[misc]
    async with (
        QEMUHostBackend.connect("/qmp", controllers=("scsi0",), timeout=5) as qemu,
        BridgeConnection.connect_unix("/agent", timeout=5) as connection,
        Manager(qemu, BridgeGuestBackend(connection, "linux")) as manager,
    ):
        assert_type(manager, Manager)
    BridgeGuestBackend(connection, "plan9")  # type: ignore[arg-type]


async def adding(manager: Manager) -> None:
    mount = await manager.add_virtual_disk(
        Path("/d"), read_only=True, vm_id="", guest_path="/m", mount=MountConfig(), format=None
    )
    assert_type(mount, Mount)
    assert_type(await manager.add_physical_disk("/dev/loop0", mount=MountConfig()), Mount)
    assert_type(await manager.add_extensible_virtual_disk("evd://nbd/x"), Mount)
    await manager.add_virtual_disk(b"/d")  # type: ignore[arg-type]
    await manager.add_virtual_disk("/d", True)  # type: ignore[misc]
    await manager.add_virtual_disk("/d", mount="ext4")  # type: ignore[arg-type]
    await manager.add_extensible_virtual_disk("evd://nbd/x", vm_id="1")  # type: ignore[call-arg]
    async with mount as same:
        assert_type(same, Mount)
    assert_type(mount.guest_path, str | None)
    assert_type(mount.config, MountConfig | None)
    assert_type((mount.id, mount.serial, mount.slot, mount.disk), tuple[str, str, Slot, Disk])
    assert_type((mount.controller, mount.lun), tuple[int, int])


async def looking(manager: Manager) -> None:
    assert_type(manager.mounts, tuple[Mount, ...])
    statuses = manager.slots()
    assert_type(statuses, tuple[SlotStatus, ...])
    assert_type(statuses[0].state, SlotState)
    assert_type(statuses[0].attachment, Attachment | None)
    assert_type(statuses[0].guest_mounts, tuple[GuestMount, ...])
    statuses[0].holders = 3  # type: ignore[misc]


async def surviving(host: HostBackend, guest: GuestBackend, journal: Journal) -> None:
    async with Manager(host, guest, journal=SQLiteJournal(Path("/j"))) as manager:
        mount = await manager.add_virtual_disk("/d", owner="pid:")
        assert_type((mount.owner, mount.lost), tuple[str, str])
        await manager.release_owner("pid:1")
        assert_type(manager.dead_owners(), tuple[str, ...])
        (one, *_) = await manager.reconcile()
        assert_type(one, Disagreement)
        assert_type((one.finding, one.resolution), tuple[Finding, Resolution])
        assert_type(one.guest_path, str | None)
        async for event in manager.events():
            assert_type(event, Event)
        document = await manager.save()
        assert_type(document, dict[str, Any])
        manager.thaw()
        await manager.forget(force=True)
    Manager(host, guest, journal="/j")  # type: ignore[arg-type]
    for one_of_them in (MemoryJournal(), SQLiteJournal("/j"), journal):
        Manager(host, guest, journal=one_of_them)
    restored = Manager.restore(document, host, guest, paths={"/a": "/b"}, journal=journal)
    assert_type(restored, Manager)
    await manager.add_virtual_disk("/d", owner=1)  # type: ignore[arg-type]


def values() -> None:
    Disk("/d", DiskKind.VIRTUAL_DISK, format=ImageFormat.RAW)
    MountConfig(1)  # type: ignore[misc]
    MountConfig(options=["ro", "noatime"])
    assert_type(MountConfig(container_scratch=True).container_scratch, bool)
    MountConfig(container_scratch="refs")  # type: ignore[arg-type]
    Slot(0, 1).lun = 2  # type: ignore[misc]
    secret = Secret("sesame")
    assert_type(secret.reveal(), bytes)
    secret.reveal = secret.reveal  # type: ignore[method-assign]
    config = MountConfig(encrypted=True, key=Secret(b"sesame"), lazy_unmount=True)
    assert_type(config.key, Secret | None)
    MountConfig(encrypted=True, key="sesame")  # type: ignore[arg-type]
    MountConfig(verity="00" * 32)
    MountConfig(verity=Verity("00" * 32, hash_offset=4096))
    MountConfig(verity=b"00")  # type: ignore[arg-type]
    assert_type(DiskIdentity("h1").size, int | None)


async def a_vm_to_try_it_on() -> None:
    async with Machine.start(controllers=4, memory_mib=512, cpus=1, timeout=120) as vm:
        done = await vm.run("true")
        assert_type((done.returncode, done.stdout, done.stderr), tuple[int, str, str])


async def a_vm_of_windows() -> None:
    assert_type(await enumerate_systems(), list[SystemInfo])
    async with open_system("vm", timeout=60) as system:
        one_of_them: System = system
        host: HostBackend = HCSHostBackend(one_of_them, controllers=("0", "1"))
        guest: GuestBackend = await HCSGuestBackend.connect(system, "windows")
        HCSGuestBackend(system, "plan9")  # type: ignore[arg-type]
        Manager(host, guest)
    document = hcs_document({Slot(0, 0): Disk("/d", DiskKind.VIRTUAL_DISK)}, into={})
    assert_type(document, dict[str, Any])
    assert_type(document_slots(document), frozenset[Slot])
