"""The guest backend of the Host Compute Service: what it has relayed, and makes of answers."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from typing import TYPE_CHECKING, Any

import pytest
from support.compute import MemorySystem

from hotlun import Attachment, Disk, DiskKind, MountConfig, Secret, Slot
from hotlun.backends import base
from hotlun.backends.hcs import HCSGuestBackend
from hotlun.bridge import messages
from hotlun.bridge.codes import HResult
from hotlun.errors import (
    BackendError,
    HotlunError,
    OutcomeUnknownError,
    UnsupportedError,
    VMGoneError,
    WrongKeyError,
)
from hotlun.hcs.results import failure
from hotlun.model import DiskIdentity, GuestMount

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hotlun.backends.base import OSType

DISK = Disk(r"C:\disks\a.vhdx", DiskKind.VIRTUAL_DISK)
READ_ONLY = Disk(r"C:\disks\layer.vhd", DiskKind.VIRTUAL_DISK, read_only=True)
ATTACHMENT = Attachment(Slot(1, 3), DISK, "h1")
OURS = frozenset({messages.FEATURE_OPTIONS, messages.FEATURE_KEYS, messages.FEATURE_PRESERVE_DATA})


def mounted(
    path: str = "/mnt/a", slot: Slot | None = None, disk: Disk = DISK, **config: Any
) -> GuestMount:
    attachment = ATTACHMENT if slot is None else Attachment(slot, disk, "h1")
    return GuestMount(attachment, path, MountConfig(**config))


@pytest.fixture
def system() -> MemorySystem:
    """A VM whose guest does as it is told."""
    return MemorySystem()


@pytest.fixture
def guest(system: MemorySystem) -> HCSGuestBackend:
    """A backend for it that waits as good as not at all for what was begun before."""
    return HCSGuestBackend(system, "linux", timeout=0.01)


OPERATIONS: dict[str, Callable[[HCSGuestBackend], Awaitable[None]]] = {
    "mount": lambda guest: guest.mount(mounted()),
    "unmount": lambda guest: guest.unmount(mounted()),
    "unplug": lambda guest: guest.unplug(ATTACHMENT),
}


def sent(system: MemorySystem) -> list[str]:
    """The text of each document."""
    return [json.dumps(document, separators=(",", ":")) for document in system.documents]


def relayed(verb: str, settings: str, resource: str = "MappedVirtualDisk") -> str:
    """A document that has a request for the guest, and nothing else."""
    request = f'"RequestType":"{verb}","ResourceType":"{resource}","Settings":{settings}'
    return f'{{"GuestRequest":{{{request}}}}}'


def connection(extension: object) -> dict[str, Any]:
    """What the service tells of its connection to the guest."""
    return {
        "GuestConnectionInfo": {
            "SupportedSchemaVersions": [{"Major": 2, "Minor": 1}],
            "ProtocolVersion": 4,
            "GuestDefinedCapabilities": {"SignalProcessSupported": True, "Hotlun": extension},
        }
    }


@pytest.mark.parametrize(("os_type", "controllers"), [("linux", 4), ("windows", 1)])
async def test_it_is_a_guest_backend(
    system: MemorySystem, os_type: OSType, controllers: int
) -> None:
    """Which cannot be asked what the guest has: the service relays no questions."""
    guest = HCSGuestBackend(system, os_type)
    assert isinstance(guest, base.GuestBackend)
    assert (base.os_type(guest), base.usable_controllers(guest)) == (os_type, controllers)
    assert await base.guest_survey(guest, [ATTACHMENT], [mounted()]) is None
    assert system.documents == system.queries == []


def test_what_it_cannot_be_made_of(system: MemorySystem) -> None:
    """An id is no system, and there are documents for two kinds of guests."""
    with pytest.raises(TypeError, match="open_system"):
        HCSGuestBackend("my-vm", "linux")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'linux' or 'windows', not 'Linux'"):
        HCSGuestBackend(system, "Linux")  # type: ignore[arg-type]


class TestDocuments:
    @pytest.mark.parametrize(
        ("mount", "settings"),
        [
            (
                mounted("/run/mounts/scsi/m0", Slot(0, 3), READ_ONLY),
                '{"MountPath":"/run/mounts/scsi/m0","Lun":3,"ReadOnly":true}',
            ),
            (mounted("/mnt/a", Slot(0, 0)), '{"MountPath":"/mnt/a"}'),
            (
                mounted(
                    "/run/gcs/c/x",
                    Slot(1, 2),
                    encrypted=True,
                    ensure_filesystem=True,
                    filesystem="xfs",
                ),
                (
                    '{"MountPath":"/run/gcs/c/x","Lun":2,"Controller":1,"Encrypted":true,'
                    '"EnsureFilesystem":true,"Filesystem":"xfs"}'
                ),
            ),
            (
                mounted(
                    "/mnt/d",
                    Slot(3, 63),
                    READ_ONLY,
                    partition=2,
                    options=["rshared"],
                    filesystem="ext4",
                ),
                (
                    '{"MountPath":"/mnt/d","Lun":63,"Controller":3,"Partition":2,"ReadOnly":true,'
                    '"Options":["rshared"],"Filesystem":"ext4"}'
                ),
            ),
            (
                mounted("/dev/data", Slot(2, 1), block_device=True),
                '{"MountPath":"/dev/data","Lun":1,"Controller":2,"BlockDev":true}',
            ),
        ],
    )
    async def test_for_a_mount_in_linux(
        self, guest: HCSGuestBackend, system: MemorySystem, mount: GuestMount, settings: str
    ) -> None:
        """hcsshim's, to the letter; the Remove has all that the Add had."""
        await guest.mount(mount)
        await guest.unmount(mount)
        assert sent(system) == [relayed("Add", settings), relayed("Remove", settings)]

    @pytest.mark.parametrize(
        ("slot", "settings"),
        [(Slot(0, 0), "{}"), (Slot(1, 3), '{"Controller":1,"Lun":3}'), (Slot(0, 9), '{"Lun":9}')],
    )
    async def test_for_an_unplug_in_linux(
        self, guest: HCSGuestBackend, system: MemorySystem, slot: Slot, settings: str
    ) -> None:
        """The settings are there even if they are empty."""
        await guest.unplug(Attachment(slot, DISK, "h1"))
        assert sent(system) == [relayed("Remove", settings, "SCSIDevice")]

    async def test_for_windows(self, system: MemorySystem) -> None:
        """Path and LUN, no controller; and nothing at all for an unplug."""
        guest = HCSGuestBackend(system, "windows")
        mount = mounted(r"c:\mounts\scsi\m0", Slot(0, 2))
        await guest.mount(mount)
        await guest.unmount(mount)
        await guest.unplug(mount.attachment)
        settings = r'{"ContainerPath":"c:\\mounts\\scsi\\m0","Lun":2}'
        assert sent(system) == [relayed("Add", settings), relayed("Remove", settings)]

    async def test_with_our_extension(self, system: MemorySystem) -> None:
        """Only for an agent that has it, only what it has, and a key only where it is needed."""
        guest = HCSGuestBackend(system, "linux", features=OURS)
        attachment = Attachment(Slot(0, 1), DISK, "h1")
        config = MountConfig(
            encrypted=True,
            ensure_filesystem=True,
            filesystem="ext4",
            options=["noatime"],
            preserve_data=True,
            key=Secret("sesame"),
        )
        mount = GuestMount(attachment, "/mnt/a", config, DiskIdentity("h1", 1 << 30))
        await guest.mount(mount)
        await guest.unmount(mount)
        common = (
            '{"MountPath":"/mnt/a","Lun":1,"Encrypted":true,"Options":["noatime"],'
            '"EnsureFilesystem":true,"Filesystem":"ext4","PreserveData":true'
        )
        assert sent(system) == [
            relayed("Add", common + ',"Key":"c2VzYW1l"}'),
            relayed("Remove", common + "}"),
        ]


