"""The QEMU host backend's monitor comes back when its connection is lost; if not, it says why."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from support.qemu import Refuses, ScriptedMonitor, Silence, attachment, connected, running_qemu
from support.relay import Relay

from hotlun import BackendError, OutcomeUnknownError
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.errors import VMGoneError
from hotlun.events import ConnectionLost, ConnectionRestored, Event, VMGone
from hotlun.model import Presence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from support.qemu import QEMU

    from hotlun.model import Attachment

PROMPT = 20.0
"""Seconds that nothing here may take, while the backend's own deadline is far longer."""
LONG = 600.0
SHORT = 1.0


@pytest.fixture(autouse=True)
async def nothing_unheard() -> AsyncIterator[None]:
    """No task may end with an error that nobody hears of, nor be forgotten while it runs."""
    unheard: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: unheard.append(context["message"]))
    yield
    gc.collect()
    assert not unheard


@pytest.fixture
async def monitor(tmp_path: Path) -> AsyncIterator[ScriptedMonitor]:
    """A monitor that follows a script."""
    async with ScriptedMonitor.serving(tmp_path) as monitor:
        yield monitor


@pytest.fixture
def disk(tmp_path: Path) -> Attachment:
    """An attachment of an image that exists."""
    return image(tmp_path)


def image(tmp_path: Path, lun: int = 0) -> Attachment:
    path = tmp_path / f"{lun}.raw"
    path.write_bytes(bytes(1 << 20))
    return attachment(path, lun)


def through(relay: Relay, timeout: float = LONG) -> AbstractAsyncContextManager[QEMUHostBackend]:
    return QEMUHostBackend.connect(relay.path, controllers=("scsi0", "scsi1"), timeout=timeout)


def scripted(
    monitor: ScriptedMonitor, timeout: float = LONG
) -> AbstractAsyncContextManager[QEMUHostBackend]:
    return QEMUHostBackend.connect(monitor.path, controllers=["scsi0"], timeout=timeout)


class Heard:
    """What a backend tells, to be waited for."""

    def __init__(self, host: QEMUHostBackend) -> None:
        self.events: list[Event] = []
        self._came = asyncio.Event()
        self.unsubscribe = host.watch(self._hear)

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        self._came.set()

    async def kinds(self, *kinds: type[Event]) -> None:
        """Wait until just these have come."""
        async with asyncio.timeout(PROMPT):
            while len(self.events) < len(kinds):
                self._came.clear()
                await self._came.wait()
        assert tuple(map(type, self.events)) == kinds


@pytest.mark.qemu
async def test_a_cut_connection_comes_back(vm: QEMU, tmp_path: Path, disk: Attachment) -> None:
    """Again and again; the listener hears of it, and calls made meanwhile wait for it."""
    async with Relay.to(vm.qmp_socket, tmp_path) as relay, through(relay) as host:
        for call in (host.attach, host.detach) * 2:
            heard = Heard(host)
            relay.cut()
            await heard.kinds(ConnectionLost)
            async with asyncio.timeout(PROMPT):
                await call(disk)
            await heard.kinds(ConnectionLost, ConnectionRestored)
            assert {getattr(event, "side", "") for event in heard.events} == {"host"}
            assert isinstance(heard.events[0], ConnectionLost)
            assert heard.events[0].reason
            heard.unsubscribe()
        assert await vm.is_bare()


@pytest.mark.qemu
@pytest.mark.parametrize("command", ["blockdev-add", "device_add", "device_del", "blockdev-del"])
async def test_cut_after_a_command(
    vm: QEMU, tmp_path: Path, disk: Attachment, command: str
) -> None:
    """Unknown at once: QEMU drops what it has not read. A survey tells, a detach finishes it."""
    states = {
        "blockdev-add": {Presence.ABSENT, Presence.PARTIAL, Presence.PRESENT},
        "device_add": {Presence.ABSENT, Presence.PARTIAL, Presence.PRESENT},
        "device_del": {Presence.PRESENT, Presence.PARTIAL},
        "blockdev-del": {Presence.PARTIAL, Presence.ABSENT},
    }
    async with Relay.to(vm.qmp_socket, tmp_path) as relay, through(relay) as host:
        if command.endswith("del"):
            await host.attach(disk)
        relay.cut_after(f'"{command}"'.encode())
        async with asyncio.timeout(PROMPT):
            with pytest.raises(OutcomeUnknownError, match="the monitor went away"):
                await (host.detach(disk) if command.endswith("del") else host.attach(disk))
            assert (await host.survey([disk]))[disk.serial] in states[command]
            await host.detach(disk)
            assert (await host.survey([disk]))[disk.serial] is Presence.ABSENT
        assert await vm.is_bare()


