"""What is written down of a disk: facts and holders, for a migration and in a journal.

A record says what is *certain* at the moment it is written. While a step is under way its
thing has the fact that an unknown outcome of it would have (`facts.TABLE`): that is the
intent, and whoever reads it later has to find out. Of the wants only live Mounts are
there: who waited for an answer of the process that wrote it waits no longer.

A key is written down as its seal (`secret.Seal`): it can be told again, and not be used.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from hotlun.facts import Fact
from hotlun.model import Attachment, Disk, DiskKind, MountConfig, Secret, Slot, Verity
from hotlun.owners import Owner
from hotlun.secret import Seal

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION: Final = 1
"""Of a record's document, as a migration has it; a newer hotlun's is refused."""

Identity = tuple[str, int | str, int | str]
"""What makes two disks the same: a sort of name, and two parts of it."""

_PLAIN: Final = {
    f.name: f.default
    for f in sorted(fields(MountConfig), key=lambda f: f.name)
    if f.init and f.name not in ("key", "verity")
}
"""With their defaults, which say what type each is of."""
_T = TypeVar("_T")


class GrantRecord(NamedTuple):
    """Access of a VM to the disk; `plan` is the host backend's own, made at `since`."""

    vm_id: str
    fact: Fact
    plan: str = ""
    since: int = 0


class MountRecord(NamedTuple):
    """A guest mount.

    Args:
        path: in the guest.
        config: how it is mounted.
        fact: whether it is.
        is_due: it went behind our back, and was to be made again.
    """

    path: str
    config: MountConfig
    fact: Fact
    is_due: bool = False


class HolderRecord(NamedTuple):
    """A live Mount.

    Args:
        id: its own.
        number: they are as old as these are low.
        owner: whom it is held for.
        path: the guest mount that it holds, if it holds one.
        lost: why what it held is lost; `""` if it is not.
    """

    id: str
    number: int
    owner: Owner
    path: str | None
    lost: str = ""

    def to_document(self) -> list[Any]:
        """As JSON has it."""
        return [self.id, self.number, *self.owner, self.path, self.lost]


class DiskRecord(NamedTuple):
    """A disk with all that hangs on it; `slot` is None once only revokes are left."""

    serial: str
    slot: Slot
    is_vacated: bool
    disk: Disk
    identity: Identity
    fact: Fact
    grants: tuple[GrantRecord, ...] = ()
    mounts: tuple[MountRecord, ...] = ()
    holders: tuple[HolderRecord, ...] = ()
    reason: str = ""

    def to_document(self, salt: bytes) -> dict[str, Any]:
        """As JSON has it; keys are sealed with the salt."""
        return {
            "version": VERSION,
            **self.place_document(),
            "vacated": self.is_vacated,
            "fact": self.fact,
            "reason": self.reason,
            "grants": [list(grant) for grant in self.grants],
            "mounts": [
                [m.path, m.fact, m.is_due, config_document(m.config, salt)] for m in self.mounts
            ],
            "holders": [holder.to_document() for holder in self.holders],
        }

    def place_document(self) -> dict[str, Any]:
        """The part of it that is the same for as long as the disk is attached."""
        disk = self.disk
        return {
            "serial": self.serial,
            "slot": [self.slot.controller, self.slot.lun],
            "disk": [disk.path, disk.kind, disk.read_only, disk.provider, disk.format],
            "identity": self.identity,
        }

    @classmethod
    def from_document(cls, document: Any) -> DiskRecord:
        """What `to_document` has made.

        Raises:
            ValueError: it is no such document, or a newer hotlun's.
        """
        if isinstance(document, dict) and document.get("version", 0) != VERSION:
            raise ValueError(f"its version is {document.get('version')!r}, not {VERSION}")
        try:
            return cls._read(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"no record of a disk ({error!r})") from error

    @classmethod
    def _read(cls, document: Mapping[str, Any]) -> DiskRecord:
        path, kind, read_only, provider, image_format = document["disk"]
        sort, one, other = document["identity"]
        controller, lun = document["slot"]
        disk = Disk(
            _a(str, path), DiskKind(kind), _a(bool, read_only), _a(str, provider), image_format
        )
        place = Attachment(Slot(_a(int, controller), _a(int, lun)), disk, document["serial"])
        return cls(
            serial=place.serial,
            slot=place.slot,
            is_vacated=_a(bool, document["vacated"]),
            disk=disk,
            identity=(_a(str, sort), _name(one), _name(other)),
            fact=Fact(document["fact"]),
            reason=_a(str, document["reason"]),
            grants=tuple(
                GrantRecord(_a(str, vm_id), Fact(fact), _a(str, plan), _a(int, since))
                for vm_id, fact, plan, since in document["grants"]
            ),
            mounts=tuple(
                MountRecord(_a(str, path), _config(config), Fact(fact), _a(bool, is_due))
                for path, fact, is_due, config in document["mounts"]
            ),
            holders=tuple(
                HolderRecord(
                    _a(str, name),
                    _a(int, number),
                    Owner.read(owner, born),
                    None if path is None else _a(str, path),
                    _a(str, lost),
                )
                for name, number, owner, born, path, lost in document["holders"]
            ),
        )

    def to_text(self, salt: bytes) -> str:
        """One line of JSON."""
        return json.dumps(self.to_document(salt), separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> DiskRecord:
        """What `to_text` has made.

        Raises:
            ValueError: it is no such text, or a newer hotlun's.
        """
        return cls.from_document(loaded(text))


def loaded(text: str) -> dict[str, Any]:
    """A document of ours.

    Raises:
        ValueError: it is none.
    """
    try:
        document = json.loads(text)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"no record of a disk ({error!r})") from error
    if not isinstance(document, dict):
        raise ValueError(f"no record of a disk, which is an object: {text[:40]}")
    return document


def salt_of(records: tuple[DiskRecord, ...]) -> bytes | None:
    """The salt that keys were sealed with; None if there are none."""
    return next(
        (
            salt
            for record in records
            for mount in record.mounts
            if mount.config.key is not None and (salt := mount.config.key.salt) is not None
        ),
        None,
    )


def config_document(config: MountConfig, salt: bytes) -> dict[str, Any]:
    """As JSON has it: what says something; a key is sealed with the salt."""
    document: dict[str, Any] = {name: value for name in _PLAIN if (value := getattr(config, name))}
    if config.key is not None:
        seal = config.key.seal(salt)
        document["key"] = [seal.salt.hex(), seal.digest.hex()]
    if isinstance(config.verity, Verity):
        document["verity"] = [config.verity.root_hash, config.verity.hash_offset]
    return document


def _config(document: Mapping[str, Any]) -> MountConfig:
    members = dict(document)
    for name in members.keys() & _PLAIN.keys():
        default = _PLAIN[name]
        _a(list if isinstance(default, tuple) else type(default), members[name])
    if "key" in members:
        salt, digest = members["key"]
        members["key"] = Secret.sealed(Seal(bytes.fromhex(salt), bytes.fromhex(digest)))
    if "verity" in members:
        members["verity"] = Verity(*members["verity"])
    return MountConfig(**members)


def _a(kind: type[_T], value: Any) -> _T:
    """The value, if it is of exactly this type: to JSON a bool is no number.

    Raises:
        TypeError: it is of another one.
    """
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} where a {kind.__name__} was to be")
    return value


def _name(value: Any) -> int | str:
    """A part of what a disk is known by."""
    return _a(str, value) if isinstance(value, str) else _a(int, value)
