"""Access to disks for a QEMU that runs as another user, given and taken back exactly."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.qemu import QEMU, attachment, connected, loop_device, make_image, running_qemu

from hotlun.backends import base
from hotlun.backends.access import AccessGrants
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.errors import BackendError, UnsupportedError
from hotlun.model import Disk, DiskKind, ImageFormat, Presence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.root

USER = "nobody"
UID = pwd.getpwnam(USER).pw_uid


def own_list(*paths: Path) -> str:
    """What getfacl says of these paths."""
    return subprocess.run(
        ["getfacl", "--numeric", "--absolute-names", *map(str, paths)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def listed(*paths: Path) -> str:
    """What getfacl says of these paths and all folders above them."""
    above = {folder for path in paths for folder in path.parents}
    return own_list(*sorted({*paths, *above}))


def setfacl(*arguments: str) -> None:
    subprocess.run(["setfacl", *arguments], check=True)


def image(folder: Path, name: str = "disk.raw", mode: int = 0o600) -> Path:
    path = folder / name
    path.write_bytes(bytes(1 << 20))
    path.chmod(mode)
    return path


def virtual(path: Path, *, read_only: bool = False) -> Disk:
    return Disk(str(path), DiskKind.VIRTUAL_DISK, read_only, format=ImageFormat.RAW)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the VM's user may not search, in another one; no other test is in there."""
    with tempfile.TemporaryDirectory() as private:
        path = Path(private, "disks")
        path.mkdir(mode=0o700)
        yield path


@pytest.fixture
def grants() -> AccessGrants:
    return AccessGrants()


@pytest.fixture
async def vm(tmp_path: Path) -> AsyncIterator[QEMU]:
    """A VM that runs as another user."""
    async with running_qemu(tmp_path, user=UID) as vm:
        yield vm


@pytest.mark.qemu
@pytest.mark.parametrize("vm_id", [USER, str(UID)])
@pytest.mark.parametrize("read_only", [False, True])
async def test_a_vm_of_another_user(
    host: QEMUHostBackend, folder: Path, vm_id: str, read_only: bool
) -> None:
    """Refused without the grant, attached with it, and refused again after the revoke."""
    path = image(folder)
    before = listed(path)
    disk = attachment(path, read_only=read_only)
    with pytest.raises(BackendError, match="give that user as vm_id"):
        await host.attach(disk)
    await host.grant_access(disk.disk, vm_id)
    assert listed(path) != before
    await host.attach(disk)
    await host.detach(disk)
    await host.revoke_access(disk.disk, vm_id)
    assert listed(path) == before
    with pytest.raises(BackendError, match="give that user as vm_id"):
        await host.attach(disk)


@pytest.mark.qemu
async def test_a_grant_of_an_earlier_connection(vm: QEMU, folder: Path) -> None:
    """With its plan whoever comes next detaches and revokes as if it had granted itself."""
    path, other = image(folder), image(folder, "other")
    before = listed(path, other)
    disk = attachment(path)
    async with connected(vm) as host:
        plan = base.plan_grant(host, disk.disk, USER)
        assert listed(path, other) == before
        await host.grant_access(disk.disk, USER)
        await host.attach(disk)
    async with connected(vm) as host:
        base.adopt_grant(host, disk.disk, USER, plan)
        assert await host.survey([disk]) == {disk.serial: Presence.PRESENT}
        await host.grant_access(virtual(other), USER)
        await host.detach(disk)
        await host.revoke_access(disk.disk, USER)
        second = attachment(other)
        await host.attach(second)
        await host.detach(second)
        await host.revoke_access(virtual(other), USER)
        assert listed(path, other) == before
        with pytest.raises(BackendError, match="give that user as vm_id"):
            await host.attach(disk)
        with pytest.raises(BackendError, match="not understood"):
            base.adopt_grant(host, disk.disk, USER, "{}")


@pytest.mark.qemu
async def test_a_grant_to_read_is_not_one_to_write(host: QEMUHostBackend, folder: Path) -> None:
    """The VM's user cannot open for writing what was granted for reading."""
    path = image(folder)
    reader = attachment(path, read_only=True)
    await host.grant_access(reader.disk, USER)
    with pytest.raises(BackendError, match="the VM's user may not open the disk"):
        await host.attach(attachment(path))
    await host.revoke_access(reader.disk, USER)


