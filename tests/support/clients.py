"""Bare backends on a machine: what a Manager would do to a disk, done by hand."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from hotlun.backends.bridge import BridgeGuestBackend
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.bridge.client import BridgeConnection
from hotlun.model import Attachment, Disk, DiskKind, ImageFormat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hotlun.model import GuestMount, Slot
    from hotlun.vm import Machine

TIMEOUT = 60.0
"""Seconds for whatever is waited for."""


class Clients:
    """The two backends of a machine, connected."""

    def __init__(self, host: QEMUHostBackend, guest: BridgeGuestBackend) -> None:
        self.host = host
        self.guest = guest

    @classmethod
    @asynccontextmanager
    async def at(cls, qmp_socket: str, agent_socket: str) -> AsyncIterator[Clients]:
        """Connected to these sockets of a VM."""
        async with (
            QEMUHostBackend.connect(qmp_socket, timeout=TIMEOUT) as host,
            BridgeConnection.connect_unix(
                agent_socket, timeout=TIMEOUT, request_timeout=TIMEOUT
            ) as connection,
        ):
            yield cls(host, BridgeGuestBackend(connection, "linux"))

    @classmethod
    @asynccontextmanager
    async def of(cls, vm: Machine) -> AsyncIterator[Clients]:
        """Connected to a machine that was started without backends."""
        async with cls.at(vm.qmp_socket, vm.agent_socket) as clients:
            yield clients

    async def add(self, mount: GuestMount) -> None:
        """Attach the disk, and mount it."""
        await self.host.attach(mount.attachment)
        await self.guest.mount(mount)

    async def remove(self, mount: GuestMount) -> None:
        """Undo `add`, as far as there is something to undo."""
        await self.guest.unmount(mount)
        await self.guest.unplug(mount.attachment)
        await self.host.detach(mount.attachment)


def image_at(path: Path, slot: Slot, serial: str) -> Attachment:
    """An image at a slot, in the format that its suffix says."""
    disk = Disk(str(path), DiskKind.VIRTUAL_DISK, format=ImageFormat(path.suffix[1:]))
    return Attachment(slot, disk, serial)
