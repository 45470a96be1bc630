"""The fakes can be asked what they have, told what happens, and lose things on their own."""

from __future__ import annotations

import asyncio

import pytest

from hotlun import BackendError, GuestMount, MountConfig, OutcomeUnknownError, Slot
from hotlun.backends import base
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.events import GuestReset, VMResumed
from hotlun.model import Attachment, Disk, DiskKind, GuestSurvey, Presence

MOUNTED = MountConfig(filesystem="ext4")
PATH = "/mnt/one"


def attachment(lun: int) -> Attachment:
    disk = Disk(f"/disks/{lun}.vhdx", DiskKind.VIRTUAL_DISK)
    return Attachment(Slot(0, lun), disk, f"h{lun}")


ONE, OTHER = attachment(1), attachment(2)
MOUNT = GuestMount(ONE, PATH, MOUNTED)


class Pair:
    """A host and a guest that knows it, with one disk attached and mounted."""

    def __init__(self) -> None:
        self.host = MemoryHostBackend()
        self.guest = MemoryGuestBackend(self.host)

    async def has(self) -> GuestSurvey | None:
        return await self.guest.survey([ONE, OTHER], [MOUNT])

    def assert_honest(self) -> None:
        assert self.host.violations == []
        assert self.guest.violations == []


@pytest.fixture
async def pair() -> Pair:
    pair = Pair()
    await pair.host.attach(ONE)
    await pair.guest.mount(MOUNT)
    return pair


THERE = GuestSurvey(frozenset({ONE.serial}), frozenset({MOUNT}))
DEVICE_ONLY = GuestSurvey(frozenset({ONE.serial}))
NOTHING = GuestSurvey()


class TestSurveying:
    async def test_the_host(self, pair: Pair) -> None:
        """What is attached is present, what is not is absent, what was not asked is not named."""
        found = await base.host_survey(pair.host, [ONE, OTHER])
        assert found == {ONE.serial: Presence.PRESENT, OTHER.serial: Presence.ABSENT}
        assert await base.host_survey(pair.host, [OTHER]) == {OTHER.serial: Presence.ABSENT}

    async def test_another_attachment_in_the_slot_is_not_the_one(self, pair: Pair) -> None:
        """A serial speaks of one attachment, wherever the slot went since."""
        earlier = Attachment(ONE.slot, ONE.disk, "h9")
        assert await pair.host.survey([earlier]) == {"h9": Presence.ABSENT}
        assert await pair.guest.survey([earlier], []) == NOTHING

    async def test_the_guest_after_each_verb(self, pair: Pair) -> None:
        """Mounted, unmounted, let go."""
        assert await pair.has() == THERE
        await pair.guest.unmount(MOUNT)
        assert await pair.has() == DEVICE_ONLY
        await pair.guest.unplug(ONE)
        assert await pair.has() == NOTHING
        pair.assert_honest()

    async def test_a_mount_with_another_config_is_another(self, pair: Pair) -> None:
        """Only what is as it was asked for is said to be there."""
        otherwise = GuestMount(ONE, PATH, MountConfig(filesystem="xfs"))
        assert await pair.guest.survey([ONE], [otherwise]) == DEVICE_ONLY

    async def test_a_guest_without_a_host(self) -> None:
        """It knows the disks that something was mounted from and that it has not let go."""
        guest = MemoryGuestBackend()
        assert await guest.survey([ONE], [MOUNT]) == NOTHING
        await guest.mount(MOUNT)
        assert await guest.survey([ONE], [MOUNT]) == THERE
        guest.reset()
        assert await guest.survey([ONE], [MOUNT]) == DEVICE_ONLY
        await guest.unplug(ONE)
        assert await guest.survey([ONE], [MOUNT]) == NOTHING

    async def test_backends_that_cannot_be_asked(self) -> None:
        """They say None, and it is no call of theirs."""
        host = MemoryHostBackend(surveys=False)
        guest = MemoryGuestBackend(host, surveys=False)
        assert await base.host_survey(host, [ONE]) is None
        assert await base.guest_survey(guest, [ONE], [MOUNT]) is None
        assert host.calls == guest.calls == []

    async def test_fails_is_lost_and_waits_as_scripted(self, pair: Pair) -> None:
        """A survey is an operation like the others, and has no effect."""
        for backend in (pair.host, pair.guest):
            backend.fail("survey", BackendError("scripted"))
            backend.lose("survey", happened=True, at=2)
            backend.lose("survey", at=3)
        for error in (BackendError, OutcomeUnknownError, OutcomeUnknownError):
            with pytest.raises(error):
                await pair.host.survey([ONE])
            with pytest.raises(error):
                await pair.guest.survey([ONE], [MOUNT])
        gate = pair.guest.stall("survey")
        asking = asyncio.ensure_future(pair.has())
        await gate.reached.wait()
        await pair.guest.unmount(MOUNT)
        gate.open()
        assert await asking == DEVICE_ONLY
        assert (pair.host.count("survey"), pair.guest.count("survey")) == (3, 4)
        assert not pair.host.effects["survey"]
        assert not pair.guest.effects["survey"]


