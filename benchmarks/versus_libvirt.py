#!/usr/bin/env python3
"""Disks on a real VM through libvirt and qemu-guest-agent, as people have them today, and ours.

    scripts/setup bench
    .venv/bin/python benchmarks/versus_libvirt.py [--json] [--disks 32 64] [--runs N] [--cpus N]

Two VMs stand side by side, one idle while the other works: the same kernel, image, QEMU,
devices, memory and processors under TCG, both booted, and both agents in each of them. A disk
is a 64 MiB raw image with an ext4 on it, at the same LUN of the same controller; the images
are the same. All ways take turns; medians; the first round is for warming up.

Ours is a Manager on the VM's backends: all disks are added at once, and released at once.
"Mounted" is when the last add has returned, "gone" when the last release has: unmounted,
deleted in the guest, removed from QEMU, its image closed.

Theirs is Debian's python3-libvirt and libvirtd (`libvirt_vm.py`), in three ways:

* one by one, as scripts do. For each disk attachDeviceFlags, then guest-exec of a shell that
  finds the device by its LUN, waits for it, and runs `mkdir -p` and `mount`; then for each
  guest-exec of `umount`, detachDeviceFlags, and the event DEVICE_REMOVED;
* at once. One thread attaches all (libvirt serves one at a time for a VM), then eight send a
  guest-exec for each disk, and ask for its end after 20 ms and then each 10 ms. mount makes
  the directory itself. Eight run `umount`, without a shell, and call detachDeviceFlags, and
  the events are waited for together. detachDeviceFlags keeps the VM locked until QEMU has
  removed the disk, so its waits do not overlap;
* at once, detached by detachDeviceAlias, which asks QEMU and returns: the waits overlap.

"Mounted" is when the last mount has exited, "gone" when the last DEVICE_REMOVED has come.
They are spared what ours does besides: nobody proves that a device is the disk that was
attached, nor deletes it in the guest before it is pulled, and who waits for that is not timed.
The targets are about the best of theirs, for each table and number of disks by itself.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from attach import prepare
from libvirt_vm import LibvirtVM, give
from reporting import Report, arguments, in_turn, medians, run

from hotlun import Manager, MountConfig
from hotlun.vm import Accelerator, Machine
from hotlun.vm.hardware import FIRST_CONTROLLER_ADDRESS, Hardware
from hotlun.vm.launch import Software

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable, Sequence

DISKS = (32, 64)
RUNS = 5
CPUS = 1
THREADS = 8
"""For theirs at once: no other number is better. With as many as there are disks, or mounting
while others are still being attached, it is sooner at times; but as often the guest has no time
for anything but the shells that wait for their devices."""
PHASES = {"mounted": 1.5, "gone": 4.0}
"""By what is waited for: how many times sooner than the best of theirs is aimed at."""
CONFIG = MountConfig(filesystem="ext4")
CONTROLLER = f"/sys/bus/pci/devices/0000:00:{FIRST_CONTROLLER_ADDRESS:02x}.0/virtio*/host*"
FIND = f"""
until for device in {CONTROLLER}/target*:0:0/*:0:0:LUN/block/*; do :; done; [ -e "$device" ]; do
    sleep 0.02
done
"""
"""There is no udev in this guest to make a link by path."""
MOUNTS = "/run/mounts/scsi/m"

Seconds = tuple[float, float]


async def ours(vm: Machine, images: Sequence[str]) -> Seconds:
    """Seconds until all are mounted, and then until all are gone."""
    async with Manager(vm.host, vm.guest) as manager:
        begin = time.perf_counter()
        mounts = await asyncio.gather(
            *(manager.add_virtual_disk(image, mount=CONFIG) for image in images)
        )
        mounted = time.perf_counter()
        await asyncio.gather(*(mount.release() for mount in mounts))
        return mounted - begin, time.perf_counter() - mounted


class Theirs:
    """The ways of libvirt, each the seconds until all are mounted, and then until all are gone."""

    def __init__(self, vm: LibvirtVM) -> None:
        self._vm = vm

    def one_by_one(self, images: Sequence[str]) -> Seconds:
        begin = time.perf_counter()
        for lun, image in enumerate(images):
            self._vm.attach(lun, image)
            path = f"{MOUNTS}{lun}"
            self._shell(lun, f'mkdir -p {path} && mount -t ext4 "/dev/${{device##*/}}" {path}')
        mounted = time.perf_counter()
        self._look(len(images))
        releasing = time.perf_counter()
        for lun, image in enumerate(images):
            self._unmount(lun)
            self._vm.detach(lun, image)
            self._vm.wait_until_gone([lun])
        gone = time.perf_counter()
        self._look(0)
        return mounted - begin, gone - releasing

    def at_once(self, images: Sequence[str], *, overlapping: bool) -> Seconds:
        def release(lun: int) -> None:
            self._unmount(lun)
            if overlapping:
                self._vm.begin_detach(lun)
            else:
                self._vm.detach(lun, images[lun])

        with ThreadPoolExecutor(THREADS) as threads:
            begin = time.perf_counter()
            for lun, image in enumerate(images):
                self._vm.attach(lun, image)
            for _ in threads.map(self._mount, range(len(images))):
                pass  # but what one has raised is raised here
            mounted = time.perf_counter()
            self._look(len(images))
            releasing = time.perf_counter()
            for _ in threads.map(release, range(len(images))):
                pass
            self._vm.wait_until_gone(range(len(images)))
            gone = time.perf_counter()
        self._look(0)
        return mounted - begin, gone - releasing

    def _mount(self, lun: int) -> None:
        path = f"{MOUNTS}{lun}"
        self._shell(lun, f'exec mount --mkdir -t ext4 "/dev/${{device##*/}}" {path}')

    def _shell(self, lun: int, command: str) -> None:
        self._vm.run("/bin/sh", "-c", FIND.replace("LUN", str(lun)) + command)

    def _unmount(self, lun: int) -> None:
        self._vm.run("/bin/umount", f"{MOUNTS}{lun}")

    def _look(self, disks: int) -> None:
        """Wait until so many are in the guest, and find as many mounted."""
        self._vm.run(
            "/bin/sh",
            "-c",
            f"until set -- {CONTROLLER}/target*/*:0:0:*/block/*; [ -e $1 ] || shift; "
            f"[ $# = {disks} ]; do sleep 0.05; done; "
            f"[ $(grep -c {MOUNTS} /proc/mounts) = {disks} ]",
        )


