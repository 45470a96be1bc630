"""What dies is not the process: a monitor's connection, the agent, the guest, the whole VM.

The Manager lives on through it. Operations in flight end with our errors; what they have
left unknown is found out; all that is held is whole or lost, and can be released.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from support.agent import kill_agent
from support.clients import Clients
from support.fuse import FusedGuest, FusedHost, Trigger
from support.machine import look
from support.relay import Relay
from torture.figures import Figures
from torture.work import Images, work

from hotlun import HotlunError, Manager, SlotState, VMGoneError
from hotlun.events import DisagreementSettled
from hotlun.journal import SQLiteJournal
from hotlun.vm import Machine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from support.machine import Seen

DEADLINE = 180.0
"""Seconds for whatever is waited for."""
OPERATIONS = 12
POINTS = 36


@dataclass
class Target:
    """What a fault can hit."""

    vm: Machine
    monitor: Relay


async def cut_the_monitor(target: Target) -> None:
    """The monitor's connection is cut; QEMU runs on."""
    target.monitor.cut()


async def kill_the_agent(target: Target) -> None:
    """The agent in the guest is killed, and started again by the guest's init."""
    await kill_agent(target.vm)


async def reset_the_guest(target: Target) -> None:
    """The guest boots anew."""
    await target.vm.reset()


FAULTS: dict[str, Callable[[Target], Awaitable[None]]] = {
    "the monitor cut": cut_the_monitor,
    "the agent killed": kill_the_agent,
    "the guest reset": reset_the_guest,
}


async def strike(name: str, folder: Path, seed: int, rounds: int) -> Figures:
    """So many rounds of one of the FAULTS, on one VM."""
    figures = Figures(f"{name}, seed {seed}")
    chance = random.Random(seed)
    images = Images.make(folder)
    async with AsyncExitStack() as stack:
        vm = await stack.enter_async_context(Machine.start(connect=False))
        monitor = await stack.enter_async_context(Relay.to(vm.qmp_socket, folder))
        target = Target(vm, monitor)
        bare = await look(vm)
        for number in range(rounds):
            life, point = chance.getrandbits(32), chance.randint(1, POINTS)
            trigger = Trigger(point)
            try:
                journal = folder / f"journal{number}"
                async with _managed(monitor.path, vm.agent_socket, journal, trigger) as manager:
                    await _through(manager, images, life, trigger, FAULTS[name](target), figures)
                    await manager.release_all()
                    assert {s.state for s in manager.slots()} == {SlotState.FREE}
                await _is_bare(vm, bare)
            except Exception as error:
                figures.failures.append(f"round {number} (life {life}, at {point}): {error!r}")
                break
            finally:
                figures.rounds += 1
                figures.points[trigger.where] += 1
    return figures


async def _is_bare(vm: Machine, bare: Seen) -> None:
    """As before; but for what another boot makes of its own mounts."""

    def essence(seen: Seen) -> Seen:
        mounts = (replace(mount, super_options=frozenset()) for mount in seen.mounts)
        block = (name for name in seen.block if not name.startswith("loop"))
        return replace(seen, mounts=tuple(mounts), block=tuple(block))

    deadline = time.monotonic() + 60
    while (left := essence(await look(vm))) != essence(bare):
        assert time.monotonic() < deadline, f"the VM is not as before: {left}"
        await asyncio.sleep(0.2)


async def end_the_vm(folder: Path, seed: int, rounds: int) -> Figures:
    """So many VMs whose QEMU is killed; their disks are forgotten, and used by the next VM."""
    figures = Figures(f"QEMU killed, seed {seed}")
    chance = random.Random(seed)
    images = Images.make(folder)
    for number in range(rounds):
        life, point = chance.getrandbits(32), chance.randint(1, POINTS)
        trigger = Trigger(point)
        journal = folder / f"gone{number}"
        try:
            async with AsyncExitStack() as stack:
                vm = await stack.enter_async_context(Machine.start(connect=False))
                manager = await stack.enter_async_context(
                    _managed(vm.qmp_socket, vm.agent_socket, journal, trigger)
                )
                began = time.monotonic()
                killing = _when(trigger, _kill(vm))
                await _all_end(work(manager, images, random.Random(life), OPERATIONS))
                trigger.happen("after its work")
                await _all_end(killing)
                await vm.wait()
                await _gone(manager)
                await manager.forget()
                assert manager.mounts == ()
                figures.seconds.append(time.monotonic() - began)
            assert SQLiteJournal(journal).peek() == []
        except Exception as error:
            figures.failures.append(f"round {number} (life {life}, at {point}): {error!r}")
            break
        finally:
            figures.rounds += 1
            figures.points[trigger.where] += 1
    return figures


async def _kill(vm: Machine) -> None:
    vm.kill()


async def _gone(manager: Manager) -> None:
    """Whatever is asked for ends promptly, and says why."""
    async with asyncio.timeout(10):
        while True:
            try:
                await manager.reconcile()
            except VMGoneError:
                return
            except HotlunError:
                pass
            if not any(status.attachment for status in manager.slots()):
                return  # of nothing there is nothing to ask
            await asyncio.sleep(0.05)  # the process is gone before its sockets are


async def _through(
    manager: Manager,
    images: Images,
    life: int,
    trigger: Trigger,
    fault: Awaitable[None],
    figures: Figures,
) -> None:
    """Work, in the middle of which the fault happens, until all of it is settled."""
    events = manager.events()
    striking = _when(trigger, fault)
    await _all_end(work(manager, images, random.Random(life), OPERATIONS))
    trigger.happen("after its work")
    await _all_end(striking)
    began = time.monotonic()
    async with asyncio.timeout(DEADLINE):
        await _settled(manager)
    figures.seconds.append(time.monotonic() - began)
    events.end()
    async for event in events:
        if isinstance(event, DisagreementSettled):
            figures.met(event.disagreement)


async def _settled(manager: Manager) -> None:
    """Reconcile until nothing disagrees any more."""
    while True:
        try:
            if not await manager.reconcile():
                return
        except HotlunError:
            await asyncio.sleep(0.1)


def _when(trigger: Trigger, fault: Awaitable[None]) -> asyncio.Task[None]:
    async def wait() -> None:
        await trigger.happened.wait()
        await fault

    return asyncio.create_task(wait())


async def _all_end(work: Awaitable[None]) -> None:
    async with asyncio.timeout(DEADLINE):
        await work


@asynccontextmanager
async def _managed(
    qmp_socket: str, agent_socket: str, journal: Path, trigger: Trigger
) -> AsyncIterator[Manager]:
    """A Manager whose every step counts for the trigger."""
    async with Clients.at(qmp_socket, agent_socket) as clients:
        host, guest = FusedHost(clients.host, trigger), FusedGuest(clients.guest, trigger)
        async with Manager(host, guest, journal=SQLiteJournal(journal)) as manager:
            yield manager
