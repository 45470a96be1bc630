"""Managers over the shipped backends of the compute service, and what tests ask of them."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from hotlun import Manager, Slot, SlotState
from hotlun.backends.hcs import HCSGuestBackend, HCSHostBackend
from hotlun.journal import SQLiteJournal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.hcs_on_qemu import HCSOnQEMU

    from hotlun import SlotStatus

PATIENCE = 0.2
"""Seconds that the backends wait for what goes on, in place of many."""


@asynccontextmanager
async def managed(service: HCSOnQEMU, **arguments: Any) -> AsyncIterator[Manager]:
    """A Manager on new backends, which finds out nothing by itself before a test asks it to."""
    async with await made(service, **arguments) as manager:
        manager._reconciler.first_pause = 3600
        yield manager


async def made(service: HCSOnQEMU, **arguments: Any) -> Manager:
    """A Manager that is not entered."""
    guest = await HCSGuestBackend.connect(service, "linux", timeout=PATIENCE)
    return Manager(HCSHostBackend(service, timeout=PATIENCE), guest, **arguments)


def used(manager: Manager) -> list[SlotStatus]:
    """The slots that hold something of ours, or may."""
    states = (SlotState.TAKEN, SlotState.QUARANTINED)
    return [status for status in manager.slots() if status.state in states]


def status_of(manager: Manager, slot: Slot) -> SlotStatus:
    return next(status for status in manager.slots() if status.slot == slot)


def verbs(service: HCSOnQEMU, since: int = 0) -> list[str]:
    """What the service was asked for, in order, as hcsshim calls it."""
    documents = [json.loads(text) for text in service.documents[since:]]
    return [
        "{RequestType} {ResourceType}".format(**document["GuestRequest"])
        if "GuestRequest" in document
        else document["RequestType"]
        for document in documents
    ]


class Life:
    """A process with a Manager on a journal, that ends without a word.

    What was under way in the service goes on there.
    """

    def __init__(self, service: HCSOnQEMU, journal: Path) -> None:
        self._service = service
        self._journal = SQLiteJournal(journal)
        self._others = asyncio.all_tasks()

    async def begin(self) -> Manager:
        manager = await made(self._service, journal=self._journal)
        return await manager.__aenter__()

    async def end(self) -> None:
        while rest := {
            task
            for task in asyncio.all_tasks() - self._others
            if not task.get_name().startswith("service")
        }:
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
        self._journal.close()
