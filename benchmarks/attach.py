#!/usr/bin/env python3
"""Disks on a real VM, many at once: attached and mounted, and released, beside the floor.

    .venv/bin/python benchmarks/attach.py [--json] [--disks 1 16 64 256] [--runs N]

Ours is a Manager on the backends of one VM: all are added at once, and released at once.
The floor does the same on the same VM, in turn with ours, with nothing that could be spared
(`thin.py`): QMP's bare commands without waiting for one another, and in the guest a small
program in C that calls mount(2) for each disk that the kernel announces, umount2(2), and
writes to sysfs. It remembers nothing, proves nothing, and undoes nothing that fails; it needs
gcc. While it works the guest's agent is stopped, as both would hear of each disk. "Delete
alone" is the floor as it would be if a disk did not lose its driver first. A disk is a 64 MiB
raw image with an ext4 on it. Medians.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reporting import Report, arguments, in_turn, medians, run
from thin import Thin, in_guest

from hotlun import Manager, MountConfig
from hotlun.backends.bridge import BridgeGuestBackend
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.bridge.client import BridgeConnection
from hotlun.vm import Machine

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Sequence

DISKS = (1, 16, 64, 256)
RUNS = {1: 31, 16: 11, 64: 7}
"""By the number of disks; 3 with more."""
LIMITS = {1: 1.25, 64: 1.15, 256: 1.15}
"""What is aimed at: times the floor."""
SIZE = 64 << 20
CONFIG = MountConfig(filesystem="ext4")
PHASES = {
    "attach + mount": ("ours", "floor"),
    "release": ("ours", "floor", "delete alone"),
}
"""What is measured, and of whom."""

Samples = dict[str, list[tuple[float, float]]]
"""Seconds for the two phases, by whom."""


class Bench:
    """One VM, and as many images as are needed."""

    def __init__(self, vm: Machine, thin: Thin, images: list[str]) -> None:
        self._vm = vm
        self._thin = thin
        self._images = images

    async def samples(self, disks: int, runs: int) -> Samples:
        """The first round is for warming up."""
        images = self._images[:disks]
        sides = {
            "ours": self._ours,
            "floor": self._floor,
            "delete alone": partial(self._floor, unbind=False),
        }
        samples: Samples = {side: [] for side in sides}

        async def kept(side: str) -> float:
            seconds = await sides[side](images)
            samples[side].append(seconds)
            return sum(seconds)

        await in_turn(runs + 1, **{side: partial(kept, side) for side in sides})
        return {side: seconds[1:] for side, seconds in samples.items()}

    async def _ours(self, images: Sequence[str]) -> tuple[float, float]:
        async with _backends(self._vm) as (host, guest), Manager(host, guest) as manager:
            begin = time.perf_counter()
            mounts = await asyncio.gather(
                *(manager.add_virtual_disk(image, mount=CONFIG) for image in images)
            )
            added = time.perf_counter()
            await asyncio.gather(*(mount.release() for mount in mounts))
            return added - begin, time.perf_counter() - added

    async def _floor(self, images: Sequence[str], *, unbind: bool = True) -> tuple[float, float]:
        async with _agent_stopped(self._vm):
            return self._thin.run(images, unbind=unbind)


@contextlib.asynccontextmanager
async def _backends(vm: Machine) -> AsyncIterator[tuple[QEMUHostBackend, BridgeGuestBackend]]:
    """Connected for one round: a monitor serves one client, and the floor needs it, too."""
    async with (
        QEMUHostBackend.connect(vm.qmp_socket, controllers=vm.controllers) as host,
        BridgeConnection.connect_unix(vm.agent_socket) as connection,
    ):
        yield host, BridgeGuestBackend(connection, "linux")


@contextlib.asynccontextmanager
async def _agent_stopped(vm: Machine) -> AsyncIterator[None]:
    """A time without it. The next that connects to it waits until it has caught up."""
    agent = "pgrep -f '[a]gent.pyz --port'"
    await in_guest(vm, f"kill -STOP $({agent})")
    try:
        yield
    finally:
        await in_guest(vm, f"kill -CONT $({agent})")


def prepare(directory: str, disks: int) -> list[str]:
    """Images with a filesystem that has nothing left to be done to it later."""
    first = Path(directory, "0.img")
    with first.open("wb") as file:
        file.truncate(SIZE)
    at_once = "lazy_itable_init=0,lazy_journal_init=0"
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", at_once, first], check=True)
    images = [str(first)]
    for number in range(1, disks):
        images.append(str(Path(directory, f"{number}.img")))
        subprocess.run(["cp", "--sparse=always", first, images[-1]], check=True)
    return images


async def measure(chosen: argparse.Namespace) -> Report:
    report = Report()
    tables = [
        report.table(phase, "disks", *(f"{side} ms" for side in sides), "ratio to floor")
        for phase, sides in PHASES.items()
    ]
    with tempfile.TemporaryDirectory() as directory:
        images = prepare(directory, max(chosen.disks))
        async with Machine.start(connect=False) as vm, Thin.install(vm) as thin:
            bench = Bench(vm, thin, images)
            for disks in chosen.disks:
                samples = await bench.samples(disks, chosen.runs or RUNS.get(disks, 3))
                for index, (table, sides) in enumerate(zip(tables, PHASES.values(), strict=True)):
                    seconds = medians(
                        {side: [run[index] for run in samples[side]] for side in sides}
                    )
                    ratio = seconds["ours"] / seconds["floor"]
                    table.rows.append((disks, *(seconds[side] * 1e3 for side in sides), ratio))
                    name = f"{table.title}, {disks} at once" if disks > 1 else f"{table.title}, 1"
                    report.ratios[name] = round(ratio, 3)
                    if disks in LIMITS:
                        report.aim(f"{name}: times the floor", ratio, LIMITS[disks])
    return report


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--disks", type=int, nargs="+", default=DISKS, help="how many at once")
    parser.add_argument("--runs", type=int, help="of each, in place of 31, 11, 7 or 3")
    run(__doc__ or "", measure, parser)


if __name__ == "__main__":
    main()
