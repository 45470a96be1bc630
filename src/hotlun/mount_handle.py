"""A Mount: one caller's share of an attachment and, if one was asked for, of a guest mount."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Self

from hotlun.errors import AlreadyReleasedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from hotlun.model import Disk, MountConfig, Slot
    from hotlun.states import Handle

_log = logging.getLogger("hotlun")


class Mount:
    """One caller's share of an attachment and, if one was asked for, of a guest mount.

    Given back with `release()`, or by leaving `async with mount`. The last one
    out undoes everything.
    """

    def __init__(self, handle: Handle, release: Callable[[Handle], Awaitable[None]]) -> None:
        attachment, mount = handle.disk.attachment, handle.mount
        self._handle = handle
        self._release = release
        self.id: str = handle.id
        """Unique, in this process and any other."""
        self.slot: Slot = attachment.slot
        self.serial: str = attachment.serial
        """What the guest reads as the disk's SCSI serial."""
        self.disk: Disk = attachment.disk
        self.config: MountConfig | None = None if mount is None else mount.config
        self.guest_path: str | None = None if mount is None else mount.path
        """Where it is mounted inside the guest; None when nothing was mounted."""
        self.owner: str = handle.owner.name
        """Whom it is held for, as was said when it was added."""

    @property
    def controller(self) -> int:
        return self.slot.controller

    @property
    def lun(self) -> int:
        return self.slot.lun

    @property
    def lost(self) -> str:
        """Why the disk or the guest mount is not there any more; `""` if it is.

        What was lost is released as everything else: that cleans up, succeeds, and is logged.
        """
        return self._handle.lost

    async def release(self) -> None:
        """Give the references back; the last one out unmounts, unplugs, detaches and revokes.

        A release that failed or was cancelled can be called again: it goes on
        where it stopped.

        Raises:
            AlreadyReleasedError: there is nothing left to give back.
            NotInitializedError: the Manager was left, and its journal keeps the mount; or
                it was saved, and is another host's business.
            HotlunError: what the backend raised; the Mount keeps its reference.
        """
        await self._release(self._handle)
        if self.lost:
            _log.warning("released %r", self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.release()
        except AlreadyReleasedError:
            pass
        except Exception as error:
            if exc is None:
                raise
            exc.add_note(f"then, releasing {self!r}: {error}")

    def __repr__(self) -> str:
        where = f" mounted at {self.guest_path}" if self.guest_path else ""
        lost = f", lost: {self.lost}" if self.lost else ""
        return f"<Mount {self.id}: {self.disk} at slot {self.slot}{where}{lost}>"
