"""Processes that come, work on a VM and are killed, one after another; the VM outlives them."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support import disks
from support.clients import Clients
from support.guest_shell import shell
from support.machine import eventually, look
from support.short_lived import STAGES, Child, mount_of

from hotlun import Slot

if TYPE_CHECKING:
    from pathlib import Path

    from hotlun.vm import Machine

ROUNDS = 20
DEADLINE = 20.0
"""Seconds for a round; one takes a quarter of a second, the half of it for Python to start."""
LATER = (0.0, 0.003, 0.01, 0.03, 0.1)
"""Seconds at most from a stage to the end: its first steps, or somewhere in what follows."""


@pytest.mark.parametrize("seed", [1, 2])
async def test_whoever_comes_next_finds_order_or_makes_it(
    bare_vm: Machine, tmp_path: Path, seed: int
) -> None:
    """Killed at any moment, a process leaves a VM that answers at once, and that can be cleaned."""
    chance = random.Random(seed)
    bare = await look(bare_vm)
    for number in range(ROUNDS):
        stage = chance.choice(STAGES)
        later = chance.random() * chance.choice(LATER)
        slot = Slot(chance.randrange(4), chance.randrange(64))
        image = disks.blank(tmp_path / f"{number}.raw")
        mount = mount_of(str(image), slot, f"round{number}")
        async with asyncio.timeout(DEADLINE):
            async with Child.working_on(bare_vm, mount) as child:
                await child.has(stage)
                await asyncio.sleep(later)
            async with Clients.of(bare_vm) as clients:
                await clients.remove(mount)
                assert await clients.host.occupied() == frozenset()
            left = await eventually(bare_vm, bare)
        assert left == bare, f"round {number}: killed {later:.4f} s after it had {stage}"


@pytest.mark.parametrize("stage", ["attached", "mounted", "unmounted", "unplugged"])
async def test_what_a_process_leaves_is_there_for_the_next(
    bare_vm: Machine, tmp_path: Path, stage: str
) -> None:
    """Nothing goes with it: the guest and QEMU keep the disk as it was."""
    image = disks.ext4(tmp_path / "disk.raw", "left")
    mount = mount_of(str(image), Slot(1, 2), "left1")
    bare = await look(bare_vm)
    async with Child.working_on(bare_vm, mount, stays=stage) as child:
        await child.has(stage)
        seen = await look(bare_vm)
    async with Clients.of(bare_vm) as clients:
        # What was unplugged leaves /sys/block a little later.
        assert replace(await look(bare_vm), block=()) == replace(seen, block=())
        assert await clients.host.occupied() == {mount.attachment.slot}
        if stage == "mounted":
            assert await shell(bare_vm, f"cat {mount.path}/note") == "left"
        await clients.remove(mount)
    assert await eventually(bare_vm, bare) == bare
