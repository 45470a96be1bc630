"""What the QEMU backend tells of a VM and its disks without having been asked."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import pytest
from support.qemu import QEMU, ScriptedMonitor, attachment, connected, make_image, running_qemu

from hotlun.backends import base
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.events import (
    DiskFailed,
    Event,
    GuestReset,
    GuestShutdown,
    UnplugRefused,
    VMPaused,
    VMResumed,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hotlun.model import Attachment

DEADLINE = 30.0


class Ear:
    """Hears events, which can be waited for one by one."""

    def __init__(self, host: QEMUHostBackend) -> None:
        self.heard: asyncio.Queue[Event] = asyncio.Queue()
        self.unsubscribe = base.watch(host, self.heard.put_nowait)

    async def next(self) -> Event:
        async with asyncio.timeout(DEADLINE):
            return await self.heard.get()


@pytest.fixture
async def monitor(tmp_path: Path) -> AsyncIterator[ScriptedMonitor]:
    """A monitor that follows a script."""
    async with ScriptedMonitor.serving(tmp_path) as monitor:
        yield monitor


@pytest.fixture
async def host_of_script(monitor: ScriptedMonitor) -> AsyncIterator[QEMUHostBackend]:
    """Connected to it."""
    async with QEMUHostBackend.connect(monitor.path, controllers=["scsi0"], timeout=5) as host:
        yield host


@pytest.fixture
def disk(tmp_path: Path) -> Attachment:
    """An attachment of an image that exists."""
    return attachment(make_image(tmp_path / "disk.raw", "raw"), lun=3)


@pytest.mark.qemu
async def test_pauses_and_resumptions(vm: QEMU, host: QEMUHostBackend) -> None:
    """Asked for by somebody: no reason."""
    ear = Ear(host)
    await vm.client.execute("cont")
    assert await ear.next() == VMResumed()
    await vm.client.execute("stop")
    assert await ear.next() == VMPaused("")


@pytest.mark.qemu
async def test_a_reset_and_a_shutdown(tmp_path: Path) -> None:
    """Told with who did it and, of a shutdown, QEMU's word for why."""
    async with running_qemu(tmp_path) as vm, connected(vm) as host:
        ear = Ear(host)
        await vm.client.execute("cont")
        assert await ear.next() == VMResumed()
        await vm.client.execute("system_reset")
        assert await ear.next() == GuestReset(by_guest=False)
        await vm.client.execute("quit")
        assert await ear.next() == GuestShutdown(by_guest=False, reason="host-qmp-quit")


@pytest.mark.qemu
async def test_a_reset_of_a_vm_that_ends_on_it(tmp_path: Path) -> None:
    """With -no-reboot it is a shutdown."""
    async with running_qemu(tmp_path, "-no-reboot") as vm, connected(vm) as host:
        ear = Ear(host)
        await vm.client.execute("cont")
        assert await ear.next() == VMResumed()
        await vm.client.execute("system_reset")
        assert await ear.next() == GuestShutdown(by_guest=False, reason="host-qmp-system-reset")


@pytest.mark.qemu
async def test_nothing_is_kept_by_the_client(vm: QEMU, host: QEMUHostBackend) -> None:
    """However many events come, whether or not somebody listens."""
    ear = Ear(host)
    for _ in range(50):
        await vm.client.execute("cont")
        await vm.client.execute("stop")
    assert [await ear.next() for _ in range(100)] == [VMResumed(), VMPaused()] * 50
    client = host._monitor._link._client
    assert client.events.empty()
    assert client.events.history == ()
    assert len(client._listeners) == 1


@pytest.mark.qemu
async def test_whoever_is_done_hears_no_more(vm: QEMU, host: QEMUHostBackend) -> None:
    """Each has a subscription of its own, even with the same function; ending it twice is fine."""
    heard: list[Event] = []
    one, two = host.watch(heard.append), host.watch(heard.append)
    ear = Ear(host)
    await vm.client.execute("cont")
    await ear.next()
    one()
    one()
    await vm.client.execute("stop")
    await ear.next()
    two()
    await vm.client.execute("cont")
    await ear.next()
    assert heard == [VMResumed(), VMResumed(), VMPaused()]


def io_error(disk: Attachment, **changes: object) -> dict[str, object]:
    """The data of a BLOCK_IO_ERROR as QEMU 7.2 sends it for a scsi-hd."""
    return {
        "device": "",
        "node-name": f"hotlun-{disk.serial}",
        "operation": "write",
        "action": "report",
        "nospace": False,
        "reason": "Input/output error",
    } | changes


async def test_a_disk_that_fails(
    monitor: ScriptedMonitor, host_of_script: QEMUHostBackend, disk: Attachment
) -> None:
    """Its attachment, what was tried, why it failed, and whether the VM is going to stand still."""
    ear = Ear(host_of_script)
    await host_of_script.attach(disk)
    monitor.say("BLOCK_IO_ERROR", **io_error(disk))
    assert await ear.next() == DiskFailed(disk, "write", False, False, "Input/output error")
    monitor.say("BLOCK_IO_ERROR", **io_error(disk, operation="read", action="ignore"))
    assert await ear.next() == DiskFailed(disk, "read", False, False, "Input/output error")
    monitor.say("BLOCK_IO_ERROR", **io_error(disk, action="stop", nospace=True, reason="full"))
    assert await ear.next() == DiskFailed(disk, "write", True, True, "full")
    path = {"node-name": "", "qom-path": f"/machine/peripheral/hotlun-{disk.serial}"}
    monitor.say("BLOCK_IO_ERROR", **io_error(disk, **path))
    assert cast("DiskFailed", await ear.next()).attachment == disk


