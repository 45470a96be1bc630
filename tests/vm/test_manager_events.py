"""What a Manager tells of a real VM, and what it has put right by then without being asked."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
from support import disks
from support.agent import kill_agent
from support.guest_shell import mounted_at, note_in, shell
from support.news import News
from support.space import small_file_system

from hotlun import Manager, MountConfig, Secret
from hotlun.events import (
    ConnectionLost,
    ConnectionRestored,
    DisagreementSettled,
    DiskFailed,
    GuestReset,
    VMPaused,
    VMResumed,
)
from hotlun.reconciliation import Finding, Resolution
from hotlun.vm import Machine

if TYPE_CHECKING:
    from pathlib import Path

EXT4 = MountConfig(filesystem="ext4")
LUKS = MountConfig(
    filesystem="ext4", ensure_filesystem=True, encrypted=True, key=Secret("stays with us")
)
SCRATCH = MountConfig(filesystem="ext4", ensure_filesystem=True, encrypted=True)
ANEW = "the agent in the guest was started anew"


async def test_a_guest_that_is_reset(tmp_path: Path) -> None:
    """Its mounts are made again, with what was in them; lost is what only the guest had a key to.

    The device of the lost one is there, so that its disk can be used anew once it is released.
    """
    paths = {name: disks.blank(tmp_path / f"{name}.raw", 64 << 20) for name in ("luks", "scratch")}
    paths |= {name: disks.ext4(tmp_path / f"{name}.raw", name) for name in ("one", "two")}
    configs = {"one": EXT4, "two": EXT4, "luks": LUKS, "scratch": SCRATCH}
    async with Machine.start() as vm, Manager(vm.host, vm.guest) as manager:
        mounts = {
            name: await manager.add_virtual_disk(paths[name], mount=config)
            for name, config in configs.items()
        }
        shared = await manager.add_virtual_disk(paths["one"], mount=EXT4)
        note = f"{mounts['luks'].guest_path}/note"
        await shell(vm, f"echo -n luks >{note}; sync {note}")
        news = News(manager)
        await vm.reset()
        settled = [(await news.until(DisagreementSettled)).disagreement for _ in configs]
        made_again = {one.guest_path for one in settled if one.resolution is Resolution.REMOUNTED}
        assert {one.finding for one in settled} == {Finding.MOUNT_GONE}
        assert made_again == {mounts[name].guest_path for name in ("one", "two", "luks")}
        assert news.heard[0] == GuestReset(by_guest=False)
        assert news.heard.index(ConnectionLost("guest", ANEW)) < len(news.heard) - len(settled)
        assert ConnectionRestored("guest") in news.heard
        for name in ("one", "two", "luks"):
            assert not mounts[name].lost
            assert (await mounted_at(vm, mounts[name])).filesystem == "ext4"
            assert await note_in(vm, mounts[name]) == name
        assert shared.guest_path == mounts["one"].guest_path
        (lost,) = (one for one in settled if one.resolution is Resolution.LOST)
        assert lost.guest_path == mounts["scratch"].guest_path
        assert "key" in mounts["scratch"].lost
        await mounts["scratch"].release()
        again = await manager.add_virtual_disk(paths["scratch"], mount=SCRATCH)
        assert (await mounted_at(vm, again)).filesystem == "ext4"
        assert await manager.reconcile() == ()
        await manager.release_all()
        assert await shell(vm, "ls /sys/bus/scsi/devices | grep -c : || true") == "0\n"


async def test_an_agent_that_is_started_again(vm: Machine, tmp_path: Path) -> None:
    """That is all there is to tell: what it had mounted is there, and the next one knows it."""
    path = disks.ext4(tmp_path / "disk.raw", "outlives")
    async with Manager(vm.host, vm.guest) as manager:
        mount = await manager.add_virtual_disk(path, mount=EXT4)
        news = News(manager)
        for _ in range(2):
            await kill_agent(vm)
            assert await manager.reconcile() == ()
            assert await news.next() == ConnectionLost("guest", ANEW)
            assert await news.next() == ConnectionRestored("guest")
        assert await note_in(vm, mount) == "outlives"
        await mount.release()
        assert len(news.heard) == 4


@pytest.mark.root
async def test_a_host_without_space(vm: Machine, tmp_path: Path) -> None:
    """Which disk, then the pause and why; a release meanwhile waits until the VM goes on."""
    async with AsyncExitStack() as stack:
        resize = stack.enter_context(small_file_system(tmp_path, "4m"))
        with (tmp_path / "full.raw").open("wb") as file:
            file.truncate(64 << 20)
        manager = await stack.enter_async_context(Manager(vm.host, vm.guest))
        config = MountConfig(block_device=True)
        mount = await manager.add_virtual_disk(tmp_path / "full.raw", mount=config)
        news = News(manager)
        command = f"dd if=/dev/zero of={mount.guest_path} bs=1M count=16 oflag=direct 2>&1"
        writing = asyncio.create_task(shell(vm, command))
        failed = await news.until(DiskFailed)
        assert (failed.attachment.serial, failed.operation) == (mount.serial, "write")
        assert (failed.no_space, failed.pauses) == (True, True)
        paused = await news.until(VMPaused)
        assert set(news.kinds) == {DiskFailed, VMPaused}
        assert str(mount.disk.path) in paused.reason
        releasing = asyncio.create_task(mount.release())
        await asyncio.wait([releasing, writing], timeout=0.5)
        assert not releasing.done()
        assert not writing.done()
        resize("80m")
        await vm.query("cont")
        assert await news.next() == VMResumed()
        assert "16+0 records out" in await writing
        await releasing
        assert manager.mounts == ()
