"""The QEMU host backend when the monitor, the VM or QEMU fails it.

What a real QEMU cannot be made to do at will, a scripted monitor does.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support.qemu import (
    Refuses,
    ScriptedMonitor,
    Silence,
    attachment,
    connected,
    running_qemu,
)

from hotlun.backends.qemu import QEMUHostBackend
from hotlun.errors import (
    BackendError,
    HotlunError,
    OutcomeUnknownError,
    SlotTakenError,
    VMGoneError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from hotlun.model import Attachment

PROMPT = 20.0
"""Seconds that nothing here may take, while the backend's own deadline is far longer."""
LONG = 600.0
SHORT = 1.0
"""Seconds after which a test wants the backend to give up."""


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
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return attachment(path)


def scripted(
    monitor: ScriptedMonitor, timeout: float = LONG
) -> AbstractAsyncContextManager[QEMUHostBackend]:
    return QEMUHostBackend.connect(monitor.path, controllers=["scsi0"], timeout=timeout)


async def outcome(call: Coroutine[None, None, None]) -> type[HotlunError] | None:
    """The type of error that a call ends with, in good time."""
    async with asyncio.timeout(PROMPT):
        try:
            await call
        except HotlunError as error:
            return type(error)
    return None


@pytest.mark.parametrize("kind", ["missing", "dead", "file", "long"])
async def test_a_socket_where_nobody_answers(tmp_path: Path, kind: str) -> None:
    """Connecting to a missing, abandoned or impossible socket fails at once, naming it."""
    path = tmp_path / ("x" * 120 if kind == "long" else "qmp.sock")
    if kind == "file":
        path.write_bytes(b"")
    if kind == "dead":
        with socket.socket(socket.AF_UNIX) as abandoned:
            abandoned.bind(str(path))
    async with asyncio.timeout(PROMPT):
        with pytest.raises(BackendError, match="cannot connect to a monitor at") as caught:
            async with QEMUHostBackend.connect(path, timeout=LONG):
                pass
    assert str(path) in str(caught.value)
    assert caught.value.operation == "connect"


@pytest.mark.parametrize("greeting", [b"", b"hello\r\n", b'{"QMP": 1}\r\n', b'{"event": "x"}\r\n'])
async def test_a_peer_that_is_no_monitor(tmp_path: Path, greeting: bytes) -> None:
    """One that hangs up, or greets with something else, is refused at once."""

    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    path = tmp_path / "peer.sock"
    async with await asyncio.start_unix_server(greet, path), asyncio.timeout(PROMPT):
        with pytest.raises(BackendError, match="cannot connect to a monitor"):
            async with QEMUHostBackend.connect(path, timeout=LONG):
                pass


async def test_a_monitor_that_another_client_has(monitor: ScriptedMonitor, tmp_path: Path) -> None:
    """No greeting within the deadline: the error says that, and why it may be."""
    path = tmp_path / "busy.sock"
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(1)
        with pytest.raises(BackendError, match="another client has this monitor"):
            async with QEMUHostBackend.connect(path, timeout=SHORT):
                pass


async def test_a_monitor_that_many_wait_for(tmp_path: Path) -> None:
    """Where there is no place in line either, the error is the same; a place is waited for."""
    path = str(tmp_path / "busy.sock")
    with socket.socket(socket.AF_UNIX) as busy, ExitStack() as stack:
        busy.bind(path)
        busy.listen(0)
        with pytest.raises(BlockingIOError):
            while True:
                other = stack.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                other.connect(path)
        with pytest.raises(BackendError, match="another client has this monitor"):
            async with QEMUHostBackend.connect(path, timeout=SHORT):
                pass


async def test_connecting_has_a_deadline_for_its_questions_too(monitor: ScriptedMonitor) -> None:
    """A monitor that greets and then hangs is a BackendError: nothing was to be changed."""
    monitor.answers["qom-list"] = Silence.STAYS
    with pytest.raises(BackendError, match=r"no answer to qom-list \(none within 1 s\)"):
        async with scripted(monitor, timeout=SHORT):
            pass


