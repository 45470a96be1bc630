"""Peers that are not there, go away, say nothing, or say anything; and the way back to order."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from support import disks
from support.agent import agent_pid, kill_agent
from support.guest_shell import mounted_at, note_in, shell
from support.machine import eventually, look
from support.relay import GuestInFront, Relay

from hotlun import (
    BackendError,
    HotlunError,
    Manager,
    MountConfig,
    OutcomeUnknownError,
    Slot,
    SlotState,
    UnsupportedError,
)
from hotlun.backends.bridge import BridgeGuestBackend
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.bridge.client import BridgeConnection
from hotlun.bridge.frames import Frame, encode
from hotlun.bridge.messages import MessageType, encode_request, negotiate_request
from hotlun.errors import VMGoneError
from hotlun.events import ConnectionLost, ConnectionRestored, Event
from hotlun.vm import Machine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

pytestmark = pytest.mark.asyncio(loop_scope="module")

MOUNTED = MountConfig()
DEADLINE = 60.0
TIMEOUT = 20.0
"""Seconds for what the clients wait for."""
GONE = "the VM is gone"


MKFS_WAITS = r"""
mkdir -p /run/making /usr/local/sbin
cat >/usr/local/sbin/mkfs.ext4 <<'END'
#!/bin/sh
touch /run/making/$$
until [ -e /run/go ]; do sleep 0.05; done
exec /usr/sbin/mkfs.ext4 "$@"
END
chmod +x /usr/local/sbin/mkfs.ext4
"""
"""Found first in the agent's PATH, so that there is time to kill the agent."""