async def compare(
    vm: Machine, theirs: Theirs, images: Sequence[str], runs: int
) -> dict[str, dict[str, float]]:
    """Medians in seconds, by phase and way."""
    samples: dict[str, list[Seconds]] = {}

    async def kept(way: str, work: Callable[[], Awaitable[Seconds]]) -> float:
        seconds = await work()
        samples.setdefault(way, []).append(seconds)
        return sum(seconds)

    works: dict[str, Callable[[], Awaitable[Seconds]]] = {
        "ours": partial(ours, vm, images),
        "one by one": partial(asyncio.to_thread, theirs.one_by_one, images),
        "at once": partial(asyncio.to_thread, theirs.at_once, images, overlapping=False),
        "by alias": partial(asyncio.to_thread, theirs.at_once, images, overlapping=True),
    }
    await in_turn(runs + 1, **{way: partial(kept, way, work) for way, work in works.items()})
    return {
        phase: medians({way: [each[index] for each in samples[way][1:]] for way in works})
        for index, phase in enumerate(PHASES)
    }


async def measure(chosen: argparse.Namespace) -> Report:
    report = Report()
    columns = ("disks", "ours ms", "one by one ms", "at once ms", "by alias ms", "ratio to best")
    tables = {phase: report.table(f"until all are {phase}", *columns) for phase in PHASES}
    hardware = Hardware(cpus=chosen.cpus)
    software = await Software.ready(Accelerator.TCG)
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o711)
        images = prepare(directory, max(chosen.disks))
        own = os.path.join(directory, "libvirt")
        os.mkdir(own)
        with LibvirtVM.start(hardware, software, own) as theirs:
            give(directory)
            async with Machine.start(
                cpus=chosen.cpus,
                accelerator=Accelerator.TCG,
                extra_arguments=("-name", "ours"),  # any makes it boot, as theirs does
            ) as vm:
                for disks in chosen.disks:
                    found = await compare(vm, Theirs(theirs), images[:disks], chosen.runs)
                    for phase, seconds in found.items():
                        mine, *others = seconds.values()
                        ratio = mine / min(others)
                        figures = [each * 1e3 for each in seconds.values()]
                        tables[phase].rows.append((disks, *figures, ratio))
                        name = f"{disks} disks {phase}"
                        report.ratios[name] = round(ratio, 3)
                        report.aim(f"{name}: times sooner", 1 / ratio, PHASES[phase], at_least=True)
    return report


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--disks", type=int, nargs="+", default=DISKS, help="how many, up to 64")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each way, after one more")
    parser.add_argument("--cpus", type=int, default=CPUS, help="each VM's")
    run(__doc__ or "", measure, parser)


if __name__ == "__main__":
    main()
