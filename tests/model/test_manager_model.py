"""The Manager against a small model of who holds what, under Hypothesis.

The model knows nothing of slots' tables, facts or workers: it follows the calls
from outside. A disk is *held* by the Mounts that were returned and not given
back. Rules start work, script faults, cancel callers and let the loop turn;
whatever they do, what is held is attached and mounted, the backends see nothing
impossible, and after draining nothing is left.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)
from support.hang import bounded
from support.storm import CONFIGS, EXPECTED, assert_drained

from hotlun import (
    AlreadyReleasedError,
    BackendError,
    DiskConflictError,
    Manager,
    Mount,
    MountConfig,
    OutcomeUnknownError,
    Slot,
)
from hotlun.backends.memory import Gate, MemoryGuestBackend, MemoryHostBackend

if TYPE_CHECKING:
    from collections.abc import Coroutine

DISKS = st.sampled_from(["/model/a.img", "/model/b.img", "/model/c.img"])
OPERATIONS = st.sampled_from(
    ["attach", "detach", "grant_access", "revoke_access", "mount", "unmount", "unplug"]
)


class Held:
    """What the model believes of one Mount: held until its release began."""

    def __init__(self, mount: Mount, config: MountConfig | None) -> None:
        self.mount = mount
        self.config = config
        self.is_certain = True
        """Nobody has tried to release it, so it must be there."""


class ManagerMachine(RuleBasedStateMachine):
    """Adds, releases, cancellations, failures and unknown outcomes in any order."""

    work: Bundle[asyncio.Task[None]] = Bundle("work")
    gates: Bundle[Gate] = Bundle("gates")

    @initialize()
    def enter(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.host = MemoryHostBackend(taken=[Slot(0, 1)])
        self.guest = MemoryGuestBackend(self.host)
        self.manager = Manager(self.host, self.guest, controllers=1, luns_per_controller=4)
        self.held: list[Held] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self._run(self.manager.__aenter__())

    # --- Rules ---

    @rule(
        target=work,
        disk=DISKS,
        config=st.sampled_from(CONFIGS),
        read_only=st.sampled_from([False, False, False, True]),
        vm_id=st.sampled_from(["", "", "one", "two"]),
    )
    def add(
        self, disk: str, config: MountConfig | None, read_only: bool, vm_id: str
    ) -> asyncio.Task[None]:
        return self._start(self._add(disk, config, read_only, vm_id))

    @precondition(lambda self: self.held)
    @rule(target=work, data=st.data())
    def release(self, data: st.DataObject) -> asyncio.Task[None]:
        return self._start(self._release(data.draw(st.sampled_from(self.held))))

    @rule(task=consumes(work))
    def cancel(self, task: asyncio.Task[None]) -> None:
        task.cancel()

    @rule(operation=OPERATIONS, at=st.integers(1, 3))
    def script_failure(self, operation: str, at: int) -> None:
        self._backend(operation).fail(operation, BackendError(f"scripted {operation}"), at=at)

    @rule(operation=OPERATIONS, at=st.integers(1, 3), happened=st.booleans())
    def script_unknown(self, operation: str, at: int, happened: bool) -> None:
        self._backend(operation).lose(operation, happened=happened, at=at)

    @rule(target=gates, operation=OPERATIONS, at=st.integers(1, 3))
    def script_stall(self, operation: str, at: int) -> Gate:
        return self._backend(operation).stall(operation, at=at)

    @rule(gate=consumes(gates))
    def open_gate(self, gate: Gate) -> None:
        gate.open()

    @rule(turns=st.integers(1, 25))
    def turn(self, turns: int) -> None:
        self._run(self._turns(turns))

    @rule()
    def release_all(self) -> None:
        self._start(self._release_all())

    # --- What must hold ---

    @invariant()
    def nothing_impossible_was_asked(self) -> None:
        if hasattr(self, "host"):
            assert self.host.violations == []
            assert self.guest.violations == []

    @invariant()
    def what_is_held_is_there(self) -> None:
        """A Mount that nobody tried to release is attached, mounted and known."""
        for held in getattr(self, "held", ()):
            mount = held.mount
            if not held.is_certain:
                continue
            assert mount in self.manager.mounts
            attachment = self.host.attached[mount.slot]
            assert attachment.serial == mount.serial
            if held.config is not None:
                assert mount.guest_path is not None
                there = self.guest.mounted[mount.guest_path]
                assert there.attachment == attachment
                assert there.config == held.config

    @invariant()
    def one_disk_one_attachment(self) -> None:
        if hasattr(self, "host"):
            disks = [attachment.disk.path for attachment in self.host.attached.values()]
            assert len(disks) == len(set(disks))

    def teardown(self) -> None:
        if not hasattr(self, "host"):
            return
        try:
            self.host.clear_faults()
            self.guest.clear_faults()
            self._run(self._drain())
            assert_drained(self.manager, self.host, self.guest)
        finally:
            self.loop.close()

    # --- The work of the rules ---

    async def _add(
        self, disk: str, config: MountConfig | None, read_only: bool, vm_id: str
    ) -> None:
        try:
            mount = await self.manager.add_virtual_disk(
                disk, mount=config, read_only=read_only, vm_id=vm_id
            )
        except DiskConflictError:
            held = [h.mount for h in self.held if h.mount.disk.path == disk]
            others = len(self.tasks) > 1
            assert held or others, "a conflict with nobody"
        except EXPECTED:
            pass
        else:
            assert mount.disk.read_only == read_only
            self.held.append(Held(mount, config))

    async def _release(self, held: Held) -> None:
        held.is_certain = False
        try:
            await held.mount.release()
        except AlreadyReleasedError:
            pass
        except (BackendError, OutcomeUnknownError):
            return  # it keeps its reference
        assert held.mount not in self.manager.mounts
        with contextlib.suppress(ValueError):
            self.held.remove(held)

    async def _release_all(self) -> None:
        for held in self.held:
            held.is_certain = False
        with contextlib.suppress(ExceptionGroup):
            await self.manager.release_all()

    async def _drain(self) -> None:
        while self.tasks:
            await asyncio.wait(self.tasks)
        await self.manager.release_all()
        await self.manager.__aexit__(None, None, None)

    async def _turns(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    def _backend(self, operation: str) -> MemoryHostBackend | MemoryGuestBackend:
        return self.guest if operation in ("mount", "unmount", "unplug") else self.host

    def _start(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def _run(self, work: Coroutine[object, object, object]) -> None:
        bounded(self.loop, work)


ManagerMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,  # the alarm bounds a hang; time is not the point
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


TestManager = pytest.mark.timeout(0)(ManagerMachine.TestCase)
"""The machine as a test; every run of the loop has an alarm of its own."""
