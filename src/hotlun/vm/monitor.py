"""Our own QMP connection to a VM, beside the one that is left to the user.

For taking a snapshot and restoring one, for moving a VM into another QEMU, and for
looking at a VM from the side.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

from qemu.qmp import EventListener, QMPClient, QMPError

from hotlun.vm.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qemu.qmp import Message

_ENDS = frozenset({None, "completed", "failed", "cancelled"})
"""What QEMU says of a migration that is over, or has never begun."""


class Monitor:
    """A QMP session that can move a VM's state through a file descriptor."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, path: str) -> AsyncIterator[Monitor]:
        """Connect to the unix socket `path`; the caller sets the deadline.

        Raises:
            MachineError: QEMU refused a command or has ended.
        """
        client = QMPClient("hotlun-vm")
        client.logger.disabled = True  # it logs as errors what we raise
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, path)
            await client.connect(connection)
            yield cls(client)
        except (QMPError, OSError) as error:
            raise MachineError(f"QEMU's monitor: {error}", detail=str(error)) from error
        finally:
            # Disconnecting waits until QEMU has taken what is queued; one that hangs never does.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(Exception):  # raises, as any type, what ended the session
                await client.disconnect()
            connection.close()

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> object:
        """Run a command and return its answer."""
        return await self._client.execute(command, arguments)

    async def save(self, descriptor: int) -> None:
        """Write the stopped VM's state to an open file."""
        await self._lend(descriptor)
        await self._migrate("migrate", "fd:state")

    async def load(self, descriptor: int) -> None:
        """Read the state that `save` wrote into a VM started with `-incoming defer`."""
        await self._lend(descriptor)
        await self._migrate("migrate-incoming", "fd:state")

    async def migrate(self, uri: str) -> None:
        """Move the running VM to where another QEMU listens; here it then stands still.

        The other end says that it has it (`return-path`). Without that, a migration is
        "completed" when all has been written to the socket, though the destination may die
        of the first word of it, and the guest then runs nowhere (QEMU 7.2).
        """
        await self._migrate("migrate", uri, "return-path")

    async def cancel_migration(self) -> bool:
        """Stop a migration away from here; False if it is too late, and the guest has moved.

        That a migration is "completed" can also mean the one by which the guest came here.
        """
        listener = EventListener("MIGRATION")
        with self._client.listen(listener):
            await self.execute("migrate_cancel")
            known = await self.execute("query-migrate")
            while (status := _status(known)) not in _ENDS:
                known = (await self._next(listener))["data"]
        runs = _status(await self.execute("query-status"))
        return not (status == "completed" and runs in {"finish-migrate", "postmigrate"})

    async def announce_migration(self, *more: str) -> None:
        """Have QEMU send events about a migration, whichever end of it this is.

        Args:
            more: capabilities to be switched on, too.
        """
        capabilities = [{"capability": name, "state": True} for name in ("events", *more)]
        await self.execute("migrate-set-capabilities", {"capabilities": capabilities})

    async def arrived(self) -> None:
        """Return when what migrates into this QEMU is here and runs, if it ran.

        `announce_migration` has been called before it came. QEMU sends its "completed"
        after it has started the VM (7.2, migration.c, process_incoming_migration_bh).
        """
        listener = EventListener("MIGRATION")
        with self._client.listen(listener):
            known = await self.execute("query-migrate")
            await self._completed("migrate-incoming", known, listener)

    async def event(self, name: str, command: str) -> None:
        """Run a command and return when the event that it leads to has come."""
        listener = EventListener(name)
        with self._client.listen(listener):
            await self.execute(command)
            await self._next(listener)

    async def _lend(self, descriptor: int) -> None:
        self._client.send_fd_scm(descriptor)
        await self.execute("getfd", {"fdname": "state"})

    async def _migrate(self, command: str, uri: str, *capabilities: str) -> None:
        await self.announce_migration(*capabilities)
        listener = EventListener("MIGRATION")
        with self._client.listen(listener):
            await self.execute(command, {"uri": uri})
            await self._completed(command, {}, listener)

    async def _completed(self, command: str, known: object, listener: EventListener) -> None:
        """Wait for the end of a migration of which `known` is what QEMU said last."""
        while (status := _status(known)) != "completed":
            if status in {"failed", "cancelled"}:
                words = await self._reason()
                raise MachineError(
                    f"QEMU: {command} ended as {status}: {words}", operation=command, detail=words
                )
            known = (await self._next(listener))["data"]

    async def _reason(self) -> str:
        known = await self.execute("query-migrate")
        words = known.get("error-desc") if isinstance(known, dict) else None
        return str(words or "the destination may have said why")

    async def _next(self, listener: EventListener) -> Message:
        """The next event. A listener alone would wait on when the session has ended."""
        event = asyncio.ensure_future(listener.get())
        ended = asyncio.ensure_future(self._client.runstate_changed())
        try:
            await asyncio.wait({event, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                raise MachineError("QEMU ended")
            return event.result()
        finally:
            event.cancel()
            ended.cancel()


def _status(known: object) -> object:
    return known.get("status") if isinstance(known, dict) else None
