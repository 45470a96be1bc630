"""What the host backend tells of a real VM whose disks and whose guest come to grief."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from support.guest_shell import shell
from support.space import small_file_system

from hotlun import Manager
from hotlun.backends import base
from hotlun.events import (
    ConnectionLost,
    DiskFailed,
    Event,
    GuestShutdown,
    VMGone,
    VMPaused,
    VMResumed,
)
from hotlun.vm import Machine

if TYPE_CHECKING:
    from pathlib import Path

    from hotlun.backends.base import HostBackend

DEADLINE = 60.0
MIB = 1 << 20


class Ear:
    """Hears events, which can be waited for one by one."""

    def __init__(self, host: HostBackend) -> None:
        self.heard: asyncio.Queue[Event] = asyncio.Queue()
        self.unsubscribe = base.watch(host, self.heard.put_nowait)

    async def next(self) -> Event:
        async with asyncio.timeout(DEADLINE):
            return await self.heard.get()


@pytest.mark.root
async def test_a_host_without_space(vm: Machine, tmp_path: Path) -> None:
    """The VM is paused, and it is told why; with room made it goes on, and nothing is lost."""
    with small_file_system(tmp_path, "4m") as resize:
        path = tmp_path / "disk.raw"
        with path.open("wb") as file:
            file.truncate(64 * MIB)
        async with Manager(vm.host, vm.guest) as manager:
            mount = await manager.add_virtual_disk(path)
            ear = Ear(vm.host)
            found = "/sys/bus/scsi/devices/*:0:0:0/block/*"
            await shell(vm, f"until [ -e {found} ]; do sleep 0.05; done")
            command = (
                f"dd if=/dev/zero of=/dev/$(basename {found}) bs=1M count=16 oflag=direct 2>&1"
            )
            writing = asyncio.create_task(shell(vm, command))
            heard = await ear.next()
            while isinstance(heard, DiskFailed):
                failure = heard
                heard = await ear.next()
            assert failure.attachment.serial == mount.serial
            assert failure.attachment.disk == mount.disk
            assert failure.operation == "write"
            assert failure.no_space
            assert failure.pauses
            assert "No space left" in failure.reason
            assert isinstance(heard, VMPaused)
            assert str(path) in heard.reason
            assert "make room, then `cont`" in heard.reason
            assert not writing.done()
            resize("80m")
            await vm.query("cont")
            assert await ear.next() == VMResumed()
            assert "16+0 records out" in await writing
            ear.unsubscribe()
            await mount.release()


async def test_a_guest_that_ends() -> None:
    """Told as the guest's own doing; then the connection is lost, and the VM is gone."""
    async with Machine.start() as vm:
        ear = Ear(vm.host)
        ending = asyncio.create_task(vm.run("echo o >/proc/sysrq-trigger; sleep 60"))
        assert await ear.next() == GuestShutdown(by_guest=True, reason="guest-shutdown")
        assert isinstance(await ear.next(), ConnectionLost)
        assert isinstance(await ear.next(), VMGone)
        ending.cancel()
        await asyncio.wait([ending])
        await vm.wait()
