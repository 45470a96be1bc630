"""Giving back: in order, refused while in use, tried again, cancelled at any moment."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from support import disks
from support.guest_shell import block_name, mounted_at, note_in, shell
from support.machine import eventually, look

from hotlun import AlreadyReleasedError, BackendError, Manager, MountConfig, Slot, SlotState

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from support.machine import Seen

    from hotlun import Attachment, HostBackend, Mount
    from hotlun.vm import Machine

pytestmark = pytest.mark.asyncio(loop_scope="module")

MOUNTED = MountConfig()
DEADLINE = 60.0


class Watched:
    """A host backend that looks at the VM before each detach."""

    def __init__(self, host: HostBackend, vm: Machine) -> None:
        self.seen: list[Seen] = []
        self.attach = host.attach
        self.grant_access = host.grant_access
        self.revoke_access = host.revoke_access
        self._host = host
        self._vm = vm

    async def occupied(self) -> Collection[Slot]:
        return ()

    async def detach(self, attachment: Attachment) -> None:
        self.seen.append(await look(self._vm))
        await self._host.detach(attachment)


async def test_goes_from_the_inside_out(shared_vm: Machine, tmp_path: Path) -> None:
    """When QEMU is told to remove the device, guest mounts and the kernel's device are gone."""
    watched = Watched(shared_vm.host, shared_vm)
    before = await look(shared_vm)
    async with Manager(watched, shared_vm.guest) as manager:
        path = disks.partitioned(tmp_path / "disk.raw", "gpt", {1: "1", 2: "2"})
        configs = [*(MountConfig(partition=n) for n in (1, 2)), MountConfig(block_device=True)]
        mounts = [await manager.add_virtual_disk(path, mount=config) for config in configs]
        during = await look(shared_vm)
        for mount in mounts:
            assert watched.seen == []
            await mount.release()
        (seen,) = watched.seen
        assert (seen.mounts, seen.scsi, seen.block) == (before.mounts, before.scsi, before.block)
        assert (seen.devices, seen.nodes) == (during.devices, during.nodes)
        assert await look(shared_vm) == before