async def removed_unheard(vm: QEMU, relay: Relay, host: QEMUHostBackend, disk: Attachment) -> None:
    """Have QEMU begin to remove a device, with nobody there to hear of it."""
    relay.silent_after(b'"device_del"')
    detaching = asyncio.create_task(host.detach(disk))
    while await vm.devices():
        await asyncio.sleep(0)
    relay.cut()
    async with asyncio.timeout(PROMPT):
        with pytest.raises(OutcomeUnknownError):
            await detaching


@pytest.mark.qemu
@pytest.mark.parametrize("pause", [0.0, 0.02, 0.3])
async def test_a_removal_whose_event_went_to_nobody(
    vm: QEMU, tmp_path: Path, disk: Attachment, pause: float
) -> None:
    """However far QEMU has got when it is asked again, that ends promptly and nothing is left."""
    async with Relay.to(vm.qmp_socket, tmp_path) as relay, through(relay) as host:
        await host.attach(disk)
        await removed_unheard(vm, relay, host, disk)
        await asyncio.sleep(pause)
        async with asyncio.timeout(PROMPT):
            await host.detach(disk)
        assert await vm.is_bare()


@pytest.mark.qemu
async def test_a_removal_whose_node_has_another_user(
    vm: QEMU, tmp_path: Path, disk: Attachment
) -> None:
    """With the event gone to nobody it is not waited for; when that user has gone, it is done."""
    name = f"hotlun-{disk.serial}"
    async with Relay.to(vm.qmp_socket, tmp_path) as relay, through(relay) as host:
        await host.attach(disk)
        await vm.client.execute(
            "blockdev-add", {"driver": "raw", "node-name": "user", "file": name, "read-only": True}
        )
        await removed_unheard(vm, relay, host, disk)
        while name in str(await vm.ask("query-block")):
            await asyncio.sleep(0.01)
        async with asyncio.timeout(PROMPT):
            with pytest.raises(OutcomeUnknownError, match="something in QEMU still uses"):
                await host.detach(disk)
        await vm.client.execute("blockdev-del", {"node-name": "user"})
        await host.detach(disk)
        assert await vm.is_bare()


@pytest.mark.qemu
async def test_many_in_flight(vm: QEMU, tmp_path: Path) -> None:
    """64 calls lose their connection at once: each is unknown, and all is undone afterwards."""
    disks = [image(tmp_path, lun) for lun in range(64)]
    async with Relay.to(vm.qmp_socket, tmp_path) as relay, through(relay) as host:
        await asyncio.gather(*map(host.attach, disks[:32]))
        relay.cut_after(b'"device_del"')
        async with asyncio.timeout(PROMPT):
            outcomes = await asyncio.gather(
                *map(host.detach, disks[:32]),
                *map(host.attach, disks[32:]),
                return_exceptions=True,
            )
            assert {type(each) for each in outcomes} <= {OutcomeUnknownError, type(None)}
            assert OutcomeUnknownError in map(type, outcomes)
            await asyncio.gather(*map(host.detach, disks))
        assert await vm.is_bare()


@pytest.mark.qemu
async def test_a_monitor_that_stays_silent_is_not_gone(
    vm: QEMU, tmp_path: Path, disk: Attachment
) -> None:
    """What waited for too long was not sent; when QEMU answers again, everything goes on."""
    async with Relay.to(vm.qmp_socket, tmp_path) as relay, through(relay, timeout=SHORT) as host:
        heard = Heard(host)
        vm.process.send_signal(signal.SIGSTOP)
        relay.cut()
        await heard.kinds(ConnectionLost)
        with pytest.raises(
            BackendError, match=r"did not come back within 1 s; nothing was sent"
        ) as caught:
            await host.attach(disk)
        assert type(caught.value) is BackendError
        assert caught.value.disk == disk.disk
        vm.process.send_signal(signal.SIGCONT)
        await heard.kinds(ConnectionLost, ConnectionRestored)
        assert (await host.survey([disk]))[disk.serial] is Presence.ABSENT