class TestVanishing:
    async def test_a_disk(self, pair: Pair) -> None:
        """A pulled disk is gone with its mounts, and all that undoes it is normal."""
        pair.host.vanish(ONE.serial)
        assert await pair.host.survey([ONE]) == {ONE.serial: Presence.ABSENT}
        assert await pair.has() == NOTHING
        assert pair.guest.mounted == {PATH: MOUNT}
        await pair.guest.unmount(MOUNT)
        await pair.guest.unplug(ONE)
        await pair.host.detach(ONE)
        assert (pair.guest.mounted, pair.guest.plugged) == ({}, set())
        assert pair.host.effects == {"attach": 1, "lost": 1}
        assert pair.guest.effects == {"mount": 1, "unmount": 1}
        pair.assert_honest()

    async def test_a_disk_undone_in_any_order(self, pair: Pair) -> None:
        """The guest lets a pulled disk go with its dead mounts still there."""
        pair.host.vanish(ONE.serial)
        await pair.host.detach(ONE)
        await pair.guest.unplug(ONE)
        await pair.guest.unmount(MOUNT)
        assert pair.guest.mounted == {}
        pair.assert_honest()

    async def test_a_disk_cannot_be_mounted_any_more(self, pair: Pair) -> None:
        """Whoever does not know yet is refused as by a guest, and violates nothing."""
        pair.host.vanish(ONE.serial)
        pair.host.identity(ONE)
        with pytest.raises(BackendError, match="not there any more"):
            await pair.guest.mount(GuestMount(ONE, "/mnt/two", MOUNTED))
        await pair.host.attach(OTHER)
        with pytest.raises(BackendError, match="a disk that is gone is mounted there"):
            await pair.guest.mount(GuestMount(OTHER, PATH, MOUNTED))
        pair.assert_honest()

    async def test_its_slot_and_disk_are_free(self, pair: Pair) -> None:
        """The same disk can be attached to the same slot, under another serial."""
        pair.host.vanish(ONE.serial)
        again = Attachment(ONE.slot, ONE.disk, "h9")
        await pair.host.attach(again)
        await pair.host.detach(ONE)
        assert pair.host.attached == {ONE.slot: again}
        pair.assert_honest()

    async def test_a_mount(self, pair: Pair) -> None:
        """Undone by somebody in the guest: an unmount has nothing left to do."""
        pair.guest.vanish(PATH)
        assert await pair.has() == DEVICE_ONLY
        await pair.guest.unmount(MOUNT)
        assert pair.guest.effects == {"mount": 1, "lost": 1}
        await pair.guest.mount(MOUNT)
        assert await pair.has() == THERE
        pair.assert_honest()

    async def test_what_is_not_there(self, pair: Pair) -> None:
        """A test that has it vanish is wrong, and is told so."""
        with pytest.raises(ValueError, match="'h2' is attached"):
            pair.host.vanish(OTHER.serial)
        with pytest.raises(ValueError, match="nothing is mounted at '/mnt/two'"):
            pair.guest.vanish("/mnt/two")


class TestResetting:
    async def test_forgets_the_mounts_and_finds_the_disks(self, pair: Pair) -> None:
        """After a reset nothing is mounted, and what was let go is there if still attached."""
        await pair.host.attach(OTHER)
        await pair.guest.unplug(OTHER)
        pair.guest.reset()
        both = frozenset({ONE.serial, OTHER.serial})
        assert await pair.has() == GuestSurvey(both)
        assert pair.guest.effects["lost"] == 1
        await pair.guest.unmount(MOUNT)
        assert not pair.guest.effects["unmount"]
        await pair.guest.mount(GuestMount(OTHER, "/mnt/two", MOUNTED))
        await pair.guest.mount(MOUNT)
        pair.assert_honest()

    async def test_a_detach_straight_after_it(self, pair: Pair) -> None:
        """Nothing is mounted from a disk since then: the guest holds none of it."""
        pair.guest.reset()
        await pair.host.detach(ONE)
        assert await pair.has() == NOTHING
        pair.assert_honest()


async def test_listeners_hear_until_they_stop(pair: Pair) -> None:
    """Each that watches is told each event, in order; stopping twice is stopping."""
    for backend in (pair.host, pair.guest):
        heard: list[object] = []
        stop = base.watch(backend, heard.append)
        also = base.watch(backend, heard.append)
        backend.tell(VMResumed())
        also()
        backend.tell(GuestReset(by_guest=True))
        stop()
        stop()
        backend.tell(VMResumed())
        assert heard == [VMResumed(), VMResumed(), GuestReset(by_guest=True)]
