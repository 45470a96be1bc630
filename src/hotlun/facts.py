"""What has happened to a disk, each thing of it *no*, *yes* or *maybe*, and what may come next.

`TABLE` is the only statement of the moves: facts change by it alone, a missing
entry is the illegal move, and the picture in `docs/lifecycle.md` is drawn from it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Final, NamedTuple


class Fact(StrEnum):
    """Whether a thing has been made. *maybe* is an unknown outcome, and is not *no*."""

    NO = "no"
    YES = "yes"
    MAYBE = "maybe"
    UNPLUGGED = "unplugged"
    """Of an attachment only: still attached, and the guest has let it go."""


NO, YES, MAYBE, UNPLUGGED = Fact
"""Python finds a name sooner than a member; these and the actions' are asked for at each step."""


class Action(StrEnum):
    """A backend's verb."""

    GRANT = "grant_access"
    ATTACH = "attach"
    MOUNT = "mount"
    UNMOUNT = "unmount"
    UNPLUG = "unplug"
    DETACH = "detach"
    REVOKE = "revoke_access"


GRANT, ATTACH, MOUNT, UNMOUNT, UNPLUG, DETACH, REVOKE = Action


class Kind(StrEnum):
    """What can be made and undone."""

    GRANT = "grant"
    ATTACHMENT = "attachment"
    GUEST_MOUNT = "guest mount"


class Outcomes(NamedTuple):
    """The fact after a step that was done, that failed, and whose outcome is unknown."""

    done: Fact
    failed: Fact
    unknown: Fact


TABLE: Final[dict[Kind, dict[Fact, dict[Action, Outcomes]]]] = {
    Kind.GRANT: {
        Fact.NO: {Action.GRANT: Outcomes(Fact.YES, Fact.NO, Fact.MAYBE)},
        Fact.MAYBE: {
            Action.GRANT: Outcomes(Fact.YES, Fact.MAYBE, Fact.MAYBE),
            Action.REVOKE: Outcomes(Fact.NO, Fact.MAYBE, Fact.MAYBE),
        },
        Fact.YES: {Action.REVOKE: Outcomes(Fact.NO, Fact.YES, Fact.MAYBE)},
    },
    Kind.ATTACHMENT: {
        Fact.NO: {Action.ATTACH: Outcomes(Fact.YES, Fact.NO, Fact.MAYBE)},
        Fact.YES: {Action.UNPLUG: Outcomes(Fact.UNPLUGGED, Fact.YES, Fact.MAYBE)},
        Fact.MAYBE: {Action.UNPLUG: Outcomes(Fact.UNPLUGGED, Fact.MAYBE, Fact.MAYBE)},
        Fact.UNPLUGGED: {Action.DETACH: Outcomes(Fact.NO, Fact.UNPLUGGED, Fact.UNPLUGGED)},
    },
    Kind.GUEST_MOUNT: {
        Fact.NO: {Action.MOUNT: Outcomes(Fact.YES, Fact.NO, Fact.MAYBE)},
        Fact.YES: {Action.UNMOUNT: Outcomes(Fact.NO, Fact.YES, Fact.MAYBE)},
        Fact.MAYBE: {Action.UNMOUNT: Outcomes(Fact.NO, Fact.MAYBE, Fact.MAYBE)},
    },
}

UNDOING: Final = (Action.UNMOUNT, Action.UNPLUG, Action.DETACH, Action.REVOKE)
"""The order in which a disk is taken away."""

_UNDOING: Final = {
    kind: {
        fact: next((action for action in moves if action in UNDOING), None)
        for fact, moves in rows.items()
    }
    for kind, rows in TABLE.items()
}


class Thing:
    """Something that the table speaks of: a grant, an attachment or a guest mount."""

    __slots__ = ("closing", "fact", "reason", "stalled")

    kind: ClassVar[Kind]

    def __init__(self) -> None:
        self.fact = NO
        self.closing = False
        """Its teardown has begun: nobody shares it any more."""
        self.stalled = False
        """Its teardown failed with nobody to tell: it waits for the next driver."""
        self.reason = ""
        """What went wrong last, for a person."""

    @property
    def undoing(self) -> Action | None:
        """The step that undoes it, or some of it; None if there is nothing to undo."""
        return _UNDOING[self.kind][self.fact]
