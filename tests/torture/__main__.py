"""`scripts/torture SEED N`: kills N processes on a real VM, and all else that can die."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torture.faults import FAULTS, end_the_vm, strike
from torture.kills import kill_and_drain
from torture.soak import soak

from hotlun.vm import Machine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from torture.figures import Figures

BATCH = 100
"""Kills on one VM, before a fresh one."""


async def torture(seed: int, count: int, faults: int, operations: int) -> bool:
    """All of it, one kind after another; whether all was as it must be."""
    good = True
    for begin in range(0, count, BATCH):
        good &= await _told(partial(_killed, seed + begin, min(BATCH, count - begin)))
    for name in FAULTS if faults else ():
        good &= await _told(partial(strike, name, seed=seed, rounds=faults))
    if faults:
        good &= await _told(partial(end_the_vm, seed=seed, rounds=faults))
    if operations:
        with tempfile.TemporaryDirectory(prefix="hotlun-torture-") as folder:
            print(*(await soak(Path(folder), seed, operations)).lines(), sep="\n", flush=True)
    return good


async def _killed(seed: int, count: int, folder: Path) -> Figures:
    async with Machine.start(connect=False) as vm:
        return await kill_and_drain(vm, folder, seed, count)


async def _told(work: Callable[[Path], Awaitable[Figures]]) -> bool:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hotlun-torture-") as folder:
        figures = await work(Path(folder))
    print(*figures.lines(), sep="\n")
    print(f"  all in {time.monotonic() - began:.0f} s", flush=True)
    return not figures.failures


def main() -> int:
    """The exit status: 0 if all was as it must be."""
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__)
    parser.add_argument("seed", type=int, nargs="?", default=1, metavar="SEED", help="%(default)s")
    parser.add_argument(
        "count", type=int, nargs="?", default=500, metavar="N", help="kills (%(default)s)"
    )
    parser.add_argument(
        "--faults",
        type=int,
        default=20,
        metavar="N",
        help="rounds of each: the monitor cut, the agent killed, the guest reset, QEMU killed "
        "(%(default)s)",
    )
    parser.add_argument(
        "--soak", type=int, default=2000, metavar="N", help="operations (%(default)s)"
    )
    chosen = parser.parse_args()
    logging.getLogger("hotlun").setLevel(logging.CRITICAL)  # disagreements are counted, not told
    good = asyncio.run(torture(chosen.seed, chosen.count, chosen.faults, chosen.soak))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
