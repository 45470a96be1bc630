"""One suite that every pair of backends passes: what `backends.base` promises to a Manager."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from support.hcs_pairs import hcs_by_library_pair, hcs_on_qemu_pair, silent_hcs_on_qemu_pair
from support.pairs import TAKEN, memory_pair, real_pair

from hotlun import BackendError, GuestMount, MountConfig, Slot, SlotTakenError
from hotlun.backends import base
from hotlun.model import GuestSurvey, Presence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from support.pairs import Pair

    from hotlun import Attachment

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

SLOT = Slot(1, 3)
MOUNTED = MountConfig(filesystem="ext4")
PAIRS = {
    "memory": memory_pair,
    "qemu and bridge": real_pair,
    "hcs on qemu": hcs_on_qemu_pair,
    "hcs on qemu, silent": silent_hcs_on_qemu_pair,
    "hcs by its library": hcs_by_library_pair,
}
ON_A_VM = PAIRS.keys() - {"memory", "hcs by its library"}


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.vm, pytest.mark.root] if name in ON_A_VM else [])
        for name in PAIRS
    ],
)
async def backends(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pair]:
    """Each pair in turn."""
    async with PAIRS[request.param](tmp_path_factory.mktemp("disks")) as pair:
        yield pair


@pytest_asyncio.fixture(loop_scope="module")
async def pair(backends: Pair) -> AsyncIterator[Pair]:
    """The pair, with nothing attached before and after."""
    before = await backends.state()
    yield backends
    assert await backends.state() == before
    assert not before.attached


@pytest.fixture
def attachment(pair: Pair, request: pytest.FixtureRequest) -> Attachment:
    """One that nothing has been done with, on a disk of the test's own."""
    return pair.attachment(pair.disk(request.node.originalname), SLOT)


async def undo(pair: Pair, attachment: Attachment) -> None:
    await pair.guest.unplug(attachment)
    await pair.host.detach(attachment)


async def test_both_are_backends(pair: Pair) -> None:
    """They have the seven methods."""
    assert isinstance(pair.host, base.HostBackend)
    assert isinstance(pair.guest, base.GuestBackend)
    assert base.os_type(pair.guest) == "linux"


class TestAttaching:
    async def test_puts_the_disk_into_its_slot(self, pair: Pair, attachment: Attachment) -> None:
        """It is there when the call returns, and gone when the undoing one does."""
        await pair.host.attach(attachment)
        assert (await pair.state()).attached == {(pair.name(attachment), SLOT)}
        await undo(pair, attachment)
        assert (await pair.state()).attached == frozenset()

    async def test_refused_leaves_nothing(self, pair: Pair) -> None:
        """A disk that cannot be attached: an error for certain, and the slot is still free."""
        bad = pair.attachment(pair.bad_disk(), SLOT)
        with pytest.raises(BackendError):
            await pair.host.attach(bad)
        assert (await pair.state()).attached == frozenset()
        good = pair.attachment(pair.disk("after_a_bad_one"), SLOT)
        await pair.host.attach(good)
        await undo(pair, good)

    async def test_at_a_taken_slot_is_told_apart(self, pair: Pair) -> None:
        """The Manager tries another slot for the same disk, so that has to be free for it."""
        disk = pair.disk("taken")
        newcomer = pair.attachment(disk, TAKEN)
        with pytest.raises(SlotTakenError) as caught:
            await pair.host.attach(newcomer)
        assert (caught.value.slot, caught.value.disk) == (TAKEN, disk)
        await pair.host.detach(newcomer)
        elsewhere = pair.attachment(disk, SLOT)
        await pair.host.attach(elsewhere)
        await undo(pair, elsewhere)


class TestDetaching:
    async def test_what_was_never_attached(self, pair: Pair, attachment: Attachment) -> None:
        """Nothing to undo is no error."""
        await pair.host.detach(attachment)

    async def test_twice(self, pair: Pair, attachment: Attachment) -> None:
        """Nor is something undone already."""
        await pair.host.attach(attachment)
        await undo(pair, attachment)
        await pair.host.detach(attachment)

    async def test_late_spares_the_slots_next_disk(
        self, pair: Pair, attachment: Attachment
    ) -> None:
        """The undoing of an old attachment never hits a newer one in its slot."""
        await pair.host.attach(attachment)
        await undo(pair, attachment)
        for name in (attachment.disk, pair.disk("next")):
            newer = pair.attachment(name, SLOT)
            await pair.host.attach(newer)
            await pair.host.detach(attachment)
            assert (await pair.state()).attached == {(pair.name(newer), SLOT)}
            await undo(pair, newer)


