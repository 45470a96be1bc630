#!/usr/bin/env python3
"""What the Manager costs: one add + release without I/O, with other disks attached; and a journal.

    .venv/bin/python benchmarks/manager.py [--json]

The floor is what cannot be spared: the same calls on the same memory backends,
made one after another in one task of the caller's. That of a journal is the same writes of
the same documents into such a journal, one after another. Medians of alternating runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from typing import TYPE_CHECKING

from hotlun import Attachment, Disk, DiskKind, GuestMount, Manager, MountConfig, Slot
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.journal import MemoryJournal, SQLiteJournal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hotlun.journal import Journal

RUNS = 9
ROUNDS = 300
CONFIG = MountConfig(filesystem="ext4")


async def median_us(*works: Callable[[], Awaitable[None]]) -> list[float]:
    """Median microseconds a round of each piece of work, run in turn."""
    samples: list[list[float]] = [[] for _ in works]
    for _ in range(RUNS):
        for sample, work in zip(samples, works, strict=True):
            begin = time.perf_counter()
            for _ in range(ROUNDS):
                await work()
            sample.append((time.perf_counter() - begin) / ROUNDS * 1e6)
    return [statistics.median(sample) for sample in samples]


async def add_and_release(others: int) -> dict[str, float]:
    """One add + release through a Manager with so many other disks, and its floor."""
    host, guest = MemoryHostBackend(), MemoryGuestBackend()
    bare_host, bare_guest = MemoryHostBackend(), MemoryGuestBackend()
    count = 0

    async def through_the_manager() -> None:
        mount = await manager.add_virtual_disk("/disks/one.vhdx", mount=CONFIG)
        await mount.release()
        host.calls.clear()
        guest.calls.clear()

    async def bare() -> None:
        nonlocal count
        count += 1
        disk = Disk("/disks/one.vhdx", DiskKind.VIRTUAL_DISK)
        attachment = Attachment(Slot(3, 63), disk, f"b{count:x}")
        mount = GuestMount(attachment, "/m", CONFIG)
        await bare_host.attach(attachment)
        await bare_guest.mount(mount)
        await bare_guest.unmount(mount)
        await bare_guest.unplug(attachment)
        await bare_host.detach(attachment)
        bare_host.calls.clear()
        bare_guest.calls.clear()

    async with Manager(host, guest) as manager:
        for n in range(others):
            await manager.add_virtual_disk(f"/disks/{n}.vhdx", mount=CONFIG)
        ours, floor = await median_us(through_the_manager, bare)
    return {"others": others, "us": round(ours, 1), "floor_us": round(floor, 1)}


async def with_a_journal(folder: str) -> list[dict[str, str | float]]:
    """One add + release without a journal, and on each kind; its writes alone are the floor."""
    recorded: list[tuple[str, str | None]] = []
    kinds: dict[str, Journal | None] = {
        "none": None,
        "memory": MemoryJournal(),
        "SQLite": SQLiteJournal(os.path.join(folder, "journal")),
    }
    managers = []
    for journal in kinds.values():
        host = MemoryHostBackend()
        guest = MemoryGuestBackend(host)
        managers.append(await Manager(host, guest, journal=journal).__aenter__())

    async def work(manager: Manager) -> None:
        mount = await manager.add_virtual_disk("/disks/one.vhdx", mount=CONFIG)
        await mount.release()

    class Noted(MemoryJournal):
        def write(self, name: str, document: str | None) -> None:
            recorded.append((name, document))

    host = MemoryHostBackend()
    async with Manager(host, MemoryGuestBackend(host), journal=Noted()) as manager:
        await work(manager)
    bare = SQLiteJournal(os.path.join(folder, "bare"))
    bare.open()

    async def write() -> None:
        for name, document in recorded:
            bare.write(name, document)

    *ours, floor = await median_us(*(partial(work, manager) for manager in managers), write)
    for manager in managers:
        await manager.__aexit__(None, None, None)
    bare.close()
    return [
        {
            "journal": kind,
            "us": round(us, 1),
            "more_us": round(us - ours[0], 1),
            "floor_us": round(floor, 1) if kind == "SQLite" else 0.0,
            "writes": len(recorded) if kind != "none" else 0,
        }
        for kind, us in zip(kinds, ours, strict=True)
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        journals = asyncio.run(with_a_journal(folder))
    rows = [asyncio.run(add_and_release(others)) for others in (0, 64, 255)]
    for row in rows:
        row["ratio"] = round(row["us"] / row["floor_us"], 2)
    if "--json" in sys.argv[1:]:
        print(json.dumps({"others": rows, "journals": journals}))
        return
    print("add + release, memory backends")
    print(f"{'others':>8}{'us':>10}{'floor us':>10}{'ratio':>8}")
    for row in rows:
        print(f"{row['others']:>8.0f}{row['us']:>10}{row['floor_us']:>10}{row['ratio']:>8}")
    print("\nadd + release, memory backends, with a journal")
    print(f"{'journal':>8}{'us':>10}{'more us':>10}{'writes':>8}{'floor us':>10}")
    for row in journals:
        print(
            f"{row['journal']:>8}{row['us']:>10}{row['more_us']:>10}{row['writes']:>8}"
            f"{row['floor_us']:>10}"
        )


if __name__ == "__main__":
    main()
