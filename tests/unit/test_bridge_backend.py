"""The guest backend over the bridge: what it sends, what it refuses, what it makes of answers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from support.peer import DEADLINE, Peer, connect

from hotlun.backends import base, requests
from hotlun.backends.bridge import BridgeGuestBackend
from hotlun.bridge import messages
from hotlun.bridge.client import BridgeConnection
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import encode_request
from hotlun.errors import (
    BackendError,
    OutcomeUnknownError,
    UnsupportedError,
    VMGoneError,
    WrongKeyError,
)
from hotlun.events import ConnectionLost, ConnectionRestored, VMGone
from hotlun.model import (
    Attachment,
    Disk,
    DiskIdentity,
    DiskKind,
    GuestMount,
    GuestSurvey,
    MountConfig,
    Secret,
    Slot,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from hotlun.backends.base import OSType
    from hotlun.errors import HotlunError
    from hotlun.events import Event

OURS = (
    messages.FEATURE_OPTIONS,
    messages.FEATURE_FILESYSTEMS,
    messages.FEATURE_PRESERVE_DATA,
    messages.FEATURE_IDENTITY,
    messages.FEATURE_KEYS,
    messages.FEATURE_VERITY,
    messages.FEATURE_LAZY_UNMOUNT,
    messages.FEATURE_SURVEY,
)

DISK = Disk("/srv/data.vhdx", DiskKind.VIRTUAL_DISK)
ATTACHMENT = Attachment(Slot(1, 2), DISK, "h7")


def mounted(path: str = "/mnt/data", slot: Slot | None = None, **config: Any) -> GuestMount:
    attachment = ATTACHMENT if slot is None else Attachment(slot, DISK, "h7")
    return GuestMount(attachment, path, MountConfig(**config))


@asynccontextmanager
async def guest(
    tmp_path: Path,
    os_type: OSType = "linux",
    *,
    features: tuple[str, ...] = OURS,
    says: str | None = None,
    timeout: float = DEADLINE,
) -> AsyncIterator[tuple[Peer, BridgeGuestBackend]]:
    """A backend of `os_type`, connected to a scripted agent that says it runs `says`."""
    greeting = messages.negotiate_response(list(features))
    greeting["Capabilities"]["RuntimeOsType"] = os_type.title() if says is None else says
    listening = Peer(tmp_path / "agent.sock", greeting=greeting)
    async with listening as peer, connect(peer) as connection:
        yield peer, BridgeGuestBackend(connection, os_type, timeout=timeout)


OPERATIONS: dict[str, Callable[[BridgeGuestBackend], Awaitable[None]]] = {
    "mount": lambda backend: backend.mount(mounted()),
    "unmount": lambda backend: backend.unmount(mounted()),
    "unplug": lambda backend: backend.unplug(ATTACHMENT),
}


def start(backend: BridgeGuestBackend, operation: str) -> asyncio.Future[None]:
    return asyncio.ensure_future(OPERATIONS[operation](backend))


def concerns(error: HotlunError, operation: str) -> bool:
    return (error.operation, error.slot, error.disk) == (operation, Slot(1, 2), DISK)


async def test_it_is_a_guest_backend(tmp_path: Path) -> None:
    """The three methods, its system, and how many controllers it can use."""
    async with guest(tmp_path) as (_, backend):
        assert isinstance(backend, base.GuestBackend)
        assert (base.os_type(backend), base.usable_controllers(backend)) == ("linux", 4)
    async with guest(tmp_path, "windows") as (_, backend):
        assert (base.os_type(backend), base.usable_controllers(backend)) == ("windows", 1)


async def test_another_system_is_a_value_error(tmp_path: Path) -> None:
    """There are documents for two."""
    connection = BridgeConnection.connect_unix(tmp_path / "agent.sock")
    with pytest.raises(ValueError, match="'linux' or 'windows'"):
        BridgeGuestBackend(connection, "plan9")  # type: ignore[arg-type]


async def test_mount_unmount_unplug_on_linux(tmp_path: Path) -> None:
    """One modify request each, with the documents of `requests`; success returns nothing."""
    mount = mounted(options=["noatime", "rshared"], filesystem="xfs", ensure_filesystem=True)
    async with guest(tmp_path) as (peer, backend):
        for call, request in (
            (backend.mount(mount), requests.mount_request(mount, "linux", OURS)),
            (backend.unmount(mount), requests.unmount_request(mount, "linux", OURS)),
            (backend.unplug(ATTACHMENT), requests.unplug_request(ATTACHMENT, "linux")),
        ):
            task = asyncio.ensure_future(call)
            received = await peer.call()
            assert request is not None
            assert received.frame.type == messages.MessageType.MODIFY_SETTINGS
            assert received.frame.payload == encode_request(messages.modify_request(request))
            await received.reply()
            await task


async def test_mount_unmount_unplug_on_windows(tmp_path: Path) -> None:
    """Unplug sends nothing: Windows needs no telling."""
    mount = mounted(r"c:\mounts\scsi\m0", Slot(0, 2))
    async with guest(tmp_path, "windows", features=()) as (peer, backend):
        for call, request in (
            (backend.mount(mount), requests.mount_request(mount, "windows")),
            (backend.unmount(mount), requests.unmount_request(mount, "windows")),
        ):
            task = asyncio.ensure_future(call)
            received = await peer.call()
            assert received.document["Request"] == request
            await received.reply()
            await task
        await backend.unplug(mount.attachment)
        assert len(peer.calls) == 2


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        ({"options": ["noatime"]}, messages.FEATURE_OPTIONS),
        ({"options": ["rshared", "data=ordered"]}, messages.FEATURE_OPTIONS),
        ({"ensure_filesystem": True, "filesystem": "xfs"}, messages.FEATURE_FILESYSTEMS),
        (
            {"ensure_filesystem": True, "filesystem": "ext4", "preserve_data": True},
            messages.FEATURE_PRESERVE_DATA,
        ),
        ({"encrypted": True, "key": Secret("k")}, messages.FEATURE_KEYS),
        ({"lazy_unmount": True}, messages.FEATURE_LAZY_UNMOUNT),
    ],
)
async def test_agent_that_would_do_less_is_not_asked(
    tmp_path: Path, config: dict[str, Any], feature: str
) -> None:
    """The original agent drops options and formats over an xfs; only the feature helps."""
    others = tuple(name for name in OURS if name != feature)
    async with guest(tmp_path, features=others) as (peer, backend):
        with pytest.raises(UnsupportedError, match="hotlun's agent"):
            backend.check(DISK, MountConfig(**config), "/mnt/data")
        with pytest.raises(UnsupportedError):
            await backend.mount(mounted(**config))
        assert peer.calls == []
    async with guest(tmp_path, features=(feature,)) as (_, backend):
        backend.check(DISK, MountConfig(**config), "/mnt/data")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"options": ["rshared"]},
        {"options": ["private"]},
        {"ensure_filesystem": True, "filesystem": "ext4"},
        {"filesystem": "xfs"},
        {"partition": 3},
        {"block_device": True},
        {"encrypted": True, "ensure_filesystem": True, "filesystem": "ext4"},
        {"encrypted": True, "ensure_filesystem": True, "filesystem": "xfs"},
    ],
)
async def test_original_agent_is_asked_for_what_it_does(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    """Propagation, ext4, partitions, block devices, encryption that lasts as long as the mount."""
    async with guest(tmp_path, features=()) as (_, backend):
        backend.check(DISK, MountConfig(**config), "/mnt/data")
        read_only = Disk("/srv/data.vhdx", DiskKind.VIRTUAL_DISK, read_only=True)
        backend.check(read_only, MountConfig(**config), "/mnt/data")


async def test_identity_is_sent_to_an_agent_that_compares(tmp_path: Path) -> None:
    """As far as the host gave one; another agent is spared."""
    mount = dataclasses.replace(mounted(), identity=DiskIdentity("h7", 1 << 20))
    for features, expected in ((OURS, {"Serial": "h7", "Size": 1 << 20}), ((), {})):
        async with guest(tmp_path, features=features) as (peer, backend):
            task = asyncio.ensure_future(backend.mount(mount))
            received = await peer.call()
            settings = received.document["Request"]["Settings"]
            assert {key: settings[key] for key in settings if key in ("Serial", "Size")} == expected
            await received.reply()
            await task


async def test_verity_on_a_disk_that_is_written(tmp_path: Path) -> None:
    """Refused before anything is sent, with the way out; read-only it may be."""
    async with guest(tmp_path) as (peer, backend):
        config = MountConfig(verity="ab" * 32)
        with pytest.raises(UnsupportedError, match="read_only=True"):
            backend.check(DISK, config, "/m")
        backend.check(dataclasses.replace(DISK, read_only=True), config, "/m")
        assert peer.calls == []


async def test_a_wrong_key_is_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An error of its own, that names the disk and not the key; nor does any log."""
    caplog.set_level(logging.DEBUG)
    mount = mounted(encrypted=True, key=Secret("open sesame"))
    async with guest(tmp_path) as (peer, backend):
        task = asyncio.ensure_future(backend.mount(mount))
        received = await peer.call()
        assert received.document["Request"]["Settings"]["Key"] == "b3BlbiBzZXNhbWU="
        await received.reply(HResult.WRONG_KEY, "no keyslot opens with this key")
        with pytest.raises(WrongKeyError, match="give the key that the volume was made") as caught:
            await task
    error = caught.value
    assert concerns(error, "mount")
    assert (error.code, error.detail) == (HResult.WRONG_KEY, "no keyslot opens with this key")
    for shown in (repr(error), str(vars(error)), caplog.text):
        assert "sesame" not in shown
        assert "b3Bl" not in shown


