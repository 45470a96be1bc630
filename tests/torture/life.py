"""One process at work on a VM that is not its own; at a given point it kills itself.

    python -m torture.life QMP_SOCKET AGENT_SOCKET JOURNAL FOLDER SEED POINT

Points are before and after each write into the journal and each call of a backend
(`support.fuse`). One that does not come to that point kills itself when it has done its work.
It never leaves its Manager.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from support.clients import Clients
from support.fuse import Fuse, FusedGuest, FusedHost, FusedJournal, kill_this_process
from torture.work import Images, work

from hotlun import Manager
from hotlun.journal import SQLiteJournal

OPERATIONS = 12


async def live(qmp: str, agent: str, journal: str, folder: str, seed: int, point: int) -> None:
    """Until the end."""
    fuse = Fuse(point, kill_this_process)
    async with Clients.at(qmp, agent) as clients:
        manager = Manager(
            FusedHost(clients.host, fuse),
            FusedGuest(clients.guest, fuse),
            journal=FusedJournal(SQLiteJournal(journal), fuse),
        )
        await manager.__aenter__()
        await work(manager, Images.made(Path(folder)), random.Random(seed), OPERATIONS)
        kill_this_process(f"at the end of its work, after {fuse.count} points")


if __name__ == "__main__":
    QMP, AGENT, JOURNAL, FOLDER, SEED, POINT = sys.argv[1:]
    asyncio.run(live(QMP, AGENT, JOURNAL, FOLDER, int(SEED), int(POINT)))
