"""The end of a process, at a chosen point: from then on it writes nothing and asks for nothing.

Points are before and after each write into the journal, and before and after each call of a
backend. In memory a blown fuse raises `Killed`, from that point and from every later one; in
a process of its own it is `kill -9`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

from hotlun.backends import base

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hotlun import Attachment, Disk, GuestBackend, GuestMount, HostBackend
    from hotlun.backends.base import Listener
    from hotlun.events import Event
    from hotlun.journal import Journal


class Killed(BaseException):
    """This process is dead: nothing that is caught or cleaned up here has an effect."""


class Fuse:
    """Counts points, and blows at one of them.

    Args:
        at: which one, from 1; 0 for never.
        blow: what to do then.
    """

    def __init__(self, at: int = 0, blow: Callable[[str], None] | None = None) -> None:
        self.at = at
        self.count = 0
        self.points: list[str] = []
        """What each was, by name."""
        self.is_blown = False
        self.blown = asyncio.Event()
        self._blow = blow

    def point(self, name: str) -> None:
        """Here it could end.

        Raises:
            Killed: it has.
        """
        if not self.is_blown:
            self.count += 1
            self.points.append(name)
            self.is_blown = self.count == self.at
            if self.is_blown:
                self.blown.set()
                if self._blow is not None:
                    self._blow(name)
        if self.is_blown:
            raise Killed(name)


class Trigger(Fuse):
    """A fuse at whose point something else happens, and everything goes on."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.happened = asyncio.Event()
        self.where = "nowhere"

    def point(self, name: str) -> None:
        self.count += 1
        if self.count == self.at:
            self.happen(name)

    def happen(self, where: str) -> None:
        """Now, if it has not happened yet."""
        if not self.happened.is_set():
            self.where = where
            self.happened.set()


def kill_this_process(name: str) -> None:
    """At once; nothing is flushed, closed or told to anybody."""
    os.write(2, f"killed {name}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


class FusedJournal:
    """A journal whose writer can end before and after each write."""

    def __init__(self, journal: Journal, fuse: Fuse) -> None:
        self._journal = journal
        self._fuse = fuse

    def open(self) -> list[str]:
        return self._journal.open()

    def write(self, changes: Mapping[str, str | None]) -> None:
        is_removal = not any(changes.values())
        what = "a removal from the journal" if is_removal else "a write into the journal"
        self._fuse.point(f"before {what}")
        self._journal.write(changes)
        self._fuse.point(f"after {what}")

    def close(self) -> None:
        self._journal.close()


class _Fused:
    """A backend whose caller can end before and after each call; what is optional passes."""

    def __init__(self, backend: Any, fuse: Fuse) -> None:
        self._backend = backend
        self._fuse = fuse

    def __getattr__(self, name: str) -> Any:
        if self._fuse.is_blown:
            raise Killed(name)
        return getattr(self._backend, name)

    def watch(self, listener: Listener) -> Callable[[], None]:
        """The dead hear nothing."""

        def alive(event: Event) -> None:
            if not self._fuse.is_blown:
                listener(event)

        return base.watch(self._backend, alive)

    async def _call(self, name: str, *arguments: object) -> None:
        self._fuse.point(f"before {name}")
        await getattr(self._backend, name)(*arguments)
        self._fuse.point(f"after {name}")


class FusedHost(_Fused):
    def __init__(self, backend: HostBackend, fuse: Fuse) -> None:
        super().__init__(backend, fuse)

    async def attach(self, attachment: Attachment) -> None:
        await self._call("attach", attachment)

    async def detach(self, attachment: Attachment) -> None:
        await self._call("detach", attachment)

    async def grant_access(self, disk: Disk, vm_id: str) -> None:
        await self._call("grant_access", disk, vm_id)

    async def revoke_access(self, disk: Disk, vm_id: str) -> None:
        await self._call("revoke_access", disk, vm_id)


class FusedGuest(_Fused):
    def __init__(self, backend: GuestBackend, fuse: Fuse) -> None:
        super().__init__(backend, fuse)

    async def mount(self, mount: GuestMount) -> None:
        await self._call("mount", mount)

    async def unmount(self, mount: GuestMount) -> None:
        await self._call("unmount", mount)

    async def unplug(self, attachment: Attachment) -> None:
        await self._call("unplug", attachment)