class TestConnecting:
    async def test_asks_what_the_agent_can_do(self, system: MemorySystem) -> None:
        """One question; what it has announced can be asked of it."""
        system.told = connection({"Version": 1, "Features": ["options"]})
        guest = await HCSGuestBackend.connect(system, "linux")
        assert system.queries == [{"PropertyTypes": ["GuestConnection"]}]
        guest.check(DISK, MountConfig(options=["noatime"]), "/mnt/a")
        with pytest.raises(UnsupportedError):
            guest.check(DISK, MountConfig(encrypted=True, key=Secret("a")), "/mnt/a")

    @pytest.mark.parametrize(
        "told",
        [
            {},
            {"GuestConnectionInfo": None},
            {"GuestConnectionInfo": {}},
            {"GuestConnectionInfo": {"GuestDefinedCapabilities": None}},
            {"GuestConnectionInfo": {"GuestDefinedCapabilities": {"DumpStacksSupported": True}}},
            connection({"Version": 1, "Features": []}),
            connection({"Version": 2, "Features": ["options"]}),
            connection({"Features": ["options"]}),
        ],
    )
    async def test_to_another_agent(self, system: MemorySystem, told: dict[str, Any]) -> None:
        """Or to a version of ours that is not known here: it has none of our features."""
        system.told = told
        guest = await HCSGuestBackend.connect(system, "windows")
        assert guest.os_type == "windows"
        guest = await HCSGuestBackend.connect(system, "linux")
        with pytest.raises(UnsupportedError, match="ignore the options noatime"):
            guest.check(DISK, MountConfig(options=["noatime"]), "/mnt/a")

    @pytest.mark.parametrize(
        "told",
        [
            {"GuestConnectionInfo": []},
            {"GuestConnectionInfo": {"GuestDefinedCapabilities": "none"}},
            connection([]),
            connection({"Version": "1"}),
            connection({"Version": 1, "Features": "options"}),
            connection({"Version": 1, "Features": [1]}),
        ],
    )
    async def test_to_what_makes_no_sense(self, system: MemorySystem, told: dict[str, Any]) -> None:
        """Is refused, with the member that is wrong."""
        system.told = told
        with pytest.raises(BackendError, match=r"makes no sense: .* is an? \w+, not") as caught:
            await HCSGuestBackend.connect(system, "linux")
        assert "ask the guest what it can do" in str(caught.value)

    @pytest.mark.parametrize(
        ("code", "kind"),
        [
            (0x80370110, VMGoneError),
            (0x80370108, BackendError),
            (0x8037011E, OutcomeUnknownError),
        ],
    )
    async def test_refused(self, system: MemorySystem, code: int, kind: type[HotlunError]) -> None:
        """In the service's words."""
        system.refuse(code, '{"ErrorMessage":"so it is"}')
        with pytest.raises(kind, match=r"ask the guest what it can do: .*so it is") as caught:
            await HCSGuestBackend.connect(system, "linux")
        assert type(caught.value) is kind

    async def test_takes_what_the_constructor_takes(self, system: MemorySystem) -> None:
        """And asks nothing before that is right."""
        with pytest.raises(ValueError, match="os_type"):
            await HCSGuestBackend.connect(system, "dos")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="open_system"):
            await HCSGuestBackend.connect("my-vm", "linux")  # type: ignore[arg-type]
        assert system.queries == []


