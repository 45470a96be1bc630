"""What must hold of all records of one VM together, before anything is made of them.

A journal is our own text, and is read as if it were not: two disks in one slot, or a
mount without a path of its own, would be given back twice.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from hotlun.facts import TABLE, Fact, Kind
from hotlun.host_paths import HERE

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from hotlun.records import DiskRecord

_ID: Final = re.compile(r"[a-z][a-z0-9]*")
"""A Mount's; in a journal its document is called by it."""
_MOST: Final = 1 << 63
"""Mounts that there can ever have been."""


def check(records: Iterable[DiskRecord]) -> None:
    """Whether they can all be true at once.

    Raises:
        ValueError: two of them have what only one can have, or one is in a state that
            there is not; it says which.
    """
    seen: dict[tuple[str, Hashable], DiskRecord] = {}
    for record in records:
        _check_facts(record)
        _check_holders(record)
        for name, parts in (
            ("grants", [grant.vm_id for grant in record.grants]),
            ("guest mounts", [mount.config for mount in record.mounts]),
            ("guest paths", [mount.path for mount in record.mounts]),
            ("holders", [holder.id for holder in record.holders]),
        ):
            if len(set(parts)) < len(parts):
                raise ValueError(f"two {name} of {record.disk} are the same")
        for what in _its_own(record):
            other = seen.setdefault(what, record)
            if other is not record:
                raise ValueError(f"{other.disk} and {record.disk} have the same {what[0]}")


def _its_own(record: DiskRecord) -> Iterable[tuple[str, Hashable]]:
    """What no other disk has."""
    yield "serial", record.serial
    yield "file", record.identity
    if not record.disk.provider:
        yield "path", HERE.fold(record.disk.path)
    if not record.is_vacated:
        yield "slot", record.slot
    yield from (("guest path", mount.path) for mount in record.mounts)
    yield from (("holder", holder.id) for holder in record.holders)


def _check_facts(record: DiskRecord) -> None:
    of_parts = [
        (Kind.ATTACHMENT, record.fact),
        *((Kind.GRANT, grant.fact) for grant in record.grants),
        *((Kind.GUEST_MOUNT, mount.fact) for mount in record.mounts),
    ]
    for kind, fact in of_parts:
        if fact not in TABLE[kind]:
            raise ValueError(f"no {kind} of {record.disk} is ever {fact!r}")
    if record.is_vacated and record.fact is not Fact.NO:
        raise ValueError(f"{record.disk} is attached without a slot")


def _check_holders(record: DiskRecord) -> None:
    for holder in record.holders:
        if not _ID.fullmatch(holder.id):
            raise ValueError(f"no Mount of {record.disk} is ever called {holder.id[:40]!r}")
        if not 0 <= holder.number < _MOST:
            raise ValueError(f"a Mount of {record.disk} has a number that none can have")
