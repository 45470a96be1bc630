"""A process that does one round of work on a VM that is not its own, to be killed at any moment.

    python -m support.short_lived QMP_SOCKET AGENT_SOCKET IMAGE CONTROLLER LUN SERIAL [STAGE]

It says what it has come to, a word a line, one of the STAGES each; at the STAGE given it
stays until it is killed. Its parent's view of it is a `Child`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from support.clients import Clients, image_at

from hotlun.model import GuestMount, MountConfig, Slot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hotlun.vm import Machine

STAGES = ("imported", "connected", "attached", "mounted", "unmounted", "unplugged", "detached")


def mount_of(image: str, slot: Slot, serial: str) -> GuestMount:
    """What the process mounts, for whoever cleans up after it."""
    config = MountConfig(filesystem="ext4", ensure_filesystem=True)
    return GuestMount(image_at(Path(image), slot, serial), f"/run/{serial}", config)


class Child:
    """The process, as its parent sees it; made by `working_on`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        # asyncio's own kill() reaps one that has just ended, and then misses it (Python 3.11).
        self._pidfd = os.pidfd_open(process.pid)

    @classmethod
    @contextlib.asynccontextmanager
    async def working_on(
        cls, vm: Machine, mount: GuestMount, *, stays: str = ""
    ) -> AsyncIterator[Child]:
        """Started, and killed on the way out.

        Args:
            vm: where nobody else is connected.
            mount: of `mount_of`.
            stays: the stage at which it stays.
        """
        attachment = mount.attachment
        slot = attachment.slot
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "support.short_lived", vm.qmp_socket, vm.agent_socket),
            *(attachment.disk.path, str(slot.controller), str(slot.lun), attachment.serial),
            *([stays] * bool(stays)),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        child = cls(process)
        try:
            yield child
        finally:
            await child.kill()
            child.close()

    async def has(self, stage: str) -> None:
        """Return when it has come to that."""
        assert self._process.stdout is not None
        while (word := (await self._process.stdout.readline()).decode().strip()) != stage:
            assert word, f"it ended before it had {stage}"

    async def kill(self) -> None:
        """As `kill -9` does, and reap it; it may have ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        await self._process.wait()

    def close(self) -> None:
        """Let go of it."""
        os.close(self._pidfd)


async def main(qmp_socket: str, agent_socket: str, mount: GuestMount, stays: str) -> None:
    """All of it, said step by step."""

    async def reached(stage: str) -> None:
        sys.stdout.write(f"{stage}\n")
        sys.stdout.flush()
        if stage == stays:
            await asyncio.Event().wait()

    await reached("imported")
    async with Clients.at(qmp_socket, agent_socket) as clients:
        await reached("connected")
        await clients.host.attach(mount.attachment)
        await reached("attached")
        await clients.guest.mount(mount)
        await reached("mounted")
        await clients.guest.unmount(mount)
        await reached("unmounted")
        await clients.guest.unplug(mount.attachment)
        await reached("unplugged")
        await clients.host.detach(mount.attachment)
        await reached("detached")


if __name__ == "__main__":
    QMP, AGENT, IMAGE, CONTROLLER, LUN, SERIAL, *STAYS = sys.argv[1:]
    MOUNT = mount_of(IMAGE, Slot(int(CONTROLLER), int(LUN)), SERIAL)
    asyncio.run(main(QMP, AGENT, MOUNT, "".join(STAYS)))
