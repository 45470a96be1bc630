#!/usr/bin/env python3
"""What the Manager costs, without I/O: all backends are memory's.

    .venv/bin/python benchmarks/manager.py [--json] [--runs N] [--python PATH ...]

The floor of an add + release is what cannot be spared: the same calls on the same backends,
made one after another in one task of the caller's. What lies between is told apart: the
config that a caller makes, finding out which file the path names, and two tasks that the
loop has to come round to. What remains is coordination.

The yardstick is the original, written in Go, doing the same on the machine that the targets
were set on: 42 us for an add + release beside 255 disks, 46 us for a reuse among 256, 4.4 ms
for filling and draining 256 slots, and 314 ms for 64 disks at once whose backend calls take
2 ms. Its figures are not measured here.

With `--python`, the same by other interpreters; `scripts/other-pythons` prints some.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tracemalloc
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reporting import Report, arguments, in_turn, medians, run

from hotlun import Attachment, Disk, DiskKind, GuestMount, Manager, MountConfig, Slot
from hotlun.attachments import virtual_disk
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.journal import MemoryJournal, SQLiteJournal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable, Mapping

    from hotlun.journal import Journal

RUNS = 41
ROUNDS = 60
"""Rounds in each run of what takes microseconds."""
SLOTS = 256
DELAY = 0.002
"""Seconds that a slow backend's call takes."""
AT_ONCE = 64
MANY_SLOTS = 10_000

TARGET_US, TARGET_LATER_US = 60, 42
"""For an add + release on Python 3.11, and on the best of the later ones."""


class Images:
    """Image files with nothing in them."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.paths = [os.path.join(folder, f"{n}.vhdx") for n in range(SLOTS)]
        for path in self.paths:
            Path(path).touch()


def backends(delay: float = 0) -> tuple[MemoryHostBackend, MemoryGuestBackend]:
    return MemoryHostBackend(delay=delay), MemoryGuestBackend(delay=delay)


def each(work: Callable[[], Awaitable[None]], rounds: int = ROUNDS) -> Callable[..., Any]:
    """So many rounds of some work; microseconds for one."""

    async def timed() -> float:
        begin = time.perf_counter()
        for _ in range(rounds):
            await work()
        return (time.perf_counter() - begin) / rounds * 1e6

    return timed


def add_and_release(
    manager: Manager, path: str, host: MemoryHostBackend, guest: MemoryGuestBackend
) -> Callable[[], Awaitable[None]]:
    async def work() -> None:
        mount = await manager.add_virtual_disk(path, mount=MountConfig(filesystem="ext4"))
        await mount.release()
        host.calls.clear()
        guest.calls.clear()

    return work


async def filled(manager: Manager, images: Images, count: int) -> None:
    for path in images.paths[:count]:
        await manager.add_virtual_disk(path, mount=MountConfig(filesystem="ext4"))


class Parts:
    """What an add + release cannot do without, each for itself."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._host, self._guest = backends()
        self._count = 0
        self._config = MountConfig(filesystem="ext4")

    async def calls(self) -> None:
        """The backends' calls, and the values that they are made with."""
        self._count += 1
        disk = Disk(self._path, DiskKind.VIRTUAL_DISK)
        attachment = Attachment(Slot(3, 63), disk, f"b{self._count:x}")
        mount = GuestMount(attachment, "/m", self._config)
        await self._host.attach(attachment)
        await self._guest.mount(mount)
        await self._guest.unmount(mount)
        await self._guest.unplug(attachment)
        await self._host.detach(attachment)
        self._host.calls.clear()
        self._guest.calls.clear()

    async def config(self) -> None:
        MountConfig(filesystem="ext4")

    async def path(self) -> None:
        virtual_disk(self._path, False, None)

    async def tasks(self) -> None:
        """Two tasks that do nothing, and whoever waits for each."""
        loop = asyncio.get_running_loop()
        for _ in range(2):
            answer = loop.create_future()
            task = loop.create_task(_answer(answer))
            await answer
            assert task.done()


async def _answer(answer: asyncio.Future[None]) -> None:
    answer.set_result(None)


