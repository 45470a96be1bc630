"""The story that `hotlun demo` tells: what the library does, as its users would write it.

Each chapter is a method: its docstring is the chapter's title, and `--code` prints
the rest. What a chapter says it has first read from the guest or from QEMU.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from hotlun import BackendError, DiskConflictError, Manager, MountConfig
from hotlun.cli.disks import bytes_at, exported, holds, make_disks
from hotlun.cli.pictures import SlotMap, share_table
from hotlun.cli.proofs import Proofs
from hotlun.cli.witness import is_running, look, say
from hotlun.vm import Machine

if TYPE_CHECKING:
    from hotlun import Mount
    from hotlun.cli.disks import DemoDisks
    from hotlun.cli.report import Report

EXT4 = MountConfig(ensure_filesystem=True, filesystem="ext4")
XFS = MountConfig(ensure_filesystem=True, filesystem="xfs")
SECRET = replace(EXT4, encrypted=True)
CAREFUL = replace(XFS, preserve_data=True)
GREETING = "hello, host"


async def tell(report: Report) -> None:
    """The whole demo.

    Raises:
        CheckFailedError: something was not as the story says.
        HotlunError: something failed.
    """
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="hotlun-demo-"))
        with report.titled("Disks: four formats, a partition table, and an export over NBD"):
            disks = make_disks(directory)
            export = await stack.enter_async_context(exported(disks.remote))
            for path, (offset, magic) in disks.magic.items():
                report.check(
                    bytes_at(path, offset, len(magic)) == magic,
                    f"{os.path.basename(path)} has {magic!r} at byte {offset}",
                )
            report.check(is_running(export.pid), f"remote.img is served by process {export.pid}")
        with report.titled("A VM"):
            with report.doing("QEMU started, its guest up and its agent connected"):
                vm = await stack.enter_async_context(Machine.start())
            await _give_it_a_disk_of_its_own(vm)
            before = await look(vm)
            kernel = (await say(vm, "read -r it </proc/sys/kernel/osrelease; echo $it")).strip()
            report.check(vm.controllers, f"Linux {kernel}, controllers {', '.join(vm.controllers)}")
            report.check(len(before.disks) == 1, "one disk, of the VM's own: not ours to touch")
        async with Manager(vm.host, vm.guest) as manager:
            story = Story(report, vm, manager, disks, export.address)
            await report.chapter(story.disks_go_in)
            await report.chapter(story.data_is_written)
            await report.chapter(story.a_disk_is_shared)
            await report.chapter(story.a_contradiction_is_refused)
            await report.chapter(story.one_sharer_leaves)
            await report.chapter(story.the_last_sharer_leaves)
            await report.chapter(story.the_disk_comes_back)
            await report.chapter(story.a_disk_is_encrypted)
            await report.chapter(story.data_is_not_formatted_over)
            await report.chapter(story.all_is_released)
        with report.titled("Nothing is left behind"):
            after = await look(vm)
            report.check(after.mounts == before.mounts, "the guest's mountinfo is as before")
            report.check(
                (after.disks, after.block) == (before.disks, before.block),
                "the guest's /sys has the block devices it had before",
            )
            report.check(
                (after.nodes, after.devices) == (before.nodes, before.devices),
                "QEMU's block nodes and devices are as before",
            )
            await stack.aclose()
            report.check(not is_running(vm.pid), f"QEMU, process {vm.pid}, has ended")
            report.check(not is_running(export.pid), f"qemu-nbd, process {export.pid}, has ended")
            for left in (directory, os.path.dirname(vm.qmp_socket)):
                report.check(not os.path.exists(left), f"{left} is gone")
    report.end("nothing is left behind")


class Story:
    """The chapters in which the Manager is at work.

    Args:
        report: is told everything.
        vm: a running VM.
        manager: entered on it.
        disks: image files that nobody uses yet.
        export: the address of a disk over NBD.
    """

    def __init__(
        self, report: Report, vm: Machine, manager: Manager, disks: DemoDisks, export: str
    ) -> None:
        self.report = report
        self.proofs = Proofs(report, vm)
        self.vm = vm
        self.manager = manager
        self.disks = disks
        self.export = export
        self.mounts: dict[str, Mount] = {}
        """By the name of who holds it."""
        self.checksum = ""

    async def disks_go_in(self) -> None:
        """Disks go into the running VM, and are mounted in it"""
        manager, disks, mounts, doing = self.manager, self.disks, self.mounts, self.report.doing
        with doing("web.vhdx: attached, ext4 made, mounted"):
            mounts["web"] = await manager.add_virtual_disk(disks.vhdx, mount=EXT4)
        with doing("store.vhd: attached, xfs made, mounted"):
            mounts["store"] = await manager.add_virtual_disk(disks.vhd, mount=XFS)
        with doing("parts.img: attached once, two partitions mounted, both at once"):
            mounts["logs"], mounts["spool"] = await asyncio.gather(
                manager.add_virtual_disk(disks.partitioned, mount=replace(EXT4, partition=1)),
                manager.add_virtual_disk(disks.partitioned, mount=replace(EXT4, partition=2)),
            )
        with doing("remote.img: attached over NBD, ext4 made, mounted"):
            mounts["remote"] = await manager.add_extensible_virtual_disk(self.export, mount=EXT4)
        with doing("scratch.raw: attached, the bare device at a path of its own"):
            mounts["scratch"] = await manager.add_virtual_disk(
                disks.raw, guest_path="/srv/scratch", mount=MountConfig(block_device=True)
            )
        with doing("manual.qcow2: ext4 made, mounted, written, released"):
            async with await manager.add_virtual_disk(disks.qcow2, mount=EXT4) as author:
                await say(self.vm, f"echo read me >{author.guest_path}/manual")
        with doing("manual.qcow2: attached again, read-only, mounted"):
            mounts["reader"] = await manager.add_virtual_disk(
                disks.qcow2, read_only=True, mount=MountConfig()
            )
        await self.proofs.are_there(mounts.values())

    async def data_is_written(self) -> None:
        """Programs in the guest use them"""
        path = self.mounts["web"].guest_path
        write = f"head -c 1M /dev/urandom >{path}/data && sync {path}/data"
        self.checksum = await say(self.vm, f"{write} && sha256sum <{path}/data")
        self.report.check(self.checksum, f"1 MiB written to {path}, sha256 {self.checksum[:16]}...")

        path = self.mounts["scratch"].guest_path
        await say(self.vm, f"echo {GREETING} | dd of={path} conv=fsync status=none")
        on_the_host = bytes_at(self.disks.raw, 0, len(GREETING))
        self.report.check(
            on_the_host == GREETING.encode(),
            f"written to {path}, and in scratch.raw on the host: {on_the_host.decode()!r}",
        )

        path = self.mounts["reader"].guest_path
        self.report.check(
            await say(self.vm, f"cat {path}/manual") == "read me\n",
            f"{path}/manual has what its author wrote",
        )
        refused = await self.vm.run(f"echo no >{path}/manual")
        self.report.check(
            refused.returncode and "Read-only" in refused.stderr,
            f"nobody else can write there: {refused.stderr.rpartition(': ')[2].strip()}",
        )

    async def a_disk_is_shared(self) -> None:
        """Somebody else wants web.vhdx, too: who shares what"""
        with self.report.doing("web.vhdx: one more reference, no work at all"):
            backup = await self.manager.add_virtual_disk(self.disks.vhdx, mount=EXT4)
        self.mounts["backup"] = backup
        web = self.mounts["web"]
        self.report.check(
            (backup.slot, backup.guest_path) == (web.slot, web.guest_path),
            f"backup has it where web has it: slot {web.slot}, {web.guest_path}",
        )
        self.report.show(share_table(await self.proofs.shares(self.manager, self.mounts)))
        self.report.show(SlotMap(self.manager.slots()))
        attached = {mount.slot for mount in self.mounts.values()}
        in_guest = len((await look(self.vm)).disks) - 1
        self.report.check(in_guest == len(attached), f"the guest has {in_guest} disks of ours")

    async def a_contradiction_is_refused(self) -> None:
        """Somebody wants it read-only, while others write to it"""
        before = await look(self.vm)
        try:
            await self.manager.add_virtual_disk(self.disks.vhdx, read_only=True, mount=EXT4)
        except DiskConflictError as error:
            self.report.refused(error)
        else:
            self.report.check(False, "read-only is refused")
        self.report.check(await look(self.vm) == before, "nothing has changed in guest or QEMU")

    async def one_sharer_leaves(self) -> None:
        """web leaves: the mount stays, for backup has it still"""
        web, backup = self.mounts.pop("web"), self.mounts["backup"]
        with self.report.doing("web released"):
            await web.release()
        await self.proofs.are_there([backup])
        self.report.check(
            await say(self.vm, f"sha256sum <{backup.guest_path}/data") == self.checksum,
            "the data is there, and the same",
        )

    async def the_last_sharer_leaves(self) -> None:
        """backup leaves, too, and was the last: unmounted, unplugged, detached"""
        backup = self.mounts.pop("backup")
        with self.report.doing("backup released"):
            await backup.release()
        await self.proofs.are_gone([backup])

    async def the_disk_comes_back(self) -> None:
        """web.vhdx is attached again"""
        with self.report.doing("web.vhdx: attached, mounted as it is"):
            again = await self.manager.add_virtual_disk(self.disks.vhdx, mount=MountConfig())
        await self.proofs.are_there([again])
        self.report.check(
            await say(self.vm, f"sha256sum <{again.guest_path}/data") == self.checksum,
            f"the data is the same, sha256 {self.checksum[:16]}...",
        )
        self.mounts["web"] = again

    async def a_disk_is_encrypted(self) -> None:
        """A disk is scratch: encrypted, under a key that only the guest's kernel has"""
        with self.report.doing("secret.raw: attached, encrypted, ext4 made, mounted"):
            secret = await self.manager.add_virtual_disk(self.disks.secret, mount=SECRET)
        await self.proofs.are_there([secret])
        name = (await say(self.vm, "dmsetup ls --target crypt")).split()[0]
        cipher = (await say(self.vm, f"dmsetup table --showkeys {name}")).split()
        self.report.check(
            cipher[4].startswith(":96:logon:"), f"{name}: {cipher[3]}, and root is shown no key"
        )
        path = f"{secret.guest_path}/greeting"
        await say(self.vm, f"echo {GREETING} >{path} && sync {path}")
        self.report.check(
            await say(self.vm, f"cat {path}") == f"{GREETING}\n", f"written to {path}"
        )
        self.report.check(
            not holds(self.disks.secret, GREETING.encode()), "and not to be found in secret.raw"
        )
        with self.report.doing("secret.raw released"):
            await secret.release()
        await self.proofs.are_gone([secret])
        mapped = await say(self.vm, "dmsetup ls")
        self.report.check(name not in mapped, f"{name} is gone, and the key with it")

    async def data_is_not_formatted_over(self) -> None:
        """Somebody wants an xfs, on the disk where the manual is"""
        await self.mounts.pop("reader").release()
        try:
            await self.manager.add_virtual_disk(self.disks.qcow2, mount=CAREFUL)
        except BackendError as error:
            self.report.refused(error)
        else:
            self.report.check(False, "preserve_data preserves")
        async with await self.manager.add_virtual_disk(self.disks.qcow2, mount=EXT4) as manual:
            self.report.check(
                await say(self.vm, f"cat {manual.guest_path}/manual") == "read me\n",
                "the manual is where it was",
            )

    async def all_is_released(self) -> None:
        """Everything is released at once"""
        with self.report.doing(f"{len(self.mounts)} mounts released"):
            await self.manager.release_all()
        await self.proofs.are_gone(self.mounts.values())


async def _give_it_a_disk_of_its_own(vm: Machine) -> None:
    """As most VMs have one: it boots from it, and the Manager must leave it alone."""
    null = {"driver": "null-co", "node-name": "own", "size": 64 << 20, "read-zeroes": True}
    await vm.query("blockdev-add", null)
    await vm.query(
        "device_add",
        {
            "driver": "scsi-hd",
            "id": "own",
            "drive": "own",
            "bus": "scsi0.0",
            "lun": 0,
            "serial": "own",
        },
    )
    await say(vm, "until [ -e /dev/sda ]; do sleep 0.1; done")
