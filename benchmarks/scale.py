#!/usr/bin/env python3
"""How the cost of one add + release grows: with disks, with tasks, with holders, with VMs.

    .venv/bin/python benchmarks/scale.py [--json] [--runs N] [--vms N]

Our part of the cost is the CPU time of this process for one operation: on a real VM the time
goes by in QEMU and in the guest, which are other processes, and is shown beside it as `wall us`.
Sizes take turns, each row is a median, and through the rows of a table a line is fitted: the
least squares of log cost by log n. Its slope is the exponent: 0 if n does not matter, 1 if twice
as many make each operation twice as dear. So the first row is the floor of its table.

At most 0.1 is aimed at: over a factor of 256 that is 1.7 in all, which is what caches and the
garbage collector may take, and a list that is searched once an operation is beyond it. It is an
upper limit only. Below 0 means that many at once share what one has to pay alone, a turn of the
event loop for instance. What such a fall could hide is told by the ratios: the last size over the
cheapest.

With `--vms 0` no VM is needed; `--vms` and `--most` make it shorter.
"""

from __future__ import annotations

import asyncio
import gc
import math
import shutil
import tempfile
import time
import tracemalloc
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from reporting import Report, arguments, in_turn, medians, run

from hotlun import Manager, MountConfig
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.journal import SQLiteJournal
from hotlun.vm import Machine

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from hotlun import Mount
    from hotlun.journal import Journal

    Sizes = Mapping[int, Callable[[], Awaitable["Cost"]]]

COUNTS = (1, 4, 16, 64, 256)
"""Of disks, tasks and holders."""
MANAGERS = (1, 10, 100, 1000)
VMS = (1, 2, 4, 8)
RUNS, REAL_RUNS = 15, 4
OPERATIONS, REAL_OPERATIONS = 256, 8
"""In one sample, at least; on each real VM."""
LUNS = 128
"""Of each controller, so that there is room for more than 256 disks."""
LIMIT = 0.1
CONFIG = MountConfig(filesystem="ext4")
FORMAT = MountConfig(filesystem="ext4", ensure_filesystem=True)
ONE = "/disks/one.img"


class Cost(NamedTuple):
    """Microseconds for one operation."""

    cpu: float
    wall: float


async def measure(chosen: argparse.Namespace) -> Report:
    report = Report()
    counts = [n for n in COUNTS if n <= chosen.most]
    managers = [n for n in MANAGERS if n <= chosen.most]
    runs = chosen.runs or RUNS
    await idle(report, managers[-1])
    await with_disks(report, runs, counts)
    await with_tasks(report, runs, counts)
    await with_managers(report, runs, managers)
    if chosen.vms:
        vms = [n for n in VMS if n <= chosen.vms]
        await on_real_vms(report, chosen.runs or REAL_RUNS, vms, counts)
    return report


async def compare(report: Report, subject: str, runs: int, sizes: Sizes) -> None:
    """Measure the sizes of one thing in turn, and how the cost grows with them."""
    walls: dict[str, list[float]] = {str(n): [] for n in sizes}

    async def cpu(n: int) -> float:
        cost = await sizes[n]()
        walls[str(n)].append(cost.wall)
        return cost.cpu

    took = medians(await in_turn(runs, **{str(n): partial(cpu, n) for n in sizes}))
    table = report.table(f"one add + release: {subject}", "", "CPU us", "wall us")
    table.rows += [
        (n, us, wall) for (n, us), wall in zip(took.items(), medians(walls).values(), strict=True)
    ]
    if len(took) > 1:
        slope = exponent({int(n): us for n, us in took.items()})
        table.rows.append(("exponent", round(slope, 3), None))
        report.aim(f"exponent, {subject}", slope, LIMIT)
        *_, last = took
        report.ratios[f"{subject}: {last} over the cheapest"] = took[last] / min(took.values())


def exponent(costs: Mapping[int, float]) -> float:
    """The slope of log cost by log n, by least squares."""
    points = [(math.log(n), math.log(cost)) for n, cost in costs.items()]
    mean_x, mean_y = (math.fsum(axis) / len(points) for axis in zip(*points, strict=True))
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points)
    return slope / math.fsum((x - mean_x) ** 2 for x, _ in points)


async def measured(operations: int, work: Awaitable[object]) -> Cost:
    """What each of so many operations has cost."""
    wall, cpu = time.perf_counter(), time.process_time()
    await work
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Cost(cpu / operations * 1e6, wall / operations * 1e6)


async def add_and_release(manager: Manager, image: str | Path) -> None:
    mount = await manager.add_virtual_disk(image, mount=CONFIG)
    await mount.release()


# --- In memory ---


class InMemory:
    """A Manager on memory backends, entered once."""

    def __init__(self, journal: Journal | None = None) -> None:
        self._host = MemoryHostBackend()
        self._guest = MemoryGuestBackend(self._host)
        self.manager = Manager(self._host, self._guest, luns_per_controller=LUNS, journal=journal)

    def forget(self) -> None:
        """The backends' records of calls, which are a test's, not ours."""
        self._host.calls.clear()
        self._guest.calls.clear()


def many(count: int) -> list[str]:
    return [f"/disks/{n}.img" for n in range(count)]


def the_same(count: int) -> list[str]:
    return [ONE] * count