class TestMounting:
    async def test_happens_and_is_undone(self, pair: Pair, attachment: Attachment) -> None:
        """Mounted when the call returns; unmounted, unplugged and detached likewise."""
        mount = GuestMount(attachment, "/mnt/contract", MOUNTED)
        await pair.host.attach(attachment)
        await pair.guest.mount(mount)
        state = await pair.state()
        assert state.mounted == {"/mnt/contract"}
        assert state.plugged == {SLOT}
        await pair.guest.unmount(mount)
        assert (await pair.state()).mounted == frozenset()
        await pair.guest.unplug(attachment)
        state = await pair.state()
        assert not state.plugged
        assert state.attached == {(pair.name(attachment), SLOT)}
        await pair.host.detach(attachment)

    async def test_of_a_disk_known_by_its_identity(
        self, pair: Pair, attachment: Attachment
    ) -> None:
        """What the host says that the guest is to find is what the guest finds.

        Where a host has no serials to give, it says none, and the mount does without.
        """
        await pair.host.attach(attachment)
        identity = base.identity(pair.host, attachment)
        assert (identity is not None) == pair.has_serials
        assert identity is None or identity.serial == attachment.serial
        mount = GuestMount(attachment, "/mnt/contract", MOUNTED, identity)
        await pair.guest.mount(mount)
        assert (await pair.state()).mounted == {"/mnt/contract"}
        await pair.guest.unmount(mount)
        await undo(pair, attachment)

    async def test_again_after_an_unmount(self, pair: Pair, attachment: Attachment) -> None:
        """An attachment can be mounted as often as it is unmounted."""
        await pair.host.attach(attachment)
        for path in ("/mnt/one", "/mnt/one", "/mnt/other"):
            mount = GuestMount(attachment, path, MOUNTED)
            await pair.guest.mount(mount)
            assert (await pair.state()).mounted == {path}
            await pair.guest.unmount(mount)
        await undo(pair, attachment)

    async def test_two_configs_side_by_side(self, pair: Pair, attachment: Attachment) -> None:
        """Each is unmounted alone."""
        one = GuestMount(attachment, "/mnt/one", MOUNTED)
        two = GuestMount(
            attachment, "/mnt/two", MountConfig(filesystem="ext4", options=["noatime"])
        )
        await pair.host.attach(attachment)
        await pair.guest.mount(one)
        await pair.guest.mount(two)
        await pair.guest.unmount(one)
        assert (await pair.state()).mounted == {"/mnt/two"}
        await pair.guest.unmount(two)
        await undo(pair, attachment)

    async def test_refused_leaves_nothing(self, pair: Pair, attachment: Attachment) -> None:
        """A mount that cannot be: an error for certain, and the disk can be mounted elsewhere."""
        await pair.host.attach(attachment)
        pair.refuse_mount("/proc/nowhere")
        with pytest.raises(BackendError):
            await pair.guest.mount(GuestMount(attachment, "/proc/nowhere", MOUNTED))
        assert (await pair.state()).mounted == frozenset()
        mount = GuestMount(attachment, "/mnt/elsewhere", MOUNTED)
        await pair.guest.mount(mount)
        await pair.guest.unmount(mount)
        await undo(pair, attachment)


class TestUnmountingAndUnplugging:
    async def test_what_was_never_there(self, pair: Pair, attachment: Attachment) -> None:
        """An attachment that the guest has never seen: nothing to undo."""
        await pair.guest.unmount(GuestMount(attachment, "/mnt/never", MOUNTED))
        await pair.guest.unplug(attachment)

    async def test_twice(self, pair: Pair, attachment: Attachment) -> None:
        """What was undone already is undone."""
        mount = GuestMount(attachment, "/mnt/contract", MOUNTED)
        await pair.host.attach(attachment)
        await pair.guest.mount(mount)
        for _ in range(2):
            await pair.guest.unmount(mount)
        for _ in range(2):
            await pair.guest.unplug(attachment)
        await pair.guest.unmount(mount)
        await pair.host.detach(attachment)

    async def test_without_a_mount(self, pair: Pair, attachment: Attachment) -> None:
        """A disk that was only attached: unmounting is nothing, unplugging is due."""
        await pair.host.attach(attachment)
        await pair.guest.unmount(GuestMount(attachment, "/mnt/never", MOUNTED))
        await undo(pair, attachment)

    async def test_after_the_detach(self, pair: Pair, attachment: Attachment) -> None:
        """Out of order and too late, there is nothing to undo either."""
        await pair.host.attach(attachment)
        await undo(pair, attachment)
        await pair.guest.unmount(GuestMount(attachment, "/mnt/never", MOUNTED))
        await pair.guest.unplug(attachment)

    async def test_at_a_path_of_another_disk(self, pair: Pair, attachment: Attachment) -> None:
        """Where another disk is mounted, this one is not: nothing to undo, and nothing undone."""
        other = pair.attachment(pair.disk("other"), Slot(1, 4))
        await pair.host.attach(attachment)
        await pair.host.attach(other)
        mount = GuestMount(attachment, "/mnt/contract", MOUNTED)
        await pair.guest.mount(mount)
        await pair.guest.unmount(GuestMount(other, "/mnt/contract", MOUNTED))
        assert (await pair.state()).mounted == {"/mnt/contract"}
        await pair.guest.unmount(mount)
        await undo(pair, attachment)
        await undo(pair, other)


