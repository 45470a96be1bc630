"""Takes the steps of a disk: one task a disk, alive only while there is work.

The worker is the only place that awaits a backend. It asks `lifecycle` for the
next step, takes it, and tells the outcome; everything else is decided there.
Callers that are cancelled do not touch it: a step in flight is seen through.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from hotlun import lifecycle
from hotlun.backends import base
from hotlun.errors import HotlunError, OutcomeUnknownError, SlotTakenError
from hotlun.facts import ATTACH, GRANT, MOUNT, UNPLUG
from hotlun.model import GuestMount
from hotlun.states import DiskState, GrantState, MountState
from hotlun.wants import halt, has_work

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container

    from hotlun.backends.base import GuestBackend, HostBackend
    from hotlun.states import Step

logger = logging.getLogger("hotlun")
_TASK = "hotlun's steps of a disk"


class Worker:
    """Takes the steps of every disk of one VM, side by side.

    Args:
        settle: answers the wants on a disk and keeps the manager's tables.
        relocate: finds another slot for a disk whose slot turned out taken;
            raises `NoAvailableLocationError` when there is none.
        record: is told of each step before it is taken, and of how the one before went;
            raises `JournalError` if the step must not be taken. None: it is told of none.
        rested: no step is to be taken for the disk for now.
        answered: is told, in place of that, when somebody may have had an answer although
            steps are to be taken.
    """

    def __init__(
        self,
        host: HostBackend,
        guest: GuestBackend,
        *,
        settle: Callable[[DiskState], None],
        relocate: Callable[[DiskState, SlotTakenError], None],
        record: Callable[[DiskState], None] | None,
        rested: Callable[[DiskState], None],
        answered: Callable[[DiskState], None],
    ) -> None:
        self._host = host
        self._guest = guest
        self._settle = settle
        self._relocate = relocate
        self._record = record
        self._rested = rested
        self._answered = answered
        self._tasks: dict[DiskState, asyncio.Task[None]] = {}
        self._when_idle: list[Callable[[], None]] = []

    def wake(self, disk: DiskState) -> None:
        """Something changed in who wants the disk: answer, and take steps if there are any."""
        self._settle(disk)
        if disk.working:
            self._answered(disk)
        elif disk.is_gone or not has_work(disk):
            self._rested(disk)
        else:
            self._answered(disk)
            disk.working = True
            task = asyncio.get_running_loop().create_task(self._run(disk), name=_TASK)
            if disk.working:  # not one that ran at once, as eager tasks do
                self._tasks[disk] = task

    async def idle(self, disks: Container[DiskState] | None = None) -> None:
        """Wait until no step is being taken for any of these disks; None for all there are."""
        while tasks := [
            task
            for disk, task in self._tasks.items()
            if (disks is None or disk in disks) and not task.done()
        ]:
            await asyncio.wait(tasks)

    def when_idle(self, call: Callable[[], None]) -> None:
        """Call this as soon as no step is being taken for any disk."""
        if self._tasks:
            self._when_idle.append(call)
        else:
            call()

    async def _run(self, disk: DiskState) -> None:
        is_told = logger.isEnabledFor(logging.DEBUG)
        try:
            while not disk.is_gone and (step := lifecycle.next_step(disk)) is not None:
                lifecycle.begin(disk, step)
                if is_told:
                    _tell(disk, step, "begins")
                try:
                    await self._call(disk, step)
                except Exception as error:
                    self._failed(disk, step, error)
                except BaseException as error:
                    # Cancelled, by the end of the loop or inside the backend, or interrupted.
                    if self._cut_short(disk, step, error):
                        raise
                else:
                    if is_told:
                        _tell(disk, step, "is done")
                    lifecycle.done(disk, step)
                self._settle(disk)
        finally:
            disk.working = False
            self._tasks.pop(disk, None)
            self._rested(disk)
            while self._when_idle and not self._tasks:
                self._when_idle.pop()()

    def _call(self, disk: DiskState, step: Step) -> Awaitable[None]:
        """The backend's call that takes the step, which is written down before it is made."""
        action, thing, _ = step
        attachment = disk.attachment
        if action is GRANT and isinstance(thing, GrantState):
            plan = base.plan_grant(self._host, attachment.disk, thing.vm_id)
            thing.plan = plan or thing.plan
            thing.since = thing.since or time.time_ns()
        if self._record is not None:
            self._record(disk)
        if action is ATTACH:
            return self._host.attach(attachment)
        if action is UNPLUG:
            return self._guest.unplug(attachment)
        if isinstance(thing, MountState):
            if action is MOUNT:
                identity = base.identity(self._host, attachment)
                mount = GuestMount(attachment, thing.path, thing.config, identity)
                return self._guest.mount(mount)
            return self._guest.unmount(GuestMount(attachment, thing.path, thing.config))
        if isinstance(thing, GrantState):
            change = self._host.grant_access if action is GRANT else self._host.revoke_access
            return change(attachment.disk, thing.vm_id)
        return self._host.detach(attachment)

    def _failed(self, disk: DiskState, step: Step, error: Exception) -> None:
        """The call has raised; a slot that turned out taken is no failure if there is another."""
        action, *_ = step
        if isinstance(error, SlotTakenError) and action is ATTACH:
            _tell(disk, step, f"found its slot taken ({error})")
            try:
                self._relocate(disk, error)
            except HotlunError as nowhere:
                error = nowhere
            else:
                lifecycle.called_off(disk)
                return
        _tell(disk, step, f"failed ({error})")
        lifecycle.failed(disk, step, error)

    def _cut_short(self, disk: DiskState, step: Step, error: BaseException) -> bool:
        """Nobody knows what the call has done; whether the worker is to end."""
        _tell(disk, step, f"was cut short ({error!r})")
        lifecycle.failed(disk, step, _unknown(disk, step, error))
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task and not task.cancelling():
            return False
        halt(disk)
        self._settle(disk)
        return True


def _tell(disk: DiskState, step: Step, ending: str) -> None:
    """One line of the log."""
    action, thing, _ = step
    what = ""
    if isinstance(thing, MountState):
        what = f" of {thing.path}"
    elif isinstance(thing, GrantState):
        what = f" for {thing.vm_id}"
    attachment = disk.attachment
    logger.debug(
        "%s%s %s: disk %s at slot %s, serial %s",
        *(action, what, ending, attachment.disk, attachment.slot, attachment.serial),
    )


def _unknown(disk: DiskState, step: Step, error: BaseException) -> OutcomeUnknownError:
    action, *_ = step
    attachment = disk.attachment
    unknown = OutcomeUnknownError(
        f"{action} of {attachment.disk} at slot {attachment.slot} was cut short: "
        "look at the VM, or release again, to bring it to a known state",
        operation=action,
        slot=attachment.slot,
        disk=attachment.disk,
    )
    unknown.__cause__ = error
    return unknown
