"""`hotlun journal`: what a journal says, and the end of one whose VM has ended."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from hotlun.cli.logs import debug_option
from hotlun.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hotlun.model import Disk
    from hotlun.records import DiskRecord, GrantRecord


@click.group()
def journal() -> None:
    """See what a VM's journal says, and forget a VM that has ended."""


@journal.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False))
@debug_option
def show(path: str) -> None:
    """Show what stands in the journal at PATH, also while a program uses it.

    A line for each disk, and below it one for each guest mount, grant and holder. "maybe"
    is what was under way when it was written: entering a Manager finds it out.
    """
    from hotlun.journal import SQLiteJournal
    from hotlun.journal_documents import understood

    records = understood(SQLiteJournal(path).peek(), path)
    for record in records:
        for line in _lines(record):
            click.echo(line)
    if not records:
        click.echo("no disk is attached", err=True)


@journal.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False))
@click.option("--yes", is_flag=True, help="Do not ask whether the VM has ended.")
@debug_option
def forget(path: str, yes: bool) -> None:
    """Empty the journal at PATH, of a VM that has ended.

    Access to disks that was granted to the VM is revoked. If the VM still runs its disks
    stay attached, and nobody knows of them any more: release them instead.
    """
    from hotlun.journal import SQLiteJournal
    from hotlun.journal_documents import names, understood

    database = SQLiteJournal(path)
    try:
        records = understood(database.open(), path)
        if records and not yes:
            click.confirm(f"Has the VM ended that had {len(records)} disks?", abort=True)
        granted = [(record.disk, grant) for record in records for grant in record.grants]
        _revoke(sorted(granted, key=lambda one: one[1].since))
        database.write({name: None for record in records for name in names(record)})
    finally:
        database.close()
    click.echo(f"{len(records)} disks are forgotten")


def _revoke(granted: Sequence[tuple[Disk, GrantRecord]]) -> None:
    """Undo grants, oldest first: each by the backend that has made it, as its plan tells."""
    from hotlun.backends.hcs import GRANT_PLAN, revoke_after_the_end

    of_windows = [(disk, grant.vm_id) for disk, grant in granted if grant.plan == GRANT_PLAN]
    others = [(disk, grant) for disk, grant in granted if grant.plan not in ("", GRANT_PLAN)]
    if of_windows:
        import asyncio

        asyncio.run(revoke_after_the_end(of_windows))
    if not others:
        return
    if not hasattr(os, "setxattr"):
        raise UnsupportedError(
            f"access of {others[0][1].vm_id} to {others[0][0]} was granted on Linux: "
            "forget this journal there"
        )
    from hotlun.backends.access import AccessGrants

    access = AccessGrants()
    for disk, grant in others:
        access.adopt(disk, grant.vm_id, grant.plan)
    for disk, grant in others:
        access.revoke(disk, grant.vm_id)


def _lines(record: DiskRecord) -> Iterator[str]:
    where = "no slot" if record.is_vacated else f"slot {record.slot}"
    mode = ", read-only" if record.disk.read_only else ""
    yield f"{record.disk}{mode}: {where}, serial {record.serial}, attached: {record.fact}"
    for mount in record.mounts:
        yield f"  mounted at {mount.path}: {mount.fact}"
    for grant in record.grants:
        yield f"  access of {grant.vm_id}: {grant.fact}"
    for holder in record.holders:
        what = holder.path or "the disk alone"
        whom = f" for {holder.owner.name}" if holder.owner.name else ""
        lost = f", lost: {holder.lost}" if holder.lost else ""
        yield f"  held by {holder.id}{whom}: {what}{lost}"
    if record.reason:
        yield f"  {record.reason}"
