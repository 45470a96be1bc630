"""One disk as it is known: what hangs on it, who holds it, and who waits for an answer.

Data, with no decision in it: what the facts of a disk may become is in `facts`, what follows
from who wants it in `wants`, and both together say in `lifecycle` what is next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from hotlun.facts import Action, Kind, Thing
from hotlun.owners import NOBODY

if TYPE_CHECKING:
    from hotlun.model import Attachment, MountConfig, Slot
    from hotlun.owners import Owner
    from hotlun.records import Identity


class Answer(Protocol):
    """Where a caller waits; an `asyncio.Future` is one."""

    def done(self) -> bool: ...
    def set_result(self, result: None, /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...


class _Answered:
    """Where nobody waits."""

    def done(self) -> bool:
        return True

    def set_result(self, result: None, /) -> None:
        """Nobody hears it."""

    def set_exception(self, exception: BaseException, /) -> None:
        """Nobody hears it."""


_ANSWERED = _Answered()


class GrantState(Thing):
    """The access of one VM to the disk."""

    __slots__ = ("plan", "since", "vm_id")

    kind = Kind.GRANT

    def __init__(self, vm_id: str) -> None:
        super().__init__()
        self.vm_id = vm_id
        self.plan = ""
        """What it changes, in the host backend's own words."""
        self.since = 0
        """When that was planned, in nanoseconds since the epoch: plans build on each other."""


class MountState(Thing):
    """One guest mount of the disk, and who holds it."""

    __slots__ = ("config", "handles", "is_due", "path")

    kind = Kind.GUEST_MOUNT

    def __init__(self, config: MountConfig, path: str) -> None:
        super().__init__()
        self.config = config
        self.path = path
        self.handles: dict[Handle, None] = {}
        self.is_due = False
        """It went behind our back, and is to be made again for those who hold it."""

    @property
    def is_wanted(self) -> bool:
        """Whether a Mount holds it: if it is not there, it has to be made again."""
        return not self.closing and any(h.is_live and not h.is_releasing for h in self.handles)


class DiskState(Thing):
    """The attachment of a disk with all that hangs on it.

    The tables read and clear `left`, `unmounted` and `vacated` after each
    `settle`, and drop the disk once it `is_gone`.
    """

    __slots__ = (
        "active",
        "attachment",
        "changed",
        "current",
        "drivers",
        "failures",
        "grants",
        "handles",
        "identity",
        "is_gone",
        "left",
        "mounts",
        "slot",
        "steps",
        "unmounted",
        "vacated",
        "waiters",
        "working",
    )

    kind = Kind.ATTACHMENT

    def __init__(self, attachment: Attachment, identity: Identity) -> None:
        super().__init__()
        self.attachment = attachment
        self.identity = identity
        """What the disk is known by."""
        self.slot: Slot | None = attachment.slot
        """The slot it holds; None when the slot is given back."""
        self.grants: dict[str, GrantState] = {}
        self.mounts: dict[MountConfig, MountState] = {}
        self.handles: dict[Handle, None] = {}
        self.active: dict[Handle, None] = {}
        """The handles among them that wait for an answer."""
        self.changed: dict[Handle, None] | None = None
        """The handles of which something is not as it is written down; None if nothing is."""
        self.waiters: list[Waiter] = []
        self.failures: list[Failure] = []
        self.current: Step | None = None
        self.steps = 0
        """How many were begun: whether what was seen of the disk is of now."""
        self.drivers: Sequence[Handle | Waiter] = ()
        """Who gets the error if the current step fails; nobody owns it if empty."""
        self.working = False
        """A worker is on it."""
        self.is_gone = False
        self.vacated = False
        self.left: list[Handle] = []
        self.unmounted: list[MountState] = []


class Handle:
    """One holder of references: an add that is under way, or the Mount it became."""

    __slots__ = (
        "answer", "disk", "id", "is_gone", "is_live", "lost", "mount", "number", "owner", "vm_id"
    )  # fmt: skip

    def __init__(
        self,
        disk: DiskState,
        mount: MountState | None,
        vm_id: str,
        answer: Answer,
        owner: Owner = NOBODY,
    ) -> None:
        self.disk = disk
        self.mount = mount
        self.vm_id = vm_id
        self.answer = answer
        """Of the add, or of the last release; once it is done, nobody waits."""
        self.owner = owner
        self.id = ""
        """The Mount's, once there is one."""
        self.number = 0
        """Older Mounts have lower ones."""
        self.lost = ""
        """Why what it holds is not there any more."""
        self.is_live = False
        self.is_gone = False

    @classmethod
    def restored(
        cls,
        disk: DiskState,
        mount: MountState | None,
        name: str,
        *,
        number: int,
        owner: Owner,
        lost: str,
    ) -> Handle:
        """A live Mount of an earlier process."""
        handle = cls(disk, mount, "", _ANSWERED, owner)
        handle.id, handle.number, handle.lost = name, number, lost
        handle.is_live = True
        disk.handles[handle] = None
        if mount is not None:
            mount.handles[handle] = None
        return handle

    @property
    def is_releasing(self) -> bool:
        return self.is_live and not self.answer.done()


class Waiter:
    """A caller that cannot begin before a teardown is over, and drives it meanwhile."""

    __slots__ = ("answer", "is_adding", "thing")

    def __init__(self, answer: Answer, thing: DiskState | MountState, is_adding: bool) -> None:
        self.answer = answer
        self.thing = thing
        self.is_adding = is_adding
        """It is an add's; otherwise nothing but the teardown is wanted."""


class Failure:
    """An add that failed, kept until the clean-up has had its say (as notes on the error)."""

    __slots__ = ("answer", "error", "mount")

    def __init__(self, answer: Answer, error: BaseException, mount: MountState | None) -> None:
        self.answer = answer
        self.error = error
        self.mount = mount


Step = tuple[Action, Thing, Sequence[Handle]]
"""One backend call, the thing that it changes, and the handles that ask for it."""
