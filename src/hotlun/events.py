"""What happens to a VM and its disks without having been asked for.

Backends tell a listener (see `backends.base`); a Manager passes that on, with what it
has found and settled itself, to whoever iterates `Manager.events()`.

    Event
    ├── GuestReset           the guest starts anew; its mounts are gone
    ├── GuestShutdown        the guest, or whoever runs the VM, ends it
    ├── VMPaused             the VM stands still, and why as far as that is known
    ├── VMResumed            it goes on
    ├── VMGone               the hypervisor has ended, and every attachment with it
    ├── UnplugRefused        the guest did not let a device go
    ├── DiskFailed           reading or writing a disk failed on the host
    ├── ConnectionLost       the host or the guest cannot be reached
    ├── ConnectionRestored   it can be reached again
    ├── DisagreementSettled  journal, hypervisor and guest told different stories
    └── EventsMissed         the listener was too slow
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hotlun.model import Attachment
    from hotlun.reconciliation import Disagreement

Side = Literal["host", "guest"]
"""Which backend's connection: that to the hypervisor, or that to the agent in the guest."""


@dataclass(frozen=True, slots=True)
class Event:
    """The root of all events."""


@dataclass(frozen=True, slots=True)
class GuestReset(Event):
    """The guest starts anew (QMP: RESET). Its disks stay attached, and nothing is mounted.

    Args:
        by_guest: the guest did it itself; otherwise somebody at the hypervisor.
    """

    by_guest: bool


@dataclass(frozen=True, slots=True)
class GuestShutdown(Event):
    """The VM is about to end (QMP: SHUTDOWN).

    Args:
        by_guest: the guest did it itself; otherwise somebody at the hypervisor.
        reason: the hypervisor's word for it.
    """

    by_guest: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class VMPaused(Event):
    """The VM stands still (QMP: STOP); nothing in the guest answers meanwhile.

    Args:
        reason: what for, and what to do, in words; `""` if somebody has asked for it.
    """

    reason: str = ""


@dataclass(frozen=True, slots=True)
class VMResumed(Event):
    """The VM goes on (QMP: RESUME)."""


@dataclass(frozen=True, slots=True)
class VMGone(Event):
    """The hypervisor has ended, and every attachment with it.

    Args:
        reason: how that was found out.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class UnplugRefused(Event):
    """The guest did not let a device go (QMP: DEVICE_UNPLUG_GUEST_ERROR)."""

    attachment: Attachment


@dataclass(frozen=True, slots=True)
class DiskFailed(Event):
    """Reading or writing a disk failed on the host (QMP: BLOCK_IO_ERROR).

    Args:
        attachment: the disk.
        operation: `"read"` or `"write"`.
        no_space: the host has no space left for what was to be written.
        pauses: the hypervisor pauses the VM for it, until somebody lets it go on.
        reason: the hypervisor's words.
    """

    attachment: Attachment
    operation: str
    no_space: bool
    pauses: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ConnectionLost(Event):
    """One side cannot be reached; what was in flight is unknown until it can be asked again."""

    side: Side
    reason: str


@dataclass(frozen=True, slots=True)
class ConnectionRestored(Event):
    """One side can be reached again."""

    side: Side


@dataclass(frozen=True, slots=True)
class DisagreementSettled(Event):
    """Journal, hypervisor and guest told different stories of a disk; how that was settled."""

    disagreement: Disagreement


@dataclass(frozen=True, slots=True)
class EventsMissed(Event):
    """The listener was too slow, and so many events before the next one were dropped."""

    count: int