@pytest.mark.qemu
async def test_a_monitor_that_another_client_took(vm: QEMU, tmp_path: Path) -> None:
    """It is waited for in line, and served as soon as the other has left."""
    async with Relay.to(vm.qmp_socket, tmp_path) as relay, through(relay) as host:
        heard = Heard(host)
        vm.process.send_signal(signal.SIGSTOP)
        reader, other = await asyncio.open_unix_connection(vm.qmp_socket)
        relay.cut()
        await heard.kinds(ConnectionLost)
        vm.process.send_signal(signal.SIGCONT)
        await reader.readline()
        waiting = asyncio.create_task(host.occupied())
        assert not (await asyncio.wait([waiting], timeout=1))[0]
        other.close()
        async with asyncio.timeout(PROMPT):
            assert await waiting == set()


@pytest.mark.qemu
@pytest.mark.parametrize("way", ["SIGKILL", "quit", "missing"])
async def test_a_qemu_that_has_ended(tmp_path: Path, disk: Attachment, way: str) -> None:
    """What waits and what comes later is told so at once, in the same words; trying stops."""
    async with (
        running_qemu(tmp_path) as vm,
        connected(vm, timeout=LONG) as direct,
    ):
        heard = Heard(direct)
        await direct.attach(disk)
        if way == "missing":
            os.rename(vm.qmp_socket, tmp_path / "elsewhere")
        if way == "quit":
            await vm.client.execute("quit")
        else:
            vm.process.kill()
        async with asyncio.timeout(PROMPT):
            while not isinstance(heard.events[-1] if heard.events else None, VMGone):
                with pytest.raises((OutcomeUnknownError, BackendError)):
                    await direct.detach(disk)
        for call in (
            direct.attach(disk),
            direct.detach(disk),
            direct.occupied(),
            direct.survey([disk]),
        ):
            began = time.monotonic()
            with pytest.raises(
                VMGoneError, match=r"the VM is gone: .* Nothing is attached any more"
            ):
                await call
            assert time.monotonic() - began < 1
        assert direct.device_arguments() == []
        last = heard.events[-2:]
        assert [type(event) for event in last] == [ConnectionLost, VMGone]
        assert isinstance(last[1], VMGone)
        assert vm.qmp_socket in last[1].reason
        if way == "missing":
            os.rename(tmp_path / "elsewhere", vm.qmp_socket)
        assert not [task for task in asyncio.all_tasks() if "keeper" in task.get_name()]


@pytest.mark.qemu
async def test_another_qemu_in_the_same_place(tmp_path: Path, disk: Attachment) -> None:
    """It is not taken for the one that was connected: that VM is gone, and this one is let be."""
    (tmp_path / "other").mkdir()
    async with (
        running_qemu(tmp_path) as vm,
        running_qemu(tmp_path / "other") as newer,
        Relay.to(vm.qmp_socket, tmp_path) as relay,
        through(relay) as host,
    ):
        heard = Heard(host)
        relay.target = newer.qmp_socket
        relay.cut()
        await heard.kinds(ConnectionLost, VMGone)
        with pytest.raises(VMGoneError, match=r"the VM is gone: another QEMU has its monitor"):
            await host.attach(disk)
        assert await newer.is_bare()
        async with asyncio.timeout(PROMPT), connected(newer) as other:
            await other.attach(disk)
            await other.detach(disk)


