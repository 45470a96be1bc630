"""Seeded storms over the compute service's library: refusals, time-outs, late ends, lost answers.

Whatever happens, every call into the library is right, and once all is released the VM has
nothing of ours: no disk, no mount, no access.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING

import pytest
from support.computecore import VM, Call, FakeComputeCore, When, fake_computecore

from hotlun import HotlunError, Manager, Mount, MountConfig, Slot
from hotlun.backends.hcs import HCSGuestBackend, HCSHostBackend
from hotlun.hcs import open_system

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

CONFIGS = (None, MountConfig(), MountConfig(partition=1), MountConfig(partition=2))
BUSY, DENIED, GONE_AWAY = 0x80370105, 0x80070005, 0x8037011E
PATIENCE = 0.02
"""Seconds for a call; many here take longer."""
OPERATIONS = 80
OWN = [Slot(0, 1)]


class Storm:
    """The storm of one seed."""

    def __init__(self, seed: int, fake: FakeComputeCore) -> None:
        self.random = random.Random(seed)
        self.fake = fake
        self.tasks: set[asyncio.Task[None]] = set()
        fake.attach(0, 1, "C:\\boot.vhdx")
        fake.tells(disks=seed % 2 == 0)

    async def run(self) -> None:
        async with open_system(VM, core=self.fake.core, timeout=PATIENCE) as system:
            host = HCSHostBackend(system, own=OWN, timeout=PATIENCE)
            guest = HCSGuestBackend(system, "linux", timeout=PATIENCE)
            manager = Manager(host, guest, controllers=2, luns_per_controller=3)
            manager._reconciler.first_pause = 0.05
            async with manager:
                for _ in range(OPERATIONS):
                    self.trouble()
                    self.start(self.operate(manager))
                    await asyncio.sleep(self.random.choice([0, 0, 0.001, 0.01]))
                    if self.tasks and self.random.random() < 0.15:
                        self.random.choice(sorted(self.tasks, key=id)).cancel()
                await asyncio.wait(self.tasks)
                self.fake.calm()
                async with asyncio.timeout(20):
                    while True:
                        with contextlib.suppress(ExceptionGroup):
                            await manager.release_all()
                            break
                assert [s.slot for s in manager.slots() if s.attachment] == []

    def trouble(self) -> None:
        """Something for one of the next calls, perhaps."""
        call = self.random.choices([Call.MODIFY, Call.GRANT, Call.REVOKE], [8, 1, 1])[0]
        code = self.random.choice([BUSY, DENIED, GONE_AWAY])
        if call is not Call.MODIFY:
            code = self.random.choice([DENIED, BUSY])
            if self.random.random() < 0.3:
                self.fake.script(call, When.AT_START, code)
            return
        when, code, milliseconds = self.random.choice(
            [
                (When.AT_START, code, 0),
                (When.AT_END, code, 0),
                (When.AT_END, 0, self.random.randrange(1, 60)),
                (When.AT_END, code, self.random.randrange(1, 60)),
                (When.AFTERWARDS, GONE_AWAY, self.random.randrange(1, 60)),
                (When.LATE_WAITS, 0, 2),
            ]
        )
        if self.random.random() < 0.4:
            self.fake.script(call, when, code, milliseconds=milliseconds)

    async def operate(self, manager: Manager) -> None:
        path = f"C:\\disks\\{self.random.randrange(5)}.vhdx"
        config = self.random.choice(CONFIGS)
        with contextlib.suppress(HotlunError):
            mount = await manager.add_virtual_disk(
                path, mount=config, vm_id=self.random.choice(["", VM, "other"])
            )
            await asyncio.sleep(self.random.choice([0, 0.005]))
            await self.release(mount)

    async def release(self, mount: Mount) -> None:
        for _ in range(self.random.randrange(3)):
            with contextlib.suppress(HotlunError):
                await mount.release()
                return

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)


@pytest.mark.parametrize("seed", range(8))
async def test_nothing_is_left_after_a_storm(seed: int) -> None:
    """And the VM's own disk is where it was."""
    with fake_computecore() as fake:
        await Storm(seed, fake).run()
        state = fake.state
        assert [(disk.controller, disk.lun) for disk in state.disks] == [(0, 1)]
        assert state.disks[0].path == "C:\\boot.vhdx"
        assert (state.mounts, state.grants) == ({}, set())
