"""A process is killed at a point of its work; the next one settles and drains."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from typing import TYPE_CHECKING

from support.clients import Clients
from support.machine import eventually, look
from torture.figures import Figures
from torture.work import Images

from hotlun import Manager, SlotState
from hotlun.events import DisagreementSettled
from hotlun.journal import SQLiteJournal

if TYPE_CHECKING:
    from pathlib import Path

    from support.machine import Seen

    from hotlun.vm import Machine

DEADLINE = 120.0
"""Seconds for one life, and again for what comes after it."""
POINTS = 130
"""More than most lives have; of the others some come to the end of their work."""


async def kill_and_drain(
    vm: Machine, folder: Path, seed: int, rounds: int, *, every: int = 5
) -> Figures:
    """So many rounds on one VM, each killed at a point that the seed draws.

    Args:
        vm: nobody is connected to it.
        folder: for disks and journals, empty.
        every: so often the second process is killed as well, while it settles.
    """
    figures = Figures(f"killed, seed {seed}")
    chance = random.Random(seed)
    images = Images.make(folder)
    bare = await look(vm)
    for number in range(rounds):
        journal = folder / f"journal{number}"
        life_seed, point = chance.getrandbits(32), chance.randint(1, POINTS)
        try:
            async with asyncio.timeout(DEADLINE):
                where = await _live(vm, journal, images, life_seed, point)
                figures.points[_kind(where)] += 1
                if number % every == every - 1:
                    await _live(vm, journal, images, life_seed + 1, chance.randint(1, 20))
            async with asyncio.timeout(DEADLINE):
                began = time.monotonic()
                await _drain(vm, journal, figures)
                figures.seconds.append(time.monotonic() - began)
                await _check(vm, journal, bare)
        except Exception as error:
            figures.failures.append(
                f"round {number} (life {life_seed}, killed at {point}): {error!r}"
            )
            break  # the VM is not as it was: what comes next would say nothing
        finally:
            figures.rounds += 1
    return figures


async def _live(vm: Machine, journal: Path, images: Images, seed: int, point: int) -> str:
    """One process, until it has killed itself; where that was."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "torture.life", vm.qmp_socket, vm.agent_socket),
        *(str(journal), str(images.folder), str(seed), str(point)),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    words = errors.decode(errors="replace")
    if process.returncode != -signal.SIGKILL or "killed " not in words:
        raise AssertionError(f"it ended with {process.returncode}, and said: {words[-2000:]}")
    return words.rpartition("killed ")[2].strip()


async def _drain(vm: Machine, journal: Path, figures: Figures) -> None:
    async with Clients.of(vm) as clients:
        manager = Manager(clients.host, clients.guest, journal=SQLiteJournal(journal))
        events = manager.events()
        async with manager:
            seen = await look(vm)
            for mount in manager.mounts:
                # One that was being released has let go of its mount, and a guest that scans its
                # bus for another disk finds the device again: it is not shared any more.
                assert not mount.lost or "its release had begun" in mount.lost, f"{mount!r}"
                held = mount._handle.mount
                if held is None or held.closing:  # or of which the agent is still at the unmount
                    continue
                if mount.guest_path and mount.config and not mount.config.block_device:
                    assert seen.mount_at(mount.guest_path) is not None, f"{mount!r} is not there"
            await manager.release_all()
            states = {status.state for status in manager.slots()}
            assert states == {SlotState.FREE}, states
        async for event in events:
            if isinstance(event, DisagreementSettled):
                figures.met(event.disagreement)


async def _check(vm: Machine, journal: Path, bare: Seen) -> None:
    left = await eventually(vm, bare)
    assert left == bare, f"the VM is not as before: {left}"
    documents = SQLiteJournal(journal).peek()
    assert documents == [], documents
    for path in journal.parent.glob("*.raw"):
        assert "system.posix_acl_access" not in os.listxattr(path), f"{path} is still granted"


def _kind(where: str) -> str:
    """Without numbers."""
    return where.partition(", after")[0]