@pytest.mark.parametrize("command", ["blockdev-add", "device_add"])
async def test_an_attach_without_an_answer_is_unknown(
    monitor: ScriptedMonitor, disk: Attachment, command: str
) -> None:
    """Past its deadline it may have happened; later calls still work."""
    monitor.answers[command] = [Silence.STAYS]
    async with scripted(monitor, timeout=SHORT) as host:
        with pytest.raises(OutcomeUnknownError, match=f"no answer to {command}") as caught:
            await host.attach(disk)
        assert (caught.value.disk, caught.value.slot) == (disk.disk, disk.slot)
        assert monitor.commands[-2:] == ["blockdev-add", "device_add"]
        await host.attach(disk)


@pytest.mark.parametrize("command", ["device_del", "blockdev-del"])
async def test_a_detach_without_an_answer_is_unknown(
    monitor: ScriptedMonitor, disk: Attachment, command: str
) -> None:
    """Past its deadline it may have happened; it can be tried again."""
    event: dict[str, object] = {"device": f"hotlun-{disk.serial}", "path": "/x"}
    monitor.after["device_del"] = ("DEVICE_DELETED", event)
    monitor.answers[command] = [Silence.STAYS]
    async with scripted(monitor, timeout=SHORT) as host:
        with pytest.raises(OutcomeUnknownError, match=f"no answer to {command}"):
            await host.detach(disk)
        await host.detach(disk)


@pytest.mark.parametrize("other", ["nothing", "another device's"])
async def test_a_removal_without_its_event_is_unknown(
    monitor: ScriptedMonitor, disk: Attachment, other: str
) -> None:
    """The reply to device_del is not enough, and another device's event is not ours."""
    if other != "nothing":
        monitor.after["device_del"] = ("DEVICE_DELETED", {"device": "other", "path": "/x"})
    async with scripted(monitor, timeout=SHORT) as host:
        with pytest.raises(OutcomeUnknownError, match="no answer to the event"):
            await host.detach(disk)
    assert "blockdev-del" not in monitor.commands


async def test_a_guest_that_refuses_to_let_go(monitor: ScriptedMonitor, disk: Attachment) -> None:
    """DEVICE_UNPLUG_GUEST_ERROR is a BackendError: the disk is still attached."""
    event: dict[str, object] = {"device": f"hotlun-{disk.serial}", "path": "/x"}
    monitor.after["device_del"] = ("DEVICE_UNPLUG_GUEST_ERROR", event)
    async with scripted(monitor) as host:
        with pytest.raises(BackendError, match="unplug it there first"):
            await host.detach(disk)
    assert monitor.commands[-1] == "device_del"


async def test_a_removal_that_is_pending_is_waited_for(
    monitor: ScriptedMonitor, disk: Attachment
) -> None:
    """QEMU's complaint about a repeated device_del is not passed on."""
    monitor.answers["device_del"] = Refuses("Device x is already in the process of unplug")
    event: dict[str, object] = {"device": f"hotlun-{disk.serial}", "path": "/x"}
    monitor.after["device_del"] = ("DEVICE_DELETED", event)
    async with scripted(monitor) as host:
        await host.detach(disk)
    assert monitor.commands[-2:] == ["device_del", "blockdev-del"]


async def test_a_node_that_something_else_uses(monitor: ScriptedMonitor, disk: Attachment) -> None:
    """The device is gone and the node is not: neither done nor not done."""
    event: dict[str, object] = {"device": f"hotlun-{disk.serial}", "path": "/x"}
    monitor.after["device_del"] = ("DEVICE_DELETED", event)
    monitor.answers["blockdev-del"] = Refuses("Node x is in use")
    async with scripted(monitor) as host:
        with pytest.raises(OutcomeUnknownError, match="end the block job"):
            await host.detach(disk)


async def test_half_an_attach_is_undone(monitor: ScriptedMonitor, disk: Attachment) -> None:
    """A refused device takes its node with it, and the error is QEMU's reason."""
    monitor.answers["device_add"] = Refuses("lun already used by 'x'")
    async with scripted(monitor) as host:
        with pytest.raises(SlotTakenError):
            await host.attach(disk)
    assert monitor.commands[-3:] == ["blockdev-add", "device_add", "blockdev-del"]