@pytest.mark.parametrize(("os_type", "says"), [("linux", ""), ("windows", "Linux")])
async def test_guest_of_another_system(tmp_path: Path, os_type: OSType, says: str) -> None:
    """A Linux agent would answer success to the documents for Windows, and mount nothing."""
    path = "/m" if os_type == "linux" else r"c:\m"
    async with guest(tmp_path, os_type, says=says) as (peer, backend):
        with pytest.raises(UnsupportedError, match="says that it runs"):
            backend.check(DISK, MountConfig(), path)
        with pytest.raises(UnsupportedError, match="says that it runs"):
            await backend.mount(mounted(path, Slot(0, 0)))
        assert peer.calls == []


async def test_slots_and_paths_that_the_guest_lacks(tmp_path: Path) -> None:
    """Refused by all three, before anything is sent."""
    async with guest(tmp_path) as (peer, backend):
        with pytest.raises(UnsupportedError, match="4:0"):
            await backend.mount(mounted(slot=Slot(4, 0)))
        with pytest.raises(UnsupportedError, match="0:256"):
            await backend.unmount(mounted(slot=Slot(0, 256)))
        with pytest.raises(UnsupportedError, match="4:0"):
            await backend.unplug(Attachment(Slot(4, 0), DISK, "h7"))
        with pytest.raises(UnsupportedError, match="another path"):
            backend.check(DISK, MountConfig(), "mnt")
        assert peer.calls == []