async def one_disk(report: Report, images: Images, runs: int) -> float:
    """One add + release beside others, and its parts; microseconds for it beside 255."""
    counts = (0, 64, SLOTS - 1)
    works = {}
    managers = []
    for count in counts:
        host, guest = backends()
        manager = await Manager(host, guest).__aenter__()
        await filled(manager, images, count)
        works[str(count)] = each(add_and_release(manager, images.paths[-1], host, guest))
        managers.append(manager)
    parts = Parts(images.paths[-1])
    for name in ("calls", "config", "path", "tasks"):
        works[name] = each(getattr(parts, name))
    us = medians(await in_turn(runs, **works))
    for manager in managers:
        await manager.__aexit__(None, None, None)

    table = report.table(
        "one add + release, memory backends", "other disks", "us", "floor", "ratio"
    )
    for count in counts:
        ours = us[str(count)]
        table.rows.append((count, ours, us["calls"], ours / us["calls"]))
        report.ratios[f"add + release beside {count} / bare calls"] = ours / us["calls"]
    last = us[str(counts[-1])]
    split = report.table(f"of it, beside {counts[-1]}", "part", "us", "share")
    known = {
        "the backends' calls": us["calls"],
        "the config": us["config"],
        "path look-up": us["path"],
        "two tasks": us["tasks"],
    }
    for name, value in (*known.items(), ("coordination", last - sum(known.values()))):
        split.rows.append((name, value, value / last))
    report.aim("growth of add + release from 0 to 255 disks", last / us["0"], 1.1)
    return last