async def test_a_refused_node_has_no_device(monitor: ScriptedMonitor, disk: Attachment) -> None:
    """The device is asked for with it, and refused for want of it: the error is the node's."""
    monitor.answers["blockdev-add"] = Refuses("Could not open 'x': Permission denied")
    monitor.answers["device_add"] = Refuses("Property 'scsi-hd.drive' can't find value 'x'")
    async with scripted(monitor) as host:
        with pytest.raises(BackendError, match="the VM's user may not open the disk"):
            await host.attach(disk)
    assert monitor.commands[-2:] == ["blockdev-add", "device_add"]


@pytest.mark.parametrize("answer", [{}, Silence.STAYS, Silence.HANGS_UP])
async def test_a_refused_node_and_a_device_that_may_be_there_are_unknown(
    monitor: ScriptedMonitor, disk: Attachment, answer: object
) -> None:
    """It may have found another node of that name, or nobody says what became of it."""
    monitor.answers["blockdev-add"] = Refuses("Duplicate nodes with node-name='x'")
    monitor.answers["device_add"] = answer
    async with scripted(monitor, timeout=SHORT) as host:
        with pytest.raises(OutcomeUnknownError, match=r"detach it|no answer to device_add"):
            await host.attach(disk)


@pytest.mark.parametrize("answer", [Refuses("no"), Refuses("Node x is in use"), Silence.HANGS_UP])
async def test_half_an_attach_that_cannot_be_undone_is_unknown(
    monitor: ScriptedMonitor, disk: Attachment, answer: Refuses | Silence
) -> None:
    """Something is left of it, so it is not a refusal any more."""
    monitor.answers["device_add"] = Refuses("lun already used by 'x'")
    monitor.answers["blockdev-del"] = answer
    async with scripted(monitor) as host:
        with pytest.raises(OutcomeUnknownError, match="detach it"):
            await host.attach(disk)


async def test_unknown_words_are_passed_on(monitor: ScriptedMonitor, disk: Attachment) -> None:
    """A refusal that no row of the table knows arrives as it is, with its class."""
    monitor.answers["device_add"] = Refuses("the moon is full", "KVMMissingCap")
    async with scripted(monitor) as host:
        with pytest.raises(BackendError, match="QEMU refuses: the moon is full") as caught:
            await host.attach(disk)
    assert (caught.value.code, caught.value.detail) == ("KVMMissingCap", "the moon is full")


async def test_an_answer_that_is_none_is_unknown(
    monitor: ScriptedMonitor, disk: Attachment
) -> None:
    """A malformed error says nothing about what happened."""
    monitor.answers["blockdev-add"] = Refuses(3, "x")  # type: ignore[arg-type] # no proper reply
    async with scripted(monitor) as host:
        assert await outcome(host.attach(disk)) is OutcomeUnknownError


async def test_a_monitor_lost_in_mid_command(monitor: ScriptedMonitor, disk: Attachment) -> None:
    """What was sent is unknown; what comes after is done on the next connection."""
    monitor.answers["blockdev-add"] = [Silence.HANGS_UP]
    event: dict[str, object] = {"device": f"hotlun-{disk.serial}", "path": "/x"}
    monitor.after["device_del"] = ("DEVICE_DELETED", event)
    async with scripted(monitor) as host:
        assert await outcome(host.attach(disk)) is OutcomeUnknownError
        assert await outcome(host.detach(disk)) is None
        assert await outcome(host.attach(disk)) is None
        assert await host.occupied() == set()


async def test_after_leaving_nothing_is_sent(monitor: ScriptedMonitor, disk: Attachment) -> None:
    """Attach, detach and questions are refused at once, and the monitor hears nothing of them."""
    async with scripted(monitor) as host:
        pass
    before = list(monitor.commands)
    for call in (host.attach(disk), host.detach(disk), host.occupied(), host.survey([disk])):
        async with asyncio.timeout(PROMPT):
            with pytest.raises(BackendError, match=r"has been left; nothing was sent"):
                await call
    assert monitor.commands == before


