"""Asks hypervisor and guest, has what they say judged, and has the worker act on it.

On being asked to, and by itself as long as something is unresolved: as soon as a
connection is back, and else after growing pauses. What is under way is left alone: it is
being found out already, and what was seen of it is not of now.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hotlun import wants
from hotlun.backends import base
from hotlun.errors import BackendError, HotlunError, NotInitializedError, VMGoneError
from hotlun.events import ConnectionRestored, DisagreementSettled, GuestReset, VMResumed
from hotlun.model import GuestMount, GuestSurvey
from hotlun.reconciliation import Disagreement, Seen, is_unresolved, judge, settled

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from hotlun.backends.base import GuestBackend, HostBackend
    from hotlun.events import Event
    from hotlun.states import DiskState
    from hotlun.worker import Worker

    Findings = list[tuple[DiskState, Disagreement]]

_log = logging.getLogger("hotlun")


def judge_all(disks: Iterable[DiskState], seen: Seen) -> Findings:
    """Judge each of them; what was found, with the disk that it is about."""
    return [(disk, one) for disk in disks for one in judge(disk, seen)]


class Reconciler:
    """Brings what is believed of the disks of one VM, and what is, together.

    Args:
        disks: all there are, whenever it is iterated.
        tell: hears of each disagreement that is settled, and what the two sides have to tell.
    """

    def __init__(
        self,
        host: HostBackend,
        guest: GuestBackend,
        disks: Iterable[DiskState],
        worker: Worker,
        tell: Callable[[Event], None],
    ) -> None:
        self._host = host
        self._guest = guest
        self._disks = disks
        self._worker = worker
        self._tell = tell
        self.first_pause, self.longest_pause = 1.0, 30.0
        """Seconds between two tries to resolve what no event announces to be resolvable."""
        self._is_active = False
        self._is_urgent = asyncio.Event()
        self._is_owing = False
        """Whether something has not been found out that was, or was to be, asked about."""
        self._recovery: asyncio.Task[None] | None = None
        self._unwatch: list[Callable[[], None]] = []

    # --- Asking ---

    async def look(self, disks: Collection[DiskState]) -> Seen:
        """Ask both sides what they have of these disks.

        A guest that does not answer now is one that cannot be asked; so is one that cannot
        know our disks, having no serials of ours to know them by.

        Raises:
            HotlunError: the hypervisor does not answer.
        """
        attachments = [disk.attachment for disk in disks if disk.slot is not None]
        mounts = [
            GuestMount(disk.attachment, mount.path, mount.config)
            for disk in disks
            for mount in disk.mounts.values()
        ]
        self._is_owing = bool(attachments)
        if not attachments:
            return Seen(None, None)
        host = await base.host_survey(self._host, attachments)
        if not isinstance(host, Mapping | None):
            raise BackendError(f"what the hypervisor has is no mapping: {type(host).__name__}")
        if not base.sets_serials(self._host):
            self._is_owing = False
            return Seen(host, None)
        try:
            guest = await base.guest_survey(self._guest, attachments, mounts)
            if not isinstance(guest, GuestSurvey | None):
                raise BackendError(f"what the guest has is no GuestSurvey: {type(guest).__name__}")
        except VMGoneError:
            raise
        except HotlunError as error:
            _log.info("the guest does not say what it has: %s", error)
            return Seen(host, None)
        self._is_owing = bool(guest and guest.busy)
        return Seen(host, guest)

    async def check_gone(self) -> None:
        """See that there is no VM any more for what is attached.

        Raises:
            HotlunError: it still runs, or does not answer.
        """
        attached = [disk.attachment for disk in self._disks if disk.slot is not None]
        if not attached:
            return
        try:
            await base.host_survey(self._host, attached)
        except VMGoneError:
            return
        raise HotlunError("the VM still runs, or nobody can tell: release_all(), or force it")

    async def reconcile(self) -> tuple[Disagreement, ...]:
        """Ask, judge, act; what disagreed, and how that was settled.

        Raises:
            NotInitializedError: it was stopped meanwhile: the disks may be another's by now.
            HotlunError: the hypervisor does not answer.
        """
        idle = {disk: disk.steps for disk in self._disks if not disk.working}
        seen = await self.look(idle)
        if not self._is_active:
            raise NotInitializedError(
                "the Manager was left or saved while it asked: no more is due"
            )
        unmoved = {d: None for d, steps in idle.items() if not d.working and d.steps == steps}
        if any(disk not in unmoved for disk in self._disks):
            self._is_owing = True
        if self._is_owing:
            self._begin()
        return await self.act(judge_all(unmoved, seen))

    async def act(self, found: Findings) -> tuple[Disagreement, ...]:
        """Have the worker do what was decided, and say how that ended."""
        concerned = dict.fromkeys(disk for disk, _ in found)
        for disk in concerned:
            wants.retry(disk)
            self._worker.wake(disk)
        await self._worker.idle(concerned)
        outcomes = tuple(settled(one, disk) for disk, one in found)
        for outcome in outcomes:
            _log.warning("%s", outcome)
            self._tell(DisagreementSettled(outcome))
        return outcomes

    # --- By itself ---

    def listen(self) -> None:
        """Hear from both sides what happens without having been asked for."""
        for side in (self._host, self._guest):
            self._unwatch.append(base.watch(side, self._heard))

    def listen_no_more(self) -> None:
        """Nothing is told any more of what the two sides say."""
        while self._unwatch:
            self._unwatch.pop()()

    def _heard(self, event: Event) -> None:
        self._tell(event)
        if isinstance(event, (ConnectionRestored, GuestReset, VMResumed)):
            self.hurry()

    def rested(self, disk: DiskState) -> None:
        """No step is taken for the disk any more: see whether something is unresolved."""
        if is_unresolved(disk):
            self._begin()

    def hurry(self) -> None:
        """What could not be found out before may be found out now."""
        self._is_urgent.set()
        self._begin()

    def start(self) -> None:
        """From now on, do by itself what there is to do."""
        self._is_active = True
        if self._is_owing or self._is_urgent.is_set():
            self._begin()
        for disk in self._disks:
            self.rested(disk)

    async def stop(self) -> None:
        """Do nothing by itself any more; what the worker has begun goes on."""
        self._is_active = False
        task, self._recovery = self._recovery, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def _begin(self) -> None:
        if self._is_active and (self._recovery is None or self._recovery.done()):
            self._recovery = asyncio.get_running_loop().create_task(self._recover())

    async def _recover(self) -> None:
        pause = self.first_pause
        while True:
            try:
                async with asyncio.timeout(pause):
                    await self._is_urgent.wait()
                pause = self.first_pause
            except TimeoutError:
                pause = min(2 * pause, self.longest_pause)
            self._is_urgent.clear()
            try:
                await self.reconcile()
            except VMGoneError as error:
                _log.error("nothing can be resolved any more: %s", error)
                return
            except HotlunError as error:
                _log.info("not to be resolved yet: %s", error)
            except Exception:  # a backend's, which has no such errors
                _log.exception("asking what there is went wrong: it is tried again")
            is_done = not self._is_owing and not any(map(is_unresolved, self._disks))
            if is_done and not self._is_urgent.is_set():
                return
