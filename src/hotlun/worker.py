"""Takes the steps of a disk: one task a disk, alive only while there is work.

The worker is the only place that awaits a backend. It asks `lifecycle` for the
next step, takes it, and tells the outcome; everything else is decided there.
Callers that are cancelled do not touch it: a step in flight is seen through.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from hotlun import lifecycle
from hotlun.errors import HotlunError, OutcomeUnknownError, SlotTakenError
from hotlun.facts import Action, Step
from hotlun.model import GuestMount
from hotlun.wants import DiskState, GrantState, MountState, halt

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.backends.base import GuestBackend, HostBackend

logger = logging.getLogger("hotlun")


class Worker:
    """Takes the steps of every disk of one VM, side by side.

    Args:
        settle: answers the wants on a disk and keeps the manager's tables.
        relocate: finds another slot for a disk whose slot turned out taken;
            raises `NoAvailableLocationError` when there is none.
    """

    def __init__(
        self,
        host: HostBackend,
        guest: GuestBackend,
        *,
        settle: Callable[[DiskState], None],
        relocate: Callable[[DiskState, SlotTakenError], None],
    ) -> None:
        self._host = host
        self._guest = guest
        self._settle = settle
        self._relocate = relocate
        self._tasks: set[asyncio.Task[None]] = set()

    def wake(self, disk: DiskState) -> None:
        """Something changed in who wants the disk: answer, and take steps if there are any."""
        self._settle(disk)
        if not disk.working and lifecycle.next_step(disk) is not None:
            disk.working = True
            task = asyncio.get_running_loop().create_task(self._run(disk))
            if not task.done():
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _run(self, disk: DiskState) -> None:
        try:
            while (step := lifecycle.next_step(disk)) is not None:
                lifecycle.begin(disk, step)
                await self._take(disk, step)
                self._settle(disk)
        finally:
            disk.working = False

    async def _take(self, disk: DiskState, step: Step) -> None:
        logger.debug("%s", _Words(disk, step, "begins"))
        try:
            await self._perform(disk, step)
        except SlotTakenError as error:
            self._move(disk, step, error)
        except Exception as error:
            logger.debug("%s: %s", _Words(disk, step, "failed"), error)
            lifecycle.failed(disk, error)
        except BaseException as error:
            # Cancelled, by the end of the loop or inside the backend, or interrupted.
            logger.debug("%s: %r", _Words(disk, step, "was cut short"), error)
            lifecycle.failed(disk, _cut_short(disk, step, error))
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task and not task.cancelling():
                return
            halt(disk)
            self._settle(disk)
            raise
        else:
            logger.debug("%s", _Words(disk, step, "is done"))
            lifecycle.done(disk)

    def _move(self, disk: DiskState, step: Step, error: SlotTakenError) -> None:
        if step.action is not Action.ATTACH:
            lifecycle.failed(disk, error)
            return
        logger.debug("%s: %s", _Words(disk, step, "found its slot taken"), error)
        try:
            self._relocate(disk, error)
        except HotlunError as nowhere:
            lifecycle.failed(disk, nowhere)
        else:
            lifecycle.called_off(disk)

    async def _perform(self, disk: DiskState, step: Step) -> None:
        attachment = disk.attachment
        match step:
            case (Action.ATTACH, _):
                await self._host.attach(attachment)
            case (Action.DETACH, _):
                await self._host.detach(attachment)
            case (Action.UNPLUG, _):
                await self._guest.unplug(attachment)
            case (Action.MOUNT, MountState(config=config, path=path)):
                await self._guest.mount(GuestMount(attachment, path, config))
            case (Action.UNMOUNT, MountState(config=config, path=path)):
                await self._guest.unmount(GuestMount(attachment, path, config))
            case (Action.GRANT, GrantState(vm_id=vm_id)):
                await self._host.grant_access(attachment.disk, vm_id)
            case (Action.REVOKE, GrantState(vm_id=vm_id)):
                await self._host.revoke_access(attachment.disk, vm_id)
            case _:
                raise AssertionError(f"no such step: {step}")


class _Words:
    """A step in words, put together only when somebody reads the log."""

    def __init__(self, disk: DiskState, step: Step, ending: str) -> None:
        self._what = (disk, step, ending)

    def __str__(self) -> str:
        disk, step, ending = self._what
        attachment = disk.attachment
        match step.thing:
            case MountState(path=path):
                what = f" of {path}"
            case GrantState(vm_id=vm_id):
                what = f" for {vm_id}"
            case _:
                what = ""
        return (
            f"{step.action}{what} {ending}: disk {attachment.disk} "
            f"at slot {attachment.slot}, serial {attachment.serial}"
        )


def _cut_short(disk: DiskState, step: Step, error: BaseException) -> OutcomeUnknownError:
    attachment = disk.attachment
    unknown = OutcomeUnknownError(
        f"{step.action} of {attachment.disk} at slot {attachment.slot} was cut short: "
        "look at the VM, or release again, to bring it to a known state",
        operation=step.action,
        slot=attachment.slot,
        disk=attachment.disk,
    )
    unknown.__cause__ = error
    return unknown
