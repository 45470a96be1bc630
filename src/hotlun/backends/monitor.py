"""A VM's QMP monitor, for as long as the VM lives: its connection comes back when it is lost.

A command is `OutcomeUnknownError` when it has been sent and not answered, and
`BackendError` when it was refused or never sent. When the connection is lost, what
is in flight on it ends at once; what comes then waits for the next one. QEMU
carries out the commands of one monitor in order, and those of the next connection
after them, so a later command finds the outcome of one given up.

A socket that has had a monitor and now refuses connections, or is missing, has lost its
QEMU: `VMGoneError`, for good. So has one where another QEMU answers, started anew in the same
place: it is told by the host's id of its first vCPU's thread. One that accepts and stays
silent has not: QEMU hangs, or serves another client.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from hotlun.backends.errand import Errand
from hotlun.backends.link import Link
from hotlun.errors import BackendError, VMGoneError
from hotlun.events import ConnectionLost, ConnectionRestored, VMGone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Mapping

    from hotlun.backends.link import Hear
    from hotlun.backends.refusals import Meaning
    from hotlun.events import Event

_log = logging.getLogger("hotlun.qemu")
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
"""Seconds before an attempt to connect again; they double from the first to the longest, and
begin anew after a connection that has lasted longer than that."""


def _nothing(_: object) -> None:
    """What is done with events until somebody asks for them."""


class Monitor:
    """The monitor of one VM; see `open`.

    Args:
        on_event: is called, in the loop, with each event of QEMU's as it comes.
        on_change: is called, in the loop, when the connection is lost, restored or gone for good.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self.on_event: Hear = _nothing
        self.on_change: Callable[[Event], None] = _nothing
        self._path = path
        self._timeout = timeout
        self._link: Link
        self._who: object = None
        """Which QEMU this is; None if it does not say."""
        self._is_left = False
        self._lost = ""
        """Why the last connection ended, while there is no other."""
        self._gone = ""
        """Why there will never be a connection again."""
        self._changed = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def open(cls, path: str, timeout: float) -> AsyncIterator[Monitor]:
        """Connect to the monitor's unix socket, and disconnect on the way out.

        Args:
            path: the socket.
            timeout: seconds for connecting, for each command and event, and for the wait
                of a command until there is a connection again.

        Raises:
            BackendError: nobody answers there.
        """
        monitor = cls(path, timeout)
        monitor._link, monitor._who = await monitor._connected()
        keeper = asyncio.create_task(monitor._keep(), name="hotlun-qmp-keeper")
        try:
            yield monitor
        finally:
            monitor._is_left = True
            monitor._changed.set()
            keeper.cancel()
            monitor._link.hang_up()
            await asyncio.wait({keeper})
            await monitor._link.ended()

    async def command(
        self,
        errand: Errand,
        name: str,
        arguments: Mapping[str, object],
        *,
        expecting: Collection[Meaning] = (),
    ) -> Meaning | None:
        """Have QEMU change something; see `Link.command`.

        Raises:
            VMGoneError: QEMU has ended.
        """
        link = await self.link(errand)
        return await link.command(errand, name, arguments, expecting=expecting)

    async def query(self, errand: Errand, name: str, arguments: Mapping[str, object]) -> object:
        """Ask QEMU for something; see `Link.query`.

        Raises:
            VMGoneError: QEMU has ended.
        """
        return await (await self.link(errand)).query(errand, name, arguments)

    async def link(self, errand: Errand) -> Link:
        """The connection, waited for if there is none: what is begun at once on it is sent.

        For what must stay on one connection: a command, and the event that follows it.

        Raises:
            VMGoneError: QEMU has ended.
            BackendError: there was none in time, or the monitor has been left.
        """
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    self._check(errand)
                    if self._link.is_up:
                        return self._link
                    await self._changed.wait()
        except TimeoutError as error:
            raise errand.error(
                BackendError,
                f"the connection to the monitor at {self._path} was lost ({self._lost}) and did "
                f"not come back within {self._timeout:g} s; nothing was sent. "
                "The VM hangs, or another client has its monitor; see to that, then try again",
            ) from error

    def _check(self, errand: Errand) -> None:
        if self._is_left:
            raise errand.error(
                BackendError,
                "the connection to the VM has been left; nothing was sent. Connect again",
            )
        if self._gone:
            raise errand.error(
                VMGoneError,
                f"the VM is gone: {self._gone}. Nothing is attached any more; "
                "start the VM again, and connect to it anew",
            )

    async def _keep(self) -> None:
        """Until it is left or QEMU has ended, see to it that there is a connection."""
        now = asyncio.get_running_loop().time
        pause = _FIRST_PAUSE
        while not self._gone:
            began, lost = now(), self._link
            self._lost = await lost.ended()
            _log.debug("the connection to the monitor at %s was lost: %s", self._path, self._lost)
            self.on_change(ConnectionLost("host", self._lost))
            if now() - began > _LONGEST_PAUSE:
                pause = _FIRST_PAUSE
            while self._link is lost and not self._gone:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                await self._connect_again()

    async def _connect_again(self) -> None:
        try:
            link, who = await self._connected()
        except BackendError as error:
            _log.debug("not connected again: %s", error)
            if isinstance(error.__cause__, (ConnectionRefusedError, FileNotFoundError)):
                self._is_gone(f"nobody listens at its monitor {self._path} any more")
            return
        if who != self._who:
            await _let_go(link)
            self._is_gone(f"another QEMU has its monitor {self._path} now")
            return
        self._link, self._lost = link, ""
        self._announce(ConnectionRestored("host"))

    async def _connected(self) -> tuple[Link, object]:
        """A connection, and which QEMU is at its other end."""
        link = await Link.open(self._path, self._timeout, self._hear)
        try:
            answer = await link.query(Errand("connect"), "query-cpus-fast", {})
        except BackendError as error:
            if error.code is None:
                await _let_go(link)
                raise
            answer = None
        except BaseException:
            await _let_go(link)
            raise
        match answer:
            case [{"thread-id": who}, *_]:
                return link, who
        return link, None

    def _is_gone(self, why: str) -> None:
        self._gone = why
        self._announce(VMGone(why))

    def _announce(self, event: Event) -> None:
        self._changed.set()
        self._changed.clear()
        self.on_change(event)

    def _hear(self, event: Mapping[str, object]) -> None:
        self.on_event(event)


async def _let_go(link: Link) -> None:
    link.hang_up()
    await link.ended()
