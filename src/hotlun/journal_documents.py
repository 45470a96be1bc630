"""The documents of a journal: one for each disk, and one for each Mount that holds one.

{"version": 2, "serial": SERIAL, ...}                    a disk, as in `records`, less its holders
{"version": 2, "holds": SERIAL, "holder": [ID, ...]}     one of its holders, as there

So who comes to hold a disk, or holds it no more, has nothing written but that. A disk that
comes or goes does so with all who hold it, in one write: one without the other cannot be.

Version 1 had a disk's holders in its own document. It is read as well, and replaced with the
first change of the disk.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from hotlun import record_checks, records
from hotlun.errors import JournalError
from hotlun.records import DiskRecord, config_document, loaded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hotlun.model import MountConfig
    from hotlun.records import GrantRecord, HolderRecord, Identity

VERSION: Final = 2
"""Of the documents; a hotlun of before refuses them, as this one those of a later."""

_encoded = json.JSONEncoder(separators=(",", ":")).encode


def disk_name(identity: Identity) -> str:
    """A disk's document's name: what makes it this disk. Its serial can change, with its slot."""
    return json.dumps(identity)


def holder_name(name: str) -> str:
    """A holder's document's name; no disk's begins like this."""
    return f"holder {name}"


def names(record: DiskRecord) -> Iterator[str]:
    """Of all documents that the record was read from, or can be written as."""
    yield disk_name(record.identity)
    yield from (holder_name(holder.id) for holder in record.holders)


def holder_text(serial: str, holder: HolderRecord) -> str:
    """The document of one that holds the disk with this serial."""
    return _encoded({"version": VERSION, "holds": serial, "holder": holder.to_document()})


class DiskText:
    """Makes the document of one disk, time and again: what seldom changes is encoded once.

    Args:
        identity: what the disk is known by.
        salt: what keys are sealed with.
    """

    __slots__ = ("_configs", "_head", "_salt", "_serial", "name", "written")

    def __init__(self, identity: Identity, salt: bytes) -> None:
        self.name = disk_name(identity)
        self.written: str | None = None
        """What stands there; empty if nobody knows in which words, None if nothing does."""
        self._salt = salt
        self._serial = ""
        self._head = ""
        """What does not change as long as the serial is the same."""
        self._configs: dict[str, tuple[MountConfig, str, str]] = {}
        """Of each guest mount, by path: the config that was encoded, path and config in JSON."""

    def of(self, record: DiskRecord) -> str:
        """The record's document."""
        if record.serial != self._serial:
            head = {"version": VERSION, **record.place_document()}
            self._serial, self._head = record.serial, _encoded(head)[:-1]
        configs, self._configs = self._configs, {}
        mounts = []
        for path, config, fact, is_due in record.mounts:
            kept = configs.get(path)
            if kept is None or kept[0] is not config:  # of equal ones options have their own order
                kept = config, _encoded(path), _encoded(config_document(config, self._salt))
            self._configs[path] = kept
            mounts.append(f'[{kept[1]},"{fact}",{_JSON[is_due]},{kept[2]}]')
        return (
            f'{self._head},"vacated":{_JSON[record.is_vacated]},"fact":"{record.fact}"'
            f',"reason":{_encoded(record.reason)},"grants":{_grants(record.grants)}'
            f',"mounts":[{",".join(mounts)}]}}'
        )


_JSON: Final = {False: "false", True: "true"}


def _grants(grants: tuple[GrantRecord, ...]) -> str:
    return _encoded([list(grant) for grant in grants]) if grants else "[]"


def understood(texts: Iterable[str], name: str) -> tuple[DiskRecord, ...]:
    """The disks in a journal's documents.

    Args:
        name: the journal's, for the error.

    Raises:
        JournalError: something in them is not for this hotlun to understand.
    """
    try:
        disks = _read(texts)
        record_checks.check(disks)
    except ValueError as error:
        raise JournalError(
            f"{name} holds what cannot be understood: {error}; it is left as it is: use the "
            "hotlun that wrote it",
            operation="journal",
        ) from error
    return disks


def _read(texts: Iterable[str]) -> tuple[DiskRecord, ...]:
    """The disks, each with its holders.

    Raises:
        ValueError: one of the documents is none, or holds a disk that is not there.
    """
    disks: list[dict[str, Any]] = []
    apart: dict[str, list[Any]] = {}
    """The holders of those that do not have them inside, by serial."""
    held = []
    for text in texts:
        document = loaded(text)
        if (version := document.get("version")) == records.VERSION:
            disks.append(document)
        elif version != VERSION:
            raise ValueError(f"its version is {version!r}, not {VERSION}")
        elif "holder" in document:
            held.append(document)
        else:
            own = apart.setdefault(str(document.get("serial")), [])
            disks.append({**document, "version": records.VERSION, "holders": own})
    for document in held:
        serial = str(document.get("holds"))
        if serial not in apart:
            raise ValueError(f"a holder of disk {serial[:40]}, which is not there, or has its own")
        apart[serial].append(document["holder"])
    return tuple(map(DiskRecord.from_document, disks))
