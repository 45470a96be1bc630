"""A VM in memory and the questions that tests ask of it."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Self, TypeVar

from hotlun import Manager, MountConfig, Slot, SlotState
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from hotlun import Mount, SlotStatus

T = TypeVar("T")

EXT4 = MountConfig(filesystem="ext4")
XFS = MountConfig(filesystem="xfs")
FORMATS = MountConfig(filesystem="ext4", ensure_filesystem=True)
_FOLDER = "C:\\disks\\" if os.name == "nt" else "/disks/"
A, B, C = (f"{_FOLDER}{name}.vhdx" for name in "abc")
"""Disks that do not exist here: the backend is the one who has to know them."""

UP = ["attach", "mount"]
DOWN = ["unmount", "unplug", "detach"]


class VM:
    """Memory backends that know each other, and a Manager entered on them."""

    def __init__(self, **manager_arguments: Any) -> None:
        self.host = MemoryHostBackend()
        self.guest = MemoryGuestBackend(self.host)
        self.guest.calls = self.host.calls  # one order over both
        self.manager = Manager(self.host, self.guest, **manager_arguments)
        # What is found out by itself after a second would depend on how fast this machine is.
        self.manager._reconciler.first_pause = 3600

    async def __aenter__(self) -> Self:
        await self.manager.__aenter__()
        return self

    async def __aexit__(self, exc_type: object, *exc: object) -> None:
        if exc_type is not None:  # a test that failed must not hang as well
            self.host.clear_faults()
            self.guest.clear_faults()
        await self.manager.__aexit__(None, None, None)
        if exc_type is None:
            self.assert_empty()

    async def add(self, path: str = A, mount: MountConfig | None = EXT4, **more: Any) -> Mount:
        return await self.manager.add_virtual_disk(path, mount=mount, **more)

    def start(
        self, path: str = A, mount: MountConfig | None = EXT4, **more: Any
    ) -> asyncio.Task[Mount]:
        """An add in a task of its own."""
        return start(self.add(path, mount, **more))

    def said(self) -> list[str]:
        """The operations that the backends were asked for since last time, in order."""
        operations = [call.operation for call in self.host.calls]
        self.host.calls.clear()
        return operations

    def status(self, controller: int = 0, lun: int = 0) -> SlotStatus:
        wanted = Slot(controller, lun)
        return next(s for s in self.manager.slots() if s.slot == wanted)

    def assert_empty(self) -> None:
        """Nothing is attached, mounted, granted or taken, and nothing impossible was asked."""
        self.assert_backends_empty()
        assert self.manager.mounts == ()
        assert {s.state for s in self.manager.slots()} <= {SlotState.FREE, SlotState.RESERVED}

    def assert_backends_empty(self) -> None:
        """As far as the backends know."""
        assert self.host.violations == []
        assert self.guest.violations == []
        assert self.host.attached == {}
        assert self.host.granted == set()
        assert self.guest.mounted == {}
        assert self.guest.plugged == set()


def start(work: Coroutine[object, object, T]) -> asyncio.Task[T]:
    return asyncio.get_running_loop().create_task(work)


async def turns(count: int = 20) -> None:
    """Let every task that can go on go on."""
    for _ in range(count):
        await asyncio.sleep(0)
