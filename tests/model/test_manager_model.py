"""The Manager against a small model of who holds what, under Hypothesis.

The model knows nothing of slots' tables, facts or workers: it follows the calls
from outside. A disk is *held* by the Mounts that were returned and not given
back. Rules start work, script faults, cancel callers and let the loop turn; they kill the
process at some point to come, and start another one on its journal; and they pull disks
and unmount things behind the Manager's back. Whatever they do, what is held is attached and
mounted, the backends see nothing impossible, and after draining nothing is left.
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
from support.fuse import Fuse, FusedGuest, FusedHost, FusedJournal, Killed
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
from hotlun.journal import MemoryJournal
from hotlun.journal_documents import understood

if TYPE_CHECKING:
    from collections.abc import Coroutine

DISKS = st.sampled_from(["/model/a.img", "/model/b.img", "/model/c.img"])
OPERATIONS = st.sampled_from(
    ["attach", "detach", "grant_access", "revoke_access", "mount", "unmount", "unplug"]
)

SALT = b"salt"
for config in CONFIGS:
    if config is not None and config.key is not None:
        config.key.seal(SALT)  # now, and not in a thread that takes its time


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
        self.journal = MemoryJournal()
        self.held: list[Held] = []
        self.given_back: set[str] = set()
        self.doubted: set[str] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self._begin()

    def _begin(self) -> None:
        """A process: a Manager on the journal, and a fuse at which it ends."""
        self.fuse = Fuse()
        self.manager = Manager(
            FusedHost(self.host, self.fuse),
            FusedGuest(self.guest, self.fuse),
            controllers=1,
            luns_per_controller=4,
            journal=FusedJournal(self.journal, self.fuse),
        )
        # What time decides is different each time.
        self.manager._reconciler.first_pause = 3600
        self.manager._session.recorder.salt = SALT
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

    @rule(points=st.integers(1, 40))
    def kill(self, points: int) -> None:
        """The process is going to end before or after some write or call of a backend."""
        self.fuse.at = self.fuse.count + points

    @precondition(lambda self: self.host.attached)
    @rule(data=st.data())
    def pull_a_disk(self, data: st.DataObject) -> None:
        # By slot: serials are different each time, and so would their order be.
        serials = [self.host.attached[slot].serial for slot in sorted(self.host.attached)]
        serial = data.draw(st.sampled_from(serials))
        self.host.vanish(serial)
        self._doubt({serial})

    @precondition(lambda self: self.guest.mounted)
    @rule(data=st.data())
    def unmount_in_the_guest(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.guest.mounted)))
        self._doubt({self.guest.mounted[path].attachment.serial})
        self.guest.vanish(path)

    @rule()
    def reset_the_guest(self) -> None:
        self._doubt(set(self.host.used_serials))
        self._run(self._reset())
        self._doubt(set(self.host.used_serials))  # of what was attached meanwhile, too

    @rule()
    def reconcile(self) -> None:
        self._start(self._reconcile())

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
    def who_holds_is_written_down(self) -> None:
        """Nobody else, and each with what is not there any more of what he holds."""
        if hasattr(self, "host"):
            records = understood(self.journal._documents.values(), "the journal")
            written = {h.id: (h.path, h.lost) for record in records for h in record.holders}
            handles = self.manager._tables.mounts
            assert written == {h.id: (h.mount and h.mount.path, h.lost) for h in handles}

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
            self.fuse.at = 0
            self._run(self._drain())
            assert_drained(self.manager, self.host, self.guest)
            assert self.journal.open() == []
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
            self._doubt(self.doubted)

    async def _release(self, held: Held) -> None:
        held.is_certain = False
        try:
            await held.mount.release()
        except AlreadyReleasedError:
            pass
        except (BackendError, OutcomeUnknownError):
            return  # it keeps its reference
        if not self.fuse.is_blown:
            self.given_back.add(held.mount.id)
        assert held.mount not in self.manager.mounts
        with contextlib.suppress(ValueError):
            self.held.remove(held)

    async def _release_all(self) -> None:
        for held in self.held:
            held.is_certain = False
        with contextlib.suppress(ExceptionGroup):
            await self.manager.release_all()

    async def _reset(self) -> None:
        self.guest.reset()

    async def _reconcile(self) -> None:
        await self.manager.reconcile()

    def _doubt(self, serials: set[str]) -> None:
        """Something was done to these behind the Manager's back."""
        self.doubted |= serials
        for held in self.held:
            held.is_certain = held.is_certain and held.mount.serial not in serials

    async def _drain(self) -> None:
        while self.tasks:
            await asyncio.wait(self.tasks)
        await self.manager.release_all()
        await self.manager.__aexit__(None, None, None)

    # --- The end of a process, and the next one ---

    def _end(self) -> None:
        """All that it did has an end, and no effect any more; then another one begins."""
        self.loop.set_exception_handler(lambda *_: None)
        bounded(self.loop, self._die())
        self.journal.close()
        self.host.clear_faults()
        self.guest.clear_faults()
        before = {held.mount.id: held for held in self.held}
        self._begin()
        now = {mount.id: mount for mount in self.manager.mounts}
        missing = [h for name, h in before.items() if h.is_certain and name not in now]
        assert not missing, "a Mount that was held did not survive"
        assert not self.given_back & now.keys(), "a Mount that was given back did survive"
        self.held = []
        for name, mount in now.items():
            held = Held(mount, mount.config)
            held.is_certain = name in before and before[name].is_certain
            self.held.append(held)

    async def _die(self) -> None:
        while rest := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

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
        try:
            bounded(self.loop, work)
        except Killed:
            assert self.fuse.is_blown
        if self.fuse.is_blown:
            self._end()


ManagerMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,  # the alarm bounds a hang; time is not the point
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


TestManager = pytest.mark.timeout(0)(ManagerMachine.TestCase)
"""The machine as a test; every run of the loop has an alarm of its own."""