class TestRefusingBeforeAnythingIsSent:
    @pytest.mark.parametrize(
        ("os_type", "config"),
        [
            ("linux", {"options": ["noatime"]}),
            ("linux", {"ensure_filesystem": True, "filesystem": "xfs"}),
            (
                "linux",
                {"ensure_filesystem": True, "filesystem": "ext4", "preserve_data": True},
            ),
            ("linux", {"encrypted": True, "key": Secret("a")}),
            ("linux", {"lazy_unmount": True}),
            ("linux", {"verity": "ab" * 32}),
            ("windows", {"filesystem": "ntfs"}),
            ("windows", {"partition": 1}),
        ],
    )
    async def test_what_the_guest_would_do_in_part(
        self, system: MemorySystem, os_type: OSType, config: dict[str, Any]
    ) -> None:
        """Whoever asks: the Manager beforehand, or a mount."""
        guest = HCSGuestBackend(system, os_type)
        path = "/mnt/a" if os_type == "linux" else r"c:\a"
        mount = mounted(path, Slot(0, 1), READ_ONLY, **config)
        with pytest.raises(UnsupportedError):
            guest.check(READ_ONLY, mount.config, path)
        with pytest.raises(UnsupportedError) as caught:
            await guest.mount(mount)
        assert (caught.value.operation, caught.value.disk) == ("mount", READ_ONLY)
        assert system.documents == []

    @pytest.mark.parametrize("path", ["", "relative", "/a/../b", r"c:\a"])
    async def test_a_path_that_is_none(
        self, guest: HCSGuestBackend, system: MemorySystem, path: str
    ) -> None:
        """An empty one would be a mount nowhere, and a success."""
        with pytest.raises(UnsupportedError, match="another path"):
            await guest.mount(mounted(path))
        assert system.documents == []

    @pytest.mark.parametrize(
        ("os_type", "slot"),
        [
            ("linux", Slot(0, 64)),
            ("linux", Slot(4, 0)),
            ("windows", Slot(0, 64)),
            ("windows", Slot(1, 0)),
        ],
    )
    async def test_a_slot_that_is_not_there(
        self, system: MemorySystem, os_type: OSType, slot: Slot
    ) -> None:
        """A Linux agent of old dies of a fifth controller; Hyper-V has 64 LUNs."""
        guest = HCSGuestBackend(system, os_type)
        mount = mounted("/mnt/a" if os_type == "linux" else r"c:\a", slot)
        calls = {"mount": guest.mount(mount), "unmount": guest.unmount(mount)}
        if os_type == "linux":
            calls["unplug"] = guest.unplug(mount.attachment)
        else:
            await guest.unplug(mount.attachment)  # which it needs no word about
        for operation, call in calls.items():
            with pytest.raises(UnsupportedError, match=f"cannot {operation} .* at slot") as caught:
                await call
            assert (caught.value.operation, caught.value.slot) == (operation, slot)
        assert system.documents == []


