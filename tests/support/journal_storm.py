"""A storm over several Managers in a row, on one journal that has no room now and then.

Besides what any storm does, disks are pulled, mounts undone in the guest, the guest is reset;
it is asked what there is, which fails or takes its time; the Manager is saved and thawed, and
left in the middle of everything. The next one goes on with exactly the same Mounts.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from support.storm import CONFIGS, EXPECTED, Storm, assert_drained

from hotlun import AlreadyReleasedError, BackendError, JournalError, Manager
from hotlun.facts import Fact
from hotlun.journal import MemoryJournal
from hotlun.journal_documents import understood
from hotlun.recorder import with_holders

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from hotlun.records import DiskRecord

MORE_EXPECTED = (*EXPECTED, JournalError, AlreadyReleasedError)
LIVES = 3


class ShortJournal(MemoryJournal):
    """A journal that has no room with some probability, and says nothing that cannot be so."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance = chance
        self.fails = 0.0

    def write(self, changes: Mapping[str, str | None]) -> None:
        if self._chance.random() < self.fails:
            raise JournalError("scripted: no room")
        super().write(changes)
        self.records()

    def records(self) -> tuple[DiskRecord, ...]:
        return understood(self._documents.values(), "the journal")


class JournalStorm(Storm):
    """The storm of one seed."""

    def __init__(self, seed: int, operations: int = 40) -> None:
        super().__init__(seed, operations)
        self.journal = ShortJournal(self.random)

    async def run(self) -> None:
        for _ in range(LIVES):
            await self._live()
        self.faults_end()
        manager = self._manager()
        async with manager:
            await manager.release_all()
        assert self.journal.records() == ()
        assert_drained(manager, self.host, self.guest)

    def _manager(self) -> Manager:
        manager = Manager(
            self.host, self.guest, controllers=2, luns_per_controller=3, journal=self.journal
        )
        manager._reconciler.first_pause, manager._reconciler.longest_pause = 0.002, 0.01
        return manager

    async def _live(self) -> None:
        """One process: it is left, and the journal has what is held, and nothing else."""
        self.faults_end()
        manager = self._manager()
        try:
            async with manager:
                try:
                    for _ in range(self.operations):
                        await self._operate(manager)
                        self._assert_written(manager)
                finally:  # one that fails must not hang as well
                    self.journal.fails = 0
                    for gate in self.gates:
                        gate.open()
                if self.random.random() < 0.5:
                    await self.tasks_end()
        except* MORE_EXPECTED:
            pass
        # As it is now: who asks for more is refused, which is a disk's reason, and nobody's news.
        left = by_serial(map(with_holders, manager._tables.disks))
        self.faults_end()
        await self.tasks_end()
        held = {mount.id for mount in manager.mounts}
        assert held == {h.id for record in self.journal.records() for h in record.holders}
        assert by_serial(self.journal.records()) == left

    def _assert_written(self, manager: Manager) -> None:
        """The journal knows of all there is, and of who holds it, unless it had no room."""
        if not manager._session.recorder.is_open:
            return
        records = {record.serial: record for record in self.journal.records()}
        for slot, attachment in self.host.attached.items():
            record = records[attachment.serial]
            assert record.fact is not Fact.NO
            assert record.slot == slot
        facts = {(r.serial, mount.path): mount.fact for r in records.values() for mount in r.mounts}
        for path, there in self.guest.mounted.items():
            assert facts[there.attachment.serial, path] is not Fact.NO
        granted = {(str(r.disk), grant.vm_id) for r in records.values() for grant in r.grants}
        assert granted >= self.host.granted
        if not manager._session.recorder._late:
            held = {holder.id for record in records.values() for holder in record.holders}
            assert held == {mount.id for mount in manager.mounts}

    async def _operate(self, manager: Manager) -> None:
        side = self.random.choice((self.host, self.guest))
        match self.random.randrange(40):
            case 0 | 1 | 2:
                self.journal.fails = self.random.choice((0, 0, 0.1, 0.5))
            case 3 | 4:
                self._start(self._quietly(manager.reconcile))
            case 5 if self.host.attached:
                serials = sorted(a.serial for a in self.host.attached.values())
                self.host.vanish(self.random.choice(serials))
            case 6 | 7 if self.guest.mounted:
                self.guest.vanish(self.random.choice(sorted(self.guest.mounted)))
            case 8:
                self.guest.reset()
            case 9:
                self._start(self._save(manager))
            case 10:
                self._start(self._quietly(lambda: manager.release_owner("one")))
            case 11:
                side.fail("survey", BackendError("scripted survey"))
            case 12:
                self.gates.append(side.stall("survey"))
            case 13:
                side.lose("survey")
            case 14:
                await asyncio.sleep(0.003)  # the pause after which is asked again is shorter
            case _:
                await super()._operate(manager)

    async def _add(self, manager: Manager) -> None:
        config = self.random.choice(CONFIGS)
        disk = self.random.choice("abcd")
        stated = config is not None and self.random.random() < 0.2

        async def add() -> object:
            return await manager.add_virtual_disk(
                f"/storm/{disk}.vhdx",
                vm_id=self.random.choice(("", "", "one", "two")),
                guest_path=f"/mnt/{disk}" if stated else "",
                mount=config,
                owner=self.random.choice(("", "one")),
            )

        await self._quietly(add)

    async def _save(self, manager: Manager) -> None:
        async def save() -> None:
            await manager.save()
            await asyncio.sleep(0)
            manager.thaw()

        await self._quietly(save)

    async def _quietly(self, work: Callable[[], Awaitable[object]]) -> None:
        try:
            await work()
        except* MORE_EXPECTED:
            pass


def by_serial(records: Iterable[DiskRecord]) -> dict[str, DiskRecord]:
    """The records, whose order is nobody's business; nor is that of their holders."""
    return {
        record.serial: record._replace(holders=tuple(sorted(record.holders))) for record in records
    }
