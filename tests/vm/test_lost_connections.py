"""Peers that are not there, go away, say nothing, or say anything; and the way back to order."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from support import disks
from support.agent import agent_pid, kill_agent
from support.guest_shell import mounted_at, note_in, shell
from support.machine import eventually, look
from support.news import News
from support.relay import Relay

from hotlun import (
    AlreadyReleasedError,
    BackendError,
    Manager,
    MountConfig,
    OutcomeUnknownError,
    Slot,
    SlotState,
    UnsupportedError,
)
from hotlun.backends.bridge import BridgeGuestBackend
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.bridge.client import REQUEST_TIMEOUT, BridgeConnection
from hotlun.bridge.documents import encode_request
from hotlun.bridge.frames import Frame, encode
from hotlun.bridge.messages import MessageType, negotiate_request
from hotlun.errors import VMGoneError
from hotlun.events import ConnectionLost, ConnectionRestored, DisagreementSettled, Event, VMGone
from hotlun.reconciliation import Finding, Resolution
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
WITHIN = 30.0
"""Seconds in which it is noticed that nobody is going to answer, and the undoing is tried."""
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

WAITS = "(until [ -e /run/go ]; do sleep 0.02; done; rm /run/go)"
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


@asynccontextmanager
async def managed(
    vm: Machine, folder: Path, *, answer: float = TIMEOUT
) -> AsyncIterator[tuple[Relay, Manager, News]]:
    """A Manager whose way to the agent leads through a relay, and what it tells."""
    async with (
        Relay.to(vm.agent_socket, folder) as relay,
        host_of(vm) as host,
        agent_of(vm, relay.path, answer) as connection,
        Manager(host, BridgeGuestBackend(connection, "linux")) as manager,
    ):
        yield relay, manager, News(manager)


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
    """Connections that go away in mid-operation, and come back; the Manager lives through it."""

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

    async def test_the_bridge_in_mid_mount(self, bare: Machine, tmp_path: Path) -> None:
        """After the request was sent: unknown; it comes back, and the mount is undone over it."""
        path = disks.ext4(tmp_path / "disk.raw")
        async with managed(bare, tmp_path) as (relay, manager, news):
            relay.cut_after(b'"MappedVirtualDisk"')
            async with asyncio.timeout(DEADLINE):
                with pytest.raises(OutcomeUnknownError, match="no telling") as caught:
                    await manager.add_virtual_disk(path, mount=MOUNTED)
            assert (caught.value.operation, str(path) in str(caught.value)) == ("mount", True)
            assert manager.slots()[0].state is SlotState.FREE
            assert await news.next() == ConnectionLost("guest", "the other end closed it")
            assert await news.next() == ConnectionRestored("guest")
            again = await manager.add_virtual_disk(path, mount=MOUNTED)
            assert (await mounted_at(bare, again)).filesystem == "ext4"

    @pytest.mark.parametrize("way", ["cut", "silent"])
    @pytest.mark.parametrize("operation", ["unmount", "unplug"])
    async def test_the_bridge_in_mid_release(
        self, bare: Machine, tmp_path: Path, operation: str, way: str
    ) -> None:
        """Unknown; when the guest can be asked, what it has is believed; the release goes on."""
        path = disks.ext4(tmp_path / "disk.raw")
        said = b'"SCSIDevice"' if operation == "unplug" else b'"MappedVirtualDisk"'
        async with managed(bare, tmp_path, answer=2.0) as (relay, manager, news):
            mount = await manager.add_virtual_disk(path, mount=MOUNTED)
            (relay.cut_after if way == "cut" else relay.silent_after)(said)
            async with asyncio.timeout(DEADLINE):
                with pytest.raises(OutcomeUnknownError, match="no telling") as caught:
                    await mount.release()
            assert (caught.value.operation, str(path) in str(caught.value)) == (operation, True)
            assert manager.mounts == (mount,)
            status = manager.slots()[0]
            assert (status.state, status.holders) == (SlotState.TAKEN, 1)
            assert "no telling" in status.reason
            relay.cut()
            one = (await news.until(DisagreementSettled)).disagreement
            seen = await look(bare)
            if operation == "unmount":
                was_done = seen.mount_at(mount.guest_path or "") is None
                finding = Finding.UNMOUNTED if was_done else Finding.MOUNT_KEPT
            else:
                was_done = not seen.scsi
                finding = Finding.DEVICE_GONE if was_done else Finding.DEVICE_KEPT
            resolution = Resolution.NOTED if was_done else Resolution.ADOPTED
            assert (one.finding, one.resolution) == (finding, resolution)
            assert news.kinds == [ConnectionLost, ConnectionRestored, DisagreementSettled]
            await mount.release()
            assert manager.slots()[0].state is SlotState.FREE
            again = await manager.add_virtual_disk(path, mount=MOUNTED)
            assert (await mounted_at(bare, again)).filesystem == "ext4"

    async def test_what_the_agent_still_does_is_not_adopted(
        self, bare: Machine, tmp_path: Path
    ) -> None:
        """An unmount that waits for a process goes on after the cut; what an add gets stays."""
        path = disks.ext4(tmp_path / "disk.raw")
        async with managed(bare, tmp_path) as (relay, manager, news):
            await manager.add_virtual_disk(path)
            mount = await manager.add_virtual_disk(path, mount=MOUNTED)
            await shell(bare, f"cd {mount.guest_path}; {WAITS} </dev/null >/dev/null 2>&1 &")
            relay.cut_after(b'"MappedVirtualDisk"')
            with pytest.raises(OutcomeUnknownError):
                await mount.release()
            await news.until(ConnectionRestored)
            await manager.reconcile()
            adding = asyncio.create_task(manager.add_virtual_disk(path, mount=MOUNTED))
            await asyncio.wait([adding], timeout=1.0)  # the agent gives up after two
            await shell(bare, "touch /run/go")
            async with asyncio.timeout(DEADLINE):
                sharing = await adding
                # The agent does what is asked of one disk in turn.
                await manager.add_virtual_disk(path, mount=MountConfig(options=["noatime"]))
            assert (await mounted_at(bare, sharing)).filesystem == "ext4"


class TestSilence:
    """An agent, or the way to it, from which nothing comes any more."""

    @pytest.mark.parametrize("way", ["cut", "speaks"])
    async def test_in_mid_mount(self, bare: Machine, tmp_path: Path, way: str) -> None:
        """Unknown, and so is the undoing; the slot is quarantined, and freed by itself.

        When the connection is another one, or after a pause if answers just come again.
        """
        path = disks.ext4(tmp_path / "disk.raw")
        async with managed(bare, tmp_path, answer=2.0) as (relay, manager, news):
            relay.silent_after(b'"MappedVirtualDisk"')
            async with asyncio.timeout(DEADLINE):
                with pytest.raises(OutcomeUnknownError, match="within 2 s") as caught:
                    await manager.add_virtual_disk(path, mount=MOUNTED)
            assert caught.value.operation == "mount"
            assert any("unmount" in note for note in caught.value.__notes__)
            assert manager.mounts == ()
            status = manager.slots()[0]
            assert status.state is SlotState.QUARANTINED
            assert "no telling" in status.reason
            (relay.cut if way == "cut" else relay.speak)()
            await news.until(
                DisagreementSettled, lambda it: it.disagreement.resolution is Resolution.UNDONE
            )
            assert manager.slots()[0].state is SlotState.FREE
            restored = ConnectionRestored("guest") in news.heard
            assert restored == (way == "cut")
            again = await manager.add_virtual_disk(path, mount=MOUNTED)
            assert (await mounted_at(bare, again)).filesystem == "ext4"


class TestTheAgentIsKilled:
    async def test_while_a_disk_is_mounted(self, bare: Machine, tmp_path: Path) -> None:
        """Init starts it again; what the dead one mounted is released over the same connection."""
        path = disks.ext4(tmp_path / "disk.raw", "outlives")
        async with managed(bare, tmp_path) as (_, manager, news):
            mount = await manager.add_virtual_disk(path, mount=MOUNTED)
            await kill_agent(bare)
            assert await note_in(bare, mount) == "outlives"
            await mount.release()
            assert manager.slots()[0].state is SlotState.FREE
            anew = "the agent in the guest was started anew"
            assert await news.next() == ConnectionLost("guest", anew)
            assert await news.next() == ConnectionRestored("guest")

    async def test_in_mid_request(self, bare: Machine, tmp_path: Path) -> None:
        """Each request in flight ends within seconds, unknown; then everything works again.

        However long an answer may take: the agent that is there now knows nothing of it.
        """
        paths = [disks.blank(tmp_path / f"{number}.raw") for number in range(2)]
        config = MountConfig(filesystem="ext4", ensure_filesystem=True)
        await shell(bare, MKFS_WAITS)
        async with managed(bare, tmp_path, answer=REQUEST_TIMEOUT) as (_, manager, news):
            adds = [
                asyncio.create_task(manager.add_virtual_disk(path, mount=config)) for path in paths
            ]
            await shell(bare, "until [ $(ls /run/making | wc -l) = 2 ]; do sleep 0.05; done")
            await kill_agent(bare)
            began = time.monotonic()
            done = await asyncio.gather(*adds, return_exceptions=True)
            assert time.monotonic() - began < WITHIN
            assert [type(outcome) for outcome in done] == [OutcomeUnknownError] * 2
            assert all("was started anew" in str(outcome) for outcome in done)
            # No disk is let go while what the dead agent has begun is at work on it.
            states = {manager.slots()[lun].state for lun in range(2)}
            assert states == {SlotState.QUARANTINED}
            await shell(bare, MKFS_GOES_ON)
            for _ in paths:
                await news.until(
                    DisagreementSettled, lambda it: it.disagreement.resolution is Resolution.UNDONE
                )
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
        """All end promptly with our errors; what there was is forgotten, and nothing is left."""
        paths = [disks.ext4(tmp_path / f"{number}.raw", str(number)) for number in range(5)]
        async with Machine.start() as vm:
            async with Manager(vm.host, vm.guest) as manager:
                news = News(manager)
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
                async with asyncio.timeout(WITHIN):
                    outcomes = await asyncio.gather(*work, return_exceptions=True)
                    for outcome in outcomes:
                        assert isinstance(outcome, (BackendError, OutcomeUnknownError, type(None)))
                    # A dying process holds its sockets a little longer: what is sent to it
                    # until then is unknown, and what comes after that is never sent.
                    await news.until(VMGone)
                    with pytest.raises(VMGoneError, match=GONE):
                        await manager.add_virtual_disk(disks.blank(tmp_path / "more.raw"))
                    with pytest.raises(VMGoneError, match=GONE):
                        await mounts[2].release()
                assert manager.mounts
                await manager.forget()
                assert manager.mounts == ()
                assert {status.state for status in manager.slots()} == {SlotState.FREE}
                assert mounts[2].lost == GONE
                with pytest.raises(AlreadyReleasedError):
                    await mounts[2].release()
            await vm.wait()
        assert not os.path.exists(f"/proc/{vm.pid}")
        async with Machine.start() as other, Manager(other.host, other.guest) as manager:
            for number, path in enumerate(paths):
                mount = await manager.add_virtual_disk(path, mount=MOUNTED)
                assert await note_in(other, mount) == str(number)

    async def test_and_nothing_is_forgotten(self, tmp_path: Path) -> None:
        """Then leaving says so, once, and is prompt."""
        paths = [disks.ext4(tmp_path / f"{number}.raw") for number in range(3)]
        async with Machine.start() as vm:
            with pytest.raises(ExceptionGroup) as left:
                async with Manager(vm.host, vm.guest) as manager:
                    news = News(manager)
                    for path in paths:
                        await manager.add_virtual_disk(path, mount=MOUNTED)
                    vm.kill()
                    await news.until(VMGone)
                    began = time.monotonic()
            assert time.monotonic() - began < WITHIN
            (error,) = left.value.exceptions
            assert isinstance(error, VMGoneError)


async def _any(work: object) -> object:
    return await work  # type: ignore[misc]