async def test_check_before_entering(tmp_path: Path) -> None:
    """Nobody knows yet what the guest can do."""
    connection = BridgeConnection.connect_unix(tmp_path / "agent.sock")
    backend = BridgeGuestBackend(connection, "linux")
    with pytest.raises(BackendError, match="not been entered"):
        backend.check(DISK, MountConfig(), "/m")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (HResult.FAIL, ""),
        (HResult.NOT_IMPLEMENTED, "this agent cannot do that: run hotlun's"),
        (HResult.UNKNOWN_MESSAGE, "cannot do that"),
        (HResult.INVALID_JSON, "does not understand"),
        (HResult.INVALID_STATE, "still uses it"),
        (HResult.WRONG_DISK, "nothing was done to the disk"),
        (HResult.ALREADY_EXISTS, "leave out preserve_data"),
        (HResult.NOT_FOUND, "partition"),
        (0xDEADBEEF, ""),
    ],
)
async def test_refusal(tmp_path: Path, operation: str, code: int, advice: str) -> None:
    """Not done: the guest's code, unsigned, its words, and what to do about it."""
    async with guest(tmp_path) as (peer, backend):
        task = start(backend, operation)
        await (await peer.call()).reply(code, "mounting: invalid argument\nsee \x1b[1mlog")
        with pytest.raises(BackendError) as caught:
            await task
        error, text = caught.value, str(caught.value)
        assert concerns(error, operation)
        assert error.code == code
        assert error.detail == r"mounting: invalid argument; see \x1b[1mlog"
        assert text.startswith(f"the guest did not {operation} /srv/data.vhdx (slot 1:2)")
        assert error.detail in text
        assert f"{code:#010x}" in text
        assert advice in text
        assert ("/mnt/data" in text) == (operation != "unplug")
        assert text.isprintable()


async def test_device_that_did_not_come(tmp_path: Path) -> None:
    """The guest waited before it began: nothing was done."""
    async with guest(tmp_path) as (peer, backend):
        task = start(backend, "mount")
        await (await peer.call()).reply(HResult.TIMEOUT, "no disk within 10 s")
        with pytest.raises(BackendError, match="took too long") as caught:
            await task
        assert concerns(caught.value, "mount")


@pytest.mark.parametrize("operation", ["unmount", "unplug"])
async def test_device_that_did_not_go(tmp_path: Path, operation: str) -> None:
    """It may be off its path, or the kernel may yet let it go: unknown, not failed."""
    async with guest(tmp_path) as (peer, backend):
        task = start(backend, operation)
        await (await peer.call()).reply(HResult.TIMEOUT, "still there after 10 s")
        with pytest.raises(OutcomeUnknownError, match="still there after 10 s") as caught:
            await task
        assert concerns(caught.value, operation)
        assert caught.value.code == HResult.TIMEOUT


