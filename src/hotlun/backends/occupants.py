"""Which attachment is, or may be, in which slot of a hypervisor that knows them by slot alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from hotlun.model import Attachment, Slot

_MOST_GONE = 1024
"""Attachments that are remembered after they have gone."""


class Occupants:
    """What this process knows of the slots.

    Args:
        own: the slots that the VM's own disks fill; None if nobody has said.
    """

    def __init__(self, own: Collection[Slot] | None) -> None:
        self.own = None if own is None else frozenset(own)
        self._at: dict[Slot, Attachment] = {}
        self._proven: set[Slot] = set()
        """Where a disk of ours has certainly been: nothing of the VM's own is there."""
        self._gone: dict[str, None] = {}
        """Serials, the latest last."""

    def comes(self, attachment: Attachment) -> None:
        """It is about to be attached."""
        self._at[attachment.slot] = attachment

    def is_there(self, attachment: Attachment, before: Attachment | None = None) -> None:
        """It certainly is attached; what may have been there before is not."""
        self._proven.add(attachment.slot)
        if before is not None and before != attachment:
            self.is_gone(before)

    def is_gone(self, attachment: Attachment, before: Attachment | None = None) -> None:
        """It certainly is not; what was there before, if anything was, is there again."""
        if self.at(attachment.slot) == attachment:
            del self._at[attachment.slot]
            if before is not None:
                self._at[attachment.slot] = before
        self._gone[attachment.serial] = None
        while len(self._gone) > _MOST_GONE:
            del self._gone[next(iter(self._gone))]

    def at(self, slot: Slot) -> Attachment | None:
        """What is, or may be, there."""
        return self._at.get(slot)

    def knows(self, attachment: Attachment) -> bool | None:
        """Whether it is, or may be, there; None if this process has had nothing to do with it."""
        known = self.at(attachment.slot)
        if known is not None:
            return known == attachment
        return False if attachment.serial in self._gone else None

    def may_be_another(self, attachment: Attachment) -> bool:
        """Whether what is in its slot may be a disk of the VM's own, that nobody has told of."""
        return self.own is None and attachment.slot not in self._proven
