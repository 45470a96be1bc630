"""What this process knows to be attached to the VM: what it has attached, or has been shown.

QEMU tells of devices and block nodes by their ids, and of sizes in its own words; here
is which attachment that is, how large it is for the guest, and how QEMU was
told of it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from hotlun.backends.nodes import Node
    from hotlun.model import Attachment


def id_of(attachment: Attachment) -> str:
    """The id of an attachment's node and device; 31 characters are the most a node may have."""
    return f"hotlun-{attachment.serial}"


class Attached(NamedTuple):
    """An attachment that the VM has.

    Args:
        attachment: which.
        size: in bytes, as the guest sees it; None if that is not certain.
        node: the arguments of `blockdev-add`; None if another process has made it.
        has_backing: its image rests on another one; said only where another process made the node.
    """

    attachment: Attachment
    size: int | None = None
    node: Node | None = None
    has_backing: bool = False


class Known:
    """All of them, by serial."""

    def __init__(self) -> None:
        self._attached: dict[str, Attached] = {}
        self._coming: dict[str, Attachment] = {}
        """Told of by QEMU maybe, and not attached for certain."""
        self._surveys: list[set[str]] = []

    def __contains__(self, serial: str) -> bool:
        return serial in self._attached

    def size(self, serial: str) -> int | None:
        """In bytes; None if it is not known, or not certain."""
        entry = self._attached.get(serial)
        return entry.size if entry else None

    def find(self, name: str) -> Attachment | None:
        """The attachment whose device or node has this id."""
        serial = name.removeprefix("hotlun-")
        entry = self._attached.get(serial)
        found = entry.attachment if entry else self._coming.get(serial)
        return found if found and id_of(found) == name else None

    def in_slot_order(self) -> list[Attached]:
        """The lowest slot first."""
        return sorted(self._attached.values(), key=lambda entry: entry.attachment.slot)

    def comes(self, attachment: Attachment) -> None:
        """It is being attached: events of it are its own from now on."""
        self._disturb(attachment.serial)
        self._coming[attachment.serial] = attachment

    def is_there(self, entry: Attached) -> None:
        """It is attached."""
        serial = entry.attachment.serial
        self._disturb(serial)
        self._coming.pop(serial, None)
        self._attached[serial] = entry

    def does_not_come(self, attachment: Attachment) -> None:
        """It has not been attached after all."""
        self._disturb(attachment.serial)
        self._coming.pop(attachment.serial, None)

    def goes(self, attachment: Attachment) -> Attached | None:
        """It is being detached, or may be; events of it are still its own. What it was."""
        self.comes(attachment)
        return self._attached.pop(attachment.serial, None)

    def is_gone(self, attachment: Attachment) -> None:
        """It is not attached."""
        self.does_not_come(attachment)
        self._attached.pop(attachment.serial, None)

    def forget(self) -> None:
        """Nothing is attached any more."""
        for quiet in self._surveys:
            quiet.clear()
        self._coming.clear()
        self._attached.clear()

    @contextmanager
    def undisturbed(self, serials: Collection[str]) -> Iterator[set[str]]:
        """Those of the serials that nobody has attached nor detached since."""
        quiet = set(serials)
        self._surveys.append(quiet)
        try:
            yield quiet
        finally:
            self._surveys = [each for each in self._surveys if each is not quiet]

    def _disturb(self, serial: str) -> None:
        for quiet in self._surveys:
            quiet.discard(serial)