async def test_refusal_without_words(tmp_path: Path) -> None:
    """The code is all there is."""
    async with guest(tmp_path) as (peer, backend):
        task = start(backend, "unmount")
        await (await peer.call()).reply(HResult.FAIL)
        with pytest.raises(BackendError, match=r"no reason given \[0x80004005 \(FAIL\)\]; if some"):
            await task


async def test_neither_success_nor_failure(tmp_path: Path) -> None:
    """A code that is not 0 and has no failure bit tells nothing."""
    async with guest(tmp_path) as (peer, backend):
        task = start(backend, "mount")
        await (await peer.call()).reply(1, "perhaps")
        with pytest.raises(OutcomeUnknownError, match="perhaps") as caught:
            await task
        assert concerns(caught.value, "mount")
        assert caught.value.code == 1


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_lost_after_sending(tmp_path: Path, operation: str) -> None:
    """Unknown; and what comes later is done on the connection that came back."""
    async with guest(tmp_path) as (peer, backend):
        task = start(backend, operation)
        (await peer.call()).link.hang_up()
        with pytest.raises(OutcomeUnknownError, match=r"slot 1:2.*was lost") as unknown:
            await task
        assert concerns(unknown.value, operation)
        task = start(backend, operation)
        await (await peer.call()).reply()
        await task


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_not_there_again_in_time(tmp_path: Path, operation: str) -> None:
    """Not sent, so it is not unknown."""
    async with guest(tmp_path, timeout=0.1) as (peer, backend):
        peer.greets = False
        peer.links[0].hang_up()
        await peer.call()  # the greeting, to which there is no answer
        with pytest.raises(BackendError, match=r"was not asked to.*nothing was sent") as refused:
            await start(backend, operation)
        assert concerns(refused.value, operation)
        assert not isinstance(refused.value, VMGoneError)


@pytest.mark.skipif(os.name == "nt", reason="nobody at a port of TCP is no VM that has ended")
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_the_vm_is_gone(tmp_path: Path, operation: str) -> None:
    """What was sent is unknown, what comes later was not done, by an error of its own."""
    async with guest(tmp_path) as (peer, backend):
        task = start(backend, operation)
        call = await peer.call()
        peer.stop_listening()
        call.link.hang_up()
        with pytest.raises(OutcomeUnknownError):
            await task
        with pytest.raises(VMGoneError, match=r"was not asked to.*the VM is gone.*forget") as gone:
            await start(backend, operation)
        assert concerns(gone.value, operation)


async def test_another_agent_is_not_sent_what_was_made_for_the_first(tmp_path: Path) -> None:
    """One that would ignore what it does not know would do less than it was asked."""
    async with guest(tmp_path) as (peer, backend):
        peer.restart()
        peer.greeting = messages.negotiate_response([])
        peer.greeting["Capabilities"]["RuntimeOsType"] = "Linux"
        with pytest.raises(BackendError, match="another one now") as refused:
            await backend.mount(mounted(options=["noatime"]))
        assert concerns(refused.value, "mount")
        with pytest.raises(UnsupportedError, match="hotlun's agent"):
            await backend.mount(mounted(options=["noatime"]))
        assert peer.calls == []


@pytest.mark.skipif(os.name == "nt", reason="nobody at a port of TCP is no VM that has ended")
async def test_what_becomes_of_the_connection_is_told(tmp_path: Path) -> None:
    """Lost, restored, gone, until nobody wants to know; an agent started anew is both."""
    async with guest(tmp_path) as (peer, backend):
        told: asyncio.Queue[Event] = asyncio.Queue()
        unsubscribe = base.watch(backend, told.put_nowait)
        base.watch(backend, lambda event: None)()

        async def event() -> Event:
            return await asyncio.wait_for(told.get(), DEADLINE)

        peer.links[0].hang_up()
        assert await event() == ConnectionLost("guest", "the other end closed it")
        assert await event() == ConnectionRestored("guest")
        peer.restart()
        task = start(backend, "mount")
        await (await peer.call()).reply()
        await task
        assert await event() == ConnectionLost("guest", "the agent in the guest was started anew")
        assert await event() == ConnectionRestored("guest")
        peer.stop_listening()
        peer.links[-1].hang_up()
        assert await event() == ConnectionLost("guest", "the other end closed it")
        gone = await event()
        assert isinstance(gone, VMGone)
        assert "refused" in gone.reason
        unsubscribe()
        unsubscribe()
    assert told.empty()


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_no_answer_in_time(tmp_path: Path, operation: str) -> None:
    """The backend's own deadline; the bridge lives."""
    async with guest(tmp_path) as (peer, backend):
        hasty = BridgeGuestBackend(backend._connection, "linux", timeout=0.1)
        with pytest.raises(OutcomeUnknownError, match=r"within 0\.1 s") as caught:
            await start(hasty, operation)
        assert concerns(caught.value, operation)
        await (await peer.call()).reply()
        task = start(backend, operation)
        await (await peer.call()).reply()
        await task