async def reuse(report: Report, images: Images, runs: int) -> None:
    """Another Mount of what is mounted already, and its release, among 256 disks."""
    host, guest = backends()
    async with Manager(host, guest) as manager:
        await filled(manager, images, SLOTS)
        work = each(add_and_release(manager, images.paths[SLOTS // 2], host, guest))
        parts = Parts(images.paths[-1])
        us = medians(await in_turn(runs, ours=work, path=each(parts.path)))
    table = report.table(f"a reuse among {SLOTS}", "us", "path look-up", "ratio")
    table.rows.append((us["ours"], us["path"], us["ours"] / us["path"]))
    report.ratios["reuse / path look-up"] = us["ours"] / us["path"]
    report.aim(f"us for a reuse among {SLOTS}", us["ours"], 15)


async def fill_and_drain(report: Report, images: Images, runs: int) -> None:
    """All 256 slots, one after another and all at once; the bare calls of 256 disks."""

    async def one_by_one() -> None:
        async with Manager(*backends()) as manager:
            await filled(manager, images, SLOTS)
            for mount in manager.mounts:
                await mount.release()

    async def at_once() -> None:
        async with Manager(*backends()) as manager:
            add = partial(manager.add_virtual_disk, mount=MountConfig(filesystem="ext4"))
            await asyncio.gather(*map(add, images.paths))
            await manager.release_all()

    parts = Parts(images.paths[-1])

    async def bare() -> None:
        for _ in range(SLOTS):
            await parts.calls()

    works = {work.__name__: each(work, 1) for work in (one_by_one, at_once, bare)}
    us = medians(await in_turn(runs, **works))
    table = report.table(f"fill and drain {SLOTS} slots", "how", "ms", "floor", "ratio")
    for name in ("one_by_one", "at_once"):
        ratio = us[name] / us["bare"]
        words = name.replace("_", " ")
        table.rows.append((words, us[name] / 1e3, us["bare"] / 1e3, ratio))
        report.ratios[f"fill and drain, {words} / bare calls"] = ratio
    report.aim(f"ms to fill and drain {SLOTS}, one by one", us["one_by_one"] / 1e3, 16)


async def slow_backends(report: Report, images: Images, runs: int) -> None:
    """64 disks at once whose backend calls take 2 ms each; five of them are the floor."""
    config = MountConfig(filesystem="ext4")

    async def ours() -> None:
        async with Manager(*backends(DELAY)) as manager:
            add = partial(manager.add_virtual_disk, mount=config)
            mounts = await asyncio.gather(*map(add, images.paths[:AT_ONCE]))
            await asyncio.gather(*(mount.release() for mount in mounts))

    async def five_sleeps() -> None:
        for _ in range(5):
            await asyncio.sleep(DELAY)

    async def floor() -> None:
        await asyncio.gather(*(five_sleeps() for _ in range(AT_ONCE)))

    us = medians(await in_turn(runs, ours=each(ours, 1), floor=each(floor, 1)))
    title = f"{AT_ONCE} disks at once, {DELAY * 1e3:.0f} ms a backend call"
    table = report.table(title, "ms", "floor", "ratio")
    table.rows.append((us["ours"] / 1e3, us["floor"] / 1e3, us["ours"] / us["floor"]))
    report.ratios[f"{AT_ONCE} at once / five sleeps"] = us["ours"] / us["floor"]
    report.aim(f"ms for {AT_ONCE} at once", us["ours"] / 1e3, 30)


async def memory(report: Report, images: Images) -> None:
    """The most that is allocated, by what holds it."""
    table = report.table("peak memory (tracemalloc)", "what", "KiB")

    async def peak(what: str, luns: int, paths: list[str]) -> None:
        tracemalloc.start()
        async with Manager(*backends(), controllers=4, luns_per_controller=luns) as manager:
            for path in paths:
                await manager.add_virtual_disk(path, mount=MountConfig(filesystem="ext4"))
            assert len(manager.mounts) == len(paths)
            used = tracemalloc.get_traced_memory()[1] / 1024
        tracemalloc.stop()
        table.rows.append((what, round(used, 1)))

    await peak(f"a Manager of {SLOTS} slots", 64, [])
    await peak(f"{SLOTS} disks, and the memory backends", 64, images.paths)
    await peak(f"{MANY_SLOTS} slots", MANY_SLOTS // 4, [])


async def with_a_journal(report: Report, images: Images, runs: int) -> None:
    """One add + release without a journal, and on each kind; its writes alone are the floor."""
    recorded: list[Mapping[str, str | None]] = []

    class Noted(MemoryJournal):
        def write(self, changes: Mapping[str, str | None]) -> None:
            recorded.append(changes)

    path = images.paths[0]
    host, guest = backends()
    async with Manager(host, guest, journal=Noted()) as manager:
        await add_and_release(manager, path, host, guest)()
    bare = SQLiteJournal(os.path.join(images.folder, "bare"))
    bare.open()

    async def write() -> None:
        for changes in recorded:
            bare.write(changes)

    kinds: dict[str, Journal | None] = {
        "none": None,
        "memory": MemoryJournal(),
        "SQLite": SQLiteJournal(os.path.join(images.folder, "journal")),
    }
    works = {"bare": each(write)}
    managers = []
    for kind, journal in kinds.items():
        host, guest = backends()
        manager = await Manager(host, guest, journal=journal).__aenter__()
        works[kind] = each(add_and_release(manager, path, host, guest))
        managers.append(manager)
    us = medians(await in_turn(runs, **works))
    for manager in managers:
        await manager.__aexit__(None, None, None)
    bare.close()
    title = f"with a journal: {len(recorded)} writes"
    table = report.table(title, "journal", "us", "more", "writes alone", "ratio")
    for kind in kinds:
        more = us[kind] - us["none"]
        if kind == "SQLite":
            table.rows.append((kind, us[kind], more, us["bare"], more / us["bare"]))
            report.ratios["SQLite journal / its writes alone"] = more / us["bare"]
        else:
            table.rows.append((kind, us[kind], more, None, None))


def others(report: Report, pythons: list[str], runs: int) -> None:
    """The figures of other interpreters, beside this one's."""
    table = report.table(
        f"one add + release beside {SLOTS - 1}, by interpreter", "Python", "us", "floor", "ratio"
    )
    source = Path(__file__).parent.parent / "src"
    best = []
    table.rows.append((platform.python_version(), *report.tables[0].rows[-1][1:]))
    for python in pythons:
        done = subprocess.run(
            [python, __file__, "--json", "--runs", str(runs)],
            env={**os.environ, "PYTHONPATH": str(source)},
            stdout=subprocess.PIPE,
            check=True,
        )
        said = json.loads(done.stdout)
        row = said["tables"][0]["rows"][-1]
        table.rows.append((said["python"], *row[1:]))
        best.append(row[1])
    if best:
        report.aim("us for an add + release, the best later Python", min(best), TARGET_LATER_US)


async def measure(chosen: argparse.Namespace) -> Report:
    report = Report()
    runs = chosen.runs
    with tempfile.TemporaryDirectory() as folder:
        images = Images(folder)
        last = await one_disk(report, images, runs)
        if sys.version_info < (3, 12):
            report.aim(f"us for an add + release beside {SLOTS - 1}", last, TARGET_US)
        await reuse(report, images, runs)
        await fill_and_drain(report, images, runs)
        await slow_backends(report, images, min(runs, 11))
        await memory(report, images)
        await with_a_journal(report, images, runs)
    if chosen.python:
        others(report, chosen.python, runs)
    return report


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each; {RUNS} if not given")
    parser.add_argument(
        "--python", action="append", metavar="PATH", help="another interpreter; can be repeated"
    )
    run(__doc__ or "", measure, parser)


if __name__ == "__main__":
    main()