MKFS_GOES_ON = """
touch /run/go
for pid in $(ls /run/making); do while [ -e /proc/$pid ]; do sleep 0.05; done; done
rm -r /usr/local/sbin/mkfs.ext4 /run/making /run/go
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def unconnected() -> AsyncIterator[Machine]:
    """One VM for the file; each test connects as it likes."""
    async with Machine.start(connect=False) as machine:
        yield machine


@pytest_asyncio.fixture(loop_scope="module")
async def bare(unconnected: Machine) -> AsyncIterator[Machine]:
    """The VM, found afterwards as it was before."""
    before = await look(unconnected)
    yield unconnected
    assert await eventually(unconnected, before) == before


def host_of(vm: Machine, path: str = "") -> AbstractAsyncContextManager[QEMUHostBackend]:
    return QEMUHostBackend.connect(path or vm.qmp_socket, timeout=TIMEOUT)


def agent_of(vm: Machine, path: str = "", answer: float = TIMEOUT) -> BridgeConnection:
    return BridgeConnection.connect_unix(
        path or vm.agent_socket, timeout=TIMEOUT, request_timeout=answer
    )


async def works(vm: Machine, path: Path) -> None:
    """An ordinary client attaches, mounts, and takes it back."""
    async with (
        host_of(vm) as host,
        agent_of(vm) as connection,
        Manager(host, BridgeGuestBackend(connection, "linux")) as manager,
    ):
        mount = await manager.add_virtual_disk(path, mount=MOUNTED)
        assert (await mounted_at(vm, mount)).filesystem == "ext4"


class TestNobodyThere:
    @pytest.mark.parametrize("what", ["missing", "file", "folder", "dead", "mute"])
    async def test_connecting_says_where_and_what_to_do(self, tmp_path: Path, what: str) -> None:
        """No socket, no listener, no word: a clear error within the deadline, for either end."""
        path = tmp_path / "socket"
        listener = socket.socket(socket.AF_UNIX)
        match what:
            case "file":
                path.touch()
            case "folder":
                path.mkdir()
            case "dead":
                with socket.socket(socket.AF_UNIX) as gone:
                    gone.bind(str(path))
            case "mute":
                listener.bind(str(path))
                listener.listen()
        with listener:
            clients: list[Callable[[], AbstractAsyncContextManager[object]]] = [
                lambda: QEMUHostBackend.connect(path, timeout=0.5),
                lambda: BridgeConnection.connect_unix(path, timeout=0.5),
            ]
            for client in clients:
                async with asyncio.timeout(DEADLINE):
                    with pytest.raises(BackendError) as caught:
                        async with client():
                            pass
                assert str(path) in str(caught.value)
                assert caught.value.operation == "connect"

    async def test_a_second_client_is_told_that_there_is_one(self, bare: Machine) -> None:
        """A monitor and an agent serve one at a time, and the first one is not disturbed."""
        async with host_of(bare) as host, agent_of(bare):
            with pytest.raises(BackendError, match="another client has this monitor"):
                async with QEMUHostBackend.connect(bare.qmp_socket, timeout=0.5):
                    pass
            with pytest.raises(BackendError, match="no other client connected"):
                async with BridgeConnection.connect_unix(bare.agent_socket, timeout=0.5):
                    pass
            assert await host.occupied() == set()

    async def test_controllers_that_the_vm_lacks(self, bare: Machine, tmp_path: Path) -> None:
        """Connecting says which there are; a Manager that counts on more is refused by name."""
        with pytest.raises(BackendError, match=r"no SCSI controller scsi9.*scsi0, scsi1, scsi2"):
            async with QEMUHostBackend.connect(bare.qmp_socket, controllers=["scsi0", "scsi9"]):
                pass
        path = disks.ext4(tmp_path / "disk.raw")
        async with (
            QEMUHostBackend.connect(bare.qmp_socket, controllers=["scsi0"]) as host,
            agent_of(bare) as connection,
            Manager(
                host,
                BridgeGuestBackend(connection, "linux"),
                controllers=2,
                reserved_slots=[Slot(0, lun) for lun in range(64)],
            ) as manager,
        ):
            with pytest.raises(UnsupportedError, match="connected are the controllers scsi0"):
                await manager.add_virtual_disk(path, mount=MOUNTED)
            assert manager.slots()[64].state is SlotState.FREE


class TestCut:
    """Connections that go away in mid-operation; the Manager lives, its backends are changed."""

    @pytest.mark.parametrize(
        "command", ["blockdev-add", "device_add", "device_del", "blockdev-del"]
    )
    async def test_the_monitor(self, bare: Machine, tmp_path: Path, command: str) -> None:
        """After the command was sent: unknown. It comes back by itself, and the undoing with it."""
        path = disks.ext4(tmp_path / "disk.raw")
        async with AsyncExitStack() as stack:
            relay = await stack.enter_async_context(Relay.to(bare.qmp_socket, tmp_path))
            host = await stack.enter_async_context(host_of(bare, relay.path))
            heard: list[Event] = []
            host.watch(heard.append)
            guest = BridgeGuestBackend(await stack.enter_async_context(agent_of(bare)), "linux")
            manager = await stack.enter_async_context(Manager(host, guest))
            mount = None
            if command.endswith("del"):
                mount = await manager.add_virtual_disk(path, mount=MOUNTED)
            relay.cut_after(f'"{command}"'.encode())
            async with asyncio.timeout(DEADLINE):
                with pytest.raises(OutcomeUnknownError, match=command) as caught:
                    await (mount.release() if mount else manager.add_virtual_disk(path))
            assert str(path) in str(caught.value)
            status = manager.slots()[0]
            if mount:
                assert status.state is SlotState.TAKEN
                assert status.reason
                async with asyncio.timeout(DEADLINE):
                    await mount.release()
            assert manager.slots()[0].state is SlotState.FREE
            assert list(map(type, heard)) == [ConnectionLost, ConnectionRestored]
            again = await manager.add_virtual_disk(path, mount=MOUNTED)
            assert (await mounted_at(bare, again)).filesystem == "ext4"

    @pytest.mark.parametrize("way", ["cut", "silent"])
    @pytest.mark.parametrize("operation", ["mount", "unmount", "unplug"])
    async def test_the_bridge(
        self, bare: Machine, tmp_path: Path, operation: str, way: str
    ) -> None:
        """After the request was sent: unknown, the agent may have done it; then all is undone."""
        path = disks.ext4(tmp_path / "disk.raw")
        said = b'"SCSIDevice"' if operation == "unplug" else b'"MappedVirtualDisk"'
        async with AsyncExitStack() as stack:
            relay = await stack.enter_async_context(Relay.to(bare.agent_socket, tmp_path))
            line = await stack.enter_async_context(AsyncExitStack())
            old = await line.enter_async_context(agent_of(bare, relay.path, answer=2.0))
            front = GuestInFront(BridgeGuestBackend(old, "linux"))
            host = await stack.enter_async_context(host_of(bare))
            manager = await stack.enter_async_context(Manager(host, front))
            mount = None
            if operation != "mount":
                mount = await manager.add_virtual_disk(path, mount=MOUNTED)
            (relay.cut_after if way == "cut" else relay.silent_after)(said)
            async with asyncio.timeout(DEADLINE):
                with pytest.raises(OutcomeUnknownError, match="no telling") as caught:
                    await (
                        mount.release() if mount else manager.add_virtual_disk(path, mount=MOUNTED)
                    )
            assert caught.value.operation == operation
            assert str(path) in str(caught.value)
            assert manager.slots()[0].state is not SlotState.FREE
            await line.aclose()
            relay.cut()
            new = await line.enter_async_context(agent_of(bare))
            front.current = BridgeGuestBackend(new, "linux")
            await manager.release_all()
            assert manager.slots()[0].state is SlotState.FREE
            again = await manager.add_virtual_disk(path, mount=MOUNTED)
            assert (await mounted_at(bare, again)).filesystem == "ext4"


class TestTheAgentIsKilled:
    async def test_while_a_disk_is_mounted(self, bare: Machine, tmp_path: Path) -> None:
        """Init starts it again; a new connection releases what the dead one mounted."""
        path = disks.ext4(tmp_path / "disk.raw", "outlives")
        async with AsyncExitStack() as stack:
            host = await stack.enter_async_context(host_of(bare))
            line = await stack.enter_async_context(AsyncExitStack())
            old = await line.enter_async_context(agent_of(bare, answer=2.0))
            front = GuestInFront(BridgeGuestBackend(old, "linux"))
            manager = await stack.enter_async_context(Manager(host, front))
            mount = await manager.add_virtual_disk(path, mount=MOUNTED)
            await kill_agent(bare)
            assert await note_in(bare, mount) == "outlives"
            with pytest.raises(HotlunError) as caught:
                await mount.release()
            assert isinstance(caught.value, (BackendError, OutcomeUnknownError))
            assert manager.mounts == (mount,)
            await line.aclose()
            new = await line.enter_async_context(agent_of(bare))
            front.current = BridgeGuestBackend(new, "linux")
            await mount.release()

    async def test_in_mid_request(self, bare: Machine, tmp_path: Path) -> None:
        """Each request in flight ends, unknown; afterwards everything is released and works."""
        paths = [disks.blank(tmp_path / f"{number}.raw") for number in range(2)]
        config = MountConfig(filesystem="ext4", ensure_filesystem=True)
        await shell(bare, MKFS_WAITS)
        async with AsyncExitStack() as stack:
            host = await stack.enter_async_context(host_of(bare))
            line = await stack.enter_async_context(AsyncExitStack())
            old = await line.enter_async_context(agent_of(bare, answer=5.0))
            front = GuestInFront(BridgeGuestBackend(old, "linux"))
            manager = await stack.enter_async_context(Manager(host, front))
            adds = [
                asyncio.create_task(manager.add_virtual_disk(path, mount=config)) for path in paths
            ]
            await shell(bare, "until [ $(ls /run/making | wc -l) = 2 ]; do sleep 0.05; done")
            await kill_agent(bare)
            async with asyncio.timeout(DEADLINE):
                done = await asyncio.gather(*adds, return_exceptions=True)
            assert [type(outcome) for outcome in done] == [OutcomeUnknownError] * 2
            await line.aclose()
            new = await line.enter_async_context(agent_of(bare))
            front.current = BridgeGuestBackend(new, "linux")
            # No disk is let go while what the dead agent has begun is at work on it.
            await shell(bare, MKFS_GOES_ON)
            await manager.release_all()
            assert {status.state for status in manager.slots()} == {SlotState.FREE}
            mount = await manager.add_virtual_disk(paths[0], mount=config)
            assert (await mounted_at(bare, mount)).filesystem == "ext4"


class TestGarbage:
    async def test_does_not_keep_the_agent_from_the_next_client(
        self, bare: Machine, tmp_path: Path
    ) -> None:
        """Frames of any size and content into a real agent's port; then an ordinary client."""
        path = disks.ext4(tmp_path / "disk.raw")
        agent = await agent_pid(bare)
        for garbage in _garbage():
            reader, writer = await asyncio.open_unix_connection(bare.agent_socket)
            writer.write(garbage)
            # The agent need not read all of it: some ends its patience.
            reading = asyncio.create_task(reader.read(1 << 20))
            await asyncio.wait([asyncio.create_task(writer.drain()), reading], timeout=0.2)
            reading.cancel()
            await asyncio.wait([reading])
            writer.transport.abort()
            async with asyncio.timeout(DEADLINE), agent_of(bare) as connection:
                assert connection.os_type == "linux"
        await works(bare, path)
        assert await agent_pid(bare) == agent


