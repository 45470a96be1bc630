"""What an earlier Manager had: its disks stand in the journal, or were saved on another host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotlun.backends import base
from hotlun.errors import HotlunError, JournalError
from hotlun.reconciler import judge_all
from hotlun.recorder import disk_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hotlun.backends.base import HostBackend
    from hotlun.callers import Callers
    from hotlun.reconciler import Findings
    from hotlun.reconciliation import Seen
    from hotlun.recorder import Recorder
    from hotlun.records import DiskRecord
    from hotlun.states import DiskState
    from hotlun.tables import Tables


class Inheritance:
    """The disks that one Manager has from an earlier one.

    Args:
        host: is told what was granted.
        tables: without any disk yet.
        recorder: not open yet.
        callers: are given their Mounts again.
    """

    def __init__(
        self, host: HostBackend, tables: Tables, recorder: Recorder, callers: Callers
    ) -> None:
        self._host = host
        self._tables = tables
        self._recorder = recorder
        self._callers = callers
        self.brought: tuple[DiskRecord, ...] = ()
        """What another host's Manager has saved."""

    def open(self) -> list[DiskState]:
        """Take the journal; the disks, as they were when that was written down.

        Raises:
            JournalError: it cannot be had, or read; or it has disks, and others were saved.
            HotlunError: a disk is at a slot that there is not.
        """
        records = self._recorder.open()
        if records and self.brought:
            raise JournalError(
                "the journal holds disks already, and what was saved cannot be added to them: "
                "give an empty one",
                operation="restore",
            )
        records = records or self.brought
        for record in records:
            if record.slot not in self._tables.slots:
                raise HotlunError(
                    f"{record.disk} is at slot {record.slot}, which this Manager does not have: "
                    "give it as many controllers and LUNs as the one before it had",
                    slot=record.slot,
                    disk=record.disk,
                )
        self._recorder.seal_as(records)
        return [disk_of(record) for record in records]

    def take_up(self, disks: Iterable[DiskState], seen: Seen) -> Findings:
        """Go on with them; in what they are not as they were.

        Raises:
            JournalError: what was saved could not be written down.
        """
        grants = [(grant, disk.attachment.disk) for disk in disks for grant in disk.grants.values()]
        for grant, of_disk in sorted(grants, key=lambda one: one[0].since):
            base.adopt_grant(self._host, of_disk, grant.vm_id, grant.plan)
        if self.brought:
            self._recorder.bring(disks)
        else:
            self._recorder.adopt(disks)
        # Nothing fails from here on: a Manager that could not be entered knows nothing.
        handles = self._tables.take_up(disks)
        found = judge_all(disks, seen)
        for handle in handles:
            self._callers.hold(handle)
        return found
