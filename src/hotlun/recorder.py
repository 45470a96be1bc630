"""Keeps the journal true: what is to happen to a disk stands there before it happens.

records             what is known of a disk, to be written down
journal_documents   how: a disk, and each that holds it, in one of its own
journal             where
recorder            when, and from what: this file
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING

from hotlun.errors import JournalError
from hotlun.facts import TABLE, Fact
from hotlun.journal_documents import DiskText, holder_name, holder_text, understood
from hotlun.model import Attachment
from hotlun.records import DiskRecord, GrantRecord, HolderRecord, MountRecord, salt_of
from hotlun.states import DiskState, GrantState, Handle, MountState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hotlun.facts import Thing
    from hotlun.journal import Journal
    from hotlun.model import Secret

_log = logging.getLogger("hotlun")


class Recorder:
    """Writes disks and holders into a journal, as often as what has to be known of them changes.

    Args:
        journal: None for nowhere; everything is done at once then.
    """

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._is_open = False
        self.salt = secrets.token_bytes(16)
        """What keys are sealed with."""
        self._is_sealing = journal is not None
        """Whether keys are to be told by their seals."""
        self._texts: dict[DiskState, DiskText] = {}
        """Of each disk that stands there."""
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
        self._is_sealing = self._is_sealing or bool(records)

    async def seal(self, key: Secret) -> None:
        """Have a key's seal worked out before it is needed: that takes too long for a loop."""
        if self._is_sealing and not key.has_seal(self.salt):
            await asyncio.to_thread(key.seal, self.salt)

    def close(self) -> None:
        """Nothing is written any more, but for what could not be written before."""
        if self._journal is not None and self._is_open:
            try:
                self.catch_up()
            except JournalError as error:
                _log.error("the journal is not as it should be: %s", error)
            self._is_open = False
            self._texts.clear()
            self._late.clear()
            self._journal.close()

    @property
    def is_open(self) -> bool:
        return self._is_open

    def adopt(self, disks: Iterable[DiskState]) -> None:
        """The disks were made of what stands in the journal, in whichever words."""
        for disk in disks:
            self._begin(disk).written = ""

    def bring(self, disks: Iterable[DiskState]) -> None:
        """Write disks down that came from elsewhere: all of them, or none.

        Raises:
            JournalError: it could not be done.
        """
        self._write(dict.fromkeys(disks))

    def write(self, disk: DiskState) -> None:
        """Have the journal say what is known of the disk, and what is about to happen to it.

        What could not be written of other disks is written with it: otherwise two of them
        could stand there in one slot.

        Raises:
            JournalError: it could not be written; it says what it said before. Or the journal
                was given away already.
        """
        if self._journal is None:
            return
        if not self._is_open:
            raise JournalError("the Manager was left, and its journal closed: enter another one")
        self._write({**self._late, disk: None})

    def catch_up(self) -> None:
        """Write what could not be written when it had happened.

        Raises:
            JournalError: it still cannot be.
        """
        self._write(self._late)

    def write_late(self, disk: DiskState) -> None:
        """As `write`, of what has happened already: that it cannot be written undoes nothing.

        What stands there meanwhile is what might have happened, and is found out by asking. It
        is written with whatever is written next. So is what was done for an add that is about
        to return: held by nobody, it is undone by whoever finds it, in whichever words.
        """
        if self._journal is None or not self._is_open or _is_promised(disk):
            return
        try:
            self.write(disk)
        except JournalError as error:
            self._late[disk] = None
            _log.error("disk %s: %s", disk.attachment.disk, error)

    def _write(self, disks: dict[DiskState, None]) -> None:
        """All of what changed of these disks in one write."""
        if self._journal is None:
            return
        changes: dict[str, str | None] = {}
        new = {disk: self._collect(disk, changes) for disk in disks}
        if changes:
            self._journal.write(changes)
        for disk, text in new.items():
            if disk.changed:
                disk.changed.clear()
            self._late.pop(disk, None)
            if not disk.is_gone:
                self._texts[disk].written = text
            else:
                self._texts.pop(disk, None)

    def _collect(self, disk: DiskState, changes: dict[str, str | None]) -> str:
        """Add what has to be replaced or removed so that the journal is true of the disk."""
        text = self._texts.get(disk)
        if disk.is_gone:
            if text is None or text.written is None:
                return ""
            changes[text.name], new = None, ""
        else:
            text = text or self._begin(disk)
            new = text.of(record_of(disk))
            if new != text.written:
                changes[text.name] = new
        for handle in disk.changed or ():
            if handle.id:
                changes[holder_name(handle.id)] = (
                    None if handle.is_gone else _holder_text(disk, handle)
                )
        return new

    def _begin(self, disk: DiskState) -> DiskText:
        """From here on it is noted which of its handles change; all of them have, at first."""
        disk.changed = dict.fromkeys(disk.handles)
        text = self._texts[disk] = DiskText(disk.identity, self.salt)
        return text


def _is_promised(disk: DiskState) -> bool:
    """Whether an add is about to return, and nobody has been told of anything else."""
    changed = disk.changed or ()
    is_adding = any(handle.is_live and not (handle.id or handle.is_gone) for handle in changed)
    return is_adding and not any(handle.id for handle in changed)


def _holder_text(disk: DiskState, handle: Handle) -> str:
    return holder_text(disk.attachment.serial, _holder_record(handle))


def record_of(disk: DiskState) -> DiskRecord:
    """What is certain of a disk now, less who holds it."""
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
    )


def with_holders(disk: DiskState) -> DiskRecord:
    """What is certain of a disk now, with its live Mounts."""
    holders = tuple(_holder_record(handle) for handle in disk.handles if handle.id)
    return record_of(disk)._replace(holders=holders)


def _holder_record(handle: Handle) -> HolderRecord:
    path = None if handle.mount is None else handle.mount.path
    return HolderRecord(handle.id, handle.number, handle.owner, path, handle.lost)


def _certain(disk: DiskState, thing: Thing) -> Fact:
    """The thing's fact; of one that a step is under way for, the fact that it may have."""
    if disk.current is None:
        return thing.fact
    action, changing, _ = disk.current
    outcomes = TABLE[thing.kind][thing.fact]
    return outcomes[action].unknown if changing is thing else thing.fact


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
