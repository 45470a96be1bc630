"""hotlun's own agent, without a guest around it, dials a host that waits in threads."""

from __future__ import annotations

import asyncio
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest
from support.dialling import check_nothing_is_left
from support.peer import DEADLINE

from hotlun import Disk, DiskKind, MountConfig, OutcomeUnknownError, Slot
from hotlun.agent.links import dialled_links
from hotlun.agent.server import FEATURES, Server
from hotlun.backends.bridge import BridgeGuestBackend
from hotlun.bridge import openings
from hotlun.bridge.client import BridgeConnection
from hotlun.bridge.frames import DEFAULT_LIMIT
from hotlun.bridge.keeper import Change
from hotlun.bridge.listening import Listening
from hotlun.model import Attachment, GuestMount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hotlun.agent.links import Link
    from hotlun.agent.queries import DiskQuery, Found
    from hotlun.agent.settings import DiskSettings
    from hotlun.agent.settings import Slot as AgentSlot


class Noted:
    """Disks of which is but noted what is mounted."""

    def __init__(self) -> None:
        self.mounted: set[str] = set()
        self.unplugged: list[int] = []
        self.may_mount = threading.Event()
        self.may_mount.set()

    def mount(self, settings: DiskSettings, wanted: Callable[[], bool]) -> None:
        self.may_mount.wait(DEADLINE)
        self.mounted.add(settings.path)

    def unmount(self, settings: DiskSettings) -> None:
        self.mounted.discard(settings.path)

    def unplug(self, slot: AgentSlot, timeout: float | None) -> None:
        self.unplugged.append(slot.lun)

    def survey(self, asked: list[DiskQuery]) -> list[Found]:
        raise NotImplementedError


def listen_at(path: Path) -> socket.socket:
    """At a unix socket, in place of whoever did before."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    return listener


class Agent:
    """The agent's server in a thread, dialling the host for as long as it is there."""

    def __init__(self, path: Path) -> None:
        self.disks = Noted()
        self.links: list[Link] = []
        self._is_over = False
        self._server = Server(self.disks)
        self._path = path
        self._thread = threading.Thread(target=self._serve, name="agent")
        self._thread.start()

    def _serve(self) -> None:
        for link in dialled_links(socket.AF_UNIX, str(self._path)):
            self.links.append(link)
            if self._is_over:
                link.close()
                break
            self._server.serve(link)

    async def stop(self) -> None:
        """It stops when it is answered once more."""
        self._is_over = True
        with listen_at(self._path) as listener:
            listener.settimeout(DEADLINE)
            (await asyncio.to_thread(listener.accept))[0].close()
        await asyncio.to_thread(self._thread.join, DEADLINE)
        assert not self._thread.is_alive()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Of threads and sockets."""
    yield
    check_nothing_is_left()


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Where the agent dials it."""
    return tmp_path / "host"


def listening(path: Path) -> BridgeConnection:
    listen = Listening(partial(listen_at, path), "the guest", in_threads=True)
    return BridgeConnection(
        openings.being_dialled(listen, "the guest", "is it there?"),
        timeout=DEADLINE,
        request_timeout=DEADLINE,
        limit=DEFAULT_LIMIT,
        keepalive=2.0,
    )


def mount_of(number: int) -> GuestMount:
    disk = Disk(f"/disks/{number}.raw", DiskKind.VIRTUAL_DISK)
    attachment = Attachment(Slot(number // 64, number % 64), disk, f"d{number}")
    return GuestMount(attachment, f"/run/m{number}", MountConfig(options=("noatime",)))


async def test_disks_come_and_go(host: Path) -> None:
    """Hundreds at once, with what only this agent can do."""
    agent = Agent(host)
    mounts = [mount_of(number) for number in range(256)]
    async with listening(host) as connection:
        assert connection.features == frozenset(FEATURES)
        guest = BridgeGuestBackend(connection, "linux")
        await asyncio.gather(*(guest.mount(mount) for mount in mounts))
        assert agent.disks.mounted == {mount.path for mount in mounts}
        await asyncio.gather(*(guest.unmount(mount) for mount in mounts))
        await asyncio.gather(*(guest.unplug(mount.attachment) for mount in mounts))
        assert not agent.disks.mounted
        assert len(agent.disks.unplugged) == 256
    await agent.stop()


async def test_it_dials_again(host: Path) -> None:
    """The moment somebody listens: what was under way is unknown, and the rest goes on."""
    agent = Agent(host)
    async with listening(host) as connection:
        guest = BridgeGuestBackend(connection, "linux")
        restored = asyncio.Event()
        connection.watch(lambda change, _: restored.set() if change is Change.RESTORED else None)
        agent.disks.may_mount.clear()
        mounting = asyncio.create_task(guest.mount(mount_of(0)))
        await asyncio.wait([mounting], timeout=0.1)
        agent.links[-1].close()
        with pytest.raises(OutcomeUnknownError):
            await mounting
        await asyncio.wait_for(restored.wait(), DEADLINE)
        agent.disks.may_mount.set()
        await guest.mount(mount_of(1))
        assert "/run/m1" in agent.disks.mounted
    await agent.stop()