async def with_disks(report: Report, runs: int, counts: Sequence[int]) -> None:
    """With other disks attached and mounted, or others that hold the same."""
    for subject, images in (("n others attached", many), ("n others hold the disk", the_same)):
        for recorded, words in ((False, ""), (True, ", in a journal")):
            with tempfile.TemporaryDirectory() as folder:
                async with AsyncExitStack() as stack:
                    sizes = {}
                    for n in counts:
                        journal = SQLiteJournal(Path(folder, str(n))) if recorded else None
                        vm = InMemory(journal)
                        await stack.enter_async_context(vm.manager)
                        for image in images(n):
                            await vm.manager.add_virtual_disk(image, mount=CONFIG)
                        sizes[n] = partial(in_rounds, [vm], [ONE])
                    await compare(report, subject + words, runs, sizes)


async def with_tasks(report: Report, runs: int, counts: Sequence[int]) -> None:
    """With many at once, a task each."""
    for subject, images in (("n tasks, a disk each", many), ("n tasks, one disk", the_same)):
        vm = InMemory()
        async with vm.manager:
            sizes = {n: partial(in_rounds, [vm], images(n)) for n in counts}
            await compare(report, subject, runs, sizes)


async def with_managers(report: Report, runs: int, counts: Sequence[int]) -> None:
    """With many in this process, one after another."""
    vms = [InMemory() for _ in range(counts[-1])]
    async with AsyncExitStack() as stack:
        for vm in vms:
            await stack.enter_async_context(vm.manager)
        sizes = {n: partial(in_rounds, vms[:n], [ONE]) for n in counts}
        await compare(report, "n Managers in one process", runs, sizes)


async def in_rounds(vms: Sequence[InMemory], images: Sequence[str]) -> Cost:
    """All images of a VM at once, the VMs one after another, and again from the start."""
    for vm in vms:
        vm.forget()
    rounds = -(-OPERATIONS // (len(vms) * len(images)))

    async def work() -> None:
        for vm in rounds * list(vms):
            if len(images) == 1:
                await add_and_release(vm.manager, images[0])
            else:
                await asyncio.gather(*(add_and_release(vm.manager, image) for image in images))

    return await measured(rounds * len(vms) * len(images), work())


async def idle(report: Report, count: int) -> None:
    """What a Manager takes that has nothing to do, its backends left out."""
    hosts = [MemoryHostBackend() for _ in range(count)]
    guests = [MemoryGuestBackend(host) for host in hosts]
    tasks = len(asyncio.all_tasks())
    gc.collect()
    tracemalloc.start()
    try:
        async with AsyncExitStack() as stack:
            for host, guest in zip(hosts, guests, strict=True):
                await stack.enter_async_context(Manager(host, guest))
            gc.collect()
            taken, _ = tracemalloc.get_traced_memory()
            tasks = len(asyncio.all_tasks()) - tasks
    finally:
        tracemalloc.stop()
    table = report.table("idle Managers", "", "KiB each", "tasks each")
    table.rows.append((count, round(taken / count / 1024, 2), tasks / count))


# --- On real VMs ---


async def on_real_vms(
    report: Report, runs: int, sizes: Sequence[int], counts: Sequence[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            vms = await asyncio.gather(
                *(stack.enter_async_context(Machine.start()) for _ in range(sizes[-1]))
            )
            images = await formatted(vms[0], folder, len(vms))
            managers = [Manager(vm.host, vm.guest, luns_per_controller=LUNS) for vm in vms]
            for manager in managers:
                await stack.enter_async_context(manager)
            made = list(zip(managers, images, strict=True))
            works = {n: partial(side_by_side, made[:n]) for n in sizes}
            await compare(report, "n real VMs at once", runs, works)
            await among_others(report, runs, counts, *made[0])


async def formatted(vm: Machine, folder: str, count: int) -> list[Path]:
    """So many images with an ext4 on each."""
    first, *more = (Path(folder, f"{n}.img") for n in range(count))
    empty(first, 16 << 20)
    async with Manager(vm.host, vm.guest) as manager:
        await (await manager.add_virtual_disk(first, mount=FORMAT)).release()
    for image in more:
        shutil.copyfile(first, image)
    return [first, *more]


def empty(image: Path, size: int) -> None:
    with image.open("wb") as file:
        file.truncate(size)


async def side_by_side(made: Sequence[tuple[Manager, Path]]) -> Cost:
    """One after another on each VM, and side by side on all of them."""

    async def on(manager: Manager, image: Path) -> None:
        for _ in range(REAL_OPERATIONS):
            await add_and_release(manager, image)

    work = asyncio.gather(*(on(*each) for each in made))
    return await measured(REAL_OPERATIONS * len(made), work)


async def among_others(
    report: Report, runs: int, counts: Sequence[int], manager: Manager, image: Path
) -> None:
    """On one VM that gets more and more other disks, and then fewer."""
    others: list[Mount] = []

    async def with_others(count: int) -> Cost:
        while len(others) > count:
            await others.pop().release()
        while len(others) < count:
            other = image.with_name(f"other {len(others)}.img")
            empty(other, 1 << 20)
            others.append(await manager.add_virtual_disk(other))
        return await side_by_side([(manager, image)])

    works = {n: partial(with_others, n) for n in counts}
    await compare(report, "n others attached to a real VM", runs, works)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, metavar="N", help="of each size; fewer to see it work")
    parser.add_argument("--vms", type=int, default=VMS[-1], metavar="N", help="real ones, at most")
    parser.add_argument(
        "--most", type=int, default=MANAGERS[-1], metavar="N", help="of all else, at most"
    )
    run(__doc__, measure, parser)