@pytest.mark.parametrize("operation", OPERATIONS)
class TestRefusals:
    @pytest.mark.parametrize(
        ("code", "kind"),
        [
            (0x80004005, BackendError),
            (0x80070057, BackendError),
            (0x80070490, BackendError),
            (0x800700B7, BackendError),
            (0x80370105, BackendError),
            (0x80370108, BackendError),
            (0xC037010D, BackendError),
            (0x8037010D, BackendError),
            (0x87654321, BackendError),
            (0x80370110, BackendError),
            (0x8037010E, BackendError),
            (0x8037010A, OutcomeUnknownError),
            (0x80370109, OutcomeUnknownError),
            (0xC0370109, OutcomeUnknownError),
            (0x8037011E, OutcomeUnknownError),
        ],
    )
    async def test_tells_what_was_not_done_and_why(
        self,
        guest: HCSGuestBackend,
        system: MemorySystem,
        operation: str,
        code: int,
        kind: type[HotlunError],
    ) -> None:
        """Disk, slot, code, and the words that came with it: the guest's, or the service's."""
        system.refuse(code, '{"Error":-1,"ErrorMessage":"mounting: invalid argument"}')
        with pytest.raises(HotlunError, match="mounting: invalid argument") as caught:
            await OPERATIONS[operation](guest)
        error = caught.value
        assert type(error) is kind
        assert (error.operation, error.slot, error.disk) == (operation, Slot(1, 3), DISK)
        assert (error.code, error.detail) == (code, "mounting: invalid argument")
        assert DISK.path in str(error)
        assert "slot 1:3" in str(error)

    async def test_can_be_tried_again(
        self, guest: HCSGuestBackend, system: MemorySystem, operation: str
    ) -> None:
        """Nothing is remembered of it."""
        system.refuse(0x80004005)
        with pytest.raises(BackendError):
            await OPERATIONS[operation](guest)
        await OPERATIONS[operation](guest)
        assert len(system.documents) == 2

    async def test_of_another_kind_are_passed_on(
        self, guest: HCSGuestBackend, system: MemorySystem, operation: str
    ) -> None:
        """A bug is nobody's refusal."""
        system.lose(RuntimeError("a bug"))
        with pytest.raises(RuntimeError, match="a bug"):
            await OPERATIONS[operation](guest)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("code", [0x80370106, 0x80370107, 0x8037010E, 0x80370110])
class TestAVMThatHasEnded:
    """A guest can answer with the code for that; who believes it lets go of its disks."""

    @pytest.mark.parametrize("told", ["by code", "as stopped"])
    async def test_is_one_that_the_service_says_so_of(
        self, guest: HCSGuestBackend, system: MemorySystem, operation: str, code: int, told: str
    ) -> None:
        """It is asked itself, and nothing is relayed for that."""
        system.refuse(code)
        if told == "by code":
            system.refuse(0x8037010E)
        system.told = {"Stopped": True}
        with pytest.raises(VMGoneError) as caught:
            await OPERATIONS[operation](guest)
        assert (caught.value.operation, caught.value.code) == (operation, code)
        assert (len(system.documents), len(system.queries)) == (1, 1)

    @pytest.mark.parametrize("asked", [None, 0x8037011E, 0x80370105])
    async def test_is_none_while_that_is_the_guests_word(
        self,
        guest: HCSGuestBackend,
        system: MemorySystem,
        operation: str,
        code: int,
        asked: int | None,
    ) -> None:
        """The disks are attached still, as far as anybody can tell."""
        system.refuse(code)
        if asked is not None:
            system.refuse(asked)
        with pytest.raises(BackendError, match="does not say that the VM has ended") as caught:
            await OPERATIONS[operation](guest)
        assert type(caught.value) is BackendError
        assert (caught.value.operation, caught.value.code) == (operation, code)


