"""Our own QMP connection to a VM, beside the one that is left to the user.

For taking a snapshot and restoring one, and for looking at a VM from the side.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, TYPE_CHECKING

from qemu.qmp import EventListener, QMPClient, QMPError

from hotlun.vm.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_DISCONNECT_TIMEOUT = 5.0


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
        client = QMPClient("hotlun")
        client.logger.propagate = False  # it tells at ERROR what we raise
        try:
            await client.connect(path)
            yield cls(client)
        except (QMPError, OSError, EOFError) as error:
            raise MachineError(f"QEMU's monitor: {error}", detail=str(error)) from error
        finally:
            with contextlib.suppress(Exception):  # the session may be the very thing that broke
                async with asyncio.timeout(_DISCONNECT_TIMEOUT):
                    await client.disconnect()

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> object:
        """Run a command and return its answer."""
        return await self._client.execute(command, arguments)

    async def save(self, descriptor: int) -> None:
        """Write the stopped VM's state to an open file."""
        await self._migrate("migrate", descriptor)

    async def load(self, descriptor: int) -> None:
        """Read the state that `save` wrote into a VM started with `-incoming defer`."""
        await self._migrate("migrate-incoming", descriptor)

    async def _migrate(self, command: str, descriptor: int) -> None:
        capability = {"capability": "events", "state": True}
        await self.execute("migrate-set-capabilities", {"capabilities": [capability]})
        self._client.send_fd_scm(descriptor)
        await self.execute("getfd", {"fdname": "state"})
        listener = EventListener("MIGRATION")
        with self._client.listen(listener):
            await self.execute(command, {"uri": "fd:state"})
            async for event in listener:
                data = event["data"]
                status = data["status"] if isinstance(data, dict) else None
                if status == "completed":
                    return
                if status in {"failed", "cancelled"}:
                    raise MachineError(f"QEMU: {command} ended as {status}", operation=command)