async def test_why_the_vm_stands_still(
    monitor: ScriptedMonitor, host_of_script: QEMUHostBackend, disk: Attachment
) -> None:
    """A pause after a failure says which disk, why, and what to do; the next one has forgotten."""
    ear = Ear(host_of_script)
    await host_of_script.attach(disk)
    for changes, words in (
        ({"nospace": True}, "the host has no space left for it; make room, then `cont`"),
        ({}, "Input/output error; mend the disk's storage, then `cont`"),
    ):
        for _ in range(2):
            monitor.say("BLOCK_IO_ERROR", **io_error(disk, action="stop", **changes))
            await ear.next()
        monitor.say("STOP")
        reason = f"a write of the disk {disk.disk} at slot 0:3 failed: {words}"
        assert await ear.next() == VMPaused(reason)
        monitor.say("RESUME")
        assert await ear.next() == VMResumed()
        monitor.say("STOP")
        assert await ear.next() == VMPaused("")
    monitor.say("BLOCK_IO_ERROR", **io_error(disk, action="report"))
    await ear.next()
    monitor.say("STOP")
    assert await ear.next() == VMPaused("")


async def test_a_pause_for_the_vms_own_reasons(
    monitor: ScriptedMonitor, host_of_script: QEMUHostBackend, disk: Attachment
) -> None:
    """A disk that is not ours, a panic, a watchdog: nobody asked for these either."""
    ear = Ear(host_of_script)
    for event, data, words in (
        ("BLOCK_IO_ERROR", io_error(disk, action="stop"), f"VM's own disk hotlun-{disk.serial}"),
        ("BLOCK_IO_ERROR", {"device": "boot", "action": "stop"}, "the VM's own disk boot failed"),
        ("GUEST_PANICKED", {"action": "pause"}, "panicked"),
        ("WATCHDOG", {"action": "pause"}, "watchdog"),
    ):
        monitor.say(event, **data)
        monitor.say("STOP")
        heard = await ear.next()
        assert isinstance(heard, VMPaused)
        assert words in heard.reason
    assert ear.heard.empty()


async def test_a_guest_that_refuses_an_unplug(
    monitor: ScriptedMonitor, host_of_script: QEMUHostBackend, disk: Attachment
) -> None:
    """Told of our devices alone, and while they are there."""
    ear = Ear(host_of_script)
    data = {"device": f"hotlun-{disk.serial}", "path": "/x"}
    monitor.say("DEVICE_UNPLUG_GUEST_ERROR", **data)
    await host_of_script.occupied()  # an answer comes after the events before it
    await host_of_script.attach(disk)
    monitor.say("DEVICE_UNPLUG_GUEST_ERROR", device="boot", path="/x")
    monitor.say("DEVICE_UNPLUG_GUEST_ERROR", path="/x")
    monitor.say("DEVICE_UNPLUG_GUEST_ERROR", **data)
    assert await ear.next() == UnplugRefused(disk)
    monitor.after["device_del"] = ("DEVICE_DELETED", dict(data))
    await host_of_script.detach(disk)
    monitor.say("DEVICE_UNPLUG_GUEST_ERROR", **data)
    monitor.say("RESUME")
    assert await ear.next() == VMResumed()


async def test_events_that_make_no_sense(
    monitor: ScriptedMonitor, host_of_script: QEMUHostBackend, disk: Attachment
) -> None:
    """They are dropped or told as far as they go, and the connection stays."""
    ear = Ear(host_of_script)
    await host_of_script.attach(disk)
    monitor.say("NO_SUCH_EVENT", guest=True)
    monitor.say("BLOCK_IO_ERROR", **{"node-name": [1], "device": None})
    monitor.say("DEVICE_UNPLUG_GUEST_ERROR", device={})
    monitor.say("SHUTDOWN", guest="yes", reason=3)
    assert await ear.next() == GuestShutdown(by_guest=False, reason="")
    monitor.say("RESET", guest=True, reason="guest-reset")
    assert await ear.next() == GuestReset(by_guest=True)
    monitor.say("SHUTDOWN", guest=True, reason="guest-shutdown")
    assert await ear.next() == GuestShutdown(by_guest=True, reason="guest-shutdown")
    assert await host_of_script.occupied() == set()


async def test_events_come_on_the_next_connection_too(
    monitor: ScriptedMonitor, host_of_script: QEMUHostBackend, disk: Attachment
) -> None:
    """Of the same disks, to the same listeners."""
    ear = Ear(host_of_script)
    await host_of_script.attach(disk)
    monitor.hang_up()
    await ear.next()
    await ear.next()
    monitor.say("BLOCK_IO_ERROR", **io_error(disk))
    assert cast("DiskFailed", await ear.next()).attachment == disk


async def test_a_reason_is_not_carried_to_the_next_connection(
    monitor: ScriptedMonitor, host_of_script: QEMUHostBackend, disk: Attachment
) -> None:
    """The pause that it was for has been missed."""
    ear = Ear(host_of_script)
    await host_of_script.attach(disk)
    monitor.say("BLOCK_IO_ERROR", **io_error(disk, action="stop"))
    assert isinstance(await ear.next(), DiskFailed)
    monitor.hang_up()
    await ear.next()
    await ear.next()
    monitor.say("STOP")
    assert await ear.next() == VMPaused("")
