"""Which slot is free, taken, reserved or quarantined. Lowest first."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from hotlun.errors import NoAvailableLocationError
from hotlun.model import Attachment, GuestMount, Slot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class SlotState(StrEnum):
    """What may be done with a slot."""

    FREE = "free"
    TAKEN = "taken"
    RESERVED = "reserved"
    """Somebody else's: never given out and never detached."""
    QUARANTINED = "quarantined"
    """Holds what nobody owns and what could not be undone; given to no other disk."""


@dataclass(frozen=True, slots=True)
class SlotStatus:
    """A snapshot of one slot.

    `holders` counts the Mounts on it; `reason` says why a slot is reserved or
    quarantined, or what went wrong last on a taken one.
    """

    slot: Slot
    state: SlotState
    attachment: Attachment | None = None
    guest_mounts: tuple[GuestMount, ...] = ()
    holders: int = 0
    reason: str = ""


class SlotTable:
    """The slots of a VM: controller 0 LUN 0, 1, 2... then controller 1.

    Args:
        controllers: how many the VM has.
        luns: how many LUNs each of them has.
        usable_controllers: how many of them the guest can use; None for all.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: no controllers or LUNs.
    """

    def __init__(self, controllers: int, luns: int, usable_controllers: int | None = None) -> None:
        for name, count in (("controllers", controllers), ("LUNs", luns)):
            if not isinstance(count, int):
                raise TypeError(f"the number of {name} is an int: {count!r}")
            if count < 1:
                raise ValueError(f"a VM without {name} has no slots: {count}")
        self.controllers = controllers
        self.luns = luns
        usable = controllers if usable_controllers is None else min(controllers, usable_controllers)
        self._end = usable * luns
        self._remedy = (
            f"take another VM: this guest uses no controller above {usable - 1}"
            if usable == usable_controllers
            else "start the VM with more controllers"
        )
        self._fresh = 0
        """The lowest index that was never given out."""
        self._returned: list[int] = []
        """A heap of the indices given back."""
        self._reserved: dict[int, str] = {}
        self._claimed: set[int] = set()
        """Given to whoever named them, out of turn."""
        self._made: dict[int, Slot] = {}
        """Those that were given out, by index."""

    def __iter__(self) -> Iterator[Slot]:
        return (Slot(*divmod(i, self.luns)) for i in range(self.controllers * self.luns))

    def __contains__(self, slot: Slot) -> bool:
        return slot.controller < self.controllers and slot.lun < self.luns

    def reserve(self, slots: Iterable[Slot], reason: str) -> None:
        """Give these out to nobody, ever. Slots that the table does not have are ignored."""
        for slot in slots:
            if slot in self:
                self._reserved.setdefault(self._index(slot), reason)

    def status(self, slot: Slot) -> SlotStatus:
        """Of a slot that holds no disk of ours."""
        index = self._index(slot)
        reason = self._reserved.get(index, "")
        if index >= self._end:
            reason = "the guest cannot use this controller"
        return SlotStatus(slot, SlotState.RESERVED if reason else SlotState.FREE, reason=reason)

    def take(self) -> Slot:
        """The lowest free slot.

        Raises:
            NoAvailableLocationError: there is none.
        """
        while self._returned:
            index = heapq.heappop(self._returned)
            if self._is_to_be_had(index):
                return self._slot(index)
        while self._fresh < self._end:
            index = self._fresh
            self._fresh += 1
            if self._is_to_be_had(index):
                return self._slot(index)
        raise NoAvailableLocationError(
            f"all {self._end} slots that the guest can use are taken, reserved or quarantined: "
            f"release a disk, or {self._remedy}"
        )

    def claim(self, slot: Slot) -> None:
        """This slot, which a disk of before holds; reserved or not."""
        self._claimed.add(self._index(slot))

    def give_back(self, slot: Slot) -> None:
        """The slot is free again."""
        index = self._index(slot)
        self._claimed.discard(index)
        if index < self._fresh:  # else its turn is yet to come
            heapq.heappush(self._returned, index)

    def _is_to_be_had(self, index: int) -> bool:
        return index not in self._reserved and index not in self._claimed

    def _slot(self, index: int) -> Slot:
        slot = self._made.get(index)
        if slot is None:
            slot = self._made[index] = Slot(*divmod(index, self.luns))
        return slot

    def _index(self, slot: Slot) -> int:
        return slot.controller * self.luns + slot.lun
