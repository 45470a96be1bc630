"""Many tasks at work on one VM for long, with faults now and then; nothing may grow."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from support.agent import kill_agent
from support.clients import Clients
from support.machine import eventually, look
from support.relay import Relay
from torture.work import Images, operate

from hotlun import HotlunError, Manager, SlotState
from hotlun.events import DisagreementSettled
from hotlun.journal import SQLiteJournal
from hotlun.vm import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TASKS = 16
DEADLINE = 120.0
"""Seconds for what remains when the operations are through."""
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Size:
    """What one process takes."""

    mebibytes: float
    descriptors: int
    tasks: int

    @classmethod
    def now(cls) -> Size:
        """Of this process."""
        gc.collect()
        with open("/proc/self/statm", encoding="ascii") as file:
            resident = int(file.read().split()[1])
        return cls(
            round(resident * PAGE / (1 << 20), 1),
            len(os.listdir("/proc/self/fd")),
            len(asyncio.all_tasks()),
        )


@dataclass
class Soak:
    """What came out."""

    operations: int
    seconds: float
    before: Size
    after: Size
    guest_before: int
    """KiB that the guest has in use (MemTotal - MemAvailable)."""
    guest_after: int
    faults: Counter[str] = field(default_factory=Counter)
    disagreements: Counter[str] = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        yield (
            f"soak: {self.operations} operations from {TASKS} tasks in {self.seconds:.0f} s, "
            + ", ".join(f"{count} times {what}" for what, count in self.faults.items())
        )
        yield f"  before: {self.before}, guest {self.guest_before >> 10} MiB"
        yield f"  after:  {self.after}, guest {self.guest_after >> 10} MiB"
        for what, count in self.disagreements.most_common():
            yield f"  {count:6} {what}"


class _Faults:
    """What happens while others work."""

    def __init__(self, vm: Machine, monitor: Relay, chance: random.Random) -> None:
        self.count: Counter[str] = Counter()
        self._vm = vm
        self._monitor = monitor
        self._chance = chance
        self._running: asyncio.Task[object] | None = None

    def strike(self) -> None:
        """The agent is killed once at a time: a new one takes two seconds."""
        is_killing = self._running is not None and not self._running.done()
        if not is_killing and self._chance.random() < 0.3:
            self.count["the agent killed"] += 1
            self._running = asyncio.create_task(kill_agent(self._vm))
        else:
            self.count["the monitor cut"] += 1
            self._monitor.cut()

    async def end(self) -> None:
        """Until the last one is over."""
        if self._running is not None:
            await self._running


async def soak(folder: Path, seed: int, operations: int, *, fault_every: int = 40) -> Soak:
    """So many operations, after some for warming up, and what they have left.

    Raises:
        AssertionError: the VM or the journal is not as before.
    """
    chance = random.Random(seed)
    images = Images.make(folder, count=12)
    journal = folder / "journal"
    async with AsyncExitStack() as stack:
        vm = await stack.enter_async_context(Machine.start(connect=False))
        monitor = await stack.enter_async_context(Relay.to(vm.qmp_socket, folder))
        faults = _Faults(vm, monitor, chance)
        bare = await look(vm)
        clients = await stack.enter_async_context(Clients.at(monitor.path, vm.agent_socket))
        manager = Manager(clients.host, clients.guest, journal=SQLiteJournal(journal))
        events = manager.events()
        async with manager:
            await _work(manager, images, chance, max(operations // 5, 2 * TASKS), lambda: None)
            await _drain(manager)
            before, guest_before = Size.now(), await _guest_use(vm)
            began = time.monotonic()
            await _work(manager, images, chance, operations, faults.strike, fault_every)
            await faults.end()
            await _drain(manager)
            seconds = time.monotonic() - began
            await _at_rest(before)
            after, guest_after = Size.now(), await _guest_use(vm)
            assert {status.state for status in manager.slots()} == {SlotState.FREE}
        left = await eventually(vm, bare, timeout=60)
        assert left == bare, left
        assert SQLiteJournal(journal).peek() == []
    result = Soak(operations, seconds, before, after, guest_before, guest_after, faults.count)
    async for event in events:
        if isinstance(event, DisagreementSettled):
            found = event.disagreement
            result.disagreements[f"{found.finding}: {found.resolution}"] += 1
    return result


async def _work(
    manager: Manager,
    images: Images,
    chance: random.Random,
    operations: int,
    strike: Callable[[], None],
    every: int = 1 << 30,
) -> None:
    """Several tasks share so many operations."""
    numbers = iter(range(1, operations + 1))

    async def some() -> None:
        for number in numbers:
            if number % every == 0:
                strike()
            await operate(manager, images, chance)

    async with asyncio.TaskGroup() as group:
        for _ in range(TASKS):
            group.create_task(some())


async def _drain(manager: Manager) -> None:
    """Release everything, however often that has to be tried until both sides answer."""
    async with asyncio.timeout(DEADLINE):
        while manager.mounts or any(s.attachment is not None for s in manager.slots()):
            try:
                await manager.release_all()
            except* HotlunError:
                await asyncio.sleep(0.2)


async def _at_rest(before: Size) -> None:
    """Whoever looks again after a pause does so once more, and ends."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DEADLINE):
            while len(asyncio.all_tasks()) > before.tasks:
                await asyncio.sleep(0.1)


async def _guest_use(vm: Machine) -> int:
    done = await vm.run("sync; echo 3 >/proc/sys/vm/drop_caches; cat /proc/meminfo")
    fields = dict(line.split(":", 1) for line in done.stdout.splitlines())
    total, available = (int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return total - available