class TestWhatGoesOn:
    """A request that has not ended when nobody waits any more."""

    async def test_is_waited_for_by_its_undoing(self, system: MemorySystem) -> None:
        """The unmount is not sent before the mount has ended."""
        guest = HCSGuestBackend(system, "linux", timeout=30)
        outcome = system.hang()
        with pytest.raises(OutcomeUnknownError, match="goes on") as caught:
            await guest.mount(mounted())
        assert (caught.value.operation, caught.value.slot) == ("mount", Slot(1, 3))
        undoing = asyncio.ensure_future(guest.unmount(mounted()))
        await asyncio.sleep(0)
        assert len(system.documents) == 1
        outcome.set_result(None)
        await undoing
        assert [d["GuestRequest"]["RequestType"] for d in system.documents] == ["Add", "Remove"]

    @pytest.mark.parametrize("error", [None, failure(0x80004005)])
    async def test_keeps_its_slot_busy_and_no_other(
        self, guest: HCSGuestBackend, system: MemorySystem, error: Exception | None
    ) -> None:
        """Until it has ended, however that is."""
        outcome = system.hang()
        with pytest.raises(OutcomeUnknownError):
            await guest.mount(mounted())
        for operation in OPERATIONS.values():
            with pytest.raises(OutcomeUnknownError, match=r"slot 1:3 as h1: what .* was not begun"):
                await operation(guest)
        assert len(system.documents) == 1
        await guest.mount(mounted("/mnt/b", Slot(1, 4)))
        assert len(system.documents) == 2
        outcome.set_result(error)
        for operation in OPERATIONS.values():
            await operation(guest)
        assert len(system.documents) == 5

    async def test_is_one_after_the_other_for_each_slot(self, system: MemorySystem) -> None:
        """Two mounts of one disk are not asked for at once, as the guest may mix them up."""
        guest = HCSGuestBackend(system, "linux", timeout=30)
        gate = system.stall()
        mounts = [
            asyncio.ensure_future(guest.mount(mounted(path, slot)))
            for path, slot in (("/mnt/a", None), ("/mnt/b", None), ("/mnt/c", Slot(0, 0)))
        ]
        await mounts[2]
        paths = [d["GuestRequest"]["Settings"]["MountPath"] for d in system.documents]
        assert paths == ["/mnt/a", "/mnt/c"]
        gate.set()
        await asyncio.gather(*mounts)
        assert len(system.documents) == 3

    async def test_after_a_cancelled_caller_is_waited_for_too(self, system: MemorySystem) -> None:
        """The guest cannot be told to stop."""
        guest = HCSGuestBackend(system, "linux", timeout=30)
        gate = system.stall()
        mounting = asyncio.ensure_future(guest.mount(mounted()))
        while not system.documents:
            await asyncio.sleep(0)
        mounting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await mounting
        undoing = asyncio.ensure_future(guest.unmount(mounted()))
        await asyncio.sleep(0)
        assert len(system.documents) == 1
        gate.set()
        await undoing
        assert len(system.documents) == 2


class TestAnAgentThatWasReplaced:
    """By one that would do less, without a word: for instance when the guest was started anew."""

    CONFIG = MountConfig(filesystem="ext4", ensure_filesystem=True, preserve_data=True)

    @pytest.fixture
    async def connected(self, system: MemorySystem) -> HCSGuestBackend:
        """To an agent that preserves data."""
        system.told = connection({"Version": 1, "Features": [messages.FEATURE_PRESERVE_DATA]})
        return await HCSGuestBackend.connect(system, "linux")

    @pytest.mark.parametrize(
        "told", [connection(None), connection({"Version": 1, "Features": ["options"]})]
    )
    async def test_is_not_asked_for_more(
        self, system: MemorySystem, connected: HCSGuestBackend, told: dict[str, Any]
    ) -> None:
        """The original one makes a file system over what was to be preserved."""
        system.told = told
        mount = GuestMount(ATTACHMENT, "/mnt/a", self.CONFIG)
        with pytest.raises(BackendError, match="another one now, without preserve-data") as caught:
            await connected.mount(mount)
        assert (caught.value.operation, caught.value.slot) == ("mount", ATTACHMENT.slot)
        assert system.documents == []
        await connected.mount(mounted())
        await connected.unmount(mount)
        assert len(system.documents) == 2

    async def test_by_its_like_is_as_good(
        self, system: MemorySystem, connected: HCSGuestBackend
    ) -> None:
        """And where the service says nothing, what it said first holds."""
        mount = GuestMount(ATTACHMENT, "/mnt/a", self.CONFIG)
        await connected.mount(mount)
        system.told = {}
        await connected.mount(mount)
        assert len(system.documents) == 2

    @pytest.mark.parametrize("code", [0x80370105, 0x8037011E])
    async def test_is_not_found_out(
        self, system: MemorySystem, connected: HCSGuestBackend, code: int
    ) -> None:
        """Then nothing is sent, and nothing is unknown."""
        system.refuse(code)
        with pytest.raises(BackendError, match="cannot mount"):
            await connected.mount(GuestMount(ATTACHMENT, "/mnt/a", self.CONFIG))
        assert system.documents == []


