"""What a guest is asked for in a survey, in requests of bounded size, and what it answered. Pure.

An answer says yes or no to what was asked for, entry by entry; nothing else can be in it.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hotlun.backends import requests
from hotlun.bridge import messages
from hotlun.bridge.documents import MessageError, embedded, printable
from hotlun.bridge.messages import EXTENSION
from hotlun.model import GuestSurvey

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from hotlun.bridge.documents import Document, Fields
    from hotlun.model import Attachment, GuestMount

_MOST_DISKS, _MOST_MOUNTS = 256, 512
"""In one request; an agent would take some more."""
_MOST_BYTES = 256 << 10
"""Of the query in one request, as well: paths can be long."""


class _Entry(NamedTuple):
    """A disk and some of its mounts, and whether the disk itself was asked for."""

    attachment: Attachment
    is_asked: bool
    mounts: tuple[GuestMount, ...]

    def query(self) -> dict[str, Any]:
        slot = self.attachment.slot
        members = {
            "Controller": slot.controller,
            "Lun": slot.lun,
            "Serial": self.attachment.serial,
            "Mounts": [requests.mount_query(mount) for mount in self.mounts],
        }
        return {name: value for name, value in members.items() if value}

    def read(self, answer: Fields) -> GuestSurvey:
        """Raises as `Survey.read`."""
        device, mounts = answer.string("Device"), answer.booleans("Mounts")
        if device not in ("", *messages.DEVICES):
            raise MessageError(f"no device is {printable(device, 32)!r}")
        if len(mounts) not in (0, len(self.mounts)):
            raise MessageError(f"{len(mounts)} mounts, where {len(self.mounts)} were asked for")
        is_there = device == messages.OWN
        if any(mounts) and not is_there:
            raise MessageError("mounts from a disk that is not there")
        return GuestSurvey(
            frozenset({self.attachment.serial} if is_there and self.is_asked else ()),
            frozenset(itertools.compress(self.mounts, mounts)),
            frozenset({self.attachment.serial} if answer.boolean("Busy") else ()),
        )


@dataclass(frozen=True)
class Survey:
    """One request of a survey."""

    entries: Sequence[_Entry]

    @property
    def document(self) -> Document:
        """What to send, as a `MessageType.GET_PROPERTIES`."""
        asked = {"Disks": [entry.query() for entry in self.entries]}
        return messages.properties_request({EXTENSION: asked})

    def read(self, answer: Fields) -> GuestSurvey:
        """What was answered.

        Raises:
            MessageError: it is no answer to this.
        """
        properties = embedded(answer, "Properties")
        if EXTENSION not in properties:
            raise MessageError(f"no {EXTENSION} in the properties")
        found = properties.fields(EXTENSION).objects("Disks")
        if len(found) != len(self.entries):
            raise MessageError(f"{len(found)} disks, where {len(self.entries)} were asked for")
        return together(
            entry.read(fields) for entry, fields in zip(self.entries, found, strict=True)
        )


def over(attachments: Collection[Attachment], mounts: Collection[GuestMount]) -> Iterator[Survey]:
    """The requests that ask for all of these.

    A slot that no guest can be told of is not asked for: nothing can be there.
    """
    of_disk: dict[Attachment, list[GuestMount]] = {one: [] for one in attachments}
    asked = frozenset(of_disk)
    for mount in mounts:
        of_disk.setdefault(mount.attachment, []).append(mount)
    entries: list[_Entry] = []
    size = count = 0
    for attachment, its_mounts in of_disk.items():
        if not requests.is_sayable(attachment.slot):
            continue
        parts: list[tuple[GuestMount, ...]] = [(mount,) for mount in its_mounts] or [()]
        for part in parts:
            entry = _Entry(attachment, attachment in asked, part)
            more = 2 * len(json.dumps(entry.query()))  # each quote in a string takes a backslash
            if entries and (
                len(entries) >= _MOST_DISKS
                or count + len(part) > _MOST_MOUNTS
                or size + more > _MOST_BYTES
            ):
                yield Survey(entries)
                entries, size, count = [], 0, 0
            if entries and entries[-1].attachment == attachment:
                entries[-1] = entries[-1]._replace(mounts=entries[-1].mounts + part)
            else:
                entries.append(entry)
            size += more
            count += len(part)
    if entries:
        yield Survey(entries)


def together(surveys: Iterable[GuestSurvey]) -> GuestSurvey:
    """All that was found by several."""
    found = tuple(surveys)
    return GuestSurvey(
        frozenset().union(*(survey.devices for survey in found)),
        frozenset().union(*(survey.mounts for survey in found)),
        frozenset().union(*(survey.busy for survey in found)),
    )
