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
attached, nor deletes it in the guest before it is pulled. The guest does that afterwards, and
until then a disk at the same LUN can be taken for the one before, or not be seen; so the last
table goes on until the guest has none left, as it has none when ours are gone. The targets
are about the best of theirs, for each table and number of disks by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from attach import prepare
from libvirt_vm import LibvirtVM, give
from reporting import Report, arguments, in_turn, run

from hotlun import Manager, MountConfig
from hotlun.vm import Accelerator, Machine
from hotlun.vm.hardware import FIRST_CONTROLLER_ADDRESS, Hardware
from hotlun.vm.launch import Software

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

DISKS = (32, 64)
RUNS = 5
CPUS = 1
THREADS = 8
"""For theirs at once: no other number is better. With as many as there are disks, or mounting
while others are still being attached, it is sooner at times; but as often the guest has no time
for anything but the shells that wait for their devices."""
THEIRS = ("libvirt one by one", "libvirt at once", "libvirt by alias")
WAYS = ("ours", *THEIRS)
PHASES = ("mounted", "gone", "gone from the guest, too")
LIMITS = {"mounted": 1.5, "gone": 4.0}
"""How many times sooner than the best of theirs is aimed at."""
CONFIG = MountConfig(filesystem="ext4")
CONTROLLER = f"/sys/bus/pci/devices/0000:00:{FIRST_CONTROLLER_ADDRESS:02x}.0/virtio*/host*"
FIND = f"""
until for device in {CONTROLLER}/target*:0:0/*:0:0:LUN/block/*; do :; done; [ -e "$device" ]; do
    sleep 0.02
done
"""
"""There is no udev in this guest to make a link by path."""
MOUNTS = "/run/mounts/scsi/m"

Seconds = tuple[float, float, float]
"""Until all are mounted; and from the beginning of their release, for the other phases."""


async def ours(vm: Machine, images: Sequence[str]) -> Seconds:
    """A Manager's."""
    async with Manager(vm.host, vm.guest) as manager:
        begin = time.perf_counter()
        mounts = await asyncio.gather(
            *(manager.add_virtual_disk(image, mount=CONFIG) for image in images)
        )
        mounted = time.perf_counter()
        await asyncio.gather(*(mount.release() for mount in mounts))
        gone = time.perf_counter() - mounted
        return mounted - begin, gone, gone


class Theirs:
    """The ways of libvirt."""

    def __init__(self, vm: LibvirtVM) -> None:
        self._vm = vm

    def one_by_one(self, images: Sequence[str]) -> Seconds:
        def mount() -> None:
            for lun, image in enumerate(images):
                self._vm.attach(lun, image)
                path = f"{MOUNTS}{lun}"
                self._shell(lun, f'mkdir -p {path} && mount -t ext4 "/dev/${{device##*/}}" {path}')

        def release() -> None:
            for lun, image in enumerate(images):
                self._unmount(lun)
                self._vm.detach(lun, image)
                self._vm.wait_until_gone([lun])

        return self._timed(len(images), mount, release)

    def at_once(self, images: Sequence[str], *, overlapping: bool) -> Seconds:
        luns = range(len(images))

        def detach(lun: int) -> None:
            self._unmount(lun)
            if overlapping:
                self._vm.begin_detach(lun)
            else:
                self._vm.detach(lun, images[lun])

        with ThreadPoolExecutor(THREADS) as threads:

            def mount() -> None:
                for lun, image in enumerate(images):
                    self._vm.attach(lun, image)
                list(threads.map(self._mount, luns))  # what one of them raises is raised here

            def release() -> None:
                list(threads.map(detach, luns))
                self._vm.wait_until_gone(luns)

            return self._timed(len(images), mount, release)

    def _timed(self, disks: int, mount: Callable[[], None], release: Callable[[], None]) -> Seconds:
        begin = time.perf_counter()
        mount()
        mounted = time.perf_counter() - begin
        self._look(disks)
        begin = time.perf_counter()
        release()
        gone = time.perf_counter() - begin
        self._look(0)
        return mounted, gone, time.perf_counter() - begin

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
            f'until set -- {CONTROLLER}/target*/*:0:0:*/block/*; [ -e "$1" ] || shift; '
            f"[ $# = {disks} ]; do sleep 0.02; done; "
            f"[ $(grep -c {MOUNTS} /proc/mounts) = {disks} ]",
        )


async def compare(
    vm: Machine, theirs: Theirs, images: Sequence[str], runs: int
) -> dict[str, list[float]]:
    """By phase, the medians in seconds of all ways."""
    samples: dict[str, list[Seconds]] = {}

    async def kept(way: str, work: Callable[[], Awaitable[Seconds]]) -> float:
        seconds = await work()
        samples.setdefault(way, []).append(seconds)
        return sum(seconds)

    works: Sequence[Callable[[], Awaitable[Seconds]]] = (
        partial(ours, vm, images),
        partial(asyncio.to_thread, theirs.one_by_one, images),
        partial(asyncio.to_thread, theirs.at_once, images, overlapping=False),
        partial(asyncio.to_thread, theirs.at_once, images, overlapping=True),
    )
    turns = {way: partial(kept, way, work) for way, work in zip(WAYS, works, strict=True)}
    await in_turn(runs + 1, **turns)
    return {
        phase: [statistics.median(run[index] for run in samples[way][1:]) for way in WAYS]
        for index, phase in enumerate(PHASES)
    }


async def measure(chosen: argparse.Namespace) -> Report:
    report = Report()
    columns = ("disks", *(f"{way} ms" for way in WAYS), "ratio to best")
    tables = {phase: report.table(f"until all are {phase}", *columns) for phase in PHASES}
    async with _vms(chosen.cpus, max(chosen.disks)) as (vm, theirs, images):
        for disks in chosen.disks:
            found = await compare(vm, theirs, images[:disks], chosen.runs)
            for phase, seconds in found.items():
                mine, *others = seconds
                ratio = mine / min(others)
                figures = [each * 1e3 for each in seconds]
                tables[phase].rows.append((disks, *figures, ratio))
                name = f"{disks} disks {phase}"
                report.ratios[name] = round(ratio, 3)
                if phase in LIMITS:
                    report.aim(f"{name}: times sooner", 1 / ratio, LIMITS[phase], at_least=True)
    return report


@contextlib.asynccontextmanager
async def _vms(cpus: int, disks: int) -> AsyncIterator[tuple[Machine, Theirs, list[str]]]:
    """Both VMs, and images for either."""
    software = await Software.ready(Accelerator.TCG)
    with tempfile.TemporaryDirectory() as directory:
        images = prepare(directory, disks)
        own = os.path.join(directory, "libvirt")
        os.mkdir(own)
        give(directory)
        with LibvirtVM.start(Hardware(cpus=cpus), software, own) as theirs:
            async with Machine.start(
                cpus=cpus,
                accelerator=Accelerator.TCG,
                extra_arguments=("-name", "ours"),  # any makes it boot, as theirs does
            ) as vm:
                yield vm, Theirs(theirs), images


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--disks", type=int, nargs="+", default=DISKS, help="how many, up to 64")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each way, after one more")
    parser.add_argument("--cpus", type=int, default=CPUS, help="each VM's")
    run(__doc__ or "", measure, parser)


if __name__ == "__main__":
    main()
