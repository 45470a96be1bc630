"""One seeded storm: many tasks over a few disks, with faults and cancellations at every step.

What must hold whatever happens: the backends see nothing impossible, every
task ends, and once all is released nothing is left and each thing was done and
undone exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING

from hotlun import (
    BackendError,
    DiskConflictError,
    GuestPathConflictError,
    HotlunError,
    Manager,
    Mount,
    MountConfig,
    NoAvailableLocationError,
    NotInitializedError,
    OutcomeUnknownError,
    Secret,
    Slot,
    SlotState,
)
from hotlun.backends.memory import Gate, MemoryGuestBackend, MemoryHostBackend

if TYPE_CHECKING:
    from collections.abc import Coroutine

CONFIGS = (
    None,
    MountConfig(),
    MountConfig(options=("noatime",)),
    MountConfig(partition=1),
    MountConfig(ensure_filesystem=True, filesystem="ext4"),
    MountConfig(partition=2, ensure_filesystem=True, filesystem="xfs"),
    MountConfig(partition=2, encrypted=True, key=Secret("key")),
)
HOST = ("attach", "detach", "grant_access", "revoke_access")
GUEST = ("mount", "unmount", "unplug")
EXPECTED = (
    BackendError,
    OutcomeUnknownError,
    DiskConflictError,
    GuestPathConflictError,
    NoAvailableLocationError,
    NotInitializedError,
)


class Storm:
    """The storm of one seed."""

    def __init__(self, seed: int, operations: int = 60) -> None:
        self.random = random.Random(seed)
        self.operations = operations
        self.host = MemoryHostBackend(taken=[Slot(0, 2)])
        self.guest = MemoryGuestBackend(self.host)
        self.gates: list[Gate] = []
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        leave_early = self.random.random() < 0.3
        manager = Manager(self.host, self.guest, controllers=2, luns_per_controller=3)
        try:
            async with manager:
                for _ in range(self.operations):
                    await self._operate(manager)
                if not leave_early:  # faults or not, every caller gets its answer by itself
                    for gate in self.gates:
                        gate.open()
                    await self.tasks_end()
                self.faults_end()
                if not leave_early:
                    assert_consistent(manager, self.host, self.guest)
        except* EXPECTED:
            pass
        await self.tasks_end()
        self.faults_end()
        await manager.release_all()
        assert_drained(manager, self.host, self.guest)

    async def _operate(self, manager: Manager) -> None:
        chance = self.random.random()
        if chance < 0.45:
            self._start(self._add(manager))
        elif chance < 0.65 and manager.mounts:
            self._start(self._release(self.random.choice(manager.mounts)))
        elif chance < 0.75 and self.tasks:
            self.random.choice(sorted(self.tasks, key=id)).cancel()
        elif chance < 0.90:
            self._script_fault()
        elif chance < 0.95 and self.gates:
            self.random.choice(self.gates).open()
        elif chance < 0.96:
            self._start(self._release_all(manager))
        for _ in range(self.random.choice((0, 0, 1, 2, 5, 12))):
            await asyncio.sleep(0)

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _add(self, manager: Manager) -> None:
        disk = self.random.choice("abcd")
        try:
            await manager.add_virtual_disk(
                f"/storm/{disk}.vhdx",
                read_only=self.random.random() < 0.1,
                vm_id=self.random.choice(("", "", "one", "two")),
                guest_path="" if self.random.random() < 0.8 else f"/mnt/{disk}",
                mount=(config := self.random.choice(CONFIGS)),
            )
        except ValueError:
            assert config is None
        except EXPECTED:
            pass

    async def _release(self, mount: Mount) -> None:
        with contextlib.suppress(HotlunError):
            await mount.release()

    async def _release_all(self, manager: Manager) -> None:
        try:
            await manager.release_all()
        except* HotlunError:
            pass

    def _script_fault(self) -> None:
        operation = self.random.choice(HOST + GUEST)
        backend = self.host if operation in HOST else self.guest
        at = self.random.choice((1, 1, 2, 3))
        match self.random.randrange(4):
            case 0:
                backend.fail(operation, BackendError(f"scripted {operation}"), at=at)
            case 1:
                self.gates.append(backend.stall(operation, at=at))
            case 2:
                backend.lose(operation, happened=True, at=at)
            case _:
                backend.lose(operation, happened=False, at=at)

    def faults_end(self) -> None:
        self.host.clear_faults()
        self.guest.clear_faults()

    async def tasks_end(self) -> None:
        while self.tasks:
            await asyncio.wait(self.tasks)


def assert_consistent(manager: Manager, host: MemoryHostBackend, guest: MemoryGuestBackend) -> None:
    """The snapshots and the backends tell the same story."""
    slots: dict[str, Slot] = {}
    for mount in manager.mounts:
        assert slots.setdefault(mount.serial, mount.slot) == mount.slot
    status = {status.slot: status for status in manager.slots()}
    for serial, slot in slots.items():
        attachment = status[slot].attachment
        if attachment is not None and attachment.serial == serial:
            assert status[slot].state is SlotState.TAKEN
            assert status[slot].holders >= 1
        else:  # only a revoke was left to do when it failed: the slot is free, or another's
            assert serial not in {a.serial for a in host.attached.values()}
    for slot, attachment in host.attached.items():
        assert status[slot].attachment == attachment


def assert_drained(manager: Manager, host: MemoryHostBackend, guest: MemoryGuestBackend) -> None:
    """Nothing is left anywhere, and nothing impossible was asked for on the way."""
    assert host.violations == []
    assert guest.violations == []
    assert manager.mounts == ()
    assert {s.state for s in manager.slots()} <= {SlotState.FREE, SlotState.RESERVED}
    assert host.attached == {}
    assert host.granted == set()
    assert guest.mounted == {}
    assert guest.plugged == set()
    for make, undo in (("attach", "detach"), ("grant_access", "revoke_access")):
        lost = host.effects["lost"] if make == "attach" else 0
        assert host.effects[make] == host.effects[undo] + lost
    assert guest.effects["mount"] == guest.effects["unmount"] + guest.effects["lost"]