async def test_a_survey_is_a_question(tmp_path: Path) -> None:
    """GetProperties of the VM, as often as it takes; its answers are one."""
    many = [Attachment(Slot(n // 200, n % 200), DISK, f"h{n}") for n in range(300)]
    mount = GuestMount(many[0], "/mnt/data", MountConfig())
    async with guest(tmp_path) as (peer, backend):
        asking = asyncio.ensure_future(backend.survey(many, [mount]))
        for _ in range(2):
            call = await peer.call()
            assert call.frame.type == messages.MessageType.GET_PROPERTIES
            query = json.loads(call.document["Query"])["Hotlun"]["Disks"]
            told = [{"Device": "Own", "Mounts": [True] * len(d.get("Mounts", ()))} for d in query]
            await call.reply(Properties=json.dumps({"Hotlun": {"Disks": told}}))
        everything = GuestSurvey(frozenset(one.serial for one in many), frozenset({mount}))
        assert await asking == everything
        assert len(peer.calls) == 2


@pytest.mark.parametrize("os_type", ["linux", "windows"])
async def test_an_agent_that_cannot_be_asked_is_not_asked(tmp_path: Path, os_type: OSType) -> None:
    """It says None, which is not that there is nothing."""
    async with guest(tmp_path, os_type, features=(messages.FEATURE_KEYS,)) as (peer, backend):
        assert await base.guest_survey(backend, [ATTACHMENT], [mounted()]) is None
        assert peer.calls == []


@pytest.mark.parametrize(
    ("code", "more", "words"),
    [
        (HResult.NOT_IMPLEMENTED, {"message": "not here"}, "not here .*NOT_IMPLEMENTED"),
        (1, {}, "no reason given"),
        (0, {}, "makes no sense"),
        (0, {"Properties": "{}"}, "no Hotlun in the properties"),
        (0, {"Properties": '{"Hotlun":{"Disks":[{},{}]}}'}, "2 disks, where 1"),
        (0, {"Properties": 5}, "makes no sense"),
    ],
)
async def test_a_survey_without_an_answer_that_makes_sense(
    tmp_path: Path, code: int, more: dict[str, Any], words: str
) -> None:
    """A guest that cannot be asked: nothing is believed, and nothing has changed."""
    async with guest(tmp_path) as (peer, backend):
        asking = asyncio.ensure_future(backend.survey([ATTACHMENT], []))
        await (await peer.call()).reply(code, **more)
        with pytest.raises(BackendError, match=f"did not say what it has: .*{words}") as caught:
            await asking
        assert caught.value.operation == "survey"


async def test_a_survey_whose_answer_is_lost(tmp_path: Path) -> None:
    """It changes nothing, so nothing is unknown but the answer: no OutcomeUnknownError."""
    async with guest(tmp_path) as (peer, backend):
        hasty = BridgeGuestBackend(backend._connection, "linux", timeout=0.1)
        with pytest.raises(BackendError, match="did not answer"):
            await hasty.survey([ATTACHMENT], [])
        asking = asyncio.ensure_future(backend.survey([ATTACHMENT], []))
        await peer.call()
        (await peer.call()).link.hang_up()
        with pytest.raises(BackendError, match="was lost"):
            await asking
        asking = asyncio.ensure_future(backend.survey([ATTACHMENT], []))
        assert (await peer.call()).link is not peer.links[0]
        asking.cancel()


async def test_what_the_bridge_cannot_say(tmp_path: Path) -> None:
    """An option that is no Unicode is refused and not sent."""
    async with guest(tmp_path) as (peer, backend):
        with pytest.raises(BackendError, match="was not asked") as caught:
            await backend.mount(mounted(options=["x=\udc80"]))
        assert concerns(caught.value, "mount")
        assert peer.calls == []


async def test_each_step_is_told_at_debug(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With disk, slot and serial."""
    caplog.set_level(logging.DEBUG, "hotlun")
    async with guest(tmp_path) as (peer, backend):
        task = start(backend, "unplug")
        await (await peer.call()).reply()
        await task
    assert "unplug /srv/data.vhdx (slot 1:2), serial h7" in caplog.text