@pytest.mark.qemu
async def test_a_backing_file_is_granted_for_reading(vm: QEMU, folder: Path) -> None:
    """The images below an image are needed, too."""
    below = Path(make_image(folder / "base.qcow2", "qcow2"))
    path = Path(make_image(folder / "top.qcow2", "qcow2", "1M", "-b", str(below), "-F", "qcow2"))
    for file in (below, path):
        file.chmod(0o600)
    before = listed(path, below)
    disk = attachment(path, format=ImageFormat.QCOW2)
    async with QEMUHostBackend.connect(
        vm.qmp_socket, controllers=["scsi0"], allow_backing=[below]
    ) as host:
        await host.grant_access(disk.disk, USER)
        assert f"user:{UID}:r--" in listed(below)
        await host.attach(disk)
        await host.detach(disk)
        await host.revoke_access(disk.disk, USER)
    assert listed(path, below) == before


@pytest.mark.qemu
async def test_a_host_block_device_is_granted(host: QEMUHostBackend, tmp_path: Path) -> None:
    """The device's node gets the entry."""
    with loop_device(image(tmp_path)) as device:
        before = listed(Path(device))
        disk = attachment(device, kind=DiskKind.PHYSICAL_DISK, format=None)
        with pytest.raises(BackendError, match="the VM's user may not open the disk"):
            await host.attach(disk)
        await host.grant_access(disk.disk, USER)
        await host.attach(disk)
        await host.detach(disk)
        await host.revoke_access(disk.disk, USER)
        assert listed(Path(device)) == before


def test_only_what_is_missing_is_given(grants: AccessGrants, folder: Path) -> None:
    """A file that everybody may read, in a folder that everybody may search, stays as it is."""
    path = image(folder, mode=0o644)
    folder.chmod(0o711)
    before = listed(path), own_list(path), own_list(folder)
    grants.grant(virtual(path, read_only=True), USER)
    assert (own_list(path), own_list(folder)) == before[1:]
    grants.grant(virtual(path), USER)
    assert f"user:{UID}:rw-" in own_list(path)
    assert own_list(folder) == before[2]
    grants.revoke(virtual(path, read_only=True), USER)
    grants.revoke(virtual(path), USER)
    assert listed(path) == before[0]


def test_two_disks_share_their_folders_entry(grants: AccessGrants, folder: Path) -> None:
    """It goes with the last of them, in whatever order they go."""
    one, two = image(folder, "one"), image(folder, "two")
    before = listed(one, two)
    for disks in ((one, two), (two, one)):
        grants.grant(virtual(one), USER)
        grants.grant(virtual(two), USER)
        grants.grant(virtual(two), str(UID + 1))
        grants.revoke(virtual(disks[0]), USER)
        assert f"user:{UID}:--x" in listed(folder)
        grants.revoke(virtual(disks[1]), USER)
        assert f"user:{UID}:--x" not in listed(folder)
        assert f"user:{UID + 1}:--x" in listed(folder)
        grants.revoke(virtual(two), str(UID + 1))
        assert listed(one, two) == before


def test_a_grant_is_made_and_revoked_once(grants: AccessGrants, folder: Path) -> None:
    """Again makes no difference, nor does a revoke of what was never granted."""
    path = image(folder)
    before = listed(path)
    grants.revoke(virtual(path), USER)
    grants.grant(virtual(path), USER)
    grants.grant(virtual(path), USER)
    grants.revoke(virtual(path), USER)
    assert listed(path) == before
    grants.revoke(virtual(path), USER)
    assert listed(path) == before


@pytest.mark.parametrize(
    "entries",
    [
        "u:1:rwx,g:2:r-x,m::r--",
        "g::rw-,u:1:rw-,m::---",
        f"u:{UID}:r--,m::r--",
        f"u:{UID}:---,g::---",
    ],
)
def test_a_list_that_is_there_is_kept(grants: AccessGrants, folder: Path, entries: str) -> None:
    """Named entries and masks come back as they were, and nobody gains by the grant."""
    path = image(folder)
    setfacl("--no-mask", "--modify", entries, str(path))
    before = listed(path)
    grants.grant(virtual(path), USER)
    assert f"user:{UID}:rw-\n" in listed(path)
    grants.revoke(virtual(path), USER)
    assert listed(path) == before