@pytest.mark.qemu
async def test_calls_in_flight_when_qemu_is_killed(tmp_path: Path) -> None:
    """Sent ones are unknown, waiting ones learn that the VM is gone; none takes long."""
    disks = [image(tmp_path, lun) for lun in range(32)]
    async with running_qemu(tmp_path) as vm, connected(vm, timeout=LONG) as host:
        calls = [asyncio.create_task(host.attach(disk)) for disk in disks]
        await asyncio.sleep(0.01)
        vm.process.kill()
        later = [asyncio.create_task(host.detach(disk)) for disk in disks]
        async with asyncio.timeout(PROMPT):
            outcomes = await asyncio.gather(*calls, *later, return_exceptions=True)
        assert {type(each) for each in outcomes} <= {OutcomeUnknownError, VMGoneError, type(None)}
        with pytest.raises(VMGoneError):
            await host.detach(disks[0])


async def test_a_monitor_that_keeps_hanging_up(monitor: ScriptedMonitor) -> None:
    """It is tried ever more seldom, not as fast as it can."""
    monitor.answers["query-named-block-nodes"] = Silence.HANGS_UP
    async with scripted(monitor) as host:
        heard = Heard(host)
        ends = time.monotonic() + 1.5
        while time.monotonic() < ends:
            with pytest.raises(BackendError):
                await host.survey([attachment("/nowhere")])
        assert len(heard.events) <= 14


async def test_a_device_that_vanished_between_two_connections(
    monitor: ScriptedMonitor, disk: Attachment
) -> None:
    """It is absent and its node is not held by it: the event is not waited for."""
    monitor.answers["device_del"] = [
        Silence.HANGS_UP,
        Refuses("Device 'x' not found", "DeviceNotFound"),
    ]
    monitor.answers["blockdev-del"] = [Refuses("Node x is in use"), {}]
    monitor.answers["query-block"] = [[{"device": "", "inserted": {"node-name": "other"}}, {}]]
    async with scripted(monitor) as host, asyncio.timeout(PROMPT):
        with pytest.raises(OutcomeUnknownError):
            await host.detach(disk)
        await host.detach(disk)
    assert monitor.commands[-4:] == ["device_del", "blockdev-del", "query-block", "blockdev-del"]


async def test_a_connection_lost_while_the_event_is_waited_for(
    monitor: ScriptedMonitor, disk: Attachment
) -> None:
    """The wait ends at once, though the connection comes back: the event went to the old one."""
    async with scripted(monitor) as host, asyncio.timeout(PROMPT):
        heard = Heard(host)
        detaching = asyncio.create_task(host.detach(disk))
        while "device_del" not in monitor.commands:
            await asyncio.sleep(0.01)
        monitor.hang_up()
        with pytest.raises(OutcomeUnknownError, match="no answer to the event"):
            await detaching
        await heard.kinds(ConnectionLost, ConnectionRestored)


async def test_leaving_while_it_connects_again(monitor: ScriptedMonitor, disk: Attachment) -> None:
    """Leaving does not wait, ends what waits, and leaves no task and no file behind."""
    before = len(os.listdir("/proc/self/fd")), asyncio.all_tasks()
    async with asyncio.timeout(PROMPT):
        async with scripted(monitor) as host:
            heard = Heard(host)
            monitor.greets = False
            monitor.hang_up()
            await heard.kinds(ConnectionLost)
            attaching = asyncio.create_task(host.attach(disk))
            await asyncio.sleep(0.2)
        with pytest.raises(BackendError, match="has been left; nothing was sent"):
            await attaching
        while asyncio.all_tasks() - before[1] - monitor.tasks:
            await asyncio.sleep(0.01)
    monitor.hang_up()
    await asyncio.sleep(0.1)
    assert len(os.listdir("/proc/self/fd")) <= before[0] + 1
    assert len(heard.events) == 1


async def test_a_listener_that_fails(
    monitor: ScriptedMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; the others hear, and the connection comes back."""

    def fails(event: Event) -> None:
        raise ValueError("no")

    caplog.set_level(logging.ERROR, "hotlun.qemu")
    async with scripted(monitor) as host:
        host.watch(fails)
        heard = Heard(host)
        monitor.hang_up()
        await heard.kinds(ConnectionLost, ConnectionRestored)
        assert await host.occupied() == set()
    assert [record.message.split(" at ")[0] for record in caplog.records] == [
        "a listener failed"
    ] * 2
