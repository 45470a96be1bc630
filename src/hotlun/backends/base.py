"""What a backend must be: four methods on the host's side, three on the guest's.

A call that returns has happened. One that raises `OutcomeUnknownError` may or
may not have happened. One that raises anything else has *not* happened and
left nothing behind. The undoing calls (`detach`, `unmount`, `unplug`,
`revoke_access`) return normally when there is nothing to undo. Backends
translate foreign errors at their own edge.

What is optional is looked up with a default by the functions below, so that
seven methods stay enough:

* `host.occupied()` - async; the slots that others use, a boot disk for instance.
* `host.identity(attachment)` - synchronous; the serial and size that the guest is to
  find at the slot, asked before each mount. A guest that can compare does so before
  it touches the disk; None, and nothing is compared.
* `guest.os_type` - `"linux"` or `"windows"`.
* `guest.controllers` - how many controllers the guest can use (Windows: 1).
* `guest.check(disk, config, path)` - synchronous; raises `UnsupportedError`
  for a mount that this guest cannot do, before anything is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, cast, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Collection

    from hotlun.model import (
        Attachment,
        Disk,
        DiskIdentity,
        GuestMount,
        MountConfig,
        Slot,
    )

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