async def test_leaving_ends_what_is_in_flight(monitor: ScriptedMonitor, disk: Attachment) -> None:
    """A call that still waits when the connection is closed ends as unknown."""
    monitor.answers["blockdev-add"] = Silence.STAYS
    async with asyncio.timeout(PROMPT):
        async with scripted(monitor) as host:
            attaching = asyncio.create_task(host.attach(disk))
            while "blockdev-add" not in monitor.commands:
                await asyncio.sleep(0.01)
        with pytest.raises(OutcomeUnknownError):
            await attaching


@pytest.mark.qemu
async def test_a_killed_qemu(tmp_path: Path) -> None:
    """Everything in flight ends at once as unknown; later calls say that the VM is gone."""
    disks = [attachment(tmp_path / f"{lun}.raw", lun) for lun in range(64)]
    for disk in disks:
        (tmp_path / disk.disk.path).write_bytes(bytes(1 << 20))
    async with running_qemu(tmp_path) as vm, connected(vm, timeout=LONG) as host:
        await asyncio.gather(*map(host.attach, disks[:32]))
        vm.process.send_signal(signal.SIGSTOP)
        calls = [
            *(asyncio.create_task(outcome(host.detach(disk))) for disk in disks[:32]),
            *(asyncio.create_task(outcome(host.attach(disk))) for disk in disks[32:]),
        ]
        await asyncio.sleep(0)
        vm.process.kill()
        assert set(await asyncio.gather(*calls)) == {OutcomeUnknownError}
        for call in (host.attach, host.detach):
            assert await outcome(call(disks[0])) is VMGoneError


@pytest.mark.qemu
async def test_a_qemu_killed_between_command_and_event(tmp_path: Path) -> None:
    """A detach that waits for its event ends at once, too."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    disk = attachment(path)
    async with running_qemu(tmp_path) as vm, connected(vm, timeout=LONG) as host:
        await host.attach(disk)
        detaching = asyncio.create_task(outcome(host.detach(disk)))
        while await vm.devices():
            await asyncio.sleep(0)
        vm.process.kill()
        assert await detaching in (OutcomeUnknownError, VMGoneError, None)


@pytest.mark.qemu
async def test_a_hanging_qemu(tmp_path: Path) -> None:
    """Calls end by their deadline as unknown, leaving does not wait, and a retry settles it."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    there, newcomer = attachment(path, read_only=True), attachment(path, 1, read_only=True)
    async with running_qemu(tmp_path) as vm:
        async with connected(vm, timeout=1) as host:
            await host.attach(there)
            vm.process.send_signal(signal.SIGSTOP)
            two = asyncio.gather(outcome(host.detach(there)), outcome(host.attach(newcomer)))
            assert set(await two) == {OutcomeUnknownError}
            vm.process.send_signal(signal.SIGCONT)
            while await outcome(host.detach(there)) is OutcomeUnknownError:
                pass
            assert await outcome(host.detach(newcomer)) is None
            assert await vm.is_bare()
            vm.process.send_signal(signal.SIGSTOP)
            calls = [outcome(host.attach(attachment(path, lun))) for lun in range(64)]
            left_alone = asyncio.gather(*calls)
            await asyncio.sleep(0)
        async with asyncio.timeout(PROMPT):
            await left_alone
        with pytest.raises(BackendError, match="hangs"):
            async with connected(vm, timeout=SHORT):
                pass


async def test_cancelling_leaves_no_task_and_no_file_behind(
    monitor: ScriptedMonitor, disk: Attachment
) -> None:
    """A caller gone in mid-command, its late answer, and a connection left by an error."""
    monitor.answers["blockdev-add"] = [Silence.STAYS]
    before = len(os.listdir("/proc/self/fd")), asyncio.all_tasks()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SHORT), scripted(monitor) as host:
            await host.attach(disk)
    while asyncio.all_tasks() != before[1]:
        await asyncio.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before[0] + 1
