"""Keeps the journal true: what is to happen to a disk stands there before it happens.

records     what is written down
journal     where
recorder    when, and from what: this file
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
from typing import TYPE_CHECKING

from hotlun import record_checks
from hotlun.errors import JournalError
from hotlun.facts import TABLE, Fact
from hotlun.model import Attachment
from hotlun.records import (
    DiskRecord,
    GrantRecord,
    HolderRecord,
    MountRecord,
    salt_of,
)
from hotlun.wants import DiskState, GrantState, Handle, MountState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hotlun.facts import Thing
    from hotlun.journal import Journal
    from hotlun.records import Identity

_log = logging.getLogger("hotlun")


class Recorder:
    """Writes disks into a journal, each as often as what has to be known of it changes.

    Args:
        journal: None for nowhere; everything is done at once then.
    """

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._is_open = False
        self.salt = secrets.token_bytes(16)
        """What keys are sealed with."""
        self._written: dict[DiskState, str] = {}
        """What stands there of each disk."""
        self._late: dict[DiskState, None] = {}
        """Of which there stands what is not so any more, since that could not be written."""

    def open(self) -> tuple[DiskRecord, ...]:
        """Take the journal; what stands there, oldest first.

        Raises:
            JournalError: it cannot be had, or read.
        """
        if self._journal is None:
            return ()
        documents = self._journal.open()
        self._is_open = True
        try:
            records = understood(documents, repr(self._journal))
        except JournalError:
            self.close()
            raise
        return records

    def seal_as(self, records: tuple[DiskRecord, ...]) -> None:
        """Seal keys with the salt of what there is: one key, one seal."""
        self.salt = salt_of(records) or self.salt

    def close(self) -> None:
        """Nothing is written any more, but for what could not be written before."""
        if self._journal is not None and self._is_open:
            try:
                self.catch_up()
            except JournalError as error:
                _log.error("the journal is not as it should be: %s", error)
            self._is_open = False
            self._written.clear()
            self._late.clear()
            self._journal.close()

    @property
    def is_open(self) -> bool:
        return self._is_open

    def adopt(self, disks: Iterable[DiskState]) -> None:
        """The disks were made of what stands in the journal."""
        self._written.update(dict.fromkeys(disks, ""))

    def bring(self, disks: Iterable[DiskState]) -> None:
        """Write disks down that came from elsewhere: all of them, or none.

        Raises:
            JournalError: it could not be done.
        """
        try:
            for disk in disks:
                self._write(disk)
        except JournalError:
            for disk in list(self._written):
                with contextlib.suppress(JournalError):
                    self._remove(disk)
            raise

    def write(self, disk: DiskState) -> None:
        """Have the journal say what is known of the disk, and what is about to happen to it.

        What could not be written of other disks is written first: otherwise two of them
        could stand there in one slot.

        Raises:
            JournalError: it could not be written; it says what it said before. Or the journal
                was given away already.
        """
        if self._journal is None:
            return
        if not self._is_open:
            raise JournalError("the Manager was left, and its journal closed: enter another one")
        self.catch_up()
        self._write(disk)

    def catch_up(self) -> None:
        """Write what could not be written when it had happened.

        Raises:
            JournalError: it still cannot be.
        """
        for disk in list(self._late):
            self._write(disk)

    def _write(self, disk: DiskState) -> None:
        if self._journal is None:
            return
        if disk.is_gone:
            self._remove(disk)
        else:
            text = record_of(disk).to_text(self.salt)
            if text != self._written.get(disk):
                self._journal.write({name_of(disk.identity): text})
                self._written[disk] = text
        self._late.pop(disk, None)

    def _remove(self, disk: DiskState) -> None:
        if self._journal is not None and disk in self._written:
            self._journal.write({name_of(disk.identity): None})
            del self._written[disk]

    def write_late(self, disk: DiskState) -> None:
        """As `write`, of what has happened already: that it cannot be written undoes nothing.

        What stands there meanwhile is what might have happened, and is found out by asking. It
        is written before anything else is.
        """
        if self._journal is None or not self._is_open:
            return
        try:
            self.write(disk)
        except JournalError as error:
            self._late[disk] = None
            _log.error("disk %s: %s", disk.attachment.disk, error)


def name_of(identity: Identity) -> str:
    """A document's name: what makes it this disk. Its serial can change, with its slot."""
    return json.dumps(identity)


def understood(documents: Iterable[str], name: str) -> tuple[DiskRecord, ...]:
    """The records in a journal's documents.

    Args:
        name: the journal's, for the error.

    Raises:
        JournalError: one of them is none that this hotlun understands.
    """
    try:
        records = tuple(DiskRecord.from_text(document) for document in documents)
        record_checks.check(records)
    except ValueError as error:
        raise JournalError(
            f"{name} holds what cannot be understood: {error}; it is left as it is: use the "
            "hotlun that wrote it",
            operation="journal",
        ) from error
    return records


def record_of(disk: DiskState) -> DiskRecord:
    """What is certain of a disk now."""
    attachment = disk.attachment
    return DiskRecord(
        serial=attachment.serial,
        slot=attachment.slot,
        is_vacated=disk.slot is None or disk.vacated,
        disk=attachment.disk,
        identity=disk.identity,
        fact=_certain(disk, disk),
        reason=disk.reason,
        grants=tuple(
            GrantRecord(grant.vm_id, _certain(disk, grant), grant.plan, grant.since)
            for grant in disk.grants.values()
        ),
        mounts=tuple(
            MountRecord(mount.path, mount.config, fact, mount.is_due)
            for mount in disk.mounts.values()
            if (fact := _certain(disk, mount)) is not Fact.NO or mount.is_wanted
        ),
        holders=tuple(
            HolderRecord(
                handle.id,
                handle.number,
                handle.owner,
                None if handle.mount is None else handle.mount.path,
                handle.lost,
            )
            for handle in disk.handles
            if handle.id
        ),
    )


def _certain(disk: DiskState, thing: Thing) -> Fact:
    """The thing's fact; of one that a step is under way for, the fact that it may have."""
    step = disk.current
    if step is None or step.thing is not thing:
        return thing.fact
    return TABLE[thing.kind][thing.fact][step.action].unknown


def disk_of(record: DiskRecord) -> DiskState:
    """The state that a record was made of, less those who waited.

    What was under way is *maybe* now, and in teardown, so that nobody shares it before
    it has been found out.
    """
    disk = DiskState(Attachment(record.slot, record.disk, record.serial), record.identity)
    disk.fact = record.fact
    disk.reason = record.reason
    if record.is_vacated:
        disk.slot = None
        disk.vacated = True
    disk.closing = record.fact is not Fact.YES
    for grant in record.grants:
        state = disk.grants[grant.vm_id] = GrantState(grant.vm_id)
        state.fact, state.plan, state.since = grant.fact, grant.plan, grant.since
    mounts: dict[str | None, MountState] = {}
    held_paths = {holder.path for holder in record.holders}
    for mount in record.mounts:
        state_of_it = MountState(mount.config, mount.path)
        state_of_it.fact, state_of_it.is_due = mount.fact, mount.is_due
        state_of_it.closing = mount.fact is Fact.MAYBE or mount.path not in held_paths
        mounts[mount.path] = disk.mounts[mount.config] = state_of_it
    for holder in record.holders:
        held = mounts.get(holder.path)
        Handle.restored(
            disk, held, holder.id, number=holder.number, owner=holder.owner, lost=holder.lost
        )
    return disk
