"""What the agent says is there: by serial and number, whatever goes on, and nothing changed."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from support.guest import FakeGuest, image_of, loop_disk
from support.mounted import unmount_all

from hotlun.agent import syscalls
from hotlun.agent.errors import RequestError
from hotlun.agent.queries import DiskQuery, Found, answered
from hotlun.bridge.documents import Fields, MessageError
from hotlun.bridge.messages import MAX_SURVEYED_DISKS, MAX_SURVEYED_MOUNTS, OTHER, OWN, UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    guest = FakeGuest(tmp_path / "guest")
    yield guest
    guest.close()


def ask(guest: FakeGuest, *disks: dict[str, Any]) -> list[Found]:
    return guest.disks.survey(DiskQuery.read_all(Fields({"Disks": list(disks)})))


def asked(lun: int, serial: str = "", **mount: Any) -> dict[str, Any]:
    return {"Lun": lun, "Serial": serial, "Mounts": [mount] if mount else []}


def files(root: Path) -> dict[str, object]:
    """All there is below, and where links lead."""
    return {
        str(path): path.readlink() if path.is_symlink() else path.is_dir() or path.read_bytes()
        for path in root.rglob("*")
    }


class TestDevices:
    def test_by_their_serial(self, guest: FakeGuest) -> None:
        """The one asked for, another, one that says nothing, none; any, if no serial is asked."""
        guest.add_disk(1, "sda", "8:0", serial="h1")
        guest.add_disk(2, "sdb", "8:16", serial="h9")
        guest.add_disk(3, "sdc", "8:32")
        found = ask(guest, asked(1, "h1"), asked(2, "h2"), asked(3, "h3"), asked(4, "h4"))
        assert [one.device for one in found] == [OWN, OTHER, UNKNOWN, ""]
        found = ask(guest, asked(1), asked(3), asked(4))
        assert [one.device for one in found] == [OWN, OWN, ""]

    def test_that_have_lost_their_driver(self, guest: FakeGuest) -> None:
        """They are there until they are let go: the host must not take one away yet."""
        guest.add_disk(1, "sda", "8:0", serial="h1")
        shutil.rmtree(guest.sysfs(1) / "block")
        link = {"MountPath": "/run/link", "BlockDevice": True}
        found = ask(guest, asked(1, "h1", **link), asked(1, "h2"), asked(1))
        assert found == [Found(OWN, [False]), Found(OTHER, []), Found(OWN, [])]

    def test_on_a_controller_that_is_not_there(self, guest: FakeGuest) -> None:
        """Nothing is there either."""
        assert ask(guest, {"Controller": 3, "Serial": "h1"}) == [Found("", [])]

    def test_each_controller_is_looked_for_once(
        self, guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not once a disk: that is most of the work in an emulated guest."""
        looked: list[str] = []
        names = guest.kernel.names

        def noted(path: str, stem: str = "") -> list[str]:
            looked.append(path)
            return names(path, stem)

        monkeypatch.setattr(guest.kernel, "names", noted)
        for lun in range(8):
            guest.add_disk(lun, f"sd{lun}", f"8:{16 * lun}", serial="h1")
        found = ask(guest, *(asked(lun, "h1") for lun in range(8)))
        assert {one.device for one in found} == {OWN}
        assert looked.count(f"{guest.kernel.sys}/bus/vmbus/devices") == 1

    def test_a_slot_that_makes_no_sense_is_not_known(self, guest: FakeGuest) -> None:
        """And the others are answered for."""
        guest.add_disk(1, "sda", "8:0", serial="h1")
        guest.add_disk(1, "sdz", "8:80", serial="h1")
        guest.add_disk(2, "sdb", "8:16", serial="h2")
        found = ask(guest, asked(1, "h1"), asked(2, "h2"))
        assert [one.device for one in found] == [UNKNOWN, OWN]


class TestLinks:
    def test_to_the_device_and_no_other(self, guest: FakeGuest, tmp_path: Path) -> None:
        """To its node; of a partition to that; and only if the disk is the one asked for."""
        guest.add_disk(1, "sda", "8:0", {"sda2": "8:2"}, serial="h1")
        link = tmp_path / "link"
        here = {"MountPath": str(link), "BlockDev": True}
        for target, whole, second in (
            (f"{guest.kernel.dev}/sda", True, False),
            (f"{guest.kernel.dev}/sda2", False, True),
            (f"{guest.kernel.dev}/sdb", False, False),
            (str(tmp_path), False, False),
        ):
            link.symlink_to(target)
            assert ask(guest, asked(1, "h1", **here))[0].mounts == [whole]
            assert ask(guest, asked(1, "h1", **here, Partition=2))[0].mounts == [second]
            assert ask(guest, asked(1, "h1", **here, Partition=1))[0].mounts == [False]
            assert ask(guest, asked(1, "h2", **here))[0].mounts == [False]
            assert ask(guest, asked(1, "h1", MountPath=str(link)))[0].mounts == [False]
            link.unlink()
        assert ask(guest, asked(1, "h1", **here))[0].mounts == [False]

    def test_what_another_request_is_busy_with(self, guest: FakeGuest, tmp_path: Path) -> None:
        """The path can be claimed: a survey looks, and neither waits nor is in the way."""
        guest.add_disk(1, "sda", "8:0", serial="h1")
        path = str(tmp_path / "link")
        os.symlink(f"{guest.kernel.dev}/sda", path)
        with guest.mounts.claim(path):
            assert ask(guest, asked(1, "h1", MountPath=path, BlockDev=True))[0].mounts == [True]
        with guest.mounts.claim(path):
            pass

    def test_nothing_is_changed(self, guest: FakeGuest, tmp_path: Path) -> None:
        """No directory is made, no file is written, no descriptor is left open."""
        guest.add_disk(1, "sda", "8:0", serial="h1")
        before, descriptors = files(tmp_path), len(os.listdir("/proc/self/fd"))
        path = str(tmp_path / "a" / "b")
        for kind in ({}, {"BlockDev": True}, {"Encrypted": True}):
            ask(guest, asked(1, "h1", MountPath=path, **kind))
            ask(guest, asked(1, "h1", MountPath=str(tmp_path), **kind))
            ask(guest, asked(1, "h1", MountPath=f"{guest.sys}/bus/scsi/x/y", **kind))
        assert files(tmp_path) == before
        assert len(os.listdir("/proc/self/fd")) == descriptors

    def test_by_a_way_that_no_agent_goes(self, guest: FakeGuest, tmp_path: Path) -> None:
        """Behind a file, or a link that somebody else can change, nothing is mounted."""
        guest.add_disk(1, "sda", "8:0", serial="h1")
        folder = tmp_path / "theirs"
        folder.mkdir()
        os.chown(folder, 65534, 65534)
        (folder / "way").symlink_to(tmp_path)
        (tmp_path / "file").touch()
        for path in (folder / "way" / "m", tmp_path / "file" / "m", tmp_path / "file"):
            assert ask(guest, asked(1, "h1", MountPath=str(path))) == [Found(OWN, [False])]