def _garbage() -> list[bytes]:
    chance = random.Random(5)

    def frame(kind: int, payload: bytes, number: int = 1) -> bytes:
        return encode(Frame(kind, number, payload))

    def header(kind: int, size: int) -> bytes:
        return struct.pack("<IIQ", kind, size, 1)

    greeting = frame(MessageType.NEGOTIATE_PROTOCOL, encode_request(negotiate_request()))
    modify = MessageType.MODIFY_SETTINGS
    return [
        b"\n",
        chance.randbytes(15),
        chance.randbytes(100_000),
        bytes(1 << 20),
        *(header(modify, size) for size in (0, 1, 15, 17, 1 << 31, (1 << 32) - 1)),
        greeting[:7],
        greeting[:-1],
        greeting + greeting,
        greeting + frame(modify, b"{"),
        greeting + frame(modify, b'{"Request": ' + b"[" * 100_000),
        greeting + frame(modify, b'{"ContainerId": 1e400, "Request": {"Settings": null}}'),
        greeting + frame(modify, chance.randbytes(50_000)),
        greeting + b"".join(frame(chance.getrandbits(32), b"{}", n) for n in range(200)),
        greeting + header(modify, 4 << 20) + bytes(3 << 20),
    ]


class TestTheVMDies:
    @pytest.mark.parametrize("moment", [0.0, 0.05])
    async def test_with_adds_and_releases_in_flight(self, tmp_path: Path, moment: float) -> None:
        """All end promptly with our errors, so does leaving; no process and no lock is left."""
        paths = [disks.ext4(tmp_path / f"{number}.raw", str(number)) for number in range(5)]
        async with Machine.start() as vm:
            manager = Manager(vm.host, vm.guest)
            with pytest.raises(ExceptionGroup) as left:
                async with manager:
                    mounts = [await manager.add_virtual_disk(p, mount=MOUNTED) for p in paths[:3]]
                    work: list[asyncio.Task[object]] = [
                        *(asyncio.create_task(_any(mount.release())) for mount in mounts[:2]),
                        *(
                            asyncio.create_task(_any(manager.add_virtual_disk(p, mount=MOUNTED)))
                            for p in paths[3:]
                        ),
                    ]
                    await asyncio.sleep(moment)
                    vm.kill()
                    async with asyncio.timeout(DEADLINE):
                        outcomes = await asyncio.gather(*work, return_exceptions=True)
                    assert all(
                        isinstance(outcome, (HotlunError, type(None))) for outcome in outcomes
                    ), outcomes
                    async with asyncio.timeout(DEADLINE):
                        # A dying process holds its sockets a little longer: what is sent to it
                        # until then is unknown, and what comes after that is never sent.
                        with pytest.raises(
                            (OutcomeUnknownError, VMGoneError), match=f"monitor went away|{GONE}"
                        ):
                            await manager.add_virtual_disk(disks.blank(tmp_path / "a.raw"))
                        with pytest.raises(VMGoneError, match=GONE):
                            await manager.add_virtual_disk(disks.blank(tmp_path / "b.raw"))
            assert all(isinstance(error, HotlunError) for error in left.value.exceptions)
            await vm.wait()
        assert not os.path.exists(f"/proc/{vm.pid}")
        async with Machine.start() as other, Manager(other.host, other.guest) as manager:
            for number, path in enumerate(paths):
                mount = await manager.add_virtual_disk(path, mount=MOUNTED)
                assert await note_in(other, mount) == str(number)


async def _any(work: object) -> object:
    return await work  # type: ignore[misc]