async def test_what_the_guest_wrote_last_is_on_the_disk(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """No sync in the guest: the release itself leaves a clean filesystem with everything in it."""
    path = disks.ext4(tmp_path / "disk.raw")
    mount = await manager.add_virtual_disk(path, mount=MOUNTED)
    await shell(shared_vm, f"seq 50000 > {mount.guest_path}/numbers")
    await mount.release()
    assert disks.ext4_file(path, "numbers") == "".join(f"{n}\n" for n in range(1, 50001))


class TestInUse:
    async def test_a_process_in_the_mount_keeps_it(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """The error names the process, the Mount keeps its reference; later the release works."""
        path = disks.ext4(tmp_path / "disk.raw", "here")
        mount = await manager.add_virtual_disk(path, mount=MOUNTED)
        command = f"cd {mount.guest_path}; sleep 600 & echo $! >/run/sleeper; wait"
        user = asyncio.create_task(shared_vm.run(command, timeout=DEADLINE))
        await shell(shared_vm, "until [ -s /run/sleeper ]; do :; done")
        pid = (await shell(shared_vm, "cat /run/sleeper; rm /run/sleeper")).strip()
        before = await look(shared_vm)
        for _ in range(2):
            with pytest.raises(BackendError, match="busy") as caught:
                await mount.release()
            assert f"{pid} (sleep)" in str(caught.value)
            assert str(path) in str(caught.value)
            assert caught.value.operation == "unmount"
        assert manager.mounts == (mount,)
        assert manager.slots()[0].state is SlotState.TAKEN
        assert pid in manager.slots()[0].reason
        assert await look(shared_vm) == before
        # Still as good as new, and to be shared.
        assert await note_in(shared_vm, mount) == "here"
        other = await manager.add_virtual_disk(path, mount=MOUNTED)
        assert other.guest_path == mount.guest_path
        await other.release()
        await shell(shared_vm, f"kill {pid}")
        await user
        await mount.release()
        with pytest.raises(AlreadyReleasedError):
            await mount.release()

    async def test_somebody_elses_mount_keeps_the_device(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """What was unmounted is not unmounted again; the device waits for the other mount."""
        mount = await manager.add_virtual_disk(disks.ext4(tmp_path / "d.raw"), mount=MOUNTED)
        name = await block_name(shared_vm, mount)
        await shell(shared_vm, f"mkdir -p /mnt/theirs && mount /dev/{name} /mnt/theirs")
        with pytest.raises(BackendError, match=f"{name} is mounted at /mnt/theirs") as caught:
            await mount.release()
        assert caught.value.operation == "unplug"
        seen = await look(shared_vm)
        assert [m.path for m in seen.mounts if m.device == f"/dev/{name}"] == ["/mnt/theirs"]
        assert len(seen.scsi) == 1
        await shell(shared_vm, "echo safe > /mnt/theirs/note; umount /mnt/theirs")
        await mount.release()
        assert disks.ext4_file(tmp_path / "d.raw", "note") == "safe\n"

    async def test_after_a_refused_unplug_the_disk_can_be_mounted_again(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Unmounted but not unplugged, the attachment is shared by the next add."""
        path = disks.ext4(tmp_path / "disk.raw", "again")
        mount = await manager.add_virtual_disk(path, mount=MOUNTED)
        name = await block_name(shared_vm, mount)
        await shell(shared_vm, f"mkdir -p /mnt/theirs && mount /dev/{name} /mnt/theirs")
        with pytest.raises(BackendError, match="/mnt/theirs"):
            await mount.release()
        again = await manager.add_virtual_disk(path, mount=MOUNTED, guest_path="/mnt/ours")
        assert again.serial == mount.serial
        assert await note_in(shared_vm, again) == "again"
        await mount.release()
        assert (await mounted_at(shared_vm, again)).device == f"/dev/{name}"
        await shell(shared_vm, "umount /mnt/theirs")

    async def test_a_mount_below_keeps_the_one_above(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Something of the guest's own mounted inside ours is named."""
        mount = await manager.add_virtual_disk(
            disks.ext4(tmp_path / "d.raw"), mount=MOUNTED, guest_path="/mnt/outer"
        )
        await shell(shared_vm, "mkdir /mnt/outer/in && mount -t tmpfs tmpfs /mnt/outer/in")
        with pytest.raises(BackendError, match="/mnt/outer/in is mounted on it"):
            await mount.release()
        await shell(shared_vm, "umount /mnt/outer/in")


class TestWhatTheGuestDidItself:
    async def test_unmounted_already(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """A mount that somebody in the guest has undone is no error."""
        mount = await manager.add_virtual_disk(disks.ext4(tmp_path / "d.raw"), mount=MOUNTED)
        await shell(shared_vm, f"umount {mount.guest_path}")
        await mount.release()

    async def test_unplugged_already(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Nor is a device that somebody in the guest has deleted under the mount."""
        mount = await manager.add_virtual_disk(disks.ext4(tmp_path / "d.raw"), mount=MOUNTED)
        await shell(shared_vm, "echo 1 | tee /sys/bus/scsi/devices/*:0:0:0/delete")
        await mount.release()

    async def test_mounted_over(self, shared_vm: Machine, manager: Manager, tmp_path: Path) -> None:
        """Another mount on top of ours is left alone and named."""
        mount = await manager.add_virtual_disk(
            disks.ext4(tmp_path / "d.raw"), mount=MOUNTED, guest_path="/mnt/covered"
        )
        await shell(shared_vm, "mount -t tmpfs cover /mnt/covered")
        with pytest.raises(BackendError, match="cover is mounted at /mnt/covered"):
            await mount.release()
        await shell(shared_vm, "umount /mnt/covered")
        await mount.release()


class TestCancelled:
    @pytest.mark.parametrize("seed", range(3))
    async def test_adds_and_releases_at_any_moment(
        self, shared_vm: Machine, tmp_path: Path, seed: int
    ) -> None:
        """Twenty operations on three disks, cut off wherever it hits them: nothing is left."""
        chance = random.Random(seed)
        paths = [disks.ext4(tmp_path / f"{number}.raw", str(number)) for number in range(3)]
        configs = (None, MOUNTED, MountConfig(options=["noatime"]), MountConfig(block_device=True))
        before = await look(shared_vm)
        async with Manager(shared_vm.host, shared_vm.guest) as manager:
            for _ in range(20):
                work: list[asyncio.Task[Mount] | asyncio.Task[None]] = [
                    asyncio.create_task(
                        manager.add_virtual_disk(chance.choice(paths), mount=chance.choice(configs))
                    )
                    for _ in range(chance.randrange(1, 4))
                ]
                if manager.mounts:
                    work.append(asyncio.create_task(_released(chance.choice(manager.mounts))))
                await asyncio.sleep(chance.choice((0, 0.002, 0.01, 0.05, 0.1)) * chance.random())
                for task in work:
                    if chance.random() < 0.7:
                        task.cancel()
                async with asyncio.timeout(DEADLINE):
                    await asyncio.wait(work)
                assert not [e for t in work if not t.cancelled() and (e := t.exception())]
            for number, path in enumerate(paths):
                mount = await manager.add_virtual_disk(path, mount=MOUNTED)
                assert await note_in(shared_vm, mount) == str(number)
            await manager.release_all()
            assert {status.state for status in manager.slots()} == {SlotState.FREE}
        assert await eventually(shared_vm, before) == before

    async def test_a_release_can_be_tried_again(
        self, shared_vm: Machine, manager: Manager, tmp_path: Path
    ) -> None:
        """Cut off at ten points of its way, a release goes on where it stopped."""
        for cut in range(10):
            path = disks.ext4(tmp_path / f"{cut}.raw")
            mount = await manager.add_virtual_disk(path, mount=MOUNTED)
            task = asyncio.create_task(mount.release())
            await asyncio.sleep(cut * 0.012)
            task.cancel()
            await asyncio.wait([task])
            with suppress(AlreadyReleasedError):
                await mount.release()
            assert manager.mounts == ()
            assert {status.state for status in manager.slots()} == {SlotState.FREE}


async def test_leaving_releases_everything(shared_vm: Machine, tmp_path: Path) -> None:
    """Adds in flight included: after the block the VM is as it was."""
    before = await look(shared_vm)
    paths = [disks.ext4(tmp_path / f"{number}.raw") for number in range(6)]
    async with Manager(shared_vm.host, shared_vm.guest) as manager:
        done = [await manager.add_virtual_disk(path, mount=MOUNTED) for path in paths[:3]]
        running = [
            asyncio.create_task(manager.add_virtual_disk(path, mount=MOUNTED)) for path in paths[3:]
        ]
        await asyncio.sleep(0.02)
    await asyncio.wait(running)
    assert await eventually(shared_vm, before) == before
    for mount in done:
        with pytest.raises(AlreadyReleasedError):
            await mount.release()


async def _released(mount: Mount) -> None:
    with suppress(AlreadyReleasedError):
        await mount.release()