@pytest.mark.root
class TestMounts:
    def test_in_sight_from_this_disk(self, tmp_path: Path) -> None:
        """Not elsewhere, not of a disk under another serial, and not what is covered."""
        guest = FakeGuest(tmp_path / "guest", real_devices=True)
        image = image_of(tmp_path / "image", 4, "mke2fs", "-q", "-t", "ext4")
        place, other = tmp_path / "place", tmp_path / "other"
        place.mkdir()
        try:
            with loop_disk(guest, 1, image) as node:
                (guest.sysfs(1) / "vpd_pg80").write_bytes(b"\0\x80\0\x02h1")
                mounts = [{"MountPath": str(path)} for path in (place, other)]
                query = {"Lun": 1, "Serial": "h1", "Mounts": mounts}
                assert ask(guest, query) == [Found(OWN, [False, False])]
                syscalls.mount(node, str(place), "ext4", 0)
                assert ask(guest, query) == [Found(OWN, [True, False])]
                assert ask(guest, {**query, "Serial": "h2"}) == [Found(OTHER, [False, False])]
                syscalls.mount("none", str(place), "tmpfs", 0)
                assert ask(guest, query) == [Found(OWN, [False, False])]
                syscalls.unmount(str(place))
                guest.remove_disk(1)
                assert ask(guest, query) == [Found("", [False, False])]
                syscalls.unmount(str(place))
        finally:
            unmount_all(tmp_path)
            guest.close()


class TestQueries:
    @pytest.mark.parametrize(
        "members",
        [
            {"Disks": 7},
            {"Disks": {}},
            {"Disks": [7]},
            {"Disks": [{"Lun": 300}]},
            {"Disks": [{"Lun": "1"}]},
            {"Disks": [{"Serial": 1}]},
            {"Disks": [{"Mounts": "/mnt"}]},
            {"Disks": [{"Mounts": ["/mnt"]}]},
            {"Disks": [{"Mounts": [{}]}]},
            {"Disks": [{"Mounts": [{"MountPath": 5}]}]},
            {"Disks": [{"Mounts": [{"MountPath": "/m", "Partition": -1}]}]},
            {"Disks": [{"Mounts": [{"MountPath": "/m", "BlockDev": "yes"}]}]},
            {"Disks": [{"Mounts": [{"MountPath": "/m", "Encrypted": 1}]}]},
            {"Disks": [{"Mounts": [{"MountPath": "/m", "Verity": "hash"}]}]},
            {"Disks": [{}] * (MAX_SURVEYED_DISKS + 1)},
            {"Disks": [{"Mounts": [{"MountPath": "/m"}] * (MAX_SURVEYED_MOUNTS // 2 + 1)}] * 2},
        ],
    )
    def test_of_wrong_types_or_too_many(self, members: dict[str, Any]) -> None:
        """Are no document of the protocol."""
        with pytest.raises(MessageError):
            DiskQuery.read_all(Fields(members))

    @pytest.mark.parametrize(
        "mount",
        [
            {"MountPath": "relative"},
            {"MountPath": "/"},
            {"MountPath": "/a/../b"},
            {"MountPath": "/m", "Verity": {"RootHash": "no"}},
        ],
    )
    def test_that_make_no_sense(self, mount: dict[str, Any]) -> None:
        """Are refused as for a mount."""
        with pytest.raises(RequestError):
            DiskQuery.read_all(Fields({"Disks": [{"Mounts": [mount]}]}))

    def test_of_what_only_says_how(self) -> None:
        """The members of a mount that tell no device are passed over, whatever they hold."""
        mount = {"MountPath": "//m/./", "Options": 7, "Key": "x", "Size": -1}
        [disk] = DiskQuery.read_all(Fields({"Disks": [{"mounts": [mount]}]}))
        assert disk.mounts[0].path == "/m"

    def test_answers_leave_out_what_is_not_there(self) -> None:
        """As the protocol has it: zero, false and empty are missing."""
        found = [Found("", [False]), Found(OTHER, []), Found(OWN, [False, True])]
        assert answered(found, [False, True, False]) == {
            "Disks": [
                {},
                {"Device": "Other", "Busy": True},
                {"Device": "Own", "Mounts": [False, True]},
            ]
        }
