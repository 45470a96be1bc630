"""The process ends at each of its steps, in memory: the next one finds out, settles, and drains.

Other than a Manager that is left, one that is killed has no last word. What it had begun
has happened or not; what it wrote is all that is known of it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from support.fuse import Fuse, FusedGuest, FusedHost, FusedJournal
from support.memory import EXT4
from support.script import run_script

from hotlun import Manager, Slot, SlotState
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.journal import SQLiteJournal

if TYPE_CHECKING:
    from pathlib import Path

PATHS = ("/crash/a.img", "/crash/b.img", "/crash/c.img")


class World:
    """What outlives the process: a VM in memory, and the journal's file.

    Args:
        can_be_asked: whether hypervisor and guest say what they have.
    """

    def __init__(self, journal: Path, *, can_be_asked: bool = True) -> None:
        self.host = MemoryHostBackend(surveys=can_be_asked)
        self.guest = MemoryGuestBackend(self.host, surveys=can_be_asked)
        self.can_be_asked = can_be_asked
        self.path = journal

    async def live_and_die(self, fuse: Fuse) -> None:
        """One process: it ends at the fuse's point, or with its script, and leaves nothing."""
        journal = FusedJournal(SQLiteJournal(self.path), fuse)
        manager = Manager(FusedHost(self.host, fuse), FusedGuest(self.guest, fuse), journal=journal)

        async def live() -> None:
            await manager.__aenter__()
            await run_script(manager, PATHS, EXT4, "user")

        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *_: None)  # tasks die of the fuse, and nobody asks them
        outside = asyncio.all_tasks()
        life, end = asyncio.ensure_future(live()), asyncio.ensure_future(fuse.blown.wait())
        await asyncio.wait([life, end], return_when=asyncio.FIRST_COMPLETED)
        if not fuse.is_blown:
            await life
        fuse.is_blown = True  # whatever its tasks still try has no effect
        while rest := asyncio.all_tasks() - outside:
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
        await asyncio.gather(life, end, return_exceptions=True)
        journal.close()

    async def drain(self) -> None:
        """Another process: it settles what it finds, and releases all."""
        async with Manager(self.host, self.guest, journal=SQLiteJournal(self.path)) as manager:
            for mount in manager.mounts:
                assert not mount.lost
                if mount.guest_path is not None and self.can_be_asked:
                    assert self.host.attached[mount.slot].serial == mount.serial
                    assert self.guest.mounted[mount.guest_path].config == mount.config
            held = {mount.serial for mount in manager.mounts}
            assert {a.serial for a in self.host.attached.values()} <= held
            await manager.release_all()
            states = {status.state for status in manager.slots()}
            assert states <= {SlotState.FREE, SlotState.RESERVED}

    def assert_empty(self) -> None:
        assert self.host.violations == self.guest.violations == []
        assert self.host.attached == {}
        assert self.host.granted == set()
        assert self.guest.mounted == {}
        assert self.guest.plugged == set()
        journal = SQLiteJournal(self.path)
        assert journal.open() == []
        journal.close()
        for make, undo in (("attach", "detach"), ("grant_access", "revoke_access")):
            assert self.host.effects[make] == self.host.effects[undo]
        assert self.guest.effects["mount"] == self.guest.effects["unmount"]


async def count_points(path: Path) -> list[str]:
    fuse = Fuse()
    await World(path).live_and_die(fuse)
    return fuse.points


@pytest.mark.timeout(300)
@pytest.mark.parametrize("can_be_asked", [True, False])
async def test_every_point_of_a_script(tmp_path: Path, can_be_asked: bool) -> None:
    """Killed there, and everything is found again: what is held is whole, the rest is undone.

    Also where neither side can be asked: undoing can be repeated.
    """
    points = await count_points(tmp_path / "all")
    assert {name.partition(" ")[0] for name in points} == {"before", "after"}
    assert {name.split()[-1] for name in points} >= {
        *("attach", "mount", "unmount", "unplug", "detach", "grant_access", "revoke_access"),
        "journal",
    }
    for number in range(1, len(points) + 1):
        world = World(tmp_path / f"{number}", can_be_asked=can_be_asked)
        fuse = Fuse(number)
        await world.live_and_die(fuse)
        assert fuse.points[-1] == points[number - 1]
        await world.drain()
        world.assert_empty()


@pytest.mark.timeout(300)
async def test_killed_again_while_it_settles(tmp_path: Path) -> None:
    """The second process dies as well, at each point of its own; the third drains."""
    points = await count_points(tmp_path / "all")
    for number in range(1, len(points) + 1, 7):
        for second in range(1, 12):
            world = World(tmp_path / f"{number}-{second}")
            await world.live_and_die(Fuse(number))
            await world.live_and_die(Fuse(second))
            await world.drain()
            world.assert_empty()


async def test_a_disk_that_moves_to_another_slot_is_never_out_of_the_journal(
    tmp_path: Path,
) -> None:
    """It gets a new serial with its new slot, and what was granted before is still known."""
    for at in range(1, 14):
        world = World(tmp_path / f"{at}")
        world.host = MemoryHostBackend(taken=[Slot(0, 0)])
        world.guest = MemoryGuestBackend(world.host)
        await world.live_and_die(Fuse(at))
        await world.drain()
        world.assert_empty()
