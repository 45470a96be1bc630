"""What a backend must be: four methods on the host's side, three on the guest's.

A call that returns has happened. One that raises `OutcomeUnknownError` may or
may not have happened. One that raises anything else has *not* happened and
left nothing behind. The undoing calls (`detach`, `unmount`, `unplug`,
`revoke_access`) return normally when there is nothing to undo. Backends
translate foreign errors at their own edge. Where it is certain that the hypervisor has
ended, a call raises `VMGoneError`.

What is optional is looked up with a default by the functions below, so that
seven methods stay enough:

* `host.occupied()` - async; the slots that others use, a boot disk for instance.
* `host.identity(attachment)` - synchronous; the serial and size that the guest is to
  find at the slot, asked before each mount. A guest that can compare does so before
  it touches the disk; None, and nothing is compared.
* `host.serials` - whether the guest reads our serial from an attached disk; True if the
  backend does not say. Where it does not, the guest is not asked what it has: it could
  not tell our disks from others.
* `host.survey(attachments)` - async; how much of each the hypervisor has now, by serial
  (`Presence`), and nothing about others; None if it cannot be asked. Changes nothing.
* `host.plan_grant(disk, vm_id)` - synchronous; what `grant_access` is going to change, as
  text, for whoever wants to revoke it in another process. Asked before the grant.
* `host.adopt_grant(disk, vm_id, plan)` - synchronous; that grant has been made, or begun,
  by an earlier process: `revoke_access` undoes what is there of it.
* `guest.survey(attachments, mounts)` - async; a `GuestSurvey` of what the guest has now; None
  if it cannot be asked. Changes nothing.
* `host.watch(listener)`, `guest.watch(listener)` - synchronous; call `listener(event)` from
  now on with what happens (`hotlun.events`), in the loop, until the function that is returned
  is called.
* `guest.os_type` - `"linux"` or `"windows"`.
* `guest.controllers` - how many controllers the guest can use (Windows: 1).
* `guest.check(disk, config, path)` - synchronous; raises `UnsupportedError`
  for a mount that this guest cannot do, before anything is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, cast, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from hotlun.events import Event
    from hotlun.model import (
        Attachment,
        Disk,
        DiskIdentity,
        GuestMount,
        GuestSurvey,
        MountConfig,
        Presence,
        Slot,
    )

    Listener = Callable[[Event], None]

OSType = Literal["linux", "windows"]


@runtime_checkable
class HostBackend(Protocol):
    """Gives disks to the VM: the hypervisor's side."""

    async def attach(self, attachment: Attachment) -> None:
        """Make the disk appear at its slot.

        Raises:
            SlotTakenError: the slot is somebody else's; the Manager tries the next.
        """

    async def detach(self, attachment: Attachment) -> None:
        """Take exactly this attachment (by its serial) out of the VM."""

    async def grant_access(self, disk: Disk, vm_id: str) -> None:
        """Let the VM `vm_id` open the disk."""

    async def revoke_access(self, disk: Disk, vm_id: str) -> None:
        """Undo what `grant_access` changed, and nothing else."""


@runtime_checkable
class GuestBackend(Protocol):
    """Has disks mounted inside the VM: the guest's side."""

    async def mount(self, mount: GuestMount) -> None:
        """Mount (a partition of) the attachment at the guest path."""

    async def unmount(self, mount: GuestMount) -> None:
        """Undo `mount`, encryption included."""

    async def unplug(self, attachment: Attachment) -> None:
        """Have the guest let go of the SCSI device, before the host detaches it."""


async def occupied(host: HostBackend) -> Collection[Slot]:
    """The slots that the VM's own disks hold; none if the backend cannot tell."""
    ask = getattr(host, "occupied", None)
    return cast("Collection[Slot]", await ask()) if ask is not None else ()


def identity(host: HostBackend, attachment: Attachment) -> DiskIdentity | None:
    """What the guest is to know an attached disk by; None if the backend does not say."""
    ask = getattr(host, "identity", None)
    return cast("DiskIdentity | None", ask(attachment)) if ask is not None else None


def os_type(guest: GuestBackend) -> OSType:
    """Whose path rules and default mount format hold; linux if the backend does not say."""
    value = getattr(guest, "os_type", "linux")
    if value not in ("linux", "windows"):
        raise ValueError(f"a guest's os_type is 'linux' or 'windows', not {value!r}")
    return cast("OSType", value)


def usable_controllers(guest: GuestBackend) -> int | None:
    """How many controllers the guest can use; None if all of them."""
    return cast("int | None", getattr(guest, "controllers", None))


def check(guest: GuestBackend, disk: Disk, config: MountConfig, path: str) -> None:
    """Let the guest backend refuse a mount before anything is touched.

    Raises:
        UnsupportedError: this guest cannot do that.
    """
    refuse = getattr(guest, "check", None)
    if refuse is not None:
        refuse(disk, config, path)


def sets_serials(host: HostBackend) -> bool:
    """Whether the guest can know an attached disk by our serial; True if it is not said."""
    return bool(getattr(host, "serials", True))


async def host_survey(
    host: HostBackend, attachments: Collection[Attachment]
) -> Mapping[str, Presence] | None:
    """How much of each attachment the hypervisor has, by serial; None if it cannot be asked."""
    ask = getattr(host, "survey", None)
    return cast("Mapping[str, Presence] | None", await ask(attachments)) if ask else None


async def guest_survey(
    guest: GuestBackend, attachments: Collection[Attachment], mounts: Collection[GuestMount]
) -> GuestSurvey | None:
    """What of these the guest has; None if it cannot be asked."""
    ask = getattr(guest, "survey", None)
    return cast("GuestSurvey | None", await ask(attachments, mounts)) if ask else None


def watch(backend: HostBackend | GuestBackend, listener: Listener) -> Callable[[], None]:
    """Hear of what happens there, until the function that is returned is called."""
    subscribe = getattr(backend, "watch", None)
    return cast("Callable[[], None]", subscribe(listener)) if subscribe is not None else _nothing


def _nothing() -> None:
    """The end of having heard nothing."""


def plan_grant(host: HostBackend, disk: Disk, vm_id: str) -> str:
    """What a grant is going to change; `""` if the backend needs no telling to revoke it."""
    ask = getattr(host, "plan_grant", None)
    return cast("str", ask(disk, vm_id)) if ask is not None else ""


def adopt_grant(host: HostBackend, disk: Disk, vm_id: str, plan: str) -> None:
    """Tell the backend of a grant that an earlier process has made, or begun."""
    tell = getattr(host, "adopt_grant", None)
    if tell is not None:
        tell(disk, vm_id, plan)
