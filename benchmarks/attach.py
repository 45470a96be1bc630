#!/usr/bin/env python3
"""What the Manager adds on a real VM: attach + mount of one disk, and its release.

    .venv/bin/python benchmarks/attach.py [--json]

The floor is the same backends called one after another without a Manager, on the
same VM in the same run: what QEMU, the guest's kernel and the agent take. A disk
is a 64 MiB raw image with an ext4 on it. Medians of alternating runs.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from hotlun import Attachment, Disk, DiskKind, GuestMount, ImageFormat, Manager, MountConfig, Slot
from hotlun.vm import Machine

RUNS = 31
CONFIG = MountConfig(filesystem="ext4")
FORMAT = MountConfig(filesystem="ext4", ensure_filesystem=True)


async def ours(vm: Machine, image: str) -> tuple[float, float]:
    """Seconds for add and release through a Manager."""
    async with Manager(vm.host, vm.guest) as manager:
        begin = time.perf_counter()
        mount = await manager.add_virtual_disk(image, mount=CONFIG)
        added = time.perf_counter()
        await mount.release()
        return added - begin, time.perf_counter() - added


async def floor(vm: Machine, image: str, serial: str) -> tuple[float, float]:
    """Seconds for the same backend calls."""
    disk = Disk(image, DiskKind.VIRTUAL_DISK, format=ImageFormat.RAW)
    attachment = Attachment(Slot(0, 0), disk, serial)
    mount = GuestMount(attachment, "/run/mounts/scsi/m0", CONFIG)
    begin = time.perf_counter()
    await vm.host.attach(attachment)
    await vm.guest.mount(mount)
    added = time.perf_counter()
    await vm.guest.unmount(mount)
    await vm.guest.unplug(attachment)
    await vm.host.detach(attachment)
    return added - begin, time.perf_counter() - added


async def measure() -> dict[str, dict[str, float]]:
    """Medians in milliseconds, by what was done."""
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory, "disk.img")
        with image.open("wb") as file:
            file.truncate(64 << 20)
        async with Machine.start() as vm:
            async with Manager(vm.host, vm.guest) as manager:
                await (await manager.add_virtual_disk(image, mount=FORMAT)).release()
            pairs = [
                (await ours(vm, str(image)), await floor(vm, str(image), f"b{run}"))
                for run in range(RUNS)
            ]
    rows = {}
    for index, name in enumerate(("attach + mount", "release")):
        mine, bare = (
            statistics.median(pair[side][index] for pair in pairs) * 1e3 for side in (0, 1)
        )
        rows[name] = {
            "ms": round(mine, 1),
            "floor_ms": round(bare, 1),
            "ratio": round(mine / bare, 3),
        }
    return rows


def main() -> None:
    rows = asyncio.run(measure())
    if "--json" in sys.argv[1:]:
        print(json.dumps(rows))
        return
    print(f"{'one disk, on the VM':<20}{'ms':>8}{'floor ms':>10}{'ratio':>8}")
    for name, row in rows.items():
        print(f"{name:<20}{row['ms']:>8}{row['floor_ms']:>10}{row['ratio']:>8}")


if __name__ == "__main__":
    main()
