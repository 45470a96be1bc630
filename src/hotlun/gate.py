"""Which calls a Manager lets through: that follows from where it is in its life.

NEW -> ENTERING -> ENTERED -> LEFT, for good; ENTERED <-> FROZEN, which can be left as well.
"""

from __future__ import annotations

from enum import Enum, auto

from hotlun.errors import NotInitializedError


class Phase(Enum):
    """Where a Manager is in its life."""

    NEW = auto()
    ENTERING = auto()
    ENTERED = auto()
    FROZEN = auto()
    """Saved: its disks may be another host's by now."""
    LEFT = auto()


_REFUSALS = {
    Phase.LEFT: "the Manager has been left: make and enter another one",
    Phase.FROZEN: "the Manager has been saved: thaw() it, or go on where it is restored",
}


class Gate:
    """Lets the calls of one Manager through, or refuses them.

    Args:
        survives: whether what is live when the Manager is left stays so.
    """

    def __init__(self, survives: bool) -> None:
        self.phase = Phase.NEW
        self._survives = survives

    def is_open(self) -> bool:
        """Whether it is entered, and not left or saved."""
        return self.phase is Phase.ENTERED

    def is_frozen(self) -> bool:
        """Whether it is saved, and not left or thawed."""
        return self.phase is Phase.FROZEN

    def check(self, *phases: Phase) -> None:
        """Let a call through that is for these phases.

        Raises:
            NotInitializedError: it is another one.
        """
        if self.phase not in phases:
            raise self.refusal()

    def check_ours(self) -> None:
        """Let a release through: also after leaving, unless the journal keeps the Mounts.

        Raises:
            NotInitializedError: they are not this Manager's any more.
        """
        if self.phase is Phase.FROZEN or (self._survives and self.phase is Phase.LEFT):
            raise self.refusal()

    def refusal(self) -> NotInitializedError:
        """Why nothing can be asked for now."""
        words = _REFUSALS.get(self.phase, "the Manager has not been entered: use `async with`")
        return NotInitializedError(words)