class TestSurveying:
    async def test_says_what_there_is_after_each_verb(
        self, pair: Pair, attachment: Attachment
    ) -> None:
        """Attached, mounted, unmounted, let go, detached: each shows, and what is not is absent."""
        mount = GuestMount(attachment, "/mnt/contract", MOUNTED)
        nothing, device = GuestSurvey(), GuestSurvey(frozenset({attachment.serial}))
        await self.check(pair, attachment, mount, nothing, pair.never_attached)
        await pair.host.attach(attachment)
        await pair.guest.mount(mount)
        both = GuestSurvey(device.devices, frozenset({mount}))
        await self.check(pair, attachment, mount, both, Presence.PRESENT)
        await pair.guest.unmount(mount)
        await self.check(pair, attachment, mount, device, Presence.PRESENT)
        await pair.guest.unplug(attachment)
        await self.check(pair, attachment, mount, nothing, Presence.PRESENT)
        await pair.host.detach(attachment)
        await self.check(pair, attachment, mount, nothing, Presence.ABSENT)

    async def check(
        self,
        pair: Pair,
        attachment: Attachment,
        mount: GuestMount,
        found: GuestSurvey,
        presence: Presence,
    ) -> None:
        """Asked twice, as to ask changes nothing."""
        for _ in range(2):
            said = await base.guest_survey(pair.guest, [attachment], [mount])
            assert said == pair.guest_says(found)
            seen = await base.host_survey(pair.host, [attachment])
            assert seen == pair.host_says({attachment.serial: presence})

    async def test_of_what_was_not_asked_for_says_nothing(
        self, pair: Pair, attachment: Attachment
    ) -> None:
        """Another disk is there and mounted; only who asks for it hears of it."""
        other = pair.attachment(pair.disk("not_asked_for"), Slot(1, 4))
        mount = GuestMount(attachment, "/mnt/contract", MOUNTED)
        others = GuestMount(other, "/mnt/other", MOUNTED)
        for one in (mount, others):
            await pair.host.attach(one.attachment)
            await pair.guest.mount(one)
        for attachments, mounts in (
            ([], []),
            ([attachment], []),
            ([], [others]),
            ([attachment], [others]),
            ([attachment, other], [mount, others]),
        ):
            found = GuestSurvey(frozenset(a.serial for a in attachments), frozenset(mounts))
            said = await base.guest_survey(pair.guest, attachments, mounts)
            assert said == pair.guest_says(found)
            seen = await base.host_survey(pair.host, attachments)
            assert seen == pair.host_says({a.serial: Presence.PRESENT for a in attachments})
        for one in (mount, others):
            await pair.guest.unmount(one)
            await undo(pair, one.attachment)

    async def test_tells_a_slots_disks_apart(self, pair: Pair, attachment: Attachment) -> None:
        """What was in the slot before, or is in another, is not there; nor is it at the path."""
        earlier = pair.attachment(attachment.disk, SLOT)
        elsewhere = pair.attachment(pair.disk("elsewhere"), Slot(1, 4))
        mount = GuestMount(attachment, "/mnt/contract", MOUNTED)
        mounts = [
            mount,
            GuestMount(earlier, "/mnt/contract", MOUNTED),
            GuestMount(elsewhere, "/mnt/contract", MOUNTED),
            GuestMount(attachment, "/mnt/other", MOUNTED),
        ]
        await pair.host.attach(attachment)
        await pair.guest.mount(mount)
        found = await base.guest_survey(pair.guest, [attachment, earlier, elsewhere], mounts)
        assert found == pair.guest_says(
            GuestSurvey(frozenset({attachment.serial}), frozenset({mount}))
        )
        seen = await base.host_survey(pair.host, [attachment, earlier, elsewhere])
        assert seen == pair.host_says(
            {
                attachment.serial: Presence.PRESENT,
                earlier.serial: Presence.ABSENT,
                elsewhere.serial: pair.never_attached,
            }
        )
        await pair.guest.unmount(mount)
        await undo(pair, attachment)


class TestGranting:
    async def test_is_undone(self, pair: Pair) -> None:
        """Granted when the call returns, and not any more when the undoing one does."""
        disk = pair.disk("granted")
        await pair.host.grant_access(disk, pair.vm_id)
        assert (await pair.state()).granted == {disk.path}
        await pair.host.revoke_access(disk, pair.vm_id)
        assert (await pair.state()).granted == frozenset()

    async def test_once_or_twice_is_the_same(self, pair: Pair) -> None:
        """What is granted twice is revoked at once; what is not granted can be revoked."""
        disk = pair.disk("granted_twice")
        await pair.host.revoke_access(disk, pair.vm_id)
        await pair.host.grant_access(disk, pair.vm_id)
        await pair.host.grant_access(disk, pair.vm_id)
        await pair.host.revoke_access(disk, pair.vm_id)
        await pair.host.revoke_access(disk, pair.vm_id)

    async def test_revokes_only_its_own(self, pair: Pair) -> None:
        """Another disk keeps its grant."""
        one, two = pair.disk("grant_one"), pair.disk("grant_two")
        await pair.host.grant_access(one, pair.vm_id)
        await pair.host.grant_access(two, pair.vm_id)
        await pair.host.revoke_access(one, pair.vm_id)
        assert (await pair.state()).granted == {two.path}
        await pair.host.revoke_access(two, pair.vm_id)
