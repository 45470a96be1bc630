"""The table of guest mounts: who may share one, their paths, and conflicts.

The twin of `attachments`. Guest mounts of one disk are the same when their
configs are equal; two that overlap live side by side unless one needs the
sectors to itself: it may format them, or the guest maps them (decrypted, verified)
under a name that only one can have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotlun.errors import DiskConflictError
from hotlun.guest_paths import GuestPaths
from hotlun.states import MountState

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.backends.base import OSType
    from hotlun.model import Disk, MountConfig
    from hotlun.states import DiskState


class MountTable:
    """The guest mounts of one VM.

    Args:
        pattern: for generated guest paths, with exactly one `%d`; None for the default.
        os_type: whose path rules hold.
    """

    def __init__(self, pattern: str | None, os_type: OSType) -> None:
        self._paths = GuestPaths(pattern, os_type)

    @property
    def pattern(self) -> str:
        """For generated guest paths."""
        return self._paths.pattern

    def normalise(self, path: str) -> str:
        """The one spelling of a guest path.

        Raises:
            ValueError: it is none.
        """
        return self._paths.normalise(path)

    def in_the_way(self, state: DiskState, config: MountConfig) -> MountState | None:
        """A guest mount of the disk that overlaps one with this config, which no other has.

        It is in teardown, or owned by nobody, and has to be waited for.

        Raises:
            DiskConflictError: one overlaps, is in use, and one of the two needs the
                sectors to itself.
        """
        in_teardown = None
        for mount in state.mounts.values():
            if not mount.config.overlaps(config):
                continue
            exclusive_use = config.exclusive_use or mount.config.exclusive_use
            if mount.closing or (exclusive_use and not mount.handles):
                in_teardown = mount
                continue
            if not exclusive_use:
                continue
            attachment = state.attachment
            raise DiskConflictError(
                f"disk {attachment.disk} at slot {attachment.slot} is mounted at {mount.path}, and "
                f"{'this request' if config.exclusive_use else 'that mount'} {exclusive_use} the "
                "same sectors: ask for the same mount, or release that one first",
                operation="mount",
                slot=attachment.slot,
                disk=attachment.disk,
            )
        return in_teardown

    def check_free(self, path: str) -> None:
        """Whether a normalised path can be taken.

        Raises:
            GuestPathConflictError: it collides with another guest mount's.
        """
        self._paths.check_free(path)

    def plan(
        self,
        disk: Disk,
        config: MountConfig,
        path: str,
        check: Callable[[Disk, MountConfig, str], None],
    ) -> MountState:
        """A new guest mount at a normalised path, or at a generated one if it is empty.

        Raises:
            GuestPathConflictError: the path collides, or no generated one ever fits.
            UnsupportedError: from `check`; nothing is changed then.
        """
        number = None
        if path:
            self._paths.check_free(path)
        else:
            path, number = self._paths.generate()
        check(disk, config, path)
        self._paths.take(path, number)
        return MountState(config, path)

    def add(self, mount: MountState) -> None:
        """A guest mount of before, at the path that it has."""
        self._paths.take(mount.path)

    def remove(self, mount: MountState) -> None:
        """The guest mount is gone; its path is free."""
        self._paths.give_back(mount.path)