def test_what_others_change_meanwhile_is_kept(grants: AccessGrants, folder: Path) -> None:
    """An entry that somebody else adds stays, a mode that somebody changes does, too."""
    path = image(folder, mode=0o640)
    grants.grant(virtual(path), USER)
    setfacl("--modify", "u:1:r--", str(path))
    folder.chmod(0o704)
    grants.revoke(virtual(path), USER)
    assert f"user:{UID}:" not in own_list(path)
    assert "user:1:r--\n" in own_list(path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o704
    assert "mask" not in own_list(folder)


def test_a_chmod_meanwhile_is_kept(grants: AccessGrants, folder: Path) -> None:
    """It lands on the mask, which is ours; the owning group gets what it was meant to have."""
    path = image(folder, mode=0o660)
    grants.grant(virtual(path), USER)
    path.chmod(0o640)
    grants.revoke(virtual(path), USER)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert "mask" not in own_list(path)


def test_a_disk_of_the_users_own(grants: AccessGrants, folder: Path) -> None:
    """The owner's own permissions are what counts, and are widened."""
    path = image(folder, mode=0o400)
    os.chown(path, UID, -1)
    before = listed(path)
    grants.grant(virtual(path), USER)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    grants.revoke(virtual(path), USER)
    assert listed(path) == before


def test_a_link_is_followed(grants: AccessGrants, folder: Path) -> None:
    """The file behind it gets the entry, and its folders; QEMU is given the same path."""
    path = image(folder)
    link = folder.parent / "link"
    link.symlink_to(path)
    before = listed(path)
    grants.grant(virtual(link), USER)
    assert f"user:{UID}:rw-" in listed(path)
    grants.revoke(virtual(link), USER)
    assert listed(path) == before


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_file_that_has_gone(grants: AccessGrants, folder: Path, is_replaced: bool) -> None:
    """Another file of that name is not touched, and the folders are as before."""
    path = image(folder)
    before = listed(folder)
    grants.grant(virtual(path), USER)
    path.rename(folder / "old")
    if is_replaced:
        image(folder)
        setfacl("--modify", f"u:{UID}:rw-", str(path))
    grants.revoke(virtual(path), USER)
    assert listed(folder) == before
    assert not is_replaced or f"user:{UID}:rw-" in listed(path)


def test_the_superuser_needs_nothing(grants: AccessGrants, folder: Path) -> None:
    """No entry is made for it."""
    path = image(folder)
    before = listed(path)
    grants.grant(virtual(path), "root")
    assert listed(path) == before
    grants.revoke(virtual(path), "0")


@pytest.mark.parametrize("vm_id", ["no-such-user", "4294967295", "-1", "", "a\0b"])
def test_an_unknown_user(grants: AccessGrants, folder: Path, vm_id: str) -> None:
    """The error names it, and nothing is changed."""
    path = image(folder)
    before = listed(path)
    with pytest.raises(BackendError, match="there is no user") as caught:
        grants.grant(virtual(path), vm_id)
    assert caught.value.disk == virtual(path)
    assert listed(path) == before


def test_half_a_grant_is_undone(grants: AccessGrants, folder: Path) -> None:
    """The file is missing: the folders are as before."""
    before = listed(folder)
    with pytest.raises(BackendError, match="there is no such file"):
        grants.grant(virtual(folder / "missing"), USER)
    assert listed(folder) == before


def test_somebody_elses_file(grants: AccessGrants, folder: Path) -> None:
    """Only its owner, or root, may give access to it."""
    path = image(folder)
    folder.chmod(0o755)
    before = own_list(path)
    folder.parent.chmod(0o755)
    os.seteuid(UID)
    try:
        with pytest.raises(BackendError, match="only the owner of a file, or root"):
            grants.grant(virtual(path), USER)
    finally:
        os.seteuid(0)
    assert own_list(path) == before


def test_what_is_no_file(grants: AccessGrants) -> None:
    """An extensible virtual disk has nothing to put a list on."""
    disk = Disk("h:1", DiskKind.EXTENSIBLE_VIRTUAL_DISK, provider="nbd")
    with pytest.raises(UnsupportedError, match="its provider has the files"):
        grants.grant(disk, USER)


def test_a_file_system_without_lists(grants: AccessGrants) -> None:
    """The error says that, and what else to do."""
    with pytest.raises(UnsupportedError, match="has no POSIX ACLs"):
        grants.grant(virtual(Path("/proc/self/environ")), USER)