class TestKeys:
    @pytest.mark.parametrize("code", [0x80004005, 0x80310027, 0x8037010D, 0x8037011E])
    async def test_are_sent_and_shown_nowhere(
        self, system: MemorySystem, caplog: pytest.LogCaptureFixture, code: int
    ) -> None:
        """Not in a log, an error, its causes, or the document when it is printed."""
        caplog.set_level(logging.DEBUG)
        guest = HCSGuestBackend(system, "linux", features=OURS)
        mount = mounted(encrypted=True, key=Secret("sesame"))
        system.answer()  # what the agent can do
        system.refuse(code)
        with pytest.raises(HotlunError) as caught:
            await guest.mount(mount)
        (text,) = sent(system)
        assert "c2VzYW1l" in text
        shown = [
            caplog.text,
            repr(system.documents),
            repr(guest),
            *traceback.format_exception(caught.value),
            *(repr(vars(error)) for error in (caught.value, caught.value.__cause__)),
        ]
        assert "mount" in caplog.text
        for words in ("c2VzYW1l", "sesame"):
            assert not any(words in text for text in shown)


async def test_each_step_is_told_at_debug(
    guest: HCSGuestBackend, system: MemorySystem, caplog: pytest.LogCaptureFixture
) -> None:
    """With disk, slot, serial and path."""
    caplog.set_level(logging.DEBUG, "hotlun")
    await guest.mount(mounted())
    assert rf"mount {DISK} at slot 1:3 as h1 at '/mnt/a'" in caplog.text


async def test_the_guests_own_codes_are_judged_as_over_the_bridge() -> None:
    """A key that does not open the volume, for instance."""
    system = MemorySystem()
    backend = HCSGuestBackend(system, "linux", features=[messages.FEATURE_KEYS])
    config = MountConfig(encrypted=True, key=Secret("sesame"))
    system.answer()  # what the agent can do
    system.refuse(HResult.WRONG_KEY, '{"ErrorMessage":"no key opens it"}')
    with pytest.raises(WrongKeyError, match="no key opens it") as caught:
        await backend.mount(GuestMount(ATTACHMENT, "/m", config))
    assert caught.value.code == HResult.WRONG_KEY
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ('{"ErrorMessage":"held by sleep (pid 7)"}', "something in the guest still uses it"),
        ("", "wait until the VM runs"),
    ],
)
async def test_who_is_not_in_a_state_for_it(words: str, advice: str) -> None:
    """A guest says what is in the way; without a word it was the service, of the VM."""
    system = MemorySystem()
    system.refuse(HResult.INVALID_STATE, words)
    with pytest.raises(BackendError, match=advice):
        await HCSGuestBackend(system, "linux").unmount(mounted())


@pytest.mark.parametrize(("os_type", "told"), [("linux", "Windows"), ("windows", "Linux")])
async def test_of_another_system_than_it_runs(os_type: OSType, told: str) -> None:
    """A Linux agent would take Windows' unmount for one of nothing."""
    system = MemorySystem()
    system.told = {"RuntimeOsType": told}
    with pytest.raises(UnsupportedError, match=rf"runs {told.lower()}.*for {os_type}"):
        await HCSGuestBackend.connect(system, os_type)


async def test_of_a_system_with_no_name_for_people() -> None:
    """The guest has said it."""
    system = MemorySystem()
    system.told = {"RuntimeOsType": "\x1b]0;root\x07" + "x" * 100_000}
    with pytest.raises(UnsupportedError, match="make it for the right one") as caught:
        await HCSGuestBackend.connect(system, "linux")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
